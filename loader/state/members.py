"""Other datasets in a mixture: a saved state, rewritten to be of the datasets at hand.

Each dataset that stays keeps its place (its own counter, and what is left of its epoch), a new one
begins with its epoch 0, and one that is left out is kept in the state, where it waits for its
return. What is rewritten is a state like any other: whatever else differs is found by comparing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loader.order import MixtureConfig, MixtureOrder, PackSchedule
from shardspec.errors import StateError


def with_members(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    *,
    saved: MixtureOrder,
    ours: MixtureOrder,
    packs: PackSchedule | None,
) -> dict[str, Any]:
    """Rewrites a state for the datasets and weights of a loader.

    Args:
      state: A state whose order has been read as `saved`.
      own: The loader's state; `data` and `view` of datasets that the state does not know are taken
        from it.
      saved, ours: The orders; of ours, the members count.
      packs: The loader's packs, if it makes any.

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
    if packs is not None:
        packing, step = _begin_packs(state, own, packs)
    order = saved.with_members(members, step=step)
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
    state: Mapping[str, Any], own: Mapping[str, Any], packs: PackSchedule
) -> tuple[dict[str, Any], int]:
    """Lets packs begin anew: (fields of the state, the step of the order to begin with)."""
    step, saved = int(state["step"]), state.get("packing")
    if not (isinstance(saved, Mapping) and own["packing"] and "begins" in saved):
        return {}, step  # refused, as one of the two makes no packs
    first, begin = map(int, saved["begins"])
    if step > first:
        found = packs.unread_step(state.get("streams", []), begins=(first, begin))
        if found is None:
            raise StateError("state_mixture.streams")
        begin, left_out = found
        saved = {**saved, "left_out": saved.get("left_out", 0) + left_out.stop}
    # The windows follow from the sizes of the datasets, and nothing is left of those begun.
    packing = {**saved, "window": own["packing"]["window"], "begins": [step, begin]}
    return {"packing": packing, "streams": []}, begin


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
