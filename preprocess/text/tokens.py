"""The tokenizer: any Hugging Face fast tokenizer, plus the image symbols and a fingerprint.

`transformers` resolves the name (hub id, local folder, or the embedded default) once, in the parent
process; everything after that runs on the `tokenizers` library alone, which workers load in a
fraction of a second.

Image symbols are not added to the tokenizer's own vocabulary: they get the ids from `pad_to` on,
where `pad_to` is the length of the tokenizer rounded up to the model's embedding (Molmo pads the
vocabulary with filler tokens to the same effect). No text can therefore produce one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardspec.errors import ConfigError
from shardspec.manifest import TokenizerEntry
from shardspec.probe import probe_sha256

EMBEDDED = "embedded"
"""Name of the small byte-level BPE tokenizer that the package ships."""

EMBEDDED_PATH = Path(__file__).parents[1] / "tokenizer"

IMAGE_SYMBOLS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
    "<|points|>",
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
)
"""The fourteen symbols of Molmo 2, in its id order; the first four and <|image|> are Molmo 1's."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError)
"""What transformers raises for a name, a download or a file that it cannot use."""

VOCAB_MULTIPLE = 128
"""Default rounding of the vocabulary: embeddings are commonly padded to multiples of 128."""


@dataclass(frozen=True, kw_only=True)
class ChatFrame:
    """The markup around a conversation's turns, as text.

    A prompt is `first` (or `later`, from the second turn on) + user text + `suffix`; a response is
    `response_prefix` + text. The end-of-turn token follows a response in the sequence itself.
    """

    first: str
    later: str
    suffix: str
    response_prefix: str


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer as a value: it can be sent to workers and compared."""

    name: str
    json: str
    """The canonical tokenizer.json."""
    special_ids: Mapping[str, int]
    """bos, eos, pad and the image symbols."""
    vocab_size: int
    chat: ChatFrame | None = None
    """The frame of the tokenizer's own chat template, when it has one."""

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _control(self) -> re.Pattern[str]:
        tokens = [t["content"] for t in json.loads(self.json)["added_tokens"] if t["special"]]
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, reverse=True)) or r"(?!)")

    def __getstate__(self) -> dict[str, Any]:
        names = ("name", "json", "special_ids", "vocab_size", "chat")
        return {name: getattr(self, name) for name in names}

    def encode(self, text: str) -> list[int]:
        """Turns a text into ids; nothing is added at either end."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Turns ids into text; image symbols and control tokens appear as such."""
        symbols = {i: name for name, i in self.special_ids.items() if name in IMAGE_SYMBOLS}
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, -1]:
            if 0 <= i < self.vocab_size:
                run.append(i)
                continue
            parts.append(self._backend.decode(run, skip_special_tokens=False))
            run = []
            parts.append(symbols.get(i, "" if i < 0 else f"<{i}>"))
        return "".join(parts)

    def control_token(self, text: str) -> str | None:
        """Finds a control token spelled out in a text, which would be read as markup."""
        found = self._control.search(text)
        return found.group() if found else None

    @property
    def entry(self) -> TokenizerEntry:
        """Describes the tokenizer for the manifest, with its fingerprints."""
        return TokenizerEntry(
            name=self.name,
            sha256=hashlib.sha256(self.json.encode()).hexdigest(),
            probe_sha256=probe_sha256(self.encode),
            vocab_size=self.vocab_size,
            embedding_size=max(self.special_ids.values()) + 1,
            special_ids=dict(sorted(self.special_ids.items())),
            special_tokens={
                name: self._backend.id_to_token(self.special_ids[name])
                for name in ("bos", "eos", "pad")
            },
        )


def load_tokenizer(name: str = EMBEDDED, *, pad_to: int | None = None) -> Tokenizer:
    """Loads a tokenizer by hub id or local folder, or the embedded one.

    Args:
      name: "embedded", a folder with tokenizer.json, or a hub id such as "Qwen/Qwen2-7B".
      pad_to: First id of the image symbols: the rows of the model's embedding. None rounds the
        tokenizer's length up to a multiple of 128.

    Raises:
      ConfigError: `tokenizer_missing`, `tokenizer_slow`, `tokenizer_eos`, `tokenizer_pad_to`.
    """
    loader: Any
    if name == EMBEDDED:
        # The class that AutoTokenizer would choose, without the 2 s in which that imports torch.
        from transformers import PreTrainedTokenizerFast as loader
    else:
        from transformers import AutoTokenizer as loader
    location = str(EMBEDDED_PATH) if name == EMBEDDED else name
    try:
        loaded = loader.from_pretrained(location)
    except Exception as error:
        # The tokenizers library reports a malformed file as a bare Exception.
        if type(error) is not Exception and not isinstance(error, _LOAD_ERRORS):
            raise
        raise ConfigError(
            "tokenizer_missing", where=location, name=name, error=str(error).strip().splitlines()[0]
        ) from error
    if not loaded.is_fast:
        raise ConfigError("tokenizer_slow", where=location, name=name)
    if loaded.eos_token_id is None:
        raise ConfigError("tokenizer_eos", where=location, name=name)
    length = len(loaded)
    start = -(-length // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if pad_to is None else pad_to
    if start < length:
        raise ConfigError("tokenizer_pad_to", where=name, got_pad_to=start, want_at_least=length)
    chat = _template_frame(loaded)
    eos = loaded.eos_token_id
    if chat is not None and chat[1] is not None:
        eos = loaded.convert_tokens_to_ids(chat[1])
    # A tokenizer without BOS uses EOS instead, as Molmo does.
    bos = loaded.bos_token_id if loaded.bos_token_id is not None else loaded.eos_token_id
    pad = loaded.pad_token_id if loaded.pad_token_id is not None else loaded.eos_token_id
    symbols = {symbol: start + i for i, symbol in enumerate(IMAGE_SYMBOLS)}
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(
        name=name,
        json=backend.to_str(pretty=False),
        special_ids={"bos": bos, "eos": eos, "pad": pad, **symbols},
        vocab_size=length,
        chat=chat[0] if chat else None,
    )


def tokenizer_from_entry(text: str, entry: TokenizerEntry) -> Tokenizer:
    """Rebuilds the tokenizer that a dataset carries.

    Args:
      text: The tokenizer.json stored beside the manifest.
      entry: What the manifest says of it.
    """
    return Tokenizer(
        name=entry.name, json=text, special_ids=entry.special_ids, vocab_size=entry.vocab_size
    )


def _template_frame(loaded: Any) -> tuple[ChatFrame, str | None] | None:
    """Reads the markup of a chat template off two rendered conversations.

    Returns:
      The frame and the control token that ends a response, or None without a usable template.
    """
    if not getattr(loaded, "chat_template", None):
        return None
    from jinja2 import TemplateError

    user, answer, again = "\ufdd0u", "\ufdd0a", "\ufdd0v"  # noncharacters: in no real text
    turns = [("user", user), ("assistant", answer), ("user", again)]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        first = loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # malformed, or it refuses such a conversation
        return None
    if first.count(user) != 1 or any(whole.count(text) != 1 for _, text in turns):
        return None
    before, suffix = first.split(user)
    later = whole.split(answer)[1].split(again)[0]
    # Not all_special_tokens: that lists only those with a role, so <|end|> may be missing there.
    control = [token.content for token in loaded.added_tokens_decoder.values() if token.special]
    specials = [token for token in control if token and later.startswith(token)]
    end_of_turn = max(specials, key=len) if specials else None
    frame = ChatFrame(
        first=before,
        later=later.removeprefix(end_of_turn or ""),
        suffix=suffix,
        response_prefix="",
    )
    return frame, end_of_turn
