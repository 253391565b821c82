"""`python -m loader get`: one sample by its key, as the files that its members are."""

from __future__ import annotations

import argparse
import io
import tarfile

import numpy as np

from loader.cli.verb import Verb, add_dataset, add_flag
from loader.cli.which import number_of_key
from loader.stream import StreamingDataset
from shardspec import storage


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    parser.add_argument("key", help="key of the sample")
    add_flag(parser, "--out", "folder or URL to write its files to", ".")


def _run(options: argparse.Namespace) -> str:
    stream = StreamingDataset(options.shards, split=options.split, rank=0, world_size=1)
    number = number_of_key(stream, options.key, split=options.split)
    _, members, where = stream.reader.members(number)
    lines = [f"sample {number} of the split {options.split}, {where}"]
    # What follows the last member of a tar are zeros.
    with tarfile.open(fileobj=io.BytesIO(bytes(members) + bytes(1024)), mode="r:") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            payload = b"" if opened is None else opened.read()
            # A key may have slashes: the files are in one folder.
            url = f"{options.out.rstrip('/')}/{member.name.replace('/', '_')}"
            storage.publish_bytes(url, payload)
            lines.append(f"{len(payload):>12,} bytes  {url}{_described(url, payload)}")
    return "\n".join(lines)


def _described(name: str, payload: bytes) -> str:
    if not name.endswith(".npy"):
        return ""
    array = np.load(io.BytesIO(payload), allow_pickle=False)
    return f"  {array.dtype} {list(array.shape)}"


GET = Verb(name="get", help="write one sample as files", add=_add, run=_run)
