"""Other datasets in a mixture: a saved state, rewritten to be of the datasets at hand.

Each dataset that stays keeps its place (its own counter, and what is left of its epoch), a new one
begins with its epoch 0, and one that is left out is kept in the state, where it waits for its
return. What is rewritten is a state like any other: whatever else differs is found by comparing it.

Packs begin anew with the slots that none of their streams has delivered a sample of; what they have
left of the slots before is their backlog. Where the datasets are the same ones at the same weights,
packs continue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loader.order import (
    MixtureConfig,
    MixtureMember,
    MixtureOrder,
    PackConfig,
    StreamSlots,
    backlog_after,
)
from loader.state.read_up import describe_backlog, read_up_of, stored_backlog
from shardspec.errors import StateError

_NONE = np.zeros(0, np.int64)


def with_members(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    saved: MixtureOrder,
    ours: MixtureOrder,
    packed: bool,
) -> dict[str, Any]:
    """Rewrites a state for the datasets and weights of a loader.

    Args:
      state: A state whose order has been read as `saved`.
      own: The loader's state; `data` and `view` of datasets that the state does not know are taken
        from it.
      saved, ours: The orders; of ours, the members count.
      packed: Whether the loader makes packs.

    Raises:
      StateError: `state_mixture`, packs whose state does not know all streams.
      ConfigError: As `MixtureOrder.with_members`.
    """
    known = {member.name: member.num_samples for member in saved.config.everyone}
    # A dataset that has grown or is another one since is refused by its fingerprint, not here.
    members = [
        replace(member, num_samples=known.get(member.name, member.num_samples))
        for member in ours.config.members
    ]
    step, packing = int(state["step"]), dict[str, Any]()
    if not packed:
        order = saved.with_members(members, step=step)
    else:
        order, packing = _begin_packs(state, own, saved=saved, members=members)
    fields = {name: value for name, value in state.items() if name != "removed"}
    gone = {**state.get("removed", {}), **state["data"]}
    fields["data"] = {name: gone.get(name, entry) for name, entry in own["data"].items()}
    if isinstance(own.get("view"), Mapping) and isinstance(state.get("view"), Mapping):
        fields["view"] = {n: state["view"].get(n, entry) for n, entry in own["view"].items()}
    left_out = [member.name for member in order.config.removed if member.name in gone]
    if left_out:
        fields["removed"] = {name: gone[name] for name in left_out}
    names = [member.name for member in saved.config.members]
    number = {member.name: i for i, member in enumerate(members)}
    if any(record.get("dataset", 0) >= len(names) for record in state.get("bad", [])):
        raise StateError("state_fields", field="bad")
    fields["bad"] = [
        {**record, "dataset": number[names[record.get("dataset", 0)]]}
        for record in state.get("bad", [])
        if names[record.get("dataset", 0)] in number
    ]
    return {**fields, **packing, "order": order.config.to_dict()}


def _begin_packs(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    saved: MixtureOrder,
    members: Sequence[MixtureMember],
) -> tuple[MixtureOrder, dict[str, Any]]:
    """Lets packs begin anew with other datasets: (their order, fields of the state)."""
    step, packing = int(state["step"]), state.get("packing")
    if not (isinstance(packing, Mapping) and own["packing"] and "begins" in packing):
        return saved.with_members(members, step=step), {}  # refused, as one of them has no packs
    first, begin = map(int, packing["begins"])
    num_streams = saved.config.canonical_ranks
    share = saved.config.global_batch_size // num_streams
    left: Sequence[np.ndarray] = stored_backlog(packing, saved.config)
    same = _weights(saved.config.members) == _weights(members)
    if step > first and not same:
        limits = _limits(packing)
        reads = read_up_of(state, limits, num_streams=num_streams)
        if reads is None:
            raise StateError("state_mixture.streams")
        slots = [
            StreamSlots(backlog=left[n] if left else _NONE, begin=begin * share, run=limits.run)
            for n in range(num_streams)
        ]
        begin, left = backlog_after(slots, reads, share=share)
    earliest = min((int(one[0]) // share for one in left if len(one)), default=begin)
    order = saved.with_members(members, step=begin, keep=min(begin, earliest))
    if same:  # at most listed otherwise
        return order, {}
    kept = []
    for number, one in enumerate(left):
        steps, inside = np.divmod(one, share)
        kept.append(one[order.slots(steps, number * share + inside).dataset < len(members)])
    left_out = sum(map(len, left)) - sum(map(len, kept))
    fields = {name: value for name, value in packing.items() if name != "backlog"}
    return order, {
        "packing": {
            **fields,
            # The windows follow from the sizes of the datasets.
            "window": own["packing"]["window"],
            "begins": [step, begin],
            "left_out": packing["left_out"] + left_out,
            **describe_backlog(kept),
        },
        "streams": [],
    }


def _weights(members: Sequence[MixtureMember]) -> dict[str, float]:
    return {member.name: member.weight for member in members}


def _limits(packing: Mapping[str, Any]) -> PackConfig:
    """Reads the limits of a state's packs."""
    names = ("sequence_length", "max_crops", "window", "windows_per_run", "seed")
    if not all(name in packing for name in names):
        raise StateError("state_fields", field="packing")
    return PackConfig(**{name: packing[name] for name in names})


def member_differences(saved: Mapping[str, Any], own: MixtureConfig) -> dict[str, Any]:
    """Names the datasets by which the order of a state differs from a loader's: facts of errors.

    Returns:
      `added`, `removed` and `order` (of those in the state), as far as they differ.
    """
    members: Sequence[Any] = saved.get("members") or []
    names = [member.get("name") for member in members if isinstance(member, Mapping)]
    ours = [member.name for member in own.members]
    found: dict[str, Any] = {}
    added = [name for name in ours if name not in names]
    removed = [name for name in names if name not in ours]
    if added:
        found["added"] = added
    if removed:
        found["removed"] = removed
    if [name for name in names if name in ours] != [name for name in ours if name in names]:
        found["listed"] = {"saved": names, "here": ours}
    return found
