"""The lengths in an index, from which batches and packs are planned, against `assemble` itself."""

import numpy as np
import pytest

from loader.assembly.layout import TokenIds
from loader.assembly.planner import Planner
from loader.assembly.view import View
from loader.reading.reader import ShardReader
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec.index import open_index
from shardspec.keyed import keyed
from shardspec.manifest import require_manifest
from shardspec.sample import text_rows
from shardspec.tiling import ImageView
from tests import inline

TILES = ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=4)
MORE_TILES = ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=6)


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def note(self, text):
        pass


CASES = {
    "captions": ("pixmo_cap", "captions", 1, "role"),
    "captions in variants": ("pixmo_cap", "captions", 4, "role"),
    "two branches": ("pixmo_cap", "transcript1_and_caption", 1, "role"),
    "a tree of answers": ("vqa2", None, 1, "role"),
    "several images": ("pixmo_multi_image_qa", None, 1, "role"),
    "several turns": ("text_sft", None, 1, "role"),
    "a template without BOS": ("text_sft", None, 1, "template"),
}
"""Name of the case: dataset, mode, variants, message format."""


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def built(request, tmp_path_factory):
    dataset, mode, num_variants, message_format = request.param
    recipe = Recipe(
        text=TextPolicy(num_variants=num_variants, message_format=message_format),
        image=ImagePolicy(views=(TILES, MORE_TILES), codec="jpeg"),
    )
    out = str(tmp_path_factory.mktemp("lengths") / "set")
    settings = JobSettings(
        dataset=dataset,
        source="sample",
        mode=mode,
        limit=3,
        out=out,
        recipe=recipe,
        num_shards=2,
        cache=str(tmp_path_factory.mktemp("cache")),
    )
    with inline.jobs():
        run_job(settings, Silent())
    return out


@pytest.mark.parametrize("number", [0, 1], ids=["view 0", "view 1"])
def test_recorded_lengths_are_those_of_assemble(built, number):
    manifest = require_manifest(built)
    reader = ShardReader(built, manifest, split="train")
    ids = TokenIds.from_special_ids(manifest.tokenizer.special_ids)
    planner = Planner(View(image=(TILES, MORE_TILES)[number]), ids)
    rows = np.concatenate(
        [
            open_index(
                f"{built}/{shard.index_url}",
                num_samples=shard.nsamples,
                shard_bytes=shard.num_bytes,
            )
            for shard in manifest.shards
        ]
    )
    for i, row in enumerate(rows):
        sample = reader.read(i)
        texts = text_rows(sample.spans)
        choices = len(texts) - len({(b, t) for _, b, t, *_ in texts.tolist()})
        plans = [
            planner.plan(sample.tokens, sample.spans, np.random.RandomState(keyed(i, draw) >> 32))
            for draw in range(60 if choices else 1)
        ]
        assert {plan.num_crops for plan in plans} == {int(row["view_crops"][number])}
        # The recorded lengths are the longest draw's; where nothing is drawn, they are the lengths.
        lengths = {plan.num_tokens for plan in plans}
        losses = {plan.num_loss_tokens for plan in plans}
        assert max(lengths) <= row["view_length"][number]
        assert max(losses) <= row["loss_length"]
        if choices < 10:  # with few choices 60 draws meet the longest one
            assert max(lengths) == row["view_length"][number]
            assert max(losses) == row["loss_length"]
