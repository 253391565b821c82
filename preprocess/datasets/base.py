"""What a dataset is: a numbered collection of examples in their raw, canonical form.

An *example* is a plain dict, as in the Molmo code bases:

    image         an ImageSource (below), or a list of them where the dataset has `several_images`;
                  absent for text-only examples
    video         a VideoSource (below), or a list of them, where the dataset has `videos`; they
                  follow the images, or are where a user text has `<|video|>`
    clip          the part of the video that is meant, [start, end] in seconds, either of which may
                  be None; of several videos a list with a part, or None, for each
    subtitles     what is said in the video, [start, end, text] for each line, in seconds of the
                  video, or the text of an SRT or WebVTT file; of several videos a list
    message_list  messages, each an independent conversation about the image; a dict with `style`
                  and the fields that the formatter wants for that style, all of JSON types
    metadata      JSON types, kept for people and evaluators
    rigid         True where no crop or flip may be applied to the images, whatever the texts say
    group         name of a group of examples, such as an episode, that stay in one shard
    windows       for each message the numbers of the images that it shows, in order: the messages
                  are alternatives, of which training draws one, with those images, in each epoch;
                  what metadata differ by is in their `windows` (docs/robots.md)
    leads         texts in front of the images, such as "Page 3"; absent for "Image 1" and so on
    chats         for each message with tools what a model's chat template takes, `system`, `tools`
                  and `turns`; None for others; absent where there is none

Instead of `message_list` an example may have `messages`, a conversation of role and content.

What training redraws each epoch is not drawn here: it stays in the example as alternatives.
A row that cannot become an example raises SampleError, and is counted by its reason. Any other
exception of an adapter counts as one too (`row_error`): one bad row does not end a job.

A dataset is a subclass of `HfDataset` (rows in Parquet or Arrow) or of `DatasetBase` (anything
else); it needs `load` and, unless its rows are examples already, `to_example`. One of this package
is a module that defines `DATASET`; others are given as `file.py:Class` or `package.module:Class`.
Anything else with examples by number is a subclass of `Dataset`, with `__len__` and `get`.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import re
import sys
import traceback
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from preprocess.datasets.code import code_beside
from preprocess.datasets.hooks import naming_hook, wrap_hooks
from preprocess.datasets.images import EpisodeFrame, RemoteImage, resolve_image
from preprocess.datasets.rows import Rows, hub_rows, local_layout, local_rows
from preprocess.datasets.splits import SplitLayout, Unmatched
from preprocess.documents import PageImage, read_file
from preprocess.formats import Subtitle, parse_messages, row_subtitles, visible_names
from preprocess.hash_table import TextSet
from preprocess.media import encode_video
from preprocess.synthetic import plan_clip, plan_scene, render, render_clip
from shardspec import storage
from shardspec.errors import ConfigError, SampleError, ShardsError, SourceError
from shardspec.keyed import hash_text, keyed

SAMPLE_ROWS = 256
"""Examples of SOURCE=sample when no limit is given."""

SCENE_QUALITY = 92
"""JPEG quality of generated scenes, about what cameras and the web use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneImage:
    """A generated picture, named by its numbers; it is drawn when it is read."""

    seed: int
    idx: int

    def read(self) -> bytes:
        """Draws the scene and returns it as a JPEG file, as the web would deliver it."""
        stream = io.BytesIO()
        pixels = render(plan_scene(self.seed, self.idx))
        Image.fromarray(pixels).save(stream, "JPEG", quality=SCENE_QUALITY)
        return stream.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneVideo:
    """A generated clip, named by its numbers; it is drawn when it is read."""

    seed: int
    idx: int

    def read(self) -> bytes:
        """Draws the clip and returns it as an MP4 file.

        Raises:
          ConfigError: `video_extra`.
        """
        plan = plan_clip(self.seed, self.idx)
        return encode_video(render_clip(plan), fps=plan.fps)


DOCUMENT_SETTINGS: Mapping[str, str] = {"CODEC": "lossless"}
"""Settings of documents: no loss, and for each page the smaller format (docs/documents.md)."""

Value = TypeVar("Value")

ImageSource = (
    bytes
    | str
    | Path
    | RemoteImage
    | SceneImage
    | PageImage
    | EpisodeFrame
    | Image.Image
    | np.ndarray
)
"""Encoded bytes, an http(s) URL, a local path, an object of a store, a generated scene, a page of a
document, a frame of a robot's camera, or pixels (uint8 [H, W, 3])."""

VideoSource = bytes | str | Path | RemoteImage | SceneVideo
"""The bytes of a video file, an http(s) URL, a local path, an object of a store, or a generated
clip."""


class Dataset(abc.ABC):
    """A numbered collection of examples: `__len__` and `get` are all that one needs."""

    name: ClassVar[str]
    """By default the class's name in lower case, with underscores."""

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Counts the examples."""

    @abc.abstractmethod
    def get(self, item: int, rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """Makes example `item`, 0 to len - 1; `rng` is there for datasets that must draw."""

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Makes example `item`."""
        return self.get(item)

    def preload(self) -> None:  # noqa: B027 - a dataset that holds nothing has nothing to load
        """Reads the whole dataset into memory, where it can; by default it stays where it is."""


class DatasetBase(Dataset):
    """A dataset over rows: a subclass says where rows come from and what a row means."""

    modes: ClassVar[tuple[str, ...]] = ()
    """What a row may become, the default first; () where there is only one way."""
    split_salt: ClassVar[str] = "vlm-shards"
    """Shared by datasets so that an image is in the same split in all of them."""
    validation_share: ClassVar[float] = 0.0
    """Share of the images set aside as "validation", by a hash of the image's identity; with 0 the
    source's own splits are used."""
    several_images: ClassVar[bool] = False
    """Whether an example may have several images; its `image` is a list then."""
    videos: ClassVar[bool] = False
    """Whether examples have videos; `several_images` is True then, as frames are images."""
    ocr_files: ClassVar[bool] = False
    """Whether URLs of examples may be files of OCR; the plan reads them by `read_url`."""
    grouped: ClassVar[bool] = False
    """Whether the source has a row per annotation: all rows of an image become one example.

    Opening such a dataset reads every row once. It holds 16 bytes a row, about 80 at the peak:
    PixMo-Points' 2.4 million rows take 40 MB. Images are distinguished by 64-bit hashes; among
    10**7 images the chance that any two are taken for one is 3 in 10**6.
    """
    leaves_out: ClassVar[frozenset[str]] = frozenset()
    """Reasons for which the dataset itself leaves rows out; they are no failures of a job."""
    settings: ClassVar[Mapping[str, str]] = {}
    """Variables of `make shards` whose default is another one for this dataset."""
    sample_rows_per_example: ClassVar[int] = 1
    """Generated rows about one image."""
    read_url: Callable[[str], bytes] | None = None
    """Gives the file of a URL, for documents and OCR; set on an object once there is something to
    give."""

    def __init__(
        self,
        split: str = "train",
        *,
        source: str = "hub",
        limit: int | None = None,
        mode: str | None = None,
        unmatched: Unmatched = "refuse",
    ) -> None:
        """Opens the rows of a split.

        Args:
          split: "train", "validation" or another split of the source.
          source: "hub", "sample" (generated rows, no network), or a folder, local or of a store.
          limit: Examples of the split to use, from the first on; None for all.
          mode: One of `modes`; None for the first.
          unmatched: What happens to files of a folder that are of no known split.

        Raises:
          ConfigError: `unknown_mode`.
          SourceError: `source_missing`, `source_empty`, `source_schema`, `source_split`.
        """
        self.mode = self.resolve_mode(mode)
        self.split = split
        self.source = source
        self.limit = limit
        self.unmatched = unmatched
        self._preloaded: list[dict[str, Any] | SampleError] | None = None
        self.rows = self._open_rows()
        self.left_out: Counter[str] = Counter()
        """Rows that cannot become examples, by reason, as far as they were met on opening."""
        self._left_out_numbers = array("q")
        self.num_rows_read = 0
        """Rows looked at on opening: those of the examples, and all that are counted here."""
        self.rows_not_taken: Counter[str] = Counter()
        """Rows that are of no example and no failure either: "other_split", "beyond_limit"."""
        self._held_out = array("q")
        self._numbers, self._borders = self._select(limit)
        if not len(self._numbers):
            raise SourceError(
                "source_empty.split",
                where=source,
                split=split,
                name=self.name,
                rows_in_source=len(self.rows),
                facts=self.left_out,
            )

    @classmethod
    def resolve_mode(cls, mode: str | None) -> str:
        """Gives the mode's name, the default's for None; "" where there is only one way.

        Raises:
          ConfigError: `unknown_mode`.
        """
        if mode is None:
            return cls.modes[0] if cls.modes else ""
        if mode not in cls.modes:
            raise ConfigError(
                "unknown_mode", name=cls.name, mode=mode, modes=", ".join(cls.modes) or "none"
            )
        return mode

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        wrap_hooks(cls)

    @abc.abstractmethod
    def load(self) -> Rows | Sequence[Mapping[str, Any]]:
        """Opens the rows of the source that hold this split; a list will do."""

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example; pure. By default rows are examples.

        Raises:
          SampleError: The row cannot become one.
        """
        return dict(row)

    def _example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example with messages and images as the job wants them.

        Raises:
          SampleError: The row cannot become one.
        """
        example = self.to_example(row)
        if "messages" in example and "message_list" not in example:
            example = parse_messages(example)
        if not isinstance(example.get("message_list"), list):
            raise SampleError(
                "row_fields",
                name="message_list",
                want="a list of messages",
                fields=sorted(map(str, example)),
            )
        return {**example, **_found_images(example), **_found_videos(example)}

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Generates a row in the true schema, for SOURCE=sample; its image is a SceneImage.

        Rows of one example follow each other: `divmod(idx, self.sample_rows_per_example)`.

        Raises:
          ConfigError: `no_sample_rows`: the dataset generates none.
        """
        raise ConfigError("no_sample_rows", dataset=self.name)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Says what else samples follow from, in plain JSON types, for the recipe."""
        return {}

    @classmethod
    def code_files(cls) -> list[Path]:
        """Lists the files of code that samples follow from, besides those of all datasets.

        These are the files of the class and its bases, and what they import from beside them.
        """
        return class_files(cls)

    def __len__(self) -> int:
        """Counts the examples of the split."""
        return len(self._borders) - 1

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Makes example `item`, whatever `get` does.

        Raises:
          SampleError: Its row cannot become an example.
        """
        with self.naming_row(self.row_numbers(item)[0]):
            example = self.get(item)
            if not isinstance(example, dict) or "message_list" not in example:
                raise TypeError(f"get() gives {type(example).__name__}, not an example")
        return example

    def get(self, item: int, rng: np.random.RandomState | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Makes example `item` of the split.

        Raises:
          SampleError: Its row cannot become an example.
        """
        if self._preloaded is not None:
            kept = self._preloaded[item]
            if isinstance(kept, SampleError):
                raise kept
            return dict(kept)
        examples = []
        messages: list[Any] = []
        for number in self.row_numbers(item):
            with self.naming_row(number):
                examples.append(self._example(self.rows[number]))
                messages += examples[-1]["message_list"]
        found = {**examples[0], "message_list": messages}
        if any("chats" in each for each in examples):
            chats = [each.get("chats", [None] * len(each["message_list"])) for each in examples]
            found["chats"] = [chat for each in chats for chat in each]
        return found

    def preload(self) -> None:
        """Makes all examples of the split, and reads their local image files, into memory.

        Afterwards `get` reads nothing. Images that are URLs stay URLs, and a row that cannot become
        an example still raises when it is asked for. Processes that are forked later share it.
        """
        kept: list[dict[str, Any] | SampleError] = []
        for item in range(len(self)):
            try:
                kept.append(_in_memory(self.get(item)))
            except SampleError as error:
                kept.append(error)
        self._preloaded = kept

    def row_numbers(self, item: int) -> list[int]:
        """Lists the rows of an example: their numbers in the source's split, from 0 on."""
        item = range(len(self))[item]
        if item + 1 >= len(self._borders):
            num_examples = len(self._borders) - 1
            raise ConfigError("dataset_code.length", where=self.name, examples=num_examples)
        numbers = self._numbers[self._borders[item] : self._borders[item + 1]]
        return list(numbers) if isinstance(numbers, range) else numbers.tolist()

    def left_out_rows(self) -> Iterator[tuple[int, SampleError]]:
        """Reads the rows again that were left out on opening, to say of each why."""
        for number in self._left_out_numbers:
            try:
                with self.naming_row(number):
                    self._mark(self._example(self.rows[number]))
            except SampleError as error:
                yield number, error

    @property
    def divided(self) -> bool:
        """Whether "train" and "validation" are divided by a hash: the source has only "train"."""
        layout = self.rows.layout
        return (
            self.source != "sample"
            and self.validation_share > 0
            and self.split in ("train", "validation")
            and (layout is None or "validation" not in layout.splits)
        )

    def notes(self) -> list[str]:
        """Says which files make which split, and how many rows a hash put into another split."""
        lines = self.rows.layout.lines() if self.rows.layout is not None else []
        if self.divided:
            other = "validation" if self.split == "train" else "train"
            number = self.rows_not_taken["other_split"]
            lines.append(
                f"{number:,} of {self.num_rows_read:,} rows are in the split {other}: a hash of "
                f"the image chooses {self.validation_share:.2%} of the images for validation"
            )
        return lines

    @classmethod
    def source_files(cls, source: str, split: str, *, unmatched: Unmatched) -> Sequence[Path | str]:
        """Lists the files that rows are read from; files that rows name are not among them.

        A change of one of them is a change of the source, which the same job notices. An adapter
        that reads further files adds them here: local ones as a `Path`, objects of stores as a URL.
        This one lists a file, or all files of a folder, and nothing of a store.
        """
        del split, unmatched
        if source in ("hub", "sample") or not storage.is_local(source):
            return []
        path = Path(source)
        if not path.is_dir():
            return [path]
        found = {*path.rglob("*"), *(path / name for name in visible_names(source))}  # links, too
        return sorted(each for each in found if each.is_file())

    @contextmanager
    def naming_row(self, number: int) -> Iterator[None]:
        """Turns what an adapter raises into a SampleError that names the row."""
        try:
            yield
        except (ShardsError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - code of adapters: one row, not the job
            file, row = self.rows.locate(number)
            raise SampleError(
                "row_error.adapter",
                where=file or self.source,
                row=row,
                dataset=self.name,
                error=f"{type(error).__name__}: {error}",
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel: another process opens the source for itself.
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = self._open_rows()

    def _open_rows(self) -> Rows:
        if self.source == "sample":
            return self._sample_rows(self.limit)
        try:
            rows = self.load()
        except (ShardsError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # code of the user's
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error}"
            where = f"{frame.filename}:{frame.lineno}"
            raise ConfigError("dataset_code.load", where=where, error=told) from error
        if isinstance(rows, Rows):
            return rows
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or isinstance(
            rows, Mapping
        ):
            got = type(rows).__name__
            raise ConfigError("dataset_code.rows", where=self.name, got=got)
        with naming_hook("__len__ of what load() gives"):
            length = len(rows)
        return Rows([lambda: rows], lengths=[length], kind={"kind": "code"})

    def _sample_rows(self, limit: int | None) -> Rows:
        seed = keyed(hash_text(self.name), hash_text(self.split)) % 2**31
        count = (SAMPLE_ROWS if limit is None else limit) * self.sample_rows_per_example
        return Rows(
            [lambda: SampleRows(self, seed, count)],
            lengths=[count],
            kind={"kind": "sample", "seed": seed},
        )

    def _select(self, limit: int | None) -> tuple[np.ndarray | range, np.ndarray | range]:
        """Chooses the rows of the split, and groups them where the dataset is grouped.

        Returns:
          Row numbers, int64 [R], in the order of the examples, and the borders of the examples in
          them, int64 [N + 1]. Examples are in the order of their first rows.
        """
        divided = self.divided
        if not (self.grouped or divided):
            num_rows = len(self.rows) if limit is None else min(limit, len(self.rows))
            self.num_rows_read = num_rows
            return range(num_rows), range(num_rows + 1)
        found, marks = array("q"), array("Q")
        for number, mark, named in self._marks():
            side = "validation" if mark / 2**64 < self.validation_share else "train"
            if divided and side != self.split:
                self.rows_not_taken["other_split"] += 1
                if named and side == "validation":
                    self._held_out.append(number)
            elif not self.grouped and len(found) == limit:
                self.num_rows_read -= 1  # looked at, but not used
                break
            else:
                found.append(number)
                marks.append(mark)
        numbers = np.frombuffer(found, dtype=np.int64) if found else np.zeros(0, dtype=np.int64)
        if not self.grouped or not found:
            return numbers, range(len(numbers) + 1)
        _, first, group = np.unique(
            np.frombuffer(marks, dtype=np.uint64), return_index=True, return_inverse=True
        )
        first_of_row = first[group]
        order = np.argsort(first_of_row, kind="stable")
        starts = np.flatnonzero(np.diff(first_of_row[order], prepend=-1))
        borders = np.append(starts, len(numbers))[: None if limit is None else limit + 1]
        self.rows_not_taken["beyond_limit"] = len(numbers) - int(borders[-1])
        return numbers[order[: borders[-1]]], borders

    def held_out(self) -> Iterator[ImageSource | VideoSource]:
        """Gives the pictures and videos that a hash has put into "validation", opened for "train".

        Of the rows that were looked at on opening: those named by a URL or path, each once, and
        those that a row embeds beside others. A single embedded one is named by its content, which
        is in one split anyway.
        """
        names = TextSet()
        for number in self._held_out:
            with suppress(SampleError), self.naming_row(number):
                example = self._example(self.rows[number])
                for each in [*example_images(example), *example_videos(example)]:
                    if names.add(self._image_name(each, whole=True)):
                        yield each

    def _marks(self) -> Iterator[tuple[int, int, bool]]:
        """Reads the rows in order; counts those that cannot be read.

        Yields:
          Number, hash of what the row is about, and whether that has a name that is not its content
          alone: a URL, a path, or several pictures.
        """
        for number, row in enumerate(self.rows.attempts()):
            self.num_rows_read += 1
            try:
                with self.naming_row(number):
                    if isinstance(row, Exception):
                        raise row
                    example = self._example(row)
                    mark = self._mark(example)
            except SampleError as error:
                self.left_out[error.reason] += 1
                self._left_out_numbers.append(number)
                continue
            media = [*example_images(example), *example_videos(example)]
            named = len(media) > 1 or any(not isinstance(each, bytes) for each in media)
            yield number, mark, named

    def _mark(self, example: Mapping[str, Any]) -> int:
        """Hashes what the example is about: its images, or its text; 64 bits."""
        names = [self._image_name(image) for image in example_images(example)]
        names += [self._image_name(video) for video in example_videos(example)]
        if not names:
            names = [json.dumps(example["message_list"], sort_keys=True)]
        return hash_text("\0".join([self.split_salt, *names]))

    def _image_name(self, image: ImageSource | VideoSource, *, whole: bool = False) -> str:
        """Names an image: the same wherever its folder is; or `whole`, as no other folder does."""
        if isinstance(image, PageImage):  # all pages of a document are of one split
            image = image.document
        if isinstance(image, Path | RemoteImage):
            place = image if isinstance(image, Path) else image.url
            return str(place) if whole else self.rows.relative_name(place)
        return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image)


def class_files(kind: type[Dataset]) -> list[Path]:
    """Lists the files of code of a class and its bases, and what they import from beside them."""
    files: set[Path] = set()
    for name in {base.__module__ for base in kind.__mro__} - {__name__}:
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is not None and name.partition(".")[0] not in sys.stdlib_module_names:
            files |= {Path(path), *code_beside(Path(path), name)}
    return sorted(files)


class HfDataset(DatasetBase):
    """A dataset of the Hugging Face hub, or a local copy of its Parquet or Arrow files."""

    PATH: ClassVar[str]
    """Repository id on the hub."""
    REVISION: ClassVar[str | None] = None
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    """Columns that a row must have; alternatives are joined by "|", such as "image|image_url"."""

    def load(self) -> Rows:
        """Opens the hub's or the folder's rows, and checks their schema."""
        if self.source == "hub":
            split = self._stored_split(None, self.split)
            return hub_rows(self.PATH, revision=self.REVISION, split=split, want=self.COLUMNS)
        layout = local_layout(self.source, unmatched=self.unmatched)
        return local_rows(
            self.source,
            split=self._stored_split(layout, self.split),
            want=self.COLUMNS,
            unmatched=self.unmatched,
            layout=layout,
        )

    @classmethod
    def source_files(cls, source: str, split: str, *, unmatched: Unmatched) -> Sequence[Path | str]:
        """Lists the files of the split, and those that say which files are of it."""
        if source in ("hub", "sample"):
            return []
        layout = local_layout(source, unmatched=unmatched)
        stored = cls._stored_split(layout, split)
        names = layout.files(stored, unmatched=unmatched, where=source)
        places = [storage.join(source, name) for name in [*names, *layout.configured_by]]
        return [Path(each) if storage.is_local(each) else each for each in places]

    @classmethod
    def _stored_split(cls, layout: SplitLayout | None, split: str) -> str:
        """Names the split of the source that holds a split; "train" where a hash divides it."""
        own = layout is not None and "validation" in layout.splits
        divided = cls.validation_share and split in ("train", "validation") and not own
        return "train" if divided else split


class SampleRows(Sequence[Mapping[str, Any]]):
    """The generated rows of a dataset, made when asked for."""

    def __init__(self, dataset: DatasetBase, seed: int, count: int) -> None:
        self._dataset, self._seed, self._count = dataset, seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._dataset.sample_row(self._seed, int(i))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(self._count))


def row_image(row: Mapping[str, Any], *, base: str = "") -> ImageSource:
    """Finds the image of a row: embedded bytes, a local path or a URL.

    Args:
      row: Has `image` (bytes, the hub's {"bytes", "path"}, a path or a scene) or `image_url`.
      base: Folder or URL that relative paths start from.

    Raises:
      SampleError: `row_image`.
    """
    image = row.get("image")
    if isinstance(image, Mapping):  # the hub's; both of its fields may be empty
        image = image.get("bytes") or image.get("path")
    return _image_source(row.get("image_url") if image is None else image, row, base)


def row_images(row: Mapping[str, Any], *, base: str = "") -> list[ImageSource]:
    """Finds the images of a row that has several; as `row_image`.

    Args:
      row: Has `images` or `image_urls`, lists.
      base: Folder or URL that relative paths start from.

    Raises:
      SampleError: `row_image`.
    """
    return [_image_source(image, row, base) for image in row.get("images") or row["image_urls"]]


def _image_source(image: Any, row: Mapping[str, Any], base: str) -> ImageSource:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return resolve_image(image, base=base)
    if isinstance(image, bytes | Path | SceneImage | Image.Image | np.ndarray):
        return image
    raise SampleError("row_image", fields=sorted(row), got=type(image).__name__)


def _found_images(example: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the images that an adapter has only named; names start from the working directory."""
    image = example.get("image")
    if isinstance(image, list | tuple):
        return {"image": [_found_image(each) for each in image]}
    return {} if image is None else {"image": _found_image(image)}


def _found_image(image: Any) -> Any:
    named = isinstance(image, str | Mapping | bytearray | memoryview)
    return resolve_image(image, base="") if named else image


def example_images(example: Mapping[str, Any]) -> list[ImageSource]:
    """Lists the images of an example: none, the one, or several.

    Names start from the working directory.

    Raises:
      SampleError: `row_image`, `row_image_data`.
    """
    image = example.get("image")
    if image is None:
        return []
    images = [_found_image(i) for i in (image if isinstance(image, list | tuple) else [image])]
    for each in images:
        if not isinstance(each, ImageSource):
            raise SampleError("row_image", fields=sorted(example), got=type(each).__name__)
    return images


def _in_memory(example: dict[str, Any]) -> dict[str, Any]:
    """Replaces local images of an example by their bytes; a file that is missing stays a name."""
    image = example.get("image")
    if isinstance(image, list | tuple):
        return {**example, "image": [_bytes_of(each) for each in image]}
    return {**example, "image": _bytes_of(image)} if isinstance(image, Path) else example


def _bytes_of(image: ImageSource) -> ImageSource:
    if isinstance(image, PageImage) and isinstance(image.document, Path):
        return replace(image, document=read_file(image.document))
    return image.read_bytes() if isinstance(image, Path) and image.is_file() else image


def _found_videos(example: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the videos that an adapter has only named."""
    return {"video": example_videos(example)} if example.get("video") is not None else {}


def example_videos(example: Mapping[str, Any]) -> list[VideoSource]:
    """Lists the videos of an example; names start from the working directory."""
    video = example.get("video")
    if video is None:
        return []
    return [_found_image(v) for v in (video if isinstance(video, list | tuple) else [video])]


def example_subtitles(example: Mapping[str, Any]) -> list[list[Subtitle]]:
    """Lists the subtitles of each video of an example.

    Raises:
      SampleError: `subtitles`.
    """
    number, value = len(example_videos(example)), example.get("subtitles")
    if value is None:
        return [[]] * number
    values = [value] if number == 1 else value
    if not isinstance(values, list | tuple) or len(values) != number:
        raise SampleError("subtitles.number", videos=number)
    return [row_subtitles(each) for each in values]


Clip = tuple[float | None, float | None]
"""Start and end of a part of a video, in seconds."""


def example_clips(example: Mapping[str, Any]) -> list[Clip | None]:
    """Lists the parts of its videos that an example is about; None for a whole video.

    Raises:
      SampleError: `video_clip`: it is not such a pair, or there are not as many as videos.
    """
    clip, videos = example.get("clip"), example.get("video")
    number = len(videos) if isinstance(videos, list | tuple) else int(videos is not None)
    if clip is None:
        return [None] * number
    several = isinstance(clip, list | tuple) and any(isinstance(c, list | tuple) for c in clip)
    clips = list(clip) if several else [clip]
    if len(clips) != number:
        raise SampleError("video_clip.number", clips=len(clips), videos=number)
    return [_clip(each) for each in clips]


def _clip(clip: Any) -> Clip | None:
    if clip is None:
        return None
    pair = isinstance(clip, list | tuple) and len(clip) == 2
    if not pair or not all(v is None or _is_time(v) for v in clip):
        raise SampleError("video_clip.field", got=str(clip)[:80])
    start_s, end_s = (None if v is None else float(v) for v in clip)
    return start_s, end_s


def _is_time(value: object) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and 0 <= value < 1e9  # type: ignore[operator]


def image_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Collects what a row says of its image, for the example's metadata."""
    return {name: row[name] for name in ("image_url", "image_sha256") if row.get(name)}


def required(value: Value, *, reason: str) -> Value:
    """Gives a value back, as it is, if there is anything in it but space.

    Raises:
      SampleError: `reason`, such as `no_label`, which has its own entry in `errors.toml`.
    """
    if not value or (isinstance(value, str) and not value.strip()):
        raise SampleError(reason)
    return value


def as_records(value: Any) -> list[dict[str, Any]]:
    """Reads a list of records, stored as such or, as the hub also does it, as a record of lists.

    >>> as_records({"x": [1, 2], "y": [3, 4]}) == as_records([{"x": 1, "y": 3}, {"x": 2, "y": 4}])
    True
    """
    if isinstance(value, Mapping):
        return [
            dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)
        ]
    return [dict(record) for record in value or ()]


def xy_pairs(points: Any) -> list[list[float]]:
    """Reads points as [x, y] pairs, in their own unit and order.

    >>> xy_pairs({"x": [1.5], "y": [2.0]})
    [[1.5, 2.0]]
    """
    return [[float(point["x"]), float(point["y"])] for point in as_records(points)]


def scene_texts(seed: int, idx: int) -> tuple[str, tuple[str, ...]]:
    """Gives the caption and the transcripts of a generated scene, without drawing it."""
    plan = plan_scene(seed, idx)
    return plan.caption, plan.transcripts
