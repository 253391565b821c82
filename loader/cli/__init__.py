"""What the verbs of `python -m loader` print.

Decides how batches and plans are shown. Never touches training state.
"""

from loader.cli.peek import describe_batch, readable_rows
from loader.cli.plan import Cluster, describe_plan, plan_cluster

__all__ = [
    "Cluster",
    "describe_batch",
    "describe_plan",
    "plan_cluster",
    "readable_rows",
]
