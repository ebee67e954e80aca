"""Comparisons, reports, measurements: what is no part of a training step."""
