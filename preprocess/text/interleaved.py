"""InterleavedTextPreprocessor: from formatted branches to ids and the spans table's TEXT rows.

In Molmo's own formats each text is tokenized on its own, prompt and response apart, as Molmo does
it; so the ids of a response do not depend on the prompt that is drawn before it. In the format
"template" both are tokenized together, as transformers does it. Equal runs of ids are stored once.

A user text may place the images itself, by the placeholder `<|image|>`: that takes a single
conversation with one placeholder per image. So may a document, a response without a prompt, whose
texts are all learned. Otherwise images precede all text, each after its lead
("Image 2"), if there are leads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.text.formatter import Branch, Variant
from preprocess.text.tokens import IMAGE_PLACEHOLDER, EncodedPieces, Tokenizer
from shardspec.errors import SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """The text of one sample as ids."""

    tokens: np.ndarray
    """int32 [T], distinct runs end to end."""
    rows: tuple[tuple[int, int, int, int, int, int, int], ...]
    """TEXT rows without their kind: branch, turn, prompt and response spans, weight."""
    leads: tuple[tuple[int, int], ...]
    """(start, stop) of the tokens in front of each image, or ()."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedTextPreprocessor:
    """Tokenizes branches."""

    tokenizer: Tokenizer

    def __call__(
        self, branches: Sequence[Branch], *, key: str, leads: Sequence[str] = ()
    ) -> TokenizedText:
        """Tokenizes every variant of every turn.

        Args:
          branches: Formatted conversations.
          key: The sample's, for errors.
          leads: Texts in front of the images, one per image; () for none.

        Raises:
          SampleError: `empty_response` (no token to learn from), `image_placeholder`.
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
            for t, variants in enumerate(branch.turns):
                for variant in variants:
                    prompt, response = exchange(variant, t == 0)
                    if response[0] == response[1]:
                        raise SampleError("empty_response", where=key)
                    rows.append((b, t, *prompt, *response, branch.weight))
        placed = any(
            IMAGE_PLACEHOLDER in variant.prompt or IMAGE_PLACEHOLDER in variant.response
            for variant in _variants(branches)
        )
        return TokenizedText(
            leads=() if placed or not any(leads) else tuple(span(text) for text in leads),
            rows=tuple(rows),
            tokens=np.array(ids, dtype="<i4"),
        )

    def _encode(self, text: str) -> list[int]:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.tokenizer.encode(first)
        for part in rest:
            ids += [self.tokenizer.special_ids[IMAGE_PLACEHOLDER], *self.tokenizer.encode(part)]
        return ids


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
