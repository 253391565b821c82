"""OpenSplit: the samples of one dataset that a run uses, and what states say of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from loader.assembly import Questions
from loader.reading import Check, Network, ShardReader, StoredSample, open_dataset
from loader.state import keys_fingerprint, split_fingerprint
from loader.stream.subset import Keys, Subset, choose_subset
from shardspec.errors import ConfigError, ShardError
from shardspec.index import QUESTION_COLUMNS, count_questions
from shardspec.manifest import Manifest

logger = logging.getLogger(__name__)

_AT_ONCE = 16
"""Samples that are announced together."""

_DIGITS = 16  # as in `split_fingerprint`


@dataclass(frozen=True, kw_only=True)
class OpenSplit:
    """A split of a dataset, opened for reading."""

    url: str
    manifest: Manifest
    reader: ShardReader
    name: str
    """Of the split."""
    num_stored: int
    """Samples that ids count: those of the split, or the first `max_samples` of them."""
    subset: Subset | None = None
    """Those in use; None: all of these."""
    group: str = ""
    """What the samples in use have in common, if they are a group of the dataset's."""
    questions: Questions | None = None
    """Which questions of the samples are asked one by one; None: rows are samples."""

    @property
    def title(self) -> str:
        """Names the samples among the datasets of a mixture."""
        return self.manifest.dataset + (f"[{self.group}]" if self.group else "")

    @property
    def num_samples(self) -> int:
        """Samples in use: those of the subset, if there is one; in an evaluation, questions."""
        ids = self.ids_in_use
        return self.num_stored if ids is None else len(ids)

    @property
    def ids_in_use(self) -> np.ndarray | None:
        """int64 [num_samples], ids of the samples by their numbers; None: the numbers are ids."""
        if self.questions is not None:
            return self.asked[0]
        return None if self.subset is None else self.subset.ids

    @cached_property
    def asked(self) -> tuple[np.ndarray, np.ndarray]:
        """The questions of an evaluation in stored order: int64 [Q] sample ids, int32 [Q] numbers.

        Raises:
          ShardError: A sample or an index cannot be read.
        """
        assert self.questions is not None
        ids = np.arange(self.num_stored) if self.subset is None else self.subset.ids
        return list_questions(self.reader, ids, self.questions)

    def sample_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Gives the ids of samples in use by their numbers, 0 to `num_samples` - 1."""
        ids = self.ids_in_use
        return numbers if ids is None else ids[numbers]

    @property
    def mean_tokens(self) -> float:
        """Text tokens per sample: of the subset, or else of the whole split."""
        if self.subset is not None:
            return self.subset.mean_tokens
        split = self.manifest.splits[self.name]
        return split.num_tokens / max(1, split.num_samples)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What states say of the data: the sequence of samples, whatever the shards' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        return self._describe(self.subset, self.num_stored)

    def has_grown_from(self, saved: Mapping[str, Any]) -> bool:
        """Returns True if a fingerprint is that of this data before samples were appended.

        Of a subset, the samples that were there then must be chosen by the same condition, and be
        the same ones.
        """
        then = stored_in(saved)
        if not isinstance(then, int) or not 0 < then < self.num_stored:
            return False
        if self.subset is None:
            keys = keys_fingerprint(self.reader, then)
            return dict(saved) == {**self.fingerprint, "num_samples": then, "keys": keys}
        before = self.subset.before(then)
        return bool(len(before.ids)) and dict(saved) == self._describe(before, then)

    def _describe(self, subset: Subset | None, num_stored: int) -> dict[str, Any]:
        if subset is None:
            return split_fingerprint(
                self.manifest, self.reader, split=self.name, num_samples=num_stored
            )
        described = split_fingerprint(
            self.manifest,
            self.reader,
            split=self.name,
            num_samples=len(subset.ids),
            sample_ids=subset.ids,
        )
        # The seeds of draws follow from the ids and from the number of all samples.
        chosen = {"of": num_stored, "where": subset.where, "ids": subset.ids_sha256[:_DIGITS]}
        return {**described, "subset": chosen}


def stored_in(fingerprint: Mapping[str, Any]) -> Any:
    """Returns how many samples a dataset had, of all or a subset of which this is a fingerprint."""
    subset = fingerprint.get("subset")
    return subset.get("of") if isinstance(subset, Mapping) else fingerprint.get("num_samples")


def list_questions(
    reader: ShardReader, sample_ids: np.ndarray, which: Questions
) -> tuple[np.ndarray, np.ndarray]:
    """Lists the questions of samples, sample after sample; see `OpenSplit.asked`.

    Raises:
      ShardError: As `ShardReader.columns`; of indexes without the counts, as `ShardReader.stored`.
    """
    column = QUESTION_COLUMNS[which == "all"]
    try:
        counts = reader.column(column, sample_ids).astype(np.int64)
    except ShardError as error:
        if error.reason != "index_column":
            raise
        logger.warning(
            "the indexes of %s do not count questions: all %d samples are read for that now, in"
            " every process. Datasets that this release builds have the counts.",
            reader.url,
            len(sample_ids),
        )
        found = (count_questions(stored.spans) for stored in stored_in_order(reader, sample_ids))
        counts = np.array([pair[which == "all"] for pair in found], np.int64)
    if not counts.all():  # of a dataset for a model, by a release that did not evaluate those
        raise ShardError("index_column", where=reader.url, name=column)
    ends = np.cumsum(counts)
    numbers = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return np.repeat(sample_ids, counts), numbers.astype(np.int32)


def stored_in_order(reader: ShardReader, sample_ids: np.ndarray) -> Iterator[StoredSample]:
    """Reads samples one after the other; those in a store are fetched ahead.

    Not for a reader that a loader uses at the same time: both would announce their steps to it.

    Raises:
      ShardError, StorageError: As `ShardReader.stored`.
    """
    parts = [sample_ids[i : i + _AT_ONCE] for i in range(0, len(sample_ids), _AT_ONCE)]
    announced = 0
    for step, part in enumerate(parts):
        while announced < len(parts) and announced <= step + reader.ahead_steps:
            reader.prefetch(announced, parts[announced].tolist())
            announced += 1
        for sample_id in part.tolist():
            yield reader.stored(sample_id)
        reader.release(step)


def open_split(
    url: str,
    *,
    split: str,
    check: Check,
    cache: str | None,
    cache_bytes: int,
    network: Network | None,
    max_samples: int | None,
    where: str | None,
    keys: Keys | None,
) -> OpenSplit:
    """Reads the manifest of a dataset, and for a subset its indexes; see `StreamingDataset`.

    Raises:
      ManifestError: There is no readable manifest.
      ConfigError: `unknown_split`, `cache_bytes`, `cache_foreign`, `max_samples`, and as
        `choose_subset`.
      ShardError: A subset is asked for, and an index cannot be read.
      StorageError: The store does not answer.
    """
    manifest, reader = open_dataset(
        url, split=split, check=check, cache=cache, cache_bytes=cache_bytes, network=network
    )
    if max_samples is not None and not 1 <= max_samples <= len(reader):
        raise ConfigError(
            "max_samples",
            where=url,
            num_reader=len(reader),
            got=max_samples,
            samples=len(reader),
        )
    num_stored = len(reader) if max_samples is None else max_samples
    subset = None
    if num_stored and (where or keys is not None):
        subset = choose_subset(reader, num_samples=num_stored, where=where, keys=keys)
    return OpenSplit(
        url=url,
        manifest=manifest,
        reader=reader,
        name=split,
        num_stored=num_stored,
        subset=subset,
    )
