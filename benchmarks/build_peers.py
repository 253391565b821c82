"""Measures the offline job beside other projects that resize the same pictures, in one run.

    python benchmarks/build_peers.py --python .peers/bin/python --python .img2dataset/bin/python

Each program gets the same JPEG files and stores each resized into 336 x 336 px, as JPEG of quality
95, with a caption, by one process. A peer that leaves the work on pictures to its user (webdataset,
mosaicml-streaming, litdata, datatrove) calls the same few lines of Pillow: decode, LANCZOS, encode;
"+" is one of them with `Image.thumbnail`, which has JPEGs decoded at a fraction of their sides.
img2dataset fetches from a server on loopback and resizes with OpenCV's area filter and 4:2:0
chroma. Of ours the whole job is measured, which besides plans, splits, draws and tokenizes the
eight variants of a text, checks files, hashes and indexes.

Every run is a new process. Programs run with two numbers of pictures, so that the time of starting
is told from that of a picture: the columns are milliseconds per further picture (processor time
with that of children; wall clock) and the rest in seconds. Programs take turns, and ratios are
medians over rounds of the program's processor time / ours.

Peers need environments of their own, because their requirements disagree: `--python` names the
interpreter of one with Pillow, any number of times. What no environment has is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE_PX, QUALITY = 336, 95
SCENES = 16
PICTURES = {1280: (32, 224), 4000: (32, 64)}
"""Longer side of the sources: the two numbers of pictures. From 32 on the job's sample for its
estimates has the same size."""

CAPTION = "A scene with shapes of several colours before a plain background, number {}."


def contained(payload: bytes) -> bytes:
    """Resizes one picture as its documentation shows it: whole decode, LANCZOS."""
    image = Image.open(io.BytesIO(payload)).convert("RGB")
    scale = min(SIDE_PX / image.width, SIDE_PX / image.height)
    size = int(image.width * scale), int(image.height * scale)
    return _encoded(image.resize(size, Image.Resampling.LANCZOS))


def thumbnail(payload: bytes) -> bytes:
    """Resizes one picture with Pillow's shortcut, from a draft of the file."""
    image = Image.open(io.BytesIO(payload))
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return _encoded(image.convert("RGB"))


def _encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def sample(number_path: tuple[int, str]) -> dict[str, Any]:
    """Makes the sample of one file."""
    number, path = number_path
    return {"jpg": contained(Path(path).read_bytes()), "txt": CAPTION.format(number)}


def run_webdataset(files: list[str], out: str, resize: Callable[[bytes], bytes]) -> None:
    import webdataset

    Path(out).mkdir()
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=64, verbose=0) as sink:
        for number, path in enumerate(files):
            picture = resize(Path(path).read_bytes())
            sink.write({"__key__": f"{number:06d}", "jpg": picture, "txt": CAPTION.format(number)})


def run_streaming(files: list[str], out: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=out, columns={"jpg": "bytes", "txt": "str"}) as sink:
        for each in enumerate(files):
            sink.write(sample(each))


def run_litdata(files: list[str], out: str) -> None:
    from litdata import optimize

    optimize(
        fn=sample,
        inputs=list(enumerate(files)),
        output_dir=out,
        num_workers=1,
        chunk_bytes="64MB",
        verbose=False,
    )


def run_datatrove(files: list[str], out: str) -> None:
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.writers import ParquetWriter

    def documents(_: object, rank: int = 0, world_size: int = 1) -> Iterable[Document]:
        for number, path in list(enumerate(files))[rank::world_size]:
            made = sample((number, path))
            yield Document(text=made["txt"], id=str(number), metadata={"jpg": made["jpg"]})

    writer = ParquetWriter(out, compression=None)
    LocalPipelineExecutor(
        pipeline=[documents, writer], tasks=1, workers=1, logging_dir=f"{out}-logs"
    ).run()


def run_img2dataset(urls: list[str], out: str) -> None:
    import pyarrow
    import pyarrow.parquet
    from img2dataset import download

    table = {"url": urls, "caption": [CAPTION.format(i) for i in range(len(urls))]}
    pyarrow.parquet.write_table(pyarrow.table(table), f"{out}.parquet")
    download(
        url_list=f"{out}.parquet",
        input_format="parquet",
        caption_col="caption",
        image_size=SIDE_PX,
        resize_mode="keep_ratio_largest",
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        output_folder=out,
        output_format="webdataset",
        number_sample_per_shard=64,
        processes_count=1,
        thread_count=8,
        disallowed_header_directives=[],
    )


def run_ours(files: list[str], out: str, decode: str) -> None:
    import pyarrow
    import pyarrow.parquet

    from benchmarks.job import Silent
    from preprocess.fetch import FetchPolicy
    from preprocess.job.job import JobSettings
    from preprocess.job.pipeline import run_job
    from preprocess.media.image import ImagePolicy
    from preprocess.recipe import Recipe

    def picture(file: str) -> dict[str, Any]:
        if file.startswith("http:"):
            return {"image_url": file}
        return {"image": {"bytes": Path(file).read_bytes(), "path": None}}

    rows = [
        picture(file) | {"caption": CAPTION.format(i), "transcripts": []}
        for i, file in enumerate(files)
    ]
    source = Path(f"{out}-source")
    source.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), source / "train-00000-of-00001.parquet", row_group_size=64
    )
    settings = JobSettings(
        dataset="pixmo_cap",
        out=out,
        source=str(source),
        cache=f"{out}-cache",
        recipe=Recipe(image=ImagePolicy(decode=decode)),
        num_shards=max(1, len(files) // 64),
        num_workers=1,
        fetch=FetchPolicy(allow_hosts=frozenset({"127.0.0.1"}), host_rate=0),
    )
    run_job(settings, Silent())


Run = Callable[[list[str], str], None]

PROGRAMS: dict[str, tuple[str, Run]] = {
    "ours": ("", functools.partial(run_ours, decode="full")),
    "ours, DECODE=reduced": ("", functools.partial(run_ours, decode="reduced")),
    "ours by URL, reduced": ("", functools.partial(run_ours, decode="reduced")),
    "webdataset": ("webdataset", functools.partial(run_webdataset, resize=contained)),
    "webdataset +": ("webdataset", functools.partial(run_webdataset, resize=thumbnail)),
    "mosaicml-streaming": ("mosaicml-streaming", run_streaming),
    "litdata": ("litdata", run_litdata),
    "datatrove": ("datatrove", run_datatrove),
    "img2dataset by URL": ("img2dataset", run_img2dataset),
}
"""Name to the distribution that it needs, and what it does with files or URLs."""


def measured(name: str, folder: str, count: int, port: int, out: str) -> None:
    """Runs one program in this process and prints what it took, as JSON."""
    names = [f"{number:05d}.jpg" for number in range(count)]
    root = f"http://127.0.0.1:{port}" if "by URL" in name else folder
    run = PROGRAMS[name][1]
    wall, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(sys.stderr):
        run([f"{root}/{each}" for each in names], out)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu}))


def cpu_seconds() -> float:
    """Reads the processor time of this process and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def versions(python: str) -> dict[str, str]:
    """Finds which of the peers an environment has."""
    code = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return {name: found[name] for name, _ in PROGRAMS.values() if name in found}


def draw(folder: Path, side_px: int, count: int) -> None:
    """Writes pictures whose longer side is `side_px`; a comment makes each file another one."""
    from preprocess.synthetic.scenes import make_scene

    for i in range(min(SCENES, count)):
        image = Image.fromarray(make_scene(1, i).pixels)
        scale = side_px / max(image.size)
        stream = io.BytesIO()
        image.resize((round(image.width * scale), round(image.height * scale))).save(
            stream, "JPEG", quality=92
        )
        payload = stream.getvalue()
        for number in range(i, count, SCENES):
            comment = b"\xff\xfe\x00\x08%06d" % number
            (folder / f"{number:05d}.jpg").write_bytes(payload[:2] + comment + payload[2:])


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files over kept connections and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Ignores it."""


def serve(folder: Path) -> int:
    """Serves a folder on loopback from this process, whose time is not counted; gives the port."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def compare(side_px: int, pythons: dict[str, str], *, rounds: int) -> None:
    """Prints the table of one size of pictures."""
    few, many = PICTURES[side_px]
    cells: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    kilobytes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pictures"
        folder.mkdir()
        draw(folder, side_px, many)
        port = serve(folder)
        for i in range(rounds):
            for name in list(pythons)[:: -1 if i % 2 else 1]:
                took = []
                for count in (few, many):
                    out = f"{root}/out"
                    took.append(launch(pythons[name], name, str(folder), count, port, out))
                    kilobytes[name] = stored_bytes(Path(out)) / count / 1e3
                    for made in Path(root).glob("out*"):
                        shutil.rmtree(made) if made.is_dir() else made.unlink()
                cpu, wall = ((took[1][k] - took[0][k]) / (many - few) for k in ("cpu", "wall"))
                cells[name].append((1e3 * cpu, 1e3 * wall, took[0]["cpu"] - few * cpu))
    print(f"{f'{side_px} px':<24}{'cpu, ms':>10}{'wall, ms':>10}{'start, s':>10}{'kB':>8}", end="")
    bases = [name for name in pythons if name.startswith("ours")]
    print("".join(f"{'/ ' + name.removeprefix('ours, '):>24}" for name in bases))
    for name, readings in cells.items():
        cpu, wall, start = map(statistics.median, zip(*readings, strict=True))
        print(f"{name:<24}{cpu:>10.1f}{wall:>10.1f}{start:>10.1f}{kilobytes[name]:>8.1f}", end="")
        for base in bases:
            ratios = [a[0] / b[0] for a, b in zip(readings, cells[base], strict=True)]
            print(f"{statistics.median(ratios):>24.2f}", end="")
        print(flush=True)
    print()


def launch(python: str, name: str, folder: str, count: int, port: int, out: str) -> dict[str, Any]:
    """Runs one program in a process of its environment."""
    command = [python, __file__, "--run", name, folder, str(count), str(port), out]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored_bytes(out: Path) -> int:
    """Counts the bytes of what a program has stored, but not of plans, logs and reports."""
    kinds = (".tar", ".mds", ".bin", ".parquet")
    return sum(file.stat().st_size for file in out.rglob("*") if file.suffix in kinds)


def main() -> None:
    """Prints a table for each size of pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="interpreter of peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="1280,4000", help="longer sides of the pictures, in px")
    args = parser.parse_args()
    from benchmarks.job import machine

    print(machine())
    pythons, known = {}, {}
    for python in [sys.executable, *args.python]:
        for peer, version in versions(python).items():
            known.setdefault(peer, (python, version))
    for name, (peer, _) in PROGRAMS.items():
        if not peer:
            pythons[name] = sys.executable
        elif peer in known:
            pythons[name] = known[peer][0]
        else:
            print(f"{name} is not installed")
    print(", ".join(f"{peer} {version}" for peer, (_, version) in known.items()), "\n")
    for side_px in map(int, args.sides.split(",")):
        compare(side_px, pythons, rounds=args.rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--run"]:
        measured(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        main()
