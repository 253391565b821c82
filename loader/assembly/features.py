"""Features in the place of pictures: what a backbone made of them is read instead.

No picture is decoded: the members of such a dataset are the arrays of `shardspec.features`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loader.assembly.pixels import Encoded
from shardspec.errors import ConfigError
from shardspec.features import FEATURES, StoredFeatures

IMAGE_FEATURES = "image_features"
"""Their name in examples and batches."""


def write_features(
    sources: Sequence[tuple[object, object]],
    counts: Sequence[int],
    stored: StoredFeatures,
    out: np.ndarray,
) -> None:
    """Reads the features of some images.

    Args:
      sources: Of a draft: each image, and nothing.
      counts: Rows of each.
      stored: What the dataset says of them.
      out: [rows of all, *row_shape] to be filled.

    Raises:
      ShardError: As `StoredFeatures.decode`.
      ConfigError: `features_view`: an image is a picture.
    """
    done = 0
    for (source, _), count in zip(sources, counts, strict=True):
        if not isinstance(source, Encoded) or source.codec != FEATURES:
            raise ConfigError("features_view.pictures")
        stored.decode(source.payload, out=out[done : done + count], where=source.where)
        done += count


def as_tensor(array: np.ndarray, stored: StoredFeatures) -> torch.Tensor:
    """Makes the tensor of features, which shares their memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if stored.dtype == "bfloat16" else tensor
