"""Weights: what a file of them holds, and reading them into a detector."""
