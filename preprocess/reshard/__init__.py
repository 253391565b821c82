"""New shards from old ones: reshard, merge, split, filter, as views or as copies.

Decides which stored sample goes to which new shard, and copies byte ranges. Never parses or changes
a sample.
"""

from preprocess.reshard.assign import ReaderCluster, SampleOrder, parse_shares, repeated_key
from preprocess.reshard.copy import scratch_of
from preprocess.reshard.plan import (
    ReshardPlan,
    ReshardSettings,
    Through,
    plan_reshard,
    split_keys,
)
from preprocess.reshard.run import (
    Resharded,
    check_sources,
    portable_url,
    publish_tokenizer,
    reshard,
    reshard_part,
)

__all__ = [
    "ReaderCluster",
    "ReshardPlan",
    "ReshardSettings",
    "Resharded",
    "SampleOrder",
    "Through",
    "check_sources",
    "parse_shares",
    "plan_reshard",
    "portable_url",
    "publish_tokenizer",
    "repeated_key",
    "reshard",
    "reshard_part",
    "scratch_of",
    "split_keys",
]
