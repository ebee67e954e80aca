"""Conditional DETR: masks, query groups, losses against loops, what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from kd_models import CLASSES, build, losses_at, make_batch, tiny_cfg, train_steps

from projects.kd.detectors import taps_for
from projects.kd.engine.optim import build_optimizations
from projects.kd.errors import DataError
from projects.kd.modeling.conditional_detr_transformer import (
    Attention,
    DecoderLayer,
    image_positions,
    sine_features,
)
from projects.kd.taps import FeatureTaps

ARCH = "ConditionalDETR"
SIZES = ((64, 96), (90, 60))


def detr(seed=0, **overrides):
    overrides = {f"MODEL__CONDITIONAL_DETR__{k}": v for k, v in overrides.items()}
    return build(tiny_cfg(ARCH, **overrides), seed).train()


def encoded(model, batch):
    images = model.preprocess_image(batch)
    return model.encode(model.backbone(images.tensor), images)


# --- positions and masks -------------------------------------------------------------------------


def test_sine_features_equal_a_loop():
    positions = torch.tensor([[0.3, 1.7], [2.0, 0.1]])
    found = sine_features(positions, 6)
    for row, (x, y) in zip(found, positions.tolist(), strict=True):
        expected = []
        for value in (y, x):
            for i in range(6):
                angle = value / 10000 ** (2 * (i // 2) / 6)
                expected.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
        torch.testing.assert_close(row, torch.tensor(expected))


def test_positions_are_shares_of_the_valid_area():
    valid = torch.zeros(1, 4, 5, dtype=torch.bool)
    valid[:, :3, :2] = True
    alone = image_positions(torch.ones(1, 3, 2, dtype=torch.bool), 4).view(3, 2, 8)
    inside = image_positions(valid, 4).view(4, 5, 8)
    torch.testing.assert_close(inside[:3, :2], alone)
    assert inside.isfinite().all()


def test_the_mask_is_that_of_nearest_neighbour_resizing():
    model = detr()
    for canvas, size in (((64, 96), (47, 33)), ((100, 61), (51, 61)), ((64, 64), (1, 64))):
        images = ImageList(torch.zeros(1, 3, *canvas), [size])
        feature = {"res4": torch.randn(1, 256, -(-canvas[0] // 16), -(-canvas[1] // 16))}
        memory = model.encode(feature, images)
        pixels = torch.zeros(1, 1, *canvas)
        pixels[..., : size[0], : size[1]] = 1
        expected = F.interpolate(pixels, size=memory.grid).bool().flatten(1)
        found = memory.valid if memory.valid is not None else torch.ones_like(expected)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("spoiler", [1e3, float("inf"), float("nan")])
def test_padding_has_no_influence_on_predictions(spoiler):
    model = detr().eval()
    canvas, size = (96, 128), (64, 96)
    alone = torch.randn(1, 256, 4, 6)
    feature = torch.full((1, 256, 6, 8), spoiler)
    feature[..., :4, :6] = alone
    with torch.no_grad():
        small = model.decode(
            model.encode({"res4": alone}, ImageList(torch.zeros(1, 3, *size), [size]))
        )
        large = model.decode(
            model.encode({"res4": feature}, ImageList(torch.zeros(1, 3, *canvas), [size]))
        )
    torch.testing.assert_close(large.logits, small.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(large.boxes, small.boxes, rtol=1e-4, atol=1e-5)


def test_evaluation_masks_padding_too():
    """Each image of a ragged batch is detected as it is alone on the same canvas."""
    model = detr().eval()
    batch = make_batch(SIZES)
    seen = []
    model.transformer.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    with torch.no_grad():
        model(batch)
    assert seen[0] is not None and not seen[0].all()


# --- attention -----------------------------------------------------------------------------------


def test_maps_are_the_softmax_before_dropout():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 6))
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = Attention(query, key, valid).map()
    for n in range(2):
        for m in range(3):
            logits = query[n, m] @ key[n, m].T / 2.0
            weights = logits.exp() * valid[n]
            torch.testing.assert_close(found[n, m], weights / weights.sum(-1, keepdim=True))


def test_the_layer_output_is_that_of_its_maps():
    """The fused path and the maps that are given on request are the same attention."""
    torch.manual_seed(0)
    model = detr().eval()
    memory = encoded(model, make_batch(SIZES))
    layer: DecoderLayer = model.transformer.decoder.layers[1]
    calls = []
    layer.cross_attn.register_forward_hook(lambda m, args, output: calls.append((args, output)))
    decoded = model.decode(memory, keep_attention=True)
    (_, output), values = calls[0], memory.values[1]
    mixed = decoded.cross_attention[1].map() @ values
    expected = layer.cross_attn.out_proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected)
    assert model.decode(memory).cross_attention is None, "kept only when asked"


def test_no_map_is_made_unless_asked(monkeypatch):
    def refuse(self):
        raise AssertionError("a map was made")

    monkeypatch.setattr(Attention, "map", refuse)
    model = detr()
    sum(losses_at(model, make_batch(SIZES)).values()).backward()
    with torch.no_grad():
        model.eval()(make_batch(SIZES))


# --- query groups --------------------------------------------------------------------------------


def block_mask_oracle(model, memory, groups):
    """The decoder on all groups at once; a mask keeps them apart in self-attention."""
    decoder = model.transformer.decoder
    lengths = [len(group) for group in groups]
    mask = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
    layers = list(decoder.layers)
    original = F.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, dropout_p=0.0):
        if query.shape[-2] == key.shape[-2] == len(mask) and attn_mask is None:
            attn_mask = mask
        return original(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)

    assert memory.valid is not None and layers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        return model.decode(memory, torch.cat(groups))


def test_groups_equal_one_pass_with_a_block_diagonal_mask():
    model = detr()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    memory = encoded(model, make_batch(SIZES))
    groups = [model.query_embed.weight, torch.randn(7, 16)]
    together = block_mask_oracle(model, memory, groups)
    alone = [model.decode(memory, group) for group in groups]
    torch.testing.assert_close(
        together.logits, torch.cat([x.logits for x in alone], dim=2), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        together.boxes, torch.cat([x.boxes for x in alone], dim=2), rtol=1e-5, atol=1e-5
    )


def test_memory_is_projected_once_for_all_groups():
    model = detr()
    calls = []
    for layer in model.transformer.decoder.layers:
        for module in (layer.ca_kcontent_proj, layer.ca_kpos_proj, layer.ca_v_proj):
            module.register_forward_hook(lambda *args: calls.append(1))
    memory = encoded(model, make_batch(SIZES))
    for queries in (None, torch.randn(3, 16), torch.randn(20, 16)):
        model.decode(memory, queries)
    assert len(calls) == 3 * len(model.transformer.decoder.layers)


# --- training ------------------------------------------------------------------------------------


def test_every_layer_has_three_losses_and_every_parameter_a_gradient():
    for layers in (1, 3):
        model = detr(DEC_LAYERS=layers)
        losses = losses_at(model, make_batch(SIZES))
        names = {f"loss_{kind}" for kind in ("class", "l1", "giou")}
        early = {f"{name}_{k}" for name in names for k in range(layers - 1)}
        assert losses.keys() == names | early
        sum(losses.values()).backward()
        lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lacking == []


@pytest.mark.parametrize("boxes", [0, 1, 30])
def test_no_object_and_more_objects_than_queries(boxes):
    """With 12 queries and 30 objects 12 pairs are made; all 30 count in the normaliser."""
    model = detr()
    losses = losses_at(model, make_batch(SIZES, boxes=boxes))
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_l1"] > 0) == (boxes > 0)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_batch_without_annotations_is_refused():
    batch = make_batch(SIZES)
    del batch[0]["instances"]
    with pytest.raises(DataError, match="DATASETS.TRAIN"):
        losses_at(detr(), batch)


def test_losses_fall_on_one_batch():
    model, batch = detr(), make_batch(SIZES)
    before = sum(losses_at(model, batch).values()).item()
    train_steps(model, batch, steps=20, lr=0.02)
    assert sum(losses_at(model, batch).values()).item() < 0.8 * before


def test_the_backbone_has_its_own_learning_rate():
    cfg = tiny_cfg(ARCH, SOLVER__OPTIMIZER="AdamW", SOLVER__BACKBONE_MULTIPLIER=0.1)
    model = build(cfg)
    groups = build_optimizations(cfg, model)["student"].optimizer.param_groups
    rates = {p: group["initial_lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 0.1 if name.startswith("backbone.") else 1.0
            assert rates[parameter] == pytest.approx(0.01 * factor), name


# --- inference -----------------------------------------------------------------------------------


def test_inference_takes_the_top_scores_over_queries_and_classes():
    model = detr().eval()
    model.detections = 5
    batch = make_batch(SIZES)
    batch[0]["height"], batch[0]["width"] = 128, 192  # twice the input
    with torch.no_grad():
        decoded = model.decode(encoded(model, batch))
        found = model(batch)
    for image, (height, width) in enumerate(((128, 192), SIZES[1])):
        scores = decoded.logits[-1, image].sigmoid()
        best = sorted(
            ((scores[q, k].item(), q, k) for q in range(12) for k in range(CLASSES)), reverse=True
        )[:5]
        instances = found[image]["instances"]
        assert instances.image_size == (height, width)
        for index, (score, q, k) in enumerate(best):
            assert instances.scores[index].item() == pytest.approx(score)
            assert instances.pred_classes[index] == k
            cx, cy, w, h = decoded.boxes[-1, image, q].tolist()
            box = [
                max((cx - w / 2) * width, 0),
                max((cy - h / 2) * height, 0),
                min((cx + w / 2) * width, width),
                min((cy + h / 2) * height, height),
            ]
            assert instances.pred_boxes.tensor[index].tolist() == pytest.approx(box, abs=1e-3)


def test_the_tap_gives_what_was_decoded_on_both_sides():
    model = detr()
    specs = {"decoded": taps_for(model)["decoded"]}
    taps = FeatureTaps(model, specs)
    with taps.record():
        losses_at(model, make_batch(SIZES))
    decoded = taps["decoded"]
    assert decoded.logits.shape == (3, 2, 12, CLASSES) and decoded.self_attention is not None
    taps.clear()
    model.eval()
    images = model.preprocess_image(make_batch(SIZES))
    with taps.record(), torch.no_grad():
        specs["decoded"].run(model, model.backbone(images.tensor), images)
    torch.testing.assert_close(
        taps["decoded"].boxes, model.decode(encoded(model, make_batch(SIZES))).boxes
    )
