"""InterleavedTextPreprocessor: from formatted branches to ids and the spans table's TEXT rows.

In Molmo's own formats each text is tokenized on its own, prompt and response apart, as Molmo does
it; so the ids of a response do not depend on the prompt that is drawn before it. In the format
"template" both are tokenized together, as transformers does it, and the ids of whole conversations
are compared with those of their renderings. Equal runs of ids are stored once.

A user text may place the images itself, by the placeholder `<|image|>`: that takes a single
conversation with one placeholder per image. So may a document, a response without a prompt, whose
texts are all learned. Otherwise images precede all text, each after its lead
("Image 2"), if there are leads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.text.formatter import Branch, Variant
from preprocess.text.rendering import Conversation, render_branch
from preprocess.text.tokens import IMAGE_PLACEHOLDER, EncodedPieces, Tokenizer
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


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedTextPreprocessor:
    """Tokenizes branches."""

    tokenizer: Tokenizer

    def __call__(
        self,
        branches: Sequence[Branch],
        *,
        key: str,
        leads: Sequence[str] = (),
        frame_times_s: Sequence[float] = (),
    ) -> TokenizedText:
        """Tokenizes every variant of every turn.

        Args:
          branches: Formatted conversations.
          key: The sample's, for errors.
          leads: Texts in front of the images, one per image; () for none.
          frame_times_s: When the frames of a video are shown, which follow the images.

        Raises:
          SampleError: `empty_response` (no token to learn from), `image_placeholder`,
            `template_ids`, `reasoning`.
        """
        ids: list[int] = []
        spans: dict[str | tuple[int, ...], tuple[int, int]] = {}
        memo: EncodedPieces = {}

        def store(name: str | tuple[int, ...], run: Sequence[int]) -> tuple[int, int]:
            start = len(ids)
            ids.extend(run)
            return spans.setdefault(name, (start, len(ids)))

        def span(text: str) -> tuple[int, int]:
            return spans.get(text) or store(text, self._encode(text))

        def exchange(variant: Variant, first: bool) -> Sequence[tuple[int, int]]:
            if self.tokenizer.chat is None or not variant.prompt:  # documents have no turns
                return span(variant.prompt), span(variant.response)
            runs = self.tokenizer.encode_exchange(
                variant.prompt, variant.response, first=first, memo=memo
            )
            return [spans.get(tuple(run)) or store(tuple(run), run) for run in runs]

        rows = []
        for b, branch in enumerate(branches):
            branch, conversations = self._rendered(branch, key)
            drawn: dict[tuple[int, int], list[int]] = {}
            for t, variants in enumerate(branch.turns):
                for v, variant in enumerate(variants):
                    prompt, response = exchange(variant, t == 0)
                    if response[0] == response[1]:
                        raise SampleError("empty_response", where=key)
                    rows.append((b, t, *prompt, *response, branch.turn_weight(t)))
                    if conversations:
                        drawn[t, v] = ids[slice(*prompt)] + ids[slice(*response)]
            for conversation in conversations:
                self._check(conversation, drawn, key)
        placed = any(
            IMAGE_PLACEHOLDER in variant.prompt or IMAGE_PLACEHOLDER in variant.response
            for variant in _variants(branches)
        )
        if frame_times_s:
            lead_spans: list[tuple[int, ...]] = [span(text) if text else (0, 0) for text in leads]
            lead_spans += [
                (*span(" " + text), *span(text), round(time_s * 1000))
                for time_s in frame_times_s
                for text in [frame_time(time_s)]
            ]
        else:
            lead_spans = [] if placed or not any(leads) else [*map(span, leads)]
        return TokenizedText(
            leads=tuple(lead_spans),
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
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.tokenizer.encode(first)
        for part in rest:
            ids += [self.tokenizer.special_ids[IMAGE_PLACEHOLDER], *self.tokenizer.encode(part)]
        return ids


def frame_time(time_s: float) -> str:
    """Writes the time in front of a frame, as Molmo 2 does; one that follows others has a space
    before it.

    >>> frame_time(12.46)
    '12.5 '
    """
    return f"{time_s:.1f} "


def check_placeholders(branches: Sequence[Branch], *, num_images: int, key: str) -> None:
    """Refuses placeholders that do not name each image once, or have no meaning where they are.

    Raises:
      SampleError: `image_placeholder`.
    """
    if not any(
        IMAGE_PLACEHOLDER in text
        for variant in _variants(branches)
        for text in (variant.prompt, variant.response)
    ):
        return
    counts = [
        sum(_count(turn[v % len(turn)]) for turn in branch.turns)
        for branch in branches
        for v in range(max(len(turn) for turn in branch.turns))
    ]
    answered = any(
        IMAGE_PLACEHOLDER in variant.response and variant.prompt for variant in _variants(branches)
    )
    if len(branches) > 1 or answered or set(counts) != {num_images}:
        raise SampleError(
            "image_placeholder.turn", where=key, images=num_images, placeholders=sorted(set(counts))
        )


def _count(variant: Variant) -> int:
    return (variant.prompt + variant.response).count(IMAGE_PLACEHOLDER)


def _variants(branches: Sequence[Branch]) -> Iterator[Variant]:
    for branch in branches:
        for turn in branch.turns:
            yield from turn
