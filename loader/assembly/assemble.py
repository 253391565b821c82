"""`assemble`: from a prepared sample to the arrays of a training example.

The online half of the pipeline. It needs no tokenizer and no formatter, and it does not know
whether the sample came out of a shard or straight from `prepare`.

It works in two steps: a `Planner` decides everything from the spans and the tokens alone (so
lengths are known without a pixel), then the arrays are made. A `Draft` is between the two: it
knows their shapes and writes each into the memory that it is given, such as that of the batch, so
that no array of a single sample is made on the way there. `assemble` has it write into new ones.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from loader.assembly.clip import prepared_clips
from loader.assembly.collate import finished
from loader.assembly.draft import Draft, describe_question
from loader.assembly.layout import TokenIds
from loader.assembly.planner import Planner
from loader.assembly.view import View
from loader.buffers import Scratch
from shardspec.errors import ConfigError
from shardspec.index import count_questions
from shardspec.sample import PreparedSample


def assemble(
    sample: PreparedSample,
    rng: np.random.RandomState,
    *,
    view: View,
    ids: TokenIds,
    question: int | None = None,
) -> dict[str, Any]:
    """Makes the example of one sample in one epoch.

    Args:
      sample: From a shard or from `prepare`.
      rng: The sample's generator for this epoch.
      view: What the run wants.
      ids: Special ids of the dataset's tokenizer.
      question: Number of the question that is asked, for evaluation: a sample with several gives
        one example for each, see `shardspec.index.count_questions`. None: the only one.

    Returns:
      input_ids, labels, position_ids, subsegment_ids: int64 [L]; loss_weights: float32 [L];
      images: uint8 or float32 [n, 3, S, S] or [n, patches, dim], n crops of all images;
      image_masks: float32 [n, patches]; image_input_idx: int64 [n] or [n, tokens per crop];
      token_pooling: int64 [image tokens, pool], with image_map "pooling"; image_end: int64 [n],
      one past the last token of the crop's image; metadata.

    Raises:
      SampleError: As `Planner.plan`, and as `render`.
      ConfigError: `question_number`: there is no such question, or several and none is named.
    """
    if question is None and view.purpose == "evaluation":
        count = count_questions(sample.spans)[view.questions == "all"]
        if count > 1:
            raise ConfigError("question_number.several", where=sample.key, questions=count)
    question = question or 0
    planner = _planner(view, ids)
    plan = planner.plan(sample.tokens, sample.spans, rng, key=sample.key, question=question)
    sources = [(image.require_pixels(), image.overview) for image in sample.images]
    clips = prepared_clips(sample)
    draft = Draft(plan, sources, clips=clips, view=view, key=sample.key, scratch=Scratch())
    if plan.asked is not None:
        draft.described = describe_question(plan, question, sample.record)
    return finished(draft)


@functools.lru_cache(maxsize=16)
def _planner(view: View, ids: TokenIds) -> Planner:
    return Planner(view, ids)
