"""`resume`: where a loader begins that is given the state of a run, or why it cannot.

1. What can be read of the state is read first: its version, step, order and records.
2. Packs are made as those of the state's run: which samples share one follows from the batch that
   the run began with. Where other datasets are mixed on purpose, the state is rewritten for them.
3. What the state's run changed on its way (batch size, weights, width) is taken over, unless the
   loader made changes itself; so is the batch that the run had in the end.
4. What may differ on purpose (`allow`) is taken out of the comparison; everything else must agree.
5. The order from the state's step on: the state's, or the loader's as its continuation.

Decides from the two descriptions alone: never touches the loader, a reader or the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from loader.order import (
    MixtureConfig,
    MixtureOrder,
    Order,
    OrderConfig,
    PackSchedule,
    bucket_group,
    is_whole,
    rank_positions,
)
from loader.state import (
    STATE_VERSION,
    Allowed,
    describe_backlog,
    describe_read_up,
    member_differences,
    require_allowed,
    require_plain_state,
    require_state,
    stored_backlog,
    with_members,
)
from loader.stream import Stream, stored_in
from shardspec.errors import ConfigError, StateError

FREE = ("version", "step", "streams", "delivered", "bad", "removed")
"""Of a state: what may differ from the loader's."""

_MOST_SLOTS = 2**62
"""Of a run: slots are counted in 64 bits."""

_MOST_PLACE = 2**48
"""Of packs: steps, runs and samples of a stream."""

_WIDTH = ("layout", "canonical_ranks", "active_blocks", "block_size")
"""The canonical ranks, and fields of an order that follow from them."""

MakePacks = Callable[[Order | MixtureOrder], PackSchedule]
"""Makes the packs of an order, within the limits of the loader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHere:
    """The loader that a state is loaded into."""

    stream: Stream[Any]
    """What it streams."""
    order: Order | MixtureOrder
    """The order that the state's is compared with: as the loader was made, or changed here."""
    in_use: Order | MixtureOrder
    """The order in use, with the changes of a state that was loaded before."""
    own: Mapping[str, Any]
    """Its state, without the fields of `FREE`, and with `order`."""
    changed: bool
    """True if changes were made here."""
    packs: PackSchedule | None
    """The packs in use; None where rows are samples."""
    make_packs: MakePacks | None
    """Makes others like them."""
    bucket_steps: int
    """Steps of a group of buckets; 0 without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Where and how a loader begins after it was given a state."""

    step: int
    """The next step to be delivered."""
    order: Order | MixtureOrder
    """The order from there on."""
    packs: PackSchedule | None
    """The packs to use, still without what follows here: new ones, or those in use where changes
    were made here."""
    bad: list[dict[str, Any]]
    """Samples that the state's run substituted."""
    removed: dict[str, Any]
    """The data of datasets that were removed from the mixture."""
    sizes: list[tuple[int, int]]
    """Of packs: steps, and the global batch size from there on."""
    begins: tuple[int, int]
    """Of packs of a mixture: as `PackSchedule.begins`."""
    backlog: Sequence[np.ndarray]
    """Of packs of a mixture: as `PackSchedule.backlog`."""
    left_out: int
    """Of packs of a mixture: as `PackSchedule.left_out`."""
    leaves_out: int
    """How many of these are left out now."""
    streams: list[list[int]]
    """Of packs: where their streams are."""


def resume(state: Mapping[str, Any], here: RunHere, *, allow: Sequence[Allowed]) -> Resumption:
    """Compares a state with the loader at hand, and decides how the loader continues.

    Raises:
      StateError, ConfigError: as `StreamLoader.load_state_dict`.
    """
    require_allowed(allow)
    own, ours, packs, given = dict(here.own), here.order, here.packs, state
    _require_sound(state, own)
    if packs is not None:
        _require_sound_packs(state, by_epoch=packs.pass_is_exact)
    if packs is not None and not here.changed:
        ours, packs = _begun_packs(state, here)
        own["order"] = ours.config.to_dict()
        own["packing"] = describe_packs(packs, mixed=isinstance(ours, MixtureOrder))
    if "mixture" in allow and isinstance(ours, MixtureOrder):
        state = _with_members(state, own, ours, packs, bucket_steps=here.bucket_steps)
    saved_order, saved_packing = state.get("order"), state.get("packing")
    if _is_same_version(saved_order, own["order"]):
        plan = here.stream.plan
        free = [name for name in _WIDTH if getattr(plan, name, None) is None]
        own["order"] |= _adopted_batch(saved_order, own["order"], state, free=free)
        own["order"] |= _inherited_changes(saved_order, own["order"])
    if isinstance(saved_packing, Mapping) and own["packing"]:
        saved_sizes = saved_packing.get("sizes", [])
        if isinstance(ours, MixtureOrder):
            own["packing"] = {
                **own["packing"],
                "begins": _begins(saved_packing),
                "left_out": _left_out(saved_packing),
            }
            if "backlog" in saved_packing:
                own["packing"]["backlog"] = saved_packing["backlog"]
            else:
                own["packing"].pop("backlog", None)
        if saved_sizes[:1] == own["packing"]["sizes"]:
            own["packing"] = {**own["packing"], "sizes": saved_sizes}
    continues = _continues(state, own, here, allow, ours=ours)
    _explain(state, own, here)
    lengths_matter = packs is not None or here.bucket_steps > 0
    require_state(state, own, allow=allow, lengths_matter=lengths_matter)
    step = int(state["step"])
    order: Order | MixtureOrder
    if isinstance(ours, MixtureOrder):
        mixture = saved = MixtureConfig.from_dict(state["order"])
        if continues:
            mixture = mixture.with_width(ours.config, step=step)
        if here.bucket_steps and mixture is not saved:
            before = MixtureOrder(saved, stop=ours.stop)
            require_border(before, step, bucket_steps=here.bucket_steps)
        order = here.in_use
        if mixture != here.in_use.config:
            order = MixtureOrder(mixture, stop=ours.stop)
    else:
        single = Order(OrderConfig.from_dict(state["order"]))
        order = single.continued(ours.config, step=step) if continues else single
        if order is not single:
            require_border(single, step, bucket_steps=here.bucket_steps)
    sizes: list[tuple[int, int]] = []
    streams: list[list[int]] = []
    begins, left_out = (0, 0), 0
    backlog: Sequence[np.ndarray] = ()
    if packs is None:
        batch = order.batch_at(step)[0]
    else:
        sizes = [(int(since), int(size)) for since, size in state["packing"]["sizes"]]
        streams = [list(map(int, stream)) for stream in state.get("streams", [])]
        batch = [size for since, size in sizes if since <= step][-1]
        if isinstance(ours, MixtureOrder):
            first, begin = map(int, state["packing"]["begins"])
            begins, left_out = (first, begin), _left_out(state["packing"])
            backlog = stored_backlog(state["packing"], MixtureConfig.from_dict(state["order"]))
    # The state's batch at its step may be another than the one that this loader began with.
    rank_positions(0, here.stream.topology.world_size, batch)
    if step * batch >= _MOST_SLOTS:
        raise StateError("state_fields", field="step", got=repr(step))
    return Resumption(
        step=step,
        order=order,
        packs=packs,
        bad=[dict(record) for record in state.get("bad", [])],
        removed=dict(state.get("removed", {})),
        sizes=sizes,
        begins=begins,
        backlog=backlog,
        left_out=left_out,
        leaves_out=left_out - _left_out(given["packing"]) if left_out else 0,
        streams=streams,
    )


def require_border(order: Order | MixtureOrder, step: int, *, bucket_steps: int) -> None:
    """Refuses another order inside a group of buckets: it would lose samples of the group."""
    if not bucket_steps:
        return
    group = bucket_group(order, step, steps=bucket_steps)
    if step != group.start:
        left = group.stop - step
        raise ConfigError("bucket_group", step=step, left=left, border=group.stop)


def describe_packs(packs: PackSchedule, *, mixed: bool) -> dict[str, Any]:
    """Gives the field `packing` of states; `mixed`: the packs are a mixture's."""
    names = ("sequence_length", "max_crops", "window", "windows_per_run", "seed")
    return {
        **{name: getattr(packs.config, name) for name in names},
        "exact": packs.pass_is_exact,
        "sizes": [list(size) for size in packs.sizes],
        # Only those of mixtures ever begin anew.
        **({"begins": list(packs.begins), "left_out": packs.left_out} if mixed else {}),
        **describe_backlog(packs.backlog),
    }


def describe_streams(
    packs: PackSchedule, streams: Sequence[Sequence[int]], *, step: int, mixed: bool
) -> dict[str, Any]:
    """Gives the fields of states that say how far the streams of packs are at a step."""
    found = describe_read_up(packs.read_up(streams, step)) if mixed else {}
    return {"streams": streams, **found}


def _begun_packs(
    state: Mapping[str, Any], here: RunHere
) -> tuple[Order | MixtureOrder, PackSchedule]:
    """Makes the packs as the loader was made to, or those of the state's run.

    Which samples share a pack follows from the batch that the run began with; the state may have
    another one by now, and the loader that.
    """
    assert here.make_packs is not None, "a loader with packs"
    order, sizes = here.order, _packs_per_step(state)
    batch = order.batch_at(0)[0]
    begun = [size for since, size in sizes if since <= state["step"]]
    if begun and begun[0] != batch == begun[-1]:
        order = here.stream.plan.order(global_batch_size=begun[0])
    return order, here.make_packs(order)


def _with_members(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    ours: MixtureOrder,
    packs: PackSchedule | None,
    *,
    bucket_steps: int,
) -> Mapping[str, Any]:
    """Rewrites a state for the datasets of a mixture at hand, where its order can be read."""
    order = state.get("order")
    if not (
        isinstance(state.get("data"), Mapping)
        and isinstance(order, Mapping)
        and order.get("version") == own["order"]["version"]
    ):
        return state
    saved = MixtureOrder(MixtureConfig.from_dict(order), stop=ours.stop)
    require_border(saved, int(state["step"]), bucket_steps=bucket_steps)
    return with_members(state, own, saved=saved, ours=ours, packed=packs is not None)


def _continues(
    state: Mapping[str, Any],
    own: dict[str, Any],
    here: RunHere,
    allow: Sequence[Allowed],
    *,
    ours: Order | MixtureOrder,
) -> bool:
    """Returns True if our order continues the state's; takes over what may differ.

    What may not differ stays in `own`, to be refused.
    """
    data, order = state.get("data"), state.get("order")
    if not (isinstance(data, Mapping) and isinstance(order, Mapping)):
        return False
    same = order == own["order"]
    one = "appended" in allow and isinstance(ours, Order)
    if same and one and here.stream.has_grown_from(data):
        # Samples were appended, but none of them is in the subset.
        own["data"] = dict(data)
        return False
    if here.packs is not None or here.changed:
        return False
    if same and _last_batch(order, state) == ours.batch_at(0)[0]:
        return False
    may_differ: set[str] = set()
    if "order" in allow:
        may_differ |= {"global_batch_size", *_WIDTH}
    if isinstance(ours, Order):
        if order.get("tail") != "wrap":
            return False
        if "appended" in allow and here.stream.has_grown_from(data):
            may_differ |= {"num_samples", "layout", "block_size"}
            own["data"] = dict(data)
    own["order"] |= {name: order[name] for name in may_differ if name in order}
    return bool(may_differ)


def _explain(state: Mapping[str, Any], own: Mapping[str, Any], here: RunHere) -> None:
    """Refuses what differs for a reason that has a remedy."""
    if state.get("version") != STATE_VERSION:
        return
    data, order = state.get("data"), state.get("order")
    config = here.stream.order.config
    if isinstance(order, Mapping) and isinstance(config, MixtureConfig):
        found = member_differences(order, config)
        if found:
            raise StateError("state_mixture.members", **found)
    grown = isinstance(data, Mapping) and here.stream.has_grown_from(data)
    if isinstance(data, Mapping) and grown and own["data"] != data:
        then = stored_in(data) or {name: stored_in(entry) for name, entry in data.items()}
        now = sum(part.data.num_stored for part in here.stream.parts)
        raise StateError("state_appended", then=then, now=now)
    if not _is_same_version(order, own["order"]):
        return
    ours = own["order"]["global_batch_size"]
    first, last = order.get("global_batch_size"), _last_batch(order, state)
    if first != last and ours not in (first, last):
        raise StateError("state_batch", step=state["step"], first=first, last=last, here=ours)
    name = "canonical_ranks"
    saved, ours = order.get(name), own["order"][name]
    same_batch = order.get("global_batch_size") == own["order"]["global_batch_size"]
    if isinstance(saved, int) and saved != ours and same_batch:
        raise StateError("state_canonical_ranks", saved=saved, here=ours)


def _adopted_batch(
    saved: Mapping[str, Any],
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    free: Sequence[str],
) -> dict[str, Any]:
    """Lists what a loader takes over of a state's order whose batch size is the loader's by now.

    Args:
      saved, own: The orders, as `to_dict` gives them.
      state: The state, which names its step.
      free: Fields that were chosen, not given: the state's are as good.
    """
    if own.get("ramp") or own.get("changes") or saved.get("version") != own["version"]:
        return {}
    if not (saved.get("ramp") or saved.get("changes") or saved.get("base")):
        return {}
    if _last_batch(saved, state) != own["global_batch_size"]:
        return {}
    names = ("global_batch_size", *free)
    return {name: saved[name] for name in names if name in saved}


def _last_batch(saved: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """Finds the batch size that a state's order, or its packs, have at the state's step."""
    packs = [batch for step, batch in _packs_per_step(state) if step <= state["step"]]
    if packs:
        return packs[-1]
    changes = saved.get("ramp") or saved.get("changes") or []
    first = saved["base"]["segment"] if saved.get("base") else saved
    sizes = [first["global_batch_size"]]
    sizes += [c["global_batch_size"] for c in changes if c["step"] <= state["step"]]
    return int(sizes[-1])


def _packs_per_step(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Reads (first step, packs per step) from a state; none where they are damaged."""
    packing = state.get("packing")
    sizes = packing.get("sizes") if isinstance(packing, Mapping) else None
    if not isinstance(sizes, list | tuple):
        return []
    found = []
    for pair in sizes:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_whole, pair))):
            return []
        found.append((int(pair[0]), int(pair[1])))
    return found


def _require_sound(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses a state of another version, or whose step, order or records cannot be read.

    Raises:
      StateError: `state_version`, `state_fields`, `order_fields`, `order_values`.
      ConfigError: A value of the order is not valid.
    """
    require_plain_state(state)
    if state.get("version") != STATE_VERSION:
        raise StateError("state_version", got=state.get("version"), want=STATE_VERSION)
    order, step, bad = state.get("order"), state.get("step"), state.get("bad", [])
    if not (isinstance(bad, list | tuple) and all(map(_is_bad_record, bad))):
        raise StateError("state_fields", field="bad")
    if not isinstance(state.get("removed", {}), Mapping):
        raise StateError("state_fields", field="removed")
    since = 0
    if _is_same_version(order, own["order"]):
        config = MixtureConfig if "members" in own["order"] else OrderConfig
        since = config.from_dict(order).since
    packing = state.get("packing")
    if isinstance(packing, Mapping) and _are_places([packing.get("begins")], num_fields=2):
        since = 0  # steps of packs, which hold the samples of many steps of the order
    if not is_whole(step) or not since <= step < 2**62:  # type: ignore[operator]
        raise StateError("state_fields", field="step", got=repr(step))


def _is_bad_record(record: object) -> bool:
    """Tells whether a value is the record of a substituted sample, as states list them."""
    if not isinstance(record, Mapping):
        return False
    numbers = [record.get("sample"), record.get("step", 0), record.get("dataset", 0)]
    texts = [record.get(name) for name in ("shard", "key", "reason")]
    return (
        all(is_whole(number) and 0 <= number < 2**62 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and record.get("stage") in ("read", "layout")
    )


def _begins(packing: Mapping[str, Any]) -> list[int]:
    begins = packing.get("begins")
    if not (_are_places([begins], num_fields=2)):
        raise StateError("state_fields", field="packing.begins")
    return [int(number) for number in begins or ()]


def _left_out(packing: Mapping[str, Any]) -> int:
    count = packing.get("left_out")
    if not is_whole(count) or not 0 <= count < _MOST_PLACE:  # type: ignore[operator]
        raise StateError("state_fields", field="packing.left_out")
    return int(count)  # type: ignore[arg-type]


def _require_sound_packs(state: Mapping[str, Any], *, by_epoch: bool) -> None:
    """Refuses a state whose packs cannot be read.

    Args:
      state: The state.
      by_epoch: Packs are planned by epochs, not as endless streams: there is one place, or none.

    Raises:
      StateError: `state_fields`.
    """
    packing, streams = state.get("packing"), state.get("streams", [])
    if isinstance(packing, Mapping) and not _are_places(packing.get("sizes"), num_fields=2):
        raise StateError("state_fields", field="packing.sizes")
    if isinstance(packing, Mapping) and "begins" in packing:
        _begins(packing)
        _left_out(packing)
    sound = _are_places(streams, num_fields=2 if by_epoch else 3)
    if not sound or (by_epoch and len(streams) > 1):
        raise StateError("state_fields", field="streams")


def _are_places(value: object, *, num_fields: int) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(place, list | tuple)
        and len(place) == num_fields
        and all(is_whole(number) and 0 <= number < _MOST_PLACE for number in place)
        for place in value
    )


def _is_same_version(saved: object, own: Mapping[str, Any]) -> TypeGuard[Mapping[str, Any]]:
    """Returns True if the fields of a state's order are those of this release's."""
    return isinstance(saved, Mapping) and saved.get("version") == own["version"]


def _inherited_changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lists the changes in a state's order that a loader without any of its own takes over."""
    inherited: dict[str, Any] = {}
    for name in ("ramp", "changes"):
        if own.get(name) == []:
            inherited[name] = saved.get(name, [])
    if "before" in own and own["before"] is None:
        names = ("since", "first_epoch", "owed", "before")
        inherited |= {name: saved[name] for name in names if name in saved}
    if "base" in own and own["base"] is None:
        inherited |= {name: saved[name] for name in ("base", "past", "removed") if name in saved}
    return inherited
