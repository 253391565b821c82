"""`python -m loader preview`: a page with one batch as training sees it at a step, seed and rank.

Joins both halves of the project: the loader gives the batch, the offline half its tokenizer and the
parts of pages. The batch is the very one that the run with these settings gets: augmented, cut into
crops, packed and padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from loader.assembly import build_attention_mask
from loader.cli.opened import add_mixture, open_dataset
from loader.cli.peek import open_tokenizer
from loader.cli.readable import describe_batch
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.dataloader import make_dataloader
from loader.order import require_step
from preprocess.page import (
    Markup,
    Piece,
    card,
    element,
    figure,
    loss_text,
    page,
    section,
    table,
)
from preprocess.text import IMAGE_SYMBOLS
from shardspec import storage
from shardspec.families import (
    Family,
    PicturePlan,
    Qwen2VL,
    StoredModel,
    plan_pictures,
    plan_videos,
)

_CROP_PX = 128
_MASK_CELLS = 192
_MOST_CROPS = 40
_MOST_CHARS = 4_000

_SEEN, _HIDDEN, _PADDING = (42, 107, 176), (226, 231, 237), (140, 150, 160)
"""Colours of the attention mask."""


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    add_mixture(parser)
    add_flag(parser, "--step", "step of the run", 0)
    add_flag(parser, "--global-batch", "rows per step over all ranks", 8)
    add_flag(parser, "--ranks", "data-parallel ranks of the run", 1)
    add_flag(parser, "--rank", "rank to show", 0)
    add_flag(parser, "--sequence-length", "longest sequence", 2048)
    add_flag(parser, "--pad-mode", "padding: max_len, batch_max or to_N", "to_128")
    parser.add_argument("--pack", action="store_true", help="fill rows with several samples")
    parser.add_argument("--augment", action="store_true", help="augment images as in training")
    add_flag(parser, "--out", "file or URL to write", "preview.html")


def _run(options: argparse.Namespace) -> str:
    require_step(options.step)
    opened = open_dataset(options, rank=options.rank, world_size=options.ranks)
    manifest, model = opened.manifest, opened.model
    loader = make_dataloader(
        opened.dataset,
        global_batch_size=options.global_batch,
        sequence_length=options.sequence_length,
        pad_mode=options.pad_mode,
        pack=options.pack,
        decode_threads=0,
        extra_keys=("subsegment_ids",) if model else ("position_ids", "subsegment_ids"),
        with_metadata=True,
    )
    loader.load_state_dict({**loader.state_dict(), "step": options.step})
    batch = next(iter(loader))
    tokenizer = open_tokenizer(options.shards, manifest)
    ids = manifest.tokenizer.special_ids
    symbols = {ids[name]: name for name in IMAGE_SYMBOLS if name in ids}
    if model is not None:
        symbols = {model.soft_id: model.family.image_token}
    told = (
        f"{opened.name} {options.split}: step {options.step:,} of a run with seed "
        f"{options.seed}, rank {options.rank} of {options.ranks}, "
        f"{options.global_batch} rows per step, "
        + ("augmented, " if options.augment else "not augmented, ")
        + (f"packed to {options.sequence_length:,} tokens" if options.pack else "one sample a row")
    )
    document = preview_page(
        batch, title=f"{opened.name}: preview", lead=told, decode=tokenizer.decode,
        symbols=symbols,
        model=model,
    )  # fmt: skip
    storage.publish_bytes(options.out, document.encode())
    return f"{told}\n{options.out}"


def preview_page(
    batch: Mapping[str, Any],
    *,
    title: str,
    lead: str,
    decode: Callable[[list[int]], str],
    symbols: Mapping[int, str],
    model: StoredModel | None = None,
) -> str:
    """Makes a page of a batch.

    Args:
      batch: As `MMCollator` or, with a model, `ModelCollator` makes it, with `metadata` and
        `subsegment_ids`, and `position_ids` without a model.
      title: Of the page.
      lead: What the batch is.
      decode: Ids to text.
      symbols: The image symbols by id.
      model: That the dataset was built for.
    """
    rows = _rows(batch, model)
    cards = [_card(row, number, decode, symbols) for number, row in enumerate(rows)]
    described = [line.split(None, 2) for line in _tensors(batch)]
    num_targets = sum(row.num_targets for row in rows)
    used, places = sum(row.used for row in rows), sum(len(row.ids) for row in rows)
    facts = [
        ("rows", f"{len(rows):,}"),
        ("samples", f"{sum(len(row.parts) for row in rows):,}"),
        ("positions", f"{places:,}"),
        ("padding", f"{1 - used / max(1, places):.1%}"),
        ("targets under loss", f"{num_targets:,}"),
    ]
    pairs = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    legend = element(
        "p",
        "Text with a ",
        element("mark", "background"),
        " is under loss; so is the end of each conversation, which has no position of its own. "
        "Crops are the pixels that the model gets."
        if model is None
        else " is under loss. Crops are the pixels that the model gets.",
        class_="note",
    )
    return page(
        title,
        section(
            "Batch",
            element("dl", *pairs, class_="facts"),
            table("Tensors", ("key", "type", "shape and values"), described, numeric=False),
            anchor="batch",
        ),
        section("Rows", legend, element("div", *cards, class_="cards"), anchor="rows"),
        lead=lead,
        contents=[("batch", "Batch"), ("rows", "Rows")],
    )


def _tensors(batch: Mapping[str, Any]) -> list[str]:
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return describe_batch(tensors).splitlines()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row of a batch."""

    key: str
    parts: Sequence[Mapping[str, Any]]
    """Metadata of each sample in it."""
    ids: np.ndarray
    """int64 [L], with padding; so are the others."""
    learned: np.ndarray
    """bool [L]: the token is a target."""
    num_targets: int
    """With those that are no position's token: the ends of conversations."""
    real: np.ndarray
    """bool [L]: no padding."""
    segments: np.ndarray
    starts: Sequence[int]
    """Where its samples begin."""
    pictures: Sequence[tuple[str, np.ndarray]]
    """Name and pixels of what the model gets: uint8 [H, W, 3]."""

    @property
    def used(self) -> int:
        """Positions that are not padding."""
        return int(self.real.sum())

    @property
    def borders(self) -> list[int]:
        """Where its samples begin, and where the last one ends."""
        (real,) = np.nonzero(self.real)
        return [*self.starts, int(real[-1]) + 1] if len(real) else [0]


def _rows(batch: Mapping[str, Any], model: StoredModel | None) -> list[_Row]:
    """Takes a batch apart."""
    rows = []
    first_units = {"pixel_values": 0, "pixel_values_videos": 0}
    for i, metadata in enumerate(batch["metadata"]):
        parts = metadata.get("examples", [metadata])
        ids, labels = batch["input_ids"][i].numpy(), batch["labels"][i].numpy()
        segments = batch["subsegment_ids"][i].numpy()
        real = segments >= 0
        if model is None:
            # Positions begin with 0 in each sample, and nowhere else.
            begins = real & (batch["position_ids"][i].numpy() == 0)
            # A branch's last target is its EOS, which is not the next token of the row; the BOS of
            # the next sample may be the same token.
            learned = np.zeros(len(ids), bool)
            learned[1:] = (labels[:-1] == ids[1:]) & ~begins[1:]
            crops = batch["images"][i].numpy() if "images" in batch else ()
            pixels = [np.ascontiguousarray(crop.transpose(1, 2, 0)) for crop in crops]
            counts = [image["crops"] for part in parts for image in part["images"]]
        else:
            learned = labels == ids
            begins = real & (np.diff(segments, prepend=-1) != 0)
            plans = [plan for part in parts for plan in _plans(model.family, part["images"])]
            pixels, counts = [], []
            for plan in plans:
                name = "pixel_values_videos" if plan.num_frames else "pixel_values"
                if name not in batch:  # features
                    counts.append(0)
                    continue
                values, first_unit = batch[name], first_units[name]
                # Idefics3 has all rows in one: [1, N, 3, S, S].
                values = values[0] if values.ndim == 5 and len(values) == 1 else values
                units = values[first_unit : first_unit + plan.num_units].numpy()
                first_units[name] += plan.num_units
                pixels += (own := model_pictures(model.family, plan, units))
                counts.append(len(own))
        rows.append(
            _Row(
                key=str(metadata["key"]),
                parts=parts,
                ids=ids,
                learned=learned,
                num_targets=int((labels != -100).sum()),
                real=real,
                segments=segments,
                starts=np.flatnonzero(begins).tolist(),
                pictures=list(zip(_names(parts, counts, model), pixels, strict=False)),
            )
        )
    return rows


def _plans(family: Family, images: Sequence[Mapping[str, Any]]) -> list[PicturePlan]:
    """Plans the pictures and videos of a sample by their metadata."""
    sizes = [(image["height"], image["width"]) for image in images]
    pictures = iter(
        plan_pictures(family, [s for s, i in zip(sizes, images, strict=True) if "frames" not in i])
    )
    return [
        plan_videos(family, [size], [(0, image["frames"])])[0]
        if "frames" in image
        else next(pictures)
        for size, image in zip(sizes, images, strict=True)
    ]


def _names(
    parts: Sequence[Mapping[str, Any]], counts: Sequence[int], model: StoredModel | None
) -> list[str]:
    """Names each crop of a row.

    Args:
      parts: Metadata of each sample.
      counts: Crops of each picture, of all samples.
      model: For which there is no overview.
    """
    names, numbers = [], iter(counts)
    for s, part in enumerate(parts):
        for i, _ in enumerate(part["images"]):
            sample = f"sample {s + 1}, " if len(parts) > 1 else ""
            picture = f"picture {i + 1}, " if len(part["images"]) > 1 else ""
            number = next(numbers)
            crops = ["whole"]
            if number > 1:
                crops = [f"crop {crop}" for crop in range(number)]
                crops = ["overview", *crops[1:]] if model is None else crops
            names += [f"{sample}{picture}{crop}" for crop in crops]
    return names


def model_pictures(family: Family, plan: PicturePlan, units: np.ndarray) -> list[np.ndarray]:
    """Makes pictures of the rows of `pixel_values` that one picture has become.

    Args:
      family: Of the model.
      plan: Of the picture.
      units: float32 [plan.num_units, ...]: tiles [3, S, S], or patches.

    Returns:
      uint8 [H, W, 3] each, without the model's normalisation: the tiles, or all patches put
      together again; of a video the first frame of each patch along time.
    """
    if isinstance(family, Qwen2VL):
        (rows, cols), merge, side = plan.grid, family.merge, family.patch_px
        # Patches come by squares that become one token, each with all its frames.
        squares = (rows // merge, cols // merge, merge, merge)
        cells = units.reshape(plan.num_times, *squares, 3, -1, side, side)
        chw = cells[..., 0, :, :].transpose(0, 5, 1, 3, 6, 2, 4, 7)
        units = chw.reshape(plan.num_times, 3, rows * side, cols * side)
    elif units.ndim < 4 or units.shape[-3] != 3:
        return []  # of a form that is not known here
    units = units.reshape(-1, *units.shape[-3:])
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (family.mean, family.std))
    levels = np.rint((units * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(each.transpose(1, 2, 0)) for each in levels]


def _card(
    row: _Row, number: int, decode: Callable[[list[int]], str], symbols: Mapping[int, str]
) -> Markup:
    several = len(row.parts) > 1
    title = f"Row {number}: {f'pack of {len(row.parts)} samples' if several else row.key}"
    crops, padded = len(row.pictures), len(row.ids) - row.used
    dropped = sum(part.get("dropped_branches", 0) for part in row.parts)
    told = (
        f"{row.used:,} tokens and {padded:,} of padding; {row.num_targets:,} under loss; "
        f"{crops} crop{'' if crops == 1 else 's'}"
        + (f"; {dropped} conversations did not fit" if dropped else "")
    )
    bodies = []
    for part, (start, stop) in zip(row.parts, pairwise(row.borders), strict=False):
        heading = (
            element("h4", f"Sample {part['key']}, {stop - start:,} tokens") if several else None
        )
        pieces = row_pieces(
            row.ids[start:stop].tolist(), row.learned[start:stop].tolist(), decode, symbols
        )
        label = f"Text of {part['key']}; marked parts are under loss"
        bodies += [heading, loss_text(pieces, label=label)]
    return card(title, _fill(row), *_tiles(row), *bodies, _mask(row, number), meta=told)


def _fill(row: _Row) -> Markup:
    """Draws how the samples of a row fill it."""
    length = max(1, len(row.ids))
    lengths = [stop - start for start, stop in pairwise(row.borders)]
    bars = [element("span", style=f"width:{100 * each / length:.2f}%") for each in lengths]
    told = ", ".join(f"{each:,}" for each in lengths)
    label = f"Of {length:,} positions, samples take {told}; the rest is padding"
    return element("div", *bars, class_="fill", role="img", aria_label=label)


def _tiles(row: _Row) -> list[Markup]:
    shown = [
        figure(pixels, alt=name.capitalize(), caption=name, longest_px=_CROP_PX)
        for name, pixels in row.pictures[:_MOST_CROPS]
    ]
    rest = len(row.pictures) - len(shown)
    more = [element("p", f"{rest} more crops.", class_="note")] if rest else []
    return [element("div", *shown, class_="tiles"), *more] if shown else []


def _mask(row: _Row, number: int) -> Markup:
    """Draws which positions see which, by evenly spaced positions of the row."""
    count = min(len(row.ids), _MASK_CELLS)
    # Their order is the row's, so that the rule for them is the rule of the row.
    at = np.linspace(0, len(row.ids) - 1, count).astype(np.int64)
    seen = build_attention_mask(
        torch.from_numpy(row.segments[at])[None], torch.from_numpy(row.real[at])[None]
    )[0].numpy()
    colors: np.ndarray = np.array([_HIDDEN, _SEEN], np.uint8)[seen.astype(np.int64)]
    colors[~row.real[at]] = _PADDING
    colors[:, ~row.real[at]] = _PADDING
    scale = max(1, 224 // count)
    pixels = np.ascontiguousarray(colors.repeat(scale, axis=0).repeat(scale, axis=1))
    share = float(seen[np.ix_(row.real[at], row.real[at])].mean()) if row.real[at].any() else 0.0
    picture = figure(
        pixels,
        alt=f"Attention mask of row {number}: of all pairs of tokens, {share:.0%} are seen",
        caption="rows are queries, columns keys; seen: blue, not seen: pale, padding: grey",
        longest_px=256,
    )
    return element("details", element("summary", f"Attention mask of row {number}"), picture)


def row_pieces(
    ids: Sequence[int],
    learned: Sequence[bool],
    decode: Callable[[list[int]], str],
    symbols: Mapping[int, str],
) -> list[Piece]:
    """Decodes a row by its runs: given text, learned text, and image tokens, which are counted."""
    kinds = [(token in symbols, known) for token, known in zip(ids, learned, strict=True)]
    borders = [i for i in range(len(ids)) if not i or kinds[i] != kinds[i - 1]] + [len(ids)]
    pieces = []
    for start, stop in pairwise(borders):
        is_image, is_learned = kinds[start]
        if is_image:
            text = f"{stop - start:,} image tokens"
            pieces.append(Piece(text, False, symbol=True))
            continue
        text = decode(list(ids[start:stop]))
        rest = len(text) - _MOST_CHARS
        text = f"{text[:_MOST_CHARS]} … ({rest:,} more characters)" if rest > 0 else text
        pieces.append(Piece(text, is_learned))
    return pieces


PREVIEW = Verb(
    name="preview",
    help="write a page with one batch as training sees it: crops, text, loss, padding, masks",
    add=_add,
    run=_run,
)
