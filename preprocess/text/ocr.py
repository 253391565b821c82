"""The text of a document in front of questions about it, within a budget of tokens.

A message says what it wants by `ocr` ("text" or "words_with_boxes") and `ocr_tokens`; the text is
in the example's metadata (`ocr`: pages of words in reading order, or a text), where it is stored
once for all questions.

    text               lines as they are on the page, pages one after the other
    words_with_boxes   a word on a line, with x0, y0, x1, y1 in thousandths of the page

Pages of a document that has several have their number as a heading. What is beyond the budget is
cut off after a word; the words of all pages are one sequence, so that pages at the end go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from preprocess.text.message import field_error
from shardspec.errors import SampleError

MODES = ("text", "words_with_boxes")


def add_ocr(
    example: Mapping[str, Any], *, encode: Callable[[str], Sequence[int]]
) -> Mapping[str, Any]:
    """Puts the text of a document in front of the questions that want it.

    Args:
      example: With `message_list` and `metadata`; it is given back as it is where no message wants
        its text.
      encode: Gives the tokens of a text, which are counted.

    Raises:
      SampleError: `message_fields`: no such mode, no budget, or no text.
    """
    messages = example["message_list"]
    if not any(isinstance(message, Mapping) and "ocr" in message for message in messages):
        return example
    ready: dict[tuple[str, int], str] = {}
    found = []
    for message in messages:
        if "ocr" not in message:
            found.append(message)
            continue
        mode, budget = message["ocr"], message.get("ocr_tokens")
        if mode not in MODES:
            raise field_error(message, "ocr", " or ".join(MODES))
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise field_error(message, "ocr_tokens", "a number of tokens, 1 or more")
        if not isinstance(message.get("question"), str):
            raise field_error(message, "question", "a text")
        if (mode, budget) not in ready:
            pieces = list(_pieces(example, message, mode))
            ready[mode, budget] = fit_pieces(pieces, budget=budget, encode=encode)
        text = ready[mode, budget]
        question = f"{text}\n\n{message['question']}" if text else message["question"]
        rest = {k: v for k, v in message.items() if k not in ("ocr", "ocr_tokens")}
        found.append({**rest, "question": question})
    return {**example, "message_list": found}


def name_pages(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Puts the names of pages in front of questions, for templates that place images themselves.

    >>> name_pages({"leads": ["Page 1", "Page 7"], "message_list": [{"question": "Total?"}]})[
    ...     "message_list"
    ... ]
    [{'question': 'Page 1, Page 7\\n\\nTotal?'}]
    """
    if not example.get("leads"):
        return example
    names = ", ".join(example["leads"])
    messages = [
        {**message, "question": f"{names}\n\n{message['question']}"}
        if isinstance(message.get("question"), str)
        else message
        for message in example["message_list"]
    ]
    return {**example, "message_list": messages}


def fit_pieces(
    pieces: Sequence[str], *, budget: int, encode: Callable[[str], Sequence[int]]
) -> str:
    """Joins as many pieces, from the first on, as a budget of tokens holds.

    Args:
      pieces: Texts, each with the space in front of it.
      budget: Most tokens of the result.
      encode: Gives the tokens of a text.

    >>> fit_pieces(["one", " two", " three"], budget=2, encode=str.split)
    'one two'
    """
    # A token has at least one character, and most pieces are of a token or more.
    least, most = 0, min(len(pieces), budget + 1)
    while most < len(pieces) and len(encode(_joined(pieces, most))) <= budget:
        most = min(len(pieces), 2 * most)
    while least < most:
        middle = (least + most + 1) // 2
        if len(encode(_joined(pieces, middle))) <= budget:
            least = middle
        else:
            most = middle - 1
    # Tokens join over borders of pieces, so that one more piece may take fewer tokens: not here.
    return _joined(pieces, least)


def _joined(pieces: Sequence[str], number: int) -> str:
    return "".join(pieces[:number]).strip()


def _pieces(example: Mapping[str, Any], message: Mapping[str, Any], mode: str) -> Iterator[str]:
    """Gives the words of all pages, each with what is in front of it."""
    found = (example.get("metadata") or {}).get("ocr")
    if isinstance(found, str):
        yield from (f" {word}" if i else word for i, word in enumerate(found.split(" ")))
        return
    try:
        several = "num_pages" in example["metadata"]
        for number, page in enumerate(found or ()):
            lead = "\n\n" if number else ""
            if several:
                lead += f"Page {page['page']}:\n"
            line = None
            for text, x0, y0, x1, y1, own in page["words"]:
                if mode == "text":
                    space = "" if line is None else " " if own == line else "\n"
                    yield f"{lead}{space}{text}"
                else:
                    corners = (x0 / page["width"], y0 / page["height"])
                    corners += (x1 / page["width"], y1 / page["height"])  # type: ignore[assignment]
                    box = ", ".join(str(round(1000 * value)) for value in corners)
                    yield f"{lead}{'' if line is None else chr(10)}{text} [{box}]"
                lead, line = "", own
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SampleError(
            "message_fields.field",
            style=message.get("style"),
            name="ocr",
            field="ocr",
            want="pages of words",
            fields=sorted(message),
        ) from error
