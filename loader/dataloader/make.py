"""`make_dataloader`: from arguments to the loader of this rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from loader.assembly import MMCollator, ModelCollator, PadSide, view_collator
from loader.dataloader.options import DECODE_THREADS, Balance, LoaderOptions
from loader.dataloader.planning import Lengths, packs_of, patches_per_crop, sample_lengths
from loader.dataloader.stream_loader import StreamLoader
from loader.delivery import BatchBuilder, Collate, MapExample, PreparedBatches, RawBatches
from loader.mixture_stream import IterableDatasetMixture
from loader.order import PackSchedule
from loader.raw import RawBuilder, RawDataset
from loader.resume import MakePacks
from loader.stream import PreparedBuilder, Stream, StreamingDataset, require_argument
from shardspec.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

_PASSES = {
    True: "one epoch: each sample once, but for the step that two epochs share",
    False: "a number of steps: samples continue from one pass to the next",
}


def make_dataloader(
    dataset: StreamingDataset | RawDataset | IterableDatasetMixture,
    *,
    global_batch_size: int,
    sequence_length: int | None = None,
    collate_fn: Collate | None = None,
    map: MapExample | None = None,
    pad_mode: str = "to_128",
    decode_threads: int = DECODE_THREADS,
    workers: int = 0,
    extra_keys: tuple[str, ...] = (),
    with_metadata: bool = False,
    columns: tuple[str, ...] = (),
    pack: bool = False,
    max_crops: int | None = None,
    min_images: int = 0,
    max_images: int | None = None,
    balance: Balance = True,
    bucket_steps: int = 0,
    prefetch_bytes: int = 1 << 32,
    watchdog_s: float | None = 600.0,
    pad_side: PadSide = "right",
    metadata: bool | tuple[str, ...] = False,
    arrays: tuple[str, ...] = (),
) -> StreamLoader:
    """Makes the loader of this rank.

    Prepared samples need `sequence_length`, raw ones `collate_fn`; both take `global_batch_size`,
    `collate_fn`, `decode_threads`, `workers`, `prefetch_bytes` and `watchdog_s`. All other
    arguments are for prepared samples.

    Args:
      dataset: What to stream.
      global_batch_size: Rows per step over all ranks; the number of ranks must divide it. A row is
        a sample, or a pack.
      sequence_length: Longest sequence; text is cut there, and packs are filled up to there.
      collate_fn: Makes a batch of a list, one entry per row of this rank: of what a RawDataset's
        `decode` or a map-style dataset returned, or of examples as `assemble` describes them, which
        `MMCollator` would pad. It may be called from several threads at a time; in worker processes
        it must be picklable.
      map: `map(example, rng)` changes each row's example before it is collated, and returns it; as
        `collate_fn` otherwise. All its draws are to come from `rng`, the sample's own in the epoch.
        Both functions are named in states, by their source: see `View.augment`.
      pad_mode: "max_len", "batch_max" or "to_N"; see `MMCollator`.
      decode_threads: Threads that make batches, where workers is 0. With 0 threads each batch is
        made when it is asked for, in the consumer's thread.
      workers: Worker processes instead of threads, for Python code that holds the interpreter.
      extra_keys: Further keys of the batch; see `MMCollator`.
      with_metadata: Add `metadata`, a list with each sample's key; None as the key of a row that
        only fills the last batch of an evaluation. With tail "pad" a batch has `real` in any case,
        bool [B], False for such rows.
      columns: Added columns (`make annotate`) to deliver, as `column_NAME`: a tensor of S values
        (bool, int64 or float64; vectors float32 or int64, [S, length]), or a list of S texts. The S
        samples come row after row: one per row; with packs any number, and `sample_rows`, int64
        [S], has the row of each.
      pack: Fill each row with several samples, planned from the lengths in the indexes; adds
        `position_ids` and `subsegment_ids` to the batch. Needs tail "wrap".
      max_crops: Most crops in a pack; None: any number.
      min_images: Least crops per row of `images`, 1 where some ranks may have a step of text alone
        (as FSDP hangs if only some ranks run the image encoder): what is missing is padding, which
        no token refers to.
      max_images: Fixed crops per row of `images`, so that all steps have one shape (with pad_mode
        "max_len"); a row with more is an error. With `pack`, the default of `max_crops`.
      balance: Exchange rows between the ranks of a step, never between steps. True exchanges packs,
        so that all ranks have equal work; without packs rows keep their slots. "images" exchanges
        rows of either kind, so that every rank has pictures where the batch has as many rows with
        pictures as there are ranks, and work is nearly equal; every rank then reads the lengths of
        all rows. False: rows keep their slots, and a rank plans its own packs only.
      bucket_steps: Deal the samples of this many steps to these steps by length, so that batches
        pad less: the lighter alternative to packs. The order can change between such groups only.
        0: do not.
      prefetch_bytes: Most bytes in batches that are made ahead of the consumer, and most that wait
        to be used again. One batch is always made, however large; where fewer fit than there are
        threads or workers, some of these have nothing to do.
      watchdog_s: Seconds, above 0, that a batch may be awaited before a warning shows the stacks of
        all threads, and worker processes write theirs to standard error: what hangs is there. The
        run waits on. None: never.
      pad_side: "left" pads texts in front, for models that generate; see `MMCollator`.
      metadata: Fields of the samples' records that `metadata` has as `record`, plain Python objects
        (question_id, answers, options, points, image_url ...; None where a sample has none); True:
        all. `ocr_boxes` is where the words of documents are on the crops, see
        `loader.assembly.ocr_boxes`. It implies `with_metadata`. In an evaluation they are those of
        the row's question.
      arrays: Fields of the samples' records to deliver as tensors of their own names, [B, ...]:
        float32, int64 or bool, of one shape in all samples, such as the `actions`, `action_mask`
        and `state` of robots. `ocr_boxes` gives `boxes`, `box_crop` and `box_word`: the words of
        documents on the crops, padded to the row with most. Not with packs or `collate_fn`.

    Raises:
      ConfigError: `argument`; `argument_unused`, one that means nothing beside the others;
        `batch_size`, the dataset was made for another one; `order_count`, `batch_not_divisible`,
        `loader_range`, `loader_options`, `loader_columns`, `collator_range`, `packing_tail`,
        `packing_and_buckets`, and as `MMCollator`; `user_function`, states cannot name
        `map` or `collate_fn`.
    """
    fits = isinstance(dataset, StreamingDataset | RawDataset | IterableDatasetMixture)
    require_argument(fits, "dataset", dataset, "a dataset or a mixture of datasets")
    options = LoaderOptions(
        global_batch_size=global_batch_size,
        sequence_length=sequence_length,
        collate_fn=collate_fn,
        map=map,
        pad_mode=pad_mode,
        decode_threads=decode_threads,
        workers=workers,
        extra_keys=extra_keys,
        with_metadata=with_metadata,
        columns=columns,
        pack=pack,
        max_crops=max_crops,
        min_images=min_images,
        max_images=max_images,
        balance=balance,
        bucket_steps=bucket_steps,
        prefetch_bytes=prefetch_bytes,
        watchdog_s=watchdog_s,
        pad_side=pad_side,
        metadata=metadata,
        arrays=arrays,
    )
    options.require_ranks(dataset._stream.topology.world_size)
    dataset._stream.require_batch(options.global_batch_size)
    dataset = dataset._resized(options.global_batch_size, sequence_length=options.sequence_length)
    stream: Stream[Any] = dataset._stream
    builders = [part.builder for part in stream.parts]
    lengths: Lengths | None = None
    packs: PackSchedule | None = None
    make_packs: MakePacks | None = None
    batches: BatchBuilder
    if isinstance(builders[0], RawBuilder):
        batches = RawBatches(builders, options.require_raw())
    else:
        view, length = builders[0].view, options.require_prepared(builders[0].view)
        builders = [builder.with_record(options.fields) for builder in builders]
        collator = _collator(options, builders[0], length, with_real=stream.parts[0].tail == "pad")
        lengths = partial(sample_lengths, builders)
        if options.pack:
            make_packs = partial(
                packs_of,
                lengths=lengths,
                sequence_length=length,
                max_crops=options.crops_per_pack,
                patches_per_crop=patches_per_crop(view),
                balance=options.balance is True,
            )
            packs = make_packs(stream.order)
            if stream.topology.rank == 0:
                logger.info("a pass over packs is %s", _PASSES[packs.pass_is_exact])
        _require_columns(builders, options.columns)
        batches = PreparedBatches(
            builders,
            collator,
            packing=packs.config if packs else None,
            columns=options.columns,
            arrays=options.arrays,
            told=options.metadata,
            map=options.map,
            collate=options.collate_fn,
        )
    stream.warn_of_unused()
    if packs is None:
        stream.warn_of_pairs(stream.order, step=0)
    return StreamLoader(
        dataset,
        batches,
        lengths=lengths,
        packs=packs,
        make_packs=make_packs,
        bucket_steps=options.bucket_steps,
        share_images=options.balance == "images",
        decode_threads=options.decode_threads,
        workers=options.workers,
        prefetch_bytes=options.prefetch_bytes,
        watchdog_s=options.watchdog_s,
    )


def _collator(
    options: LoaderOptions, builder: PreparedBuilder, sequence_length: int, *, with_real: bool
) -> MMCollator | ModelCollator:
    view, extra_keys = builder.view, options.extra_keys
    if view.model is not None:
        return ModelCollator(
            view.model.family,
            pad_side=options.pad_side,
            sequence_length=sequence_length,
            pad_mode=options.pad_mode,
            pad_token_id=builder.ids.pad,
            packed=options.pack,
            extra_keys=extra_keys,
            with_metadata=options.with_metadata,
            with_real=with_real,
            features=view.features,
        )
    if options.pack:
        extra_keys = tuple(dict.fromkeys((*extra_keys, "position_ids", "subsegment_ids")))
    return view_collator(
        view,
        sequence_length=sequence_length,
        pad_mode=options.pad_mode,
        pad_token_id=builder.ids.pad,
        extra_keys=extra_keys,
        with_metadata=options.with_metadata,
        with_real=with_real,
        min_images=options.min_images,
        max_images=options.max_images,
        pad_side=options.pad_side,
    )


def _require_columns(builders: Sequence[PreparedBuilder], columns: Sequence[str]) -> None:
    """Refuses columns that a dataset lacks, or that differ in their types between datasets."""
    for name in columns:
        kinds = {}
        for builder in builders:
            added = builder.data.manifest.columns
            known = added.types if added else {}
            if name not in known:
                raise ConfigError(
                    "loader_columns.unknown",
                    where=builder.data.url,
                    column=name,
                    hint=nearest(name, known) if known else "run `make annotate`",
                )
            kind = known[name]
            kinds["text" if kind.startswith("text") else kind] = builder.data.title
        if len(kinds) > 1:
            raise ConfigError("loader_columns.types", where=", ".join(kinds.values()), column=name)
