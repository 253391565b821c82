"""Peak memory and time of PLAN for many rows: `python benchmarks/plan.py [ROWS] [--urls]`.

Rows are synthetic and in Parquet; with `--urls` each has an image URL whose download is in the
ledger already, so that nothing is requested.
"""

import argparse
import dataclasses
import io
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from preprocess.fetch import BlobCache, FetchPolicy, FetchResult
from preprocess.job.job import Job, JobSettings
from preprocess.job.planner import make_plan

CONTENTS = 200
ROWS_AT_ONCE = 100_000


class Stages:
    """Prints how long each stage took, and the peak of memory at its end."""

    def __init__(self):
        self.name, self.began_s = "start", time.monotonic()

    def stage(self, name, total):  # noqa: ARG002
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{self.name:12} {time.monotonic() - self.began_s:8.1f} s  peak {peak:6.2f} GiB")
        self.name, self.began_s = name, time.monotonic()

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


def write_ledger(cache, num_rows):
    blobs, known = BlobCache(cache), []
    draw = np.random.RandomState(0)
    with blobs.writing():
        for _ in range(CONTENTS):
            buffer = io.BytesIO()
            Image.fromarray(draw.randint(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
            known.append((blobs.put(buffer.getvalue()), len(buffer.getvalue())))
    path = cache / "ledgers" / "pixmo_cap.jsonl"
    path.parent.mkdir(parents=True)
    with path.open("w") as stream:
        for i in range(num_rows):
            url = f"http://host{i % 997}.example.com/{i}.jpg"
            sha256, num_bytes = known[i % CONTENTS]
            result = FetchResult(
                url=url, status="ok", http_status=200, sha256=sha256, num_bytes=num_bytes
            )
            stream.write(json.dumps(dataclasses.asdict(result)) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="?", default=200_000)
    parser.add_argument("--urls", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_source(root / "source", options.rows, options.urls)
        if options.urls:
            write_ledger(root / "cache", options.rows)
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
