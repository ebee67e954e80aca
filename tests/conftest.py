"""Puts this folder on the path of all tests, for the helpers beside it, and keeps torch small."""

import torch

torch.set_num_threads(1)
