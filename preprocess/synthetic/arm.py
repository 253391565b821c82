"""Simulates a small arm that carries a block: the episodes of `SOURCE=sample`, seen by two cameras.

The gripper moves over a table of 1 x 1, x to the right and y downwards. An action is the motion of
one step (dx, dy) and what the gripper does (1 closes it, 0 opens it); after it, the state is
exactly that of the next step. The cameras are "overhead", which sees the whole table, and "wrist",
which sees what is around the gripper. Pure functions of (seed, idx).
"""

# L: steps of an episode.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from preprocess.synthetic.scenes import COLORS
from shardspec.keyed import SEED_MODULUS, keyed

ARM_FPS = 10.0
ARM_STEPS = 24
"""Steps of every episode."""

ARM_CAMERAS = ("overhead", "wrist")
ARM_ACTIONS = ("x", "y", "gripper")
ARM_STATE = ("x", "y", "gripper")

OVERHEAD_PX = 160
WRIST_PX = 96
WRIST_REACH = 0.2
"""Half of the side that the wrist camera sees."""

_STEP = 0.09
_TABLE, _OUTSIDE = (226, 218, 200), (70, 72, 78)
_PARTS = {
    "arm": (96, 100, 112),
    "open": (40, 90, 200),
    "closed": (20, 30, 60),
    "goal": (90, 90, 90),
}
_BLOCKS = ("red", "green", "orange", "purple")
_GOALS = ("left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEpisode:
    """An episode without its pictures."""

    task: str
    color: str
    goal: tuple[float, float]
    state_L3: np.ndarray
    """float32 [L, 3]: x, y, and 1 where the gripper is closed."""
    actions_L3: np.ndarray
    """float32 [L, 3]."""
    block_L2: np.ndarray
    """float64 [L, 2], where the block is."""


def plan_arm_episode(seed: int, idx: int) -> ArmEpisode:
    """Simulates episode `idx`: reach the block, close, carry it to a side, open, and wait."""
    rng = np.random.RandomState(keyed(seed, idx, 0xA43) % SEED_MODULUS)
    side = _GOALS[rng.randint(2)]
    goal = np.array([0.12 if side == "left" else 0.88, rng.uniform(0.3, 0.7)])
    color = _BLOCKS[rng.randint(len(_BLOCKS))]
    block = rng.uniform(0.3, 0.7, 2)
    hand, closed, carried = rng.uniform(0.2, 0.8, 2), 0.0, False
    states, actions, blocks = [], [], []
    for _ in range(ARM_STEPS):
        states.append([*hand, closed])
        blocks.append(block)
        target = goal if closed else block
        done = not closed and bool(np.allclose(block, goal))
        move = np.zeros(2) if done else target - hand
        distance = float(np.hypot(*move))
        move = move * min(1.0, _STEP / distance) if distance else move
        arrived = distance == 0 and not done
        command = (1.0 - closed) if arrived else closed
        actions.append([*move, command])
        hand, carried = hand + move, bool(closed)
        hand = target if distance and distance <= _STEP else hand
        block = hand if carried else block
        closed = command
    return ArmEpisode(
        task=f"Carry the {color} block to the {side} side.",
        color=color,
        goal=(float(goal[0]), float(goal[1])),
        state_L3=np.array(states, np.float32),
        actions_L3=np.array(actions, np.float32),
        block_L2=np.array(blocks),
    )


def render_arm(episode: ArmEpisode, row: int, *, camera: str) -> np.ndarray:
    """Draws what a camera sees at a step: uint8 [H, W, 3]."""
    x, y, closed = (float(v) for v in episode.state_L3[row])
    if camera == "overhead":
        left, top, span, size = 0.0, 0.0, 1.0, OVERHEAD_PX
    else:
        left, top, span, size = x - WRIST_REACH, y - WRIST_REACH, 2 * WRIST_REACH, WRIST_PX
    image = Image.new("RGB", (size, size), _OUTSIDE)
    draw = ImageDraw.Draw(image)

    def box(center: tuple[float, float], half: float) -> list[float]:
        corners = (center[0] - half, center[1] - half, center[0] + half, center[1] + half)
        starts = (left, top, left, top)
        return [(v - at) / span * size for v, at in zip(corners, starts, strict=True)]

    draw.rectangle(box((0.5, 0.5), 0.5), fill=_TABLE)
    draw.rectangle(box(episode.goal, 0.09), outline=_PARTS["goal"], width=2)
    base, hand = box((0.5, 0.0), 0.0)[:2], box((x, y), 0.0)[:2]
    if camera == "overhead":
        draw.line([*base, *hand], fill=_PARTS["arm"], width=4)
    at = float(episode.block_L2[row][0]), float(episode.block_L2[row][1])
    draw.rectangle(box(at, 0.05), fill=COLORS[episode.color])
    draw.ellipse(box((x, y), 0.03), fill=_PARTS["closed" if closed else "open"])
    return np.asarray(image)
