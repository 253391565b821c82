"""PixMo-Cap from Parquet files: links that work, die, hang and lie; bytes; paths; kills."""

import hashlib
import io
import itertools
import json
import shutil
import socket
from collections import Counter

import pytest
from aiohttp import web
from PIL import Image

from preprocess.datasets.pixmo_cap import PixMoCap
from preprocess.fetch import read_ledger
from shardspec.keyed import hash_text
from shardspec.manifest import load_manifest
from tests.preprocess.fetch.damage import blobs_of, damage_blob
from tests.preprocess.fetch.faulty_http import FaultyServer


class PictureServer(FaultyServer):
    """A server whose pictures may be damaged in ways that no header shows."""

    draw = None

    async def _jpeg(self, request: web.Request) -> web.Response:
        return web.Response(body=self.draw(int(request.path.split("/")[2])))

    async def _cut(self, request: web.Request) -> web.Response:
        """A whole answer that holds three quarters of a picture: its length is as announced."""
        body = self.draw(int(request.path.split("/")[2]))
        return web.Response(body=body[: len(body) * 3 // 4])

    async def _early(self, request: web.Request) -> web.Response:
        """Half of a picture and an end marker: only a decoder notices."""
        body = self.draw(int(request.path.split("/")[2]))
        return web.Response(body=body[: len(body) * 3 // 4] + b"\xff\xd9")

    async def _flipped(self, request: web.Request) -> web.Response:
        """A PNG with one bit of its pixels turned over; the chunk's checksum tells."""
        stream = io.BytesIO()
        Image.open(io.BytesIO(self.draw(0))).save(stream, "PNG")
        body = bytearray(stream.getvalue())
        body[body.index(b"IDAT") + 100] ^= 1
        return web.Response(body=bytes(body))


@pytest.fixture(scope="module")
def shared_server(small_jpeg):
    with PictureServer() as server:
        server.draw = small_jpeg
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.requests.clear()
    return shared_server


@pytest.fixture
def refusing_port():
    """A port that is taken and not listening: connections to it are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def in_train(identity):
    """Tells whether a row is in the split "train"; the port in a URL differs from run to run."""
    return hash_text(f"{PixMoCap.split_salt}\0{identity}") / 2**64 >= PixMoCap.validation_share


def train_urls(base):
    """Counts up the URLs below a base that are in the split "train"."""
    return (url for i in itertools.count() if in_train(url := f"{base}/{i}"))


def take(count, base):
    return list(itertools.islice(train_urls(base), count))


def captioned(urls):
    return [
        {"image_url": url, "caption": f"what is to see at row {i}", "transcripts": [f"row {i}"]}
        for i, url in enumerate(urls)
    ]


def job(source, folder, *more):
    """The arguments of a job that meets a bad network without patience."""
    return (
        *("shards", "pixmo_cap", "--source", source, "--out", folder / "out"),
        *("--cache", folder / "cache", "--num-shards", 2, "--workers", 1, "--image-size", 112),
        *("--allow-hosts", "127.0.0.1", "--attempts", 1, "--read-timeout", 0.4),
        *("--host-rate", 0, *more),
    )


def manifest_bytes(folder):
    return (folder / "out" / "manifest.json").read_bytes()


def quarantine(folder):
    return [
        json.loads(line)
        for path in sorted((folder / "out" / "quarantine").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_every_bad_link_is_counted_and_listed_and_none_is_asked_twice(
    cli, server, refusing_port, write_parquet, tmp_path
):
    good = take(16, server.url("/jpeg"))
    bad = {
        "http_404": take(2, server.url("/status/404")),
        "http_5xx": take(1, server.url("/status/503")),
        "connect": take(1, f"http://127.0.0.1:{refusing_port}"),
        "timeout": take(1, server.url("/hang")),
        "not_image": take(1, server.url("/html")),
        "empty": take(1, server.url("/empty")),
        "truncated": take(1, server.url("/short")),
        "private_addr": take(1, "http://10.0.0.1"),
        "incomplete": [*take(1, server.url("/cut")), *take(1, server.url("/flipped"))],
        "image_decode": take(1, server.url("/early")),
    }
    rows = captioned([*good, *itertools.chain(*bad.values())])
    rows.append(rows[0])  # the same row again
    # Another link to the same picture, with the same text.
    mirror = next(train_urls(good[1] + "/mirror"))
    rows.append({**rows[1], "image_url": mirror})
    rows.append({**rows[2], "caption": "the same picture told in other words"})
    source = write_parquet(tmp_path / "source", rows)

    finished = cli.good(*job(source, tmp_path))

    (split,) = load_manifest(str(tmp_path / "out")).splits.values()
    want = {reason: len(urls) for reason, urls in bad.items()} | {"duplicate": 2}
    assert dict(split.quarantined) == want
    assert split.num_samples == len(good) + 1
    assert split.num_samples + sum(split.quarantined.values()) == len(rows)
    assert split.source["num_rows"] == len(rows)

    lines = quarantine(tmp_path)
    listed = Counter((line["reason"], line["image"]["url"]) for line in lines)
    wanted = [(reason, url) for reason, urls in bad.items() for url in urls]
    assert listed == Counter([*wanted, ("duplicate", good[0]), ("duplicate", mirror)])
    assert all(line["message"] and line["key"] and line["metadata"]["image_url"] for line in lines)
    assert f"left out           {sum(want.values())} (" in finished.out

    assert set(server.requests.values()) == {1}
    before = (server.requests.copy(), manifest_bytes(tmp_path))
    again = cli.good(*job(source, tmp_path))
    assert "nothing to do" in again.out
    assert (server.requests, manifest_bytes(tmp_path)) == before


@pytest.mark.slow
def test_kill_while_fetching_costs_no_finished_download(cli, server, write_parquet, tmp_path):
    urls = take(80, server.url("/slow"))
    source = write_parquet(tmp_path / "source", captioned(urls))
    running = cli.start(*job(source, tmp_path / "killed"))
    assert running.wait_until(lambda: server.requests.total() >= 30)
    running.kill_group()
    ledger = tmp_path / "killed" / "cache" / "ledgers" / "pixmo_cap.jsonl"
    finished = set(read_ledger(ledger)) & set(urls)  # robots.txt is there as well
    assert 0 < len(finished) < len(urls)
    assert not (tmp_path / "killed" / "out" / "manifest.json").exists()

    cli.good(*job(source, tmp_path / "killed"))
    asked = {url: server.requests["/slow/" + url.rsplit("/")[-1]] for url in urls}
    assert {asked[url] for url in finished} == {1}
    assert {asked[url] for url in urls} <= {1, 2}
    # At most four requests at a host are on their way at a time (FetchPolicy.per_host).
    assert sum(asked.values()) <= len(urls) + 4

    cli.good(*job(source, tmp_path / "whole"))
    assert manifest_bytes(tmp_path / "killed") == manifest_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_same_pictures_give_the_same_shards_however_the_source_holds_them(
    cli, server, write_parquet, small_jpeg, tmp_path
):
    rows = []
    for i, url in zip(itertools.count(), take(30, server.url("/jpeg")), strict=False):
        number = int(url.rsplit("/")[-1])
        path = tmp_path / "paths" / "pictures" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_jpeg(number))
        digest = hashlib.sha256(small_jpeg(number)).hexdigest()
        names = (digest, f"pictures/{i}.jpg", url)
        if all(map(in_train, names)) and len(rows) < 12:
            rows.append((f"pictures/{i}.jpg", small_jpeg(number), *captioned([url])))
    assert len(rows) == 12
    sources = {
        "urls": [row for _, _, row in rows],
        "bytes": [{**row, "image": {"bytes": b, "path": p}} for p, b, row in rows],
        "paths": [{**row, "image": {"bytes": None, "path": p}} for p, _, row in rows],
    }
    built = {}
    for name, source in sources.items():
        write_parquet(tmp_path / name, source)
        cli.good(*job(tmp_path / name, tmp_path / f"{name}-job"))
        manifest = load_manifest(str(tmp_path / f"{name}-job" / "out"))
        built[name] = [(s.url, s.sha256, s.index_sha256, s.nsamples) for s in manifest.shards]
    assert sum(nsamples for *_, nsamples in built["urls"]) == len(rows)
    assert built["bytes"] == built["urls"]
    assert built["paths"] == built["urls"]


def test_picture_files_that_are_missing_or_broken_are_listed(
    inline_cli, write_parquet, small_jpeg, tmp_path
):
    source = tmp_path / "source"
    (source / "pictures").mkdir(parents=True)
    rows = []
    for i in itertools.count():
        path = source / "pictures" / f"{i}.jpg"
        if in_train(str(path)) and len(rows) < 14:
            path.write_bytes(small_jpeg(i) if len(rows) < 10 else b"")
            rows.append({**captioned([""])[0], "image": f"pictures/{i}.jpg", "caption": f"no {i}"})
        if len(rows) == 14:
            break
    (source / rows[12]["image"]).unlink()
    (source / rows[13]["image"]).unlink()
    write_parquet(source, rows)
    inline_cli.good(*job(source, tmp_path))
    (split,) = load_manifest(str(tmp_path / "out")).splits.values()
    assert split.num_samples == 10
    assert dict(split.quarantined) == {"image_empty": 2, "image_missing": 2}
    missing = {line["image"]["path"] for line in quarantine(tmp_path) if line["stage"] == "plan"}
    assert missing == {str(source / row["image"]) for row in rows[12:]}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ("truncate", "flip"))
def test_lost_blob_costs_a_download_and_no_sample(cli, server, write_parquet, tmp_path, damage):
    source = write_parquet(tmp_path / "source", captioned(take(40, server.url("/jpeg"))))
    arguments = job(source, tmp_path / "lost", "--num-shards", 20)
    receipts = tmp_path / "lost" / "out" / "receipts"
    running = cli.start_held(
        *arguments,
        when=lambda _: 2 <= len([*receipts.glob("*.json")]) <= 10,
        undo=lambda: shutil.rmtree(tmp_path / "lost" / "out"),
    )
    running.kill_group()
    assert not (tmp_path / "lost" / "out" / "manifest.json").exists()
    planned = [
        json.loads(line)["image"]["sha256"]
        for path in (tmp_path / "lost" / "out" / "plan" / "train").glob("rows-*.jsonl")
        if not (receipts / f"pixmo_cap-train-{path.stem[-5:]}-of-00020.json").exists()
        for line in path.read_text().splitlines()
    ]
    cache, lost, num_gone = tmp_path / "lost" / "cache", planned[0], 1
    if damage == "truncate":
        # Of what is left to build, what is last in its pack; what finished shards have may follow.
        starts = {sha256: blob.start for sha256, blob in blobs_of(cache).items()}
        lost = max(planned, key=lambda sha256: starts[sha256])
        num_gone = sum(start >= starts[lost] for start in starts.values())
    damage_blob(cache, lost, damage)
    server.requests.clear()

    finished = cli.run(*arguments)
    assert finished.code == 1
    assert "run the same command again" in finished.err
    assert "Traceback" not in finished.err
    assert not (tmp_path / "lost" / "out" / "manifest.json").exists()
    cli.good(*arguments)
    assert server.requests.total() == num_gone
    cli.good(*job(source, tmp_path / "whole", "--num-shards", 20))
    assert manifest_bytes(tmp_path / "lost") == manifest_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_repair_of_a_committed_split_does_not_take_up_links_that_revived(
    cli, server, write_parquet, tmp_path
):
    urls = [*take(12, server.url("/jpeg")), *take(2, server.url("/flaky/503/1"))]
    source = write_parquet(tmp_path / "source", captioned(urls))
    cli.good(*job(source, tmp_path))
    before = manifest_bytes(tmp_path)
    assert json.loads(before)["splits"]["train"]["quarantined"] == {"http_5xx": 2}
    (tmp_path / "out" / load_manifest(str(tmp_path / "out")).shards[0].url).unlink()
    cli.good(*job(source, tmp_path))
    assert manifest_bytes(tmp_path) == before
    assert cli.good("verify", tmp_path / "out", "--deep").code == 0


@pytest.mark.slow
def test_repair_is_refused_where_the_source_gives_other_rows_now(
    cli, server, write_parquet, tmp_path
):
    source = write_parquet(tmp_path / "source", captioned(take(12, server.url("/jpeg"))))
    cli.good(*job(source, tmp_path))
    before = manifest_bytes(tmp_path)
    shards = load_manifest(str(tmp_path / "out")).shards
    (tmp_path / "out" / shards[0].url).unlink()
    intact = (tmp_path / "out" / shards[1].url).read_bytes()
    # Without the ledger the links are asked again, and they show something else by now.
    (tmp_path / "cache" / "ledgers" / "pixmo_cap.jsonl").unlink()
    draw, server.draw = server.draw, lambda i: draw(i + 1000)
    try:
        finished = cli.run(*job(source, tmp_path))
    finally:
        server.draw = draw
    assert finished.code == 3
    assert "fix:" in finished.err
    assert "Traceback" not in finished.err
    assert manifest_bytes(tmp_path) == before
    assert (tmp_path / "out" / shards[1].url).read_bytes() == intact
