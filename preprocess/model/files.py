"""Opening a model's folder or hub id: its configuration, its tokenizer and its chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocess.model.processor import is_model_type, open_processor, read_processor
from preprocess.model.render import ChatModel
from preprocess.text import IMAGE_PLACEHOLDER, USER, VIDEO_PLACEHOLDER, Tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.families import MODEL_TYPES, Family, ModelConfig, PaliGemma, StoredModel, read_family

PALIGEMMA = (
    "{% if messages | length != 2 or messages[0].role != 'user' %}"
    "{{ raise_exception('PaliGemma takes one question and one answer') }}{% endif %}"
    "{% for part in messages[0].content %}{% if part.type == 'text' %}"
    "{{ bos_token if loop.first or loop.previtem.type == 'image' }}{{ part.text }}"
    "{% elif loop.first or loop.previtem.type == 'image' %}<image>{% else %}"
    "{{ raise_exception('PaliGemma takes pictures in front of the question') }}{% endif %}"
    "{% endfor %}{{ bos_token if messages[0].content[-1].type == 'image' }}"
    "{{ '\n' }}{% generation %}"
    "{% for part in messages[1].content %}{{ part.text }}{% endfor %}{{ eos_token }}"
    "{% endgeneration %}"
)
"""What PaliGemma's processor makes of a question and an answer; its files have no template."""

_NAMED = ("start_image_token", "end_image_token", "boi_token", "eoi_token")
"""Attributes of tokenizers that name the tokens around a picture."""

_TRIED = (224, 336)
"""(height, width) of a picture by which templates are tried."""

_TEXT = re.compile(r"\n+|<row_\d+_col_\d+>|<global-img>")
"""What Idefics3's processor writes as plain text where the tokenizer has no such token."""


def load_model(
    name: str, *, tokenizer: Tokenizer, date: str = "", own: bool = True, videos: bool = False
) -> ChatModel:
    """Loads the text side of a model.

    Args:
      name: A folder with the model's configuration, processor and tokenizer files, or a hub id.
      tokenizer: The model's, as it is stored with the dataset.
      date: Day for templates that write one, YYYY-MM-DD.
      own: Whether a family of `shardspec.families` is preferred to the model's own processor.
      videos: Whether the dataset may have videos.

    Raises:
      ConfigError: `model_file`, `model_template`, `chat_date`; as `read_family`, `read_processor`.
    """
    from transformers import AutoTokenizer

    config = _document(name, "config.json")
    if config is None:
        raise ConfigError("model_file", where=name, file="config.json")
    processor = _document(name, "processor_config.json") or {}
    # Folders that were saved by several releases of transformers have both; this is its order.
    images = processor.get("image_processor") or _document(name, "preprocessor_config.json")
    if images is None:
        raise ConfigError("model_file", where=name, file="preprocessor_config.json")
    loaded: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    token_id = config.get("image_token_id", config.get("image_token_index"))
    token = "" if token_id is None else loaded.convert_ids_to_tokens(token_id) or ""
    video_id = config.get("video_token_id") if videos else None
    model_type = config.get("model_type")
    family: Family
    if (own and model_type in MODEL_TYPES) or not is_model_type(model_type):
        family = read_family(
            ModelConfig(
                config=config,
                image_processor=images,
                processor=processor,
                image_token=token,
                tokens={name: getattr(loaded, name) for name in _NAMED if hasattr(loaded, name)},
                video_token=""
                if video_id is None
                else loaded.convert_ids_to_tokens(video_id) or "",
                video_processor=processor.get("video_processor")
                or _document(name, "video_preprocessor_config.json")
                or images,
            ),
            where=name,
        )
    else:
        family = read_processor(name, open_processor(name, config, images), config, images)
    added = tuple(each.content for each in loaded.added_tokens_decoder.values())
    ids = {symbol: _ids_of(symbol, family, loaded, added) for symbol in family.tokens.symbols}
    written = (*ids, family.tokens.marker, *_tokens_of(family))
    missing = [symbol for symbol in written if symbol not in added and not _TEXT.fullmatch(symbol)]
    if missing:
        problem = f"the tokenizer has no token {missing[0]}"
        raise ConfigError("model_template", where=name, problem=problem)
    template = PALIGEMMA
    if not isinstance(family, PaliGemma):
        template = _template(name, processor, loaded)
    if "strftime_now" in template and not date:
        raise ConfigError("chat_date.missing", where=name)
    stored = StoredModel(
        family=family,
        symbols=ids,
        placeholder=tokenizer.special_ids[IMAGE_PLACEHOLDER],
    )
    special = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    for content in ("parts", "text"):
        model = ChatModel(
            name=name,
            stored=stored,
            template=template,
            tokenizer_json=tokenizer.json,
            added_tokens=added,
            special_tokens=special,
            content=content,  # type: ignore[arg-type]
            date=date,
            config=config if stored.inline else {},
            images=images if stored.inline else {},
        )
        problem = _problem(model, loaded)
        if not problem:
            return model
    raise ConfigError("model_template", where=name, problem=problem)


def _ids_of(symbol: str, family: Family, loaded: Any, added: Sequence[str]) -> tuple[int, ...]:
    """Gives the ids of a symbol; of a text those that it has between two tokens of a picture."""
    if symbol in added or not _TEXT.fullmatch(symbol):
        return (int(loaded.convert_tokens_to_ids(symbol) or 0),)
    soft = family.image_token
    ids = loaded(f"{soft}{symbol}{soft}", add_special_tokens=False)["input_ids"]
    return tuple(map(int, ids[1:-1]))


def _tokens_of(family: Family) -> tuple[str, ...]:
    """Lists the tokens that a processor writes around a picture."""
    tokens = family.tokens
    return tuple(
        re.findall(r"<[^<>\s]+>", tokens.written if tokens.written != tokens.marker else "")
    )


def _problem(model: ChatModel, loaded: Any) -> str:
    """Says why the template cannot render a picture and a question; "" if it can."""
    messages = [model.message("user", USER, images=1), model.message("assistant", "An answer.")]
    marker = model.stored.family.tokens.marker
    try:
        text, _ = model.render(messages)
    except SampleError as error:
        return str(error.facts.get("error", error.what))
    if text.count(marker) != 1:
        return f"it writes {marker} {text.count(marker)} times for one picture"
    if model.video is not None:
        if model.content == "text":
            return f"it writes no {model.video.token} for a video"
        shown = [model.message("user", VIDEO_PLACEHOLDER + USER, videos=0), messages[1]]
        written = model.render(shown)[0].count(model.video.token)
        if written != 1:
            return f"it writes {model.video.token} {written} times for one video"
    # A list that is written as such has its quotes around each text.
    if text.count(USER) != 1 or f"'{USER}'" in text:
        return "it does not write the user's text once"
    try:
        found = model.tokenize(messages, sizes=[_TRIED])
    except SampleError as error:
        return str(error.facts.get("problem", error.what))
    if model.stored.inline or isinstance(model.stored.family, PaliGemma):
        return ""
    bos, (text, _) = loaded.bos_token, model.expanded(text, [], [_TRIED])
    own = loaded(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
    ids = found.ids.tolist()
    mark = loaded.convert_tokens_to_ids(model.stored.family.image_token)
    if [mark if i == model.stored.placeholder else i for i in ids] != list(own):
        return "its text is tokenized otherwise by the tokenizers library"
    return ""


def _template(name: str, processor: Mapping[str, Any], loaded: Any) -> str:
    """Finds the chat template; of several the one that transformers' processors take."""
    older = (_document(name, "chat_template.json") or {}).get("chat_template")
    found = processor.get("chat_template") or older
    path = None if found else _file(name, "chat_template.jinja")
    if path is not None:
        return path.read_text(encoding="utf-8")
    found = found or getattr(loaded, "chat_template", None)
    if isinstance(found, Mapping):
        found = found.get("default")
    if not found:
        raise ConfigError("model_template", where=name, problem="there is none")
    return str(found)


def _document(name: str, file: str) -> dict[str, Any] | None:
    path = _file(name, file)
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("model_file", where=str(path), file=file) from error
    if not isinstance(document, dict):
        raise ConfigError("model_file", where=str(path), file=file)
    return document


def _file(name: str, file: str) -> Path | None:
    """Finds a file of a model, from the hub if need be; None where the model has none."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise ConfigError("model_file", where=name, file=file) from error
    return None if found is None else Path(found)
