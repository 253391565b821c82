"""FETCH on an engine: hosts are dealt to as many tasks as there are machines, by the hash of names.

So all requests to a host come from one process, and its limits hold over all machines. A task has a
ledger of its own, in the image cache if that is a folder: one that runs again resumes there. Its
results come back to the ledger of the job, or of its part, so that whatever runs next knows them.
On one machine there is one task, and it runs in this process.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

from preprocess.fetch import (
    BlobCache,
    FetchPolicy,
    FetchResult,
    Ledger,
    decode_results,
    encode_results,
    host_key,
    read_ledger,
    redact,
)
from preprocess.job.engines.engine import Engine, node_proof
from preprocess.job.engines.local import TaskDone, TaskProgress
from preprocess.job.job import NODES_FOLDER, Job, Reporter, local_cache
from preprocess.job.plan import Part
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

    def fetch(
        self, urls: Sequence[str], ledger: Ledger, blobs: BlobCache, report: Callable[[str], None]
    ) -> dict[str, FetchResult]:
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
            on_result=lambda result: report(result.reason),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShare:
    """The hosts of one task."""

    part: Part
    urls: tuple[str, ...]
    known: bytes
    """What the job knows of them."""


def fetch_images(
    job: Job,
    urls: Sequence[str],
    report: Reporter,
    *,
    again: bool,
    engine: Engine | None = None,
    cache_token: str = "",
    mark: str = "",
) -> dict[str, FetchResult]:
    """Downloads images into the cache.

    Args:
      job: The job.
      urls: What to download.
      report: Gets the progress.
      again: Whether transient failures of earlier runs are requested again.
      engine: Where; None for this process.
      cache_token: Mark that is left in the cache for other machines.
      mark: URL of an object by which they tell that they see the output; "" for none yet.

    Returns:
      How each URL has ended.
    """
    if not urls:
        return {}
    policy = job.settings.fetch
    if not again:
        policy = dataclasses.replace(policy, retry="none")
    context = FetchContext(
        name=job.name,
        cache=job.blobs.url,
        policy=policy,
        limits=job.settings.recipe.image.limits,
        videos=job.dataset.videos,
        ocr_files=job.dataset.ocr_files,
    )
    report.stage("fetch", len(set(urls)))
    with Ledger(job.ledger_path()) as ledger:
        _copy_known(job, ledger, urls)
        _copy_images(job, ledger, urls)
        if engine is None or engine.is_local:
            return context.fetch(urls, ledger, job.blobs, report.step)
        _fetch_on_nodes(job, urls, ledger, context, report, engine, cache_token, mark)
        return _results(ledger, urls)


def _fetch_on_nodes(
    job: Job,
    urls: Sequence[str],
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
        shares = _deal(urls, ledger, (s.part or WHOLE).divide(engine.num_nodes))
        for event in engine.run(
            range(len(shares)),
            work=fetch_share,
            context=context,
            given=shares.__getitem__,
            proof=proof,
        ):
            if isinstance(event, TaskDone):
                _learn(ledger, event.value)
            elif isinstance(event, TaskProgress):
                report.step(event.note)
    finally:
        job.blobs.remove_tokens(cache_token)
    job.blobs.refresh()  # what the tasks have put


def _deal(urls: Sequence[str], ledger: Ledger, parts: Sequence[Part]) -> list[HostShare]:
    """Deals hosts to tasks; each gets what is known of its URLs."""
    dealt: dict[int, list[str]] = {part.index: [] for part in parts}
    for url in urls:
        dealt[host_key(url) % parts[0].count].append(url)
    return [
        HostShare(part=part, urls=tuple(own), known=_encoded(ledger, own))
        for part in parts
        if (own := dealt[part.index])
    ]


def fetch_share(context: FetchContext, share: HostShare, report: Callable[[str], None]) -> bytes:
    """Downloads the URLs of some hosts, on any machine; gives what its ledger knows of them."""
    folder = local_cache(context.cache) / "ledgers" / NODES_FOLDER
    with _opened(folder / f"{context.name}.{share.part.stem}.jsonl") as ledger:
        _learn(ledger, share.known)
        blobs = BlobCache(context.cache, pack_bytes=context.policy.pack_bytes)
        context.fetch(share.urls, ledger, blobs, report)
        return _encoded(ledger, share.urls)


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


def _results(ledger: Ledger, urls: Iterable[str]) -> dict[str, FetchResult]:
    found = ((url, ledger.get(url)) for url in urls)
    return {url: result for url, result in found if result is not None}


def _encoded(ledger: Ledger, urls: Iterable[str]) -> bytes:
    """Writes what a ledger knows of some URLs, and of the robots.txt of their origins."""
    wanted = set(urls)
    for url in [*wanted]:
        with suppress(ValueError):
            wanted.add(urljoin(url, "/robots.txt"))
    return encode_results(_results(ledger, wanted))


def _learn(ledger: Ledger, payload: bytes) -> None:
    """Takes over what another ledger knew; the later result of a URL counts."""
    for url, result in decode_results(payload).items():
        known = ledger.get(url)
        if known is None or (known != result and known.finished_unix_s <= result.finished_unix_s):
            ledger.append(result)


def _copy_known(job: Job, ledger: Ledger, urls: Sequence[str]) -> None:
    """Copies what runs in another number of parts know of some URLs, so that none is fetched twice.

    Only URLs that the ledger lacks: this is done when a part is first run.
    """
    others = job.other_ledger_paths()
    wanted = {name for name in map(redact, urls) if ledger.get(name) is None} if others else set()
    for path in others if wanted else ():
        known = read_ledger(path)
        for name in sorted(wanted & known.keys()):
            ledger.append(known[name])
        wanted -= known.keys()


def _copy_images(job: Job, ledger: Ledger, urls: Sequence[str]) -> None:
    """Takes over the images that other datasets have; their failures may not be this one's."""
    for path in job.foreign_ledger_paths():
        wanted = {name for name in map(redact, urls) if ledger.get(name) is None}
        if path.stat().st_size > len(wanted) * READ_BYTES_PER_URL:
            continue
        known: dict[str, FetchResult] = {}
        with suppress(StorageError):  # a damaged one is told to who needs it
            known = read_ledger(path)
        for name in sorted(wanted & known.keys()):
            if known[name].status == "ok" and _is_usable(job, known[name]):
                ledger.append(known[name])


def _is_usable(job: Job, known: FetchResult) -> bool:
    """Whether the dataset would have kept what another has downloaded."""
    from preprocess.fetch import image_fault

    if known.reason or known.sha256 is None or not job.blobs.has(known.sha256):
        return False
    with suppress(StorageError):  # damaged: it is requested
        body = job.blobs.get(known.sha256)
        return not image_fault(body, limits=job.settings.recipe.image.limits)
    return False
