"""CONFIG=: one file is the whole recipe, and flags win over it."""

import json

import pytest

from preprocess.__main__ import command_line
from preprocess.cli import make_arguments, with_files
from shardspec.errors import ConfigError
from shardspec.manifest import load_manifest

PARSER, VERBS = command_line()

CONFIG = """
dataset = "pixmo_cap"
source = "sample"
limit = 6
image_size = 112
message-format = "none"
variants = 2
seed = 3
"""


def settled(tmp_path, text, *arguments):
    (tmp_path / "a.toml").write_text(text)
    line = ["shards", "--config", str(tmp_path / "a.toml"), *arguments]
    return vars(PARSER.parse_args(with_files(line, PARSER, VERBS)))


def test_a_config_gives_the_shards_of_its_flags_and_they_win(inline_cli, tmp_path):
    (tmp_path / "a.toml").write_text(CONFIG)
    more = ("--cache", tmp_path / "cache", "--workers", 1, "--seed", 4)
    inline_cli.good("shards", "--config", tmp_path / "a.toml", "--out", tmp_path / "config", *more)
    flags = ("--source", "sample", "--limit", 6, "--image-size", 112, "--variants", 2)
    told = ("shards", "pixmo_cap", *flags, "--message-format", "none", *more)
    inline_cli.good(*told, "--out", tmp_path / "flags")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("config", "flags")]
    assert manifests[0] == manifests[1]
    recipe = load_manifest(str(tmp_path / "config")).recipe
    assert recipe["seed"] == 4
    assert recipe["text"]["num_variants"] == 2
    assert recipe["text"]["message_format"] == "none"
    assert recipe["image"]["views"][0]["size_px"] == 112


def test_every_setting_can_be_in_a_config(tmp_path):
    """A file that gives each its default changes nothing."""
    defaults = vars(PARSER.parse_args(["shards", "pixmo_cap"]))
    lines = []
    for name, value in defaults.items():
        if name in ("verb", "run", "config") or value in (None, ""):
            continue
        lines.append(f"{name} = {json.dumps(value)}")
    got = settled(tmp_path, "\n".join(lines))
    assert {**got, "config": None} == {**defaults, "config": None}
    assert len(lines) > 20


def test_a_switch_and_a_dataset_of_the_command_line_win(tmp_path):
    got = settled(tmp_path, CONFIG + "force = true\n", "vqa2", "--source", "hub", "--limit=9")
    assert (got["dataset"], got["source"], got["limit"], got["force"]) == ("vqa2", "hub", 9, True)
    assert not settled(tmp_path, CONFIG + "force = false\n")["force"]


def test_make_takes_a_config(tmp_path):
    line = make_arguments(["shards", "CONFIG=a.toml", "SEED=1"], VERBS)
    assert set(line) == {"shards", "--config=a.toml", "--seed=1"}
    line = make_arguments(["shards", "CONFIG=a.toml", "DATASET=vqa2"], VERBS)
    assert line[-1] == "vqa2"


def test_a_config_may_name_a_spec_whose_settings_it_wins_over(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "x"}\n')
    (tmp_path / "spec.toml").write_text(
        'format = "captions"\nsource = "rows.jsonl"\n[settings]\nvariants = 5\nseed = 7\n'
    )
    got = settled(tmp_path, f'dataset = "{tmp_path}/spec.toml"\nvariants = 3\n')
    assert (got["dataset"], got["source"]) == (
        f"{tmp_path}/spec.toml",
        f"{tmp_path}/rows.jsonl",
    )
    assert (got["variants"], got["seed"], got["system_prompt"]) == (3, 7, "none")


@pytest.mark.parametrize(
    "text, reason, told",
    [
        ('dataset = "pixmo_cap"\nimage_siz = 3', "config_key", "image_size"),
        ('datset = "pixmo_cap"', "config_key", "dataset"),
        ('dataset = "pixmo_cap"\nconfig = "b.toml"', "config_key", "no setting config"),
        ('dataset = "pixmo_cap"\nforce = 1', "config_key", "true or false"),
        ('dataset = "pixmo_cap"\nseed = true', "config_key", "a number or a text"),
        ('dataset = "pixmo_cap"\n[image]\nsize = 3', "config_key", "has no setting image"),
        ('format = "llava"', "config_file", "DATASET="),
        ("seed = ", "config_file", "cannot be read"),
        ("seed = 1", "no_dataset", "needs a dataset"),
        ('dataset = "pixmo_cap"\nout = ""', "make_variable", "OUT is empty"),
    ],
)
def test_a_config_that_means_nothing_is_refused(text, reason, told, tmp_path):
    with pytest.raises(ConfigError) as caught:
        settled(tmp_path, text)
    assert caught.value.reason == reason
    assert told in str(caught.value)


def test_a_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        with_files(["plan", "--config", str(tmp_path / "b.toml")], PARSER, VERBS)
    assert caught.value.reason == "config_file"


@pytest.mark.parametrize("name", ["dataset", "source"])
def test_settings_of_a_spec_do_not_name_another_dataset(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "caption": "x"}\n')
    (tmp_path / "spec.toml").write_text(
        f'format = "captions"\nsource = "rows.jsonl"\n[settings]\n{name} = "vqa2"\n'
    )
    with pytest.raises(ConfigError) as caught:
        with_files(["shards", str(tmp_path / "spec.toml")], PARSER, VERBS)
    assert (caught.value.reason, caught.value.where) == ("config_key", f"{tmp_path}/spec.toml")


def test_documents_are_stored_without_loss_unless_told_otherwise(tmp_path):
    def codec(*arguments):
        return PARSER.parse_args(with_files(["shards", *arguments], PARSER, VERBS)).codec

    spec = tmp_path / "papers.toml"
    spec.write_text('format = "documents"\nsource = "rows.jsonl"\n')
    assert codec("documents") == codec(str(spec)) == "lossless"
    assert codec("documents", "--codec", "png") == "png"
    spec.write_text('format = "documents"\nsource = "rows.jsonl"\n[settings]\ncodec = "raw"\n')
    assert codec(str(spec)) == "raw"
    assert codec("pixmo_cap") == "jpeg"
