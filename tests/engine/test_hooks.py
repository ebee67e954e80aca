"""The warning about distillation losses that drown the task."""

from types import SimpleNamespace

from detectron2.utils.events import EventStorage

from projects.kd.engine.hooks import LossBalance


def run(losses: dict, steps: int = 40, period: int = 20) -> LossBalance:
    hook = LossBalance(period)
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(storage=storage, iter=0)
        for i in range(steps):
            storage.put_scalars(**losses)
            hook.trainer.iter = i
            hook.after_step()
            storage.step()
    return hook


def test_ten_times_the_task_losses_is_warned_of_once(caplog):
    run({"loss_cls": 0.5, "loss_box_reg": 0.5, "loss_kd_cwd": 11.0, "loss_kd_pkd": 1.0})
    (record,) = caplog.records
    assert "12 times the task losses (12 beside 1; the largest is loss_kd_cwd)" in record.message


def test_less_is_not_and_auxiliary_losses_do_not_count(caplog):
    run({"loss_cls": 1.0, "loss_kd_cwd": 9.9, "loss_aux_icd": 500.0, "total_loss": 900.0})
    run({"loss_cls": 1.0})
    run({"loss_cls": 1.0, "loss_kd_cwd": 90.0}, steps=19)  # before the losses are gathered
    assert not caplog.records
