"""Batches made ahead of the training step: threads, worker processes, and timings.

Decides who makes which batch and when. Never decides what is in it.
"""

from loader.delivery.stats import Stats
from loader.delivery.threads import BatchMaker, LookAhead, MadeBatch, Task, make_in_threads
from loader.delivery.workers import make_in_workers

__all__ = [
    "BatchMaker",
    "LookAhead",
    "MadeBatch",
    "Stats",
    "Task",
    "make_in_threads",
    "make_in_workers",
]
