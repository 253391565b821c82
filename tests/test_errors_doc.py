"""docs/errors.md lists every error: it is made from `shardspec/errors.toml`, here.

UPDATE_GOLDEN=1 writes the page anew.
"""

import os
import re
import textwrap
from pathlib import Path

from shardspec import errors
from shardspec.messages import messages

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.ShardsError)
}
HEAD = """\
# Errors

Every error of the project, by its `reason`: what it means, and what to do. In Python,
`error.reason` is the word here, and `error.facts` holds the values of the message. On the command
line, search this page for words of the message. Words in *italics* stand for a value of the case
at hand.

Verbs end with an exit code: 0 = done, 1 = an error, 2 = too many rows were left out or a flag is
wrong, 3 = the output holds another job, 4 = a shard is missing or damaged, 130 = ended by Ctrl-C.
"""


def shown(text):
    """A text of the table as Markdown: its facts in italics, the rest as it is printed."""
    text = re.sub(r"\s+", " ", text).replace("{{", "\0").replace("}}", "\1")
    text = re.sub(r"\{(\w+)[^{}]*\}", r"*\1*", text)
    return text.replace("\0", "{").replace("\1", "}").replace("<", "\\<").strip()


def page():
    """Builds the page, one section for each class and one entry for each reason."""
    table = {}
    for code, message in messages().items():
        reason = code.split(".")[0]
        table.setdefault(message.error, {}).setdefault(reason, []).append(message)
    parts = [HEAD]
    for kind in sorted(table):
        described = CLASSES[kind].__doc__.strip().splitlines()[0]
        parts.append(f"## {kind}\n\n{described}\n")
        for reason, texts in sorted(table[kind].items()):
            lines = [f"### `{reason}`\n"]
            for message in texts:
                fix = f" Remedy: {shown(message.fix)}." if message.fix else ""
                entry = f"{shown(message.what)}.{fix}"
                wrapped = textwrap.wrap(
                    entry, 110, break_long_words=False, break_on_hyphens=False, initial_indent="- "
                )
                lines += [wrapped[0], *(f"  {line}" for line in wrapped[1:])]
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def test_page_lists_every_error_as_the_table_has_it():
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_reason_has_one_entry_with_a_sentence():
    found = re.findall(r"^### `(\w+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {code.split(".")[0] for code in messages()} == set(found)
    assert all(message.what for message in messages().values())
