"""Any other model of transformers: its own image processor runs where batches are made.

What such a processor makes of a picture is known to it alone. So pictures are stored as they are,
and the tokens of a conversation with those that the model's processor writes for its pictures: they
are counted once, when a dataset is built, and no view can request other ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from shardspec.families.plan import Family, Filter, PicturePlan, PictureTokens, Positions, Size

_REFUSED: Mapping[str, str] = {
    "mllama": "its pictures enter by cross attention, whose masks are those of one batch",
    "idefics": "its pictures enter by cross attention",
    "qwen3_5": "its linear attention keeps a state over a row",
    "qwen3_5_moe": "its linear attention keeps a state over a row",
    "qwen4_exp": "its linear attention keeps a state over a row",
    "lfm2_vl": "its convolutions keep a state over a row",
    "nemotron_h_omni": "its state-space layers keep a state over a row",
    "blip-2": "its pictures are queries beside the text",
    "instructblip": "its pictures are queries beside the text",
    "fuyu": "its patches are part of the text's arrays",
    "llama4": "its pixels are bfloat16 and its tokens depend on the shapes of a batch",
}
"""Models whose examples are more than a sequence and the rows of its pictures."""

_STATEFUL = ("linear_attention", "conv", "mamba", "mamba2", "recurrent")
"""Layers that are not attention, as configurations name them."""

_PACKED = frozenset(
    {
        *("aya_vision", "deepseek_vl", "exaone4_5", "hyperclovax_vision_v2", "lighton_ocr"),
        *("ovis2", "qianfan_ocr", "video_llama_3", "vipllava"),
    }
)
"""Plain decoders whose packed rows were compared with their samples alone."""


def refusal(config: Mapping[str, Any]) -> str:
    """Says why a model cannot be fed by sequences and the outputs of its image processor.

    Args:
      config: The document config.json.

    Returns:
      The reason; "" where there is none.
    """
    kind = str(config.get("model_type", ""))
    if kind in _REFUSED:
        return _REFUSED[kind]
    for part in _parts(config):
        if part.get("is_encoder_decoder"):
            return "it has an encoder for texts"
        if part.get("cross_attention_layers"):
            return "its pictures enter by cross attention"
        if found := sorted({*_STATEFUL} & {*map(str, part.get("layer_types") or ())}):
            return f"its layers of the kind {found[0]} keep a state over a row"
    return ""


def packs_as_plain_decoder(config: Mapping[str, Any]) -> bool:
    """Returns True if restarting positions are known to keep the examples of a row apart."""
    three = any("mrope_section" in part for part in _parts(config))
    return config.get("model_type") in _PACKED and not three


def _parts(document: Any) -> Iterator[Mapping[str, Any]]:
    """Lists a document and all documents inside of it."""
    if isinstance(document, Mapping):
        yield document
        for value in document.values():
            yield from _parts(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The picture side of a model whose image processor runs itself."""

    kind: ClassVar[str] = "processor"
    positions: ClassVar[Positions] = "plain"
    filter: ClassVar[Filter] = "bicubic"
    mean: ClassVar[tuple[float, float, float]] = (0.0, 0.0, 0.0)
    std: ClassVar[tuple[float, float, float]] = (1.0, 1.0, 1.0)
    """Without meaning: pictures are stored as they are, and values are made by the processor."""

    model_type: str
    image_processor: str
    """Name of its class in transformers, of the torchvision back end."""
    settings: str
    """The arguments of the class, a JSON object."""
    options: str = "{}"
    """What the model's processor passes beside the pictures, a JSON object."""
    unused: tuple[str, ...] = ()
    """Outputs that the model does not take."""
    image_token: str
    marker: str
    """What a chat template writes where a picture is."""
    type_ids: str = ""
    packs: bool = False
    """Whether it is a plain decoder, whose positions are known too."""

    @property
    def tokens(self) -> PictureTokens:
        return PictureTokens(soft=self.image_token, marker=self.marker)

    def plan(self, size: Size) -> PicturePlan:
        """Plans nothing: the tokens of pictures are among those of the text."""
        return PicturePlan(resized=size, layout=())

    def stored_size(self, size: Size) -> Size:
        return size

    def unlike(self, stored: Family) -> dict[str, str]:
        if self == stored:
            return {}
        return {"family": "a processor's pictures are seen as they were when the dataset was built"}

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Gives the arguments of the image processor's class and those of each call."""
        return json.loads(self.settings), json.loads(self.options)
