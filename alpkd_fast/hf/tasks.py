"""The tasks: GLUE's by name, one's own by columns, masked-LM; and the metric of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .extras import require

Metric = Callable[[Any, Any], dict[str, float]]  # (predictions (N,), labels (N,))


def _accuracy(predictions: Any, labels: Any) -> dict[str, float]:
    return {"accuracy": float((predictions == labels).mean())}


def _accuracy_and_f1(predictions: Any, labels: Any) -> dict[str, float]:
    metrics = require("sklearn.metrics", "the F1 score")
    average = "binary" if set(labels.tolist()) <= {0, 1} else "macro"
    return {**_accuracy(predictions, labels), "f1": float(metrics.f1_score(labels, predictions, average=average))}


def _matthews(predictions: Any, labels: Any) -> dict[str, float]:
    metrics = require("sklearn.metrics", "Matthews' correlation")
    return {"matthews": float(metrics.matthews_corrcoef(labels, predictions))}


def _correlations(predictions: Any, labels: Any) -> dict[str, float]:
    stats = require("scipy.stats", "the correlations")
    return {
        "pearson": float(stats.pearsonr(predictions, labels).statistic),
        "spearman": float(stats.spearmanr(predictions, labels).statistic),
    }


@dataclass(frozen=True)
class Task:
    """A task: the columns of its rows, its kind and its metric.

    kind: "classification", "regression" or "mlm". The first name that ``metric`` returns is the main one.
    """

    name: str
    kind: str
    text_columns: tuple[str, ...]
    label_column: str = "label"
    num_labels: int | None = None  # None: counted in the training data
    metric: Metric = _accuracy
    main_metric: str = "accuracy"
    validation_split: str = "validation"

    def predictions(self, logits: Any) -> Any:
        """Return (N,) predicted classes, or values for regression, from (N, outputs) logits as a NumPy array."""
        return logits[:, 0] if self.kind == "regression" else logits.argmax(-1)

    def score(self, logits: Any, labels: Any) -> dict[str, float]:
        """Return the task's metrics from logits and labels as NumPy arrays."""
        return self.metric(self.predictions(logits), labels)


# Columns and metrics of Wang et al. 2019, "GLUE", table 1; column names as on the hub.
_SENTENCE, _PAIR = ("sentence",), ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "classification", _SENTENCE, num_labels=2, metric=_matthews, main_metric="matthews"),
        Task("sst2", "classification", _SENTENCE, num_labels=2),
        Task("mrpc", "classification", _PAIR, num_labels=2, metric=_accuracy_and_f1),
        Task("qqp", "classification", ("question1", "question2"), num_labels=2, metric=_accuracy_and_f1),
        Task("stsb", "regression", _PAIR, num_labels=1, metric=_correlations, main_metric="pearson"),
        Task("mnli", "classification", ("premise", "hypothesis"), num_labels=3, validation_split="validation_matched"),
        Task("qnli", "classification", ("question", "sentence"), num_labels=2),
        Task("rte", "classification", _PAIR, num_labels=2),
        Task("wnli", "classification", _PAIR, num_labels=2),
        Task("classification", "classification", (), metric=_accuracy_and_f1),
        Task("regression", "regression", (), num_labels=1, metric=_correlations, main_metric="pearson"),
        Task("mlm", "mlm", ("text",)),
    )
}
