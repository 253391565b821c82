"""What `make plan` shows: what a job would do, without writing or downloading anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from preprocess.datasets import ImageSource, VideoSource, example_images, example_videos
from preprocess.fetch import FetchResult, read_ledger
from preprocess.job.build import SampleSize, sample_size
from preprocess.job.job import Job, JobSettings, Reporter
from preprocess.job.plan import ShardCount, count_shards
from preprocess.job.planner import PROBE_ROWS, image_urls
from shardspec import storage
from shardspec.errors import SampleError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a job would do, as `make plan` prints it."""

    num_rows: int
    notes: tuple[str, ...]
    """Which files make which split, and what a hash divides."""
    num_urls: int
    urls_known: Mapping[str, int]
    """URLs by what the ledger says of them: ok, a reason of failure, or "unknown"."""
    mean_sample_bytes: float | None
    """From really built samples; None where no image is available yet."""
    mean_tokens: float | None
    mean_variant_bytes: float | None
    """Of these bytes, what the baked variants beyond the first cost."""
    shards: ShardCount | None
    free_bytes: int | None


def dry_run(settings: JobSettings, report: Reporter) -> DryRun:
    """Finds out what a job would do; writes and downloads nothing."""
    job = Job(settings)
    known = read_ledger(job.ledger_path()) if job.ledger_path().exists() else {}
    urls = set(image_urls(job, report))
    states = Counter(_url_state(known.get(url)) for url in urls)
    samples: list[SampleSize] = []
    report.stage("probe", min(PROBE_ROWS, len(job.dataset)))
    for row in islice(_survey_rows(job, known), PROBE_ROWS):
        try:
            samples.append(sample_size(job.preparer, row, cache=job.blobs))
        except SampleError as error:
            report.note(f"a sample cannot be built: {error.what}")
        report.step("")
    mean = _mean([sample.num_bytes for sample in samples])
    count = None
    alive = len(job.dataset) - sum(n for s, n in states.items() if s not in ("ok", "unknown"))
    if mean is not None and alive > 0:
        count = count_shards(
            round(mean * alive),
            target_bytes=settings.shard_bytes,
            num_samples=alive,
            num_shards=settings.num_shards,
        )
    return DryRun(
        num_rows=len(job.dataset),
        notes=tuple(job.dataset.notes()),
        num_urls=len(urls),
        urls_known=dict(sorted(states.items())),
        mean_sample_bytes=mean,
        mean_tokens=_mean([sample.num_tokens for sample in samples]),
        mean_variant_bytes=_mean([sample.variant_bytes for sample in samples]),
        shards=count,
        free_bytes=storage.free_bytes(settings.out),
    )


def _survey_rows(job: Job, known: Mapping[str, FetchResult]) -> Iterator[dict[str, Any]]:
    """Gives rows whose image is available without the network."""
    for i in range(len(job.dataset)):
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
