"""A metric script for `evaluate.load(<this folder>, <task name>)`: GLUE's measures without the hub.

The configuration name is a task of `prunadapt_ds.data.tasks` (or "own_classification", "own_regression"), so
that which task has which measures is written in one place."""

import datasets
import evaluate
import numpy as np

from prunadapt_ds.data.metrics import MEASURES
from prunadapt_ds.data.tasks import OWN_METRICS, TASKS

CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and
          Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""
DESCRIPTION = "The measures GLUE reports for each of its tasks, and their like for other classification and regression."
INPUTS = """
Args:
    predictions: class numbers, or scores for regression.
    references: the same, true.
Returns:
    one number, at most 1, for each measure of the task, e.g. "accuracy" and "f1" for mrpc.
"""


class GlueMetric(evaluate.Metric):
    def _info(self):
        names = {**{task.name: task.metrics for task in TASKS.values()}, **OWN_METRICS}
        if self.config_name not in names:
            raise KeyError(f"config_name={self.config_name!r}: choose one of {', '.join(names)}")
        self.measures = names[self.config_name]
        kind = datasets.Value("float64" if "pearson" in self.measures else "int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        # Lists, not the library's numpy format: that rounds float64 to float32.
        labels, predicted = np.asarray(references), np.asarray(predictions)
        return {name: MEASURES[name](labels, predicted) for name in self.measures}
