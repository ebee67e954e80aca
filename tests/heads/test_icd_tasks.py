"""The ICD head's instances, real and fake, and what its auxiliary tasks learn from them."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage
from icd_toys import STUDENT, build, context
from torch.utils._python_dispatch import TorchDispatchMode

from projects.kd.data.priors import BoxPriors
from projects.kd.heads.icd import ICD

# --- draws --------------------------------------------------------------------------------------


class _Forbid(TorchDispatchMode):
    """Fails on what makes a host wait for its device."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "multinomial", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.names, func
        if func.overloadpacket.__name__ == "index":
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), func
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    head, ctx = build(), context()
    with _Forbid():
        losses = head(ctx)
        sum(losses.values()).backward()
    with pytest.raises(AssertionError, match="nonzero"), _Forbid():
        torch.ones(3).nonzero()


def test_draws_follow_the_generator_of_the_step():
    head, ctx = build(), context()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(head.queries(ctx).encoded.vectors)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_real_instances_come_first_and_are_the_annotated_ones():
    head, ctx = build(JITTER=0.0), context()
    for instances_ in ctx.gt:
        instances_.gt_classes += 3
    queries = head.queries(ctx)
    start = 0
    for size, own, (number, fakes) in zip(ctx.image_sizes, ctx.gt, queries.counts, strict=True):
        assert queries.real[start : start + number + fakes].tolist() == [True] * 3 + [False] * 15
        rows = queries.encoded.vectors[start : start + number, :5]
        assert rows.argmax(1).tolist() == [3] * 3
        height, width = size
        boxes = own.gt_boxes.tensor / torch.tensor([width, height, width, height])
        half = (boxes[:, 2:] - boxes[:, :2]) / 2
        expected = torch.cat([half, half], dim=1)
        torch.testing.assert_close(queries.encoded.sides[start : start + number], expected)
        start += number + fakes
    assert start == len(queries.real)


def test_fakes_are_drawn_from_the_priors():
    head, ctx = build(NEGATIVES_PER_BOX=50.0), context()
    # class 4 only, of one size, too small to be cut at the border
    priors = BoxPriors([0.0, 0.0, 0.0, 0.0, 1.0], [[0.05, 0.04]] * 5, [[0.0, 0.0]] * 5)
    head = ICD(
        decoder=head.decoder, student_channels=STUDENT, priors=priors, negatives=50.0,
        levels=head.levels, weight=1.0, mask_padding=True,
    )  # fmt: skip
    queries = head.queries(ctx)
    fake = ~queries.real
    assert queries.encoded.vectors[fake, :5].argmax(1).unique().tolist() == [4]
    torch.testing.assert_close(
        queries.encoded.sizes[fake], torch.tensor([[0.05, 0.04]]).expand(int(fake.sum()), 2)
    )


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["conf", "box"])
def test_an_auxiliary_task_is_learned_and_logged(task):
    """Real instances are all of class 0, fakes of any; scales tell something about the sides."""
    head = build(DIM=32, NEGATIVES_PER_BOX=1.0)
    optimizer = torch.optim.AdamW(head.decoder.parameters(), lr=3e-3)
    name = {"conf": "kd/icd_accuracy", "box": "kd/icd_box_error"}[task]
    steps = 50
    with EventStorage(0) as storage:
        for step in range(steps):
            ctx = context(seed=step)
            ctx.log_scalars = True
            optimizer.zero_grad()
            head(ctx)[f"loss_aux_icd_{task}"].backward()
            optimizer.step()
            storage.step()
        history = torch.tensor([value for value, _ in storage.history(name).values()])
    assert len(history) == steps
    if task == "conf":
        assert history.min() >= 0 and history.max() <= 1
        assert history[:5].mean() < 0.6 < 0.75 < history[-15:].mean()
    else:
        assert history[-15:].mean() < 0.8 * history[:5].mean()


def test_accuracy_is_counted_at_the_odds_of_a_real_instance():
    """One real among five: a probability of 0.3 is an answer "real", though below a half."""
    ctx = context()
    ctx.log_scalars = True
    real = torch.tensor([True, False, False, False, False])
    logits = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1]).logit()
    with EventStorage(0) as storage:
        build()._log(ctx, logits, real, torch.tensor(4.0), 1)
        assert storage.latest()["kd/icd_accuracy"][0] == pytest.approx((1 + 3 / 4) / 2)
        assert storage.latest()["kd/icd_box_error"][0] == 1.0
