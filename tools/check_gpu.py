#!/usr/bin/env python
"""``kd-check-gpu`` in a checkout: ``python tools/check_gpu.py -h``."""

from projects.kd.commands.check_gpu import run

if __name__ == "__main__":
    run()
