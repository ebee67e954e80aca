#!/usr/bin/env python
"""``kd-benchmark`` in a checkout: ``python tools/benchmark.py -h``."""

from projects.start import benchmark

if __name__ == "__main__":
    benchmark()
