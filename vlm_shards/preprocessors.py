"""Images and texts by themselves: from pixels to a tensor, from messages to token ids.

Both show what the whole pipeline makes of a part of an example, by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loader import View
from loader.assembly import Planner, TokenIds, render_image
from preprocess.media import ImagePolicy
from preprocess.media import ImagePreprocessor as _StoredImage
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, Tokenizer
from shardspec.keyed import SampleRng
from shardspec.sample import Geometry


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessor:
    """Turns an image into what a vision encoder takes: resized, augmented, normalised, tiled.

    A picture in a view of single crops gives [3, S, S], as does the example of a sample with that
    picture alone; several crops give [n, 3, S, S].
    """

    view: View = field(default_factory=View)
    """What to see of it; its `augment` is off unless it is given, and `normalize` too."""
    policy: ImagePolicy | None = None
    """How it would be stored; None: for this view."""

    def __call__(
        self,
        image: np.ndarray | bytes | Path,
        rng: np.random.RandomState,
        *,
        geometry: Geometry = Geometry.ALL,
    ) -> torch.Tensor:
        """Makes the tensor of an image.

        Args:
          image: uint8 [H, W, 3], the bytes of a file, or its path.
          rng: Of the augmentation.
          geometry: Which augmentations may be applied.

        Raises:
          SampleError: As `preprocess.media.ImagePreprocessor`.
        """
        policy = self.policy or ImagePolicy(views=(self.view.image,))
        prepared = _StoredImage(policy)(image, geometry=geometry)
        crops = torch.from_numpy(render_image(prepared, rng, view=self.view))
        return crops[0] if len(crops) == 1 else crops


@dataclass(frozen=True, kw_only=True)
class InterleavedTextPreprocessor:
    """Turns messages into the ids of a sequence, with the symbols of images where they belong."""

    text: TextPolicy = field(default_factory=lambda: TextPolicy(system_prompt="none"))
    """Chat format, and all else about texts."""
    view: View = field(default_factory=View)
    """Its `sequence_length` cuts the text; its crops say how many symbols an image takes."""

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        image_sizes: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Makes the ids of a conversation.

        Args:
          messages: Of role and content. The placeholder `<image>` says where an image is; without
            placeholders all images come first.
          tokenizer: As `preprocess.text.load_tokenizer` makes it.
          image_sizes: (width, height) of each image, in pixels.

        Raises:
          SampleError: As `preprocess.recipe.Preparer` and `loader.assemble`.
        """
        recipe = Recipe(text=self.text, image=ImagePolicy(views=(self.view.image,)))
        prepare = Preparer(recipe=recipe, tokenizer=tokenizer)
        blank = [np.zeros((height, width, 3), np.uint8) for width, height in image_sizes]
        sample = prepare({"messages": list(messages), "image": blank})
        planner = Planner(
            replace(self.view, purpose="inference"),
            TokenIds.from_special_ids(tokenizer.special_ids),
        )
        plan = planner.plan(sample.tokens, sample.spans, SampleRng()(0), key=sample.key)
        ids: list[int] = np.concatenate(plan.sequence.pieces("input_ids")).tolist()
        return ids
