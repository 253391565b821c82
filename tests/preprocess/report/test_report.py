"""report.html by structure: headings, what each part says, nothing loaded, the same bytes.

Pixels are not compared: pages are looked at by people.
"""

import base64
import io
import re
from unittest import mock

import fsspec
import pytest
from PIL import Image

from loader.reading.reader import ShardReader
from preprocess.report import ReportSettings, make_report
from preprocess.report.cards import crop_shapes
from preprocess.report.left_out import left_out_examples
from preprocess.report.stored import SampleReader
from shardspec import storage
from shardspec.errors import ConfigError, ManifestError, ShardError
from shardspec.index import sample_layout
from shardspec.manifest import require_manifest
from shardspec.sample import text_rows
from shardspec.tiling import ImageView
from tests.inline import Quiet
from tests.pages import checked

HOSTILE = "<script>alert(1)</script><img src=http://example.com/a.png> & \x00 ends"


def report(url, to, **settings):
    make_report(ReportSettings(out=str(url), to=str(to), **settings), Quiet())
    return storage.read_bytes(str(to)).decode()


@pytest.fixture(scope="module")
def captions(inline_cli, build_once, captioned_rows, write_parquet):
    """12 rows: two are no image, one is a duplicate, one has markup in its caption, and two have
    the same image with other captions."""

    def build(folder):
        rows = captioned_rows(12, broken=2)
        rows[4] = {**rows[3]}
        rows[5] = {**rows[5], "caption": HOSTILE}
        rows[7] = {**rows[7], "image": rows[6]["image"]}
        source = write_parquet(folder / "source" / "train", rows)
        inline_cli.good(
            *("shards", "pixmo_cap", "--source", source.parent, "--out", folder / "out"),
            *("--cache", folder / "cache", "--workers", 1, "--num-shards", 2),
            *("--max-lost-rows", 1, "--max-bad-samples", 1),
        )

    return build_once("report-captions", build) / "out"


@pytest.fixture(scope="module")
def points(inline_cli, build_once):
    """Generated scenes with points, tiled, as PNG."""

    def build(folder):
        inline_cli.good(
            *(
                "shards",
                "pixmo_points",
                "--source",
                "sample",
                "--limit",
                5,
                "--out",
                folder / "out",
            ),
            *("--cache", folder / "cache", "--workers", 1, "--image-size", 168, "--crops", 4),
            *("--codec", "png"),
        )

    return build_once("report-points", build) / "out"


@pytest.fixture(scope="module")
def caption_page(captions, tmp_path_factory):
    return checked(report(captions, tmp_path_factory.mktemp("page") / "a.html"))


@pytest.fixture(scope="module")
def points_page(points, tmp_path_factory):
    return checked(report(points, tmp_path_factory.mktemp("page") / "a.html"))


def outline(page):
    """The headings of a page, with the keys of samples left out."""
    lines = []
    for tag, _, _ in page.elements:
        if re.fullmatch("h[1-6]", tag):
            lines.append(tag)
    texts = re.findall(r"<h([1-6])[^>]*>(.*?)</h\1>", page.document)
    assert len(texts) == len(lines)
    return "".join(
        "  " * (int(level) - 1) + re.sub("[0-9a-f]{24}", "KEY", text) + "\n"
        for level, text in texts
    )


def test_outline_is_the_golden_file(caption_page, points_page, golden):
    golden("report-outline.txt", outline(caption_page) + "\n" + outline(points_page))


def test_every_part_is_in_the_contents(caption_page):
    links = [a["href"][1:] for a in caption_page.all("a") if a["href"] != "#content"]
    assert links == [each["id"] for each in caption_page.all("section")]


def test_texts_of_rows_are_shown_and_add_no_markup(caption_page):
    assert "<script>alert(1)</script>" in caption_page.text
    assert caption_page.all("script") == []
    assert len(caption_page.all("img")) == 0, "pictures of samples are in svg"


def test_what_was_left_out_has_counts_and_examples(caption_page, captions):
    counts = require_manifest(str(captions)).splits["train"].quarantined
    assert counts == {"duplicate": 1, "image_decode": 2}
    for reason, count in counts.items():
        assert f"Examples of {reason}" in caption_page.text
        assert re.search(rf'<th scope="row">{reason}</th><td>{count}</td>', caption_page.document)
    assert "left out: 1." in caption_page.text, "the duplicate"


def test_samples_with_the_same_image_are_found(caption_page):
    part = caption_page.document.split('id="duplicates-train"')[1].split("<section")[0]
    found = re.findall(r'<th scope="row">[0-9a-f]{12}</th><td>2</td><td>(\d+), (\d+)</td>', part)
    assert len(found) == 1


def test_long_quarantine_lists_are_read_in_part(tmp_path, monkeypatch):
    lines = [b'{"reason":"r%d","key":"k"}\n' % (i % 3) for i in range(100)]
    lines.insert(5, b"no JSON\n")
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "quarantine" / "a.jsonl").write_bytes(b"".join(lines))
    found = left_out_examples(str(tmp_path))
    assert {reason: len(each) for reason, each in found.items()} == {"r0": 3, "r1": 3, "r2": 3}
    monkeypatch.setattr("preprocess.report.left_out._MOST_BYTES", 60)
    found = left_out_examples(str(tmp_path))
    assert {reason: len(each) for reason, each in found.items()} == {"r0": 1, "r1": 1}
    assert left_out_examples(str(tmp_path / "none")) == {}


def test_all_samples_of_a_small_dataset_are_shown_once(caption_page, captions):
    manifest = require_manifest(str(captions))
    reader = ShardReader(str(captions), manifest, split="train")
    keys = {reader.name(i)[1] for i in range(len(reader))}
    samples = caption_page.document.split('id="samples-train"')[1].split("<section")[0]
    assert sorted(re.findall(r"<h3>(\w{24})</h3>", samples)) == sorted(keys)


def test_learned_tokens_are_marked_and_prompts_are_not(caption_page):
    groups = re.findall(r'<div class="text tokens".*?</div>', caption_page.document)
    assert groups
    for group in groups:
        kinds = re.findall(r"<(span|mark)", group)
        assert kinds == sorted(kinds, reverse=True), "the prompt, then the answer"
        assert {"span", "mark"} == set(kinds)


def test_points_are_drawn_where_the_record_has_them(points_page, points):
    reader = SampleReader(str(points), require_manifest(str(points)))
    for number in range(5):
        sample = reader.sample("train", number)
        want = []
        for message in sample.record["message_list"]:
            want += [(x / 100, y / 100) for x, y in message["points"]]
        article = re.search(rf"<article[^>]*><h3>{sample.key}.*?</article>", points_page.document)
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', article[0]).groups())
        pins = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', article[0])
        got = sorted((float(x) / width, float(y) / height) for x, y in pins)
        assert len(got) == len(want)
        for (x, y), (u, v) in zip(got, sorted(want), strict=True):
            assert abs(x - u) < 0.001
            assert abs(y - v) < 0.001
        assert f"{len(want)} marked" in re.search(r'aria-label="([^"]*)"', article[0])[1]


def test_pictures_of_a_page_can_be_decoded(points_page):
    pictures = [image["href"] for image in points_page.all("image")]
    assert len(pictures) >= 5
    for uri in pictures:
        payload = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        assert max(Image.open(io.BytesIO(payload)).size) <= 480


def test_same_dataset_gives_the_same_bytes_anywhere(captions, tmp_path):
    first = report(captions, tmp_path / "a.html")
    for path in sorted(captions.rglob("*")):
        if path.is_file():
            name = path.relative_to(captions).as_posix()
            storage.publish_bytes(f"memory://reports/{tmp_path.name}/{name}", path.read_bytes())
    url = f"memory://reports/{tmp_path.name}"
    assert report(url, f"{url}/report.html") == first
    assert str(captions) not in first
    fsspec.filesystem("memory").rm(f"/reports/{tmp_path.name}", recursive=True)


@pytest.mark.slow
def test_report_and_preview_of_an_s3_store_are_those_of_the_disk(points, s3_server, tmp_path):
    from loader.__main__ import main

    with s3_server.entered():
        url = s3_server.make_bucket() + "/points"
        for path in sorted(points.rglob("*")):
            if path.is_file():
                name = path.relative_to(points).as_posix()
                storage.publish_bytes(storage.join(url, name), path.read_bytes())
        assert report(url, f"{url}/report.html") == report(points, tmp_path / "a.html")
        for source, out in ((url, "b.html"), (str(points), "c.html")):
            assert main(["preview", source, "--out", str(tmp_path / out)]) == 0
    assert (tmp_path / "b.html").read_bytes() == (tmp_path / "c.html").read_bytes()


def test_only_shown_samples_are_read(points, tmp_path):
    read = []

    def counted(self, url, start, num_bytes, *, total):
        read.append(num_bytes)
        return real(self, url, start, num_bytes, total=total)

    real = SampleReader._read
    with mock.patch.object(SampleReader, "_read", counted):
        report(points, tmp_path / "a.html", samples=1, text_samples=2)
    # One sample by hash, two texts, at most five at the ends of the scales, no duplicates.
    assert len(read) <= 8


def test_number_of_samples_is_bounded():
    with pytest.raises(ConfigError, match="out of range") as caught:
        ReportSettings(out="x", samples=501)
    assert caught.value.reason == "report_samples"


def test_imported_tars_have_a_report_of_their_numbers(inline_cli, captions, tmp_path):
    inline_cli.good("import", captions / "train", "--out", tmp_path / "raw", "--name", "raw")
    page = checked(report(tmp_path / "raw", tmp_path / "a.html"))
    assert "Files of a sample" in page.text
    assert "Samples" not in page.text_of("h2")


def test_views_have_a_report_of_their_samples(inline_cli, captions, tmp_path):
    inline_cli.good(
        *("filter", captions, tmp_path / "view", "--where", "num_tokens > 0"),
    )
    page = checked(report(tmp_path / "view", tmp_path / "a.html"))
    number = require_manifest(str(tmp_path / "view")).splits["train"].num_samples
    samples = page.document.split('id="samples-train"')[1].split("<section")[0]
    assert samples.count("<article") == number


def test_datasets_without_images_have_a_report(write_dataset, tiny_sample, tmp_path, monkeypatch):
    samples = [tiny_sample(i, num_images=0) for i in range(4)]
    url = write_dataset(tmp_path / "texts", samples)
    with mock.patch("preprocess.report.report._tokenizer", return_value=Numbers()):
        page = checked(report(url, tmp_path / "a.html"))
    assert page.all("image") == []


def test_several_images_are_shown_each(write_dataset, tiny_sample, tmp_path):
    samples = [tiny_sample(i, num_images=2, num_branches=2) for i in range(3)]
    url = write_dataset(tmp_path / "pairs", samples, several=True)
    with mock.patch("preprocess.report.report._tokenizer", return_value=Numbers()):
        page = checked(report(url, tmp_path / "a.html"))
    names = [svg["aria-label"] for svg in page.all("svg")]
    assert sum(name.startswith("Picture 2 of 2") for name in names) >= 3


def test_frames_are_shown_with_their_times(inline_cli, tmp_path):
    inline_cli.good(
        *("shards", "moving_shapes", "--source", "sample", "--limit", 1, "--workers", 1),
        *("--out", tmp_path / "out", "--cache", tmp_path / "cache"),
    )
    page = checked(report(tmp_path / "out", tmp_path / "a.html", samples=0))
    found = re.findall(r"frame (\d+) of (\d+) of video 1, at ([\d.]+) s;", page.document)
    numbers = [int(number) for number, _, _ in found]
    assert numbers == [*range(1, int(found[0][1]) + 1)]
    times = [float(time) for _, _, time in found]
    assert times == sorted(set(times))
    assert times[0] == 0


def test_context_of_no_weight_is_not_marked(write_dataset, tiny_sample, tmp_path):
    samples = [tiny_sample(i) for i in range(2)]
    for sample in samples:
        text_rows(sample.spans)[:, 7] = 0
    url = write_dataset(tmp_path / "context", samples)
    with mock.patch("preprocess.report.report._tokenizer", return_value=Numbers()):
        page = checked(report(url, tmp_path / "a.html"))
    assert [text for text in page.text_of("mark") if text != "background"] == []


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)


def test_a_damaged_sample_is_a_named_error(write_dataset, tiny_sample, tmp_path):
    url = write_dataset(tmp_path / "bad", [tiny_sample(0)])
    reader = SampleReader(url, require_manifest(url))
    assert reader.sample("train", 0).images
    (tar,) = (tmp_path / "bad").rglob("*.tar")
    payload = bytearray(tar.read_bytes())
    payload[sample_layout(reader.sample("train", 0).row).image + 200] ^= 1
    tar.write_bytes(payload)
    with pytest.raises(ShardError) as caught:
        reader.sample("train", 0)
    assert caught.value.reason == "sample_crc"


def test_no_manifest_is_a_named_error(tmp_path):
    with pytest.raises(ManifestError):
        make_report(ReportSettings(out=str(tmp_path)), Quiet())


def test_report_verb_writes_into_the_dataset(inline_cli, points, tmp_path):
    done = inline_cli.good("report", points, "--to", tmp_path / "a.html", "--samples", 1)
    assert done.out.strip() == str(tmp_path / "a.html")
    checked((tmp_path / "a.html").read_text())


# --- crops


def test_crops_cover_the_picture_and_overlap():
    view = ImageView(
        size_px=112, crop_mode="overlap-and-resize-c2", max_crops=4, margin_patches=(2, 2)
    )
    shapes = crop_shapes((640, 480), view, (320, 240))
    assert len(shapes) == 4
    assert min(s.at[0] for s in shapes) == min(s.at[1] for s in shapes) == 0
    assert (max(s.at[2] for s in shapes), max(s.at[3] for s in shapes)) == (320, 240)
    assert shapes[0].at[2] > shapes[1].at[0]
    assert [s.label for s in shapes] == ["1", "2", "3", "4"]


def test_crops_of_a_padded_view_end_at_the_picture():
    view = ImageView(size_px=112, crop_mode="overlap-and-resize-c2", fit="pad", max_crops=4,
                     margin_patches=(2, 2))  # fmt: skip
    for shape in crop_shapes((900, 300), view, (300, 100)):
        x1, y1, x2, y2 = shape.at
        assert 0 <= x1 < x2 <= 300
        assert 0 <= y1 < y2 <= 100


def test_center_crop_draws_what_is_kept():
    (shape,) = crop_shapes((400, 200), ImageView(fit="center-crop"), (400, 200))
    assert shape.at == pytest.approx((100, 0, 300, 200), abs=1)


def test_one_crop_of_the_whole_picture_is_not_drawn():
    assert crop_shapes((400, 200), ImageView(), (400, 200)) == []
