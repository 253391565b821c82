"""Conversations: `conversations` of from/value, `messages` of role/content, content as parts.

One reader for all of them, since files mix the spellings: LLaVA, LLaVA-OneVision, ShareGPT4V,
InternVL and Cambrian (from/value), TRL, Qwen-VL, ms-swift and OpenAI (role/content, as a text or as
parts), LLaMA-Factory's sharegpt, The Cauldron and FineVision (pairs of user and assistant), and
rows of one exchange: alpaca (instruction, input, output), ms-swift (query, response, history), TRL
(prompt, completion). What is read:

- roles: user, human; assistant, gpt, model, function_call; system, developer, in front of the other
  turns; tool, observation, function: turns of the user whose text begins with the role, as in
  "tool: 3", since Molmo's formats and most templates have no other role that is not learned.
  `chats` has results and calls as chat templates with tools take them;
- contents: a text, or parts: text, image, image_url, and those of OpenAI's Responses (input_text,
  output_text, refusal, input_image);
- images: `image` or `images` (a name, a URL, a data: URL, bytes, the hub's {bytes, path}, or a list
  of those), a mapping of placeholders to images (MiniCPM-V), or inside of parts;
- placeholders: `<image>`, `<|image|>`, `<ImageHere>`; `<img>NAME</img>` (Qwen-VL), which names its
  image; and numbered ones such as `<image 2>`, `<image_2>`, `<image-2>`, whose image is the one of
  its number, counted from 1 unless the row has a number 0;
- videos, where the spec names their column ("" for none but those of parts): `video` or `videos` (a
  name, bytes, or a list), and parts of type video and video_url. Their placeholders are `<video>`
  and `<|video|>`; LLaVA has `<image>` in rows with videos alone.

An image or video stays where its placeholder is. Where all placeholders of a row are in front of
everything else, images first, they say nothing, and the images are laid out as those of any other
dataset. Where a row has placeholders of one kind only, what is of the other comes first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.formats.images import (
    is_empty,
    named_media,
    numbered_images,
    part_media,
    require_no_media,
)
from preprocess.formats.spec import Spec
from preprocess.formats.video import RowVideo, part_video, row_videos, with_videos
from shardspec.errors import SampleError

MARK = "<|image|>"
"""Placeholder of an image in the texts of an example (`preprocess.text.interleaved`)."""

VIDEO_MARK = "<|video|>"
"""Placeholder of a video there."""

STYLE = "demo"
"""Default style: free form, without a prefix that names it."""

PROMPTS = ("instruction", "query", "prompt")
RESPONSES = ("output", "response", "completion")
"""Columns of a prompt and its response, the first that is there wins."""

_TOOL = ("tool", "tool_response", "observation", "function", "function_response", "ipython")
_USER = ("user", "human", *_TOOL)
_ASSISTANT = ("assistant", "gpt", "model", "function_call", "tool_call", "chatgpt", "bot")
_SYSTEM = ("system", "developer")

_PLACEHOLDER = (
    r"<image[ _-]?(?P<number>\d+)>|<image>|<\|image\|>|<ImageHere>|<img>(?P<name>[^<>]+)</img>"
)
_VIDEO_PLACEHOLDER = r"(?P<video><video>|<\|video\|>)"


@dataclass(frozen=True, slots=True)
class _Turn:
    side: str
    """"system", "user" or "assistant"."""
    text: str
    """With a `MARK` for each image."""
    weight: float = 1.0
    """Factor on the loss of an answer; 0 for one that is only context."""
    reasoning: str | None = None
    """What the assistant thought before an answer, where that is kept apart."""
    chat: tuple[Mapping[str, Any], ...] = ()
    """The messages of a chat template that the turn is."""


def parse_conversation(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Turns a row into an example with one message.

    Raises:
      SampleError: `conversation`, `assistant_first`, `empty_answer`, `row_fields`,
        `row_media`, `image_placeholder`, `image_without_placeholder`, `placeholder_without_image`,
        `video_without_placeholder`, `placeholder_without_video`.
    """
    require_no_media(row, spec)
    found = None
    for name in ("messages", "conversations", "conversation"):
        found = row.get(spec.names("messages", (name,))[0]) if found is None else found
    if found is None and _are_pairs(row.get("texts")):
        return _parse_pairs(row, spec)
    found = _exchange(row, spec) if found is None else found
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        want = spec.names("messages", ("messages or conversations",))[0]
        raise SampleError("row_fields", name=want, want="a list of turns", fields=sorted(row))
    given = _given(row, spec, url=False)
    turns = [_turn(each, given) for entry in found for each in _halves(entry)]
    first = next((i for i, turn in enumerate(turns) if turn.side != "system"), len(turns))
    system = row.get(spec.column("system"))
    if not isinstance(system, str) and not is_empty(system):
        name = spec.column("system")
        raise SampleError("row_fields", name=name, want="a text", fields=sorted(row))
    if isinstance(system, str) and system.strip() and not first:
        turns, first = [_Turn("system", system), *turns], 1
    unanswered = bool(spec.unanswered) and _has_no_answer(turns)
    if unanswered:  # a text for the turn that is missing, in the place of an empty one
        answered = turns if turns[-1].side == "user" else turns[:-1]
        turns = [*answered, _Turn("assistant", "?")]
    spoken = _alternating(turns)
    texts, placed, videos = _placed([turn.text for turn in spoken], given, spec)
    if not texts[0].strip():
        raise SampleError("empty_user.turn", turns=len(turns))
    message: dict[str, Any] = {"style": spec.style or STYLE, "messages": texts}
    if unanswered:
        message |= {"messages": [*texts[:-1], ""], "unanswered": True}
    if any(turn.weight != 1 for turn in spoken[1::2]):
        message["turn_weights"] = [turn.weight for turn in spoken[1::2]]
    if any(turn.reasoning is not None for turn in spoken[1::2]):
        message["reasoning"] = [turn.reasoning for turn in spoken[1::2]]
    system_texts = [t.text for t in turns[:first]]
    told = "\n\n".join(text for text in [*system_texts, _tools(row.get("tools"))] if text.strip())
    message |= {"system": told} if told else {}
    example = {"image": placed, "message_list": [message]}
    if chat := _chat(spoken, texts, system_texts, row.get("tools")):
        example["chats"] = [chat]
    return with_videos(example, videos)


def _has_no_answer(turns: Sequence[_Turn]) -> bool:
    """Returns True for a conversation that ends with the user, or with an empty answer."""
    last = turns[-1] if turns else None
    return last is not None and (
        last.side == "user" or (last.side == "assistant" and not last.text.strip())
    )


def _exchange(row: Mapping[str, Any], spec: Spec) -> list[Any] | None:
    """Reads a row of one prompt and one response as turns; None where it lacks either."""
    prompt, name = _first(row, spec, "prompt", PROMPTS)
    response, _ = _first(row, spec, "response", RESPONSES)
    if prompt is None or response is None:
        return None
    more = row.get("input")
    if name == "instruction" and isinstance(prompt, str) and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n{more}" if prompt.strip() else more
    turns: list[Any] = []
    for exchange in [*(row.get("history") or ()), (prompt, response)]:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise SampleError("conversation.entry", got=type(exchange).__name__)
        for role, content in zip(("user", "assistant"), exchange, strict=True):
            parts = isinstance(content, list | tuple) and _are_turns(content)
            turns += content if parts else [{"role": role, "content": content}]
    return turns


def _first(
    row: Mapping[str, Any], spec: Spec, field: str, usual: Sequence[str]
) -> tuple[Any, str | None]:
    """Finds the column of a field that a row has: the one of the spec, or a usual one."""
    names = spec.names(field, usual)
    name = next((name for name in names if row.get(name) is not None), None)
    return (None if name is None else row[name]), name


def _are_turns(content: Sequence[Any]) -> bool:
    return bool(content) and all(isinstance(p, Mapping) and "role" in p for p in content)


def _halves(entry: Any) -> list[Any]:
    """Divides an entry that is a whole exchange, as ms-swift's old files have it."""
    if isinstance(entry, Mapping) and {"human", "assistant"} <= set(entry):
        return [{"role": role, "content": entry[role]} for role in ("human", "assistant")]
    return [entry]


def _tools(tools: Any) -> str:
    """Writes the tools that a conversation may call, a line of JSON for each; "" for none."""
    if isinstance(tools, str):
        return "" if tools.strip() in ("", "[]", "{}", "null") else tools
    if is_empty(tools):
        return ""
    tools = tools if isinstance(tools, list | tuple) else [tools]
    lines = [t if isinstance(t, str) else json.dumps(t, ensure_ascii=False) for t in tools]
    return "\n".join(lines)


def _chat(
    spoken: Sequence[_Turn], texts: Sequence[str], systems: Sequence[str], tools: Any
) -> dict[str, Any] | None:
    """Gives a conversation with tools as chat templates take it; None for one without.

    Returns:
      `system`, `tools` (a text where they are not JSON) and, for each text of the message, `turns`:
      its messages of role and content, with `tool_calls` after an answer.
    """
    defined = _tool_definitions(tools)
    turns = [
        list(turn.chat)
        if turn.side == "assistant" or any(each["role"] == "tool" for each in turn.chat)
        else [{"role": "user", "content": text}]
        for turn, text in zip(spoken, texts, strict=True)
    ]
    spoken_of = [each for turn in turns for each in turn]
    if not defined and not any(m["role"] == "tool" or "tool_calls" in m for m in spoken_of):
        return None
    system = "\n\n".join(filter(str.strip, systems))
    return {"system": system, "tools": defined, "turns": turns}


def _tool_definitions(tools: Any) -> Any:
    """Gives the definitions of tools as JSON objects, or as the text that is not JSON."""
    if not _tools(tools):
        return []
    found = _json(tools)
    found = [found] if isinstance(found, Mapping) else found
    if not isinstance(found, list | tuple):
        return _tools(tools)
    objects = [_json(each) for each in found]
    return _plain(objects) if all(isinstance(o, Mapping) for o in objects) else _tools(tools)


def _json(value: Any) -> Any:
    """Reads a text of JSON; gives anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _plain(value: Any) -> Any:
    """Gives a value in the types of JSON."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))


def _calls(given: Any) -> list[dict[str, Any]]:
    """Lists tool calls in the form that chat templates take."""
    found = []
    for call in given if isinstance(given, list | tuple) else [given]:
        function = call.get("function", call) if isinstance(call, Mapping) else {"name": str(call)}
        function = {"name": function} if isinstance(function, str) else function
        read = _json(function.get("arguments"))
        arguments = read if isinstance(read, Mapping) else function.get("arguments") or {}
        own = {"name": str(function.get("name", "")), "arguments": _plain(arguments)}
        named = {"id": str(call["id"])} if isinstance(call, Mapping) and call.get("id") else {}
        found.append({**named, "type": "function", "function": own})
    return found


def _spoken_call(text: str) -> Any:
    """Reads calls that are the text of a turn, as ShareGPT has them; None for another text."""
    found = _json(text)
    calls = [found] if isinstance(found, Mapping) else found
    are_calls = isinstance(calls, list) and all(
        isinstance(c, Mapping) and "name" in c for c in calls
    )
    return calls if are_calls and calls else None


def _are_pairs(texts: Any) -> bool:
    return isinstance(texts, list | tuple) and all(
        isinstance(each, Mapping) and {"user", "assistant"} <= set(each) for each in texts
    )


def _parse_pairs(row: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Reads The Cauldron, Docmatix and FineVision: each pair is a question of its own."""
    messages = []
    images = _given(row, spec, url=False)
    for pair in row["texts"]:
        turns = [{"role": role, "content": pair[role]} for role in ("user", "assistant")]
        told = [t.text for t in _alternating([_turn(each, images) for each in turns])]
        messages.append({"style": spec.style or STYLE, "messages": told})
    if not messages:
        raise SampleError("conversation.nothing", turns=0)
    if len(messages) > 1 and not images.placed:
        _require_placeholders(images, spec)
        if not all(each["messages"][0].strip() for each in messages):
            raise SampleError("empty_user.turn", turns=2 * len(messages))
        return {"image": images.column, "message_list": messages}
    if len(messages) > 1:  # an image has one place, and the questions are apart
        raise SampleError(
            "image_placeholder.place", images=len(images.column), placeholders=len(images.placed)
        )
    texts, placed, _ = _placed(messages[0]["messages"], images, spec)
    if not texts[0].strip():
        raise SampleError("empty_user.turn", turns=2)
    return {"image": placed, "message_list": [{**messages[0], "messages": texts}]}


def place_images(question: str, row: Mapping[str, Any], spec: Spec) -> tuple[str, list[Any]]:
    """Puts the images of a row at the placeholders of its only user text, if there are any.

    Returns:
      The text with a `MARK` per image and a `VIDEO_MARK` per video, or with none where these come
      first; and the images. The videos stay in the order of the row.

    Raises:
      SampleError: `image_without_placeholder`, `placeholder_without_image`.
    """
    given = _given(row, spec)
    marked = given.marked(question)
    if not given.placed and not given.videos.placed:
        _require_placeholders(given, spec)
        return question, given.column
    texts, images, _ = _placed([marked], given, spec)
    return texts[0], images


def text_with_media(
    text: str, row: Mapping[str, Any], spec: Spec
) -> tuple[str, list[Any], list[RowVideo]]:
    """Puts the images and videos of a row at the placeholders of a text.

    Those of a kind without any placeholder are in front, images first.

    Returns:
      The text with a `MARK` per image and a `VIDEO_MARK` per video, the images, and the videos.

    Raises:
      SampleError: As `_marked`.
    """
    given = _given(row, spec, url=False)
    (marked,), images, videos = _marked([given.marked(text)], given, spec)
    if not (given.placed or given.videos.placed):
        marked = MARK * len(images) + VIDEO_MARK * len(videos) + marked
    return marked, images, videos


def without_marks(text: str) -> str:
    """Removes the places of images and videos from a text.

    >>> without_marks("Where is <|image|> it?"), without_marks("<|image|>")
    ('Where is it?', '')
    """
    return " ".join(text.replace(MARK, " ").replace(VIDEO_MARK, " ").split())


def has_placeholder(text: str) -> bool:
    """Tells whether a text speaks of the place of an image."""
    return re.search(_PLACEHOLDER, text) is not None


def has_video_part(row: Mapping[str, Any]) -> bool:
    """Tells whether a conversation has a video in a part of a content."""
    for turns in (row.get("messages"), row.get("conversations"), row.get("conversation")):
        for turn in turns if isinstance(turns, list | tuple) else ():
            content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
            for part in content if isinstance(content, list | tuple) else ():
                if isinstance(part, Mapping) and part.get("type") in ("video", "video_url"):
                    return True
    return False


def _given(row: Mapping[str, Any], spec: Spec, *, url: bool = True) -> _Images:
    named = row.get(spec.column("image"))
    keyed = [
        str(key)
        for key, value in (named.items() if isinstance(named, Mapping) else ())
        if re.fullmatch("<[^<>]+>", str(key)) and not is_empty(value)
    ]
    videos = _Videos(row_videos(row, spec), allowed="video" in spec.columns)
    return _Images(numbered_images(row, spec, url=url), keyed=keyed, videos=videos)


class _Videos:
    """The videos of a row, handed out to placeholders in the order in which they come up."""

    def __init__(self, videos: Sequence[RowVideo] = (), *, allowed: bool = False) -> None:
        self.column, self.allowed = list(videos), allowed
        self.placed: list[RowVideo | None] = []
        """By placeholder: the video, or None for the next one of `column`."""

    def place(self, video: RowVideo | None = None) -> str:
        """Places a video that its part of the content brings along, or the next of the column."""
        self.placed.append(video)
        return VIDEO_MARK

    def resolve(self) -> list[RowVideo]:
        """Lists the video of each placeholder.

        Raises:
          SampleError: `video_without_placeholder`, `placeholder_without_video`.
        """
        wanted = sum(each is None for each in self.placed)
        if wanted != len(self.column):
            raise mismatch(len(self.column), wanted, kind="video")
        column = iter(self.column)
        return [next(column) if each is None else each for each in self.placed]


class _Images:
    """The images of a row, handed out to placeholders in the order in which they come up."""

    def __init__(
        self, images: Mapping[int, Any], *, keyed: Sequence[str] = (), videos: _Videos
    ) -> None:
        self.column, self.videos = list(images.values()), videos
        self._of_number = {number: i for i, number in enumerate(images)}
        """Place in `column` of the image of each number."""
        self._keyed = {name: i for i, name in enumerate(keyed)}
        """Number of the image by its placeholder, where the row has such a mapping."""
        named = [_PLACEHOLDER, *([_VIDEO_PLACEHOLDER] if videos.allowed else [])]
        self._pattern = re.compile("|".join([*map(re.escape, keyed), *named]))
        self.placed: list[Any] = []
        """By placeholder: the image, or a number that says which of `column`."""
        self.num_unnumbered = 0
        self.numbers: set[int] = set()

    def inline(self, image: Any) -> str:
        """Places an image that its part of the content brings along."""
        self.placed.append(image)
        return MARK

    def marked(self, text: str) -> str:
        """Replaces the placeholders of a text."""
        return self._pattern.sub(self._place, text)

    def bare(self, index: int | None = None) -> str:
        """Places the next image of the column, or the one of a number from 0."""
        if index is not None:
            self.placed.append(_Number(self._of_number.get(index, -1)))
            return MARK
        self.placed.append(_Number(self.num_unnumbered))
        self.num_unnumbered += 1
        return MARK

    def _place(self, match: re.Match[str]) -> str:
        if match[0] in self._keyed:
            self.placed.append(_Number(self._keyed[match[0]]))
            return MARK
        if match.groupdict().get("video"):
            return self.videos.place()
        if match["name"] is not None:
            return self.inline(match["name"].strip())
        if match["number"] is None:
            return self.bare()
        self.numbers.add(int(match["number"]))
        self.placed.append(_Number(int(match["number"]), numbered=True))
        return MARK

    def resolve(self) -> list[Any]:
        """Lists the image of each placeholder.

        Raises:
          SampleError: `image_without_placeholder`, `placeholder_without_image`.
        """
        base = 0 if 0 in self.numbers or not self.numbers else 1
        used: set[int] = set()
        resolved: list[Any] = []
        for each in self.placed:
            if isinstance(each, _Number):
                number = each.number
                if each.numbered:
                    number = self._of_number.get(number - base, -1)
                used.add(number)
                if not 0 <= number < len(self.column):
                    raise self._mismatch()
                resolved.append(self.column[number])
            else:
                resolved.append(each)
        if used != set(range(len(self.column))) or (self.numbers and self.num_unnumbered):
            raise self._mismatch()
        return resolved

    def are_videos(self) -> bool:
        """Tells whether the placeholders of images are those of videos, as LLaVA writes them."""
        bare = all(isinstance(each, _Number) and not each.numbered for each in self.placed)
        return bool(
            self.placed and bare and self.videos.column and not (self.column or self.videos.placed)
        )

    def _mismatch(self) -> SampleError:
        placed = sum(isinstance(each, _Number) for each in self.placed)
        return mismatch(len(self.column), placed)


_MISMATCHES = {
    ("image", True): "image_without_placeholder",
    ("image", False): "placeholder_without_image",
    ("video", True): "video_without_placeholder",
    ("video", False): "placeholder_without_video",
}


def mismatch(number: int, placeholders: int, *, kind: str = "image") -> SampleError:
    """Makes the error of a row that has another number of placeholders than of images or videos."""
    # Equally many, and still no match: a number in a placeholder is of no image.
    more = number > placeholders
    return SampleError(
        _MISMATCHES[kind, more], facts={f"{kind}s": number, "placeholders": placeholders}
    )


@dataclass(frozen=True, slots=True)
class _Number:
    number: int
    numbered: bool = False


def _turn(entry: Any, images: _Images) -> _Turn:
    if not isinstance(entry, Mapping):
        raise SampleError("conversation.entry", got=type(entry).__name__)
    role = str(entry.get("role") or entry.get("from") or "").strip().lower()
    side = next(
        (
            name
            for name, roles in (("user", _USER), ("assistant", _ASSISTANT), ("system", _SYSTEM))
            if role in roles
        ),
        None,
    )
    if side is None:
        raise SampleError("conversation.role", role=role[:40], fields=sorted(map(str, entry)))
    values = (entry.get(name) for name in ("content", "value", "text"))  # InternVL has a text
    content = next((value for value in values if value is not None), None)
    if side == "user" and isinstance(content, str) and _PARTS.match(content):
        raise SampleError("conversation.part", got="a text of JSON")
    parts = _with_numbers(content if isinstance(content, list | tuple) else [content])
    thoughts: list[Any] = []
    if side == "assistant":
        thoughts = [part for part in parts if _is_thought(part)]
        parts = [part for part in parts if not _is_thought(part)]
    text = "".join(_part(part, images, role=role) for part in parts)
    calls = entry.get("tool_calls") or list(filter(None, [entry.get("function_call")]))
    content = text
    if calls:
        text = "\n".join(filter(None, [text, *(_call(call) for call in calls)]))
    elif not text and side == "assistant" and isinstance(entry.get("refusal"), str):
        text = content = entry["refusal"]  # OpenAI's, beside an empty content
    if side != "user" and (MARK in text or (images.videos.allowed and VIDEO_MARK in text)):
        raise SampleError("image_placeholder.side", side=side)
    chat: dict[str, Any] = {"role": side, "content": content}
    if calls:
        chat["tool_calls"] = _calls(calls)
    elif role == "function_call" and (read := _spoken_call(text)):
        chat = {"role": side, "content": "", "tool_calls": _calls(read)}
    if role in _TOOL:
        named = {k: str(entry[k]) for k in ("name", "tool_call_id") if entry.get(k)}
        chat = {"role": "tool", "content": content, **named}
        name = entry.get("name")
        text = f"{role} {name}: {text}" if isinstance(name, str) and name else f"{role}: {text}"
    if side != "assistant":
        return _Turn(side, text, chat=(chat,))
    thought = _reasoning(entry, thoughts)
    return _Turn(side, text, weight=_weight(entry), reasoning=thought, chat=(chat,))


_PARTS = re.compile(
    r"\s*\[\s*\{\s*\"type\"\s*:\s*\"(?:input_)?(?:text|image|image_url|video)\"\s*[,}]"
)
"""How a list of parts begins that was written as a text."""

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

_INDEX = "index"


def _with_numbers(parts: Sequence[Any]) -> list[Any]:
    """Keeps `index` where it is the number of an image from 0, as llava-instruct-mix has it.

    Where texts are numbered as well, it counts the parts.
    """
    given = [part for part in parts if isinstance(part, Mapping) and part.get(_INDEX) is not None]
    if all(part.get("type") == "image" and _is_number(part[_INDEX]) for part in given):
        return [{**p, _INDEX: int(p[_INDEX])} if p in given else p for p in parts]
    return [
        {name: p[name] for name in p if name != _INDEX} if isinstance(p, Mapping) else p
        for p in parts
    ]


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return whole and value >= 0 and value == int(value)


def _part(part: Any, images: _Images, *, role: str) -> str:
    if part is None:
        return ""
    if isinstance(part, str):
        # A system prompt may speak of a placeholder; images are the user's.
        return images.marked(part) if role in _USER else part
    if not isinstance(part, Mapping):
        raise SampleError("conversation.part", got=type(part).__name__)
    kind = part.get("type")
    named = named_media(part) if kind is None else []
    if named and (len(named) > 1 or part.get("text")):
        raise SampleError("conversation.several", fields=sorted(map(str, part)))
    if kind in _TEXT_PARTS or (not named and kind is None and isinstance(part.get("text"), str)):
        values = (part.get(name) for name in ("text", "refusal", "value"))
        return _part(next(filter(None, values), ""), images, role=role)
    if kind == "input_image" and part_media(part, "image") is None:
        raise SampleError("conversation.file", fields=sorted(map(str, part)))
    if kind in ("image", "image_url", "input_image"):
        found = part_media(part, "image")
        return images.bare(part.get(_INDEX)) if found is None else images.inline(found)
    if kind in ("video", "video_url") and images.videos.allowed:
        return images.videos.place(part_video(part))
    if kind in ("video", "video_url"):
        raise SampleError("row_media", name=f"a part of type {kind}", fields=sorted(map(str, part)))
    raise SampleError("conversation.part", got=str(kind)[:40])


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if isinstance(function, Mapping):
        given = function.get("arguments") or ""
        if not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False, default=str)
        return f"{function.get('name', '')}({given})"
    return str(function)


def _weight(entry: Mapping[str, Any]) -> float:
    """Gives the factor on the loss of an answer.

    Raises:
      SampleError: `conversation.weight`: a text such as "false", or no number of 0 or more.
    """
    weight = 1.0
    for name in ("train", "loss", "weight"):
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not 0 <= value < math.inf:
            raise SampleError("conversation.weight", name=name, got=repr(value)[:40])
        weight *= value if name == "weight" else float(bool(value))
    return weight


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Where an answer keeps its reasoning: the names that transformers knows, in its order."""


def _is_thought(part: Any) -> bool:
    """Tells a part of the content that is a thought, as Anthropic's {type, thinking}."""
    return isinstance(part, Mapping) and part.get("type") in _REASONING


def _reasoning(entry: Mapping[str, Any], thoughts: Sequence[Mapping[str, Any]]) -> str | None:
    given = [entry.get(name) for name in _REASONING]
    if thoughts:
        told = [part.get(part["type"], part.get("text")) for part in thoughts]
        given.append("\n".join(told) if all(isinstance(t, str) for t in told) else told)
    found = next((each for each in given if each is not None), None)
    if not isinstance(found, str | None):
        raise SampleError("conversation.part", got=type(found).__name__)
    return found


def _alternating(turns: Sequence[_Turn]) -> list[_Turn]:
    """Gives user and assistant turns in turn; neighbours on the user's side are joined.

    Raises:
      SampleError: `conversation`, `assistant_first`, `empty_answer`.
    """
    spoken = [turn for turn in turns if turn.side != "system"]
    while spoken and (spoken[-1].side == "user" or not spoken[-1].weight):
        if spoken[-1].side == "user" and spoken[-1] is turns[-1]:
            raise SampleError("conversation.end", turns=len(turns))
        spoken.pop()  # what follows the last text to learn changes nothing
    if not spoken:
        raise SampleError("conversation.nothing", turns=len(turns))
    if spoken[0].side == "assistant":
        raise SampleError("assistant_first", roles=" ".join(turn.side for turn in turns[:8]))
    start, stop = (next(i for i, t in enumerate(turns) if t is spoken[end]) for end in (0, -1))
    if any(turn.side == "system" and turn.text.strip() for turn in turns[start:stop]):
        raise SampleError("conversation.system", roles=" ".join(turn.side for turn in turns[:8]))
    found: list[_Turn] = []
    for turn in spoken:
        if turn.side == "user" and len(found) % 2:
            text = "\n".join(filter(None, [found[-1].text, turn.text]))
            found[-1] = _Turn("user", text, chat=found[-1].chat + turn.chat)
        elif turn.side == "assistant" and not len(found) % 2:
            raise SampleError("conversation.order", roles=" ".join(t.side for t in spoken[:8]))
        else:
            found.append(turn)
    empty = [turn for turn in found[1::2] if not turn.text.strip()]
    if empty:
        raise SampleError("empty_answer.turn", empty=len(empty))
    return found


def _placed(
    texts: Sequence[str], given: _Images, spec: Spec
) -> tuple[list[str], list[Any], list[RowVideo]]:
    """Checks the placeholders, and drops them where they only say that images come first.

    Returns:
      The texts, and the images and the videos in the order of their placeholders.
    """
    texts, images, videos = _marked(texts, given, spec)
    if not (given.placed or given.videos.placed):
        if not texts[0].strip():
            texts[0] = MARK * len(images) + VIDEO_MARK * len(videos)
        return texts, images, videos
    # The others are of turns that were left out at the end.
    images = images[: sum(text.count(MARK) for text in texts)]
    if given.videos.allowed:
        videos = videos[: sum(text.count(VIDEO_MARK) for text in texts)]
    body = texts[0]
    for mark in [MARK] * len(images) + [VIDEO_MARK] * len(videos):
        body = body.lstrip()
        if not body.startswith(mark):
            return texts, images, videos
        body = body.removeprefix(mark)
    if not body.strip():  # the images are the question
        return texts, images, videos
    return [body.lstrip(), *texts[1:]], images, videos


def _marked(
    texts: Sequence[str], given: _Images, spec: Spec
) -> tuple[list[str], list[Any], list[RowVideo]]:
    """Finds the image or video of each placeholder; where one kind has none, it comes first.

    Returns:
      The texts, without any placeholders where neither kind has one, the images and the videos.

    Raises:
      SampleError: `image_without_placeholder`, `placeholder_without_image`,
        `video_without_placeholder`, `placeholder_without_video`.
    """
    texts = list(texts)
    if given.are_videos():
        texts = [text.replace(MARK, VIDEO_MARK) for text in texts]
        given.videos.placed, given.placed = [None] * len(given.placed), []
    images, videos = given.column, given.videos.column
    if given.placed:
        images = given.resolve()
    if given.videos.placed:
        videos = given.videos.resolve()
    if not (given.placed and given.videos.placed):
        _require_placeholders(given, spec)
    if given.placed and not given.videos.placed:
        texts[0] = VIDEO_MARK * len(videos) + texts[0]
    elif given.videos.placed and not given.placed:
        texts[0] = MARK * len(images) + texts[0]
    return texts, images, videos


def _require_placeholders(given: _Images, spec: Spec) -> None:
    """Refuses images and videos that no text places, where the spec says so."""
    if spec.missing_placeholder != "refuse":
        return
    if given.column and not given.placed:
        raise mismatch(len(given.column), 0)
    if given.videos.column and not given.videos.placed:
        raise mismatch(len(given.videos.column), 0, kind="video")
