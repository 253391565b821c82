"""The flags of a job: the model's input as views and a bound of the stored size."""

import pytest

from preprocess.__main__ import command_line
from preprocess.cli.build import ViewSettings, job_settings
from preprocess.job.job import JobSettings
from shardspec.errors import ConfigError
from shardspec.tiling import ImageView


def settings_of(*words):
    return job_settings(command_line()[0].parse_args(["shards", "pixmo_cap", *words]))


def test_without_flags_a_job_has_the_defaults_of_the_settings_and_all_cores():
    got = settings_of("--workers", "1")
    assert got == JobSettings(dataset="pixmo_cap", out="shards/pixmo_cap")


def test_flags_reach_the_recipe():
    got = settings_of(
        *("--image-size", "378", "--crops", "6", "--high-res-crops", "24"),
        *("--image-bound", "canvas*1.5", "--codec", "png", "--variants", "3", "--seed", "7"),
        *("--pad-vocab", "50000", "--shard-size", "64MiB", "--allow-hosts", "a,b,"),
    )
    tiled = {"size_px": 378, "crop_mode": "overlap-and-resize-c2"}
    image = got.recipe.image
    assert image.views == (ImageView(max_crops=6, **tiled), ImageView(max_crops=24, **tiled))
    assert (image.headroom, image.max_side_px, image.codec) == (1.5, None, "png")
    assert (got.recipe.text.num_variants, got.recipe.seed, got.pad_to) == (3, 7, 50000)
    assert got.shard_bytes == 64 * 2**20
    assert got.fetch.allow_hosts == {"a", "b"}


@pytest.mark.parametrize(
    "bound, headroom, max_side_px",
    [("canvas", 1.0, None), ("canvas*2", 2.0, None), ("1024", 1.0, 1024)],
)
def test_bound_is_a_factor_on_the_canvas_or_a_side(bound, headroom, max_side_px):
    views = ViewSettings(image_bound=bound)
    assert (views.headroom, views.max_side_px) == (headroom, max_side_px)


@pytest.mark.parametrize("bound", ["wide", "canvas*wide", "nan", "inf", "canvas*inf"])
def test_bound_that_is_not_a_number_is_refused(bound):
    with pytest.raises(ConfigError) as caught:
        settings_of("--image-bound", bound)
    assert caught.value.reason == "number_text"
