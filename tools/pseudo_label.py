#!/usr/bin/env python
"""``kd-pseudo-label`` in a checkout: ``python tools/pseudo_label.py -h``."""

from projects.kd.commands.pseudo_label import run

if __name__ == "__main__":
    run()
