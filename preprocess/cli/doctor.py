"""The verb doctor: whether this machine has what building and training need.

Each check looks at one thing and says what it saw and, where that is too little, what to do. None
changes anything but with `--write`, which publishes a small object and deletes it again.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Literal

from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.verbs import Console, Verb
from preprocess.settings import Setting
from preprocess.sizes import size_text
from shardspec import storage
from shardspec.errors import ShardsError, redacted
from shardspec.manifest import require_manifest
from shardspec.messages import counted

PACKAGES = {
    "torch": "",
    "numpy": "",
    "pillow": "",
    "transformers": "",
    "tokenizers": "",
    "webdataset": "",
    "fsspec": "",
    "s3fs": "",
    "gcsfs": "",
    "datasets": "hub",
    "pyarrow": "hub",
    "simplejpeg": "fast",
    "isal": "fast",
    "av": "video",
    "pypdfium2": "documents",
    "vl-convert-python": "",
}
"""Packages, and the extra that brings each."""

_ROOMS = ("preprocess", "loader", "shardspec", "vlm_shards")

_MIN_SHM_BYTES = 1 << 30
"""Of shared memory: worker processes hand batches over through it; containers often have 64 MiB."""

_MIN_FILES = 4096
"""Open files: a loader keeps one per shard and one per connection."""

Grade = Literal["ok", "note", "FAULT"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw."""

    grade: Grade
    name: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Formats the finding."""
        remedy = f"\n       {'':<14}  fix: {self.remedy}" if self.remedy else ""
        return f"{self.grade:<6} {self.name:<14}  {self.text}{remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """What to look at."""

    url: Annotated[
        str,
        Setting("dataset or folder that is to be reached, local or of a store", positional=True),
    ] = ""
    write: Annotated[bool, Setting("also write a small object there, and delete it")] = False


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """Runs all checks, one after the other."""
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.platform()}")
    for check in (packages, rooms, accelerator, processor, shared_memory, open_files):
        yield from check()
    if settings.url:
        yield from store(settings.url, write=settings.write)


def packages(version: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """Lists the installed packages, and the extras that are missing."""
    found, missing = [], {}
    for name, extra in PACKAGES.items():
        try:
            found.append(f"{name} {version(name)}")
        except metadata.PackageNotFoundError:
            missing[name] = extra
    yield Finding("ok", "packages", ", ".join(found))
    for name, extra in missing.items():
        if extra:
            remedy = f"pip install 'vlm-shards[{extra}]', if you need it"
            yield Finding("note", "packages", f"{name} is not installed", remedy)
        else:
            yield Finding("FAULT", "packages", f"{name} is not installed", f"pip install {name}")


def rooms(
    find: Callable[[str], str | None] | None = None, home: Path | None = None
) -> Iterator[Finding]:
    """Tells which of our packages Python finds: names as common as `loader` may be another's."""
    find = find or _origin
    home = home or Path(__file__).resolve().parents[2]
    for name in _ROOMS:
        origin = find(name)
        if origin is not None and Path(origin).resolve().parents[1] == home:
            continue
        seen = f"{name} is {origin}" if origin else f"{name} is not found"
        yield Finding(
            "FAULT", "imports", f"{seen}, not the one in {home}",
            "rename or remove that one, or put ours first in PYTHONPATH",
        )  # fmt: skip
        return
    yield Finding("ok", "imports", f"{', '.join(_ROOMS)} from {home}")


def _origin(name: str) -> str | None:
    # What a script in this folder, or `python -m`, would find first.
    spec = PathFinder.find_spec(name, [str(Path.cwd())])
    if spec is None or spec.origin is None:
        spec = importlib.util.find_spec(name)
    return None if spec is None else spec.origin


def accelerator() -> Iterator[Finding]:
    """Tells which accelerators torch sees."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "install a build of torch for this machine"
        yield Finding("FAULT", "accelerator", f"torch cannot be imported: {error}", remedy)
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        yield Finding("ok", "accelerator", f"{count} x {', '.join(sorted(names))}")
    else:
        built = torch.version.cuda
        text = "torch sees none" + (f", though it is built for CUDA {built}" if built else "")
        yield Finding("note", "accelerator", f"{text}; building needs none")


def processor() -> Iterator[Finding]:
    """Tells how many cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota(Path("/sys/fs/cgroup/cpu.max"))
    if quota is not None and quota < (allowed or 1):
        cores = counted(allowed or 1, "core")
        yield Finding(
            "note", "processor", f"{cores}, of which a limit gives {quota:g} at a time",
            f"use no more workers or threads than {max(1, int(quota))}",
        )  # fmt: skip
    else:
        yield Finding("ok", "processor", counted(allowed or 1, "core"))


def _cpu_quota(path: Path) -> float | None:
    """Reads how many cores a container may use; None for any number."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Tells whether worker processes can hand batches over."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # not Linux: there is none to run out of
    if free < _MIN_SHM_BYTES:
        yield Finding(
            "note", "shared memory", f"{size_text(free)} free in {folder}",
            "start the container with --shm-size=8g (or --ipc=host), or use threads, not workers=",
        )  # fmt: skip
    else:
        yield Finding("ok", "shared memory", f"{size_text(free)} free in {folder}")


def open_files() -> Iterator[Finding]:
    """Tells how many files a process may open."""
    try:
        import resource
    except ImportError:
        return  # not Unix
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _MIN_FILES:
        remedy = f"ulimit -n {_MIN_FILES if hard < 0 else min(hard, 1 << 16)}"
        yield Finding("note", "open files", f"at most {soft:,}", remedy)
    else:
        yield Finding("ok", "open files", "any number" if soft < 0 else f"at most {soft:,}")


def store(url: str, *, write: bool) -> Iterator[Finding]:
    """Reads, and with `write` writes, where a dataset is or is to be."""
    shown = redacted(url)
    try:
        names = storage.list_names(url)
        if storage.exists(storage.join(url, "manifest.json")):
            manifest = require_manifest(url)
            counts = ", ".join(f"{s.num_samples:,} {name}" for name, s in manifest.splits.items())
            yield Finding("ok", "store", f"{shown}: {manifest.dataset}, samples: {counts}")
        else:
            yield Finding("ok", "store", f"{shown}: {counted(len(names), 'name')}, no dataset yet")
        if write:
            name = storage.join(url, f".doctor-{os.getpid()}")
            storage.publish_bytes(name, b"doctor")
            same = storage.read_bytes(name) == b"doctor"
            storage.delete(name)
            grade: Grade = "ok" if same else "FAULT"
            yield Finding(grade, "store", f"{shown}: wrote, read and deleted an object")
    except (ShardsError, OSError) as error:
        yield Finding("FAULT", "store", f"{shown}: {error}")


def _run(options: argparse.Namespace, console: Console) -> int:
    faults = 0
    for finding in examine(read_settings(DoctorSettings, options)):
        faults += finding.grade == "FAULT"
        console.show(finding.line())
    return 1 if faults else 0


VERBS = (
    Verb(
        name="doctor",
        help="check this machine: packages, GPU, shared memory, open files, access to a store",
        add=lambda parser: add_settings(parser, DoctorSettings),
        run=_run,
    ),
)
