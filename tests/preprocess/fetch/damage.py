"""What is in the packs of a blob cache, by another reader than ours, and how it gets damaged."""

import struct
from pathlib import Path
from typing import NamedTuple


class Blob(NamedTuple):
    """Where a blob is."""

    path: Path
    start: int
    num_bytes: int


def blobs_of(root):
    """Finds all blobs of published packs, by sha256; of several copies one."""
    found = {}
    for ledger in Path(root, "packs").glob("*.ledger"):
        for sha256, start, num_bytes in struct.iter_unpack("<32sQQ", ledger.read_bytes()):
            found[sha256.hex()] = Blob(ledger.with_suffix(".pack"), start, num_bytes)
    return found


def damage_blob(root, sha256, how):
    """Deletes the pack of a blob, cuts it within the blob, or flips a bit of the blob."""
    blob = blobs_of(root)[sha256]
    content = bytearray(blob.path.read_bytes())
    last = blob.start + blob.num_bytes - 1
    if how == "delete":
        blob.path.unlink()
    elif how == "truncate":
        blob.path.write_bytes(content[:last])
    else:
        content[last] ^= 1
        blob.path.write_bytes(content)
