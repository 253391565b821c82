"""The text side of a vision-language model: its files, its chat template, what of it is learned.

Decides the tokens of a conversation, as the model's own chat template and tokenizer make them, and
which of them have loss. Never decides what is said in it (`preprocess.text`), and never opens an
image.
"""

from preprocess.model.conversation import Turn, Turns, conversations, tokenized_conversations
from preprocess.model.files import load_model
from preprocess.model.render import ChatModel

__all__ = [
    "ChatModel",
    "Turn",
    "Turns",
    "conversations",
    "load_model",
    "tokenized_conversations",
]
