"""Registration of the built-in data sets."""

from .shapes import register_shapes

register_shapes()
