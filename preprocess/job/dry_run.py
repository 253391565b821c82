"""What `make plan` shows: what a job would do, without writing or downloading anything."""

from __future__ import annotations

import statistics
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from preprocess.datasets import ImageSource, VideoSource, example_images, example_videos
from preprocess.fetch import FetchResult, host_of, read_ledger
from preprocess.job.build import SampleSize, sample_size
from preprocess.job.commit import committed
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.pipeline import check_conflict, check_sources
from preprocess.job.plan import ShardCount, count_shards
from preprocess.job.planner import PROBE_ROWS, image_urls
from shardspec import storage
from shardspec.errors import SampleError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a job would do, as `make plan` prints it."""

    num_rows: int
    """Those that are to be built: where new rows are appended, these alone."""
    num_alive: int
    """Rows without those whose URLs have failed before."""
    notes: tuple[str, ...]
    """Which files make which split, and what a hash divides."""
    num_urls: int
    urls_known: Mapping[str, int]
    """URLs by what the ledger says of them: ok, a reason of failure, or "unknown"."""
    downloads: Downloads | None
    """What is left to be downloaded; None where nothing is."""
    build_core_s: float | None
    """Seconds of one core that all samples take."""
    mean_sample_bytes: float | None
    """From really built samples; None where no image is available yet."""
    mean_tokens: float | None
    mean_variant_bytes: float | None
    """Of these bytes, what the baked variants beyond the first cost."""
    shards: ShardCount | None
    free_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloads:
    """What a job has to request."""

    num_urls: int
    num_hosts: int
    busiest_host: str
    busiest_urls: int
    """URLs of that host."""
    least_s: float
    """Seconds that they take at the rate that a host is asked at."""
    num_bytes: float | None
    """Estimate by the files that are there; None where none is."""


def dry_run(settings: JobSettings, report: Reporter) -> DryRun:
    """Finds out what a job would do; writes and downloads nothing.

    Raises:
      ConflictError: New rows would be appended, and the output or the source do not allow it.
    """
    job = Job(settings)
    if settings.new_rows == "append":
        check_conflict(job)
        result = committed(job)
        if result is not None:
            check_sources(job, result, report)
    known: Mapping[str, FetchResult] = {}
    if job.ledger_path().exists():
        known = read_ledger(job.ledger_path())
    urls = image_urls(job, report, folder=None)
    states = Counter(_url_state(known.get(url)) for url in urls)
    samples: list[SampleSize] = []
    seconds: list[float] = []
    report.stage("probe", min(PROBE_ROWS, len(job.examples)))
    for row in islice(_survey_rows(job, known), PROBE_ROWS):
        began_s = time.perf_counter()
        try:
            samples.append(sample_size(job.preparer, row, cache=job.blobs))
            seconds.append(time.perf_counter() - began_s)
        except SampleError as error:
            report.note(f"a sample cannot be built: {error.what}")
        report.step("")
    mean = _mean([sample.num_bytes for sample in samples])
    count = None
    alive = len(job.examples) - sum(n for s, n in states.items() if s not in ("ok", "unknown"))
    if mean is not None and alive > 0:
        count = count_shards(
            round(mean * alive),
            target_bytes=settings.shard_bytes,
            num_samples=alive,
            num_shards=settings.num_shards,
        )
    return DryRun(
        num_rows=len(job.examples),
        num_alive=max(0, alive),
        notes=tuple(job.dataset.notes()),
        num_urls=len(urls),
        urls_known=dict(sorted(states.items())),
        downloads=_downloads(settings, (url for url in urls if url not in known), known),
        # The first sample pays for what is loaded once.
        build_core_s=statistics.median(seconds) * max(0, alive) if seconds else None,
        mean_sample_bytes=mean,
        mean_tokens=_mean([sample.num_tokens for sample in samples]),
        mean_variant_bytes=_mean([sample.variant_bytes for sample in samples]),
        shards=count,
        free_bytes=storage.free_bytes(settings.out),
    )


def _downloads(
    settings: JobSettings, urls: Iterable[str], known: Mapping[str, FetchResult]
) -> Downloads | None:
    hosts = Counter(map(host_of, urls))
    if not hosts:
        return None
    num_urls = hosts.total()
    host, most = min(hosts.items(), key=lambda each: (-each[1], each[0]))
    rate = settings.fetch.host_rate
    lengths = array("Q", (each.num_bytes for each in known.values() if each.num_bytes))
    return Downloads(
        num_urls=num_urls,
        num_hosts=len(hosts),
        busiest_host=host,
        busiest_urls=most,
        least_s=most / rate if rate else 0.0,
        num_bytes=sum(lengths) / len(lengths) * num_urls if lengths else None,
    )


def _survey_rows(job: Job, known: Mapping[str, FetchResult]) -> Iterator[dict[str, Any]]:
    """Gives rows whose image is available without the network."""
    for i in job.examples:
        try:
            example = job.dataset[i]
        except SampleError:
            continue
        images = [_at_hand(job, image, known) for image in example_images(example)]
        if any(image is None for image in images):
            continue
        videos = [_at_hand(job, video, known) for video in example_videos(example)]
        if any(video is None for video in videos):
            continue
        if videos:
            example["video"] = videos
        if images:
            example["image"] = images if job.dataset.several_images else images[0]
        yield {"key": f"row-{i}", "example": example, "image": None}


def _at_hand(
    job: Job, image: ImageSource | VideoSource, known: Mapping[str, FetchResult]
) -> ImageSource | VideoSource | None:
    if not isinstance(image, str):
        return image
    result = known.get(image)
    if result is None or result.status != "ok" or result.sha256 is None:
        return None
    if not job.blobs.has(result.sha256):
        return None
    try:
        return job.blobs.get(result.sha256)
    except StorageError:
        return None


def _url_state(result: FetchResult | None) -> str:
    if result is None:
        return "unknown"
    return "ok" if result.status == "ok" else result.reason


def _mean(values: list[int]) -> float | None:
    return sum(values) / len(values) if values else None
