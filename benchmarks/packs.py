"""Many small blobs in packs: `python benchmarks/packs.py [BLOBS] [--bytes 200] [--folder DIR]`.

Prints inodes, bytes, times and memory of writing, opening and looking up, what a killed writer
costs, and the same for one file per blob as older releases wrote them. Each row is a process.
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import struct
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from preprocess.fetch import BlobCache
from shardspec import storage

NUM_LOOKUPS = 20_000
NUM_FILES = 2_000
NUM_LEFT = 100_000


def content(number, num_bytes):
    return struct.pack("<Q", number).ljust(num_bytes, b"\1")


def name(number, num_bytes):
    return sha256(content(number, num_bytes)).hexdigest()


def write(root, numbers, num_bytes):
    cache = BlobCache(root)
    with cache.writing():
        for number in numbers:
            cache.put(content(number, num_bytes))


def die_writing(root, numbers, num_bytes):
    cache = BlobCache(root)
    for number in numbers:
        cache.put(content(number, num_bytes))
    os.kill(os.getpid(), signal.SIGKILL)


def open_cache(root, num_blobs, num_bytes):
    assert BlobCache(root).has(name(num_blobs - 1, num_bytes))


def look_up(root, num_blobs, num_bytes):
    cache, draw = BlobCache(root), random.Random(0)
    cache.refresh()
    for kind, first in (("has, present", 0), ("has, absent", num_blobs), ("get", 0)):
        names = [name(first + draw.randrange(num_blobs), num_bytes) for _ in range(NUM_LOOKUPS)]
        times_s = []
        for each in names:
            began_s = time.perf_counter()
            if kind == "get":
                cache.get(each)
            else:
                assert cache.has(each) == (first == 0)
            times_s.append(time.perf_counter() - began_s)
        times_s.sort()
        median, most = statistics.median(times_s), times_s[len(times_s) * 99 // 100]
        print(f"  {kind:13} median {median * 1e6:6.1f} us, 99 % {most * 1e6:7.1f} us")


def write_files(root, num_bytes):
    for number in range(NUM_FILES):
        each = name(number, num_bytes)
        url = storage.join(str(root), "blobs", each[:2], each)
        storage.publish_bytes(url, content(number, num_bytes))


def measured(label, function, *args):
    """Runs a function in a process of its own; prints its times and the memory it took."""

    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began_s = time.monotonic()
        try:
            function(*args)
        finally:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            wall_s, cpu_s = time.monotonic() - began_s, usage.ru_utime + usage.ru_stime
            peak = (usage.ru_maxrss - before) / 2**10
            print(f"{label:34} {wall_s:8.2f} s, {cpu_s:8.2f} s CPU, peak +{peak:.0f} MiB")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


def print_files(root):
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = [path for path in folder.rglob("*") if path.is_file()]
        for suffix in sorted({path.suffix for path in files}):
            found = [path.stat() for path in files if path.suffix == suffix]
            num_bytes = sum(each.st_size for each in found)
            on_disk = sum(each.st_blocks * 512 for each in found)
            print(
                f"  {folder.name + '/*' + suffix:18} {len(found):8,} inodes, "
                f"{num_bytes / 2**20:9.1f} MiB, {on_disk / 2**20:9.1f} MiB on disk"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blobs", nargs="?", type=int, default=5_000_000)
    parser.add_argument("--bytes", type=int, default=200)
    parser.add_argument("--folder", default=None)
    chosen = parser.parse_args()
    num_blobs, num_bytes = chosen.blobs, chosen.bytes
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        root = Path(folder, "packs")
        print(f"{num_blobs:,} blobs of {num_bytes} bytes")
        measured("write", write, root, range(num_blobs), num_bytes)
        print_files(root)
        measured("open, first lookup", open_cache, root, num_blobs, num_bytes)
        measured("look up", look_up, root, num_blobs, num_bytes)
        shutil.rmtree(root / "index")
        measured("open without an index", open_cache, root, num_blobs, num_bytes)
        left = range(num_blobs, num_blobs + NUM_LEFT)
        measured(f"write {NUM_LEFT:,} more, killed", die_writing, root, left, num_bytes)
        (ledger,) = (root / "open").glob("*.ledger")
        os.truncate(ledger, ledger.stat().st_size - 7)
        torn = num_blobs + NUM_LEFT - 1
        measured("open, finish what is torn", open_cache, root, torn, num_bytes)
        cache = BlobCache(root)
        lost = [number for number in left if not cache.has(name(number, num_bytes))]
        print(f"  lost: {len(lost)} of {NUM_LEFT:,}")
        root = Path(folder, "files")
        measured(f"write {NUM_FILES:,} files", write_files, root, num_bytes)
        print_files(root)


if __name__ == "__main__":
    main()
