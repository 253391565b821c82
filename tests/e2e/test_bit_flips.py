"""No flipped bit of a dataset's files gives a wrong batch: every class of bytes, both policies.

A flip may be harmless (nobody reads the end of a tar), raise a named error, or, under
`on_bad="substitute"`, replace one sample and say so. `verify` notices every one of them.
"""

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from loader.raw import RawDataset
from loader.stream import StreamingDataset
from preprocess.exchange.export import export_index
from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.job.gc import find_strays
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.job.verify import verify
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from shardspec import storage
from shardspec.errors import ManifestError, ShardsError
from shardspec.manifest import MANIFEST_NAME, TOKENIZER_NAME, require_manifest
from shardspec.tar import BLOCK, END_OF_ARCHIVE, padded, walk_tar
from tests.inline import Quiet

NUM_SAMPLES = 6


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i) for i in range(NUM_SAMPLES)]
    return write_dataset(tmp_path_factory.mktemp("flips") / "set", samples, num_shards=2)


@pytest.fixture(scope="module")
def want(url):
    """Key of each sample -> its example."""
    dataset = StreamingDataset(url)
    examples = [dataset.example(i) for i in range(NUM_SAMPLES)]
    return {example["metadata"]["key"]: contents(example) for example in examples}


def contents(example):
    digest = hashlib.sha256()
    for name, value in sorted(example.items()):
        if name != "metadata":
            array = np.asarray(value)
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def tar_classes(path):
    """Class -> byte positions in a tar of ours."""
    found = {"end": range(path.stat().st_size - len(END_OF_ARCHIVE), path.stat().st_size)}
    fields = {"name": (0, 100), "size": (124, 136), "checksum": (148, 156)}
    with path.open("rb") as stream:
        for member in walk_tar(stream):
            suffix = member.name.partition(".")[2]
            header, stop = member.offset - BLOCK, member.offset + member.num_bytes
            for name, (first, last) in fields.items():
                found.setdefault(name, []).extend(range(header + first, header + last))
            rest = [*range(100, 124), *range(136, 148), *range(156, BLOCK)]
            found.setdefault("rest of header", []).extend(header + at for at in rest)
            found.setdefault(suffix, []).extend(range(member.offset, stop))
            end = member.offset + padded(member.num_bytes)
            found.setdefault("padding", []).extend(range(stop, end))
    return found


def index_classes(path):
    """Class -> byte positions in an index: its header, and every column."""
    table = np.load(path)
    start = path.stat().st_size - table.nbytes
    found = {"magic": range(8), "header": range(8, start)}
    for name in table.dtype.names:
        kind, offset = table.dtype.fields[name][:2]
        found[name] = [
            start + row * table.dtype.itemsize + offset + i
            for row in range(len(table))
            for i in range(kind.itemsize)
        ]
    return found


def files(url):
    """Class -> (file, byte positions)."""
    entry = require_manifest(url).shards[1]
    tar, index, manifest = (
        Path(url, entry.url),
        Path(url, entry.index_url),
        Path(url, MANIFEST_NAME),
    )
    found = {f"tar: {name}": (tar, at) for name, at in tar_classes(tar).items()}
    found |= {f"index: {name}": (index, at) for name, at in index_classes(index).items()}
    found["manifest"] = (manifest, range(manifest.stat().st_size))
    return found


def flips(url, each):
    """Yields (class, undo) with one bit flipped, `each` times for every class."""
    for name, (path, positions) in files(url).items():
        good = path.read_bytes()
        # The golden ratio spreads any number of positions evenly.
        for i in range(each * (8 if name == "manifest" else 1)):
            at = positions[int(len(positions) * ((i + 1) * 0.6180339887 % 1))]
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << i % 8]) + good[at + 1 :])
            try:
                yield name
            finally:
                path.write_bytes(good)


def outcome(url, want, on_bad):
    """Reads every sample; says what came of it, and fails where an example is wrong."""
    try:
        dataset = StreamingDataset(url, on_bad=on_bad)
        made = [dataset.example(i) for i in range(NUM_SAMPLES)]
    except ShardsError as error:
        return error.reason
    keys = list(want)
    for number, example in enumerate(made):
        metadata = example["metadata"]
        assert contents(example) == want[metadata["key"]]
        if "substitutes" in metadata:
            assert metadata["substitutes"]["key"] == keys[number]
        else:
            assert metadata["key"] == keys[number]
    return "substituted" if sum(dataset.bad.values()) else "right"


def try_all(url, want, each):
    found = Counter()
    baseline = len(verify(url, Quiet()))  # the set has no copy of a tokenizer
    assert not Path(url, TOKENIZER_NAME).exists()
    for name in flips(url, each):
        kinds = {on_bad: outcome(url, want, on_bad) for on_bad in ("raise", "substitute")}
        try:
            noticed = len(verify(url, Quiet())) > baseline
        except ShardsError:
            noticed = True
        assert noticed, name
        file = name.partition(":")[0]
        if name == "tar: end":
            assert kinds == {"raise": "right", "substitute": "right"}
        elif file == "tar":
            assert kinds == {"raise": "sample_crc", "substitute": "substituted"}
        else:
            # Never a substitute: what an index or a manifest says concerns many samples.
            assert kinds["raise"] == kinds["substitute"]
            assert kinds["raise"].startswith(f"{file}_")
        found[file] += 1
    return found


def test_no_flipped_bit_gives_a_wrong_batch(url, want):
    found = try_all(url, want, 8)
    assert found["tar"] >= 60
    assert found["index"] >= 100
    assert found["manifest"] >= 60


@pytest.mark.slow
def test_no_flipped_bit_of_thousands_gives_a_wrong_batch(url, want):
    assert sum(try_all(url, want, 60).values()) >= 1800


@pytest.mark.parametrize("name", ["manifest", "index: key", "index: offset", "index: crc32"])
@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
def test_a_wrong_byte_of_a_store_is_never_a_shard_of_substitutes(name, on_bad, url, want):
    remote = f"memory://{name.replace(': ', '-')}-{on_bad}"
    for path in Path(url).rglob("*.*"):
        storage.publish_bytes(storage.join(remote, str(path.relative_to(url))), path.read_bytes())
    assert outcome(remote, want, on_bad) == "right"
    path, positions = files(url)[name]
    payload = bytearray(path.read_bytes())
    payload[positions[len(positions) // 2]] ^= 4
    storage.publish_bytes(storage.join(remote, str(path.relative_to(url))), bytes(payload))
    found = outcome(remote, want, on_bad)
    assert found.startswith("manifest_") if name == "manifest" else found == "index_sha256"


def _import(url, folder):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("key.txt"), io.BytesIO())
    import_tars(ImportSettings(tars=(str(folder),), out=url, name="x"), Quiet())


READERS = {
    "loader": lambda url, folder: StreamingDataset(url),
    "verify": lambda url, folder: verify(url, Quiet()),
    "gc": lambda url, folder: find_strays(url),
    "export": lambda url, folder: export_index(url, "wids", Quiet()),
    "reshard, source": lambda url, folder: plan_reshard(
        ReshardSettings(sources=(url,), out=str(folder / "out"), form="view"), Quiet()
    ),
    "build": lambda url, folder: run_job(
        JobSettings(dataset="pixmo_cap", source="sample", limit=2, out=url), Quiet()
    ),
    "import": _import,
    "plan of a cluster": lambda url, folder: require_manifest(url),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_compares_the_digest_of_the_manifest(
    name, tiny_sample, write_dataset, tmp_path
):
    url = write_dataset(tmp_path / "set", [tiny_sample(0)])
    path = Path(url, MANIFEST_NAME)
    path.write_bytes(path.read_bytes().replace(b'"eos": 2', b'"eos": 3'))
    with pytest.raises(ManifestError) as caught:
        READERS[name](url, tmp_path / "work")
    assert caught.value.reason == "manifest_digest"


@pytest.fixture
def imported(tmp_path):
    """A raw dataset of one tar with PAX headers; gives its URL and the tar."""
    tar = tmp_path / "tars" / "a.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(4):
            for suffix in ("jpg", "txt"):
                entry = tarfile.TarInfo(f"key{i}.{suffix}")
                entry.size, entry.mtime = 300 + i, 1.5
                archive.addfile(entry, io.BytesIO(bytes([i]) * entry.size))
    url = str(tmp_path / "out")
    import_tars(ImportSettings(tars=(str(tar),), out=url, name="x"), Quiet())
    return url, tar


def test_no_flipped_bit_of_an_imported_tar_gives_a_wrong_sample(imported):
    url, tar = imported

    def samples():
        dataset = RawDataset(url, decode=lambda sample, rng: sample)
        made = [dataset.sample(i) for i in range(4)]
        return [(each.key, {n: bytes(p) for n, p in each.fields.items()}) for each in made]

    want = samples()
    good = tar.read_bytes()
    reasons = Counter()
    for at in range(7, len(good), 97):
        tar.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        try:
            assert samples() == want
            reasons["right"] += 1
        except ShardsError as error:
            reasons[error.reason] += 1
    assert set(reasons) == {"right", "sample_crc"}
    assert reasons["sample_crc"] * 97 > int(require_manifest(url).shards[0].num_bytes) / 2
