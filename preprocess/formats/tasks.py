"""Rows of flat columns: captions, questions with answers, points and boxes."""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from preprocess.formats.class_names import ClassName
from preprocess.formats.conversations import MARK, has_placeholder, place_images, without_marks
from preprocess.formats.images import require_no_media, row_images
from preprocess.formats.spec import UNITS, Spec
from preprocess.formats.video import row_videos
from shardspec.errors import SampleError, SourceError

CAPTIONS = ("caption", "captions", "text", "TEXT", "description", "alt", "prompt", "title")
"""Columns that hold a caption, the first that is there wins."""

BOXES = ("boxes", "bboxes", "bbox", "box", "bbox_2d")
"""Columns that hold boxes, the first that is there wins."""

_OBJECT_LABELS = ("categories", "label", "labels", "category", "class", "name")
"""What objects call their labels."""

_POINT_FIELDS = (("x", "y"),)

_BOX_FIELDS: Mapping[str, Sequence[Sequence[str]]] = {
    "xyxy": (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax")),
    "xywh": (("x", "y", "w", "h"), ("x", "y", "width", "height")),
    "cxcywh": (("cx", "cy", "w", "h"), ("cx", "cy", "width", "height")),
}

OPTIONS = ("options", "choices")
"""Columns that hold the options of a question, the first that is there wins."""

_OPTION_COLUMNS = ("{}", "choice_{}", "option_{}")
"""Columns of one option each, by its letter: MMBench and SEED-Bench."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_caption(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row with one or more captions of its image into an example.

    Raises:
      SampleError: `row_fields`, `row_image`.
    """
    names = spec.names("caption", CAPTIONS)
    there = [name for name in names if row.get(name) is not None] or [names[0]]
    name = there[0]
    used = there if "caption" in spec.columns else there[:1]
    texts = [text for each in used for text in _texts(_listed(row.get(each)))]
    if not texts:
        raise _unusable(row, name, "a text, or a list of texts")
    message: dict[str, Any] = {"style": spec.style or "long_caption"}
    message |= {"text": texts[0]} if len(texts) == 1 else {"alternatives": texts}
    images = _required_images(row, spec)
    question = row.get(spec.column("question")) or spec.prompt
    if question:
        question, images = place_images(str(question), row, spec)
        message |= {"question": question} if without_marks(question) else {}
    return {"image": images, "message_list": [message]}


def parse_question(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row with a question and its answer, answers or options into an example.

    Raises:
      SampleError: `row_fields`, `row_answer`, `image_placeholder`.
    """
    chart = "query" in row and not {"question", "answer"} & set(spec.columns)  # ChartQA
    question = row.get(spec.column("question")) or (chart and row["query"]) or spec.prompt
    if not isinstance(question, str) or not question.strip():
        raise _missing(row, spec.column("question"), "a text")
    options, labels = _row_options(row, spec)
    if any(map(has_placeholder, options)):  # the order of options is drawn, that of images is not
        raise SampleError("image_placeholder.option")
    question, images = place_images(question, row, spec)
    if not images and "video" not in spec.columns:
        require_no_media(row, spec)
    answers = row.get(spec.column("answers"))
    answer = row.get(spec.column("answer"))
    answer = row.get("label") if chart and answer is None else answer
    message: dict[str, Any] = {"question": question}
    given = _answers(answer if answers is None else answers)
    if spec.unanswered and not _texts(given):
        message |= {"style": spec.style or ("a_okvqa_mc" if options else "vqa2")}
        message |= {"options": options} if options else {}
        message["unanswered"] = True
    elif options:
        message |= {
            "style": spec.style or "a_okvqa_mc",
            "options": options,
            "answer_idx": _answer_idx(answer, options, labels, row),
        }
    elif answers is not None:
        texts = _texts(_answers(answers))
        if not texts:
            raise _unusable(row, spec.column("answers"), "a list of texts")
        message |= {"style": spec.style or "vqa2", "answers": texts}
    else:
        texts = _texts(answer)
        if not texts:
            raise _unusable(row, spec.column("answer"), "a text")
        message |= {"style": spec.style or "vqa2", "answer": texts[0]}
        if len(texts) > 1:
            message = {**message, "answers": texts}
            del message["answer"]
    return {"image": images, "message_list": [message]}


def parse_points(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row with points of what its label names into an example.

    Raises:
      SampleError: `row_fields`, `row_image`.
    """
    if row.get(spec.column("timestamps")) is not None and row_videos(row, spec):
        return _parse_timed(row, spec, "points", "timestamps", style="video_point")
    label, question = row.get(spec.column("label")), row.get(spec.column("question"))
    points = _shaped(_of_columns(row, row.get(spec.column("points")), _POINT_FIELDS), _POINT_FIELDS)
    if points is None or not all(
        {"x", "y"} <= set(each) if isinstance(each, Mapping) else isinstance(each, list | tuple)
        for each in points
    ):
        raise _missing(row, spec.column("points"), "a list of [x, y]")
    pairs = [list(each) for each in _pairs(points)]
    images = _required_images(row, spec)
    message: dict[str, Any] = {"style": spec.style or "pointing", "points": pairs}
    message |= {"label": label} if _is_text(label) else {}
    if _is_text(question):
        question, images = place_images(question, row, spec)
        asked = without_marks(question)
        message |= {"question": question} if asked else {}
        if asked and MARK in question and "label" not in message:
            message["label_cased"] = asked  # an answer has no place for images
    if not {"label", "question"} & set(message):
        raise _missing(row, spec.column("label"), "a text")
    return {"image": images, "message_list": [_with_unit(message, spec)]}


def parse_tracks(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row with the places of things in the frames of its video into an example.

    Raises:
      SampleError: `row_fields`, `row_image`.
    """
    return _parse_timed(row, spec, "frame_trajectories", style="video_point_track_per_frame")


def _parse_timed(row: Mapping[str, Any], spec: Spec, *names: str, style: str) -> dict[str, Any]:
    """Takes fields of a message with times as they are; its style checks them."""
    message: dict[str, Any] = {"style": spec.style or style}
    for name in names:
        value = row.get(spec.column(name))
        if not isinstance(value, list | tuple):
            raise _missing(row, spec.column(name), "a list")
        message[name] = [_pairs(each) for each in value] if name == "points" else list(value)
    for name in ("fps", "sampling_fps"):
        rate = row.get(spec.column(name))
        if rate is not None and (name == "sampling_fps" or "timestamps" in names):
            message[name] = rate
    label, question = row.get(spec.column("label")), row.get(spec.column("question"))
    label = row.get("expression") if label is None else label
    if not isinstance(label, str) and not isinstance(question, str):
        raise _missing(row, spec.column("label"), "a text")
    message |= {"label": label} if isinstance(label, str) else {}
    message |= {"question": question} if isinstance(question, str) else {}
    size = [row.get("width"), row.get("height")]
    if UNITS[spec.unit] is not None:
        message["point_scale"] = UNITS[spec.unit]
    elif None not in size:
        message["point_size"] = size
    return {"image": _required_images(row, spec), "message_list": [message]}


def _pairs(points: Any) -> Any:
    """Gives points as [x, y], records among them; other values are left to the style."""
    if not isinstance(points, list | tuple):
        return points
    return [[p.get("x"), p.get("y")] if isinstance(p, Mapping) else p for p in points]


def parse_boxes(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row with boxes of what its labels name into an example.

    Raises:
      SampleError: `row_fields`, `row_image`, `box_shape`, `image_placeholder`.
    """
    found, label = row_boxes(row, spec)
    boxes = [_corners(each, spec.box) for each in found]
    question = row.get(spec.column("question"))
    label = _listed(label)
    labels = [label] * bool(label) if isinstance(label, str) else label
    if not _is_text(question) and spec.prompt:
        question = spec.prompt.replace("{label}", ", ".join(dict.fromkeys(map(str, labels or ()))))
    if not _is_text(question) and not labels:
        raise _missing(row, spec.column("label"), "a text, or one for each box")
    message: dict[str, Any] = {"style": spec.style or "boxes", "boxes": boxes}
    message |= {"notation": spec.notation, **({"label": label} if labels else {})}
    images = _required_images(row, spec)
    if _is_text(question):
        question, images = place_images(question, row, spec)
        message |= {"question": question} if without_marks(question) or not labels else {}
    return {"image": images, "message_list": [_with_unit(message, spec)]}


def row_boxes(row: Mapping[str, Any], spec: Spec) -> tuple[list[Any], Any]:
    """Finds the boxes of a row, as they are written there, and their label or labels.

    Raises:
      SampleError: `row_fields`, `box_shape`.
    """
    fields = _BOX_FIELDS.get(spec.box, ())
    names = spec.names("boxes", (*BOXES, "objects"))
    found = next((row[name] for name in names if row.get(name) is not None), None)
    boxes, label = _objects(_literal(found) if isinstance(found, str) else found)
    boxes = _shaped(_of_columns(row, boxes, fields), fields)
    if boxes is None:
        raise _missing(row, spec.column("boxes"), "a list of boxes")
    own = row.get(spec.column("label"))
    return boxes, label if own is None else own


def _objects(value: Any) -> tuple[Any, Any]:
    """Divides objects into their boxes and labels: the hub's record of lists, or records."""
    if isinstance(value, Mapping):
        boxes = (value[name] for name in BOXES if value.get(name) is not None)
        labels = (value[name] for name in _OBJECT_LABELS if value.get(name) is not None)
        return next(boxes, value), next(labels, None)
    if isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value):
        pairs = [_objects(each) for each in value]
        given = [label for _, label in pairs]
        unnamed = all(label is None for label in given)
        return [box for box, _ in pairs], None if unnamed else given
    return value, None


def _of_columns(row: Mapping[str, Any], value: Any, fields: Sequence[Sequence[str]]) -> Any:
    """Makes a record of columns of one number each where there is no column of points or boxes."""
    if value is not None:
        return value
    for names in fields:
        try:
            return {name: float(row[name]) for name in names}
        except (KeyError, TypeError, ValueError):
            continue
    return None


def _shaped(value: Any, fields: Sequence[Sequence[str]]) -> list[Any] | None:
    """Lists points or boxes however a column holds them; None for what is none of these.

    A list, one point or box by itself, a record of lists, or the text of one of these, as cells of
    CSV files have it.

    >>> _shaped("[[1, 2]]", _POINT_FIELDS), _shaped({"x": [1, 3], "y": [2, 4]}, _POINT_FIELDS)
    ([[1, 2]], [[1, 2], [3, 4]])
    """
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, Mapping):
        names = next((each for each in fields if set(each) <= set(value)), ())
        columns = [value[name] for name in names]
        if not any(isinstance(column, list | tuple) for column in columns):
            return [value]
        lists = all(isinstance(column, list | tuple) for column in columns)
        even = lists and len({len(column) for column in columns}) == 1
        return list(map(list, zip(*columns, strict=True))) if even else None
    if not isinstance(value, list | tuple):
        return None
    return [value] if value and isinstance(value[0], int | float) else list(value)


def _corners(box: Any, form: str) -> list[float]:
    """Gives x1, y1, x2, y2 of a box of four numbers, or of a record of them.

    >>> _corners([10, 20, 4, 6], "xywh"), _corners([10, 20, 4, 6], "cxcywh")
    ([10, 20, 14, 26], [8.0, 17.0, 12.0, 23.0])
    """
    if isinstance(box, Mapping):
        names = next((each for each in _BOX_FIELDS.get(form, ()) if set(each) <= set(box)), ())
        box = [box[name] for name in names]
    if (
        not isinstance(box, list | tuple)
        or len(box) != 4
        or not all(isinstance(each, int | float) and math.isfinite(each) for each in box)
    ):
        raise SampleError("box_shape.numbers", got=repr(box)[:80], want=form)
    a, b, c, d = box
    if form == "xywh":
        return [a, b, a + c, b + d]
    if form == "cxcywh":
        return [a - c / 2, b - d / 2, a + c / 2, b + d / 2]
    return [a, b, c, d]


def _with_unit(message: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """Says what coordinates are fractions of, and that others are no coordinates."""
    scale = UNITS[spec.unit]
    return {**message, "bounds": "strict", **({} if scale is None else {"point_scale": scale})}


def check_unit(rows: Sequence[Mapping[str, Any]], spec: Spec, *, where: str) -> None:
    """Refuses a source whose coordinates are all so small that `unit` must be another one.

    No row shows it by itself: a point of 0.4 per cent is a point. Rows that cannot be read are left
    to the job.

    Args:
      rows: Some of the source.
      spec: Its format is "points" or "boxes".
      where: The file, for the error.

    Raises:
      SourceError: `source_unit`.
    """
    scale = UNITS[spec.unit]
    values = [value for row in rows for value in _coordinates(row, spec)]
    if not values or scale is None or all(value == int(value) for value in values):
        return
    most = max(values)
    for unit, full in (("1", 1.0), ("100", 100.0)):
        if full < scale and most <= full and (full == 1 or len(values) >= _ENOUGH):
            raise SourceError(
                "source_unit", where=where, unit=spec.unit, likely=unit, most=most, rows=len(rows)
            )


_ENOUGH = 20
"""Coordinates of which one would be above 100 if they were thousandths: the chance that none is
by accident is 1 in 10**20."""


def _coordinates(row: Mapping[str, Any], spec: Spec) -> list[float]:
    try:
        message = (parse_boxes if spec.format == "boxes" else parse_points)(row, spec)
    except SampleError:
        return []
    found = message["message_list"][0]
    return [
        float(value)
        for each in found.get("boxes", found.get("points"))
        for value in each
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _answers(value: Any) -> list[Any]:
    """Lists answers: a text, a list, records with `answer` or `text`, or a record of such lists."""
    if isinstance(value, Mapping):
        found = value.get("answer")
        return _answers(value.get("text") if found is None else found)
    if isinstance(value, str) and value.strip().startswith("["):
        found = _literal(value)
        value = [value] if found is None else found
    if isinstance(value, list | tuple):
        return [
            text
            for each in value
            for text in (_answers(each) if isinstance(each, Mapping) else [each])
        ]
    return [value]


def _literal(text: str) -> Any:
    """Reads a list that is written as a text, as JSON, Python or NumPy does it; None for another.

    >>> _literal('["a", null]'), _literal("['a' 'b']"), _literal("[a]")
    (['a', None], ['a', 'b'], None)
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        found: list[str] = []
        strings = 0
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type in (tokenize.NL, tokenize.COMMENT):
                continue
            # NumPy writes no commas, and Python would join the texts.
            strings = (strings + 1) if token.type == tokenize.STRING else 0
            found += [",", token.string] if strings > 1 else [token.string]
        return ast.literal_eval(" ".join(found).strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return None


def _texts(value: Any) -> list[str]:
    """Lists the texts of a value that are not blank; numbers are taken as they are written."""
    parts = value if isinstance(value, list | tuple) else [value]
    texts = [part if isinstance(part, str) else _number(part) for part in parts]
    return [text for text in texts if text.strip()]


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int | float) and value == value else ""


def _listed(value: Any) -> Any:
    """Reads a list of texts that is written as a text, as cells of CSV files have it."""
    if isinstance(value, str) and value.strip().startswith("["):
        found = _literal(value)
        if isinstance(found, list) and all(isinstance(each, str | None) for each in found):
            return found
    return value


def _row_options(row: Mapping[str, Any], spec: Spec) -> tuple[list[str], list[str]]:
    """Lists the options of a question: of a list, or of a column for each letter; [] for none.

    Returns:
      The options, and what the row calls them; [] where that is their letters.

    Raises:
      SampleError: `row_fields`: an option between others is missing, or they cannot be read.
    """
    named = spec.names("options", OPTIONS)
    for name in named:
        options, labels = _options(row.get(name))
        if options:
            texts = [option if isinstance(option, str) else _number(option) for option in options]
            # Arrow and tables fill up with nothing.
            while texts and options[len(texts) - 1] in (None, ""):
                texts.pop()
            if not all(text.strip() for text in texts):
                raise _missing(row, name, "a list of texts")
            return texts, labels[: len(texts)]
        if isinstance(row.get(name), str) and row[name].strip().strip("[]"):
            raise _missing(row, name, "a list of options")
    if "options" in spec.columns:
        return [], []
    for form in _OPTION_COLUMNS:
        for letters in (_LETTERS, _LETTERS.lower()):
            names = [form.format(letter) for letter in letters]
            texts = ["".join(_texts(row.get(name))) for name in names]
            while texts and not texts[-1]:
                texts.pop()
            if "" in texts[:2] or len(texts) < 2:
                continue
            if "" in texts:
                raise _missing(row, names[texts.index("")], "a text")
            return texts, []
    return [], []


def _options(value: Any) -> tuple[list[Any], list[str]]:
    if isinstance(value, str) and value.strip().startswith("["):  # MMMU: a list as a text
        value = _literal(value)
    labels: Any = []
    if isinstance(value, Mapping):  # {"A": ..., "B": ...}, or the hub's record of lists
        labels = value.get("label") if value.get("text") else sorted(value, key=str)
        value = value.get("text") or [value[key] for key in labels]
    options = list(value) if isinstance(value, list | tuple) else []
    if options and all(isinstance(each, Mapping) and each.get("text") for each in options):
        labels = [each.get("label", "") for each in options]
        options = [each["text"] for each in options]
    fits = isinstance(labels, list | tuple) and len(labels) == len(options)
    return options, [str(label).strip() for label in labels] if fits else []


def _answer_idx(
    answer: Any, options: Sequence[str], labels: Sequence[str], row: Mapping[str, Any]
) -> int:
    """Finds the right option: by number from 0, by its letter, or by its text.

    Raises:
      SampleError: `row_answer`: it is none of them, or the number or letter of one option and the
        text of another.
    """
    if isinstance(answer, ClassName) and answer not in (*options, *labels):
        answer = answer.number  # whose name may be a number from 1
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        found: set[int] = set()
    else:
        text = str(answer).strip()
        letter = text.rstrip(".)").lstrip("(")
        found = {list(options).index(text)} if text in options else set()
        if letter in labels:  # ARC's are 1 to 4 in some rows
            found.add(list(labels).index(letter))
        elif len(letter) == 1 and letter in _LETTERS:
            found.add(_LETTERS.index(letter))
        elif text.isdecimal():
            found.add(int(text))
        found = {each for each in found if each < len(options)}
    if len(found) != 1:
        reason = "row_answer.both" if found else "row_answer.none"
        raise SampleError(reason, got=str(answer)[:80], options=len(options), fields=sorted(row))
    return found.pop()


def _required_images(row: Mapping[str, Any], spec: Spec) -> list[Any]:
    images = row_images(row, spec)
    if not images and not row_videos(row, spec):
        raise SampleError("row_image", fields=sorted(row), got="nothing")
    return images


def _unusable(row: Mapping[str, Any], name: str, want: str) -> SampleError:
    """Makes the error of a text that is learned: it is empty, or there is none."""
    value = row.get(name)
    parts = value if isinstance(value, list | tuple) else [value]
    if value is not None and all(isinstance(p, str) and not p.strip() for p in parts):
        return SampleError("empty_answer.field", name=name, fields=sorted(map(str, row)))
    return _missing(row, name, want)


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _missing(row: Mapping[str, Any], name: str, want: str) -> SampleError:
    return SampleError("row_fields", name=name, want=want, fields=sorted(map(str, row)))
