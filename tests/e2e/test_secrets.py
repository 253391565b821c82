"""No file that a job leaves, and nothing that it prints, has a secret of the rows' URLs."""

import gzip
import json

from aiohttp import web

from tests.preprocess.fetch.faulty_http import FaultyServer

SECRET = "s3cr3tV4lue"
PARAMETERS = ["api_key", "auth", "hf_token", "token", "sig", "AWSAccessKeyId"]
PARAMETERS += ["X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature"]
FORMS = [
    "http://me:{secret}@{host}{path}",
    "http://me:a%2F{secret}@{host}{path}",
    "http://me:a%40{secret}@{host}{path}",
    "http://me:a@{secret}@{host}{path}",
    "http://me:/{secret}@{host}{path}",
    "http://{secret}@{host}{path}",
    *("http://{host}{path}?w=9&" + name + "={secret}" for name in PARAMETERS),
]
KINDS = {
    "/ok/{i}.png": "",
    "/status/404/{i}": "http_404",
    "/status/403/{i}": "http_403",
    "/short/{i}.png": "truncated",
    "/html/{i}": "not_image",
    "/early/{i}": "image_decode",
}
"""Paths, and how their rows end: at FETCH, or at BUILD."""


class Server(FaultyServer):
    """Serves pictures that only a decoder finds to be cut, too."""

    def __init__(self, picture):
        super().__init__()
        self._picture = picture

    async def _early(self, request):
        del request
        return web.Response(body=self._picture[: len(self._picture) * 3 // 4] + b"\xff\xd9")


def contents(folder):
    """Gives each file below a folder, those that are compressed also as they were."""
    for path in folder.rglob("*"):
        if path.is_file():
            payload = path.read_bytes()
            yield path, payload
            if path.suffix == ".gz":
                yield path, gzip.decompress(payload)


def test_a_job_leaves_no_secret_of_its_urls(inline_cli, write_parquet, small_jpeg, tmp_path):
    with Server(small_jpeg(0)) as server:
        host = server.url("").removeprefix("http://")
        paths = [kind.format(i=i) for i in range(len(FORMS)) for kind in KINDS]
        rows = [
            {
                "image_url": FORMS[i // len(KINDS)].format(secret=SECRET, host=host, path=path),
                "caption": f"number {i}",
                "transcripts": [],
            }
            for i, path in enumerate(paths)
        ]
        source = write_parquet(tmp_path / "source", rows)
        done = inline_cli.run(
            *("shards", "pixmo_cap", "--source", source, "--out", tmp_path / "out"),
            *("--cache", tmp_path / "cache", "--num-shards", 2, "--workers", 1),
            *("--image-size", 112, "--allow-hosts", "127.0.0.1", "--attempts", 1),
            *("--host-rate", 0, "--placeholder-urls", 0),
            *("--read-timeout", 0.4, "--max-dead-links", 1.0, "--max-lost-rows", 1.0),
            *("--max-bad-samples", 1.0),
        )
        assert done.code == 0, done.err
    assert SECRET not in done.out + done.err
    found = [*contents(tmp_path / "out"), *contents(tmp_path / "cache")]
    names = {path.relative_to(tmp_path).parts[1] for path, _ in found}
    assert {"quarantine", "run.json", "plan", "receipts", "train", "manifest.json"} <= names
    assert any(b'"url"' in payload for path, payload in found if "ledger" in str(path))
    reasons = {
        json.loads(line)["reason"]
        for path, payload in found
        if path.parent.name == "quarantine"
        for line in payload.splitlines()
    }
    assert reasons >= set(filter(None, KINDS.values()))
    leaks = [str(path) for path, payload in found if SECRET.encode() in payload]
    assert not leaks
