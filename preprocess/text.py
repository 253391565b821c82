"""InterleavedTextPreprocessor: from formatted branches to ids and the spans table's TEXT rows.

Each text is tokenized on its own, prompt and response apart, as Molmo does it; so the ids of a
response do not depend on the prompt that is drawn before it. Equal texts share one run of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.formatter import Branch
from preprocess.tokens import Tokenizer
from shardspec.errors import SampleError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedText:
    """The text of one sample as ids."""

    tokens: np.ndarray
    """int32 [T], distinct runs end to end."""
    rows: tuple[tuple[int, int, int, int, int, int, int], ...]
    """TEXT rows without their kind: branch, turn, prompt and response spans, weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterleavedTextPreprocessor:
    """Tokenizes branches."""

    tokenizer: Tokenizer

    def __call__(self, branches: Sequence[Branch], *, key: str) -> TokenizedText:
        """Tokenizes every variant of every turn.

        Raises:
          SampleError: `empty_response` (no token to learn from).
        """
        ids: list[int] = []
        spans: dict[str, tuple[int, int]] = {}

        def span(text: str) -> tuple[int, int]:
            if text not in spans:
                start = len(ids)
                ids.extend(self.tokenizer.encode(text))
                spans[text] = (start, len(ids))
            return spans[text]

        rows = []
        for b, branch in enumerate(branches):
            for t, variants in enumerate(branch.turns):
                for variant in variants:
                    prompt, response = span(variant.prompt), span(variant.response)
                    if response[0] == response[1]:
                        raise SampleError(
                            "response has no tokens", reason="empty_response", where=key
                        )
                    rows.append((b, t, *prompt, *response, branch.weight))
        return TokenizedText(tokens=np.array(ids, dtype="<i4"), rows=tuple(rows))
