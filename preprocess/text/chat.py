"""The markup around a conversation's turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from preprocess.text.chat_template import TemplateFrame
from preprocess.text.policy import MessageFormat
from shardspec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatFrame:
    """The markup around the turns of Molmo's own formats, as text.

    A prompt is `first` (or `later`, from the second turn on) + user text + `suffix`; a response is
    `response_prefix` + text. The end-of-turn token follows a response in the sequence itself.
    """

    folds_system: ClassVar[bool] = True
    """A system text is part of the first user text, as in Molmo 2."""

    first: str
    later: str
    suffix: str
    response_prefix: str

    def frame(
        self, user: str, response: str, *, first: bool, last: bool, system: str = ""
    ) -> tuple[str, str]:
        """Puts the markup around one exchange: (prompt, response); see `TemplateFrame.frame`."""
        del last, system
        return (self.first if first else self.later) + user + self.suffix, (
            self.response_prefix + response
        )


@dataclass(frozen=True, kw_only=True)
class BareFrame:
    """No markup at all: the texts are rendered later, by the chat template of a model."""

    folds_system: ClassVar[bool] = False
    """The template renders it."""

    def frame(
        self, user: str, response: str, *, first: bool, last: bool, system: str = ""
    ) -> tuple[str, str]:
        """Gives the texts as they are; see `TemplateFrame.frame`."""
        del first, last, system
        return user, response


Frame = BareFrame | ChatFrame | TemplateFrame


def chat_frame(message_format: MessageFormat, template: TemplateFrame | None) -> Frame:
    """Gives the markup of a message format.

    Args:
      message_format: See `TextPolicy`.
      template: The frame of the tokenizer's chat template, needed by "template".

    Raises:
      ConfigError: `no_chat_template`.
    """
    if message_format == "none":
        return ChatFrame(first="", later=" ", suffix="", response_prefix=" ")
    if message_format == "role":
        return ChatFrame(
            first=" User: ", later=" User: ", suffix=" Assistant:", response_prefix=" "
        )
    if message_format == "chatml":
        return ChatFrame(
            first="<|im_start|>user\n",
            later="\n<|im_start|>user\n",
            suffix="<|im_end|>\n<|im_start|>assistant\n",
            response_prefix="",
        )
    if template is None:
        raise ConfigError("no_chat_template")
    return template


def image_prefixes(num_images: int) -> list[str]:
    """Names the images of an example for the text before them; one image needs no name.

    >>> image_prefixes(1), image_prefixes(2)
    ([''], ['Image 1', 'Image 2'])
    """
    if num_images < 2:
        return [""] * num_images
    return [f"Image {number}" for number in range(1, num_images + 1)]
