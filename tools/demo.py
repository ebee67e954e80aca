#!/usr/bin/env python
"""``kd-demo`` in a checkout: ``python tools/demo.py -h``."""

from projects.kd.commands.demo import run

if __name__ == "__main__":
    run()
