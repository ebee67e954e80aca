"""Train or evaluate a detector: a plain one, or a student distilled from a teacher.

    python train_net.py --config-file CONFIG [--resume] [--num-gpus N] [KEY VALUE ...]
    python train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS FILE
    python train_net.py --config-file LAZY_CONFIG.py [PLACE=VALUE ...] [KEY VALUE ...]
    python train_net.py --config-file STUDENT --teacher TEACHER [--method CWD]
    torchrun --nproc-per-node N train_net.py --config-file CONFIG

Where the package is installed, kd-train stands for python train_net.py, in any folder.

On a machine without a GPU --num-gpus is the number of CPU processes (add MODEL.DEVICE cpu).
"""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..building import build_detector
from ..check import check_config
from ..config import load_config
from ..data.image_check import check_images
from ..data.register import register_configured
from ..deploy.formats import is_exported
from ..deploy.use import exported_detector
from ..engine.checkpoint import DistillCheckpointer, output_checkpoint
from ..engine.launch import argument_parser, launch_training
from ..engine.setup import start_run
from ..engine.trainer import DistillTrainer
from ..errors import ConfigError, exit_on_user_error
from ..evaluation import check_evaluation, evaluate
from ..evaluation.quick import quicken
from ..evaluation.tta import tta_class


def setup(args) -> CfgNode:
    """Config, data sets and log files of a run."""
    if args.teacher:
        from ..recipes.one_flag import apply_recipe

        cfg = apply_recipe(args)
    else:
        if args.teacher_weights or args.method:
            raise ConfigError("--teacher-weights and --method need --teacher")
        cfg = load_config(args.config_file, args.opts)
    register_configured(cfg)
    check_config(cfg, training=not args.eval_only)
    if args.eval_only:
        check_to_evaluate(cfg, args)
    cfg.freeze()
    found = output_checkpoint(cfg.OUTPUT_DIR)
    if found and not args.resume and not args.eval_only:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} already holds {found} of another run: add --resume to "
            "continue it, or choose another OUTPUT_DIR"
        )
    check_evaluation(cfg)
    check_images(cfg, training=not args.eval_only)
    comm.synchronize()  # no rank may write before all have looked
    start_run(cfg, args)
    return cfg


def check_to_evaluate(cfg: CfgNode, args) -> None:
    """ConfigError where --eval-only has nothing to evaluate on, or nothing but random weights."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    resumes = args.resume and output_checkpoint(cfg.OUTPUT_DIR)
    if not (cfg.MODEL.WEIGHTS or resumes or args.untrained):
        raise ConfigError(
            "MODEL.WEIGHTS is empty: --eval-only would evaluate random weights; name a checkpoint"
            + (f", OUTPUT_DIR {cfg.OUTPUT_DIR} holds none to --resume" if args.resume else "")
            + ", or add --untrained"
        )


def test_with_tta(cfg: CfgNode, student):
    """Results with test-time augmentation (TEST.AUG), keys marked with _TTA."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
    results = evaluate(cfg, tta_class(cfg)(cfg, student), output_dir=folder)
    return {f"{key}_TTA": value for key, value in results.items()}


def evaluate_only(cfg: CfgNode, args):
    """Build and load the student alone, or a file of kd-export, and evaluate it."""
    if is_exported(cfg.MODEL.WEIGHTS):
        return _evaluate(cfg, exported_detector(cfg))
    student = build_detector(cfg)
    DistillCheckpointer(
        student,
        cfg.OUTPUT_DIR,
        allow_pickle=cfg.KD.ALLOW_PICKLE,
        use_ema=cfg.SOLVER.EMA.EVAL_ONLY,
        complete=not args.untrained,
    ).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return _evaluate(cfg, quicken(cfg, student.eval()))


def _evaluate(cfg: CfgNode, student):
    results = DistillTrainer.test(cfg, student)
    if cfg.TEST.AUG.ENABLED:
        results.update(test_with_tta(cfg, student))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args):
    """What every process of the run executes."""
    cfg = setup(args)
    if cfg.TEST.AUG.ENABLED:
        tta_class(cfg)  # refused before anything is trained
    if args.eval_only:
        return evaluate_only(cfg, args)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.write_config()
    if cfg.TEST.AUG.ENABLED:
        trainer.register_hooks(
            [
                hooks.EvalHook(
                    0,
                    lambda: trainer.unless_stopped(lambda: test_with_tta(cfg, trainer.student)),
                )
            ]
        )
    return trainer.train()


def parse_arguments(argv=None):
    """detectron2's flags and those of the one-flag recipes."""
    parser = argument_parser(epilog=__doc__)
    recipe = parser.add_argument_group("distil by a recipe, without a config of your own")
    recipe.add_argument("--teacher", default="", help="the teacher's config: file or model_zoo://")
    recipe.add_argument("--teacher-weights", default="", help="default: those of its config")
    recipe.add_argument("--method", default="", help="imitation head, default: by detector")
    parser.add_argument(
        "--untrained", action="store_true", help="let --eval-only evaluate random weights"
    )
    return parser.parse_args(argv)


def run() -> None:
    """The command: parse what was typed, and start the processes of the run."""
    with exit_on_user_error():
        args = parse_arguments()
        launch_training(main, args)


if __name__ == "__main__":
    run()
