"""A tokenizer's own chat template, read once into the markup of every turn.

What a template writes around the texts of a conversation is read off renderings of sentinel texts,
in the process that loads the tokenizer, so that most templates that would fail do so early:

1. Conversations of one to four exchanges are rendered by transformers' `apply_chat_template`. The
   markup of a turn may depend on whether it is the first and whether it is the last one, and on
   whether there is a system text; on nothing else. Longer conversations must be alike.
2. An answer ends in one added token, the *end of turn*. What follows it after the last answer (a
   line break, as a rule) is not part of the sequence: nothing that is learned comes after it.
3. A template that trims texts is trimmed after. Literals of the template that change a text which
   contains them (such as `</think>` in history) are listed, and texts with them are refused.
4. The ids of a whole conversation, put together turn by turn, must equal those of
   `apply_chat_template`.

A template that breaks one of these rules is refused by name (`chat_template`): its ids could not
be those of transformers. What no probe can show is compared conversation by conversation when
samples are made (`preprocess.text.rendering`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, ClassVar, Protocol

from shardspec.errors import ConfigError, SampleError

USER, SYSTEM, ANSWER = "\ufdd0", "\ufdd1", "\ufdd2"
"""Noncharacters, which are in no real text: where a user, a system and an answer text go."""

MOST_EXCHANGES = 4
"""Exchanges of the longest probe: two turns in the middle must look alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trims:
    """What a template strips off the two sides of a text: characters, or None for any white space.

    >>> Trims(left="", right=None)("  a  ")
    '  a'
    """

    left: str | None = ""
    right: str | None = ""

    def __call__(self, text: str) -> str:
        """Strips a text as the template does."""
        # An empty set of characters strips nothing.
        return text.lstrip(self.left).rstrip(self.right)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnMarkup:
    """What a template writes for one exchange."""

    prompt: str
    """Up to the answer, with the slots `USER` and, in conversations with one, `SYSTEM`."""
    answer: str
    """Between the generation prompt and the text of the answer, such as a space; learned."""
    user_trims: Trims = Trims()
    answer_trims: Trims = Trims()
    system_trims: Trims = Trims()


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnMarkups:
    """The markup of the turns of a conversation, by their positions."""

    only: TurnMarkup
    first: TurnMarkup
    middle: TurnMarkup
    last: TurnMarkup

    def at(self, *, first: bool, last: bool) -> TurnMarkup:
        """Gives the markup of a turn."""
        if first:
            return self.only if last else self.first
        return self.last if last else self.middle


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFrame:
    """A chat template as text: what is around the texts of a conversation.

    Renderings are `bos` + exchanges, each `prompt` + `answer` + text + `tail` + `end`.
    """

    folds_system: ClassVar[bool] = False
    """A system text is a turn of its own."""
    bos: str
    """The BOS token that the template writes in front; "" where it writes none."""
    tail: str
    """Text between an answer and the token that ends it, such as a space; learned."""
    end: str
    """The end-of-turn token after an answer."""
    plain: TurnMarkups
    """Of a conversation without a system text."""
    system: TurnMarkups | None
    """Of one with a system text; None where the template takes none."""
    changed: tuple[str, ...] = ()
    """Literals that make the template change a text that contains them."""
    empty_user: bool = True
    """Whether an empty user text is rendered like any other."""

    def frame(
        self, user: str, response: str, *, first: bool, last: bool, system: str = ""
    ) -> tuple[str, str]:
        """Puts the markup around one exchange.

        Args:
          user: The user text.
          response: The answer.
          first, last: Whether the exchange is the first or the last one of its conversation.
          system: The conversation's system text; "" for none.

        Returns:
          The prompt and the response, markup included, without `bos` and `end`.

        Raises:
          SampleError: `system_turn`, `empty_user`.
        """
        if system and self.system is None:
            raise SampleError("system_turn", chars=len(system))
        markups = self.system if system and self.system is not None else self.plain
        markup = markups.at(first=first, last=last)
        user = markup.user_trims(user)
        if not user and not self.empty_user:
            raise SampleError("empty_user.template")
        slots = {USER: user, SYSTEM: markup.system_trims(system)}
        prompt = re.sub(f"[{USER}{SYSTEM}]", lambda found: slots[found[0]], markup.prompt)
        return prompt, markup.answer + markup.answer_trims(response) + self.tail


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is read here."""

    bos_token: str | None
    special_tokens_map: Mapping[str, Any]
    added_tokens_decoder: Mapping[int, Any]

    def get_chat_template(self) -> str:
        """Gives the template of conversations without tools."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Renders a conversation."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Turns a text into ids."""


def is_day(text: str) -> bool:
    """Returns True for a day written as YYYY-MM-DD."""
    try:
        return datetime.fromisoformat(text).date().isoformat() == text
    except ValueError:
        return False


def read_template(loaded: ChatTokenizer, *, where: str, date: str = "") -> TemplateFrame | None:
    """Reads the chat template of a tokenizer.

    Args:
      loaded: The tokenizer.
      where: Its name, for errors.
      date: Day that the template writes, as YYYY-MM-DD; "" refuses templates that write one.

    Returns:
      The markup of its turns, or None for a tokenizer without a template.

    Raises:
      ConfigError: `chat_template` (it cannot be rendered turn by turn), `chat_date`.
    """
    if not getattr(loaded, "chat_template", None):
        return None
    return _Reader(loaded, where=where, date=date).frame()


def template_source(
    loaded: ChatTokenizer, *, where: str, date: str = ""
) -> tuple[str, dict[str, Any]]:
    """Gives a template that `read_template` has accepted, and what it may name besides messages.

    Args:
      loaded: The tokenizer.
      where: Its name, for errors.
      date: Day that the template writes.
    """
    reader = _Reader(loaded, where=where, date=date)
    reader._set_date()
    options = dict(reader.options)
    source = options.pop("chat_template", None) or loaded.get_chat_template()
    return source, {**loaded.special_tokens_map, **options}


def template_literals(loaded: Any, *, data: bool = True) -> tuple[str, ...]:
    """Lists what a tokenizer's chat templates write: their string literals, distinct, in order.

    Args:
      loaded: The tokenizer.
      data: Whether the text outside of statements counts as well.
    """
    source = getattr(loaded, "chat_template", None)
    if not source:
        return ()
    from jinja2 import Environment, TemplateSyntaxError

    sources = list(source.values()) if isinstance(source, Mapping) else [source]
    found: dict[str, None] = {}
    for text in sources:
        try:
            tokens = list(Environment().lex(text))
        except TemplateSyntaxError:
            continue
        for _, kind, value in tokens:
            if kind == "data" and data:
                found[value] = None
            elif kind == "string":
                found[_unescaped(value[1:-1])] = None
    return tuple(found)


def _unescaped(literal: str) -> str:
    # What jinja2's own lexer does with the literals of a template.
    return literal.encode("ascii", "backslashreplace").decode("unicode-escape", "replace")


FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{%- if format in chat_dates -%}{{ chat_dates[format] }}"
    "{%- else -%}{{ raise_exception('unknown date format') }}{%- endif -%}{%- endmacro -%}{{ '' }}"
)
"""Hides the function of that name, which formats the time of now."""


class _Refused(Exception):
    """A rule of the module docstring that the template breaks."""


class _Reader:
    def __init__(self, loaded: ChatTokenizer, *, where: str, date: str) -> None:
        self.loaded, self.where, self.date = loaded, where, date
        self.options: dict[str, Any] = {}

    def frame(self) -> TemplateFrame:
        try:
            self._set_date()
            return self._read()
        except _Refused as error:
            raise ConfigError(
                "chat_template", where=self.where, problem=str(error), cause=error.__cause__
            ) from error

    def _set_date(self) -> None:
        """Fixes the day that the template writes, if it writes one.

        Raises:
          ConfigError: `chat_date.missing`.
        """
        try:
            source = self.loaded.get_chat_template()
        except ValueError as error:
            raise _Refused("there are several, and none is the default") from error
        if "strftime_now" not in source:
            return
        formats = [text for text in template_literals(self.loaded, data=False) if "%" in text]

        def options(day: str) -> dict[str, Any]:
            table = {text: datetime.fromisoformat(day).strftime(text) for text in formats}
            return {"chat_template": FIXED_DATE + source, "chat_dates": table}

        seen: dict[str, set[str]] = {"": set(), SYSTEM: set()}
        for day in ("2001-02-03", "2020-11-14"):
            self.options = options(day)
            for system, texts in seen.items():
                with contextlib.suppress(_Refused):
                    texts.add(self.render(_messages([(USER, ANSWER)], system=system)))
        if not self.date and any(len(texts) > 1 for texts in seen.values()):
            raise ConfigError("chat_date.missing", where=self.where)
        self.options = options(self.date or "2001-02-03")

    def render(self, messages: list[dict[str, str]], *, generation: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.loaded.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **self.options
            )
        # A template's own arithmetic raises what Python does: an index, a missing attribute.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise _Refused(f"it refuses a conversation of {roles}") from error
        return text

    def _read(self) -> TemplateFrame:
        plain, ends = self._markups(system=False)
        system: TurnMarkups | None = None
        try:
            system, system_ends = self._markups(system=True)
        except _Refused:
            pass  # Gemma's, for one: rows with a system text are refused one by one
        else:
            if system_ends != ends:
                raise _Refused("its BOS or end of turn depends on the system text")
        bos, tail, end = ends
        frame = TemplateFrame(bos=bos, tail=tail, end=end, plain=plain, system=system)
        self._check_texts(frame)
        self._check_numbers(frame)
        return replace(
            frame,
            changed=tuple(self._changing(frame)),
            empty_user=self._renders(frame, [("", "a")]) and self._renders(frame, [("", "a")] * 3),
        )

    def _markups(self, *, system: bool) -> tuple[TurnMarkups, tuple[str, str, str]]:
        """Reads the markup off conversations of every length; also (BOS, tail, end of turn)."""
        pieces = [self._pieces(count, system=system) for count in range(1, MOST_EXCHANGES + 1)]
        tail, end = self._end(pieces)
        bos = self._bos(pieces, tail + end)
        found: dict[tuple[bool, bool], TurnMarkup] = {}
        for count, parts in enumerate(pieces, start=1):
            left, right = (
                self._stripped(count, parts, side=side, system=system) for side in ("left", "right")
            )
            for t in range(count):
                before, between = parts[2 * t], parts[2 * t + 1]
                before = before.removeprefix(tail + end if t else bos)
                prompt = before + USER
                generated = self._generation(t, system=system)
                answer = ""
                if generated is not None and between.startswith(generated):
                    prompt, answer = prompt + generated, between[len(generated) :]
                else:
                    prompt += between
                markup = TurnMarkup(
                    prompt=prompt,
                    answer=answer,
                    user_trims=Trims(left=left[f"{USER}{t}"], right=right[f"{USER}{t}"]),
                    answer_trims=Trims(left=left[f"{ANSWER}{t}"], right=right[f"{ANSWER}{t}"]),
                    system_trims=Trims(left=left[SYSTEM], right=right[SYSTEM]),
                )
                at = (t == 0, t == count - 1)
                if found.setdefault(at, markup) != markup:
                    raise _Refused(
                        f"turn {t + 1} of {count} has other markup than one at another number"
                    )
        markups = TurnMarkups(
            only=found[True, True],
            first=found[True, False],
            middle=found[False, False],
            last=found[False, True],
        )
        return markups, (bos, tail, end)

    def _pieces(self, count: int, *, system: bool) -> list[str]:
        """Renders a conversation and cuts it at its user and answer texts."""
        names = [(f"{USER}{t}", f"{ANSWER}{t}") for t in range(count)]
        text = self.render(_messages(names, system=SYSTEM if system else ""))
        if system and text.count(SYSTEM) != 1:
            raise _Refused(f"it writes the system text {text.count(SYSTEM)} times")
        parts: list[str] = []
        for name in (name for pair in names for name in pair):
            head, found, text = text.partition(name)
            if not found:
                raise _Refused("it leaves out a text, or changes their order")
            parts.append(head)
        parts.append(text)
        if any(mark in part for part in parts for mark in (USER, ANSWER)):
            raise _Refused("it writes a text twice")
        return parts

    def _generation(self, t: int, *, system: bool) -> str | None:
        """What is between a user text and the place where a model would answer it."""
        names = [(f"{USER}{i}", f"{ANSWER}{i}") for i in range(t + 1)]
        messages = _messages(names, system=SYSTEM if system else "")[:-1]
        try:
            text = self.render(messages, generation=True)
        except _Refused:
            return None
        _, found, generated = text.partition(f"{USER}{t}")
        return generated if found else None

    def _end(self, pieces: Sequence[Sequence[str]]) -> tuple[str, str]:
        """Finds the token that ends every answer, and the text in front of it."""
        after = [part for parts in pieces for part in parts[2::2]]
        tokens = [token.content for token in self.loaded.added_tokens_decoder.values()]
        found = [
            (after[0].index(token), -len(token), token)
            for token in tokens
            if token.strip() and token in after[0]
        ]
        if found:
            start, _, end = min(found)
            tail = after[0][:start]
            if all(part.startswith(tail + end) for part in after):
                return tail, end
        raise _Refused(f"no added token ends every answer: {sorted(set(after), key=len)[:3]}")

    def _bos(self, pieces: Sequence[Sequence[str]], ending: str) -> str:
        """Finds the BOS token in front, if the template writes one."""
        bos = self.loaded.bos_token or ""
        first, second = pieces[0], pieces[1]
        if not bos or not first[0].startswith(bos):
            return ""
        if ending.endswith(bos):
            # One token begins a text and ends an answer, as OLMo 2's does: the next turn has none.
            return "" if second[2].removeprefix(ending).lstrip().startswith(bos) else bos
        # Once in a conversation: ChatML tokenizers may call <|im_start|>, which opens each of the
        # turns, their BOS.
        return bos if sum(part.count(bos) for part in first) == 1 else ""

    def _stripped(
        self, count: int, parts: Sequence[str], *, side: str, system: bool
    ) -> dict[str, str | None]:
        """Looks which characters the template strips off one side of each text."""
        names = [(f"{USER}{t}", f"{ANSWER}{t}") for t in range(count)]
        marks = [*(name for pair in names for name in pair), *([SYSTEM] if system else ())]
        whole = [
            part for pair in zip(parts, [*marks[: 2 * count], ""], strict=True) for part in pair
        ]
        found: dict[str, str] = {mark: "" for mark in (*marks, SYSTEM)}
        for pad in _PADS:
            padded = {m: pad + m if side == "left" else m + pad for m in (*marks, SYSTEM)}
            text = self.render(
                _messages(
                    [(padded[user], padded[answer]) for user, answer in names],
                    system=padded[SYSTEM] if system else "",
                )
            )
            # Put the pads into what is written without them, one text at a time.
            for mark in marks:
                kept = self._kept(text, "".join(whole), mark, pad, side)
                if not kept:
                    found[mark] += pad
        return {m: None if set(chars) == set(_PADS) else chars for m, chars in found.items()}

    @staticmethod
    def _kept(text: str, whole: str, mark: str, pad: str, side: str) -> bool:
        """Returns True if the pad is beside a mark, besides the space that is there without it."""
        if side == "left":
            got, plain = text.partition(mark)[0], whole.partition(mark)[0]
            return _run(got[::-1], pad) > _run(plain[::-1], pad)
        got, plain = text.partition(mark)[2], whole.partition(mark)[2]
        return _run(got, pad) > _run(plain, pad)

    def _check_texts(self, frame: TemplateFrame) -> None:
        """Refuses templates that change a text otherwise than by the space around it."""
        for text in (
            "a\nb",
            "a\n\nb",
            "a  b",
            "\na\n",
            "  a  ",
            "\t\na \n",
            "<b>&'\"\\ {{ x }}{% y",
            "Ab cD",
            "007",
            "See http://www.example.com/A?b=1#c or A_b@example.com.",
            _LONG,
        ):
            for system in ("", text) if frame.system is not None else ("",):
                if not self._renders(frame, [(text, text)] * 3, system=system):
                    raise _Refused(f"it changes texts such as {text!r}")

    def _check_numbers(self, frame: TemplateFrame) -> None:
        """Refuses templates in which a turn far from both ends has other markup, or none."""
        for number in _NUMBERS:
            pairs = [(f"q{t}", f"a{t}") for t in range(number)]
            for system in ("", "s") if frame.system is not None else ("",):
                if not self._renders(frame, pairs, system=system):
                    raise _Refused(f"a conversation of {number} exchanges has other markup")

    def _changing(self, frame: TemplateFrame) -> Iterator[str]:
        """Finds the literals of the template that change a text which contains them."""
        literals = template_literals(self.loaded, data=False)
        for literal in sorted({*literals, *(literal.strip() for literal in literals)}):
            if literal.strip() and not self._keeps(frame, literal):
                yield literal

    def _keeps(self, frame: TemplateFrame, literal: str) -> bool:
        """Returns True if texts with a literal are written as they are."""
        forms = [f"x{literal}y", f"{literal}y", f"x{literal}"]
        for shift in range(3):
            texts = forms[shift:] + forms[:shift]
            pairs = [(text, texts[(i + 1) % 3]) for i, text in enumerate(texts)]
            for system in ("", texts[0]) if frame.system is not None else ("",):
                if not self._renders(frame, pairs, system=system):
                    return False
        return True

    def _renders(
        self, frame: TemplateFrame, pairs: Sequence[tuple[str, str]], *, system: str = ""
    ) -> bool:
        """Returns True if a conversation is what the frame says, up to its last end of turn."""
        try:
            text = self.render(_messages(pairs, system=system))
            return text.startswith(rendered(frame, pairs, system=system))
        except _Refused:
            return False


_LONG = "".join(f"Word {i}, " for i in range(2000)) + "end"
"""More than templates that cut texts or look at their length leave as it is."""

_NUMBERS = (5, 6, 7, 8, 12, 20, 50)
"""Exchanges of conversations that need not be read, only to be as the others are."""

_PADS = " \n\t\r\u3000"
"""Space of every kind: what strips all of it strips with `str.strip()`."""


def _run(text: str, char: str) -> int:
    """Counts how often a character comes first."""
    return len(text) - len(text.lstrip(char))


def rendered(frame: TemplateFrame, pairs: Sequence[tuple[str, str]], *, system: str = "") -> str:
    """Writes a whole conversation, up to the end of its last answer."""
    parts = [frame.bos]
    for t, (user, answer) in enumerate(pairs):
        parts += frame.frame(user, answer, first=t == 0, last=t == len(pairs) - 1, system=system)
        parts.append(frame.end)
    return "".join(parts)


def _messages(pairs: Sequence[tuple[str, str]], *, system: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in pairs:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
    return messages
