"""Streams: the samples of datasets in the order of a run, as examples.

Decides which pass comes next, what is read ahead, and what states contain; `ExampleBuilder` is the
part in which datasets of prepared and of raw samples differ. Never makes a batch, and never starts
a thread or a process.
"""

from loader.stream.dataset import StreamingDataset, check_view, model_view, stored_view
from loader.stream.groups import group_by
from loader.stream.options import (
    CACHE_BYTES,
    StreamOptions,
    flag_argument,
    is_listed,
    name_argument,
    require_argument,
    require_used,
    seed_argument,
    whole_argument,
)
from loader.stream.prepared import (
    PlannedExample,
    PreparedBuilder,
    stored_features,
    stored_model,
)
from loader.stream.split import OpenSplit, open_split, stored_in, stored_in_order
from loader.stream.stream import (
    DatasetPlan,
    ExampleBuilder,
    OrderPlan,
    ReadAhead,
    Stream,
    StreamPart,
)
from loader.stream.subset import Keys

__all__ = [
    "CACHE_BYTES",
    "DatasetPlan",
    "ExampleBuilder",
    "Keys",
    "OpenSplit",
    "OrderPlan",
    "PlannedExample",
    "PreparedBuilder",
    "ReadAhead",
    "Stream",
    "StreamOptions",
    "StreamPart",
    "StreamingDataset",
    "check_view",
    "flag_argument",
    "group_by",
    "is_listed",
    "name_argument",
    "open_split",
    "require_argument",
    "require_used",
    "seed_argument",
    "stored_features",
    "stored_in",
    "model_view",
    "stored_in_order",
    "stored_model",
    "stored_view",
    "whole_argument",
]
