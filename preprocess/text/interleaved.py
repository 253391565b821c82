"""InterleavedTextPreprocessor: from formatted branches to ids and the spans table's TEXT rows.

In Molmo's own formats each text is tokenized on its own, prompt and response apart, as Molmo does
it; so the ids of a response do not depend on the prompt that is drawn before it. In the format
"template" both are tokenized together, as transformers does it, and the ids of whole conversations
are compared with those of their renderings. Equal runs of ids are stored once.

A user text may place the images itself, by the placeholder `<|image|>`, and videos by `<|video|>`:
that takes a single conversation with one placeholder per image and per video. So may a document, a
response without a prompt, whose texts are all learned. Otherwise images precede all text, each
after its lead ("Image 2"), if there are leads, and then the frames of videos.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from preprocess.text.actions import encode_actions
from preprocess.text.formatter import Branch, Variant
from preprocess.text.movable import Encode, find_numbers, list_points
from preprocess.text.rendering import Conversation, render_branch
from preprocess.text.subtitles import SubtitleText
from preprocess.text.tokens import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    EncodedPieces,
    Tokenizer,
)
from shardspec.coordinates import Notation, PointList
from shardspec.errors import SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """The text of one sample as ids."""

    tokens: np.ndarray
    """int32 [T], distinct runs end to end."""
    rows: tuple[tuple[int, int, int, int, int, int, int], ...]
    """TEXT rows without their kind: branch, turn, prompt and response spans, weight."""
    leads: tuple[tuple[int, ...], ...]
    """(start, stop) of the tokens in front of each image, or (). Those of frames have more: (start,
    stop) for the first frame of a video, and its time in milliseconds."""
    subtitles: tuple[tuple[int, int, int, int, int], ...] = ()
    """(video, start, stop, begin and end in milliseconds) of each run of subtitles."""
    points: tuple[PointList, ...] = ()
    """Where the coordinates of responses are, of samples whose points may be moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameLead:
    """What is in front of a frame of a video."""

    time_s: float
    """When it is shown, in seconds from the beginning of the clip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedTextPreprocessor:
    """Tokenizes branches."""

    tokenizer: Tokenizer
    action_tokens: bool = False
    """Whether texts name action tokens (`preprocess.text.actions`)."""
    digits: Sequence[int] = ()
    """The ids that spell numbers, where points may be moved (`preprocess.text.movable`)."""

    def __call__(
        self,
        branches: Sequence[Branch],
        *,
        key: str,
        leads: Sequence[str] = (),
        frames: Sequence[FrameLead | None] = (),
        subtitles: Sequence[Sequence[SubtitleText]] = (),
        movable: Mapping[int, int] | None = None,
    ) -> TokenizedText:
        """Tokenizes every variant of every turn.

        Args:
          branches: Formatted conversations.
          key: The sample's, for errors.
          leads: Texts in front of the images that are not frames, one for each; () for none.
          frames: Where there are videos, what is in front of each image as a frame; None for one
            that is not a frame.
          subtitles: Of each video.
          movable: Where points may be moved, what each image allows then.

        Raises:
          SampleError: `empty_response` (no token to learn from), `image_placeholder`,
            `template_ids`, `reasoning`.
        """
        ids: list[int] = []
        spans: dict[str | tuple[object, ...], tuple[int, int]] = {}
        memo: EncodedPieces = {}
        lists: list[PointList] | None = None if movable is None else []

        def store(name: str | tuple[object, ...], run: Sequence[int]) -> tuple[int, int]:
            start = len(ids)
            ids.extend(run)
            return spans.setdefault(name, (start, len(ids)))

        def span(text: str) -> tuple[int, int]:
            return spans.get(text) or store(text, self._encode(text))

        def movable_response(variant: Variant, encode: Encode) -> tuple[int, int]:
            """Stores a response with coordinates: once, unless those of an equal text differ."""
            nonlocal lists
            run = encode(variant.response)
            name = (variant.tags, *run)
            if name in spans:
                return spans[name]
            start, stop = store(name, run)
            numbers = find_numbers(variant.response, variant.tags, encode, self.digits)
            if lists is not None and numbers is not None:
                lists += list_points(variant.tags, numbers, start=start, geometry=movable or {})
            else:
                lists = None
            return start, stop

        def exchange(variant: Variant, first: bool) -> Sequence[tuple[int, int]]:
            tags = variant.tags if movable is not None else ()
            if self.tokenizer.chat is None or not variant.prompt:  # documents have no turns
                prompt = span(variant.prompt)
                if tags:
                    return prompt, movable_response(variant, self._encode)
                return prompt, span(variant.response)
            encode = partial(self.tokenizer.encode_exchange, variant.prompt, first=first)
            runs = encode(variant.response, memo=memo)
            if tags:
                own = movable_response(variant, partial(_response_ids, encode, runs[0]))
                return spans.get(tuple(runs[0])) or store(tuple(runs[0]), runs[0]), own
            return [spans.get(tuple(run)) or store(tuple(run), run) for run in runs]

        rows = []
        for b, branch in enumerate(branches):
            branch, conversations = self._rendered(branch, key)
            drawn: dict[tuple[int, int], list[int]] = {}
            for t, variants in enumerate(branch.turns):
                for v, variant in enumerate(variants):
                    prompt, response = exchange(variant, t == 0)
                    if branch.unanswered and t == len(branch.turns) - 1:
                        rows.append((b, t, *prompt, 0, 0, branch.turn_weight(t)))
                    elif response[0] == response[1]:
                        raise SampleError("empty_response", where=key)
                    else:
                        rows.append((b, t, *prompt, *response, branch.turn_weight(t)))
                    if conversations:
                        drawn[t, v] = ids[slice(*prompt)] + ids[slice(*response)]
            for conversation in conversations:
                self._check(conversation, drawn, key)
        placed = any(
            IMAGE_PLACEHOLDER in variant.prompt or IMAGE_PLACEHOLDER in variant.response
            for variant in _variants(branches)
        )
        lead_spans: list[tuple[int, ...]]
        if frames:
            names = iter(() if placed else leads)

            def lead(frame: FrameLead | None) -> tuple[int, ...]:
                if frame is None:
                    name = next(names, "")
                    return span(name) if name else (0, 0)
                text = frame_time(frame.time_s)
                return (*span(" " + text), *span(text), round(frame.time_s * 1000))

            lead_spans = [*map(lead, frames)]
        else:
            lead_spans = [] if placed or not any(leads) else [*map(span, leads)]
        said = [
            (video, *span(line.text), line.begin_ms, line.end_ms)
            for video, lines in enumerate(subtitles)
            for line in lines
        ]
        if lists and any(each.points for each in lists):
            digits, _ = spans.get(tuple(self.digits)) or store(tuple(self.digits), self.digits)
            lists = [each._replace(digits=digits) for each in lists]
        if lists is not None and movable is not None:
            named = {each.image for each in lists}
            lists += [
                PointList(image, allowed, int(Notation.NOTHING), 0, ())
                for image, allowed in movable.items()
                if image not in named
            ]
        return TokenizedText(
            points=tuple(lists or ()),
            leads=tuple(lead_spans),
            subtitles=tuple(said),
            rows=tuple(rows),
            tokens=np.array(ids, dtype="<i4"),
        )

    def _rendered(self, branch: Branch, key: str) -> tuple[Branch, list[Conversation]]:
        """Renders the conversations of a branch, where a chat template writes them."""
        frame, template = self.tokenizer.chat, self.tokenizer.template
        if frame is None or template is None:
            return branch, []
        if not any(variant.answer for turn in branch.turns for variant in turn):
            return branch, []  # a document: no template writes it
        try:
            return render_branch(branch, template=template, frame=frame)
        except SampleError as error:
            error.where = error.where or key
            raise

    def _check(
        self, conversation: Conversation, drawn: Mapping[tuple[int, int], list[int]], key: str
    ) -> None:
        """Refuses a conversation whose turns are not the ids of its rendering.

        Raises:
          SampleError: `template_ids`.
        """
        special = self.tokenizer.special_ids
        ids = [special["bos"]] if "bos" in special else []
        for t, v in enumerate(conversation.variants):
            ids += [*drawn[t, v], special["eos"]]
        want = self.tokenizer.conversation_ids(conversation.text)
        if ids != want[: len(ids)]:
            at = next((i for i, (a, b) in enumerate(zip(ids, want)) if a != b), len(want))  # noqa: B905
            raise SampleError("template_ids.tokens", where=key, token=at)

    def _encode(self, text: str) -> list[int]:
        if self.action_tokens:
            size = self.tokenizer.own_size
            return encode_actions(text, self._encode_plain, vocab_size=size)
        return self._encode_plain(text)

    def _encode_plain(self, text: str) -> list[int]:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.tokenizer.encode(first)
        for part in rest:
            ids += [self.tokenizer.special_ids[IMAGE_PLACEHOLDER], *self.tokenizer.encode(part)]
        return ids


def _response_ids(encode: Any, prompt: Sequence[int], response: str) -> list[int]:
    """Encodes another response of an exchange; [] where the ids of the prompt change with it."""
    try:
        found, ids = encode(response)
    except SampleError:
        return []
    return list(ids) if found == prompt else []


def frame_time(time_s: float) -> str:
    """Writes the time in front of a frame, as Molmo 2 does; one that follows others has a space
    before it.

    >>> frame_time(12.46)
    '12.5 '
    """
    return f"{time_s:.1f} "


def place_media(
    branches: Sequence[Branch], *, num_images: int, num_videos: int = 0, key: str
) -> tuple[Sequence[Branch], list[int]]:
    """Finds where the texts of an example have its videos.

    Args:
      branches: Formatted conversations.
      num_images, num_videos: Of the example.
      key: The sample's, for errors.

    Returns:
      The conversations, with the placeholder of an image where a video is to be as well; and which
      placeholder each video has, from 1: 0 where there are none.

    Raises:
      SampleError: `image_placeholder`: placeholders that do not name each image and video once, or
        have no meaning where they are.
    """
    marks = [IMAGE_PLACEHOLDER, *([VIDEO_PLACEHOLDER] if num_videos else [])]
    # Without the end of a placeholder none is there, not even where two texts meet.
    if not any(">" in variant.prompt or ">" in variant.response for variant in _variants(branches)):
        return branches, [0] * num_videos
    pattern = re.compile("|".join(map(re.escape, marks)))
    orders = {
        tuple(pattern.findall("".join(v.prompt + v.response for v in drawn)))
        for branch in branches
        for i in range(max(map(len, branch.turns)))
        for drawn in [[turn[i % len(turn)] for turn in branch.turns]]
    }
    if orders == {()}:
        return branches, [0] * num_videos
    answered = any(pattern.search(v.response) and v.prompt for v in _variants(branches))
    counts = [sorted({order.count(mark) for order in orders}) for mark in marks]
    found = [[num_images], [num_videos]][: len(marks)]
    if len(branches) > 1 or len(orders) > 1 or answered or counts != found:
        facts = {"videos": num_videos, "video_placeholders": counts[1]} if num_videos else {}
        raise SampleError(
            "image_placeholder.turn",
            where=key,
            images=num_images,
            placeholders=counts[0],
            facts=facts,
        )
    if num_videos:
        branches = [_with_images(branch) for branch in branches]
    marked = enumerate(next(iter(orders)), start=1)
    return branches, [number for number, mark in marked if mark == VIDEO_PLACEHOLDER]


def _with_images(branch: Branch) -> Branch:
    """Writes the placeholder of an image for that of a video: one token says where either is."""

    def changed(variant: Variant) -> Variant:
        texts = {name: getattr(variant, name) for name in ("prompt", "response", "user", "system")}
        return replace(
            variant,
            **{n: text.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER) for n, text in texts.items()},
        )

    return replace(branch, turns=tuple(tuple(map(changed, turn)) for turn in branch.turns))


def _variants(branches: Sequence[Branch]) -> Iterator[Variant]:
    for branch in branches:
        for turn in branch.turns:
            yield from turn
