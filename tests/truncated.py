"""Files of pictures that end early: cut, and *well-formed* but with a part of the picture only."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, features

SIZE = (33, 31)
"""Odd, and more than one block or unit of each format."""

_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def scene(mode="RGB"):
    """A picture whose lowest rows are neither black nor of one colour."""
    coarse = np.random.RandomState(5).randint(30, 256, (6, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).convert(mode)


def encoded(kind, *, mode="RGB", **options):
    return encoded_image(scene(mode), kind, **options)


def encoded_image(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def whole_files():
    """Name -> (Pillow's name of the format, file)."""
    files = {
        "jpeg": ("JPEG", encoded("JPEG")),
        "jpeg, chroma halved": ("JPEG", encoded("JPEG", subsampling=2)),
        "jpeg, grey": ("JPEG", encoded("JPEG", mode="L")),
        "jpeg, CMYK": ("JPEG", encoded("JPEG", mode="CMYK")),
        "jpeg, restarts": ("JPEG", encoded("JPEG", restart_marker_rows=1)),
        "jpeg, progressive": ("JPEG", encoded("JPEG", progressive=True)),
        "png": ("PNG", encoded("PNG")),
        "png, palette": ("PNG", encoded("PNG", mode="P")),
        "png, grey": ("PNG", encoded("PNG", mode="L")),
        "png, bits": ("PNG", encoded("PNG", mode="1")),
        "png, transparent": ("PNG", encoded("PNG", mode="RGBA")),
        "png, interlaced": ("PNG", interlaced_png()),
        "webp": ("WEBP", encoded("WEBP")),
        "webp, lossless": ("WEBP", encoded("WEBP", lossless=True)),
        "webp, transparent": ("WEBP", encoded("WEBP", mode="RGBA")),
        "gif": ("GIF", encoded("GIF", mode="P", interlace=0)),
        "gif, interlaced": ("GIF", encoded("GIF", mode="P", interlace=1)),
        "bmp": ("BMP", encoded("BMP")),
        "bmp, run lengths": ("BMP", rle_bmp(8)),
        "tiff": ("TIFF", encoded("TIFF")),
        "tiff, deflate": ("TIFF", encoded("TIFF", compression="tiff_adobe_deflate")),
        "tiff, lzw": ("TIFF", encoded("TIFF", compression="tiff_lzw")),
        "tiff, packbits": ("TIFF", encoded("TIFF", compression="packbits")),
        "tiff, jpeg": ("TIFF", encoded("TIFF", compression="jpeg")),
        **{
            f"tiff, {name}": ("TIFF", encoded("TIFF", mode="1", compression=compression))
            for name, compression in (("fax 3", "group3"), ("fax 4", "group4"))
        },
        "ppm": ("PPM", encoded("PPM")),
    }
    if features.check("jpg_2000"):
        files["jpeg 2000"] = ("JPEG2000", encoded("JPEG2000"))
        files["jpeg 2000, stream"] = ("JPEG2000", encoded("JPEG2000", no_jp2=True))
        files["jpeg 2000, tiles"] = ("JPEG2000", encoded("JPEG2000", tile_size=(16, 16)))
    if features.check("avif"):
        files["avif"] = ("AVIF", encoded("AVIF"))
    return files


def early_ends(name, payload, count):
    """Makes about `count` files that are well-formed and have a part of the picture only."""
    shares = [i / count for i in range(count)]
    kind = name.split(",")[0]
    if kind == "png":
        return [early_png(payload, share) for share in shares]
    if name == "jpeg, progressive":
        return early_scans(payload)
    if kind == "jpeg":
        return [early_jpeg(payload, share) for share in shares]
    if kind == "webp":
        return [early_webp(payload, share) for share in shares]
    if kind == "gif":
        return [early_gif(payload, share) for share in shares]
    if name == "bmp, run lengths":
        return [rle_bmp(rows) for rows in range(8)]
    if name == "tiff, jpeg":
        return [early_tiff(payload, share) for share in shares if share]
    if name == "jpeg 2000, stream":
        return [payload[: int(len(payload) * share)] + b"\xff\xd9" for share in shares]
    return []


def png(chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def png_chunks(payload):
    at = 8
    while at < len(payload):
        length = int.from_bytes(payload[at : at + 4], "big")
        yield payload[at + 4 : at + 8], payload[at + 8 : at + 8 + length]
        at += 12 + length


def interlaced_png():
    pixels = np.asarray(scene())
    header = struct.pack(">IIBBBBB", *SIZE, 8, 2, 0, 0, 1)
    rows = b"".join(
        b"\0" + row.tobytes()
        for x, y, step_x, step_y in _ADAM7
        for row in pixels[y::step_y, x::step_x]
    )
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def early_png(payload, share):
    """Ends the compressed stream, complete with its checksum, at the end of a row."""
    chunks = list(png_chunks(payload))
    rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    width, _, bits, color = struct.unpack(">IIBB", chunks[0][1][:10])
    stop = int(len(rows) * share)
    if not chunks[0][1][12]:
        row_bytes = 1 + -(-width * bits * {0: 1, 2: 3, 3: 1, 6: 4}[color] // 8)
        stop = stop // row_bytes * row_bytes
    idat = (b"IDAT", zlib.compress(rows[:stop]))
    rest = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    return png([*rest, idat, (b"IEND", b"")])


def early_jpeg(payload, share):
    start = payload.index(b"\xff\xda")
    start += 2 + int.from_bytes(payload[start + 2 : start + 4], "big")
    stop = start + int((len(payload) - 2 - start) * share)
    return payload[: stop - (payload[stop - 1] == 0xFF)] + b"\xff\xd9"


def early_scans(payload):
    """Ends a progressive JPEG after each scan but the last."""
    starts = [i for i in range(len(payload)) if payload[i : i + 2] == b"\xff\xda"]
    return [payload[:start] + b"\xff\xd9" for start in starts[1:]]


def early_webp(payload, share):
    at = 12
    while payload[at : at + 4] not in (b"VP8 ", b"VP8L"):
        length = int.from_bytes(payload[at + 4 : at + 8], "little")
        at += 8 + length + length % 2
    length = int(int.from_bytes(payload[at + 4 : at + 8], "little") * share)
    body = payload[: at + 4] + struct.pack("<I", length) + payload[at + 8 : at + 8 + length]
    body += bytes(length % 2)
    return body[:4] + struct.pack("<I", len(body) - 8) + body[8:]


def early_gif(payload, share):
    """Ends the LZW stream with its end code, after a part of the pixels, each a code of its own."""
    head, bits = _gif_head(payload)
    pixels = np.asarray(scene("P")).ravel()
    values = [int(v) for v in pixels[: int(len(pixels) * share)]]
    clear, codes, period = 1 << bits, [], (1 << bits) - 2
    for i, value in enumerate(values):
        codes += [clear, value] if i % period == 0 else [value]  # no code gets longer
    stream = 0
    for i, code in enumerate([*(codes or [clear]), clear + 1]):
        stream |= code << i * (bits + 1)
    body = stream.to_bytes(-(-stream.bit_length() // 8), "little")
    blocks = [body[i : i + 255] for i in range(0, len(body), 255)]
    return head + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0\x3b"


def _gif_head(payload):
    """Gives the file up to its first block of data, and the bits of its codes."""
    at = 13 + (3 * (2 << (payload[10] & 7)) if payload[10] & 0x80 else 0)
    while payload[at] != 0x2C:
        at += 2
        while payload[at]:
            at += payload[at] + 1
        at += 1
    flags = payload[at + 9]
    at += 10 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0)
    return payload[: at + 1], payload[at]


def rle_bmp(rows):
    """An 8 x 8 picture by run lengths, of which the first rows are there."""
    palette = bytes(channel for i in range(256) for channel in (i, i, i, 0))
    body = b"\x08\x4d\0\0" * rows + b"\0\x01"
    start = 14 + 40 + len(palette)
    head = b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)
    facts = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(body), 0, 0, 256, 0)
    return head + facts + palette + body


def early_tiff(payload, share):
    """Lets the strips' lengths end early."""
    start = int.from_bytes(payload[4:8], "little")
    changed = bytearray(payload)
    for i in range(int.from_bytes(payload[start : start + 2], "little")):
        at = start + 2 + 12 * i
        tag, kind, number, value = struct.unpack("<HHII", payload[at : at + 12])
        if tag == 279:
            assert number == 1
            value &= 0xFFFF if kind == 3 else 0xFFFFFFFF
            changed[at + 8 : at + 12] = struct.pack("<I", int(value * share))
    return bytes(changed)
