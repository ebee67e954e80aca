"""Checkpoints of the plain student. They survive a kill, and one line says why one does not fit.

A file holds ``model`` (state dict of the student, as stock detectron2 loads it), ``distill`` (state
dict of the imitation heads, when distilling), ``trainer`` (optimizers, schedules, seed, ...),
``ema`` (averaged student, with SOLVER.EMA) and ``iteration`` (the last finished one).
"""

from __future__ import annotations

import glob
import os
import re
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, UserError, disk_fault
from ..files import replacing
from ..weights.files import modules_in
from ..weights.loading import SafeCheckpointer

_NAMES = re.compile(r"model_(\d{7}|final)\.pth")  # files that training writes
_NUMBERED = re.compile(r"model_\d{7}\.pth")
# entries of weight files that say nothing about the architecture
_BOOKKEEPING = ("num_batches_tracked", "pixel_mean", "pixel_std", "cell_anchors")


class DistillCheckpointer(SafeCheckpointer):
    """Saves and loads the student and what training needs to go on.

    Args:
        student: the plain detector.
        save_dir: OUTPUT_DIR.
        allow_pickle: KD.ALLOW_PICKLE.
        allow_missing_distill: KD.ALLOW_MISSING_DISTILL.
        use_ema: load the entry ``ema`` in place of ``model`` (evaluation).
        complete: refuse weights that leave a part of the student random (evaluation).
        keep: SOLVER.KEEP_CHECKPOINTS, how many checkpoints of the training stay; 0 = all.
        **checkpointables: objects with ``state_dict``/``load_state_dict``; the imitation heads are
            ``distill``. Those that communicate need :meth:`save` called on all ranks.
    """

    def __init__(
        self,
        student: nn.Module,
        save_dir: str = "",
        *,
        allow_pickle: bool = False,
        allow_missing_distill: bool = False,
        use_ema: bool = False,
        complete: bool = False,
        keep: int = 0,
        **checkpointables: Any,
    ):
        super().__init__(student, save_dir, allow_pickle=allow_pickle, **checkpointables)
        self.allow_missing_distill = allow_missing_distill
        self.use_ema = use_ema
        self.complete = complete
        self.keep = keep
        self.whole = False  # the weights read last left no part of the student random
        self._resuming = False
        self.last_saved = -1  # the iteration of the last checkpoint written by this process

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth in ``save_dir`` and point ``last_checkpoint`` to it.

        Call it on all ranks; only the main process writes. The file appears under its name when it
        is complete and on the disk, so a kill at any moment leaves the one before in use.

        Raises:
            ConfigError: the disk is full or the folder cannot be written.
        """
        data = {"model": self.model.state_dict()}
        data |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        data |= kwargs
        if not self.save_dir or not self.save_to_disk:
            return
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            os.makedirs(self.save_dir, exist_ok=True)
            for leftover in glob.glob(os.path.join(glob.escape(self.save_dir), ".model_*.partial")):
                os.remove(leftover)  # of a run that was killed while it saved
            with replacing(path) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(basename)
        except (OSError, RuntimeError) as error:
            good = self.last_good()
            raise ConfigError(
                f"OUTPUT_DIR: cannot write checkpoint {path}: {disk_fault(error) or error}; "
                + (f"{good} is whole, go on from it with --resume" if good else "there is none yet")
            ) from error
        self.last_saved = kwargs.get("iteration", -1)
        self._remove_old(basename)

    def _remove_old(self, last: str) -> None:
        """Remove what KEEP_CHECKPOINTS has no place for, but never what a resume would read."""
        paths = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        paths = [p for p in paths if _NUMBERED.fullmatch(os.path.basename(p))]
        paths.sort(key=os.path.getmtime, reverse=True)
        for path in paths[self.keep :] if self.keep else ():
            if os.path.basename(path) != last:
                os.remove(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file, atomically."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def last_good(self) -> str:
        """Path of the newest complete checkpoint in ``save_dir``, or ""."""
        return next(iter(self.usable_checkpoints()), "")

    def resume_file(self) -> str:
        """The file that ``--resume`` continues from, "" if ``save_dir`` holds none.

        Raises:
            ConfigError: ``last_checkpoint`` is garbled, or names a file that is missing or
                truncated.
        """
        pointer = os.path.join(self.save_dir, "last_checkpoint")
        if not os.path.lexists(pointer):  # killed between the first checkpoint and it, or new
            return self.last_good()
        name = _read_pointer(pointer)
        path = os.path.join(self.save_dir, name) if name else ""
        if path and is_readable(path):
            return path
        usable = self.last_good()
        hint = (
            f"to go on from {usable} write its file name there"
            if usable
            else "no other usable checkpoint is there, start again in another OUTPUT_DIR"
        )
        what = f"names {path}, which is missing or truncated" if path else "names no file"
        raise ConfigError(f"--resume: {pointer} {what}; {hint}")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Continue from the last checkpoint if ``resume`` and there is one, else load weights.

        Args:
            path: MODEL.WEIGHTS; "" leaves the student as it is.
            resume: whether to look into ``save_dir`` first.

        Returns:
            The entries of the file that nothing has consumed; with ``iteration`` when resumed.

        Raises:
            ConfigError: missing, truncated, of another architecture, or not safe to read.
        """
        file = self.resume_file() if resume else ""
        if not file:
            if resume:
                start = f"the weights {path}" if path else "random weights"
                self.logger.warning(
                    f"--resume: {self.save_dir} holds no checkpoint, this starts anew from {start}"
                )
            self.load(path, checkpointables=[])
            return {}
        key, self.key, self._resuming = self.key, "--resume", True
        try:
            return self.load(file)
        except UserError:
            raise
        except Exception as error:  # an entry that this version does not write so
            raise ConfigError(
                f"--resume: '{file}' cannot be continued, its entries are not those that this "
                f"version writes ({type(error).__name__}: {error}); give it as MODEL.WEIGHTS "
                "without --resume to start a new run from its weights"
            ) from error
        finally:
            self.key, self._resuming = key, False

    def usable_checkpoints(self) -> list[str]:
        """Complete checkpoints of training in ``save_dir``, the newest first."""
        paths = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        paths = [p for p in paths if _NAMES.fullmatch(os.path.basename(p)) and is_readable(p)]
        return sorted(paths, key=os.path.getmtime, reverse=True)

    def _load_model(self, checkpoint):
        if self._resuming:
            self._check_complete(checkpoint)
        if self.use_ema:
            if "ema" not in checkpoint:
                raise ConfigError(
                    f"SOLVER.EMA.EVAL_ONLY: '{self._name}' holds no averaged weights (ema); "
                    "False evaluates those that it holds"
                )
            checkpoint["model"] = checkpoint["ema"]
        names = [name for name in checkpoint["model"] if not name.endswith(_BOOKKEEPING)]
        incompatible = super()._load_model(checkpoint)
        self._check_match(len(names), incompatible)
        return incompatible

    def _check_complete(self, checkpoint: dict) -> None:
        for key in self.checkpointables:
            if key in checkpoint:
                continue
            if key == "ema":
                self.logger.warning(
                    f"--resume: {self._name} has no averaged weights (SOLVER.EMA was off); the "
                    "average starts at its weights"
                )
                continue
            if key == "distill" and self.allow_missing_distill:
                self.logger.warning(
                    f"{self._name} has no state of the imitation heads; they start anew"
                )
                continue
            advice = "set KD.ALLOW_MISSING_DISTILL True, or " if key == "distill" else ""
            raise ConfigError(
                f"--resume: '{self._name}' has no entry '{key}'; {advice}give the file as "
                "MODEL.WEIGHTS without --resume to start a new run from its weights"
            )

    def _check_match(self, total: int, incompatible) -> None:
        unmatched = [n for n in incompatible.unexpected_keys if not n.endswith(_BOOKKEEPING)]
        unmatched += [name for name, *_ in incompatible.incorrect_shapes]
        missing = [n for n in incompatible.missing_keys if not n.endswith(_BOOKKEEPING)]
        if self._resuming and (unmatched or missing):
            raise ConfigError(
                f"--resume: '{self._name}' is of another model than MODEL in this config: "
                f"{len(unmatched)} entries do not fit and {len(missing)} are missing, e.g. "
                f"{(unmatched + missing)[0]}"
            )
        lacking = missing + [name for name, *_ in incompatible.incorrect_shapes]
        self.whole = not lacking
        if self.complete and lacking:
            raise ConfigError(
                f"{self.key}: '{self._name}' lacks {len(lacking)} of the parameters and buffers of "
                f"the student as MODEL describes it, which would be evaluated with random ones: "
                f"{modules_in(lacking)}; its {len(self.names)} entries are {modules_in(self.names)}"
                "; --untrained evaluates it all the same"
            )
        matched = total - len(unmatched)
        if matched <= 0 or matched < total / 2:
            raise ConfigError(
                f"{self.key}: '{self._name}' is of another architecture than "
                f"{type(self.model).__name__} as MODEL describes it: {max(matched, 0)} of its "
                f"{total} entries fit, which are {modules_in(self.names)} (bare backbone weights "
                f"need '?matching_heuristics=True' after the file name)"
            )


class Heads:
    """The imitation heads as the checkpoint's ``distill`` entry.

    Args:
        heads: as in the training wrapper.
    """

    def __init__(self, heads: nn.ModuleDict):
        self.heads = heads

    def state_dict(self) -> dict:
        """Parameters and buffers of all heads."""
        return self.heads.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """All of them, exactly; ConfigError if they are those of other heads."""
        try:
            self.heads.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"--resume: the checkpoint's imitation heads are not those of KD.HEADS: {error}"
            ) from error


def _read_pointer(path: str) -> str:
    """The file name in ``last_checkpoint``; "" if that holds anything else."""
    try:
        with open(path, "rb") as file:
            name = file.read(1024).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if name and os.path.basename(name) == name and name.isprintable() else ""


def is_readable(path: str) -> bool:
    """Whether a checkpoint file is complete; reads its directory and not the tensors' data."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever torch finds wrong with it
        return False
    return True


def output_checkpoint(folder: str) -> str:
    """Name of a checkpoint that training left in a folder, "" if there is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return next((name for name in names if _NAMES.fullmatch(name)), "")
