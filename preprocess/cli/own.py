"""The verb that looks at a user's own data."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from preprocess.cli.verbs import Console, Verb
from preprocess.datasets import (
    OwnDataset,
    RemoteImage,
    dataset_class,
    example_clips,
    example_images,
    example_videos,
)
from preprocess.formats import Spec
from preprocess.media import ImageLimits, open_source
from preprocess.recipe import read_path
from preprocess.text import (
    DataFormatter,
    StyleSheet,
    TextPolicy,
    VideoFacts,
    chat_frame,
    read_styles,
    require_style,
    styles_of,
)
from shardspec.errors import ConfigError, SampleError
from shardspec.messages import counted

_SHOWN_ROWS = 1000
"""Rows that `inspect` looks through for one that becomes an example."""

_SHOWN_PLACES = 8
"""Files with a folder of images of their own that are named."""


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="a file or folder of rows, or a spec.toml")
    parser.add_argument("--split", default="train", help="split to look at (default: train)")
    parser.add_argument("--styles", metavar="FILE", help="style sheet (default: the spec's)")


def _inspect(options: argparse.Namespace, console: Console) -> int:
    kind = dataset_class(options.dataset)
    if not issubclass(kind, OwnDataset):
        raise ConfigError("inspect_own", dataset=options.dataset)
    dataset = kind(options.split)
    lines = [f"{options.dataset}: {counted(len(dataset), 'row')}, format {kind.spec.format}", ""]
    if not options.dataset.endswith(".toml"):
        lines += ["# a spec that works:", *_spec_lines(kind.spec), ""]
    found, looked_at = dataset.image_names
    if looked_at:
        lines += [f"images: {found} of the first {looked_at} names exist below {dataset.base}"]
        others = [f"of {name}: below {base}" for name, base in dataset.other_bases.items()]
        lines += [*others[:_SHOWN_PLACES], *["..."] * (len(others) > _SHOWN_PLACES), ""]
    frame = chat_frame("role", None)
    sheet = _sheet(options, kind)
    lines += _sheet_lines(sheet)
    policy = TextPolicy(system_prompt="none", num_variants=1, styles=sheet)
    formatter = DataFormatter(policy=policy, frame=frame)
    require_style(kind.spec.style, sheet, where=kind.name)
    problems: dict[str, int] = {}
    told: dict[str, str] = {}
    """Of the first row of each reason."""
    for item in islice(range(len(dataset)), _SHOWN_ROWS):
        try:
            example = dataset.get(item)
            images = example_images(example)
            sizes = [_image_size(each) for each in images]
            if None in sizes:  # whether coordinates are inside of the image cannot be said
                for message in example["message_list"]:
                    message.pop("bounds", None)
            known = [size or (1, 1) for size in sizes]
            videos = [
                VideoFacts(frame_times_s=(), clip=clip, size=(1000, 1000))
                for clip in example_clips(example)
            ]
            branches = formatter(example, key="inspect", image_sizes=known, videos=videos)
        except SampleError as error:
            problems[error.reason] = problems.get(error.reason, 0) + 1
            told.setdefault(error.reason, f"row {item}: {str(error).splitlines()[0]}")
            continue
        lines += [
            f"row {item}: {counted(len(images), 'image')} {[_image_text(each) for each in images]}"
        ]
        lines += [f"  video     {_image_text(video)}" for video in example_videos(example)]
        for branch in branches:
            for turn in branch.turns:
                lines += [f"  prompt    {turn[0].prompt!r}", f"  response  {turn[0].response!r}"]
        break
    lines += [f"left out: {n:,} ({name}), first {told[name]}" for name, n in problems.items()]
    console.show("\n".join(lines))
    return 0


def _sheet(options: argparse.Namespace, kind: type[OwnDataset]) -> StyleSheet:
    """Reads the style sheet that `inspect` uses."""
    given = options.styles
    if not given:
        beside = str(kind.folder / kind.spec.styles) if kind.spec.styles else ""
        given = str(kind.spec.settings.get("styles", beside))
    return read_styles(given) if given else StyleSheet()


def _sheet_lines(sheet: StyleSheet) -> list[str]:
    """Says what a style sheet has, with how each style came about."""
    if not sheet.to_dict():
        return []
    lines = [f"style sheet {sheet.path}:"]
    known = styles_of(sheet)
    for name, own in sheet.styles:
        style = known[name]
        what = f"like {own.like}" if own.like else "as built in"
        extras = [f"{key} {value}" for key, value in own.attributes]
        extras += [counted(len(style.templates), "template")] if style.templates else []
        extras += [counted(len(style.system), "system prompt")] if style.system else []
        lines.append(f"  {name}: {', '.join([what, f'family {style.family}', *extras])}")
    if sheet.system:
        lines.append(f"  system prompts of the others: {len(sheet.system)}")
    if sheet.paraphrase:
        lines.append(f"  paraphrase groups: {len(sheet.paraphrase)}")
    return [*lines, ""]


def _spec_lines(spec: Spec) -> list[str]:
    source = spec.source if "://" in spec.source else str(Path(spec.source).absolute())
    return [
        f'format = "{spec.format}"',
        f"source = {json.dumps(source, ensure_ascii=False)}",
        f'name = "{spec.name}"',
        *(["", "[columns]"] if spec.columns else []),
        *(f"{name} = {json.dumps(column)}" for name, column in spec.columns.items()),
    ]


def _image_size(image: Any) -> tuple[int, int] | None:
    """Reads the size of an image, which points in pixels need; a URL is not fetched for it."""
    payload = image if isinstance(image, bytes) else b""
    try:
        payload = read_path(image) if isinstance(image, Path) else payload
        return open_source(payload, limits=ImageLimits()).size
    except SampleError:  # the job counts it
        return None


def _image_text(image: Any) -> str:
    if isinstance(image, bytes):
        return counted(len(image), "byte")
    return image.url if isinstance(image, RemoteImage) else str(image)


VERBS = (
    Verb(
        name="inspect",
        help="say which format a file has, and show one of its rows as an example",
        add=_add_inspect,
        run=_inspect,
    ),
)
