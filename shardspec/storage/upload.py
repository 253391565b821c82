"""How bytes become an object: whole or not at all, checked, and on a condition where one is asked.

Three kinds of store are told apart, by what their file system calls itself.

* S3 and what speaks it. One PUT up to `SINGLE_PUT_BYTES`, with the MD5 of the body, which the store
  compares; beyond that a multipart upload, whose parts are read from the file as they go, several
  at a time, each with its MD5. The object appears when the parts are put together; any exception
  before that, Ctrl-C included, aborts the upload, so that no parts are left to be paid for.
* Google Cloud Storage. One request, or a resumable upload in chunks, with the MD5 of the whole; the
  answer's own MD5 is compared as well. An upload that breaks off is cancelled.
* Any other file system of fsspec: its plain write for small objects and for `memory://`, for large
  ones its write that appears on commit. The length is compared.

Conditions ("only where there is none", "only in place of this very one") are decided by the store
(If-None-Match, If-Match, ifGenerationMatch). S3-compatible stores exist that ignore them: such a
store takes the last writer. Other file systems know no conditions; there the check and the write
are two steps, apart for other processes.

Failures that may pass are tried again (`shardspec.storage.retries`); every request here bears that.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shardspec.errors import StorageError
from shardspec.storage.failures import is_condition_refused
from shardspec.storage.retries import with_retries

logger = logging.getLogger(__name__)

SINGLE_PUT_BYTES = 8 * 2**20
"""Up to here one request carries the object; S3 parts must have at least 5 MiB."""

PART_BYTES = 8 * 2**20
"""Of a part, or a chunk (a multiple of 256 KiB, as GCS asks); larger where parts would be many."""

MAX_PARTS = 10_000
"""S3 takes no more."""

CHUNK_TRIES = 8
"""Times that a chunk is sent to a store that answers and keeps less of it."""

PARTS_AT_ONCE = 4
"""So one upload holds 32 MiB of the file in memory."""

OnPart = Callable[[int], None]
"""Hears how many bytes of a file that goes up in parts have arrived; what it raises ends the
upload, which is then aborted."""

_HERE = threading.Lock()


def kind_of(fs: Any) -> str:
    """Tells what kind of store a file system leads to: "s3", "gs" or "other"."""
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return "s3" if "s3" in names else "gs" if "gs" in names else "other"


def version_of(fs: Any, path: str) -> str | None:
    """Names the version of an object by what the store changes with each write.

    Returns:
      The ETag (S3), the generation (GCS) or the length and time of writing; None where there is no
      object.
    """
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return version_of_entry(fs, info) if info["type"] == "file" else None


def version_of_entry(fs: Any, info: Mapping[str, Any]) -> str:
    """Names the version of an object as `version_of` does, by its entry in a listing."""
    if kind_of(fs) == "s3":
        return str(info.get("ETag"))
    if kind_of(fs) == "gs":
        return str(info.get("generation"))
    # Web servers' answers are listed with the names of their headers.
    for name in ("etag", "ETag", "Last-Modified"):
        if info.get(name):
            return str(info[name])
    return f"{info['size']}-{info.get('mtime', info.get('created'))}"


def put_bytes(fs: Any, path: str, payload: bytes, *, where: str) -> None:
    """Puts a small object in place, whatever was there before.

    Raises:
      StorageError: `store_unavailable`, `upload_size`, `upload_checksum`; other errors as the
        client has them.
    """
    if kind_of(fs) == "s3":
        _put_s3(fs, path, payload, where=where)
    elif kind_of(fs) == "gs":
        _put_gs(fs, path, payload, where=where)
    else:
        with_retries(lambda: fs.pipe_file(path, payload), where=where)
        check_size(fs, path, len(payload), where=where)


def compare_and_swap(
    fs: Any, path: str, payload: bytes, *, replacing: str | None, where: str
) -> bool:
    """Puts a small object in place of one known version, or of none.

    Args:
      fs: The file system.
      path: The object.
      payload: What it shall be.
      replacing: What `version_of` has said; None where no object may be.
      where: The URL that an error names.

    Returns:
      Whether the object is now `payload`; False where it was another version.
    """
    kind = kind_of(fs)
    try:
        if kind == "s3":
            condition = {"IfNoneMatch": "*"} if replacing is None else {"IfMatch": replacing}
            _put_s3(fs, path, payload, where=where, **condition)
        elif kind == "gs":
            _put_gs(fs, path, payload, where=where, ifGenerationMatch=replacing or "0")
        else:
            with _HERE:
                if version_of(fs, path) != replacing:
                    return _holds(fs, path, payload)
                put_bytes(fs, path, payload, where=where)
    except FileNotFoundError:
        if replacing is None:
            raise
        return False  # S3 says 404, not 412, where the object to be replaced is gone
    except Exception as error:
        if not is_condition_refused(error):
            raise
        # An answer may have been lost on its way: the try before this one was the winner.
        return _holds(fs, path, payload)
    return True


def put_file(
    fs: Any, path: str, source: Path, *, where: str, on_part: OnPart | None = None
) -> None:
    """Puts a local file in place as an object, whatever was there before.

    Raises:
      StorageError: `store_unavailable`, `upload_size`, `upload_checksum`: nothing is left of it.
    """
    on_part = on_part or (lambda _: None)
    num_bytes = source.stat().st_size
    if num_bytes <= SINGLE_PUT_BYTES or fs.protocol == "memory":
        put_bytes(fs, path, source.read_bytes(), where=where)
    elif kind_of(fs) == "s3":
        _put_parts_s3(fs, path, source, where=where, on_part=on_part)
    elif kind_of(fs) == "gs":
        _put_chunks_gs(fs, path, source, where=where, on_part=on_part)
    else:
        with_retries(lambda: _stream(fs, path, source, on_part), where=where)
        check_size(fs, path, num_bytes, where=where)


def open_uploads(fs: Any, path: str) -> list[tuple[str, str, float]]:
    """Lists the multipart uploads that were begun below a path and neither ended nor aborted.

    Returns:
      Path, upload id and time of beginning (Unix seconds) of each; only S3 has any to list: GCS
      forgets what is unfinished by itself, after a week, and shows it to nobody.
    """
    if kind_of(fs) != "s3":
        return []
    bucket, prefix, _ = fs.split_path(path)
    found = []
    page: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        for each in answer.get("Uploads", []):
            # Bucket/set2/... has the prefix bucket/set as well.
            if f"{each['Key']}/".startswith(f"{prefix}/" if prefix else ""):
                began = each["Initiated"].timestamp()
                found.append((f"{bucket}/{each['Key']}", str(each["UploadId"]), float(began)))
        if not answer.get("IsTruncated"):
            return sorted(found)
        page = {
            "KeyMarker": answer["NextKeyMarker"],
            "UploadIdMarker": answer["NextUploadIdMarker"],
        }


def abort_upload(fs: Any, path: str, upload_id: str, *, where: str) -> None:
    """Drops the parts of an unfinished multipart upload; one that is gone is no error."""
    bucket, key, _ = fs.split_path(path)
    try:
        with_retries(
            lambda: fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id
            ),
            where=where,
        )
    except FileNotFoundError:
        return


def part_bytes(num_bytes: int) -> int:
    """Chooses the length of the parts of an object.

    >>> part_bytes(256 * 2**20) == PART_BYTES
    True
    >>> -(-200 * 2**30 // part_bytes(200 * 2**30)) <= MAX_PARTS
    True
    """
    least = -(-num_bytes // MAX_PARTS)
    return max(PART_BYTES, -(-least // 2**20) * 2**20)


def _put_s3(fs: Any, path: str, payload: bytes, *, where: str, **condition: str) -> None:
    bucket, key, _ = fs.split_path(path)
    md5 = hashlib.md5(payload, usedforsecurity=False)
    answer = with_retries(
        lambda: fs.call_s3(
            "put_object",
            Bucket=bucket,
            Key=key,
            Body=payload,
            ContentMD5=_base64(md5),
            **condition,
        ),
        where=where,
    )
    # Encrypted objects have ETags of another kind; then the store's own comparison has to do.
    etag = str(answer["ETag"]).strip('"')
    if _is_md5(etag) and etag != md5.hexdigest() and "SSEKMSKeyId" not in answer:
        raise _not_what_was_sent(fs, path, got=etag, want=md5.hexdigest(), where=where)


def _put_gs(fs: Any, path: str, payload: bytes, *, where: str, **condition: str) -> None:
    bucket, key, _ = fs.split_path(path)
    md5 = _base64(hashlib.md5(payload, usedforsecurity=False))
    border = "vlm-shards-" + hashlib.sha256(payload).hexdigest()
    head = json.dumps({"name": key, "md5Hash": md5})
    body = (
        f"--{border}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{head}\r\n"
        f"--{border}\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode()
    answer = with_retries(
        lambda: fs.call(
            "POST",
            _gs_upload_url(fs, bucket),
            uploadType="multipart",
            headers={"Content-Type": f'multipart/related; boundary="{border}"'},
            data=_Body(body + payload + f"\r\n--{border}--".encode()),
            json_out=True,
            **condition,
        ),
        where=where,
    )
    _check_gs(fs, path, answer, md5=md5, where=where)


def _put_parts_s3(fs: Any, path: str, source: Path, *, where: str, on_part: OnPart) -> None:
    num_bytes = source.stat().st_size
    length = part_bytes(num_bytes)
    sizes = [min(length, num_bytes - start) for start in range(0, num_bytes, length)]
    with source.open("rb") as stream:

        def send(number: int, upload: Mapping[str, Any]) -> str:
            payload = os.pread(stream.fileno(), length, (number - 1) * length)
            if len(payload) != sizes[number - 1]:
                raise _changed_source(source, where=where)
            return send_part_s3(fs, payload, upload, where)

        put_in_parts_s3(fs, path, sizes, send, num_bytes=num_bytes, where=where, on_part=on_part)


def put_in_parts_s3(
    fs: Any,
    path: str,
    sizes: Sequence[int],
    send: Callable[[int, Mapping[str, Any]], str],
    *,
    num_bytes: int,
    where: str,
    on_part: OnPart,
    before_end: Callable[[], None] = lambda: None,
) -> None:
    """Makes an object of parts, a few at a time; any exception aborts the upload.

    Args:
      fs: The file system.
      path: The object.
      sizes: Of the parts, for `on_part`.
      send: Makes a part, given its number, from 1 on, and the arguments of a request that name it;
        gives the ETag.
      num_bytes: Of the object.
      where: The URL that an error names.
      on_part: Hears of each part.
      before_end: Called when all parts are there and the object is not.

    Raises:
      StorageError: `store_unavailable`, `upload_size`, `upload_checksum`: nothing is left of it;
        `upload_lost`: somebody else has ended it.
    """
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    begun = with_retries(lambda: fs.call_s3("create_multipart_upload", **place), where=where)
    upload = {**place, "UploadId": str(begun["UploadId"])}
    try:
        etags = _in_parallel(
            len(sizes),
            lambda number: send(number, {**upload, "PartNumber": number}),
            after=lambda number: on_part(sizes[number - 1]),
        )
        before_end()
        parts = {"Parts": [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(etags, 1)]}
        try:
            answer = with_retries(
                lambda: fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts),
                where=where,
            )
            want = str(answer["ETag"])
        except FileNotFoundError:
            # No such upload: the try before this one has ended it and its answer was lost, or
            # another job has aborted it, and what lies there is that one's.
            fs.invalidate_cache(path)
            _require_parts(fs, path, etags, num_bytes=num_bytes, where=where)
            return
    except BaseException:
        _abort_quietly(fs, path, upload["UploadId"], where=where)
        raise
    fs.invalidate_cache(path)
    check_size(fs, path, num_bytes, where=where)
    got = str(with_retries(lambda: version_of(fs, path), where=where))
    if want and got.strip('"') != want.strip('"'):
        raise _not_what_was_sent(fs, path, got=got, want=want, where=where)


def _require_parts(fs: Any, path: str, etags: Sequence[str], *, num_bytes: int, where: str) -> None:
    """Accepts an object that is made of parts with these ETags; never removes another one."""
    want = _etag_of_parts(etags)
    try:
        info = with_retries(lambda: fs.info(path), where=where)
    except FileNotFoundError:
        info = {"size": None}
    got = str(info.get("ETag")).strip('"')
    if info["size"] != num_bytes or got != (want or got):
        raise StorageError(
            "upload_lost",
            where=where,
            got=got,
            want=want,
            got_bytes=info["size"],
            want_bytes=num_bytes,
        )


def send_part_s3(fs: Any, payload: bytes, upload: Mapping[str, Any], where: str) -> str:
    """Sends a part with its MD5, which the store compares; gives its ETag."""
    md5 = _base64(hashlib.md5(payload, usedforsecurity=False))
    answer = with_retries(
        lambda: fs.call_s3("upload_part", Body=payload, ContentMD5=md5, **upload), where=where
    )
    return str(answer["ETag"])


def _etag_of_parts(etags: Sequence[str]) -> str:
    """Gives the ETag of the object that parts make; "" where theirs are no MD5 (encrypted ones)."""
    digests = [etag.strip('"') for etag in etags]
    if not all(map(_is_md5, digests)):
        return ""
    joined = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False)
    return f"{joined.hexdigest()}-{len(etags)}"


def _abort_quietly(fs: Any, path: str, upload_id: str, *, where: str) -> None:
    """Aborts while another exception is on its way: that one is to be seen, not this one's."""
    try:
        abort_upload(fs, path, upload_id, where=where)
    except Exception as error:  # noqa: BLE001 - the exception under way says what went wrong
        logger.warning("%s: unfinished upload is left behind for `gc`: %s", where, error)


def _put_chunks_gs(fs: Any, path: str, source: Path, *, where: str, on_part: OnPart) -> None:
    bucket, key, _ = fs.split_path(path)
    num_bytes = source.stat().st_size
    md5 = hashlib.md5(usedforsecurity=False)
    with source.open("rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            md5.update(block)
    headers, _ = with_retries(
        lambda: fs.call(
            "POST",
            _gs_upload_url(fs, bucket),
            uploadType="resumable",
            name=key,
            json={"name": key, "md5Hash": _base64(md5)},
            headers={"X-Upload-Content-Type": "application/octet-stream"},
        ),
        where=where,
    )
    session = headers["Location"]
    answer = b""
    try:
        with source.open("rb") as stream:
            for start in range(0, num_bytes, PART_BYTES):
                chunk = stream.read(PART_BYTES)
                if len(chunk) != min(PART_BYTES, num_bytes - start):
                    raise _changed_source(source, where=where)
                answer = _send_chunk_gs(fs, session, chunk, start, num_bytes, where=where)
                on_part(len(chunk))
    except BaseException:
        try:
            fs.call("DELETE", session)
        except Exception as error:  # noqa: BLE001 - the exception under way says what went wrong
            logger.warning("%s: unfinished upload is left to expire: %s", where, error)
        raise
    _check_gs(fs, path, json.loads(answer), md5=_base64(md5), where=where)


def _send_chunk_gs(
    fs: Any, session: str, chunk: bytes, start: int, total: int, *, where: str
) -> bytes:
    """Sends a chunk until the store has kept all of it; the last one's answer is the object."""
    first, stop = start, start + len(chunk)
    for _ in range(CHUNK_TRIES):
        span = f"{start}-{stop - 1}" if start < stop else "*"
        body = chunk[start - first :]
        headers, answer = with_retries(
            lambda span=span, body=body: fs.call(  # type: ignore[misc]
                "PUT", session, headers={"Content-Range": f"bytes {span}/{total}"}, data=_Body(body)
            ),
            where=where,
        )
        if answer:
            return bytes(answer)
        # Without an object it says how far it has come; nothing where nothing was kept.
        start = int(headers["Range"].split("-")[1]) + 1 if "Range" in headers else 0
        if start < first:
            break
        if start >= stop and stop < total:
            return b""
    raise StorageError(
        "store_unavailable.keep", where=where, kept_bytes=start, sent_bytes=stop, tries=CHUNK_TRIES
    )


def _stream(fs: Any, path: str, source: Path, on_part: OnPart) -> None:
    # The plain `with fs.open(path, "wb")` would publish what was written when its body raises.
    target = fs.open(path, "wb", autocommit=False)
    try:
        with source.open("rb") as stream:
            for block in iter(lambda: stream.read(PART_BYTES), b""):
                target.write(block)
                on_part(len(block))
        target.close()
    except BaseException:
        target.discard()
        raise
    target.commit()


def _in_parallel(count: int, send: Callable[[int], Any], *, after: Callable[[int], None]) -> list:
    """Does numbers 1 to `count`, a few at a time; gives the results in order.

    An exception, of a task or of `after`, waits for the tasks under way and begins no other.
    """
    results: dict[int, Any] = {}
    pool = ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="upload")
    running: dict[Future, int] = {}
    try:
        for number in range(1, count + 1):
            running[pool.submit(send, number)] = number
            while running and (len(running) == PARTS_AT_ONCE or number == count):
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    finished = running.pop(future)
                    results[finished] = future.result()
                    after(finished)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[number] for number in range(1, count + 1)]


class _Body(io.BytesIO):
    """What a request carries: aiohttp closes it behind a try, and the next try begins anew."""

    def close(self) -> None:
        pass


def _gs_upload_url(fs: Any, bucket: str) -> str:
    return f"{fs.base.removesuffix('/storage/v1/')}/upload/storage/v1/b/{quote(bucket)}/o"


def check_size(fs: Any, path: str, want: int, *, where: str) -> None:
    """Removes an object that has another length than what was put there.

    Raises:
      StorageError: `upload_size`.
    """
    try:
        got = int(with_retries(lambda: fs.info(path), where=where)["size"])
    except FileNotFoundError:
        got = None
    if got != want:
        if got is not None:
            fs.rm_file(path)
        raise StorageError("upload_size", where=where, got_bytes=got, want_bytes=want)


def _check_gs(fs: Any, path: str, answer: dict[str, Any], *, md5: str, where: str) -> None:
    if answer.get("md5Hash", md5) != md5:
        raise _not_what_was_sent(fs, path, got=answer["md5Hash"], want=md5, where=where)


def _not_what_was_sent(fs: Any, path: str, *, got: str, want: str, where: str) -> StorageError:
    fs.rm_file(path)
    return StorageError("upload_checksum", where=where, got=got, want=want)


def _changed_source(source: Path, *, where: str) -> StorageError:
    return StorageError("upload_source", where=where, file=source)


def _holds(fs: Any, path: str, payload: bytes) -> bool:
    try:
        return bytes(fs.cat_file(path)) == payload
    except FileNotFoundError:
        return False


def _is_md5(etag: str) -> bool:
    return len(etag) == 32 and all(c in "0123456789abcdef" for c in etag)


def _base64(md5: Any) -> str:
    return base64.b64encode(md5.digest()).decode()
