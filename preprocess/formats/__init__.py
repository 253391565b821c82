"""Layouts that vision-language data is kept in: from a row of a user's own file to an example.

Decides which layout a file has, and what its rows mean. Never reads an image, and knows nothing of
tokens: what it gives is an example as `preprocess.datasets.base` describes it, whose images are
still names, URLs or bytes.

To add a format, add a module with a function from (row, `Spec`) to an example, and a line to
`FORMATS` in `preprocess.formats.parse`; `preprocess.formats.detect` says how it is recognised.
"""

from preprocess.formats.conversations import has_video_part
from preprocess.formats.copies import local_copy
from preprocess.formats.detect import Guess, guess_format
from preprocess.formats.documents import TASKS as DOCUMENT_TASKS
from preprocess.formats.documents import DocumentPolicy, document_request
from preprocess.formats.images import is_empty
from preprocess.formats.interleaved import PIECE
from preprocess.formats.json_files import BROKEN, annotation_names
from preprocess.formats.parse import FORMATS, parse_messages, parse_row
from preprocess.formats.records import (
    IMAGES,
    ROWS,
    Records,
    holds_rows,
    is_folder,
    is_hidden,
    open_records,
    visible_names,
)
from preprocess.formats.spec import NAME, Spec, read_spec
from preprocess.formats.subtitles import Subtitle, row_subtitles
from preprocess.formats.tasks import check_unit
from preprocess.formats.video import VIDEO_NAMES

__all__ = [
    "BROKEN",
    "DOCUMENT_TASKS",
    "DocumentPolicy",
    "FORMATS",
    "Guess",
    "IMAGES",
    "NAME",
    "PIECE",
    "ROWS",
    "Records",
    "Spec",
    "Subtitle",
    "VIDEO_NAMES",
    "annotation_names",
    "check_unit",
    "document_request",
    "guess_format",
    "has_video_part",
    "holds_rows",
    "is_empty",
    "is_folder",
    "is_hidden",
    "local_copy",
    "open_records",
    "parse_messages",
    "parse_row",
    "read_spec",
    "row_subtitles",
    "visible_names",
]
