"""Conditional DETR against the implementation of Hugging Face transformers, with random weights."""

import pytest
import torch
from detectron2.structures import ImageList
from kd_models import CLASSES, build, tiny_cfg

from projects.kd.modeling.conditional_detr_weights import compare, convert

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = [(160, 224), (90, 150)]
CANVAS = (160, 224)


def hugging_face(queries=12, layers=3):
    """A small model of theirs with a timm ResNet-18 on its own random weights."""
    config = transformers.ConditionalDetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="resnet18", use_pretrained_backbone=False, out_indices=[1, 2, 3, 4]
        ),
        d_model=16,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_layers=2,
        decoder_layers=layers,
        num_queries=queries,
        num_labels=CLASSES,
        auxiliary_loss=False,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    model = transformers.ConditionalDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "bbox_predictor" in name or "layernorm" in name.replace("_layer_norm", "layernorm"):
                value.add_(0.3 * torch.randn_like(value))
        for name, value in model.named_buffers():
            if name.endswith(("running_mean", "weight", "bias")):
                value.add_(0.1 * torch.randn_like(value))
            elif name.endswith("running_var"):
                value.mul_(0.5 + torch.rand_like(value))
    return model


def ours(queries=12, layers=3):
    overrides = {
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        "MODEL__RESNETS__NORM": "FrozenBN",
        "MODEL__RESNETS__OUT_FEATURES": ["res5"],
        "MODEL__CONDITIONAL_DETR__IN_FEATURE": "res5",
        "MODEL__CONDITIONAL_DETR__ENC_LAYERS": 2,
        "MODEL__CONDITIONAL_DETR__DEC_LAYERS": layers,
        "MODEL__CONDITIONAL_DETR__NUM_QUERIES": queries,
    }
    return build(tiny_cfg("ConditionalDETR", **overrides)).eval()


@pytest.fixture(scope="module")
def pair():
    theirs, model = hugging_face(), ours()
    converted = convert(theirs.state_dict(), CLASSES)
    assert converted.layout == "hugging face"
    assert not compare(converted.state, model), str(compare(converted.state, model))
    model.load_state_dict(converted.state, strict=False)
    return theirs, model


@torch.no_grad()
def test_decoder_encoder_and_heads_agree_on_a_padded_batch(pair):
    theirs, model = pair
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *CANVAS, generator=generator)
    mask = torch.zeros(2, *CANVAS)
    for index, (height, width) in enumerate(SIZES):
        mask[index, :height, :width] = 1
    images = images * mask[:, None]
    expected = theirs(
        pixel_values=images, pixel_mask=mask.long(), output_attentions=True, return_dict=True
    )
    memory = model.encode(model.backbone(images), ImageList(images, SIZES))
    assert memory.valid is not None and not memory.valid.all()
    found = model.decode(memory, keep_attention=True)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.logits[-1], expected.logits, **close)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, **close)
    for layer in range(3):
        own, other = found.self_attention[layer].map(), expected.decoder_attentions[layer]
        torch.testing.assert_close(own, other, **close)
        own, other = found.cross_attention[layer].map(), expected.cross_attentions[layer]
        torch.testing.assert_close(own, other, **close)
        assert not own.masked_select(~memory.valid[:, None, None].expand_as(own)).any()


@torch.no_grad()
def test_without_padding(pair):
    theirs, model = pair
    images = torch.randn(2, 3, *CANVAS, generator=torch.Generator().manual_seed(1))
    expected = theirs(pixel_values=images)
    memory = model.encode(model.backbone(images), ImageList(images, [CANVAS] * 2))
    assert memory.valid is None
    found = model.decode(memory)
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=1e-5, atol=1e-5)
