"""Videos: which frames a file has, their pixels, exactly, and clips as they are stored.

`decoder_process` is the door: it decodes in a process of its own, the only one that imports PyAV.
`read_frames` is that for stored clips, with a bounded number of such processes. Never decides
which frames are wanted of a stored clip.
"""

from shardspec.video.clip import decode_table, encode_table
from shardspec.video.extract import Request
from shardspec.video.parts import FilePart, RemoteFile, select_frames, with_parts
from shardspec.video.pool import DEFAULT_LIMITS, ClipLimits, decoder_process, read_frames
from shardspec.video.reader import VideoInfo, import_av, shown_size

__all__ = [
    "DEFAULT_LIMITS",
    "ClipLimits",
    "FilePart",
    "RemoteFile",
    "Request",
    "VideoInfo",
    "decode_table",
    "decoder_process",
    "encode_table",
    "import_av",
    "read_frames",
    "select_frames",
    "shown_size",
    "with_parts",
]
