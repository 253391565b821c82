"""Packed streams in a state: how far each one is, and what it has left where packs began anew.

Both are sets of slots: a flag for each slot of a stretch, per stream, as compressed bits in base64.
A stretch is a run of a stream, or reaches from the first slot that is left to the last one.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loader.order import MixtureConfig, PackConfig, ReadUp, is_whole
from shardspec.errors import StateError

_MOST_BITS = 2**31
"""Of all streams together: 256 MiB, a thousand times what 192 streams have left."""


def describe_read_up(reads: Sequence[ReadUp] | None) -> dict[str, Any]:
    """Gives the field `delivered` of states, which goes with `streams`; none where unknown."""
    return {"delivered": _text([read.delivered for read in reads])} if reads else {}


def read_up_of(
    state: Mapping[str, Any], config: PackConfig, *, num_streams: int
) -> list[ReadUp] | None:
    """Reads what `describe_read_up` gave.

    Args:
      state: A state whose `streams` are sound.
      config: The limits of the state's packs.
      num_streams: Streams of its order.

    Returns:
      One entry per stream; None where the state does not know all of them.

    Raises:
      StateError: `state_fields`.
    """
    runs = {int(number): int(run) for number, run, _ in state.get("streams", [])}
    if set(runs) != set(range(num_streams)) or "delivered" not in state:
        return None
    flags = _flags(state["delivered"], [config.run] * num_streams, field="delivered")
    return [ReadUp(run=runs[number], delivered=own) for number, own in enumerate(flags)]


def describe_backlog(backlog: Sequence[np.ndarray]) -> dict[str, Any]:
    """Gives the field `backlog` of `packing` in states; none where nothing is left.

    Args:
      backlog: int64 per stream, slots, ascending.
    """
    if not any(map(len, backlog)):
        return {}
    first = [int(slots[0]) if len(slots) else 0 for slots in backlog]
    spans = [int(slots[-1] - slots[0]) + 1 if len(slots) else 0 for slots in backlog]
    flags = [np.zeros(span, np.bool_) for span in spans]
    for own, slots, at in zip(flags, backlog, first, strict=True):
        own[slots - at] = True
    return {"backlog": {"first": first, "spans": spans, "slots": _text(flags)}}


def stored_backlog(packing: Mapping[str, Any], order: MixtureConfig) -> tuple[np.ndarray, ...]:
    """Reads what `describe_backlog` gave.

    Args:
      packing: The field of a state, with sound `begins`.
      order: The state's, which describes the slots that are left.

    Raises:
      StateError: `state_fields`.
    """
    num_streams = order.canonical_ranks
    share = order.global_batch_size // num_streams
    slots = range(order.since * share, int(packing["begins"][1]) * share)
    field, found = "packing.backlog", packing.get("backlog")
    if found is None:
        return ()
    if not isinstance(found, Mapping):
        raise StateError("state_fields", field=field)
    first, spans = (_counts(found.get(name), num_streams, field) for name in ("first", "spans"))
    flags = _flags(found.get("slots"), spans, field=field)
    backlog = tuple(at + np.flatnonzero(own) for at, own in zip(first, flags, strict=True))
    if any(own[0] < slots.start or own[-1] >= slots.stop for own in backlog if len(own)):
        raise StateError("state_fields", field=field)
    return backlog


def _counts(numbers: object, num_streams: int, field: str) -> Sequence[int]:
    sound = isinstance(numbers, list | tuple) and len(numbers) == num_streams
    if not (sound and all(is_whole(n) and 0 <= n < 2**62 for n in numbers)):  # type: ignore[attr-defined]
        raise StateError("state_fields", field=field)
    return numbers  # type: ignore[return-value]


def _text(flags: Sequence[np.ndarray]) -> str:
    bits = b"".join(np.packbits(own).tobytes() for own in flags)
    return base64.b64encode(zlib.compress(bits, 9)).decode("ascii")


def _flags(text: object, sizes: Sequence[int], *, field: str) -> list[np.ndarray]:
    stops = np.cumsum([-(-size // 8) for size in sizes]).tolist()
    if not isinstance(text, str) or sum(sizes) > _MOST_BITS:
        raise StateError("state_fields", field=field)
    unpacker = zlib.decompressobj()
    try:
        bits = unpacker.decompress(base64.b64decode(text, validate=True), stops[-1] + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise StateError("state_fields", field=field) from error
    if len(bits) != stops[-1]:
        raise StateError("state_fields", field=field)
    parts = np.split(np.frombuffer(bits, np.uint8), stops[:-1])
    return [
        np.unpackbits(part, count=size).astype(np.bool_)
        for part, size in zip(parts, sizes, strict=True)
    ]
