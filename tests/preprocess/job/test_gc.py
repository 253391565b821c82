"""GC: what is needed stays, whatever state the output is in; what is ours and not needed goes."""

import os

import pytest

from preprocess.exchange.foreign import ImportSettings, import_tars
from preprocess.job.gc import find_strays, remove_strays
from preprocess.job.lease import output_lock
from preprocess.job.verify import verify
from shardspec import storage
from shardspec.errors import ManifestError
from tests.inline import Quiet

HEX = "0" * 32
STRAYS = [
    "train/pixmo_cap-train-00000-of-00099.tar",
    "train/pixmo_cap-train-00000-of-00099.index.npy",
    "validation/pixmo_cap-validation-00001-of-00002.tar",
    "receipts/pixmo_cap-train-00000-of-00099.json",
    "quarantine/pixmo_cap-train-00000-of-00099.jsonl",
    "plan/train/rows-00000.jsonl",
    f".manifest.json.tmp-{HEX}",
    f"train/.pixmo_cap-train-00000-of-00003.tar.tmp-{HEX}",
    ".scratch/x/shard.tar",
    ".parts/0123456789abcdef/00000-of-00002.json",
]
FOREIGN = [
    "README.md",
    "train/notes.txt",
    "train/pixmo_cap-train-00000-of-00003.tar.bak",
    "train/other-validation-00000-of-00001.tar",
    "images/pixmo_cap-train-00000-of-00003.jpg",
    "receipts/summary.json",
    "plan/other.txt",
    "results/pixmo_cap.1700000000.0123456789abcdef.jsonl.gz",
    ".hidden",
]


@pytest.fixture(params=["local", "s3", "gcs"])
def out(request, tiny_dataset, tmp_path):
    """A finished dataset on each back end."""
    if request.param == "local":
        yield str(request.getfixturevalue("tiny_copy"))
        return
    server = request.getfixturevalue(f"{request.param}_server")
    with server.entered():
        url = f"{server.bucket}/{tmp_path.name}/out"
        for path in sorted(tiny_dataset.rglob("*")):
            if path.is_file():
                name = path.relative_to(tiny_dataset).as_posix()
                storage.publish_bytes(storage.join(url, name), path.read_bytes())
        yield url


def names(out):
    return [each.name for each in storage.list_objects(out)]


def put(out, found):
    for name in found:
        storage.publish_bytes(storage.join(out, name), b"12345")


def test_of_a_finished_dataset_nothing_is_stray(out):
    strays = find_strays(out)
    assert (strays.objects, strays.uploads) == ((), ())


def test_what_is_ours_and_not_needed_goes_and_all_else_stays(out):
    before = names(out)
    put(out, [*STRAYS, *FOREIGN])
    strays = find_strays(out)
    assert [each.name for each in strays.objects] == sorted(STRAYS)
    assert strays.num_bytes == 5 * len(STRAYS)
    remove_strays(out, strays)
    assert names(out) == sorted([*before, *FOREIGN])
    assert find_strays(out).objects == ()


def test_an_uncommitted_plan_keeps_its_rows_and_its_finished_shards(out):
    receipt = storage.read_bytes(
        storage.join(out, "receipts/pixmo_cap-train-00000-of-00003.json")
    ).decode()
    ours = receipt.replace("-00000-of-00003", "-00000-of-00099")
    another = receipt.replace("-00000-of-00003", "-00001-of-00099").replace(
        '"build_key": "', '"build_key": "0'
    )
    key = receipt.split('"build_key": "')[1].split('"')[0]
    kept = {
        "plan/train/plan.json": f'{{"build_key": "{key}"}}',
        "plan/train/rows-00000.jsonl": "",
        "receipts/pixmo_cap-train-00000-of-00099.json": ours,
        "train/pixmo_cap-train-00000-of-00099.tar": "",
        "train/pixmo_cap-train-00000-of-00099.index.npy": "",
    }
    gone = {
        "receipts/pixmo_cap-train-00001-of-00099.json": another,
        "train/pixmo_cap-train-00001-of-00099.tar": "",
        "train/pixmo_cap-train-00002-of-00099.tar": "",
        "plan/validation/rows-00000.jsonl": "",
    }
    for name, text in (kept | gone).items():
        storage.publish_bytes(storage.join(out, name), text.encode())
    assert [each.name for each in find_strays(out).objects] == sorted(gone)


def give_up(out):
    """Takes away what makes an output a dataset of ours, or one that is not finished."""
    storage.delete(storage.join(out, "manifest.json"))
    storage.delete(storage.join(out, "plan"))


def imported(tars, out, **options):
    import_tars(ImportSettings(tars=tars, out=out, name="mine", **options), Quiet())


@pytest.mark.usefixtures("in_this_process")
def test_tars_of_others_stay_where_the_output_is_their_own_folder(out):
    give_up(out)
    before = [name for name in names(out) if name.startswith("train/")]
    # One of them is not named; but nobody can tell that it is ours.
    tars = [storage.join(out, name) for name in before if name.endswith(".tar")][1:]
    assert len(tars) == 2
    imported(tuple(tars), out)
    put(out, ["validation/mine-validation-00000-of-00001.tar"])
    strays = find_strays(out)
    assert {each.name.split("/")[0] for each in strays.objects} == {"receipts", "validation"}
    remove_strays(out, strays)
    assert set(before) <= set(names(out))
    assert verify(out, Quiet()) == []


@pytest.mark.usefixtures("in_this_process")
def test_tars_that_an_import_names_stay_though_the_output_is_reached_over_a_link(
    tiny_copy, tmp_path
):
    out = tiny_copy
    give_up(str(out))
    imported((str(out / "train"),), str(out))
    (tmp_path / "link").symlink_to(out)
    assert {each.name.split("/")[0] for each in find_strays(str(tmp_path / "link")).objects} == {
        "receipts"
    }


@pytest.mark.usefixtures("in_this_process")
def test_tars_that_an_import_names_stay_though_it_gave_their_store_another_name(
    s3_server, tiny_dataset, tmp_path
):
    out = f"{s3_server.bucket}/{tmp_path.name}/out"
    with s3_server.entered():
        tars = [f"train/{path.name}" for path in sorted((tiny_dataset / "train").glob("*.tar"))]
        for name in tars:
            storage.publish_bytes(storage.join(out, name), (tiny_dataset / name).read_bytes())
        imported((storage.join(out, "train").replace("s3://", "s3a://"),), out)
        assert find_strays(out).objects == ()
        assert set(tars) <= set(names(out))
        assert verify(out, Quiet()) == []


@pytest.mark.usefixtures("in_this_process")
def test_a_name_that_is_needed_in_one_folder_is_not_in_another(tiny_dataset, tmp_path):
    out = str(tmp_path / "out")
    imported((str(tiny_dataset / "train"),), out, split="held-out")
    stray = "out/mine-held-out-00000-of-00003.index.npy"
    put(out, [stray])
    assert [each.name for each in find_strays(out).objects] == [stray]


def test_without_manifest_and_plan_nothing_is_touched(out):
    give_up(out)
    with pytest.raises(ManifestError) as caught:
        find_strays(out)
    assert caught.value.reason == "manifest_missing"


def test_unfinished_uploads_of_ours_are_aborted_and_those_of_others_left(s3_server):
    bucket = s3_server.make_bucket()
    client = s3_server.client()
    ours = "out/train/pixmo_cap-train-00000-of-00003.tar"
    begun = [ours, "out/train/something-else.bin", "out2/train/pixmo_cap-train-00000-of-00003.tar"]
    for key in begun:
        client.call_s3("create_multipart_upload", Bucket=bucket.removeprefix("s3://"), Key=key)
    with s3_server.entered():
        out = bucket + "/out"
        storage.publish_bytes(out + "/plan/train.json", b"{}")
        strays = find_strays(out)
        assert [each.name for each in strays.uploads] == [ours.removeprefix("out/")]
        remove_strays(out, strays)
        assert find_strays(out).uploads == ()
    assert s3_server.uploads(bucket) == sorted(set(begun) - {ours})


def test_what_is_younger_is_passed_over(tiny_copy, tmp_path):
    out = tiny_copy
    put(str(out), STRAYS[:2])
    os.utime(out / STRAYS[0], (1_000_000, 1_000_000))
    (found,) = find_strays(str(out), written_before_unix_s=2_000_000).objects
    assert found.name == STRAYS[0]


def test_the_command_lists_then_removes(inline_cli, tiny_copy, tmp_path):
    out = tiny_copy
    put(str(out), STRAYS[:2])
    listed = inline_cli.good("gc", out, "--dry-run")
    assert STRAYS[0] in listed.out
    assert "would remove 2 objects (10 B), abort 0 unfinished uploads" in listed.out
    assert (out / STRAYS[0]).exists()
    assert "removed 0 objects" in inline_cli.good("gc", out, "--older-than", "1h").out
    assert "removed 2 objects" in inline_cli.good("gc", out).out
    assert not (out / STRAYS[0]).exists()


def test_the_command_makes_nothing_where_nothing_is(inline_cli, tmp_path):
    finished = inline_cli.run("gc", tmp_path / "typo")
    assert finished.code == 1
    assert "has neither a manifest nor a job" in finished.err
    assert not (tmp_path / "typo").exists()


def test_the_command_is_refused_while_a_job_runs(inline_cli, tiny_copy, tmp_path):
    out = tiny_copy
    put(str(out), STRAYS)
    with output_lock(str(out)):
        finished = inline_cli.run("gc", out)
    assert finished.code == 1
    assert "output is locked by another job" in finished.err
    assert (out / STRAYS[0]).exists()
