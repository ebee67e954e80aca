"""LazyConfig students train as their file says, resume to the bit, and save stock checkpoints."""

import types

import kd_lazy
import kd_models
import pytest
import torch
import toy_data
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import LRMultiplier
from detectron2.utils.events import EventStorage
from kd_runs import interrupt, start

from projects.kd import ConfigError, build_training_model, load_config
from projects.kd.building import build_detector
from projects.kd.check import check_config
from projects.kd.commands import train
from projects.kd.data.loader import build_train_loader
from projects.kd.engine import processes
from projects.kd.engine.optim import build_optimizations
from projects.kd.evaluation import evaluate

NAME = "noise_lazy"
EVALUATOR = "\nfrom kd_lazy import Seen\ndataloader['evaluator'] = L(Seen)()\n"


@pytest.fixture
def data(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


def teacher_of(folder, name="retinanet"):
    """A teacher's file and its random weights."""
    path = kd_lazy.write_model(folder, name)
    torch.manual_seed(1)
    weights = str(folder / f"{name}.pth")
    cfg = load_config(path, ["train.device=cpu"])
    torch.save({"model": build_detector(cfg).state_dict()}, weights)
    return path, weights


def distilled(folder, name, teacher, heads=("CWD",), more=""):
    kd = {"heads": list(heads), "teacher": {"config_file": teacher[0], "weights": teacher[1]}}
    return kd_lazy.write_training(folder, name, NAME, f"kd = {kd!r}\n{more}")


def test_a_plain_student_trains_as_a_loop_of_the_files_own_parts(tmp_path, data):
    path = kd_lazy.write_training(tmp_path, "fcos", NAME)
    trainer = start(load_config(path, ["SOLVER.CHANNELS_LAST=False"]), seed=0)
    trainer.train()

    lazy = LazyConfig.load(path)
    torch.manual_seed(0)
    model = instantiate(lazy.model).train()
    lazy.optimizer.params.model = model
    optimizer = instantiate(lazy.optimizer)
    scheduler = LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), max_iter=6)
    batches = iter(build_train_loader(load_config(path), seed=11))
    rates = {}
    with EventStorage(0) as storage, torch.jit.optimized_execution(False):
        for step in range(6):
            batch = next(batches)
            assert {min(x["image"].shape[1:]) for x in batch} <= {32, 48}
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            rates[step] = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            storage.step()
    ours = {i: v for v, i in trainer.storage.history("lr").values()}
    assert ours == pytest.approx(rates) and rates[0] == pytest.approx(1e-4) and rates[5] < 2e-4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_distilled_run_resumes_to_the_bit_and_its_weights_are_detectron2s(tmp_path, data):
    path = distilled(tmp_path, "fcos", teacher_of(tmp_path))
    straight = start(load_config(path, [f"train.output_dir={tmp_path}/straight"]))
    straight.train()
    cfg = load_config(path)
    interrupt(start(cfg), at=5)
    torch.manual_seed(5)
    resumed = start(cfg, resume=True, seed=99)
    assert resumed.start_iter == 4
    resumed.train()
    ours, theirs = resumed.student.state_dict(), straight.student.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {len(x["params"]) > 0 for x in resumed.optimizer.param_groups} == {True}

    model = instantiate(LazyConfig.load(path).model)
    found = DetectionCheckpointer(model).load(str(tmp_path / "student" / "model_final.pth"))
    assert "distill" in found and not (tmp_path / "student" / "student.yaml").exists()
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())

    changed = load_config(path, ["optimizer.weight_decay=0.2", "model.test_nms_thresh=0.4"])
    again = start(changed, resume=True)
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.2


def test_what_a_resumed_run_changes_is_named(tmp_path, data, caplog):
    path = kd_lazy.write_training(tmp_path, "fcos", NAME, more="train.update(max_iter=2)\n")
    start(load_config(path)).train()
    start(load_config(path, ["train.max_iter=4", "model.test_nms_thresh=0.4"]), resume=True)
    (line,) = [x.message for x in caplog.records if "other values than before" in x.message]
    assert "SOLVER.MAX_ITER 2 -> 4" in line and "model.test_nms_thresh 0.6 -> 0.4" in line


def test_adapters_have_the_files_rate_and_the_student_its_groups(tmp_path, data):
    path = distilled(tmp_path, "fcos", teacher_of(tmp_path))
    cfg = load_config(path, ["kd.adapter.type=conv1x1", "KD.ADAPTER.LR_FACTOR", "3.0"])
    model = build_training_model(cfg)
    (main,) = build_optimizations(cfg, model).values()
    groups = main.optimizer.param_groups
    owner = {id(p): group for group in groups for p in group["params"]}
    adapter = owner[id(model.heads["CWD"].adapters["p3"].weight)]
    assert (adapter["initial_lr"], adapter["weight_decay"]) == pytest.approx((3e-3, 0.1))
    norm = owner[id(model.student.backbone.bottom_up.stem.conv1.norm.weight)]
    assert (norm["initial_lr"], norm["weight_decay"]) == (1e-3, 0.0), "weight_decay_norm"
    assert type(main.optimizer) is torch.optim.AdamW and groups[0]["betas"] == (0.9, 0.99)
    assert len(owner) == len([p for p in model.parameters() if p.requires_grad])


def test_evaluation_uses_the_files_loader_and_evaluator(tmp_path, data, caplog):
    path = kd_lazy.write_training(tmp_path, "fcos", NAME, EVALUATOR)
    cfg = load_config(path)
    found = evaluate(cfg, build_detector(cfg))["bbox"]
    assert (found["AP"], found["side"]) == (len(data), 53)
    swapped = load_config(path, ["INPUT.FORMAT", "BGR"])
    other = evaluate(swapped, build_detector(cfg))["bbox"]
    assert found["first"] == pytest.approx(other["last"]) != found["last"]
    bare = load_config(kd_lazy.write_training(tmp_path, "fcos", NAME, name="bare"))
    assert evaluate(bare, build_detector(bare)) == {}
    assert "bare.py: has no dataloader.evaluator, nothing is evaluated" in caplog.text


def test_the_command_evaluates_the_student_alone(tmp_path, data):
    more = f"{EVALUATOR}kd = dict(heads=['CWD'], teacher=dict(config_file='absent.py'))\n"
    path = kd_lazy.write_training(tmp_path, "fcos", NAME, more)
    weights = str(tmp_path / "w.pth")
    torch.save({"model": build_detector(load_config(path)).state_dict()}, weights)
    words = ["--config-file", path, "--eval-only", "MODEL.WEIGHTS", weights]
    args = train.parse_arguments([*words, "dataloader.test.num_workers=0"])
    assert train.main(args)["bbox"]["AP"] == len(data)


def test_samplers_get_the_seed_and_other_loaders_are_used_as_they_are(tmp_path, data, caplog):
    more = """
from detectron2.data.samplers import RepeatFactorTrainingSampler
from kd_lazy import repeat_factors
dataloader["train"].sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(repeat_factors)(count=12)
)
"""
    path = kd_lazy.write_training(tmp_path, "fcos", NAME, more)

    def stream(skip, count):
        batches = iter(build_train_loader(load_config(path), skip, seed=3))
        return [[x["image_id"] for x in next(batches)] for _ in range(count)]

    assert stream(0, 5)[2:] == stream(2, 3)

    own = kd_lazy.write_training(tmp_path, "fcos", NAME, "dataloader['train'] = L(list)()\n", "own")
    assert build_train_loader(load_config(own), 2, seed=3) == []
    assert "starts anew: the resumed run is not exact" in caplog.text


PAIRS = {
    "vitdet": "swin",
    "swin": "vitdet",
    "mvit": "vitdet",
    "fcos": "retinanet",
    "retinanet": "fcos",
    "baseline": "mvit",
}


@pytest.mark.parametrize("student", PAIRS)
def test_every_family_as_student_and_as_teacher(student, tmp_path, data):
    teacher = teacher_of(tmp_path, PAIRS[student])
    cfg = load_config(distilled(tmp_path, student, teacher, more="train.update(seed=1)\n"))
    torch.manual_seed(3)
    model = build_training_model(cfg).train()
    before = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    losses = kd_models.losses_at(model, kd_models.make_batch(sizes=((64, 48), (40, 64))))
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_kd_cwd"] > 0
    sum(losses.values()).backward()
    reached = [n for n, p in model.student.backbone.named_parameters() if p.grad is not None]
    unreached = {n for n, _ in model.student.backbone.named_parameters()} - set(reached)
    assert not [n for n in unreached if "norm" not in n], unreached
    after = model.teacher.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_processes_exchange_gradients_as_the_file_says(tmp_path, monkeypatch):
    path = kd_lazy.write_training(tmp_path, "fcos", NAME)
    cfg = load_config(path, ["train.ddp.fp16_compression=True", "train.ddp.broadcast_buffers=True"])
    made = []

    class Wrapped:
        def __init__(self, model, **options):
            made.append(options)

        def register_comm_hook(self, state, hook):
            made.append(hook)

    monkeypatch.setattr(processes, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(
        processes, "comm", types.SimpleNamespace(get_world_size=lambda: 2, all_gather=lambda x: [x])
    )
    monkeypatch.setattr(processes.torch.distributed, "get_backend", lambda: "gloo")
    processes.wrap_ddp(cfg, torch.nn.Linear(1, 1))
    options, hook = made
    assert options["broadcast_buffers"] and hook is processes.fp16_compress_hook
    processes.wrap_ddp(load_config(path), torch.nn.Linear(1, 1))
    assert not made[2]["broadcast_buffers"] and len(made) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("del optimizer\n", r"student\.py: training needs optimizer too"),
        ("optimizer.params = None\n", r"optimizer\.params has to be a LazyCall"),
        ("lr_multiplier = dict(a=1)\n", r"lr_multiplier gives a DictConfig"),
        ("optimizer.nesterof = True\n", r"optimizer cannot be instantiated \(TypeError.*nesterof"),
        ("model.hed = 3\n", r"student\.py: model cannot be instantiated \(TypeError.*hed"),
        (
            "dataloader['train'].collate_fn = list\n",
            r"dataloader\.train\.collate_fn cannot be used",
        ),
    ],
)
def test_files_that_cannot_train_are_refused(tmp_path, data, more, message):
    cfg = load_config(kd_lazy.write_training(tmp_path, "fcos", NAME, more))
    with pytest.raises(ConfigError, match=message) as error:
        check_config(cfg)
        build_optimizations(cfg, build_training_model(cfg))
        build_train_loader(cfg, seed=0)
    assert "\n" not in str(error.value)
