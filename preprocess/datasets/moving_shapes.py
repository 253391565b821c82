"""Moving shapes: generated clips with true texts, to try videos without downloads.

The dataset has no rows but generated ones: SOURCE=sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from preprocess.datasets.base import DatasetBase, SceneVideo
from preprocess.datasets.rows import Rows
from preprocess.synthetic import MOVES, SHAPES, ClipPlan, plan_clip
from shardspec.errors import SourceError


class MovingShapes(DatasetBase):
    """Generated clips. Modes: captions and questions, one of them, choices, points or tracks."""

    name: ClassVar[str] = "moving_shapes"
    modes: ClassVar[tuple[str, ...]] = (
        *("captions_and_questions", "captions", "questions"),
        *("choices", "points", "tracks"),
    )
    videos: ClassVar[bool] = True
    several_images: ClassVar[bool] = True

    def load(self) -> Rows:
        """Refuses any source but SOURCE=sample.

        Raises:
          SourceError: `source_missing`.
        """
        raise SourceError("source_missing.generated", where=self.source, dataset=self.name)

    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example."""
        messages: list[dict[str, Any]] = []
        if "captions" in self.mode:
            question = "Describe this video."
            messages.append({"style": "long_caption", "question": question, "text": row["caption"]})
        if "questions" in self.mode:
            messages += [
                {"style": "vqa2", "question": pair["question"], "answer": pair["answer"]}
                for pair in row["qa_pairs"]
            ]
        if self.mode == "choices":
            messages += [
                {
                    "style": "video_multiple_choice",
                    "question": each["question"],
                    "options": row["moves"],
                    "answer_idx": each["answer_idx"],
                }
                for each in row["choices"]
            ]
        if self.mode == "points":
            messages += [
                {"style": style, "point_scale": 100, **each}
                for each in row["points"]
                for style in ("video_point_count", "video_point")
            ]
        if self.mode == "tracks":
            messages += [
                {"style": style, "point_scale": 100, **each}
                for each in row["tracks"]
                for style in _TRACKS
            ]
        return {
            "video": row["video"],
            "message_list": messages,
            "metadata": {"cut_times_s": row["cut_times_s"], "num_shapes": row["num_shapes"]},
        }

    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row: a drawn clip, its caption, and questions about it."""
        plan = plan_clip(seed, idx)
        return {
            "video": SceneVideo(seed=seed, idx=idx),
            "caption": plan.caption,
            "qa_pairs": [{"question": q, "answer": a} for q, a in plan.questions()],
            "cut_times_s": [round(float(cut / plan.fps), 3) for cut in plan.cuts],
            "num_shapes": len(plan.shapes),
            "moves": list(MOVES),
            "choices": [{"question": q, "answer_idx": i} for q, i in plan.choices()],
            "points": [_points(plan, shape) for shape in SHAPES],
            "tracks": [
                {
                    "label": label,
                    "frame_trajectories": [
                        {
                            "time": round(time_s, 6),
                            "points": [{"id": 0, "point": [round(x, 2), round(y, 2)]}],
                        }
                        for time_s, x, y in track
                    ],
                }
                for label, track in plan.tracks()
            ],
        }


_TRACKS = (
    "video_point_track_per_frame",
    "video_point_ground_start_end",
    "video_single_point_track_per_frame",
)


def _points(plan: ClipPlan, shape: str) -> dict[str, Any]:
    """Points at all shapes of a kind, each in the middle of its scene."""
    named = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    middles = [track[len(track) // 2] for label, track in plan.tracks() if label.endswith(shape)]
    return {
        "label": named,
        "fps": float(plan.fps),
        "timestamps": [round(time_s, 6) for time_s, _, _ in middles],
        "points": [[[round(x, 2), round(y, 2)]] for _, x, y in middles],
    }


DATASET = MovingShapes
