"""From any media file to what is stored of it.

Decides how an image is decoded, oriented, converted to sRGB, resized and encoded, and which frames
of a video are taken (`preprocess.media.video`). Never opens a URL.
"""

from preprocess.media.header import SOURCE_FORMATS, ImageLimits, open_source
from preprocess.media.image import ImagePolicy, ImagePreprocessor, pixels_file
from preprocess.media.memory import MemoryBudget
from preprocess.media.video import (
    StoredVideo,
    VideoDecoder,
    VideoPolicy,
    VideoPreparer,
    encode_video,
)

__all__ = [
    "SOURCE_FORMATS",
    "ImageLimits",
    "ImagePolicy",
    "ImagePreprocessor",
    "MemoryBudget",
    "StoredVideo",
    "VideoDecoder",
    "VideoPolicy",
    "VideoPreparer",
    "encode_video",
    "open_source",
    "pixels_file",
]
