"""`python -m loader preview`: one batch as training sees it at a step, as HTML or PNG.

Joins both halves of the project: the loader gives the batch, the offline half its tokenizer and the
parts of pages. The batch is the very one that the run with these settings gets: augmented, cut into
crops, packed and padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from loader.assembly import build_attention_mask
from loader.cli.batch_rows import Row, read_rows
from loader.cli.opened import add_mixture, open_dataset
from loader.cli.peek import open_tokenizer
from loader.cli.readable import describe_batch
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.dataloader import make_dataloader
from loader.order import require_step
from preprocess.page import (
    Block,
    Figure,
    Markup,
    Piece,
    card,
    draw_sheet,
    element,
    fact_blocks,
    figure,
    figure_blocks,
    fill_block,
    loss_text,
    page,
    section,
    space_block,
    table,
    table_blocks,
    text_blocks,
    token_blocks,
)
from preprocess.text import IMAGE_SYMBOLS
from shardspec import storage
from shardspec.errors import ConfigError
from shardspec.families import StoredModel
from shardspec.messages import counted

_CROP_PX = 128
_MASK_CELLS = 192
_MOST_CROPS = 40
_MOST_CHARS = 4_000

_COLUMNS = ("key", "type", "shape and values")
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
    add_flag(
        parser, "--out", "file or URL to write: a page (.html) or a picture (.png)", "preview.html"
    )


def _run(options: argparse.Namespace) -> str:
    require_step(options.step)
    write = writer_of(options.out)
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
    length = counted(options.sequence_length, "token")
    told = (
        f"{opened.name} {options.split}: step {options.step:,} of a run with seed "
        f"{options.seed}, rank {options.rank} of {options.ranks}, "
        f"{counted(options.global_batch, 'row')} per step, "
        + ("augmented, " if options.augment else "not augmented, ")
        + (f"packed to {length}" if options.pack else "one sample a row")
    )
    preview = read_preview(
        batch, title=f"{opened.name}: preview", lead=told, decode=tokenizer.decode,
        symbols=symbols,
        model=model,
    )  # fmt: skip
    storage.publish_bytes(options.out, write(preview))
    return f"{told}\n{options.out}"


def writer_of(out: str) -> Callable[[Preview], bytes]:
    """Chooses the form of a preview by the suffix of its file.

    Raises:
      ConfigError: `preview_suffix`.
    """
    suffix = PurePosixPath(out).suffix.lower()
    if suffix not in _WRITERS:
        raise ConfigError("preview_suffix", where=out)
    return _WRITERS[suffix]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """What is shown of a row."""

    title: str
    told: str
    lengths: Sequence[int]
    """Positions of each of its samples."""
    length: int
    """Positions of the row, with padding."""
    figures: Sequence[Figure]
    more: str
    """What is said of pictures that are not shown."""
    texts: Sequence[tuple[str | None, str, Sequence[Piece]]]
    """Of each sample: heading, what it is, tokens."""
    mask: Figure
    mask_told: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What is shown of a batch."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    tensors: Sequence[Sequence[str]]
    """Key, type, and shape and values of each."""
    legend: str
    """What follows "Text that is marked"."""
    cards: Sequence[_Card]


def read_preview(
    batch: Mapping[str, Any],
    *,
    title: str,
    lead: str,
    decode: Callable[[list[int]], str],
    symbols: Mapping[int, str],
    model: StoredModel | None = None,
) -> Preview:
    """Chooses what is shown of a batch.

    Args:
      batch: As `read_rows` takes it.
      title: Of the page.
      lead: What the batch is.
      decode: Ids to text.
      symbols: The image symbols by id.
      model: That the dataset was built for.
    """
    rows = read_rows(batch, model)
    used, places = sum(row.used for row in rows), sum(len(row.ids) for row in rows)
    facts = [
        ("rows", f"{len(rows):,}"),
        ("samples", f"{sum(len(row.parts) for row in rows):,}"),
        ("positions", f"{places:,}"),
        ("padding", f"{1 - used / max(1, places):.1%}"),
        ("targets under loss", f"{sum(row.num_targets for row in rows):,}"),
    ]
    ends = "; so is the end of each conversation, which has no position of its own"
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return Preview(
        title=title,
        lead=lead,
        facts=facts,
        tensors=[line.split(None, 2) for line in describe_batch(tensors).splitlines()],
        legend=f" is under loss{ends if model is None else ''}. "
        "Crops are the pixels that the model gets.",
        cards=[_card(row, number, decode, symbols) for number, row in enumerate(rows)],
    )


def as_html(preview: Preview) -> bytes:
    """Makes a page of a preview."""
    facts = [
        element("div", element("dt", name), element("dd", value)) for name, value in preview.facts
    ]
    mark = element("mark", "background")
    legend = element("p", "Text with a ", mark, preview.legend, class_="note")
    cards = element("div", *map(_html_card, preview.cards), class_="cards")
    document = page(
        preview.title,
        section(
            "Batch",
            element("dl", *facts, class_="facts"),
            table("Tensors", _COLUMNS, preview.tensors, numeric=False),
            anchor="batch",
        ),
        section("Rows", legend, cards, anchor="rows"),
        lead=preview.lead,
        contents=[("batch", "Batch"), ("rows", "Rows")],
    )
    return document.encode()


def _html_card(shown: _Card) -> Markup:
    shares = [f"width:{100 * each / max(1, shown.length):.2f}%" for each in shown.lengths]
    bars = [element("span", style=share) for share in shares]
    told = ", ".join(f"{each:,}" for each in shown.lengths)
    label = f"Of {shown.length:,} positions, samples take {told}; the rest is padding"
    figures = [
        figure(each.pixels, alt=each.caption.capitalize(), caption=each.caption,
               longest_px=each.longest_px)
        for each in shown.figures
    ]  # fmt: skip
    bodies = []
    for heading, of, pieces in shown.texts:
        bodies.append(element("h4", heading) if heading else None)
        bodies.append(loss_text(pieces, label=f"Text of {of}; marked parts are under loss"))
    mask = shown.mask
    return card(
        shown.title,
        element("div", *bars, class_="fill", role="img", aria_label=label),
        element("div", *figures, class_="tiles") if figures else None,
        element("p", shown.more, class_="note") if shown.more else None,
        *bodies,
        element(
            "details",
            element("summary", shown.mask_told.partition(":")[0]),
            figure(
                mask.pixels, alt=shown.mask_told, caption=mask.caption, longest_px=mask.longest_px
            ),
        ),
        meta=shown.told,
    )


def as_png(preview: Preview) -> bytes:
    """Makes a picture of a preview, with what is on its page."""
    head = [
        *text_blocks(preview.title, size=26),
        *text_blocks(preview.lead, soft=True),
        *fact_blocks(preview.facts),
        *table_blocks([_COLUMNS, *preview.tensors]),
        space_block(),
        *text_blocks(f"Text with a background and a line below it{preview.legend}", soft=True),
    ]
    return draw_sheet(head, [_png_card(shown) for shown in preview.cards], of="row")


def _png_card(shown: _Card) -> list[Block]:
    blocks = [*text_blocks(shown.title, size=17), *text_blocks(shown.told, soft=True)]
    mask = shown.mask._replace(caption=f"{shown.mask_told}; {shown.mask.caption}")
    blocks += [fill_block(shown.lengths, shown.length), *figure_blocks([*shown.figures, mask])]
    blocks += text_blocks(shown.more, soft=True)
    for heading, _, pieces in shown.texts:
        blocks += [space_block(), *text_blocks(heading or ""), *token_blocks(pieces)]
    return blocks


def _card(
    row: Row, number: int, decode: Callable[[list[int]], str], symbols: Mapping[int, str]
) -> _Card:
    several = len(row.parts) > 1
    title = f"Row {number}: {f'pack of {len(row.parts)} samples' if several else row.key}"
    crops, padded = len(row.pictures), len(row.ids) - row.used
    dropped = sum(part.get("dropped_branches", 0) for part in row.parts)
    told = (
        f"{counted(row.used, 'token')} and {padded:,} of padding; {row.num_targets:,} under loss; "
        f"{counted(crops, 'crop')}"
        + (f"; {counted(dropped, 'conversation')} did not fit" if dropped else "")
    )
    texts = []
    for part, (start, stop) in zip(row.parts, pairwise(row.borders), strict=False):
        heading = f"Sample {part['key']}, {counted(stop - start, 'token')}" if several else None
        pieces = row_pieces(
            row.ids[start:stop].tolist(), row.learned[start:stop].tolist(), decode, symbols
        )
        texts.append((heading, part["key"], pieces))
    mask, share = _mask(row)
    rest = max(0, crops - _MOST_CROPS)
    return _Card(
        title=title,
        told=told,
        lengths=[stop - start for start, stop in pairwise(row.borders)],
        length=len(row.ids),
        figures=[Figure(pixels, name, _CROP_PX) for name, pixels in row.pictures[:_MOST_CROPS]],
        more=f"{counted(rest, 'more crop')}." if rest else "",
        texts=texts,
        mask=mask,
        mask_told=f"Attention mask of row {number}: of all pairs of tokens, {share:.0%} are seen",
    )


def _mask(row: Row) -> tuple[Figure, float]:
    """Draws which positions see which, by evenly spaced positions; gives the share seen, too."""
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
    told = "rows are queries, columns keys; seen: blue, not seen: pale, padding: grey"
    return Figure(pixels, told, 256), share


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
            text = counted(stop - start, "image token")
            pieces.append(Piece(text, False, symbol=True))
            continue
        text = decode(list(ids[start:stop]))
        rest = len(text) - _MOST_CHARS
        text = f"{text[:_MOST_CHARS]} … ({counted(rest, 'more character')})" if rest > 0 else text
        pieces.append(Piece(text, is_learned))
    return pieces


_WRITERS = {".html": as_html, ".png": as_png}

PREVIEW = Verb(
    name="preview",
    help="write a page or PNG of a batch as training sees it: crops, text, loss, padding, masks",
    add=_add,
    run=_run,
)
