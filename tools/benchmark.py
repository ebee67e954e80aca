#!/usr/bin/env python
"""``kd-benchmark`` in a checkout: ``python tools/benchmark.py -h``."""

from projects.kd.commands.benchmark import run

if __name__ == "__main__":
    run()
