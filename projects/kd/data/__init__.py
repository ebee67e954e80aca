"""Data sets, mappers and loaders; importing this registers the built-in ones and their keys."""

from . import detr_augmentation, ignored_regions, images, register, unlabelled

__all__ = ["detr_augmentation", "ignored_regions", "images", "register", "unlabelled"]
