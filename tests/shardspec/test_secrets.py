"""No secret of a URL or a message reaches a text that is shown, logged or stored."""

import logging
import pickle

import pytest

from preprocess.fetch import FetchResult, Ledger, read_ledger, redact
from shardspec.errors import FetchError, StorageError, redacted, redacted_url

SECRET = "s3cr3tV4lue"

PASSWORDS = [SECRET, f"/{SECRET}", f"{SECRET}/x", f"a@{SECRET}", f"{SECRET}@b", f"a/{SECRET}@/b@c"]
PASSWORDS += [f"1234{SECRET}", f"#{SECRET}", f"?{SECRET}", f":{SECRET}:", f"%40{SECRET}"]
NAMES = ["api_key", "apikey", "api-key", "auth", "hf_token", "token", "access_token", "key", "sig"]
NAMES += ["X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "pwd"]
NAMES += ["Signature", "AWSAccessKeyId", "password", "client_secret", "secret", "subscription-key"]
NAMES += ["private_token", "auth_token", "Authorization", "refresh_token", "sas_token", "HF_TOKEN"]
URLS = [
    *(f"{scheme}://me:{word}@host/a" for word in PASSWORDS for scheme in ("s3", "https", "weka")),
    f"s3://{SECRET}@bucket/a",
    *(f"https://host/a.jpg?{name}={SECRET}" for name in NAMES),
    *(f"https://host/a.jpg?w=9&{name}={SECRET}&h=3#part" for name in NAMES),
    *(f"https://host/a.jpg?w=9;{name.upper()}={SECRET}" for name in NAMES),
]
MESSAGES = [
    *(f"cannot open {url}: refused" for url in URLS),
    *(f"cannot open '{url}'" for url in URLS),
    f"{{'aws_secret_access_key': '{SECRET}', 'n': 1}}",
    f'{{"password": "{SECRET}"}}',
    f"Authorization: Bearer {SECRET}",
    f"Authorization: Basic {SECRET}==",
    f"--hf-token={SECRET}",
    f"HF_TOKEN={SECRET} make shards",
    f"Client(api_key={SECRET!r}, region='x')",
    f"api_key: {SECRET}",
    f"the token hf_{SECRET * 3} is not valid",
    f"bearer {SECRET}",
]


@pytest.mark.parametrize("text", [*URLS, *MESSAGES])
def test_no_text_shows_a_secret(text):
    shown = redacted(text)
    assert SECRET not in shown
    assert "***" in shown
    assert redacted(shown) == shown


@pytest.mark.parametrize("text", [*URLS, *MESSAGES])
def test_no_part_of_an_error_shows_a_secret(text):
    error = StorageError("x", what=text, fix=text, where=text, facts={"error": OSError(text)})
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again):
        assert SECRET not in str(each) + repr(each) + each.where + each.what + each.fix


@pytest.mark.parametrize("url", [url for url in URLS if url.startswith("https")])
def test_no_ledger_keeps_a_secret(url, tmp_path):
    assert SECRET not in redact(url) + redacted_url(url)
    assert redact(redact(url)) == redact(url)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        result = FetchResult(url=redact(url), status="ok", final_url=redact(url))
        ledger.append(result)
        assert ledger.get(url) == result
    assert SECRET not in (tmp_path / "ledger.jsonl").read_text()


def test_urls_that_differ_in_a_parameter_stay_two():
    one, two = (redact(f"https://h/image?key={name}") for name in ("a", "b"))
    assert one != two
    assert redact("https://h/image?key=a") == one


def test_a_ledger_of_an_older_release_is_found_under_the_same_urls(tmp_path):
    url = f"https://h/a.jpg?X-Amz-Signature={SECRET}"
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.append(FetchResult(url=url, status="ok"))
    assert list(read_ledger(tmp_path / "ledger.jsonl")) == [redact(url)]
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.get(url).url == redact(url)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/a@2x.jpg",
        "https://example.com:8080/a@2x.jpg?size=@2x",
        "s3://bucket/set/train-00001.tar: key=train-00001, num_tokens=12, max_tokens=9",
        "mailto: me@example.com",
        "key=000012, token=17, code=3",
        "got_bytes=1048576, want_bytes=268435456",
        "the author of this tokenizer",
        "tokenizer: Qwen/Qwen2-7B, keys: 3, signals: 2",
        "fix: set hf_hub_offline=1",
    ],
)
def test_what_is_not_a_secret_is_shown(text):
    assert redacted(text) == text


def test_a_retry_that_is_logged_shows_no_secret(caplog):
    from shardspec.storage.retries import Clock, RetryPolicy, with_retries

    def fail():
        raise ConnectionResetError(f"https://h/a?api_key={SECRET}")

    clock = Clock(now_s=lambda: 0.0, sleep=lambda _: None)
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        with_retries(
            fail, where=f"s3://me:{SECRET}/@b/a", policy=RetryPolicy(attempts=3), clock=clock
        )
    assert SECRET not in caplog.text + str(caught.value)


def test_errors_of_rows_show_no_secret_in_the_quarantine():
    error = FetchError("http_404", what=f"no image at https://h/a?auth={SECRET}")
    assert SECRET not in str(error)
