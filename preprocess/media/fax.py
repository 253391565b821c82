"""Whether all rows of a fax-compressed TIFF are there.

libtiff fills up what is missing of a strip, or damaged, with white, and says so in a warning at
most. Which bits some rows have in these codes is stated by the ITU's recommendations T.4 and T.6,
whoever encodes them: so each strip is decoded alone, its rows are encoded again, and the bits are
those of the strip, or it is not taken. What ends a strip (RTC, EOFB) may be there or not.

Strips of encoders that choose other codes, or that put fill bits or ends of lines elsewhere, cannot
be told from damaged ones.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, TiffImagePlugin, TiffTags

FAX: Mapping[int, str] = {2: "tiff_ccitt", 3: "group3", 4: "group4"}
"""Pillow's names of the compressions, by their numbers in a TIFF."""

_END = re.compile("(0{0,18}(000000000001){2}((000000000001){4})?)?")
"""What may follow the rows, of T.6 or T.4, with the zeros that fill up the last byte."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_whole_fax(payload: bytes, tags: Mapping[int, Any]) -> bool:
    """Returns True if all strips of a page have all of its rows.

    Args:
      payload: The file.
      tags: Of the page: bits, black or white, in strips.

    Raises:
      OSError, ValueError: Pillow cannot read a strip.
    """
    width, height = int(tags[256]), int(tags[257])
    per_strip = min(int(tags.get(278, height)), height)
    offsets, lengths = tags.get(273, ()), tags.get(279, ())
    heights = [min(per_strip, height - top) for top in range(0, height, per_strip)]
    bits, samples = tags.get(258, (1,)), tags.get(277, 1)
    if not len(offsets) == len(lengths) == len(heights) or (*bits, samples) != (1, 1):
        return False
    if sum(lengths) > len(payload):  # or a short file would be decoded any number of times
        return False
    compression, options = int(tags[259]), int(tags.get(292, 0))
    for start, length, rows in zip(offsets, lengths, heights, strict=True):
        strip = payload[start : start + length]
        if tags.get(266, 1) == 2:
            strip = strip.translate(_REVERSED)
        file = _tiff_of(strip, (width, rows), compression, options)
        with Image.open(io.BytesIO(file), formats=["TIFF"]) as page:
            page.load()
            again = io.BytesIO()
            page.save(again, "TIFF", compression=FAX[compression], strip_size=1 << 30)
        if len(strip) != length or not _same(strip, _strip_of(again.getvalue())):
            return False
    return True


def _tiff_of(strip: bytes, size: tuple[int, int], compression: int, options: int) -> bytes:
    """Makes a TIFF of one strip."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    values = {256: size[0], 257: size[1], 258: 1, 259: compression, 262: 1, 277: 1, 278: size[1]}
    if compression == 3:
        values[292] = options
    for tag, value in values.items():
        tags[tag] = value
    tags.tagtype[273] = tags.tagtype[279] = TiffTags.LONG
    tags[273], tags[279] = (0,), (len(strip),)
    return b"II*\0" + (8).to_bytes(4, "little") + tags.tobytes(8) + strip  # shifts the offset


def _strip_of(file: bytes) -> bytes:
    with Image.open(io.BytesIO(file), formats=["TIFF"]) as page:
        tags = page.tag_v2  # type: ignore[attr-defined]
        (start,), (length,) = tags[273], tags[279]
    return file[start : start + length]


def _same(strip: bytes, again: bytes) -> bool:
    """Compares bits, but for what ends them."""
    ours, theirs = (
        bin(int.from_bytes(b"\1" + part, "big"))[3:].rstrip("0") for part in (strip, again)
    )
    theirs = theirs.removesuffix("000000000001" * 2).rstrip("0")  # libtiff writes that of T.6
    return ours.startswith(theirs) and _END.fullmatch(ours, len(theirs)) is not None
