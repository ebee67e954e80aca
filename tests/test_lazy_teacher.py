"""Teachers of detectron2's new baselines: LazyConfig files."""

import kd_models
import pytest
import torch

from projects.kd import ConfigError, build_teacher

LAZY = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet

model = model_zoo.get_config("common/models/retinanet.py").model
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.stages = L(ResNet.make_default_stages)(depth=18, norm="BN")
model.backbone.out_channels = 16
model.backbone.top_block.in_channels = 512
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
model.num_classes = 3
model.pixel_mean = [1.0, 2.0, 3.0]
train = dict(init_checkpoint={weights!r})
dataloader = dict(train=dict(mapper=dict(image_format="RGB"), dataset=dict(names="shapes_train")))
"""


def test_lazy_config_teacher(tmp_path):
    path, weights = tmp_path / "teacher.py", str(tmp_path / "lazy.pth")
    path.write_text(LAZY.replace("{weights!r}", repr(weights)))
    cfg = kd_models.distill_cfg((str(path), ""))
    cfg.KD.TEACHER.OPTS = ["model.pixel_std", "[7.0,7.0,7.0]"]
    cfg.KD.TEACHER.ALLOW_MISSING = True
    with pytest.raises(ConfigError, match=r"KD\.TEACHER\.WEIGHTS.*lazy\.pth"):
        build_teacher(cfg)
    from detectron2.config import LazyConfig, instantiate

    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(path)).model)
    torch.save({"model": model.state_dict()}, weights)
    cfg.KD.TEACHER.ALLOW_MISSING = False
    teacher = build_teacher(cfg)
    assert teacher.cfg.MODEL.RETINANET.NUM_CLASSES == 3 and teacher.input_format == "RGB"
    assert teacher.model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert teacher.model.pixel_std.flatten().tolist() == [7.0, 7.0, 7.0]
    assert all(
        torch.equal(value, model.state_dict()[n]) for n, value in teacher.model.state_dict().items()
    )
    wrapper = kd_models.build_wrapper(cfg)
    assert kd_models.losses_at(wrapper, kd_models.make_batch())["loss_kd_mimic"] > 0


@pytest.mark.parametrize(
    "text", ["model = (", "import no_such_module_of_mine", "train = dict()", "model = dict(a=1)"]
)
def test_broken_lazy_configs_end_in_one_line(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^KD\.TEACHER\.CONFIG_FILE: .*broken\.py") as error:
        build_teacher(kd_models.distill_cfg((str(path), "")))
    assert "\n" not in str(error.value)
