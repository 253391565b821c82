"""PaliGemma: questions seen as a whole, answers causally, as its own processor has them."""

import itertools
import json

import numpy as np
import pytest
import torch

from loader import StreamingDataset, View, make_dataloader, model_view
from preprocess.media import ImagePolicy
from preprocess.model import load_model
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from tests import model_folders
from tests.e2e.test_model_videos import losses_of
from tests.e2e.test_models import (
    open_dataset,
    picture,
    same_as_unsharded,
    same_for_every_number_of_ranks,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CHATS = (
    ([0], "What is it?", " A red ball.\n"),
    ([2], "Naïve, 你好:\n\n- a", "\n3 cats 👩‍👩‍👧"),
    ([3, 4], "caption en", "two"),
)
REFUSED = (
    ([0], ["Why?", "So.", "Really?", "Yes."]),
    ([1], ["From <image> to?", "Bluer."]),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory, inline_cli):
    rows = (*((p, [q, a]) for p, q, a in CHATS), *REFUSED)
    return build(tmp_path_factory.mktemp("paligemma"), inline_cli, rows)


def build(folder, inline_cli, rows):
    model_folders.paligemma(folder / "model")
    for i in range(5):
        picture(i).save(folder / f"{i}.png")
    lines = []
    for pictures, texts in rows:
        sides = itertools.cycle(("user", "assistant"))
        turns = [{"role": r, "content": t} for r, t in zip(sides, texts, strict=False)]
        row = {"messages": turns, "images": [f"{i}.png" for i in pictures]}
        lines.append(json.dumps(row))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    inline_cli.good(
        *("shards", folder / "chats.jsonl", "--model", folder / "model", "--out", folder / "out"),
        *("--cache", folder / "cache", "--codec", "png", "--workers", 1, "--num-shards", 1),
    )
    return folder


def batch_of(folder, view=None, **options):
    url = str(folder / "out")
    view = view or View(model=model_view(url, backend="pil"))
    dataset = StreamingDataset(url, view=view, shuffle=False)
    loader = make_dataloader(
        dataset, sequence_length=256, decode_threads=0, pad_mode="batch_max", **options
    )
    return next(iter(loader))


def test_a_batch_is_what_the_processor_makes_of_prompts_and_suffixes(built):
    batch = batch_of(built, global_batch_size=3)
    processor = model_folders.processor("paligemma", built / "model")
    model = model_folders.model("paligemma", built / "model").train()
    rows = []
    for pictures, question, answer in CHATS:
        own = processor(
            text="<image>" * len(pictures) + question,
            images=[[picture(i) for i in pictures]],
            suffix=answer,
            return_tensors="pt",
        )
        rows.append(own)
        (row,) = [
            i
            for i, ids in enumerate(batch["input_ids"])
            if ids[: own["input_ids"].shape[1]].tolist() == own["input_ids"][0].tolist()
        ]
        length = own["input_ids"].shape[1]
        for key in ("attention_mask", "token_type_ids", "labels"):
            assert batch[key][row, :length].tolist() == own[key][0].tolist()
        assert not batch["attention_mask"][row, length:].any()
    assert sorted(map(len, batch["pixel_values"].flatten(1))) == [3 * 56 * 56] * 4
    count = sum(int((own["labels"][:, 1:] != -100).sum()) for own in rows)
    with torch.no_grad():
        total = sum(
            float(model(**own).loss) * int((own["labels"][:, 1:] != -100).sum()) / count
            for own in rows
        )
        assert float(model(**batch).loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_any_conversation_has_the_ids_of_the_processor(built):
    folder = built / "model"
    chat = load_model(str(folder), tokenizer=load_tokenizer(str(folder)))
    processor = model_folders.processor("paligemma", folder)
    rng = np.random.RandomState(3)
    words = ["a", " red", "ball\n", "  ", "naïve", "你好", "👩‍👩‍👧", "1.", "- x", "def f():\n\t"]
    for _ in range(40):
        count = rng.randint(1, 4)
        asked, said = ("".join(rng.choice(words, rng.randint(1, 9))) + "w" for _ in range(2))
        turns = [chat.message("user", asked, images=count), chat.message("assistant", said)]
        got = chat.tokenize(turns, sizes=[(97, 61)] * count)
        own = processor(
            text="<image>" * count + asked,
            images=[[picture(0)] * count],
            suffix=said,
            return_tensors="np",
        )
        soft = own["input_ids"][0] == chat.stored.soft_id
        assert soft.sum() == 16 * count
        text = own["input_ids"][0][~soft].tolist()
        assert got.ids[got.ids != chat.stored.placeholder].tolist() == text
        assert got.learned[count:].tolist() == (own["labels"][0][~soft] != -100).tolist()


def test_a_caption_that_nobody_asked_for_is_what_the_processor_makes_of_it(built):
    folder = built / "model"
    chat = load_model(str(folder), tokenizer=load_tokenizer(str(folder)))
    turns = [chat.message("user", "", images=1), chat.message("assistant", "A ball.")]
    got = chat.tokenize(turns, sizes=[(97, 61)])
    processor = model_folders.processor("paligemma", folder)
    own = processor(text="<image>", images=[[picture(0)]], suffix="A ball.", return_tensors="pt")
    one_picture = own["input_ids"][0, 15:].tolist()
    assert got.ids[1:].tolist() == one_picture[1:]
    assert got.learned[1:].tolist() == (own["labels"][0, 16:] != -100).tolist()


def test_documents_are_not_rendered_as_chats(built):
    folder = str(built / "model")
    tokenizer = load_tokenizer(folder, policy=TextPolicy(message_format="none"))
    chat = load_model(folder, tokenizer=tokenizer)
    image = ImagePolicy(views=(), family=chat.stored.family, resample=chat.stored.family.filter)
    recipe = Recipe(text=TextPolicy(message_format="none", system_prompt="none"), image=image)
    prepare = Preparer(recipe=recipe, tokenizer=tokenizer, model=chat)
    with pytest.raises(SampleError) as caught:
        prepare({"message_list": [{"style": "interleaved", "text": "A text."}]}, key="k")
    assert caught.value.reason == "loss_span"


@pytest.mark.slow
def test_shards_ranks_and_resumes_are_those_of_every_family(tmp_path, inline_cli):
    rows = [([i % 5], ["What is it?", f"It is {i}" + " and more" * i]) for i in range(8)]
    build(tmp_path, inline_cli, rows)
    for pack in (False, True):
        same_for_every_number_of_ranks(tmp_path, "out", pack=pack)
    dataset = open_dataset(tmp_path, "out")

    def pictures_of(i):
        answer = dataset.reader.record(i)["message_list"][0]["messages"][-1]
        return [int(answer.split()[2]) % 5]

    same_as_unsharded(dataset, tmp_path / "model", pictures_of)


def test_packs_that_its_masks_cannot_tell_are_refused(built):
    url = str(built / "out")
    for window, told in ((None, "does not say how many"), (255, "255 tokens, and sequence_length")):
        view = View(model=model_view(url, sliding_window=window))
        with pytest.raises(ConfigError) as caught:
            batch_of(built, global_batch_size=1, pack=True, view=view)
        assert caught.value.reason == "loader_options"
        assert told in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "attention"), [("gemma", "eager"), ("gemma", "sdpa"), ("gemma2", "eager")]
)
def test_a_pack_has_the_losses_of_its_examples(built, tmp_path, text, attention):
    folder = model_folders.paligemma(tmp_path / "m", text=text)
    tokenizer = load_tokenizer(str(folder))
    assert load_model(str(folder), tokenizer=tokenizer).stored.family.sliding_window == (
        256 if text == "gemma2" else 0
    )
    model = model_folders.model("paligemma", folder)
    model.set_attn_implementation(attention)
    options = {"extra_keys": ("subsegment_ids", "position_ids"), "with_metadata": True}
    alone = losses_of(model, batch_of(built, global_batch_size=3, **options))
    packed = batch_of(built, global_batch_size=1, pack=True, **options)
    assert packed["input_ids"].shape[0] == 1
    together = losses_of(model, packed)
    assert set(together) == set(alone)
    assert len(together) == 3
    for key, losses in together.items():
        torch.testing.assert_close(losses, alone[key], rtol=1e-4, atol=2e-5)
