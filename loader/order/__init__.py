"""The order of samples: which sample is in which slot of which step, as pure functions.

Decides how an epoch is laid out, how datasets of a mixture take turns, how samples are packed and
which rows a rank's batch has. Never reads a file, a clock or the environment, and never sees a
sample's content.
"""

from loader.order.backlog import ReadUp, StreamSlots, backlog_after
from loader.order.config import BLOCK_SIZE, Locality, OrderConfig, Tail, plan_order
from loader.order.mixture import MixtureOrder, Stop, mixture_blocks, require_stop
from loader.order.mixture_config import MixtureConfig, MixtureMember, plan_mixture
from loader.order.order import Order
from loader.order.packing import PackConfig
from loader.order.quality import (
    Drawn,
    LaneReading,
    lane_reading,
    pairs_in_groups,
    pairs_in_share,
)
from loader.order.rows import Row, SampleRef
from loader.order.schedule import (
    BalancedSchedule,
    BucketSchedule,
    PackSchedule,
    Schedule,
    SlotSchedule,
    bucket_group,
    plan_packing,
)
from loader.order.slots import (
    Passes,
    Slots,
    epoch_of,
    is_whole,
    rank_positions,
    require_count,
    require_step,
)
from loader.order.subset import SubsetSchedule
from loader.order.weights import MixtureGroup, MixtureSource, Unit, Weighting

__all__ = [
    "BalancedSchedule",
    "BLOCK_SIZE",
    "BucketSchedule",
    "Drawn",
    "LaneReading",
    "Locality",
    "MixtureConfig",
    "MixtureGroup",
    "MixtureMember",
    "MixtureOrder",
    "MixtureSource",
    "Order",
    "OrderConfig",
    "PackConfig",
    "PackSchedule",
    "Passes",
    "ReadUp",
    "SampleRef",
    "Row",
    "Schedule",
    "SlotSchedule",
    "Slots",
    "Stop",
    "StreamSlots",
    "SubsetSchedule",
    "Tail",
    "Unit",
    "Weighting",
    "backlog_after",
    "bucket_group",
    "epoch_of",
    "is_whole",
    "lane_reading",
    "mixture_blocks",
    "pairs_in_groups",
    "pairs_in_share",
    "plan_mixture",
    "plan_order",
    "plan_packing",
    "rank_positions",
    "require_count",
    "require_step",
    "require_stop",
]
