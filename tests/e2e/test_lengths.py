"""The lengths in an index, from which batches and packs are planned, against `assemble` itself."""

import numpy as np
import pytest

from loader.assemble import View, plan_example
from loader.layout import TokenIds
from loader.reader import ShardReader
from preprocess.formatter import TextPolicy
from preprocess.image import ImagePolicy
from preprocess.job import JobSettings
from preprocess.pipeline import run_job
from preprocess.recipe import Recipe
from shardspec.index import open_index
from shardspec.keyed import keyed
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView

TILES = ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=4)
MORE_TILES = ImageView(size_px=378, crop_mode="overlap-and-resize-c2", max_crops=6)


class Silent:
    def stage(self, name, total):
        pass

    def step(self, reason):
        pass

    def note(self, text):
        pass


@pytest.fixture(scope="module", params=[1, 4], ids=["one variant", "four variants"])
def built(request, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("lengths") / "set")
    recipe = Recipe(
        text=TextPolicy(num_variants=request.param),
        image=ImagePolicy(views=(TILES, MORE_TILES), codec="jpeg"),
    )
    cache = str(tmp_path_factory.mktemp("cache"))
    settings = JobSettings(
        dataset="pixmo_cap",
        source="sample",
        mode="captions",
        limit=12,
        out=out,
        recipe=recipe,
        num_shards=2,
        cache=cache,
    )
    run_job(settings, Silent())
    return out, request.param


@pytest.mark.parametrize("number", [0, 1], ids=["view 0", "view 1"])
def test_recorded_lengths_are_those_of_assemble(built, number):
    out, num_variants = built
    manifest = require_manifest(out)
    reader = ShardReader(out, manifest, split="train")
    ids = TokenIds.from_special_ids(manifest.tokenizer.special_ids)
    view = View(image=(TILES, MORE_TILES)[number])
    rows = np.concatenate(
        [
            open_index(
                f"{out}/{shard.index_url}", num_samples=shard.nsamples, shard_bytes=shard.num_bytes
            )
            for shard in manifest.shards
        ]
    )
    for i, row in enumerate(rows):
        sample = reader.read(i)
        plans = [
            plan_example(
                sample.tokens,
                sample.spans,
                np.random.RandomState(keyed(i, draw) >> 32),
                view=view,
                ids=ids,
            )
            for draw in range(1 if num_variants == 1 else 40)
        ]
        assert {plan.num_crops for plan in plans} == {int(row["view_crops"][number])}
        # The longest draw is the recorded one; with one variant there is no other.
        assert max(plan.num_tokens for plan in plans) == row["view_length"][number]
        assert max(plan.num_loss_tokens for plan in plans) == row["loss_length"]
