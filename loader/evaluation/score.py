"""Scores of a table: the mean of a metric over its rows.

Values are added exactly and in the order of the table, so a score is the same to the last bit
whatever the number of ranks that made the predictions.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loader.evaluation.metrics import Metric, metric_named, metric_of
from shardspec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result of an evaluation by one metric."""

    metric: str
    score: float
    """Mean over the questions, 0 to 1."""
    num_questions: int
    parts: Mapping[str, float] = field(default_factory=dict)
    """Means of what the metric tells besides, such as precision and recall."""
    values: Sequence[float] = field(default=(), repr=False)
    """The score of each question, in the order of the table."""


def score_results(
    table: Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    references: Iterable[Mapping[str, Any]] | None = None,
) -> list[Score]:
    """Scores the predictions of a table.

    Args:
      table: Rows with `prediction`, and `record` where no references are given.
      metric: Its name; None: each row by the metric of its style, and a score for each metric.
      references: Rows with `record` of at least the same questions, such as those of
        `loader.evaluation.references`; None: the rows of the table have them.

    Returns:
      A score per metric, in the order in which they come up.

    Raises:
      ConfigError: `metric`; `references`: a record is not there, says nothing that the metric
        needs, or is of a question without an answer; `results`: there are no rows.
    """
    chosen = None if metric is None else metric_named(metric)
    known: dict[tuple[Any, Any], Mapping[str, Any]] | None = None
    if references is not None:
        known = {(row["key"], row["question_idx"]): row for row in references}
    found: dict[str, list[Mapping[str, float]]] = {}
    for row in table:
        question = row.get("key"), row.get("question_idx", 0)
        reference = row if known is None else known.get(question)
        record = None if reference is None else reference.get("record")
        if reference is None or not isinstance(record, Mapping):
            raise ConfigError("references.none", key=question[0], question_idx=question[1])
        own = chosen or metric_of(record)
        values = _score(own, row["prediction"], reference, key=question[0])
        found.setdefault(own.name, []).append(values)
    if not found:
        raise ConfigError("results.empty")
    return [_mean(name, values) for name, values in found.items()]


def _score(
    metric: Metric, prediction: Any, reference: Mapping[str, Any], *, key: Any
) -> Mapping[str, float]:
    if reference["record"].get("unanswered"):
        raise ConfigError("references.unanswered", key=key)
    try:
        return metric.score(str(prediction), reference)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            "references.fields",
            key=key,
            metric=metric.name,
            needs=" or ".join(metric.needs),
            fields=sorted(reference["record"]),
        ) from error


def _mean(name: str, values: Sequence[Mapping[str, float]]) -> Score:
    means = {part: math.fsum(each[part] for each in values) / len(values) for part in values[0]}
    return Score(
        metric=name,
        score=means.pop(name),
        num_questions=len(values),
        parts=means,
        values=tuple(each[name] for each in values),
    )
