"""Documents: texts, images and videos in the order in which they are read.

    OBELICS, MINT-1T   `texts` and `images` of one length, one of the two set at each place
    MMC4               `text_list`, and `image_info` with the `matched_text_index` of each image
    parts              `document`, `content` or `parts`: texts, and images and videos as in
                       conversations
    a text             `text` with a placeholder (`<image>`) for each of `images`, and one
                       (`<video>`) for each video of the column that the spec names

All texts are learned. An image is where it was between them; MMC4's are in front of the text that
they match. Texts with nothing between them are separated by an empty line, MMC4's sentences by a
space; beside an image nothing is added.

A document with more than `max_images` images, `max_videos` videos or `max_chars` characters becomes
several samples. The next one begins with the image, the video or the text that does not fit. A text
longer than `max_chars` is cut after the last white space that fits, or at the limit where there is
none. Nothing is left out: joined, the samples are the document. One without text has nothing to
learn, and is a counted reason; so is a sample of more than `max_tokens` tokens, which only the
tokenizer can count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from preprocess.formats.conversations import MARK, VIDEO_MARK, text_with_media
from preprocess.formats.images import is_empty, named_media, part_media, require_no_media
from preprocess.formats.spec import Spec
from preprocess.formats.video import RowVideo, part_video, with_videos
from shardspec.errors import SampleError

PIECE = "__piece__"
"""Field of a row that says which of the samples of its document is wanted; without it the first."""

PARTS = ("document", "content", "parts")
"""Columns of a list of parts, the first that is there wins."""

STYLE = "interleaved"

_PARAGRAPH = "\n\n"
_SENTENCE = " "
_WORD = re.compile(r"\S*\Z")


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a document."""

    value: Any
    """A name, a URL, bytes or the hub's {bytes, path}."""


Part = str | Image | RowVideo


def parse_document(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a document, or the piece of it that the row names, into an example.

    Raises:
      SampleError: `document_no_text`, and as `document_parts`.
    """
    pieces = _pieces(row, spec)
    number = row.get(PIECE, 0)
    piece = pieces[number]
    if not any(isinstance(part, str) and part.strip() for part in piece):
        raise SampleError("document_no_text", piece=number + 1, pieces=len(pieces))
    text = "".join(
        part if isinstance(part, str) else MARK if isinstance(part, Image) else VIDEO_MARK
        for part in piece
    )
    images = [part.value for part in piece if isinstance(part, Image)]
    budget = {"max_tokens": spec.max_tokens} if spec.max_tokens else {}
    message = {"style": spec.style or STYLE, "text": text}
    videos = [part for part in piece if isinstance(part, RowVideo)]
    return with_videos({"image": images, "message_list": [message], **budget}, videos)


def count_pieces(row: Mapping[str, Any], spec: Spec) -> int:
    """Counts the samples of a document; one that cannot be read is one, which says why."""
    try:
        return len(_pieces(row, spec))
    except SampleError:
        return 1


def _pieces(row: Mapping[str, Any], spec: Spec) -> list[list[Part]]:
    return split_parts(
        document_parts(row, spec),
        max_images=spec.max_images,
        max_videos=spec.max_videos,
        max_chars=spec.max_chars,
    )


def document_parts(row: Mapping[str, Any], spec: Spec) -> list[Part]:
    """Lists the parts of a row in their order; no text is followed by another one.

    Raises:
      SampleError: `document`, `row_image`, `row_fields`, `row_media`, `image_without_placeholder`,
        `placeholder_without_image`, `video_without_placeholder`, `placeholder_without_video`.
    """
    texts, images = row.get(spec.column("texts")), row.get(spec.column("images"))
    sentences, text = row.get(spec.column("text_list")), row.get(spec.column("text"))
    names = spec.names("document", PARTS)
    listed = next((row[name] for name in names if isinstance(row.get(name), list | tuple)), None)
    known: Any = sentences, texts, listed
    is_text = not any(isinstance(each, Sequence) and not isinstance(each, str) for each in known)
    # Only a text says where the videos of a column are.
    require_no_media(row, spec if is_text else replace(spec, columns={}))
    if isinstance(sentences, Sequence) and not isinstance(sentences, str):
        return _joined(_matched(sentences, row.get(spec.column("image_info")), spec), _SENTENCE)
    if isinstance(texts, Sequence) and not isinstance(texts, str):
        return _joined(_aligned(texts, images), _PARAGRAPH)
    if listed is not None:
        return _joined([_part(part, spec) for part in listed], _PARAGRAPH)
    if isinstance(text, str):
        return _placed(text, row, spec)
    want = "texts and images, text_list and image_info, document, or text"
    raise SampleError("row_fields", name="texts", want=want, fields=sorted(map(str, row)))


def split_parts(
    parts: Sequence[Part], *, max_images: int, max_chars: int, max_videos: int = 0
) -> list[list[Part]]:
    """Divides a document by the budget of a sample; 0 is none. Pure, and loses nothing.

    >>> split_parts(["ab cd", Image(1), "ef"], max_images=0, max_chars=4)
    [['ab '], ['cd', Image(value=1), 'ef']]
    """
    pieces: list[list[Part]] = [[]]
    most = {Image: max_images, RowVideo: max_videos}
    counts: Counter[type] = Counter()
    num_chars = 0
    for part in parts:
        if not isinstance(part, str):
            kind = type(part)
            if most[kind] and counts[kind] == most[kind]:
                pieces.append([])
                counts, num_chars = Counter(), 0
            pieces[-1].append(part)
            counts[kind] += 1
            continue
        for text in _cut(part, max_chars):
            if max_chars and num_chars and num_chars + len(text) > max_chars:
                pieces.append([])
                counts, num_chars = Counter(), 0
            pieces[-1].append(text)
            num_chars += len(text)
    return pieces


def _cut(text: str, limit: int) -> list[str]:
    """Cuts a text into runs of at most `limit` characters, after white space if there is any.

    >>> _cut("one two three", 6), _cut("abcdef", 4), _cut("abc", 0)
    (['one ', 'two ', 'three'], ['abcd', 'ef'], ['abc'])
    """
    found = []
    while limit and len(text) > limit:
        head = text[:limit]
        end = limit
        if not text[limit].isspace() and not head[-1].isspace():
            match = _WORD.search(head)
            end = (match.start() if match else 0) or limit
        found.append(text[:end])
        text = text[end:]
    return [*found, text]


def _joined(parts: Sequence[Part], separator: str) -> list[Part]:
    """Joins neighbouring texts, and leaves empty ones out."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str) and part:
            found[-1] += separator + part
        elif part:
            found.append(part)
    return found


def _aligned(texts: Sequence[Any], images: Any) -> list[Part]:
    if not isinstance(images, Sequence) or isinstance(images, str) or len(texts) != len(images):
        length = len(images) if isinstance(images, Sequence) else type(images).__name__
        raise SampleError("document.lengths", texts=len(texts), images=length)
    parts: list[Part] = []
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        named = not is_empty(image)
        if text is not None and not isinstance(text, str):
            raise SampleError("document.part", number=i, got=type(text).__name__)
        if text and named:
            raise SampleError("document.both", number=i)
        if text:
            parts.append(text)
        elif named:
            parts.append(Image(image))
    return parts


def _matched(sentences: Sequence[Any], found: Any, spec: Spec) -> list[Part]:
    """Puts each image of MMC4 in front of the text that it matches."""
    before: list[list[Image]] = [[] for _ in sentences]
    for image in found if isinstance(found, list | tuple) else ():
        at = image.get("matched_text_index") if isinstance(image, Mapping) else None
        if not isinstance(at, int) or not 0 <= at < len(sentences):
            raise SampleError("document.index", got=at, texts=len(sentences))
        # Files have a URL and a name; names are of use to those who have the images.
        names = ("image_name", "raw_url") if spec.images else ("raw_url", "image_name")
        value = next((image[name] for name in names if not is_empty(image.get(name))), None)
        if value is None:
            raise SampleError("row_image", fields=sorted(map(str, image)), got="nothing")
        before[at].append(Image(value))
    parts: list[Part] = []
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise SampleError("document.part", number=i, got=type(sentence).__name__)
        parts += [*before[i], sentence]
    return parts


def _part(part: Any, spec: Spec) -> Part:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind, text = part.get("type"), part.get("text")
        named = named_media(part) if kind is None else []
        told = isinstance(text, str) and bool(text.strip())
        if named and len(named) + told > 1:
            raise SampleError("document.several", fields=sorted(named + ["text"] * told))
        if kind == "text" or (kind is None and isinstance(text, str) and not named):
            return str(part.get("text") or part.get("value") or "")
        if kind in ("video", "video_url") or (kind is None and not is_empty(part.get("video"))):
            if "video" not in spec.columns:
                raise SampleError("row_media", name="a part of type video", fields=sorted(part))
            video = part_video(part)
            if video is not None:
                return video
        image = part_media(part, "image") if kind not in ("video", "video_url") else None
        if image is not None:
            return Image(image)
    raise SampleError("document.part", number=-1, got=type(part).__name__)


def _placed(text: str, row: Mapping[str, Any], spec: Spec) -> list[Part]:
    marked, images, videos = text_with_media(text, row, spec)
    media: dict[str, Iterator[Part]] = {MARK: map(Image, images), VIDEO_MARK: iter(videos)}
    marks = [MARK, *([VIDEO_MARK] if "video" in spec.columns else [])]
    found = re.split(f"({'|'.join(map(re.escape, marks))})", marked)
    return [next(media[each]) if each in marks else each for each in found if each]
