"""Settings dataclasses as flags."""

import argparse
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from preprocess.cli.build import ViewSettings
from preprocess.cli.options import add_settings, read_settings
from preprocess.settings import Setting
from shardspec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    color: Annotated[Literal["red", "blue"], Setting("which color")] = "red"
    ratio: Annotated[float, Setting("how much", flag="share")] = 0.5
    hidden: int = 7


@dataclass(frozen=True, kw_only=True)
class Outer:
    names: Annotated[tuple[str, ...], Setting("which names", positional=True)]
    limit: Annotated[int | None, Setting("how many", group="more")] = None
    size: Annotated[int, Setting("how large", parse=lambda text: len(text), shown="none")] = 0
    workers: Annotated[int, Setting("processes", unset=lambda: 4)] = 1
    fast: Annotated[bool, Setting("be fast")] = False
    only_b: Annotated[str, Setting("of b alone", verbs=("b",))] = ""
    inner: Inner = field(default_factory=Inner)


def parse(*words, verb="a", given=None):
    parser = argparse.ArgumentParser()
    add_settings(parser, Outer, verb=verb, groups=("more",))
    return read_settings(Outer, parser.parse_args(words), given)


def test_without_flags_every_field_has_its_default_but_those_that_say_otherwise():
    assert parse("x") == Outer(names=("x",), workers=4)


def test_flags_reach_their_fields_nested_ones_too():
    words = ("x", "y", "--limit", "3", "--size", "abc", "--workers", "2", "--fast")
    inner = Inner(color="blue", ratio=0.25)
    assert parse(*words, "--color", "blue", "--share", "0.25") == Outer(
        names=("x", "y"), limit=3, size=3, workers=2, fast=True, inner=inner
    )


def test_given_values_win_over_flags():
    inner = {"hidden": 1, "color": "blue"}
    assert parse("x", "--share", "1", given={Inner: inner}).inner == Inner(ratio=1, **inner)


def test_zero_is_a_value():
    assert parse("x", "--workers", "0", "--limit", "0").workers == 0


def test_verbs_have_only_their_own_flags(capsys):
    assert parse("x", "--only-b", "y", verb="b").only_b == "y"
    with pytest.raises(SystemExit):
        parse("x", "--only-b", "y", verb="a")
    assert "--only-b" in capsys.readouterr().err


def test_help_shows_types_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--share X how much (default: 0.5)" in shown
    assert "--size SIZE how large (default: none)" in shown
    assert "--color {red,blue} which color (default: red)" in shown
    assert "more: --limit N how many" in shown
    assert "--fast be fast" in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("settings", "flag", "want"),
    [
        ({"image_size": 112, "crops": 2}, "--image-size", "126 or more"),
        ({"image_size": 100}, "--image-size", "a multiple of --patch-size 14"),
        ({"patch_size": 0}, "--patch-size", "an integer >= 1"),
        ({"crops": -1}, "--crops", "0 or more"),
        ({"high_res_crops": -1}, "--high-res-crops", "0 or more"),
        ({"crops": 2, "image_fit": "center-crop"}, "--image-fit", "another than center-crop"),
    ],
)
def test_what_does_not_fit_a_view_is_named_by_its_flag(settings, flag, want):
    with pytest.raises(ConfigError) as caught:
        _ = ViewSettings(**settings).views
    assert (caught.value.reason, caught.value.facts["name"]) == ("image_view", flag)
    assert caught.value.facts["want"].startswith(want)
