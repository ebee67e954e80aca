#!/usr/bin/env python
"""Train or evaluate a detector: ``python train_net.py -h``. Installed, this is ``kd-train``."""

from projects.start import train

if __name__ == "__main__":
    train()
