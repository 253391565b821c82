"""Fixtures that several test files share: the command line as a real process, and small sources."""

import compileall
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from _pytest.assertion import rewrite
from hypothesis import settings
from PIL import Image

from preprocess.__main__ import INTERRUPTED, main
from preprocess.datasets.base import SceneImage
from tests import inline, servers

collect_ignore = ["e2e/launched.py"]  # a program, which wants arguments

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# Read when huggingface_hub is first imported: a test that asks the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when gcsfs is first imported: no gRPC call that a server on loopback cannot answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# Read when torch is first imported, here or in a child: threads that wait for each other in busy
# loops cost several times what they save once two processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Unbuffered, a program prints a line and its end in two writes: lines of ranks that share a pipe
# run into each other. With a buffer, `flush=True` writes a whole line at once.
os.environ.pop("PYTHONUNBUFFERED", None)

# No deadline: the machine may be busy; pytest-timeout ends what hangs.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("all", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("suite")

# Rows of SOURCE=sample are the same in hundreds of jobs: each picture is drawn once per worker.
SceneImage.read = functools.lru_cache(maxsize=1024)(SceneImage.read)

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: the
# tests that interrupt one would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """For `-n auto`: one worker per core, and none where the command line names what to run.

    A worker imports and collects all that the others do: a single room has run by then. Everyday
    tests get one worker more: some of them wait.
    """
    if config.args_source is config.ArgsSource.ARGS or config.option.keyword:
        return 0
    cores = min(len(os.sched_getaffinity(0)), 8)
    return cores + 1 if config.option.markexpr == "not slow" else cores


def pytest_sessionstart(session):
    """Compiles our modules and tests once, before the workers of pytest-xdist all do."""
    if getattr(session.config.option, "numprocesses", None) and not sys.dont_write_bytecode:
        for room in ("shardspec", "preprocess", "loader", "vlm_shards"):
            compileall.compile_dir(ROOT / room, quiet=2, workers=0)
        compile_tests(session.config)


def compile_tests(config):
    """Compiles the tests with their asserts rewritten, on all cores, as importing them would.

    Rewriting takes longer than all else that a worker does before its first test.
    """
    paths = sorted(Path(__file__).parent.rglob("test_*.py"))
    cores = len(os.sched_getaffinity(0))
    children = []
    for core in range(cores):
        child = os.fork()
        if not child:
            try:
                gc.disable()
                _rewrite(config.pluginmanager.rewrite_hook, paths[core::cores])
            finally:
                os._exit(0)  # what failed is rewritten, or fails, where it is imported
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _rewrite(hook, paths):
    with mock.patch.object(rewrite, "exec", create=True):
        for path in paths:
            spec = importlib.util.spec_from_file_location(path.stem, path, loader=hook)
            hook.exec_module(importlib.util.module_from_spec(spec))  # writes the file, runs nothing


def pytest_collection(session):
    """Leaves out the search for garbage while all modules are imported: they are no garbage."""
    gc.disable()


def pytest_collection_finish(session):
    """Takes what importing and collecting has made out of the collector's sight.

    It is a million objects, and each full collection of the suite would look through all of them.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


_SERVERS = pytest.StashKey[servers.SharedServers]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tells a worker of pytest-xdist where the stores are that all workers share."""
    stash = node.config.stash
    if _SERVERS not in stash:
        factory = node.config._tmp_path_factory
        stash[_SERVERS] = servers.SharedServers(factory.mktemp("servers") / "shared")
    node.workerinput["servers"] = stash[_SERVERS].place()


def pytest_unconfigure(config):
    if _SERVERS in config.stash:
        config.stash[_SERVERS].close()


@contextlib.contextmanager
def _server_of_the_session(kind, factory, config):
    worker = getattr(config, "workerinput", None)
    if worker is None:
        start = {"s3": servers.s3_server, "gcs": servers.gcs_server}[kind]
        with start(factory.mktemp(kind) / "server") as server:
            yield server
    else:
        with servers.shared(kind, worker["servers"], user=worker["workerid"]) as server:
            yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory, pytestconfig):
    """An S3 server of the whole session: make a bucket of your own, enter it to use it."""
    with _server_of_the_session("s3", tmp_path_factory, pytestconfig) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory, pytestconfig):
    """A GCS server of the whole session: make a bucket of your own, enter it to use it."""
    with _server_of_the_session("gcs", tmp_path_factory, pytestconfig) as server:
        yield server


@pytest.fixture
def s3_servers(tmp_path):
    """A function that starts another S3 server, one that a test may kill."""
    return lambda: servers.s3_server(tmp_path / "server")


@pytest.fixture
def in_this_process():
    """Runs the tasks of jobs in this process: the engine has tests of its own."""
    with inline.jobs():
        yield


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """A function that builds a folder, once for all workers of the suite, and returns it.

    `build_once(name, build)` calls `build(folder)` unless somebody has. The folder is read-only; a
    test that changes it all the same (as root may) fails the suite at its end.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made = {}

    def once(name, build):
        folder = base / f"shared-{name}"
        if name not in made:
            with (base / f"shared-{name}.lock").open("a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
                lock.seek(0)
                if not lock.read():  # nobody has built it to its end
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    build(folder)
                    for path in (*folder.rglob("*"), folder):
                        path.chmod(0o555 if path.is_dir() else 0o444)
                    lock.write("built")
            made[name] = _stamps(folder)
        return folder

    yield once
    changed = {name for name, before in made.items() if _stamps(base / f"shared-{name}") != before}
    assert not changed, f"a test has changed what all share: {sorted(changed)}"


def _stamps(folder):
    paths = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in paths.items()}


@pytest.fixture
def golden():
    """Compares a text with tests/golden/NAME; UPDATE_GOLDEN=1 writes the file instead."""

    def check(name, text):
        path = GOLDEN / name
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return check


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
        """Sends a signal to the process and all its workers, unless all have ended."""
        with contextlib.suppress(ProcessLookupError):
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

    def start_held(self, *args, when, undo=lambda: None):
        """Starts a command and stops it, with its workers, in a state that it is in for a moment.

        On a busy machine this process may look too late: then the command is started again.

        Args:
          args: Of the command.
          when: Tells of the running command whether it is in that state.
          undo: Removes what a command that got beyond that state has made.

        Returns:
          The command. A signal ends it as it is; SIGCONT lets it continue.
        """
        for _ in range(10):
            running = self.start(*args)
            running.wait_until(lambda running=running: when(running))
            running.signal_group(signal.SIGSTOP)
            if running.process.poll() is None and when(running):
                return running
            running.close()
            undo()
        raise AssertionError(f"the command was always over too soon:\n{running.err()}")

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


class InlineCommandLine:
    """The same commands in this process, one worker after the other: a start costs seconds.

    Attributes:
      env: Variables of the environment that the next commands see; they start as `CommandLine`'s.
    """

    def __init__(self, home):
        self.env = CommandLine(home).env

    def run(self, *args):
        out, err = io.StringIO(), io.StringIO()
        handler = signal.getsignal(signal.SIGTERM)
        with (
            mock.patch.dict(os.environ, self.env, clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            inline.jobs(),
        ):
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as ended:
                code = ended.code
            finally:
                signal.signal(signal.SIGTERM, handler)
        if code == INTERRUPTED:  # Ctrl-C or SIGTERM is for the suite, which would else go on
            raise KeyboardInterrupt(err.getvalue())
        return Finished(code=code, out=out.getvalue(), err=err.getvalue())

    def good(self, *args):
        """Runs a command that must succeed."""
        finished = self.run(*args)
        assert finished.code == 0, finished.err + finished.out
        return finished


@pytest.fixture(scope="session")
def inline_cli(tmp_path_factory):
    return InlineCommandLine(tmp_path_factory.mktemp("home"))


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
        digest = hashlib.sha256(payload).hexdigest()
        share = hash_text(f"{PixMoCap.split_salt}\0{digest}") / 2**64
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
def tiny_dataset(inline_cli, build_once):
    """The folder of a small finished dataset: 24 generated rows in 3 shards, split "train".

    It is read-only: `tiny_copy` may be changed.
    """

    def build(folder):
        inline_cli.good(
            *("shards", "pixmo_cap", "--source", "sample", "--limit", 24, "--num-shards", 3),
            *("--out", folder / "out", "--cache", folder / "cache", "--workers", 2),
        )

    return build_once("tiny", build) / "out"


@pytest.fixture(scope="session")
def movable_dataset(inline_cli, build_once):
    """The folder of a small finished dataset whose points can be moved: 6 rows of pixmo_points."""

    def build(folder):
        from tests.digits import write_digit_tokenizer

        inline_cli.good(
            *("shards", "pixmo_points", "--source", "sample", "--limit", 6, "--codec", "raw"),
            *("--tokenizer", write_digit_tokenizer(folder / "digits"), "--movable"),
            *("--out", folder / "out", "--cache", folder / "cache", "--workers", 1),
        )

    return build_once("movable", build) / "out"


@pytest.fixture
def tiny_copy(tiny_dataset, tmp_path):
    """A copy of the tiny dataset in `tmp_path / "out"`, to be changed."""
    for path in (tiny_dataset, *sorted(tiny_dataset.rglob("*"))):
        copy = tmp_path / "out" / path.relative_to(tiny_dataset)
        copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
    return tmp_path / "out"


def _tiny_sample(i, *, num_images=1, num_branches=1, num_variants=2, size=(28, 28)):
    """Makes a sample of random pixels and ids 10 to 99; the same number gives the same sample."""
    from shardspec.sample import WEIGHT_ONE, Geometry, PreparedImage, PreparedSample, spans_table

    rng = np.random.RandomState(i)
    tokens = []

    def run(length):
        start = len(tokens)
        tokens.extend(rng.randint(10, 100, length).tolist())
        return start, len(tokens)

    rows = []
    for branch in range(num_branches):
        response = run(rng.randint(2, 9))
        for _ in range(num_variants):
            rows.append((branch, 0, *run(rng.randint(1, 5)), *response, WEIGHT_ONE))
    images = tuple(
        PreparedImage(
            pixels=rng.randint(0, 256, (size[1], size[0], 3), np.uint8),
            source_width=size[0],
            source_height=size[1],
            geometry=Geometry.ALL,
        )
        for _ in range(num_images)
    )
    return PreparedSample(
        key=f"sample-{i:04d}",
        tokens=np.array(tokens, dtype="<i4"),
        spans=spans_table(rows, images),
        images=images,
        record={"key": f"sample-{i:04d}", "metadata": {"number": i}},
    )


@pytest.fixture(scope="session")
def tiny_sample():
    """A function from a number to a prepared sample, another for each number."""
    return _tiny_sample


def _write_dataset(
    folder, samples, *, num_shards=1, codec="raw", several=False, name="tiny", view=None, groups=()
):
    from shardspec.index import encode_index, index_dtype, index_row, with_groups
    from shardspec.manifest import Manifest, ShardEntry, SplitEntry, TokenizerEntry
    from shardspec.media import encode_stored
    from shardspec.sample import sample_members
    from shardspec.tar import TarWriter
    from shardspec.tiling import ImageView

    view = view or ImageView(size_px=28, patch_px=14, pool=(1, 1))
    (folder / "train").mkdir(parents=True)
    entries = []
    for shard in range(num_shards):
        borders = [len(samples) * k // num_shards for k in (shard, shard + 1)]
        url = f"train/{name}-train-{shard:05d}-of-{num_shards:05d}.tar"
        rows = [np.zeros(0, dtype=index_dtype(1))]
        with (folder / url).open("wb") as stream:
            writer = TarWriter(stream)
            for sample in samples[slice(*borders)]:
                encoded = [encode_stored(image.pixels, codec=codec) for image in sample.images]
                members = sample_members(sample, encoded, codec=codec, several=several)
                place = writer.write_sample(members)
                sizes = [len(payload) for payload in encoded]
                json_bytes = len(members[0][1])
                rows.append(
                    index_row(
                        sample,
                        place=place,
                        json_bytes=json_bytes,
                        image_sizes=sizes,
                        views=(view,),
                    )
                )
            sha256 = writer.finish()
        table = np.concatenate(rows)
        index = encode_index(with_groups(table, groups[slice(*borders)]) if groups else table)
        entry = ShardEntry(
            url=url,
            split="train",
            nsamples=len(table),
            num_bytes=writer.num_bytes,
            sha256=sha256,
            index_bytes=len(index),
            index_sha256=hashlib.sha256(index).hexdigest(),
            num_images=int(table["num_images"].sum()),
            num_tokens=int(table["num_tokens"].sum()),
            num_loss_tokens=int(table["num_loss_tokens"].sum()),
        )
        (folder / entry.index_url).write_bytes(index)
        entries.append(entry)
    totals = ("num_images", "num_tokens", "num_loss_tokens", "num_bytes")
    symbols = (
        "<im_start>",
        "<im_end>",
        "<im_patch>",
        "<im_col>",
        "<low_res_im_start>",
        "<|image|>",
    )
    special_ids = {"bos": 1, "eos": 2, "pad": 0, **{s: 128 + i for i, s in enumerate(symbols)}}
    manifest = Manifest(
        dataset=name,
        recipe={
            "image": {
                "codec": codec,
                "views": [view.to_dict()],
                "headroom": 1.0,
                "max_side_px": None,
            }
        },
        tokenizer=TokenizerEntry(
            name="numbers",
            sha256="",
            probe_sha256="",
            vocab_size=100,
            embedding_size=134,
            special_ids=special_ids,
            special_tokens={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
        ),
        libraries={},
        splits={
            "train": SplitEntry(
                build_key="-".join(entry.sha256[:8] for entry in entries[:4]),
                source={"kind": "synthetic"},
                num_samples=len(samples),
                quarantined={},
                **{t: sum(getattr(entry, t) for entry in entries) for t in totals},
            )
        },
        shards=tuple(entries),
    )
    (folder / "manifest.json").write_bytes(manifest.encode())
    return str(folder)


@pytest.fixture(scope="session")
def write_dataset():
    """A function that writes prepared samples as a dataset and returns its URL.

    Its view is a crop of 28 px with 4 image tokens, unless another is given.
    """
    return _write_dataset
