#!/usr/bin/env python
"""``kd-visualize`` in a checkout: ``python tools/visualize.py -h``."""

from projects.kd.commands.visualize import run

if __name__ == "__main__":
    run()
