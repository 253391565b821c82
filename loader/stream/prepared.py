"""PreparedBuilder: from a sample as it is stored to an example, or to that of a substitute.

A sample is read, its texts and crops are drawn and laid out; its pictures stay compressed until
whoever collates the batch says where they are to be written (`PlannedExample`). A sample that
cannot be read, laid out or decoded raises, or is replaced by a substitute that is chosen by hash:
the same one on every rank and after every resume.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np

from loader.assembly import (
    Draft,
    ExamplePlan,
    ModelDraft,
    ModelPlan,
    ModelPlanner,
    Planner,
    TokenIds,
    View,
    describe_question,
    finished,
    finished_for_model,
    ocr_boxes,
)
from loader.buffers import Scratch
from loader.order import SampleRef
from loader.reading import Quarantine, StoredSample, is_of_one_sample, read_record
from loader.state import view_fingerprint
from loader.stream.options import require_used
from loader.stream.split import OpenSplit
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.families import Family, StoredModel, plan_pictures, same_tokens
from shardspec.features import FEATURES, StoredFeatures
from shardspec.keyed import SampleRng, dataset_seed, keyed, sample_seed
from shardspec.manifest import Manifest
from shardspec.tiling import ImageView
from shardspec.video import DEFAULT_LIMITS, ClipLimits

OnBad = Literal["raise", "substitute"]

MAX_SUBSTITUTES = 8
"""Substitutes tried for one slot: with one sample in two bad, 1 slot in 500 would still fail."""


_MAPPED = 0x6D6170  # keeps these seeds apart from the numbers of substitutes


@dataclass(slots=True, kw_only=True)
class PlannedExample:
    """An example whose arrays are not made yet, and what it took to get there."""

    draft: Draft | ModelDraft
    """It names the sample that it substitutes: `Quarantine.record`."""
    sample: int
    """Id of the sample that was read: the slot's own, or a substitute."""
    attempt: int = 0
    """0, or the number of the substitute."""
    read_s: float
    """Seconds of reading."""
    plan_s: float
    """Seconds of draws and layout."""
    num_bytes: int
    """Of the sample as it is stored."""


def stored_model(manifest: Manifest, *, where: str = "") -> StoredModel | None:
    """Reads for which model a dataset was built; None for models of the Molmo kind.

    Raises:
      ConfigError: `family_unknown`, `family_field`.
    """
    document = manifest.recipe.get("model")
    return None if document is None else StoredModel.from_dict(document, where=where)


def stored_features(manifest: Manifest, *, where: str = "") -> StoredFeatures | None:
    """Reads whose features a dataset has instead of pictures; None for one with pictures.

    Raises:
      ConfigError: `features_fields`.
    """
    document = manifest.recipe.get(FEATURES)
    return None if document is None else StoredFeatures.from_dict(document, where=where)


class PreparedBuilder:
    """Makes the examples of a dataset of prepared samples."""

    def __init__(
        self,
        data: OpenSplit,
        *,
        view: View,
        seed: int,
        on_bad: OnBad,
        max_bad_rate: float | None,
        clips: ClipLimits = DEFAULT_LIMITS,
    ) -> None:
        """Joins a split and what to see of its samples; see `StreamingDataset`."""
        self.data = data
        self.view = view
        self.ids = TokenIds.from_special_ids(data.manifest.tokenizer.special_ids)
        self.on_bad: OnBad = on_bad
        self._clips = clips
        self.quarantine = Quarantine(max_rate=max_bad_rate)
        """Samples substituted in this process; shared between copies."""
        self._record: bool | frozenset[str] = view.purpose == "evaluation"
        """Which fields of the samples' records their metadata have; True: all."""
        self._dataset: str | None = None
        """Name of the dataset that examples tell; None outside mixtures."""
        self._base_seed = dataset_seed(seed, data.manifest.dataset, data.name)
        self.model = stored_model(data.manifest, where=data.url)
        """The model that the dataset was built for; None for those of the Molmo kind."""
        self._planner = self._planner_of(view)
        self._rng = SampleRng()
        self._scratch = Scratch()

    def in_mixture(self, *, seed: int) -> PreparedBuilder:
        """Makes the builder of the same dataset in a mixture, whose seed is that of the run."""
        other = copy.copy(self)
        other._dataset = self.data.title
        # Not of the group's name: a sample draws the same whatever group it is taken for.
        other._base_seed = dataset_seed(seed, self.data.manifest.dataset, self.data.name)
        return other

    def with_sequence_length(self, sequence_length: int | None) -> PreparedBuilder:
        """Makes a builder whose examples are no longer than that; None leaves it as it is."""
        own = self.view.sequence_length
        differs = sequence_length is not None and own not in (None, sequence_length)
        require_used(
            {"View(sequence_length)": differs},
            f"beside the loader's sequence_length={sequence_length}",
            remedy="give both the same",
        )
        length = sequence_length or own
        other = copy.copy(self)
        other.view = replace(self.view, sequence_length=length)
        other._planner = self._planner_of(other.view)
        return other

    def _planner_of(self, view: View) -> Planner | ModelPlanner:
        if self.model is None or view.model is None:
            return Planner(view, self.ids)
        return ModelPlanner(
            self.model,
            view.model,
            limit=view.sequence_length,
            max_images=view.max_images,
            weight=view.weight,
            purpose=view.purpose,
            questions=view.questions,
        )

    def with_record(self, fields: bool | Sequence[str]) -> PreparedBuilder:
        """Makes a builder whose examples tell these fields of the record; True: all of them."""
        other = copy.copy(self)
        other._record = fields if isinstance(fields, bool) else frozenset(fields)
        return other

    def of_group(self, data: OpenSplit) -> PreparedBuilder:
        """Makes the builder of some of the samples in use."""
        other = copy.copy(self)
        other.data = data
        return other

    def view_fingerprint(self) -> dict[str, Any]:
        """Describes the view for states."""
        return view_fingerprint(self.view)

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state knows; they are substituted unread."""
        self.quarantine.restore(records)

    def example(self, ref: SampleRef) -> dict[str, Any]:
        """Makes the whole example of a slot; broken pictures are substituted if `on_bad` says so.

        Raises:
          ShardError, SampleError: As `plan_example`.
        """
        planned = self.plan_example(ref)
        while True:
            try:
                draft = planned.draft
                return finished(draft) if isinstance(draft, Draft) else finished_for_model(draft)
            except (SampleError, ShardError):
                planned = self.plan_example(ref, after_failed=planned)

    def plan_example(
        self, ref: SampleRef, *, after_failed: PlannedExample | None = None
    ) -> PlannedExample:
        """Plans the example of a slot; the collator makes its arrays.

        Args:
          ref: Of the order. Padding has nothing to learn.
          after_failed: What was planned for the slot before and turned out to have broken pictures:
            the next substitute is chosen.

        Raises:
          ShardError: The sample cannot be read, and is not to be substituted; or its shard or index
            is missing or damaged.
          SampleError: It cannot be laid out, likewise.
        """
        planned = self._planned(ref, after_failed=after_failed)
        planned.draft.dataset = self._dataset
        if not ref.real:
            planned.draft.plan.sequence.learns = False
            planned.draft.real = False
        return planned

    def map_seed(self, sample: int, epoch: int) -> int:
        """Seeds the generator of the user's function for a sample: not that of its own draws."""
        return keyed(self._base_seed, sample, epoch, _MAPPED) >> 32

    def lengths(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up how long samples are at most, in the indexes.

        Args:
          sample: int64 [n].

        Returns:
          (tokens, crops), int64 [n]: what the longest draws in this view have.

        Raises:
          ConfigError: `view_lengths`, the indexes have no lengths for this view.
          ShardError: `index_column`, or as `open_index`.
        """
        where, manifest = self.data.url, self.data.manifest
        if self.model is not None and self.view.model is not None:
            return self._model_lengths(sample, self.model, self.view.model.family)
        if self.view.tree == "molmo1":
            raise ConfigError("view_lengths.tree", where=where, tree=self.view.tree)
        stored = [ImageView.from_dict(v) for v in manifest.recipe["image"]["views"]]
        views = [self.view.image, *([self.view.high_res] if self.view.high_res else [])]
        missing = [view for view in views if view not in stored]
        if missing:
            raise ConfigError("view_lengths.view", where=where, view=missing[0].to_dict())
        video, frames = manifest.recipe.get("video"), self.view.frames
        if video is not None and frames is not None and min(frames.pool) < video["pool"]:
            raise ConfigError("view_lengths.frames", where=where, pool=frames.pool)
        columns = [stored.index(view) for view in views]
        tokens = self.data.reader.column("view_length", sample)[:, columns].max(axis=1)
        crops = self.data.reader.column("view_crops", sample)[:, columns].max(axis=1)
        return tokens.astype(np.int64), crops.astype(np.int64)

    def _model_lengths(
        self, sample: np.ndarray, model: StoredModel, family: Family
    ) -> tuple[np.ndarray, np.ndarray]:
        column = self.data.reader.column
        tokens = column("view_length", sample)[:, 0].astype(np.int64)
        visual = column("view_crops", sample)[:, 0].astype(np.int64)
        if same_tokens(family, model.family):
            return tokens, visual
        num_images = column("num_images", sample)
        # The one frame of a video has not the tokens of a picture.
        if num_images.max(initial=0) > 1 or self.data.manifest.recipe.get("video") is not None:
            raise ConfigError("view_lengths.pictures", where=self.data.url)
        sides = [column(name, sample).tolist() for name in ("height", "width")]
        own = [
            model.block_length(plan_pictures(family, [(height, width)])[0]) if height else 0
            for height, width in zip(*sides, strict=True)
        ]
        found = np.array(own, np.int64).reshape(len(sample))
        return tokens - visual + found, found

    def _planned(self, ref: SampleRef, *, after_failed: PlannedExample | None) -> PlannedExample:
        sample_id, epoch = ref.sample, ref.epoch
        first: dict[str, Any] | None = None
        failure: ShardsError | None = None
        start = 0
        if after_failed is None:
            self.quarantine.asked()
        else:
            failure = after_failed.draft.error
            assert failure is not None
            if self.on_bad == "raise" or not is_of_one_sample(failure):
                raise failure
            number = self._candidate(sample_id, epoch, after_failed.attempt)
            self._require_sound_shard(number, failure)
            broken = self._bad_record(number, failure, late=True)
            self.quarantine.add(broken, failure)
            first, start = after_failed.draft.substitutes or broken, after_failed.attempt + 1
        for attempt in range(start, 1 + MAX_SUBSTITUTES):
            number = self._candidate(sample_id, epoch, attempt)
            known = self.quarantine.record(number) if self.on_bad == "substitute" else None
            if known is None:
                try:
                    planned = self._draft(number, epoch, ref.question)
                except (SampleError, ShardError) as error:
                    if self.on_bad == "raise" or not is_of_one_sample(error):
                        raise
                    self._require_sound_shard(number, error)
                    failure = failure or error
                    known = self._bad_record(number, error)
                    self.quarantine.add(known, error)
                else:
                    planned.attempt, planned.draft.substitutes = attempt, first
                    return planned
            else:
                self.quarantine.add(known)
            first = first or known
        assert first is not None
        # Not the failure itself: its remedy may be to substitute.
        where = f"{first['shard']} sample {first['key']}"
        reason = first["reason"]
        if first["stage"] == "read":
            raise ShardError(
                "all_substitutes_bad.read", where=where, first_reason=reason
            ) from failure
        raise SampleError(
            "all_substitutes_bad.layout", where=where, first_reason=reason
        ) from failure

    def _require_sound_shard(self, number: int, error: ShardsError) -> None:
        """Raises where the shard of a damaged sample is damaged as a whole."""
        if error.reason == "sample_crc" and self.data.reader.is_shard_damaged(number):
            shard, _ = self.data.reader.name(number)
            raise ShardError("shard_damaged", where=shard) from error

    def _candidate(self, sample_id: int, epoch: int, attempt: int) -> int:
        """Gives the sample itself, and then its substitutes, which are samples in use too."""
        if not attempt:
            return sample_id
        number = keyed(self._base_seed, sample_id, epoch, attempt) % self.data.num_samples
        return int(self.data.sample_ids(np.array(number)))

    def _draft(self, number: int, epoch: int, question: int) -> PlannedExample:
        start_s = perf_counter()
        stored = self.data.reader.stored(number)
        read_s = perf_counter()
        seed = sample_seed(self._base_seed, idx=number, length=self.data.num_stored, epoch=epoch)
        rng = self._rng(seed)
        sources = list(zip(stored.pictures, stored.overviews, strict=True))
        draft: Draft | ModelDraft
        plan: ExamplePlan | ModelPlan
        if isinstance(self._planner, Planner):
            plan = self._planner.plan(
                stored.tokens, stored.spans, rng, key=stored.key, question=question
            )
            draft = Draft(
                plan,
                sources,
                clips=stored.clips,
                limits=self._clips,
                view=self.view,
                key=stored.key,
                scratch=self._scratch,
            )
        else:
            assert self.model is not None
            assert self.view.model is not None
            plan = self._model_plan(stored, rng, question)
            draft = ModelDraft(
                plan,
                sources,
                clips=stored.clips,
                limits=self._clips,
                view=self.view.model,
                stored=self.model,
                key=stored.key,
                scratch=self._scratch,
                features=self.view.features,
            )
        if self._record or plan.asked is not None:
            draft.described = self._describe(stored, plan, number, question)
        return PlannedExample(
            draft=draft,
            sample=number,
            read_s=read_s - start_s,
            plan_s=perf_counter() - read_s,
            num_bytes=stored.num_bytes,
        )

    def describe_sample(self, stored: StoredSample, number: int, question: int) -> dict[str, Any]:
        """Tells what the metadata of a question of a sample do.

        Raises:
          ShardError: As `read_record`.
          SampleError: The question cannot be laid out.
        """
        plan: ExamplePlan | ModelPlan
        if isinstance(self._planner, Planner):
            plan = self._planner.plan(
                stored.tokens, stored.spans, self._rng(0), key=stored.key, question=question
            )
        else:
            plan = self._model_plan(stored, self._rng(0), question)
        images = [{"width": width, "height": height} for width, height in plan.sizes]
        described = self.with_record(True)._describe(stored, plan, number, question)
        return {"key": stored.key, **described, "images": images}

    def _model_plan(
        self, stored: StoredSample, rng: np.random.RandomState, question: int
    ) -> ModelPlan:
        assert isinstance(self._planner, ModelPlanner)
        num_messages = 1
        if self.view.purpose == "evaluation":
            num_messages = len(read_record(stored).get("message_list") or [()])
        return self._planner.plan(
            stored.tokens,
            stored.spans,
            rng,
            key=stored.key,
            question=question,
            num_messages=num_messages,
        )

    def _describe(
        self, stored: StoredSample, plan: ExamplePlan | ModelPlan, number: int, question: int
    ) -> dict[str, Any]:
        record = read_record(stored) if self._record else None
        described = describe_question(plan, question, record)
        if plan.asked is not None:
            described["sample"] = number
        if "record" in described and isinstance(plan, ExamplePlan):
            pages = described["record"].get("ocr")
            boxes = ocr_boxes(pages, sizes=plan.sizes, view=plan.view)
            described["record"] |= {"ocr_boxes": boxes} if boxes is not None else {}
        if not isinstance(self._record, bool):
            found = described["record"]
            described["record"] = {name: found.get(name) for name in sorted(self._record)}
        return described

    def _bad_record(self, number: int, error: ShardsError, *, late: bool = False) -> dict[str, Any]:
        shard, key = self.data.reader.name(number)
        # Which parts of a clip are read follows from the epoch's draws.
        is_part = late and error.reason == "sample_crc"
        stage = "read" if isinstance(error, ShardError) and not is_part else "layout"
        names = {"sample": number, "shard": shard, "key": key}
        return {**names, "stage": stage, "reason": error.reason}
