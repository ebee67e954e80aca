"""Images without labels: task losses and heads of mixed batches, and of batches without labels."""

import kd_models
import pytest
import torch

HEADS = ("Mimic", "CWD", "PKD", "AT")
SMALL, LARGE = ((64, 96), (96, 64)), ((64, 128), (32, 64))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return {
        arch: kd_models.write_teacher(tmp_path_factory.mktemp(arch), kd_models.tiny_cfg(arch))
        for arch in ("RetinaNet", "GeneralizedRCNN", "ConditionalDETR")
    }


def unlabelled(batch):
    """The same images without their labels."""
    keys = ("image", "image_teacher", "height", "width")
    return [{**{k: x[k] for k in keys if k in x}, "unlabeled": True} for x in batch]


def losses_of(wrapper, batch, seed=5):
    torch.manual_seed(seed)
    return kd_models.losses_at(wrapper, batch)


def gradients_of(wrapper, loss):
    parameters = dict(wrapper.named_parameters())
    found = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_task_losses_of_a_mixed_batch_are_those_of_the_labelled_part(teachers, arch):
    cfg = kd_models.distill_cfg(teachers[arch], arch, heads=("Mimic",))
    labelled = kd_models.make_batch(SMALL)
    others = unlabelled(kd_models.make_batch(LARGE, seed=3))
    alone = losses_of(kd_models.build_wrapper(cfg), labelled)
    wrapper = kd_models.build_wrapper(cfg)
    # in any order, with batch norms that train
    mixed = losses_of(wrapper, [others[0], labelled[0], others[1], labelled[1]])
    assert mixed.keys() == alone.keys()
    for name in alone.keys() - {"loss_kd_mimic"}:
        assert torch.equal(mixed[name], alone[name]), name
    assert mixed["loss_kd_mimic"] != alone["loss_kd_mimic"]
    own, task = gradients_of(wrapper, mixed["loss_kd_mimic"]), sum(alone.values())
    assert task.isfinite() and any("bottom_up" in name for name in own)


def test_heads_on_a_mixed_batch_equal_those_on_a_labelled_one(teachers):
    cfg = kd_models.distill_cfg(teachers["RetinaNet"], heads=HEADS, MODEL__RESNETS__NORM="FrozenBN")
    wrapper = kd_models.build_wrapper(cfg)
    batch = kd_models.make_batch(((64, 96), (64, 80)) * 2)
    mixed = batch[:2] + unlabelled(batch[2:])
    whole, parts = losses_of(wrapper, batch), losses_of(wrapper, mixed)
    assert whole.keys() == parts.keys()
    for name in (name for name in whole if name.startswith("loss_kd_")):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=0)
        expected = gradients_of(wrapper, whole[name])
        found = gradients_of(wrapper, parts[name])
        assert found.keys() == expected.keys()
        largest = max(value.abs().max().item() for value in expected.values())
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * largest)
