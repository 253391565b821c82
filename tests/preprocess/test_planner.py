"""PLAN: rows that cannot become samples are counted with a reason."""

import json


def test_rows_without_a_message_in_the_chosen_mode_are_counted_not_built(
    cli, tmp_path, captioned_rows, write_parquet
):
    rows = captioned_rows(6)
    for row in rows[::2]:
        row["transcripts"] = []
    source = write_parquet(tmp_path / "source", rows)
    out = tmp_path / "out"
    done = cli.run(
        "shards", "pixmo_cap", "--source", str(source), "--mode", "transcript", "--out", str(out)
    )
    assert done.code == 0, done.err
    split = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert (split["num_samples"], split["quarantined"]) == (3, {"no_message": 3})
    assert len(list((out / "quarantine").iterdir())) == 1
