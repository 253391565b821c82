"""Videos for models of transformers: batches equal those of the models' own processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from loader import StreamingDataset, View, make_dataloader, model_view
from loader.assembly import ModelPlanner, ModelView, assemble_for_model
from loader.assembly.families.collate import ModelCollator
from loader.cli.preview import as_html, read_preview
from preprocess.datasets import get_dataset
from preprocess.media import ImagePolicy, VideoPolicy
from preprocess.media.video import VideoFrames
from preprocess.model import load_model
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import SampleError
from shardspec.families import family_from_dict, family_to_dict
from tests import model_folders, video_processors
from tests.chat_shapes import QWEN3_VL
from tests.e2e.test_models import (
    equal,
    open_dataset,
    refused,
    run,
    same_as_the_unsharded_path,
    same_for_every_number_of_ranks,
)

KINDS = (pytest.param("qwen2_vl", marks=pytest.mark.slow), "qwen2_5_vl", "qwen3_vl")
"""Qwen2.5-VL has all that Qwen2-VL has, and times."""
FPS = 2.0
BOUNDS = {
    "qwen2_vl": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 12},
    "qwen2_5_vl": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 12},
    "qwen3_vl": {"shortest_edge": 28 * 28 * 8, "longest_edge": 28 * 28 * 40},
}
"""Areas of frames, and of all frames together."""

CLIPS = ((5, 60, 100), (4, 200, 120), (1, 90, 90), (2, 30, 40), (9, 64, 300))
"""(frames, height, width)."""

CHATS = (
    ([0], [], ["What happens?", "A ball rolls."]),
    ([1], [(70, 50)], ["See <|image|>. What <|video|> now?", "Rain."]),
    ([0, 3], [], ["<|video|>One, and <|video|>?", "Two.", "Really?", "Yes."]),
    ([4], [(40, 40), (61, 97)], ["Which?", "The first."]),
    ([], [(40, 40)], ["And this?", "A cat."]),
)
"""(clips, sizes of pictures, texts in turn)."""


def clip(i):
    count, height, width = CLIPS[i]
    levels = np.random.RandomState(i).randint(0, 256, (count, height, width, 3))
    return levels.astype(np.uint8)


def picture(size):
    levels = np.random.RandomState(size[0]).randint(0, 256, (*size, 3)).astype(np.uint8)
    return Image.fromarray(levels)


class Decoded:
    """Stands for the decoder: the bytes of a file are the number of a clip."""

    policy = VideoPolicy()

    def __call__(self, source, on_frame, **_):
        frames = clip(int(source))
        count, height, width = CLIPS[int(source)]
        facts = {"fps": FPS, "num_frames": count, "width": width, "height": height}
        rest = "start_s end_s codec container rotation interlaced variable_rate decoder access"
        info = {**dict.fromkeys([*rest.split(), "damaged"]), **facts, "num_chosen": count}
        return VideoFrames(
            frames=[on_frame(frame, info) for frame in frames],
            times_s=[i / FPS for i in range(count)],
            numbers=list(range(count)),
            info=info,
        )


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with video_processors.torchvision():
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    """(preparer, processor) of each kind of model."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("video-models") / kind
            template = QWEN3_VL if kind == "qwen3_vl" else model_folders.QWEN2_VL_VIDEOS
            model_folders.qwen2_vl(folder, kind=kind, template=template)
            size = {"size": BOUNDS[kind], "patch_size": 14, **model_folders.CLIP}
            model_folders.write_json(folder / "video_preprocessor_config.json", size)
            tokenizer = load_tokenizer(str(folder))
            model = load_model(str(folder), tokenizer=tokenizer, videos=True)
            images = ImagePolicy(views=(), family=model.stored.family, codec="png")
            text = TextPolicy(message_format="none", system_prompt="none")
            preparer = Preparer(
                recipe=Recipe(text=text, image=images), tokenizer=tokenizer, model=model
            )
            preparer.video_preparer._decoder.close()
            preparer.video_preparer._decoder = Decoded()
            videos = video_processors.video_processor(kind, **size)
            made[kind] = preparer, video_processors.processor(kind, folder, videos=videos)
        return made[kind]

    return get


def prepared(preparer, chat):
    clips, sizes, texts = chat
    style = {"style": "demo", "messages": texts}
    example = {"message_list": [style]}
    if clips:
        example["video"] = [str(i).encode() for i in clips]
    if sizes:
        example["image"] = [np.asarray(picture(size)) for size in sizes]
    return preparer(example)


def assembled(preparer, samples, **options):
    stored = preparer.model.stored
    view = ModelView(family=stored.family)
    examples = [
        assemble_for_model(sample, np.random.RandomState(0), stored=stored, view=view)
        for sample in samples
    ]
    collate = ModelCollator(stored.family, sequence_length=4096, pad_mode="to_1", **options)
    return collate(examples)


def theirs(processor, sample, chat, *, stored):
    """What the model's processor makes of a chat, of the frames as they came or as stored."""
    clips, sizes, texts = chat
    pictures = [picture(size) for size in sizes]
    frames = [clip(i) for i in clips]
    if stored:
        pixels = [image.pixels for image in sample.images]
        pictures = [Image.fromarray(each) for each in pixels[: len(sizes)]]
        rest = iter(pixels[len(sizes) :])
        frames = [np.stack([next(rest) for _ in each]) for each in frames]
    messages = []
    for t, text in enumerate(texts):
        if t == 0 and "<|" not in text:
            text = "<|image|>" * len(sizes) + "<|video|>" * len(clips) + text
        marks = text.replace("<|image|>", "\0i\0").replace("<|video|>", "\0v\0").split("\0")
        kinds = {"i": {"type": "image"}, "v": {"type": "video"}}
        content = [kinds.get(m, {"type": "text", "text": m}) for m in marks if m]
        messages.append({"role": ("user", "assistant")[t % 2], "content": content})
    facts = [
        {"fps": FPS, "total_num_frames": len(f), "frames_indices": list(range(len(f)))}
        for f in frames
    ]
    found = processor(
        text=[processor.apply_chat_template(messages)],
        images=[pictures] if pictures else None,
        videos=[frames] if frames else None,
        video_metadata=[facts] if frames else None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    return {k: torch.as_tensor(v) for k, v in found.items() if k != "video_metadata"}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_processor(setups, kind):
    preparer, processor = setups(kind)
    for chat in CHATS:
        sample = prepared(preparer, chat)
        batch = assembled(preparer, [sample])
        whole, small = (theirs(processor, sample, chat, stored=s) for s in (False, True))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(batch[name], whole[name]), (chat, name)
        for name in ("image_grid_thw", "video_grid_thw"):
            assert (name in batch) == (name in whole), (chat, name)
            assert name not in batch or torch.equal(batch[name], whole[name]), (chat, name)
        assert ("second_per_grid_ts" in batch) == (kind == "qwen2_5_vl" and bool(chat[0]))
        if "second_per_grid_ts" in batch:
            assert torch.equal(batch["second_per_grid_ts"], whole["second_per_grid_ts"].float())
        if chat[0]:
            assert torch.equal(batch["pixel_values_videos"], small["pixel_values_videos"])
        learned = batch["labels"][batch["labels"] != -100].tolist()
        assert preparer.tokenizer.decode(learned).count("<|im_end|>") == len(chat[2]) // 2


def rope_index(kind):
    """The model's own arithmetic of positions, without a model."""
    from importlib import import_module

    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    title = {"qwen2_vl": "Qwen2VLModel", "qwen2_5_vl": "Qwen2_5_VLModel"}.get(kind, "Qwen3VLModel")
    own = getattr(module, title)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    holder = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    holder.get_vision_position_ids = lambda *args, **more: own.get_vision_position_ids(
        holder, *args, **more
    )
    return lambda **inputs: own.get_rope_index(holder, **inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_the_model(setups, kind):
    preparer, _ = setups(kind)
    samples = [prepared(preparer, chat) for chat in CHATS]
    batch = assembled(preparer, samples, extra_keys=("position_ids",))
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
    inputs = {name: batch[name] for name in (*names, "attention_mask")}
    if kind == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = batch["second_per_grid_ts"]
    wanted = rope_index(kind)(**inputs)
    mask = batch["attention_mask"].bool()
    for row in range(3):
        assert torch.equal(batch["position_ids"][1 + row][mask], wanted[row][mask])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_question_is_asked_with_the_videos_up_to_it(setups, kind):
    preparer, _ = setups(kind)
    chat = ([0, 3], [(70, 50)], ["<|video|>One?", "1", "And <|image|> or <|video|>?", "2"])
    sample, stored = prepared(preparer, chat), preparer.model.stored
    planner = ModelPlanner(
        stored,
        ModelView(family=stored.family),
        limit=None,
        max_images=None,
        weight=1.0,
        purpose="evaluation",
    )
    plans = [
        planner.plan(sample.tokens, sample.spans, np.random.RandomState(0), question=q)
        for q in (0, 1)
    ]
    # Frames come after all pictures in the shard, whatever the order of the text.
    assert [plan.images for plan in plans] == [
        [range(1, 6)],
        [range(1, 6), range(1), range(6, 8)],
    ]


def test_a_tool_may_give_a_picture(setups):
    preparer, processor = setups("qwen3_vl")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        {"role": "user", "content": "Blue?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "Seen: "}, {"type": "image"}]},
        {"role": "assistant", "content": "Grey."},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    seen = picture((61, 97))
    sample = preparer({"messages": messages, "tools": tools, "image": [np.asarray(seen)]})
    batch = assembled(preparer, [sample])
    text = processor.apply_chat_template(messages, tools=tools)
    own = processor(text=[text], images=[[seen]], return_tensors="pt", add_special_tokens=False)
    for name in ("input_ids", "image_grid_thw", "mm_token_type_ids"):
        assert torch.equal(batch[name], own[name])
    learned = batch["labels"][batch["labels"] != -100].tolist()
    said = preparer.tokenizer.decode(learned)
    assert "look" in said
    assert "Seen" not in said


REFUSED = {
    "a family without videos": ("the family fixed get no videos", {}),
    "subtitles": ("has subtitles", {"subtitles": [[0.0, 1.0, "Hello."]]}),
    "one frame for Qwen3-VL": ("has 1 frames", {"video": b"2"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_video_is_left_out_in_silence(setups, tmp_path, name):
    problem, changes = REFUSED[name]
    preparer, _ = setups("qwen3_vl")
    if "family" in name:
        model_folders.llava(tmp_path / "llava")
        tokenizer = load_tokenizer(str(tmp_path / "llava"))
        model = load_model(str(tmp_path / "llava"), tokenizer=tokenizer, videos=True)
        preparer = Preparer(recipe=preparer.recipe, tokenizer=tokenizer, model=model)
    example = {"video": b"0", "message_list": [{"style": "demo", "messages": ["a", "b"]}]}
    with pytest.raises(SampleError) as caught:
        preparer({**example, **changes})
    assert caught.value.reason == "model_videos"
    assert problem in str(caught.value)


def test_a_family_with_videos_is_read_as_it_is_written(setups):
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        family = setups(kind)[0].model.stored.family
        assert family_from_dict(family_to_dict(family)) == family


def losses_of(model, batch):
    """The loss of each learned token, by the key of its example."""
    inputs = {k: v for k, v in batch.items() if k not in ("metadata", "subsegment_ids", "labels")}
    with torch.no_grad():
        logits = model(**inputs).logits
    labels, found = batch["labels"][:, 1:], {}
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none"
    )
    for row, each in enumerate(batch["metadata"]):
        for number, example in enumerate(each.get("examples", [each])):
            own = (labels[row] != -100) & (batch["subsegment_ids"][row, 1:] == number)
            found[example["key"]] = losses[row, own]
    return found


@pytest.mark.slow
def test_videos_go_from_files_through_shards_into_packs(inline_cli, tmp_path):
    pytest.importorskip("av")
    folder = model_folders.qwen2_vl(tmp_path / "m", template=model_folders.QWEN2_VL_VIDEOS)
    command = ("shards", "moving_shapes", "--source", "sample", "--limit", 4, "--workers", 1)
    command = (*command, "--max-frames", 5, "--codec", "png", "--cache", tmp_path / "cache")
    inline_cli.good(*command, "--model", folder, "--out", tmp_path / "out")
    url = str(tmp_path / "out")
    dataset = StreamingDataset(url, seed=3)
    options = {"global_batch_size": 4, "sequence_length": 2048, "with_metadata": True}
    options |= {"extra_keys": ("subsegment_ids",)}
    batch = next(iter(make_dataloader(dataset, **options)))
    builder = dataset._stream.parts[0].builder
    model = builder.model
    rows = get_dataset("moving_shapes", source="sample", limit=4)
    preparer = Preparer(
        recipe=Recipe(
            text=TextPolicy(message_format="none", system_prompt="none"),
            image=ImagePolicy(views=(), family=model.family, codec="png", resample="bicubic"),
            video=VideoPolicy(max_frames=5),
        ),
        tokenizer=load_tokenizer(str(folder)),
        model=load_model(str(folder), tokenizer=load_tokenizer(str(folder)), videos=True),
    )
    unsharded = {}
    for i in range(4):
        sample = preparer(rows.get(i))
        own = assemble_for_model(
            sample,
            np.random.RandomState(0),
            stored=model,
            view=ModelView(family=model.family),
            purpose="inference",
        )
        unsharded[sample.key] = own["pixel_values_videos"]
    keys = [each["key"] for each in batch["metadata"]]
    wanted = torch.cat([torch.from_numpy(unsharded[key]) for key in keys])
    assert torch.equal(batch["pixel_values_videos"], wanted)
    assert [each["images"][0]["frames"] for each in batch["metadata"]] == [5] * 4
    lengths, _ = builder.lengths(np.arange(4))
    assert lengths.max() == int(batch["attention_mask"].sum(1).max())
    network = model_folders.model("qwen2_vl", folder)
    packed = next(iter(make_dataloader(dataset, **options | {"global_batch_size": 1}, pack=True)))
    alone = losses_of(network, batch)
    together = losses_of(network, packed)
    assert len(together) > 1
    for key, losses in together.items():
        torch.testing.assert_close(losses, alone[key], rtol=1e-4, atol=2e-5)
    # Pages for people show each patch along time, and each frame.
    words = {"title": "x", "lead": "x", "decode": lambda _: "", "symbols": {}, "model": model}
    assert as_html(read_preview(batch, **words)).count(b"crop 2") == 4
    inline_cli.good("report", tmp_path / "out")
    assert "frame 5 of 5, which are" in (tmp_path / "out" / "report.html").read_text()
    # Another family says so, by row.
    other = model_folders.llava(tmp_path / "llava")
    finished = inline_cli.run(*command, "--model", other, "--out", tmp_path / "other")
    assert finished.code
    assert "model_videos" in finished.out + finished.err


@pytest.mark.slow
def test_the_frame_of_a_video_is_not_counted_as_a_picture(inline_cli, tmp_path):
    pytest.importorskip("av")
    folder = model_folders.qwen2_vl(tmp_path / "m", template=model_folders.QWEN2_VL_VIDEOS)
    inline_cli.good(
        *("shards", "moving_shapes", "--source", "sample", "--limit", 2, "--workers", 1),
        *("--max-frames", 1, "--model", folder, "--out", tmp_path / "out"),
        *("--cache", tmp_path / "cache"),
    )
    dataset = open_dataset(tmp_path, "out", changes={"max_pixels": 28 * 28 * 4})
    builder = dataset._stream.parts[0].builder
    refused("view_lengths", lambda: builder.lengths(np.arange(2)))
    lengths, _ = open_dataset(tmp_path, "out")._stream.parts[0].builder.lengths(np.arange(2))
    assert lengths.tolist() == [len(dataset.example(i)["input_ids"]) for i in range(2)]


def text_of(row):
    return row["message_list"][0]["text"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_clips_and_frames_give_the_same_rows_on_every_number_of_ranks(inline_cli, tmp_path, kind):
    pytest.importorskip("av")
    template = QWEN3_VL if kind == "qwen3_vl" else model_folders.QWEN2_VL_VIDEOS
    folder = model_folders.qwen2_vl(tmp_path / "m", kind=kind, template=template)
    size = {"size": BOUNDS[kind], "patch_size": 14, **model_folders.CLIP}
    model_folders.write_json(folder / "video_preprocessor_config.json", size)
    rows = get_dataset("moving_shapes", source="sample", limit=8)
    found, raw = [], {text_of(rows.get(i)): rows.get(i) for i in range(8)}
    for store in ("frames", "clip"):
        inline_cli.good(
            *("shards", "moving_shapes", "--source", "sample", "--limit", 8, "--workers", 1),
            *("--max-frames", 5, "--codec", "png", "--cache", tmp_path / "cache"),
            *("--num-shards", 2, "--model", folder, "--out", tmp_path / store),
            *("--video-store", store),
        )
        found.append(run(tmp_path, store, world_size=1, count=2, sequence_length=1024)[0])
        view = View(model=model_view(str(tmp_path / store), backend="pil"))
        dataset = StreamingDataset(str(tmp_path / store), view=view, seed=3)
        texts = [text_of(dataset.reader.record(i)) for i in range(8)]
        policy = VideoPolicy(max_frames=5, store=store)
        # Frames in the two ways to store them become the rows of the unsharded path.
        same_as_the_unsharded_path(
            dataset, folder, [raw[t] for t in texts].__getitem__, video=policy
        )
    assert equal(*found)
    for pack, store in enumerate(("frames", "clip")):
        options = {"pack": bool(pack), "sequence_length": 1024}
        same_for_every_number_of_ranks(tmp_path, store, **options)
    inline_cli.good("verify", tmp_path / "clip")
    inline_cli.good("report", tmp_path / "clip")
