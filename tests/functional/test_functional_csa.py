"""Cross-scale attention: rates, masks, memory, and torch's own multi-head attention."""

import pytest
import torch
from torch import nn

from projects.kd.analysis.measure import peak_bytes
from projects.kd.functional.csa import (
    attend,
    cell_encoding,
    default_rates,
    pad_to_rate,
    token_mask,
)
from projects.kd.heads.csa_attention import CrossScaleAttention


def attention(rates, student=16, teacher=24, dim=32, heads=4, seed=0, **options):
    torch.manual_seed(seed)
    module = CrossScaleAttention(
        student_channels=student,
        teacher_channels=teacher,
        rates={"p3": rates},
        dim=dim,
        heads=heads,
        **options,
    )
    nn.init.normal_(module.output.weight, std=0.1)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return module


def test_rates_of_the_table():
    strides = (4, 8, 16, 32, 64, 128)
    double = [(32, 16), (16, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
    assert [default_rates(stride, 2.0) for stride in strides] == double
    equal = [(16, 8), (8, 4), (4, 2), (2, 1), (1, 1), (1, 1)]
    assert [default_rates(stride, 1.0) for stride in strides] == equal


@pytest.mark.parametrize("rates", [(1,), (1, 1), (1, 1, 1, 1)])
def test_without_aggregation_it_is_torchs_multi_head_attention(rates):
    """Rates of 1 and no local enhancement; P = 0 is the same."""
    for options in ({"local_enhancement": False}, {}):
        ours = attention(rates, student=32, **options)
        if ours.local is not None:
            nn.init.zeros_(ours.local.weight)
            nn.init.zeros_(ours.local.bias)
        theirs = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        sources = ours.sources["p3"]
        with torch.no_grad():
            theirs.q_proj_weight.copy_(ours.query.weight)
            theirs.k_proj_weight.copy_(torch.cat([s.key.weight for s in sources]))
            theirs.v_proj_weight.copy_(torch.cat([s.value.weight for s in sources]))
            biases = [ours.query.bias]
            biases += [torch.cat([getattr(s, n).bias for s in sources]) for n in ("key", "value")]
            theirs.in_proj_bias.copy_(torch.cat(biases))
            theirs.out_proj.load_state_dict(ours.output.state_dict())
        student, teacher = torch.randn(2, 32, 5, 7), torch.randn(2, 24, 10, 14)
        mask = torch.rand(2, 1, 10, 14) > 0.3
        tokens = teacher.flatten(2).transpose(1, 2)
        expected, _ = theirs(
            *(student.flatten(2).transpose(1, 2), tokens, tokens),
            key_padding_mask=~mask.flatten(1),
        )
        found = ours("p3", student, teacher, mask).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def plain_attention(module, student, teacher, rates):
    """One image, one attention head and one token at a time, without padding."""
    width = module.query.out_features // module.heads
    out = []
    for image in range(len(student)):
        queries = module.query(student[image].flatten(1).T)
        read = []
        for head in range(module.heads):
            index = head * len(rates) // module.heads
            source, rate = module.sources["p3"][index], rates[index]
            first = (head - index * module.heads // len(rates)) * width
            rows, columns = (side // rate for side in teacher.shape[-2:])
            tokens = []
            for i in range(rows):
                for j in range(columns):
                    block = teacher[image, :, i * rate : (i + 1) * rate, j * rate : (j + 1) * rate]
                    if rate == 1:
                        tokens.append(block.flatten())
                        continue
                    gathered = (source.gather.weight[:, 0] * block).sum((1, 2)) + source.gather.bias
                    mixed = source.norm(source.mix(gathered))
                    tokens.append(0.5 * mixed * (1 + torch.erf(mixed / 2**0.5)))
            tokens = torch.stack(tokens)
            keys = source.key(tokens)[:, first : first + width]
            values = source.value(tokens)[:, first : first + width]
            if module.local is not None:
                grid = values.T.reshape(1, width, rows, columns)
                channel = head * width
                weight = module.local.weight[channel : channel + width]
                bias = module.local.bias[channel : channel + width]
                local = nn.functional.conv2d(grid, weight, bias, padding=1, groups=width)
                values = values + local.flatten(2)[0].T
            query = queries[:, head * width : (head + 1) * width]
            read.append((query @ keys.T / width**0.5).softmax(1) @ values)
        out.append(module.output(torch.cat(read, 1)).T.reshape(student.shape[1:]))
    return torch.stack(out)


@pytest.mark.parametrize("rates", [(4, 2), (2, 1), (1,), (4, 4, 2, 1)])
def test_it_equals_the_equations_written_out(rates):
    module = attention(rates).double()
    student = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    teacher = torch.randn(2, 24, 8, 12, dtype=torch.float64)
    expected = plain_attention(module, student, teacher, rates)
    torch.testing.assert_close(module("p3", student, teacher), expected)


@pytest.mark.parametrize(("dim", "heads"), [(32, 4), (64, 2)])
def test_with_positions_each_query_starts_at_its_own_place(dim, heads):
    module = attention((1,), dim=dim, heads=heads, positions=True)
    encoding = cell_encoding(5, 6, (1.0, 1.0), dim // heads, torch.zeros(()))
    logits = module.position_scale[0] ** 2 * encoding @ encoding.T / (dim // heads) ** 0.5
    torch.testing.assert_close(logits.diagonal(), torch.full((30,), 10.0))
    others = logits.masked_fill(torch.eye(30, dtype=torch.bool), -1.0)
    assert (others < 10.0).all()


@pytest.mark.parametrize("positions", [False, True])
def test_gradients_are_those_of_finite_differences(positions):
    module = attention((2, 1), 4, 3, 8, 2, positions=positions).double()
    student = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 4:] = False
    inputs = (student, teacher)
    assert torch.autograd.gradcheck(lambda s, t: module("p3", s, t, mask), inputs)


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (1, 1), (5, 3), (13, 2)])
@pytest.mark.parametrize("scale", [1, 2])
def test_sizes_that_the_rates_do_not_divide(grid, scale):
    """As if the teacher's map were followed by padding that is masked."""
    module = attention((4, 2))
    student = torch.randn(2, 16, *grid)
    size = [scale * side for side in grid]
    teacher = torch.randn(2, 24, *size)
    found = module("p3", student, teacher)
    assert found.isfinite().all() and found.shape == student.shape
    larger = torch.full((2, 24, size[0] + 9, size[1] + 4), float("nan"))
    larger[..., : size[0], : size[1]] = teacher
    mask = torch.zeros(2, 1, *larger.shape[-2:], dtype=torch.bool)
    mask[..., : size[0], : size[1]] = True
    torch.testing.assert_close(module("p3", student, larger, mask), found, rtol=1e-4, atol=1e-6)


def test_images_of_a_padded_batch_are_read_as_if_alone():
    module = attention((4, 2))
    student, teacher = torch.randn(2, 16, 6, 8), torch.randn(2, 24, 12, 16)
    mask = torch.zeros(2, 1, 12, 16, dtype=torch.bool)
    sizes = ((12, 5), (3, 16))
    for image, (rows, columns) in enumerate(sizes):
        mask[image, :, :rows, :columns] = True
    together = module("p3", student, teacher, mask)
    for image, (rows, columns) in enumerate(sizes):
        own = teacher[image : image + 1, :, :rows, :columns]
        alone = module("p3", student[image : image + 1], own)
        torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-4, atol=1e-6)


def test_masks_of_tokens():
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    mask[..., :3, :5] = True
    assert token_mask(mask, 1) is mask and token_mask(None, 4) is None
    expected = torch.tensor([[True, True, True, False], [True, True, True, False], [False] * 4])
    assert torch.equal(token_mask(mask, 2)[0, 0], expected)
    assert torch.equal(token_mask(mask, 4)[0, 0], torch.tensor([[True, True], [False, False]]))
    padded = pad_to_rate(torch.ones(1, 1, 5, 7), 4)
    assert padded.shape[-2:] == (8, 8) and padded.sum() == 35
    one = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    one[..., 0, 0] = True
    assert token_mask(one, 8).sum() == 1, "an image of one cell keeps a key"


@pytest.mark.parametrize("masked", [False, True])
def test_the_map_of_queries_and_keys_never_exists(masked):
    queries = torch.randn(1, 4, 4096, 16, requires_grad=True)
    keys, values = (torch.randn(1, 4, 1024, 16, requires_grad=True) for _ in range(2))
    mask = None
    if masked:
        mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
        mask[..., 20:] = False
    whole = 4 * 4096 * 1024 * 4
    used = peak_bytes(lambda: attend(queries, keys, values, mask).sum().backward())
    assert used < whole / 4


def test_the_parameters_do_not_grow_with_a_full_convolution():
    """At rate 16 and 256 channels: depth-wise 65 thousand weights, not 16.8 million."""
    source = attention((16,), 256, 256, 256, 8).sources["p3"][0]
    assert source.gather.weight.numel() == 16 * 16 * 256


def test_encodings_are_alike_where_the_places_are():
    like = torch.zeros(1, dtype=torch.float64)
    queries = cell_encoding(6, 9, (1.0, 1.0), 16, like)
    nearest = (queries @ queries.T).argmax(1)
    assert torch.equal(nearest, torch.arange(54))
    # a grid of half the step: the four cells around a query's centre are its nearest
    keys = cell_encoding(12, 18, (0.5, 0.5), 16, like)
    row, column = 2, 5
    best = (queries[row * 9 + column] @ keys.T).topk(4).indices
    expected = {(2 * row + i) * 18 + 2 * column + j for i in (0, 1) for j in (0, 1)}
    assert set(best.tolist()) == expected
