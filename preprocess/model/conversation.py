"""From formatted messages to the tokens of conversations, and to the rows that store them.

A sample's conversations are alternatives: training draws one of them in each epoch. A message with
several variants is as many conversations; messages with fewer are repeated, so that each message is
drawn equally often. Their tokens are stored once.

A conversation is stored as turns (prompt, response) whose ids, one after the other, are the whole
of it: the responses are what is learned, and the last one may be empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from preprocess.model.render import ChatModel, Message, TokenizedConversation
from preprocess.text import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Branch, TokenizedText
from shardspec.errors import SampleError
from shardspec.families import Size


class Turn(NamedTuple):
    """One exchange, without markup."""

    user: str
    answer: str
    reasoning: str = ""
    """What the assistant thought, where a row has it beside the answer."""
    asked: str = ""
    """JSON of the messages in front of the answer, in place of `user`: tool results among them."""
    calls: str = ""
    """JSON of the tool calls after the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One conversation."""

    turns: tuple[Turn, ...]
    system: str = ""
    tools: str = ""
    """JSON of the definitions of tools."""
    weight: int
    """In millionths."""


def conversations(
    branches: Sequence[Branch],
    systems: Sequence[str],
    chats: Sequence[Mapping[str, Any] | None] | None = None,
) -> list[Turns]:
    """Lists the conversations of a sample.

    Args:
      branches: Formatted messages, whose variants have no markup.
      systems: The system text of each; "" for none.
      chats: Those with tools as chat templates take them, None for others; they win.

    Raises:
      SampleError: `loss_span`, an answer has a weight of its own; `chat_tools`; `unanswered`.
    """
    found: list[list[Turns]] = []
    chats = [None] * len(branches) if chats is None else chats
    for branch, system, chat in zip(branches, systems, chats, strict=True):
        if branch.unanswered:
            raise SampleError("unanswered.model")
        if set(branch.shares) - {1.0}:
            problem = "answers with weights of their own, or without loss, are not for models yet"
            raise SampleError("loss_span", problem=problem)
        if chat is not None:
            found.append([_with_tools(branch, chat)])
            continue
        count = math.lcm(*[len(variants) for variants in branch.turns])
        drawn = [
            tuple(
                Turn(own.prompt, own.response, own.reasoning or "")
                for own in (variants[v % len(variants)] for variants in branch.turns)
            )
            for v in range(count)
        ]
        distinct = drawn[:1] if len(set(drawn)) == 1 else drawn
        found.append([Turns(turns=t, system=system, weight=branch.weight) for t in distinct])
    total = math.lcm(*map(len, found))
    return [own for each in found for own in each * (total // len(each))]


def _with_tools(branch: Branch, chat: Mapping[str, Any]) -> Turns:
    """Makes the one conversation of a message with tools.

    Raises:
      SampleError: `chat_tools`.
    """
    tools = chat["tools"]
    if isinstance(tools, str):
        raise SampleError("chat_tools", problem="their definitions are not JSON objects")
    turns = []
    for t, variants in enumerate(branch.turns):
        asked, (answer,) = chat["turns"][2 * t : 2 * t + 2]
        calls = answer.get("tool_calls")
        turn = Turn(
            user="\n".join(each["content"] for each in asked),
            answer=answer["content"],
            reasoning=variants[0].reasoning or "",
            asked=json.dumps(asked) if any(each["role"] == "tool" for each in asked) else "",
            calls=json.dumps(calls) if calls else "",
        )
        turns.append(turn)
    return Turns(
        turns=tuple(turns),
        system=chat["system"],
        tools=json.dumps(tools) if tools else "",
        weight=branch.weight,
    )


def tokenized_conversations(
    model: ChatModel,
    alternatives: Sequence[Turns],
    *,
    sizes: Sequence[Size],
    videos: Sequence[Sequence[float]] = (),
    key: str,
) -> TokenizedText:
    """Tokenizes every conversation of a sample.

    Args:
      model: Whose template and tokenizer.
      alternatives: The conversations.
      sizes: (height, width) of the upright pictures of the sample; each is in every conversation.
      videos: When the frames of its videos are shown, in seconds; likewise.
      key: The sample's, for errors.

    Raises:
      SampleError: `image_placeholder`, `empty_response`, `reasoning`, and as `ChatModel.tokenize`.
    """
    ids: list[np.ndarray] = []
    length = 0
    known: dict[bytes, tuple[int, int]] = {}

    def store(run: np.ndarray) -> tuple[int, int]:
        nonlocal length
        name = run.tobytes()
        if name not in known:
            known[name] = (length, length + len(run))
            ids.append(run)
            length += len(run)
        return known[name]

    rows = []
    memo: dict[tuple[tuple[Turn, ...], str, str], TokenizedConversation] = {}
    for b, each in enumerate(alternatives):
        name = (each.turns, each.system, each.tools)
        try:
            if name not in memo:
                messages = _messages(model, each, images=len(sizes), videos=len(videos))
                tools = json.loads(each.tools or "[]")
                memo[name] = model.tokenize(messages, sizes=sizes, videos=videos, tools=tools)
        except SampleError as error:
            error.where = error.where or key
            raise
        for t, (prompt, response) in enumerate(_runs(memo[name])):
            rows.append((b, t, *store(prompt), *store(response), each.weight))
    tokens = np.concatenate(ids) if ids else np.zeros(0, "<i4")
    return TokenizedText(tokens=tokens.astype("<i4"), rows=tuple(rows), leads=())


def _messages(model: ChatModel, each: Turns, *, images: int, videos: int) -> list[Message]:
    marks = (IMAGE_PLACEHOLDER, *([VIDEO_PLACEHOLDER] if videos else []))
    placed = [sum(turn.user.count(mark) for turn in each.turns) for mark in marks]
    wanted = [images, videos][: len(marks)]
    others = [each.system, *(turn.answer for turn in each.turns)]
    is_placed = any(placed)
    if placed not in ([0] * len(marks), wanted) or any(m in text for text in others for m in marks):
        raise SampleError("image_placeholder.turn", images=sum(wanted), placeholders=placed)
    if not all(turn.answer.strip() or turn.calls for turn in each.turns):
        raise SampleError("empty_response")
    messages = [model.message("system", each.system)] if each.system else []
    for t, turn in enumerate(each.turns):
        first = (images, videos) if t == 0 and not is_placed else (0, 0)
        plain = [{"role": "user", "content": turn.user}]
        for told in json.loads(turn.asked) if turn.asked else plain:
            rest = {k: v for k, v in told.items() if k not in ("role", "content")}
            made = model.message(
                told["role"],
                told["content"],
                images=first[0],
                videos=first[1] if videos else None,
            )
            messages.append({**made, **rest})
            first = (0, 0)
        answer = model.message("assistant", turn.answer, reasoning=turn.reasoning)
        calls = {"tool_calls": json.loads(turn.calls)} if turn.calls else {}
        # Templates ask whether there is a text in front of the calls; a list of parts would be one.
        silent = {} if turn.answer else {"content": ""}
        messages.append({**answer, **silent, **calls})
    return messages


def _runs(conversation: TokenizedConversation) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts a conversation into (not learned, learned) pairs; the last may learn nothing."""
    ids, learned = conversation.ids, conversation.learned
    edges = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0))
    pairs, done = [], 0
    for start, stop in edges.reshape(-1, 2).tolist():
        pairs.append((ids[done:start], ids[start:stop]))
        done = stop
    if done < len(ids):
        pairs.append((ids[done:], ids[:0]))
    return pairs
