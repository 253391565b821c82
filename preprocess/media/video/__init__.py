"""Videos: which frames a file has, and their pixels, exactly.

`VideoDecoder` is the door: it chooses frames and decodes them in a process of its own, the only one
that imports PyAV.
"""

from preprocess.media.video.decoder import VideoDecoder, VideoFrames
from preprocess.media.video.encode import encode_video
from preprocess.media.video.policy import VideoPolicy
from preprocess.media.video.prepare import StoredFrames, VideoPreparer
from preprocess.media.video.reader import VideoInfo, shown_size

__all__ = [
    "StoredFrames",
    "VideoDecoder",
    "VideoFrames",
    "VideoInfo",
    "VideoPolicy",
    "VideoPreparer",
    "encode_video",
    "shown_size",
]
