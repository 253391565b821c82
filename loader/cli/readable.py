"""Shows a batch as a person can read it: keys, shapes, types, and each sequence decoded.

An image's tokens are shortened to `<image 784×1008, 12 crops>`, text under loss is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from shardspec.messages import counted


def describe_batch(batch: Mapping[str, Any]) -> str:
    """Tabulates the tensors of a batch: key, dtype, shape, range of values."""
    rows = []
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            shape = "[" + ", ".join(map(str, value.shape)) + "]"
            span = f"{value.min():g} to {value.max():g}" if value.numel() else "empty"
            dtype = str(value.dtype).removeprefix("torch.")
            rows.append(f"{key:<18} {dtype:<8} {shape:<24} {span}")
        else:
            rows.append(f"{key:<18} {type(value).__name__:<8} {len(value)}")
    return "\n".join(rows)


def readable_rows(
    batch: Mapping[str, Any],
    *,
    decode: Callable[[list[int]], str],
    image_ids: Mapping[int, str],
) -> list[str]:
    """Turns the sequences of a batch back into text.

    Args:
      batch: As `MMCollator` makes it, with `metadata`.
      decode: Ids to text.
      image_ids: The image symbols by id.

    Returns:
      One text per row; learned tokens are between ⟦ and ⟧.
    """
    texts = []
    for ids, labels, mask, metadata in zip(
        batch["input_ids"].tolist(),
        batch["labels"].tolist(),
        batch["attention_mask"].tolist(),
        batch["metadata"],
        strict=True,
    ):
        row = ids[: sum(mask)]
        # A branch's last target is its EOS, which is not the next token of the row.
        learned = [False, *(labels[i] == token for i, token in enumerate(row[1:]))]
        pictures = iter(_named_images(metadata))
        texts.append(_readable(row, learned, decode, image_ids, pictures))
    return texts


def readable_model_rows(
    batch: Mapping[str, Any], *, decode: Callable[[list[int]], str], soft_id: int
) -> list[str]:
    """Turns the sequences of a batch for a model back into text.

    Args:
      batch: As `ModelCollator` makes it without packs, with `metadata`.
      decode: Ids to text, special tokens included.
      soft_id: The id that the features of a picture replace.
    """
    texts = []
    for ids, labels, mask, metadata in zip(
        batch["input_ids"].tolist(),
        batch["labels"].tolist(),
        batch["attention_mask"].tolist(),
        batch["metadata"],
        strict=True,
    ):
        row = ids[: sum(mask)]
        learned = [label == token for label, token in zip(labels, row, strict=False)]
        pictures = iter(
            f"<image {one['width']}×{one['height']}, {counted(one['tokens'], 'token')}>"
            for one in metadata["images"]
        )
        parts, start = [], 0
        while start < len(row):
            kind = _kind(row[start], learned[start], {soft_id: ""})
            stop = start
            while stop < len(row) and _kind(row[stop], learned[stop], {soft_id: ""}) == kind:
                stop += 1
            text = next(pictures, "<image?>") if kind == "image" else decode(row[start:stop])
            parts.append(f"⟦{text}⟧" if kind == "learned" else text)
            start = stop
        texts.append("".join(parts))
    return texts


def _named_images(metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Names each image of a sample, with the number of token blocks that it has."""
    named = []
    for image in metadata["images"]:
        crops = image["crops"]
        size = f"{image['width']}×{image['height']}"
        named.append((f"<image {size}, {crops} crop{'s' if crops > 1 else ''}>", min(crops, 2)))
    return named


def _readable(
    ids: list[int],
    learned: list[bool],
    decode: Callable[[list[int]], str],
    image_ids: Mapping[int, str],
    pictures: Iterator[tuple[str, int]],
) -> str:
    parts: list[str] = []
    start = 0
    while start < len(ids):
        kind = _kind(ids[start], learned[start], image_ids)
        stop = start
        while stop < len(ids) and _kind(ids[stop], learned[stop], image_ids) == kind:
            stop += 1
        run = ids[start:stop]
        if kind == "image":
            parts.append(_readable_images([image_ids[token] for token in run], pictures))
        else:
            parts.append(f"⟦{decode(run)}⟧" if kind == "learned" else decode(run))
        start = stop
    return "".join(parts)


def _kind(token: int, learned: bool, image_ids: Mapping[int, str]) -> str:
    if token in image_ids:
        return "image"
    return "learned" if learned else "given"


def _readable_images(symbols: list[str], pictures: Iterator[tuple[str, int]]) -> str:
    """Names the images of one run of image symbols: an overview and its tiles are two blocks."""
    blocks = symbols.count("<im_end>")
    names = []
    while blocks > 0:
        name, own = next(pictures, ("<image?>", 1))
        names.append(name)
        blocks -= own
    return "".join(names)
