"""A matrix of odd image files, made here: what a crawl brings, and what an attacker sends.

Each has the reason by which it is refused, or what its upright sRGB pixels are.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

HEIGHT, WIDTH = 61, 83


@dataclass(frozen=True, kw_only=True)
class Odd:
    """One file."""

    payload: bytes
    refused: str = ""
    """The reason; "" for a file that is taken."""
    want: np.ndarray | None = None
    """uint8 [H, W, 3]; None where only the size is known."""
    size: tuple[int, int] = (WIDTH, HEIGHT)
    """(width, height) of the upright original."""
    close: float = 0.0
    """Largest mean difference in levels; 0 for equality."""
    fetched: str = ""
    """What FETCH says of it; "" where only decoding can tell."""


def scene(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3]: slopes of colour; every corner is different."""
    y, x = np.mgrid[:height, :width]
    blue = (x + y) * 255 // (width + height)
    return np.stack([x * 255 // width, y * 255 // height, blue], axis=-1).astype(np.uint8)


def saved(image: Image.Image | np.ndarray, fmt: str, **options: object) -> bytes:
    """The bytes of an image file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_header(width: int, height: int, *, bits: int = 8, color: int = 2, lace: int = 0) -> bytes:
    """The body of IHDR."""
    return struct.pack(">2I5B", width, height, bits, color, 0, 0, lace)


def png_pixels(rows: np.ndarray, *, bits: int, color: int, extra=()) -> bytes:
    """A PNG of packed rows, uint8 [H, bytes], without filters."""
    lines = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1)
    return png(
        (b"IHDR", png_header(WIDTH, HEIGHT, bits=bits, color=color)),
        *extra,
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    )


def with_chunks(payload: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with further chunks after its header."""
    return payload[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + payload[33:]


def black_png(width: int, height: int, *, color: int = 2) -> bytes:
    """A complete PNG of zeros, of any size in a few milliseconds."""
    line = 1 + width * {0: 1, 2: 3, 6: 4}[color]
    total, unit = line * height, 1 << 20
    engine = zlib.compressobj(9, wbits=-15)
    block = engine.compress(bytes(unit)) + engine.flush(zlib.Z_FULL_FLUSH)
    tail = zlib.compressobj(9, wbits=-15)
    end = tail.compress(bytes(total % unit)) + tail.flush()
    adler = ((total % 65521) << 16) | 1
    data = b"\x78\xda" + block * (total // unit) + end + struct.pack(">I", adler)
    header = png_header(width, height, color=color)
    return png((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))


def grey_jpeg(width: int, height: int) -> bytes:
    """A complete baseline JPEG of one middle grey, of any size: every block has the same 6 bits."""
    small = saved(Image.new("L", (8, 8), 128), "JPEG")
    frame, scan = small.index(b"\xff\xc0"), small.index(b"\xff\xda")
    head = bytearray(small[: scan + 2 + struct.unpack(">H", small[scan + 2 : scan + 4])[0]])
    head[frame + 5 : frame + 9] = struct.pack(">2H", height, width)
    blocks = -(-width // 8) * -(-height // 8)
    bits = b"\x28\xa2\x8a" * -(-blocks // 4)  # DC difference 0 (00), end of block (1010)
    return bytes(head) + bits[: -(-blocks * 6 // 8)] + b"\xff\xd9"


def resized_header(payload: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header announces another size."""
    changed = bytearray(payload)
    marks = [at for mark in (b"\xff\xc0", b"\xff\xc2") if (at := payload.find(mark)) >= 0]
    changed[min(marks) + 5 : min(marks) + 9] = struct.pack(">2H", height, width)
    return bytes(changed)


def exif(orientation: int) -> bytes:
    """An EXIF block."""
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


def srgb_profile() -> bytes:
    """An ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def padded_profile(num_bytes: int) -> bytes:
    """The same, longer: profiles with large tables look like this to a reader of PNG."""
    profile = srgb_profile()
    noise = np.random.RandomState(3).bytes(num_bytes - len(profile))
    return struct.pack(">I", num_bytes) + profile[4:] + noise


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lays pixels over white, as the offline half does."""
    image = Image.fromarray(np.dstack([rgb, alpha]))
    white = Image.new("RGB", image.size, (255, 255, 255))
    return np.asarray(Image.composite(image.convert("RGB"), white, image.getchannel("A")))


_TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def odd_images() -> dict[str, Odd]:
    """The matrix, by name."""
    rgb = scene()
    grey = rgb[..., 0]
    greys = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bit = ((x // 8 + y // 8) % 2).astype(np.uint8)
    bits = np.repeat(bit[..., None] * 255, 3, axis=2)
    plain = saved(rgb, "PNG")
    noise = np.random.RandomState(5).bytes(3 << 20)
    found: dict[str, Odd] = {}

    def take(name: str, payload: bytes, want: np.ndarray | None, close: float = 0.0) -> None:
        size = (WIDTH, HEIGHT) if want is None else (want.shape[1], want.shape[0])
        found[name] = Odd(payload=payload, want=want, close=close, size=size)

    def refuse(name: str, payload: bytes, reason: str, fetched: str = "") -> None:
        found[name] = Odd(payload=payload, refused=reason, fetched=fetched)

    # --- PNG
    wide = np.dstack([rgb, rgb]).reshape(HEIGHT, WIDTH, 2, 3).swapaxes(2, 3)  # v * 257
    take("png rgb", plain, rgb)
    take("png grey", saved(grey, "PNG"), greys)
    take("png 1 bit", saved(Image.fromarray(bit * 255).convert("1"), "PNG"), bits)
    nibbles = np.concatenate([bit * 15, np.zeros((HEIGHT, 1), np.uint8)], axis=1)
    take(
        "png grey 4 bit",
        png_pixels(nibbles[:, ::2] << 4 | nibbles[:, 1::2], bits=4, color=0),
        bits,
    )
    big_endian = (grey.astype(np.uint16) * 256 + 7).astype(">u2")
    packed = big_endian.view(np.uint8).reshape(HEIGHT, -1)
    take("png grey 16 bit", png_pixels(packed, bits=16, color=0), greys)
    packed = np.ascontiguousarray(wide).reshape(HEIGHT, -1)
    take("png rgb 16 bit", png_pixels(packed, bits=16, color=2), rgb)
    both = np.dstack([grey, alpha])
    take("png grey and alpha", saved(Image.fromarray(both), "PNG"), over_white(greys, alpha))
    rgba = np.dstack([rgb, alpha])
    take("png rgba", saved(rgba, "PNG"), over_white(rgb, alpha))
    palette = Image.fromarray(rgb).quantize(32)
    take("png palette", saved(palette, "PNG"), np.asarray(palette.convert("RGB")))
    clear = np.where(np.asarray(palette) == 3, 0, 255).astype(np.uint8)
    take(
        "png palette with transparency",
        saved(palette, "PNG", transparency=3),
        over_white(np.asarray(palette.convert("RGB")), clear),
    )
    key = np.where((rgb == rgb[5, 5]).all(axis=2), 0, 255).astype(np.uint8)
    take(
        "png colour key",
        saved(rgb, "PNG", transparency=tuple(map(int, rgb[5, 5]))),
        over_white(rgb, key),
    )
    take("png profile", saved(rgb, "PNG", icc_profile=srgb_profile()), rgb)
    long_profile = b"long\0\0" + zlib.compress(padded_profile(2 << 20))
    take("png profile of 2 MiB", with_chunks(plain, (b"iCCP", long_profile)), rgb)
    endless = b"endless\0\0" + zlib.compress(bytes(64 << 20))
    take("png profile of 64 MiB", with_chunks(plain, (b"iCCP", endless)), rgb)
    take("png text of 3 MiB", with_chunks(plain, (b"tEXt", b"Comment\0" + noise)), rgb)
    deflated = b"Comment\0\0" + zlib.compress(bytes(8 << 20))
    take("png deflated texts of 80 MiB", with_chunks(plain, *[(b"zTXt", deflated)] * 10), rgb)
    international = b"prompt\0\1\0\0\0" + zlib.compress(bytes(2 << 20))
    take("png international text of 2 MiB", with_chunks(plain, (b"iTXt", international)), rgb)
    take("png text of 3 MiB at its end", plain[:-12] + png_chunk(b"tEXt", b"a\0" + noise)
         + plain[-12:], rgb)  # fmt: skip
    xmp = b'<x tiff:Orientation="6"/>'
    described = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    take("png turned by xmp", with_chunks(plain, described), _TURNED[6](rgb))
    take(
        "png turned by xmp beside long text",
        with_chunks(plain, (b"zTXt", deflated), described),
        _TURNED[6](rgb),
    )
    long_xmp = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp + bytes(8 << 20))
    take("png xmp of 8 MiB", with_chunks(plain, (b"iTXt", long_xmp)), rgb)
    take("png turned by exif", saved(rgb, "PNG", exif=exif(6)), _TURNED[6](rgb))
    frames = [Image.fromarray(p) for p in (rgb, rgb[::-1])]
    take("png animated", saved(frames[0], "PNG", save_all=True, append_images=frames[1:]), rgb)
    take("png and zip", plain + b"PK\3\4" + noise[:1000], rgb)
    # --- JPEG
    take("jpeg", saved(rgb, "JPEG", quality=95), rgb, 3)
    take("jpeg grey", saved(grey, "JPEG", quality=95), greys, 3)
    take("jpeg progressive", saved(rgb, "JPEG", quality=95, progressive=True), rgb, 3)
    take("jpeg restarts", saved(rgb, "JPEG", quality=95, restart_marker_rows=1), rgb, 3)
    take("jpeg in rgb", saved(rgb, "JPEG", quality=95, keep_rgb=True), rgb, 3)
    take("jpeg profile", saved(rgb, "JPEG", quality=95, icc_profile=srgb_profile()), rgb, 3)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    take("jpeg cmyk", saved(cmyk, "JPEG", quality=95), np.asarray(cmyk.convert("RGB")), 4)
    for orientation, turn in _TURNED.items():
        payload = saved(rgb, "JPEG", quality=95, exif=exif(orientation))
        take(f"jpeg orientation {orientation}", payload, turn(rgb), 3)
    broken = saved(rgb, "JPEG", quality=95, exif=b"Exif\0\0" + b"\xff" * 40)
    take("jpeg with a broken exif block", broken, rgb, 3)
    second = [Image.fromarray(rgb[::-1])]
    take("jpeg of several images", saved(rgb, "MPO", save_all=True, append_images=second), rgb, 6)
    take("jpeg and html", saved(rgb, "JPEG", quality=95, comment=b"<html>") + b"<p>", rgb, 3)
    # --- others
    take("gif", saved(palette, "GIF"), np.asarray(palette.convert("RGB")))
    take(
        "gif animated",
        saved(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        np.asarray(palette.convert("RGB")),
    )
    take("gif transparent", saved(palette, "GIF", transparency=3),
         over_white(np.asarray(palette.convert("RGB")), clear))  # fmt: skip
    take("webp", saved(rgb, "WEBP", quality=95), rgb, 6)
    take("webp lossless", saved(rgb, "WEBP", lossless=True), rgb)
    take("webp alpha", saved(rgba, "WEBP", lossless=True, exact=True), over_white(rgb, alpha))
    take("webp animated", saved(frames[0], "WEBP", lossless=True, save_all=True,
                                append_images=frames[1:]), rgb)  # fmt: skip
    take("webp turned", saved(rgb, "WEBP", lossless=True, exif=exif(8)), _TURNED[8](rgb))
    take("tiff", saved(rgb, "TIFF"), rgb)
    take("tiff lzw", saved(rgb, "TIFF", compression="tiff_lzw"), rgb)
    take("tiff turned", saved(rgb, "TIFF", exif=exif(6)), _TURNED[6](rgb))
    take("tiff cmyk", saved(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB")))
    take("tiff pages", saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]), rgb)
    take("tiff float levels", saved(Image.fromarray(grey.astype(np.float32)), "TIFF"), greys)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 256)
    take("tiff 16 bit", saved(sixteen, "TIFF"), greys)
    take("tiff 1 bit", saved(Image.fromarray(bit * 255).convert("1"), "TIFF"), bits)
    take("bmp", saved(rgb, "BMP"), rgb)
    upside = bytearray(saved(rgb[::-1].copy(), "BMP"))
    upside[22:26] = struct.pack("<i", -HEIGHT)
    take("bmp from the top", bytes(upside), rgb)
    take("ppm", saved(rgb, "PPM"), rgb)
    take("pgm 16 bit", saved(sixteen, "PPM"), greys)
    take("avif", saved(rgb, "AVIF", quality=95), rgb, 6)
    take("jpeg 2000", saved(rgb, "JPEG2000"), rgb)
    take("jpeg 2000 alpha", saved(rgba, "JPEG2000"), over_white(rgb, alpha))
    # --- numbers and colours without one meaning
    shares = Image.fromarray((grey / 255).astype(np.float32))
    refuse("tiff float shares", saved(shares, "TIFF"), "image_mode")
    refuse("tiff float nan", saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
           "image_mode")  # fmt: skip
    refuse("tiff 32 bit", saved(Image.fromarray(grey.astype(np.int32) * 2**20), "TIFF"),
           "image_mode")  # fmt: skip
    bare = png_pixels(np.asarray(palette), bits=8, color=3)
    refuse("png palette without a palette", bare, "image_mode")
    # --- not images, or not ours
    refuse("nothing", b"", "image_empty", "empty")
    refuse("html", b"<!doctype html><title>404</title>", "image_decode", "not_image")
    refuse("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image_decode", "not_image")
    refuse("zip", b"PK\3\4" + noise[:100], "image_decode", "not_image")
    for fmt in ("ICO", "EPS", "TGA", "PCX", "SGI", "ICNS", "PDF", "DDS"):
        image = Image.fromarray(rgb).resize((64, 64))
        refuse(fmt.lower(), saved(image, fmt), "image_decode", "not_image")
    # --- cut off and damaged headers
    refuse("png cut in its header", plain[:30], "image_decode", "not_image")
    refuse("jpeg cut in its header", saved(rgb, "JPEG")[:100], "image_truncated", "incomplete")
    refuse("gif cut in its header", saved(palette, "GIF")[:9], "image_decode", "not_image")
    twelve = bytearray(saved(rgb, "JPEG"))
    twelve[twelve.index(b"\xff\xc0") + 4] = 12
    refuse("jpeg of 12 bits", bytes(twelve), "image_decode", "not_image")
    refuse("png without pixels", png((b"IHDR", png_header(0, 9)), (b"IDAT", b""), (b"IEND", b"")),
           "image_empty", "empty")  # fmt: skip
    # --- more than a machine should hold
    one = zlib.compress(b"\0")
    thin = png((b"IHDR", png_header(1, 200_000_000)), (b"IDAT", one), (b"IEND", b""))
    refuse("png of one column", thin, "image_bomb", "bomb")
    flat = png((b"IHDR", png_header(200_000_000, 1)), (b"IDAT", one), (b"IEND", b""))
    refuse("png of one row", flat, "image_bomb", "bomb")
    refuse("png of one long column", black_png(1, 60_000), "image_bomb", "bomb")
    empty = png((b"IHDR", png_header(9_000, 9_000)), (b"IDAT", one), (b"IEND", b""))
    refuse("png that only announces", empty, "image_truncated", "incomplete")
    refuse("png of 196 megapixels", black_png(14_000, 14_000), "image_bomb", "bomb")
    refuse("png of 400 megapixels", black_png(20_000, 20_000, color=0), "image_bomb", "bomb")
    base, lace = saved(rgb, "JPEG"), saved(rgb, "JPEG", progressive=True)
    for name, payload in (("jpeg", base), ("progressive jpeg", lace)):
        refuse(f"{name} that only announces", resized_header(payload, 14_000, 14_000),
               "image_truncated", "incomplete")  # fmt: skip
        refuse(f"{name} of 4 gigapixels", resized_header(payload, 65_500, 65_500), "image_bomb",
               "bomb")  # fmt: skip
    refuse("cmyk jpeg that only announces", resized_header(saved(cmyk, "JPEG"), 14_000, 14_000),
           "image_truncated", "incomplete")  # fmt: skip
    found["jpeg of 92 megapixels"] = Odd(payload=grey_jpeg(9_600, 9_600), size=(9_600, 9_600))
    screen = bytearray(saved(palette, "GIF"))
    screen[6:10] = struct.pack("<2H", 65535, 65535)
    refuse("gif of 4 gigapixels", bytes(screen), "image_bomb", "bomb")
    solid = bytearray(saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    solid[21:25] = struct.pack("<I", 13_999 | 13_999 << 14)
    refuse("webp of 196 megapixels", bytes(solid), "image_bomb", "bomb")
    refuse("tiff of huge tiles", _huge_tiles(), "image_bomb", "bomb")
    refuse("jpeg of 1000 scans", _many_scans(lace, 1000), "image_bomb", "bomb")
    return found


def _huge_tiles() -> bytes:
    """A TIFF whose one tile would have 900 million pixels: the decoder allocates whole tiles."""
    tags = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 322: 30_000, 323: 30_000}
    body = bytes(64)
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    count = len(tags) + 2
    start = 8 + 2 + 12 * count + 4
    table += struct.pack("<HHII", 324, 4, 1, start) + struct.pack("<HHII", 325, 4, 1, len(body))
    return b"II*\0" + struct.pack("<IH", 8, count) + table + bytes(4) + body


def _many_scans(payload: bytes, count: int) -> bytes:
    """A progressive JPEG that repeats a scan: each costs a pass over all coefficients."""
    start = payload.rindex(b"\xff\xda")
    return payload[:-2] + payload[start:-2] * count + b"\xff\xd9"
