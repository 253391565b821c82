"""What storage promises, on every back end: local disk, memory, S3, GCS, a named store."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardspec import storage
from shardspec.errors import StorageError
from shardspec.storage import retries, upload

ROOT = Path(__file__).parents[3]
NAMES = ["a+b", "with space", "ü-日本", "100%25", "k=v&w", "what?", "no#t", "st*r", "~t", "[x]"]
BIG = 20 * 2**20 + 12_345
"""Three parts, the last one short."""


BACK_ENDS = ["local", "memory", "s3", "gcs", pytest.param("alias", marks=pytest.mark.slow)]


@pytest.fixture(params=BACK_ENDS)
def place(request, tmp_path, monkeypatch):
    """An empty place to write to, as a URL, on each back end."""
    if request.param == "local":
        yield str(tmp_path / "set")
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}/set"
        storage.delete(f"memory://{tmp_path.name}")
    elif request.param == "gcs":
        server = request.getfixturevalue("gcs_server")
        with server.entered():
            yield f"{server.bucket}/{tmp_path.name}/set"
    else:
        server = request.getfixturevalue("s3_server")
        with server.entered():
            url = f"{server.bucket}/{tmp_path.name}/set"
            if request.param == "alias":
                monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_ENDPOINT_URL", server.endpoint)
                monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
                url = url.replace("s3://", "weka://")
            yield url


@pytest.fixture
def s3(s3_server, tmp_path):
    """A place on the S3 server."""
    with s3_server.entered():
        yield f"{s3_server.bucket}/{tmp_path.name}/set"


def big_file(folder, num_bytes=BIG):
    path = folder / "big.tar"
    block = bytes(range(256)) * 4096
    with path.open("wb") as stream:
        for start in range(0, num_bytes, len(block)):
            stream.write(block[: num_bytes - start])
    return path


# --- objects


def test_an_object_reads_back_and_is_replaced(place):
    url = storage.join(place, "train", "a")
    assert (storage.exists(url), storage.size(url), storage.version(url)) == (False, None, None)
    storage.publish_bytes(url, b"first")
    version = storage.version(url)
    assert (storage.read_bytes(url), storage.size(url)) == (b"first", 5)
    storage.publish_bytes(url, b"second!")
    assert (storage.read_bytes(url), storage.size(url)) == (b"second!", 7)
    assert None not in (version, storage.version(url))
    assert storage.version(url) != version


def test_an_empty_object_is_an_object(place, tmp_path):
    url = storage.join(place, "empty")
    storage.publish_bytes(url, b"")
    assert (storage.read_bytes(url), storage.size(url), storage.exists(url)) == (b"", 0, True)
    (tmp_path / "file").touch()
    storage.publish_file(storage.join(place, "file"), tmp_path / "file")
    assert storage.list_names(place) == ["empty", "file"]


def test_missing_objects_are_told_apart_from_failures(place):
    for url in (place, storage.join(place, "none")):
        assert not storage.exists(url)
        assert (storage.size(url), storage.version(url)) == (None, None)
        assert storage.list_names(url) == storage.list_objects(url) == []
        assert storage.list_uploads(url) == []
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(url)
        storage.delete(url)


def test_names_mean_themselves(place):
    folder, left = storage.join(place, "sub"), sorted([*NAMES, "other", "stir", "tt", "x"])
    for name in left:
        storage.publish_bytes(storage.join(folder, name), name.encode())
    for name in NAMES:
        assert storage.read_bytes(storage.join(folder, name)) == name.encode()
        assert storage.list_names(folder) == left
        storage.delete(storage.join(folder, name))  # no pattern: it takes nothing else along
        left.remove(name)
    assert storage.list_names(folder) == left == ["other", "stir", "tt", "x"]


def test_a_folder_has_no_length_and_no_version(place):
    storage.publish_bytes(storage.join(place, "sub", "a"), b"x")
    assert storage.exists(storage.join(place, "sub"))
    assert storage.size(storage.join(place, "sub")) is None


# --- listings


def test_listings_are_sorted_by_code_point_whatever_the_store_does(place):
    names = ["z/a/1", "z/a-1", "z/a0", "b", "B", "a.b", "a-b", "ü", "z/a/0"]
    for name in names:
        storage.publish_bytes(storage.join(place, name), b"x")
    assert [each.name for each in storage.list_objects(place)] == sorted(names)
    assert storage.list_names(storage.join(place, "z")) == ["a", "a-1", "a0"]
    assert storage.list_names(place) == sorted(["B", "a-b", "a.b", "b", "z", "ü"])


def test_listings_tell_lengths_and_times_and_keep_to_their_folder(place):
    for name, payload in (("set/a", b"123"), ("set/sub/b", b""), ("set2/c", b"1")):
        storage.publish_bytes(storage.join(place, name), payload)
    found = storage.list_objects(storage.join(place, "set"))
    assert [(each.name, each.num_bytes) for each in found] == [("a", 3), ("sub/b", 0)]
    times = [each.modified_unix_s for each in found]
    assert max(times) - min(times) < 60
    assert min(times) > 1.7e9
    storage.delete(storage.join(place, "set"))
    assert [each.name for each in storage.list_objects(place)] == ["set2/c"]


@pytest.mark.slow
def test_more_objects_than_a_page_holds_are_listed_and_deleted(s3):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.publish_bytes(f"{s3}/{i:04d}", b"x"), range(1050)))
    assert storage.list_names(s3) == [f"{i:04d}" for i in range(1050)]
    assert len(storage.list_objects(s3)) == 1050
    storage.delete_objects(s3, (f"{i:04d}" for i in range(1, 1060)))
    assert storage.list_names(s3) == ["0000"]


# --- files


def test_a_large_file_goes_up_in_parts_and_arrives_whole(place, tmp_path):
    source = big_file(tmp_path)
    want = source.read_bytes()
    url = storage.join(place, "big.tar")
    arrived = []
    for _ in range(2):  # the second time it replaces the first
        source.write_bytes(want)
        storage.publish_file(url, source, on_part=arrived.append)
        assert not source.exists()
        assert storage.size(url) == BIG
        assert storage.read_bytes(url) == want
    if not storage.is_local(place) and not place.startswith("memory"):
        assert sum(arrived) == 2 * BIG
        assert max(arrived) <= upload.PART_BYTES
    assert storage.list_names(place) == ["big.tar"]
    assert storage.list_uploads(place) == []


class Stopped(BaseException):
    """No Exception, as Ctrl-C and the end of a worker are none."""


@pytest.mark.parametrize(
    "error, old",
    [
        (KeyboardInterrupt, None),
        (OSError, b"old"),
        pytest.param(Stopped, b"old", marks=pytest.mark.slow),
    ],
)
def test_an_upload_that_is_broken_off_leaves_the_old_state(place, tmp_path, error, old):
    if storage.is_local(place) or place.startswith("memory"):
        pytest.skip("there it takes one step")
    source = big_file(tmp_path)
    url = storage.join(place, "big.tar")
    if old is not None:
        storage.publish_bytes(url, old)

    def stop(num_bytes):
        raise error

    with pytest.raises((Stopped, KeyboardInterrupt, StorageError)):
        storage.publish_file(url, source, on_part=stop)
    assert source.exists()
    assert storage.list_uploads(place) == []
    assert storage.list_names(place) == ([] if old is None else ["big.tar"])
    assert old is None or storage.read_bytes(url) == old


def test_a_process_killed_in_an_upload_leaves_nothing_but_parts_that_can_be_dropped(
    s3_server, s3, tmp_path
):
    source = big_file(tmp_path, 64 * 2**20)
    code = f"""
import os, signal
from pathlib import Path
from shardspec import storage
def killed(num_bytes):
    os.kill(os.getpid(), signal.SIGKILL)
storage.publish_file({s3 + "/big.tar"!r}, Path({str(source)!r}), on_part=killed)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert s3_server.objects(s3) == {}
    (left,) = storage.list_uploads(s3)
    assert left.name == "big.tar"
    assert left.began_unix_s > 1.7e9
    assert storage.list_uploads(s3 + "2") == []
    storage.abort_upload(storage.join(s3, left.name), left.upload_id)
    assert s3_server.uploads(s3) == storage.list_uploads(s3) == []
    storage.abort_upload(storage.join(s3, left.name), left.upload_id)


def test_a_file_that_shrinks_while_it_goes_up_is_named_and_leaves_nothing(place, tmp_path):
    if storage.is_local(place) or place.startswith("memory"):
        pytest.skip("there it takes one step")
    source = big_file(tmp_path, 64 * 2**20)

    def shrink(num_bytes):
        os.truncate(source, upload.PART_BYTES)

    with pytest.raises(StorageError) as caught:
        storage.publish_file(storage.join(place, "big.tar"), source, on_part=shrink)
    assert caught.value.reason == "upload_source"
    assert storage.list_names(place) == []
    assert storage.list_uploads(place) == []


# --- conditions


ONE_STORE_IS_ENOUGH = "a named store is an S3 store, and that one is raced for already"


def test_one_of_sixteen_writers_creates_an_object(place):
    if place.startswith("weka"):
        pytest.skip(ONE_STORE_IS_ENOUGH)
    url = storage.join(place, "one")
    barrier = threading.Barrier(16)

    def create(i):
        barrier.wait()
        return storage.compare_and_swap(url, f"writer {i}".encode(), replacing=None)

    for _ in range(2):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert sum(won) == 1
        assert storage.read_bytes(url) == f"writer {won.index(True)}".encode()
        storage.delete(url)


def test_one_of_sixteen_writers_replaces_a_version(place):
    if storage.is_local(place):
        pytest.skip("replacing on local disk is for the holder of the folder's lock")
    if place.startswith("weka"):
        pytest.skip(ONE_STORE_IS_ENOUGH)
    url = storage.join(place, "one")
    storage.publish_bytes(url, b"old")
    version = storage.version(url)
    barrier = threading.Barrier(16)

    def replace(i):
        barrier.wait()
        return storage.compare_and_swap(url, f"writer {i}".encode(), replacing=version)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(replace, range(16)))
    assert sum(won) == 1
    assert storage.read_bytes(url) == f"writer {won.index(True)}".encode()


def test_a_swap_is_refused_where_another_version_stands(place):
    url = storage.join(place, "a")
    assert storage.compare_and_swap(url, b"1", replacing=None)
    first = storage.version(url)
    assert not storage.compare_and_swap(url, b"other", replacing=None)
    assert storage.compare_and_swap(url, b"22", replacing=first)
    assert not storage.compare_and_swap(url, b"333", replacing=first)
    assert storage.read_bytes(url) == b"22"
    storage.delete(url)
    assert not storage.compare_and_swap(url, b"4444", replacing=first)
    assert not storage.exists(url)


def test_a_swap_whose_answer_was_lost_counts_as_done(place):
    url = storage.join(place, "a")
    assert storage.compare_and_swap(url, b"mine", replacing=None)
    assert storage.compare_and_swap(url, b"mine", replacing=None)


# --- refusals


def test_a_bucket_that_is_not_there_is_named(place, tmp_path):
    if not place.startswith(("s3://", "gs://", "weka://")):
        pytest.skip("no buckets here")
    url = f"{place.split('://')[0]}://no-such-bucket/a"
    (tmp_path / "file").write_bytes(b"x")
    for write in (
        lambda: storage.publish_bytes(url, b"x"),
        lambda: storage.publish_file(url, tmp_path / "file"),
        lambda: storage.publish_file(url, big_file(tmp_path)),
        lambda: storage.compare_and_swap(url, b"x", replacing=None),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert (caught.value.reason, caught.value.where) == ("bucket_missing", url)


@pytest.mark.parametrize(
    "keys",
    [
        {"AWS_SECRET_ACCESS_KEY": "not-the-secret-of-this-server"},
        {"AWS_ACCESS_KEY_ID": "nobody-knows-this-key", "AWS_SECRET_ACCESS_KEY": "whatever-it-is"},
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ],
)
def test_refused_access_is_named_and_no_secret_shown(s3, monkeypatch, tmp_path, keys):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in keys.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    for action in (
        lambda: storage.read_bytes(f"{s3}/a"),
        lambda: storage.publish_bytes(f"{s3}/a", b"x"),
        lambda: storage.publish_file(f"{s3}/a", big_file(tmp_path)),
        lambda: storage.list_names(s3),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.reason == "permission"
        assert "credentials" in caught.value.fix
        assert not any(value in str(caught.value) for value in keys.values() if value)


def test_a_store_that_is_gone_is_named_with_what_was_tried(s3_servers, tmp_path, monkeypatch):
    policy = retries.RetryPolicy(attempts=2, first_wait_s=0.005)
    monkeypatch.setattr(retries, "ACTION_POLICY", policy)
    with s3_servers() as server, server.entered():
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        bucket = server.make_bucket()
        storage.publish_bytes(f"{bucket}/a", b"x")
        server.kill()
        for action in (
            lambda: storage.read_bytes(f"{bucket}/a"),
            lambda: storage.publish_file(f"{bucket}/b", big_file(tmp_path)),
        ):
            with pytest.raises(StorageError) as caught:
                action()
            assert caught.value.reason == "store_unavailable"
            assert caught.value.facts["attempts"] == 2
            assert "EndpointConnectionError" in caught.value.facts["error"]


def test_a_body_that_was_changed_on_its_way_is_refused(place, tmp_path, monkeypatch):
    """The client says one checksum and sends other bytes, as a broken proxy would make it seem."""
    if not place.startswith(("s3://", "gs://", "weka://")):
        pytest.skip("nothing stands in between")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client would send it again and again
    monkeypatch.setattr(upload, "_base64", lambda md5: "1B2M2Y8AsgTpgAmY7PhCfg==")
    source = big_file(tmp_path)
    for write in (
        lambda: storage.publish_bytes(f"{place}/a", b"bytes"),
        lambda: storage.publish_file(f"{place}/b", source),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.reason in ("storage_failed", "upload_checksum")
    assert storage.list_names(place) == []
    assert storage.list_uploads(place) == []
    assert source.exists()
