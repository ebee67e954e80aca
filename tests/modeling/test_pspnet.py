"""PSPNet's head and dilated backbones."""

import kd_models
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from segmentation import CLASSES, label_batch, segmentor_cfg
from torch import nn

from projects.kd import ConfigError
from projects.kd.modeling.pspnet import PSPNetHead

SHAPE = ShapeSpec(channels=3, height=None, width=None)


def head(**options):
    shapes = {name: ShapeSpec(channels=c, stride=8) for name, c in (("res4", 8), ("res5", 16))}
    options = {"num_classes": 5, "conv_dims": 12, "norm": "", "dropout": 0.0, **options}
    torch.manual_seed(0)
    return PSPNetHead(shapes, in_features=["res4", "res5"], **options)


def features(n=2, h=9, w=7):
    torch.manual_seed(1)
    return {"res4": torch.randn(n, 8, h, w), "res5": torch.randn(n, 16, h, w)}


def test_logits_equal_the_formula():
    model, maps = head(), features()
    x = maps["res5"]
    parts = [x]
    for size, conv in zip((1, 2, 3, 6), model.pyramid, strict=True):
        cells = torch.stack(
            [
                torch.stack([block.mean((-2, -1)) for block in blocks(rows, size, -1)], -1)
                for rows in blocks(x, size, -2)
            ],
            -2,
        )
        reduced = F.relu(F.conv2d(cells, conv.weight, conv.bias))
        parts.append(F.interpolate(reduced, (9, 7), mode="bilinear", align_corners=False))
    y = F.relu(F.conv2d(torch.cat(parts, 1), *model.bottleneck.parameters(), padding=1))
    expected = F.conv2d(y, *model.predictor.parameters())
    torch.testing.assert_close(model.layers(maps), expected)


def blocks(x, count, dim):
    """Adaptive pooling's blocks: from floor(i n / count) to ceil((i + 1) n / count)."""
    n = x.shape[dim]
    return [
        x.narrow(dim, i * n // count, -(-(i + 1) * n // count) - i * n // count)
        for i in range(count)
    ]


def test_losses_are_means_over_labelled_pixels_and_the_auxiliary_one_has_its_weight():
    model, maps = head(aux_weight=0.4, loss_weight=2.0).train(), features()
    targets = torch.randint(0, 5, (2, 70, 54))  # less than 8 times the grid
    targets[0, :30] = 255
    _, losses = model(maps, targets)
    main = F.interpolate(model.layers(maps), scale_factor=8, mode="bilinear")[..., :70, :54]
    auxiliary = F.interpolate(model.auxiliary(maps["res4"]), scale_factor=8, mode="bilinear")
    expected = {
        "loss_sem_seg": 2.0 * F.cross_entropy(main, targets, ignore_index=255),
        "loss_sem_seg_aux": 0.8
        * F.cross_entropy(auxiliary[..., :70, :54], targets, ignore_index=255),
    }
    assert losses.keys() == expected.keys()
    for key, loss in expected.items():
        torch.testing.assert_close(losses[key], loss)


def test_all_ignored_labels_give_zero_and_not_nan():
    model = head().train()
    _, losses = model(features(), torch.full((2, 72, 56), 255))
    sum(losses.values()).backward()
    assert all(loss.item() == 0.0 for loss in losses.values())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_evaluation_upsamples_and_leaves_the_auxiliary_branch_out():
    model, maps = head().eval(), features()
    model.auxiliary = None  # would fail if it ran
    logits, losses = model(maps)
    assert logits.shape == (2, 5, 72, 56) and losses == {}
    plain = head(aux_feature="").train()
    assert plain(maps, torch.zeros(2, 72, 56, dtype=torch.long))[1].keys() == {"loss_sem_seg"}


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_batch_norm_over_one_cell_of_one_image_is_refused(norm):
    model = head(norm=norm).train()
    with pytest.raises(ConfigError, match=f"MODEL.SEM_SEG_HEAD.NORM: '{norm}'.*two images"):
        model(features(1), torch.zeros(1, 72, 56, dtype=torch.long))
    model.eval()(features(1))
    head(norm="BN", bins=(2, 3)).train()(features(1), torch.zeros(1, 72, 56, dtype=torch.long))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL__SEM_SEG_HEAD__COMMON_STRIDE", 4, "COMMON_STRIDE is 4, but res5 has stride 8"),
        ("MODEL__SEM_SEG_HEAD__IN_FEATURES", ["res3"], "the backbone gives res4, res5, not res3"),
        ("MODEL__SEM_SEG_HEAD__IN_FEATURES", [], "IN_FEATURES is empty"),
        ("MODEL__SEM_SEG_HEAD__PSPNET__AUX_FEATURE", "res2", "not res2"),
        ("MODEL__SEM_SEG_HEAD__PSPNET__BINS", [0, 1], "PSPNET.BINS"),
        ("MODEL__RESNETS__OUTPUT_STRIDE", 4, "MODEL.RESNETS.OUTPUT_STRIDE: 4 is not one of"),
        ("MODEL__RESNETS__RES5_DILATION", 2, "MODEL.RESNETS.RES5_DILATION"),
    ],
)
def test_bad_values_name_their_key(key, value, message):
    with pytest.raises(ConfigError, match=message):
        kd_models.build(segmentor_cfg(**{key: value}))


def resnet(depth, stride, **overrides):
    stages = ["res2", "res3", "res4", "res5"]
    cfg = segmentor_cfg(
        MODEL__RESNETS__DEPTH=depth,
        MODEL__RESNETS__RES2_OUT_CHANNELS=64 if depth < 50 else 32,
        MODEL__RESNETS__WIDTH_PER_GROUP=8,
        MODEL__RESNETS__OUTPUT_STRIDE=stride,
        MODEL__RESNETS__OUT_FEATURES=stages,
        **overrides,
    )
    torch.manual_seed(0)
    return build_backbone(cfg, SHAPE).eval()


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_strides_become_dilations_with_the_same_parameters(depth, stride_in_1x1):
    options = {"MODEL__RESNETS__STRIDE_IN_1X1": stride_in_1x1}
    plain = resnet(depth, 32, **options)
    image = torch.randn(1, 3, 96, 64)
    for stride in (8, 16):
        dilated = resnet(depth, stride, **options)
        dilated.load_state_dict(plain.state_dict())
        with torch.no_grad():
            outputs = dilated(image)
        for name, shape in dilated.output_shape().items():
            own = min(plain.output_shape()[name].stride, stride)
            assert shape.stride == own and outputs[name].shape[2:] == (96 // own, 64 // own)
        rates = {
            name: {m.dilation for m in getattr(dilated, name).modules() if is_3x3(m)}
            for name in outputs
        }
        four = (1, 1) if stride == 16 else (2, 2)
        five = (2, 2) if stride == 16 else (4, 4)
        assert rates == {"res2": {(1, 1)}, "res3": {(1, 1)}, "res4": {four}, "res5": {five}}


def is_3x3(module):
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def test_a_dilated_network_sees_what_the_plain_one_sees():
    """Every eighth cell of a stage computed densely is the strided stage's cell."""
    plain, dense = resnet(18, 32).res4[0], resnet(18, 8).res4[0]
    dense.load_state_dict(plain.state_dict())
    dense.conv1.dilation = dense.conv1.padding = (1, 1)  # the first convolution reads the old grid
    x = torch.randn(1, 128, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(dense(x)[..., ::2, ::2], plain(x))


def test_detectron2s_own_dilation_of_res5_is_the_same():
    from detectron2.modeling import build_resnet_backbone

    ours = resnet(50, 16, MODEL__RESNETS__STRIDE_IN_1X1=False)
    cfg = segmentor_cfg(
        MODEL__RESNETS__DEPTH=50,
        MODEL__RESNETS__RES2_OUT_CHANNELS=32,
        MODEL__RESNETS__WIDTH_PER_GROUP=8,
        MODEL__RESNETS__RES5_DILATION=2,
        MODEL__RESNETS__STRIDE_IN_1X1=False,
        MODEL__RESNETS__OUT_FEATURES=["res5"],
    )
    theirs = build_resnet_backbone(cfg, SHAPE).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(image)["res5"], theirs(image)["res5"])


def test_a_timm_backbone_of_output_stride_8():
    backbone = build_backbone(segmentor_cfg("pspnet_timm"), SHAPE)
    assert {name: s.stride for name, s in backbone.output_shape().items()} == {"res4": 8, "res5": 8}
    with torch.no_grad():
        outputs = backbone.eval()(torch.zeros(1, 3, 64, 96))
    for name, shape in backbone.output_shape().items():
        assert outputs[name].shape == (1, shape.channels, 8, 12)
    for kind in ("timm_fpn", "retinanet_timm_fpn", "fcos_timm_fpn"):
        cfg = segmentor_cfg("fpn_timm", MODEL__TIMM__OUTPUT_STRIDE=16)
        cfg.MODEL.BACKBONE.NAME = f"build_{kind}_backbone"
        with pytest.raises(ConfigError, match="MODEL.TIMM.OUTPUT_STRIDE: an FPN needs 32"):
            kd_models.build(cfg)
    with pytest.raises(ConfigError, match="MODEL.TIMM.OUTPUT_STRIDE: 4 is not 8, 16 or 32"):
        kd_models.build(segmentor_cfg("pspnet_timm", MODEL__TIMM__OUTPUT_STRIDE=4))


def test_a_few_steps_fit_a_batch():
    model = kd_models.build(segmentor_cfg(MODEL__SEM_SEG_HEAD__PSPNET__DROPOUT=0.0)).train()
    batch = label_batch(((32, 32),) * 2, classes=CLASSES)
    before = sum(kd_models.losses_at(model, batch).values()).item()
    kd_models.train_steps(model, batch, steps=20, lr=0.05)
    assert sum(kd_models.losses_at(model, batch).values()).item() < 0.9 * before
