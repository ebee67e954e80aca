"""Pictures of evaluations: what is on them, when they come, and that training does not notice."""

import kd_models
import numpy as np
import pytest
import torch
import toy_data
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from kd_runs import run_settings, start

from projects.kd import evaluation
from projects.kd.engine.eval_pictures import EvalPictures
from projects.kd.engine.hooks import running_floats
from projects.kd.engine.pulls import heat_row, pulls, undisturbed
from projects.kd.evaluation.pictures import truth_and_predictions

NAME = "noise_pictures"


@pytest.fixture
def records(tmp_path):
    return toy_data.register_noise(tmp_path, NAME)


def test_truth_is_left_and_sure_predictions_are_right(records):
    found = Instances((48, 64))
    found.pred_boxes = Boxes(torch.tensor([[30.0, 10, 60, 40], [2, 2, 12, 12]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.1]), torch.tensor([1, 2])
    record = records[1] | {"annotations": [], "sem_seg_file_name": "not_read.png"}
    metadata = MetadataCatalog.get(NAME)
    picture = truth_and_predictions(record, {"instances": found}, metadata).astype(int)
    assert picture.shape == (48, 128, 3)
    changed = np.abs(picture[:, 64:] - picture[:, :64]).sum(2) > 30
    assert changed[10:41, 30:61].any() and not changed[20:44, 2:24].any()


def test_which_evaluations_are_shown():
    def due(iterations, final=False, **values):
        cfg = kd_models.tiny_cfg(TEST__EVAL_PERIOD=10, **values)
        return EvalPictures(cfg, None, None).due(iterations, final)

    every = {"TEST__PICTURES__PERIOD": 2}
    assert [due(i, **every) for i in (10, 20, 30, 40)] == [False, True, False, True]
    assert due(30, True, **every) and not due(20) and not due(20, True)


def test_images_are_evenly_spaced(records):
    cfg = kd_models.tiny_cfg(DATASETS__TEST=(NAME,), TEST__PICTURES__COUNT=3)
    chosen = EvalPictures(cfg, None, None).records()
    assert [record["image_id"] for record in chosen] == [0, 6, 11]
    cfg.TEST.PICTURES.COUNT = 100
    assert len(EvalPictures(cfg, None, None).records()) == 12


def test_a_map_is_brightest_where_the_gradient_is_largest():
    cells = torch.zeros(2, 3)
    cells[1, 2] = 5.0
    row = heat_row(np.zeros((20, 30, 3), np.uint8), [cells, cells / 5], height=40).astype(int)
    assert row.shape == (40, 180, 3)
    bright = row[:, 60:120].sum(2)
    assert bright[30, 50] == bright.max() > bright[10, 10] + 200


def test_a_wrapper_is_afterwards_as_it_was(tmp_path, records):
    teacher = kd_models.write_teacher(tmp_path)
    model = kd_models.build_wrapper(kd_models.distill_cfg(teacher, heads=("CWD",)))
    model.student.backbone.bottom_up.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    floats = running_floats(model, {})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with undisturbed(model):
        found = pulls(model, kd_models.make_batch(sizes=((64, 64),))[0], 3)
        torch.rand(7)
    assert found["CWD"] and torch.equal(torch.rand(3), expected)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [module.training for module in model.modules()] == modes
    assert running_floats(model, {}) == floats
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_stores_those_that_are_due(tmp_path, records, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda cfg, model: {"bbox": {"AP": 1.0}})
    teacher = kd_models.write_teacher(tmp_path)
    stored = []
    monkeypatch.setattr(
        EventStorage, "put_image", lambda self, name, image: stored.append((name, image.shape))
    )
    for folder, every in (("with", 1), ("without", 0)):
        settings = run_settings(tmp_path, folder, NAME) | {
            "SOLVER__MAX_ITER": 3,
            "SOLVER__STEPS": (2,),
            "DATASETS__TEST": (NAME,),
            "TEST__EVAL_PERIOD": 2,
            "TEST__PICTURES__PERIOD": every,
            "TEST__PICTURES__COUNT": 2,
        }
        stored.clear()
        trainer = start(kd_models.distill_cfg(teacher, **settings))
        trainer.train()
        names = [name for name, _ in stored]
        wanted = ["detections/0", "detections/1", "pull/Mimic/0", "pull/Mimic/1"]
        assert names == (2 * wanted if every else [])  # after two iterations, and at the end
        assert all(shape[0] == 3 for _, shape in stored)
