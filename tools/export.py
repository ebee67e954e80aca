#!/usr/bin/env python
"""``kd-export`` in a checkout: ``python tools/export.py -h``."""

from projects.kd.commands.export import run

if __name__ == "__main__":
    run()
