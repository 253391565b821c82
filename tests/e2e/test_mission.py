"""The pipeline as it was first asked for: its names and its complete example, to the letter.

What is quoted below in full is run as it is quoted; only its imports are added, and the rows of the
hub are replaced by generated ones of the same schema.
"""

import http.server
import inspect
import io
import pickle
import runpy
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

import vlm_shards
from loader import Augment, View
from preprocess.datasets import base
from preprocess.fetch import FetchPolicy
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.tiling import ImageView

EXAMPLE = """
# 1. Define dataset
dataset = PixMoCap(split="train")

# 2. Build preprocessor
preprocessor = config.build_preprocessor(
    for_inference=False,
    is_training=True,
)

# 3. Wrap with deterministic iteration
dataset = DeterministicDataset(
    dataset=dataset,
    preprocessor=preprocessor,
    seed=42,
)

# 4. Build collator
collator = config.build_collator(
    sequence_length=2048,
    pad_mode="to_128",
)

# 5. Create DataLoader
dataloader = DataLoader(
    dataset,
    batch_size=32,
    collate_fn=collator,
    num_workers=4,
    pin_memory=True,
)

# 6. Training loop
for batch in dataloader:
    outputs = model(**batch)
    loss = outputs.loss
    loss.backward()
    optimizer.step()
"""

MIXTURE = """
mixture = IterableDatasetMixture(
    datasets=[
        PixMoCap(),      # Captioning
        VQA2(),          # VQA
        PixMoPoints(),   # Pointing
    ],
    weights=[0.5, 0.3, 0.2],  # Sample proportions
    seed=42,
)
"""

ROOT = Path(__file__).parents[2]
SIDE = 56
_photo = io.BytesIO()
Image.new("RGB", (SIDE, SIDE), (200, 200, 200)).save(_photo, "PNG")
PHOTO = _photo.getvalue()
VIEW = View(image=ImageView(size_px=SIDE))


@pytest.fixture
def generated(monkeypatch):
    """Datasets whose rows are generated, six of each, as if they were the hub's."""

    def opened(self, split="train", *, source="sample", limit=6, **options):
        return init(self, split, source=source, limit=limit, **options)

    init = base.DatasetBase.__init__
    monkeypatch.setattr(base.DatasetBase, "__init__", opened)


@pytest.fixture(scope="module")
def config():
    return vlm_shards.PipelineConfig(view=VIEW)


@pytest.fixture
def names(config):
    """What the imports of a script would bring."""
    return {**vars(vlm_shards), "config": config, "DataLoader": DataLoader}


class Model(torch.nn.Module):
    """Takes a batch by its keys; learns which token comes most often."""

    def __init__(self, vocab_size):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(vocab_size))
        self.shapes = []

    def forward(self, input_ids, labels, images, image_masks, image_input_idx, attention_mask):
        self.shapes.append([tuple(each.shape) for each in (input_ids, images, image_masks)])
        assert labels.shape == attention_mask.shape == input_ids.shape
        assert image_input_idx.shape == images.shape[:2]
        scores = self.bias.log_softmax(0)[labels.clamp(min=0)]
        return SimpleNamespace(loss=-scores[labels >= 0].mean())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_complete_example_runs_as_it_is_written(names, config, generated):
    model = Model(config.text_tokenizer.entry.embedding_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    exec(EXAMPLE, names | {"model": model, "optimizer": optimizer})
    ((text, images, masks),) = model.shapes
    assert text[0] == 6
    assert text[1] % 128 == 0
    assert images == (6, 1, 3, SIDE, SIDE)
    assert masks == (6, 1, 16)
    assert model.bias.abs().sum() > 0


def test_mixture_is_written_over_map_style_datasets(names, generated):
    exec(MIXTURE, names)
    examples = list(names["mixture"])
    kinds = [example["message_list"][0]["style"] for example in examples]
    counts = [kinds.count(style) for style in ("long_caption", "vqa2", "pointing")]
    assert sum(counts) == len(examples) == len(names["mixture"])
    for count, share in zip(counts, (0.5, 0.3, 0.2), strict=True):
        assert abs(count - share * len(examples)) <= 2


def test_cached_dataset_is_opened_once(generated):
    vlm_shards.get_dataset.cache_clear()
    first = vlm_shards.get_dataset("pixmo_cap", source="sample")
    assert vlm_shards.get_dataset("pixmo_cap", source="sample") is first
    assert isinstance(first, vlm_shards.PixMoCap)


def test_distributed_sampler_divides_a_dataset(config, generated):
    dataset = vlm_shards.DeterministicDataset(
        vlm_shards.PixMoCap(), config.build_preprocessor(), seed=42
    )
    collator = config.build_collator(sequence_length=512)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
        seen += list(sampler)
        batches = DataLoader(dataset, batch_size=3, sampler=sampler, collate_fn=collator)
        assert [len(batch["input_ids"]) for batch in batches] == [3]
    assert sorted(seen) == list(range(6))


# --- datasets


def test_dataset_is_anything_with_a_length_and_get(config):
    class CustomDataset(vlm_shards.Dataset):
        size = 3

        def __len__(self):
            return self.size

        def get(self, item, rng):
            return {
                "image": rng.randint(0, 256, (40, 50, 3)).astype(np.uint8),
                "messages": [
                    {"role": "user", "content": f"Number {item}?"},
                    {"role": "assistant", "content": "Yes."},
                ],
                "metadata": {"item": item},
            }

    dataset = vlm_shards.DeterministicDataset(
        dataset=CustomDataset(), preprocessor=config.build_preprocessor(), seed=42
    )
    dataset.preload()
    first, again = dataset.get(1, 0), dataset.get(idx=1, epoch=0)
    assert np.array_equal(first["images"], again["images"])
    assert not np.array_equal(first["images"], dataset.get(1, 3)["images"])
    assert len(dataset) == 3


def test_seed_of_an_example_is_the_formula():
    class Draws(vlm_shards.Dataset):
        def __len__(self):
            return 10

        def get(self, item, rng):
            return {"drawn": rng.random_sample()}

    dataset = vlm_shards.DeterministicDataset(Draws(), seed=42)
    seed = (42 * 195172 + 7 + len(dataset) * 3) % (2**32 - 1)
    assert dataset.get(7, 3)["drawn"] == np.random.RandomState(seed).random_sample()


# --- formatting


def test_formatter_makes_conversations():
    image = np.zeros((8, 8, 3), np.uint8)
    formatter = vlm_shards.DataFormatter()
    asked = formatter.format_qa("What is it?", "Nothing.", image)
    assert asked == {
        "image": image,
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "Nothing."},
        ],
    }
    assert asked["image"] is image
    assert formatter.format_qa(question="2 + 2?", answer="4")["image"] is None
    told = formatter.format_caption(image, "A black square.")
    assert told["messages"] == [
        {"role": "user", "content": "Describe this image."},
        {"role": "assistant", "content": "A black square."},
    ]


@pytest.mark.parametrize("image", [np.zeros((40, 50, 3), np.uint8), None], ids=["image", "text"])
def test_every_form_of_the_formatter_becomes_an_example(image, config):
    formatter = vlm_shards.DataFormatter()
    examples = [
        formatter.format_qa("Q?", "A.", image),
        formatter.format_instruction("Say A.", "A.", image),
    ]
    if image is not None:
        examples += [
            formatter.format_caption(image, "A."),
            formatter.format_pointing("ball", [[10, 20]], image),
            formatter.format_counting("ball", [[0.1, 0.2], [0.3, 0.4]], image, point_scale=1),
        ]
    preprocess = config.build_preprocessor()
    decode = config.text_tokenizer.decode
    texts = []
    for example in examples:
        made = preprocess(example, np.random.RandomState(0))
        assert len(made["images"]) == (image is not None)
        texts.append(decode(made["labels"][made["labels"] != -100].tolist()))
    assert texts[0].strip().startswith("A.")
    if image is not None:
        assert "ball" in texts[3]


# --- preprocessing


def test_image_becomes_a_tensor_as_in_an_example(config):
    image = np.random.RandomState(3).randint(0, 256, (90, 120, 3)).astype(np.uint8)
    view = View(image=VIEW.image, augment=Augment.standard(), normalize="imagenet")
    text = TextPolicy(system_prompt="none", num_variants=1)  # nothing else to draw
    whole = vlm_shards.PipelineConfig(recipe=Recipe(text=text), view=view)
    example = vlm_shards.DataFormatter().format_qa("Color?", "Mixed.", image)
    made = whole.build_preprocessor()(example, np.random.RandomState(5))
    alone = vlm_shards.ImagePreprocessor(view=view)(image, np.random.RandomState(5))
    assert (alone.dtype, alone.shape) == (torch.float32, (3, SIDE, SIDE))
    assert np.array_equal(alone.numpy(), made["images"][0])
    other = vlm_shards.ImagePreprocessor(view=view)(image, np.random.RandomState(6))
    assert not torch.equal(alone, other)


def test_tiled_image_becomes_a_tensor_per_crop():
    view = View(image=ImageView(size_px=56, crop_mode="resize"))
    image = np.zeros((40, 50, 3), np.uint8)
    assert vlm_shards.ImagePreprocessor(view=view)(image, np.random.RandomState(0)).ndim == 3
    tiled = View(image=ImageView(crop_mode="overlap-and-resize-c2", max_crops=4))
    made = vlm_shards.ImagePreprocessor(view=tiled)(
        np.zeros((900, 900, 3), np.uint8), np.random.RandomState(0)
    )
    assert made.ndim == 4
    assert len(made) > 1


def test_messages_become_ids_with_the_symbols_of_images(config):
    tokenizer = load_tokenizer()
    told = [
        {"role": "user", "content": "Compare <image> with <image>."},
        {"role": "assistant", "content": "Same."},
    ]
    preprocess = vlm_shards.InterleavedTextPreprocessor(view=VIEW)
    ids = preprocess(told, tokenizer, image_sizes=[(40, 30), (50, 50)])
    assert isinstance(ids, list)
    assert ids.count(tokenizer.special_ids["<im_start>"]) == 2
    image = np.zeros((30, 40, 3), np.uint8), np.zeros((50, 50, 3), np.uint8)
    whole = config.build_preprocessor(is_training=False)
    text = vlm_shards.InterleavedTextPreprocessor(text=config.recipe.text, view=VIEW)
    made = whole({"image": list(image), "messages": told}, np.random.RandomState(0))
    assert text(told, tokenizer, image_sizes=[(40, 30), (50, 50)]) == made["input_ids"].tolist()
    plain = preprocess([{**told[0], "content": "Hello?"}, told[1]], tokenizer)
    assert tokenizer.special_ids["<im_start>"] not in plain


# --- config


def test_training_draws_and_inference_does_not(config, generated):
    example = vlm_shards.PixMoCap().get(0)
    train = config.build_preprocessor(for_inference=False, is_training=True)
    fixed = config.build_preprocessor(for_inference=False, is_training=False)
    draws = {train(example, np.random.RandomState(i))["input_ids"].tobytes() for i in range(4)}
    assert len(draws) > 1
    same = {fixed(example, np.random.RandomState(i))["input_ids"].tobytes() for i in range(4)}
    assert len(same) == 1
    prompts = config.build_preprocessor(for_inference=True, is_training=False)
    asked = vlm_shards.DataFormatter().format_qa("Which number?", "4321")
    made = prompts(asked, np.random.RandomState(0))
    assert (made["labels"] == -100).all()
    text = config.text_tokenizer.decode(made["input_ids"].tolist())
    assert "Which number?" in text
    assert "4321" not in text
    with pytest.raises(ConfigError):
        config.build_preprocessor(for_inference=True, is_training=True)


@pytest.mark.parametrize("pad_mode, length", [("max_len", 384), ("to_128", 128), ("batch_max", 0)])
def test_collator_pads_as_its_mode_says(pad_mode, length, config):
    preprocess = config.build_preprocessor()
    formatter = vlm_shards.DataFormatter()
    examples = [
        preprocess(formatter.format_qa("Q?", "A " * n), np.random.RandomState(0)) for n in (3, 9)
    ]
    longest = max(len(example["input_ids"]) for example in examples)
    batch = config.build_collator(sequence_length=384, pad_mode=pad_mode)(examples)
    assert batch["input_ids"].shape == (2, length or longest)


def test_collator_cuts_texts_that_are_too_long(config):
    example = vlm_shards.DataFormatter().format_qa("Q?", "word " * 400)
    made = config.build_preprocessor()(example, np.random.RandomState(0))
    assert len(made["input_ids"]) > 128
    assert config.build_collator(sequence_length=128)([made])["input_ids"].shape == (1, 128)


def test_image_of_a_url_is_fetched_under_the_limits_of_the_job(tmp_path):
    config = vlm_shards.PipelineConfig(cache=str(tmp_path))
    example = {"image": "http://127.0.0.1:9/a.png", "messages": EXCHANGE}
    with pytest.raises(SampleError) as caught:
        config.build_preprocessor()(example, np.random.RandomState(0))
    assert caught.value.reason == "private_addr"


def test_image_of_a_url_is_fetched_once_for_all_processes(tmp_path):
    requests = []

    class Photos(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PHOTO)

        def log_message(self, *args):
            pass

    policy = FetchPolicy(allow_hosts=frozenset({"127.0.0.1"}))
    config = vlm_shards.PipelineConfig(view=VIEW, cache=str(tmp_path), fetch=policy)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Photos) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/a.png"
            example = {"image": url, "messages": EXCHANGE}
            made = [
                pickle.loads(pickle.dumps(config)).build_preprocessor()(
                    example, np.random.RandomState(0)
                )
                for _ in range(2)
            ]
        finally:
            server.shutdown()
            thread.join()
    assert requests == ["/robots.txt", "/a.png"]
    assert (made[0]["images"] == 200).all()
    assert np.array_equal(made[0]["images"], made[1]["images"])


EXCHANGE = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]


# --- kinds


def test_documents_are_rows_of_pages_and_questions(config):
    page = np.full((60, 40, 3), 255, np.uint8)

    class Papers(vlm_shards.DocumentDataset):
        def load(self):
            asked = [{"question": "Title?", "answers": ["A", "B"]}]
            return [
                {"pages": [page, page], "questions": asked, "ocr": "A B"},
                {"image": page, "question": "Year?", "answer": "1999"},
                {"image": page, "answer": "1999"},
            ]

    papers = Papers()
    assert papers.get(0)["metadata"] == {"ocr": "A B", "pages": [1, 2], "num_pages": 2}
    made = [config.build_preprocessor()(papers.get(i), np.random.RandomState(0)) for i in (0, 1)]
    assert [len(one["images"]) for one in made] == [2, 1]
    with pytest.raises(SampleError) as caught:
        papers.get(2)
    assert caught.value.reason == "row_fields"


def test_episodes_of_robots_are_rows_of_views_and_actions(config):
    scene = np.full((60, 40, 3), 9, np.uint8)

    class Kitchen(vlm_shards.RobotDataset):
        def load(self):
            views = {"overhead": scene, "egocentric": scene}
            actions = [[0.0, 1.0], [-1.0, 0.5]]
            return [{"views": views, "task": "Take the cup.", "actions": actions, "success": 1}]

    example = Kitchen().get(0)
    assert example["metadata"] == {"views": ["egocentric", "overhead"], "success": True}
    made = config.build_preprocessor()(example, np.random.RandomState(0))
    assert len(made["images"]) == 2
    learned = config.text_tokenizer.decode(made["labels"][made["labels"] != -100].tolist())
    assert learned.strip().startswith("128 255; 0 192")


# --- signatures


@pytest.mark.parametrize(
    "name, call, want",
    [
        ("Dataset", "get", ["item", "rng"]),
        ("DataFormatter", "format_qa", ["question", "answer", "image"]),
        ("DataFormatter", "format_caption", ["image", "caption"]),
        ("ImagePreprocessor", "__call__", ["image", "rng"]),
        ("InterleavedTextPreprocessor", "__call__", ["messages", "tokenizer"]),
        ("MolmoPreprocessor", "__call__", ["example", "rng"]),
        ("MMCollator", "__call__", ["examples"]),
        ("IterableDatasetMixture", "__init__", ["datasets", "weights", "seed"]),
        ("DeterministicDataset", "get", ["idx", "epoch"]),
        ("DeterministicDataset", "__init__", ["dataset", "preprocessor", "seed"]),
        ("PipelineConfig", "build_preprocessor", ["for_inference", "is_training"]),
        ("PipelineConfig", "build_collator", ["sequence_length", "pad_mode"]),
    ],
)
def test_calls_take_the_arguments_that_the_mission_names(name, call, want):
    parameters = inspect.signature(getattr(getattr(vlm_shards, name), call)).parameters
    assert list(parameters)[1 : 1 + len(want)] == want


def test_preprocessors_and_collators_can_be_sent_to_workers(config):
    for made in (config.build_preprocessor(), config.build_collator(sequence_length=8)):
        assert type(pickle.loads(pickle.dumps(made))) is type(made)


@pytest.mark.slow
def test_example_program_trains(monkeypatch, capsys):
    """In this process: a start of Python costs more than the training."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    program = runpy.run_path(str(ROOT / "examples" / "mission.py"))
    program["main"].__globals__["NUM_WORKERS"] = 0
    program["main"]()
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
