"""The best evaluation of a run by TEST.BEST_METRIC, and when there have been enough."""

from __future__ import annotations

import json
import logging
import math
import os

from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..errors import ConfigError
from ..files import replacing

logger = logging.getLogger(__name__)

NAME = "best.json"


class BestResult:
    """What the evaluations of a run gave for one metric, kept in OUTPUT_DIR/best.json.

    An evaluation is known by the number of iterations that were finished before it, so that a
    resumed run has what the uninterrupted one has: evaluations of steps that were lost are
    forgotten, and the one that a kill took away is made again (:meth:`load`, ``in``).

    Args:
        folder: OUTPUT_DIR.
        metric: ``task/name``, behind the data set's name where there are several.
        lower: whether lower is better.
        patience: evaluations without a better one after which there have been enough; 0 = never.
    """

    def __init__(self, folder: str, metric: str, *, lower: bool = False, patience: int = 0):
        self.path = os.path.join(folder, NAME)
        self.metric, self.lower, self.patience = metric, lower, patience
        self.values: dict[int, float] = {}

    def __contains__(self, iterations: int) -> bool:
        return iterations in self.values

    @property
    def best(self) -> tuple[int, float] | None:
        """(iterations, value) of the first evaluation that no other beats; NaN is never best."""
        found = None
        for iterations, value in sorted(self.values.items()):
            if found is None or self._beats(value, found[1]):
                found = (iterations, value) if not math.isnan(value) else found
        return found

    @property
    def exhausted(self) -> bool:
        """Whether the last ``patience`` evaluations brought nothing better."""
        if not self.patience or self.best is None:
            return False
        return sum(iterations > self.best[0] for iterations in self.values) >= self.patience

    def _beats(self, value: float, other: float) -> bool:
        return value < other if self.lower else value > other

    def take(self, results: dict, iterations: int) -> bool:
        """Note an evaluation; all processes call it together.

        Args:
            results: nested dict of the main process, as detectron2's evaluation gives it.
            iterations: that were finished before it.

        Returns:
            Whether it is the best so far; the caller writes the weights, then :meth:`write`.

        Raises:
            ConfigError: there is no such metric among the results.
        """
        flat = {name: float(x) for name, x in flatten_results_dict(results).items()}
        flat = comm.all_gather(flat)[0]
        if self.metric not in flat:
            raise ConfigError(
                f"TEST.BEST_METRIC: the evaluation gives no '{self.metric}', it gives "
                f"{', '.join(flat) or 'nothing'}"
            )
        self.values[iterations] = flat[self.metric]
        return self.best is not None and self.best[0] == iterations

    def write(self) -> None:
        """Write best.json, atomically, on the main process."""
        if not comm.is_main_process():
            return
        content = {
            "metric": self.metric,
            "lower_is_better": self.lower,
            "best": self.best,
            "evaluations": [
                [iterations, None if math.isnan(value) else value]
                for iterations, value in sorted(self.values.items())
            ],
        }
        with replacing(self.path) as file:
            file.write(json.dumps(content).encode())

    def load(self, iterations: int) -> None:
        """Take over what a run noted that is resumed after so many iterations.

        Raises:
            ConfigError: best.json is damaged.
        """
        if not iterations or not os.path.exists(self.path):
            return
        try:
            with open(self.path, encoding="utf-8") as file:
                content = json.load(file)
            metric, lower = content["metric"], content["lower_is_better"]
            found = {int(i): math.nan if x is None else float(x) for i, x in content["evaluations"]}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--resume: {self.path} is damaged ({type(error).__name__}: {error}); remove it, "
                "and the search for the best checkpoint starts anew"
            ) from error
        if (metric, lower) != (self.metric, self.lower):
            logger.warning(
                f"--resume: {self.path} is about {metric}, TEST.BEST_METRIC is {self.metric} now: "
                "the search for the best checkpoint starts anew"
            )
            return
        self.values = {i: value for i, value in found.items() if i <= iterations}

    def __str__(self) -> str:
        if self.best is None:
            return f"no {self.metric} so far"
        return f"{self.metric} {self.best[1]:.4g} after {self.best[0]} iterations"


def build_best(cfg: CfgNode) -> BestResult | None:
    """What TEST.BEST_METRIC asks for; None where it is ""."""
    node = cfg.TEST
    if not node.BEST_METRIC:
        return None
    lower = node.BEST_MODE == "min"
    return BestResult(cfg.OUTPUT_DIR, node.BEST_METRIC, lower=lower, patience=node.PATIENCE)
