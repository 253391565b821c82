"""Resharding in and between object stores, on real servers, with the bytes counted on the wire."""

import hashlib
import io
import json
import os
import select
import socket
import socketserver
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest

from loader import RawDataset, StreamingDataset, make_dataloader
from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.job.engines import local
from preprocess.job.verify import verify
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import reshard
from shardspec import storage
from shardspec.errors import ConfigError, ShardError, StorageError
from shardspec.manifest import load_manifest, require_manifest
from shardspec.storage import copying
from shardspec.storage.copying import ByteRange, multipart_copy, object_version
from tests.inline import Quiet

MIB = 2**20


# Tasks run here, so that they go through the relay that a test makes.
pytestmark = pytest.mark.usefixtures("in_this_process")


class Relay(socketserver.ThreadingTCPServer):
    """Passes TCP connections on to a server and counts the bytes of both directions."""

    daemon_threads = False  # closing waits for them

    def __init__(self, target_port):
        self.target_port = target_port
        self.num_bytes = 0
        self.ends = False
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), RelayedConnection)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def count(self, num_bytes):
        with self._lock:
            self.num_bytes += num_bytes

    def close(self):
        self.ends = True
        self.shutdown()
        self._thread.join()
        self.server_close()


class RelayedConnection(socketserver.BaseRequestHandler):
    """One connection of a client."""

    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.target_port)) as upstream:
            other = {self.request: upstream, upstream: self.request}
            while not self.server.ends:
                for source in select.select(list(other), [], [], 0.05)[0]:
                    try:
                        payload = source.recv(2**18)
                        if not payload:
                            return
                        self.server.count(len(payload))
                        other[source].sendall(payload)
                    except ConnectionError:
                        return


@pytest.fixture
def relayed(s3_server, monkeypatch):
    """The S3 server behind a relay; clients of this process go through it."""
    relay = Relay(s3_server.ports["s3.port"])
    monkeypatch.setitem(
        s3_server.env, "AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{relay.server_address[1]}"
    )
    with s3_server.entered():
        yield relay
    relay.close()


def upload(folder, url):
    """Puts a dataset into a store, its manifest last."""
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    for path in sorted(paths, key=lambda p: p.name == "manifest.json"):
        storage.publish_bytes(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(tmp_path, monkeypatch):
    """Unfinished files lie in the machine's temporary folder, and nothing of them stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    here = set(os.listdir())
    yield
    left = [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()]
    assert left == []
    assert set(os.listdir()) == here


def recut(source, out, **options):
    wanted = ReshardSettings(sources=(source,), out=out, **{"form": "copy", **options})
    return reshard(plan_reshard(wanted, Quiet()), Quiet())


def tars(url):
    return {
        shard.url: storage.read_bytes(storage.join(url, shard.url))
        for shard in require_manifest(url).shards
    }


@pytest.fixture(scope="module")
def large(tiny_sample, write_dataset, tmp_path_factory):
    """Three shards of 40 MiB: 42 samples of 2.8 MiB, uncompressed."""
    folder = tmp_path_factory.mktemp("large") / "source"
    samples = [tiny_sample(i, size=(1024, 960)) for i in range(42)]
    return write_dataset(folder, samples, num_shards=3)


@pytest.fixture(scope="module")
def small(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "source"
    return write_dataset(folder, [tiny_sample(i) for i in range(20)], num_shards=3)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [2, 3, 5])
def test_an_s3_store_copies_and_the_client_moves_next_to_nothing(
    num_shards, large, s3_server, relayed, tmp_path
):
    bucket = s3_server.make_bucket()
    upload(large, f"{bucket}/source")
    before = s3_server.objects(f"{bucket}/source")
    relayed.num_bytes = 0
    recut(f"{bucket}/source", f"{bucket}/out", num_shards=num_shards)
    moved = relayed.num_bytes
    data = sum(size for name, size in before.items() if name.endswith(".tar"))
    assert data > 115 * MIB
    assert moved <= data / 100 + num_shards * 5 * MIB
    # The same bytes as a copy on a local disk.
    recut(large, str(tmp_path / "out"), num_shards=num_shards)
    assert tars(f"{bucket}/out") == tars(str(tmp_path / "out"))
    assert s3_server.uploads(bucket) == []
    assert s3_server.objects(f"{bucket}/source") == before
    findings = verify(f"{bucket}/out", Quiet())
    assert [finding.reason for finding in findings] == ["tokenizer_file"]


@pytest.mark.slow
def test_whole_shards_keep_their_hash_in_a_store(large, s3_server, relayed):
    bucket = s3_server.make_bucket()
    upload(large, f"{bucket}/source")
    done = recut(f"{bucket}/source", f"{bucket}/out", num_shards=3)
    before = require_manifest(large).shards
    assert [shard.sha256 for shard in done.manifest.shards] == [shard.sha256 for shard in before]
    for shard in done.manifest.shards:
        payload = storage.read_bytes(f"{bucket}/out/{shard.url}")
        assert hashlib.sha256(payload).hexdigest() == shard.sha256


@pytest.mark.parametrize("order", ["keep", "shuffle"])
def test_short_ranges_pass_through_the_client_with_their_checksums(
    order, small, s3_server, tmp_path
):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        upload(small, f"{bucket}/source")
        recut(f"{bucket}/source", f"{bucket}/out", num_shards=2, order=order)
        recut(small, str(tmp_path / "out"), num_shards=2, order=order)
        assert tars(f"{bucket}/out") == tars(str(tmp_path / "out"))
        shard = require_manifest(f"{bucket}/source").shards[0]
        payload = bytearray(storage.read_bytes(f"{bucket}/source/{shard.url}"))
        payload[1500] ^= 1
        storage.publish_bytes(f"{bucket}/source/{shard.url}", bytes(payload))
        with pytest.raises(ShardError) as caught:
            recut(f"{bucket}/source", f"{bucket}/other", num_shards=2, order=order)
        assert caught.value.reason == "sample_crc"
        assert load_manifest(f"{bucket}/other") is None


def test_what_changes_while_the_store_copies_is_refused_and_no_upload_stays(s3_server):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        url = f"{bucket}/a.tar"
        storage.publish_bytes(url, bytes(12 * MIB))
        old = object_version(url)
        storage.publish_bytes(url, b"1" * (12 * MIB))
        pieces = [ByteRange(url=url, start=0, stop=11 * MIB)]
        with pytest.raises(ShardError) as caught:
            multipart_copy(f"{bucket}/out.tar", pieces, {url: old})
        assert caught.value.reason == "source_changed"
        assert storage.size(f"{bucket}/out.tar") is None
        assert s3_server.uploads(bucket) == []


def test_an_upload_that_a_killed_process_left_is_ended_by_the_next(s3_server):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        url = f"{bucket}/a.tar"
        storage.publish_bytes(url, bytes(12 * MIB))
        fs, _ = storage.filesystem(url)
        name = bucket.removeprefix("s3://")
        for key in ("out.tar", "out.tar.other"):
            fs.call_s3("create_multipart_upload", Bucket=name, Key=key)
        assert s3_server.uploads(bucket) == ["out.tar", "out.tar.other"]
        pieces = [ByteRange(url=url, start=0, stop=11 * MIB)]
        multipart_copy(f"{bucket}/out.tar", pieces, {url: object_version(url)})
        assert s3_server.uploads(bucket) == ["out.tar.other"]
        assert storage.size(f"{bucket}/out.tar") == 11 * MIB + 1024


def test_stores_that_cannot_copy_ranges_say_so_when_they_must(small, s3_server):
    bucket = s3_server.make_bucket()
    with s3_server.entered(), pytest.raises(ConfigError) as caught:
        recut(small, f"{bucket}/out", through="store")
    assert caught.value.reason == "not_in_store"


def test_a_gcs_store_copies_whole_shards_and_streams_ranges(
    small, gcs_server, tmp_path, monkeypatch
):
    bucket = gcs_server.make_bucket()
    with gcs_server.entered():
        upload(small, f"{bucket}/source")
        copied = []
        monkeypatch.setattr(
            copying, "check_unchanged", lambda url, want: copied.append(url)
        )  # called where the store copies
        recut(f"{bucket}/source", f"{bucket}/same", num_shards=3)
        assert len(set(copied)) == 3
        copied.clear()
        recut(f"{bucket}/source", f"{bucket}/out", num_shards=2)
        assert copied == []
        recut(small, str(tmp_path / "out"), num_shards=2)
        assert tars(f"{bucket}/same") == tars(small)
        assert tars(f"{bucket}/out") == tars(str(tmp_path / "out"))


def test_from_one_kind_of_store_to_another(small, s3_server, gcs_server, tmp_path):
    s3, gcs = s3_server.make_bucket(), gcs_server.make_bucket()
    with s3_server.entered(), gcs_server.entered():
        recut(small, f"{s3}/a", num_shards=2)
        recut(f"{s3}/a", f"{gcs}/b", num_shards=4)
        recut(f"{gcs}/b", str(tmp_path / "c"), num_shards=3)
        assert tars(str(tmp_path / "c")) == tars(small)


def test_a_view_beside_its_dataset_in_a_store_names_it_relatively(small, s3_server):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        upload(small, f"{bucket}/sets/source")
        recut(f"{bucket}/sets/source", f"{bucket}/sets/view", num_shards=2, form="view")
        document = json.loads(storage.read_bytes(f"{bucket}/sets/view/manifest.json"))
        urls = [file["url"] for file in document["view"]["files"]]
        assert all(url.startswith("../source/train/") for url in urls)
        assert verify(f"{bucket}/sets/view", Quiet())[1:] == []


def streamed(url, **options):
    """Digests of the batches of an epoch."""
    dataset = StreamingDataset(url, seed=5, **options)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=64, with_metadata=True)
    return [
        (
            [each["key"] for each in batch["metadata"]],
            hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest(),
            hashlib.sha256(batch["images"].numpy().tobytes()).hexdigest(),
        )
        for batch in loader
    ]


def test_views_are_streamed_wherever_they_and_their_files_lie(
    small, s3_server, tmp_path, monkeypatch
):
    bucket = s3_server.make_bucket()
    want = streamed(small)
    assert len(want) == 5
    with s3_server.entered():
        upload(small, f"{bucket}/sets/source")
        recut(f"{bucket}/sets/source", f"{bucket}/sets/view", num_shards=2, form="view")
        recut(f"{bucket}/sets/source", str(tmp_path / "view"), num_shards=5, form="view")
        recut(f"{bucket}/sets/source", f"{bucket}/sets/copy", num_shards=2)
        with pytest.raises(StorageError) as caught:  # this bucket is named by the manifest alone
            streamed(str(tmp_path / "view"))
        assert caught.value.reason == "foreign_host"
        monkeypatch.setenv("VLM_SHARDS_HOSTS", f"{bucket}/sets")
        for url in (f"{bucket}/sets/view", str(tmp_path / "view"), f"{bucket}/sets/copy"):
            assert streamed(url) == want
            assert streamed(url, cache=str(tmp_path / "cache"), cache_bytes=2**30) == want


def test_two_copies_without_a_hash_do_not_share_blocks_of_a_cache(small, s3_server, tmp_path):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        upload(small, f"{bucket}/source")
        for name, order in (("a", "keep"), ("b", "length")):
            done = recut(f"{bucket}/source", f"{bucket}/{name}", num_shards=1, order=order)
            assert done.manifest.shards[0].sha256 == ""
        cached = {"cache": str(tmp_path / "cache"), "cache_bytes": 2**30}
        for name in ("a", "b"):
            assert streamed(f"{bucket}/{name}", **cached) == streamed(f"{bucket}/{name}")


def test_tars_in_a_store_are_imported_and_streamed_raw(s3_server, tmp_path, monkeypatch):
    bucket = s3_server.make_bucket()
    monkeypatch.setenv("VLM_SHARDS_HOSTS", bucket)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for i in range(9):
            entry = tarfile.TarInfo(f"{i:04d}.txt")
            entry.size = 7
            archive.addfile(entry, io.BytesIO(b"text %02d" % i))
    want = [(f"{i:04d}", b"text %02d" % i) for i in range(9)]

    def decode(sample, rng):
        return sample.key, bytes(sample.fields["txt"])

    with s3_server.entered():
        storage.publish_bytes(f"{bucket}/tars/x.tar", stream.getvalue())
        for out in (f"{bucket}/index", str(tmp_path / "index")):
            settings = ImportSettings(tars=(f"{bucket}/tars",), out=out, name="foreign")
            import_tars(settings, Quiet())
            options = {"shuffle": False, "tail": "pad", "decode": decode}
            assert list(RawDataset(out, **options)) == want
            assert verify(out, Quiet()) == []


def test_what_is_told_to_end_in_the_middle_of_an_upload_leaves_nothing(large, s3_server):
    """As Ctrl-C does: the next thing that a worker reports raises SystemExit."""
    bucket = s3_server.make_bucket()

    def run(tasks, *, work, context, num_workers, given):
        def report(num_bytes):
            arrived.append(num_bytes)
            raise SystemExit

        work(context, given(tasks[0]), report).finish()
        yield

    arrived = []
    with s3_server.entered(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run", run)
        with pytest.raises(SystemExit):
            recut(large, f"{bucket}/out", num_shards=2)
        assert arrived
        assert s3_server.uploads(bucket) == []
        assert not [name for name in s3_server.objects(bucket) if name.endswith(".tar")]


def test_joins_in_a_store_outlast_its_passing_refusals(s3_server, monkeypatch):
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        url = f"{bucket}/a.tar"
        storage.publish_bytes(url, bytes(12 * MIB))
        fs, _ = storage.filesystem(url)
        real, refused = fs.call_s3, set()

        def call(method, **arguments):
            if method not in refused:
                refused.add(method)
                raise TimeoutError("the store is busy")
            return real(method, **arguments)

        monkeypatch.setattr(fs, "call_s3", call)
        pieces = [ByteRange(url=url, start=0, stop=6 * MIB), ByteRange(url=url, start=0, stop=512)]
        multipart_copy(f"{bucket}/out.tar", pieces, {url: object_version(url)})
        assert {"upload_part", "upload_part_copy", "complete_multipart_upload"} <= refused
        assert storage.size(f"{bucket}/out.tar") == 6 * MIB + 512 + 1024
        assert s3_server.uploads(bucket) == []


@pytest.mark.parametrize("source_bytes", [3 * MIB, 8 * MIB])
def test_no_ranges_of_objects_shorter_than_a_part_are_asked_for(
    source_bytes, s3_server, monkeypatch
):
    # S3 refuses these; the server of these tests does not.
    bucket = s3_server.make_bucket()
    with s3_server.entered():
        long, last = f"{bucket}/long.tar", f"{bucket}/last.tar"
        storage.publish_bytes(long, bytes(12 * MIB))
        storage.publish_bytes(last, bytes(source_bytes))
        fs, _ = storage.filesystem(long)
        real, copied = fs.call_s3, []

        def call(method, **arguments):
            if method == "upload_part_copy":
                copied.append(arguments["CopySource"]["Key"])
            return real(method, **arguments)

        monkeypatch.setattr(fs, "call_s3", call)
        pieces = [
            ByteRange(url=long, start=0, stop=6 * MIB),
            ByteRange(url=last, start=1 * MIB, stop=source_bytes - 1024),
        ]
        multipart_copy(f"{bucket}/out.tar", pieces, {u: object_version(u) for u in (long, last)})
        assert storage.size(f"{bucket}/out.tar") == 6 * MIB + source_bytes - 1 * MIB
        assert copied == (["long.tar"] if source_bytes < 5 * MIB else ["long.tar", "last.tar"])
