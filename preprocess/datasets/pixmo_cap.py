"""PixMo-Cap: long captions of web images, with the spoken descriptions that they were made from.

Public schema (card of allenai/pixmo-cap): image_url str, caption str, transcripts list[str]. The
card has one split; Molmo sets 2,048 of about 717,000 rows aside for validation. Here the share is
the same but the choice is a hash of the image's identity, so it does not depend on which links
are alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset, SceneImage, row_image, scene_texts
from shardspec.errors import SampleError


class PixMoCap(HfDataset):
    """PixMo-Cap in one of five modes.

    captions: the caption. transcripts: every transcript, each a conversation. transcript: the
    first.
    transcript_and_caption: the caption, and one transcript drawn in each epoch (Molmo's
    pre-training). transcript1_and_caption: the caption and the first transcript.
    """

    name: ClassVar[str] = "pixmo_cap"
    PATH: ClassVar[str] = "allenai/pixmo-cap"
    COLUMNS: ClassVar[tuple[str, ...]] = ("image|image_url", "caption", "transcripts")
    modes: ClassVar[tuple[str, ...]] = (
        "transcript_and_caption",
        "captions",
        "transcripts",
        "transcript",
        "transcript1_and_caption",
    )
    validation_share: ClassVar[float] = 2048 / 717_042

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        transcripts = _texts(row["transcripts"])
        caption = {"style": "long_caption", "text": row["caption"]}
        messages: list[dict[str, Any]] = []
        if "caption" in self.mode:
            messages.append(caption)
        if transcripts:
            if self.mode == "transcript_and_caption":
                messages.append({"style": "transcript", "alternatives": transcripts})
            elif self.mode == "transcripts":
                messages += [{"style": "transcript", "text": text} for text in transcripts]
            elif self.mode != "captions":
                messages.append({"style": "transcript", "text": transcripts[0]})
        return {
            "image": row_image(row, base=self.rows.base),
            "message_list": messages,
            "metadata": {"image_url": row.get("image_url") or ""},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: a drawn scene, its caption and its transcripts."""
        caption, transcripts = scene_texts(seed, idx)
        return {
            "image": SceneImage(seed=seed, idx=idx),
            "image_url": f"scene://{seed}/{idx}",
            "caption": caption,
            "transcripts": list(transcripts),
        }


def _texts(transcripts: Any) -> list[str]:
    """Checks the column `transcripts` and drops its empty entries."""
    if transcripts is None:
        return []
    if isinstance(transcripts, str) or not all(isinstance(t, str | None) for t in transcripts):
        raise SampleError("row_field", got=type(transcripts).__name__)
    return [text for text in transcripts if text and text.strip()]


DATASET = PixMoCap
