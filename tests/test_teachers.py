"""Several teachers: each as if it were the only one, under its own name."""

from __future__ import annotations

import copy
from pathlib import Path

import kd_models
import kd_runs
import pytest
import torch
import toy_data
import yaml
from detectron2.utils.events import EventStorage
from kd_suites import make_suite

from projects.kd import evaluation
from projects.kd.analysis.suite_lessons import lessons_of
from projects.kd.analysis.suites import make_runs, select_rows
from projects.kd.check import check_config
from projects.kd.config import add_kd_config, get_cfg, load_config
from projects.kd.config.key_checks import check_each
from projects.kd.config.teachers import config_of, config_of_head, image_scale, key_of_head
from projects.kd.data.mapper import build_train_mapper
from projects.kd.engine.optim import build_optimizations
from projects.kd.errors import ConfigError

HEADS = ("PKD", "BCKD")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two teachers of other weights; config and weights of each."""
    return [
        kd_models.write_teacher(tmp_path_factory.mktemp(f"teacher{seed}"), seed=seed)
        for seed in (1, 2)
    ]


def node(files, **options):
    return {"CONFIG_FILE": files[0], "WEIGHTS": files[1], **options}


def make_cfg(tmp_path, teachers, heads=HEADS, **kd):
    """The config of a file with these teachers, on top of a tiny student's."""
    kd = {"META_ARCHITECTURE": "DistillMetaArch", "HEADS": list(heads), **kd, "TEACHERS": teachers}
    student = tmp_path / "plain.yaml"
    kd_models.write_config(kd_models.tiny_cfg(), student)
    path = tmp_path / "student.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": "plain.yaml", "KD": kd}))
    return load_config(str(path))


def build(cfg):
    return kd_models.build_wrapper(cfg)


def step(model, batch):
    losses = kd_models.losses_at(model, batch)
    model.zero_grad()
    sum(losses.values()).backward()
    found = {k: p.grad.clone() for k, p in model.student.named_parameters() if p.grad is not None}
    return losses, found


def test_the_same_teacher_twice_with_half_the_weight_is_that_teacher(files, tmp_path):
    batch = kd_models.make_batch(sizes=((64, 64),))
    half = node(files[0], WEIGHT=0.5)
    losses, gradients = step(build(make_cfg(tmp_path, {"ONE": half, "TWO": half})), batch)
    alone, expected = step(build(kd_models.distill_cfg(files[0], heads=HEADS)), batch)
    distilled = {key for key in alone if key.startswith("loss_kd_")}
    assert len(distilled) == 3
    for key, loss in alone.items():
        if key not in distilled:
            assert torch.equal(losses.pop(key), loss)
            continue
        parts = [losses.pop(key.replace("loss_kd_", f"loss_kd_{x}_")) for x in ("one", "two")]
        assert torch.equal(parts[0], parts[1]) and torch.equal(sum(parts), loss)
    assert not losses and gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key])


def test_each_teaches_as_if_it_were_the_only_one(files, tmp_path):
    """Other weights, heads, levels, pairs of levels and image sizes."""
    teachers = {
        "NEAR": node(files[0], INPUT_SCALE=2.0, HEADS=["PKD"], PKD={"LEVELS": ["p3"]}),
        "FAR": node(files[1], WEIGHT=2.0, LEVEL_MAP=[["p3", "p3"], ["p4", "p4"]]),
    }
    cfg = make_cfg(tmp_path, teachers, PKD={"WEIGHT": 3.0, "LEVELS": ["p3", "p4"]})
    model = build(cfg)
    batch = kd_models.make_batch(sizes=((64, 128), (128, 64)), teacher_scale=2.0)
    found = kd_models.losses_at(model, batch)
    assert list(model.heads) == ["FAR-PKD", "FAR-BCKD", "NEAR-PKD"]
    expected = {}
    for name, weight in (("FAR", 2.0), ("NEAR", 1.0)):
        alone = build(config_of(cfg, name))
        # the canvas is one for all: the coarsest level of the teacher at twice the size
        alone._padding = model._padding
        for key, loss in kd_models.losses_at(alone, batch).items():
            if key.startswith("loss_kd_"):
                expected[key.replace("loss_kd_", f"loss_kd_{name.lower()}_")] = loss * weight
            else:
                torch.testing.assert_close(found[key], loss)
    assert len(expected) == 4 and expected.keys() < found.keys()
    for key, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(found[key], loss)
    first, second = (x.teacher.model.state_dict() for x in model.links)
    assert any(not torch.equal(x, second[key]) for key, x in first.items())


def test_weights_that_set_themselves_and_scalars_have_their_own_names(files, tmp_path):
    teachers = {"ONE": node(files[0]), "TWO": node(files[1], CROSSKD={"SHARE": 0.5})}
    cfg = make_cfg(
        tmp_path, teachers, heads=("CrossKD",), BALANCE={"TARGET": 0.1, "BOUND": 1e6}, LOG_PERIOD=1
    )
    model = build(cfg)
    assert {k: v.start for k, v in model.balance.targets.items()} == {
        "ONE-CrossKD": 0.1,
        "TWO-CrossKD": 0.5,
    }
    with EventStorage() as storage:
        model(kd_models.make_batch(sizes=((64, 64),)))
    logged = {key: value for key, (value, _) in storage.latest().items()}
    for name, target in (("ONE", 0.1), ("TWO", 0.5)):
        assert logged[f"kd/share_{name}-CrossKD"] == pytest.approx(target, rel=1e-3)
        assert f"kd/{name.lower()}_crosskd_gain" in logged
    assert {"ONE-CrossKD.balance_state", "TWO-CrossKD.balance_state"} <= set(
        model.heads.state_dict()
    )


def test_heads_with_optimizers_of_their_own_have_one_each(files, tmp_path):
    csa = {"DIM": 8, "HEADS": 2, "OPTIMIZER": {"BASE_LR": 0.5}}
    teachers = {"ONE": node(files[0], CSA=csa), "TWO": node(files[1])}
    cfg = make_cfg(tmp_path, teachers, heads=("CSA",), CSA={"DIM": 16, "HEADS": 2})
    model = build(cfg)
    assert model.heads["ONE-CSA"].attention is not model.heads["TWO-CSA"].attention
    found = build_optimizations(cfg, model)
    rates = {k: x.optimizer.param_groups[0]["initial_lr"] for k, x in found.items()}
    assert rates["ONE-CSA"] == 0.5 and rates["TWO-CSA"] == cfg.KD.CSA.OPTIMIZER.BASE_LR
    assert key_of_head("ONE-CSA") == "KD.TEACHERS.ONE.CSA" and key_of_head("CSA") == "KD.CSA"
    own, head = config_of_head(cfg, "ONE-CSA")
    assert (own.KD[head.upper()].DIM, own.KD.CSA.OPTIMIZER.NAME) == (8, "Adam")


def test_a_copy_keeps_its_teachers_and_its_own_taps(files, tmp_path):
    model = build(make_cfg(tmp_path, {"ONE": node(files[0]), "TWO": node(files[1])}))
    twin = copy.deepcopy(model)
    assert [x.teacher for x in twin.links] == [x.teacher for x in model.links]
    batch = kd_models.make_batch(sizes=((64, 64),))
    one, other = (kd_models.losses_at(x, batch) for x in (model, twin))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_suite_gives_each_the_weights_of_the_row_with_its_config(tmp_path):
    suite = make_suite()
    shapes = Path(suite["rows"][0]["config"]).parent
    fcos = {"name": "other", "config": str(shapes / "fcos_teacher.yaml"), "role": "teacher"}
    two = {"name": "two", "config": str(shapes / "retinanet_student_two_teachers.yaml")}
    suite["rows"] = [*suite["rows"][:2], fcos, two]
    assert lessons_of(suite) == {
        "two": {"KD.TEACHERS.FCOS": "other", "KD.TEACHERS.RETINANET": "teacher"}
    }
    runs = {run.row["name"]: run for run in make_runs(suite, [1], str(tmp_path), [])}
    own = runs["two"].cfg.KD.TEACHERS
    assert own.FCOS.WEIGHTS == runs["other"].weights != own.RETINANET.WEIGHTS
    assert own.RETINANET.WEIGHTS == runs["teacher"].weights
    assert [x["name"] for x in select_rows(suite["rows"], ["two"])] == ["teacher", "other", "two"]


def test_a_run_that_resumes_with_two_teachers_is_the_same_run(files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    toy_data.register_noise(tmp_path, "noise_teachers")
    teachers = {"A": node(files[0]), "B": node(files[1], WEIGHT=0.5)}
    own = make_cfg(tmp_path, teachers, heads=("Mimic",), BALANCE={"TARGET": 0.1, "PERIOD": 1})

    def cfg_of(folder):
        cfg = own.clone()
        settings = kd_runs.run_settings(tmp_path, folder, "noise_teachers")
        settings |= {"SOLVER__MAX_ITER": 3, "SOLVER__STEPS": (), "KD__ADAPTER__TYPE": "conv1x1"}
        cfg.merge_from_list([x for k, v in settings.items() for x in (k.replace("__", "."), v)])
        return cfg

    whole = kd_runs.start(cfg_of("whole"))
    whole.train()
    kd_runs.interrupt(kd_runs.start(cfg_of("cut")), at=2)
    again = kd_runs.start(cfg_of("cut"), resume=True)
    again.train()
    states = [x._unwrapped.state_dict() for x in (whole, again)]
    assert {"heads.A-Mimic.balance_state", "heads.B-Mimic.adapters.p3.weight"} <= set(states[0])
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert not torch.equal(
        states[0]["heads.A-Mimic.adapters.p3.weight"], states[0]["heads.B-Mimic.adapters.p3.weight"]
    )


# --- the config ----------------------------------------------------------------------------------


def test_files_overrides_and_dumps(files, tmp_path):
    cfg = make_cfg(tmp_path, {"B": node(files[1], PKD={"WEIGHT": 2.0}), "A": node(files[0])})
    assert cfg.KD.TEACHERS.B.PKD == {"WEIGHT": 2.0}  # what differs, nothing else
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: student.yaml\nKD: {TEACHERS: {A: {HEADS: [CWD], WEIGHT: 0.5}}}\n")
    words = ["KD.TEACHERS.B.PKD.LEVELS", "('p3',)", "KD.TEACHERS.A.CLASS_MAP", "by_name"]
    cfg = load_config(str(child), words)
    assert cfg.KD.TEACHERS.A.CONFIG_FILE == files[0][0] and cfg.KD.TEACHERS.A.HEADS == ("CWD",)
    own = config_of(cfg, "B")
    assert (own.KD.PKD.WEIGHT, own.KD.PKD.LEVELS, tuple(own.KD.HEADS)) == (2.0, ("p3",), HEADS)
    assert own.KD.TEACHER.CONFIG_FILE == files[1][0] and not own.KD.TEACHERS
    assert config_of(cfg, "A").KD.TEACHER.CLASS_MAP == ["by_name"]
    check_each(cfg, ("KD",))
    again = tmp_path / "again.yaml"
    again.write_text(cfg.dump())
    assert load_config(str(again)).dump() == cfg.dump()


def test_files_beside_the_config_are_found(tmp_path):
    kd_models.write_config(kd_models.tiny_cfg(), tmp_path / "big.yaml")
    cfg = make_cfg(tmp_path, {"A": {"CONFIG_FILE": "big.yaml"}})
    assert cfg.KD.TEACHERS.A.CONFIG_FILE == str(tmp_path / "big.yaml")


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ({"A": {"WEIGTH": 1.0}}, "KD.TEACHERS.A: unknown key WEIGTH; did you mean WEIGHT"),
        ({"A": {"PKD": {"LEVLES": []}}}, "KD.TEACHERS.A.PKD: unknown key LEVLES; did you mean LEV"),
        ({"A": {"META_ARCHITECTURE": "X"}}, "KD.TEACHERS.A: unknown key META_ARCHITECTURE"),
        ({"A": "a.yaml"}, "KD.TEACHERS.A is 'a.yaml', but it is a group of keys"),
        ({"A": {"PKD": 2.0}}, "KD.TEACHERS.A.PKD is 2.0, but it is a group of keys"),
        ({"A-B": {}}, "KD.TEACHERS.A-B: a teacher's name is a word"),
        ({"big": {}, "Big": {}}, "KD.TEACHERS.big: Big has this name already"),
        (["a.yaml"], "KD.TEACHERS is .*, but it is a group of keys"),
        ({"A": {"OPTS": None}}, "KD.TEACHERS.A.OPTS has no value"),
    ],
)
def test_wrong_nodes_are_one_line(tmp_path, teachers, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_cfg(tmp_path, teachers)
    assert "\n" not in str(caught.value)


def test_wrong_values_are_told_of_the_teacher(files, tmp_path):
    cfg = make_cfg(tmp_path, {"A": node(files[0], INPUT_SCALE=-1.0)})
    with pytest.raises(ConfigError, match="KD.TEACHERS.A.INPUT_SCALE is -1.0, it must be"):
        check_each(cfg, ("KD",))
    cfg = make_cfg(tmp_path, {"A": node(files[0], WEIGHT=-1.0)})
    with pytest.raises(ConfigError, match="KD.TEACHERS.A.WEIGHT is -1.0, it must be"):
        check_each(cfg, ("KD",))


def checked(cfg):
    cfg.KD.META_ARCHITECTURE = "DistillMetaArch"
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    check_config(cfg)


@pytest.mark.parametrize(
    ("teachers", "kd", "words"),
    [
        ({"A": {}}, {}, "KD.TEACHERS.A.CONFIG_FILE is empty"),
        ({"A": {"CONFIG_FILE": "no.yaml"}}, {}, "KD.TEACHERS.A.CONFIG_FILE: .*no.yaml"),
        ({"A": {"HEADS": ["PKD", "PKD"]}}, {}, "KD.TEACHERS.A: KD.HEADS names PKD twice"),
        ({"A": {}}, {"TEACHER": {"CONFIG_FILE": "b.yaml"}}, "KD.TEACHER.CONFIG_FILE is set, and"),
        ({"A": {}}, {"INIT_FROM_TEACHER": ["head."]}, "KD.INIT_FROM_TEACHER is set, and"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(tmp_path, teachers, kd, words):
    with pytest.raises(ConfigError, match=words) as caught:
        checked(make_cfg(tmp_path, teachers, **kd))
    assert "\n" not in str(caught.value)


def test_what_several_must_agree_in(files, tmp_path):
    one, two = (node(x, INPUT_SCALE=s) for x, s in zip(files, (2.0, 0.5), strict=True))
    with pytest.raises(ConfigError, match="KD.TEACHERS.A: 2, KD.TEACHERS.B: 0.5"):
        checked(make_cfg(tmp_path, {"A": one, "B": two}))
    one, two = (node(x, INIT_FROM_TEACHER=["head."]) for x in files)
    with pytest.raises(ConfigError, match="KD.TEACHERS.B.INIT_FROM_TEACHER: .*A and B"):
        checked(make_cfg(tmp_path, {"A": one, "B": two}))
    cfg = make_cfg(tmp_path, {"A": node(files[0]), "B": node(files[1], INPUT_SCALE=2.0)})
    checked(cfg)
    assert image_scale(cfg) == 2.0
    mapper = build_train_mapper(cfg)
    while not hasattr(mapper, "teacher_scale"):
        mapper = mapper.mapper
    assert mapper.teacher_scale == 2.0
    assert image_scale(kd_models.distill_cfg(files[0])) == 1.0


def test_a_teacher_that_shares_no_level_is_refused_by_its_name(files, tmp_path):
    coarse = kd_models.tiny_cfg(
        "ConditionalDETR",
        MODEL__RESNETS__OUT_FEATURES=["res2"],
        MODEL__CONDITIONAL_DETR__IN_FEATURE="res2",
    )
    other = kd_models.write_teacher(tmp_path, coarse, kd_models.build(coarse))
    cfg = make_cfg(tmp_path, {"A": node(files[0]), "B": node(other)}, heads=("PKD",))
    with pytest.raises(ConfigError, match="KD.TEACHERS.B: KD.LEVEL_MAP: .* share no level"):
        build(cfg)
    cfg = make_cfg(tmp_path, {"A": node((files[0][0], str(tmp_path / "none.pth")))})
    with pytest.raises(ConfigError, match="KD.TEACHERS.A.WEIGHTS: .*none.pth"):
        build(cfg)


def test_a_config_without_them_is_as_before():
    cfg = get_cfg()
    add_kd_config(cfg)
    assert config_of(cfg, "") is cfg and key_of_head("PKD") == "KD.PKD"
    assert config_of_head(cfg, "PKD") == (cfg, "PKD")
