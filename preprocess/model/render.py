"""ChatModel: renders a conversation as a model's processor does, and finds what is learned in it.

The whole conversation is rendered by transformers' own template engine, and tokenized as a whole.
What is learned of it:

1. Templates with `{% generation %}` marks say it themselves: one marked part for each answer.
2. For others, each answer is replaced by a sentinel and the conversation is rendered again: what is
   equal in front of it and after it is markup; a thought in front of an answer is the template's
   to place. The learned part begins where the conversation up to
   there ends when it is rendered with the generation prompt, and it ends with the token that ends
   the turn.

Both are proven for each conversation: a part that does not contain its answer, or markup that
depends on the answer, is refused (`loss_span`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from preprocess.model.processor import black, open_processor, run
from preprocess.text import ANSWER, FIXED_DATE, IMAGE_PLACEHOLDER
from shardspec.errors import SampleError
from shardspec.families import (
    Gemma3,
    PaliGemma,
    Qwen2VL,
    Size,
    StoredModel,
    VideoSide,
    plan_pictures,
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_IMAGES = re.compile(r"<\|(?P<kind>image)\|>")
_MEDIA = re.compile(r"<\|(?P<kind>image|video)\|>")
"""Placeholders of texts."""

_TOOL = re.compile(r"\btool")
"""What every template with tools has in its source."""

_THOUGHT = re.compile(r"\s*<(?P<tag>think|thinking|thought)>(?P<thought>.*)</(?P=tag)>\s*", re.S)

Message = Mapping[str, Any]

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedConversation:
    """A conversation as ids, with one id for each picture."""

    ids: np.ndarray
    """int32 [T]."""
    learned: np.ndarray
    """bool [T]: which of them have loss as targets."""


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """The text side of a model, as a value: it can be sent to worker processes."""

    name: str
    stored: StoredModel
    template: str
    """Source of the chat template."""
    tokenizer_json: str
    added_tokens: tuple[str, ...]
    """Every added token of the tokenizer: what may end a turn."""
    special_tokens: Mapping[str, Any]
    """Variables of the template, such as `bos_token`."""
    content: Literal["parts", "text"] = "parts"
    """How the template takes a message: as a list of typed parts, or as one text."""
    date: str = ""
    """Day that the template writes, YYYY-MM-DD."""
    config: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    """The documents config.json and preprocessor_config.json, where the model's own processor
    writes the tokens of pictures."""

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _processor(self) -> Any:
        return open_processor(self.name, self.config, self.images)

    @property
    def video(self) -> VideoSide | None:
        """What the model makes of videos; None where the dataset has none."""
        family = self.stored.family
        return family.video if isinstance(family, Qwen2VL) else None

    @cached_property
    def _marker_id(self) -> int:
        found: int | None = self._backend.token_to_id(self.stored.family.image_token)
        return -1 if found is None else found

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        tokens = sorted(filter(str.strip, self.added_tokens), key=len, reverse=True)
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, tokens)) + ")")

    @cached_property
    def _options(self) -> tuple[str, dict[str, Any]]:
        """The template with a fixed day, and the variables that it needs."""
        if "strftime_now" not in self.template:
            return self.template, {}
        day = datetime.fromisoformat(self.date)
        formats = re.findall(r"""strftime_now\(\s*(['"])(.*?)\1""", self.template)
        dates = {text: day.strftime(text) for _, text in formats}
        return FIXED_DATE + self.template, {"chat_dates": dates}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_backend", "_processor", "_marker_id", "_ends", "_options")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def describe(self) -> dict[str, Any]:
        """Lists what the bytes of a dataset follow from, in plain JSON types, for its recipe."""
        return {
            **self.stored.to_dict(),
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest(),
            "content": self.content,
            "special_tokens": dict(self.special_tokens),
            "loss": "marks" if self.marks_generation else "prefixes",
        }

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself what is generated."""
        return _GENERATION.search(self.template) is not None

    def message(
        self,
        role: str,
        text: str,
        *,
        images: int = 0,
        videos: int | None = None,
        reasoning: str = "",
    ) -> Message:
        """Makes a message of the template.

        Args:
          role: Of the chat.
          text: With <|image|> where a picture is, <|video|> where a video is.
          images: Pictures in front of all text.
          videos: Videos after them; None: the sample has none, and <|video|> is a text.
          reasoning: What templates know as `reasoning_content`.
        """
        thought = {"reasoning_content": reasoning} if reasoning else {}
        leading = ("image",) * images + ("video",) * (videos or 0)
        pattern = _IMAGES if videos is None else _MEDIA
        if self.content == "text":
            marker = self.stored.family.tokens.marker
            content = f"{marker}\n" * images + text.replace(IMAGE_PLACEHOLDER, marker)
            return {"role": role, "content": content, **thought}
        parts: list[dict[str, str]] = [{"type": kind} for kind in leading]
        # Texts, with what is between two of them: "image" or "video".
        pieces = pattern.split(text)
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append({"type": piece})
            elif piece or not (leading or len(pieces) > 1):
                parts.append({"type": "text", "text": piece})
        return {"role": role, "content": parts, **thought}

    def render(
        self, messages: Sequence[Message], *, generation: bool = False, tools: Tools = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation.

        Args:
          messages: Made by `message`.
          generation: Whether the prompt of a further answer follows.
          tools: Definitions of what may be called.

        Returns:
          The text, and the parts of it that the template marks as generated.

        Raises:
          SampleError: `chat_render`, the template refuses it.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        template, variables = self._options
        chats: Any = [list(messages)]
        try:
            # Declared as a text; it is (texts, generated parts).
            found: Any = render_jinja_template(
                conversations=chats,
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=self.marks_generation,
                **self.special_tokens,
                **variables,
            )
        # A template's own arithmetic raises what Python does: an index, a missing attribute.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = " ".join(str(message["role"]) for message in messages)
            raise SampleError("chat_render", roles=roles, error=error) from error
        texts, spans = found
        marked = spans[0] if spans else ()
        return str(texts[0]), [(int(a), int(b)) for a, b in marked]

    def tokenize(
        self,
        messages: Sequence[Message],
        *,
        sizes: Sequence[Size],
        videos: Sequence[Sequence[float]] = (),
        tools: Tools = (),
    ) -> TokenizedConversation:
        """Turns a conversation into ids.

        Args:
          messages: Made by `message`; answers have the role "assistant", and `tool_calls`.
          sizes: (height, width) of its pictures, upright.
          videos: When the frames of each video are shown, in seconds.
          tools: Definitions of what may be called.

        Raises:
          SampleError: `chat_render`, `chat_tools`, `loss_span`, `reasoning`, `picture_processor`;
            `image_placeholder`, the template does not write each picture once.
        """
        results = [message for message in messages if message["role"] == "tool"]
        calls = any("tool_calls" in message for message in messages)
        if (tools or results or calls) and not _TOOL.search(self.template):
            raise SampleError("chat_tools", problem="it has no tools")
        text, marked = self.render(messages, tools=tools)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marks_generation:
            spans = self._marked(text, marked, [messages[i] for i in answers])
        else:
            spans = [self._span(text, messages, i, tools) for i in answers]
        _require_tools(text, spans, [messages[i] for i in answers], results, tools)
        if answers:
            _require_thought(messages[answers[-1]], text[slice(*spans[-1])])
        bos = str(self.special_tokens.get("bos_token") or "")
        # As processors do: no second BOS where the template has written one.
        adds = not (bos and text.startswith(bos))
        if self.stored.inline:
            ids, offsets, spans = self._processed(text, spans, sizes, adds=adds)
            pictures = ids == self._marker_id
        else:
            text, spans = self.expanded(text, spans, sizes, videos)
            ids, offsets = self._encoded(text, spans, adds=adds)
            pictures = self._media(ids, messages, sizes, videos)
            ids[pictures] = self.stored.placeholder
        learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            learned |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        if (learned & pictures).any():
            raise SampleError("loss_span", problem="a picture is part of an answer")
        return TokenizedConversation(ids=ids, learned=learned)

    def _media(
        self,
        ids: np.ndarray,
        messages: Sequence[Message],
        sizes: Sequence[Size],
        videos: Sequence[Sequence[float]],
    ) -> np.ndarray:
        """Finds the markers of pictures and videos, which are in the order of the messages.

        Returns:
          bool [T].
        """
        is_picture: np.ndarray = ids == self._marker_id
        plans = plan_pictures(self.stored.family, sizes)
        wanted_ids = sum(plan.num_blocks for plan in plans)
        _require_each(wanted_ids, int(np.count_nonzero(is_picture)))
        if not videos or self.video is None:
            return is_picture
        is_video: np.ndarray = ids == self.stored.video_id
        contents = [m["content"] for m in messages if not isinstance(m["content"], str)]
        kinds = [part["type"] for content in contents for part in content]
        wanted, v = [], 0
        for kind in kinds:
            if kind == "image":
                wanted.append(False)
            elif kind == "video":
                wanted += [True] * (self._num_times(videos[v]) if self.video.times == "text" else 1)
                v += 1
        found = is_video[is_picture | is_video].tolist()
        if found != wanted or v != len(videos):
            raise SampleError(
                "image_placeholder.rendered", images=len(wanted), placeholders=len(found)
            )
        media: np.ndarray = is_picture | is_video
        return media

    def _num_times(self, times_s: Sequence[float]) -> int:
        family = self.stored.family
        assert isinstance(family, Qwen2VL)
        return -(-len(times_s) // family.temporal_patch)

    def _written(self, times_s: Sequence[float]) -> str:
        """Gives what the model's processor writes for the marker of a video with timestamps."""
        assert self.video is not None
        count = self._num_times(times_s)
        each = -(-len(times_s) // count)
        # The last frame fills the last patch; a patch is shown at the middle of its frames.
        times = [*times_s, *[times_s[-1]] * (count * each - len(times_s))]
        middles = [(times[i] + times[i + each - 1]) / 2 for i in range(0, len(times), each)]
        before, after = self.video.around
        return "".join(f"<{t:.1f} seconds>{before}{self.video.token}{after}" for t in middles)

    def _encoded(
        self, text: str, spans: Sequence[tuple[int, int]], *, adds: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gives int32 [T] ids, and int64 [T, 2] where they are in the text."""
        cuts = [0, len(text)]
        if isinstance(self.stored.family, PaliGemma):
            # Its processor takes an answer as a text of its own, and adds no tokens.
            cuts, adds = sorted({*cuts, *(start for start, _ in spans)}), False
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in pairwise(cuts):
            encoding = self._backend.encode(text[start:stop], add_special_tokens=adds)
            ids += encoding.ids
            offsets += [(start + a, start + b) for a, b in encoding.offsets]
        return np.array(ids, dtype="<i4"), np.array(offsets, np.int64).reshape(-1, 2)

    def _processed(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        sizes: Sequence[Size],
        *,
        adds: bool,
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Tokenizes as the model's processor does, with the tokens that it writes for pictures.

        Returns:
          int32 [T] ids; int64 [T, 2] where they are in the text; the parts of it, moved along.
        """
        _require_each(len(sizes), text.count(self.stored.family.tokens.marker))
        try:
            found = run(self._processor, text, [black(size) for size in sizes], special=adds)
        except (ValueError, ZeroDivisionError) as error:
            problem = str(error).strip().partition("\n")[0]
            raise SampleError("picture_processor", problem=problem) from error
        replaced = (found.get("text_replacement_offsets") or [[]])[0]
        moves = [(one["span"][1], one["new_span"][1] - one["span"][1]) for one in replaced]

        def moved(at: int) -> int:
            # Each says how far all replacements up to it move the text.
            return at + next((by for end, by in reversed(moves) if end <= at), 0)

        return (
            np.array(found["input_ids"][0], dtype="<i4"),
            np.array(found["offset_mapping"][0], np.int64).reshape(-1, 2),
            [(moved(start), moved(stop)) for start, stop in spans],
        )

    def expanded(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        sizes: Sequence[Size] = (),
        videos: Sequence[Sequence[float]] = (),
    ) -> tuple[str, list[tuple[int, int]]]:
        """Writes what the model's processor writes for the marker of each picture and video.

        Line breaks around a picture may be joined with those of the text, so this comes before the
        text is tokenized.

        Args:
          text: As the template renders it.
          spans: Parts of it, (start, stop); they move along.
          sizes, videos: As of `tokenize`.

        Raises:
          SampleError: `image_placeholder`, another number of them is written.
        """
        family, own = self.stored.family.tokens, self.stored.family
        marker, written = family.marker, [family.written] * text.count(family.marker)
        if isinstance(own, Gemma3) and own.pan_and_scan and sizes:
            _require_each(len(sizes), len(written))
            written = [own.written(own.plan(size).num_units - 1) for size in sizes]
        if videos and self.video is not None and self.video.times == "text":
            assert family.written == family.marker
            marker, written = self.video.token, [*map(self._written, videos)]
            _require_each(len(videos), text.count(marker))
        if not written or written[0] == marker:
            return text, list(spans)
        pieces = text.split(marker)
        places = [found.start() for found in re.finditer(re.escape(marker), text)]
        longer = [len(each) - len(marker) for each in written]

        def moved(at: int) -> int:
            before = zip(places, longer, strict=True)
            return at + sum(by for place, by in before if place < at)

        expanded = "".join(p + w for p, w in zip(pieces, [*written, ""], strict=True))
        return expanded, [(moved(start), moved(stop)) for start, stop in spans]

    def _marked(
        self, text: str, spans: list[tuple[int, int]], answers: Sequence[Message]
    ) -> list[tuple[int, int]]:
        texts = [_split(_text_of(message))[1].strip() for message in answers]
        if len(spans) != len(answers):
            problem = f"{len(answers)} answers, {len(spans)} marked as generated"
            raise SampleError("loss_span", problem=problem)
        for (start, stop), answer in zip(spans, texts, strict=True):
            if answer not in text[start:stop]:
                raise SampleError("loss_span", problem="an answer is not in its marked part")
        return spans

    def _span(
        self, text: str, messages: Sequence[Message], i: int, tools: Tools
    ) -> tuple[int, int]:
        """Finds what is learned of answer i, its end of turn included."""
        thought, answer = _split(_text_of(messages[i]))
        beside = messages[i].get("reasoning_content", "")
        probe = self.message("assistant", thought + ANSWER, reasoning=beside)
        replaced = [*messages[:i], probe, *messages[i + 1 :]]
        head, found, tail = self.render(replaced, tools=tools)[0].partition(ANSWER)
        if not found or ANSWER in tail:
            raise SampleError("loss_span", problem="an answer is left out, or written twice")
        own = text[len(head) : len(text) - len(tail)]
        # Calls follow the text of an answer; `_require_tools` looks at them.
        is_own = own.strip() == answer.strip()
        is_own |= "tool_calls" in messages[i] and own.lstrip().startswith(answer.strip())
        same = text.startswith(head) and text.endswith(tail) and is_own
        if not same or len(head) + len(tail) > len(text):
            problem = "the markup around an answer depends on its text"
            raise SampleError("loss_span", problem=problem)
        before = self.render(messages[:i], generation=True, tools=tools)[0]
        if not head.startswith(before):
            problem = "the conversation does not begin with what is in front of an answer"
            raise SampleError("loss_span", problem=problem)
        end = self._ends.match(tail)
        if end is None:
            raise SampleError("loss_span", problem="no token ends an answer")
        return len(before), len(text) - len(tail) + end.end()


def _require_each(images: int, written: int) -> None:
    if written != images:
        raise SampleError("image_placeholder.rendered", images=images, placeholders=written)


def _split(answer: str) -> tuple[str, str]:
    """Splits an answer into the thought in front of it, if there is one, and the rest."""
    found = _THOUGHT.match(answer)
    return (found.group(), answer[found.end() :]) if found else ("", answer)


def _require_tools(
    text: str,
    spans: Sequence[tuple[int, int]],
    answers: Sequence[Message],
    results: Sequence[Message],
    tools: Tools,
) -> None:
    """Refuses a template that leaves out what a conversation has of tools, or teaches results."""
    rest, done = [], 0
    for start, stop in spans:
        rest.append(text[done:start])
        done = stop
    context = "\n".join((*rest, text[done:]))
    for tool in tools:
        if str(tool.get("function", tool).get("name", "")) not in context:
            raise SampleError("chat_tools", problem="it does not write their definitions")
    for message in results:
        told = _text_of(message).strip()
        if told not in context and json.dumps(told)[1:-1] not in context:
            raise SampleError("chat_tools", problem="it does not write a result, or it is learned")
    for (start, stop), message in zip(spans, answers, strict=True):
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            wanted = (name, *(arguments if isinstance(arguments, Mapping) else ()))
            if not all(each in text[start:stop] for each in wanted):
                raise SampleError("chat_tools", problem="it does not write a call")


def _require_thought(message: Message, learned: str) -> None:
    """Refuses a template that leaves the thought of the last answer out."""
    beside = str(message.get("reasoning_content", "")).strip()
    found = _THOUGHT.match(_text_of(message))
    for thought in filter(None, (beside, found.group("thought").strip() if found else "")):
        if thought not in learned:
            raise SampleError("reasoning.dropped", chars=len(thought))


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
