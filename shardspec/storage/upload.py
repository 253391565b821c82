"""Uploads: bytes become an object whole or not at all, verified, and conditionally where requested.

There are three kinds of store, by the protocol of their file system.

* S3 and compatible stores. One PUT up to `SINGLE_PUT_BYTES`, with the MD5 of the body, which the
  store compares; beyond that a multipart upload, whose parts are read from the file as they are
  sent, several at a time, each with its MD5. The object appears when the upload is completed; any
  exception before that, Ctrl-C included, aborts it, so that no parts are left to be paid for.
* Google Cloud Storage. One request, or a resumable upload in chunks, with the MD5 of the whole; the
  MD5 in the response is compared as well. An upload that fails is cancelled.
* Any other file system of fsspec: its plain write for small objects and for `memory://`, for large
  ones its write that appears on commit. The length is compared.

Conditions ("only if there is no object", "only in place of this version") are decided by the store
(If-None-Match, If-Match, ifGenerationMatch). Some S3-compatible stores ignore them: there the last
writer wins. Other file systems have no conditions: the check and the write are two steps, and
another process may write in between.

Transient failures are retried (`shardspec.storage.retries`); every request here is safe to repeat.
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
from shardspec.storage.retries import CLEANUP_POLICY, RetryPolicy, with_retries

logger = logging.getLogger(__name__)

SINGLE_PUT_BYTES = 8 * 2**20
"""Objects up to this length are sent in one request; S3 parts must have at least 5 MiB."""

PART_BYTES = 8 * 2**20
"""Length of a part, or of a chunk (GCS requires a multiple of 256 KiB); larger where there would be
more than `MAX_PARTS`."""

MAX_PARTS = 10_000
"""Most parts of an upload (S3's limit)."""

CHUNK_TRIES = 8
"""Times that a chunk is sent to a store that answers but keeps only a part of it."""

PARTS_AT_ONCE = 4
"""Parts of one upload under way: they hold 32 MiB of the file in memory."""

OnPart = Callable[[int], None]
"""Called with the bytes of each part that has arrived; an exception of it aborts the upload."""

_HERE = threading.Lock()
"""Makes check and write one step for the threads of this process, on file systems without
conditional writes. Held while the object is written."""


def kind_of(fs: Any) -> str:
    """Returns the kind of store that a file system leads to: "s3", "gs" or "other"."""
    names = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return "s3" if "s3" in names else "gs" if "gs" in names else "other"


def version_of(fs: Any, path: str) -> str | None:
    """Returns the version of an object: what the store changes with each write.

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
    """Returns the version of an object as `version_of` does, from its entry in a listing."""
    if kind_of(fs) == "s3":
        return str(info.get("ETag"))
    if kind_of(fs) == "gs":
        return str(info.get("generation"))
    # fsspec's HTTP file system names the fields after the response's headers; the hub has blobs.
    for name in ("etag", "ETag", "Last-Modified", "blob_id"):
        if info.get(name):
            return str(info[name])
    return f"{info['size']}-{info.get('mtime', info.get('created'))}"


def put_bytes(fs: Any, path: str, payload: bytes, *, where: str) -> None:
    """Writes a small object, whatever was there before.

    Raises:
      StorageError: `store_unavailable`, `upload_size`, `upload_checksum`; other errors as the
        client raises them.
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
    """Writes a small object in place of one known version, or of none.

    Args:
      fs: The file system.
      path: The object.
      payload: Its new content.
      replacing: What `version_of` returned; None where there must be no object.
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
                if with_retries(lambda: version_of(fs, path), where=where) != replacing:
                    return _holds(fs, path, payload, where=where)
                put_bytes(fs, path, payload, where=where)
    except FileNotFoundError:
        if replacing is None:
            raise
        return False  # S3 says 404, not 412, where the object to be replaced is gone
    except Exception as error:
        if not is_condition_refused(error):
            raise
        # A response may have been lost: then the attempt before this one has written the object.
        return _holds(fs, path, payload, where=where)
    return True


def put_file(
    fs: Any, path: str, source: Path, *, where: str, on_part: OnPart | None = None
) -> None:
    """Uploads a local file as an object, whatever was there before.

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
    """Lists the unfinished multipart uploads below a path.

    Returns:
      Path, upload id and start time (Unix seconds) of each. Only S3 has any to list: GCS does not
      list unfinished uploads, and drops them after a week.
    """
    if kind_of(fs) != "s3":
        return []
    bucket, prefix, _ = fs.split_path(path)
    found = []
    page: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
        for each in answer.get("Uploads", []):
            # bucket/set2/... has the prefix bucket/set too.
            if f"{each['Key']}/".startswith(f"{prefix}/" if prefix else ""):
                began = each["Initiated"].timestamp()
                found.append((f"{bucket}/{each['Key']}", str(each["UploadId"]), float(began)))
        if not answer.get("IsTruncated"):
            return sorted(found)
        page = {
            "KeyMarker": answer["NextKeyMarker"],
            "UploadIdMarker": answer["NextUploadIdMarker"],
        }


def abort_upload(
    fs: Any, path: str, upload_id: str, *, where: str, policy: RetryPolicy | None = None
) -> None:
    """Drops the parts of an unfinished multipart upload; a missing one is not an error."""
    bucket, key, _ = fs.split_path(path)
    try:
        with_retries(
            lambda: fs.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id
            ),
            where=where,
            policy=policy,
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
    # ETags of encrypted objects are not MD5s; then only the store's own comparison is left.
    etag = str(answer["ETag"]).strip('"')
    if _is_md5(etag) and etag != md5.hexdigest() and "SSEKMSKeyId" not in answer:
        raise _checksum_mismatch(fs, path, got=etag, want=md5.hexdigest(), where=where)


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
    """Makes an object from parts, a few at a time; any exception aborts the upload.

    Args:
      fs: The file system.
      path: The object.
      sizes: Of the parts, for `on_part`.
      send: Makes a part, given its number, from 1 on, and the arguments of a request that name it;
        returns the ETag.
      num_bytes: Of the object.
      where: The URL that an error names.
      on_part: Called after each part.
      before_end: Called when all parts have arrived, before the object appears.

    Raises:
      StorageError: `store_unavailable`, `upload_size`, `upload_checksum`: nothing is left of it;
        `upload_lost`: another process has completed or aborted it.
    """
    bucket, key, _ = fs.split_path(path)
    target = {"Bucket": bucket, "Key": key}
    begun = with_retries(lambda: fs.call_s3("create_multipart_upload", **target), where=where)
    upload = {**target, "UploadId": str(begun["UploadId"])}
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
            # No such upload: either the attempt before this one has completed it and its response
            # was lost, or another job has aborted it, and the object there is not ours.
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
        raise _checksum_mismatch(fs, path, got=got, want=want, where=where)


def _require_parts(fs: Any, path: str, etags: Sequence[str], *, num_bytes: int, where: str) -> None:
    """Accepts an object that consists of parts with these ETags; never removes another one."""
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
    """Sends a part with its MD5, which the store compares; returns its ETag."""
    md5 = _base64(hashlib.md5(payload, usedforsecurity=False))
    answer = with_retries(
        lambda: fs.call_s3("upload_part", Body=payload, ContentMD5=md5, **upload), where=where
    )
    return str(answer["ETag"])


def _etag_of_parts(etags: Sequence[str]) -> str:
    """Returns the ETag of an object made from parts; "" where theirs are not MD5s (encryption)."""
    digests = [etag.strip('"') for etag in etags]
    if not all(map(_is_md5, digests)):
        return ""
    joined = hashlib.md5(bytes.fromhex("".join(digests)), usedforsecurity=False)
    return f"{joined.hexdigest()}-{len(etags)}"


def _abort_quietly(fs: Any, path: str, upload_id: str, *, where: str) -> None:
    """Aborts while another exception is being raised, which must not be replaced by this one's."""
    try:
        abort_upload(fs, path, upload_id, where=where, policy=CLEANUP_POLICY)
    except Exception as error:  # noqa: BLE001 - the exception being raised says what went wrong
        logger.warning("%s: unfinished upload is left for `gc`: %s", where, error)


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
        except Exception as error:  # noqa: BLE001 - the exception being raised says what went wrong
            logger.warning("%s: unfinished upload is left to expire: %s", where, error)
        raise
    _check_gs(fs, path, json.loads(answer), md5=_base64(md5), where=where)


def _send_chunk_gs(
    fs: Any, session: str, chunk: bytes, start: int, total: int, *, where: str
) -> bytes:
    """Sends a chunk until the store has all of it; the response to the last one is the object."""
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
        # Range: what the store has so far; absent where it has nothing.
        start = int(headers["Range"].split("-")[1]) + 1 if "Range" in headers else 0
        if start < first:
            break
        if start >= stop and stop < total:
            return b""
    raise StorageError(
        "store_unavailable.keep", where=where, kept_bytes=start, sent_bytes=stop, tries=CHUNK_TRIES
    )


def _stream(fs: Any, path: str, source: Path, on_part: OnPart) -> None:
    # A plain `with fs.open(path, "wb")` would publish a partial object when its body raises.
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
    """Does tasks 1 to `count`, a few at a time; returns their results in order.

    `after` runs in the calling thread, which alone owns `results` and `running`. An exception, of a
    task or of `after`, waits for the running tasks and starts no other: a part that arrived after
    the upload was aborted would be left in the store.
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
    """A request body that can be sent again: aiohttp closes bodies after an attempt."""

    def close(self) -> None:
        pass


def _gs_upload_url(fs: Any, bucket: str) -> str:
    return f"{fs.base.removesuffix('/storage/v1/')}/upload/storage/v1/b/{quote(bucket)}/o"


def check_size(fs: Any, path: str, want: int, *, where: str) -> None:
    """Removes an object whose length is not that of what was uploaded.

    Raises:
      StorageError: `upload_size`.
    """
    try:
        got = int(with_retries(lambda: fs.info(path), where=where)["size"])
    except FileNotFoundError:
        got = None
    if got != want:
        if got is not None:
            with_retries(lambda: fs.rm_file(path), where=where)
        raise StorageError("upload_size", where=where, got_bytes=got, want_bytes=want)


def _check_gs(fs: Any, path: str, answer: dict[str, Any], *, md5: str, where: str) -> None:
    if answer.get("md5Hash", md5) != md5:
        raise _checksum_mismatch(fs, path, got=answer["md5Hash"], want=md5, where=where)


def _checksum_mismatch(fs: Any, path: str, *, got: str, want: str, where: str) -> StorageError:
    with_retries(lambda: fs.rm_file(path), where=where)
    return StorageError("upload_checksum", where=where, got=got, want=want)


def _changed_source(source: Path, *, where: str) -> StorageError:
    return StorageError("upload_source", where=where, file=source)


def _holds(fs: Any, path: str, payload: bytes, *, where: str) -> bool:
    try:
        return with_retries(lambda: bytes(fs.cat_file(path)), where=where) == payload
    except FileNotFoundError:
        return False


def _is_md5(etag: str) -> bool:
    return len(etag) == 32 and all(c in "0123456789abcdef" for c in etag)


def _base64(md5: Any) -> str:
    return base64.b64encode(md5.digest()).decode()
