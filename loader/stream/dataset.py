"""StreamingDataset: the prepared samples of a dataset, in the order of the run, as examples."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset

from loader.assembly import Backend, ModelView, View
from loader.order import Locality, SampleRef, Tail
from loader.reading import Check, Network
from loader.state import Allowed
from loader.stream.options import (
    CACHE_BYTES,
    StreamOptions,
    is_rate,
    name_argument,
    require_argument,
    require_used,
)
from loader.stream.prepared import OnBad, PreparedBuilder, stored_features, stored_model
from loader.stream.stream import Stream
from loader.stream.subset import Keys
from shardspec.errors import ConfigError
from shardspec.families import StoredModel, family_from_dict, family_to_dict
from shardspec.features import StoredFeatures
from shardspec.manifest import Manifest, require_manifest
from shardspec.probe import TrainingTokenizer, check_tokenizer
from shardspec.tiling import FrameView, ImageView, canvas_size, stored_size
from shardspec.video import ClipLimits

_NAMES_LENGTH = "style_and_length"
"""How the names begin of system prompts with a hint of the answer's length."""

logger = logging.getLogger(__name__)

_PROBE_SIZES = (
    (4000, 3000),
    (3000, 4000),
    (4000, 4000),
    (6000, 1000),
    (1000, 6000),
    (8000, 200),
    (200, 8000),
)
"""Source sizes (width, height) on which a view is compared with the stored bound."""


class StreamingDataset(IterableDataset[dict[str, Any]]):
    """Streams a split of a dataset built by `make shards`."""

    def __init__(
        self,
        url: str,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int | None = None,
        view: View | None = None,
        shuffle: bool = True,
        tail: Tail = "wrap",
        rank: int | None = None,
        world_size: int | None = None,
        check: Check = "crc",
        on_bad: OnBad = "raise",
        max_bad_rate: float | None = None,
        cache: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        network: Network | None = None,
        clips: ClipLimits | None = None,
        tokenizer: TrainingTokenizer | None = None,
        canonical_ranks: int | None = None,
        active_blocks: int | None = None,
        block_size: int | None = None,
        locality: Locality = "any",
        max_samples: int | None = None,
        where: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Reads the manifest, and for a subset or an evaluation the indexes; opens no shard yet.

        Args:
          url: Folder of the dataset, or its URL in an object store (s3://, gs://, ...).
          split: Split to stream.
          seed: Of the order and of every draw; with the names of dataset and split it makes the
            base seed.
          batch_size: Samples per batch of this rank, the same as the DataLoader's. Needed with
            more than one worker; without it batches have one sample as far as the order goes.
          view: What to see of the samples; None takes the view that the shards were made for. One
            for evaluation gives a row per question, and needs tail "pad" (docs/evaluation.md).
          shuffle: False gives the stored order.
          tail: How an epoch ends: "wrap" (the next one begins inside the batch; nothing is dropped
            or repeated), "drop_last", or "pad" (evaluation: every sample once, and what fills the
            last batch has labels -100 throughout).
          rank: In the data-parallel group; by default that of torch.distributed or of the
            environment.
          world_size: Of the data-parallel group; as `rank`.
          check: "crc" compares each sample's checksum as it is read. "size" only compares the
            lengths of local tars; samples of remote ones are always verified, and so are indexes.
          on_bad: What a sample that cannot be read or laid out does: it raises, or another sample,
            chosen by hash, takes its slot, which `metadata["substitutes"]` and `bad` record. A
            store that does not answer is not a bad sample, and neither is a shard or an index that
            is missing or damaged: these always raise.
          max_bad_rate: With on_bad "substitute": share of bad samples, counted per process, above
            which to stop after all; None: never.
          cache: Folder on the node's disk, shared by its ranks and workers, that keeps what was
            fetched of a remote dataset; None: only memory. Best a fast disk with room for the
            node's share of the data.
          cache_bytes: Most bytes in the cache.
          network: How remote shards are read.
          clips: What decoding stored clips may take.
          tokenizer: The run's Hugging Face tokenizer, to be compared with the shards'.
          canonical_ranks: See `plan_order`; set it where the default does not suit the numbers of
            ranks that the run may have. It cannot change during a run.
          active_blocks: See `plan_order`.
          block_size: See `plan_order`; 1 is a global shuffle, for data that is read sample by
            sample.
          locality: "node" lets a node read the same samples in every epoch, so that a `cache` with
            room for its share fetches each once; see `OrderConfig`.
          max_samples: Use only this many samples, the first ones: continues a run whose dataset has
            grown since. A subset is chosen among them.
          where: Use only the samples that fulfil this condition on columns of the indexes or on
            added ones (`make annotate`), for example
            "num_tokens < 2048 and width >= 336": those that `make filter WHERE=` keeps, in the
            same order as of that dataset, but nothing is written. Draws (variants, augmentation)
            are those of the whole dataset: a sample looks the same in a subset as without one.
            States are refused where another condition, or another choice, is in use. All indexes
            are read now, in every process that makes the dataset: of a remote one some 130 bytes
            per sample are fetched, once per node with `cache`. The ids of the samples in use take
            8 bytes each.
          keys: Use only the samples of these keys, of those that `where` keeps: strings, or the
            path or URL of a text file with one key per line, as of `make filter KEYS=`. Keys that
            no sample has are counted in a warning.

        Raises:
          ManifestError: There is no readable manifest.
          ConfigError: `argument`, a value of another type or range; `unknown_split`, `view_bound`,
            `tokenizer_mismatch`, `topology`, `cache_bytes`, `cache_foreign`, `raw_dataset`,
            `max_samples`, `filter_expression`, `keys_file`, `keys_type`; `empty_result`, the subset
            has no samples; `evaluation`, an argument that would repeat or leave out questions.
          ShardError: With `where` or `keys`: an index cannot be read.
          StorageError: The store does not answer.
        """
        super().__init__()
        options = StreamOptions(
            url=url,
            split=split,
            seed=seed,
            batch_size=batch_size,
            shuffle=shuffle,
            tail=tail,
            rank=rank,
            world_size=world_size,
            check=check,
            cache=cache,
            cache_bytes=cache_bytes,
            network=network,
            canonical_ranks=canonical_ranks,
            active_blocks=active_blocks,
            block_size=block_size,
            locality=locality,
            max_samples=max_samples,
            where=where,
            keys=keys,
        )
        name_argument("on_bad", on_bad, OnBad)
        fits = max_bad_rate is None or (is_rate(max_bad_rate) and max_bad_rate <= 1)
        require_argument(fits, "max_bad_rate", max_bad_rate, "a number from 0 to 1, or None")
        if on_bad == "raise":
            require_used(
                {"max_bad_rate": max_bad_rate is not None},
                'with on_bad="raise"',
                remedy='use on_bad="substitute"',
            )
        fits = clips is None or isinstance(clips, ClipLimits)
        require_argument(fits, "clips", clips, "ClipLimits or None")
        require_argument(view is None or isinstance(view, View), "view", view, "a View or None")
        fits = tokenizer is None or callable(getattr(tokenizer, "encode", None))
        fits = fits and not isinstance(tokenizer, str)
        require_argument(fits, "tokenizer", tokenizer, "a tokenizer or None")
        data = options.open()
        url = data.url
        if data.manifest.raw:
            raise ConfigError("raw_dataset", where=url)
        model = stored_model(data.manifest, where=url)
        features = stored_features(data.manifest, where=url)
        if features is not None or (view is not None and view.features is not None):
            view = features_view(features, view, where=url)
        if model is None:
            if view is not None and view.model is not None:
                raise ConfigError("model_view.unbuilt", where=url)
            view = view or View(image=stored_view(data.manifest))
            if view.frames is None:
                view = replace(view, frames=stored_frames(data.manifest))
            for image in filter(None, (view.image, view.high_res)):
                check_view(data.manifest, image, where=url)
        else:
            view = view or View()
            if view.model is None:
                view = replace(view, model=ModelView(family=model.family))
            check_model_view(model, view, where=url)
        if view.purpose == "evaluation":
            for name, value, wanted in (("tail", tail, "pad"), ("on_bad", on_bad, "raise")):
                if value != wanted:
                    raise ConfigError("evaluation", where=url, name=name, got=value, wanted=wanted)
            data = replace(data, questions=view.questions)
        if tokenizer is not None:
            check_tokenizer(data.manifest.tokenizer, tokenizer, where=url)
        builder = PreparedBuilder(
            data,
            view=view,
            seed=options.seed,
            on_bad=on_bad,
            max_bad_rate=max_bad_rate,
            clips=clips or ClipLimits(),
        )
        self._use(options.stream(data, builder))
        prompt = str((data.manifest.recipe.get("text") or {}).get("system_prompt"))
        names_length = view.purpose == "evaluation" and prompt.startswith(_NAMES_LENGTH)
        if names_length and self._stream.topology.rank == 0:
            logger.warning(
                "prompts of %s may name the length of the answer: the shards were built with"
                " SYSTEM_PROMPT=%s; build those of an evaluation with SYSTEM_PROMPT=style",
                url,
                prompt,
            )

    def _use(self, stream: Stream[PreparedBuilder]) -> None:
        (part,) = stream.parts
        self._stream = stream
        """What the loader and mixtures drive."""
        self.manifest: Manifest = part.data.manifest
        self.reader = part.data.reader
        """Reads single samples, and counts what was fetched over the network."""
        self.num_samples = part.data.num_samples
        """Samples in use: those of the split, of its first `max_samples`, or of the subset; with a
        view for evaluation, their questions."""
        self.ids = part.builder.ids
        self.view = part.builder.view

    def _resized(self, global_batch: int, *, sequence_length: int | None) -> StreamingDataset:
        """Makes a dataset that shares what is open, at another batch size or sequence length."""
        (part,) = self._stream.parts
        part = replace(part, builder=part.builder.with_sequence_length(sequence_length))
        return self._over(self._stream.resized([part], global_batch_size=global_batch))

    def _over(self, stream: Stream[PreparedBuilder]) -> StreamingDataset:
        other = copy.copy(self)
        other._use(stream)
        return other

    @property
    def bad(self) -> Counter[str]:
        """Samples substituted in this process, by reason."""
        return self._stream.parts[0].builder.quarantine.counts

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives."""
        return self._stream.cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass, as DistributedSampler's method does."""
        self._stream.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run, for resuming under a plain DataLoader.

        Args:
          step: Batches that the run has taken so far, over all epochs. The pass ends with that
            step's epoch; `set_epoch` chooses the next one.
        """
        self._stream.set_step(step)

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return len(self._stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives this worker's share of the current epoch."""
        return iter(self._stream)

    def example(self, sample_id: int, *, epoch: int = 0, question: int = 0) -> dict[str, Any]:
        """Makes the example of one sample in one epoch, the same in every process.

        Args:
          sample_id: Number in stored order, among all samples of the split.
          epoch: Of the draws.
          question: With a view for evaluation: the number of the question that is asked.

        Raises:
          ShardError: The sample cannot be read; see `ShardReader.read`.
          SampleError: It cannot be laid out; see `assemble`.
        """
        ref = SampleRef(0, epoch, sample_id, question=question)
        return self._stream.parts[0].builder.example(ref)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data, as states do: the sequence of samples, whatever the shards' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        return self._stream.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """Describes how far this process is in its pass, for torchdata's StatefulDataLoader."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Restores what `state_dict` gave, for the next pass.

        Args:
          state: A state of this rank and worker.
          allow: ("view",) takes a state that was saved with another view.

        Raises:
          StateError, ConfigError: As `require_state`.
        """
        self._stream.load_state_dict(state, allow=allow)


def stored_view(manifest: Manifest) -> ImageView:
    """Gives the view that a dataset's images were stored for."""
    return ImageView.from_dict(manifest.recipe["image"]["views"][0])


def stored_frames(manifest: Manifest) -> FrameView | None:
    """Gives the view that the frames of a dataset's videos were stored for; None without videos."""
    video = manifest.recipe.get("video")
    return None if video is None else FrameView(pool=(video["pool"], video["pool"]))


def features_view(features: StoredFeatures | None, view: View | None, *, where: str) -> View:
    """Gives the view of a dataset of features.

    Args:
      features: The dataset's.
      view: What is asked for; None: what the features were made of.
      where: URL of the dataset.

    Raises:
      ConfigError: `features_view`: the dataset has no features, or those of other pictures or of
        another backbone.
    """
    if features is None:
        raise ConfigError("features_view.none", where=where)
    if view is None:
        return View(features=features)
    if view.features is not None and view.features != features:
        ours, theirs = view.features.to_dict(), features.to_dict()
        wrong = {
            n: f"{ours[n]} asked for, {theirs[n]} stored" for n in ours if ours[n] != theirs[n]
        }
        raise ConfigError("features_view.fields", where=where, facts=wrong)
    if view.features is None and features.image is not None and view.image != features.image:
        wrong = {"image": f"{view.image} asked for, {features.image} stored"}
        raise ConfigError("features_view.fields", where=where, facts=wrong)
    return replace(view, features=features)


def model_view(url: str, *, backend: Backend = "torchvision", **changes: Any) -> ModelView:
    """Makes the view of a dataset that was built for a model, for `View(model=...)`.

    Args:
      url: Folder or URL of the dataset.
      backend: Whose values pictures have: those of transformers' default processors, which resize
        with torchvision, or of the others, which resize with Pillow.
      changes: Fields of the family to change, such as max_pixels=500_000; no more than was stored.

    Raises:
      ConfigError: `model_view`, the dataset was not built for a model, or has no such field.
    """
    model = stored_model(require_manifest(url), where=url)
    if model is None:
        raise ConfigError("model_view.unbuilt", where=url)
    document = {**family_to_dict(model.family), **changes}
    return ModelView(family=family_from_dict(document, where=url), backend=backend)


def check_model_view(model: StoredModel, view: View, *, where: str) -> None:
    """Refuses a view that requests pictures that were not stored.

    Raises:
      ConfigError: `model_view.bound`.
    """
    assert view.model is not None
    if wrong := view.model.family.unlike(model.family):
        raise ConfigError("model_view.bound", where=where, facts=wrong)


def check_view(manifest: Manifest, view: ImageView, *, where: str) -> None:
    """Refuses a view that asks for more pixels than were stored.

    Raises:
      ConfigError: `view_bound`.
    """
    image = manifest.recipe["image"]
    views = [ImageView.from_dict(stored) for stored in image["views"]]
    if view in views:
        return
    for width, height in _PROBE_SIZES:
        if image["max_side_px"]:
            # It bounds the longer side; the other one is whatever the picture's shape leaves.
            have = (image["max_side_px"], image["max_side_px"])
        else:
            have = stored_size(width, height, views, headroom=image["headroom"])
        want = canvas_size(width, height, view)
        # No side is ever stored larger than the source's: views enlarge such pictures at load.
        if min(want[0], width) > have[0] or min(want[1], height) > have[1]:
            raise ConfigError(
                "view_bound", where=where, source=f"{width}x{height}", stored=have, wanted=want
            )
