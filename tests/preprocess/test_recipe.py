"""The recipe as plain data, and `Preparer`: one example in, one prepared sample or a reason."""

import base64
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from preprocess.datasets import SceneImage, get_dataset
from preprocess.media import ImageLimits, ImagePolicy, VideoPolicy
from preprocess.recipe import Preparer, Recipe, image_identity, read_path, sample_key
from preprocess.text import StyleSheet, TextPolicy, check_action_tokens
from preprocess.text.sheet import OwnStyle
from preprocess.text.tokens import load_tokenizer
from shardspec.actions import bin_tokens, openvla_tokens, value_bins
from shardspec.errors import ConfigError, SampleError
from shardspec.families import Qwen2VL
from shardspec.sample import Geometry, SpanKind, image_rows, text_rows
from shardspec.tiling import ImageView
from tests.chat_shapes import SHAPES, make_tokenizer

VIEW = ImageView(size_px=56)
IMAGE = ImagePolicy(views=(VIEW,))
TOKENIZER = load_tokenizer()
PREPARE = Preparer(recipe=Recipe(image=IMAGE), tokenizer=TOKENIZER)
MESSAGES = [{"style": "long_caption", "text": "A red ball."}]


def picture(seed=0, kind="JPEG"):
    pixels = np.random.RandomState(seed).randint(0, 256, (40, 60, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def example(image=None, *, messages=MESSAGES, **fields):
    made = {"message_list": messages, "metadata": {}, **fields}
    return made if image is None else {**made, "image": image}


# --- keys


def test_bytes_and_the_file_that_holds_them_give_the_same_sample(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture())
    from_bytes, from_path = PREPARE(example(picture())), PREPARE(example(path))
    assert from_bytes.key == from_path.key
    assert np.array_equal(from_bytes.tokens, from_path.tokens)
    assert np.array_equal(from_bytes.spans, from_path.spans)
    assert np.array_equal(from_bytes.images[0].pixels, from_path.images[0].pixels)
    assert from_bytes.record == from_path.record


def test_name_of_an_image_gives_the_same_sample_as_its_bytes(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    data = "data:image/jpeg;base64," + base64.b64encode(picture()).decode()
    for image in ("a.jpg", {"bytes": None, "path": "a.jpg"}, data):
        assert PREPARE(example(image)).key == PREPARE(example(picture())).key


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "no_message"),
        ({"image": picture(), "message_list": []}, "no_message"),
        (example(3), "row_image"),
        (example(messages=[{**MESSAGES[0], "text": "A \ud83d"}]), "row_encoding"),
    ],
)
def test_example_that_is_none_has_a_reason(row, reason):
    with pytest.raises(SampleError) as caught:
        PREPARE(row)
    assert caught.value.reason == reason


def test_url_gives_the_same_sample_as_the_bytes_behind_it():
    fetched = dataclasses.replace(PREPARE, read_url={"http://example.com/a.jpg": picture()}.get)
    assert fetched(example("http://example.com/a.jpg")).key == PREPARE(example(picture())).key


def test_scene_has_the_same_key_whether_drawn_or_not():
    scene = SceneImage(seed=1, idx=2)
    identity = image_identity(scene, scene.read())
    assert identity == image_identity(scene, None) == "scene:1:2"
    assert PREPARE(example(scene)).key == sample_key(example(scene), image_id=identity)


def test_key_is_another_for_another_image_or_text_and_fits_the_contract():
    keys = [
        PREPARE(example(picture(0))).key,
        PREPARE(example(picture(1))).key,
        PREPARE(example()).key,
        PREPARE(example(picture(0), messages=[{**MESSAGES[0], "text": "A cat."}])).key,
        PREPARE(example(picture(0), messages=MESSAGES * 2)).key,
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 24 and int(key, 16) >= 0 for key in keys)


def test_key_does_not_depend_on_the_metadata():
    with_metadata = PREPARE(example(picture(), metadata={"image_url": "http://a/b"}))
    assert with_metadata.key == PREPARE(example(picture())).key


def test_pixels_of_another_shape_are_another_image():
    flat = np.zeros((4, 6, 3), np.uint8)
    ids = [image_identity(pixels, pixels) for pixels in (flat, flat.reshape(6, 4, 3), flat + 1)]
    assert len(set(ids)) == 3
    assert image_identity(flat, flat) == image_identity(flat, flat.copy(order="F"))


def test_given_key_is_used():
    assert PREPARE(example(picture()), key="mine").key == "mine"


# --- what a sample holds


def test_sample_rows_become_samples_whose_spans_decode_to_their_texts():
    dataset = get_dataset("pixmo_cap", source="sample", limit=4)
    recipe = Recipe(image=IMAGE, text=TextPolicy(num_variants=2))
    prepare = dataclasses.replace(PREPARE, recipe=recipe)
    for i in range(len(dataset)):
        given = dataset[i]
        sample = prepare(given)
        caption, transcripts = given["message_list"]
        responses = [
            TOKENIZER.decode(sample.tokens[row[5] : row[6]].tolist())
            for row in text_rows(sample.spans)
        ]
        want = [caption["text"], *transcripts["alternatives"]]
        assert responses == [f" {text}" for text in want for _ in range(2)]
        assert len(image_rows(sample.spans)) == len(sample.images) == 1
        assert sample.record["message_list"] == given["message_list"]
        json.dumps(sample.record)


def test_prompts_are_framed_by_the_message_format():
    text = TextPolicy(message_format="chatml", system_prompt="style", num_variants=1)
    sample = dataclasses.replace(PREPARE, recipe=Recipe(image=IMAGE, text=text))(example())
    (row,) = text_rows(sample.spans)
    assert TOKENIZER.decode(sample.tokens[row[3] : row[4]].tolist()) == (
        "<|im_start|>user\nlong_caption:<|im_end|>\n<|im_start|>assistant\n"
    )


def test_example_without_an_image_has_no_image_row():
    sample = PREPARE(example())
    assert sample.images == ()
    assert set(sample.spans[:, 0].tolist()) == {SpanKind.TEXT}


@pytest.mark.parametrize(
    "message, flip",
    [
        ({"text": "A red ball."}, True),
        ({"text": "A ball on the left."}, False),
        ({"alternatives": ["A ball.", "A sign."]}, False),
        ({"text": "A red ball.", "prompt": "What is on the left?"}, False),
    ],
)
def test_geometry_follows_from_every_text_of_the_example(message, flip):
    sample = PREPARE(example(picture(), messages=[{"style": "long_caption", **message}]))
    want = Geometry.ALL if flip else Geometry.ALL & ~Geometry.FLIP
    assert sample.images[0].geometry == want
    assert image_rows(sample.spans)[0, 7] == want


def test_same_example_gives_the_same_sample_after_crossing_a_process_border():
    clone = pickle.loads(pickle.dumps(PREPARE))
    first, second = PREPARE(example(picture())), clone(example(picture()))
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.spans, second.spans)
    assert np.array_equal(first.images[0].pixels, second.images[0].pixels)


# --- what cannot become a sample


@pytest.mark.parametrize(
    "message",
    [
        {"text": "The end<|endoftext|> of it."},
        {"alternatives": ["Fine.", "<|endoftext|>"]},
        {"text": "A cat.", "prompt": "<|endoftext|>What is it?"},
    ],
)
def test_text_that_spells_a_control_token_is_refused(message):
    with pytest.raises(SampleError) as caught:
        PREPARE(example(messages=[{"style": "long_caption", **message}]), key="k7")
    assert (caught.value.reason, caught.value.where) == ("control_token", "k7")
    assert "<|endoftext|>" in caught.value.what


def test_text_that_spells_an_image_symbol_is_only_text():
    keep = Recipe(image=IMAGE, text=TextPolicy(placeholders="keep"))
    prepare = Preparer(recipe=keep, tokenizer=TOKENIZER)
    sample = prepare(example(messages=[{"style": "long_caption", "text": "<im_patch>"}]))
    assert sample.tokens.max() < TOKENIZER.vocab_size


def test_missing_image_file_is_a_sample_error_that_names_the_path(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(SampleError) as caught:
            PREPARE(example(path))
        assert (caught.value.reason, caught.value.where) == ("image_missing", str(path))
        pickle.loads(pickle.dumps(caught.value))
        with pytest.raises(SampleError):
            read_path(path)


def test_url_without_a_reader_is_refused():
    with pytest.raises(SampleError) as caught:
        PREPARE(example("http://example.com/a.jpg"))
    assert (caught.value.reason, caught.value.where) == ("image_url", "http://example.com/a.jpg")


def test_bytes_that_are_not_an_image_are_a_sample_error_that_names_the_key():
    with pytest.raises(SampleError) as caught:
        PREPARE(example(b"no image"), key="k7")
    assert "k7" in caught.value.where


def test_unsharded_path_refuses_bombs_by_the_same_limits():
    limits = ImageLimits(max_source_side_px=100)
    prepare = Preparer(
        recipe=Recipe(image=dataclasses.replace(IMAGE, limits=limits)), tokenizer=TOKENIZER
    )
    with pytest.raises(SampleError) as caught:
        prepare(example(np.zeros((101, 100, 3), np.uint8)), key="k7")
    assert (caught.value.reason, caught.value.where) == ("image_bomb", "k7")


def test_template_format_needs_a_tokenizer_with_a_template():
    recipe = Recipe(image=IMAGE, text=TextPolicy(message_format="template"))
    bare = dataclasses.replace(TOKENIZER, chat=None)
    with pytest.raises(ConfigError) as caught:
        Preparer(recipe=recipe, tokenizer=bare)(example())
    assert caught.value.reason == "no_chat_template"


@pytest.mark.parametrize("field", ["question", "answer"])
def test_placeholder_of_another_code_base_is_refused_by_name_or_kept(field):
    row = {"style": "user_qa", "question": "What?", "answer": "A cat."}
    row = {"message_list": [{**row, field: f"<image>\n{row[field]}"}]}
    with pytest.raises(SampleError) as caught:
        Preparer(recipe=Recipe(image=IMAGE), tokenizer=TOKENIZER)(row, key="k")
    assert (caught.value.reason, caught.value.where) == ("media_placeholder", "k")
    assert caught.value.facts == {"spelled": "<image>"}
    keep = Recipe(image=IMAGE, text=TextPolicy(placeholders="keep"))
    tokens = Preparer(recipe=keep, tokenizer=TOKENIZER)(row, key="k").tokens
    assert "<image>" in TOKENIZER.decode(tokens.tolist())


def test_tokenizer_of_another_message_format_is_refused(tmp_path):
    shape = dataclasses.replace(SHAPES["chatml"], eos="<|endoftext|>")
    folder = make_tokenizer(tmp_path / "t", shape)
    for loaded, wanted in (("role", "chatml"), ("chatml", "role"), ("template", "none")):
        tokenizer = load_tokenizer(folder, policy=TextPolicy(message_format=loaded))
        recipe = Recipe(image=IMAGE, text=TextPolicy(message_format=wanted))
        with pytest.raises(ConfigError) as caught:
            Preparer(recipe=recipe, tokenizer=tokenizer)(example())
        assert caught.value.reason == "tokenizer_format"
        assert caught.value.facts["got"] == loaded


# --- actions as tokens

ROBOT = {"style": "robot_action", "instruction": "go", "action": [[-1.0, 0.3], [1.0, 0.0]]}


def robot_ids(form, *, message=ROBOT, **text):
    recipe = Recipe(image=IMAGE, text=TextPolicy(actions=form, system_prompt="none", **text))
    prepare = Preparer(recipe=recipe, tokenizer=TOKENIZER)
    return prepare({"message_list": [message]}).tokens.tolist()


@pytest.mark.parametrize("message_format", ["role", "chatml", "none"])
def test_actions_are_the_last_ids_of_the_vocabulary(message_format):
    values = np.array(ROBOT["action"]).reshape(-1)
    size = TOKENIZER.own_size
    ids = robot_ids("tokens", message_format=message_format)
    assert ids[-4:] == bin_tokens(value_bins(values), vocab_size=size).tolist()
    assert "go" in TOKENIZER.decode(ids[:-4])
    ids = robot_ids("openvla", message_format=message_format)
    assert ids[-4:] == openvla_tokens(values, vocab_size=size).tolist()


def test_actions_are_not_tokens_where_they_would_be_markup():
    with pytest.raises(ConfigError) as caught:
        robot_ids("tokens", message_format="template")
    assert caught.value.reason == "action_tokens"
    changed, size = json.loads(TOKENIZER.json), TOKENIZER.own_size
    changed["added_tokens"].append({**changed["added_tokens"][0], "id": size - 9, "content": "<x>"})
    with pytest.raises(ConfigError) as caught:
        check_action_tokens(json.dumps(changed), {}, size=size)
    assert caught.value.reason == "action_tokens"
    with pytest.raises(ConfigError):
        check_action_tokens(TOKENIZER.json, {"eos": size - 1}, size=size)


def test_a_text_that_spells_an_action_token_is_refused():
    with pytest.raises(SampleError) as caught:
        robot_ids("tokens", message={**ROBOT, "instruction": "say <|action_3|>"})
    assert caught.value.reason == "control_token"


# --- the recipe as data

RECIPE = Recipe(image=IMAGE)
OTHER_TEXT = {
    "prompt_templates": "uber_model",
    "system_prompt": "style",
    "message_format": "chatml",
    "chat_date": "2024-07-26",
    "num_variants": 3,
    "point_format": "xml",
    "choices": "varied",
    "select_answer": "first",
    "whitespace": "strip",
    "placeholders": "keep",
    "reasoning": "keep",
    "styles": StyleSheet(styles=(("mine", OwnStyle(like="vqa2", templates=("{question}!",))),)),
    "movable": True,
    "paraphrase": 0.5,
    "actions": "tokens",
}
OTHER_IMAGE = {
    "views": (VIEW, ImageView(size_px=112)),
    "headroom": 1.5,
    "max_side_px": 100,
    "codec": "png",
    "quality": 90,
    "keep": "never",
    "overview": "resized",
    "limits": ImageLimits(max_megapixels=10),
    "resample": "bilinear",
    "decode": "reduced",
    "family": Qwen2VL(),
}


def test_recipe_is_plain_json():
    plain = RECIPE.to_dict()
    assert json.loads(json.dumps(plain)) == plain


def test_every_setting_of_the_policies_is_tried_below():
    assert set(OTHER_TEXT) == {f.name for f in dataclasses.fields(TextPolicy)}
    assert set(OTHER_IMAGE) == {f.name for f in dataclasses.fields(ImagePolicy)}
    assert {f.name for f in dataclasses.fields(Recipe)} == {"text", "image", "video", "seed"}


@pytest.mark.parametrize(
    "other",
    [
        *(
            Recipe(image=IMAGE, text=dataclasses.replace(TextPolicy(), **{name: value}))
            for name, value in OTHER_TEXT.items()
        ),
        *(
            Recipe(image=dataclasses.replace(IMAGE, **{name: value}))
            for name, value in OTHER_IMAGE.items()
        ),
        Recipe(image=IMAGE, seed=1),
    ],
)
def test_change_of_any_setting_shows_in_the_recipe(other):
    assert other.to_dict() != RECIPE.to_dict()
    assert json.loads(json.dumps(other.to_dict())) == other.to_dict()


def test_settings_of_videos_count_for_datasets_with_videos_only():
    other = Recipe(image=IMAGE, video=VideoPolicy(max_frames=3, pool=2))
    assert other.to_dict() == RECIPE.to_dict()
    plain = other.video.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    names = {f.name for f in dataclasses.fields(VideoPolicy)}
    assert set(plain) == names - {"store", "max_clip_bytes"}
    assert set(VideoPolicy(store="clip", max_clip_bytes=9).to_dict()) == names


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ImageView)])
def test_every_field_of_a_view_is_in_the_recipe(name):
    assert name in RECIPE.to_dict()["image"]["views"][0]
