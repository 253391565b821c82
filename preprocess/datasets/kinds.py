"""Kinds of datasets that several sources share: documents to be read, and robots' episodes.

A subclass says where rows come from (`load`), and what its columns mean where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import DOCUMENT_SETTINGS, DatasetBase
from preprocess.datasets.images import resolve_image
from preprocess.documents import pdfium_version, read_document
from preprocess.formats import DocumentPolicy, Spec, document_request
from shardspec.errors import SampleError


class DocumentDataset(DatasetBase):
    """Questions about documents, with what their pages say and where.

    Pages are PDFs, TIFFs or images; flips and crops are never applied to them. A row has the
    columns of `preprocess.formats.documents`: `document`, or `image`, or `pages` (a list in reading
    order); `question` and `answer` or `answers`, or `questions`, a list of such records; and
    perhaps `ocr`. Here a text as `ocr` is the text itself; a file is a `Path` or its bytes.
    """

    several_images: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, str]] = DOCUMENT_SETTINGS
    style: ClassVar[str] = "doc_qa"
    """Of the questions; one of the document styles."""
    policy: ClassVar[DocumentPolicy] = DocumentPolicy()
    """Which pages are kept, how they are drawn, and what is asked for."""

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        if isinstance(row.get("ocr"), str):
            row = {**{k: v for k, v in row.items() if k != "ocr"}, "ocr_text": row["ocr"]}
        spec = Spec(name=self.name, format="documents", style=self.style)
        example = document_request(row, spec)
        images = [
            resolve_image(each, base=self.rows.base) if isinstance(each, str | Mapping) else each
            for each in example["image"]
        ]
        example |= {"image": images, "metadata": dict(row.get("metadata") or {})}
        return read_document(example, policy=self.policy)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Says what else samples follow from."""
        return {"documents": cls.policy.to_dict(), "pdfium": pdfium_version()}


class RobotDataset(DatasetBase):
    """Episodes of robots: views of a scene, a task, and the actions that fulfil it.

    A row has `views`, images by their names (such as egocentric and overhead) or a list; `task`;
    `actions`, numbers from -1 to 1 of one step, or a list of steps; and perhaps `success`.
    """

    several_images: ClassVar[bool] = True

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        views = _needed(row, "views")
        names = sorted(views) if isinstance(views, Mapping) else []
        message = {
            "style": "robot_action",
            "instruction": _needed(row, "task"),
            "action": _needed(row, "actions"),
        }
        metadata = {**row.get("metadata", {}), **({"views": names} if names else {})}
        if "success" in row:
            metadata["success"] = bool(row["success"])
        images = [views[name] for name in names] if names else list(views)
        return {"image": images, "message_list": [message], "metadata": metadata}


def _needed(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise SampleError("row_fields", name=name, want="a value", fields=sorted(map(str, row)))
    return row[name]
