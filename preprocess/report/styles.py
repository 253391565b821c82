"""Texts by style, from the samples that are read for it: the indexes do not know styles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from preprocess.page import Counts
from preprocess.report.marks import marks
from preprocess.report.stored import Sample
from preprocess.text import message_styles
from shardspec.sample import image_rows, text_rows

NO_STYLE = "no style"


@dataclass(slots=True, kw_only=True)
class StyleCounts:
    """Exchanges of one style; each counts with its longest variant."""

    tokens: Counts = field(default_factory=Counts)
    loss_tokens: Counts = field(default_factory=Counts)
    variants: Counts = field(default_factory=Counts)


@dataclass(slots=True, kw_only=True)
class TextCounts:
    """What the read samples say."""

    num_samples: int = 0
    styles: dict[str, StyleCounts] = field(default_factory=dict)
    marks: Counts = field(default_factory=Counts)
    """Points and boxes per image, of samples that have some."""


def count_texts(samples: Iterable[Sample]) -> TextCounts:
    """Counts the exchanges of samples by style."""
    found = TextCounts()
    for sample in samples:
        found.num_samples += 1
        exchanges: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for _, branch, turn, a, b, c, d, _ in text_rows(sample.spans).tolist():
            exchanges.setdefault((branch, turn), []).append((b - a + d - c, d - c))
        num_branches = 1 + max((branch for branch, _ in exchanges), default=-1)
        answered = {at[0] for at, texts in exchanges.items() if any(loss for _, loss in texts)}
        for (branch, _), variants in exchanges.items():
            tokens, loss = max(variants)
            if branch in answered and not loss:
                continue  # what a chat template has after the last answer
            style = _style(sample.record.get("message_list"), branch, num_branches)
            counts = found.styles.setdefault(style, StyleCounts())
            counts.tokens.add(np.array([tokens]))
            counts.loss_tokens.add(np.array([loss]))
            counts.variants.add(np.array([len(variants)]))
        sizes = [(int(row[2]), int(row[3])) for row in image_rows(sample.spans)]
        per_image = [0] * len(sizes)
        for mark in marks(sample.record, sizes):
            per_image[mark.image] += 1
        if any(per_image):
            found.marks.add(np.array(per_image))
    ordered = sorted(found.styles.items(), key=lambda pair: (-pair[1].tokens.count, pair[0]))
    found.styles = dict(ordered)
    return found


def _style(messages: Any, branch: int, num_branches: int) -> str:
    """Names the styles of the message that a branch was made of."""
    # Where messages were joined or left out, it is not known which of them a branch is.
    known = isinstance(messages, list) and len(messages) == num_branches
    return style_names([messages[branch]] if known else messages)


def style_names(messages: Any) -> str:
    """Names the styles of messages, each once."""
    styles = message_styles({"message_list": messages}) if isinstance(messages, list) else []
    return ", ".join(dict.fromkeys(styles)) or NO_STYLE
