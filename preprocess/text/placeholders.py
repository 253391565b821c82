"""Placeholders of media that other code bases spell in texts.

In their data they say where an image goes, or what was there. Here an image goes in front of the
texts or where a user text has `<|image|>`; any other spelling would be learned as text, and mostly
means that the row comes with media that nobody reads.
"""

from __future__ import annotations

import re

_MEDIA = "image|img|video|audio|vision|media"
_PART = (
    r"\d+|pad|patch|start|end|begin|bos|eos|sep|token|placeholder|soft|context|break|newline|row"
    r"|col|thumbnail|content|global|id"
)

_SPELLINGS = re.compile(
    r"<(?:image|video|audio)>"  # LLaVA, InternVL, MiniCPM; what trainers document
    rf"|</?(?:{_MEDIA})(?:[ _-]?(?:{_PART}))+>"  # <image 1>, <image_1>, <image_soft_token>
    rf"|<\|(?i:{_MEDIA})(?:[ _-]?(?:{_PART}))*\|>"  # <|image_1|>, <|vision_start|>, <|IMAGE|>
    rf"|<\|?(?:start|end|begin)_?of_?(?:{_MEDIA})\|?>"  # Gemma 3, GLM-4V, Janus
    r"|<img>[^<>]{0,500}</img>|<IMG_CONTEXT>|\[IMG(?:_BREAK|_END)?\]"  # Qwen-VL, InternVL, Pixtral
    r"|<[Ii]mageHere>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<boi>|<eoi>"
    r"|<tile_global_thumbnail>|<im_(?:start|end|patch|col|low)>|<low_res_im_start>"
    r"|<frame_(?:start|end)>"
    r"|<ref-object>|<bbox>(?![^<]*</bbox>)"  # ms-swift, which puts names and boxes there
)


def media_placeholder(text: str) -> str | None:
    """Finds a placeholder in a spelling that is not ours.

    HTML tags with attributes and `<img>` alone are text; `<|image|>` is ours. So is `<|video|>`,
    but only where there are videos: it is not to be in `text` there.

    >>> media_placeholder("<image>\\nWhat is it?"), media_placeholder('<img src="a.png">')
    ('<image>', None)
    """
    for found in _SPELLINGS.finditer(text):
        if found[0] != "<|image|>":
            return found[0]
    return None
