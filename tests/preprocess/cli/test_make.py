"""Variables of make as arguments of a verb: the function, and the Makefile that calls it."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.__main__ import command_line
from preprocess.cli import make_arguments
from shardspec.errors import ConfigError

ROOT = Path(__file__).parents[3]
VERBS = command_line()[1]


def arguments(*given):
    return make_arguments(given, VERBS)


def refused(*given):
    with pytest.raises(ConfigError) as caught:
        arguments(*given)
    return caught.value


# --- the function


@pytest.mark.parametrize(
    "given, wanted",
    [
        (("shards", "DATASET=vqa2"), ["shards", "--", "vqa2"]),
        (
            ("shards", "DATASET=vqa2", "IMAGE_SIZE=224", "OUT=s3://b/x=y"),
            ["shards", "--image-size=224", "--out=s3://b/x=y", "--", "vqa2"],
        ),
        (("verify", "DATASET=vqa2", "DEEP=1"), ["verify", "--deep", "--", "shards/vqa2"]),
        (("verify", "DATASET=vqa2", "OUT=a"), ["verify", "--", "a"]),
        (("verify", "OUT=a", "DEEP=0"), ["verify", "--", "a"]),
        (("gc", "OUT=a b", "OLDER_THAN=24h"), ["gc", "--older-than=24h", "--", "a b"]),
        (("reshard", "SRC=a", "DST=b", "VIEW=1"), ["reshard", "--view", "--", "a", "b"]),
        (("reshard", "SRC=a", "DST=b", "VIEW=0"), ["reshard", "--copy", "--", "a", "b"]),
        (("merge", "SRC=a 'b c'", "DST=-d"), ["merge", "--", "a", "b c", "-d"]),
        (("export-index", "OUT=a", "FORMAT=wids"), ["export-index", "--format=wids", "--", "a"]),
        (("datasets",), ["datasets"]),
    ],
)
def test_variables_become_the_flags_of_the_verb(given, wanted):
    assert arguments(*given) == wanted


@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_every_value_reaches_the_option_as_it_is(value):
    got = arguments("filter", "SRC=a", "DST=b", f"WHERE={value}")
    options = command_line()[0].parse_args(got)
    assert (options.where, options.src, options.dst) == (value, ["a"], "b")


def test_values_that_look_like_flags_stay_values():
    options = command_line()[0].parse_args(arguments("reshard", "SRC=--copy", "DST=-h"))
    assert (options.src, options.dst, options.form) == (["--copy"], "-h", "auto")


@pytest.mark.parametrize(
    "name, offer",
    [
        ("IMGSIZE", "did you mean 'IMAGE_SIZE'?"),
        ("TOKENISER", "did you mean 'TOKENIZER'?"),
        ("tokenizer", "did you mean 'TOKENIZER'?"),
        ("image_size", "did you mean 'IMAGE_SIZE'?"),
        ("WHERE", "known: "),
        ("ARGS", "known: "),
        ("HELP", "known: "),
        ("--source", "known: "),
        ("", "known: "),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest_name(name, offer):
    error = refused("shards", "DATASET=vqa2", f"{name}=1")
    assert error.reason == "make_variable"
    assert error.facts["name"] == name
    assert offer in error.fix


@pytest.mark.parametrize("name", ["SOURCE", "OUT", "TOKENIZER", "CACHE", "NAME", "LIMIT"])
def test_empty_variable_is_refused_by_its_name(name):
    error = refused("shards", "DATASET=vqa2", f"{name}=")
    assert (error.reason, error.what) == ("make_variable", f"{name} is empty")


@pytest.mark.parametrize(
    "given, name",
    [
        (("shards", "SOURCE=sample"), "DATASET"),
        (("shards", "DATASET="), "DATASET"),
        (("reshard", "SRC=a"), "DST"),
        (("import", "SRC=a", "OUT=b"), "NAME"),
        (("verify",), "OUT"),
    ],
)
def test_missing_variable_is_named(given, name):
    error = refused(*given)
    assert error.reason == "make_variable"
    assert error.what == f"make {given[0]} needs {name}="


def test_switch_is_0_or_1():
    assert refused("verify", "OUT=a", "DEEP=yes").reason == "make_variable"


def test_unknown_target_is_refused():
    error = refused("shard", "DATASET=vqa2")
    assert (error.reason, error.fix) == ("make_target", "did you mean 'shards'?")


# --- the Makefile


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that prints its arguments, one per line, between brackets."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text("#!/bin/sh\nprintf '[%s]\\n' \"$@\"\n")
    python.chmod(0o755)
    for name in ("ready", "ready-dev"):
        (venv / name).touch()

    def run(*args, **environment):
        clean = {name: value for name, value in os.environ.items() if "MAKE" not in name}
        return subprocess.run(
            ["make", "--no-print-directory", *args, f"VENV={venv}"],
            cwd=ROOT,
            env={**clean, **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize(
    "value", ["a b", "it's", '"x"', "$HOME $(HOME) $$", "`id` ; id", "# <a> (b, c) \\ *", "", "é"]
)
def test_make_hands_on_each_value_as_it_is_typed(make, value):
    done = make("filter", "SRC=a", "DST=b", f"WHERE={value}")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines == ["[-m]", "[preprocess]", "[make]", "[filter]"] + [
        f"[{each}]" for each in ("DST=b", "SRC=a", f"WHERE={value}")
    ]


def test_preview_has_a_file_to_write_that_the_environment_does_not_name(make):
    wanted = ["[-m]", "[loader]", "[preview]", "[a]"]
    assert make("preview", "OUT=a", TO="x").stdout.splitlines() == wanted
    done = make("preview", "OUT=a", "TO=a 'b'.png")
    assert done.stdout.splitlines() == [*wanted, "[--out]", "[a 'b'.png]"]


def test_make_refuses_a_value_of_two_lines(make):
    done = make("filter", "WHERE=a\nb")
    assert (done.returncode, done.stdout) == (2, "")
    assert "WHERE has a line break" in done.stderr


def test_exported_variables_do_not_change_a_job(make):
    done = make("shards", "DATASET=vqa2", SEED="3", CACHE="/tmp", OUT="/tmp/x", TOKENIZER="x")
    assert done.stdout.splitlines()[3:] == ["[shards]", "[DATASET=vqa2]"]


@pytest.mark.parametrize("target", ["stream", "train", "test", "check"])
def test_targets_without_a_verb_refuse_variables_too(make, target):
    done = make(target, "SEEED=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"make {target} has no variable SEEED" in done.stderr


def test_help_needs_no_environment(make):
    assert "build the shards of DATASET" in make("help").stdout
