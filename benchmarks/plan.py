"""Peak memory and time of PLAN for many rows: `python benchmarks/plan.py [ROWS] [--urls]`.

Rows are synthetic and in Parquet; with `--urls` each has an image URL whose download is in the
ledger already, in another order than that of the rows, so that nothing is requested. All contents
differ by their hashes, and are one picture for whoever reads them.
"""

import argparse
import hashlib
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from preprocess.fetch import BlobCache, FetchPolicy, FetchResult, encode_result
from preprocess.fetch.pack_index import LEDGER_ROW
from preprocess.job import planner
from preprocess.job.job import Job, JobSettings
from preprocess.job.planner import make_plan

ROWS_AT_ONCE = 100_000
STRIDE = 7_919_993
"""Between two neighbours of the ledger, in rows; a prime number."""


class Stages:
    """Prints how long each stage took, and the peak of memory at its end."""

    def __init__(self):
        self.name, self.began_s, self.cpu_s = "start", time.monotonic(), time.process_time()

    def stage(self, name, total):  # noqa: ARG002
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        took_s, cpu_s = time.monotonic() - self.began_s, time.process_time() - self.cpu_s
        print(
            f"{self.name:12} {took_s:8.1f} s, cpu {cpu_s:8.1f} s  peak {peak:6.2f} GiB", flush=True
        )
        self.name, self.began_s, self.cpu_s = name, time.monotonic(), time.process_time()

    def step(self, reason):  # noqa: ARG002
        pass

    def sent(self, num_bytes):  # noqa: ARG002
        pass

    def note(self, text):
        print(" ", text)


def write_source(folder, num_rows, urls):
    folder.mkdir()
    for first in range(0, num_rows, ROWS_AT_ONCE):
        numbers = range(first, min(num_rows, first + ROWS_AT_ONCE))
        if urls:
            rows = {
                "image_url": [f"http://host{i % 997}.example.com/{i}.jpg" for i in numbers],
                "caption": [
                    f"This is the caption of picture {i}, with a few words." for i in numbers
                ],
                "transcripts": [[] for _ in numbers],
            }
        else:
            rows = {
                "messages": [
                    [
                        {"role": "user", "content": f"What is number {i}?"},
                        {"role": "assistant", "content": f"It is {i + 1} less one."},
                    ]
                    for i in numbers
                ]
            }
        pq.write_table(pa.table(rows), folder / f"train-{first:010d}.parquet")


def picture():
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_ledger(cache, num_rows):
    """Writes the ledger, and packs whose pictures are holes: only who reads them would see it."""
    num_bytes = len(picture())
    packs, path = cache / "packs", cache / "ledgers" / "pixmo_cap.jsonl"
    packs.mkdir(parents=True)
    path.parent.mkdir()
    with path.open("wb") as stream:
        for first in range(0, num_rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_rows - first)
            rows = np.zeros(count, LEDGER_ROW)
            rows["start"], rows["num_bytes"] = np.arange(count) * num_bytes, num_bytes
            hashes = memoryview(rows.view(np.uint8)).cast("B")
            for j in range(count):
                i = (first + j) * STRIDE % num_rows
                digest = hashlib.sha256(str(i).encode())
                hashes[j * LEDGER_ROW.itemsize :][:32] = digest.digest()
                url = f"http://host{i % 997}.example.com/{i}.jpg"
                result = FetchResult(
                    url=url,
                    status="ok",
                    http_status=200,
                    sha256=digest.hexdigest(),
                    num_bytes=num_bytes,
                    attempts=1,
                    content_type="image/jpeg",
                    final_url=url,
                    finished_unix_s=1_700_000_000,
                )
                stream.write(encode_result(result))
            (packs / f"{first:032x}.ledger").write_bytes(rows.tobytes())
            with (packs / f"{first:032x}.pack").open("wb") as pack:
                pack.truncate(count * num_bytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=200_000)
    parser.add_argument("--urls", action="store_true")
    options = parser.parse_args()
    # Only what is planned is written here, so the shards need not fit on the disk.
    planner.require_space = lambda out, total_bytes: None  # noqa: ARG005
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_source(root / "source", options.rows, options.urls)
        if options.urls:
            write_ledger(root / "cache", options.rows)
            BlobCache.get = lambda self, sha256: picture()  # noqa: ARG005
        stages = Stages()
        settings = JobSettings(
            dataset="pixmo_cap" if options.urls else "text_sft",
            source=str(root / "source"),
            out=str(root / "out"),
            cache=str(root / "cache"),
            fetch=FetchPolicy(placeholder_urls=0),
        )
        began_s = time.monotonic()
        plan = make_plan(Job(settings), stages)
        stages.stage("end", None)
        seconds = time.monotonic() - began_s
        print(f"{plan.num_samples:,} samples in {seconds:.0f} s")


if __name__ == "__main__":
    main()
