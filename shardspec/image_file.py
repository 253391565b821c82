"""Whether the file of an image is whole, as far as its structure shows without decoding it.

Decoders are lenient: libpng, libjpeg and OpenJPEG fill in what is missing, in black, grey or coarse
blocks, and report success where the file ends *well-formed* but early. What is compared here:

* png: the CRC of every chunk (Pillow skips those of IDAT), IEND, and on request the number of rows
  in the compressed stream, which costs an inflate (a third to a half of decoding);
* jpeg: an end marker, a scan of every component, and in progressive files every bit of every
  coefficient. Blocks that are missing within a scan are for a strict decoder to notice;
* webp: the length in the RIFF header; the format has no checksum;
* jpeg 2000: a part of every tile.

`require_payload` looks at the header alone, before anything of the image's size is allocated: is
the file long enough for what it announces?
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from shardspec.checksum import crc32

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by colour type (PNG 3rd edition, table 8)."""

_DEFLATE_RATIO = 1032
"""Most bytes that a byte of deflate expands to: 258 for two bits (RFC 1951)."""

_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""First column, first row, steps of each pass of an interlaced PNG."""

_INFLATED_BYTES = 1 << 20
"""Most bytes that are inflated at a time; only their number is of interest."""

# A marker in entropy-coded data is 0xFF and neither a stuffed zero nor a restart. Written as
# `\xff\xff*`, not `\xff+`, it has a literal first byte: 0.15 ms instead of 2.1 ms for 375 KB.
JPEG_MARKER = re.compile(rb"\xff\xff*[^\x00\xff\xd0-\xd7]")
"""The next marker of a JPEG; its last byte is the kind (ITU-T T.81, table B.1)."""

JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_SOS, JPEG_EOI = 0xDA, 0xD9
_SEQUENTIAL_FRAMES, _HUFFMAN_FRAMES = frozenset({0xC0, 0xC1}), frozenset({0xC0, 0xC1, 0xC2})
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_BLOCK_COEFFICIENTS = 64

_J2K_SOC_SIZ, _J2K_SOT = b"\xff\x4f\xff\x51", b"\xff\x90"


@dataclass(frozen=True, slots=True, kw_only=True)
class JpegFrame:
    """The frame header of a JPEG."""

    is_sequential: bool
    """Baseline or extended: decoded block by block, if it has one scan."""
    least_bits: int
    """Blocks of its smallest component, each of which takes one bit at least; 0 where a block may
    take less (arithmetic coding, lossless files)."""
    samples_per_pixel: float
    """Of all components together; 3 without subsampling."""


def jpeg_frame(payload: bytes | memoryview) -> JpegFrame | None:
    """Reads the frame header of a JPEG; None where there is none that can be read."""
    at = 2
    while match := _SEGMENT.match(payload, at):
        marker, at = match[1][0], match.end()
        if marker in _STANDALONE:
            continue
        stop = at + int.from_bytes(payload[at : at + 2], "big")
        if marker in JPEG_FRAMES:
            return _parse_frame(marker, bytes(payload[at + 2 : stop]))
        if stop <= at:
            return None
        at = stop
    return None


def size_before_opening(payload: bytes | memoryview) -> tuple[int, int] | None:
    """Reads (width, height) of a PNG or WebP from its first bytes; None for other files.

    Pillow allocates the canvas of a WebP when it opens the file.
    """
    head = bytes(payload[:30])
    if head[:8] == _PNG_SIGNATURE and head[12:16] == b"IHDR" and len(head) >= 24:
        width, height = struct.unpack(">2I", head[16:24])
        return width, height
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        sides = (int.from_bytes(head[24:27], "little"), int.from_bytes(head[27:30], "little"))
        return 1 + sides[0], 1 + sides[1]
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if head[12:16] == b"VP8 ":
        width, height = struct.unpack("<2H", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def require_payload(payload: bytes | memoryview) -> None:
    """Refuses a PNG or JPEG that is too short for the pixels that its header announces.

    Raises:
      ValueError: "truncated ...", before anything of the image's size is allocated.
    """
    if bytes(payload[:2]) == b"\xff\xd8":
        frame = jpeg_frame(payload)
        if frame is not None and 8 * len(payload) < frame.least_bits:
            raise ValueError(f"truncated JPEG: {len(payload)} bytes for {frame.least_bits} blocks")
    elif bytes(payload[:8]) == _PNG_SIGNATURE and len(payload) > 25:
        size = size_before_opening(payload)
        bits = payload[24] * _PNG_CHANNELS.get(payload[25], 0)
        if size is not None and 8 * _DEFLATE_RATIO * len(payload) < size[0] * size[1] * bits:
            raise ValueError(
                f"truncated PNG: {len(payload)} bytes for {size[0]} x {size[1]} pixels"
            )


def check_image_file(payload: bytes, *, form: str) -> dict[int, int]:
    """Checks what the structure of a file shows.

    Args:
      payload: The file.
      form: Pillow's name of its format; of others than these nothing is compared.

    Returns:
      Of a JPEG, what `check_jpeg` returns.

    Raises:
      ValueError: The file is truncated or damaged; the text says how.
    """
    if form == "PNG":
        check_png_rows(payload, check_png(payload))
    elif form in ("JPEG", "MPO"):
        return check_jpeg(payload)
    elif form == "WEBP":
        check_webp(payload)
    elif form == "JPEG2000":
        check_jpeg2000(payload)
    return {}


def _parse_frame(marker: int, body: bytes) -> JpegFrame | None:
    count = body[5] if len(body) > 5 else 0
    if not count or len(body) < 6 + 3 * count:
        return None
    height, width = struct.unpack(">2H", body[1:5])
    factors = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(count)]
    if not all(h and v for h, v in factors):
        return None
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    blocks = [-(-width * h // (8 * across)) * -(-height * v // (8 * down)) for h, v in factors]
    return JpegFrame(
        is_sequential=marker in _SEQUENTIAL_FRAMES,
        least_bits=min(blocks) if marker in _HUFFMAN_FRAMES else 0,
        samples_per_pixel=sum(h * v for h, v in factors) / (across * down),
    )


def check_png(payload: bytes | memoryview) -> list[tuple[bytes, int, int]]:
    """Checks the chunks of a PNG file and lists them.

    Returns:
      (type, start, stop) of each chunk, length and CRC included, IHDR first and IEND last.

    Raises:
      ValueError: Not a PNG, truncated, or a chunk whose CRC differs.
    """
    if bytes(payload[:8]) != _PNG_SIGNATURE:
        raise ValueError("no PNG signature")
    chunks = []
    view = memoryview(payload)
    start, kind = 8, b""
    while kind != b"IEND":
        if start + 12 > len(view):
            raise ValueError("truncated PNG: no IEND chunk")
        length = int.from_bytes(view[start : start + 4], "big")
        kind = bytes(view[start + 4 : start + 8])
        stop = start + 12 + length
        if stop > len(view):
            raise ValueError(f"truncated PNG chunk {kind!r}")
        crc = int.from_bytes(view[stop - 4 : stop], "big")
        if crc32(view[start + 4 : stop - 4]) != crc:
            raise ValueError(f"PNG chunk {kind!r} fails its CRC")
        chunks.append((kind, start, stop))
        start = stop
    return chunks


def check_png_rows(payload: bytes | memoryview, chunks: list[tuple[bytes, int, int]]) -> None:
    """Checks that the compressed stream of a PNG has all rows: one may end well-formed early.

    Args:
      payload: The file.
      chunks: What `check_png` returned.

    Raises:
      ValueError: Rows are missing, or the header or the stream is damaged.
    """
    view = memoryview(payload)
    want = _png_stream_bytes(bytes(view[16:29]))
    # Without zlib's header and Adler-32: the CRCs guard the data, and Pillow takes some files whose
    # Adler-32 is wrong.
    stream, header_bytes, got = zlib.decompressobj(-zlib.MAX_WBITS), 2, 0
    try:
        for kind, start, stop in chunks:
            left: bytes | memoryview = view[start + 8 : stop - 4] if kind == b"IDAT" else b""
            header_bytes, left = max(0, header_bytes - len(left)), left[header_bytes:]
            while left and got < want:
                got += len(stream.decompress(left, _INFLATED_BYTES))
                left = stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"damaged PNG stream: {error}") from error
    # What is still buffered fits one call: it is less than was put in at a time.
    while got < want and (more := len(stream.decompress(b"", _INFLATED_BYTES))):
        got += more
    if got < want:
        raise ValueError(f"truncated PNG stream: {got} of {want} bytes of rows")


def _png_stream_bytes(header: bytes) -> int:
    """Computes how many bytes the rows have, filter bytes included."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits, color_type, interlace = header[8], header[9], header[12]
    if color_type not in _PNG_CHANNELS or interlace > 1:
        raise ValueError(f"PNG of colour type {color_type}, interlace method {interlace}")
    pixel_bits = bits * _PNG_CHANNELS[color_type]
    total = 0
    for x, y, step_x, step_y in _ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * pixel_bits // 8))
    return total


def check_webp(payload: bytes | memoryview) -> None:
    """Checks that a WebP file is as long as its header says (the format has no checksum).

    Raises:
      ValueError: Not a WebP, or truncated.
    """
    if bytes(payload[:4]) != b"RIFF" or bytes(payload[8:12]) != b"WEBP":
        raise ValueError("no WebP signature")
    want = 8 + int.from_bytes(payload[4:8], "little")
    if len(payload) < want:
        raise ValueError(f"truncated WebP: {len(payload)} of {want} bytes")


def check_jpeg(payload: bytes) -> dict[int, int]:
    """Checks that the scans of a JPEG give every coefficient of every component.

    A file whose markers cannot be followed is left to the decoder to explain.

    Returns:
      Where the data of each scan ends, by where the length in its header is.

    Raises:
      ValueError: No end marker, or scans are missing.
    """
    at, progressive, scan = 2, False, 0
    scan_ends: dict[int, int] = {}
    # Of each component: for each coefficient the lowest bit that a scan has given, or None.
    given: dict[int, list[int | None]] = {}
    while match := JPEG_MARKER.search(payload, at):
        if scan:
            scan_ends[scan], scan = match.start(), 0
        marker, at = payload[match.end() - 1], match.end()
        if marker == JPEG_EOI:
            break
        stop = at + int.from_bytes(payload[at : at + 2], "big")
        body = payload[at + 2 : stop]
        if marker in JPEG_FRAMES and not given and len(body) > 5:
            progressive = marker in _PROGRESSIVE
            given = {i: [None] * _BLOCK_COEFFICIENTS for i in body[6::3][: body[5]]}
        elif marker == JPEG_SOS:
            scan = at
            if body and len(body) >= 4 + 2 * body[0]:
                first, last, bits = body[-3:] if progressive else (0, _BLOCK_COEFFICIENTS - 1, 0)
                for component in body[1 : 1 + 2 * body[0] : 2]:
                    bands = given.get(component, [])
                    bands[first : last + 1] = [bits & 15] * len(bands[first : last + 1])
        at = stop
    else:
        raise ValueError("truncated JPEG: no end marker")
    missing = sorted(component for component, bits in given.items() if any(b != 0 for b in bits))
    if missing:
        raise ValueError(f"truncated JPEG: scans of the components {missing} are missing")
    return scan_ends


def check_jpeg2000(payload: bytes) -> None:
    """Checks that a JPEG 2000 file has a part of each of its tiles.

    Raises:
      ValueError: No codestream, or tiles are missing.
    """
    at = payload.find(_J2K_SOC_SIZ)
    if at < 0 or len(payload) < at + 42:
        raise ValueError("truncated JPEG 2000 file: no codestream")
    # SIZ (ITU-T T.800, A.5.1), from its length field on at + 4.
    sizes = [int.from_bytes(payload[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(8)]
    width, height, _, _, tile_width, tile_height, tile_x, tile_y = sizes
    if not tile_width or not tile_height:
        raise ValueError("JPEG 2000 file has tiles of no size")
    num_tiles = -(-(width - tile_x) // tile_width) * -(-(height - tile_y) // tile_height)
    at += 2
    while at + 12 <= len(payload) and payload[at : at + 2] != _J2K_SOT:  # the main header
        at += 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    found = set()
    while at + 12 <= len(payload) and payload[at : at + 2] == _J2K_SOT:
        found.add(int.from_bytes(payload[at + 4 : at + 6], "big"))
        length = int.from_bytes(payload[at + 6 : at + 10], "big")
        at += length or len(payload)  # 0: up to the end of the codestream
    if len(found) < num_tiles:
        raise ValueError(f"truncated JPEG 2000 file: {len(found)} of {num_tiles} tiles")
