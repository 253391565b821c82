"""Measures loaders of other projects and ours on the same pictures and texts, in one run.

    python benchmarks/peers.py [--quick] [--rounds 3] [--only W1,W4]

Every loader gives batches of the same size with the same tensors: pictures uint8 [B, ..., H, W, C],
`input_ids` and `labels` padded to a multiple of 128, from a shuffled epoch on a local disk, made by
two workers. The peers' samples hold ids and labels laid out beforehand, so that they only pad; ours
draws variants and lays out tokens. A peer runs as its documentation recommends, with Pillow where
it leaves decoding to the user, and once more with our decoder ("+"). "Unsharded path" is the
map-style dataset that decodes, resizes, formats and tokenizes at load time, under a DataLoader.

A rate is that of the batches behind the first few, so that the start of processes is left out. The
loaders take turns; ratios are medians over rounds of ours / the peer's rate.

Needs the extra [bench]; a peer that is not installed is left out. mosaicml-streaming imports
torchvision without using it for data like ours: an empty module stands in.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import io
import multiprocessing
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import machine, row
from benchmarks.workloads import (
    SEQUENCE_LENGTH,
    Workload,
    clips,
    single_crops,
    texts,
    tiles,
    unsharded,
)
from loader.assembly.pixels import render
from shardspec.media import decode_stored
from shardspec.sample import image_rows
from shardspec.tiling import ImageView

WORKERS = 2
SKIPPED = 6
"""Batches before the clock starts: more than two workers make ahead."""

Sample = dict[str, Any]
"""images: list of encoded pictures; sizes: their sources' sizes; ids, labels: int32 [L]."""

Decode = Callable[[bytes], np.ndarray]


def pillow(payload: bytes) -> np.ndarray:
    """Decodes as documentations show it."""
    return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))


def ours(payload: bytes) -> np.ndarray:
    """Decodes as our loader does."""
    return decode_stored(payload, codec="jpeg")


def raw(payload: bytes) -> np.ndarray:
    """Views a raw picture."""
    return decode_stored(payload, codec="raw")


def samples_of(workload: Workload) -> list[Sample]:
    """Reads the samples of a workload for the peers to store."""
    dataset = workload.loader(decode_threads=0).dataset
    found = []
    for number in range(dataset.num_samples):
        stored = dataset.reader.stored(number)
        example = dataset.example(number)
        found.append(
            {
                "images": [bytes(picture.payload) for picture in stored.pictures],
                "sizes": image_rows(stored.spans)[:, 2:4].tolist(),
                "ids": example["input_ids"].astype(np.int32),
                "labels": example["labels"].astype(np.int32),
            }
        )
    return found


def packed(sample: Sample) -> bytes:
    """Joins a sample to one record, for stores of single values."""
    arrays = [np.array([len(sample["ids"]), len(sample["images"])], np.int32)]
    arrays.append(np.array([len(image) for image in sample["images"]], np.int32))
    arrays.append(np.array(sample["sizes"], np.int32).ravel())
    head = b"".join(array.tobytes() for array in (*arrays, sample["ids"], sample["labels"]))
    return head + b"".join(sample["images"])


def unpacked(record: bytes) -> Sample:
    """Splits a record."""
    length, count = np.frombuffer(record, np.int32, 2).tolist()
    numbers = np.frombuffer(record, np.int32, 3 * count + 2 * length, 8)
    images, at = [], 8 + numbers.nbytes
    for size in numbers[:count].tolist():
        images.append(record[at : at + size])
        at += size
    texts = numbers[3 * count :]
    return {
        "images": images,
        "sizes": numbers[count : 3 * count].reshape(-1, 2).tolist(),
        "ids": texts[:length],
        "labels": texts[length:],
    }


class Transform:
    """What a user's code does to a sample: decode, tile where the view tiles."""

    def __init__(self, decode: Decode, view: ImageView | None) -> None:
        self.decode, self.view = decode, view

    def __call__(self, sample: Sample) -> Sample:
        pictures = [self.decode(image) for image in sample["images"]]
        if self.view is not None:
            pictures = [
                render(picture, source_width=width, source_height=height, view=self.view)
                for picture, (width, height) in zip(pictures, sample["sizes"], strict=True)
            ]
        return {**sample, "images": pictures}

    def record(self, record: bytes) -> Sample:
        """The same of a packed record."""
        return self(unpacked(record))


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stacks and pads, as a user would."""
    return {name: torch.from_numpy(array) for name, array in arrays_of(samples).items()}


def arrays_of(samples: list[Sample]) -> dict[str, np.ndarray]:
    """The same, as arrays."""
    longest = max(len(sample["ids"]) for sample in samples)
    length = min(-(-longest // 128) * 128, SEQUENCE_LENGTH)
    batch = {
        "input_ids": np.zeros((len(samples), length), np.int64),
        "labels": np.full((len(samples), length), -100, np.int64),
    }
    for i, sample in enumerate(samples):
        batch["input_ids"][i, : len(sample["ids"])] = sample["ids"]
        batch["labels"][i, : len(sample["labels"])] = sample["labels"]
    batch["attention_mask"] = (batch["labels"] != 0).astype(np.int64)
    pictures = [np.stack(sample["images"]) for sample in samples if sample["images"]]
    if pictures:
        if pictures[0].ndim == 5:  # tiles of one picture
            pictures = [tiles[0] for tiles in pictures]
        most = max(map(len, pictures))
        images = np.zeros((len(samples), most, *pictures[0].shape[1:]), np.uint8)
        for i, own in enumerate(pictures):
            images[i, : len(own)] = own
        batch["images"] = images
    return batch


# ------------------------------------------------------------------------------------- peers

Epochs = Callable[[], Iterable[Any]]
"""Begins one shuffled pass and gives its batches."""


def webdataset(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """Tar shards, a shuffle buffer, WebLoader."""
    import webdataset as wds

    if not folder.exists():
        folder.mkdir()
        per_shard = -(-len(samples) // 8)
        with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=per_shard, verbose=0) as sink:
            for i, sample in enumerate(samples):
                sink.write({"__key__": f"{i:06d}", "bin": packed(sample)})
    urls = sorted(map(str, folder.glob("*.tar")))

    def epoch() -> Iterable[Any]:
        dataset = (
            wds.WebDataset(urls, shardshuffle=len(urls), seed=1)
            .shuffle(256)
            .map(partial(_of_tar, transform))
            .batched(batch, collation_fn=collate)
        )
        return wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)

    return epoch


def _of_tar(transform: Transform, sample: dict[str, bytes]) -> Sample:
    return transform.record(sample["bin"])


def mosaic(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """MDS shards and StreamingDataset under a DataLoader."""
    _stand_in_for_torchvision()
    import streaming

    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"record": "bytes"}) as writer:
            for sample in samples:
                writer.write({"record": packed(sample)})

    class Records(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return transform.record(super().__getitem__(at)["record"])

    streaming.base.util.clean_stale_shared_memory()
    dataset = Records(local=str(folder), shuffle=True, batch_size=batch, shuffle_seed=1)
    return lambda: DataLoader(dataset, batch_size=batch, num_workers=WORKERS, collate_fn=collate)


def litdata(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """Chunks of 64 MB and StreamingDataLoader."""
    import litdata as ld

    if not folder.exists():
        ld.optimize(
            fn=packed, inputs=samples, output_dir=str(folder), num_workers=1, chunk_bytes="64MB"
        )
        # It has set "spawn" for the whole process, the other loaders included.
        multiprocessing.set_start_method("fork", force=True)

    class Records(ld.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            return transform.record(super().__getitem__(at))

    def epoch() -> Iterable[Any]:
        dataset = Records(str(folder), shuffle=True, seed=1)
        return ld.StreamingDataLoader(
            dataset, batch_size=batch, num_workers=WORKERS, collate_fn=collate
        )

    return epoch


def hf_datasets(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """Arrow files with a transform, under a DataLoader."""
    import datasets

    datasets.disable_progress_bars()
    if not folder.exists():
        table = {"record": [packed(sample) for sample in samples]}
        datasets.Dataset.from_dict(table).save_to_disk(str(folder))
    dataset = datasets.load_from_disk(str(folder)).with_transform(partial(_of_rows, transform))
    return lambda: DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=WORKERS, collate_fn=collate
    )


def _of_rows(transform: Transform, rows: dict[str, list[bytes]]) -> dict[str, list[Any]]:
    found = [transform.record(record) for record in rows["record"]]
    return {name: [sample[name] for sample in found] for name in found[0]}


def grain(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """ArrayRecord files, a global shuffle, worker processes."""
    import grain.python as pygrain
    from array_record.python import array_record_module

    if not folder.exists():
        folder.mkdir()
        writer = array_record_module.ArrayRecordWriter(str(folder / "a"), "group_size:1")
        for sample in samples:
            writer.write(packed(sample))
        writer.close()
    source = pygrain.ArrayRecordDataSource(str(folder / "a"))

    def epoch() -> Iterable[Any]:
        dataset = pygrain.MapDataset.source(source).seed(1).shuffle().map(transform.record)
        batches = dataset.to_iter_dataset().batch(batch, batch_fn=arrays_of)
        return batches.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=WORKERS))

    return epoch


def spdl(samples: list[Sample], folder: Path, transform: Transform, batch: int) -> Epochs:
    """A pipeline of threads over files of one sample each."""
    from spdl.pipeline import PipelineBuilder

    if not folder.exists():
        folder.mkdir()
        for i, sample in enumerate(samples):
            (folder / f"{i:06d}").write_bytes(packed(sample))
    paths = sorted(folder.iterdir())

    def load(path: Path) -> Sample:
        return transform.record(path.read_bytes())

    def epoch() -> Iterable[Any]:
        order = np.random.RandomState(1).permutation(len(paths)).tolist()
        builder = PipelineBuilder().add_source([paths[i] for i in order])
        builder = builder.pipe(load, concurrency=WORKERS).aggregate(batch).pipe(collate)
        pipeline = builder.add_sink(3).build(num_threads=WORKERS)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator(timeout=60)

    return epoch


PEERS: dict[str, tuple[str, Callable[..., Epochs]]] = {
    "webdataset": ("webdataset", webdataset),
    "mosaicml-streaming": ("streaming", mosaic),
    "litdata": ("litdata", litdata),
    "datasets": ("datasets", hf_datasets),
    "grain": ("grain", grain),
    "spdl": ("spdl", spdl),
}


def _stand_in_for_torchvision() -> None:
    if importlib.util.find_spec("torchvision"):
        return
    for name in ("", ".transforms", ".datasets", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------- measuring


def rate(batches: Iterable[Any], *, batch: int, most: int) -> float:
    """Counts samples per second behind the first batches, of at most so many batches."""
    skipped = max(1, min(SKIPPED, most // 4))
    start_s, count = 0.0, 0
    for _ in batches:
        count += 1
        if count == skipped:
            start_s = time.perf_counter()
        if count == most:
            break
    return (count - skipped) * batch / (time.perf_counter() - start_s)


def measure(workload: Workload, folder: Path, *, rounds: int, view: ImageView | None) -> dict:
    """Gives the rates of all loaders, float64 [rounds] each."""
    samples = samples_of(workload)
    most = len(samples) // workload.batch
    codec = "raw" if workload.name == "W3" else "jpeg"
    decoders: dict[str, Decode] = {"": pillow, " +": ours} if codec == "jpeg" else {"": raw}
    if not samples[0]["images"]:
        decoders = {"": pillow}
    runs: dict[str, Callable[[], Iterable[Any]]] = {
        "vlm-shards, 2 threads": partial(workload.loader, decode_threads=WORKERS),
        "vlm-shards, 2 workers": partial(workload.loader, workers=WORKERS),
    }
    if workload.source:
        runs["unsharded path"] = partial(without_shards, workload)
    for name, (module, make) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name} is not installed", flush=True)
            continue
        for sign, decode in decoders.items():
            try:
                made = make(samples, folder / name, Transform(decode, view), workload.batch)
                rate(made(), batch=workload.batch, most=8)
            except Exception as error:  # noqa: BLE001 - a peer that fails is left out, and named
                print(f"{name}{sign} failed: {type(error).__name__}: {error}", flush=True)
                continue
            runs[name + sign] = made
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            rates[name].append(rate(runs[name](), batch=workload.batch, most=most))
    return {name: np.array(found) for name, found in rates.items()}


def without_shards(workload: Workload) -> Iterable[Any]:
    """Begins a pass of the map-style dataset that does everything at load time."""
    dataset, collator = unsharded(workload)
    settings = {"batch_size": workload.batch, "shuffle": True, "num_workers": WORKERS}
    return DataLoader(dataset, collate_fn=collator, **settings)


def report(workload: Workload, rates: dict[str, np.ndarray]) -> None:
    """Prints the rates, and ours to each peer's."""
    ours_first = [name for name in rates if name.startswith("vlm-shards")]
    row(workload.name, "samples/s", "threads", "workers")
    for name, found in rates.items():
        ratios = [f"{np.median(rates[own] / found):.2f}" for own in ours_first]
        row(name, f"{np.median(found):.0f}", *ratios)
    print(flush=True)


def plot(rates: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draws the rates of each workload to the best of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rates), figsize=(3.2 * len(rates), 3.6), squeeze=False)
    for axis, (name, found) in zip(axes[0], rates.items(), strict=True):
        names = sorted(found, key=lambda one: np.median(found[one]))
        medians = [float(np.median(found[one])) for one in names]
        colors = ["tab:blue" if one.startswith("vlm") else "tab:gray" for one in names]
        axis.barh(names, medians, color=colors)
        axis.set_title(f"{name}, samples/s")
        axis.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loaders side by side.")
    parser.add_argument("--quick", action="store_true", help="few rows, one round")
    parser.add_argument("--rounds", type=int, help="turns of each loader; medians are shown")
    parser.add_argument("--only", default="W1,W2,W3,W4,W5", help="workloads")
    parser.add_argument("--plot", help="PNG file to draw the rates into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    scale, rounds = (1, 1) if options.quick else (4, 5)
    rounds = options.rounds or rounds
    wanted = options.only.split(",")
    all_rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload in wanted:
            made, view = _build(workload, folder, scale)
            rates = measure(made, folder / f"{workload}-peers", rounds=rounds, view=view)
            all_rates[workload] = rates
            report(made, rates)
            shutil.rmtree(folder / f"{workload}-peers")
    if options.plot:
        plot(all_rates, Path(options.plot))


def _build(name: str, folder: Path, scale: int) -> tuple[Workload, ImageView | None]:
    (folder / f"{name}-peers").mkdir()
    place = folder / name
    if name in ("W1", "W3"):
        return single_crops(place, rows=512 * scale, raw=name == "W3"), None
    if name == "W2":
        from benchmarks.job import TILED

        return tiles(place, rows=160 * scale), TILED
    if name == "W4":
        return texts(place, rows=8192 * scale), None
    like = single_crops(folder / "W5-source", rows=64)
    return clips(place, rows=64 * scale, like=like), None


if __name__ == "__main__":
    main()
