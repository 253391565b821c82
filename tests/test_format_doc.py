"""docs/format.md agrees with the code: names, numbers and reason codes."""

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from shardspec import columns, index, manifest, media, sample, tar
from shardspec.messages import messages

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "format.md").read_text()


def section(title: str) -> str:
    """Cuts out a section, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def table(text: str, head: str) -> dict[str, list[str]]:
    """Reads the table with this first heading: each name of the first column to its other cells."""
    lines = text.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    rows = {}
    for line in lines:
        first, *rest = [cell.strip() for cell in line.strip("|").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first) or [first]:
            rows[name] = rest
    return rows


def names(kind) -> list[str]:
    return [field.name for field in fields(kind)]


def test_version_is_the_codes():
    assert f"# The on-disk format, version {manifest.FORMAT_VERSION}\n" in TEXT
    assert table(section("The manifest"), "field")["format_version"] == [
        f"{manifest.FORMAT_VERSION}"
    ]
    assert f"* Version {manifest.FORMAT_VERSION} is this page without the section on views" in TEXT


def test_index_columns_and_their_types_are_the_codes_in_order():
    described = {name: cells[0] for name, cells in table(section("The index"), "column").items()}
    dtype = np.dtype([(name, text.strip("`")) for name, text in described.items()])
    assert dtype == index.INDEX_DTYPE
    assert f"a row of {index.INDEX_DTYPE.itemsize} bytes" in section("The index")


def test_columns_of_clips_are_the_codes():
    for name in index.HEAD_COLUMNS:
        assert index.index_dtype(1, clips=True)[name] == np.dtype("<u4")
        assert f"| `{name}` | `<u4` |" in section("The index")


@pytest.mark.parametrize(
    "head, kind",
    [
        ("of a shard", manifest.ShardEntry),
        ("of a split", manifest.SplitEntry),
        ("of the tokenizer", manifest.TokenizerEntry),
    ],
)
def test_manifest_entries_have_the_fields_of_the_code(head, kind):
    assert sorted(table(section("The manifest"), head)) == sorted(names(kind))


def test_manifest_has_the_fields_of_the_code():
    described = set(table(section("The manifest"), "field"))
    stored = set(names(manifest.Manifest)) - {"shards"}
    assert described == stored | {"shardlist", "format_version", "digest"}


def test_views_and_raw_datasets_are_the_codes():
    said = section("Views and raw datasets")
    assert f"Manifests of version {manifest.EXTENDED_VERSION}" in said
    assert f"Version {manifest.EXTENDED_VERSION} is version {manifest.FORMAT_VERSION} with" in TEXT
    assert sorted(table(said, "of a file")) == sorted(names(manifest.FileEntry))
    assert {f"`{name}`" for name in names(manifest.View)} <= set(re.findall("`[^`]+`", said))
    for name in index.raw_index_dtype(1).names:
        assert f"`{name}`" in said


def test_added_columns_are_the_codes():
    said = section("Added columns")
    for kind in (manifest.AddedColumns, manifest.ColumnFile):
        assert {f"`{name}`" for name in names(kind)} <= set(re.findall("`[^`]+`", said))
    kinds = {
        name.replace("N", "7"): cells[0].replace("N", "7").strip("`").lstrip("\\")
        for name, cells in table(said, "type").items()
    }
    for kind, stored in kinds.items():
        base, _, length = stored.partition("` [")
        want = np.dtype((base, (7,))) if length else np.dtype(base)
        assert columns.columns_dtype({"x": kind})["x"] == want
        assert columns.type_problems({"x": kind}) == []
    assert f"1 to {columns.MAX_NAME_CHARACTERS} letters" in said
    assert f"at most {columns.MAX_TEXT_BYTES}" in said
    assert f"at most {columns.MAX_VECTOR:,} numbers" in said


def test_receipt_has_the_fields_of_the_code():
    said = section("The manifest").split("A *receipt*")[1]
    assert {f"`{name}`" for name in names(manifest.Receipt)} <= set(re.findall("`[^`]+`", said))


def test_codecs_and_member_suffixes_are_the_codes():
    described = {
        name: cells[0].strip("`") for name, cells in table(section("The sample"), "codec").items()
    }
    assert described.pop("lossless") == "png` or `webp"
    assert described == dict(sample.CODEC_SUFFIX)
    lossless = {
        name
        for name, cells in table(section("The sample"), "codec").items()
        if "lossless" in cells[1] or "uncompressed" in cells[1]
    }
    assert lossless == set(sample.LOSSLESS_CODECS)


def test_members_of_a_sample_are_the_codes_in_order():
    image = sample.PreparedImage(
        pixels=np.zeros((1, 1, 3), np.uint8), source_width=1, source_height=1
    )
    tiled = replace(image, overview=np.zeros((1, 1, 3), np.uint8))
    described = list(table(section("The sample"), "member"))

    clip = sample.PreparedClip(
        table=np.zeros((1, 4), np.int64),
        file=b"",
        suffix="mp4",
        num_frames=1,
        chosen=(0,),
        width=1,
        height=1,
        source_width=1,
        source_height=1,
    )

    def members(images, several, clips=()):
        made = sample.PreparedSample(
            key="<key>",
            tokens=np.zeros(0, "<i4"),
            spans=sample.spans_table(
                [], images, videos=[(v, 1, 0) for v in range(len(clips))], clips=clips
            ),
            images=tuple(images),
            clips=clips,
        )
        overviews = [b"" for image in images if image.overview is not None]
        found = sample.sample_members(
            made, [b""] * len(images), overviews=overviews, codec="png", several=several
        )
        return [name.replace(".png", ".<suffix>") for name, _ in found]

    plain, with_overviews = members([image] * 2, True)[3:], members([tiled] * 2, True)[3:]
    with_clips = members([], True, (clip, clip))[3:]
    assert described == [
        *members([tiled], False),
        *plain,
        *(name for name in with_overviews if name not in plain),
        *with_clips,
    ]
    # Each directly after its image.
    assert with_overviews == [described[i] for i in (5, 7, 6, 8)]


def test_array_header_is_the_codes():
    said = section("The sample")
    payload = sample.encode_array(np.zeros(3, "<i4"))
    length = int.from_bytes(payload[8:10], "little")
    assert len(payload) - 12 == sample.ARRAY_HEADER_BYTES
    assert f"a header of exactly {sample.ARRAY_HEADER_BYTES} bytes" in said
    assert f"length {length}," in said
    assert payload[10:].startswith(b"{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }")


def test_spans_table_has_the_columns_and_kinds_of_the_code():
    described = table(section("The spans table"), "column")
    assert [int(column) for column in described] == list(range(1, sample.SPAN_COLUMNS))
    for kind in sample.SpanKind:
        assert f"{kind.name} ({kind.value})" in TEXT
    for flag in (sample.Geometry.FLIP, sample.Geometry.CROP, sample.Geometry.COLOR):
        assert f"{flag.name} ({flag.value})" in section("The spans table")
    assert sample.WEIGHT_ONE == 10**6
    assert "loss weight, millionths" in TEXT


def test_limits_are_the_codes():
    assert f"`S{index.INDEX_DTYPE['key'].itemsize}`" in TEXT
    assert sample.KEY_PATTERN.pattern == "[a-z0-9_-]{1,60}"
    assert "1 to 60 characters out of `a-z`, `0-9`, `_` and `-`" in TEXT
    assert f"1 to {tar.MAX_NAME} bytes" in TEXT
    assert f"{media.MAX_STORED_PIXELS:,}\npixels" in TEXT


def test_file_names_are_the_codes():
    for name in (
        manifest.MANIFEST_NAME,
        manifest.TOKENIZER_NAME,
        manifest.INDEX_SUFFIX,
        columns.COLUMNS_SUFFIX,
    ):
        assert name in section("The tree")


def test_every_reason_that_readers_give_exists_in_the_code_and_the_other_way_round():
    described = set(
        re.findall(
            r"`([a-z0-9_]+)`",
            "".join(
                line.rsplit(" | ", 1)[-1]
                for line in section("What a reader must refuse").splitlines()
                if line.startswith("|")
            ),
        )
    )
    assert described <= {code.partition(".")[0] for code in messages()}
    raised = set()
    for module in ("index", "columns", "manifest", "tar", "sample"):
        source = (ROOT / "shardspec" / f"{module}.py").read_text()
        raised |= set(re.findall(r'(?:Error\(|_broken\(where, )\s*"(\w+)', source))
    assert "index_count" in raised
    # Joining splits is the writer's business.
    assert raised - {"recipe_conflict"} <= described
