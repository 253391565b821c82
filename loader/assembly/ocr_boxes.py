"""Where the words of a document are on the crops of a row.

The words are those of the record's `ocr`: pages with their size, and words with boxes in its unit.
Documents are never flipped or cropped, so that boxes follow from the sizes and the view. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shardspec.tiling import ImageView, boxes_on_crops, num_crops


def ocr_boxes(
    ocr: Any, *, sizes: Sequence[tuple[int, int]], view: ImageView
) -> dict[str, Any] | None:
    """Computes where words are on the crops of an example.

    Args:
      ocr: Of the sample's record: a page for each image, in order.
      sizes: (width, height) of each upright original, in pixels.
      view: What the model sees.

    Returns:
      `texts`, the words of all pages in reading order; and for each part of a word on a crop, in
      the order of the crops: `word`, int64 [M], its number in `texts`; `crop`, int64 [M], its
      number in the example's `images`; `corners`, float64 [M, 4], x0, y0, x1, y1 in pixels of the
      crop. None for a record without pages of words.
    """
    if not isinstance(ocr, Sequence) or isinstance(ocr, str) or not ocr:
        return None
    texts: list[str] = []
    words, crops, corners = [], [], []
    first_crop = 0
    for page, (width, height) in zip(ocr, sizes, strict=False):
        shares_N4 = _shares(page)
        found = boxes_on_crops(shares_N4, width=width, height=height, view=view)
        words.append(found.box + len(texts))
        crops.append(found.crop + first_crop)
        corners.append(found.corners)
        texts += [word[0] for word in page["words"]]
        first_crop += num_crops(width, height, view)
    return {
        "texts": texts,
        "word": np.concatenate(words),
        "crop": np.concatenate(crops),
        "corners": np.concatenate(corners),
    }


def _shares(page: Mapping[str, Any]) -> np.ndarray:
    """Gives the boxes of a page as shares of it: float64 [N, 4]."""
    boxes_N4 = np.array([word[1:5] for word in page["words"]], np.float64).reshape(-1, 4)
    shares: np.ndarray = boxes_N4 / ((page["width"], page["height"]) * 2)
    return shares
