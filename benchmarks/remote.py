"""Measures reading from an object store over a slow link, beside other loaders on the same server.

    python benchmarks/remote.py [--small] [CONTENDER ...]

Peers that are not installed are left out; `make bench` installs all of them. It takes ten minutes.

An S3 server on loopback stands behind a slow link (tests/slow_link.py), a process of its own, that
lets each request and each new connection wait 20 ms and all answers together pass at 100 MB/s.
Pictures are stored as raw pixels, so that the link and not the decoder is what limits. Every
contender has its own copy in its own format with shards of 64 MB, an empty cache, and a fresh
process. They take turns; medians are shown.

* first: from building the dataset to the first batch in hand, in a process that has imported
  everything that any of them needs.
* from start: the same from the start of the process, these imports included.
* epoch: bytes of samples per second from the first batch to the end of the epoch, for loaders that
  fetch while they give; those that fetch whole shards first give bursts above the link here.
* whole: the same from building the dataset to the end of the epoch.
* of limit: whole, to the bare reader's: eight threads that receive ranges of 4 MB and throw them
  away, by URLs that were signed before.
* link: all that the link has passed for it, by the time from the first byte to the last, in percent
  of its rate. A loader that has fetched everything may still have batches to give.

With --small there are 16,384 samples of 59 kB instead of 3,072 of 340 kB, and our order has lanes
that read blocks of 16 samples, as it has of every large dataset; 3,072 samples are shuffled as a
whole. "ours, 4 MiB" caches blocks of the size that all datasets had before it followed from theirs.

Shuffles differ: ours is of the whole dataset, mosaicml-streaming's and litdata's of shards and
inside them, webdataset's of shards and of a buffer of 1,000 samples, from which it gives the first
one when 100 are there, its default, or when it is full. Rows "in order" do not shuffle.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import Silent, machine, row, write_source
from loader import Network, StreamingDataset, make_dataloader
from preprocess.job.pipeline import run_job
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Recipe
from preprocess.synthetic.scenes import make_scene
from shardspec.media import encode_stored
from shardspec.storage.connections import Connections
from shardspec.tiling import ImageView
from tests import servers

ROOT = Path(__file__).resolve().parents[1]
SMALL = "REMOTE_SMALL" in os.environ or "--small" in sys.argv
ROWS = 16_384 if SMALL else 3072
VIEW = ImageView(size_px=140) if SMALL else ImageView()
PICTURES = 32
BATCH = 32
ROUNDS = 3
RANGE_BYTES = 4 * 10**6
SHARD_BYTES = 64 * 10**6
LATENCY_S = 0.02
LINK_BYTES_PER_S = 100e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="pictures of 140 px")
    parser.add_argument("contenders", nargs="*", help=f"of {', '.join(CONTENDERS)}")
    names = parser.parse_args().contenders
    if unknown := set(names) - set(CONTENDERS):
        parser.error(f"unknown contenders: {', '.join(sorted(unknown))}")
    print(f"{machine()}\n")
    contenders = [name for name in names or CONTENDERS if is_installed(name)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_samples, sample_bytes = build(folder / "data", contenders)
        print(f"{num_samples} samples of {sample_bytes / 1e3:.0f} KB, batches of {BATCH}; ")
        print(f"{LATENCY_S * 1e3:.0f} ms per request, {LINK_BYTES_PER_S / 1e6:.0f} MB/s\n")
        with servers.s3_server(folder / "s3") as server, behind(server.endpoint) as link:
            bucket = server.make_bucket("bench")
            server.client().put(str(folder / "data"), bucket + "/data", recursive=True)
            env = {**os.environ, **server.env, "AWS_ENDPOINT_URL_S3": link.endpoint}
            env |= {"REMOTE_SMALL": "1"} if SMALL else {}
            found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for i in range(ROUNDS):
                for contender in contenders[:: 1 if i % 2 else -1]:
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        link.used()
                        measured = run(contender, cache, env)
                        if contender != LIMIT and measured["samples"] != num_samples:
                            raise RuntimeError(f"{contender}: {measured['samples']} samples")
                        found[contender].append(measured | {"link": link.used()})
    row("", "first, s", "from start, s", "epoch", "whole", "of limit", "link", "CPU, s")
    limit = np.median([run["whole_bytes_per_s"] for run in found.get(LIMIT, [])] or [0])
    for contender, runs in found.items():
        median = {name: np.median([r[name] for r in runs]) for name in runs[0]}
        row(
            contender,
            *(
                "" if contender == LIMIT else f"{median[n]:.2f}"
                for n in ("first_s", "from_start_s")
            ),
            f"{median['bytes_per_s'] / 1e6:.0f} MB/s",
            f"{median['whole_bytes_per_s'] / 1e6:.0f} MB/s",
            f"{median['whole_bytes_per_s'] / limit:.2f}" if limit else "",
            f"{median['link']:.0%}",
            f"{median['cpu_s']:.2f}",
        )


class Link:
    """The slow link, which runs in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.endpoint = self._read()

    def used(self) -> float:
        """Tells how much of its rate was used since this was asked last."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        num_bytes, seconds = map(float, self._read().split())
        return num_bytes / seconds / LINK_BYTES_PER_S if seconds else 0.0

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def behind(endpoint: str) -> Iterator[Link]:
    """Starts the slow link to a server."""
    options = ("--latency", str(LATENCY_S), "--rate", str(LINK_BYTES_PER_S))
    command = [sys.executable, str(ROOT / "tests/slow_link.py"), endpoint, *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Link(process)
        finally:
            process.kill()


def run(contender: str, cache: str, env: dict[str, str]) -> dict[str, float]:
    """Runs a contender for one epoch in a process of its own."""
    began = str(time.monotonic())
    command = [sys.executable, __file__, "--contender", contender, cache, began]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{contender}: {done.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def is_installed(contender: str) -> bool:
    """Tells whether a contender's package is there, and says so if it is not."""
    package = PACKAGES.get(contender.split(",")[0])
    found = package is None or importlib.util.find_spec(package) is not None
    if not found:
        print(f"{contender}: {package} is not installed, left out")
    return found


def build(folder: Path, contenders: list[str]) -> tuple[int, float]:
    """Writes the same samples in every contender's format."""
    view = VIEW
    payloads = []
    for i in range(PICTURES):
        picture = Image.fromarray(make_scene(1, i).pixels)
        stored = picture.resize((view.size_px, view.size_px), Image.Resampling.LANCZOS)
        payloads.append(encode_stored(np.asarray(stored), codec="jpeg", quality=95))
    settings = write_source(folder.parent / "source", payloads, rows=ROWS, view=view)
    recipe = Recipe(image=ImagePolicy(views=(view,), codec="raw"))
    out = str(folder / "ours")
    settings = replace(settings, recipe=recipe, out=out, shard_bytes=SHARD_BYTES)
    run_job(settings, Silent())
    dataset = StreamingDataset(out)
    samples = []
    for i in range(dataset.num_samples):
        sample = dataset.reader.read(i)
        pixels = np.ascontiguousarray(sample.images[0].pixels).tobytes()
        samples.append({"pixels": pixels, "tokens": sample.tokens.tobytes()})
    write_webdataset(folder / "webdataset", samples)
    if "mosaicml-streaming" in contenders:
        write_mosaic(folder / "mosaic", samples)
    if "litdata" in contenders:
        write_litdata(folder / "litdata", samples)
    size = np.mean([len(s["pixels"]) + len(s["tokens"]) for s in samples])
    return len(samples), float(size)


def write_webdataset(folder: Path, samples: list[dict[str, bytes]]) -> None:
    import webdataset as wds

    folder.mkdir(parents=True)
    with wds.ShardWriter(
        str(folder / "%05d.tar"), maxsize=SHARD_BYTES, maxcount=10**6, verbose=0
    ) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"{i:08d}", "pix": sample["pixels"], "tok": sample["tokens"]})


def write_mosaic(folder: Path, samples: list[dict[str, bytes]]) -> None:
    streaming = import_mosaic()
    columns = {"pixels": "bytes", "tokens": "bytes"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write(sample)


def write_litdata(folder: Path, samples: list[dict[str, bytes]]) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=SHARD_BYTES)
    for i, sample in enumerate(samples):
        cache[i] = sample
    cache.done()
    cache.merge()


def import_mosaic() -> Any:
    """Imports mosaicml-streaming; torchvision, which it names and we do not use, is left out."""

    import transformers.feature_extraction_utils  # noqa: F401 - it would look for torchvision

    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".datasets.folder"):
        sys.modules.setdefault(f"torchvision{name}", Absent(f"torchvision{name}"))
    import streaming

    return streaming


def bare(cache: str) -> Iterator[int]:
    """Receives the bytes of our shards and does nothing with them."""
    del cache
    size = VIEW.size_px**2 * 3
    fs = _s3fs()
    parts = [
        (fs.sign(name, expiration=3600), start, min(start + RANGE_BYTES, length))
        for name, length in sorted(fs.du("bench/data/ours/train", total=False).items())
        for start in range(0, length, RANGE_BYTES)
        if name.endswith(".tar")
    ]
    connections = Connections()

    def receive(part: tuple[str, int, int]) -> int:
        url, start, stop = part
        target = memoryview(bytearray(stop - start))
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with connections.get(url, headers, wait_s=lambda: 60.0) as answer:
            place = 0
            while place < len(target):
                place += answer.readinto(target[place : place + 2**18])
        return stop - start

    with ThreadPoolExecutor(8) as pool:
        yield 0  # the clock starts here: all is signed
        received, given = 0, 0
        for num_bytes in pool.map(receive, parts):
            received += num_bytes
            if received // size - given >= BATCH:
                yield received // size - given
                given = received // size
        if received // size > given:
            yield received // size - given


def ours(
    cache: str | None, *, shuffle: bool = True, block_bytes: int | None = None
) -> Iterator[int]:
    lanes = {"canonical_ranks": 1, "active_blocks": BATCH} if SMALL and shuffle else {}
    dataset = StreamingDataset(
        "s3://bench/data/ours",
        seed=1,
        cache=cache,
        shuffle=shuffle,
        network=Network(block_bytes=block_bytes),
        **lanes,
    )
    batches = make_dataloader(dataset, global_batch_size=BATCH, sequence_length=1024)
    for batch in batches:
        yield len(batch["input_ids"])


def webdataset(buffer: int, *, initial: int = 0) -> Iterator[int]:
    import webdataset as wds

    fs = _s3fs()
    names = sorted(fs.ls("bench/data/webdataset", detail=False))
    urls = [f"pipe:curl -s -f '{fs.sign(name, expiration=3600)}'" for name in names]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls) if buffer else False, seed=1)
    if buffer:
        dataset = dataset.shuffle(buffer, initial=initial)
    for batch in dataset.to_tuple("pix", "tok").batched(BATCH, collation_fn=_stack):
        yield len(batch)


def mosaic(cache: str) -> Iterator[int]:
    streaming = import_mosaic()
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL_S3"]
    dataset = streaming.StreamingDataset(
        remote="s3://bench/data/mosaic", local=cache, shuffle=True, batch_size=BATCH
    )
    yield from _batched(dataset)


def litdata(cache: str) -> Iterator[int]:
    import litdata
    from litdata.streaming import downloader

    # What it reads with insists on TLS otherwise, and no other setting reaches it.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    dataset = litdata.StreamingDataset(
        "s3://bench/data/litdata",
        cache_dir=cache,
        shuffle=True,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]},
    )
    yield from _batched(dataset)


def _batched(dataset: Any) -> Iterator[int]:
    held = []
    for sample in dataset:
        held.append((sample["pixels"], sample["tokens"]))
        if len(held) == BATCH:
            yield len(_stack(held))
            held = []
    if held:
        yield len(held)


def _stack(samples: list[Any]) -> np.ndarray:
    """Makes a batch of the pixels, as every loader has to."""
    return np.stack([np.frombuffer(sample[0], np.uint8) for sample in samples])


def _s3fs() -> Any:
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])


def _without_cache(run: Callable[[Any], Iterator[int]], argument: Any, cache: str) -> Iterator[int]:
    del cache
    return run(argument)


LIMIT = "bare reader"
CONTENDERS = {
    LIMIT: bare,
    "ours, cache": ours,
    "ours, 4 MiB": partial(ours, block_bytes=4 * 2**20),
    "ours, no cache": partial(_without_cache, ours, None),
    "ours, in order": partial(_without_cache, partial(ours, shuffle=False), None),
    "webdataset, full buffer": partial(_without_cache, partial(webdataset, initial=1000), 1000),
    "webdataset, buffer": partial(_without_cache, partial(webdataset, initial=100), 1000),
    "webdataset, in order": partial(_without_cache, webdataset, 0),
    "mosaicml-streaming": mosaic,
    "litdata": litdata,
}
PACKAGES = {"webdataset": "webdataset", "mosaicml-streaming": "streaming", "litdata": "litdata"}


def contend(contender: str, cache: str, began: str) -> None:
    """Measures one contender in this process and prints the result as JSON.

    Args:
      contender: Its name.
      cache: An empty folder.
      began: When its process was started, by the monotonic clock.
    """
    # Clients are imported before the clock starts.
    for package in ("s3fs", "boto3", "webdataset", "litdata"):
        if importlib.util.find_spec(package):
            importlib.import_module(package)
    if importlib.util.find_spec("streaming"):
        import_mosaic()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    first_s, from_start_s, samples, first = 0.0, 0.0, 0, 0
    for count in CONTENDERS[contender](str(Path(cache) / "cache")):
        if not count:
            start_s = time.perf_counter()
            continue
        samples += count
        if not first_s:
            first_s, first = time.perf_counter() - start_s, count
            from_start_s = time.monotonic() - float(began)
    rest_s = time.perf_counter() - start_s - first_s
    size = VIEW.size_px**2 * 3
    measured = {
        "first_s": first_s,
        "from_start_s": from_start_s,
        "cpu_s": time.process_time() - start_cpu_s,
        "bytes_per_s": (samples - first) * size / rest_s,
        "whole_bytes_per_s": samples * size / (first_s + rest_s),
        "samples": samples,
    }
    print(json.dumps(measured), flush=True)
    os._exit(0)  # some leave threads or processes behind that wait for each other


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        contend(*sys.argv[2:])
    else:
        main()
