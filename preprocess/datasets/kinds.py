"""Kinds of datasets that several sources share: documents to be read, and robots' episodes.

A subclass says where rows come from (`load`), and what its columns mean where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import DatasetBase
from shardspec.errors import SampleError


class DocumentDataset(DatasetBase):
    """Questions about documents: flips and crops are never applied to their pages.

    A row has `image`, or `pages` (a list in reading order); `question` and `answer`, or
    `questions`: a list of {question, answer or answers}; and perhaps `ocr`, which is kept as
    metadata.
    """

    several_images: ClassVar[bool] = True
    style: ClassVar[str] = "doc_qa"
    """Of the messages; one of the document styles."""

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        pages = row["pages"] if "pages" in row else [_needed(row, "image")]
        asked = row.get("questions") or [row]
        messages = [
            {
                "style": self.style,
                "question": _needed(each, "question"),
                **{name: each[name] for name in ("answer", "answers") if name in each},
            }
            for each in asked
        ]
        metadata = {**row.get("metadata", {})}
        if "ocr" in row:
            metadata["ocr"] = row["ocr"]
        return {"image": list(pages), "message_list": messages, "metadata": metadata}


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
