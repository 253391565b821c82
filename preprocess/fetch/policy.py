"""The limits and manners of FETCH, all of them settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from preprocess.fetch.packs import PACK_BYTES
from preprocess.settings import Setting
from preprocess.sizes import parse_bytes
from shardspec.errors import ConfigError

Retry = Literal["none", "transient", "all"]
ShaPolicy = Literal["require", "warn", "ignore"]
OptOuts = Literal["obey", "ignore"]

PRODUCT = "vlm-shards"
"""How a site may name us in its robots.txt."""

_GROUP = "downloading images"
_CHOICES = {
    "retry": Retry,
    "sha256": ShaPolicy,
    "robots_txt": OptOuts,
    "x_robots_tag": OptOuts,
}
_MAY_BE_ZERO = {
    "max_redirects",
    "backoff_s",
    "dns_cache_s",
    "host_rate",
    "breaker_success",
    "placeholder_urls",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPolicy:
    """Limits of FETCH: pauses, timeouts, sizes and numbers of requests."""

    user_agent: Annotated[
        str,
        Setting(
            f"your name and a contact, for public hosts; {PRODUCT} is added",
            group=_GROUP,
            metavar="TEXT",
        ),
    ] = PRODUCT
    allow_hosts: Annotated[
        frozenset[str],
        Setting(
            "hosts that may have private addresses, separated by commas",
            group=_GROUP,
            metavar="HOSTS",
            parse=lambda text: frozenset(text.split(",")) - {""},
        ),
    ] = frozenset()
    """In lower case, as they are written in URLs."""
    robots_txt: Annotated[
        OptOuts, Setting("what robots.txt of a host forbids; the manifest says so", group=_GROUP)
    ] = "obey"
    robots_age_s: Annotated[
        float,
        Setting("how long a robots.txt is used, in seconds", flag="robots-age", group=_GROUP),
    ] = 24 * 3600.0
    """RFC 9309, 2.4: no longer than that."""
    robots_bytes: Annotated[
        int,
        Setting(
            "as much of a robots.txt is read",
            flag="robots-size",
            group=_GROUP,
            metavar="SIZE",
            parse=parse_bytes,
            shown="500KiB",
        ),
    ] = 500 * 2**10
    """RFC 9309, 2.5: no less than that."""
    x_robots_tag: Annotated[
        OptOuts,
        Setting(
            "images whose X-Robots-Tag or TDM-Reservation forbids it; the manifest says so",
            group=_GROUP,
        ),
    ] = "obey"
    per_host: Annotated[int, Setting("most requests to a host at a time", group=_GROUP)] = 4
    host_rate: Annotated[
        float, Setting("most requests to a host per second; 0 for no limit", group=_GROUP)
    ] = 8.0
    """Requests begin at least 1 / host_rate seconds apart, or the host's Crawl-delay."""
    concurrency: Annotated[
        int, Setting("most requests, and images in memory, at a time", group=_GROUP)
    ] = 32
    max_pause_s: Annotated[
        float,
        Setting(
            "longest pause that a host may ask for, in seconds; above, it is left for a later run",
            flag="max-pause",
            group=_GROUP,
        ),
    ] = 120.0
    longest_pause_s: Annotated[
        float,
        Setting(
            "a host that asks for a longer pause is taken to mean this, in seconds",
            flag="longest-pause",
            group=_GROUP,
        ),
    ] = 24 * 3600.0
    host_failures: Annotated[
        int,
        Setting(
            "failures of a host in a row after which it is asked only now and then, at last left "
            "for a later run",
            group=_GROUP,
        ),
    ] = 20
    """Transient ones, of different URLs: a dead host would cost minutes per URL. It is asked once
    after each of `attempts` pauses, which go on doubling where those of one URL end."""
    attempts: Annotated[
        int, Setting("maximum number of attempts at one image in one run", group=_GROUP)
    ] = 4
    backoff_s: Annotated[
        float,
        Setting("longest wait after the first attempt, in seconds", flag="backoff", group=_GROUP),
    ] = 1.0
    """The wait after attempt n is drawn from 0 to backoff_s * 2**(n - 1)."""
    connect_timeout_s: Annotated[
        float,
        Setting("longest wait for a connection, in seconds", flag="connect-timeout", group=_GROUP),
    ] = 10.0
    read_timeout_s: Annotated[
        float,
        Setting("longest silence of a server, in seconds", flag="read-timeout", group=_GROUP),
    ] = 15.0
    wall_timeout_s: Annotated[
        float,
        Setting("longest download of one image, in seconds", flag="wall-timeout", group=_GROUP),
    ] = 60.0
    """Of one attempt: all its redirects, and slow bodies, but not pauses in front of requests."""
    dns_cache_s: Annotated[
        int,
        Setting(
            "how long the addresses of a host are used, in seconds; 0 looks them up each time",
            flag="dns-cache",
            group=_GROUP,
        ),
    ] = 300
    """Of a connection that is made; one that is open stays."""
    keepalive_s: Annotated[
        float,
        Setting("how long an idle connection is kept, in seconds", flag="keepalive", group=_GROUP),
    ] = 2.0
    """Idle sockets of a thousand hosts are a thousand descriptors."""
    max_bytes: Annotated[
        int | None,
        Setting(
            "largest file of an image",
            flag="max-download",
            group=_GROUP,
            metavar="SIZE",
            parse=parse_bytes,
            shown="64MiB, of datasets with videos 512MiB",
        ),
    ] = None
    pack_bytes: Annotated[
        int,
        Setting(
            "length from which a file of CACHE is full that images are appended to",
            flag="pack-size",
            group=_GROUP,
            metavar="SIZE",
            parse=parse_bytes,
            shown="512MiB",
        ),
    ] = PACK_BYTES
    max_redirects: Annotated[int, Setting("most redirects that are followed", group=_GROUP)] = 5
    retry: Annotated[
        Retry, Setting("which failures of earlier runs are tried again", group=_GROUP)
    ] = "transient"
    failures_expire_days: Annotated[
        float,
        Setting(
            "days after which a failure is tried again, whatever its class",
            flag="failures-expire",
            group=_GROUP,
        ),
    ] = 30.0
    sha256: Annotated[
        ShaPolicy,
        Setting(
            "images whose sha256 is not the one in their row: leave the row out, keep and count "
            "it, or do not compare",
            group=_GROUP,
        ),
    ] = "require"
    placeholder_urls: Annotated[
        int,
        Setting(
            "leave out an image that this many URLs give, as hosts do for those that are gone; "
            "0 keeps it",
            group=_GROUP,
        ),
    ] = 10
    breaker_window: Annotated[
        int, Setting("number of last URLs that tell whether the network is down", group=_GROUP)
    ] = 200
    breaker_hosts: Annotated[int, Setting("number of hosts that they must be of", group=_GROUP)] = (
        10
    )
    breaker_success: Annotated[
        float,
        Setting("share of them below which the job stops; 0 for never", group=_GROUP),
    ] = 0.10

    def __post_init__(self) -> None:
        wrong = []
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in _MAY_BE_ZERO else 1e-9
            if isinstance(value, (int, float)) and not least <= value:
                wrong.append(setting.name)
        if self.breaker_success > 1:
            wrong.append("breaker_success")
        wrong += [
            name for name, kind in _CHOICES.items() if getattr(self, name) not in get_args(kind)
        ]
        if not (self.user_agent.isascii() and self.user_agent.isprintable()):
            wrong.append("user_agent")
        if wrong:
            raise ConfigError("bad_policy", facts={name: getattr(self, name) for name in wrong})

    @property
    def sent_user_agent(self) -> str:
        """What requests say of who asks: whatever is set, the tool is named."""
        text = self.user_agent.strip()
        return text if PRODUCT in text else f"{text} {PRODUCT}".strip()

    @property
    def ignored_opt_outs(self) -> list[str]:
        """The kinds of opt-outs that are ignored."""
        return [name for name in ("robots_txt", "x_robots_tag") if getattr(self, name) == "ignore"]

    def describe(self) -> dict[str, object]:
        """Lists what decides which images are taken, where it is not as usual."""
        usual = FetchPolicy()
        chosen = ("robots_txt", "x_robots_tag", "sha256", "placeholder_urls")
        values = {name: getattr(self, name) for name in chosen}
        return {name: value for name, value in values.items() if value != getattr(usual, name)}
