"""BUILD: one task makes one shard: tar, index, quarantine list, receipt.

A task is a pure function of the plan's rows, the images and the recipe; it may run anywhere, any
number of times. It has two parts: `build_shard` makes the files in a scratch folder, which takes a
processor; `publish_shard` writes them to the output, which takes a network. They appear complete
under their final names, the receipt last: a shard without a valid receipt does not exist. Rows that
cannot become samples are written to the quarantine list with the reason, never dropped silently.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from preprocess.datasets import PageImage, SceneImage, SceneVideo
from preprocess.fetch import BlobCache
from preprocess.job.plan import shard_name
from preprocess.recipe import OpenedExample, Preparer, file_sha256, read_path
from shardspec import storage
from shardspec.documents import DocumentError, read_object
from shardspec.errors import SampleError, ShardsError, StorageError
from shardspec.index import encode_index, index_dtype, index_row, longest_text, with_groups
from shardspec.keyed import hash_text
from shardspec.manifest import (
    Receipt,
    ShardEntry,
    canonical_json,
    encode_receipt,
    parse_receipt,
)
from shardspec.sample import SPAN_COLUMNS, PreparedSample, sample_members, text_rows
from shardspec.tar import BLOCK, TarRange, TarWriter, padded

SCRATCH = ".scratch"
"""Folder of unfinished files below a local output; emptied when a job starts."""

T = TypeVar("T")

Row = Mapping[str, Any]
"""A row of a plan."""

_READS_AT_ONCE = 16

_BUFFER_BYTES = 2**20
"""Of the file that samples are written to, so that small members are not written one by one."""

_BLOCK_ROWS, _BLOCK_BYTES = 32, 16 * 2**20
"""Rows that are opened before their texts are formatted, and the memory that ends a block."""


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What every task of a job shares; sent to worker processes."""

    preparer: Preparer
    dataset: str
    split: str
    out: str
    num_shards: int
    generation: int = 0
    build_key: str
    blobs: str
    """Root of the blob cache."""
    scratch: str
    """Local folder for unfinished files."""
    several_images: bool = False
    """Whether the members of images carry numbers."""
    grouped: bool = False
    """Whether samples have groups, which the index then names."""

    @cached_property
    def cache(self) -> BlobCache:
        """The blob cache, opened in this process."""
        return BlobCache(self.blobs)

    def name(self, shard: int) -> str:
        """Names a shard."""
        return shard_name(
            self.dataset,
            self.split,
            shard,
            num_shards=self.num_shards,
            generation=self.generation,
        )

    def receipt_name(self, shard: int) -> str:
        """Where the output keeps a shard's receipt."""
        return f"receipts/{self.name(shard)}.json"

    def quarantine_name(self, shard: int) -> str:
        """Where the output keeps a shard's quarantine list."""
        return f"quarantine/{self.name(shard)}.jsonl"


@dataclass(frozen=True, kw_only=True)
class BuiltShard:
    """A shard that is built and not yet published."""

    path: Path
    """The tar, in a scratch folder."""
    index: bytes
    quarantined: list[bytes]
    """Lines of the quarantine list."""
    receipt: Receipt
    scratch: ExitStack
    """Removes the folder."""


def read_rows(url: str) -> list[dict[str, Any]]:
    """Reads the planned rows of a shard, in stored order.

    Raises:
      StorageError: `plan_rows`, they are damaged.
    """
    rows = []
    *lines, rest = storage.read_bytes(url).split(b"\n")
    if rest:
        raise StorageError("plan_rows", where=url, error="the last line is cut")
    for number, line in enumerate(lines, start=1):
        try:
            row = read_object(line, any_text=True)
            kinds = (row["position"], int), (row["key"], str), (row["example"], dict)
            if not all(type(value) is kind for value, kind in kinds) or "image" not in row:
                raise DocumentError("want a position, a key, an example and an image")
        except (ValueError, KeyError) as error:
            raise StorageError("plan_rows", where=f"{url}:{number}", error=error) from error
        rows.append(row)
    return sorted(rows, key=lambda row: int(row["position"]))


def build_shard(context: BuildContext, shard: int, on_row: Callable[[str], None]) -> BuiltShard:
    """Builds one shard in a scratch folder.

    Args:
      context: The job.
      shard: Its number.
      on_row: Called after each row with "" or the reason why it was quarantined.

    Raises:
      StorageError: The disk is full, or the cache has lost an image.
    """
    rows = read_rows(rows_url(context.out, context.split, shard))
    name = f"{context.split}/{context.name(shard)}"
    quarantined: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    index, groups = [], []
    codec = context.preparer.recipe.image.codec
    views = context.preparer.recipe.image.views
    with ExitStack() as stack:
        path = stack.enter_context(scratch_folder(context.scratch)) / "shard.tar"
        with storage.translate_errors(str(path)), path.open("wb", _BUFFER_BYTES) as stream:
            writer = TarWriter(stream)
            for row, opened in _formatted_rows(context.preparer, rows, cache=context.cache):
                try:
                    sample = _after(context.preparer.finish, row, opened)
                    encoded, overviews = encode_images(context.preparer, sample)
                    members = sample_members(
                        sample,
                        encoded,
                        overviews=overviews,
                        codec=codec,
                        several=context.several_images,
                    )
                    index_of = _index_row(context.preparer, sample, members, encoded, writer)
                except SampleError as error:
                    quarantined.append(quarantine_line(row, stage="build", error=error))
                    reasons[error.reason] += row.get("rows", 1)
                    on_row(error.reason)
                    continue
                place = writer.write_sample(members, num_head=len(members) - len(sample.clips))
                index_of["crc32"] = place.crc32
                if _stores_clips(context.preparer):
                    index_of["head_crc32"] = place.head_crc32
                index.append(index_of)
                groups.append(hash_text(row["group"]) if row.get("group") else 0)
                on_row("")
            sha256 = writer.finish()
        num_views = 1 if context.preparer.model else len(views)
        dtype = index_dtype(num_views, clips=_stores_clips(context.preparer))
        table = np.concatenate(index) if index else np.zeros(0, dtype)
        encoded_index = encode_index(with_groups(table, groups) if context.grouped else table)
        entry = ShardEntry(
            url=name + ".tar",
            split=context.split,
            nsamples=len(table),
            num_bytes=writer.num_bytes,
            sha256=sha256,
            index_bytes=len(encoded_index),
            index_sha256=hashlib.sha256(encoded_index).hexdigest(),
            num_images=int(table["num_images"].sum()),
            num_tokens=int(table["num_tokens"].sum()),
            num_loss_tokens=int(table["num_loss_tokens"].sum()),
        )
        return BuiltShard(
            path=path,
            index=encoded_index,
            quarantined=[canonical_json(line) for line in quarantined],
            receipt=Receipt(
                build_key=context.build_key,
                shard=entry,
                quarantined=dict(sorted(reasons.items())),
            ),
            scratch=stack.pop_all(),
        )


def _index_row(
    preparer: Preparer,
    sample: PreparedSample,
    members: Sequence[tuple[str, bytes]],
    encoded: Sequence[bytes],
    writer: TarWriter,
) -> np.ndarray:
    """Makes the index row of a sample before it is written; its checksum is still 0.

    Raises:
      SampleError: `sample_length`: a number does not fit in its column.
    """
    num_bytes = tar_length(members)
    head_bytes = None
    if _stores_clips(preparer):
        head_bytes = tar_length(members[: -len(sample.clips)]) if sample.clips else 0
    try:
        return index_row(
            sample,
            place=TarRange(offset=writer.num_bytes, num_bytes=num_bytes, crc32=0),
            json_bytes=len(members[0][1]),
            image_sizes=[len(payload) for payload in encoded],
            views=preparer.recipe.image.views,
            frames=preparer.frame_view,
            placeholder=preparer.tokenizer.special_ids["<|image|>"],
            bos="bos" in preparer.tokenizer.special_ids,
            model=preparer.model.stored if preparer.model else None,
            head_bytes=head_bytes,
        )
    except OverflowError as error:
        raise SampleError(
            "sample_length",
            where=sample.key,
            num_bytes=num_bytes,
            num_images=len(encoded),
            error=error,
        ) from error


def _stores_clips(preparer: Preparer) -> bool:
    return preparer.recipe.video is not None and preparer.recipe.video.store == "clip"


def tar_length(members: Sequence[tuple[str, bytes]]) -> int:
    """Computes the length of a sample in a tar: headers, payloads and padding."""
    return sum(BLOCK + padded(len(payload)) for _, payload in members)


def publish_shard(
    context: BuildContext, shard: int, built: BuiltShard, on_part: Callable[[int], None]
) -> Receipt:
    """Publishes a built shard, its receipt last.

    Args:
      context: The job.
      shard: Its number.
      built: What `build_shard` has made; its scratch folder is gone afterwards.
      on_part: Called with the number of bytes that an object store has received, part by part.

    Raises:
      StorageError: The output cannot be written; `output_busy`: another job writes to it.
    """
    receipt_name, quarantine_name = context.receipt_name(shard), context.quarantine_name(shard)
    entry = built.receipt.shard
    with built.scratch:
        # Another job's receipt must not vouch for this one's bytes, wherever it is interrupted.
        storage.delete_objects(context.out, [receipt_name])
        storage.publish_file(storage.join(context.out, entry.url), built.path, on_part=on_part)
    storage.publish_bytes(storage.join(context.out, entry.index_url), built.index)
    if built.quarantined:
        url = storage.join(context.out, quarantine_name)
        storage.publish_bytes(url, b"".join(built.quarantined))
    else:
        # An earlier, uncommitted build's.
        storage.delete_objects(context.out, [quarantine_name])
    url = storage.join(context.out, receipt_name)
    receipt = encode_receipt(built.receipt)
    # Another attempt at this shard, on a node that was given up, may have written the very same.
    if (
        not storage.compare_and_swap(url, receipt, replacing=None)
        and storage.read_bytes(url) != receipt
    ):
        raise StorageError("output_busy.job", where=url)
    return built.receipt


def rows_url(out: str, split: str, shard: int) -> str:
    """URL of the planned rows of a shard."""
    return storage.join(out, "plan", split, f"rows-{shard:05d}.jsonl")


def find_receipts(context: BuildContext, shards: Iterable[int] | None = None) -> dict[int, Receipt]:
    """Finds the receipts of finished shards: of this very build, whose shards exist.

    Args:
      context: The job.
      shards: Those that are looked for; None for all.
    """
    wanted = range(context.num_shards) if shards is None else shards
    names = {context.name(shard): shard for shard in wanted}
    found = valid_receipts(context.out, names, keys={context.build_key})
    return {names[name]: receipt for name, receipt in found.items()}


def valid_receipts(out: str, names: Iterable[str], *, keys: Container[str]) -> dict[str, Receipt]:
    """Finds the receipts of finished shards by the shards' names.

    Args:
      out: The output.
      names: Of the shards.
      keys: Build keys that count.
    """
    wanted = {f"{name}.json": name for name in names}
    folder = storage.join(out, "receipts")
    present = [name for name in storage.list_names(folder, fresh=True) if name in wanted]

    def read(name: str) -> Receipt | None:
        url = storage.join(out, "receipts", name)
        try:
            return parse_receipt(storage.read_bytes(url), where=url)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        read_ones = zip(present, pool.map(read, present), strict=True)
        found = {wanted[name]: receipt for name, receipt in read_ones if receipt is not None}
    splits = sorted({receipt.shard.split for receipt in found.values()})
    sizes: dict[str, int] = {}
    for split in splits:
        sizes |= stored_sizes(out, split)
    return {
        name: receipt
        for name, receipt in found.items()
        if receipt.build_key in keys and is_in_place(receipt.shard, sizes)
    }


def stored_sizes(out: str, split: str) -> dict[str, int]:
    """Lists the files of a split: their paths, as the manifest has them, to their lengths."""
    listed = storage.list_objects(storage.join(out, split), fresh=True)
    return {f"{split}/{each.name}": each.num_bytes for each in listed}


def is_in_place(entry: ShardEntry, sizes: Mapping[str, int]) -> bool:
    """Returns True if a shard and its index exist with their lengths."""
    wanted = {entry.url: entry.num_bytes, entry.index_url: entry.index_bytes}
    return all(sizes.get(url) == num_bytes for url, num_bytes in wanted.items())


def prepare_row(preparer: Preparer, row: Row, *, cache: BlobCache) -> PreparedSample:
    """Prepares one row of a plan.

    Raises:
      SampleError: The row cannot become a sample.
      StorageError: `blob_missing`, `blob_corrupt`: that is the cache's fault, not the row's.
    """
    opened = _after(preparer.format, row, _open_row(preparer, row, cache=cache))
    return _after(preparer.finish, row, opened)


def _formatted_rows(
    preparer: Preparer, rows: Iterable[Row], *, cache: BlobCache
) -> Iterator[tuple[Row, OpenedExample | SampleError]]:
    """Decodes and formats rows, a block at a time; gives each, or why it cannot become a sample.

    Each step is done for all rows of a block before the next: decoding an image empties the
    processor's caches, and texts take half of the time if they follow each other.
    """
    block: list[tuple[Row, OpenedExample | SampleError]] = []
    num_bytes = 0
    for row in rows:
        opened = _or_error(partial(_open_row, preparer, row, cache=cache))
        block.append((row, opened))
        num_bytes += 0 if isinstance(opened, SampleError) else opened.num_bytes
        if len(block) == _BLOCK_ROWS or num_bytes >= _BLOCK_BYTES:
            yield from _formatted(preparer, block)
            block, num_bytes = [], 0
    yield from _formatted(preparer, block)


def _formatted(
    preparer: Preparer, block: Iterable[tuple[Row, OpenedExample | SampleError]]
) -> list[tuple[Row, OpenedExample | SampleError]]:
    """Formats and tokenizes the texts of a block of rows."""
    made = [
        (row, _or_error(partial(_after, preparer.format, row, opened))) for row, opened in block
    ]
    preparer.tokenize(each for _, each in made if not isinstance(each, SampleError))
    return made


def _or_error(step: Callable[[], OpenedExample]) -> OpenedExample | SampleError:
    try:
        return step()
    except SampleError as error:
        return error


def _open_row(preparer: Preparer, row: Row, *, cache: BlobCache) -> OpenedExample:
    example = dict(row["example"])
    image = row["image"]
    if isinstance(image, list):
        example["image"] = [_open_image(each, cache=cache) for each in image]
    elif image is not None:
        example["image"] = _open_image(image, cache=cache)
    if "video" in row:
        example["video"] = [_open_video(each, cache=cache) for each in row["video"]]
    with _row_errors(row):
        return preparer.open(example, key=row["key"], for_storing=True)


def _after(step: Callable[[OpenedExample], T], row: Row, opened: OpenedExample | SampleError) -> T:
    """Takes the next step with a row, if the last one did not fail."""
    if isinstance(opened, SampleError):
        raise opened
    with _row_errors(row):
        return step(opened)


@contextmanager
def _row_errors(row: Row) -> Iterator[None]:
    """Makes a SampleError of what a row's values lead to."""
    try:
        yield
    except (ShardsError, MemoryError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - messages come from adapters: one row, not the job
        kind = type(error).__name__
        raise SampleError(
            "row_error.prepare", where=row["key"], error=f"{kind}: {error}"
        ) from error


def encode_images(preparer: Preparer, sample: PreparedSample) -> tuple[list[bytes], list[bytes]]:
    """Encodes the images of a sample, and the overviews that go with them."""
    preprocessor = preparer.image_preprocessor
    overviews = [image.overview for image in sample.images if image.overview is not None]
    return (
        [preprocessor.encode(image) for image in sample.images],
        [preprocessor.encode_overview(overview) for overview in overviews],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSize:
    """What one sample costs."""

    num_bytes: int
    """Length in the tar: headers, payloads and padding."""
    num_tokens: int
    """Text tokens, each turn at its longest variant."""
    variant_bytes: int
    """Bytes of the arrays that one variant per turn would not need."""


def sample_size(preparer: Preparer, row: Mapping[str, Any], *, cache: BlobCache) -> SampleSize:
    """Builds one sample without storing it, and measures it.

    Raises:
      SampleError: The row cannot become a sample.
    """
    sample = prepare_row(preparer, row, cache=cache)
    encoded, overviews = encode_images(preparer, sample)
    members = sample_members(
        sample,
        encoded,
        overviews=overviews,
        codec=preparer.recipe.image.codec,
        several=len(encoded) > 1,
    )
    stored = TarWriter(io.BytesIO()).write_sample(members)
    return SampleSize(
        num_bytes=stored.num_bytes,
        num_tokens=longest_text(sample.spans)[0],
        variant_bytes=variant_bytes(sample.spans),
    )


def variant_bytes(spans: np.ndarray) -> int:
    """Counts the bytes of a sample's arrays that only its further variants need.

    Args:
      spans: int32 [S, 8].

    Returns:
      The rows beyond the first of each turn, and the tokens that no first variant uses.
    """
    rows = text_rows(spans).tolist()
    first: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        first.setdefault((row[1], row[2]), row)

    def runs(chosen: Iterable[list[int]]) -> set[tuple[int, int]]:
        return {pair for row in chosen for pair in ((row[3], row[4]), (row[5], row[6]))}

    further = runs(rows) - runs(first.values())
    tokens = sum(stop - start for start, stop in further)
    row_bytes = int(spans.itemsize) * SPAN_COLUMNS
    return (len(rows) - len(first)) * row_bytes + tokens * int(spans.itemsize)


def quarantine_line(row: Mapping[str, Any], *, stage: str, error: SampleError) -> dict[str, Any]:
    """Records why a row did not become a sample."""
    return {
        "key": row["key"],
        **row.get("origin", {}),
        "image": row["image"],
        "metadata": row["example"].get("metadata", {}),
        "stage": stage,
        "reason": error.reason,
        "message": error.what,
        "facts": {name: str(value) for name, value in error.facts.items()},
    }


def scratch_root(out: str, *, cache: Path) -> Path:
    """Names the folder for unfinished files: on a local output's own disk, else in the cache."""
    if storage.is_local(out):
        return storage.local_path(out) / SCRATCH
    return cache / "scratch" / hashlib.sha256(out.encode()).hexdigest()[:16]


@contextmanager
def scratch_folder(root: str) -> Iterator[Path]:
    """Makes a new folder for unfinished files."""
    with storage.translate_errors(root):
        storage.make_folder(Path(root))
        made = tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True)
    # Errors of unfinished files have no other name, when they are written and when they are closed.
    with made as folder, storage.translate_errors(root):
        yield Path(folder)


def _open_image(image: Mapping[str, Any], *, cache: BlobCache) -> Any:
    if image["kind"] == "page":
        document = _open_image(image["document"], cache=cache)
        return PageImage(document=document, page=image["page"], dpi=image["dpi"])
    if image["kind"] == "scene":
        return SceneImage(seed=image["seed"], idx=image["idx"])
    if image["kind"] == "blob":
        return cache.get(image["sha256"])
    payload = read_path(Path(image["path"]))
    if hashlib.sha256(payload).hexdigest() != image["sha256"]:
        raise SampleError("image_changed", where=image["path"])
    return payload


def _open_video(video: Mapping[str, Any], *, cache: BlobCache) -> bytes | Path | SceneVideo:
    if video["kind"] == "scene":
        return SceneVideo(seed=video["seed"], idx=video["idx"])
    if video["kind"] == "blob":
        return cache.get(video["sha256"])
    path = Path(video["path"])
    if file_sha256(path) != video["sha256"]:
        raise SampleError("video_changed", where=video["path"])
    return path
