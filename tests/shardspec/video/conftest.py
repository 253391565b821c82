"""Fixtures: the program ffmpeg, and the folder of the files that it makes."""

from tests.shardspec.video.matrix import ffmpeg, folder

__all__ = ["ffmpeg", "folder"]
