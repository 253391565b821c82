"""How another job's result is told: a short table, the user's settings first."""

import dataclasses

import pytest

from preprocess.__main__ import command_line
from preprocess.cli import make_variables
from preprocess.cli.build import job_settings
from preprocess.job.conflicts import _VARIABLES, MAX_ROWS, check_same, find_differences, table
from preprocess.job.job import Job, JobSettings
from preprocess.media import ImagePolicy
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec.errors import ConflictError
from shardspec.manifest import Manifest
from shardspec.tiling import ImageView

SETTINGS = JobSettings(dataset="text_sft", source="sample", out="out")
TILES = ImageView(crop_mode="overlap-and-resize-c2", max_crops=8)


def recipe(**image):
    return Recipe(image=ImagePolicy(**image))


@pytest.mark.parametrize(
    "change, rows",
    [
        ({"limit": 7}, ["LIMIT none 7"]),
        (
            {"recipe": recipe(views=(dataclasses.replace(TILES, small_sides="serving"),))},
            ["CROPS 0 8", "SMALL_SIDES training serving"],
        ),
        ({"source": "hub"}, ["SOURCE sample hub"]),
        ({"name": "mine"}, ["NAME none mine"]),
        ({"name": "text_sft"}, []),
        ({"recipe": recipe(quality=90)}, ["QUALITY 95 90"]),
        ({"recipe": recipe(views=(TILES,))}, ["CROPS 0 8"]),
        ({"recipe": recipe(views=(ImageView(size_px=224),))}, ["IMAGE_SIZE 336 224"]),
        ({"recipe": recipe(views=(ImageView(), TILES))}, ["HIGH_RES_CROPS - 8"]),
        (
            {"recipe": Recipe(text=TextPolicy(message_format="chatml"))},
            ["MESSAGE_FORMAT role chatml"],
        ),
        ({"pad_to": 4096}, ["PAD_VOCAB 2944 4096"]),
        (
            {"recipe": Recipe(seed=3, text=TextPolicy(num_variants=1)), "num_shards": 2},
            ["SEED 0 3", "VARIANTS 8 1", "NUM_SHARDS none 2"],
        ),
    ],
)
def test_changed_settings_are_the_rows_and_nothing_that_follows_from_them(change, rows):
    old, new = (Job(each).identity for each in (SETTINGS, dataclasses.replace(SETTINGS, **change)))
    found = table(find_differences(old, new)).splitlines()
    assert found[0].split() == ["setting", "in", "the", "output", "now"]
    assert [" ".join(line.split()) for line in found[1:]] == rows


def test_a_name_is_told_apart_from_the_dataset():
    """Both where there is an identity, and where only the manifest says what the output holds."""
    settings = [
        dataclasses.replace(SETTINGS, **change)
        for change in ({}, {"name": "mine"}, {"dataset": "pixmo_cap"})
    ]
    plain, named, other = (Job(each) for each in settings)
    names = [each.name for each in find_differences(plain.identity, other.identity)]
    assert "DATASET" in names
    assert "NAME" not in names
    with pytest.raises(ConflictError) as caught:
        check_same(manifest(plain), manifest(named), where="out/manifest.json", named=True)
    assert [row.split() for row in caught.value.what.splitlines()[2:]] == [
        ["NAME", "text_sft", "mine"]
    ]
    with pytest.raises(ConflictError) as caught:
        check_same(manifest(plain), manifest(other), where="out/manifest.json")
    assert "DATASET" in caught.value.what
    check_same(manifest(plain), manifest(plain), where="out/manifest.json")


def test_splits_of_other_kinds_do_not_join():
    shards = manifest(Job(SETTINGS))
    with pytest.raises(ConflictError) as caught:
        check_same(shards, dataclasses.replace(shards, raw=True), where="out/manifest.json")
    assert caught.value.reason == "recipe_conflict"
    assert "kind     shards         imported tars" in caught.value.what


def manifest(job):
    return Manifest(
        dataset=job.name,
        recipe=job.recipe,
        tokenizer=job.tokenizer,
        libraries=job.libraries,
        splits={},
        shards=(),
    )


def test_libraries_come_last():
    old = {"libraries": {"numpy": "1", "code_sha256": "0"}, "recipe": {"seed": 0, "new": 1}}
    new = {"libraries": {"numpy": "2", "code_sha256": "1"}, "recipe": {"seed": 1, "new": 2}}
    names = [each.name for each in find_differences(old, new)]
    assert names == ["SEED", "recipe.new", "libraries.numpy", "code"]


def test_long_values_are_cut_where_they_differ():
    old, new = ("/data/" + "x" * 200 + end for end in ("/first", "/second"))
    text = table(find_differences({"source": old}, {"source": new}))
    assert "/first" in text
    assert "/second" in text
    assert max(map(len, text.splitlines())) < 110


def test_long_tables_end_in_a_number():
    old = {f"field{i:02}": 0 for i in range(MAX_ROWS + 5)}
    lines = table(find_differences(old, dict.fromkeys(old, 1))).splitlines()
    assert len(lines) == MAX_ROWS + 2
    assert lines[-1] == "  and 5 more"


def test_derived_fields_are_shown_where_nothing_else_differs():
    found = find_differences({"tokenizer": {"sha256": "1"}}, {"tokenizer": {"sha256": "2"}})
    assert [each.name for each in found] == ["tokenizer.sha256"]


def test_names_of_the_table_are_variables_of_make():
    _, verbs = command_line()
    assert set(_VARIABLES.values()) <= set(make_variables(verbs["shards"]))


OTHERS = {
    "SPLIT": "validation",
    "UNMATCHED_FILES": "skip",
    "LIMIT": "7",
    "DUPLICATES": "keep",
    "SEED": "1",
    "PAD_VOCAB": "4096",
    "MESSAGE_FORMAT": "chatml",
    "PROMPTS": "uber_model",
    "SYSTEM_PROMPT": "none",
    "VARIANTS": "1",
    "POINT_FORMAT": "xml",
    "CHOICES": "letter",
    "WHITESPACE": "strip",
    "PLACEHOLDERS": "keep",
    "REASONING": "keep",
    "STYLES": "FILE",
    "PARAPHRASE": "0.5",
    "ACTIONS": "tokens",
    "IMAGE_SIZE": "224",
    "PATCH_SIZE": "28",
    "CROPS": "8",
    "HIGH_RES_CROPS": "4",
    "IMAGE_FIT": "pad",
    "SMALL_SIDES": "serving",
    "IMAGE_BOUND": "canvas*1.5",
    "CODEC": "png",
    "QUALITY": "90",
    "KEEP": "never",
    "RESAMPLE": "bilinear",
    "DECODE": "reduced",
    "MAX_MEGAPIXELS": "100",
    "MAX_SOURCE_SIDE": "1000",
    "MAX_ASPECT": "10",
    "DECODE_MEMORY": "100MiB",
    "SHARD_SIZE": "4MiB",
    "NUM_SHARDS": "2",
    "ROBOTS_TXT": "ignore",
    "X_ROBOTS_TAG": "ignore",
    "SHA256": "warn",
    "PLACEHOLDER_URLS": "0",
}
"""Another value of every variable that enters the identity of a job."""
VIDEOS = {
    "VIDEO_STORE": "clip",
    "FRAMES": "uniform",
    "MAX_FRAMES": "8",
    "MAX_FPS": "1",
    "FRAME_SPACING": "0.5",
    "FRAME_POOL": "2",
    "DAMAGED_VIDEOS": "refuse",
    "SUBTITLES": "after",
    "SUBTITLE_TOKENS": "64",
    "SUBTITLE_WINDOW": "1",
    "VIDEO_TIME": "60",
    "VIDEO_MEMORY": "2GB",
}
"""The same of datasets with videos."""
NOT_IN_IT = {
    "ALLOW_HOSTS",
    "ATTEMPTS",
    "BACKOFF",
    "BREAKER_HOSTS",
    "BREAKER_SUCCESS",
    "BREAKER_WINDOW",
    "CACHE",
    "COMPARE",
    "CONCURRENCY",
    "CONNECT_TIMEOUT",
    "DNS_CACHE",
    "ENGINE",
    "EVENTS",
    "FAILURES_EXPIRE",
    "FORCE",
    "HOST_FAILURES",
    "HOST_RATE",
    "IMAGE_MEMORY",
    "KEEPALIVE",
    "LONGEST_PAUSE",
    "MAX_BAD_SAMPLES",
    "MAX_DEAD_LINKS",
    "MAX_DOWNLOAD",
    "MAX_LOST_ROWS",
    "MAX_PAUSE",
    "MAX_REDIRECTS",
    "NEW_ROWS",
    "OUT",
    "OWN_DISK",
    "PACK_SIZE",
    "PART",
    "PART_WAIT",
    "PER_HOST",
    "RAY_ADDRESS",
    "READ_TIMEOUT",
    "RETRY",
    "ROBOTS_AGE",
    "ROBOTS_SIZE",
    "STALL_AFTER",
    "USER_AGENT",
    "WALL_TIMEOUT",
    "WORKERS",
}
"""Variables that change no byte."""


def identity(*flags, dataset="text_sft"):
    parser, _ = command_line()
    given = ["shards", dataset, "--source=sample", "--out=out", "--crops=6", *flags]
    return Job(job_settings(parser.parse_args(given))).identity


@pytest.mark.parametrize("variable", OTHERS)
def test_every_setting_is_told_by_its_own_name_alone(variable, tmp_path):
    flag, value = variable.lower().replace("_", "-"), OTHERS[variable]
    if value == "FILE":
        value = tmp_path / "styles.toml"
        value.write_text('system = "Be brief."\n')
    found = find_differences(identity(), identity(f"--{flag}={value}"))
    assert [each.name.split()[0] for each in found] == [variable]
    assert table(found).splitlines()[1].split()[0] == variable


@pytest.mark.parametrize("field, value", [("movable", True), ("chat_date", "2024-01-02")])
def test_settings_that_need_others_are_told_by_their_own_names(field, value):
    old = identity()
    text = {**old["recipe"]["text"], field: value}
    new = {**old, "recipe": {**old["recipe"], "text": text}}
    assert [each.name for each in find_differences(old, new)] == [field.upper()]


@pytest.mark.parametrize("variable", VIDEOS)
def test_settings_of_videos_are_told_where_there_are_videos(variable):
    flag = f"--{variable.lower().replace('_', '-')}={VIDEOS[variable]}"
    same = [identity(dataset="moving_shapes"), identity(flag, dataset="moving_shapes")]
    assert [each.name for each in find_differences(*same)] == [variable]
    assert not find_differences(identity(), identity(flag))


def test_every_variable_is_in_one_of_the_lists():
    _, verbs = command_line()
    told = {*OTHERS, *VIDEOS, *NOT_IN_IT, "CONFIG", "DATASET", "NAME", "SOURCE", "MODE"}
    told |= {"TOKENIZER", "MODEL", "FAMILY", "MOVABLE", "CHAT_DATE"}
    assert set(make_variables(verbs["shards"])) == told
