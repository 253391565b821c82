"""Datasets for models of transformers: batches equal those of the models' own processors."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from loader import (
    IterableDatasetMixture,
    MMCollator,
    ModelPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
    model_view,
    view_collator,
)
from loader.evaluation import questions_of, references
from loader.integrations import attach_to_trainer, check_model
from preprocess.media import ImagePolicy
from preprocess.model import load_model
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.families import plan_pictures
from shardspec.keyed import SampleRng, dataset_seed, sample_seed
from shardspec.manifest import require_manifest
from tests import model_folders, processor_folders

WRITERS = model_folders.WRITERS | model_folders.RELATIVES
NATIVE = tuple(model_folders.WRITERS)
THROUGH = ("aya_vision",)
"""Goes through its own processor."""

FAMILIES = (*NATIVE, *THROUGH)
SIZES = ((61, 97), (200, 150), (30, 31), (56, 84), (150, 40), (112, 112), (90, 33), (28, 28))
"""(height, width) of the pictures; some are stored as they are, some smaller."""

CHATS = (
    ([0], None, ["What is it?", "A red ball."]),
    ([1], "Be brief.\n", ["  Naïve, 你好:\n\n- a\n- b\n", "\n3 cats 👩‍👩‍👧, ok "]),
    ([2, 3], None, ["From <image> to <image>?", "Bluer."]),
    ([4, 5, 6], None, ["<image>One", "1", "and <image> or <image>?", "2 or 3\n"]),
    ([], None, ["Say hello.", "Hello."]),
    ([7], "You see all.", ["<image>\nWhy?", "So.", "Really?", "Yes, really.", "Hm", "x"]),
    ([0], None, ["<image>\nx", "y"]),
    ([], "Sum.", ["1+1", "2", "2+2", "4"]),
)
"""(pictures, system text, texts in turn); `<image>` is where a picture is."""


def picture(i):
    height, width = SIZES[i]
    levels = np.random.RandomState(i).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(levels)


def rows():
    """The chats as rows of a file."""
    for pictures, system, texts in CHATS:
        sides = itertools.cycle(("user", "assistant"))
        turns = [{"role": "system", "content": system}] if system else []
        turns += [{"role": side, "content": text} for side, text in zip(sides, texts, strict=False)]
        yield {"messages": turns, "images": [f"{i}.png" for i in pictures]}


def parts(text, images):
    """A text with placeholders as the parts of a message, as a person would write it."""
    found = []
    for n, piece in enumerate(text.split("<image>")):
        if n:
            found.append({"type": "image", "image": next(images)})
        if piece:
            found.append({"type": "text", "text": piece})
    return found


def messages(chat, stored):
    """The messages of a chat for a processor; `stored` gives its pictures."""
    pictures, system, texts = chat
    images = iter(stored)
    found = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    leading = "<image>" * (len(pictures) if not any("<image>" in t for t in texts) else 0)
    for t, text in enumerate(texts):
        # A placeholder in front of everything says nothing: its line break goes with it.
        if t == 0:
            text = leading + text.replace("<image>\n", "<image>", 1)
        found.append({"role": ("user", "assistant")[t % 2], "content": parts(text, images)})
    return found


def mostly_slow(*everyday, known=FAMILIES):
    """Families as parameters: what all do alike is tested every day for a few of them."""
    return [
        name if name in everyday else pytest.param(name, marks=pytest.mark.slow) for name in known
    ]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def folders(build_once):
    """The folder of each family's tiny model."""

    def build(folder):
        for name, write in model_folders.WRITERS.items():
            write(folder / name)
        for name in THROUGH:
            processor_folders.write(name, folder / name)

    return build_once("models", build)


@pytest.fixture(scope="session")
def datasets(build_once, inline_cli, folders):
    """The chats as a dataset for each family, with lossless pictures, in two shards."""

    def build(folder):
        build_chats(inline_cli, folder, {name: folders / name for name in FAMILIES})

    return build_once("model-datasets", build)


def build_chats(inline_cli, folder, models):
    for i in range(len(SIZES)):
        picture(i).save(folder / f"{i}.png")
    lines = [json.dumps(row) for row in rows()]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    for name, model in models.items():
        inline_cli.good(
            *("shards", folder / "chats.jsonl", "--model", model),
            *("--out", folder / name, "--cache", folder / "cache", "--codec", "png"),
            *("--workers", 1, "--num-shards", 2),
        )


@pytest.fixture(scope="session")
def processors(folders):
    made = {}

    def get(name):
        if name not in made:
            room = processor_folders if name in THROUGH else model_folders
            made[name] = room.processor(name, folders / name)
        return made[name]

    return get


ENDS = dict.fromkeys(FAMILIES, "<|im_end|>") | {
    "gemma3": "<end_of_turn>",
    "idefics3": "<end_of_utterance>",
    "pixtral": "</s>",
}

PICTURES = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")
VIDEOS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def open_dataset(datasets, name, *, backend="pil", **options):
    url = str(datasets / name)
    changes = options.pop("changes", {})
    view = View(model=model_view(url, backend=backend, **changes), purpose="inference")
    return StreamingDataset(url, view=view, seed=3, **options)


def chat_of(dataset, i):
    """Finds the chat that a stored sample is."""
    (message,) = dataset.reader.record(i)["message_list"]
    (found,) = [chat for chat in CHATS if chat[2][-1] == message["messages"][-1]]
    return found


def theirs(processor, chat, **options):
    """What the model's own processor makes of a chat."""
    found = processor.apply_chat_template(
        messages(chat, map(picture, chat[0])),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    return dict(found)


def unpadded(name, own):
    """What a processor makes of a sample without its padding, which our batches do not have."""
    found = dict(own)
    if name in ("llava_next", "llava_onevision") and "pixel_values" in own:
        pixels = own["pixel_values"].flatten(0, 1)
        found["pixel_values"] = pixels[pixels.flatten(1).any(1)]
    if name == "idefics3" and "pixel_values" in own:
        assert own["pixel_attention_mask"].all()
    if name == "pixtral" and "pixel_values" in own:
        sizes = own["image_sizes"].tolist()
        found["pixel_values"] = [
            picture[:, :high, :wide]
            for picture, (high, wide) in zip(own["pixel_values"], sizes, strict=True)
        ]
    return found


def batches(dataset, count=1, **options):
    options = {"sequence_length": 512, "global_batch_size": len(CHATS), **options}
    loader = make_dataloader(
        dataset, decode_threads=0, pad_mode="batch_max", with_metadata=True, **options
    )
    return list(itertools.islice(loader, count))


def order_of(dataset, batch):
    """Lists the stored numbers of the rows of a batch."""
    numbers = {dataset.reader.record(i)["key"]: i for i in range(dataset.num_samples)}
    return [numbers[each["key"]] for each in batch["metadata"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_what_the_processor_makes_of_the_originals(datasets, processors, name):
    dataset = open_dataset(datasets, name)
    (batch,) = batches(dataset)
    chats = [chat_of(dataset, i) for i in order_of(dataset, batch)]
    want = [theirs(processors(name), chat) for chat in chats]
    names = {"input_ids", "attention_mask", "labels", "pixel_values", "metadata"}
    names |= {"mm_token_type_ids", "image_grid_thw"} if name == "qwen2_vl" else set()
    names |= {"token_type_ids"} if name == "gemma3" else set()
    names |= {"image_sizes"} if name in ("llava_next", "llava_onevision", "pixtral") else set()
    names |= {"batch_num_images"} if name == "llava_onevision" else set()
    assert set(batch) == names
    for row, own in enumerate(want):
        length = own["input_ids"].shape[1]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            if key in own:
                assert batch[key][row, :length].tolist() == own[key][0].tolist()
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["labels"][row, length:] == -100).all()
    own = [unpadded(name, each) for each in want]
    for key in PICTURES:
        if key in batch and (name, key) == ("pixtral", "pixel_values"):
            largest = batch["image_sizes"].amax(0).tolist()
            pictures = [picture for each in own if key in each for picture in each[key]]
            assert batch[key].shape == (len(pictures), 3, *largest)
            for mine, theirs_ in zip(batch[key], pictures, strict=True):
                high, wide = theirs_.shape[1:]
                assert torch.equal(mine[:, :high, :wide], theirs_)
                assert not mine[:, high:].any()
                assert not mine[:, :, wide:].any()
        elif key in batch:
            # The pictures of Idefics3 are those of one row.
            axis = 1 if (name, key) == ("idefics3", "pixel_values") else 0
            joined = torch.cat([each[key] for each in own if key in each], axis)
            assert batch[key].shape == joined.shape
            assert batch[key].dtype == joined.dtype
            same = (batch[key] == joined).reshape(len(joined), -1).all(1)
            if name == "internvl":  # the thumbnail of a picture that was stored smaller is not
                assert same.float().mean() > 0.8
            else:
                assert same.all()


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_what_ends_them_are_learned_and_nothing_else(datasets, processors, name):
    dataset = open_dataset(datasets, name)
    tokenizer = processors(name).tokenizer
    for i in range(dataset.num_samples):
        example = dataset.example(i)
        labels, ids = example["labels"], example["input_ids"]
        learned = labels != -100
        assert (labels[learned] == ids[learned]).all()
        answers = chat_of(dataset, i)[2][1::2]
        if name in (
            "llava",
            "llava_next",
        ):  # their template has generation marks, and no token ends an answer
            own = theirs(processors(name), chat_of(dataset, i), return_assistant_tokens_mask=True)
            assert own["assistant_masks"][0].tolist() == learned.tolist()
            assert learned.any()
        else:
            trim = str.strip if name == "gemma3" else str
            start = " " if name == "idefics3" else ""
            text = tokenizer.decode(ids[learned])
            assert text == "".join(f"{start}{trim(answer)}{ENDS[name]}" for answer in answers)


@pytest.mark.parametrize("name", mostly_slow("qwen2_vl", "llava_onevision", "pixtral"))
def test_shards_equal_the_unsharded_path(datasets, folders, name):
    dataset = open_dataset(datasets, name)
    same_as_unsharded(dataset, folders / name, lambda i: chat_of(dataset, i)[0])


def same_as_unsharded(dataset, folder, pictures_of):
    """Compares a dataset with what its records and pictures become without shards."""

    def example_of(i):
        pictures = [np.asarray(picture(n)) for n in pictures_of(i)]
        return {"message_list": dataset.reader.record(i)["message_list"], "image": pictures}

    same_as_the_unsharded_path(dataset, folder, example_of)


def same_as_the_unsharded_path(dataset, folder, example_of, **recipe):
    """Compares a dataset with what raw examples, by stored number, become without shards."""
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    model = load_model(str(folder), tokenizer=tokenizer, videos="video" in recipe)
    image = ImagePolicy(
        views=(), family=model.stored.family, codec="png", resample=model.stored.family.filter
    )
    text = TextPolicy(message_format="none", system_prompt="none")
    made = Recipe(text=text, image=image, **recipe)
    prepare = Preparer(recipe=made, tokenizer=tokenizer, model=model)
    unsharded = ModelPreprocessor(prepare, stored=model.stored, view=dataset.view.model)
    seed = dataset_seed(3, dataset.manifest.dataset, "train")
    for i in range(dataset.num_samples):
        rng = SampleRng()(sample_seed(seed, idx=i, length=dataset.num_samples, epoch=0))
        want, got = unsharded(example_of(i), rng), dataset.example(i)
        assert set(want) == set(got)
        for key, value in got.items():
            if key != "metadata":
                np.testing.assert_array_equal(value, want[key])


def rows_of(batch, name):
    """The rows of a batch in a form that can be compared, and its pictures."""
    keys = [each["key"] for each in batch["metadata"]]
    columns = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    pictures = {k: columns.pop(k) for k in (*PICTURES, *VIDEOS) if k in columns}
    if name == "pixtral" and pictures:  # padded to the largest of a rank's batch
        pixels, sizes = pictures["pixel_values"], pictures["image_sizes"].tolist()
        cut = [each[:, :h, :w].flatten() for each, (h, w) in zip(pixels, sizes, strict=True)]
        pictures["pixel_values"] = torch.cat(cut)
    pictures = [each.flatten() for each in pictures.values()]
    found, masks = batch.get("attention_mask"), []
    if isinstance(found, dict):  # of packs of Gemma 3
        masks = list(found.values())
    elif found is not None and found.ndim == 4:  # and of PaliGemma
        masks = [columns.pop("attention_mask")]
    columns = {k: v.movedim(-2, 0) for k, v in columns.items()}
    rows = [
        (k, *(v[r].tolist() for v in columns.values()), *(m[r].numpy().tobytes() for m in masks))
        for r, k in enumerate(keys)
    ]
    return rows, pictures


def run(datasets, name, *, world_size, count, state=None, **options):
    """Gives global batches of all ranks together, and a state."""
    steps, loader = [([], []) for _ in range(count)], None
    for rank in range(world_size):
        dataset = open_dataset(datasets, name, rank=rank, world_size=world_size, canonical_ranks=4)
        loader = make_dataloader(
            dataset,
            global_batch_size=4,
            sequence_length=options.get("sequence_length", 400),
            pad_mode="max_len",
            with_metadata=True,
            decode_threads=options.get("decode_threads", 0),
            **({"pack": True, "balance": False} if options.get("pack") else {}),
        )
        if state is not None:
            loader.load_state_dict(state)
        taken = 0
        while taken < count:
            for batch in itertools.islice(loader, count - taken):
                rows, pictures = rows_of(batch, name)
                steps[taken][0].extend(rows)
                steps[taken][1].append(pictures)
                taken += 1
    joined = [
        (rows, *map(torch.cat, zip(*filter(None, pictures), strict=True)))
        for rows, pictures in steps
    ]
    return joined, json.loads(json.dumps(loader.state_dict()))


def equal(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and all(map(torch.equal, a[1:], b[1:]))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", mostly_slow("gemma3", "pixtral"))
def test_every_number_of_ranks_and_every_resume_gives_the_same_rows(datasets, name):
    same_for_every_number_of_ranks(datasets, name, pack=False)


@pytest.mark.parametrize("name", mostly_slow("qwen2_vl", "llava_onevision"))
def test_every_number_of_ranks_and_every_resume_gives_the_same_packs(datasets, name):
    same_for_every_number_of_ranks(datasets, name, pack=True)


def same_for_every_number_of_ranks(datasets, name, **options):
    want, _ = run(datasets, name, world_size=1, count=5, **options)
    for world_size, threads in ((2, 0), (4, 2)):
        got, _ = run(
            datasets, name, world_size=world_size, count=5, decode_threads=threads, **options
        )
        assert equal(got, want)
    _, state = run(datasets, name, world_size=2, count=2, **options)
    rest, _ = run(datasets, name, world_size=4, count=3, state=state, **options)
    assert equal(rest, want[2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", model_folders.RELATIVES)
def test_models_that_share_a_family_have_the_same_rows_everywhere(inline_cli, tmp_path, name):
    folder = model_folders.RELATIVES[name](tmp_path / "m")
    build_chats(inline_cli, tmp_path, {name: folder})
    for pack in (False, True):
        same_for_every_number_of_ranks(tmp_path, name, pack=pack)
    dataset = open_dataset(tmp_path, name)
    same_as_unsharded(dataset, folder, lambda i: chat_of(dataset, i)[0])
    model, processor = (
        make(name, folder) for make in (model_folders.model, model_folders.processor)
    )
    same_losses(dataset, name, model, processor)


def token_losses(model, batch):
    """The loss of each learned token of each example, by the example's key."""
    labels = batch["labels"]
    metadata = batch["metadata"]
    inputs = {k: v for k, v in batch.items() if k not in ("metadata", "subsegment_ids", "labels")}
    with torch.no_grad():
        logits = model(**inputs).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    found = {}
    for row, each in enumerate(metadata):
        examples = each.get("examples", [each])
        for number, example in enumerate(examples):
            learned = labels[row, 1:] != -100
            if "examples" in each:
                learned &= batch["subsegment_ids"][row, 1:] == number
            found[example["key"]] = losses[row, learned]
    return found


@pytest.mark.parametrize("name", mostly_slow("qwen2_vl", "llava_onevision", "pixtral"))
def test_a_model_has_the_loss_of_its_processors_batch_packed_or_not(
    datasets, folders, processors, name
):
    model = (processor_folders if name in THROUGH else model_folders).model(name, folders / name)
    same_losses(open_dataset(datasets, name), name, model, processors(name))


def same_losses(dataset, name, model, processor):
    """Compares losses and gradients of our batch, packed or not, with those of the processor's."""
    (batch,) = batches(dataset)
    numbers = order_of(dataset, batch)
    metadata = batch.pop("metadata")
    ours = model(**batch).loss
    ours.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    # Each row alone, as its processor makes it, with our labels: the processor makes none.
    model.zero_grad()
    count = int((batch["labels"][:, 1:] != -100).sum())
    total, alone = 0.0, {}
    for row, i in enumerate(numbers):
        own = theirs(processor, chat_of(dataset, i))
        labels = batch["labels"][row : row + 1, : own["input_ids"].shape[1]]
        loss = model(**own, labels=labels).loss * int((labels[:, 1:] != -100).sum()) / count
        loss.backward()
        total += float(loss.detach())
        alone |= token_losses(model, {**own, "labels": labels, "metadata": [metadata[row]]})
    if name != "internvl":  # see the thumbnails above
        assert float(ours.detach()) == pytest.approx(total, rel=1e-5)
        for mine, parameter in zip(gradients, model.parameters(), strict=True):
            if parameter.grad is not None:
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
    (packed,) = batches(
        dataset,
        global_batch_size=1,
        pack=True,
        sequence_length=1024,
        extra_keys=("subsegment_ids",),
    )
    assert len(packed["metadata"][0]["examples"]) == len(CHATS)
    assert ("attention_mask" in packed) == (name == "gemma3")
    if name != "internvl":
        for key, losses in token_losses(model, packed).items():
            torch.testing.assert_close(losses, alone[key], rtol=1e-4, atol=2e-5)
    (single,) = batches(dataset)
    unpacked = token_losses(model, single)
    for key, losses in token_losses(model, packed).items():
        torch.testing.assert_close(losses, unpacked[key], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_smolvlm_takes_pictures_without_their_padding_as_idefics3_does(tmp_path):
    folder = model_folders.idefics3(tmp_path / "m", kind="smolvlm")
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    assert load_model(str(folder), tokenizer=tokenizer).stored.family.kind == "idefics3"
    processor = model_folders.processor("idefics3", folder)
    own = processor.apply_chat_template(
        [messages(CHATS[i], map(picture, CHATS[i][0])) for i in (3, 5)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    pixels = own.pop("pixel_values").flatten(0, 1)
    mask = own.pop("pixel_attention_mask")
    kept = pixels[pixels.flatten(1).any(1)]
    assert len(kept) < len(pixels)
    model, labels = model_folders.model("smolvlm", folder), own["input_ids"]
    with torch.no_grad():
        want = model(
            **own,
            pixel_values=pixels.unflatten(0, (2, -1)),
            pixel_attention_mask=mask,
            labels=labels,
        ).loss
        got = model(**own, pixel_values=kept[None], labels=labels).loss
    torch.testing.assert_close(got, want)


# Batches for a model that are not what its user thinks


def refused(reason, call, kind=ConfigError):
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.reason == reason
    return str(caught.value)


def test_fewer_pixels_need_no_new_shards_and_more_are_refused(datasets, processors):
    dataset = open_dataset(datasets, "qwen2_vl", changes={"max_pixels": 28 * 28 * 9})
    assert (
        max(
            image["tokens"]
            for i in range(dataset.num_samples)
            for image in dataset.example(i)["metadata"]["images"]
        )
        <= 9
    )
    url = str(datasets / "qwen2_vl")
    text = refused(
        "model_view",
        lambda: open_dataset(datasets, "qwen2_vl", changes={"max_pixels": 28 * 28 * 41}),
    )
    assert "max_pixels=31360 stored, 32144 asked for" in text
    refused("family_unknown", lambda: model_view(url, max_pixel=1))
    # Lengths of samples with several pictures are known for the stored values alone.
    refused("view_lengths", lambda: batches(dataset, pack=True, global_batch_size=1))
    one = open_dataset(
        datasets, "qwen2_vl", changes={"max_pixels": 28 * 28 * 9}, where="num_images < 2"
    )
    (batch,) = batches(one, pack=True, global_batch_size=1)
    assert len(batch["metadata"][0]["examples"]) == one.num_samples
    assert batch["image_grid_thw"].prod(1).max() <= 36


def test_what_changes_no_tokens_leaves_lengths_known(datasets):
    changes = {"sliding_window": 5, "mean": (0.4, 0.4, 0.4)}
    options = {"pack": True, "sequence_length": 256, "global_batch_size": 1}
    (want,), (got,) = (
        batches(open_dataset(datasets, "gemma3", changes=each), **options) for each in ({}, changes)
    )
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert not torch.equal(*got["attention_mask"].values())


def test_settings_of_the_other_kind_are_refused_by_name(datasets, tiny_dataset):
    url = str(datasets / "qwen2_vl")
    model = model_view(url)
    text = refused("model_view", lambda: View(model=model, normalize="siglip", tree="molmo1"))
    assert "normalize, tree" in text
    refused("model_view", lambda: StreamingDataset(url, view=View(pixels="patches")))
    refused("model_view", lambda: StreamingDataset(str(tiny_dataset), view=View(model=model)))
    refused("model_view", lambda: model_view(str(tiny_dataset)))
    refused("argument", lambda: model_view(url, backend="Pillow"))
    dataset = StreamingDataset(url)
    assert dataset.view.model == model
    assert dataset.view.model.backend == "torchvision"
    refused("loader_options", lambda: batches(dataset, max_images=3))
    refused("loader_options", lambda: batches(dataset, pad_side="left", pack=True))
    refused("loader_options", lambda: batches(dataset, map=lambda example, _: example, pack=True))
    refused("extra_key", lambda: batches(dataset, extra_keys=("token_pooling",)))
    refused("model_view", lambda: view_collator(dataset.view, sequence_length=512))
    examples = [dataset.example(i) for i in range(len(CHATS))]
    text = refused("example_mismatch", lambda: MMCollator(sequence_length=512)(examples))
    assert "pixel_values are of a dataset for a model" in text


def test_pictures_that_ranks_share_cost_their_tokens(datasets):
    dataset = open_dataset(datasets, "internvl", rank=0, world_size=2)
    options = {"global_batch_size": 2, "sequence_length": 512}
    loader = make_dataloader(dataset, balance="images", **options)
    assert loader._schedule._patches_per_crop == 1


def test_datasets_whose_views_are_for_different_models_do_not_mix(datasets, tmp_path):
    shutil.copytree(datasets / "llava", tmp_path / "other", copy_function=shutil.copyfile)
    manifest = require_manifest(str(datasets / "llava"))
    (tmp_path / "other").chmod(0o755)
    (tmp_path / "other" / "manifest.json").write_bytes(replace(manifest, dataset="other").encode())
    one = StreamingDataset(str(datasets / "llava"))
    alike = StreamingDataset(str(tmp_path / "other"))
    mixture = IterableDatasetMixture([one, alike], seed=0)
    assert len(batches(mixture, global_batch_size=4)[0]["pixel_values"]) > 2
    view = View(model=model_view(str(tmp_path / "other"), backend="pil"))
    other = StreamingDataset(str(tmp_path / "other"), view=view)
    text = refused("mixture_view", lambda: IterableDatasetMixture([one, other], seed=0))
    assert "backend" in text


def test_a_model_that_would_not_see_the_pictures_is_refused(datasets, folders, tiny_dataset):
    model = model_folders.model("llava", folders / "llava")
    molmo = make_dataloader(
        StreamingDataset(str(tiny_dataset)), global_batch_size=1, sequence_length=1024
    )
    text = refused("trainer_model", lambda: check_model(model, molmo))
    assert "LlavaForConditionalGeneration" in text
    check_model(torch.nn.Linear(1, 1), molmo)
    check_model(
        model,
        make_dataloader(
            StreamingDataset(str(datasets / "llava")), global_batch_size=1, sequence_length=512
        ),
    )


def test_a_trainer_that_would_divide_a_models_batches_by_rows_is_refused(datasets, folders):
    dataset = StreamingDataset(str(datasets / "llava"))
    loader = make_dataloader(dataset, global_batch_size=8, sequence_length=512)
    model = model_folders.model("llava", folders / "llava")
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(n_gpu=8))
    text = refused("trainer_gpus", lambda: attach_to_trainer(trainer, loader))
    assert "8 GPUs" in text


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_trainer_trains_on_the_batches(datasets, folders, tmp_path, name, pack):
    from transformers import Trainer, TrainingArguments

    model = model_folders.model(name, folders / name)
    loader = make_dataloader(
        StreamingDataset(str(datasets / name), seed=1),
        global_batch_size=2,
        sequence_length=512,
        decode_threads=1,
        pack=pack,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(model=model, args=arguments)
    attach_to_trainer(trainer, loader)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_evaluation_counts_every_sample_once_and_fillers_have_no_loss(datasets):
    dataset = open_dataset(datasets, "llava", tail="pad", shuffle=False)
    found = batches(dataset, count=2, global_batch_size=5)
    real = torch.cat([batch["real"] for batch in found])
    assert real.tolist() == [True] * 8 + [False] * 2
    assert (found[1]["labels"][~found[1]["real"]] == -100).all()


def test_a_sequence_is_cut_in_its_text_and_never_in_a_picture(datasets):
    url = str(datasets / "llava")
    view = View(model=model_view(url), sequence_length=120, purpose="inference")
    dataset = StreamingDataset(url, view=view)
    lengths = [len(dataset.example(i)["input_ids"]) for i in range(5)]
    assert max(lengths) <= 120
    short = View(model=model_view(url), sequence_length=12, max_images=2)
    dataset = StreamingDataset(url, view=short)
    reasons = set()
    for i in range(dataset.num_samples):
        with pytest.raises(SampleError) as caught:
            dataset.example(i)
        reasons.add(caught.value.reason)
    assert reasons == {"image_cut", "no_loss", "too_many_images"}


def _conversations(count):
    """Conversations of any texts, with pictures anywhere, and their sizes."""
    rng = np.random.RandomState(7)
    words = [
        "a",
        " red",
        "ball\n",
        "\n\n",
        "  ",
        "naïve",
        "你好",
        "👩‍👩‍👧",
        "1.",
        "- x",
        "def f(x):\n\t",
        "é",
        "!?",
    ]
    for _ in range(count):
        chosen, texts = [], []
        for turn in range(2 * rng.randint(1, 4)):
            pieces = ["".join(rng.choice(words, rng.randint(1, 9))) + "w" for _ in range(2)]
            pictures = rng.randint(0, 3) if turn % 2 == 0 else 0
            chosen += rng.randint(0, len(SIZES), pictures).tolist()
            texts.append(pieces[0] + ("<image>" * pictures + pieces[1] if pictures else ""))
        yield chosen, "Be brief.\n" if rng.randint(2) else None, texts


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_any_conversation_has_the_ids_of_the_processor_with_qwens_own_tokenizer(tmp_path, name):
    folder = WRITERS[name](tmp_path / "m", real=True)
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    model = load_model(str(folder), tokenizer=tokenizer)
    processor = model_folders.processor(name, folder)
    for chosen, system, texts in _conversations(40):
        own = [model.message("system", system)] if system else []
        for t, text in enumerate(texts):
            text = text.replace("<image>", "<|image|>")
            own.append(model.message(("user", "assistant")[t % 2], text))
        found = model.tokenize(own, sizes=[SIZES[i] for i in chosen])
        plans = iter(plan_pictures(model.stored.family, [SIZES[i] for i in chosen]))
        blocks = [
            model.stored.block(next(plans)) if i == model.stored.placeholder else [i]
            for i in found.ids.tolist()
        ]
        images = map(picture, chosen)
        asked = [{"role": "system", "content": parts(system, images)}] if system else []
        for t, text in enumerate(texts):
            role = ("user", "assistant")[t % 2]
            asked.append({"role": role, "content": parts(text, images)})
        want = processor.apply_chat_template(
            asked, tokenize=True, return_dict=True, return_tensors="np"
        )
        assert np.concatenate(blocks).tolist() == want["input_ids"][0].tolist()
        learned = processor.tokenizer.decode(found.ids[found.learned].tolist())
        for answer in texts[1::2]:
            assert answer.strip() in learned


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_worker_processes_make_the_same_batches(datasets, name):
    dataset = open_dataset(datasets, name)
    (want,) = batches(dataset, pack=True, global_batch_size=2)
    (got,) = batches(dataset, pack=True, global_batch_size=2, workers=1)
    assert set(got) == set(want)
    assert got["use_cache"] is False
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, got[key])
        elif isinstance(value, dict):
            assert all(torch.equal(mask, got[key][kind]) for kind, mask in value.items())


# Evaluations, and functions of the user's

ASKED = [(chat, turn) for chat in CHATS for turn in range(len(chat[2]) // 2)]


def evaluation(datasets, name, *, where=None, **view):
    url = str(datasets / name)
    own = View(model=model_view(url, backend="pil"), purpose="evaluation", **view)
    return StreamingDataset(url, view=own, seed=1, tail="pad", shuffle=False, where=where)


def answer_of(chat, turn):
    return chat[2][2 * turn + 1].strip()


def prompt_of(processor, chat, turn):
    """What the model's own processor makes of a conversation in front of an answer."""
    number = bool(chat[1]) + 2 * turn + 1
    return processor.apply_chat_template(
        messages(chat, map(picture, chat[0]))[:number],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )["input_ids"][0]


@pytest.mark.parametrize("name", mostly_slow("qwen2_vl", "aya_vision"))
def test_every_question_is_asked_by_the_prompt_of_the_processor(datasets, processors, name):
    # Where pictures are of several turns, their own processors leave no mark of each.
    where = "num_images < 3" if name in THROUGH else None
    dataset = evaluation(datasets, name, where=where)
    known = [asked for asked in ASKED if len(asked[0][0]) < 3 or not where]
    assert dataset.num_samples == len(known)
    found = batches(dataset, count=2, global_batch_size=8, pad_side="left", metadata=True)
    rows = [row for batch in found for row in asked_rows(batch)]
    assert len(rows) == len(known)
    for ids, labels, metadata in rows:
        answer = metadata["record"]["answer"].strip()
        ((chat, turn),) = [asked for asked in ASKED if answer_of(*asked) == answer]
        assert (labels == -100).all()
        want = prompt_of(processors(name), chat, turn).tolist()
        if name in ("llava", "llava_next"):
            # Their templates write a space after the prompt, often a token that is not learned.
            assert ids.tolist()[: len(want)] == want
            assert len(ids) - len(want) <= 1
        else:
            assert ids.tolist() == want


def asked_rows(batch):
    """The rows of a batch without padding, which is in front."""
    for row, metadata in enumerate(batch["metadata"]):
        mask = batch["attention_mask"][row].bool()
        assert mask.tolist() == sorted(mask.tolist())
        if batch["real"][row]:
            yield batch["input_ids"][row, mask], batch["labels"][row], metadata


def test_references_name_each_question_and_its_answer(datasets):
    dataset = evaluation(datasets, "qwen2_vl")
    right = references(dataset)
    assert [(row["key"], row["question_idx"]) for row in right] == questions_of(dataset)
    answers = sorted(answer_of(*asked) for asked in ASKED)
    assert sorted(row["record"]["answer"].strip() for row in right) == answers
    assert evaluation(datasets, "qwen2_vl", questions="first").num_samples == len(CHATS)
    short = StreamingDataset(
        str(datasets / "qwen2_vl"),
        view=View(purpose="evaluation", sequence_length=8),
        tail="pad",
    )
    with pytest.raises(SampleError) as caught:
        short.example(0)
    assert caught.value.reason == "too_long"
    with pytest.raises(ConfigError) as caught:
        dataset.example(0, question=9)
    assert caught.value.reason == "question_number"


def test_pictures_of_later_turns_are_refused_where_they_cannot_be_told(datasets):
    dataset = evaluation(datasets, "aya_vision", where="num_images > 2")
    (found, *_) = batches(evaluation(datasets, "qwen2_vl", where="num_images > 2"))
    sample = found["metadata"][0]["sample"]
    refused("evaluation_pictures", lambda: dataset.example(sample), SampleError)


def noted(example, rng):
    return {**example, "input_ids": example["input_ids"] + rng.randint(1)}


@pytest.mark.parametrize("name", mostly_slow("qwen2_vl", "pixtral"))
def test_a_map_that_changes_nothing_changes_nothing(datasets, name):
    dataset = open_dataset(datasets, name)
    (want,) = batches(dataset)
    (got,) = batches(dataset, map=noted)
    assert set(got) == set(want)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[key], value)
            assert got[key].dtype == value.dtype
        else:
            assert got[key] == value


def test_a_users_collate_gets_the_examples_of_a_model(datasets):
    def lengths(examples):
        return [len(example["input_ids"]) for example in examples]

    dataset = open_dataset(datasets, "llava")
    loader = make_dataloader(
        dataset, sequence_length=512, global_batch_size=8, decode_threads=0, collate_fn=lengths
    )
    found = next(iter(loader))
    assert sorted(found) == sorted(len(dataset.example(i)["input_ids"]) for i in range(8))


@pytest.mark.slow
def test_several_conversations_of_a_sample_are_shown_one_per_epoch(folders, inline_cli, tmp_path):
    inline_cli.good(
        *("shards", "pixmo_cap", "--source", "sample", "--limit", 6, "--workers", 1),
        *("--model", folders / "llava", "--out", tmp_path / "out", "--num-shards", 1),
        *("--cache", tmp_path / "cache"),
    )
    seen, drawn = {}, []
    for world_size in (1, 2):
        rows = []
        for rank in range(world_size):
            dataset = StreamingDataset(
                str(tmp_path / "out"), seed=3, rank=rank, world_size=world_size, canonical_ranks=2
            )
            loader = make_dataloader(
                dataset, global_batch_size=2, sequence_length=1024, with_metadata=True
            )
            for batch in itertools.chain.from_iterable(loader for _ in range(3)):
                rows += zip(
                    (one["key"] for one in batch["metadata"]),
                    map(tuple, batch["labels"].tolist()),
                    strict=True,
                )
        drawn.append(sorted((key, tuple(x for x in labels if x != -100)) for key, labels in rows))
    assert drawn[0] == drawn[1]
    for key, learned in drawn[0]:
        seen.setdefault(key, set()).add(learned)
    # Three epochs of six samples: each is shown three times, some by their other conversation.
    counts = [sum(key == one for one, _ in drawn[0]) for key in seen]
    assert counts == [3] * 6
    assert max(map(len, seen.values())) > 1
    # An evaluation asks each message, in its first variant.
    asked = evaluation(tmp_path, "out")
    num_messages = [len(dataset.reader.record(i)["message_list"]) for i in range(6)]
    assert asked.num_samples == sum(num_messages) > 6
    last = asked.example(0, question=num_messages[0] - 1)["metadata"]["record"]
    assert last["style"] == dataset.reader.record(0)["message_list"][-1]["style"]
