"""Extraction: the pixels of stored pictures as training would see them, and what comes of them.

The pixels are those that the loader delivers without augmentation, from the same kernels. Pictures
are shown in stored order, each with all of its crops, tiles or patches in one call; several at a
time only where their units are of one shape. So what comes out depends on the shard and the
settings alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from loader.assembly import View, normalize, patchify, render, unit_shape, write_units
from loader.buffers import Scratch
from loader.features.backbone import Backbone, Shown
from loader.reading import StoredSample
from shardspec.families import plan_pictures
from shardspec.sample import image_rows


@dataclass(slots=True)
class _Waiting:
    """A sample whose pictures are not all done."""

    sample: StoredSample
    found: list[np.ndarray | None] = field(default_factory=list)


def show_pictures(sample: StoredSample, view: View, scratch: Scratch) -> list[Shown]:
    """Makes the pixels of each picture of a sample.

    Args:
      sample: Of a dataset with pictures, without videos.
      view: What a run would see of it; its augmentation is left out.
      scratch: Memory for decoding.

    Raises:
      ShardError: `image_decode`.
      SampleError: As `plan_pictures`.
    """
    sizes = [(row[2], row[3]) for row in image_rows(sample.spans).tolist()]
    pictures = sample.pictures
    if view.model is not None:
        family, shown = view.model.family, []
        plans = plan_pictures(family, [size[::-1] for size in sizes])
        for picture, plan in zip(pictures, plans, strict=True):
            units = np.empty((plan.num_units, *unit_shape(family, [plan])), np.float32)
            pixels = picture.pixels(scratch, "picture")
            write_units(family, plan, pixels, units, backend=view.model.backend)
            shown.append(Shown(units=units, plan=plan))
        return shown
    found = []
    for picture, overview, (width, height) in zip(pictures, sample.overviews, sizes, strict=True):
        crops = render(
            picture,
            source_width=width,
            source_height=height,
            view=view.image,
            overview=overview,
            scratch=scratch,
            resample=view.resample,
        )
        if view.normalize is not None:
            crops = normalize(crops, kind=view.normalize)
        patches = view.pixels == "patches"
        crops = patchify(crops, view.image.patch_px) if patches else crops.transpose(0, 3, 1, 2)
        found.append(Shown(units=crops))
    return found


def extract(
    samples: Iterable[StoredSample], view: View, backbone: Backbone, *, batch: int = 1
) -> Iterator[tuple[StoredSample, list[np.ndarray]]]:
    """Makes the features of samples.

    Args:
      samples: In order.
      view: As of `show_pictures`.
      backbone: What sees them.
      batch: Most pictures per call.

    Yields:
      Each sample, in order, with float32 [rows, ...] for each of its pictures.

    Raises:
      ShardError, SampleError: As `show_pictures`.
      ConfigError: As `Backbone.__call__`.
    """
    scratch, waiting = Scratch(), deque[_Waiting]()
    group: list[tuple[Shown, _Waiting, int]] = []

    def run() -> None:
        made = backbone([shown for shown, _, _ in group], view) if group else []
        for values, (_, owner, place) in zip(made, group, strict=True):
            owner.found[place] = values
        group.clear()

    def done() -> Iterator[tuple[StoredSample, list[np.ndarray]]]:
        while waiting and all(values is not None for values in waiting[0].found):
            first = waiting.popleft()
            yield first.sample, [values for values in first.found if values is not None]

    for sample in samples:
        owner = _Waiting(sample)
        waiting.append(owner)
        for shown in show_pictures(sample, view, scratch):
            if group and group[0][0].units.shape[1:] != shown.units.shape[1:]:
                run()
            group.append((shown, owner, len(owner.found)))
            owner.found.append(None)
            if len(group) == batch:
                run()
        yield from done()
    run()
    yield from done()
