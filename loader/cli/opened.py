"""Opens a dataset, or a mixture of several, for a verb as training would, by the verb's flags."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from loader.assembly import Augment, View
from loader.mixture_stream import IterableDatasetMixture
from loader.stream import StreamingDataset, stored_model, stored_view
from shardspec.families import StoredModel
from shardspec.manifest import Manifest, require_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What is streamed, and what it was built for."""

    dataset: StreamingDataset | IterableDatasetMixture
    """With the view that the first dataset was built for."""
    manifest: Manifest
    """Of the first dataset; all of a mixture have the same tokenizer."""
    model: StoredModel | None
    """That the first dataset was built for, if it was built for one."""
    name: str


def add_mixture(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that join further datasets."""
    parser.add_argument(
        "--with", dest="others", action="append", default=[], metavar="SHARDS",
        help="another dataset of the mixture; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=_numbers, metavar="W,W",
        help="weights of the mixture, such as 0.7,0.3 (default: equal)",
    )  # fmt: skip


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def open_dataset(
    options: argparse.Namespace, *, rank: int | None = None, world_size: int | None = None
) -> Opened:
    """Opens what `shards`, `--split`, `--seed`, `--augment` and the flags of `add_mixture` name."""
    augment = Augment.standard() if options.augment else Augment()
    urls = [options.shards, *getattr(options, "others", ())]
    manifests = [require_manifest(url) for url in urls]
    models = [stored_model(each, where=url) for url, each in zip(urls, manifests, strict=True)]
    # One for all, as in training: shards for larger images have the pixels of a smaller view.
    images = [
        stored_view(each) for each, model in zip(manifests, models, strict=True) if model is None
    ]
    datasets = []
    for url, model in zip(urls, models, strict=True):
        view = View(augment=augment)
        if model is None:
            view = View(image=images[0], augment=augment)
        datasets.append(
            StreamingDataset(
                url,
                split=options.split,
                seed=options.seed,
                view=view,
                rank=rank,
                world_size=world_size,
            )
        )
    dataset: StreamingDataset | IterableDatasetMixture = datasets[0]
    if len(datasets) > 1 or getattr(options, "weights", None) is not None:
        dataset = IterableDatasetMixture(datasets, options.weights, seed=options.seed)
    return Opened(
        dataset=dataset,
        manifest=manifests[0],
        model=models[0],
        name=" + ".join(manifest.dataset for manifest in manifests),
    )
