"""What settings need in order to count: one table per kind of job, and the check of what was given.

A setting that cannot change the result is a mistake in the settings, and refused. Where it is the
dataset that leaves nothing for it to change, scripts over several datasets give it on purpose: a
line says so. A value equal to the default is not distinguished from one that is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from preprocess.cli.options import setting_values
from preprocess.datasets import dataset_class, dataset_names
from shardspec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What some settings need in order to count."""

    flags: tuple[str, ...]
    """Names of their values among the parsed options."""
    text: str
    """When they count: the end of a sentence, with "only"."""
    holds: Callable[[Any], bool]
    """Whether they do, from the values of all settings."""


_REMOTE = (
    Need(
        flags=("ray_address",),
        text="only with --engine ray",
        holds=lambda s: s.engine == "ray",
    ),
)
_DIVIDED = (
    Need(flags=("own_disk",), text="only with --part", holds=lambda s: s.part is not None),
    *_REMOTE,
)
VERIFY_NEEDS = _REMOTE
RESHARD_NEEDS = (
    *_DIVIDED,
    Need(
        flags=("seed",),
        text="only with --order shuffle",
        holds=lambda s: s.order == "shuffle",
    ),
    Need(
        flags=("shard_size", "nodes", "ranks", "workers"),
        text="only without --shards, which decides the number of shards alone",
        holds=lambda s: s.shards is None,
    ),
    Need(
        flags=("sha256", "through", "engine"),
        text="only without --view, which copies nothing",
        holds=lambda s: s.form != "view",
    ),
)
JOB_NEEDS = (
    *_DIVIDED,
    Need(flags=("part_wait",), text="only with --part", holds=lambda s: s.part is not None),
    Need(flags=("family",), text="only with --model", holds=lambda s: bool(s.model)),
    Need(
        flags=("chat_date",),
        text="only with --model or --message-format template",
        holds=lambda s: s.model or s.message_format == "template",
    ),
    Need(
        flags=("small_sides",),
        text="only with --crops or --high-res-crops",
        holds=lambda s: s.crops or s.high_res_crops,
    ),
    Need(flags=("quality",), text="only with --codec jpeg", holds=lambda s: s.codec == "jpeg"),
    Need(
        flags=("keep",),
        text="only without --codec raw, which no file has",
        holds=lambda s: s.codec != "raw",
    ),
    Need(
        flags=("max_fps",),
        text="only with --frames uniform_last",
        holds=lambda s: s.frames == "uniform_last",
    ),
    Need(
        flags=("subtitle_tokens", "subtitle_window"),
        text="only with --subtitles frames or after",
        holds=lambda s: s.subtitles != "none",
    ),
    Need(
        flags=("frame_pool",),
        text="only without --model, which pools frames in its own way",
        holds=lambda s: not s.model,
    ),
    Need(
        flags=("shard_size",),
        text="only without --num-shards, which decides the number of shards alone",
        holds=lambda s: s.num_shards is None,
    ),
    Need(
        flags=("new_rows",),
        text="only without --force, which builds all rows again",
        holds=lambda s: not s.force,
    ),
    Need(
        flags=("robots_age", "robots_size"),
        text="only with --robots-txt obey",
        holds=lambda s: s.robots_txt == "obey",
    ),
    Need(
        flags=("failures_expire",),
        text="only with --retry transient",
        holds=lambda s: s.retry == "transient",
    ),
    Need(
        flags=("breaker_window", "breaker_hosts"),
        text="only with --breaker-success above 0",
        holds=lambda s: s.breaker_success > 0,
    ),
)


_POINTS = ("documents", "pixmo_count", "pixmo_point_explanations", "pixmo_points")


def _may_have(*names: str) -> Callable[[Any], bool]:
    """Makes the condition that the dataset is one of these, or one whose rows nobody knows."""
    return lambda s: s.dataset in names or s.dataset not in dataset_names()


DATASET_NEEDS = (
    Need(
        flags=(
            *("video_store", "frames", "max_frames", "max_fps", "frame_spacing", "frame_pool"),
            *("damaged_videos", "subtitles", "subtitle_tokens", "subtitle_window"),
            *("video_time", "video_memory"),
        ),
        text="only for datasets with videos",
        holds=lambda s: dataset_class(s.dataset).videos,
    ),
    Need(
        flags=("choices",),
        text="only for datasets with multiple-choice questions",
        holds=_may_have("a_okvqa", "moving_shapes"),
    ),
    Need(
        flags=("point_format",),
        text="only for datasets with points",
        holds=_may_have("moving_shapes", *_POINTS),
    ),
    Need(
        flags=("movable",),
        text="only for datasets with points in pictures",
        holds=_may_have(*_POINTS),
    ),
    Need(
        flags=("actions",),
        text="only for datasets with a robot's actions",
        holds=_may_have("lerobot"),
    ),
    Need(
        flags=("unmatched_files",),
        text="only for folders of files",
        holds=lambda s: s.source not in ("hub", "sample"),
    ),
    Need(
        flags=(
            *("allow_hosts", "attempts", "backoff", "breaker_hosts", "breaker_success"),
            *("breaker_window", "compare", "concurrency", "connect_timeout", "dns_cache"),
            *("failures_expire", "host_failures", "host_rate", "keepalive", "longest_pause"),
            *("max_dead_links", "max_download", "max_pause", "max_redirects", "new_rows"),
            *("per_host", "placeholder_urls", "read_timeout", "retry", "robots_age"),
            *("robots_size", "robots_txt", "sha256", "user_agent", "wall_timeout"),
            "x_robots_tag",
        ),
        text="only for rows that are not generated, as those of --source sample are",
        holds=lambda s: s.source != "sample",
    ),
)
"""What the dataset decides."""


def require_used(needs: Sequence[Need], settings: Iterable[object], **more: object) -> None:
    """Refuses settings that change nothing.

    Args:
      needs: The table of the job.
      settings: The settings dataclasses of the job.
      more: Values that are no field of theirs with a flag, by the names that the table has.

    Raises:
      ConfigError: `unused_setting`.
    """
    found = _unused(needs, settings, **more)
    if found:
        named = "; ".join(f"{flag} counts {text}" for flag, text in found.items())
        raise ConfigError("unused_setting", named=named)


def unused_notes(needs: Sequence[Need], settings: Iterable[object], **more: object) -> list[str]:
    """Says which settings change nothing, and what they would need; arguments as above."""
    found = _unused(needs, settings, **more)
    by_text = {text: [flag for flag in found if found[flag] == text] for text in found.values()}
    return [f"no effect: {', '.join(flags)}: counts {text}" for text, flags in by_text.items()]


def _unused(needs: Sequence[Need], settings: Iterable[object], **more: object) -> dict[str, str]:
    values = [each for part in settings for each in setting_values(part)]
    known = SimpleNamespace(**{each.name: each.value for each in values}, **more)
    given = {each.name for each in values if each.given}
    return {
        f"--{name.replace('_', '-')}": need.text
        for need in needs
        for name in need.flags
        if name in given and not need.holds(known)
    }
