"""The markup around a conversation's turns."""

from __future__ import annotations

from preprocess.text.policy import MessageFormat
from preprocess.text.tokens import ChatFrame
from shardspec.errors import ConfigError


def chat_frame(message_format: MessageFormat, template: ChatFrame | None) -> ChatFrame:
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
