"""The dataset adapters: what a row of each becomes, and that generated rows say what is true."""

import ast
import functools
import hashlib
import json
import re
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.datasets import (
    DatasetBase,
    EpisodeFrame,
    PageImage,
    SceneImage,
    SceneVideo,
    dataset_class,
    dataset_names,
    example_images,
    example_videos,
    get_dataset,
)
from preprocess.datasets.base import row_image
from preprocess.datasets.pixmo_cap_qa import user_turns
from preprocess.datasets.rows import ArrowRows, Rows
from preprocess.datasets.text_sft import conversation
from preprocess.fetch import FetchPolicy
from preprocess.job.job import (
    _BYTE_SOURCES,
    Job,
    JobSettings,
    byte_sources,
    library_versions,
)
from preprocess.job.pipeline import run_job
from preprocess.job.verify import verify
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Recipe
from preprocess.synthetic.questions import POINT_MARK, scene_targets
from preprocess.synthetic.scenes import NUMBERS, plan_scene
from preprocess.text import TextPolicy
from preprocess.text.styles import STYLES
from shardspec.errors import SampleError
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView
from tests import inline

ROOT = Path(__file__).parents[3]
PACKAGES = ("preprocess", "shardspec")
GOLDEN = ROOT / "tests" / "golden"
RECIPE = Recipe(
    text=TextPolicy(prompt_templates="uber_model", num_variants=2),
    image=ImagePolicy(views=(ImageView(size_px=336),)),
)
GOLDEN_NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/rows.json"))
MODES = [(name, mode) for name in dataset_names() for mode in dataset_class(name).modes or ("",)]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def note(self, text):
        pass


def shown(example, *, base):
    """An example in JSON types, paths relative to the folder of the rows."""

    def name(image):
        return image.relative_to(base).as_posix() if isinstance(image, Path) else image

    image = example.get("image")
    named = [name(one) for one in image] if isinstance(image, list) else name(image)
    return {**example, "image": named} if "image" in example else dict(example)


def golden_rows(name):
    return json.loads((GOLDEN / name / "rows.json").read_text())


def examples_of(folder, name, mode):
    dataset = get_dataset(name, source=str(folder), mode=mode or None)
    return [shown(dataset[i], base=folder) for i in range(len(dataset))]


def points_of(message):
    """Every point of a message, with those of inline annotations."""
    annotations = message.get("answer_annotations", ())
    return [*message.get("points", ()), *(p for one in annotations for p in one["points"])]


def test_every_dataset_but_the_first_has_golden_rows():
    # The one with videos has generated rows only; folders of robots are written by their own tests.
    others = {"pixmo_cap", "moving_shapes", "lerobot"}
    assert set(GOLDEN_NAMES) == set(dataset_names()) - others


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_rows_in_parquet_become_the_golden_examples(name, write_parquet, tmp_path):
    folder = write_parquet(tmp_path, golden_rows(name))
    want = json.loads((GOLDEN / name / "examples.json").read_text())
    assert set(want) == set(dataset_class(name).modes or ("default",))
    for mode, examples in want.items():
        assert examples_of(folder, name, mode.replace("default", "")) == examples


@pytest.mark.parametrize("name, mode", MODES)
def test_generated_examples_are_whole_and_of_plain_json(name, mode):
    dataset = get_dataset(name, source="sample", limit=16, mode=mode or None)
    assert len(dataset) == 16
    for i in range(len(dataset)):
        example = dataset[i]
        text = {"message_list": example["message_list"], "metadata": example["metadata"]}
        assert json.loads(json.dumps(text, allow_nan=False)) == text
        assert example["message_list"]
        images = example_images(example)
        assert all(isinstance(image, SceneImage | EpisodeFrame | PageImage) for image in images)
        assert isinstance(example.get("image"), list) == dataset.several_images - dataset.videos
        assert [type(v) for v in example_videos(example)] == [SceneVideo] * dataset.videos
        for message in example["message_list"]:
            assert message["style"] in STYLES
            if "options" in message:
                number = 3 if dataset.videos else 4
                assert len(set(message["options"])) == len(message["options"]) == number
                assert 0 <= message["answer_idx"] < number
            # Documents and videos have tests of their own.
            if points_of(message) and name not in ("documents", "moving_shapes"):
                plan = plan_scene(images[0].seed, images[0].idx)
                scale = message.get("point_scale")
                width, height = (scale, scale) if scale else (plan.width_px, plan.height_px)
                assert all(0 < x < width and 0 < y < height for x, y in points_of(message))


@pytest.mark.parametrize("name, mode", MODES)
def test_the_same_row_is_generated_again(name, mode):
    first, again = (get_dataset(name, source="sample", limit=n, mode=mode or None) for n in (3, 5))
    assert [first[i] for i in range(3)] == [again[i] for i in range(3)]


def test_images_of_a_generated_group_are_two_to_five_different_ones():
    dataset = get_dataset("pixmo_multi_image_qa", source="sample", limit=40)
    groups = [dataset[i]["image"] for i in range(40)]
    assert {len(group) for group in groups} == {2, 3, 4, 5}
    assert len({image for group in groups for image in group}) == sum(map(len, groups))


def asked_and_answered(name):
    """(scene, question, answer) of generated examples, whatever their form."""
    dataset = get_dataset(name, source="sample", limit=30)
    for i in range(len(dataset)):
        example = dataset[i]
        plan = plan_scene(example["image"].seed, example["image"].idx)
        for message in example["message_list"]:
            if "messages" in message:
                pairs = zip(message["messages"][::2], message["messages"][1::2], strict=True)
                yield from ((plan, question, answer) for question, answer in pairs)
            elif "answers" in message:
                texts = message["answers"]
                yield plan, message["question"], max(texts, key=texts.count)
                assert len(texts) == 10
            elif "options" in message:
                yield plan, message["question"], message["options"][message["answer_idx"]]
            else:
                yield plan, message["question"], message["answer"]


def check(plan, question, answer):
    """Says whether an answer is right, from positions and names alone; None if it cannot tell."""
    words = re.findall(r"\w+", answer.lower())
    if found := re.fullmatch(r"How many (\w+?)(?:es|s) are in the picture\?", question):
        stem = found[1].removesuffix("e")
        count = sum(stem in ("shap", t.shape.removesuffix("e")) for t in plan.objects)
        accepted = [str(count), NUMBERS[count]] + (["none"] if count == 0 else [])
        return any(word in words for word in accepted)
    if found := re.fullmatch(r"Is any of the shapes (\w+)\?", question):
        return words[0] == ("yes" if any(t.color == found[1] for t in plan.objects) else "no")
    if found := re.fullmatch(r"What color is the (\w+)\?", question):
        return [t.color for t in plan.objects if t.shape == found[1]] == [words[-1]]
    if found := re.fullmatch(r"What shape is the (\w+) one\?", question):
        return [t.shape for t in plan.objects if t.color == found[1]] == [words[-1]]
    if found := re.fullmatch(r"Is the (\w+) (\w+) .* the (\w+) (\w+)\?", question):
        (first,), (second,) = (
            [t.center_px for t in plan.objects if (t.color, t.shape) == pair]
            for pair in (found.groups()[:2], found.groups()[2:])
        )
        side = next(word for word in words if word in ("left", "right", "above", "below"))
        axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[side]
        return sign * (second[axis] - first[axis]) > 0
    return None


@pytest.mark.parametrize("name", ["vqa2", "a_okvqa", "pixmo_cap_qa", "pixmo_ask_model_anything"])
def test_generated_answers_are_true_of_their_scenes(name):
    checked = [check(*asked) for asked in asked_and_answered(name)]
    assert False not in checked
    assert checked.count(True) >= 25


def test_generated_vqa_rows_have_five_to_twelve_questions():
    dataset = get_dataset("vqa2", source="sample", limit=40)
    assert {len(dataset[i]["message_list"]) for i in range(40)} == set(range(5, 13))


def test_wrong_options_are_wrong():
    dataset = get_dataset("a_okvqa", source="sample", limit=30)
    for i in range(30):
        example = dataset[i]
        plan = plan_scene(example["image"].seed, example["image"].idx)
        (message,) = example["message_list"]
        options = list(message["options"])
        options.pop(message["answer_idx"])
        assert [check(plan, message["question"], option) for option in options] == [False] * 3


@pytest.mark.parametrize("name", ["pixmo_points", "pixmo_count"])
def test_generated_points_are_the_centres_of_what_the_label_names(name):
    dataset = get_dataset(name, source="sample", limit=30)
    pointed = absent = 0
    for i in range(30):
        example = dataset[i]
        plan = plan_scene(example["image"].seed, example["image"].idx)
        for message in example["message_list"]:
            words = message["label"].split()
            nouns = {words[-1], words[-1].removesuffix("s"), words[-1].removesuffix("es")}
            things = [
                thing
                for thing in plan.objects
                if nouns & {thing.shape, "shape"}
                and set(words[:-1]) <= {thing.color, thing.texture}
                and (len(words) != 2 or words[-1].startswith("shape") or thing.texture == "plain")
            ]
            scale = message.get("point_scale")
            unit = (plan.width_px / scale, plan.height_px / scale) if scale else (1, 1)
            got = np.reshape(message["points"], (-1, 2)) * unit
            want = np.reshape([thing.center_px for thing in things], (-1, 2))
            assert np.allclose(sorted(got.tolist()), sorted(want.tolist()), atol=1e-6)
            pointed += len(things)
            absent += not things
        if name == "pixmo_count":
            assert example["metadata"]["count"] == len(message["points"]) > 0
    assert pointed > 30
    assert (absent > 0) == (name == "pixmo_points")


def test_rows_of_points_count_them():
    dataset = get_dataset("pixmo_points", source="sample", limit=20)
    rows = list(dataset.rows)
    assert len(rows) == 60
    assert all(row["count"] == len(row["points"]) for row in rows)


def test_every_placeholder_of_a_generated_explanation_has_its_points_and_tag():
    dataset = get_dataset("pixmo_point_explanations", source="sample", limit=30)
    for row in dataset.rows:
        if row["parsed_response"] is None:
            continue
        pieces = [re.escape(piece) for piece in row["parsed_response"].split(POINT_MARK)]
        tags = re.fullmatch(r"(<points? .*?</points?>)".join(pieces), row["response"])
        assert tags
        assert len(tags.groups()) == len(row["points"]) == len(row["inline_text"]) >= 1
        for tag, points, text in zip(tags.groups(), row["points"], row["inline_text"], strict=True):
            assert f">{text}</" in tag
            assert len(re.findall(r'\bx\d*="', tag)) == len(points)


def test_targets_of_a_scene_are_told_apart_by_their_objects():
    for idx in range(20):
        present, absent = scene_targets(plan_scene(0, idx))
        assert len({target.objects for target in present}) == len(present) >= 1
        assert len(absent) >= 2


def test_generated_conversations_end_in_right_sums():
    dataset = get_dataset("text_sft", source="sample", limit=60)
    sums = 0
    for i in range(60):
        turns = dataset[i]["message_list"][0]["messages"]
        assert len(turns) % 2 == 0
        for text in turns[1::2]:
            if found := re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\.", text):
                sums += 1
                assert int(found[1]) + int(found[2]) == int(found[3])
    assert sums > 10


# Grouping


class Pictures(DatasetBase):
    """Rows given by a test: (url, label) pairs; the label "bad" cannot become an example."""

    name = "pictures"
    grouped = True
    pairs = ()

    def load(self):
        rows = [{"image_url": url, "label": label} for url, label in self.pairs]
        return Rows([lambda: rows], lengths=[len(rows)], kind={"kind": "test"})

    def to_example(self, row):
        if row["label"] == "bad":
            raise SampleError("bad_label", what="bad label")
        message = {"style": "pointing", "label": row["label"]}
        return {"image": row_image(row), "message_list": [message], "metadata": {}}

    def sample_row(self, seed, idx):
        raise NotImplementedError


def pictures(pairs, **options):
    kind = type("Given", (Pictures,), {"pairs": [(f"https://x.org/{u}", v) for u, v in pairs]})
    dataset = kind(source="given", **options)
    examples = [dataset[i] for i in range(len(dataset))]
    labels = [[message["label"] for message in example["message_list"]] for example in examples]
    urls = [example["image"].removeprefix("https://x.org/") for example in examples]
    return dataset, list(zip(urls, labels, strict=True))


def test_rows_of_one_image_become_one_example_where_the_image_first_stands():
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("a", "5"), ("b", "6")]
    _, found = pictures(pairs)
    assert found == [("b", ["1", "3", "6"]), ("a", ["2", "5"]), ("c", ["4"])]


def test_limit_counts_examples_and_each_keeps_all_its_rows():
    _, found = pictures([("b", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("a", "5")], limit=2)
    assert found == [("b", ["1", "3"]), ("a", ["2", "5"])]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from(["x", "y", "bad"]))))
def test_grouping_keeps_every_good_row_once_in_its_order(pairs):
    good = [(url, label) for url, label in pairs if label != "bad"]
    if not good:
        return
    dataset, found = pictures(pairs)
    assert dataset.left_out["bad_label"] == len(pairs) - len(good)
    want = {url: [label for u, label in good if u == url] for url, _ in good}
    assert found == list(want.items())


def test_example_numbers_out_of_range_are_refused_and_negative_ones_count_from_the_end():
    dataset, found = pictures([("a", "1"), ("b", "2"), ("a", "3")])
    assert dataset[-1]["message_list"][0]["label"] == "2"
    for item in (2, -3):
        with pytest.raises(IndexError):
            dataset[item]
    assert len(found) == 2


def test_grouped_images_are_divided_into_splits_whole():
    kind = type("Divided", (Pictures,), {"validation_share": 0.5})
    kind.pairs = [(f"https://x.org/{i % 20}", str(i)) for i in range(60)]
    sides = [kind(split, source="given") for split in ("train", "validation")]
    urls = [{side[i]["image"] for i in range(len(side))} for side in sides]
    assert not urls[0] & urls[1]
    assert len(urls[0] | urls[1]) == 20
    assert all(len(side[i]["message_list"]) == 3 for side in sides for i in range(len(side)))


def scattered_rows(reads):
    """1,000 rows in pieces of 100, of 50 images in turn; `reads` lists the pieces that are read."""

    def read(p):
        reads.append(p)
        return ArrowRows(pa.Table.from_pylist([{"i": 100 * p + k} for k in range(100)]))

    pieces = [functools.partial(read, p) for p in range(10)]
    return Rows(pieces, lengths=[100] * 10, kind={})


def test_scattered_rows_of_a_source_that_fits_are_read_once():
    reads = []
    rows = scattered_rows(reads)
    order = [50 * k + image for image in range(50) for k in range(20)]
    assert [rows[i]["i"] for i in order] == order
    assert [row["i"] for row in rows] == list(range(1000))
    assert reads == list(range(10))


def test_pieces_beyond_the_bound_are_dropped_oldest_first(monkeypatch):
    reads = []
    rows = scattered_rows(reads)
    monkeypatch.setattr("preprocess.datasets.rows.HELD_BYTES", 2 * 100 * 8)
    for i in (0, 100, 0, 200, 100, 0):
        assert rows[i]["i"] == i
    assert reads == [0, 1, 2, 0]


def test_rows_in_order_pass_by_and_jumps_keep_what_they_may_need_again(monkeypatch):
    reads = []
    rows = scattered_rows(reads)
    monkeypatch.setattr("preprocess.datasets.rows.PASSED_BYTES", 100 * 8)
    passes = [*range(1000), *range(1000)]
    assert [rows[i]["i"] for i in passes] == passes
    assert reads == [*range(10), *range(10)]
    del reads[:]
    for i in (500, 100, 500, 100, 999):
        assert rows[i]["i"] == i
    assert reads == [5, 1]


# Rows that cannot become examples


@pytest.mark.parametrize(
    "question, turns",
    [
        ("What is this?", ["What is this?"]),
        ("[USER] One? [ASSISTANT]", ["One?"]),
        ("[USER]One?[ASSISTANT]Yes.[USER]Two?", ["One?", "Yes.", "Two?"]),
    ],
)
def test_marked_conversations_are_split_into_turns(question, turns):
    assert user_turns(question) == turns


@pytest.mark.parametrize(
    "question",
    ["Hm. [USER] One?", "[USER] One? [USER] Two?", "[ASSISTANT] Yes.", "[USER] a [ASSISTANT] b"],
)
def test_marked_conversations_that_do_not_alternate_are_refused(question):
    with pytest.raises(SampleError) as caught:
        user_turns(question)
    assert caught.value.reason == "conversation"


@pytest.mark.parametrize(
    "roles, contents",
    [
        ([], []),
        (["user"], ["Hi!"]),
        (["user", "user"], ["Hi!", "Hm?"]),
        (["user", "assistant"], ["Hi!", " "]),
        (["user", "assistant"], ["Hi!", None]),
        (["system"], ["Be kind."]),
        (["user", "system", "assistant"], ["Hi!", "Be kind.", "Hello."]),
    ],
)
def test_conversations_that_do_not_alternate_are_refused(roles, contents):
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    with pytest.raises(SampleError) as caught:
        conversation(messages)
    assert caught.value.reason == "conversation"


@pytest.mark.parametrize(
    "name, mode, field, value, reason",
    [
        ("vqa2", "", "messages", [], "no_answers"),
        ("pixmo_points", "pointing", "label", " ", "no_label"),
        ("pixmo_count", "point_count", "points", None, "no_points"),
        ("pixmo_cap_qa", "", "answer", "", "empty_answer"),
        ("pixmo_ask_model_anything", "", "question", "", "no_question"),
        ("pixmo_ask_model_anything", "", "answer", None, "no_answer"),
        ("pixmo_point_explanations", "", "parsed_response", None, "no_parsed_response"),
        ("pixmo_point_explanations", "", "parsed_response", "No marks.", "point_number"),
        ("a_okvqa", "mc", "correct_choice_idx", None, "no_answers"),
        ("a_okvqa", "mc", "correct_choice_idx", 4, "no_answers"),
        ("a_okvqa", "da", "direct_answers", "['rain'", "no_answers"),
        ("a_okvqa", "da", "direct_answers", None, "no_answers"),
        ("pixmo_multi_image_qa", "", "qa_pairs", {"question": [], "answer": []}, "no_answers"),
    ],
)
def test_rows_that_lack_something_are_refused_by_name(name, mode, field, value, reason):
    dataset = get_dataset(name, source="sample", limit=1, mode=mode or None)
    with pytest.raises(SampleError) as caught:
        dataset.to_example({**golden_rows(name)[0], field: value})
    assert caught.value.reason == reason


def test_difficult_questions_are_left_to_choices_outside_of_training():
    row = {**golden_rows("a_okvqa")[0], "difficult_direct_answer": True}
    for mode, split, good in (("da", "train", True), ("da", "validation", False)):
        dataset = get_dataset("a_okvqa", split, source="sample", limit=1, mode=mode)
        if good:
            assert dataset.to_example(row)["message_list"][0]["answers"].count("rain") == 7
        else:
            with pytest.raises(SampleError, match="too difficult"):
                dataset.to_example(row)


def test_counts_can_be_trained_without_points():
    row = {**golden_rows("pixmo_count")[0], "points": None}
    dataset = get_dataset("pixmo_count", source="sample", limit=1, mode="count")
    (message,) = dataset.to_example(row)["message_list"]
    assert message == {"style": "count", "label": "people", "count": 3}


# Generated rows as files


def as_stored(row):
    """A generated row as the source stores it: its pictures drawn and embedded."""

    def drawn(value):
        if isinstance(value, SceneImage):
            return {"bytes": value.read(), "path": None}
        return [drawn(one) for one in value] if isinstance(value, list) else value

    return {name: drawn(value) for name, value in row.items()}


@pytest.mark.parametrize("name", ["vqa2", "pixmo_points", "pixmo_count", "pixmo_multi_image_qa"])
def test_generated_rows_in_parquet_give_the_same_examples(name, write_parquet, tmp_path):
    generated = get_dataset(name, source="sample", limit=3)
    folder = write_parquet(tmp_path, [as_stored(row) for row in generated.rows])
    want = {}
    for i in range(3):
        images = [image.read() for image in example_images(generated[i])]
        want[tuple(images)] = generated[i]["message_list"]
    got = {}
    # Where the split goes by the image's hash, one of the three may be in the other split.
    stored = get_dataset(name, source=str(folder))
    for i in range(len(stored)):
        got[tuple(example_images(stored[i]))] = stored[i]["message_list"]
    assert len(got) >= 2
    assert got.items() <= want.items()
    assert generated.validation_share or got == want


# Whole jobs


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    @functools.cache
    def run(name, **options):
        out = tmp_path_factory.mktemp(name)
        job = JobSettings(
            dataset=name,
            out=str(out / "out"),
            cache=str(out / "cache"),
            recipe=RECIPE,
            **{"source": "sample", "limit": 2, **options},
        )
        with inline.jobs():
            run_job(job, Silent())
        return out / "out"

    return run


@pytest.mark.parametrize("name", [name for name in dataset_names() if name != "pixmo_cap"])
def test_a_job_builds_generated_rows(name, build):
    out = build(name)
    manifest = require_manifest(str(out))
    several = dataset_class(name).several_images
    videos = name == "moving_shapes"
    assert manifest.splits["train"].num_samples == 2
    assert manifest.recipe["several_images"] is several
    assert ("video" in manifest.recipe) == ("av" in manifest.libraries) == videos
    assert verify(str(out), Silent(), deep=True) == []
    dataset = get_dataset(name, source="sample", limit=2)
    want = sorted(
        (len(example_images(dataset[i])), dataset[i]["message_list"][0].get("question", ""))
        for i in range(2)
    )
    got = []
    for path in sorted((out / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for member in names:
                if not member.endswith(".json"):
                    continue
                key = member.removesuffix(".json")
                record = json.load(tar.extractfile(member))
                suffixes = [n.removeprefix(key + ".") for n in names if n.startswith(key)][3:]
                if several:
                    assert suffixes == [f"{i}.jpg" for i in range(len(suffixes))]
                else:
                    assert suffixes in (["jpg"], [])
                assert len(suffixes) == len(record["video"]["frame_times_s"]) if videos else True
                number = 0 if videos else len(suffixes)
                got.append((number, record["message_list"][0].get("question", "")))
    assert sorted(got) == want


def test_rows_that_become_no_example_are_counted_in_the_manifest(
    build, write_parquet, tmp_path, small_jpeg
):
    rows = golden_rows("a_okvqa") * 3
    rows = [{**row, "image": {"bytes": small_jpeg(i), "path": None}} for i, row in enumerate(rows)]
    rows[1]["correct_choice_idx"] = None
    folder = write_parquet(tmp_path, rows)
    out = build("a_okvqa", source=str(folder), limit=None)
    split = require_manifest(str(out)).splits["train"]
    assert split.num_samples == 5
    assert split.quarantined == {"no_answers": 1}


def test_rows_left_out_of_a_group_are_counted_in_the_manifest(build):
    out = build("pixmo_point_explanations", limit=5)
    rows = get_dataset("pixmo_point_explanations", source="sample", limit=5).rows
    unparsed = sum(row["parsed_response"] is None for row in rows)
    split = require_manifest(str(out)).splits["train"]
    assert unparsed > 0
    assert split.quarantined == {"no_parsed_response": unparsed}
    assert split.num_samples == 5


def test_a_group_with_a_dead_image_is_quarantined_whole(build, write_parquet, tmp_path):
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(pictures[:2]):
        path.write_bytes(SceneImage(seed=5, idx=i).read())
    pairs = [{"question": "Which is brighter?", "answer": "The first."}]
    rows = [
        {"image_urls": [pictures[0].name, pictures[1].name], "qa_pairs": pairs},
        {"image_urls": [pictures[0].name, pictures[2].name], "qa_pairs": pairs},
    ]
    folder = write_parquet(tmp_path, rows)
    out = build("pixmo_multi_image_qa", source=str(folder), limit=None)
    split = require_manifest(str(out)).splits["train"]
    assert (split.num_samples, split.num_images) == (1, 2)
    assert split.quarantined == {"image_missing": 1}


@pytest.fixture
def picture_server(tmp_path, small_jpeg):
    """Serves two small pictures from loopback; gives its address."""
    folder = tmp_path / "www"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.jpg").write_bytes(small_jpeg(i))
    handler = functools.partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "images, settings, left_out, noted",
    [
        (("0.jpg", "1.jpg"), {}, {"image_sha256": 1}, None),
        (("0.jpg", "1.jpg"), {"sha256": "warn"}, {}, {"sha256": "warn"}),
        (("1.jpg?a", "1.jpg?b", "0.jpg"), {"placeholder_urls": 2}, {"placeholder": 2}, "same"),
        # What was annotated as it is, stands for nothing else.
        (("0.jpg?a", "0.jpg?b"), {"placeholder_urls": 2}, {}, "same"),
    ],
)
def test_images_that_are_not_the_annotated_ones_are_quarantined(
    build,
    picture_server,
    small_jpeg,
    write_parquet,
    tmp_path,
    images,
    settings,
    left_out,
    noted,
):
    right = hashlib.sha256(small_jpeg(0)).hexdigest()
    points = {"x": [4.0, 30.0], "y": [5.0, 6.0]}
    rows = [
        {"image_url": f"{picture_server}/{image}", "image_sha256": right, "count": 2}
        | {"points": points, "label": f"dots {image}"}
        for image in images
    ]
    folder = write_parquet(tmp_path / "rows", rows)
    fetch = FetchPolicy(allow_hosts=frozenset({"127.0.0.1"}), host_rate=0.0, **settings)
    out = build("pixmo_count", source=str(folder), limit=None, fetch=fetch)
    split = require_manifest(str(out)).splits["train"]
    assert split.quarantined == left_out
    assert split.num_samples == len(images) - sum(left_out.values())
    # Whoever reads the dataset sees that it is not the usual one.
    assert split.source.get("downloads") == (settings if noted == "same" else noted)


@pytest.mark.parametrize("name", ["pixmo_multi_image_qa", "text_sft"])
def test_keys_in_shards_are_those_of_the_unsharded_path(name, build):
    job = Job(JobSettings(dataset=name, out="unused", source="sample", limit=2, recipe=RECIPE))
    want = {job.preparer(job.dataset[i]).key for i in range(2)}
    with tarfile.open(next((build(name) / "train").glob("*.tar"))) as tar:
        assert {member.split(".")[0] for member in tar.getnames()} == want


# The identity of a job


def test_code_of_other_datasets_does_not_count_as_ours():
    ours, theirs = (
        library_versions(dataset_class(name))["code_sha256"] for name in ("vqa2", "a_okvqa")
    )
    assert ours != theirs
    assert library_versions(dataset_class("vqa2"))["code_sha256"] == ours


def file_of(module):
    """The source file of a module of the two packages; None for any other name."""
    path = ROOT / module.replace(".", "/")
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]
    return found[0] if found and module.split(".")[0] in PACKAGES else None


@functools.cache
def defining(module, name):
    """The file that a name of a module comes from: doors of rooms are looked through."""
    if file_of(f"{module}.{name}") is not None:
        return file_of(f"{module}.{name}")
    path = file_of(module)
    if path is not None and path.name == "__init__.py":
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return defining(node.module, name)
    return path


@functools.cache
def imported(path):
    """Files of the two packages whose names a source file imports, wherever in it."""
    files = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found = {defining(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found = {file_of(alias.name) for alias in node.names}
        else:
            continue
        files |= found - {None}
    return files


PASSIVE = (
    "preprocess/datasets/__init__.py",
    "preprocess/datasets/code.py",
    "preprocess/fetch/*.py",
    "preprocess/job/conflicts.py",
    "preprocess/job/engines/*.py",
    "preprocess/job/fetching.py",
    "preprocess/job/job.py",
    "preprocess/job/stamps.py",
    "preprocess/settings.py",
    "shardspec/documents.py",
    "shardspec/errors.py",
    "shardspec/manifest.py",
    "shardspec/messages.py",
    "shardspec/probe.py",
    "shardspec/storage/*.py",
    "shardspec/toml.py",
)
"""These move, name or check bytes, or find rows; what they give is hashed with the plan."""


@pytest.mark.parametrize("name", dataset_names())
def test_all_code_that_makes_bytes_counts(name):
    counted = {path for path in byte_sources(dataset_class(name)) if path.suffix == ".py"}
    found, waiting = set(), sorted(counted)
    while waiting:
        path = waiting.pop()
        if path not in found and not any(path.match(passive) for passive in PASSIVE):
            found.add(path)
            waiting += imported(path)
    assert {path.relative_to(ROOT).as_posix() for path in found - counted} == set()
    assert ROOT / "shardspec/tiling/grid.py" in found


@pytest.mark.parametrize("pattern", [*_BYTE_SOURCES, *PASSIVE])
def test_every_pattern_of_sources_finds_some(pattern):
    assert list(ROOT.glob(pattern))
