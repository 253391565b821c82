"""The unsharded path for a model: what people debug with, and what shards are compared to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from loader.assembly.clip import prepared_clips
from loader.assembly.families.collate import finished_for_model
from loader.assembly.families.example import ModelDraft, ModelPlanner, ModelView, Purpose
from loader.buffers import Scratch
from shardspec.families import StoredModel
from shardspec.sample import PreparedSample


def assemble_for_model(
    sample: PreparedSample,
    rng: np.random.RandomState,
    *,
    stored: StoredModel,
    view: ModelView,
    purpose: Purpose = "train",
) -> dict[str, Any]:
    """Makes the example of one sample in one epoch.

    Args:
      sample: From a shard or from `prepare`.
      rng: The sample's generator for this epoch.
      stored: The model that it was prepared for.
      view: What the run wants.
      purpose: "inference" takes the first conversation.

    Raises:
      SampleError: As `ModelPlanner.plan`.
    """
    planner = ModelPlanner(stored, view, limit=None, max_images=None, weight=1.0, purpose=purpose)
    plan = planner.plan(sample.tokens, sample.spans, rng, key=sample.key)
    sources = [(image.require_pixels(), None) for image in sample.images]
    clips = prepared_clips(sample)
    draft = ModelDraft(
        plan, sources, clips=clips, view=view, stored=stored, key=sample.key, scratch=Scratch()
    )
    return finished_for_model(draft)


class ModelPreprocessor:
    """Turns a raw example into a training example for a model: prepare, then assemble."""

    def __init__(
        self,
        prepare: Callable[[Mapping[str, Any]], PreparedSample],
        *,
        stored: StoredModel,
        view: ModelView | None = None,
    ) -> None:
        """Joins the two halves.

        Args:
          prepare: The offline half, of the same model.
          stored: The model.
          view: What to see of the sample; None for the model's own family.
        """
        self.prepare, self.stored = prepare, stored
        self.view = view or ModelView(family=stored.family)

    def __call__(self, example: Mapping[str, Any], rng: np.random.RandomState) -> dict[str, Any]:
        """Makes the example that `assemble_for_model` describes.

        Raises:
          SampleError: The example cannot be prepared or laid out.
        """
        return assemble_for_model(self.prepare(example), rng, stored=self.stored, view=self.view)
