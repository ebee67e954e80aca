"""What kd-benchmark d3etr compares is the same mathematics."""

import pytest
from detectron2.utils.events import EventStorage
from kd_models import distill_cfg, tiny_cfg, write_config, write_teacher

from projects.kd.commands.benchmark import d3etr as tool


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    teacher = write_teacher(folder, tiny_cfg("ConditionalDETR"))
    cfg = distill_cfg(teacher, "ConditionalDETR", ("D3ETR",))
    config = write_config(cfg, folder / "student.yaml")
    return ["--config-file", config, "--size", "64x96", "--rounds", "2"]


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


def test_a_heads_own_cost_ends_at_what_the_decoder_gave(words):
    with EventStorage(1):
        bench = tool.build(tool.parse_arguments(words))
        decoded = bench.ctx.student_outputs["decoded"]
        assert decoded.logits.is_leaf and decoded.logits.requires_grad
        assert decoded.memory.keys[0].is_leaf and decoded.cross_attention[0].query.is_leaf
        before = [p.grad for p in bench.model.student.parameters()]
        bench.head("D3ETR")()
        bench.head("D3ETR")()
    assert before == [p.grad for p in bench.model.student.parameters()] == [None] * len(before)
