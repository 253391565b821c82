"""Opens a dataset for a verb as training would, by the verb's flags."""

from __future__ import annotations

import argparse

from loader.assembly import Augment, View
from loader.stream import StreamingDataset, stored_model, stored_view
from shardspec.families import StoredModel
from shardspec.manifest import Manifest, require_manifest


def open_dataset(
    options: argparse.Namespace, *, rank: int | None = None, world_size: int | None = None
) -> tuple[StreamingDataset, Manifest, StoredModel | None]:
    """Opens the dataset that the flags `shards`, `--split`, `--seed` and `--augment` name.

    Returns:
      The dataset with the view that it was built for, its manifest, and the model that it was built
      for, if it was built for one.
    """
    manifest = require_manifest(options.shards)
    augment = Augment.standard() if options.augment else Augment()
    model = stored_model(manifest, where=options.shards)
    view = View(augment=augment)
    if model is None:
        view = View(image=stored_view(manifest), augment=augment)
    dataset = StreamingDataset(
        options.shards,
        split=options.split,
        seed=options.seed,
        view=view,
        rank=rank,
        world_size=world_size,
    )
    return dataset, manifest, model
