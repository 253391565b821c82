"""Importing tars that others wrote: webdataset is the oracle of what a sample is."""

import io
import json
import os
import subprocess
import tarfile
import tracemalloc
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader.raw import RawDataset
from preprocess.exchange import foreign
from preprocess.exchange.foreign import ImportSettings, import_tars, index_rows
from preprocess.job import pipeline
from preprocess.job.job import JobSettings
from preprocess.job.verify import verify
from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import reshard
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, ShardError
from shardspec.foreign import ForeignFile, walk_foreign
from shardspec.manifest import require_manifest
from tests.examples import examples
from tests.inline import Quiet, cluster

# Not ours to mend: files that webdataset leaves to the garbage collector.
pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]


def add(archive, name, payload, **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(payload)
    for field, value in fields.items():
        setattr(entry, field, value)
    archive.addfile(entry, io.BytesIO(payload))


def write_tar(path, files, *, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, payload in files:
            add(archive, name, payload, mtime=1.5)
    return path


def img2dataset(folder, *, shards=3, samples=7):
    """Tars as img2dataset writes them: jpg, txt and json per key, numbered through."""
    paths = []
    for shard in range(shards):
        files = []
        for i in range(samples + shard):
            key = f"{shard:05d}{i:04d}"
            rng = np.random.RandomState(1000 * shard + i)
            files += [
                (f"{key}.jpg", rng.bytes(rng.randint(1, 3000))),
                (f"{key}.txt", f"caption {key}".encode()),
                (f"{key}.json", json.dumps({"key": key, "width": i}).encode()),
            ]
        paths.append(write_tar(folder / f"{shard:05d}.tar", files))
    return paths


def by_webdataset(paths):
    """What webdataset groups: (key, {suffix: payload}) in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import webdataset as wds

        found = wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
        return [
            (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
            for sample in found
        ]


def raw(url, **options):
    def decode(sample, rng):
        return sample.key, {name: bytes(payload) for name, payload in sample.fields.items()}

    return RawDataset(str(url), decode=decode, **{"shuffle": False, "tail": "pad", **options})


def imported(tars, out, **options):
    settings = {"name": "foreign", "tars": tuple(map(str, tars)), "out": str(out), **options}
    return import_tars(ImportSettings(**settings), Quiet())


def recut(source, out, **options):
    wanted = ReshardSettings(sources=(str(source),), out=str(out), **{"form": "copy", **options})
    return reshard(plan_reshard(wanted, Quiet()), Quiet())


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_are_those_of_webdataset_whatever_the_headers(form, tmp_path):
    long = "folder/" * 20 + "0001" if form != tarfile.USTAR_FORMAT else "folder/" * 12 + "0001"
    files = [
        ("a/0000.jpg", b"j" * 700),
        ("a/0000.cls.TXT", b"seven"),
        ("README", b"no suffix"),
        ("__meta__/notes.txt", b"not a sample"),
        ("a/0001.jpg", b""),
        (f"{long}.png", b"p" * 512),
        (f"{long}.seg.png", b"s" * 513),
        ("b.c/0000.json", b"{}"),
        ("a/0000.jpg", b"again, later"),
    ]
    path = write_tar(tmp_path / "x.tar", files, form=form)
    imported([path], tmp_path / "out")
    assert list(raw(tmp_path / "out")) == by_webdataset([path])
    assert len(raw(tmp_path / "out")) == 5


names = st.text("aB/._é", min_size=1, max_size=8).filter(
    lambda name: not name.startswith("/") and "//" not in name and not name.endswith("/")
)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=700)), max_size=8),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_any_names_are_grouped_as_webdataset_groups_them(files, form, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    path = write_tar(folder / "x.tar", files, form=form)
    try:
        want = by_webdataset([path])
    except ValueError as error:  # webdataset refuses a sample with a field twice
        reason = str(error)
    else:
        if want:
            imported([path], folder / "out")
            assert list(raw(folder / "out")) == want
        return
    assert "duplicate file name" in reason
    with pytest.raises(ShardError) as caught:
        imported([path], folder / "out")
    assert caught.value.reason == "foreign_sample"


def test_what_img2dataset_wrote_is_streamed_cut_again_merged_and_verified(tmp_path):
    paths = img2dataset(tmp_path / "tars")
    before = {path: path.read_bytes() for path in paths}
    done = imported([tmp_path / "tars"], tmp_path / "a")
    want = by_webdataset(paths)
    assert done.manifest.splits["train"].num_samples == len(want) == 24
    assert (done.skipped, done.repeated) == ({}, None)
    assert list(raw(tmp_path / "a", check="crc")) == want
    assert verify(str(tmp_path / "a"), Quiet()) == []
    recut(tmp_path / "a", tmp_path / "b", num_shards=5, order="shuffle", seed=1)
    assert Counter(map(str, raw(tmp_path / "b"))) == Counter(map(str, want))
    assert verify(str(tmp_path / "b"), Quiet()) == []
    # The copies are tars for everybody, whatever headers the samples brought with them.
    shards = [tmp_path / "b" / s.url for s in require_manifest(str(tmp_path / "b")).shards]
    assert by_webdataset(shards) == list(raw(tmp_path / "b"))
    recut(tmp_path / "b", tmp_path / "c", where="num_bytes < 7000", form="view")
    assert 0 < len(raw(tmp_path / "c")) < 24
    more = write_tar(tmp_path / "more" / "x.tar", [(f"k/{'k' * 90}.txt", b"x")])
    imported([more], tmp_path / "d")
    settings = ReshardSettings(
        sources=(str(tmp_path / "a"), str(tmp_path / "d")), out=str(tmp_path / "e"), num_shards=1
    )
    plan = plan_reshard(ReshardSettings(**{**_fields(settings), "form": "copy"}), Quiet())
    reshard(plan, Quiet())
    assert list(raw(tmp_path / "e")) == want + by_webdataset([more])
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("form", ["copy", "view"])
@pytest.mark.parametrize("out", ["set", "set/train", ".", "link"])
def test_an_output_where_the_source_has_its_tars_is_refused(out, form, tmp_path):
    tars = tmp_path / "set" / "train"
    for i, path in enumerate(img2dataset(tars)):
        path.rename(tars / f"foreign-train-{i:05d}-of-00003.tar")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "else").mkdir()
    imported([tars], tmp_path / "else" / "idx")
    before = {path: path.read_bytes() for path in tars.iterdir()}
    with pytest.raises(ConfigError) as caught:
        recut(tmp_path / "else" / "idx", tmp_path / out, num_shards=3, order="shuffle", form=form)
    assert caught.value.reason == "reshard_in_place"
    assert {path: path.read_bytes() for path in tars.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["train"]


def test_an_output_where_a_split_that_is_not_asked_for_lies_is_refused(tmp_path):
    imported(img2dataset(tmp_path / "set"), tmp_path / "a")
    recut(tmp_path / "a", tmp_path / "b", into={"train": 0.5, "held-out": 0.5})
    recut(tmp_path / "b", tmp_path / "view", form="view", num_shards=1)
    with pytest.raises(ConfigError) as caught:
        recut(tmp_path / "view", tmp_path / "b" / "held-out", split="train")
    assert caught.value.reason == "reshard_in_place"


def test_an_import_into_the_folder_of_its_tars_is_cut_again_elsewhere(tmp_path):
    paths = img2dataset(tmp_path / "set" / "train")
    imported([tmp_path / "set" / "train"], tmp_path / "set")
    assert list(raw(tmp_path / "set")) == by_webdataset(paths)
    recut(tmp_path / "set", tmp_path / "out", num_shards=2)
    assert list(raw(tmp_path / "out")) == by_webdataset(paths)


def _fields(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_states_fit_raw_data_that_was_cut_again(tmp_path):
    img2dataset(tmp_path / "tars")
    write_tar(tmp_path / "tars" / "z.tar", [("long/key/0.txt", b"x"), ("long/key/1.txt", b"y")])
    imported([tmp_path / "tars"], tmp_path / "a")
    recut(tmp_path / "a", tmp_path / "b", num_shards=2)
    first = raw(tmp_path / "a", shuffle=True, tail="wrap", seed=7, batch_size=2)
    want = list(first)
    assert [key for key, _ in want] != sorted(key for key, _ in want)
    for url in ("a", "b"):
        run = raw(tmp_path / url, shuffle=True, tail="wrap", seed=7, batch_size=2)
        iterator = iter(run)
        taken = [next(iterator) for _ in range(9)]
        assert taken == want[:9]
        state = run.state_dict()
        for other in ("a", "b"):
            resumed = raw(tmp_path / other, shuffle=True, tail="wrap", seed=7, batch_size=2)
            resumed.load_state_dict(state)
            assert list(resumed) == want[9:]


def test_states_of_raw_data_read_the_keys_once(tmp_path, monkeypatch):
    img2dataset(tmp_path / "tars")
    imported([tmp_path / "tars"], tmp_path / "out")
    run = raw(tmp_path / "out")
    first = run.state_dict()
    # StatefulDataLoader asks for a state at every batch.
    monkeypatch.setattr(type(run.reader), "column", None)
    assert run.state_dict() == first


def test_ranks_share_raw_samples_and_draws_are_the_samples_own(tmp_path):
    img2dataset(tmp_path / "tars")
    imported([tmp_path / "tars"], tmp_path / "out")

    def decode(sample, rng):
        return sample.key, rng.randint(10**9)

    def stream(rank, world_size):
        options = {"rank": rank, "world_size": world_size, "seed": 3}
        return list(
            RawDataset(
                str(tmp_path / "out"),
                decode=decode,
                batch_size=4 // world_size,
                canonical_ranks=2,
                **options,
            )
        )

    alone = stream(0, 1)
    both = [stream(rank, 2) for rank in range(2)]
    assert len(both[0]) == len(both[1])
    assert sorted(both[0] + both[1]) == sorted(alone)
    assert len({draw for _, draw in alone}) == len(alone)


def test_pickles_are_counted_and_never_given(tmp_path):
    files = [("0.jpg", b"j"), ("0.pyd", b"\x80\x04N."), ("0.x.pkl", b"\x80\x04N."), ("1.txt", b"t")]
    path = write_tar(tmp_path / "x.tar", files)
    done = imported([path], tmp_path / "out")
    assert done.skipped == {"pickle": 2}
    assert [sorted(fields) for _, fields in raw(tmp_path / "out")] == [["jpg"], ["txt"]]


def test_links_folders_and_sparse_files_are_passed_over(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "a", b"", type=tarfile.DIRTYPE)
        add(archive, "a/0.jpg", b"picture")
        add(archive, "a/0.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "a/0.json", b"{}")
        add(archive, "../../out.txt", b"a name that leads outside is a key like any other")
    done = imported([path], tmp_path / "out")
    assert done.skipped == {"no_regular_file": 1}
    assert [(key, sorted(fields)) for key, fields in raw(tmp_path / "out")] == [
        ("a/0", ["jpg", "json"]),
        ("../../out", ["txt"]),
    ]
    assert not (tmp_path.parent / "out.txt").exists()


def test_repeated_keys_are_told(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar", [("0.txt", b"%d" % i)]) for i in range(2)]
    assert imported(paths, tmp_path / "out").repeated == "0"
    assert [fields["txt"] for _, fields in raw(tmp_path / "out")] == [b"0", b"1"]


def damaged(tmp_path, damage):
    path = img2dataset(tmp_path / "tars", shards=1)[0]
    payload = damage(path.read_bytes())
    path.write_bytes(payload)
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: tar[:5000],  # inside a payload
        lambda tar: tar[:512],
        lambda tar: b"",
        lambda tar: b"\x1f\x8b" + tar,
        lambda tar: tar[: len(tar) // 2] + b"junk" * 200,
        lambda tar: tar.replace(b"000000002.jpg", b"000000002.jpgXX", 1),
    ],
)
def test_a_tar_that_is_cut_or_damaged_is_refused(damage, tmp_path):
    path = damaged(tmp_path, damage)
    with pytest.raises(ShardError) as caught:
        imported([path], tmp_path / "out")
    assert caught.value.reason == "foreign_tar"
    assert str(path) in caught.value.where
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        add(archive, "0.txt", b"x" * 4000)
    with pytest.raises(ShardError) as caught:
        imported([tmp_path / "x.tar"], tmp_path / "out")
    assert caught.value.reason == "foreign_tar"


def test_a_tar_that_changes_after_its_import_is_noticed(tmp_path):
    path = img2dataset(tmp_path / "tars", shards=1)[0]
    imported([path], tmp_path / "out")
    payload = bytearray(path.read_bytes())
    payload[1600] ^= 1
    path.write_bytes(payload)
    assert [f.reason for f in verify(str(tmp_path / "out"), Quiet())] == ["shard_sha256"]
    with pytest.raises(ShardError) as caught:
        list(raw(tmp_path / "out", check="crc"))
    assert caught.value.reason == "sample_crc"
    with pytest.raises(ShardError) as caught:
        recut(tmp_path / "out", tmp_path / "b")
    assert caught.value.reason == "sample_crc"


def test_an_import_on_a_cluster_is_that_of_one_machine(tmp_path):
    paths = img2dataset(tmp_path / "tars")
    first = imported(paths, tmp_path / "out")
    with cluster(2) as sent:
        again = imported(paths, tmp_path / "cluster", engine="ray")
    assert (again.sha256, sent) == (first.sha256, list(range(len(paths))))
    names = [set(storage.list_names(str(tmp_path / out))) for out in ("out", "cluster")]
    assert names[0] == names[1]


def test_an_import_continues_and_another_is_refused(tmp_path, monkeypatch):
    paths = img2dataset(tmp_path / "tars")
    first = imported(paths, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    calls = []
    monkeypatch.setattr(foreign, "index_tar", lambda context, task, report: calls.append(task))
    again = imported(paths, tmp_path / "out")
    assert calls == []
    assert again.sha256 == first.sha256
    with pytest.raises(ConflictError) as caught:
        imported(paths[:2], tmp_path / "out")
    assert caught.value.reason == "job_conflict"
    names = [path.name for path in paths]
    assert caught.value.facts["table"].splitlines()[1].split(maxsplit=1)[0] == "tars"
    assert len(names) > 2
    for change, row in (
        ({"name": "other"}, f"NAME {first.manifest.dataset} other"),
        ({"split": "test"}, "SPLIT train test"),
        ({"dots": "last"}, "DOTS first last"),
    ):
        with pytest.raises(ConflictError) as caught:
            imported(paths, tmp_path / "out", **change)
        rows = caught.value.facts["table"].splitlines()[1:]
        assert [" ".join(each.split()) for each in rows] == [row]
    os.utime(paths[0], ns=(0, 0))
    with pytest.raises(ConflictError, match="written since"):
        imported(paths, tmp_path / "out")


def begin_shards(source, out):  # noqa: ARG001 - as begin_reshard
    settings = {"source": "sample", "limit": 8, "cache": str(out.parent / "cache")}
    pipeline.run_job(JobSettings(dataset="pixmo_cap", out=str(out), **settings), Quiet())


def begin_reshard(source, out):
    recut(source, out, num_shards=2)


@pytest.mark.parametrize("begin", [begin_shards, begin_reshard])
def test_an_output_with_an_unfinished_dataset_of_ours_is_refused(begin, tmp_path, monkeypatch):
    tars = img2dataset(tmp_path / "tars")
    imported(tars, tmp_path / "a")
    out = tmp_path / "out"
    swap = storage.compare_and_swap

    def interrupted(url, payload, *, replacing):
        if url.endswith("manifest.json"):
            raise KeyboardInterrupt
        return swap(url, payload, replacing=replacing)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin(tmp_path / "a", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert list((out / "receipts").iterdir())
    with pytest.raises(ConflictError) as caught:
        imported(tars, out)
    assert caught.value.reason == "job_conflict"
    assert caught.value.where == str(out)
    assert "another output" in caught.value.fix
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("tars", [(), ("none",), ("a.tar",), ("x.tar", "./x.tar")])
def test_tars_that_are_not_there_or_twice_are_refused(tars, tmp_path):
    write_tar(tmp_path / "x.tar", [("0.txt", b"x")])
    with pytest.raises(ConfigError) as caught:
        imported([tmp_path / tar for tar in tars], tmp_path / "out")
    assert caught.value.reason == "import_tars"


def test_headers_are_found_where_the_extended_ones_begin(tmp_path):
    long = "x" * 200
    path = write_tar(tmp_path / "x.tar", [("0.txt", b"a"), (f"{long}.txt", b"b")])
    with path.open("rb") as stream:
        files = list(walk_foreign(stream, where=""))
    assert files[1].header == files[0].end
    assert files[1].offset > files[1].header + 512


def test_each_kind_of_dataset_names_the_class_that_streams_it(tiny_dataset, tmp_path):
    from loader import StreamingDataset

    path = write_tar(tmp_path / "x.tar", [("0.txt", b"x")])
    imported([path], tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        StreamingDataset(str(tmp_path / "out"))
    assert caught.value.reason == "raw_dataset"
    with pytest.raises(ConfigError) as caught:
        raw(str(tiny_dataset))
    assert caught.value.reason == "prepared_dataset"


def test_raw_samples_are_prepared_at_load_time(tmp_path, small_jpeg):
    """Fields to a training example: the offline half as an argument, as on the unsharded path."""
    from torch.utils.data import DataLoader

    from loader import MolmoPreprocessor, view_collator
    from preprocess.recipe import Preparer, Recipe
    from preprocess.text.tokens import EMBEDDED, load_tokenizer

    files = []
    for i in range(6):
        files += [(f"{i}.jpg", small_jpeg(i)), (f"{i}.txt", f"a picture, number {i}".encode())]
    imported([write_tar(tmp_path / "x.tar", files)], tmp_path / "out")
    tokenizer = load_tokenizer(EMBEDDED, pad_to=None)
    preprocessor = MolmoPreprocessor(
        Preparer(recipe=Recipe(), tokenizer=tokenizer), special_ids=tokenizer.entry.special_ids
    )

    def example(sample):
        return {
            "image": bytes(sample.fields["jpg"]),
            "message_list": [
                {"text": bytes(sample.fields["txt"]).decode(), "style": "long_caption"}
            ],
            "metadata": {"key": sample.key},
        }

    def decode(sample, rng):
        return preprocessor(example(sample), rng)

    dataset = RawDataset(str(tmp_path / "out"), decode=decode, batch_size=3, seed=1)
    collate = view_collator(
        preprocessor.view, sequence_length=512, pad_token_id=preprocessor.ids.pad
    )
    batches = list(DataLoader(dataset, batch_size=3, collate_fn=collate))
    assert len(batches) == 2
    assert batches[0]["images"].shape[0] == 3
    texts = [
        tokenizer.decode([t for t in row.tolist() if t >= 0])
        for batch in batches
        for row in batch["labels"]
    ]
    assert all(any(f"number {i}" in text for text in texts) for i in range(6))


def test_tars_without_a_sample_are_not_a_dataset(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("README", b"x")])
    with pytest.raises(ConfigError) as caught:
        imported([path], tmp_path / "out")
    assert caught.value.reason == "import_tars"
    other = write_tar(tmp_path / "y.tar", [("0.txt", b"x")])
    imported([path, other], tmp_path / "out")
    assert len(raw(tmp_path / "out")) == 1


def test_folders_of_other_files_hold_no_tars(tmp_path):
    Path(tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        imported([tmp_path / "folder"], tmp_path / "out")
    assert caught.value.reason == "import_tars"


@pytest.mark.parametrize("form", ["gnu", "posix"])
@pytest.mark.parametrize("last", ["b.bin", "c.txt"])
def test_files_with_holes_are_passed_over_wherever_they_stand(form, last, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"first")
    with (folder / "b.bin").open("wb") as stream:
        stream.truncate(10 * 2**20)
        stream.seek(5 * 2**20)
        stream.write(b"x")
    (folder / "c.txt").write_bytes(b"last")
    names = ["a.txt", "b.bin", "c.txt"] if last == "c.txt" else ["a.txt", "b.bin"]
    tar = tmp_path / "holes.tar"
    command = ["tar", "--sparse", f"--format={form}", "-cf", str(tar), *names]
    subprocess.run(command, cwd=folder, check=True)
    assert tar.stat().st_size < 2**20
    done = imported([tar], tmp_path / "out")
    assert done.skipped == {"no_regular_file": 1}
    assert [key for key, _ in raw(tmp_path / "out")] == [n[0] for n in names if n != "b.bin"]


@pytest.mark.slow
def test_walking_a_tar_holds_none_of_its_headers(tmp_path):
    path = write_tar(tmp_path / "many.tar", [(f"{i:06d}.x", b"") for i in range(20_000)])
    with path.open("rb") as stream:
        tracemalloc.start()
        assert sum(1 for _ in walk_foreign(stream, where="")) == 20_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**20


def test_a_sample_of_one_file_beyond_4_gib_is_refused():
    long = ForeignFile(key="a", suffix="bin", header=0, offset=512, num_bytes=2**32 - 512)
    with pytest.raises(ShardError) as caught:
        index_rows([long], where="x.tar")
    assert caught.value.reason == "foreign_sample"


def test_a_folder_without_tars_is_named_and_not_passed_over(tmp_path):
    img2dataset(tmp_path / "tars")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        imported([tmp_path / "tars", tmp_path / "empty"], tmp_path / "out")
    assert caught.value.reason == "import_tars"
    assert caught.value.where == str(tmp_path / "empty")


@pytest.mark.parametrize("wrong", [{"name": "../../x"}, {"name": "A.b"}, {"split": "a/b"}])
def test_names_that_lead_elsewhere_are_refused(wrong, tmp_path):
    img2dataset(tmp_path / "tars")
    before = sorted(tmp_path.rglob("*"))
    options = {"name": "foreign", "split": "train", **wrong}
    with pytest.raises(ConfigError) as caught:
        import_tars(
            ImportSettings(tars=(str(tmp_path / "tars"),), out=str(tmp_path / "out"), **options),
            Quiet(),
        )
    assert caught.value.reason == "dataset_name"
    assert sorted(tmp_path.rglob("*")) == before


def test_of_two_imports_into_one_output_the_later_one_leaves_the_first(tmp_path, monkeypatch):
    ours = img2dataset(tmp_path / "ours", samples=2)
    theirs = img2dataset(tmp_path / "theirs", samples=5)

    @contextmanager
    def output_lock(url):
        monkeypatch.undo()
        imported(theirs, url)  # it began and ended just before this one got the output
        with real(url) as check:
            yield check

    real = foreign.output_lock
    monkeypatch.setattr(foreign, "output_lock", output_lock)
    with pytest.raises(ConflictError) as caught:
        imported(ours, tmp_path / "out")
    assert caught.value.reason == "job_conflict"
    assert [key for key, _ in raw(tmp_path / "out")] == [key for key, _ in by_webdataset(theirs)]


# --- what is more often a mistake than meant


def census_of(out, i=0):
    return json.loads(sorted((out / "import").iterdir())[i].read_bytes())


def test_samples_of_one_kind_leave_nothing_to_note(tmp_path):
    assert imported(img2dataset(tmp_path / "tars"), tmp_path / "out").notes == ()


def test_scattered_samples_are_counted_and_named(tmp_path):
    files = [(f"{i}.jpg", b"j") for i in range(5)] + [(f"{i}.txt", b"t") for i in range(4)]
    path = write_tar(tmp_path / "x.tar", files)
    done = imported([path], tmp_path / "out")
    assert done.manifest.splits["train"].num_samples == 9
    assert list(raw(tmp_path / "out")) == by_webdataset([path])
    assert done.notes[0].startswith("4 keys come again in the same tar")
    assert done.notes[0].endswith(f"first 0 in {path}")
    assert done.notes[-1] == f"all of these are named in {tmp_path / 'out' / 'import'}"
    assert census_of(tmp_path / "out")["scattered"] == ["0", "1", "2", "3"]


def test_scattered_samples_at_the_border_of_two_others(tmp_path):
    files = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("c.jpg", b"4"), ("c.txt", b"5")]
    imported([write_tar(tmp_path / "x.tar", files)], tmp_path / "out")
    assert census_of(tmp_path / "out")["scattered"] == ["a"]


FRAMES = [(f"22.0{i}.png", b"frame %d" % i) for i in (5, 6, 7)]


def test_dots_in_names_are_split_as_webdataset_does_with_a_note(tmp_path):
    path = write_tar(tmp_path / "x.tar", FRAMES)
    done = imported([path], tmp_path / "out")
    assert list(raw(tmp_path / "out")) == by_webdataset([path])
    assert len(raw(tmp_path / "out")) == 1
    assert f"first 22.05.png and 22.06.png in {path}" in done.notes[0]
    assert "DOTS=last" in done.notes[0]
    assert census_of(tmp_path / "out")["dotted"] == [
        {"key": "22", "fields": ["05.png", "06.png", "07.png"]}
    ]


def test_last_dot_can_end_the_key(tmp_path):
    files = [*FRAMES, ("d.e/A.B.JPG", b"j"), ("d.e/A.B.txt", b"t"), ("plain.txt", b"p")]
    path = write_tar(tmp_path / "x.tar", files)
    done = imported([path], tmp_path / "out", dots="last")
    want = [
        *((name[:-4], {"png": payload}) for name, payload in FRAMES),
        ("d.e/A.B", {"jpg": b"j", "txt": b"t"}),
        ("plain", {"txt": b"p"}),
    ]
    assert list(raw(tmp_path / "out")) == want
    assert not any("DOTS" in note for note in done.notes)
    recut(tmp_path / "out", tmp_path / "b", num_shards=2)
    assert list(raw(tmp_path / "b")) == want
    with pytest.raises(ConflictError):
        imported([path], tmp_path / "out")


def test_unknown_rule_for_dots_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        ImportSettings(tars=("x.tar",), out=str(tmp_path), name="x", dots="second")
    assert caught.value.facts == {"dots": "second"}


@pytest.mark.parametrize(
    "fields",
    [("jpg", "cls.txt"), ("0.jpg", "1.jpg", "2.jpg"), ("left.png", "right.png", "json"), ("png",)],
)
def test_fields_that_every_sample_has_may_have_dots(fields, tmp_path):
    files = [(f"{i}.{name}", b"x") for i in range(4) for name in fields]
    assert imported([write_tar(tmp_path / "x.tar", files)], tmp_path / "out").notes == ()


def test_samples_that_lack_a_field_are_counted_and_named(tmp_path):
    files = []
    for i in range(10):
        files += [(f"{i}.jpg", b"j"), (f"{i}.txt", b"t"), (f"{i}.json", b"{}")]
    lacking = [file for file in files if file[0] not in ("3.txt", "7.txt", "7.json")]
    paths = [
        write_tar(tmp_path / "a.tar", lacking),
        write_tar(tmp_path / "b.tar", [f for f in files if not f[0].endswith("json")]),
        *(write_tar(tmp_path / f"{name}.tar", files) for name in "cde"),
    ]
    done = imported(paths, tmp_path / "out")
    assert done.notes[:2] == (
        f"11 of 50 samples lack the field json; first 7 in {paths[0]}",
        f"2 of 50 samples lack the field txt; first 3 in {paths[0]}",
    )
    found = census_of(tmp_path / "out")["kinds"]
    assert found == [
        {"fields": ["jpg", "json", "txt"], "num_samples": 8, "keys": ["0"]},
        {"fields": ["jpg", "json"], "num_samples": 1, "keys": ["3"]},
        {"fields": ["jpg"], "num_samples": 1, "keys": ["7"]},
    ]


def test_rare_fields_are_named(tmp_path):
    files = [(f"{i}.txt", b"t") for i in range(6)] + [("6.txt", b"t"), ("6.note", b"n")]
    done = imported([write_tar(tmp_path / "x.tar", files)], tmp_path / "out")
    assert done.notes[0] == "fewer than half of the samples have the fields note (1)"


def test_resumed_import_has_the_same_notes(tmp_path):
    paths = [write_tar(tmp_path / "x.tar", FRAMES), *img2dataset(tmp_path / "tars", shards=1)]
    first = imported(paths, tmp_path / "out")
    assert first.notes
    assert imported(paths, tmp_path / "out").notes == first.notes


distinct = st.lists(st.tuples(names, st.binary(max_size=9)), max_size=8, unique_by=lambda f: f[0])


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=distinct)
def test_any_names_are_read_back_by_the_last_dot(files, tmp_path_factory):
    """What a reader finds by the index's key is what the names say."""
    folder = tmp_path_factory.mktemp("names")
    try:
        imported([write_tar(folder / "x.tar", files)], folder / "out", dots="last")
    except (ConfigError, ShardError):
        return  # no sample, or names that differ in case only
    known = {}
    for name, payload in files:
        key, _, suffix = name.rpartition(".")
        known[key, suffix.lower()] = payload
    got = [((key, n), v) for key, fields in raw(folder / "out") for n, v in fields.items()]
    assert got
    assert all(known[name] == payload for name, payload in got)
