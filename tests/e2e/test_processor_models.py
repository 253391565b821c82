"""Models through their own processors: samples and batches equal what those make of originals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from loader.assembly.families.collate import ModelCollator
from loader.assembly.families.processor import joined, processed
from preprocess.model import load_model, render
from preprocess.model.processor import open_processor, read_processor
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.families import Processor, refusal
from tests import processor_folders
from tests.e2e.test_models import mostly_slow

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""Some processors make arrays of tensors."""

SIZES = ((61, 97), (200, 150), (30, 31), (56, 84), (150, 40), (112, 112))
"""(height, width)."""

RNG = np.random.RandomState(0)
MANY = (*((int(h), int(w)) for h, w in RNG.randint(8, 170, (300, 2))), (8, 400), (400, 8), (8, 8))


def picture(size):
    levels = np.random.RandomState(size[0] * 7 + size[1]).randint(0, 256, (*size, 3))
    return levels.astype(np.uint8)


def load(kind, folder):
    processor_folders.write(kind, folder)
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    return load_model(str(folder), tokenizer=tokenizer)


def chats(model, sizes):
    """Conversations of one picture, of two in two turns, and of none."""
    sizes = iter(sizes)
    for one in sizes:
        more = [size for size in (next(sizes, None), next(sizes, None)) if size]
        yield (
            [one],
            [
                model.message("system", "Be brief.\n"),
                model.message("user", "What is it? 你好", images=1),
                model.message("assistant", " A red ball.\n"),
            ],
        )
        places = "<|image|> and" * len(more)
        yield (
            more,
            [
                model.message("user", f"One\n{places} then?"),
                model.message("assistant", "1"),
                model.message("user", "More?"),
                model.message("assistant", "2"),
            ],
        )


def same_as_processor(kind, folder, sizes):
    model = load(kind, folder)
    family = model.stored.family
    assert isinstance(family, Processor)
    theirs = processor_folders.processor(kind, folder)
    parts, asked, texts = [], [], []
    for chosen, messages in chats(model, sizes):
        found = model.tokenize(messages, sizes=chosen)
        pictures = [picture(size) for size in chosen]
        text, _ = model.render(messages)
        images = [Image.fromarray(each) for each in pictures] or None
        want = theirs(text=[text], images=images and [images], return_tensors="pt")
        assert found.ids.tolist() == want["input_ids"][0].tolist()
        learned = theirs.tokenizer.decode(found.ids[found.learned].tolist())
        answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
        assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)
        if family.type_ids:
            soft = torch.tensor(found.ids == model.stored.soft_id)
            assert torch.equal(want[family.type_ids][0], soft.long())
        if images:
            parts.append(processed(family, pictures, backend="pil"))
            same(parts[-1], want)
            asked.append(images)
            texts.append(text)
    # The pictures of a batch are those of its samples, padded as the processor pads them.
    few = slice(0, 6)
    whole = theirs(text=texts[few], images=asked[few], return_tensors="pt", padding=True)
    same(joined(parts[few]), whole)


def same(ours, theirs):
    text = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    assert set(ours) == theirs.keys() - text
    for key, value in ours.items():
        assert torch.equal(value, theirs[key])


@pytest.mark.parametrize(
    "kind", mostly_slow("aya_vision", "glm4v", "lighton_ocr", known=processor_folders.KINDS)
)
def test_samples_and_batches_are_what_the_processor_makes(tmp_path, kind):
    same_as_processor(kind, tmp_path / "m", SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", processor_folders.KINDS)
def test_any_size_is_what_the_processor_makes_of_it(tmp_path, kind):
    # Aria's processor passes a size of 980 px, whatever its files say.
    same_as_processor(kind, tmp_path / "m", MANY[-12:] if kind == "aria" else MANY)


EXTREME = ((1, 1), (1, 97), (97, 1), (3, 500), (1, 5000), (8000, 41), (41, 8000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", processor_folders.KINDS)
def test_extreme_sizes_are_what_the_processor_makes_of_them_or_left_out(tmp_path, kind):
    model = load(kind, tmp_path / "m")
    theirs = processor_folders.processor(kind, tmp_path / "m")
    messages = [model.message("user", "What is it?", images=1), model.message("assistant", "2")]
    text, _ = model.render(messages)
    done = 0
    for size in EXTREME:
        images = [[Image.fromarray(picture(size))]]
        try:
            want = theirs(text=[text], images=images, return_tensors="pt")
        except (ArithmeticError, RuntimeError, TypeError, ValueError):
            with pytest.raises(SampleError) as caught:
                model.tokenize(messages, sizes=[size])
            assert caught.value.reason == "picture_processor"
            continue
        found = model.tokenize(messages, sizes=[size])
        assert found.ids.tolist() == want["input_ids"][0].tolist()
        same(processed(model.stored.family, [picture(size)], backend="pil"), want)
        done += 1
    assert done > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", processor_folders.CONFIGS)
def test_models_that_are_packed_compute_of_a_row_what_they_compute_of_its_samples(tmp_path, kind):
    model = load(kind, tmp_path / "m")
    assert model.stored.family.packs
    network = processor_folders.model(kind, tmp_path / "m")
    rows, alone = [], []
    for i, size in enumerate(SIZES[:3]):
        asked = model.message("user", f"What is {i}?", images=1)
        found = model.tokenize([asked, model.message("assistant", "A red ball")], sizes=[size])
        ids = torch.tensor(found.ids[None].astype(np.int64))
        pictures = processed(model.stored.family, [picture(size)], backend="pil")
        rows.append((ids, torch.arange(ids.shape[1])[None], pictures))
        with torch.no_grad():
            alone.append(network(input_ids=ids, **pictures).logits)
    ids, positions, pictures = zip(*rows, strict=True)
    with torch.no_grad():
        packed = network(
            input_ids=torch.cat(ids, 1),
            position_ids=torch.cat(positions, 1),
            use_cache=False,
            **joined(pictures),
        )
    torch.testing.assert_close(packed.logits, torch.cat(alone, 1), atol=2e-6, rtol=1e-5)


def test_positions_that_only_the_model_knows_are_refused():
    family = Processor(
        model_type="glm4v",
        image_processor="Glm4vImageProcessor",
        settings="{}",
        image_token="<|image|>",
        marker="<|image|>",
    )
    with pytest.raises(ConfigError) as caught:
        ModelCollator(family, sequence_length=9, extra_keys=("position_ids",))
    assert caught.value.reason == "extra_positions"


def test_a_picture_that_the_processor_refuses_is_a_row_that_is_left_out(tmp_path, monkeypatch):
    model = load("aya_vision", tmp_path / "m")
    messages = [model.message("user", "What is it?", images=1), model.message("assistant", "2")]

    def refuse(*args, **options):  # noqa: ARG001
        raise ValueError("absolute aspect ratio must be smaller than 200\nmore")

    monkeypatch.setattr(render, "run", refuse)
    with pytest.raises(SampleError, match="aspect ratio must be smaller than 200") as caught:
        model.tokenize(messages, sizes=[(1, 400)])
    assert caught.value.reason == "picture_processor"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mllama"}, "cross attention"),
        ({"model_type": "x", "text_config": {"layer_types": ["full_attention", "conv"]}}, "conv"),
        ({"model_type": "x", "text_config": {"cross_attention_layers": [1]}}, "cross attention"),
        ({"model_type": "x", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "aya_vision", "text_config": {"layer_types": ["full_attention"]}}, ""),
    ],
)
def test_models_that_keep_more_than_a_sequence_are_refused(config, told):
    assert told in refusal(config)
    assert bool(refusal(config)) == bool(told)


def test_an_image_processor_that_is_not_there_is_refused_with_the_other_backend(tmp_path):
    family = load("aya_vision", tmp_path / "m").stored.family
    with pytest.raises(ConfigError) as caught:
        processed(replace(family, image_processor="NoneSuch"), [picture((9, 9))], backend="pil")
    assert caught.value.reason == "image_processor"
    assert "NoneSuch" in str(caught.value)


def test_outputs_that_cannot_be_joined_are_refused(tmp_path):
    processor_folders.write("aya_vision", tmp_path / "m")
    config = {"model_type": "aya_vision"}
    images = processor_folders.KINDS["aya_vision"][0]
    opened = open_processor(str(tmp_path / "m"), config, images)
    own = opened.image_processor._own

    def counted(pictures, **options):
        found = own(pictures, **options)
        return {**found, "batch_num_images": np.array([len(found["num_patches"])])}

    counted.fetch_images = own.fetch_images
    opened.image_processor._own = counted
    with pytest.raises(ConfigError) as caught:
        read_processor("m", opened, config, images)
    assert "batch_num_images of several pictures" in str(caught.value)
