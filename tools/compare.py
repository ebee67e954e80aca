#!/usr/bin/env python
"""``kd-compare`` in a checkout: ``python tools/compare.py -h``."""

from projects.kd.commands.compare import run

if __name__ == "__main__":
    run()
