"""Keys that do not fit each other: the failure of building names the one to change."""

import kd_models
import pytest
from detectron2.modeling import BACKBONE_REGISTRY

from projects.kd.building import build_detector
from projects.kd.errors import ConfigError


def refused(message, arch="RetinaNet", **overrides):
    with pytest.raises(ConfigError, match=message) as error:
        build_detector(kd_models.tiny_cfg(arch, **overrides))
    assert "\n" not in str(error.value)


def test_a_key_is_named_with_whose_default_the_model_builds():
    refused(
        r"^MODEL\.RETINANET\.IN_FEATURES is \['p3', 'p9'\] \(\['p3', 'p4', .*KeyError: 'p9'",
        MODEL__RETINANET__IN_FEATURES=["p3", "p9"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[32]],
    )
    # 32 groups do not divide 16 channels
    both = r"^MODEL\.FPN\.OUT_CHANNELS is 16 \(256 would do\) or MODEL\.FPN\.NORM is 'GN' \('' w"
    refused(both, MODEL__FPN__NORM="GN")


def test_else_a_key_whose_value_the_message_quotes():
    refused(r"^MODEL\.FPN\.IN_FEATURES is \['res9'\]: the model", MODEL__FPN__IN_FEATURES=["res9"])


def test_an_error_in_a_package_of_the_users_keeps_its_traceback():
    @BACKBONE_REGISTRY.register()
    def build_backbone_with_a_bug(cfg, shape):
        return {}["missing"]

    try:
        with pytest.raises(KeyError, match="missing"):
            build_detector(kd_models.tiny_cfg(MODEL__BACKBONE__NAME="build_backbone_with_a_bug"))
    finally:
        BACKBONE_REGISTRY._obj_map.pop("build_backbone_with_a_bug")


def test_the_source_of_the_config_comes_first():
    cfg = kd_models.tiny_cfg(MODEL__FPN__NORM="GN")
    with pytest.raises(ConfigError, match=r"^KD\.TEACHER\.CONFIG_FILE 'x': MODEL\.FPN\."):
        build_detector(cfg, "KD.TEACHER.CONFIG_FILE 'x'")
