"""AT, PI, LOCAL and IFVD against golden numbers, plain loops and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from kd_testing import wave

from projects.kd.functional.at import at_loss
from projects.kd.functional.ifvd import box_labels, ifvd_loss, resize_labels
from projects.kd.functional.local import local_loss
from projects.kd.functional.pa import pa_loss
from projects.kd.functional.pi import bernoulli_pi_loss, pi_loss, teacher_confidence

SHAPE = (2, 3, 4, 6)


def golden():
    return wave("student", *SHAPE).requires_grad_(), wave("teacher", *SHAPE)


def golden_labels():
    labels = torch.arange(48).view(2, 4, 6) // 5 % 4
    labels[0, 0, 0] = 255
    return labels


def bernoulli(student, teacher, mask=None):
    return bernoulli_pi_loss(student, teacher, 2.0, 1.0, mask)


def ifvd(student, teacher, mask=None):
    labels = torch.arange(len(student) * student[0, 0].numel()) // 3 % 4
    return ifvd_loss(student, teacher, labels.view(len(student), *student.shape[2:]), 3, mask)


def local_normalized(student, teacher, mask=None):
    return local_loss(student, teacher, mask, normalize=True)


def pi_with_tau(student, teacher, mask=None):
    return pi_loss(student, teacher, 2.0, mask)


def pa(student, teacher, mask=None):
    return pa_loss(student, teacher, 0.0, mask)


def pa_pooled(student, teacher, mask=None):
    return pa_loss(student, teacher, 0.5, mask)


MASKED = [at_loss, pi_with_tau, bernoulli, local_loss, local_normalized, ifvd]
ALL = [*MASKED, pa, pa_pooled]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (lambda s, t: at_loss(s, t, reduction="mean"), 0.00956132795),
        (at_loss, 0.22947187),
        (pi_loss, 1.03532151),
        (lambda s, t: pi_loss(s, t, reduction="elements"), 0.34510717),
        (lambda s, t: bernoulli_pi_loss(s, t, beta=1.0), 64.84309916),
        (local_loss, 1.19484654),
        (lambda s, t: ifvd_loss(s, t, golden_labels(), 4), 0.16661983),
    ],
)
def test_golden_numbers(loss, value):
    assert loss(*golden()).item() == pytest.approx(value, rel=5e-8)


def test_golden_cross_entropies_are_the_divergences_and_the_teachers_entropy():
    student, teacher = golden()
    p = teacher.softmax(1)
    entropy = -(p * p.log()).sum()
    total = pi_loss(student, teacher) * 48 + entropy
    assert total.item() / 24 == pytest.approx(3.45197327, rel=5e-8)  # over H*W, as SKD's code
    p = teacher.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    total = bernoulli_pi_loss(student, teacher, beta=0.0) + entropy
    assert total.item() / student.numel() == pytest.approx(0.88603204, rel=5e-8)


def plain_at(student, teacher, mask):
    values = []
    for s, t, inside in zip(student, teacher, mask[:, 0], strict=True):
        a, b = (x.square().mean(0)[inside] for x in (s, t))
        values.append((a / a.norm() - b / b.norm()).square().sum())
    return torch.stack(values).mean()


def plain_pi(student, teacher, mask):
    p, q = (torch.softmax(x / 2.0, 1).movedim(1, -1)[mask[:, 0]] for x in (teacher, student))
    return 4.0 * (p * (p / q).log()).sum(1).mean()


def plain_bernoulli(student, teacher, mask):
    inside = mask.expand_as(student)
    p, q = torch.sigmoid(teacher[inside] / 2.0), torch.sigmoid(student[inside] / 2.0)
    return -4.0 * ((p - q).abs() * (p * q.log() + (1 - p) * (1 - q).log())).sum()


def plain_local(student, teacher, mask):
    """All ordered pairs of 8-neighbours, one at a time."""
    values = []
    n, _, rows, columns = student.shape
    for image in range(n):
        for r in range(rows):
            for c in range(columns):
                for dr, dc in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j):
                    y, x = r + dr, c + dc
                    if not (0 <= y < rows and 0 <= x < columns):
                        continue
                    if not (mask[image, 0, r, c] and mask[image, 0, y, x]):
                        continue
                    ours, theirs = (
                        (m[image, :, r, c] - m[image, :, y, x]).norm() for m in (student, teacher)
                    )
                    values.append((ours - theirs).square())
    return torch.stack(values).mean()


def plain_ifvd(student, teacher, mask):
    """Prototypes class by class, as the published loop does it."""
    labels = (torch.arange(len(student) * student[0, 0].numel()) // 3 % 4).view(
        len(student), *student.shape[2:]
    )

    def similarity(values):
        centre = values.clone()
        for image in range(len(values)):
            for k in range(3):
                members = (labels[image] == k) & mask[image, 0]
                if members.any():
                    mean = values[image][:, members].sum(1) / (members.sum() + 1e-6)
                    centre[image] = torch.where(members, mean[:, None, None], centre[image])
        return F.cosine_similarity(values, centre, dim=1)

    gap = similarity(student) - similarity(teacher)
    return gap.square().masked_fill(~mask[:, 0], 0.0).sum() / mask.sum()


PLAIN = {
    at_loss: plain_at,
    pi_with_tau: plain_pi,
    bernoulli: plain_bernoulli,
    local_loss: plain_local,
    ifvd: plain_ifvd,
}


def random_mask(n, h, w):
    mask = torch.rand(n, 1, h, w) > 0.3
    mask[:, :, :2, :2] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", list(PLAIN), ids=lambda x: x.__name__)
def test_value_and_gradient_equal_the_formula(loss, masked):
    for seed in range(3):
        torch.manual_seed(seed)
        student = (2 * torch.randn(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
        teacher = 2 * torch.randn(2, 3, 4, 5, dtype=torch.float64)
        mask = random_mask(2, 4, 5) if masked else None
        everything = torch.ones(2, 1, 4, 5, dtype=torch.bool)
        ours = loss(student, teacher, mask)
        reference = PLAIN[loss](student, teacher, mask if masked else everything)
        torch.testing.assert_close(ours, reference)
        pair = (torch.autograd.grad(x, student)[0] for x in (ours, reference))
        torch.testing.assert_close(*pair)
        assert ours.item() > 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", MASKED, ids=lambda x: x.__name__)
def test_gradients_are_those_of_finite_differences(loss, masked):
    student, teacher = golden()
    torch.manual_seed(0)
    mask = random_mask(2, 4, 6) if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, mask), student)


def test_the_kl_form_has_the_gradient_of_finite_differences():
    student, teacher = golden()
    assert torch.autograd.gradcheck(lambda s: bernoulli_pi_loss(s, teacher, beta=0.0), student)


# --- properties of all ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL, ids=lambda x: x.__name__)
def test_equal_maps_give_zero_and_no_gradient(loss):
    x = torch.randn(2, 5, 9, 11)
    student = x.clone().requires_grad_()
    value = loss(student, x)
    value.backward()
    assert abs(value.item()) < 1e-6 and student.grad.abs().max() < 1e-5


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("loss", ALL, ids=lambda x: x.__name__)
def test_cells_outside_of_the_mask_do_not_matter(loss, value):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5).unbind()
    mask = random_mask(2, 4, 5)
    results = []
    for fill in (0.0, value):
        s, t = (x.masked_fill(~mask, fill).requires_grad_() for x in (student, teacher))
        found = loss(s, t, mask)
        gradient = torch.autograd.grad(found, s)[0]
        assert not gradient.masked_select(~mask).any()
        results.append((found.detach(), gradient))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", ALL, ids=lambda x: x.__name__)
def test_a_single_cell_is_finite(loss):
    student = torch.randn(2, 4, 1, 1, requires_grad=True)
    value = loss(student, torch.randn(2, 4, 1, 1))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    if loss is local_loss:
        assert value.item() == 0.0


@pytest.mark.parametrize("loss", ALL, ids=lambda x: x.__name__)
def test_maps_of_zeros_are_finite(loss):
    student = torch.zeros(2, 4, 3, 3, requires_grad=True)
    value = loss(student, torch.randn(2, 4, 3, 3))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ALL, ids=lambda x: x.__name__)
def test_half_precision_inputs_are_computed_in_fp32(loss, dtype):
    student, teacher = (x.detach().to(dtype) for x in golden())
    exact = loss(student.float(), teacher.float())
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and torch.equal(value.detach(), exact)
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [at_loss, local_loss, pa, ifvd], ids=lambda x: x.__name__)
def test_channels_may_differ(loss):
    """More teacher channels that are always zero change nothing."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
    wide = torch.cat([teacher, torch.zeros(2, 2, 4, 5)], dim=1)
    scale = 3 / 5 if loss is at_loss else 1.0  # a mean over channels, undone by the norm
    torch.testing.assert_close(loss(student, wide * scale), loss(student, teacher * scale))


# --- each one's own ------------------------------------------------------------------------------


def test_attention_is_blind_to_scale():
    student, teacher = golden()
    torch.testing.assert_close(at_loss(5 * student, teacher), at_loss(student, teacher / 7))


def test_normalised_local_distances_are_blind_to_the_length_of_vectors():
    student, teacher = golden()
    lengths = torch.rand(2, 1, 4, 6, dtype=torch.float64) + 0.5
    expected = local_normalized(student, teacher)
    torch.testing.assert_close(local_normalized(student * lengths, teacher), expected)


def test_the_focal_factor_takes_weight_from_easy_background():
    teacher = torch.full((1, 1, 10, 10), -6.0)
    teacher[..., 0, 0] = 2.0
    student = torch.full((1, 1, 10, 10), -4.0)
    shares = []
    for beta in (0.0, 1.0):
        x = student.clone().requires_grad_()
        bernoulli_pi_loss(x, teacher, beta=beta).backward()
        shares.append((x.grad[..., 0, 0].abs() / x.grad.abs().sum()).item())
    assert shares[0] < 0.5 < 0.8 < shares[1]


def test_teacher_confidence_counts_cells_with_an_object():
    teacher = torch.full((2, 6, 4, 4), -20.0)
    teacher[0, 1, 2, 2] = teacher[0, 4, 2, 2] = teacher[1, 0, 3, 3] = 20.0
    assert teacher_confidence(teacher).item() == pytest.approx(2.0, abs=1e-4)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1, :, 3, 3] = False
    assert teacher_confidence(teacher, mask).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("label", [255, -1, 4, 1000])
def test_without_a_class_ifvd_is_zero(label):
    student, teacher = golden()
    loss = ifvd_loss(student, teacher, torch.full((2, 4, 6), label), 4)
    loss.backward()
    assert loss.item() == 0.0 and not student.grad.any()


def test_classes_that_do_not_occur_change_nothing():
    student, teacher = golden()
    labels = golden_labels()
    few = ifvd_loss(student, teacher, labels, 4)
    torch.testing.assert_close(ifvd_loss(student, teacher, labels, 200), few)


def test_resize_labels_takes_existing_labels():
    labels = torch.randint(0, 20, (2, 13, 18)).masked_fill(torch.rand(2, 13, 18) > 0.8, 255)
    resized = resize_labels(labels, (4, 6))
    for r in range(4):
        for c in range(6):
            assert torch.equal(resized[:, r, c], labels[:, r * 13 // 4, c * 18 // 6])


def test_box_labels_of_a_small_example():
    boxes = torch.tensor([[0.0, 0.0, 31.9, 20.0], [8.0, 4.0, 16.0, 12.0], [40.0, 0.0, 41.0, 1.0]])
    found = box_labels(boxes, torch.tensor([2, 0, 1]), (3, 5), 8.0, 9)
    expected = [[2, 0, 2, 2, 9], [2, 2, 2, 2, 9], [9, 9, 9, 9, 9]]
    assert found.tolist() == expected
    assert (box_labels(boxes[:0], torch.zeros(0), (3, 5), 8.0, 9) == 9).all()
