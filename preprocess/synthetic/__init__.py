"""Generated scenes and clips, and questions about them: the sample rows of every dataset.

Decides what a generated row holds. Never reads files; the same seed gives the same row.
"""

from preprocess.synthetic.arm import (
    ARM_ACTIONS,
    ARM_CAMERAS,
    ARM_FPS,
    ARM_STATE,
    ARM_STEPS,
    ArmEpisode,
    plan_arm_episode,
    render_arm,
)
from preprocess.synthetic.clips import MOVES, ClipPlan, plan_clip, render_clip
from preprocess.synthetic.papers import PAGE_PX, Paper, plan_paper
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
    "ARM_ACTIONS",
    "ARM_CAMERAS",
    "ARM_FPS",
    "ARM_STATE",
    "ARM_STEPS",
    "COLORS",
    "MOVES",
    "PAGE_PX",
    "POINT_MARK",
    "Paper",
    "SHAPES",
    "ArmEpisode",
    "ClipPlan",
    "choose",
    "compared_scenes",
    "listed",
    "percent_points",
    "plan_arm_episode",
    "plan_clip",
    "plan_paper",
    "plan_scene",
    "pointed_answers",
    "render",
    "render_arm",
    "render_clip",
    "row_rng",
    "scene_plan",
    "scene_questions",
    "scene_targets",
]
