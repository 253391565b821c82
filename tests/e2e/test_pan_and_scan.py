"""Pan and scan of Gemma 3: the crops, ids and pixels are those of the model's own processor."""

import json

import numpy as np
import torch
from PIL import Image

from loader.assembly import ModelView, assemble_for_model
from preprocess.media import ImagePolicy
from preprocess.model import load_model
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.families import Gemma3, family_from_dict, family_to_dict
from tests import model_folders

SETTINGS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 40,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
SIZES = ((100, 300), (90, 100), (350, 61), (30, 300), (97, 131), (48, 800))
"""(height, width): three crops, too square, six that are four, too narrow, two, and four."""


def gemma3(folder, **settings):
    model_folders.gemma3(folder)
    path = folder / "preprocessor_config.json"
    model_folders.write_json(path, {**json.loads(path.read_text()), **settings})
    return folder


def picture(size):
    levels = np.random.RandomState(sum(size)).randint(0, 256, (*size, 3)).astype(np.uint8)
    return Image.fromarray(levels)


def test_crops_are_those_of_the_processor(tmp_path):
    folder = gemma3(tmp_path / "m", **SETTINGS)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), tokenizer=tokenizer)
    family = model.stored.family
    assert family_from_dict(family_to_dict(family)) == family
    preparer = Preparer(
        recipe=Recipe(
            text=TextPolicy(message_format="none", system_prompt="none"),
            image=ImagePolicy(views=(), family=family, codec="png", resample="bilinear"),
        ),
        tokenizer=tokenizer,
        model=model,
    )
    processor = model_folders.processor("gemma3", folder)
    counts = []
    for sizes in (*([size] for size in SIZES), [SIZES[0], SIZES[1], SIZES[2]]):
        texts = ["<|image|>" * len(sizes) + "Which is it?", "The first."]
        pictures = [picture(size) for size in sizes]
        sample = preparer(
            {
                "image": [np.asarray(each) for each in pictures],
                "message_list": [{"style": "demo", "messages": texts}],
            }
        )
        view = ModelView(family=family, backend="pil")
        ours = assemble_for_model(sample, np.random.RandomState(0), stored=model.stored, view=view)
        content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": "Which is it?"}]
        answer = [{"type": "text", "text": "The first."}]
        roles = zip(("user", "assistant"), (content, answer), strict=True)
        text = processor.apply_chat_template([{"role": r, "content": c} for r, c in roles])
        # Only as arguments of the call: the processor looks for them nowhere else.
        own = processor(
            text=[text],
            images=[pictures],
            add_special_tokens=False,
            return_tensors="pt",
            images_kwargs=SETTINGS,
        )
        for name in ("input_ids", "token_type_ids"):
            assert ours[name].tolist() == own[name][0].tolist()
        assert torch.equal(torch.from_numpy(ours["pixel_values"]), own["pixel_values"])
        counts.append(len(own["pixel_values"]) - len(sizes))
    assert counts == [3, 0, 4, 0, 2, 4, 7]


def test_pan_and_scan_has_the_numbers_of_the_processor(tmp_path):
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    folder = gemma3(tmp_path / "m", do_pan_and_scan=True, pan_and_scan_max_num_crops=None)
    family = load_model(str(folder), tokenizer=load_tokenizer(str(folder))).stored.family
    names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
    assert family.pan_and_scan == tuple(
        Gemma3Processor.images_kwargs[f"pan_and_scan_{name}"] for name in names
    )
    assert "pan_and_scan" not in family_to_dict(Gemma3())
