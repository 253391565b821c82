"""Several images in one sample, and images placed by the text, from example to arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from loader.assembly.assemble import assemble
from loader.assembly.layout import IGNORED, PREFIX_SUBSEGMENT, TokenIds
from loader.assembly.view import View
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import SampleError
from shardspec.tiling import ImageView

VIEW = View(image=ImageView(size_px=56), branch_order="stored")


@pytest.fixture(scope="module")
def preparer():
    policy = TextPolicy(system_prompt="none", message_format="none", num_variants=1)
    return Preparer(recipe=Recipe(text=policy), tokenizer=load_tokenizer())


def picture(shade):
    stream = io.BytesIO()
    Image.new("RGB", (70, 60), (shade, 90, 200)).save(stream, "PNG")
    return stream.getvalue()


def example_of(text, *, num_images, answer="yes"):
    message = {"style": "user_qa", "messages": [text, answer]}
    return {"image": [picture(40 * i) for i in range(num_images)], "message_list": [message]}


def assembled(preparer, example):
    ids = TokenIds.from_special_ids(preparer.tokenizer.special_ids)
    sample = preparer(example)
    return assemble(sample, np.random.RandomState(0), view=VIEW, ids=ids)


def readable(preparer, ids):
    """Text with each image block as <img>."""
    symbols = preparer.tokenizer.special_ids
    block = [symbols["<im_start>"], *[symbols["<im_patch>"]] * 4, symbols["<im_end>"]]
    shown, i, run = "", 0, []
    while i < len(ids):
        if ids[i : i + 6] == block:
            shown += preparer.tokenizer.decode(run) + "<img>"
            run, i = [], i + 6
        else:
            run.append(ids[i])
            i += 1
    return shown + preparer.tokenizer.decode(run)


def test_several_images_stand_in_front_each_after_its_number(preparer):
    out = assembled(preparer, example_of("same place?", num_images=3))
    text = readable(preparer, out["input_ids"].tolist())
    assert text == "<|endoftext|>Image 1<img>Image 2<img>Image 3<img>same place? yes"
    symbols = preparer.tokenizer.special_ids
    assert (out["input_ids"][out["image_input_idx"]] == symbols["<im_patch>"]).all()
    assert (out["input_ids"][out["image_input_idx"] - 1] == symbols["<im_start>"]).all()
    assert out["images"].shape == (3, 3, 56, 56)
    assert out["images"][:, 0, 0, 0].tolist() == [0, 40, 80]


def test_one_image_has_no_number(preparer):
    out = assembled(preparer, example_of("where?", num_images=1))
    assert readable(preparer, out["input_ids"].tolist()) == "<|endoftext|><img>where? yes"


def test_images_go_where_the_text_places_them(preparer):
    out = assembled(preparer, example_of("first <|image|> then <|image|> ?", num_images=2))
    text = readable(preparer, out["input_ids"].tolist())
    assert text == "<|endoftext|>first <img> then <img> ? yes"
    last = int(out["image_end"].max())
    assert (out["subsegment_ids"][:last] == PREFIX_SUBSEGMENT).all()
    assert (out["subsegment_ids"][last:] == 0).all()
    assert (out["labels"][: last - 1] == IGNORED).all()
    assert out["position_ids"].tolist() == list(range(len(out["input_ids"])))


def test_text_only_examples_are_shifted_like_all_others(preparer):
    message = {"style": "user_qa", "messages": ["two and two?", "four"]}
    out = assembled(preparer, {"message_list": [message]})
    ids, labels = out["input_ids"], out["labels"]
    assert readable(preparer, ids.tolist()) == "<|endoftext|>two and two? four"
    learned = labels[labels != IGNORED].tolist()
    assert preparer.tokenizer.decode(learned) == " four<|endoftext|>"
    assert (labels[:-1][labels[:-1] != IGNORED] == ids[1:][labels[:-1] != IGNORED]).all()
    assert out["images"].shape[0] == 0


@pytest.mark.parametrize(
    ("text", "num_images", "answer"),
    [
        ("one <|image|> only", 2, "yes"),
        ("three <|image|> <|image|> <|image|>", 2, "yes"),
        ("fine", 1, "an <|image|> in the answer"),
        ("none to show <|image|>", 0, "yes"),
    ],
)
def test_placeholders_that_do_not_name_each_image_once_are_refused(
    preparer, text, num_images, answer
):
    example = example_of(text, num_images=num_images, answer=answer)
    if not num_images:
        del example["image"]
    with pytest.raises(SampleError) as caught:
        preparer(example)
    assert caught.value.reason == "image_placeholder"
