"""Shards on object stores: the bytes of local disk, whatever fails or is killed on the way."""

import hashlib
import io
import json
import os
import random
import re
import signal
import time
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from shardspec.manifest import parse_manifest


def small_job(out, cache):
    return (
        *("shards", "pixmo_cap", "--source", "sample", "--limit", 12, "--num-shards", 3),
        *("--workers", 2, "--image-size", 112, "--out", out, "--cache", cache),
    )


def sha256(payload):
    return hashlib.sha256(payload).hexdigest()


@pytest.fixture(scope="module")
def local(inline_cli, tmp_path_factory):
    """The dataset on local disk."""
    folder = tmp_path_factory.mktemp("local")
    inline_cli.good(*small_job(folder / "out", folder / "cache"))
    return folder / "out"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(params=["s3", slow("gs"), slow("weka")])
def store(request, cli):
    """A server, and a place on it as a URL; the command line knows the way there."""
    server = request.getfixturevalue("gcs_server" if request.param == "gs" else "s3_server")
    cli.env.update(server.env)
    place = server.make_bucket() + "/data/pixmo_cap"
    if request.param == "weka":
        del cli.env["AWS_ENDPOINT_URL_S3"]
        cli.env["VLM_SHARDS_STORE_WEKA_ENDPOINT_URL"] = server.endpoint
        return server, place, place.replace("s3://", "weka://")
    return server, place, place


@pytest.mark.parametrize(
    "store, processes",
    [("s3", False), slow("s3", True), slow("gs", True), slow("weka", True)],
    indirect=["store"],
)
def test_a_store_gets_the_bytes_of_local_disk(cli, inline_cli, store, processes, local, tmp_path):
    server, place, out = store
    if processes:
        made = cli.good(*small_job(out, tmp_path / "cache"))
    else:
        with mock.patch.object(inline_cli, "env", cli.env), server.entered():
            made = inline_cli.good(*small_job(out, tmp_path / "cache"))
    assert f"manifest sha256 {sha256((local / 'manifest.json').read_bytes())}" in made.out
    found = server.objects(place)
    files = {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()}
    assert set(found) == files
    for name in sorted(files - {"run.json"}):
        assert server.read(f"{place}/{name}") == (local / name).read_bytes(), name
    assert not list((tmp_path / "cache").glob("scratch/*/*"))

    with mock.patch.object(inline_cli, "env", cli.env), server.entered():
        again = inline_cli.good(*small_job(out, tmp_path / "cache"))
        assert "nothing to do" in again.out
        checked = inline_cli.good("verify", out, "--deep")
        assert checked.out == f"{out}: every shard matches the manifest\n"
        collected = inline_cli.good("gc", out)
        assert "removed 0 objects (0 B), aborted 0 unfinished uploads" in collected.out

    shown = made.out + made.err + again.out + again.err + checked.err
    kept = b"".join(server.read(f"{place}/{name}") for name in found if not name.endswith(".tar"))
    for secret in (server.options.get("secret"), server.options.get("key")):
        if secret is not None:
            assert secret not in shown
            assert secret.encode() not in kept


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tar", slow(".index.npy")])
def test_verify_names_what_is_damaged_on_a_store(cli, store, local, suffix):
    server, place, out = store
    client = server.client()
    for path in local.rglob("*"):
        if path.is_file():
            name = path.relative_to(local).as_posix()
            client.pipe_file(f"{place}/{name}", path.read_bytes())
    name = f"train/pixmo_cap-train-00001-of-00003{suffix}"
    payload = bytearray((local / name).read_bytes())
    payload[len(payload) // 2] ^= 1
    client.pipe_file(f"{place}/{name}", bytes(payload))
    damaged = cli.run("verify", out)
    assert damaged.code == 4
    assert f"  where: {out}/{name}" in damaged.err
    client.rm_file(f"{place}/{name}")
    missing = cli.run("verify", out)
    assert missing.code == 4
    assert "error: " in missing.err
    assert "Traceback" not in missing.err


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}, {}])
def test_a_job_without_the_right_keys_says_so_at_once(cli, s3_server, tmp_path, keys):
    cli.env.update({**s3_server.env, "AWS_EC2_METADATA_DISABLED": "true", **keys})
    if not keys:
        del cli.env["AWS_SECRET_ACCESS_KEY"], cli.env["AWS_ACCESS_KEY_ID"]
    finished = cli.run(*small_job(s3_server.make_bucket() + "/out", tmp_path / "cache"))
    assert finished.code == 1
    assert "object store denied access" in finished.err
    assert "Traceback" not in finished.err
    assert "hunter2" not in finished.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_store_that_dies_in_the_middle_stops_the_job_and_the_same_command_finishes_it(
    cli, s3_servers, local, tmp_path
):
    with s3_servers() as server:
        out = server.make_bucket() + "/out"
        # It does not come back: the job is to wait half a minute for it, not two and a half.
        cli.env.update({**server.env, "AWS_MAX_ATTEMPTS": "1", "VLM_SHARDS_OUTAGE_S": "1"})
        running = cli.start(*small_job(out, tmp_path / "cache"))
        assert running.wait_until(lambda: "build:" in running.err())
        server.kill()
        finished = running.wait(600)
        assert finished.code == 1, finished.err
        assert re.search(r"object store request failed after \d+ attempts", finished.err)
        assert "Traceback" not in finished.err
        server.start()
        assert "manifest.json" not in server.objects(out)
        done = cli.good(*small_job(out, tmp_path / "cache"))
        assert sha256((local / "manifest.json").read_bytes()) in done.out


# --- large shards, which go up in parts


@pytest.fixture(scope="module")
def source(write_parquet, tmp_path_factory):
    """Rows with pictures that are large when stored raw, and quick to make."""

    def picture(i):
        blocks = np.random.RandomState(i).randint(0, 256, (6, 6, 3), np.uint8)
        stream = io.BytesIO()
        large = Image.fromarray(blocks).resize((336, 336), Image.Resampling.BICUBIC)
        large.save(stream, "JPEG", quality=90)
        return {"bytes": stream.getvalue(), "path": None}

    rows = [
        {"image": picture(i), "image_url": f"{i}", "caption": f"no {i}", "transcripts": []}
        for i in range(110)
    ]
    return write_parquet(tmp_path_factory.mktemp("large") / "source", rows)


def large_job(source, out):
    return (
        *("shards", "pixmo_cap", "--source", source, "--num-shards", 3, "--workers", 2),
        *("--codec", "raw", "--variants", 1, "--out", out, "--cache", source.parent / "cache"),
    )


@pytest.fixture(scope="module")
def large(inline_cli, source, tmp_path_factory):
    """The sha256 of the manifest of an undisturbed run, on local disk."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    inline_cli.good(*large_job(source, out))
    sizes = [path.stat().st_size for path in out.glob("train/*.tar")]
    assert len(sizes) == 3
    assert min(sizes) > 8 * 2**20
    return sha256((out / "manifest.json").read_bytes())


@pytest.mark.slow
def test_ctrl_c_leaves_no_upload_open_and_the_same_command_continues(cli, s3_server, source, large):
    cli.env.update(s3_server.env)
    out = s3_server.make_bucket() + "/out"
    running = cli.start_held(
        *large_job(source, out),
        when=lambda _: s3_server.uploads(out) != [],
        undo=lambda: s3_server.client().rm(out, recursive=True),
    )
    running.signal_group(signal.SIGINT)
    running.signal_group(signal.SIGCONT)
    finished = running.wait()
    assert finished.code == 130, finished.err
    assert "Traceback" not in finished.err, finished.err
    assert s3_server.uploads(out) == []
    assert "manifest.json" not in s3_server.objects(out)
    assert ".lease" not in s3_server.objects(out)
    done = cli.good(*large_job(source, out))
    assert large in done.out


def short_or_missing(found, read):
    """Lists what a manifest names and the store does not hold at its length."""
    if "manifest.json" not in found:
        return []
    manifest = parse_manifest(read("manifest.json"), where="")
    wanted = {s.url: s.num_bytes for s in manifest.shards}
    wanted |= {s.index_url: s.index_bytes for s in manifest.shards}
    return [name for name, num_bytes in wanted.items() if found.get(name) != num_bytes]


class Folder:
    """A local output, looked at as a server is; receipts stand for uploads that begin."""

    def objects(self, out):
        return {
            path.relative_to(out).as_posix(): path.stat().st_size
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }

    def read(self, url):
        with open(url, "rb") as stream:
            return stream.read()

    def uploads(self, out):
        return [*out.glob("receipts/[!.]*")]


@pytest.mark.slow
@pytest.mark.parametrize("place, seed", [("s3", 1), ("s3", 2), ("local", 3)])
def test_a_job_killed_ten_times_never_lies_and_ends_in_the_same_bytes(
    cli, request, source, large, place, seed, tmp_path
):
    if place == "s3":
        server = request.getfixturevalue("s3_server")
        cli.env.update(server.env)
        out = server.make_bucket() + "/out"
    else:
        server, out = Folder(), tmp_path / "out"
    rng = random.Random(seed)
    left_open = finished = 0

    def check(out):
        found = server.objects(out)
        assert short_or_missing(found, lambda name: server.read(f"{out}/{name}")) == []

    for i in range(10):
        running = cli.start(*large_job(source, out))
        # Most of a job's time passes before it writes anything: most kills wait for a sign first.
        begun, longest_s = [
            (lambda running: True, 4.0),
            (lambda running: "build:" in running.err(), 2.0),
            (lambda running: re.search(r"build: +[1-9]", running.err()), 1.0),
            (lambda running: server.uploads(out), 0.0),  # noqa: B023 - called in this round
        ][i % 4]
        running.wait_until(lambda running=running, begun=begun: begun(running))
        stop_s = time.monotonic() + rng.uniform(0, longest_s)
        running.wait_until(lambda stop_s=stop_s: time.monotonic() > stop_s)
        if running.process.poll() is None and i % 5 == 0:
            os.kill(running.pid, signal.SIGKILL)  # its workers are left to themselves
            running.process.wait()
        else:
            running.close()
        check(out)
        left_open += place == "s3" and len(server.uploads(out))
        if running.process.returncode == 0 and i < 9:
            finished += 1
            assert sha256(server.read(f"{out}/manifest.json")) == large
            out = tmp_path / f"out-{i}" if place == "local" else server.make_bucket() + "/out"
    done = cli.good(*large_job(source, out))
    assert large in done.out
    if place == "s3":  # the kills may have met none that was under way
        name = f"{out}/train/pixmo_cap-train-00000-of-00003.tar"
        bucket, key, _ = server.client().split_path(name)
        server.client().call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        assert server.uploads(out) != []
    cli.good("gc", out)
    assert place == "local" or server.uploads(out) == []
    assert "removed 0 objects (0 B), aborted 0 unfinished uploads" in cli.good("gc", out).out
    # run.json only tells people how long a job took, and comes last: a kill may cost it.
    assert set(server.objects(out)) - {"run.json"} == {
        *("manifest.json", "tokenizer/tokenizer.json"),
        *("plan/train.json", "plan/train-files.jsonl.gz", "plan/train-rows.json.gz"),
        *(f"train/pixmo_cap-train-{i:05d}-of-00003.tar" for i in range(3)),
        *(f"train/pixmo_cap-train-{i:05d}-of-00003.index.npy" for i in range(3)),
        *(f"receipts/pixmo_cap-train-{i:05d}-of-00003.json" for i in range(3)),
    }
    cli.good("verify", out)
    print(json.dumps({"uploads left open": left_open, "jobs that ended first": finished}))


@pytest.mark.slow
def test_two_jobs_on_one_store_do_not_mix(cli, s3_server, source, large):
    cli.env.update(s3_server.env)
    out = s3_server.make_bucket() + "/out"
    first = cli.start(*large_job(source, out))
    assert first.wait_until(lambda: ".lease" in s3_server.objects(out))
    first.signal_group(signal.SIGSTOP)  # or it might end before the others have begun
    second = cli.run(*large_job(source, out), "--seed", 1)
    assert second.code == 1
    assert "output is locked by another job" in second.err
    refused = cli.run("gc", out)
    assert refused.code == 1
    first.signal_group(signal.SIGCONT)
    assert first.wait().code == 0
    assert sha256(s3_server.read(f"{out}/manifest.json")) == large
