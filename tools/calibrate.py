#!/usr/bin/env python
"""``kd-calibrate`` in a checkout: ``python tools/calibrate.py -h``."""

from projects.kd.commands.calibrate import run

if __name__ == "__main__":
    run()
