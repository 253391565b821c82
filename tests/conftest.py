"""Fixtures that several test files share: the command line as a real process, and small sources."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


class Running:
    """A command in a process group of its own, as a shell starts it."""

    def __init__(self, args, *, env, log):
        self.log = log
        self.out_log = log.with_suffix(".out")
        with self.log.open("wb") as err, self.out_log.open("wb") as out:
            self.process = subprocess.Popen(
                args, env=env, cwd=ROOT, stdout=out, stderr=err, start_new_session=True
            )
        self.pid = self.process.pid

    def err(self):
        return self.log.read_text()

    def wait(self, timeout_s=120):
        code = self.process.wait(timeout_s)
        return Finished(code=code, out=self.out_log.read_text(), err=self.err())

    def wait_until(self, condition, *, timeout_s=60):
        """Polls a condition while the process lives; tells whether it came true before the end."""
        stop_s = time.monotonic() + timeout_s
        while time.monotonic() < stop_s:
            if condition():
                return True
            if self.process.poll() is not None:
                return condition()
            time.sleep(0.002)
        raise TimeoutError(f"waited {timeout_s} s for {condition}; stderr:\n{self.err()}")

    def signal_group(self, number):
        os.killpg(self.pid, number)

    def kill_group(self):
        """Kills the process and all its workers at once, as a power cut would."""
        self.signal_group(signal.SIGKILL)
        return self.wait()

    def workers(self):
        """Lists the ids of its build processes that live."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return [int(child) for child in children if b"spawn_main" in _command(int(child))]

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        self.process.wait(30)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


class CommandLine:
    """Runs `python -m preprocess`, away from the network and from the user's home."""

    def __init__(self, home):
        self.home = home
        self.env = {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"}
        self._started = []

    def start(self, *args):
        command = [sys.executable, "-m", "preprocess", *map(str, args)]
        log = self.home / f"{len(self._started)}.err"
        self._started.append(Running(command, env=self.env, log=log))
        return self._started[-1]

    def run(self, *args, timeout_s=120):
        running = self.start(*args)
        try:
            return running.wait(timeout_s)
        finally:
            running.close()

    def good(self, *args):
        """Runs a command that must succeed."""
        finished = self.run(*args)
        assert finished.code == 0, finished.err + finished.out
        return finished

    def close(self):
        for running in self._started:
            running.close()


@pytest.fixture(scope="session")
def session_cli(tmp_path_factory):
    cli = CommandLine(tmp_path_factory.mktemp("home"))
    yield cli
    cli.close()


@pytest.fixture
def cli(tmp_path_factory):
    cli = CommandLine(tmp_path_factory.mktemp("home"))
    yield cli
    cli.close()


def _small_jpeg(i, size=(48, 36)):
    blocks = np.random.RandomState(i).randint(0, 256, (6, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="session")
def small_jpeg():
    """A function from a number to a small JPEG file, another for each number."""
    return _small_jpeg


def _write_parquet(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "part.parquet")
    return folder


@pytest.fixture(scope="session")
def write_parquet():
    """A function that writes rows to a folder as one Parquet file and returns the folder."""
    return _write_parquet


@pytest.fixture(scope="session")
def captioned_rows():
    """A function that makes PixMo-Cap rows with embedded small JPEGs; `broken` ones are no image.

    All of them are in the split "train": which split a row is in is decided by its image.
    """
    from preprocess.datasets.pixmo_cap import PixMoCap
    from shardspec.keyed import hash_text

    def in_train(payload):
        share = hash_text(f"{PixMoCap.split_salt}\0{payload.decode('latin1')}") / 2**64
        return share >= PixMoCap.validation_share

    def make(count, *, broken=0):
        pictures = [_small_jpeg(i) for i in range(count + count // 10 + 2)]
        pictures = [picture for picture in pictures if in_train(picture)][:count]
        assert len(pictures) == count
        pictures[:broken] = [b"no image, number %d" % i for i in range(broken)]
        return [
            {
                "image": {"bytes": picture, "path": None},
                "image_url": f"http://example.com/{i}.jpg",
                "caption": f"a picture with number {i}, all colours and no sense",
                "transcripts": [f"so this is number {i}", f"I see {i} colours"],
            }
            for i, picture in enumerate(pictures)
        ]

    return make


@pytest.fixture(scope="session")
def tiny_dataset(session_cli, tmp_path_factory):
    """The folder of a small finished dataset: 24 generated rows in 3 shards, split "train"."""
    folder = tmp_path_factory.mktemp("tiny")
    session_cli.good(
        *("shards", "pixmo_cap", "--source", "sample", "--limit", 24, "--num-shards", 3),
        *("--out", folder / "out", "--cache", folder / "cache", "--workers", 2),
    )
    return folder / "out"
