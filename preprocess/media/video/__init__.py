"""Videos: which frames or which part of a file are stored.

`VideoDecoder` is the door: it chooses, and has `shardspec.video` decode in a process of its own.
"""

from preprocess.media.video.decoder import VideoDecoder, VideoFrames
from preprocess.media.video.encode import encode_video
from preprocess.media.video.policy import VideoPolicy
from preprocess.media.video.prepare import StoredVideo, VideoPreparer

__all__ = [
    "StoredVideo",
    "VideoDecoder",
    "VideoFrames",
    "VideoPolicy",
    "VideoPreparer",
    "encode_video",
]
