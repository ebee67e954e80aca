#!/usr/bin/env python
"""``kd-evaluate`` in a checkout: ``python tools/evaluate.py -h``."""

from projects.kd.commands.evaluate import run

if __name__ == "__main__":
    run()
