import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from shardspec import storage
from shardspec.errors import StorageError
from shardspec.storage import retries, upload

ROOT = Path(__file__).parents[3]
NOBODY = 65534


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path):
    """A place to write to, on every kind of storage that needs no server."""
    roots = {
        "path": str(tmp_path / "set"),
        "file": f"file://{tmp_path}/set",
        "memory": f"memory://{tmp_path.name}/set",
    }
    yield roots[request.param]
    storage.delete(roots[request.param])


@pytest.fixture
def unprivileged(tmp_path):
    """Gives up root's rights for the test, since root may write anywhere."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    os.chown(tmp_path, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield tmp_path
    finally:
        os.seteuid(0)


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class ShorteningFileSystem(MemoryFileSystem):
    """Stores one byte less than it was given, as a broken proxy might."""

    protocol = "shortening"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("shortening://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        super().pipe_file(path, value[:-1], **kwargs)


class BreakingFileSystem(ShorteningFileSystem):
    """Loses its connection in the middle of an upload."""

    protocol = "breaking"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("breaking://", "memory://"))

    def _open(self, path, *args, **kwargs):
        return BreakingFile(self, path)


class BreakingFile(MemoryFile):
    def write(self, payload):
        super().write(payload[: len(payload) // 2])
        raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")


@pytest.fixture
def faulty():
    fsspec.register_implementation("shortening", ShorteningFileSystem, clobber=True)
    fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def refusal(action, *arguments):
    with pytest.raises(StorageError) as raised:
        action(*arguments)
    return raised.value


def test_published_bytes_read_back(url):
    place = storage.join(url, "train", "a.bin")
    assert (storage.exists(place), storage.size(place)) == (False, None)
    storage.publish_bytes(place, b"first")
    assert (storage.exists(place), storage.size(place)) == (True, 5)
    storage.publish_bytes(place, b"second!")
    assert (storage.read_bytes(place), storage.size(place)) == (b"second!", 7)
    assert storage.list_names(storage.join(url, "train")) == ["a.bin"]


@pytest.mark.parametrize("single_put_bytes", [2**20, 1000])
def test_published_file_is_moved(url, tmp_path, monkeypatch, single_put_bytes):
    # With the small bound the file goes up in parts.
    monkeypatch.setattr(upload, "SINGLE_PUT_BYTES", single_put_bytes)
    source = tmp_path / "source"
    payload = bytes(range(256)) * 64
    for _ in range(2):
        source.write_bytes(payload)
        storage.publish_file(storage.join(url, "a.tar"), source)
        assert not source.exists()
        assert storage.read_bytes(storage.join(url, "a.tar")) == payload
    assert storage.list_names(url) == ["a.tar"]


def test_names_are_sorted_and_not_paths(url):
    for name in ("b.tar", "a.tar", "sub/c.tar"):
        storage.publish_bytes(storage.join(url, name), b"x")
    assert storage.list_names(url) == ["a.tar", "b.tar", "sub"]


def test_nothing_is_there_before_anything_is_written(url):
    assert storage.list_names(url) == []
    assert not storage.exists(url)
    assert storage.size(url) is None
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(url, "none"))


def test_delete_removes_objects_and_folders_and_forgives_absence(url):
    for name in ("keep.tar", "gone.tar", "sub/c.tar"):
        storage.publish_bytes(storage.join(url, name), b"x")
    for name in ("gone.tar", "sub", "never.tar"):
        storage.delete(storage.join(url, name))
    assert storage.list_names(url) == ["keep.tar"]


def test_empty_object_is_an_object(url):
    storage.publish_bytes(storage.join(url, "empty"), b"")
    assert (storage.size(storage.join(url, "empty")), storage.list_names(url)) == (0, ["empty"])


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("how", ["bytes", "file"])
def test_killed_process_leaves_the_old_state(tmp_path, moment, old, how):
    place = tmp_path / "set" / "manifest.json"
    source = tmp_path / "source"
    source.write_bytes(b"new" * 10_000)
    if old is not None:
        storage.publish_bytes(str(place), old)
    code = f"""
import os, signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shardspec import storage
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{moment} = killed
if {how!r} == "bytes":
    storage.publish_bytes({str(place)!r}, Path({str(source)!r}).read_bytes())
else:
    storage.publish_file({str(place)!r}, Path({str(source)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (place.read_bytes() if place.exists() else None) == old
    storage.publish_bytes(str(place), b"again")
    assert place.read_bytes() == b"again"


@pytest.mark.parametrize("old", [None, b"old"])
def test_failing_replacement_leaves_the_old_state_and_no_scraps(tmp_path, monkeypatch, old):
    place = tmp_path / "set" / "a"
    if old is not None:
        storage.publish_bytes(str(place), old)

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "replace", fail)
    error = refusal(storage.publish_bytes, str(place), b"new")
    assert (error.reason, error.where) == ("storage_failed", str(place))
    assert [p.name for p in place.parent.iterdir()] == ([] if old is None else ["a"])
    assert old is None or place.read_bytes() == old


def test_readers_see_the_old_or_the_new_object_never_a_mixture(tmp_path):
    place = str(tmp_path / "a")
    states = [bytes([i]) * 200_000 for i in range(2)]
    storage.publish_bytes(place, states[0])
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(storage.read_bytes(place))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(20):
        storage.publish_bytes(place, states[i % 2])
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(states)


def test_full_disk_is_named_and_leaves_nothing(tiny_disk):
    place = tiny_disk / "train" / "a.tar"
    error = refusal(storage.publish_bytes, str(place), bytes(2**20))
    assert (error.reason, error.where) == ("no_space", str(place))
    assert list(place.parent.iterdir()) == []


def test_file_from_another_disk_that_does_not_fit_leaves_nothing_and_stays(tiny_disk, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(2**20))
    error = refusal(storage.publish_file, str(tiny_disk / "a.tar"), source)
    assert error.reason == "no_space"
    assert list(tiny_disk.iterdir()) == []
    assert source.stat().st_size == 2**20


def test_file_moves_between_disks(tiny_disk, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 20_000)
    storage.publish_file(str(tiny_disk / "sub" / "a.tar"), source)
    assert (tiny_disk / "sub" / "a.tar").read_bytes() == b"x" * 20_000
    assert not source.exists()
    assert storage.list_names(str(tiny_disk / "sub")) == ["a.tar"]


def test_free_space_is_that_of_the_disk_of_the_nearest_folder(tiny_disk):
    free = storage.free_bytes(str(tiny_disk / "not" / "yet" / "there"))
    assert 0 < free <= 64 * 2**10
    assert storage.free_bytes("s3://bucket/set") is None


def test_folder_without_rights_is_named(unprivileged):
    locked = unprivileged / "locked"
    locked.mkdir(mode=0o500)
    error = refusal(storage.publish_bytes, str(locked / "a"), b"x")
    assert (error.reason, error.where) == ("permission", str(locked / "a"))
    error = refusal(storage.publish_bytes, str(locked / "sub" / "a"), b"x")
    assert error.reason == "permission"
    assert list(locked.iterdir()) == []


def test_file_without_rights_is_named(unprivileged):
    secret = unprivileged / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0)
    assert refusal(storage.read_bytes, str(secret)).reason == "permission"


@pytest.mark.parametrize(
    "number, reason",
    [
        (errno.ENOSPC, "no_space"),
        (errno.EDQUOT, "no_space"),
        (errno.EACCES, "permission"),
        (errno.EPERM, "permission"),
        (errno.EROFS, "permission"),
        (errno.ENOTDIR, "not_a_folder"),
        (errno.EIO, "storage_failed"),
        (errno.ESTALE, "storage_failed"),
        (None, "storage_failed"),
    ],
)
def test_errors_of_the_system_have_reasons(number, reason):
    with pytest.raises(StorageError) as raised, storage.translate_errors("s3://b/a"):
        raise OSError(number, os.strerror(number)) if number else OSError("no number")
    assert (raised.value.reason, raised.value.where) == (reason, "s3://b/a")
    assert isinstance(raised.value.__cause__, OSError)


def test_other_exceptions_pass_unchanged():
    for error in (FileNotFoundError("gone"), KeyError("bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), storage.translate_errors("a"):
            raise error


@pytest.mark.parametrize(
    "action",
    [
        storage.read_bytes,
        storage.exists,
        storage.size,
        storage.list_names,
        storage.delete,
        lambda url: storage.publish_bytes(url, b"x"),
    ],
)
def test_unknown_scheme_is_named(action):
    error = refusal(action, "nosuchscheme://bucket/a")
    assert (error.reason, error.where) == ("unknown_scheme", "nosuchscheme://bucket/a")


@pytest.mark.usefixtures("faulty")
def test_object_that_arrives_shorter_is_removed_and_named(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"payload")
    error = refusal(storage.publish_file, "shortening://b/a.tar", source)
    assert error.reason == "upload_size"
    assert error.facts == {"got_bytes": 6, "want_bytes": 7}
    assert storage.list_names("memory://b") == []
    assert source.exists()


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("old", [None, b"old"])
def test_upload_that_breaks_off_leaves_the_old_object(tmp_path, monkeypatch, old):
    monkeypatch.setattr(upload, "SINGLE_PUT_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(bytes(5000))
    if old is not None:
        storage.publish_bytes("memory://b/a.tar", old)
    policy = retries.RetryPolicy(attempts=4, first_wait_s=0.005)
    monkeypatch.setattr(retries, "ACTION_POLICY", policy)
    error = refusal(storage.publish_file, "breaking://b/a.tar", source)
    assert (error.reason, error.where) == ("store_unavailable", "breaking://b/a.tar")
    assert error.facts["attempts"] == 4
    found = storage.read_bytes("memory://b/a.tar") if storage.list_names("memory://b") else None
    assert found == old
    assert source.exists()


@pytest.mark.parametrize(
    "url, parts, joined",
    [
        ("s3://b/set", ("train", "a.tar"), "s3://b/set/train/a.tar"),
        ("s3://b/set/", ("a.tar",), "s3://b/set/a.tar"),
        ("/data", ("a",), "/data/a"),
        ("/", ("a",), "/a"),
        ("relative/set", ("a",), "relative/set/a"),
        ("", ("a",), "a"),
        ("memory://", ("a",), "memory://a"),
        ("file:///", ("a",), "file:///a"),
    ],
)
def test_joining_keeps_the_root_of_every_kind_of_url(url, parts, joined):
    assert storage.join(url, *parts) == joined
    assert storage.is_local(joined) == storage.is_local(url)


def test_local_urls_name_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local_path("file:///a/b") == storage.local_path("/a/b") == Path("/a/b")
    assert storage.local_path("~/set") == tmp_path / "set"
    assert [storage.is_local(u) for u in ("a", "/a", "file:///a", "s3://a", "memory://a")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_folder_is_held_by_one_process_and_free_when_it_is_gone(tmp_path):
    hold = (
        "import sys, time; from shardspec import storage\n"
        f"with storage.exclusive({str(tmp_path / 'out')!r}):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StorageError) as caught, storage.exclusive(str(tmp_path / "out")):
            pass
        assert caught.value.reason == "output_busy"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with storage.exclusive(str(tmp_path / "out")):
        pass


def test_of_many_that_replace_one_version_of_a_local_file_one_does(tmp_path):
    """Each adds one to a number, again and again: none is lost, in threads and in processes."""
    url, code = (
        str(tmp_path / "number"),
        (
            "import sys; from shardspec import storage\n"
            "def add(url):\n"
            "    while True:\n"
            "        version = storage.version(url)\n"
            "        number = int(storage.read_bytes(url)) + 1\n"
            "        if storage.compare_and_swap(url, b'%d' % number, replacing=version):\n"
            "            return\n"
            "for _ in range(40):\n"
            "    add(sys.argv[1])\n"
        ),
    )
    storage.publish_bytes(url, b"0")
    command = [sys.executable, "-c", code, url]
    others = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for _ in range(2)]

    def add(_):
        while True:
            version = storage.version(url)
            number = int(storage.read_bytes(url)) + 1
            if storage.compare_and_swap(url, b"%d" % number, replacing=version):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(40)))
    assert [each.wait(60) for each in others] == [0, 0]
    assert storage.read_bytes(url) == b"120"
    assert storage.compare_and_swap(url, b"1", replacing="another version") is False
    (tmp_path / "number").unlink()
    assert storage.compare_and_swap(url, b"1", replacing="gone") is False
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    url = str(tmp_path / "number")
    storage.publish_bytes(url, b"0")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert storage.compare_and_swap(url, b"1", replacing=storage.version(url))
    assert "no locks" in caplog.text


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("ext4 /dev/sda1 rw", True),
        ("overlay overlay rw", True),
        ("nfs4 server:/export rw", False),
        ("lustre mds:/scratch rw", False),
        ("fuse.s3fs s3fs rw", False),
    ],
)
def test_a_disk_of_this_machine_is_told_from_a_shared_one(tmp_path, monkeypatch, line, own):
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    text = f"1 0 0:1 / /other rw - tmpfs tmpfs rw\n36 35 {number} / /mnt rw shared:1 - {line}\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert storage.is_own_disk(str(tmp_path / "not" / "made")) is own
    assert storage.is_own_disk("s3://bucket/out") is False
