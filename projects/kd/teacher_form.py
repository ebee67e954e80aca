"""The form in which a frozen teacher's backbone runs: cheaper, and the same result.

Batch norms go into the convolutions before them (the same but for rounding), and levels and stages
that nothing reads are not computed (the same to the bit). The teacher itself stays as it is: what
runs is a copy of its backbone that shares all tensors but the fused ones, and its hooks.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import FPN
from detectron2.modeling.backbone import ResNet
from torch import nn

from .errors import ConfigError, one_line
from .fusing import fuse_batch_norms, is_batch_norm
from .taps import FeatureTaps, TapSpec

# of the largest value of a map; what rounding may change in fp32
TOLERANCE = 1e-5
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SHARED = (*_HOOKS, "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_SHARED += ("_forward_pre_hooks_with_kwargs",)

logger = logging.getLogger(__name__)


@dataclass
class TeacherForm:
    """What runs in place of a teacher's backbone.

    Attributes:
        backbone: the module to call.
        levels: those of its output that are right; None = all.
        text: how it runs, for the log.
    """

    backbone: nn.Module
    levels: frozenset[str] | None = None
    text: str = "as it is"
    _source: nn.Module | None = None
    _state: tuple = ()
    _tensors: list[torch.Tensor] = field(default_factory=list)
    _watched: list[nn.Module] = field(default_factory=list)

    def is_stale(self) -> bool:
        """Whether the teacher was changed since: other weights, another device, new hooks."""
        return self._source is not None and self._state != self._look()

    def _watch(self, source: nn.Module) -> None:
        self._source = source
        self._tensors = [*source.parameters(), *source.buffers()]
        self._watched = list(_rewritten(source))
        self._state = self._look()

    def _look(self) -> tuple:
        return (
            sum(x._version for x in self._tensors),
            sum(x.data_ptr() for x in self._tensors),
            sum(len(getattr(m, name)) for m in self._watched for name in _HOOKS),
        )

    def only_read(self, features: Mapping) -> Mapping:
        """The backbone's output without the levels that were not computed."""
        if self.levels is None:
            return features
        return {name: value for name, value in features.items() if name in self.levels}


def choose_form(
    model: nn.Module,
    specs: Mapping[str, TapSpec],
    levels: Collection[str] | None,
    fuse: bool,
    side: int = 64,
) -> TeacherForm:
    """The cheapest form of a teacher's backbone that gives the same; one line in the log.

    Batch norms stay where a tap or a hook reads one of them, or the convolution before it, and
    where a look at a small image of noise differs by more than :data:`TOLERANCE`.

    Args:
        model: the teacher, in evaluation mode.
        specs: of all taps that are placed on it.
        levels: that heads read of the backbone's output; None = all.
        fuse: KD.TEACHER.FUSE.
        side: of that image, in pixels; the backbone takes it.
    """
    plain, kept, said = model.backbone, None, []
    on_meta = any(x.is_meta for x in plain.parameters())  # there is nothing to compute with
    norms = sum(map(is_batch_norm, plain.modules())) if fuse and not on_meta else 0
    if norms:
        kept, number, why = _fused(model, specs, side)
        if why:
            said.append(f"with its batch norms, since {why}")
        elif number:
            said.append(f"with {number} of {norms} batch norms in the convolutions before them")
    form = TeacherForm(kept or plain)
    if levels is not None and _only_features(specs) and _can_be_cut(plain):
        lean = kept or _copied(plain)
        gone = _leave_out(lean, set(levels))
        why = "" if on_meta or not gone else _checked(model, lean, specs, side, gone)
        if why:  # the copy does not do what the backbone does
            form, said = TeacherForm(plain), [f"as it is, since {why}"]
        elif gone:
            form = TeacherForm(lean, frozenset(plain.output_shape()) - set(gone))
            said.append(f"without {', '.join(gone)}, which no head reads")
    if said:
        form.text = "; ".join(said)
        form._watch(plain)
    logger.info("the teacher's backbone runs %s", form.text)
    return form


def _fused(
    model: nn.Module, specs: Mapping[str, TapSpec], side: int
) -> tuple[nn.Module | None, int, str]:
    """A copy of the backbone with fused norms, their number, and why there is none."""
    why = _who_reads(model.backbone)
    if why:
        return None, 0, why
    holder = nn.Module().eval()
    try:
        holder.backbone = _copied(model.backbone)
        number = fuse_batch_norms(holder)
    except Exception as error:  # a backbone of somebody's own that takes no such image
        return None, 0, _ending(error)
    why = _checked(model, holder.backbone, specs, side) if number else ""
    return (None, 0, why) if why or not number else (holder.backbone, number, "")


def _checked(
    model: nn.Module, other: nn.Module, specs: Mapping[str, TapSpec], side: int, gone=()
) -> str:
    """Why another form of the backbone is not used, or ""; without the levels that are gone."""
    try:
        return _difference(model, other, specs, side, gone)
    except Exception as error:
        return _ending(error)


def _ending(error: Exception) -> str:
    return f"a small image of noise ends in {type(error).__name__}: {one_line(error)}"


def _only_features(specs: Mapping[str, TapSpec]) -> bool:
    """Whether taps read the backbone's output as levels, or what lies below its pyramid."""
    return all(
        spec.run is None
        and (name == "features" or all(p.startswith("backbone.bottom_up") for p in spec.paths))
        for name, spec in specs.items()
    )


def _copied(backbone: nn.Module) -> nn.Module:
    """A copy of the modules whose tensors and hooks are those of the original."""
    memo: dict[int, object] = {id(x): x for x in (*backbone.parameters(), *backbone.buffers())}
    for module in backbone.modules():
        for name in _SHARED:
            hooks = getattr(module, name)
            memo[id(hooks)] = hooks
    return copy.deepcopy(backbone, memo)


def _rewritten(backbone: nn.Module) -> Iterator[nn.Module]:
    """Modules whose own input or output differs once norms are fused.

    A convolution of detectron2 has its norm inside, and gives the same as before.
    """
    for module in backbone.modules():
        if is_batch_norm(module) or (isinstance(module, nn.Conv2d) and not _has_norm(module)):
            yield module


def _has_norm(module: nn.Module) -> bool:
    return isinstance(module, Conv2d) and module.norm is not None


def _who_reads(backbone: nn.Module) -> str:
    names = {module: name for name, module in backbone.named_modules()}
    for module in _rewritten(backbone):
        plain_conv = isinstance(module, Conv2d)  # without a norm: stays as it is
        if not plain_conv and any(getattr(module, name) for name in _HOOKS):
            return f"a tap or hook reads backbone.{names[module]}"
    return ""


@torch.no_grad()
def _difference(
    model: nn.Module, other: nn.Module, specs: Mapping[str, TapSpec], side: int, gone
) -> str:
    """How another form differs from the plain backbone on an image of noise, or ""."""
    parameter = next(model.backbone.parameters())
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    noise = noise.to(parameter.device, parameter.dtype)
    try:
        inside = {k: v for k, v in specs.items() if any(p.startswith("backbone.") for p in v.paths)}
        taps = FeatureTaps(model, inside)
    except ConfigError:
        taps = FeatureTaps(model, {})
    found = []
    try:
        with torch.autocast(noise.device.type, enabled=False):
            for backbone in (model.backbone, other):
                with taps.record():
                    result = backbone(noise)
                if gone:
                    result = {name: x for name, x in result.items() if name not in gone}
                found.append([result, *(taps[name] for name in taps.specs)])
    finally:
        taps.remove()
    worst = 0.0
    for ours, theirs in zip(_tensors(found[1]), _tensors(found[0]), strict=True):
        largest = theirs.abs().max().item()
        worst = max(worst, (ours - theirs).abs().max().item() / (largest or 1.0), key=_or_inf)
    if not worst <= TOLERANCE:
        return f"on an image of noise the result differs by {worst:.1g} of its largest value"
    return ""


def _or_inf(value: float) -> float:
    return value if value == value else float("inf")


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [x for part in value for x in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _can_be_cut(backbone: nn.Module) -> bool:
    if isinstance(backbone, FPN):
        return type(backbone).forward is FPN.forward
    return type(backbone).forward is ResNet.forward and backbone.num_classes is None


def _leave_out(backbone: nn.Module, levels: set[str]) -> list[str]:
    """Change detectron2's FPN or ResNet so that it computes these levels; returns what is gone."""
    names = list(backbone.output_shape())
    cut = _cut_pyramid if isinstance(backbone, FPN) else _cut_stages
    cut(backbone, levels)
    right = _right(backbone)
    return [name for name in names if name not in right]


def _right(backbone: nn.Module) -> set[str]:
    """Levels of an FPN or ResNet that are in its output and are no stand-in."""
    blank = {id(x) for x in getattr(backbone, "output_convs", ()) if isinstance(x, nn.Identity)}
    names = list(backbone._out_features)
    convs = list(getattr(backbone, "output_convs", ()))[::-1]  # finest first, as the names
    stand_ins = {name for name, conv in zip(names, convs, strict=False) if id(conv) in blank}
    return set(names) - stand_ins


def _cut_pyramid(fpn: FPN, levels: set[str]) -> None:
    names, own = list(fpn._out_features), len(fpn.output_convs)
    needed = set(levels)
    if fpn.top_block is not None and needed.isdisjoint(names[own:]):
        fpn.top_block, names = None, names[:own]
    elif fpn.top_block is not None:
        needed.add(fpn.top_block.in_feature)
    while own > 1 and names[0] not in needed:  # the finest level feeds no other
        fpn.lateral_convs, fpn.output_convs = fpn.lateral_convs[:-1], fpn.output_convs[:-1]
        names, own = names[1:], own - 1
    # the sum before it goes on to the finer levels
    fpn.output_convs = [
        conv if name in needed else nn.Identity()
        for name, conv in zip(names[:own][::-1], fpn.output_convs, strict=True)
    ]
    fpn._out_features = names


def _cut_stages(resnet: ResNet, levels: set[str]) -> None:
    last = max((resnet.stage_names.index(x) for x in levels if x in resnet.stage_names), default=-1)
    resnet.stage_names = resnet.stage_names[: last + 1]
    resnet.stages = resnet.stages[: last + 1]
    reached = ("stem", *resnet.stage_names)
    resnet._out_features = [name for name in resnet._out_features if name in reached]
