"""Streams: the samples of datasets in the order of a run, as examples.

Decides which pass comes next, what is read ahead, and what states contain; `ExampleBuilder` is the
part in which datasets of prepared and of raw samples differ. Never makes a batch, and never starts
a thread or a process.
"""

from loader.stream.dataset import CACHE_BYTES, StreamingDataset, check_view, stored_view
from loader.stream.groups import group_by
from loader.stream.prepared import PlannedExample, PreparedBuilder
from loader.stream.split import OpenSplit, open_split, stored_in
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
    "StreamPart",
    "StreamingDataset",
    "check_view",
    "group_by",
    "open_split",
    "stored_in",
    "stored_view",
]
