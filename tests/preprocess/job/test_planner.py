"""PLAN: rows that cannot become samples are counted with a reason."""

import json


def test_rows_without_a_message_in_the_chosen_mode_are_counted_not_built(
    inline_cli, tmp_path, captioned_rows, write_parquet
):
    rows = captioned_rows(6)
    for row in rows[::2]:
        row["transcripts"] = []
    source = write_parquet(tmp_path / "source", rows)
    out = tmp_path / "out"
    done = inline_cli.run(
        "shards", "pixmo_cap", "--source", str(source), "--mode", "transcript", "--out", str(out)
    )
    assert done.code == 0, done.err
    split = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert (split["num_samples"], split["quarantined"]) == (3, {"no_message": 3})
    assert len(list((out / "quarantine").iterdir())) == 1


def test_a_row_without_an_image_is_counted_and_stops_nothing(
    inline_cli, tmp_path, captioned_rows, write_parquet
):
    rows = captioned_rows(5)
    rows[2]["image"] = None
    rows[2]["image_url"] = None
    rows[3] = {**rows[3], "image": {"bytes": None, "path": "bad\0name.jpg"}, "image_url": None}
    source, out = write_parquet(tmp_path / "source", rows), tmp_path / "out"
    inline_cli.good("shards", "pixmo_cap", "--source", source, "--out", out)
    split = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert split["num_samples"] == 3
    assert split["quarantined"] == {"image_missing": 1, "row_image": 1}


def test_an_image_folder_that_is_not_there_stops_the_job(
    inline_cli, tmp_path, captioned_rows, write_parquet
):
    rows = [
        {**row, "image": {"bytes": None, "path": f"gone/{i}.jpg"}}
        for i, row in enumerate(captioned_rows(30))
    ]
    source, out = write_parquet(tmp_path / "source", rows), tmp_path / "out"
    done = inline_cli.run("shards", "pixmo_cap", "--source", source, "--out", out)
    assert done.code == 2
    assert "image_missing=" in done.err
    assert not (out / "manifest.json").exists()


def test_a_split_cannot_lead_out_of_the_output(inline_cli, tmp_path):
    out = tmp_path / "out"
    job = ("shards", "pixmo_cap", "--source", "sample", "--split", "../evil")
    done = inline_cli.run(*job, "--out", out)
    assert done.code == 1
    assert "split=../evil" in done.err
    assert list(tmp_path.iterdir()) == []


def test_the_note_of_an_unfinished_reshard_is_not_a_plan(inline_cli, tmp_path):
    out = tmp_path / "out"
    job = ("shards", "pixmo_cap", "--source", "sample", "--limit", 4, "--out", out)
    inline_cli.good(*job)
    (out / "manifest.json").unlink()  # what the job is stays known, as while it fetches
    note = out / "plan" / "train" / "plan.json"
    note.parent.mkdir()
    note.write_text('{"build_key": "k", "kind": "reshard"}')
    for name in ("plan/train.json", "no such file"):
        done = inline_cli.run(*job)
        assert done.code == 3
        assert "unfinished reshard" in done.err
        assert str(note) in done.err
        assert note.exists()
        (out / name).unlink(missing_ok=True)
