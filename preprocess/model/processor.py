"""Processors of transformers, for models whose pictures only they can plan.

A processor is made from the model's files, with Pillow's image processor where it has one: the
numbers of tokens are the same. Which tokens it writes for pictures follows from their sizes alone,
so that they are computed once per size, from black pictures. What the loader relies on is proven
once, when a dataset is begun: the outputs of several pictures are those of each, one after the
other, and the model's types of tokens say which are of pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from shardspec.errors import ConfigError
from shardspec.families import (
    Processor,
    Size,
    packs_as_plain_decoder,
    refusal,
)

_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_NOT_SETTINGS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
_TRIED: tuple[Size, ...] = ((60, 90), (700, 333), (41, 120))
"""(height, width) of the pictures of the proof: of one tile and of several, wide and tall."""
_SMALL = 1 << 12
"""Values of an output that are kept; of larger ones the shape is."""


class RememberedImages:
    """An image processor that computes its outputs once for pictures of the same sizes."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self._known: dict[Any, Any] = {}
        self.options: dict[str, Any] = {}
        """What the processor passes."""

    def __getattr__(self, name: str) -> Any:
        if name == "_own":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._own, name)

    def __call__(self, images: Any, **options: Any) -> Any:
        self.options = options
        sizes = tuple(image.size for image in _flat(images))
        if sizes not in self._known:
            found = self._own(images, **options)
            self._known[sizes] = {name: _light(value) for name, value in found.items()}
        return dict(self._known[sizes])


def open_processor(name: str, config: Mapping[str, Any], images: Mapping[str, Any]) -> Any:
    """Makes the processor of a model, without what it has for videos and sound.

    Args:
      name: A folder or hub id.
      config, images: The documents config.json and preprocessor_config.json.

    Raises:
      ConfigError: `family_processor`.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import image_processing_auto, processing_auto

    of_images: Any = image_processing_auto
    of_processors: Any = processing_auto
    kind = str(config.get("model_type", ""))
    if problem := refusal(config):
        raise ConfigError("family_processor", where=name, problem=problem)
    try:
        own = _image_class(kind, images)
        image_processor = of_images.get_image_processor_class_from_name(
            f"{own}Pil"
        ) or of_images.get_image_processor_class_from_name(own)
        settings = {k: v for k, v in images.items() if k not in _NOT_SETTINGS}
        title = images.get("processor_class") or of_processors.PROCESSOR_MAPPING_NAMES.get(kind)
        known = of_processors.processor_class_from_name(str(title))
        if known is None or image_processor is None:
            raise ValueError(f"transformers has no processor for {kind or 'no model_type'}")
        # Without torchvision there is no class of video processors that None could be checked by.
        kept = {"check_argument_for_proper_class": lambda *_: None}
        made: Any = type(known.__name__, (known,), kept)
        parts = {
            "image_processor": image_processor(**settings),
            "tokenizer": AutoTokenizer.from_pretrained(name, trust_remote_code=False),
        }
        document, _ = known.get_processor_dict(name)
        arguments = [parts.get(part) for part in known.get_attributes()]
        processor = made.from_args_and_dict(arguments, document)
    except (ImportError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise ConfigError("family_processor", where=name, problem=problem) from error
    processor.image_processor = RememberedImages(processor.image_processor)
    return processor


def is_model_type(name: object) -> bool:
    """Returns True if transformers knows a processor for models of this `model_type`."""
    from transformers.models.auto import processing_auto

    known: Any = processing_auto
    return name in known.PROCESSOR_MAPPING_NAMES


def read_processor(
    name: str, processor: Any, config: Mapping[str, Any], images: Mapping[str, Any]
) -> Processor:
    """Describes a model by its processor, and proves what the loader relies on.

    Raises:
      ConfigError: `family_processor`.
    """
    kind = str(config.get("model_type", ""))
    marker = getattr(processor, "image_placeholder_token", getattr(processor, "image_token", ""))
    remembered: RememberedImages = processor.image_processor
    problem = "it does not say which token stands for a picture"
    if marker:
        noise = [_noise(size) for size in _TRIED]
        try:
            whole = run(processor, marker * len(noise), noise)
            options = {k: v for k, v in remembered.options.items() if v is not None}
            options.pop("return_tensors", None)
            *made, joint = [
                remembered._own([pictures], **options, return_tensors="np")
                for pictures in (*([picture] for picture in noise), noise)
            ]
            soft = _soft_token(processor)
            soft_id = processor.tokenizer.convert_tokens_to_ids(soft)
            problem = _difference(whole, joint, made, soft_id=soft_id)
            json.dumps(options)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            problem = str(error).strip().partition("\n")[0]
    if problem:
        raise ConfigError("family_processor", where=name, problem=problem)
    types = [key for key in _TEXT_KEYS[2:] if key in whole]
    return Processor(
        model_type=kind,
        image_processor=_image_class(kind, images),
        settings=_json({k: v for k, v in images.items() if k not in _NOT_SETTINGS}),
        options=_json(options),
        unused=tuple(sorted(made[0].keys() - whole.keys())),
        image_token=soft,
        marker=marker,
        type_ids=types[0] if types else "",
        packs=packs_as_plain_decoder(config),
    )


def run(processor: Any, text: str, images: Sequence[Any], *, special: bool = False) -> Any:
    """Runs a processor on one text: ids, offsets of characters and what was replaced."""
    return processor(
        text=[text],
        # The pictures of one sample: where there are several, it makes a difference to some.
        images=[list(images)] if images else None,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        return_tensors="np",
    )


def black(size: Size) -> Any:
    """Makes a picture of a size."""
    return Image.new("RGB", size[::-1])


def _noise(size: Size) -> Any:
    levels = np.random.RandomState(0).randint(0, 256, (*size, 3))
    return Image.fromarray(levels.astype(np.uint8))


def _difference(whole: Any, joint: Any, alone: Sequence[Any], *, soft_id: int) -> str:
    """Says in what the outputs of several pictures are not those of each, joined; "" if in none.

    Args:
      whole: What the processor makes of a text with all pictures.
      joint: What its image processor makes of them.
      alone: What that makes of each.
      soft_id: Of the token that features replace.
    """
    for key in _TEXT_KEYS[2:]:
        if key in whole and not np.array_equal(whole[key], whole["input_ids"] == soft_id):
            return f"its {key} are not 1 for pictures alone"
    ignored = (*_TEXT_KEYS, "offset_mapping", "text_replacement_offsets")
    for key in sorted(whole.keys() - set(ignored)):
        if any(key not in each or np.ndim(each[key]) < 1 for each in (joint, *alone)):
            return f"its {key} are not those of its image processor"
        if not np.array_equal(_stacked([each[key] for each in alone]), joint[key]):
            return f"its {key} of several pictures are not those of each, one after the other"
        if np.shape(whole[key]) != np.shape(joint[key]):
            return f"its {key} are not those of its image processor"
    return ""


def _stacked(arrays: Sequence[Any]) -> np.ndarray:
    """Joins arrays along the first axis, the smaller ones padded with zeros."""
    arrays = [np.asarray(array) for array in arrays]
    largest = [max(sides) for sides in zip(*(array.shape[1:] for array in arrays), strict=True)]
    out = np.zeros((sum(map(len, arrays)), *largest), arrays[0].dtype)
    done = 0
    for array in arrays:
        places = (slice(done, done + len(array)), *map(slice, array.shape[1:]))
        out[places] = array
        done += len(array)
    return out


def _soft_token(processor: Any) -> str:
    """Names the token that the features of a picture replace."""
    for attribute in ("image_token_id", "image_ids"):
        found = getattr(processor, attribute, None)
        if isinstance(found, int):
            return str(processor.tokenizer.convert_ids_to_tokens(found))
    return str(processor.image_token)


def _image_class(kind: str, images: Mapping[str, Any]) -> str:
    from transformers.models.auto import image_processing_auto

    of_images: Any = image_processing_auto
    known = of_images.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}
    found = images.get("image_processor_type") or known.get("torchvision") or known.get("pil")
    return str(found or "").removesuffix("Fast").removesuffix("Pil")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for part in images for one in _flat(part)]
    return [images]


def _light(value: Any) -> Any:
    """Keeps the shape of a large output, without its memory."""
    array = np.asarray(value) if not isinstance(value, list | tuple) else value
    if isinstance(array, np.ndarray) and array.size > _SMALL:
        return np.broadcast_to(array.dtype.type(0), array.shape)
    if isinstance(value, list) and value and np.size(value[0]) > _SMALL:
        return [_light(each) for each in value]
    return value
