"""One training loop for every precision, number of optimizers and accumulation length."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping

import torch
from detectron2.engine.train_loop import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from ..errors import ConfigError, TrainingError
from ..seeding import STEP, seed_generators
from ..weights.files import modules_in
from .optim import GradientClip
from .processes import FIND_UNUSED, idle_parameters, unexpectedly_idle
from .resume import load_optimizer

WRITER_WINDOW = 20  # iterations over which detectron2's writers take the median of a scalar


class TrainLoop(SimpleTrainer):
    """Forward, backward, clip and step, with metrics that wait on the device.

    One iteration runs ``accum_steps`` batches, averages their gradients and steps once. Under DDP
    the gradients are exchanged with the last batch only. Averaging equals one big batch exactly
    when the loss is a mean with a fixed normaliser; detectron2's RetinaNet and FCOS divide by a
    running count of foreground anchors, updated with every batch.

    A step is taken only if every loss and, but for float16, every gradient is finite: reading that
    one flag is the only synchronisation of the loop with the device. In float16 the gradient
    scaler decides about the gradients, as it must.

    Args:
        model: returns a dict of scalar losses for a batch; may be wrapped in DDP.
        data_loader: iterable of batches without end.
        optimizers: by name; the first one is the main one (``self.optimizer``).
        amp_dtype: autocast to float16 or bfloat16; None = no autocast.
        accum_steps: batches per optimizer step.
        clips: gradient clipping by optimizer name.
        active: by optimizer name, tells from the iteration whether it steps at all. An optimizer
            that sits out leaves its parameters and state bit-identical (zero gradients would not:
            weight decay and momentum move parameters too).
        gather_period: iterations between two transfers of the losses to the event storage.
        seed: see :mod:`projects.kd.seeding`.
        stop_requested: gives the signal that asks this process to stop, 0 for none. After the step
            in which any process has one, ``stopping`` holds it on all of them.
        last_checkpoint: gives the file to go back to, for the error message.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        amp_dtype: torch.dtype | None = None,
        accum_steps: int = 1,
        clips: Mapping[str, GradientClip] | None = None,
        active: Mapping[str, Callable[[int], bool]] | None = None,
        gather_period: int = 20,
        seed: int = 0,
        stop_requested: Callable[[], int] = lambda: 0,
        last_checkpoint: Callable[[], str] = lambda: "",
    ):
        main = next(iter(optimizers.values()))
        super().__init__(model, data_loader, main, gather_metric_period=gather_period)
        self.optimizers = dict(optimizers)
        self.amp_dtype = amp_dtype
        self.accum_steps = accum_steps
        self.clips = dict(clips or {})
        self.active = dict(active or {})
        self.seed = seed
        self.stop_requested = stop_requested
        self.stopping = 0
        self.last_checkpoint = last_checkpoint
        self.max_iter = math.inf
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)
        self._waiting: list[tuple[int, float, list[str], torch.Tensor]] = []
        self._to_replay: dict[str, list[tuple[float, int]]] = {}

    def distribute(self, wrap: Callable[[nn.Module, list[str]], nn.Module]) -> None:
        """Make the model that of several processes; all of them must call it together.

        The first batch goes through a copy of the model, to know which parameters get a gradient.
        It is still the first that the model itself sees.

        Args:
            wrap: of the model and the names of parameters without a gradient, see
                :func:`~projects.kd.engine.processes.wrap_ddp`.
        """
        batches = self._data_loader_iter
        batch = next(batches)
        self._data_loader_iter_obj = itertools.chain([batch], batches)
        probe = copy.deepcopy(self.model)
        with EventStorage(self.iter), self._repeatable():
            self._seed(micro_step=0)
            sum(self._losses(probe, copy.deepcopy(batch)).values()).backward()
        self.model = wrap(self.model, idle_parameters(probe))

    def run_step(self) -> None:
        """One iteration; see the class."""
        assert self.model.training, "the model was switched to eval mode during training"
        self._replay_metrics()
        with record_function("kd/optimizer"):
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        data_time = 0.0
        for micro_step in range(self.accum_steps):
            start = time.perf_counter()
            with record_function("kd/loader"):
                batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            # after loading: a loader without workers uses the same generators
            self._seed(micro_step)
            with self._exchange_gradients(micro_step == self.accum_steps - 1), self._repeatable():
                for name, loss in self._backward(batch).items():
                    part = loss.detach().double() / self.accum_steps
                    losses[name] = losses[name] + part if name in losses else part
        self.after_backward()
        self._refuse_idle()
        with record_function("kd/optimizer"):
            self._step(losses)
        with record_function("kd/logging"):
            entry = self.iter, data_time, list(losses), torch.stack([*losses.values()])
            self._waiting.append(entry)
            if (self.iter + 1) % self.gather_metric_period == 0 or self.iter + 1 >= self.max_iter:
                self.write_waiting_metrics()

    def _exchange_gradients(self, now: bool):
        if now or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _repeatable(self):
        # TorchScript losses (fvcore's focal loss) change their backward formula after the first
        # call of a process: a resumed run would differ in the last bits. Costs nothing on a CPU;
        # on a GPU the fused kernels stay, as exactness is out of reach there anyway.
        if self.device.type == "cpu":
            return torch.jit.optimized_execution(False)
        return contextlib.nullcontext()

    def _seed(self, micro_step: int) -> None:
        place = (STEP, self.seed, self.iter, comm.get_rank(), micro_step)
        seed_generators(*place, cuda=self.device.type == "cuda")

    def _losses(self, model: nn.Module, batch) -> dict[str, torch.Tensor]:
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            try:
                losses = model(batch)
            except FloatingPointError as error:  # detectron2's proposal code
                raise TrainingError(f"iteration {self.iter}: {error} {self._advice()}") from error
        return {"loss": losses} if isinstance(losses, torch.Tensor) else losses

    def _backward(self, batch) -> dict[str, torch.Tensor]:
        with record_function("kd/forward"):
            losses = self._losses(self.model, batch)
            total = self.scaler.scale(sum(losses.values()) / self.accum_steps)
        with record_function("kd/backward"):
            total.backward()
        return losses

    def _refuse_idle(self) -> None:
        """Gradients that the processes have not exchanged, since some of them did not come."""
        names = unexpectedly_idle(self.model)
        if names:
            raise ConfigError(
                f"{FIND_UNUSED}: set it to True, since iteration {self.iter} gives no gradient to "
                f"{len(names)} parameters that had one in the first: {modules_in(names)}"
            )

    def _step(self, losses: dict[str, torch.Tensor]) -> None:
        stepping = [
            name
            for name in self.optimizers
            if name not in self.active or self.active[name](self.iter)
        ]
        parameters, norms = {}, {}
        for name in stepping:
            optimizer = self.optimizers[name]
            self.scaler.unscale_(optimizer)
            parameters[name] = [
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            norm_type = self.clips[name].norm_type if name in self.clips else 2.0
            norms[name] = get_total_norm([p.grad for p in parameters[name]], norm_type)
        self._refuse_non_finite(losses, norms)
        for name in stepping:
            if name in self.clips:
                self.clips[name](parameters[name], norms[name])
            self.scaler.step(self.optimizers[name])
        if stepping:
            self.scaler.update()

    def _refuse_non_finite(self, losses: dict, norms: dict) -> None:
        values = list(losses.values())
        if not self.scaler.is_enabled():
            values += [norm.to(self.device, torch.float64) for norm in norms.values()]
        finite = torch.isfinite(torch.stack(values)).all()
        received = self.stop_requested()
        if comm.get_world_size() > 1:  # all ranks stop together
            votes = torch.stack([finite.int(), torch.full_like(finite, -received, dtype=torch.int)])
            torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
            finite, received = votes[0], -int(votes[1])
        self.stopping = self.stopping or received
        if finite.item():
            return
        mine = {name: value.item() for name, value in losses.items()}
        mine |= {f"gradient norm ({name})": value.item() for name, value in norms.items()}
        if self.scaler.is_enabled():
            mine = {name: mine[name] for name in losses}
        ranks = comm.all_gather(mine)
        bad, good = {}, {}
        for name in mine:
            on_ranks = [rank.get(name, 0.0) for rank in ranks]
            value = sum(on_ranks) / len(on_ranks)
            (good if math.isfinite(value) else bad)[name] = value
        raise TrainingError(
            f"iteration {self.iter}: not finite: {_listing(bad)} (finite: {_listing(good)}); "
            f"the step was not taken. {self._advice()}"
        )

    def _advice(self) -> str:
        file = self.last_checkpoint()
        return (
            f"Last good checkpoint: {file or 'none yet'}. Lower SOLVER.BASE_LR or a loss weight, "
            "or enable SOLVER.CLIP_GRADIENTS."
        )

    def write_waiting_metrics(self) -> None:
        """Put the losses of the iterations since the last call into the event storage.

        Each value is the mean over accumulation and ranks; every iteration keeps its own entry.
        One device transfer and one gather. All ranks must call it together.
        """
        if not self._waiting:
            return
        values = iter(torch.cat([entry[3] for entry in self._waiting]).tolist())
        mine = [
            (iteration, data_time, {name: next(values) for name in names})
            for iteration, data_time, names, _ in self._waiting
        ]
        self._waiting.clear()
        ranks = comm.gather(mine)
        if not comm.is_main_process():
            return
        for entries in zip(*ranks, strict=True):
            iteration = entries[0][0]
            means = {
                name: sum(entry[2].get(name, 0.0) for entry in entries) / len(entries)
                for name in entries[0][2]
            }
            scalars = {"data_time": max(entry[1] for entry in entries)}
            scalars["total_loss"] = sum(means.values())
            get_event_storage().put_scalars(cur_iter=iteration, **scalars, **means)
        if self.scaler.is_enabled():
            get_event_storage().put_scalar("grad_scale", self.scaler.get_scale(), False)

    def _replay_metrics(self) -> None:
        """After a resume, give the writers the iterations their medians reach back to."""
        for name, entries in self._to_replay.items():
            for value, iteration in entries:
                get_event_storage().put_scalar(name, value, cur_iter=iteration)
        self._to_replay = {}

    def _recent_metrics(self) -> dict[str, list[tuple[float, int]]]:
        if not has_event_storage():
            return {}
        storage = get_event_storage()
        smoothed = [name for name, smooth in storage.smoothing_hints().items() if smooth]
        return {name: storage.history(name).values()[-WRITER_WINDOW:] for name in smoothed}

    def state_dict(self) -> dict:
        """Optimizers, gradient scaler and the last metrics. All ranks must call it together."""
        self.write_waiting_metrics()
        state = {"iteration": self.iter}
        state["optimizers"] = {name: o.state_dict() for name, o in self.optimizers.items()}
        state["scaler"] = self.scaler.state_dict()
        state["recent"] = self._recent_metrics()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ConfigError: the checkpoint has other optimizers or parameter groups.
        """
        self.iter = state["iteration"]
        saved = state["optimizers"]
        if set(saved) != set(self.optimizers):
            raise ConfigError(
                f"--resume: the checkpoint has the optimizers {sorted(saved)}, this config "
                f"{sorted(self.optimizers)}; KD.HEADS has changed. To start a new run from these "
                "weights give the file as MODEL.WEIGHTS without --resume"
            )
        for name, optimizer in self.optimizers.items():
            load_optimizer(name, optimizer, saved[name])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self._to_replay = state["recent"]


def _listing(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.6g}" for name, value in values.items()) or "none"
