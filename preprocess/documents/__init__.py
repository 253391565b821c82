"""Documents: from a PDF, a TIFF or page images, with OCR or without, to an example.

Decides which files are opened as documents, how large they may be, which pages are kept, what their
text is and where its words are, and which messages a document gives. Never opens a URL, and never
resizes or encodes a page: that is `preprocess.media`'s.
"""

from preprocess.documents.files import PageImage, page_identity, read_file
from preprocess.documents.ocr import parse_ocr
from preprocess.documents.pages import keep_pages
from preprocess.documents.pdf import pdfium_version
from preprocess.documents.read import is_web_url, read_document
from preprocess.documents.words import PageText, Word

__all__ = [
    "PageImage",
    "PageText",
    "Word",
    "is_web_url",
    "keep_pages",
    "page_identity",
    "parse_ocr",
    "pdfium_version",
    "read_document",
    "read_file",
]
