"""Generated scenes and questions about them: the sample rows of every dataset.

Decides what a generated row holds. Never reads files; the same seed gives the same row.
"""

from preprocess.synthetic.questions import (
    POINT_MARK,
    choose,
    compared_scenes,
    listed,
    percent_points,
    pointed_answers,
    row_rng,
    scene_plan,
    scene_questions,
    scene_targets,
)
from preprocess.synthetic.scenes import COLORS, SHAPES, plan_scene, render

__all__ = [
    "COLORS",
    "POINT_MARK",
    "SHAPES",
    "choose",
    "compared_scenes",
    "listed",
    "percent_points",
    "plan_scene",
    "pointed_answers",
    "render",
    "row_rng",
    "scene_plan",
    "scene_questions",
    "scene_targets",
]
