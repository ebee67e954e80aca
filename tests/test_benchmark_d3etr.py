"""What tools/benchmark_d3etr.py compares is the same mathematics."""

import importlib.util
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage
from kd_models import distill_cfg, tiny_cfg, write_config, write_teacher

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "benchmark_d3etr.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    teacher = write_teacher(folder, tiny_cfg("ConditionalDETR"))
    cfg = distill_cfg(teacher, "ConditionalDETR", ("D3ETR",))
    config = write_config(cfg, folder / "student.yaml")
    return ["--config-file", config, "--size", "64", "96", "--rounds", "2"]


def test_terms_from_kept_maps_are_the_heads_own(words):
    with EventStorage(1):
        terms = tool.attention_terms(tool.build(tool.parse_arguments(words)))
    ours = terms["ours"]()
    assert ours > 1e-4
    assert terms["full maps"]() == pytest.approx(ours, rel=1e-4)


def test_all_parts_are_measured(words, capsys):
    result = tool.main(tool.parse_arguments(words))
    assert set(result["seconds"]) == {"adaptive", "ground truth", "floor", "whole"}
    assert result["bytes"]["full maps"] > result["bytes"]["ours"] > 0
    assert "whole / floor" in capsys.readouterr().out
