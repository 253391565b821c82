"""From a fresh folder to the first batch in two commands, as docs/your-data.md has them."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from loader.__main__ import main as loader

PAGE = (Path(__file__).parents[2] / "docs" / "your-data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands(word):
    """The two commands of the page that build and show a dataset."""
    block = next(text for _, text in BLOCKS if word in text)
    return [line.split()[3:] for line in block.splitlines() if line.startswith("python -m")]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder with photos, conversations about them, and the page's Python file."""
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(3):
        stream = io.BytesIO()
        Image.new("RGB", (64, 48), (80 * i, 90, 200)).save(stream, "JPEG")
        (tmp_path / "photos" / f"{i}.50.jpg").write_bytes(stream.getvalue())
        turns = [("human", "<image>\nWhich photo?"), ("gpt", f"Number {i}.")]
        rows.append(
            {
                "id": str(i),
                "image": f"{i}.50.jpg",
                "conversations": [{"from": role, "value": text} for role, text in turns],
            }
        )
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    code = next(text for _, text in BLOCKS if "(DatasetBase)" in text)
    assert len(code.splitlines()) <= 20
    (tmp_path / "receipts.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "word, want",
    [
        ("shards chats.json", " User: Which photo? Assistant:⟦ Number {i}.⟧"),
        ("shards receipts.py:Receipts", " User: What is the total? Assistant:⟦ {i}.50⟧"),
    ],
)
def test_two_commands_lead_to_the_first_batch(word, want, fresh, inline_cli, capsys):
    build, show = commands(word)
    assert build[:2] == word.split()
    inline_cli.good(*build, "--image-size", 56)
    assert loader([*show, "--batch-size", "3"]) == 0
    text = capsys.readouterr().out
    for i in range(3):
        assert want.format(i=i) in text
    assert text.count("<image 64×48, 1 crop>") == 3
