"""What KD.TEACHER.CACHE is going to take, said before the first iteration, and how it does."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from ..config import LazyNode
from ..levels import scaled_size
from ..teacher_cache import MIB, expected_size
from ..teacher_link import TeacherLink

logger = logging.getLogger(__name__)


class CacheReport(HookBase):
    """Estimates the space that answers of the teachers need, and logs how many were found.

    The scalar ``kd/teacher_cache_hits`` (of several teachers ``kd/<name>_teacher_cache_hits``) is
    the share of images since the last one for which the teacher did not run.

    Args:
        cfg: of the run.
        period: iterations between two scalars.
    """

    def __init__(self, cfg: CfgNode, period: int):
        self.cfg = cfg
        self.period = period
        self.links: list[TeacherLink] = []

    def before_train(self) -> None:
        """The estimate."""
        links = getattr(self.trainer._unwrapped, "links", ())
        self.links = [link for link in links if link.teacher.cache is not None]
        images = getattr(self.trainer._trainer.data_loader, "images", 0)
        for link in self.links:
            if images and not isinstance(self.cfg, LazyNode):
                logger.info("%s.CACHE: %s", link.key, self._estimate(link, images))

    def _estimate(self, link: TeacherLink, images: int) -> str:
        teacher, cache, node = link.teacher, link.teacher.cache, self.cfg.INPUT
        longest = node.MAX_SIZE_TRAIN or max(node.MIN_SIZE_TRAIN)
        largest = scaled_size((max(node.MIN_SIZE_TRAIN), longest), link.scale)
        shapes = teacher.form.only_read(teacher.model.backbone.output_shape())
        forms, size = expected_size(self.cfg, shapes, teacher.own_canvas(largest))
        total = images * forms * size / MIB
        where = f"files in {cache.folder}" if cache.folder else "memory"
        return (
            f"{images} images in {forms} forms (flips, sizes), up to {size / MIB:.2f} MiB each "
            f"({', '.join(shapes)}): {total:.0f} MiB at most for each size that batches are padded "
            f"to; {cache.taken / MIB:.0f} of {cache.capacity / MIB:.0f} MiB of {where} are taken"
        )

    def after_step(self) -> None:
        """The share that was found."""
        if (self.trainer.iter + 1) % self.period == 0:
            for link in self.links:
                share = link.teacher.cache.hits()
                name = f"{link.name.lower()}_" if link.name else ""
                if share is not None:
                    self.trainer.storage.put_scalar(f"kd/{name}teacher_cache_hits", share)
