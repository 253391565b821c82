"""Batches made ahead of the training step: threads, worker processes, and timings.

Decides which thread or process makes which batch, and when. Never decides what is in it.
"""

from loader.delivery.batches import BatchBuilder, BatchMaker, MadeBatch, Task
from loader.delivery.plan import TaskPlan
from loader.delivery.prepared import MapExample, PreparedBatches
from loader.delivery.raw import Collate, RawBatches
from loader.delivery.stats import SAMPLES_OF, SHARE_OF, STAGES, Stats
from loader.delivery.threads import AheadLimit, make_in_threads
from loader.delivery.workers import WorkerCrew

__all__ = [
    "AheadLimit",
    "BatchBuilder",
    "BatchMaker",
    "Collate",
    "MadeBatch",
    "MapExample",
    "PreparedBatches",
    "RawBatches",
    "SAMPLES_OF",
    "SHARE_OF",
    "STAGES",
    "Stats",
    "Task",
    "TaskPlan",
    "WorkerCrew",
    "make_in_threads",
]
