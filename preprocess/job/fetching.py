"""FETCH on an engine: hosts are dealt to as many tasks as there are machines, by the hash of names.

So all requests to a host come from one process, and its limits hold over all machines. A task has a
ledger of its own, in the image cache if that is a folder: one that runs again resumes there. Its
results come back to the ledger of the job, or of its part, so that whatever runs next knows them.
On one machine there is one task, and it runs in this process.
"""

from __future__ import annotations

import gzip
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urljoin

from preprocess.fetch import (
    BlobCache,
    FetchPolicy,
    FetchResult,
    FetchResults,
    Ledger,
    UrlSpool,
    decode_result,
    encode_result,
    host_key,
    read_ledger,
    unique_urls,
)
from preprocess.job.engines.engine import Engine, node_proof
from preprocess.job.engines.local import TaskDone, TaskProgress
from preprocess.job.job import NODES_FOLDER, Job, Reporter, local_cache
from preprocess.job.plan import Part
from preprocess.job.shared_results import SharedResults
from preprocess.media import ImageLimits
from shardspec.errors import StorageError

WHOLE = Part(index=0, count=1)
"""Of a job without parts."""

READ_BYTES_PER_URL = 100_000
"""Length of another dataset's ledger that is read for each URL that is not known: some 250 lines,
which take as long as a request of one."""

LOCK_WAIT_S = 60
"""How long a task waits for the ledger that an earlier attempt at it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchContext:
    """What every task of a FETCH shares."""

    name: str
    """Of the dataset."""
    cache: str
    """Root of the blob cache."""
    policy: FetchPolicy
    limits: ImageLimits
    videos: bool
    ocr_files: bool
    again: bool
    """Whether what earlier runs have kept or failed to get is judged by the policy."""

    def fetch(
        self, urls: UrlSpool, ledger: Ledger, blobs: BlobCache, report: Callable[[str], None]
    ) -> Mapping[str, FetchResult]:
        """Downloads some URLs; reports the reason of each failure, or ""."""
        from preprocess.fetch import fetch_all

        return fetch_all(
            urls,
            cache=blobs,
            ledger=ledger,
            policy=self.policy,
            limits=self.limits,
            videos=self.videos,
            ocr_files=self.ocr_files,
            again=self.again,
            on_result=lambda result: report(result.reason),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShare:
    """The hosts of one task."""

    part: Part
    urls: bytes
    """Packed by `_pack`: they travel to another machine."""
    known: bytes
    """What the job knows of them."""


def fetch_images(
    job: Job,
    urls: UrlSpool,
    report: Reporter,
    *,
    again: bool,
    engine: Engine | None = None,
    cache_token: str = "",
    mark: str = "",
) -> Mapping[str, FetchResult]:
    """Downloads images into the cache.

    Args:
      job: The job.
      urls: What to download.
      report: Gets the progress.
      again: Whether failures of earlier runs may be requested again, and images that they have kept
        be refused; a finished split that is repaired is made of the results that it was made of.
      engine: Where; None for this process.
      cache_token: Mark that is left in the cache for other machines.
      mark: URL of an object by which they tell that they see the output; "" for none yet.

    Returns:
      How each URL has ended.
    """
    if not urls:
        return {}
    context = FetchContext(
        name=job.name,
        cache=job.blobs.url,
        policy=job.settings.fetch,
        limits=job.settings.recipe.image.limits,
        videos=job.dataset.videos,
        ocr_files=job.dataset.ocr_files,
        again=again,
    )
    report.stage("fetch", len(urls))
    with Ledger(job.ledger_path()) as ledger:
        shared = SharedResults(job, ledger)
        _copy_known(job, ledger, urls, shared)
        _copy_images(job, ledger, urls, shared)
        shared.note_copied()
        if engine is None or engine.is_local:
            results = context.fetch(urls, ledger, job.blobs, report.step)
        else:
            _fetch_on_nodes(job, urls, ledger, context, report, engine, cache_token, mark)
            results = FetchResults(urls, ledger.results)
        shared.publish()  # after the images, which others look for then
        return results


def _fetch_on_nodes(
    job: Job,
    urls: UrlSpool,
    ledger: Ledger,
    context: FetchContext,
    report: Reporter,
    engine: Engine,
    cache_token: str,
    mark: str,
) -> None:
    """Downloads on other machines what becomes known to a ledger of this one."""
    s = job.settings
    job.blobs.leave_token(cache_token)
    try:
        proof = node_proof(
            s.out, mark, dataset=s.dataset, cache=job.blobs.url, cache_token=cache_token
        )
        shares = _deal(urls, (s.part or WHOLE).divide(engine.num_nodes), job.scratch)
        for event in engine.run(
            range(len(shares)),
            work=fetch_share,
            context=context,
            given=lambda task: _share(*shares[task], ledger),
            proof=proof,
        ):
            if isinstance(event, TaskDone):
                _learn(ledger, event.value)
            elif isinstance(event, TaskProgress):
                report.step(event.note)
    finally:
        job.blobs.remove_tokens(cache_token)
    job.blobs.refresh()  # what the tasks have put


def _deal(urls: UrlSpool, parts: Sequence[Part], folder: str) -> list[tuple[Part, UrlSpool]]:
    """Deals hosts to tasks."""
    dealt = {part.index: UrlSpool(folder) for part in parts}
    for url in urls:
        dealt[host_key(url) % parts[0].count].add(url)
    return [(part, own) for part in parts if (own := dealt[part.index])]


def _share(part: Part, urls: UrlSpool, ledger: Ledger) -> HostShare:
    """Packs what a task is given: the others wait on the disk."""
    return HostShare(
        part=part,
        urls=_pack(json.dumps(url).encode() + b"\n" for url in urls),
        known=_known(ledger, urls),
    )


def fetch_share(context: FetchContext, share: HostShare, report: Callable[[str], None]) -> bytes:
    """Downloads the URLs of some hosts, on any machine; gives what its ledger knows of them."""
    folder = local_cache(context.cache) / "ledgers" / NODES_FOLDER
    with _opened(folder / f"{context.name}.{share.part.stem}.jsonl") as ledger:
        _learn(ledger, share.known)
        blobs = BlobCache(context.cache, pack_bytes=context.policy.pack_bytes)
        urls = unique_urls(map(json.loads, _unpack(share.urls)))
        context.fetch(urls, ledger, blobs, report)
        return _known(ledger, urls)


def _opened(path: Path) -> Ledger:
    """Opens a ledger; one that is held may be an earlier attempt's, whose machine was cut off."""
    for _ in range(LOCK_WAIT_S):
        try:
            return Ledger(path)
        except StorageError as error:
            if error.reason != "ledger_locked":
                raise
        _pause()
    return Ledger(path)


def _pause() -> None:
    threading.Event().wait(1.0)


def _known(ledger: Ledger, urls: Iterable[str]) -> bytes:
    """Packs what a ledger knows of some URLs, and of the robots.txt of their origins."""
    robots: set[str] = set()

    def wanted() -> Iterator[str]:
        for url in urls:
            yield url
            with suppress(ValueError):
                robots.add(urljoin(url, "/robots.txt"))
        yield from sorted(robots)

    found = map(ledger.get, wanted())
    return _pack(encode_result(result) for result in found if result is not None)


def _pack(lines: Iterable[bytes]) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=1, fileobj=packed, mtime=0) as stream:
        stream.writelines(lines)
    return packed.getvalue()


def _unpack(payload: bytes) -> Iterator[bytes]:
    with gzip.open(io.BytesIO(payload)) as stream:
        yield from stream


def _learn(ledger: Ledger, payload: bytes) -> None:
    """Takes over what another ledger knew; the later result of a URL counts."""
    for result in map(decode_result, _unpack(payload)):
        known = ledger.get(result.url)
        if known is None or (known != result and known.finished_unix_s <= result.finished_unix_s):
            ledger.append(result)


def _copy_known(job: Job, ledger: Ledger, urls: UrlSpool, shared: SharedResults) -> None:
    """Copies what other runs of the dataset know of some URLs, so that none is fetched twice.

    Only URLs that the ledger lacks: this is done when a part, or a machine, first runs. Runs are
    those in another number of parts, and those of other machines.
    """
    lacking = _lacking(ledger, urls)
    if not lacking:
        return
    for path in job.other_ledger_paths():
        known = read_ledger(path)
        for url in lacking:
            if (result := known.get(url)) is not None:
                ledger.append(result)
        lacking = _lacking(ledger, lacking)
    for each in shared.of_dataset():
        if not lacking:
            return
        found = shared.read(each)
        for url in lacking:
            result = found.get(url)
            # Where the image of the latest is gone, an earlier one may be there.
            if result is not None and (result.status != "ok" or _has_image(job, result)):
                ledger.append(result)
        lacking = _lacking(ledger, lacking)


def _copy_images(job: Job, ledger: Ledger, urls: UrlSpool, shared: SharedResults) -> None:
    """Takes over the images that other datasets have; their failures may not be this one's."""
    lacking = _lacking(ledger, urls)
    if not lacking:
        return

    def sources() -> Iterator[tuple[int, Callable[[], Mapping[str, FetchResult]]]]:
        for path in job.foreign_ledger_paths():
            with suppress(OSError):
                yield path.stat().st_size, partial(read_ledger, path)
        for each in shared.of_others():
            yield each.num_bytes, partial(shared.read, each)

    for num_bytes, read in sources():
        known: Mapping[str, FetchResult] = {}
        # A damaged one is an error for its own dataset; another user's may not be readable.
        with suppress(StorageError, OSError):
            if num_bytes <= len(lacking) * READ_BYTES_PER_URL:
                known = read()
        if not known:
            continue
        for url in lacking:
            result = known.get(url)
            if result is not None and result.status == "ok" and _is_usable(job, result):
                ledger.append(result)
        lacking = _lacking(ledger, lacking)


def _lacking(ledger: Ledger, urls: UrlSpool) -> UrlSpool:
    """Lists the URLs of which a ledger knows nothing: there may be many sources for few of them."""
    lacking = UrlSpool(urls.folder)
    for url in urls:
        if url not in ledger.results:
            lacking.add(url)
    return lacking


def _is_usable(job: Job, known: FetchResult) -> bool:
    """Whether the dataset would have kept what another has downloaded."""
    from preprocess.fetch import image_fault

    if known.reason or known.sha256 is None or not job.blobs.has(known.sha256):
        return False
    with suppress(StorageError):  # damaged: it is requested
        body = job.blobs.get(known.sha256)
        return not image_fault(body, limits=job.settings.recipe.image.limits)
    return False


def _has_image(job: Job, known: FetchResult) -> bool:
    return known.sha256 is not None and job.blobs.has(known.sha256)
