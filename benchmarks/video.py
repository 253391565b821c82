"""Frames of videos, drawn at random: both ways to store them, beside other decoders, in one run.

    python benchmarks/video.py [--rounds 3] [--memory-clips 2000] [--short-only]

Generated clips of 720p (H.264 by x264's defaults at its preset "veryfast", B frames among them, a
cut every five seconds): 8 of 300 frames and 32 of 3,000, drawn anew each time, as uint8 of 336 x
336 pixels. Ours are whole examples of shards, with their draws and tokens; the others are given the
numbers of frames and decode from bytes in memory, with one thread, and resize with the same kernel.
webdataset reads the file from a tar, the others hold it. A decoder that is not installed is left
out. Processor time counts all threads and child processes; rates are medians, functions take turns.

`--memory-clips`: memory of this process and its children while that many clips of 640 x 360 pixels
are decoded from shards, a tenth of the way and at the end.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.job import Silent, machine, row
from loader import StreamingDataset, View
from loader.assembly.pixels import resize
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media import ImagePolicy, VideoPolicy
from preprocess.recipe import Recipe
from shardspec.tiling import FrameView, ImageView

SIDE_PX = 336
Draw = Callable[[Sequence[int]], list[np.ndarray]]


def write_clip(path: Path, *, frames: int, size: tuple[int, int], seed: int) -> None:
    """Encodes a texture that moves, another one every 150 frames."""
    import av

    width, height = size
    rng = np.random.RandomState(seed)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for i in range(frames):
            if i % 150 == 0:
                cells = rng.randint(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
                texture = cells.repeat(8, 0).repeat(8, 1)
                texture = texture // 2 + rng.randint(0, 32, texture.shape).astype(np.uint8)
            moved = np.roll(texture, (i * 2, i * 3), (0, 1))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(moved), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shards(folder: Path, name: str, *, store: str) -> str:
    """Builds the shards of the clips of a folder."""
    settings = JobSettings(
        dataset=str(folder / "rows.jsonl"),
        out=str(folder / name),
        cache=str(folder / "cache"),
        recipe=Recipe(
            image=ImagePolicy(views=(ImageView(size_px=SIDE_PX),)),
            video=VideoPolicy(store=store, max_frames=64),  # type: ignore[arg-type]
        ),
    )
    run_job(settings, Silent())
    return settings.out


def ours(url: str, number: int) -> Callable[[int], int]:
    """Draws `number` frames of a sample in an epoch; returns how many it got."""
    view = View(image=ImageView(size_px=SIDE_PX), frames=FrameView(max_frames=number))
    dataset = StreamingDataset(url, seed=1, view=view, rank=0, world_size=1)

    def draw(epoch: int) -> int:
        example = dataset.example(epoch % dataset.num_samples, epoch=epoch)
        return len(example["images"])

    return draw


def with_pyav(payload: bytes) -> Draw:
    """Seeks to the key frame before each frame, unless it is ahead, and compares timestamps."""
    import av

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        found = []
        with av.open(io.BytesIO(payload)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            packets = [p for p in container.demux(stream) if p.size]
            pts = sorted(int(p.pts or 0) for p in packets)
            keys = sorted(int(p.pts or 0) for p in packets if p.is_keyframe)
            at, frames = None, iter(())
            for number in numbers:
                wanted = pts[number]
                key = max(k for k in keys if k <= wanted)
                if at is None or not key <= at:
                    container.seek(key, stream=stream)
                    frames = container.decode(stream)  # type: ignore[assignment]
                for frame in frames:
                    at = int(frame.pts)  # type: ignore[attr-defined]
                    if at == wanted:
                        found.append(frame.to_ndarray(format="rgb24"))  # type: ignore[attr-defined]
                        break
        return found

    return draw


def with_decord(payload: bytes) -> Draw:
    """As decord's documentation shows it, opened for each clip."""
    import decord

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        reader = decord.VideoReader(io.BytesIO(payload), num_threads=1)
        return list(reader.get_batch(list(numbers)).asnumpy())

    return draw


def with_torchcodec(payload: bytes) -> Draw:
    """As torchcodec's documentation shows it, with exact seeking."""
    from torchcodec.decoders import VideoDecoder

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        decoder = VideoDecoder(payload, num_ffmpeg_threads=1, dimension_order="NHWC")
        return list(decoder.get_frames_at(list(numbers)).data.numpy())

    return draw


def with_energon(payload: bytes) -> Draw:
    """Asks the decoder that Megatron-Energon's samples bring along for clips of one frame each."""
    from megatron.energon.av import AVDecoder

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        decoder = AVDecoder(io.BytesIO(payload))
        found, _ = decoder.get_video_clips([(n, n) for n in numbers], video_unit="frames")
        return [clip[0].permute(1, 2, 0).contiguous().numpy() for clip in found]

    return draw


def with_webdataset(folder: Path, payload: bytes) -> Draw:
    """Reads the file from a tar by webdataset, and decodes with PyAV."""
    import webdataset

    path = folder / "clip.tar"
    with tarfile.open(path, "w") as tar:
        entry = tarfile.TarInfo("clip.mp4")
        entry.size = len(payload)
        tar.addfile(entry, io.BytesIO(payload))

    def draw(numbers: Sequence[int]) -> list[np.ndarray]:
        (sample,) = webdataset.WebDataset(str(path), shardshuffle=False)
        return with_pyav(sample["mp4"])(numbers)

    return draw


def peer(draw: Draw, *, of: int, number: int) -> Callable[[int], int]:
    """Draws frames as ours are drawn, and resizes them."""

    def drawn(epoch: int) -> int:
        rng = np.random.RandomState(epoch)
        numbers = np.sort(rng.choice(of, number, replace=False)).tolist()
        frames = draw(numbers)
        batch = np.stack([resize(frame, SIDE_PX, SIDE_PX) for frame in frames])
        return len(batch)

    return drawn


def peers(folder: Path, payload: bytes) -> dict[str, Draw]:
    """Makes the decoders that are installed."""
    makers: dict[str, Callable[[], Draw]] = {
        "PyAV": lambda: with_pyav(payload),
        "decord": lambda: with_decord(payload),
        "torchcodec": lambda: with_torchcodec(payload),
        "webdataset + PyAV": lambda: with_webdataset(folder, payload),
        "Energon": lambda: with_energon(payload),
    }
    found: dict[str, Draw] = {}
    for name, make in makers.items():
        try:
            draw = make()
            draw([0])
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name}: left out, {type(error).__name__}")
        else:
            found[name] = draw
    return found


def children() -> list[int]:
    """Lists the processes that this one has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def cpu_s() -> float:
    """Sums up the processor time of this process and its children, ended ones included."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    for pid in children():
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def rss_mb() -> float:
    """Sums up the memory of this process and its children."""
    pages = 0
    for pid in ("self", *children()):
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def stored_bytes(url: str) -> int:
    """Counts the bytes of a dataset's shards."""
    return sum(path.stat().st_size for path in Path(url).rglob("*.tar"))


def compare(folder: Path, *, frames: int, number: int, clips: int, rounds: int, draws: int) -> None:
    """Prints rates of drawing `number` of `frames` frames, and ratios of ours to the others."""
    names = [f"{i}.mp4" for i in range(clips)]
    for i, name in enumerate(names):
        write_clip(folder / name, frames=frames, size=(1280, 720), seed=i)
    lines = [f'{{"video": "{name}", "caption": "A texture moves, {name}."}}' for name in names]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    urls = {store: shards(folder, store, store=store) for store in ("frames", "clip")}
    source = sum((folder / name).stat().st_size for name in names)
    print(f"\n{number} of {frames} frames, {clips} clips of {source / clips / 1e6:.2f} MB")
    for store, url in urls.items():
        print(f"  as {store}: {stored_bytes(url) / source:.2f} times the bytes of the files")
    functions = {f"ours, {store}": ours(url, number) for store, url in urls.items()}
    for name, draw in peers(folder, (folder / names[0]).read_bytes()).items():
        functions[name] = peer(draw, of=frames, number=number)
    rates: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(0)
    epochs = count(1)
    for _ in range(rounds):
        these = [next(epochs) for _ in range(draws)]
        for name, function in functions.items():
            begin_s = cpu_s()
            made = sum(function(epoch) for epoch in these)
            rates[name].append(made / (cpu_s() - begin_s))
    row("", "frames/s", "frames", "clip")
    best = {name: median(values) for name, values in rates.items()}
    for name, rate in best.items():
        ratios = [f"x {best[f'ours, {store}'] / rate:.2f}" for store in urls]
        row(name, f"{rate:.1f}", *ratios)


def memory(folder: Path, clips: int) -> None:
    """Prints memory while many clips are decoded, one after the other."""
    names = [f"{i}.mp4" for i in range(8)]
    for i, name in enumerate(names):
        write_clip(folder / name, frames=60, size=(640, 360), seed=i)
    lines = [f'{{"video": "{name}", "caption": "A texture moves, {name}."}}' for name in names]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    print(f"\nmemory, MB, over {clips} clips")
    row("", "1/10", "1/2", "end")
    for store in ("clip", "frames"):
        draw = ours(shards(folder, store, store=store), 8)
        marks = []
        for epoch in range(clips):
            draw(epoch)
            if epoch + 1 in (clips // 10, clips // 2, clips):
                marks.append(rss_mb())
        row(store, *(f"{mark:.0f}" for mark in marks))


def main(argv: list[str] | None = None) -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-clips", type=int, default=2000)
    parser.add_argument("--short-only", action="store_true", help="no clip of 3,000 frames")
    args: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(machine())
    start_s = time.perf_counter()
    sizes: list[dict[str, int]] = [{"frames": 300, "number": 8, "clips": 4, "draws": 4}]
    sizes += [] if args.short_only else [{"frames": 3000, "number": 32, "clips": 1, "draws": 1}]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), rounds=args.rounds, **size)
    if args.memory_clips:
        with tempfile.TemporaryDirectory() as folder:
            memory(Path(folder), args.memory_clips)
    print(f"{time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
