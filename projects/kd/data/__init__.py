"""Data sets, their registration and checks, and the loading of training batches."""
