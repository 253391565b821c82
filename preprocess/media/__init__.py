"""From any media file to what is stored of it.

Decides how an image is decoded, oriented, converted to sRGB, resized and encoded. Never opens a
URL.
"""

from preprocess.media.image import ImagePolicy, ImagePreprocessor

__all__ = [
    "ImagePolicy",
    "ImagePreprocessor",
]
