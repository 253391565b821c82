"""What a job left out: the first lines of its quarantine lists, by reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardspec import storage
from shardspec.documents import read_object
from shardspec.storage import RangeReader

_MOST_LISTS = 64
_MOST_BYTES = 1 << 20
"""Of a list: some thousand rows."""

NUM_EXAMPLES = 3


def left_out_examples(url: str) -> Mapping[str, list[Mapping[str, Any]]]:
    """Reads examples of rows that did not become samples.

    Returns:
      By reason, up to `NUM_EXAMPLES` lines each, in the order of the lists; of long lists and of
      many, only the first are looked at.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    folder = storage.join(url, "quarantine")
    names = [name for name in storage.list_names(folder) if name.endswith(".jsonl")]
    for name in names[:_MOST_LISTS]:
        payload = _beginning(storage.join(folder, name))
        for line in payload.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # the rest of it was not read
            try:
                entry = read_object(line, any_text=True)
            except ValueError:
                continue  # the list is for people: a damaged line is not worth an error
            examples = found.setdefault(str(entry.get("reason", "")), [])
            if len(examples) < NUM_EXAMPLES:
                examples.append(entry)
    return dict(sorted(found.items()))


def _beginning(url: str) -> bytes:
    if storage.is_local(url):
        with storage.translate_errors(url), storage.local_path(url).open("rb") as stream:
            return stream.read(_MOST_BYTES)
    num_bytes = min(storage.size(url) or 0, _MOST_BYTES)
    return bytes(RangeReader().read(url, 0, num_bytes))
