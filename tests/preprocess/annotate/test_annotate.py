"""Columns joined by key: every type and format, and every way in which a file may not fit."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.reading import ShardReader
from loader.state.fingerprint import split_fingerprint
from preprocess.__main__ import main
from preprocess.annotate import AnnotateSettings, annotate, parse_fills, plan_annotation, read_table
from preprocess.annotate.join import join
from preprocess.annotate.table import ColumnTable
from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.job import find_strays, verify
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec.errors import ConfigError, ConflictError, ShardError, SourceError
from shardspec.manifest import require_manifest
from tests.inline import Quiet

NUM = 20

pytestmark = pytest.mark.usefixtures("in_this_process")


def row(i):
    return {
        "key": f"sample-{i:04d}",
        "score": i / 20,
        "licence": ("cc0", "cc-by-größer")[i % 2],
        "clean": i % 3 == 0,
        "rank": i - 2**40,
        "clip": [i / 2, -1.0, 3.0],
    }


ROWS = [row(i) for i in range(NUM)]
FLAT = [{name: value for name, value in each.items() if name != "clip"} for each in ROWS]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return str(path)


@pytest.fixture(scope="module")
def source(tiny_sample, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotate") / "set"
    return write_dataset(folder, [tiny_sample(i) for i in range(NUM)], num_shards=3)


def add(source, columns, out=None, **options):
    wanted = AnnotateSettings(
        src=str(source), columns=str(columns), dst=out and str(out), **options
    )
    return annotate(plan_annotation(wanted, Quiet()), Quiet())


def refused(source, rows, tmp_path, *, name="c.jsonl", error=ConfigError, **options):
    with pytest.raises(error) as caught:
        add(source, write(tmp_path / name, rows), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    return caught.value


def values(url, names, split="train"):
    """The columns of all samples in order, by key."""
    reader = ShardReader(str(url), require_manifest(str(url)), split=split)
    found = reader.columns(["key", *names], np.arange(len(reader)))
    keys = [key.decode() for key in found["key"].tolist()]
    return {key: [found[name][i].tolist() for name in names] for i, key in enumerate(keys)}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_every_format_gives_the_same_values(ending, source, tmp_path):
    rows = FLAT if ending == "csv" else ROWS
    done = add(source, write(tmp_path / f"c.{ending}", rows[::-1]), tmp_path / "out")
    names = [name for name in rows[0] if name != "key"]
    want = {
        each["key"]: [v.encode() if isinstance(v, str) else v for v in list(each.values())[1:]]
        for each in rows
    }
    assert values(tmp_path / "out", names) == want
    types = {"score": "float64", "licence": "text[14]", "clean": "bool", "rank": "int64"}
    types |= {} if ending == "csv" else {"clip": "float32[3]"}
    assert done.manifest.columns.types == types


def test_order_keys_and_fingerprint_are_those_of_the_source(source, tmp_path):
    before = {p: p.read_bytes() for p in sorted(Path(source).rglob("*")) if p.is_file()}
    add(source, write(tmp_path / "c.jsonl", ROWS), tmp_path / "out")
    assert {p: p.read_bytes() for p in sorted(Path(source).rglob("*")) if p.is_file()} == before
    prints = []
    for url in (source, str(tmp_path / "out")):
        manifest = require_manifest(url)
        reader = ShardReader(url, manifest, split="train", check="crc")
        prints.append(split_fingerprint(manifest, reader, split="train", num_samples=NUM))
        assert [reader.read(i).key for i in range(NUM)] == [each["key"] for each in ROWS]
    assert prints[0] == prints[1]
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_the_same_command_has_nothing_to_do_and_another_is_refused(source, tmp_path):
    first = add(source, write(tmp_path / "c.jsonl", ROWS), tmp_path / "out")
    again = add(source, tmp_path / "c.jsonl", tmp_path / "out")
    assert (first.fresh, again.fresh) == (True, False)
    assert first.sha256 == again.sha256
    with pytest.raises(ConflictError) as caught:
        add(source, write(tmp_path / "d.jsonl", ROWS[::-1]), tmp_path / "out")
    assert caught.value.reason == "job_conflict"
    with pytest.raises(ConfigError) as caught:
        add(source, tmp_path / "c.jsonl", source)
    assert caught.value.reason == "reshard_in_place"


def test_the_output_is_beside_the_source_by_default(source, tmp_path):
    shutil.copytree(source, tmp_path / "set")
    add(f"{tmp_path}/set/", write(tmp_path / "c.jsonl", ROWS))
    assert (tmp_path / "set-annotated" / "manifest.json").exists()


def test_samples_without_a_row_are_counted_and_filled_only_as_stated(source, tmp_path):
    given = FLAT[:-3]
    error = refused(source, given, tmp_path)
    assert error.reason == "columns_incomplete"
    assert "3 of 20" in str(error)
    assert "sample-0017" in str(error)
    part = {"score": "nan", "licence": "none"}
    assert refused(source, given, tmp_path, missing=part).facts["count"] == 3
    fills = parse_fills("score=nan,licence=a text that is longer,clean=true,rank=-1")
    done = add(source, tmp_path / "c.jsonl", tmp_path / "out", missing=fills)
    found = values(tmp_path / "out", ["score", "licence", "clean", "rank"])
    assert math.isnan(found["sample-0019"][0])
    assert found["sample-0019"][1:] == [b"a text that is longer", True, -1]
    assert found["sample-0016"][:2] == [0.8, b"cc0"]
    noted = done.manifest.splits["train"].source["filled"]
    assert noted["score"] == {"samples": 3, "value": "nan"}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_missing_values_are_counted_by_column(ending, source, tmp_path):
    rows = [{**each, "score": None if i < 2 else each["score"]} for i, each in enumerate(FLAT)]
    error = refused(source, rows, tmp_path, name=f"c.{ending}")
    assert error.reason == "columns_incomplete"
    assert (error.facts["column"], error.facts["count"]) == ("score", 2)
    add(source, tmp_path / f"c.{ending}", tmp_path / "out", missing={"score": "0.25"})
    assert values(tmp_path / "out", ["score"])["sample-0001"] == [0.25]


def test_a_file_without_rows_may_fill_everything(source, tmp_path):
    (tmp_path / "c.csv").write_text("key,score\n")
    with pytest.raises(ConfigError) as caught:
        add(source, tmp_path / "c.csv", tmp_path / "out", missing={"score": "1"})
    assert caught.value.reason == "columns_type"  # of no values, a CSV has no type


@pytest.mark.parametrize(
    "fills, reason",
    [
        ("scores=nan", "columns_fill"),
        ("score=high", "columns_fill"),
        ("clean=2", "columns_fill"),
        ("rank=1.5", "columns_fill"),
        ("licence=" + "x" * 257, "columns_fill"),
    ],
)
def test_stated_values_that_do_not_fit_are_refused(fills, reason, source, tmp_path):
    every = {"score": "0", "clean": "true", "rank": "0", "licence": ""}
    error = refused(source, FLAT[:-1], tmp_path, missing={**every, **parse_fills(fills)})
    assert error.reason == reason


@pytest.mark.parametrize("text", ["nan", "score=1,score=2", "=1", ""])
def test_stated_values_that_cannot_be_parsed_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_fills(text)
    assert caught.value.reason == "columns_fill"


def test_keys_of_no_sample_are_refused_or_counted(source, tmp_path):
    rows = [*FLAT, {**FLAT[0], "key": "stranger"}]
    error = refused(source, rows, tmp_path)
    assert error.reason == "columns_unknown_keys"
    assert error.facts["first"] == ["stranger"]
    settings = AnnotateSettings(
        src=source,
        columns=str(tmp_path / "c.jsonl"),
        dst=str(tmp_path / "out"),
        unknown_keys="ignore",
    )
    plan = plan_annotation(settings, Quiet())
    assert plan.joined["train"].num_unknown == 1
    annotate(plan, Quiet())
    assert len(values(tmp_path / "out", ["score"])) == NUM


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([*FLAT, FLAT[3]], "columns_key"),
        ([{"name": "a", "score": 1}], "columns_key"),
        ([{"key": 7, "score": 1}], "columns_key"),
        ([{"key": None, "score": 1}, *FLAT], "columns_key"),
        ([{"key": "a"}], "columns_names"),
        ([{"key": "a", "num_tokens": 1}], "columns_names"),
        ([{"key": "a", "my score": 1}], "columns_names"),
        ([{"key": "a", "not": 1}], "columns_names"),
        ([{"key": "a", "score": {"x": 1}}], "columns_type"),
        ([{"key": "a", "score": None}], "columns_type"),
        ([{"key": "a", "score": "x" * 257}], "columns_type"),
        ([{"key": "a", "score": "a\0b"}], "columns_type"),
        ([{"key": "a", "clip": [1, 2]}, {"key": "b", "clip": [1]}], "columns_type"),
        ([{"key": "a", "clip": ["x"]}], "columns_type"),
        ([{"key": "a", "clip": [1.0, None]}], "columns_type"),
        ([{"key": "a", "clip": []}], "columns_type"),
    ],
)
def test_rows_that_cannot_be_columns_are_refused_by_name(rows, reason, source, tmp_path):
    assert refused(source, rows, tmp_path).reason == reason


def test_integers_beyond_64_bits_and_repeated_names_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"key": ["a"], "big": pa.array([2**63], pa.uint64())})
    pq.write_table(table, tmp_path / "big.parquet")
    with pytest.raises(ConfigError) as caught:
        read_table(str(tmp_path / "big.parquet"))
    assert caught.value.reason == "columns_type"
    (tmp_path / "twice.csv").write_text("key,a,a\nx,1,2\n")
    with pytest.raises(ConfigError) as caught:
        read_table(str(tmp_path / "twice.csv"))
    assert caught.value.reason == "columns_names"


def test_other_arrow_types_of_the_same_values_are_taken(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "key": pa.array(["b", "a"]).dictionary_encode(),
        "small": pa.array([1, 2], pa.int8()),
        "half": pa.array(np.array([0.5, 1], np.float16)),
        "text": pa.array(["x", "yz"], pa.large_string()),
        "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    table = read_table(str(tmp_path / "c.parquet"))
    assert table.keys.tolist() == [b"b", b"a"]
    found = {name: (v.dtype.str, v.tolist()) for name, v in table.values.items()}
    assert found == {
        "small": ("<i8", [1, 2]),
        "half": ("<f8", [0.5, 1.0]),
        "text": ("|S2", [b"x", b"yz"]),
        "fixed": ("<i8", [[1, 2], [3, 4]]),
    }


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize(
    ("values", "is_exact"),
    [
        ([2**64 - 1, 1, 2], False),
        ([2**53 + 1, 0.5, 2], False),
        ([-(2**63) - 1, 1, 2], False),
        ([10**30, 1, 2], False),
        ([2**63, 1, 2], True),
        ([2**63 - 1, 1, 2], True),
        ([1e30, 1.5, 2.0], True),
        ([2.0**60 + 4096, 0.5, 1e300], True),
    ],
)
def test_no_integer_is_rounded_in_silence(source, tmp_path, ending, values, is_exact):
    rows = [{"key": each["key"], "hash": values[i % 3]} for i, each in enumerate(FLAT)]
    if is_exact:
        add(source, write(tmp_path / f"c.{ending}", rows), tmp_path / "out")
        reader = ShardReader(
            str(tmp_path / "out"), require_manifest(str(tmp_path / "out")), split="train"
        )
        assert reader.column("hash", np.arange(3)).tolist() == values
    else:
        error = refused(source, rows, tmp_path, name=f"c.{ending}")
        assert error.reason == "columns_type"
        assert "rounded" in str(error)


def test_a_parquet_file_under_another_name_is_refused(source, tmp_path):
    shutil.move(write(tmp_path / "c.parquet", FLAT), tmp_path / "c.csv")
    with pytest.raises(SourceError) as caught:
        add(source, tmp_path / "c.csv", tmp_path / "out")
    assert caught.value.reason == "columns_file"


@pytest.mark.parametrize("name", ["c.txt", "missing.csv", "broken.parquet", "broken.jsonl"])
def test_a_file_that_cannot_be_read_is_refused_by_name(name, source, tmp_path):
    if not name.startswith("missing"):
        (tmp_path / name).write_text('{"key": ')
    with pytest.raises(SourceError) as caught:
        read_table(str(tmp_path / name))
    assert caught.value.reason == "columns_file"


def test_numbers_of_a_csv_with_leading_zeros_stay_as_they_are_written(tmp_path):
    cells = {
        "code": ["007", "12"],
        "part": ["00.5", "1.5"],
        "signed": ["-01", "3"],
        "plain": ["0", "-0.5"],
        "whole": ["0", "10"],
    }
    rows = [",".join(["key", *cells])]
    rows += [",".join([f"k{i}", *(each[i] for each in cells.values())]) for i in range(2)]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    found = {
        name: each.tolist() for name, each in read_table(str(tmp_path / "c.csv")).values.items()
    }
    want = {name: [cell.encode() for cell in each] for name, each in cells.items()}
    assert found == {**want, "plain": [0.0, -0.5], "whole": [0, 10]}


@pytest.mark.parametrize("cells", [["cc0", ""], ["007", ""], ["1", ""]])
def test_empty_cell_of_a_csv_is_missing(cells, source, tmp_path):
    (tmp_path / "c.csv").write_text(
        "key,code\n" + "".join(f"sample-{i:04d},{cells[i % 2]}\n" for i in range(NUM))
    )
    with pytest.raises(ConfigError) as caught:
        add(source, tmp_path / "c.csv", tmp_path / "out")
    assert caught.value.reason == "columns_incomplete"
    add(source, tmp_path / "c.csv", tmp_path / "out", missing={"code": "5"})
    whole = cells[0] == "1"
    want = [1, 5] if whole else [cells[0].encode(), b"5"]
    found = values(tmp_path / "out", ["code"])
    assert [found[f"sample-{i:04d}"] for i in (0, 1)] == [[each] for each in want]


def test_keys_of_a_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "c.csv").write_text("key,score\n0012,1\n12,2\n")
    assert read_table(str(tmp_path / "c.csv")).keys.tolist() == [b"0012", b"12"]


KEYS = st.lists(st.sampled_from("abcdefghij"), max_size=8)


@given(samples=KEYS, rows=st.dictionaries(st.sampled_from("abcdefghij"), st.none() | st.integers()))
def test_a_join_is_a_look_up_by_key(samples, rows):
    rows = {key: value for key, value in rows.items() if value is None or abs(value) < 2**63}
    table = ColumnTable(
        where="x",
        sha256="",
        keys=np.array([key.encode() for key in rows], "S1"),
        values={"v": np.array([value or 0 for value in rows.values()], np.int64)},
        present={"v": np.array([value is not None for value in rows.values()], np.bool_)},
    )
    keys = np.array([key.encode() for key in samples], "S60")
    joined = join(table, keys, fills={"v": "-7"}, unknown="ignore")
    want = [rows.get(key) for key in samples]
    assert joined.values["v"].tolist() == [-7 if value is None else value for value in want]
    assert joined.missing["v"].tolist() == [value is None for value in want]
    assert joined.num_unknown == len(set(rows) - set(samples))
    if None in want:
        with pytest.raises(ConfigError) as caught:
            join(table, keys, fills={}, unknown="ignore")
        assert caught.value.reason == "columns_incomplete"


@pytest.fixture(scope="module")
def annotated(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    add(source, write(folder / "c.jsonl", ROWS), folder / "out")
    return folder / "out"


def test_columns_are_added_to_an_annotated_dataset(annotated, tmp_path):
    more = [{"key": each["key"], "phash": f"{i:016x}"} for i, each in enumerate(ROWS)]
    add(annotated, write(tmp_path / "more.jsonl", more), tmp_path / "out")
    found = values(tmp_path / "out", ["score", "phash"])
    assert found["sample-0003"] == [0.15, b"%016x" % 3]
    again = [{"key": each["key"], "score": 1.0} for each in ROWS]
    with pytest.raises(ConfigError) as caught:
        add(annotated, write(tmp_path / "again.jsonl", again), tmp_path / "other")
    assert caught.value.reason == "columns_names"


def recut(sources, out, **options):
    sources = tuple(map(str, sources))
    settings = ReshardSettings(sources=sources, out=str(out), **options)
    return reshard(plan_reshard(settings, Quiet()), Quiet())


NAMES = ["score", "licence", "clip"]


@pytest.mark.parametrize("form", ["view", "copy"])
@pytest.mark.parametrize(
    "request_",
    [
        {"num_shards": 2, "order": "shuffle"},
        {"order": "length"},
        {"where": "score >= 0.3 and licence == 'cc0' and not clean"},
        {"into": {"train": 0.5, "rest": 0.5}},
    ],
)
def test_columns_go_along_with_their_samples(form, request_, annotated, tmp_path):
    want = values(annotated, NAMES)
    recut([annotated], tmp_path / "out", form=form, **request_)
    manifest = require_manifest(str(tmp_path / "out"))
    found = {}
    for split in manifest.splits:
        found |= values(tmp_path / "out", NAMES, split=split)
    assert found == {key: want[key] for key in found}
    if "where" in request_:
        kept = [e for e in ROWS if e["score"] >= 0.3 and e["licence"] == "cc0" and not e["clean"]]
        assert list(found) == [each["key"] for each in kept]
    else:
        assert len(found) == NUM
    assert [e.reason for e in verify(str(tmp_path / "out"), Quiet())] == ["tokenizer_file"]


def test_datasets_with_the_same_columns_are_merged_and_others_refused(
    annotated, source, tiny_sample, write_dataset, tmp_path
):
    write_dataset(tmp_path / "b", [tiny_sample(i) for i in range(30, 34)])
    rows = [{**row(i), "licence": "a licence with a long name"} for i in range(30, 34)]
    add(tmp_path / "b", write(tmp_path / "b.jsonl", rows), tmp_path / "b2")
    recut([annotated, tmp_path / "b2"], tmp_path / "both")
    found = values(tmp_path / "both", ["licence", "score"])
    assert found["sample-0031"] == [b"a licence with a long name", 31 / 20]
    assert found["sample-0004"] == [b"cc0", 0.2]
    for sources in ([annotated, tmp_path / "b"], [tmp_path / "b", annotated]):
        with pytest.raises(ConflictError) as caught:
            recut(sources, tmp_path / "no")
        assert caught.value.reason == "columns_conflict"


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda p: p.unlink(), "columns_missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\7"), "columns_sha256"),
        (lambda p: p.write_bytes(b""), "columns_sha256"),
    ],
)
def test_damaged_files_are_found_wherever_they_are_read(damage, reason, annotated, tmp_path):
    shutil.copytree(annotated.parent, tmp_path / "copy")
    broken = tmp_path / "copy" / "out"
    # A view beside its source: this copy's files are the originals' by their full path.
    manifest = (broken / "manifest.json").read_text()
    (broken / "manifest.json").write_text(manifest.replace('"../', f'"{annotated.parent}/'))
    damage(sorted(broken.rglob("*.columns.npy"))[1])
    assert reason in [e.reason for e in verify(str(broken), Quiet())]
    for read in (
        lambda: values(broken, ["score"]),
        lambda: recut([broken], tmp_path / "new"),
    ):
        with pytest.raises(ShardError) as caught:
            read()
        assert caught.value.reason == reason


def test_gc_keeps_the_files_and_removes_those_of_no_manifest(annotated, tmp_path):
    shutil.copytree(annotated, tmp_path / "out")
    (stray,) = [p for p in (tmp_path / "out").rglob("*00000-of-00003.columns.npy")]
    shutil.copyfile(stray, stray.with_name("tiny-train-00000-of-00009.columns.npy"))
    found = find_strays(str(tmp_path / "out"))
    assert [each.name for each in found.objects] == ["train/tiny-train-00000-of-00009.columns.npy"]


def test_imported_tars_can_be_annotated(source, tmp_path):
    settings = ImportSettings(tars=(f"{source}/train",), out=str(tmp_path / "raw"), name="raw")
    import_tars(settings, Quiet())
    add(tmp_path / "raw", write(tmp_path / "c.jsonl", ROWS), tmp_path / "out")
    assert values(tmp_path / "out", ["score"])["sample-0005"] == [0.25]
    recut([tmp_path / "out"], tmp_path / "few", where="score > 0.5")
    assert len(values(tmp_path / "few", ["clean"])) == 9


def test_the_command_line_and_make_take_the_same_settings(source, tmp_path, capsys):
    columns = write(tmp_path / "c.jsonl", [*FLAT[:-1], {**FLAT[0], "key": "stranger"}])
    fills = "score=nan,licence=unknown,clean=false,rank=0"
    out = str(tmp_path / "out")
    given = [f"SRC={source}", f"COLUMNS={columns}", f"DST={out}", f"MISSING={fills}"]
    assert main(["make", "annotate", *given]) == 1
    assert "1 of 20 keys" in capsys.readouterr().err
    assert main(["make", "annotate", *given, "UNKNOWN_KEYS=ignore"]) == 0
    shown = capsys.readouterr().out
    assert "train has 20 samples" in shown
    assert "score: 1 missing, stated as 'nan'" in shown
    assert "1 row of" in shown
    flags = ["--columns", columns, "--dst", out, "--missing", fills, "--unknown-keys", "ignore"]
    assert main(["annotate", source, *flags]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["filter", "annotate"])
def test_no_split_is_built_into_a_view(verb, tiny_dataset, tmp_path, capsys):
    # The manifest that a build writes has neither views nor columns: it would lose these.
    out = str(tmp_path / "out")
    reader = ShardReader(str(tiny_dataset), require_manifest(str(tiny_dataset)), split="train")
    keys = [key.decode() for key in reader.column("key", np.arange(len(reader))).tolist()]
    if verb == "filter":
        recut([tiny_dataset], out, where="num_tokens > 0", form="view")
    else:
        columns = write(tmp_path / "c.jsonl", [{"key": key, "score": 1} for key in keys])
        add(tiny_dataset, columns, out)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    asked = ["--source", "sample", "--limit", "4", "--split", "validation", "--workers", "1"]
    asked += ["--out", out, "--cache", str(tmp_path / "cache")]
    assert main(["shards", "pixmo_cap", *asked]) == 3
    told = {"filter": "a view of other shards", "annotate": "added columns"}
    assert told[verb] in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "out" / "validation").exists()
