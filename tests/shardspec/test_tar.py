import hashlib
import io
import shutil
import subprocess
import tarfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ShardError
from shardspec.tar import (
    BLOCK,
    END_OF_ARCHIVE,
    MAX_MEMBER_BYTES,
    TarWriter,
    member_header,
    padded,
    payload_offsets,
    walk_tar,
)

NAMES = st.from_regex(r"[a-z0-9_-]{1,60}\.[a-z0-9.]{1,12}", fullmatch=True)
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 1500])
SAMPLES = st.lists(
    st.lists(
        st.tuples(NAMES, SIZES.flatmap(lambda n: st.binary(min_size=n, max_size=n))),
        min_size=1,
        max_size=4,
    ),
    max_size=4,
)


def whole(samples):
    stream = io.BytesIO()
    writer = TarWriter(stream)
    places = [writer.write_sample(members) for members in samples]
    sha256 = writer.finish()
    assert writer.num_bytes == len(stream.getvalue())
    return stream.getvalue(), places, sha256


def walked(payload):
    return list(walk_tar(io.BytesIO(payload), where="a.tar"))


def refusal(payload):
    with pytest.raises(ShardError) as raised:
        walked(payload)
    assert raised.value.where.startswith("a.tar")
    return raised.value.reason


TWO = [
    [("a.json", b"{}\n"), ("a.jpg", bytes(700))],
    [("b.json", b""), ("b.jpg", b"\xff" * 512)],
]


@given(SAMPLES)
def test_python_reads_the_same_members_with_plain_headers(samples):
    payload, _, _ = whole(samples)
    flat = [member for members in samples for member in members]
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:") as archive:
        found = archive.getmembers()
        assert [(m.name, m.size) for m in found] == [(name, len(data)) for name, data in flat]
        assert [archive.extractfile(m).read() for m in found] == [data for _, data in flat]
        assert {(m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname) for m in found} <= {
            (0o644, 0, 0, 0, "", "")
        }
        assert all(m.isreg() and not m.pax_headers for m in found)
    ours = walked(payload)
    assert [(m.name, m.offset, m.num_bytes) for m in ours] == [
        (m.name, m.offset_data, m.size) for m in found
    ]


@given(SAMPLES)
def test_ranges_lie_end_to_end_and_carry_their_crc(samples):
    payload, places, sha256 = whole(samples)
    position = 0
    for place, members in zip(places, samples, strict=True):
        assert place.offset == position
        chunk = payload[position : position + place.num_bytes]
        assert place.crc32 == zlib.crc32(chunk)
        offsets = payload_offsets([len(data) for _, data in members])
        assert [chunk[o : o + len(d)] for o, (_, d) in zip(offsets, members, strict=True)] == [
            data for _, data in members
        ]
        position += place.num_bytes
    assert payload[position:] == END_OF_ARCHIVE
    assert sha256 == hashlib.sha256(payload).hexdigest()


@given(SAMPLES)
def test_same_members_give_the_same_bytes(samples):
    assert whole(samples) == whole(samples)


@given(names=st.lists(NAMES, min_size=1, max_size=3), size=st.integers(0, 1500))
def test_header_is_what_pythons_ustar_writer_makes(names, size):
    for name in names:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        assert member_header(name, size) == info.tobuf(format=tarfile.USTAR_FORMAT)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_gnu_tar_lists_and_extracts_the_same(tmp_path):
    payload, _, _ = whole(TWO)
    path = tmp_path / "a.tar"
    path.write_bytes(payload)

    def tar(*options):
        command = ["tar", *options, "-f", str(path)]
        env = {"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=True)
        assert done.stderr == b""
        return done.stdout.decode().splitlines()

    assert [line.split() for line in tar("--numeric-owner", "-tv")] == [
        ["-rw-r--r--", "0/0", size, "1970-01-01", "00:00", name]
        for name, size in [("a.json", "3"), ("a.jpg", "700"), ("b.json", "0"), ("b.jpg", "512")]
    ]
    # GNU tar counts blocks of headers; our payloads start one block later.
    blocks = [int(line.split()[1].rstrip(":")) for line in tar("--block-number", "-t")]
    ours = [member.offset // BLOCK - 1 for member in walked(payload)]
    assert blocks[: len(ours)] == ours
    tar("-x")
    assert (tmp_path / "a.jpg").read_bytes() == bytes(700)
    assert (tmp_path / "b.jpg").read_bytes() == b"\xff" * 512


def test_interrupted_file_is_refused_wherever_it_was_cut():
    payload, _, _ = whole(TWO)
    for cut in range(len(payload)):
        assert refusal(payload[:cut]) == "tar_truncated", cut


@given(SAMPLES, st.data())
def test_cut_file_is_never_taken_for_complete(samples, data):
    payload, _, _ = whole(samples)
    cut = data.draw(st.integers(0, len(payload) - 1))
    assert refusal(payload[:cut]) == "tar_truncated"


@given(position=st.integers(0, BLOCK - 1), flip=st.integers(1, 255))
def test_header_with_any_flipped_byte_is_refused(position, flip):
    payload, _, _ = whole(TWO)
    broken = bytearray(payload)
    broken[position] ^= flip
    assert refusal(bytes(broken)) == "tar_header"


def resealed(header, *, at, field):
    """Puts other bytes into a header and makes its checksum right again."""
    header = bytearray(header)
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "at, field",
    [
        (156, b"2"),
        (156, b"5"),
        (156, b"x"),
        (156, b"L"),
        (0, b"\xff"),
        (0, b"\0"),
        (1, b"\0"),
        (124, b"-0000000001"),
        (124, b"-0000001000"),
        (124, b"00000000_10"),
        (124, b"        700"),
        (124, b"\x80" + bytes(11)),
        (136, b"14000000000"),
        (257, b"ustar  \0"),
        (345, b"../../etc"),
    ],
    ids=[
        "symbolic-link",
        "directory",
        "pax",
        "gnu-long-name",
        "name-not-utf-8",
        "no-name",
        "name-with-nul",
        "negative-size",
        "size-that-would-loop-for-ever",
        "size-with-underscore",
        "size-with-spaces",
        "size-in-base-256",
        "a-clock",
        "old-gnu-format",
        "prefix",
    ],
)
def test_valid_header_of_another_kind_is_refused(at, field):
    payload, _, _ = whole(TWO)
    broken = resealed(payload[:BLOCK], at=at, field=field) + payload[BLOCK:]
    assert refusal(broken) == "tar_header"


def test_lone_zero_block_between_members_is_refused():
    # Other readers stop there, and would silently miss what follows.
    payload, places, _ = whole(TWO)
    middle = places[1].offset
    assert refusal(payload[:middle] + bytes(BLOCK) + payload[middle:]) == "tar_header"


@pytest.mark.parametrize("rest", [b"x", bytes(8 * BLOCK), whole(TWO)[0]])
def test_whatever_follows_the_end_of_the_archive_is_refused(rest):
    assert refusal(whole(TWO)[0] + rest) == "tar_header"


def test_member_that_promises_more_than_the_file_holds_is_refused():
    header = member_header("a.jpg", 10**9)
    with pytest.raises(ShardError) as raised:
        walked(header + END_OF_ARCHIVE)
    assert raised.value.reason == "tar_truncated"
    assert raised.value.where == "a.tar member a.jpg"
    assert raised.value.facts == {"got_bytes": 1536, "want_bytes": 10**9 + BLOCK}


def test_walking_reads_headers_only():
    payload, _, _ = whole([[("a.jpg", bytes(10**6))]])

    class Counting(io.BytesIO):
        num_bytes = 0

        def read(self, size=-1):
            found = super().read(size)
            self.num_bytes += len(found)
            return found

    stream = Counting(payload)
    assert len(list(walk_tar(stream))) == 1
    assert stream.num_bytes <= 4 * BLOCK


@pytest.mark.parametrize(
    "name, num_bytes",
    [("", 0), ("x" * 101, 0), ("ü" * 51, 0), ("a\0b", 0), ("a", MAX_MEMBER_BYTES + 1), ("a", -1)],
)
def test_member_that_ustar_cannot_hold_is_refused_when_written(name, num_bytes):
    with pytest.raises(ValueError, match="tar member"):
        member_header(name, num_bytes)


def test_longest_name_and_largest_size_fit():
    info = tarfile.TarInfo.frombuf(
        member_header("x" * 100, MAX_MEMBER_BYTES), encoding="utf-8", errors="strict"
    )
    assert (info.name, info.size) == ("x" * 100, 8 * 2**30 - 1)


@given(st.integers(0, 2**40))
def test_padding_fills_the_last_block(num_bytes):
    assert padded(num_bytes) % BLOCK == 0
    assert 0 <= padded(num_bytes) - num_bytes < BLOCK
