"""From annotations to token ids: prompts, answers, points, choices, chat format, tokenization.

Decides every text that a model sees. Draws nothing that training redraws: alternatives are stored
as variants.
"""

from preprocess.text.actions import check_action_tokens, spelled_action
from preprocess.text.chat import BareFrame, ChatFrame, Frame, chat_frame, image_prefixes
from preprocess.text.chat_template import ANSWER, FIXED_DATE, USER, TemplateFrame
from preprocess.text.choices import ChoiceForm
from preprocess.text.formatter import (
    Branch,
    DataFormatter,
    Variant,
    chat_as_written,
    system_text,
)
from preprocess.text.geometry import movable_geometry, safe_geometry
from preprocess.text.interleaved import (
    FrameLead,
    InterleavedTextPreprocessor,
    TokenizedText,
    place_media,
)
from preprocess.text.message import (
    VideoFacts,
    answer_flags,
    chat_names,
    has_times,
    message_styles,
    message_texts,
)
from preprocess.text.movable import digit_ids
from preprocess.text.ocr import add_ocr, name_pages
from preprocess.text.own_styles import require_style, styles_of
from preprocess.text.paraphrase import word_groups
from preprocess.text.placeholders import media_placeholder
from preprocess.text.points import PointFormat
from preprocess.text.policy import MessageFormat, PromptTemplates, SystemPrompt, TextPolicy
from preprocess.text.sheet import StyleSheet, read_styles
from preprocess.text.subtitles import (
    SubtitleText,
    place_subtitles,
)
from preprocess.text.tokens import (
    EMBEDDED,
    IMAGE_PLACEHOLDER,
    IMAGE_SYMBOLS,
    VIDEO_PLACEHOLDER,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_entry,
)

__all__ = [
    "ANSWER",
    "EMBEDDED",
    "FIXED_DATE",
    "IMAGE_PLACEHOLDER",
    "IMAGE_SYMBOLS",
    "USER",
    "VIDEO_PLACEHOLDER",
    "BareFrame",
    "Branch",
    "ChatFrame",
    "ChoiceForm",
    "DataFormatter",
    "Frame",
    "FrameLead",
    "InterleavedTextPreprocessor",
    "MessageFormat",
    "PointFormat",
    "PromptTemplates",
    "StyleSheet",
    "SubtitleText",
    "SystemPrompt",
    "TemplateFrame",
    "TextPolicy",
    "TokenizedText",
    "Tokenizer",
    "Variant",
    "VideoFacts",
    "answer_flags",
    "add_ocr",
    "chat_as_written",
    "chat_frame",
    "chat_names",
    "check_action_tokens",
    "digit_ids",
    "has_times",
    "image_prefixes",
    "load_tokenizer",
    "media_placeholder",
    "message_styles",
    "message_texts",
    "movable_geometry",
    "name_pages",
    "place_media",
    "place_subtitles",
    "read_styles",
    "require_style",
    "safe_geometry",
    "spelled_action",
    "styles_of",
    "system_text",
    "tokenizer_from_entry",
    "word_groups",
]
