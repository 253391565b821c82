"""DataFormatter: what is drawn, how often, from which keys, and in which markup."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess.text
from preprocess.text import (
    DataFormatter,
    TextPolicy,
    chat_frame,
    message_texts,
    safe_geometry,
)
from preprocess.text.chat import ChatFrame
from preprocess.text.styles import STYLES
from shardspec.errors import ConfigError, SampleError
from shardspec.sample import Geometry
from shardspec.toml import load_toml

BARE = ChatFrame(first="", later="", suffix="", response_prefix="")
TEMPLATES = load_toml(Path(preprocess.text.__file__).parent / "templates" / "caption.toml")
CAPTION_1200 = {"style": "long_caption", "text": "x" * 1200}


def branches(*messages, key="key", seed=0, frame=BARE, **policy):
    formatter = DataFormatter(policy=TextPolicy(**policy), frame=frame, seed=seed)
    return formatter({"message_list": list(messages)}, key=key)


def variants(message, **settings):
    (branch,) = branches(message, **settings)
    (turn,) = branch.turns
    return turn


def prompts(message, **settings):
    return [variant.prompt for variant in variants(message, **settings)]


def pooled(message, **settings):
    """Prompts of 20 samples, 500 variants each: a share is of the samples, not of one key."""
    keys = [f"key-{i}" for i in range(20)]
    return [p for key in keys for p in prompts(message, key=key, num_variants=500, **settings)]


def near(count, *, num, share):
    """Whether a count is within four standard deviations of its binomial mean."""
    return abs(count - num * share) < 4 * (num * share * (1 - share)) ** 0.5


def test_length_hint_counts_characters_in_fifteens_with_noise():
    drawn = pooled(CAPTION_1200)
    hints = [int(p.split()[1].rstrip(":")) for p in drawn if p != "long_caption :"]
    assert all(re.fullmatch(r"long_caption \d*:", prompt) for prompt in drawn)
    # (1200 + noise) // 15: mean 79.5, and the noise's 25 characters are 1.67 units.
    assert 79.4 < np.mean(hints) < 79.6
    assert 1.6 < np.std(hints) < 1.8


def test_length_hint_is_on_nine_prompts_in_ten():
    drawn = pooled(CAPTION_1200)
    assert near(len(drawn) - drawn.count("long_caption :"), num=len(drawn), share=0.9)


def test_length_hint_equals_the_formula_on_the_same_draws():
    formatter = DataFormatter(policy=TextPolicy(), frame=BARE)
    for seed in range(50):
        got = formatter.system_prefix("long_caption", "x" * 1200, np.random.RandomState(seed))
        rng = np.random.RandomState(seed)
        hinted = rng.random_sample() < 0.9
        length = (1200 + int(rng.normal(scale=25.0))) // 15
        assert got == (f"long_caption {length}:" if hinted else "long_caption :")


def test_length_hint_of_a_short_text_is_never_negative():
    drawn = prompts({"style": "long_caption", "text": "A cat."}, num_variants=500)
    assert all(re.fullmatch(r"long_caption \d*:", prompt) for prompt in drawn)


def test_length_hint_measures_each_alternative_on_its_own():
    message = {"style": "transcript", "alternatives": ["a" * 150, "b" * 3000]}
    for variant in variants(message, num_variants=50):
        hint = variant.prompt.removeprefix("transcript").strip(" :")
        assert not hint or (int(hint) < 100) == (variant.response[0] == "a")


def test_demo_styles_are_named_in_one_prompt_of_ten():
    drawn = pooled(CAPTION_1200, system_prompt="demo_or_style")
    assert set(drawn) == {"", "long_caption:"}
    assert near(drawn.count("long_caption:"), num=len(drawn), share=0.1)


def test_other_styles_are_always_named():
    assert not STYLES["transcript"].demo
    message = {"style": "transcript", "text": "I see a cat."}
    assert set(prompts(message, system_prompt="demo_or_style", num_variants=200)) == {"transcript:"}


@pytest.mark.parametrize("mode, prompt", [("none", ""), ("style", "long_caption:")])
def test_modes_without_draws_give_one_prompt(mode, prompt):
    assert set(prompts(CAPTION_1200, system_prompt=mode)) == {prompt}


@pytest.mark.parametrize("style", ["long_caption", "short_caption", "transcript"])
def test_templates_of_a_style_are_drawn_uniformly(style):
    message = {"style": style, "text": "A cat."}
    settings = {"prompt_templates": "uber_model", "system_prompt": "none"}
    counts = Counter(pooled(message, **settings))
    share = 1 / len(TEMPLATES[style])
    assert set(counts) == set(TEMPLATES[style])
    assert all(near(n, num=counts.total(), share=share) for n in counts.values())


def test_template_follows_the_prefix_after_one_space():
    settings = {"prompt_templates": "uber_model", "system_prompt": "style"}
    got = set(prompts(CAPTION_1200, num_variants=300, **settings))
    assert got == {f"long_caption: {template}" for template in TEMPLATES["long_caption"]}


def test_explicit_prompt_wins_over_templates():
    message = {**CAPTION_1200, "prompt": "What is it?"}
    settings = {"prompt_templates": "uber_model", "system_prompt": "none"}
    assert set(prompts(message, **settings)) == {"What is it?"}
    assert set(prompts(message, system_prompt="style")) == {"long_caption: What is it?"}


def test_same_key_and_seed_give_the_same_variants():
    assert variants(CAPTION_1200, seed=3) == variants(CAPTION_1200, seed=3)


def test_other_key_seed_or_place_in_the_example_gives_other_variants():
    first, second = branches(CAPTION_1200, CAPTION_1200)
    drawn = [
        first.turns,
        second.turns,
        branches(CAPTION_1200, key="other")[0].turns,
        branches(CAPTION_1200, seed=1)[0].turns,
    ]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


@given(num_variants=st.integers(1, 20), more=st.integers(1, 20))
def test_more_variants_keep_the_first_ones(num_variants, more):
    few = variants(CAPTION_1200, num_variants=num_variants)
    many = variants(CAPTION_1200, num_variants=num_variants + more)
    assert many[:num_variants] == few
    assert len(many) == num_variants + more


def test_alternatives_get_equal_shares():
    message = {"style": "transcript", "alternatives": ["One.", "Two.", "Three."]}
    responses = Counter(variant.response for variant in variants(message, num_variants=8))
    assert responses == {"One.": 8, "Two.": 8, "Three.": 8}


def test_alternatives_draw_their_prompts_apart():
    message = {"style": "transcript", "alternatives": ["A" * 600, "B" * 600]}
    drawn = prompts(message, num_variants=8)
    assert drawn[:8] != drawn[8:]


def test_each_message_is_a_conversation_of_one_turn():
    got = branches(CAPTION_1200, {"style": "transcript", "text": "I see."})
    assert [len(branch.turns) for branch in got] == [1, 1]
    assert [branch.turns[0][0].response for branch in got] == ["x" * 1200, "I see."]


@pytest.mark.parametrize("whitespace", ["keep", "strip"])
def test_space_around_whole_texts_is_kept_or_stripped_as_the_policy_says(whitespace):
    def texts(message):
        policy = {"system_prompt": "none", "num_variants": 1, "whitespace": whitespace}
        (variant,) = variants(message, **policy)
        return [variant.prompt, variant.response]

    text = "  A cat.\n"
    want = text if whitespace == "keep" else "A cat."
    for style, answer in (("long_caption", "text"), ("doc_qa", "answer"), ("user_qa", "answer")):
        assert texts({"style": style, "question": text, answer: text}) == [want, want]
        assert texts({"style": style, "prompt": text, answer: text}) == [want, want]
    assert texts({"style": "transcript", "alternatives": [text]}) == ["", want]
    # What becomes a vote or a part of a text has no space of its own.
    assert texts({"style": "vqa2", "question": "Q", "answers": [text, "A cat."]}) == ["Q", "A cat."]
    choice = {"style": "a_okvqa_mc", "prompt": text, "options": [" a ", "b "], "answer_idx": 1}
    assert texts(choice) == [want, "B. b"]


@pytest.mark.parametrize("whitespace", ["keep", "strip"])
def test_system_text_goes_in_front_of_the_first_user_text(whitespace):
    message = {
        "style": "text_sft",
        "system": " Be brief.\n",
        "messages": ["What is it?", "A cat.", "Where?", "Here."],
    }
    policy = TextPolicy(system_prompt="style", num_variants=1, whitespace=whitespace)
    formatter = DataFormatter(policy=policy, frame=chat_frame("role", None))
    (branch,) = formatter({"message_list": [message]}, key="k")
    start = " Be brief.\n" if whitespace == "keep" else "Be brief."
    assert [turn[0].prompt for turn in branch.turns] == [
        f" User: text_sft: {start}\n\nWhat is it? Assistant:",
        " User: Where? Assistant:",
    ]
    for blank in (None, "", " \n"):
        (branch,) = formatter({"message_list": [{**message, "system": blank}]}, key="k")
        assert branch.turns[0][0].prompt == " User: text_sft: What is it? Assistant:"
    with pytest.raises(SampleError) as caught:
        formatter({"message_list": [{**message, "system": ["Be brief."]}]}, key="k")
    assert caught.value.reason == "message_fields"


@pytest.mark.parametrize("weight, millionths", [(0.2, 200_000), (1, 1_000_000), (1 / 3, 333_333)])
def test_weights_are_stored_in_millionths(weight, millionths):
    (branch,) = branches({**CAPTION_1200, "weight": weight})
    assert branch.weight == millionths


def test_messages_without_a_weight_weigh_one():
    assert branches(CAPTION_1200)[0].weight == 1_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": ""},
        {"text": " \n"},
        {"text": None},
        {"text": 3},
        {"alternatives": []},
        {"alternatives": ["One.", ""]},
        {"alternatives": ["One.", None]},
    ],
)
def test_message_without_text_is_a_sample_error(fields):
    with pytest.raises(SampleError) as caught:
        branches({"style": "long_caption", **fields}, key="k7")
    assert (caught.value.reason, caught.value.where) == ("message_fields", "k7")


@pytest.mark.parametrize(
    "style, offer",
    [("long_captions", "did you mean 'long_caption'?"), ("xyz", "known: "), (None, "known: ")],
)
def test_unknown_style_is_a_sample_error_that_offers_known_ones(style, offer):
    with pytest.raises(SampleError) as caught:
        branches({"style": style, "text": "A cat."}, key="k7")
    assert (caught.value.reason, caught.value.where) == ("message_style", "k7")
    assert offer in caught.value.fix


@pytest.mark.parametrize("num_variants", [0, -1, 1001])
def test_number_of_variants_out_of_range_is_refused(num_variants):
    with pytest.raises(ConfigError) as caught:
        TextPolicy(num_variants=num_variants)
    assert caught.value.reason == "num_variants"


def conversation(frame, *turns, end):
    """Writes out a conversation as training lays it out."""
    text = ""
    for i, (user, answer) in enumerate(turns):
        start = frame.later if i else frame.first
        text += start + user + frame.suffix + frame.response_prefix + answer + end
    return text


@pytest.mark.parametrize(
    "message_format, text",
    [
        ("role", " User: Q Assistant: A# User: R Assistant: B#"),
        ("none", "Q A# R B#"),
        (
            "chatml",
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA#\n"
            "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB#",
        ),
        ("template", "[Q]A#;[R]B#"),
    ],
)
def test_message_formats_frame_a_conversation(message_format, text):
    template = ChatFrame(first="[", later=";[", suffix="]", response_prefix="")
    frame = chat_frame(message_format, template)
    assert conversation(frame, ("Q", "A"), ("R", "B"), end="#") == text


def test_variants_carry_the_markup_of_the_frame():
    frame = chat_frame("role", None)
    message = {"style": "long_caption", "text": "A cat.", "prompt": "What is it?"}
    (variant,) = variants(message, frame=frame, system_prompt="none", num_variants=1)
    assert variant.prompt == " User: What is it? Assistant:"
    assert variant.response == " A cat."


def test_template_format_without_a_template_is_refused():
    with pytest.raises(ConfigError) as caught:
        chat_frame("template", None)
    assert caught.value.reason == "no_chat_template"


@pytest.mark.parametrize(
    "text",
    [
        "a red ball on green grass",
        "leftover pizza on an upright piano",
        "a bright sky, a swordfish, a signal tower",
        "two dogs designed to be texture samples",
        "three people watching birds",
    ],
)
def test_captions_without_sides_and_writing_may_be_flipped(text):
    assert safe_geometry([text]) == Geometry.ALL


@pytest.mark.parametrize(
    "text",
    [
        "the ball on the left",
        "To its RIGHT, a dog",
        "the leftmost person",
        "a right-hand drive car",
        "arrows run clockwise",
        "a dog facing the camera",
        "mirrored in the lake",
        "white text on black",
        "the words are faded",
        "two letters",
        "it reads STOP",
        "a shirt that says hello",
        "a stop sign",
        "neon signs above the doors",
        "rows of logos",
        "the number 7 on a jersey",
        "Roman numerals",
        "a clock on the wall",
        "clocks of several kinds",
        "a map of France",
        "labelled jars",
        "handwritten and printed notes",
        "spelled out in lights",
    ],
)
def test_captions_with_sides_or_writing_may_not_be_flipped(text):
    assert safe_geometry([text]) == Geometry.CROP | Geometry.COLOR


def test_one_sided_text_among_several_forbids_the_flip():
    assert Geometry.FLIP not in safe_geometry(["a ball", "a ball on the left", "a ball"])


def test_texts_of_an_example_are_its_prompts_and_every_response():
    messages = [
        {"style": "long_caption", "text": " A cat. ", "prompt": "What is it?"},
        {"style": "transcript", "alternatives": ["One.", "Two."]},
    ]
    assert message_texts({"message_list": messages}) == [" A cat. ", "What is it?", "One.", "Two."]
