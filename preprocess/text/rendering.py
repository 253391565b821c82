"""Whole conversations as a chat template writes them: what the turns of a sample are compared with.

The markup of turns is read off probes (`preprocess.text.chat_template`), and no probe says what a
template does with every text. So each conversation is rendered once more, by transformers, and

1. its turns must be in the rendering, one after the other, with the markup of the frame; a text
   that the template treats otherwise refuses the row (`template_ids`);
2. answers with reasoning are what the template makes of them: it may move a thought, or leave
   those of earlier answers out; one whose last thought it leaves out is refused (`reasoning`);
3. the ids of the turns must be those of the rendering.

Of an exchange with several variants, each is in one of the conversations that are compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preprocess.text.chat_template import TemplateFrame
from preprocess.text.formatter import Branch, Variant
from shardspec.errors import SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A chat template as a value: it can be sent to workers."""

    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template may name besides the messages: the special tokens, fixed dates."""

    @property
    def sha256(self) -> str:
        """Names the template and what it may name."""
        text = json.dumps([self.source, self.variables], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Writes a conversation as `apply_chat_template` does.

        Raises:
          SampleError: `template_ids` (the template refuses it).
        """
        # 0.5 s, without torch; only workers of recipes that use a template take it.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages], chat_template=self.source, **self.variables
            )
            text: str = rendered[0][0]
        # A template's own arithmetic raises what Python does.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise SampleError("template_ids.refused", error=error) from error
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One conversation of a branch as it was rendered."""

    variants: tuple[int, ...]
    """Per exchange, the number of its variant."""
    text: str
    """All of the rendering, with what follows the last answer."""


def render_branch(
    branch: Branch, *, template: ChatTemplate, frame: TemplateFrame
) -> tuple[Branch, list[Conversation]]:
    """Renders a branch with each of its variants.

    Returns:
      The branch with its responses as the template writes them, and the conversations.

    Raises:
      SampleError: `template_ids`, `reasoning`.
    """
    turns = [list(turn) for turn in branch.turns]
    conversations = []
    written: dict[tuple[int, int], str] = {}
    for k in range(max(map(len, turns))):
        numbers = tuple(k % len(turn) for turn in branch.turns)
        chosen = [turn[v] for turn, v in zip(branch.turns, numbers, strict=True)]
        text = template.render(_messages(chosen))
        for t, response in enumerate(_responses(text, chosen, frame)):
            v = numbers[t]
            if written.setdefault((t, v), response) != response:
                raise SampleError("template_ids.text", turn=t + 1, got=response[:80])
            turns[t][v] = replace(chosen[t], response=response)
        conversations.append(Conversation(variants=numbers, text=text))
    return replace(branch, turns=tuple(tuple(turn) for turn in turns)), conversations


def _messages(chosen: Sequence[Variant]) -> list[dict[str, Any]]:
    system = chosen[0].system
    messages = [{"role": "system", "content": system}] if system else []
    for variant in chosen:
        messages.append({"role": "user", "content": variant.user})
        messages.append({"role": "assistant", "content": variant.answer})
        if variant.reasoning is not None:
            messages[-1]["reasoning_content"] = variant.reasoning
    return messages


def _responses(text: str, chosen: Sequence[Variant], frame: TemplateFrame) -> list[str]:
    """Cuts a rendering into its answers, with their markup and without the end of turn."""
    if not text.startswith(frame.bos):
        raise SampleError("template_ids.text", turn=1, got=text[:80])
    rest = text.removeprefix(frame.bos)
    found = []
    for t, variant in enumerate(chosen):
        if not rest.startswith(variant.prompt):
            raise SampleError("template_ids.text", turn=t + 1, got=rest[:80])
        response, end, rest = rest.removeprefix(variant.prompt).partition(frame.end)
        thoughts = reasoning_of(variant)
        if not end or (response != variant.response and not thoughts):
            raise SampleError("template_ids.text", turn=t + 1, got=response[:80])
        found.append(response)
    lost = [thought for thought in thoughts if thought and thought not in found[-1]]
    if lost:
        raise SampleError("reasoning.dropped", chars=len(lost[0]))
    return found


_OPEN = r"<(?:seed:)?think(?:ing)?>|\[THINK\]|◁think▷"
_CLOSE = r"</(?:seed:)?think(?:ing)?>|\[/THINK\]|◁/think▷"

_REASONING = re.compile(f"{_OPEN}|{_CLOSE}")
"""How model families spell the borders of a thought."""


def is_reasoning(marker: str) -> bool:
    """Returns True for the border of a thought.

    >>> is_reasoning("</think>"), is_reasoning("<answer>")
    (True, False)
    """
    return _REASONING.fullmatch(marker.strip()) is not None


def reasoning_of(variant: Variant) -> list[str]:
    """Lists the thoughts of an answer, without the space around them; "" for an empty one."""
    found = [] if variant.reasoning is None else [variant.reasoning.strip()]
    pieces = re.split(_CLOSE, variant.answer)
    if len(pieces) > 1:
        found += [re.split(_OPEN, piece)[-1].strip() for piece in pieces[:-1]]
    elif _REASONING.search(variant.answer):
        found.append(re.split(_OPEN, variant.answer)[-1].strip())
    return found
