"""Stats: where the time of a loader goes, and which stage limits it.

Stages are timed where they run, in threads or worker processes, and summed; waiting is timed in the
consumer's thread. The verdict follows from both: if the consumer hardly waits, the loader keeps up;
otherwise the busiest stage is named, with a way to relieve it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

STAGES = ("read", "layout", "decode", "render", "collate")
"""Of making a batch: reading bytes, draws and token layout, decoding, cropping, collating. The
`decode` of raw samples is the user's function; they have no layout and no crops of ours."""

_SERVED = 0.02
"""Share of waiting below which the loader keeps up."""

_RATES = (
    *("wait_share", "busy_share", "padding_share", "mean_ready"),
    *("samples_per_s", "tokens_per_s", "loss_tokens_per_s"),
)
"""What `Stats.to_dict` gives beside sums."""

_ADVICE: Mapping[str, str] = {
    "plan": "the schedule takes the time: plan with fewer lengths (no pack, no buckets), or with "
    "larger batches",
    "read": "copy the shards to a local disk, or read with more threads",
    "layout": "text takes the time: use worker processes, or pack=True for fewer, fuller rows",
    "decode": "add threads or worker processes, or store smaller pictures or the raw codec",
    "render": "store pictures at the size of the view, or augment less",
    "collate": "pad less: pad_mode='to_128' or bucket_steps=",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimings:
    """Seconds and bytes of some batches."""

    batches: int = 0
    samples: int = 0
    read_bytes: int = 0
    """Of the samples as they are stored."""
    batch_bytes: int = 0
    """Of the tensors."""
    positions: int = 0
    """Of `input_ids`, padding included; 0 of batches without them."""
    tokens: int = 0
    """Positions that are not padding."""
    loss_tokens: int = 0
    """Positions that have a target."""
    left_alone: int = 0
    """Pictures that an augmentation of the user's does not change, as their texts would become
    wrong, or as all draws moved a point out."""
    read_s: float = 0.0
    layout_s: float = 0.0
    decode_s: float = 0.0
    render_s: float = 0.0
    collate_s: float = 0.0

    def __add__(self, other: StageTimings) -> StageTimings:
        return StageTimings(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in _TIMED}
        )

    def __sub__(self, other: StageTimings) -> StageTimings:
        return StageTimings(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in _TIMED}
        )

    @property
    def busy_s(self) -> float:
        """Seconds of all stages."""
        return self.read_s + self.layout_s + self.decode_s + self.render_s + self.collate_s


_TIMED = fields(StageTimings)


SAMPLES_OF, SHARE_OF = "samples_of_", "share_of_"
"""How names begin of the numbers of each dataset of a mixture."""


@dataclass(slots=True, kw_only=True)
class Stats:
    """Totals of a loader since it was made, or since earlier ones (`since`)."""

    timings: StageTimings = field(default_factory=StageTimings)
    """What making the delivered batches took."""
    workers: int = 1
    """Threads or worker processes; 1 where the consumer's thread does it all."""
    worker_kind: str = "thread"
    """What each of them is: "thread" or "worker process"."""
    plan_s: float = 0.0
    """Seconds in which the consumer's thread planned."""
    wait_s: float = 0.0
    """Seconds in which the consumer waited for its batches, planning included."""
    use_s: float = 0.0
    """Seconds that the consumer spent on its batches."""
    ready: int = 0
    """Batches that were ready after the delivered one, summed over deliveries."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What the readers count, such as requests, bytes and retries, in this process and in worker
    processes; `substituted` samples; of a mixture `samples_of_NAME` of each dataset."""

    def since(self, earlier: Stats) -> Stats:
        """Gives the difference to earlier totals of the same loader."""
        counters = {k: v - earlier.counters.get(k, 0) for k, v in self.counters.items()}
        return Stats(
            timings=self.timings - earlier.timings,
            workers=self.workers,
            worker_kind=self.worker_kind,
            plan_s=self.plan_s - earlier.plan_s,
            wait_s=self.wait_s - earlier.wait_s,
            use_s=self.use_s - earlier.use_s,
            ready=self.ready - earlier.ready,
            counters=counters,
        )

    @property
    def wait_share(self) -> float:
        """Share of the time, 0 to 1, in which the consumer waited."""
        return self.wait_s / max(1e-9, self.wait_s + self.use_s)

    @property
    def samples_per_s(self) -> float:
        """Samples delivered per second."""
        return self.timings.samples / max(1e-9, self.wait_s + self.use_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens delivered per second, padding not counted."""
        return self.timings.tokens / max(1e-9, self.wait_s + self.use_s)

    @property
    def loss_tokens_per_s(self) -> float:
        """Targets delivered per second."""
        return self.timings.loss_tokens / max(1e-9, self.wait_s + self.use_s)

    @property
    def padding_share(self) -> float:
        """Share of the positions, 0 to 1, that are padding."""
        positions = self.timings.positions
        return 1 - self.timings.tokens / positions if positions else 0.0

    @property
    def busy_share(self) -> float:
        """Share of their time, 0 to 1, in which threads or worker processes worked."""
        share = self.timings.busy_s / max(1e-9, self.workers * (self.wait_s + self.use_s))
        return min(1.0, share)

    @property
    def mean_ready(self) -> float:
        """Batches that were ready after the delivered one, on average."""
        return self.ready / max(1, self.timings.batches)

    @property
    def bottleneck(self) -> str:
        """The stage that takes most, or "none" where the consumer hardly waits."""
        if not self.timings.batches or self.wait_share < _SERVED:
            return "none"
        # Planning runs in one thread, the stages in all of them.
        times = {stage: getattr(self.timings, f"{stage}_s") / self.workers for stage in STAGES}
        times["plan"] = self.plan_s
        return max(times, key=lambda stage: times[stage])

    @property
    def verdict(self) -> str:
        """What limits the loader, in words."""
        if not self.timings.batches:
            return "nothing delivered yet"
        stage = self.bottleneck
        if stage == "none":
            return f"keeps up: the consumer waits {self.wait_share:.0%} of its time"
        crew = f"{self.workers} {self.worker_kind}"
        if self.workers > 1:
            crew += "es" if crew.endswith("s") else "s"
        if stage != "plan" and self.busy_share < 0.5:
            return (
                f"starved: {crew} busy {self.busy_share:.0%} while the consumer waits "
                f"{self.wait_share:.0%}; other work holds the processor or the interpreter: use "
                "worker processes, or leave cores free"
            )
        return (
            f"{stage}-bound: {crew} busy {self.busy_share:.0%}, the consumer waits "
            f"{self.wait_share:.0%}; {_ADVICE[stage]}"
        )

    def line(self) -> str:
        """Formats the totals in one line, for a progress bar."""
        return (
            f"{self.samples_per_s:,.0f} samples/s, wait {self.wait_share:.0%}, "
            f"busy {self.busy_share:.0%}, ready {self.mean_ready:.1f}, {self.bottleneck}"
        )

    def to_dict(self) -> dict[str, float]:
        """Gives the totals as flat numbers, for loggers."""
        flat: dict[str, float] = dict(asdict(self.timings))
        for name in ("plan_s", "wait_s", "use_s", *_RATES):
            flat[name] = getattr(self, name)
        shares = {
            name.replace(SAMPLES_OF, SHARE_OF, 1): count / max(1, self.timings.samples)
            for name, count in self.counters.items()
            if name.startswith(SAMPLES_OF)
        }
        return {**flat, **self.counters, **shares}
