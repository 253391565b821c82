"""What a loader's time went into, and what that says: `Stats`.

Stages are timed where they run, in threads or worker processes, and summed; waiting is timed in the
consumer's thread. From both follows the verdict: a consumer that hardly waits is served well;
otherwise the busiest stage is named, and what would relieve it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

STAGES = ("read", "layout", "decode", "render", "collate")
"""Of making a batch: bytes of the samples, draws and tokens, pictures, crops, the rest."""

_SERVED = 0.02
"""Share of waiting below which the loader keeps up."""

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
    read_s: float = 0.0
    layout_s: float = 0.0
    decode_s: float = 0.0
    render_s: float = 0.0
    collate_s: float = 0.0

    def __add__(self, other: StageTimings) -> StageTimings:
        return StageTimings(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in _SPENT}
        )

    def __sub__(self, other: StageTimings) -> StageTimings:
        return StageTimings(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in _SPENT}
        )

    @property
    def busy_s(self) -> float:
        """Seconds of all stages."""
        return self.read_s + self.layout_s + self.decode_s + self.render_s + self.collate_s


_SPENT = fields(StageTimings)


@dataclass(slots=True, kw_only=True)
class Stats:
    """A loader's account, from its making or since an earlier one (`since`)."""

    made: StageTimings = field(default_factory=StageTimings)
    """What making the delivered batches took."""
    makers: int = 1
    """Threads or worker processes; 1 where the consumer's thread does it all."""
    maker: str = "thread"
    """What each of them is: "thread" or "worker process"."""
    plan_s: float = 0.0
    """Seconds in which the consumer's thread planned."""
    wait_s: float = 0.0
    """Seconds in which the consumer waited for its batches, planning included."""
    use_s: float = 0.0
    """Seconds that the consumer spent on its batches."""
    ready: int = 0
    """Batches that waited behind the delivered ones, summed over deliveries."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What the readers count, such as requests, bytes and retries, in this process and in worker
    processes."""

    def since(self, earlier: Stats) -> Stats:
        """Gives the account of what came behind an earlier one."""
        counters = {k: v - earlier.counters.get(k, 0) for k, v in self.counters.items()}
        return Stats(
            made=self.made - earlier.made,
            makers=self.makers,
            maker=self.maker,
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
        return self.made.samples / max(1e-9, self.wait_s + self.use_s)

    @property
    def busy_share(self) -> float:
        """Share of their time, 0 to 1, in which the makers worked."""
        share = self.made.busy_s / max(1e-9, self.makers * (self.wait_s + self.use_s))
        return min(1.0, share)

    @property
    def mean_ready(self) -> float:
        """Batches that were ready behind the delivered one, on average."""
        return self.ready / max(1, self.made.batches)

    @property
    def bottleneck(self) -> str:
        """The stage that takes most, or "none" where the consumer hardly waits."""
        if not self.made.batches or self.wait_share < _SERVED:
            return "none"
        # Planning runs in one thread, the stages in all of them.
        times = {stage: getattr(self.made, f"{stage}_s") / self.makers for stage in STAGES}
        times["plan"] = self.plan_s
        return max(times, key=lambda stage: times[stage])

    @property
    def verdict(self) -> str:
        """What limits the loader, in words."""
        if not self.made.batches:
            return "nothing delivered yet"
        stage = self.bottleneck
        if stage == "none":
            return f"keeps up: the consumer waits {self.wait_share:.0%} of its time"
        who = f"{self.makers} {self.maker}"
        if self.makers > 1:
            who = f"{self.makers} {self.maker}{'es' if self.maker.endswith('s') else 's'}"
        if stage != "plan" and self.busy_share < 0.5:
            return (
                f"starved: {who} busy {self.busy_share:.0%} while the consumer waits "
                f"{self.wait_share:.0%}; other work holds the processor or the interpreter: use "
                "worker processes, or leave cores free"
            )
        return (
            f"{stage}-bound: {who} busy {self.busy_share:.0%}, the consumer waits "
            f"{self.wait_share:.0%}; {_ADVICE[stage]}"
        )

    def line(self) -> str:
        """Gives the account in one line, for a progress bar."""
        return (
            f"{self.samples_per_s:,.0f} samples/s, wait {self.wait_share:.0%}, "
            f"busy {self.busy_share:.0%}, ready {self.mean_ready:.1f}, {self.bottleneck}"
        )

    def to_dict(self) -> dict[str, float]:
        """Gives the account as flat numbers, for loggers."""
        flat: dict[str, float] = dict(asdict(self.made))
        for name in ("plan_s", "wait_s", "use_s", "wait_share", "samples_per_s", "busy_share"):
            flat[name] = getattr(self, name)
        flat["mean_ready"] = self.mean_ready
        return {**flat, **self.counters}
