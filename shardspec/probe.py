"""The tokenizer's fingerprint by behaviour: the ids that it gives for a fixed set of texts.

File hashes change with harmless re-saves; ids do not. A loader that gets the tokenizer of the
training run compares it with the one that the shards were built with, field by field, before the
first batch: a model would train on text of another tokenizer without an error, and badly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shardspec.errors import ConfigError, ShardError
from shardspec.manifest import TokenizerEntry, canonical_json, differences

PROBE_TEXTS = (
    "",
    " ",
    "  two  spaces",
    "\n\n\ttab",
    "Hello world",
    "hello WORLD",
    "don't",
    "3.14159",
    "1,000,000",
    "naïve café",
    "Grüße aus Köln",
    "こんにちは世界",
    "你好，世界",
    "Привет",
    "مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "𝔘𝔫𝔦",
    "def f(x):\n    return x ** 2",
    '<p class="a">b</p>',
    "https://example.org/a?b=c#d",
    "a" * 40,
    "<|endoftext|>",
    "<|im_start|>user\n",
    "User: hi Assistant:",
    "long_caption 82:",
    '<point x="10.0" y="20.0" alt="cat">cat</point>',
    "\u00a0\u200b",
    "\r\n",
    "e\u0301",
)
"""Spaces, case, digits, accents, scripts, emoji, code, markup. Image symbols are
left out: a run may have added them. Never changed without a new format version."""


class TrainingTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that the comparison needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __len__(self) -> int:
        """Counts the ids."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """Turns a text into ids."""


def probe_sha256(encode: Callable[[str], Sequence[int]]) -> str:
    """Hashes the ids that a tokenizer gives for the probe texts."""
    ids = [[int(i) for i in encode(text)] for text in PROBE_TEXTS]
    return hashlib.sha256(canonical_json(ids)).hexdigest()


def check_tokenizer(entry: TokenizerEntry, tokenizer: TrainingTokenizer, *, where: str) -> None:
    """Refuses a tokenizer that is not the one that the shards were built with.

    Image symbols that were added to it above the recorded vocabulary are ignored.

    Args:
      entry: From the manifest.
      tokenizer: Of the training run.
      where: The dataset, for the error.

    Raises:
      ConfigError: `tokenizer_mismatch`, naming every field that differs.
    """
    # len() counts symbols that the run has added; ids below the recorded size are what matters.
    longer = len(tokenizer) > entry.vocab_size
    got: dict[str, Any] = {
        "vocab_size": entry.vocab_size if longer else len(tokenizer),
        "probe_sha256": probe_sha256(lambda t: tokenizer.encode(t, add_special_tokens=False)),
    }
    want: dict[str, Any] = {"vocab_size": entry.vocab_size, "probe_sha256": entry.probe_sha256}
    # A dataset without BOS follows a chat template that writes none.
    if tokenizer.bos_token_id is not None and "bos" in entry.special_ids:
        got["bos"], want["bos"] = tokenizer.bos_token_id, entry.special_ids["bos"]
    for name, token in entry.special_tokens.items():
        ids = [int(i) for i in tokenizer.encode(token, add_special_tokens=False)]
        label = f"{name} {token}"
        got[label], want[label] = ids, [entry.special_ids[name]]
    found = differences(want, got, "tokenizer")
    if found:
        raise ConfigError(
            "tokenizer_mismatch", where=where, shards=entry.name, differences="; ".join(found)
        )


def check_stored_tokenizer(entry: TokenizerEntry, payload: bytes, *, where: str) -> None:
    """Refuses a dataset's copy of its tokenizer that is not the one that the manifest describes.

    Args:
      entry: From the manifest.
      payload: The copy, tokenizer.json.
      where: Its URL, for the error.

    Raises:
      ShardError: `tokenizer_file`: other bytes, or bos, eos or pad have other ids in it.
    """
    got = hashlib.sha256(payload).hexdigest()
    if got != entry.sha256:
        raise ShardError("tokenizer_file.changed", where=where, got=got, want=entry.sha256)
    ids = _token_ids(payload)
    found = {name: ids.get(token) for name, token in entry.special_tokens.items()}
    want = {name: entry.special_ids[name] for name in entry.special_tokens}
    if found != want:
        differing = differences(want, found, "special_ids")
        raise ShardError("tokenizer_file.ids", where=where, differences="; ".join(differing))


def _token_ids(payload: bytes) -> dict[str, int]:
    """Lists the tokens of a tokenizer.json, as far as it has the parts of that format."""
    try:
        document = json.loads(payload)
        model = document["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # of a Unigram model: [token, score], by id
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        return {**vocabulary, **added}
    except (ValueError, TypeError, LookupError, RecursionError):
        return {}
