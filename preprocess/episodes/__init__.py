"""Episodes of robots: what the folders of other tools hold, and which windows samples are made of.

Decides where the steps, the tasks and the camera frames of an episode are, what makes a window
unusable, and that frames belong to steps by their timestamps.
"""

from preprocess.episodes.episode import CameraVideo, Episode, EpisodeSource, EpisodeTable
from preprocess.episodes.fields import EpisodeFields
from preprocess.episodes.frames import EpisodeFrames
from preprocess.episodes.hdf5 import open_hdf5
from preprocess.episodes.lerobot import open_lerobot
from preprocess.episodes.rlds import open_rlds
from preprocess.episodes.windows import (
    Window,
    WindowPolicy,
    cut_window,
    num_segments,
    segment_chunk,
    segment_steps,
)

__all__ = [
    "CameraVideo",
    "Episode",
    "EpisodeFields",
    "EpisodeFrames",
    "EpisodeSource",
    "EpisodeTable",
    "Window",
    "WindowPolicy",
    "cut_window",
    "num_segments",
    "open_hdf5",
    "open_lerobot",
    "open_rlds",
    "segment_chunk",
    "segment_steps",
]
