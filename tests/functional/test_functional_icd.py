"""ICD's formulas against golden numbers, plain references, finite differences and Pearson's r."""

from __future__ import annotations

import math

import pytest
import torch
from kd_testing import wave

from projects.kd.functional import icd_values
from projects.kd.functional.icd import (
    Priors,
    encode_instances,
    identification_loss,
    localisation_error,
    point_encoding,
    query_counts,
    sample_fakes,
    scale_bins,
    sine_table,
    summed_attention,
)
from projects.kd.functional.icd_values import token_distance, value_distance

SIZE = (480, 640)


def encode(box, jitter=(0.0, 0.0), size=SIZE, num_classes=80, of_class=2):
    return encode_instances(
        torch.tensor([of_class]),
        torch.tensor([box], dtype=torch.float64),
        size,
        torch.tensor([jitter], dtype=torch.float64),
        num_classes,
    )


def naive_attention(queries, keys):
    """(R, M, L) attention maps."""
    logits = torch.einsum("rmd,lmd->rml", queries, keys) / queries.shape[2] ** 0.5
    return logits.softmax(-1)


def naive_distance(student, teacher, weights, center=False):
    """The formula with torch's own layer norm, all tokens at a time."""
    if center:
        student, teacher = (x - x.sum(0) / len(x) for x in (student, teacher))
    s, t = (torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in (student, teacher))
    error = (s - t).square().mean(-1).T
    return ((weights * error).sum(1) / weights.sum(1).clamp(min=1e-6)).mean()


# --- instances ----------------------------------------------------------------------------------


def test_golden_query():
    found = encode((100, 50, 300, 200), (0.1, -0.2))
    vector = found.vectors[0]
    assert vector.shape == (346,)
    assert vector[:80].nonzero().tolist() == [[2]]
    torch.testing.assert_close(found.sides[0].tolist(), [0.1875, 0.09375, 0.125, 0.21875])
    relative = found.sides / found.sizes.repeat(1, 2)
    torch.testing.assert_close(relative[0].tolist(), [0.6, 0.3, 0.4, 0.7])
    expected = {80: [0.83147, 0.955469, 0.998807, 0.985882], 144: [-0.55557, -0.295093]}
    expected[208] = [0.94693, 0.880477]
    for start, values in expected.items():
        part = vector[start : start + len(values)].tolist()
        assert part == pytest.approx(values, abs=1e-5)
    assert vector[336:].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert vector.sum().item() == pytest.approx(141.07712974, abs=1e-8)


def test_point_encoding_of_the_jittered_centre():
    found = encode((100, 50, 300, 200), (0.1, -0.2))
    centre = torch.tensor([0.34375, 0.19791667], dtype=torch.float64)
    torch.testing.assert_close(
        found.vectors[0, 80:336], point_encoding(centre).flatten(), rtol=0, atol=1e-6
    )


def test_sides_are_positive_while_the_jitter_is_below_a_half():
    torch.manual_seed(0)
    boxes = torch.rand(200, 2) * 300
    boxes = torch.cat([boxes, boxes + 1 + 100 * torch.rand(200, 2)], 1)
    jitter = 0.499 * torch.tensor([[1.0, -1.0]]).expand(200, 2)
    found = encode_instances(torch.zeros(200, dtype=torch.long), boxes, SIZE, jitter, 3)
    assert found.sides.min() > 0
    # left + right is the width, whatever the jitter
    torch.testing.assert_close(found.sides[:, :2] + found.sides[:, 2:], found.sizes)
    outside = encode_instances(torch.zeros(200, dtype=torch.long), boxes, SIZE, jitter * 1.1, 3)
    assert outside.sides.min() < 0


def test_scale_bins_change_at_powers_of_two_exactly():
    limits = torch.tensor([64.0, 128.0, 256.0, 512.0])
    assert scale_bins(limits).tolist() == [1, 2, 3, 4]
    assert scale_bins(torch.nextafter(limits, torch.zeros(4))).tolist() == [0, 1, 2, 3]
    assert scale_bins(torch.tensor([0.0, 0.3, 1.0, 31.0, 4000.0])).tolist() == [0, 0, 0, 0, 4]


def test_each_image_has_its_own_size():
    one, other = encode((0, 0, 100, 100)), encode((0, 0, 100, 100), size=(100, 200))
    assert one.sizes[0].tolist() == [100 / 640, 100 / 480]
    assert other.sizes.tolist() == [[0.5, 1.0]]
    assert not torch.equal(one.vectors[:, 80:336], other.vectors[:, 80:336])
    assert torch.equal(one.vectors[:, 336:], other.vectors[:, 336:])  # bins are in pixels


@pytest.mark.parametrize(
    ("real", "most", "expected"),
    [(0, 300, (0, 1)), (1, 300, (1, 5)), (7, 300, (7, 35)), (50, 300, (50, 250))]
    + [(60, 300, (60, 240)), (300, 300, (300, 0)), (900, 300, (900, 0)), (20, 100, (20, 80))],
)
def test_query_counts(real, most, expected):
    assert query_counts(real, 5.0, most) == expected


def test_fakes_follow_the_priors():
    frequency = torch.tensor([0.2, 0.0, 0.8])
    mean = torch.tensor([[0.1, 0.3], [0.5, 0.5], [0.4, 0.2]])
    std = torch.tensor([[0.02, 0.05], [0.0, 0.0], [0.1, 0.01]])
    priors = Priors(frequency.cumsum(0), mean, std)
    generator = torch.Generator().manual_seed(0)
    classes, boxes = sample_fakes(20000, priors, SIZE, generator)
    share = classes.bincount(minlength=3) / len(classes)
    torch.testing.assert_close(share, frequency, rtol=0, atol=0.01)
    assert share[1] == 0
    height, width = SIZE
    assert boxes[:, 0::2].min() >= 0 and boxes[:, 0::2].max() <= width
    assert boxes[:, 1::2].min() >= 0 and boxes[:, 1::2].max() <= height
    sides = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([width, height])
    assert sides.min() > 0
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < torch.tensor([width, height])).all(1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / torch.tensor([width, height])
    assert centre[inside].min() >= 0.03 - 1e-6 and centre[inside].max() <= 0.97 + 1e-6
    for k in (0, 2):
        chosen = classes == k
        # whole boxes far from the border are a fair sample of the sides
        middle = chosen & inside & ((centre - 0.5).abs() < 0.2).all(1)
        torch.testing.assert_close(sides[middle].mean(0), mean[k], rtol=0.05, atol=0)
        least = (mean[k] - 2 * std[k]).clamp(2e-3, 0.7)
        most = (mean[k] + 2 * std[k]).clamp(2e-3, 0.7)
        assert (sides[middle] >= least - 1e-5).all() and (sides[middle] <= most + 1e-5).all()
        assert sides[middle].max(0).values == pytest.approx(most.tolist(), rel=0.01)


def test_a_generator_makes_fakes_repeatable():
    priors = Priors(torch.tensor([1.0]), torch.full((1, 2), 0.2), torch.full((1, 2), 0.2))
    draws = [sample_fakes(9, priors, SIZE, torch.Generator().manual_seed(s))[1] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(5)
    first = sample_fakes(9, priors, SIZE)[1]
    torch.manual_seed(5)
    assert torch.equal(first, sample_fakes(9, priors, SIZE)[1])


# --- positions of tokens ------------------------------------------------------------------------


def test_sine_table_is_the_formula():
    table = sine_table(7, 8, torch.device("cpu"))
    for row in range(7):
        place = 2 * math.pi * (row + 1) / (7 + 1e-6)
        for k in range(8):
            angle = place / 10000 ** (2 * (k // 2) / 8)
            wanted = math.cos(angle) if k % 2 else math.sin(angle)
            assert table[row, k].item() == pytest.approx(wanted, abs=1e-6)


# --- attention and values -----------------------------------------------------------------------


@pytest.mark.parametrize("logits", [1, 7 * 4, 7 * 3 + 5, 10**6])
def test_chunked_attention_equals_the_sum_of_softmaxes(logits):
    torch.manual_seed(0)
    queries = torch.randn(11, 3, 4, dtype=torch.float64) * 3
    keys = torch.randn(7, 3, 4, dtype=torch.float64)
    found = summed_attention(queries, keys, logits)
    expected = naive_attention(queries, keys).sum(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected)  # and to rounding
    torch.testing.assert_close(found.sum(1), torch.full((3,), 11.0, dtype=torch.float64))


def test_attention_carries_no_gradient():
    queries, keys = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(2))
    assert not summed_attention(queries, keys).requires_grad
    assert summed_attention(queries[:0], keys).tolist() == [[0] * 3] * 2


def golden_case():
    shape = (2, 2, 3, 7)  # images, heads, queries, tokens
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    logits = (3 * torch.sin(0.61 * i + 0.2)).view(shape)
    values = wave("student", 2, 7, 2, 4), wave("teacher", 2, 7, 2, 4)
    real, tokens = ([0, 1], [0]), (7, 5)
    weights = [logits[n][:, real[n], : tokens[n]].softmax(-1).sum(1) for n in range(2)]
    cut = [[x[n, : tokens[n]] for x in values] for n in range(2)]
    return cut, weights


def test_golden_distance():
    cut, weights = golden_case()
    found = [value_distance(*cut[n], weights[n]) for n in range(2)]
    assert sum(found).item() / 2 == pytest.approx(2.20301820, abs=1e-7)


def test_each_image_has_its_own_normaliser():
    """The MegEngine release's normaliser, the sum over the batch, is another number."""
    cut, weights = golden_case()
    batch = sum(value_distance(*cut[n], weights[n]) * weights[n].sum(1)[0] for n in range(2))
    total = sum(w.sum(1)[0] for w in weights)
    assert (batch / total).item() == pytest.approx(2.15994618, abs=1e-7)


def test_the_distance_is_twice_one_minus_pearson():
    torch.manual_seed(0)
    for scale, tolerance in ((100.0, 1e-8), (1.0, 1e-4)):
        s, t = (torch.randn(5, 2, 32, dtype=torch.float64) * scale + 3 for _ in range(2))
        for token in range(5):
            for head in range(2):
                weights = torch.zeros(2, 5, dtype=torch.float64)
                weights[head, token] = 0.7
                r = torch.corrcoef(torch.stack([s[token, head], t[token, head]]))[0, 1]
                # the other head has no weight and counts as 0 in the mean over heads
                found = 2 * value_distance(s, t, weights)
                assert found.item() == pytest.approx(2 * (1 - r.item()), rel=tolerance)


def test_scaling_and_shifting_values_costs_nothing():
    torch.manual_seed(0)
    teacher = torch.randn(6, 2, 16, dtype=torch.float64) * 50
    factor, shift = torch.rand(6, 2, 1, dtype=torch.float64) + 0.5, torch.randn(6, 2, 1)
    weights = torch.rand(2, 6, dtype=torch.float64)
    assert value_distance(teacher * factor + shift, teacher, weights).item() < 1e-12
    assert value_distance(-teacher, teacher, weights).item() == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("piece", [8, 24, 10**6])
def test_value_and_gradient_equal_the_formula(piece, center, monkeypatch):
    monkeypatch.setitem(icd_values.PIECE, "cpu", piece)
    for seed in range(3):
        torch.manual_seed(seed)
        student = torch.randn(7, 2, 4, dtype=torch.float64).requires_grad_()
        teacher = torch.randn(7, 2, 4, dtype=torch.float64) * 3 + 5
        weights = torch.rand(2, 7, dtype=torch.float64)
        ours, reference = (
            f(student, teacher, weights, center) for f in (value_distance, naive_distance)
        )
        torch.testing.assert_close(ours, reference)
        pair = [torch.autograd.grad(3 * loss, student)[0] for loss in (ours, reference)]
        torch.testing.assert_close(*pair)


def test_centred_by_hand():
    """Two tokens: centred they are opposite, so all that counts is the sign of the correlation."""
    common = torch.tensor([9.0, -4.0, 7.0], dtype=torch.float64)
    one = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64) * 100
    student = torch.stack([common + one, common - one])[:, None]
    weights = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    for teacher, expected in ((2 * one, 0.0), (-one, 4.0), (one[[1, 0, 2]], 2 * (1 - 13 / 14))):
        teacher = torch.stack([teacher, -teacher])[:, None] - 50 * common
        found = value_distance(student, teacher, weights, center=True)
        assert found.item() == pytest.approx(expected, abs=1e-6)
        assert token_distance(student, teacher, True)[:, 0].tolist() == pytest.approx(
            [expected] * 2, abs=1e-6
        )


def test_what_all_tokens_have_in_common_costs_nothing_when_centred():
    torch.manual_seed(0)
    student, teacher = (torch.randn(9, 2, 8, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 9, dtype=torch.float64)
    common = [10 * torch.randn(2, 8, dtype=torch.float64) for _ in range(2)]
    losses = []
    for s, t in ((student, teacher), (student + common[0], teacher + common[1])):
        s = s.clone().requires_grad_()
        losses.append([value_distance(s, t, weights, center) for center in (True, False)])
        gradient = torch.autograd.grad(losses[-1][0], s)[0]
        torch.testing.assert_close(gradient.sum(0), torch.zeros(2, 8).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert abs(losses[0][1] - losses[1][1]) > 0.1


@pytest.mark.parametrize("center", [False, True])
def test_gradients_are_those_of_finite_differences(center):
    torch.manual_seed(0)
    student = torch.randn(5, 2, 4, dtype=torch.float64).requires_grad_()
    teacher, weights = torch.randn(5, 2, 4).double(), torch.rand(2, 5).double()
    assert torch.autograd.gradcheck(lambda s: value_distance(s, teacher, weights, center), student)


def test_constant_values_and_no_weight_are_finite():
    student = torch.ones(4, 2, 8, requires_grad=True)
    teacher = torch.randn(4, 2, 8)
    for weights in (torch.ones(2, 4), torch.zeros(2, 4)):
        loss = value_distance(student, teacher, weights)
        gradient = torch.autograd.grad(loss, student)[0]
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert loss == 0 and not gradient.any()


def test_half_precision_is_promoted():
    torch.manual_seed(0)
    s, t = (torch.randn(6, 2, 8).bfloat16() for _ in range(2))
    weights = torch.rand(2, 6)
    s.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = value_distance(s, t, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_distance(s.float(), t.float(), weights).item())
    assert torch.autograd.grad(loss, s)[0].dtype == torch.bfloat16


def test_neither_teacher_nor_weights_receive_a_gradient():
    s, t = (torch.randn(6, 2, 8, requires_grad=True) for _ in range(2))
    weights = torch.rand(2, 6, requires_grad=True)
    value_distance(s, t, weights).backward()
    assert s.grad is not None and t.grad is None and weights.grad is None


# --- auxiliary tasks ----------------------------------------------------------------------------


def test_identification_is_the_mean_cross_entropy():
    logits, real = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([True, False, True])
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log(2)]
    assert identification_loss(logits, real).item() == pytest.approx(sum(expected) / 3)


def test_localisation_counts_in_box_sizes():
    sides = torch.tensor([[0.1, 0.2, 0.3, 0.2]])
    sizes = torch.tensor([[0.4, 0.4]])
    predicted = torch.tensor([[0.3, 0.2, 0.1, 0.3]])
    # |0.2| / 0.4 + 0 + |0.2| / 0.4 + |0.1| / 0.4
    assert localisation_error(predicted, sides, sizes).tolist() == pytest.approx([1.25])
    assert torch.isfinite(localisation_error(predicted, sides, torch.zeros(1, 2))).all()
