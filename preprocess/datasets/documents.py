"""Documents with questions, in the schema of the format `documents`: of a folder, or generated.

There is no copy on the hub: rows are in Parquet or Arrow files of a folder. Generated rows are
invoices of one to four pages, each a TIFF with OCR, questions with boxes, fields and tables.
"""

from __future__ import annotations

from typing import Any, ClassVar

from preprocess.datasets.base import HfDataset
from preprocess.datasets.kinds import DocumentDataset
from preprocess.datasets.rows import Rows
from preprocess.formats import DOCUMENT_TASKS, DocumentPolicy
from preprocess.synthetic import plan_paper
from shardspec.errors import ConfigError


class Documents(DocumentDataset, HfDataset):
    """Documents with all tasks; see `preprocess.formats.documents` for the columns of a row."""

    name: ClassVar[str] = "documents"
    policy: ClassVar[DocumentPolicy] = DocumentPolicy(max_pages=4, tasks=DOCUMENT_TASKS)

    def load(self) -> Rows:
        """Opens the rows of the folder.

        Raises:
          ConfigError: `document_source`: the source is the hub.
        """
        if self.source == "hub":
            raise ConfigError("document_source", where=self.name)
        return super().load()

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: an invoice."""
        paper = plan_paper(seed, idx)
        return {
            "id": f"{seed}-{idx}",
            "document": paper.draw(),
            "ocr": paper.ocr(),
            "questions": [dict(question) for question in paper.questions],
            "fields": paper.fields,
            "tables": [dict(table) for table in paper.tables],
        }


DATASET = Documents
