"""Two processes: gradients equal those of one process, for every head."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from gradient_worker import CASES, SIZES, Step, batch_of, gradients, run_rank
from kd_processes import run_ranks

from projects.kd.heads import IMITATION_HEAD_REGISTRY

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Per rank: case to gradients, from one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, str(folder), count=len(SIZES))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(len(SIZES))]


def shared_normalisers(case, model):
    """``mean_over_ranks`` of a head's module: gives in order what the ranks' values are in mean."""
    found = []
    for rank in range(len(SIZES)):
        found.append([])
        with mock.patch(f"{case.patched}.mean_over_ranks", lambda x: found[-1].append(x) or x):
            model(*batch_of([rank], case))
    means = itertools.cycle([sum(x) / len(x) for x in zip(*found, strict=True)])
    return lambda value: next(means)


def expected_gradients(case):
    """One process: the mean of the ranks' losses, the head's over the whole batch if it says so."""
    model, count = Step(case), len(SIZES)
    patch = contextlib.nullcontext()
    if case.patched:
        means = shared_normalisers(case, model)
        patch = mock.patch(f"{case.patched}.mean_over_ranks", means)
    for rank in range(count):
        with patch:
            task, distillation = model(*batch_of([rank], case))
        (task / count).backward(retain_graph=True)
        if not case.whole_batch:
            (distillation / count).backward()
    if case.whole_batch:
        model(*batch_of(range(count), case))[1].backward()
    return gradients(model)


@pytest.mark.parametrize("key", CASES)
def test_gradients_equal_one_process(ranks, key):
    expected = expected_gradients(CASES[key])
    for found in ranks:
        assert found[key].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[key][name], gradient, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_heads_share_of_the_gradient_is_seen():
    """The comparison would notice a head: without boxes FGFI's part is gone, with boxes not."""
    by_boxes = {case.boxes: Step(case) for case in CASES.values() if case.name == "FGFI"}
    for boxes, model in by_boxes.items():
        case = next(c for c in CASES.values() if c.name == "FGFI" and c.boxes == boxes)
        model(*batch_of(range(len(SIZES)), case))[1].backward()
        found = [g.abs().max().item() for n, g in gradients(model).items() if n.startswith("head.")]
        assert (max(found) > 1e-3) == (boxes != (0, 0))


def test_every_registered_head_has_a_case():
    covered = {case.name for case in CASES.values()}
    own = {name for name, cls in IMITATION_HEAD_REGISTRY if cls.__module__.startswith("projects.")}
    assert own <= covered
