"""PipelineConfig: the settings of both halves, and what they make: preprocessors and collators.

The unsharded path and shards that are built with the same settings give the same batches, so a
config says what `make shards` is to be called with, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from loader import MMCollator, MolmoPreprocessor, View
from loader.assembly import view_collator
from preprocess.datasets import DatasetBase
from preprocess.datasets import get_dataset as _open_dataset
from preprocess.fetch import BlobCache, FetchPolicy, Ledger
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import EMBEDDED, Tokenizer, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.keyed import hash_text


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What a model wants of its data."""

    tokenizer: str = EMBEDDED
    """Hub id, folder with tokenizer.json, or "embedded"."""
    recipe: Recipe = field(default_factory=Recipe)
    """How texts are formatted and images stored: the settings of `make shards`. An image policy
    that is left at its default is that of the view."""
    view: View | None = None
    """Crops, augmentation, sequence length; None: the recipe's first view, without augmentation."""
    cache: str = "~/.cache/vlm-shards"
    """Folder that downloaded images are kept in; that of `make shards` by default."""
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    """Limits and manners of downloads."""

    @functools.cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The loaded tokenizer."""
        return load_tokenizer(self.tokenizer, policy=self.recipe.text)

    def build_preprocessor(
        self, *, for_inference: bool = False, is_training: bool = True
    ) -> MolmoPreprocessor:
        """Makes what turns raw examples into training examples.

        Args:
          for_inference: Give prompts without their answers, to generate from, as `View` does for
            evaluation. An example with several questions gives them by `questions(example)`.
          is_training: Draw variants, crops and colours; otherwise the first variant of each turn,
            in stored order, and no augmentation.

        Raises:
          ConfigError: `argument`: both are True; as `load_tokenizer`.
        """
        if for_inference and is_training:
            raise ConfigError("argument", name="is_training", got="True", wanted="False")
        purpose: Literal["train", "inference", "evaluation"]
        purpose = "train" if is_training else "evaluation" if for_inference else "inference"
        return MolmoPreprocessor(
            Preparer(
                recipe=self.stored_recipe,
                tokenizer=self.text_tokenizer,
                read_url=_Downloads(self.cache, self.fetch),
            ),
            special_ids=self.text_tokenizer.special_ids,
            view=replace(self.training_view, purpose=purpose),
        )

    def build_collator(self, *, sequence_length: int, pad_mode: str = "to_128") -> MMCollator:
        """Makes what turns examples into batches.

        Longer texts are cut at `sequence_length`, images never; with `sequence_length` in the view,
        whole conversations are left out instead, as in batches of shards.
        """
        return view_collator(
            self.training_view,
            sequence_length=sequence_length,
            pad_mode=pad_mode,
            pad_token_id=self.text_tokenizer.special_ids["pad"],
            overlong="truncate",
        )

    @property
    def stored_recipe(self) -> Recipe:
        """The recipe, with images as large as the view wants them."""
        if self.view is None or self.recipe.image != ImagePolicy():
            return self.recipe
        views = tuple(view for view in (self.view.image, self.view.high_res) if view is not None)
        return replace(self.recipe, image=ImagePolicy(views=views))

    @property
    def training_view(self) -> View:
        """The view, or the recipe's first."""
        return self.view or View(image=self.recipe.image.views[0])


@dataclass(frozen=True, slots=True)
class _Downloads:
    """Reads images of URLs under the limits of the offline job; each is fetched once."""

    folder: str
    policy: FetchPolicy

    def __call__(self, url: str) -> bytes:
        from preprocess.fetch import fetch_all

        root = Path(self.folder).expanduser()
        cache = BlobCache(root)
        # A ledger has one writer at a time, and workers fetch at once: one for each URL.
        name = f"{hash_text(url):016x}"
        ledgers = root / "unsharded" / name[:2]
        ledgers.mkdir(parents=True, exist_ok=True)
        with Ledger(ledgers / f"{name}.jsonl") as ledger:
            found = fetch_all([url], cache=cache, ledger=ledger, policy=self.policy)[url]
        if found.status != "ok":
            raise SampleError(found.reason, what="image could not be fetched", where=url)
        return cache.get(found.sha256 or "")


@functools.lru_cache(maxsize=1)
def get_dataset(name: str, split: str = "train", *, source: str = "hub") -> DatasetBase:
    """Opens a dataset by name, or again the one that was opened last.

    Raises:
      ConfigError, SourceError: As `preprocess.datasets.get_dataset`.
    """
    return _open_dataset(name, split, source=source)
