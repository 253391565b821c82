"""Video files of many kinds, made by the program ffmpeg."""

import subprocess

import pytest

TEST = ("-f", "lavfi", "-i", "testsrc2=size=160x120:rate=24:duration=3")
H264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-g", "24")
B_FRAMES = (*H264, "-bf", "3")
HEVC = ("-c:v", "libx265", "-preset", "ultrafast", "-tag:v", "hvc1")
TEN_BITS = ("-pix_fmt", "yuv420p10le")
BASE = ("-i", "b.mp4")
"""The first file of the matrix, as the source of others."""


def source(text):
    return ("-f", "lavfi", "-i", f"testsrc2={text}")


def hdr(transfer):
    params = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    return (TEST, (*HEVC, *TEN_BITS, "-x265-params", params))


# name: (arguments before the encoder's, arguments of the encoder).
MATRIX = {
    "b.mp4": (TEST, B_FRAMES),
    "open-gop.mp4": (TEST, (*H264, "-x264-params", "open-gop=1:bframes=3")),
    "bt709.mp4": (TEST, (*H264, "-colorspace", "bt709", "-color_trc", "bt709")),
    "full-range.mp4": (TEST, ("-c:v", "libx264", "-pix_fmt", "yuvj420p")),
    "ten-bits.mp4": (TEST, ("-c:v", "libx264", *TEN_BITS)),
    "444.mp4": (TEST, ("-c:v", "libx264", "-pix_fmt", "yuv444p")),
    "hevc.mp4": (TEST, (*HEVC, "-x265-params", "log-level=none")),
    "vp9.webm": (TEST, ("-c:v", "libvpx-vp9", "-b:v", "200k", "-g", "24", "-cpu-used", "8")),
    "av1.mp4": (TEST, ("-c:v", "libsvtav1", "-preset", "12")),
    "av1.mkv": (TEST, ("-c:v", "libsvtav1", "-preset", "12", "-g", "24")),
    "mpeg4.avi": (TEST, ("-c:v", "mpeg4", "-bf", "2")),
    "mjpeg.avi": (TEST, ("-c:v", "mjpeg")),
    "h264.ts": (TEST, B_FRAMES),
    "mpeg2.ts": (TEST, ("-c:v", "mpeg2video", "-bf", "2")),
    "h264.mkv": (TEST, B_FRAMES),
    "h264.flv": (TEST, H264),
    "theora.ogv": (TEST, ("-c:v", "libtheora")),
    "picture.gif": (source("size=160x120:rate=10:duration=2"), ()),
    "variable.mp4": (
        TEST,
        ("-vf", "select='not(mod(n,3))+eq(mod(n,7),1)'", "-fps_mode", "vfr", *H264, "-bf", "2"),
    ),
    "turned-90.mp4": (("-display_rotation", "90", *BASE), ("-c", "copy")),
    "turned-180.mp4": (("-display_rotation", "180", *BASE), ("-c", "copy")),
    "mirrored.mp4": (("-display_hflip", *BASE), ("-c", "copy")),
    "turned-and-mirrored.mp4": (
        ("-display_rotation", "90", "-display_hflip", *BASE),
        ("-c", "copy"),
    ),
    "one-frame.mp4": (TEST, (*H264, "-frames:v", "1")),
    "edit-list.mp4": (("-ss", "0.6", *BASE), ("-c", "copy")),
    "fragments.mp4": (TEST, (*B_FRAMES, "-movflags", "frag_keyframe+empty_moov")),
    "negative-start.mkv": (BASE, ("-c", "copy", "-output_ts_offset", "-0.5")),
    "negative-start.ts": (BASE, ("-c", "copy", "-output_ts_offset", "-0.5")),
    "starts-at-5.mp4": (BASE, ("-c", "copy", "-output_ts_offset", "5")),
    "starts-at-5.mkv": (BASE, ("-c", "copy", "-output_ts_offset", "5")),
    "29.97.mp4": (source("size=160x120:rate=30000/1001:duration=3"), B_FRAMES),
    "240.mp4": (source("size=160x120:rate=240:duration=1"), H264),
    "odd.mp4": (TEST, ("-vf", "format=yuv444p,crop=151:113", "-c:v", "libx264")),
    "wide-pixels.mp4": (TEST, ("-vf", "setsar=16/11", *H264)),
    "interlaced.mp4": (TEST, ("-vf", "interlace", *H264, "-flags", "+ilme+ildct")),
    "interlaced.ts": (TEST, ("-vf", "interlace", *H264, "-flags", "+ilme+ildct")),
    "alpha.mov": (
        source("size=160x120:rate=24:duration=1,format=yuva444p10le"),
        ("-c:v", "prores_ks", "-profile:v", "4444"),
    ),
    "alpha.webm": (
        source("size=160x120:rate=24:duration=1,format=yuva420p"),
        ("-c:v", "libvpx-vp9", "-cpu-used", "8"),
    ),
    "with-sound.mp4": (
        (*TEST, "-f", "lavfi", "-i", "sine=duration=3"),
        (*B_FRAMES, "-c:a", "aac"),
    ),
    "fast-start.mp4": (TEST, (*B_FRAMES, "-movflags", "+faststart")),
}
CUT = ("fast-start.mp4", "h264.ts", "vp9.webm", "h264.mkv", "mpeg4.avi")
"""Cut at 60 %: the frames before the cut."""

REFUSED = {
    "sound.m4a": ((("-f", "lavfi", "-i", "sine=duration=1"), ()), "video_stream"),
    "pq.mkv": (hdr("smpte2084"), "video_hdr"),
    "hlg.mp4": (hdr("arib-std-b67"), "video_hdr"),
    "encrypted.mp4": (
        (
            TEST,
            (
                *(*H264, "-encryption_scheme", "cenc-aes-ctr"),
                *("-encryption_key", "76a6c65c5ea762046bd749a2e632ccbb"),
                *("-encryption_kid", "a7e61c373e219033c21091fa607bf3b8"),
            ),
        ),
        "video_stream",
    ),
    "moving.webp": (
        (source("size=160x120:rate=10:duration=1"), ("-c:v", "libwebp_anim", "-lossless", "1")),
        "video_stream",
    ),
}


@pytest.fixture(scope="session")
def ffmpeg():
    return pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()


@pytest.fixture(scope="session")
def folder(ffmpeg, tmp_path_factory):
    """All files of the matrix."""
    folder = tmp_path_factory.mktemp("matrix")
    kinds = {**MATRIX, **{name: how for name, (how, _) in REFUSED.items()}}
    for name, (before, after) in kinds.items():
        command = [ffmpeg, "-v", "error", "-y", *before, *after, name]
        subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL)
    for name in CUT:
        whole = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(whole[: int(0.6 * len(whole))])
    whole = (folder / "b.mp4").read_bytes()
    (folder / "no-index.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    return folder
