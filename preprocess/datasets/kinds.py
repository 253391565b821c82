"""Kinds of datasets that several sources share: documents to be read, and robots' episodes.

A subclass says where rows come from (`load`), and what its columns mean where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from preprocess.datasets.base import DOCUMENT_SETTINGS, DatasetBase
from preprocess.datasets.images import resolve_image
from preprocess.documents import is_web_url, pdfium_version, read_document
from preprocess.formats import DocumentPolicy, Spec, document_request
from shardspec.errors import SampleError


class DocumentDataset(DatasetBase):
    """Questions about documents, with what their pages say and where.

    Pages are PDFs, TIFFs or images; flips and crops are never applied to them. A row has the
    columns of `preprocess.formats.documents`: `document`, or `image`, or `pages` (a list in reading
    order); `question` and `answer` or `answers`, or `questions`, a list of such records; and
    perhaps `ocr`. Here a text as `ocr` is the text itself; a file is a `Path`, its bytes or a URL.
    """

    several_images: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, str]] = DOCUMENT_SETTINGS
    ocr_files: ClassVar[bool] = True
    style: ClassVar[str] = "doc_qa"
    """Of the questions; one of the document styles."""
    policy: ClassVar[DocumentPolicy] = DocumentPolicy()
    """Which pages are kept, how they are drawn, and what is asked for."""

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        if isinstance(row.get("ocr"), str) and not is_web_url(row["ocr"]):
            row = {**{k: v for k, v in row.items() if k != "ocr"}, "ocr_text": row["ocr"]}
        spec = Spec(name=self.name, format="documents", style=self.style)
        example = document_request(row, spec)
        images = [
            resolve_image(each, base=self.rows.base) if isinstance(each, str | Mapping) else each
            for each in example["image"]
        ]
        example |= {"image": images, "metadata": dict(row.get("metadata") or {})}
        return read_document(example, policy=self.policy, read_url=self.read_url)

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Says what else samples follow from."""
        return {"documents": cls.policy.to_dict(), "pdfium": pdfium_version()}


class RobotDataset(DatasetBase):
    """Episodes of robots: views of a scene, a task, and the actions that fulfil it.

    A row has `views`, images by their names (such as egocentric and overhead) or a list; `task`;
    `actions`; and perhaps `success`. A view may be a list of images, one per instant, all of the
    same number: a sample shows them instant by instant. Actions are numbers from -1 to 1 of one
    step, or a list of steps; or structured steps, as robots that navigate have them: names, such as
    "turn_left", or records, such as {"turn_deg": 15, "forward_m": 0.25}.
    """

    several_images: ClassVar[bool] = True
    leaves_out: ClassVar[frozenset[str]] = frozenset({"robot_failed"})
    only_success: ClassVar[bool] = False
    """Whether rows whose `success` is false are left out."""

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        success = _success(row)
        if self.only_success and success is False:
            raise SampleError("robot_failed")
        images, names = _instants(_needed(row, "views"))
        actions = _needed(row, "actions")
        message = {
            "style": "robot_action",
            "instruction": _needed(row, "task"),
            "action": actions.tolist() if isinstance(actions, np.ndarray) else actions,
        }
        metadata = {**row.get("metadata", {}), **({"views": names} if names else {})}
        if success is not None:
            metadata["success"] = success
        return {"image": images, "message_list": [message], "metadata": metadata}


def _success(row: Mapping[str, Any]) -> bool | None:
    """Returns whether a row says that it succeeded; None where it does not say it.

    Raises:
      SampleError: `row_fields`: a text, such as "false", which is true to Python.
    """
    told = row.get("success")
    if told is None:
        return None
    if not isinstance(told, bool | int | float | np.bool_ | np.number):
        want = "true, false or a number"
        raise SampleError("row_fields", name="success", want=want, fields=sorted(map(str, row)))
    return bool(told) if told == told else None  # a table writes NaN where it has no value


def _instants(views: Any) -> tuple[list[Any], list[str]]:
    """Lists the images of views by instant, then by name; and of each its name, if it has one.

    Raises:
      SampleError: `robot_frame`: views of different lengths.
    """
    if not isinstance(views, Mapping):
        return list(views), []
    columns = {
        name: list(view) if isinstance(view, list | tuple) else [view]
        for name, view in sorted(views.items())
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len({*lengths.values()}) > 1:
        raise SampleError("robot_frame.lengths", facts=lengths)
    images = [image for instant in zip(*columns.values(), strict=True) for image in instant]
    return images, [*columns] * (len(images) // max(len(columns), 1))


def _needed(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None or (isinstance(value, list | tuple | Mapping) and not value):
        raise SampleError("row_fields", name=name, want="a value", fields=sorted(map(str, row)))
    return row[name]
