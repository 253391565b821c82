"""The unsharded path: a dataset, prepared and assembled on the fly. What people debug with.

`MolmoPreprocessor` is assemble after prepare; the offline half comes in as an argument, so this
package never imports it. `DeterministicDataset` gives each item the sample generator of its
epoch. With a lossless codec the examples equal, bit for bit, the ones that shards give for the
same seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from loader.assembly.assemble import assemble
from loader.assembly.layout import TokenIds
from loader.assembly.view import View
from shardspec.index import count_questions
from shardspec.keyed import SampleRng, sample_seed
from shardspec.sample import WEIGHT_ONE, PreparedImage, PreparedSample, spans_table, video_rows
from shardspec.tiling import FrameView, ImageTokenIds


class ExampleSource(Protocol):
    """A numbered collection of raw examples, such as `preprocess.get_dataset` opens."""

    def __len__(self) -> int:
        """Counts the examples."""

    def get(self, item: int, rng: np.random.RandomState) -> Mapping[str, Any]:
        """Makes raw example `item`."""


Prepare = Callable[[Mapping[str, Any]], PreparedSample]
"""The offline half: `preprocess.recipe.Preparer`, or anything that makes a PreparedSample."""

Preprocess = Callable[[Mapping[str, Any], np.random.RandomState], dict[str, Any]]


class MolmoPreprocessor:
    """Turns a raw example into a training example: prepare, then assemble."""

    def __init__(
        self, prepare: Prepare, *, special_ids: Mapping[str, int], view: View | None = None
    ) -> None:
        """Joins the two halves.

        Args:
          prepare: The offline half.
          special_ids: bos, eos, pad and image symbols of the tokenizer that `prepare` uses.
          view: What to see of the sample; None for single crops of 336 px. Where it does not say
            how the frames of videos are seen, `prepare.frame_view` does, if there is one, as the
            manifest does for shards.
        """
        self.prepare = prepare
        self.ids = TokenIds.from_special_ids(special_ids)
        self.view = view or View()
        frames = getattr(prepare, "frame_view", None)
        # Not for pictures alone: what a view says of frames is in the shapes of their examples.
        self._with_frames = self.view
        if self.view.frames is None and isinstance(frames, FrameView):
            self._with_frames = replace(self.view, frames=frames)

    def _view(self, sample: PreparedSample) -> View:
        return self._with_frames if len(video_rows(sample.spans)) else self.view

    def __call__(
        self, example: Mapping[str, Any], rng: np.random.RandomState, *, question: int | None = None
    ) -> dict[str, Any]:
        """Makes the example that `loader.assembly.assemble.assemble` describes.

        Args:
          example: Raw.
          rng: The sample's generator for this epoch.
          question: With a view for evaluation: the number of the question that is asked; None: the
            only one. `questions` asks all.

        Raises:
          SampleError: The example cannot be prepared or laid out.
          ConfigError: `question_number`: there is no such question, or several and none is named.
        """
        sample = self.prepare(example)
        return assemble(sample, rng, view=self._view(sample), ids=self.ids, question=question)

    def questions(
        self, example: Mapping[str, Any], rng: np.random.RandomState | None = None
    ) -> list[dict[str, Any]]:
        """Makes an example for each question of a raw example, whatever the view's purpose.

        Args:
          example: Raw.
          rng: Unused: an evaluation draws nothing.

        Raises:
          SampleError: The example cannot be prepared or laid out.
        """
        sample = self.prepare(example)
        view = replace(self._view(sample), purpose="evaluation")
        branches, turns = count_questions(sample.spans)
        count = turns if view.questions == "all" else branches
        rng = rng or np.random.RandomState(0)
        return [
            assemble(sample, rng, view=view, ids=self.ids, question=number)
            for number in range(count)
        ]


def render_image(image: PreparedImage, rng: np.random.RandomState, *, view: View) -> np.ndarray:
    """Makes the crops of one picture, as the example of a sample with that picture alone has them.

    Args:
      image: As the offline half prepares it.
      rng: Of the augmentation; what is not augmented draws nothing.
      view: What to see of it.

    Returns:
      `images` of `assemble`: [n, 3, S, S] or [n, patches, dim].
    """
    spans = spans_table([_SHORT_TEXT], [image])
    example = assemble(
        PreparedSample(
            key="", tokens=np.zeros(2, np.int32), spans=spans, images=(image,), record={}
        ),
        rng,
        view=view,
        ids=_ANY_IDS,
    )
    images: np.ndarray = example["images"]
    return images


_SHORT_TEXT = (0, 0, 0, 1, 1, 2, WEIGHT_ONE)
"""The row of a text of two tokens, which a sequence cannot be without."""

_ANY_IDS = TokenIds(
    bos=-1,
    eos=1,
    pad=2,
    image=ImageTokenIds(im_start=3, im_end=4, im_patch=5, im_col=6, low_res_im_start=7),
)


class DeterministicDataset(Dataset[dict[str, Any]]):
    """A map-style torch dataset whose draws depend on (seed, item, epoch) and on nothing else."""

    def __init__(
        self,
        dataset: ExampleSource,
        preprocessor: Preprocess | None = None,
        *,
        seed: int = 0,
        n_pad: int = 0,
    ) -> None:
        """Wraps a dataset.

        Args:
          dataset: Raw examples.
          preprocessor: Such as `MolmoPreprocessor`; None gives the raw examples.
          seed: Base seed; `shardspec.keyed.dataset_seed` derives one per dataset of a mixture.
          n_pad: Items past the end, so that every rank of an evaluation has equally many: they
            are item 0 with metadata["valid"] False.
        """
        self.dataset = dataset
        self.preprocessor = preprocessor
        self.seed = seed
        self.n_pad = n_pad
        # In shared memory, so that workers that outlive a pass see the epoch of the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._rng = SampleRng()

    @property
    def epoch(self) -> int:
        """The epoch whose draws `[idx]` gives."""
        return int(self._epoch.item())

    def __len__(self) -> int:
        return len(self.dataset) + self.n_pad

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.get(idx, epoch=self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose draws `[idx]` gives."""
        self._epoch.fill_(epoch)

    def get(self, idx: int, epoch: int = 0) -> dict[str, Any]:
        """Makes item `idx` of an epoch: the same on every machine, rank and worker."""
        if not 0 <= idx < len(self):
            raise IndexError(f"item {idx} of {len(self)}")
        valid = idx < len(self.dataset)
        item = idx if valid else 0
        seed = sample_seed(self.seed, idx=item, length=len(self.dataset), epoch=epoch)
        example = self.example(item, self._rng(seed))
        return {**example, "metadata": {**(example.get("metadata") or {}), "valid": valid}}

    def example(self, item: int, rng: np.random.RandomState) -> Mapping[str, Any]:
        """Makes an example with a generator: the dataset and the preprocessor draw the same."""
        start = rng.get_state(legacy=False)
        example = self.dataset.get(item, rng)
        if self.preprocessor is None:
            return example
        rng.set_state(start)
        return self.preprocessor(example, rng)

    def preload(self) -> None:
        """Reads the wrapped dataset into memory, if it can be."""
        preload = getattr(self.dataset, "preload", None)
        if preload is not None:
            preload()
