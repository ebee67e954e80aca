#!/usr/bin/env python
"""``kd-convert`` in a checkout: ``python tools/convert.py -h``."""

from projects.kd.commands.convert import run

if __name__ == "__main__":
    run()
