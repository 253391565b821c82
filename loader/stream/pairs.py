"""Warnings of an order that is not what was meant: clumping batches, settings without effect.

Batches clump where a rank's share of a step has more pairs of one shard than a global shuffle would
give it. Once per run and order, with the setting that helps. What is compared is estimated in
closed form (`loader.order.quality`), from the order and the number of shards; no sample is read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from loader.order import (
    Drawn,
    LaneReading,
    MixtureOrder,
    Order,
    PackSchedule,
    Row,
    lane_reading,
    mixture_blocks,
    pairs_in_groups,
    pairs_in_share,
)

logger = logging.getLogger(__name__)

_MORE_PAIRS = 0.15
"""Share of pairs above those of a global shuffle from which on a run is warned."""

_SHUFFLE = "shards whose samples were shuffled when they were cut (`make reshard ORDER=shuffle`)"


def warn_of_pairs(
    order: Order | MixtureOrder, *, step: int, world_size: int, num_shards: Sequence[int]
) -> None:
    """Warns of an order whose rows are samples.

    Args:
      order: The order.
      step: At whose batch size.
      world_size: Ranks.
      num_shards: Of each dataset.
    """
    if isinstance(order, Order):
        _warn_of_one(order, step=step, world_size=world_size, num_shards=num_shards[0])
        return
    batch, reading = order.batch_at(step)[0], order.reading_at(step)

    def drawn(ranks: int) -> Drawn:
        share = batch / world_size
        return Drawn(
            samples=share, groups=max(1.0, ranks / world_size), lanes=1, taken=batch / ranks
        )

    ranks = order.ranks_at(step)
    found = pairs_in_groups(reading, drawn(ranks), num_shards=num_shards)
    if found > 1 + _MORE_PAIRS:
        better = _better_ranks(
            ((n, drawn(n)) for n in _widths(batch, world_size, ranks)),
            reading,
            batch=batch,
            num_shards=num_shards,
        )
        use = f"canonical_ranks={better} (it cannot change during a run), " if better else ""
        _warn(found, f"a lane takes {batch / ranks:g} samples at once", f"{use}or {_SHUFFLE}")


def warn_of_packed_pairs(
    order: Order | MixtureOrder,
    packs: PackSchedule,
    rows: Sequence[Row],
    *,
    step: int,
    world_size: int,
    num_shards: Sequence[int],
) -> None:
    """Warns of packs, which are filled from samples that are near each other in the order.

    Args:
      order: The order of the samples.
      packs: The packs.
      rows: Those of a rank in a step.
      step: The step.
      world_size: Ranks.
      num_shards: Of each dataset.
    """
    drawn, batch = packs.drawn(rows, world_size=world_size), packs.batch_at(step)[0]
    if isinstance(order, Order):
        reading = [lane_reading(order.config, global_batch_size=order.config.global_batch_size)]
    else:
        reading = order.reading_at(packs.begins[1])
    found = pairs_in_groups(reading, drawn, num_shards=num_shards)
    if found <= 1 + _MORE_PAIRS:
        return
    use = ""
    if isinstance(order, Order):
        (part,) = reading
        most = part.num_samples // (order.config.num_lanes * 4)
        active = part.active_blocks
        while active <= most and found > 1 + _MORE_PAIRS:
            active *= 2
            wider = replace(part, active_blocks=active)
            found = pairs_in_groups([wider], drawn, num_shards=num_shards)
        use = f"active_blocks={active} or block_size=1" if active <= most else "block_size=1"
        found = pairs_in_groups(reading, drawn, num_shards=num_shards)
    else:
        ranks = order.config.canonical_ranks
        better = _better_ranks(
            ((n, drawn) for n in _widths(batch, world_size, ranks)),
            reading,
            batch=batch,
            num_shards=num_shards,
        )
        use = f"canonical_ranks={better}" if better else ""
    use = f"{use} (it cannot change during a run), or " if use else ""
    _warn(found, f"packs are filled from windows of {packs.config.window} samples", use + _SHUFFLE)


def _warn_of_one(order: Order, *, step: int, world_size: int, num_shards: int) -> None:
    config = replace(order.config, global_batch_size=order.batch_at(step)[0], ramp=())
    found = pairs_in_share(config, world_size=world_size, num_shards=num_shards)
    if found > 1 + _MORE_PAIRS:
        turn = config.global_batch_size // config.canonical_ranks
        _warn(
            found,
            f"{config.active_blocks} active blocks are not a multiple of the {turn} samples that a "
            "lane takes at once",
            f"active_blocks={-(-config.active_blocks // turn) * turn} (a multiple of {turn}), "
            "block_size=1, or another canonical_ranks",
        )


def _warn(found: float, why: str, use: str) -> None:
    logger.warning(
        "a rank's share of a step has %s%.1f times as many pairs of samples from one shard as a"
        " global shuffle: %s. Where shards differ in what they hold, use %s.",
        "" if "multiple" in why else "about ",
        found,
        why,
        use,
    )


def _widths(batch: int, world_size: int, ranks: int) -> list[int]:
    """Lists other canonical ranks that give each rank whole lanes, the nearest first."""
    widths = [n for n in range(world_size, min(batch, 4 * ranks) + 1, world_size) if not batch % n]
    return sorted(widths, key=lambda n: abs(math.log(n / ranks)))


def _better_ranks(
    widths: Iterable[tuple[int, Drawn]],
    reading: Sequence[LaneReading],
    *,
    batch: int,
    num_shards: Sequence[int],
) -> int | None:
    """Finds canonical ranks at which a mixture shuffles well enough."""
    for ranks, drawn in widths:
        active = mixture_blocks([part.weight for part in reading], batch // ranks)
        wider = [
            replace(part, active_blocks=own if part.active_blocks else 0)
            for part, own in zip(reading, active, strict=True)
        ]
        if pairs_in_groups(wider, drawn, num_shards=num_shards) <= 1 + _MORE_PAIRS:
            return ranks
    return None


def warn_of_unused(order: Order | MixtureOrder, plan: object) -> None:
    """Warns of settings that change nothing, as there are too few samples for lanes.

    Args:
      order: The order.
      plan: Of it, with the settings as they were given.
    """
    if isinstance(order, Order):
        if order.config.layout != "global":
            return
    elif any(part.active_blocks for part in order.reading_at(0)):
        return
    defaults = {"locality": ("any",), "active_blocks": (None,), "block_size": (None, 1)}
    given = [name for name, plain in defaults.items() if getattr(plan, name, plain[0]) not in plain]
    if given:
        logger.warning(
            "%s has no effect: %d samples are too few for the lanes of a global batch of %d, and"
            " are shuffled as a whole",
            ", ".join(f"{name}=" for name in given),
            order.config.num_samples
            if isinstance(order, Order)
            else sum(member.num_samples for member in order.config.members),
            order.config.global_batch_size,
        )
