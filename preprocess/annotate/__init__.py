"""ANNOTATE: columns of a file, joined by key to the samples of a dataset, as a view of it.

Decides which row of a column file belongs to which sample, and what a missing value is. Never
rewrites a shard, and never changes the order of samples.
"""

from preprocess.annotate.annotate import (
    AnnotateOutcome,
    AnnotateSettings,
    Annotation,
    annotate,
    plan_annotation,
)
from preprocess.annotate.join import UnknownKeys, parse_fills
from preprocess.annotate.table import ColumnTable, read_table

__all__ = [
    "AnnotateOutcome",
    "AnnotateSettings",
    "Annotation",
    "ColumnTable",
    "UnknownKeys",
    "annotate",
    "parse_fills",
    "plan_annotation",
    "read_table",
]
