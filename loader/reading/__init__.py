"""From a sample's number to its stored bytes: local shards, object stores, caches, bad samples.

Decides when bytes are read, which are kept on the node's disk, and which samples count as damaged.
Never decides which samples are needed, and never changes stored data.
"""

from loader.reading.local import Check
from loader.reading.lookahead import LookaheadWindow
from loader.reading.network import Network, blocks_of
from loader.reading.quarantine import MOST_RECORDS, Quarantine, is_of_one_sample
from loader.reading.reader import ShardReader, count_reading, open_dataset
from loader.reading.stored import StoredSample, read_record

__all__ = [
    "MOST_RECORDS",
    "Check",
    "LookaheadWindow",
    "Network",
    "Quarantine",
    "ShardReader",
    "StoredSample",
    "blocks_of",
    "count_reading",
    "is_of_one_sample",
    "open_dataset",
    "read_record",
]
