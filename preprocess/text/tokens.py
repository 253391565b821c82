"""The tokenizer: any Hugging Face fast tokenizer, plus the image symbols and a fingerprint.

`transformers` resolves the name (hub id, local folder, or the embedded default) once, in the parent
process; everything after that runs on the `tokenizers` library alone, which workers load in a
fraction of a second.

Image symbols are not added to the tokenizer's own vocabulary: they get the ids from `pad_to` on,
where `pad_to` is the length of the tokenizer rounded up to the model's embedding (Molmo pads the
vocabulary with filler tokens to the same effect). No text can therefore produce one.

Which tokens begin a sequence and end an answer follows from the message format:

- "role", "none": BOS, or EOS for a tokenizer without BOS, and EOS after answers, as Molmo does;
- "chatml": the same, but answers end in <|im_end|> where the tokenizer has that token;
- "template": what the tokenizer's chat template writes (`preprocess.text.chat_template`); a
  sequence begins without BOS where the template writes none.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from preprocess.text.chat_template import (
    TemplateFrame,
    read_template,
    rendered,
    template_literals,
    template_source,
)
from preprocess.text.policy import MessageFormat, TextPolicy
from preprocess.text.rendering import ChatTemplate, is_reasoning
from shardspec.errors import ConfigError, SampleError
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


IMAGE_PLACEHOLDER = "<|image|>"
"""Where a user text wants its next image: the symbol that data on the hub uses as well."""

VIDEO_PLACEHOLDER = "<|video|>"
"""The same for a video, in texts; in tokens it is that of an image."""

CHATML_END = "<|im_end|>"

_MARKER_SHAPES = re.compile(
    r"<[|｜][^<>]*[|｜]>"  # <|fim_prefix|>, <｜User｜>, <|EOT|>
    r"|\[/?[A-Z][A-Z_]*\]|\[gMASK\]"  # [INST], [/TOOL_RESULTS]
    r"|<<?/?(?:SYS|s|bos|eos|pad|unk|mask|sop|eop|think|thinking|answer|tools?|tool_\w+|function"
    r"|arg_\w+|(?:start|end|begin)_of_\w+|fim_\w+|file_sep|reponame|repo_name|filename|gh_stars"
    r"|image_soft_token|reserved_\w+|unused\d+|extra_id_\d+)>>?"
)
"""How chat families spell their markers. HTML tags, which Gemma has as tokens, are not among
them."""


_SHORT_CHARS, _REMEMBERED_TEXTS = 128, 4096
"""Texts of at most this many characters are remembered, and how many: at most some 10 MB. Of the 15
texts of a caption with two transcripts 12 are prompts, of 72 in all."""


_LONG_CHARS, _REMEMBERED_LONG_TEXTS = 4096, 512
"""The same of those that `Tokenizer.remember` is given, and that are needed once: at most 20 MB."""


EncodedPieces = dict[tuple[str, str, str], tuple[list[int], list[int]]]
"""(token in front, text, token after it) to (ids, where each ends)."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer as a value: it can be sent to workers and compared."""

    name: str
    json: str
    """The canonical tokenizer.json."""
    special_ids: Mapping[str, int]
    """bos, eos, pad and the image symbols."""
    vocab_size: int
    message_format: MessageFormat = "role"
    """What bos and eos follow from; one name stands for the formats that share them."""
    chat: TemplateFrame | None = None
    """The tokenizer's own chat template, where the message format is "template"."""
    template: ChatTemplate | None = None
    """The template itself, with which each conversation is compared."""
    markers: tuple[str, ...] = ()
    """Texts besides the special tokens that would be read as markup."""

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.json)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def own_size(self) -> int:
        """Ids of the vocabulary itself, without added tokens."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        tokens = {t["content"] for t in json.loads(self.json)["added_tokens"] if t["special"]}
        # The placeholder of an image never reaches the tokenizer.
        tokens = {*tokens, *self.markers} - {IMAGE_PLACEHOLDER}
        return re.compile("|".join(re.escape(t) for t in sorted(tokens, reverse=True)) or r"(?!)")

    @cached_property
    def _added(self) -> dict[str, int]:
        """Ids of the added tokens that are tokens wherever they are written."""
        tokens = json.loads(self.json)["added_tokens"]
        return {
            token["content"]: token["id"]
            for token in tokens
            if not (token["single_word"] or token["normalized"])
        }

    @cached_property
    def _borders(self) -> re.Pattern[str]:
        tokens = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(re.escape(t) for t in tokens) or r"(?!)")

    @cached_property
    def _anchor(self) -> str:
        """A special token that leaves the space around it alone; "" where there is none."""
        for token in json.loads(self.json)["added_tokens"]:
            plain = not (token["lstrip"] or token["rstrip"] or token["single_word"])
            if token["special"] and plain and not token["normalized"]:
                return str(token["content"])
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @cached_property
    def _repeated(self) -> Callable[[str], tuple[int, ...]]:
        """Encodes a short text, and remembers it: most prompts are the same in many samples."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)

        return functools.lru_cache(maxsize=_REMEMBERED_TEXTS)(ids)

    @cached_property
    def _remembered(self) -> dict[str, list[int]]:
        return {}

    def remember(self, texts: Iterable[str]) -> None:
        """Encodes texts that `encode` is about to be asked for, once each; forgets earlier ones."""
        self._remembered.clear()
        for text in texts:
            if _SHORT_CHARS < len(text) <= _LONG_CHARS:
                try:
                    self._remembered[text] = self.encode(text)
                except MemoryError:
                    raise
                except Exception:  # noqa: BLE001 - raised again where the text's row is finished
                    continue
            if len(self._remembered) >= _REMEMBERED_LONG_TEXTS:
                break

    def encode(self, text: str) -> list[int]:
        """Turns a text into ids; nothing is added at either end."""
        if len(text) <= _SHORT_CHARS:
            return list(self._repeated(text))
        if found := self._remembered.pop(text, None):
            return found
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_exchange(
        self, prompt: str, response: str, *, first: bool, memo: EncodedPieces | None = None
    ) -> tuple[list[int], list[int]]:
        """Turns an exchange of the chat template into the ids that it has in its conversation.

        The texts are tokenized together, between the tokens that are around them, so that tokens
        reach over their borders where they do in the whole conversation. One that reaches over the
        border of prompt and response counts as the response's.

        Args:
          prompt: With markup; images go where `IMAGE_PLACEHOLDER` is.
          response: With markup.
          first: Whether the exchange begins its conversation.
          memo: Remembers pieces: variants of an exchange share the one around their response.

        Returns:
          Ids of the prompt and of the response, without BOS and end of turn.

        Raises:
          SampleError: `template_ids` (the text around the exchange is not tokenized as such).
        """
        frame = self.chat
        assert frame is not None
        memo = {} if memo is None else memo
        *heads, prompt = prompt.split(IMAGE_PLACEHOLDER)
        before = frame.bos if first else frame.end
        ids: list[int] = []
        for head in heads:
            ids += self._encode_between(before, head, "", memo)[0]
            ids.append(self.special_ids[IMAGE_PLACEHOLDER])
            before = self._anchor
        # Nothing joins over an added token: what is in front of the last one is apart.
        marks = list(self._borders.finditer(prompt))
        if marks:
            head, token = prompt[: marks[-1].start()], marks[-1].group()
            ids += self._encode_between(before, head, token, memo)[0]
            ids.append(self._added[token])
            before, prompt = token, prompt[marks[-1].end() :]
        last, ends = self._encode_between(before, prompt + response, frame.end, memo)
        border = len(before) + len(prompt)
        learned = bisect.bisect_right(ends, border)
        return ids + last[:learned], last[learned:]

    def _encode_between(
        self, before: str, text: str, after: str, memo: EncodedPieces
    ) -> tuple[list[int], list[int]]:
        """Encodes a text between two tokens ("" for none): its ids, and where each of them ends."""
        found = memo.get((before, text, after))
        if found is None:
            found = memo[before, text, after] = self._encode_piece(before, text, after)
        return found

    def _encode_piece(self, before: str, text: str, after: str) -> tuple[list[int], list[int]]:
        encoding = self._backend.encode(before + text + after, add_special_tokens=False)
        start, stop = bool(before), len(encoding.ids) - bool(after)
        around = [*encoding.ids[:start], *encoding.ids[stop:]]
        if around != [self.token_id(token) for token in (before, after) if token]:
            raise SampleError("template_ids.markup", before=before, after=after)
        return encoding.ids[start:stop], [end for _, end in encoding.offsets[start:stop]]

    def fits(self, message_format: MessageFormat) -> bool:
        """Returns True if its BOS and EOS are those of a message format."""
        if "template" in (message_format, self.message_format):
            return message_format == self.message_format
        if message_format == "chatml":
            return self.token_id(CHATML_END) in (None, self.special_ids["eos"])
        return self.message_format == "role"

    def token_id(self, token: str) -> int | None:
        """Looks up the id of a token by its exact text."""
        found: int | None = self._backend.token_to_id(token)
        return found

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

    def control_token(self, text: str, *, reasoning: bool = False) -> str | None:
        """Finds a control token spelled out in a text, which would be read as markup.

        Args:
          text: The text.
          reasoning: Whether the borders of a thought may be in it.
        """
        normalizer = self._backend.normalizer
        # Added tokens may be matched in what the normalizer makes of the text.
        for form in (text, None if normalizer is None else normalizer.normalize_str(text)):
            for found in self._control.finditer(form or ""):
                if not (reasoning and is_reasoning(found.group())):
                    return found.group()
        return None

    def conversation_ids(self, text: str) -> list[int]:
        """Turns a rendered conversation into ids, as transformers does; images are symbols."""
        image, mark = self.special_ids[IMAGE_PLACEHOLDER], self._anchor
        first, *others = text.split(IMAGE_PLACEHOLDER)
        ids = self.encode(mark.join([first, *others]) if mark else first)
        if not mark:
            for part in others:
                ids += [image, *self.encode(part)]
        elif others:
            # The symbol is not a token of the tokenizer, so another one takes its place. The
            # markup may have that one as well: they are told apart by their order in the text.
            anchor = self.token_id(mark)
            found = iter(re.findall(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(mark)}", text))
            ids = [image if i == anchor and next(found) != mark else i for i in ids]
        return ids

    @cached_property
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
                if name in self.special_ids
            },
        )


def load_tokenizer(
    name: str = EMBEDDED, *, pad_to: int | None = None, policy: TextPolicy | None = None
) -> Tokenizer:
    """Loads a tokenizer by hub id or local folder, or the embedded one.

    Args:
      name: "embedded", a folder with tokenizer.json, or a hub id such as "Qwen/Qwen2-7B".
      pad_to: First id of the image symbols: the rows of the model's embedding. None rounds the
        tokenizer's length up to a multiple of 128.
      policy: The recipe's: its message format says what begins a sequence and ends an answer.

    Raises:
      ConfigError: `tokenizer_missing`, `tokenizer_code`, `tokenizer_slow`, `tokenizer_eos`,
        `tokenizer_pad_to`; with message format "template" `no_chat_template`, `chat_template`,
        `chat_date`.
    """
    policy = policy or TextPolicy()
    load = _load_embedded if name == EMBEDDED else _load
    return load(name, pad_to, policy.message_format, policy.chat_date)


def _load(name: str, pad_to: int | None, wanted_format: MessageFormat, chat_date: str) -> Tokenizer:
    loader: Any
    if name == EMBEDDED:
        # The class that AutoTokenizer would choose, without the 2 s in which that imports torch.
        from transformers import PreTrainedTokenizerFast as loader
    else:
        from transformers import AutoTokenizer as loader
    location = str(EMBEDDED_PATH) if name == EMBEDDED else name
    try:
        # False, not the default: that asks at the terminal whether to run a folder's code.
        loaded = loader.from_pretrained(location, trust_remote_code=False)
    except Exception as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise ConfigError("tokenizer_code", where=location, name=name) from error
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
    eos = loaded.eos_token_id
    # A tokenizer without BOS uses EOS instead, as Molmo does.
    bos = eos if loaded.bos_token_id is None else loaded.bos_token_id
    pad = eos if loaded.pad_token_id is None else loaded.pad_token_id
    ids = {"bos": bos, "eos": eos, "pad": pad}
    ids |= {symbol: start + i for i, symbol in enumerate(IMAGE_SYMBOLS)}
    message_format: MessageFormat = "role"
    chat: TemplateFrame | None = None
    template: ChatTemplate | None = None
    added = {token.content: i for i, token in loaded.added_tokens_decoder.items()}
    if wanted_format == "chatml" and added.get(CHATML_END, eos) != eos:
        message_format, ids["eos"] = "chatml", added[CHATML_END]
    elif wanted_format == "template":
        message_format = "template"
        chat = read_template(loaded, where=name, date=chat_date)
        if chat is None:
            raise ConfigError("no_chat_template", where=name)
        ids["eos"] = added[chat.end]
        if not chat.bos:
            del ids["bos"]
        source, variables = template_source(loaded, where=name, date=chat_date)
        template = ChatTemplate(source=source, variables=variables)
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    tokenizer = Tokenizer(
        name=name,
        json=backend.to_str(pretty=False),
        special_ids=ids,
        vocab_size=length,
        message_format=message_format,
        chat=chat,
        template=template,
        markers=_markers(loaded, chat),
    )
    if chat is not None:
        _check_template_ids(loaded, tokenizer, chat)
    return tokenizer


# Its files are part of the package, so that it stays what it is; each job of a process asks for it.
_load_embedded = functools.lru_cache(maxsize=8)(_load)


def tokenizer_from_entry(text: str, entry: TokenizerEntry) -> Tokenizer:
    """Rebuilds the tokenizer that a dataset carries.

    Args:
      text: The tokenizer.json stored beside the manifest.
      entry: What the manifest says of it.
    """
    return Tokenizer(
        name=entry.name, json=text, special_ids=entry.special_ids, vocab_size=entry.vocab_size
    )


def _markers(loaded: Any, chat: TemplateFrame | None) -> tuple[str, ...]:
    """Lists what would be read as markup in a text, besides the special tokens.

    An added token is a marker if the chat template writes it, or if chat families spell their
    markers so: whether it is called special differs between tokenizers.
    """
    written = "\n".join(template_literals(loaded))
    if chat is not None:
        written += rendered(chat, [("x", "x")] * 3)
    found = {
        token.content
        for token in loaded.added_tokens_decoder.values()
        if token.content.strip()
        and (token.content in written or _MARKER_SHAPES.fullmatch(token.content))
    }
    return tuple(sorted(found | set(chat.changed if chat else ())))


_PROBE = (
    ("What is it?", "A red ball."),
    ("  Naïve: 3 cats,\n\nor so ", " 1. one\n2. two\n"),
    ("- a\n- b", "你好 👩‍👩‍👧 ok!"),
)
"""A conversation whose texts begin and end in what tokenizers join with their neighbours."""


def _check_template_ids(loaded: Any, tokenizer: Tokenizer, chat: TemplateFrame) -> None:
    """Refuses a template whose conversations are not tokenized turn by turn.

    Raises:
      ConfigError: `chat_template`.
    """
    for system in ("", "Be brief.\n")[: 1 + (chat.system is not None)]:
        ids = [tokenizer.special_ids["bos"]] if chat.bos else []
        text = rendered(chat, _PROBE, system=system)
        want = list(loaded(text, add_special_tokens=False)["input_ids"])
        for t, (user, answer) in enumerate(_PROBE):
            prompt, response = chat.frame(
                user, answer, first=t == 0, last=t == len(_PROBE) - 1, system=system
            )
            try:
                for part in tokenizer.encode_exchange(prompt, response, first=t == 0):
                    ids += part
            except SampleError as error:
                problem = f"{error.facts['after'] or error.facts['before']!r} is not always a token"
                raise ConfigError("chat_template", where=tokenizer.name, problem=problem) from error
            ids.append(tokenizer.special_ids["eos"])
        if ids != want:
            raise ConfigError(
                "chat_template",
                where=tokenizer.name,
                problem="its tokens reach over the borders of turns",
            )
