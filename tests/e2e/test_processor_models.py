"""Models through their own processors: samples and batches equal what those make of originals."""

import numpy as np
import pytest
import torch
from PIL import Image

from loader.assembly.families.processor import joined, processed
from preprocess.model import load_model
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.families import Processor
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
        want = theirs(text=[text], images=images, return_tensors="pt")
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
    whole = theirs(text=texts[few], images=sum(asked[few], []), return_tensors="pt", padding=True)
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
