#!/usr/bin/env python
"""``kd-compare`` in a checkout: ``python tools/compare.py -h``."""

from projects.start import compare

if __name__ == "__main__":
    compare()
