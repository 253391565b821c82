"""Running an image processor of transformers on stored pictures, for models without a kernel here.

Its class, its arguments and what its model's processor passes are the dataset's. The outputs of
pictures are joined as the processor itself joins them: along their first axis, where smaller ones
are padded with zeros; this was proven for the model when the dataset was built.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from loader.assembly.families.kernels import Backend
from shardspec.errors import ConfigError
from shardspec.families import Processor


def processed(
    family: Processor, pictures: Sequence[np.ndarray], *, backend: Backend
) -> dict[str, torch.Tensor]:
    """Makes what a model takes besides its texts of the pictures of a sample.

    Args:
      family: The dataset's.
      pictures: uint8 [H, W, 3] each, one at least.
      backend: Which of the processor's two classes makes the values.

    Raises:
      ConfigError: `image_processor`, the class cannot be used here.
    """
    images = [Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures]
    _, options = family.arguments()
    found = _image_processor(family, backend)([images], return_tensors="pt", **options)
    return {name: value for name, value in found.items() if name not in family.unused}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins the outputs of several samples."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _joined([part[name] for part in parts if name in part]) for name in names}


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    largest = [max(sides) for sides in zip(*shapes, strict=True)]
    out = tensors[0].new_zeros((sum(map(len, tensors)), *largest))
    done = 0
    for tensor in tensors:
        places = (slice(done, done + len(tensor)), *map(slice, tensor.shape[1:]))
        out[places] = tensor
        done += len(tensor)
    return out


@functools.lru_cache(maxsize=8)
def _image_processor(family: Processor, backend: Backend) -> Any:
    try:
        from transformers.models.auto.image_processing_auto import (
            get_image_processor_class_from_name as class_of,
        )

        name = family.image_processor
        kind = class_of(f"{name}Pil") if backend == "pil" else class_of(name)
        settings, _ = family.arguments()
        if kind is not None:
            return kind(**settings)
        reason = "there is no such class"
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
    raise ConfigError(
        "image_processor", name=family.image_processor, backend=backend, reason=reason
    )
