"""Metrics by their names: what each needs of a record, and the one that fits a style.

A metric is a function of a predicted text and a reference row: `record`, the fields of the
question, and `images`, with the width and height of each. It gives numbers from 0 to 1; the first
one is the score. A record that lacks what a metric needs is an error: it never counts as wrong.

Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loader.evaluation.pointing import parse_predicted, score_points, wanted_points
from loader.evaluation.texts import (
    anls,
    chosen_option,
    counted,
    exact_match,
    relaxed_match,
    vqa_accuracy,
)
from shardspec.errors import ConfigError, nearest

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How predictions are scored."""

    name: str
    needs: tuple[str, ...]
    """Fields of a record that say what is right, one of them is enough."""
    score: Callable[[str, Row], Mapping[str, float]]
    """Scores a prediction; the first value is the score. Raises KeyError if the record lacks it."""


def metric_named(name: str) -> Metric:
    """Finds a metric.

    Raises:
      ConfigError: `metric`.
    """
    if name not in METRICS:
        raise ConfigError("metric.unknown", name=name, hint=nearest(name, METRICS))
    return METRICS[name]


def metric_of(record: Mapping[str, Any]) -> Metric:
    """Chooses the metric of a record by its style, or else by the fields that it has.

    >>> metric_of({"style": "vqa2"}).name, metric_of({"style": "demo", "answer": "x"}).name
    ('vqa', 'exact')
    """
    name = _STYLES.get(str(record.get("style")))
    if name is None:
        name = next((n for f, n in _FIELDS.items() if record.get(f) is not None), "exact")
    return METRICS[name]


def _answers(record: Mapping[str, Any]) -> list[str]:
    for name in ("answers", "alternatives"):
        if record.get(name):
            return [str(answer) for answer in record[name]]
    for name in ("answer", "text"):
        if record.get(name) is not None:
            return [str(record[name])]
    if "answer_idx" in record:
        options, right = _options(record)
        return [options[right]]
    raise KeyError("answers")


def _options(record: Mapping[str, Any]) -> tuple[list[str], int]:
    options = record.get("options") or record["unlabelled_options"]
    return [str(option) for option in options], int(record["answer_idx"])


def _of_answers(name: str, function: Callable[[str, list[str]], float]) -> Metric:
    def score(prediction: str, row: Row) -> dict[str, float]:
        return {name: function(prediction, _answers(row["record"]))}

    return Metric(name=name, needs=("answers", "answer", "text", "answer_idx"), score=score)


def _choice(prediction: str, row: Row) -> dict[str, float]:
    options, right = _options(row["record"])
    return {"choice": float(chosen_option(prediction, options) == right)}


def _count(prediction: str, row: Row) -> dict[str, float]:
    record = row["record"]
    if record.get("count") is not None:
        right = int(record["count"])
    else:
        right = len(wanted_points(record["points"], sizes=(), scale=1.0))
    said = counted(prediction)
    if said is None and parse_predicted(prediction):
        said = len(parse_predicted(prediction))
    return {"count": float(said == right)}


def _pointing(prediction: str, row: Row) -> dict[str, float]:
    record = row["record"]
    sizes = [(float(image["width"]), float(image["height"])) for image in row.get("images") or ()]
    points = record["points"]
    wanted = wanted_points(points, sizes=sizes, scale=record.get("point_scale"))
    found = score_points(
        parse_predicted(prediction), wanted, sizes=sizes, masks=record.get("masks")
    )
    return {"pointing": found.f1, "precision": found.precision, "recall": found.recall}


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _of_answers("vqa", vqa_accuracy),
        _of_answers("exact", exact_match),
        _of_answers("relaxed", relaxed_match),
        _of_answers("anls", anls),
        Metric(name="choice", needs=("options", "unlabelled_options"), score=_choice),
        Metric(name="count", needs=("count", "points"), score=_count),
        Metric(name="pointing", needs=("points",), score=_pointing),
    )
}
"""Every metric by its name."""

_STYLES: Mapping[str, str] = {
    **dict.fromkeys(("vqa2", "text_vqa", "okvqa", "a_okvqa_da", "eval_short_answer"), "vqa"),
    **dict.fromkeys(("chart_qa", "plot_qa", "dv_qa"), "relaxed"),
    **dict.fromkeys(("doc_qa", "info_qa", "st_qa"), "anls"),
    **dict.fromkeys(("pointing", "cosyn_point", "multi_image_pointing"), "pointing"),
    **dict.fromkeys(("point_count", "point_then_count", "count_then_point", "count"), "count"),
    **dict.fromkeys(("multi_image_point_then_count", "multi_image_count_then_point"), "count"),
    "multi_image_counting": "count",
}
"""Styles of the Molmo family whose metric does not follow from their fields."""

_FIELDS: Mapping[str, str] = {
    "options": "choice",
    "unlabelled_options": "choice",
    "answers": "vqa",
    "points": "pointing",
    "count": "count",
}
