"""Disks that lack something, or remember what is no more: refused before work, or as good."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from shardspec import storage
from shardspec.errors import StorageError
from shardspec.storage import disks
from tests.odd_disks import LACKS, lack, remember

WRITABLE = [
    kind for kind in LACKS if kind not in ("mountpoint", "read_only", "over_quota", "broken")
]


UNFIT = {"links": "hard links", "rename": "renaming", "rewrite": "change a file"}


def refusal(folder, **needs):
    try:
        storage.prove_folder(str(folder), **needs)
    except StorageError as error:
        lacks = [variant for variant, text in UNFIT.items() if text in error.what]
        return ".".join([error.reason, *lacks])
    return ""


@pytest.mark.parametrize(
    ("kind", "alone", "machines", "rewrites"),
    [
        ("nfs", "", "", ""),
        ("nfs_without_locks", "", "", ""),
        ("lustre_without_locks", "", "", ""),
        ("no_links", "", "disk_unfit.links", ""),
        ("gcsfuse", "", "disk_unfit.links", ""),
        ("goofys", "", "disk_unfit.links", "disk_unfit.rewrite"),
        ("mountpoint", *["disk_unfit.rename"] * 2, "disk_unfit.rewrite"),
        ("read_only", *["permission"] * 3),
    ],
)
def test_a_disk_is_refused_for_what_a_job_needs_of_it(
    kind, alone, machines, rewrites, tmp_path, monkeypatch
):
    lack(monkeypatch, kind)
    assert refusal(tmp_path) == alone
    assert refusal(tmp_path, machines=True) == machines
    assert refusal(tmp_path, rewrites=True) == rewrites
    assert [*tmp_path.iterdir()] == []


def test_a_disk_that_gives_a_name_twice_or_keeps_the_old_one_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda source, target: None)
        assert refusal(tmp_path, machines=True) == "disk_unfit.links"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", shutil.copyfile)
        assert refusal(tmp_path) == "disk_unfit.rename"


@pytest.mark.parametrize("kind", WRITABLE)
def test_one_version_is_replaced_once_and_a_name_given_once(kind, tmp_path, monkeypatch):
    lack(monkeypatch, kind)
    url = str(tmp_path / "out" / "lease")
    assert storage.compare_and_swap(f"{url}s", b"1", replacing=None)
    assert storage.compare_and_swap(url, b"1", replacing=None)
    assert storage.compare_and_swap(url, b"1", replacing=None), "written already"
    assert not storage.compare_and_swap(url, b"2", replacing=None)
    first = storage.version(url)
    assert storage.compare_and_swap(url, b"2", replacing=first)
    assert not storage.compare_and_swap(url, b"3", replacing=first)
    storage.publish_bytes(url, b"4")
    assert storage.read_bytes(url) == b"4"
    storage.delete_temporaries(str(tmp_path))
    assert sorted(os.listdir(tmp_path / "out")) == ["lease", "leases"]


@pytest.mark.parametrize("kind", ["over_quota", "broken"])
def test_what_cannot_be_written_leaves_the_old_state(kind, tmp_path, monkeypatch):
    url = str(tmp_path / "lease")
    storage.publish_bytes(url, b"old")
    version = storage.version(url)
    lack(monkeypatch, kind)
    reason = {"over_quota": "no_space", "broken": "storage_failed"}[kind]
    for write in (
        lambda: storage.publish_bytes(url, b"new"),
        lambda: storage.compare_and_swap(url, b"new", replacing=version),
        lambda: storage.compare_and_swap(url, b"new", replacing=None),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.reason == reason
    assert (os.listdir(tmp_path), storage.read_bytes(url)) == (["lease"], b"old")


def test_without_locks_the_last_of_two_writers_has_won(tmp_path, monkeypatch):
    lack(monkeypatch, "nfs_without_locks")
    url = str(tmp_path / "lease")
    storage.publish_bytes(url, b"0")
    version, really = storage.version(url), disks.sync_folder

    def other_writes(folder):
        monkeypatch.setattr(disks, "sync_folder", really)
        storage.publish_bytes(url, b"other's")

    monkeypatch.setattr(disks, "sync_folder", other_writes)
    assert not storage.compare_and_swap(url, b"ours", replacing=version)


def test_the_holder_of_a_folder_can_make_files_in_it_without_links(tmp_path, monkeypatch):
    lack(monkeypatch, "gcsfuse")
    with storage.exclusive(str(tmp_path)):
        assert storage.compare_and_swap(str(tmp_path / "lease"), b"1", replacing=None)


def test_a_version_tells_contents_apart_where_length_time_and_number_are_equal(tmp_path):
    path = tmp_path / "lease"
    versions = set()
    for content in (b"1", b"2"):
        path.write_bytes(content)
        os.utime(path, (1, 1))
        versions.add(storage.version(str(path)))
    assert len(versions) == 2


READS = {
    "read_bytes": lambda url: storage.read_bytes(url) == b"1",
    "version": storage.version,
    "size": lambda url: storage.size(url) == 1,
    "exists": storage.exists,
    "list_names": lambda url: storage.list_names(os.path.dirname(url)),
    "list_objects": lambda url: storage.list_objects(os.path.dirname(url)),
    "replace": lambda url: storage.compare_and_swap(url, b"1", replacing=storage.version(url)),
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("times", [1, 1000])
def test_a_file_that_another_machine_replaces_is_opened_again(name, times, tmp_path, monkeypatch):
    url = str(tmp_path / "lease")
    storage.publish_bytes(url, b"1")
    left = [times]

    def stale(really):
        def call(*arguments, **more):
            if left[0] and str(tmp_path) in str(arguments[:1]):
                left[0] -= 1
                raise OSError(errno.ESTALE, "stale file handle")
            return really(*arguments, **more)

        return call

    monkeypatch.setattr("io.open", stale(open))
    for function in ("open", "stat", "listdir", "scandir"):
        monkeypatch.setattr(os, function, stale(getattr(os, function)))
    if times < 1000:
        assert READS[name](url)
    else:
        with pytest.raises(StorageError) as caught:
            READS[name](url)
        assert caught.value.reason == "storage_failed"


ABSENT = {
    "exists": lambda folder, fresh: storage.exists(f"{folder}/a", fresh=fresh),
    "list_names": lambda folder, fresh: storage.list_names(folder, fresh=fresh) == ["a"],
    "list_objects": lambda folder, fresh: len(storage.list_objects(folder, fresh=fresh)) == 1,
}


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("made", [True, False])
def test_what_a_client_remembers_as_missing_is_found_when_asked_for(
    name, made, tmp_path, monkeypatch
):
    folder = tmp_path / "receipts"
    if made:
        folder.mkdir()
    remember(monkeypatch)
    assert not ABSENT[name](str(folder), True)
    if not made:
        os.mkdir(folder)
    (folder / "a").write_bytes(b"1")  # by another machine
    if made or name == "exists":
        assert not ABSENT[name](str(folder), False)
    assert ABSENT[name](str(folder), True)


def test_a_folder_that_cannot_be_written_to_is_listed_as_it_is_remembered(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    monkeypatch.setattr(disks, "is_own", lambda path: False)

    def refuse(*_):
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    assert storage.list_names(str(tmp_path), fresh=True) == ["a"]


def test_a_folder_is_made_while_others_remove_the_one_above(tmp_path, monkeypatch):
    really, left = os.mkdir, [3]

    def mkdir(path, *arguments):
        if Path(path).name == "part" and left[0]:
            left[0] -= 1
            shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
        really(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    storage.make_folder(tmp_path / "scratch" / "part")
    assert (tmp_path / "scratch" / "part").is_dir()


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("times", [2, 1000])
def test_a_folder_in_which_others_still_write_is_removed_or_the_error_told(
    number, times, tmp_path, monkeypatch
):
    folder = tmp_path / "parts"
    storage.publish_bytes(str(folder / "lease"), b"1")
    really, left = os.rmdir, [times]

    def rmdir(path, **more):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        really(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    if times == 2:
        storage.delete(str(folder))
    else:
        with pytest.raises((StorageError, FileNotFoundError)):
            storage.delete(str(folder))
    assert folder.exists() == (times != 2)


def test_a_name_that_is_taken_and_free_again_was_not_given(tmp_path, monkeypatch):
    def taken(source, target):
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", taken)
    assert not storage.compare_and_swap(str(tmp_path / "lease"), b"1", replacing=None)


def test_files_that_vanish_are_not_listed_and_a_disk_that_fails_is_not_empty(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch:
        really = Path.stat

        def stat(path, **more):
            if path.name == "a":
                raise FileNotFoundError(errno.ENOENT, "gone")
            return really(path, **more)

        patch.setattr(Path, "stat", stat)
        assert [each.name for each in storage.list_objects(str(tmp_path))] == ["b"]

    def broken(folder):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(StorageError) as caught:
        storage.list_objects(str(tmp_path))
    assert caught.value.reason == "storage_failed"


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    url = str(tmp_path / "lease")
    storage.publish_bytes(url, b"0")

    def flock(descriptor, operation):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError):
        storage.compare_and_swap(url, b"1", replacing=storage.version(url))
    assert os.listdir(tmp_path) == ["lease"]


SMALL_WRITES = {
    "prove_folder": lambda url: storage.prove_folder(
        os.path.dirname(url), machines=True, rewrites=True
    ),
    "publish_bytes": lambda url: storage.publish_bytes(url, b"new"),
    "compare_and_swap": lambda url: storage.compare_and_swap(
        url, b"new", replacing=storage.version(url)
    ),
}


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("name", SMALL_WRITES)
def test_small_files_may_be_removed_unfinished_by_a_job_that_ends(name, old, tmp_path, monkeypatch):
    url, seen = str(tmp_path / "file"), []

    def tidied(function, at):
        def call(*args):
            seen.append(function.__name__)
            if len(seen) == at:
                storage.delete_temporaries(str(tmp_path))
            return function(*args)

        return call

    for at in range(1, 20):
        seen.clear()
        (tmp_path / "file").unlink(missing_ok=True)
        if old is not None:
            (tmp_path / "file").write_bytes(old)
        with monkeypatch.context() as patched:
            for module, function in ((os, "replace"), (os, "link"), (disks, "sync_folder")):
                patched.setattr(module, function, tidied(getattr(module, function), at))
            assert SMALL_WRITES[name](url) in (None, True)
        if name == "prove_folder":
            assert os.listdir(tmp_path) == ["file"] * (old is not None)
        else:
            assert (tmp_path / "file").read_bytes() == b"new"
            assert os.listdir(tmp_path) == ["file"]
        if len(seen) < at:
            break
    assert at > 2, "the removal came at every moment"


def test_a_write_into_a_folder_that_is_removed_does_not_make_it_again(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()

    def write_synced(path, payload):
        shutil.rmtree(folder)
        path.write_bytes(payload)

    monkeypatch.setattr(disks, "write_synced", write_synced)
    with pytest.raises(FileNotFoundError):
        storage.publish_bytes(str(folder / "file"), b"new")
    assert not folder.exists()


def test_unfinished_files_are_known_by_their_names(tmp_path):
    left = [f".a.tmp-{0:032x}", f"..lease.tmp-{1:032x}", f".two\nlines.tmp-{2:032x}"]
    kept = ["a", f"a.tmp-{0:032x}", f".a.tmp-{0:031x}", f".a.tmp-{0:032x}.tar", ".tmp"]
    for name in (*left, *kept):
        assert storage.is_temporary(name) == (name in left)
        for folder in (tmp_path, tmp_path / "deep" / "down"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    assert storage.has_temporaries(str(tmp_path))
    storage.delete_temporaries(str(tmp_path))
    assert not storage.has_temporaries(str(tmp_path))
    assert not storage.has_temporaries(str(tmp_path / "missing"))
    assert not storage.has_temporaries("memory://bucket/out")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "deep"])
    assert sorted(os.listdir(tmp_path / "deep" / "down")) == sorted(kept)


def test_links_that_lead_nowhere_are_no_files(tmp_path):
    """One to itself, to what is missing, and to what a file would have to be a folder for."""
    (tmp_path / "real").write_bytes(b"1")
    for name, target in (("loop", "loop"), ("lost", "gone"), ("through", "real/below")):
        (tmp_path / name).symlink_to(target)
    assert [each.name for each in storage.list_objects(str(tmp_path))] == ["real"]
