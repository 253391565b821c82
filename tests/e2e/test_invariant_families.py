"""Shards equal the unsharded path, bit for bit, for every dataset family, augmentation on."""

import numpy as np
import pytest

from loader import Augment, MolmoPreprocessor, StreamingDataset, View
from preprocess.datasets import dataset_class, dataset_names, get_dataset
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.tokens import load_tokenizer
from shardspec.keyed import SampleRng, dataset_seed, sample_seed
from shardspec.tiling import FrameView, ImageView
from tests import inline

ROWS = {"vqa2": 9}
"""The ninth vqa2 row has twelve question-answer pairs."""
FEW_ROWS = 6
TILES = ImageView(
    size_px=112, crop_mode="overlap-and-resize-c2", max_crops=4, margin_patches=(2, 2)
)
MORE = ImageView(size_px=112, crop_mode="overlap-and-resize-c2", max_crops=8, margin_patches=(2, 2))
POLICY = TextPolicy(
    num_variants=4,
    prompt_templates="uber_model_v2",
    system_prompt="demo_or_style_v2",
    choices="varied",
    paraphrase=0.3,
)


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        assert not reason

    def note(self, text):
        pass


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def make(name):
        recipe = Recipe(text=POLICY, image=ImagePolicy(views=(TILES, MORE), codec="raw"), seed=3)
        out = str(tmp_path_factory.mktemp(name) / "set")
        settings = JobSettings(
            dataset=name,
            source="sample",
            limit=ROWS.get(name, FEW_ROWS),
            out=out,
            recipe=recipe,
            num_shards=2,
            cache=str(tmp_path_factory.mktemp("cache")),
        )
        with inline.jobs():
            run_job(settings, Silent())
        return out, recipe

    return make


# Where each family of texts and images is met once; the others follow in the slow run.
EVERYDAY = {"pixmo_cap", "pixmo_points", "vqa2", "text_sft"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow)
        for name in dataset_names()
    ],
)
def test_shards_equal_the_unsharded_path(build, name):
    out, recipe = build(name)
    view = View(
        image=TILES,
        high_res=MORE,
        high_res_probability=0.5,
        augment=Augment.standard(),
        image_map="pooling",
        loss="root_both",
        sequence_length=1024,
        frames=FrameView() if dataset_class(name).videos else None,
    )
    stream = StreamingDataset(out, seed=11, view=view)
    tokenizer = load_tokenizer()
    prepare = Preparer(recipe=recipe, tokenizer=tokenizer)
    preprocess = MolmoPreprocessor(prepare, special_ids=tokenizer.special_ids, view=view)
    dataset = get_dataset(name, source="sample", limit=ROWS.get(name, FEW_ROWS))
    item_of = {prepare(dataset.get(item)).key: item for item in range(len(dataset))}
    assert len(item_of) == stream.num_samples == len(dataset)

    rng, base, crops = SampleRng(), dataset_seed(11, name), set()
    for epoch in range(2):
        for number in range(stream.num_samples):
            got = stream.example(number, epoch=epoch)
            item = item_of[got["metadata"]["key"]]
            seed = sample_seed(base, idx=number, length=stream.num_samples, epoch=epoch)
            want = preprocess(dataset.get(item), rng(seed))
            assert got.keys() == want.keys()
            for key, value in want.items():
                if key == "metadata":
                    assert got[key] == value
                else:
                    assert got[key].dtype == value.dtype
                    assert np.array_equal(got[key], value), key
            crops.add(len(got["images"]))
    # Without pictures, or all of them below the size of a crop.
    assert len(crops) > 1 or name in ("text_sft", "lerobot")


def test_a_tree_of_a_dozen_question_answer_pairs_is_among_them(build):
    out, _ = build("vqa2")
    stream = StreamingDataset(out)
    spans = [stream.reader.read(i).spans for i in range(stream.num_samples)]
    branches = [len(np.unique(s[s[:, 0] == 0, 1])) for s in spans]
    assert max(branches) == 12


@pytest.mark.parametrize("name", ["vqa2", pytest.param("pixmo_cap_qa", marks=pytest.mark.slow)])
def test_rows_of_an_evaluation_equal_the_unsharded_path(build, name):
    out, recipe = build(name)
    view = View(image=TILES, purpose="evaluation", image_map="pooling")
    stream = StreamingDataset(out, view=view, tail="pad")
    tokenizer = load_tokenizer()
    prepare = Preparer(recipe=recipe, tokenizer=tokenizer)
    preprocess = MolmoPreprocessor(prepare, special_ids=tokenizer.special_ids, view=view)
    dataset = get_dataset(name, source="sample", limit=ROWS.get(name, FEW_ROWS))
    rows = [preprocess.questions(dataset.get(item)) for item in range(len(dataset))]
    by_key = {own[0]["metadata"]["key"]: own for own in rows}
    assert sum(map(len, rows)) == stream.num_samples > 2 * len(dataset)
    for number in range(len(dataset)):
        for question, want in enumerate(by_key[stream.reader.name(number)[1]]):
            got = stream.example(number, question=question)
            assert {**want["metadata"], "sample": number} == got.pop("metadata")
            for key in got:
                assert np.array_equal(got[key], want[key]), key
