"""Loaders inside of trainers that have a data loop of their own, and in distributed checkpoints.

Accelerate needs nothing of this: a loader that is not given to `prepare()` is used as it is. Never
divides samples between ranks, and imports no trainer before it is given one of its objects.
"""

from loader.integrations import hf
from loader.integrations.distributed import DistributedState
from loader.integrations.hf import attach_to_trainer, check_model
from loader.integrations.steady import SteadyPasses

__all__ = ["DistributedState", "SteadyPasses", "attach_to_trainer", "check_model", "hf"]
