"""Settings that change nothing: every setting always counts, or has its condition in a table."""

import re

import pytest

from preprocess.__main__ import command_line
from preprocess.cli import make_variables, read_settings, unused
from preprocess.cli.build import job_settings
from preprocess.cli.care import VerifySettings
from preprocess.cli.reshard import reshard_settings
from preprocess.datasets import dataset_class, dataset_names
from shardspec.errors import ConfigError
from tests.inline import Quiet
from tests.preprocess.job.test_conflicts import OTHERS, VIDEOS

PARSER, VERBS = command_line()

ALWAYS = {
    *("CACHE", "CODEC", "CONFIG", "CROPS", "DATASET", "DECODE", "DECODE_MEMORY", "DUPLICATES"),
    *("ENGINE", "EVENTS", "FORCE", "HIGH_RES_CROPS", "IMAGE_BOUND", "IMAGE_FIT", "IMAGE_MEMORY"),
    *("IMAGE_SIZE", "LIMIT", "MAX_ASPECT", "MAX_BAD_SAMPLES", "MAX_LOST_ROWS"),
    *("MAX_MEGAPIXELS", "MAX_SOURCE_SIDE", "MESSAGE_FORMAT", "MODE", "MODEL", "NAME"),
    *("NUM_SHARDS", "OUT", "PACK_SIZE", "PAD_VOCAB", "PARAPHRASE", "PART", "PATCH_SIZE"),
    *("PLACEHOLDERS", "PROMPTS", "REASONING", "RESAMPLE", "SEED", "SOURCE", "SPLIT"),
    *("STALL_AFTER", "STYLES", "SYSTEM_PROMPT", "TOKENIZER", "VARIANTS", "WHITESPACE", "WORKERS"),
}
"""Settings of `make shards` without a condition."""
RESHARD_ALWAYS = {
    *("DRY_RUN", "DST", "INTO", "JOBS", "KEYS", "NAME", "ORDER", "PART", "SALT", "SHARDS"),
    *("SPLIT", "SRC", "VIEW", "WHERE"),
}
"""The same of `make reshard`, `merge`, `split` and `filter`."""
JOB = {
    "breaker_hosts": ("3", "--breaker-success=0", ""),
    "breaker_window": ("30", "--breaker-success=0", ""),
    "chat_date": ("2024-01-02", "", "--message-format=template"),
    "failures_expire": ("3", "--retry=all", "--retry=transient"),
    "family": ("processor", "", "--model=some/model"),
    "frame_pool": ("2", "--model=some/model", ""),
    "keep": ("never", "--codec=raw", "--codec=png"),
    "max_fps": ("1", "--frames=uniform", "--frames=uniform_last"),
    "new_rows": ("append", "--force", ""),
    "own_disk": ("allow", "", "--part=0/2"),
    "part_wait": ("9", "", "--part=0/2"),
    "quality": ("90", "--codec=png", "--codec=jpeg"),
    "ray_address": ("auto", "--engine=local", "--engine=ray"),
    "robots_age": ("9", "--robots-txt=ignore", ""),
    "robots_size": ("600KiB", "--robots-txt=ignore", ""),
    "shard_size": ("4MiB", "--num-shards=2", ""),
    "small_sides": ("serving", "--crops=0", "--high-res-crops=2"),
    "subtitle_tokens": ("64", "--subtitles=none", "--subtitles=after"),
    "subtitle_window": ("1", "--subtitles=none", ""),
}
"""By setting: another value, settings beside which it changes nothing, and those it needs."""
RESHARD = {
    "engine": ("ray", "--view", "--copy"),
    "nodes": ("2", "--shards=4", ""),
    "own_disk": ("allow", "", "--part=0/2"),
    "ranks": ("2", "--shards=4", ""),
    "ray_address": ("auto", "", "--engine=ray"),
    "seed": ("3", "", "--order=shuffle"),
    "sha256": (None, "--view", "--copy"),
    "shard_size": ("4MiB", "--shards=4", ""),
    "through": ("store", "--view", ""),
    "workers": ("2", "--shards=4", ""),
}
REMOTE = {
    **{"allow_hosts": "a", "attempts": "2", "backoff": "2", "compare": "content"},
    **{
        "concurrency": "2",
        "connect_timeout": "2",
        "dns_cache": "2",
        "host_failures": "2",
        "host_rate": "2",
    },
    **{"breaker_success": "0.5", "keepalive": "3", "longest_pause": "2", "max_dead_links": "0.5"},
    **{"max_download": "2MiB", "max_pause": "2", "max_redirects": "2", "per_host": "2"},
    **{"read_timeout": "2", "retry": "all", "user_agent": "me", "wall_timeout": "2"},
}
"""Other values of settings that only the dataset decides about, and no test has another of."""


def job(*words, dataset="pixmo_points", console=None):
    words = ["shards", dataset, "--out=out", *(word for word in words if word)]
    return job_settings(PARSER.parse_args(words), console)


def reshard(*words):
    words = ["reshard", "src", "dst", *(word for word in words if word)]
    return reshard_settings(PARSER.parse_args(words))


def given(name, value):
    flag = f"--{name.replace('_', '-')}"
    return flag if value is None else f"{flag}={value}"


def flags_of(needs):
    return {name for need in needs for name in need.flags}


@pytest.mark.parametrize(
    "verbs, needs, always",
    [
        (["shards"], [*unused.JOB_NEEDS, *unused.DATASET_NEEDS], ALWAYS),
        (["reshard", "merge", "split", "filter"], unused.RESHARD_NEEDS, RESHARD_ALWAYS),
    ],
    ids=["shards", "reshard"],
)
def test_every_setting_always_counts_or_has_its_condition(verbs, needs, always):
    conditional = {name.upper() for name in flags_of(needs)}
    assert conditional | always == {name for verb in verbs for name in make_variables(VERBS[verb])}
    assert not conditional & always


@pytest.mark.parametrize(
    "needs, cases, read",
    [(unused.JOB_NEEDS, JOB, job), (unused.RESHARD_NEEDS, RESHARD, reshard)],
    ids=["shards", "reshard"],
)
def test_a_setting_is_refused_where_it_changes_nothing(needs, cases, read):
    assert flags_of(needs) == set(cases)
    for name, (value, beside, needed) in cases.items():
        flag = given(name, value)
        read(flag, needed)
        with pytest.raises(ConfigError) as caught:
            read(flag, beside)
        assert caught.value.reason == "unused_setting"
        assert f"{flag.partition('=')[0]} counts only" in caught.value.what


def test_the_address_of_a_cluster_that_nothing_uses_is_refused_by_verify():
    def check(*words):
        options = PARSER.parse_args(["verify", "out", "--ray-address=auto", *words])
        unused.require_used(unused.VERIFY_NEEDS, [read_settings(VerifySettings, options)])

    check("--engine=ray")
    with pytest.raises(ConfigError, match="--ray-address counts only with --engine ray"):
        check()


def test_all_settings_that_change_nothing_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        job("--quality=90", "--codec=png", "--family=processor")
    assert {"--quality", "--family", "--codec", "--model"} <= set(
        re.split("[ ;]", caught.value.what)
    )


def test_defaults_are_never_refused():
    """Whatever is beside them: scripts and configs spell them out."""
    contrary = sorted({beside for _, beside, _ in JOB.values()} - {"--model=some/model"})
    usual = [
        given(action.dest, action.default)
        for action in VERBS["shards"]._actions
        if action.dest in JOB and action.default is not None
    ]
    assert len(usual) >= len(JOB) - 3
    job(*usual, "--shard-size=256MiB", "--robots-size=500KiB", *contrary)


def test_what_the_dataset_leaves_no_use_for_is_told():
    values = {name.lower(): value for name, value in {**OTHERS, **VIDEOS}.items()}
    values |= {name: value for name, (value, *_) in JOB.items()} | REMOTE | {"movable": None}
    values["frames"] = "uniform_last"  # the default: another would be refused beside --max-fps
    names = sorted(flags_of(unused.DATASET_NEEDS) - {"retry", "robots_txt", "frames"})
    console = Quiet()
    words = [given(name, values[name]) for name in names]
    job(*words, "--source=sample", dataset="text_sft", console=console)
    told = " ".join(console.notes).replace(":", "").replace(",", "").split()
    assert {given(name, None) for name in names} == {word for word in told if word[:2] == "--"} - {
        "--source"
    }
    assert len(console.notes) == len(unused.DATASET_NEEDS)


def test_nothing_is_told_of_what_counts():
    console = Quiet()
    words = ["--source=folder", "--unmatched-files=skip", "--attempts=2"]
    job(*words, "--movable", dataset="pixmo_points", console=console)
    job(*words, "--max-frames=4", dataset="moving_shapes", console=console)
    assert console.notes == []


def test_what_built_in_datasets_hold_is_what_the_table_says():
    fields = {"options": "choices", "points": "point_format", "action": "actions"}
    for dataset in dataset_names():
        kind = dataset_class(dataset)
        found = set()
        for mode in kind.modes or (None,):
            rows = kind("train", source="sample", mode=mode, limit=2)
            rows = "".join(repr(rows[i]["message_list"]) for i in range(len(rows)))
            found |= {name for field, name in fields.items() if f"'{field}':" in rows}
        console = Quiet()
        words = ["--choices=letter", "--point-format=xml", "--actions=tokens"]
        job(*words, dataset=dataset, console=console)
        told = {
            name for name in fields.values() for note in console.notes if given(name, None) in note
        }
        assert told == set(fields.values()) - found, dataset
