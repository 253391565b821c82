"""Packs of blobs: torn at every byte, flipped in every bit, several writers, and the index."""

import errno
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.fetch import pack_index, packs
from preprocess.fetch.blobs import BlobCache
from preprocess.fetch.pack_index import LEDGER_ROW, PackIndex
from shardspec import storage
from shardspec.errors import StorageError
from tests.odd_disks import lack
from tests.preprocess.fetch.damage import blobs_of, damage_blob

CONTENTS = [bytes([i]) * (20 + i) for i in range(4)]
NAMES = [hashlib.sha256(content).hexdigest() for content in CONTENTS]


def fill(root, contents=CONTENTS, **settings):
    """Puts contents into a cache and publishes them."""
    cache = BlobCache(root, **settings)
    with cache.writing():
        return [cache.put(content) for content in contents]


def die_writing(cache, contents):
    """Puts contents into a cache, and ends before they are published."""
    with suppress(KeyboardInterrupt), cache.writing():
        for content in contents:
            cache.put(content)
        raise KeyboardInterrupt


def leave_open(root, contents=CONTENTS):
    """Puts contents into a cache as a process does that dies then; returns pack and ledger."""
    die_writing(BlobCache(root), contents)
    (ledger,) = (root / "open").rglob("*.ledger")
    return ledger.with_suffix(".pack"), ledger


def found(root, names=NAMES):
    """Says what a process that begins now gets for each content: itself, or the reason."""
    cache, got = BlobCache(root), []
    for name in names:
        try:
            got.append(cache.get(name))
        except StorageError as error:
            got.append(error.reason)
            assert not cache.has(name)
            assert not BlobCache(root).has(name)
    return got


def files(root):
    return sorted(path.relative_to(root).parts[0] for path in root.rglob("*") if path.is_file())


def test_blobs_come_back_in_any_process_once_they_are_published(tmp_path):
    writer, other = BlobCache(tmp_path), BlobCache(tmp_path)
    with writer.writing():
        assert [writer.put(content) for content in CONTENTS] == NAMES
        assert [writer.get(name) for name in NAMES] == CONTENTS
        assert not other.has(NAMES[0])
    assert [other.get(name) for name in NAMES] == CONTENTS
    assert other.has(NAMES[0], num_bytes=20)
    assert not other.has(NAMES[0], num_bytes=21)
    assert [pickle.loads(pickle.dumps(writer)).get(name) for name in NAMES] == CONTENTS
    assert files(tmp_path) == ["index", "index", "packs", "packs"]


def test_an_equal_content_is_stored_once(tmp_path):
    fill(tmp_path, [b"abc", b"abc"])
    fill(tmp_path, [b"abc"])
    (blob,) = blobs_of(tmp_path).values()
    assert blob.path.read_bytes() == b"abc"


def test_a_full_pack_is_published_and_small_blobs_fill_one_too(tmp_path):
    fill(tmp_path / "size", [os.urandom(5000) for _ in range(9)], pack_bytes=15_000)
    assert len({*blobs_of(tmp_path / "size").values()}) == 9
    assert len([*(tmp_path / "size" / "packs").glob("*.pack")]) == 3
    fill(tmp_path / "number", pack_bytes=2 * packs.LEAST_BYTES)
    assert len([*(tmp_path / "number" / "packs").glob("*.pack")]) == 2


def test_a_missing_blob_is_a_named_error(tmp_path):
    assert found(tmp_path, ["0" * 64]) == ["blob_missing"]
    assert files(tmp_path) == []
    with pytest.raises(StorageError) as caught:
        BlobCache(tmp_path).get("0" * 64)
    assert caught.value.where == f"{tmp_path} (sha256 {'0' * 64})"


@pytest.mark.parametrize("torn", ["pack", "ledger"])
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_what_a_dead_writer_has_left_is_cut_at_any_byte(torn, step, tmp_path, caplog):
    pack, ledger = leave_open(tmp_path / "made")
    whole = {"pack": pack.read_bytes(), "ledger": ledger.read_bytes()}
    last = {"pack": len(CONTENTS[-1]), "ledger": LEDGER_ROW.itemsize}[torn]
    for cut in {*range(0, last, step), last}:
        root = tmp_path / str(cut)
        (root / "open").mkdir(parents=True)
        for kind, content in whole.items():
            kept = len(content) - (cut if kind == torn else 0)
            (root / "open" / f"{pack.stem}.{kind}").write_bytes(content[:kept])
        caplog.clear()
        lost = cut > 0
        assert found(root) == [*CONTENTS[:3], "blob_missing" if lost else CONTENTS[3]]
        # A ledger that ends between two rows does not show that there was another.
        shows = lost and not (torn == "ledger" and cut == last)
        assert ("3 of 4 contents are whole" in caplog.text) == shows
        assert files(root) == ["index", "index", "packs", "packs"]


def test_a_dead_writer_without_a_whole_blob_leaves_nothing(tmp_path):
    pack, _ = leave_open(tmp_path)
    pack.write_bytes(b"")
    assert found(tmp_path) == ["blob_missing"] * 4
    assert files(tmp_path) == []


def test_a_writer_that_dies_between_its_pack_and_its_ledger_loses_nothing(tmp_path):
    pack, _ = leave_open(tmp_path)
    storage.publish_file(str(tmp_path / "packs" / pack.name), pack)
    assert found(tmp_path) == CONTENTS
    assert files(tmp_path) == ["index", "index", "packs", "packs"]


@pytest.mark.parametrize("kind", ["pack", "ledger"])
@pytest.mark.parametrize("step", [pytest.param(7, marks=pytest.mark.slow), 149])
def test_any_flipped_bit_costs_at_most_a_blob(kind, step, tmp_path):
    fill(tmp_path / "made")
    (path,) = (tmp_path / "made" / "packs").glob(f"*.{kind}")
    other = path.with_suffix(".ledger" if kind == "pack" else ".pack")
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, step):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        root = tmp_path / str(bit)
        (root / "packs").mkdir(parents=True)
        (root / "packs" / path.name).write_bytes(flipped)
        (root / "packs" / other.name).hardlink_to(other)
        got = found(root)
        wrong = [
            name for name, have, want in zip(NAMES, got, CONTENTS, strict=True) if have != want
        ]
        assert len(wrong) == 1
        assert {*got} - {*CONTENTS} <= {"blob_corrupt", "blob_missing"}
        fill(root)  # FETCH, again
        assert found(root) == CONTENTS


def test_put_replaces_a_damaged_copy(tmp_path):
    fill(tmp_path)
    damage_blob(tmp_path, NAMES[1], "flip")
    fill(tmp_path)
    assert found(tmp_path) == CONTENTS


def test_writers_at_once_share_nothing(tmp_path):
    first, second = BlobCache(tmp_path), BlobCache(tmp_path)
    with first.writing(), second.writing():
        for i, content in enumerate(CONTENTS):
            (first, second)[i % 2].put(content)
            second.put(b"of both")
        first.put(b"of both")
        # A live writer's pack is left to it.
        assert found(tmp_path) == ["blob_missing"] * 4
    assert found(tmp_path) == CONTENTS
    assert found(tmp_path, [hashlib.sha256(b"of both").hexdigest()]) == [b"of both"]
    assert files(tmp_path).count("packs") == 4


def test_without_locks_the_packs_of_others_are_left_alone(tmp_path, monkeypatch):
    leave_open(tmp_path)
    monkeypatch.setattr(packs, "lock_file", lambda _: "no_locks")
    assert found(tmp_path) == ["blob_missing"] * 4
    monkeypatch.undo()
    assert found(tmp_path) == CONTENTS


def test_the_pack_of_a_dead_writer_on_a_disk_that_is_read_only_is_left_alone(tmp_path, monkeypatch):
    fill(tmp_path, CONTENTS[:2])
    leave_open(tmp_path, CONTENTS[2:])
    really_open = os.open

    def refuse(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "read-only file system")
        return really_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    assert found(tmp_path) == [*CONTENTS[:2], "blob_missing", "blob_missing"]


def test_a_disk_that_refuses_at_close_loses_what_is_not_published_alone(tmp_path, monkeypatch):
    really_close = os.close

    def refuse(descriptor):
        really_close(descriptor)
        raise OSError(errno.ENOSPC, "no space left on device")

    fill(tmp_path, CONTENTS[:2])
    cache = BlobCache(tmp_path)
    with suppress(KeyboardInterrupt), cache.writing():
        cache.put(CONTENTS[2])
        monkeypatch.setattr(os, "close", refuse)
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert found(tmp_path)[:2] == CONTENTS[:2]


def test_a_disk_that_does_not_change_files_is_refused_before_the_first_is_fetched(
    tmp_path, monkeypatch
):
    lack(monkeypatch, "goofys")
    with pytest.raises(StorageError) as caught:
        fill(tmp_path)
    assert caught.value.reason == "disk_unfit"


def test_a_store_without_its_bucket_is_not_tried_for_ever(tmp_path, monkeypatch):
    def refuse(*_):
        raise FileNotFoundError("no such bucket")

    monkeypatch.setattr(packs, "_publish_file", refuse)
    with pytest.raises(FileNotFoundError):
        fill(tmp_path)


@pytest.mark.parametrize("age_s", [packs.DEAD_AFTER_S - 60, packs.DEAD_AFTER_S + 60])
def test_a_lock_that_other_machines_do_not_see_is_not_believed(age_s, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "is_own_disk", lambda _: False)
    monkeypatch.setattr(packs, "lock_file", lambda _: "held")
    writer = BlobCache(tmp_path)
    with writer.writing():
        for content in CONTENTS[:2]:
            writer.put(content)
        with monkeypatch.context() as other:
            other.setattr(packs, "_this_machine", lambda: "another")
            assert found(tmp_path) == ["blob_missing"] * 4
            (ledger,) = (tmp_path / "open").rglob("*.ledger")
            written_s = ledger.stat().st_mtime - age_s
            os.utime(ledger, (written_s, written_s))
            taken = age_s > packs.DEAD_AFTER_S
            assert (found(tmp_path)[:2] == CONTENTS[:2]) == taken
        for content in CONTENTS[2:]:
            writer.put(content)
    assert found(tmp_path) == CONTENTS
    assert [writer.get(name) for name in NAMES] == CONTENTS
    assert files(tmp_path).count("packs") == (4 if taken else 2)
    assert "open" not in files(tmp_path)


def test_what_is_put_survives_the_removal_of_the_cache(tmp_path):
    cache = BlobCache(tmp_path / "cache")
    with cache.writing():
        cache.put(CONTENTS[0])
        shutil.rmtree(tmp_path / "cache")
        cache.put(CONTENTS[1])
    assert found(tmp_path / "cache", NAMES[:2]) == CONTENTS[:2]


def test_a_full_disk_is_an_error_and_what_it_left_is_overwritten(tmp_path, monkeypatch):
    cache = BlobCache(tmp_path)
    pwrite, left = os.pwrite, [10]

    def write(descriptor, payload, start):
        if not left[0]:
            raise OSError(errno.ENOSPC, "full")
        took = min(left[0], len(payload))
        left[0] -= took
        return pwrite(descriptor, payload[:took], start)

    with cache.writing():
        cache.put(CONTENTS[0])
        for room in (10, len(CONTENTS[3]) + 30):  # in the pack, in the ledger
            left[0] = room
            monkeypatch.setattr(os, "pwrite", write)
            with pytest.raises(StorageError) as caught:
                cache.put(CONTENTS[3])
            assert caught.value.reason == "no_space"
            monkeypatch.undo()
        for content in CONTENTS:
            cache.put(content)
    assert found(tmp_path) == CONTENTS


def test_files_of_older_releases_are_read(tmp_path):
    for name, content in zip(NAMES, CONTENTS, strict=True):
        path = tmp_path / "blobs" / name[:2] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert found(tmp_path) == CONTENTS
    assert BlobCache(tmp_path).has(NAMES[0], num_bytes=20)
    path.write_bytes(b"rotten")
    assert found(tmp_path) == [*CONTENTS[:3], "blob_corrupt"]
    fill(tmp_path, CONTENTS[3:])
    assert found(tmp_path) == CONTENTS


# --- index ------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    num_hashes=st.integers(1, 500),
    range_rows=st.integers(20, 400),
)
def test_the_index_finds_what_a_dictionary_finds(sizes, num_hashes, range_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    rng = np.random.default_rng(num_hashes)
    # Few prefixes, so that rows of one are in several blocks.
    hashes = rng.integers(0, 4, (num_hashes, 32), np.uint8)
    want, indexes = {}, [PackIndex(folder), PackIndex(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_index, "_RANGE_ROWS", range_rows)
        for number, size in enumerate(sizes):
            chosen = hashes[rng.integers(0, num_hashes, size)]
            rows = np.zeros(size, LEDGER_ROW)
            rows["start"], rows["num_bytes"] = np.arange(size), number
            rows.view(np.uint8).reshape(size, LEDGER_ROW.itemsize)[:, :32] = chosen
            for i, each in enumerate(chosen):
                want.setdefault(each.tobytes(), set()).add((f"p{number}", i, number))
            indexes[number % 2].add({f"p{number}": rows})
    assert len([*folder.glob("*.segment")]) <= 6
    for index in (*indexes, PackIndex(folder)):
        index.load()
        assert index.packs == {f"p{number}" for number in range(len(sizes))}
        for each in hashes[:50]:
            assert {*index.find(each.tobytes())} == want.get(each.tobytes(), set())


@pytest.mark.parametrize("damage", ["gone", "torn", "garbage"])
def test_a_damaged_index_is_made_again(damage, tmp_path):
    fill(tmp_path)
    (segment,) = (tmp_path / "index").glob("*.segment")
    if damage == "gone":
        segment.unlink()
    else:
        content = segment.read_bytes()
        segment.write_bytes(content[:-1] if damage == "torn" else b"x" * len(content))
    assert found(tmp_path) == CONTENTS


def test_an_index_whose_files_another_machine_removes_is_opened_again(tmp_path, monkeypatch):
    fill(tmp_path, CONTENTS[:2])
    reader = BlobCache(tmp_path)
    assert reader.has(NAMES[0])
    (left,) = (tmp_path / "index").glob("*.segment")
    pread = os.pread

    def read(descriptor, *rest):
        if not os.fstat(descriptor).st_nlink:  # as network disks do
            raise OSError(errno.ESTALE, "stale file handle")
        return pread(descriptor, *rest)

    fill(tmp_path, CONTENTS[2:])
    assert not left.exists()
    monkeypatch.setattr(os, "pread", read)
    assert [reader.get(name) for name in NAMES] == CONTENTS
    # One that is removed while others are opened.
    opened = pack_index._Segment

    def open_late(path):
        monkeypatch.setattr(pack_index, "_Segment", opened)
        fill(tmp_path, [b"more"])
        return opened(path)

    monkeypatch.setattr(pack_index, "_Segment", open_late)
    monkeypatch.setattr(pack_index, "lock_file", lambda *_, **__: "held")
    assert found(tmp_path) == CONTENTS


def test_what_a_killed_merge_has_left_is_removed(tmp_path):
    fill(tmp_path)
    (tmp_path / "index" / "left.tmp").write_bytes(b"rows")
    fill(tmp_path, [b"more"])
    assert not [*(tmp_path / "index").glob("*.tmp")]


@pytest.mark.parametrize("what", ["lock", "segment"])
def test_a_cache_that_may_not_be_written_to_is_read(what, tmp_path, monkeypatch):
    fill(tmp_path)
    fill(tmp_path, [b"more"])
    shutil.rmtree(tmp_path / "index")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "of another user")

    place, name = (storage, "make_folder") if what == "lock" else (pack_index, "_write_segment")
    monkeypatch.setattr(place, name, refuse)
    assert found(tmp_path) == CONTENTS
    assert not BlobCache(tmp_path).has("0" * 64)
    monkeypatch.undo()
    cache = BlobCache(tmp_path)
    assert cache.has(NAMES[0])
    monkeypatch.setattr(pack_index, "_write_segment", refuse)
    fill(tmp_path, [b"third"])
    assert BlobCache(tmp_path).has(hashlib.sha256(b"third").hexdigest())
    assert found(tmp_path) == CONTENTS


def test_a_full_disk_loses_nothing_of_the_index(tmp_path, monkeypatch):
    fill(tmp_path)
    cache = BlobCache(tmp_path)
    assert cache.has(NAMES[0])

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(pack_index, "_write_segment", fail)
    with pytest.raises(StorageError) as caught, cache.writing():
        cache.put(b"more")
    assert caught.value.reason == "no_space"
    monkeypatch.undo()
    assert found(tmp_path) == CONTENTS
    assert cache.get(NAMES[0]) == CONTENTS[0]
    assert BlobCache(tmp_path).has(hashlib.sha256(b"more").hexdigest())


# --- killed processes, stores -----------------------------------------------------------------

PROGRAM = """
import hashlib, random, sys
from preprocess.fetch.blobs import BlobCache
root, seed = sys.argv[1:]
rng = random.Random(seed)
cache = BlobCache(root, pack_bytes=200_000)
with cache.writing():
    while True:
        print(cache.put(rng.randbytes(rng.randint(1, 9000))), flush=True)
"""


@pytest.mark.slow
def test_what_was_put_survives_any_number_of_killed_writers(tmp_path):
    names, rng = set(), random.Random(0)
    for turn in range(5):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path), f"{turn} {i}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            names.update(writer.stdout.readline().strip() for _ in range(rng.randint(1, 400)))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            names.update(line for line in writer.communicate()[0].split("\n") if len(line) == 64)
    cache = BlobCache(tmp_path)
    assert all(hashlib.sha256(cache.get(name)).hexdigest() == name for name in names)
    assert len(names) > 100
    assert not [*(tmp_path / "open").rglob("*.ledger")]


@pytest.mark.slow
def test_packs_in_a_store(tmp_path, s3_server, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    with s3_server.entered():
        root = f"{s3_server.bucket}/{tmp_path.name}/cache"
        fill(root, CONTENTS[:2])
        monkeypatch.setenv("HOME", str(tmp_path / "two"))  # another machine
        second = BlobCache(root)
        with second.writing():
            assert found(root) == [*CONTENTS[:2], "blob_missing", "blob_missing"]
            second.put(CONTENTS[2])
        assert len(storage.list_names(f"{root}/packs")) == 4
        die_writing(second, CONTENTS[3:])
        monkeypatch.setenv("HOME", str(tmp_path / "one"))
        assert found(root) == [*CONTENTS[:3], "blob_missing"]
        monkeypatch.setenv("HOME", str(tmp_path / "two"))
        assert found(root) == CONTENTS
        # Damage that one machine meets is known to all.
        (place,) = second._packs.find(NAMES[2])
        url = f"{root}/packs/{place.pack}.pack"
        storage.publish_bytes(url, b"?" * storage.size(url))
        assert found(root, NAMES[2:3]) == ["blob_corrupt"]
        monkeypatch.setenv("HOME", str(tmp_path / "one"))
        assert not BlobCache(root).has(NAMES[2])
        fill(root, CONTENTS[2:3])
        assert found(root) == CONTENTS
        # A store that lost a pack, too.
        storage.delete(url)
        assert found(root) == CONTENTS
