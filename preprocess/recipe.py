"""The recipe: everything that decides what a sample's bytes are, and `prepare`, which applies it.

`Preparer` is the offline half of the pipeline as one pure callable: format, tokenize, resize. The
build job calls it for each row; the unsharded path hands it to the loader's `MolmoPreprocessor`.
Nothing that training redraws is drawn here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from preprocess.datasets import (
    Clip,
    EpisodeFrame,
    ImageSource,
    PageImage,
    RemoteImage,
    SceneImage,
    SceneVideo,
    VideoSource,
    example_clips,
    example_images,
    example_subtitles,
    example_videos,
)
from preprocess.formats import parse_messages
from preprocess.media import (
    ImagePolicy,
    ImagePreprocessor,
    MemoryBudget,
    VideoPolicy,
    VideoPreparer,
)
from preprocess.model import ChatModel, conversations, tokenized_conversations
from preprocess.settings import Setting
from preprocess.text import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    BareFrame,
    Branch,
    DataFormatter,
    Frame,
    FrameLead,
    InterleavedTextPreprocessor,
    SubtitleText,
    TextPolicy,
    TokenizedText,
    Tokenizer,
    VideoFacts,
    add_ocr,
    answer_flags,
    chat_as_written,
    chat_frame,
    chat_names,
    check_action_tokens,
    digit_ids,
    has_times,
    image_prefixes,
    media_placeholder,
    message_styles,
    message_texts,
    movable_geometry,
    name_pages,
    place_media,
    place_subtitles,
    safe_geometry,
    spelled_action,
    styles_of,
    system_text,
    word_groups,
)
from shardspec.errors import ConfigError, SampleError
from shardspec.families import family_to_dict, plan_videos
from shardspec.index import longest_sequence
from shardspec.manifest import canonical_json
from shardspec.sample import (
    Geometry,
    PreparedImage,
    PreparedSample,
    image_rows,
    spans_table,
    video_rows,
)
from shardspec.tiling import FrameView, num_image_tokens

KEY_BYTES = 12
"""96 bits: among 10**10 samples the chance of any collision is about 10**-9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The settings that a sample's bytes follow from."""

    text: TextPolicy = field(default_factory=TextPolicy)
    image: ImagePolicy = field(default_factory=ImagePolicy)
    video: VideoPolicy = field(default_factory=VideoPolicy)
    """Counts for datasets with videos only."""
    seed: Annotated[
        int, Setting("seed of the baked draws and of the stored order", group="what to build")
    ] = 0

    def to_dict(self) -> dict[str, Any]:
        """Gives the recipe in plain JSON types, for hashing and for the manifest."""
        image = {
            f.name: getattr(self.image, f.name)
            for f in dataclasses.fields(self.image)
            if f.name not in ("views", "family")
        }
        if self.image.decode == "full":  # manifests from before there was a choice say nothing
            del image["decode"]
        image["limits"] = dataclasses.asdict(self.image.limits)
        if self.image.family is not None:
            image["family"] = family_to_dict(self.image.family)
        views = [view.to_dict() for view in self.image.views]
        text = {f.name: getattr(self.text, f.name) for f in dataclasses.fields(self.text)}
        text["styles"] = self.text.styles.to_dict()
        if not text["styles"]:
            del text["styles"]
        if self.text.actions == "bins":  # manifests from before there was a choice say nothing
            del text["actions"]
        if not self.text.movable:
            del text["movable"]
        return {"text": text, "image": {**image, "views": views}, "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedExample:
    """An example whose images are decoded and whose texts are not formatted yet."""

    key: str
    example: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    """Those of the row, for the record."""
    geometry: Geometry
    images: tuple[PreparedImage, ...]
    videos: Sequence[bytes | Path | SceneVideo]
    clips: Sequence[Clip | None]
    subtitles: Sequence[Sequence[Any]]
    num_bytes: int
    """Memory that its files and pixels take."""
    sizes: Sequence[tuple[int, int]]
    """(width, height) of its images, those of one window."""
    branches: tuple[Branch, ...] | None = None
    """Its conversations; None before `Preparer.format`, and with videos, whose frames they name."""


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """Turns an example into a prepared sample. A value: it can be sent to worker processes."""

    recipe: Recipe
    tokenizer: Tokenizer
    read_url: Callable[[str], bytes] | None = None
    """Reads the bytes of a URL, for example from a blob cache; None refuses URLs."""
    model: ChatModel | None = None
    """The model whose chat template makes the text; None for the recipe's message format."""
    memory: MemoryBudget | None = None
    """What decoding may take in all processes together; None for no bound but each image's own."""

    @cached_property
    def frame(self) -> Frame:
        """The markup that the message format puts around turns.

        Raises:
          ConfigError: `no_chat_template`, `tokenizer_format`.
        """
        if self.model is not None:
            return BareFrame()
        wanted = self.recipe.text.message_format
        frame = chat_frame(wanted, self.tokenizer.chat)
        if not self.tokenizer.fits(wanted):
            raise ConfigError(
                "tokenizer_format",
                where=self.tokenizer.name,
                got=self.tokenizer.message_format,
                want=wanted,
            )
        return frame

    @cached_property
    def formatter(self) -> DataFormatter:
        """The text half: kept, because its generator is costly to make.

        Raises:
          ConfigError: `styles_value`: the style sheet of the recipe cannot be used.
        """
        self.check_styles()
        return DataFormatter(policy=self.recipe.text, frame=self.frame, seed=self.recipe.seed)

    def check_styles(self) -> None:
        """Refuses a style sheet whose texts would be read as markup, or that means nothing.

        Raises:
          ConfigError: `styles_value`.
        """
        sheet = self.recipe.text.styles
        styles_of(sheet)
        word_groups(sheet.paraphrase, sheet.builtin_paraphrases)
        for name, text in sheet.texts():
            found = self.tokenizer.control_token(text) or media_placeholder(text)
            if found:
                raise ConfigError(
                    "styles_value.problem",
                    where=sheet.path,
                    name=name,
                    got=text,
                    problem=f"has {found}, which would be read as markup",
                    hint="leave it out",
                )

    @cached_property
    def action_vocab_size(self) -> int | None:
        """Ids that action tokens are counted back from; None where actions are text.

        Raises:
          ConfigError: `action_tokens`: texts are made by a chat template, or the vocabulary ends
            in control tokens.
        """
        if self.recipe.text.actions == "bins":
            return None
        if self.model is not None or self.recipe.text.message_format == "template":
            raise ConfigError("action_tokens.template", actions=self.recipe.text.actions)
        ids, size = self.tokenizer.special_ids, self.tokenizer.own_size
        check_action_tokens(self.tokenizer.json, ids, size=size)
        return size

    @cached_property
    def digits(self) -> tuple[int, ...]:
        """The ids that spell numbers, where points may be moved; () where they are not.

        Raises:
          ConfigError: `movable`: it is for a model of another kind, or the tokenizer does not spell
            numbers digit by digit.
        """
        if not self.recipe.text.movable:
            return ()
        if self.model is not None:
            raise ConfigError("movable.model")
        found = digit_ids(self.tokenizer.encode)
        if not found:
            raise ConfigError("movable.tokenizer", where=self.tokenizer.name)
        return found

    @cached_property
    def image_preprocessor(self) -> ImagePreprocessor:
        """The image half."""
        return ImagePreprocessor(self.recipe.image, memory=self.memory)

    @cached_property
    def frame_view(self) -> FrameView:
        """How the frames of videos are seen."""
        return FrameView(pool=(self.recipe.video.pool, self.recipe.video.pool))

    @cached_property
    def video_preparer(self) -> VideoPreparer:
        """Makes the frames of a video; it keeps a process that decodes."""
        return VideoPreparer(self.recipe.video, self.recipe.image)

    def __call__(
        self, example: Mapping[str, Any], *, key: str | None = None, for_storing: bool = False
    ) -> PreparedSample:
        """Prepares one example.

        Args:
          example: As `preprocess.datasets.base` describes it.
          key: The sample's key; None computes it from the image's bytes and the text.
          for_storing: Whether images that are kept as their files need no pixels.

        Raises:
          SampleError: The example cannot become a sample; `reason` says why.
        """
        return self.finish(self.format(self.open(example, key=key, for_storing=for_storing)))

    def open(
        self, example: Mapping[str, Any], *, key: str | None = None, for_storing: bool = False
    ) -> OpenedExample:
        """Checks the texts of an example and decodes its images: the first step of `__call__`.

        Args and errors are those of `__call__`.
        """
        if "messages" in example and "message_list" not in example:
            example = parse_messages(example)
        if not example.get("message_list"):
            raise SampleError("no_message.row", where=key or "")
        found = example_images(example)
        videos = [self._video_file(video) for video in example_videos(example)]
        clips = example_clips(example)
        sources = [self._read(image) for image in found]
        if key is None:
            identities = [*map(image_identity, found, sources)]
            identities += map(video_identity, videos, clips)
            key = sample_key(example, image_id=images_identity(identities))
        told = example["message_list"]
        subtitles = example_subtitles(example)
        if videos and self.model is not None:
            self._check_model_videos(self.model, subtitles, key)
        example = add_ocr(example, encode=self.tokenizer.encode)
        if self.model is not None:  # its template places the images itself
            example = name_pages(example)
        texts = message_texts(example)
        keeps = self.recipe.text.reasoning == "keep"
        for text, is_answer in zip(texts, answer_flags(example), strict=True):
            if videos:  # their placeholder may be a token of the tokenizer
                text = text.replace(VIDEO_PLACEHOLDER, "")
            control = self.tokenizer.control_token(text, reasoning=keeps and is_answer)
            if control:
                raise SampleError("control_token", where=key, control=control)
            if self.action_vocab_size and (token := spelled_action(text)):
                raise SampleError("control_token", where=key, control=token)
            spelled = media_placeholder(text)
            if spelled and self.recipe.text.placeholders == "refuse":
                raise SampleError("media_placeholder", where=key, spelled=spelled)
        for text in [*chat_names(example), *(text for lines in subtitles for _, _, text in lines)]:
            if control := self.tokenizer.control_token(text) or media_placeholder(text):
                raise SampleError("control_token", where=key, control=control)
        known = self.formatter.styles
        geometry = safe_geometry(texts, styles=message_styles(example), known=known)
        if example.get("rigid"):
            geometry &= Geometry.COLOR
        images = tuple(
            self.image_preprocessor(
                source,
                geometry=geometry,
                where=key,
                frame=image.frame if isinstance(image, PageImage) else 0,
                for_storing=for_storing,
            )
            for image, source in zip(found, sources, strict=True)
        )
        sizes = [(image.source_width, image.source_height) for image in images]
        windows = example.get("windows") or ()
        if windows:
            if videos or any(IMAGE_PLACEHOLDER in text for text in texts):
                raise SampleError("sample_windows.media", where=key)
            sizes = window_sizes(windows, sizes, num_messages=len(told), key=key)
        return OpenedExample(
            key=key,
            example=example,
            messages=told,
            geometry=geometry,
            images=images,
            sizes=sizes,
            videos=videos,
            clips=clips,
            subtitles=subtitles,
            num_bytes=sum(map(_held_bytes, [*sources, *videos, *(each.pixels for each in images)])),
        )

    def format(self, opened: OpenedExample) -> OpenedExample:
        """Formats the texts of an example: the second step of `__call__`.

        Raises:
          SampleError: As `__call__`.
        """
        if opened.videos:
            return opened
        formatted = self.formatter(opened.example, key=opened.key, image_sizes=opened.sizes)
        return replace(opened, branches=formatted)

    def tokenize(self, examples: Iterable[OpenedExample]) -> None:
        """Tokenizes texts of formatted examples, which `finish` then finds.

        Between the other work of a sample it takes up to twice as long: the processor's caches do
        not hold both. Texts that are tokenized in parts are left to `finish`.
        """
        if self.model is not None or self.tokenizer.chat or self.action_vocab_size is not None:
            return
        turns = (
            turn for each in examples for branch in each.branches or () for turn in branch.turns
        )
        texts = {text for turn in turns for each in turn for text in (each.prompt, each.response)}
        self.tokenizer.remember(text for text in texts if IMAGE_PLACEHOLDER not in text)

    def finish(self, opened: OpenedExample) -> PreparedSample:
        """Tokenizes the texts of an example and lays it out: the last step of `__call__`.

        Raises:
          SampleError: As `__call__`.
        """
        example, key, images = opened.example, opened.key, opened.images
        told, geometry = opened.messages, opened.geometry
        videos, clips, subtitles = opened.videos, opened.clips, opened.subtitles
        sizes, windows = opened.sizes, example.get("windows") or ()
        # Texts name frames of the first video, as `add_video_facts` has it.
        named = int(len(videos) > 0 and any(map(has_times, told)))
        stored = [
            self.video_preparer(
                video.read() if isinstance(video, SceneVideo) else video,
                clip=clip,
                geometry=geometry,
                # The tokens of a model's video are those of its frames: they are not drawn.
                draws=number >= named and self.model is None,
                where=key,
            )
            for number, (video, clip) in enumerate(zip(videos, clips, strict=True))
        ]
        facts = [
            VideoFacts(
                frame_times_s=shown.times_s,
                clip=clip,
                size=(shown.record["width"], shown.record["height"]),
            )
            for shown, clip in zip(stored, clips, strict=True)
        ]
        branches = opened.branches
        if branches is None:
            branches = self.formatter(example, key=key, image_sizes=sizes, videos=facts)
        if not branches:
            raise SampleError("no_message.row", where=key)
        placed: Sequence[Branch] = branches
        places = [0] * len(stored)
        if self.model is None or stored:
            placed, places = place_media(
                branches, num_images=len(sizes), num_videos=len(stored), key=key
            )
        if self.model is not None:  # its template writes videos otherwise than images
            placed = branches
        video_policy = self.recipe.video
        said = [
            place_subtitles(
                lines,
                form=video_policy.subtitles,
                max_tokens=video_policy.subtitle_tokens,
                window_s=video_policy.subtitle_window_s,
                clip=clip or (None, None),
                frame_times_s=shown.times_s,
                count=lambda text: len(self.tokenizer.encode(text)),
            )
            for lines, clip, shown in zip(subtitles, clips, stored, strict=True)
        ]
        frames: list[FrameLead | None] = [None] * len(images) if stored else []
        rows = []
        first = len(images)
        for shown, place in zip(stored, places, strict=True):
            rows.append((first, len(shown.times_s), place))
            first += len(shown.times_s)
            images = (*images, *shown.images)
            frames += [FrameLead(time_s=time_s) for time_s in shown.times_s]
        prepared_clips = tuple(shown.clip for shown in stored if shown.clip is not None)
        tokenized = self._tokenized(
            example,
            placed,
            sizes=sizes,
            frames=frames,
            subtitles=[placed.lines for placed in said],
            movable=None if stored or windows else self._movable(example, len(sizes), geometry),
            videos=[shown.times_s for shown in stored],
            key=key,
        )
        spans = spans_table(
            tokenized.rows,
            images,
            leads=tokenized.leads,
            videos=rows,
            subtitles=tokenized.subtitles,
            clips=prepared_clips,
            windows=windows,
            points=tokenized.points,
            named=named,
        )
        if self.model is not None and prepared_clips:
            # Refuses what frames are refused for when they are resized.
            shapes = [(int(row[3]), int(row[2])) for row in image_rows(spans)]
            plan_videos(self.model.stored.family, shapes, [row[:2] for row in rows])
        record = {
            "key": key,
            "message_list": told,
            "metadata": example.get("metadata", {}),
        }
        described = [
            {**shown.record, **({"subtitles_left_out": text.left_out} if text.left_out else {})}
            for shown, text in zip(stored, said, strict=True)
        ]
        if described:
            record |= {"videos": described} if len(described) > 1 else {"video": described[0]}
        limit = example.get("max_tokens")
        if limit and (length := self._length(tokenized.tokens, spans, sizes)) > limit:
            raise SampleError("document_tokens", where=key, tokens=length, limit=limit)
        return PreparedSample(
            key=key,
            tokens=tokenized.tokens,
            spans=spans,
            images=images,
            clips=prepared_clips,
            record=record,
        )

    def _check_model_videos(
        self, model: ChatModel, subtitles: Sequence[Sequence[Any]], key: str
    ) -> None:
        """Refuses videos that the model gets nothing, or less, of.

        Raises:
          SampleError: `model_videos`.
        """
        if model.video is None:
            raise SampleError("model_videos.family", where=key, family=model.stored.family.kind)
        if any(subtitles) and self.recipe.video.subtitles != "none":
            raise SampleError("model_videos.subtitles", where=key)

    def _length(
        self, tokens: np.ndarray, spans: np.ndarray, sizes: Sequence[tuple[int, int]]
    ) -> int:
        """Counts the tokens of a document with its images and the frames of its videos.

        By the longest of the recipe's views; each image and video has a symbol in the text.
        """
        num_frames: int = sum(row[6] or row[3] for row in video_rows(spans).tolist())
        per_view = [
            sum(num_image_tokens(width, height, view) for width, height in sizes)
            + num_frames * self.frame_view.num_tokens(view)
            for view in self.recipe.image.views
        ]
        ids = self.tokenizer.special_ids
        placeholder = ids["<|image|>"]
        text, _ = longest_sequence(tokens, spans, placeholder=placeholder, bos="bos" in ids)
        return int(text + max(per_view))

    def _movable(
        self, example: Mapping[str, Any], num_images: int, safe: Geometry
    ) -> dict[int, int] | None:
        """Says what each image allows if its points move; None where that is no more than now."""
        if not self.digits or not num_images:
            return None
        known = self.formatter.styles
        allowed = movable_geometry(example, num_images=num_images, known=known)
        return dict.fromkeys(range(num_images), int(allowed)) if allowed & ~safe else None

    def _tokenized(
        self,
        example: Mapping[str, Any],
        branches: Sequence[Branch],
        *,
        sizes: Sequence[tuple[int, int]],
        frames: Sequence[FrameLead | None],
        subtitles: Sequence[Sequence[SubtitleText]],
        movable: Mapping[int, int] | None,
        videos: Sequence[Sequence[float]],
        key: str,
    ) -> TokenizedText:
        """Tokenizes the texts; `sizes` are (width, height) of the images that are not frames."""
        num_pictures = len(sizes)
        if self.model is None:
            interleave = InterleavedTextPreprocessor(
                tokenizer=self.tokenizer,
                action_tokens=self.action_vocab_size is not None,
                digits=self.digits,
            )
            return interleave(
                branches,
                key=key,
                leads=example.get("leads") or image_prefixes(num_pictures),
                frames=frames,
                subtitles=subtitles,
                movable=movable,
            )
        known = self.formatter.styles
        if any(known[style].bare for style in message_styles(example) if style in known):
            raise SampleError("loss_span", where=key, problem="documents are not for models yet")
        systems = [system_text(each, self.recipe.text) for each in example["message_list"]]
        chats = [
            None if chat is None else chat_as_written(chat, self.recipe.text)
            for chat in example.get("chats", [None] * len(branches))
        ]
        alternatives = conversations(branches, systems, chats)
        tokenized = tokenized_conversations(
            self.model,
            alternatives,
            sizes=[size[::-1] for size in sizes],
            videos=videos,
            key=key,
        )
        leads = [(0, 0, 0, 0, 0 if f is None else round(f.time_s * 1000)) for f in frames]
        return replace(tokenized, leads=tuple(leads))

    def _video_file(self, video: VideoSource) -> bytes | Path | SceneVideo:
        """Reads a video that is not a local file.

        Raises:
          SampleError: `image_url`: it is a URL, and there is nothing that reads it.
        """
        if isinstance(video, str | RemoteImage):
            payload: bytes = self._read(video)
            return payload
        return video

    def _read(self, image: ImageSource) -> Any:
        if isinstance(image, SceneImage | RemoteImage | EpisodeFrame):
            return image.read()
        if isinstance(image, PageImage):
            return image.read(memory=self.memory)
        if isinstance(image, Path):
            return read_path(image)
        if isinstance(image, str):
            if self.read_url is None:
                raise SampleError("image_url", where=image)
            return self.read_url(image)
        return image


def _held_bytes(value: Any) -> int:
    return len(value) if isinstance(value, bytes) else getattr(value, "nbytes", 0)


def window_sizes(
    windows: Sequence[Sequence[int]],
    sizes: Sequence[tuple[int, int]],
    *,
    num_messages: int,
    key: str,
) -> list[tuple[int, int]]:
    """Gives the sizes of the images of each window of an example.

    Args:
      windows: The numbers of the images of each.
      sizes: (width, height) of each image of the example.
      num_messages: Of the example.
      key: The sample's, for errors.

    Raises:
      SampleError: `sample_windows`.

    >>> window_sizes([[0, 1], [2, 1]], [(4, 3), (8, 8), (4, 3)], num_messages=2, key="")
    [(4, 3), (8, 8)]
    """
    known = range(len(sizes))
    if len(windows) != num_messages or not all(i in known for each in windows for i in each):
        raise SampleError("sample_windows.images", where=key, windows=len(windows))
    found = [[sizes[i] for i in each] for each in windows]
    if not found[0] or any(each != found[0] for each in found):
        raise SampleError("sample_windows.sizes", where=key)
    return found[0]


def read_path(path: Path) -> bytes:
    """Reads a local image file.

    Raises:
      SampleError: `image_missing`.
    """
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait for a writer
            raise SampleError("image_missing.special", where=str(path))
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise SampleError("image_missing.row", where=str(path), error=error) from error


def images_identity(identities: Iterable[str]) -> str:
    """Names a list of images in their order; a single image keeps its own name, no image is ""."""
    return " ".join(identities)


def image_identity(image: ImageSource, encoded: Any) -> str:
    """Names what an image is, for keys, splits and duplicates.

    Args:
      image: The example's image.
      encoded: Its bytes or pixels.

    Returns:
      sha256 of the encoded bytes (of shape and pixels for arrays); the numbers of a generated
      scene.
    """
    if isinstance(image, SceneImage):
        return f"scene:{image.seed}:{image.idx}"
    if isinstance(image, PageImage):
        return image.identity()
    if isinstance(encoded, bytes):
        return hashlib.sha256(encoded).hexdigest()
    pixels = np.ascontiguousarray(np.asarray(encoded))
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def video_identity(video: VideoSource, clip: Clip | None, *, sha256: str = "") -> str:
    """Names what a video is, and which part of it an example is about.

    Args:
      video: A video of the example.
      clip: The part; None for the whole.
      sha256: Of its file, if that is known.
    """
    if isinstance(video, SceneVideo):
        name = f"scene-video:{video.seed}:{video.idx}"
    else:
        if not sha256:
            assert isinstance(video, bytes | Path)
            sha256 = file_sha256(video)
        name = f"video:{sha256}"
    return name if clip is None else f"{name}@{clip[0]}-{clip[1]}"


def file_sha256(file: bytes | Path) -> str:
    """Hashes a video file, in parts.

    Raises:
      SampleError: `video_open`: it is not there.
    """
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    try:
        if not file.is_file():
            raise SampleError("video_open.missing", where=str(file))
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    except (OSError, ValueError) as error:
        raise SampleError("video_open.missing", where=str(file), error=error) from error
    return digest.hexdigest()


def sample_key(example: Mapping[str, Any], *, image_id: str) -> str:
    """Names a sample by its content: image identity and messages, 24 hex digits.

    The same row gives the same key in every source that delivers the same bytes.

    Raises:
      SampleError: `row_encoding`: a text holds half of a surrogate pair.
    """
    content = {"image": image_id, "message_list": example["message_list"]}
    if example.get("subtitles"):
        content["subtitles"] = example["subtitles"]
    try:
        text = canonical_json(content)
    except UnicodeEncodeError as error:
        raise SampleError("row_encoding.surrogate", got=ascii(error.object[error.start])) from error
    return hashlib.blake2b(text, digest_size=KEY_BYTES).hexdigest()


def repeated_key(key: str, number: int) -> str:
    """Names a further sample of the same content: `number` is 2 for the second."""
    return hashlib.blake2b(f"{key} {number}".encode(), digest_size=KEY_BYTES).hexdigest()
