"""New shards from old ones: reshard, merge, split, filter, as views or as copies.

Decides which stored sample goes to which new shard, and copies byte ranges. Never parses or changes
a sample.
"""

from preprocess.reshard.assign import ReaderCluster, SampleOrder, parse_shares, repeated_key
from preprocess.reshard.plan import ReshardPlan, ReshardSettings, Through, plan_reshard
from preprocess.reshard.run import Resharded, portable_url, read_notes, reshard

__all__ = [
    "ReaderCluster",
    "ReshardPlan",
    "ReshardSettings",
    "Resharded",
    "SampleOrder",
    "Through",
    "parse_shares",
    "plan_reshard",
    "portable_url",
    "read_notes",
    "repeated_key",
    "reshard",
]
