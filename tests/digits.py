"""A tokenizer that spells numbers digit by digit: the embedded one, with digits apart."""

import json

from preprocess.text.tokens import EMBEDDED_PATH


def write_digit_tokenizer(folder):
    """Writes the tokenizer to a folder, as Qwen2 and Gemma have their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    made = json.loads((EMBEDDED_PATH / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, made["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(
        (EMBEDDED_PATH / "tokenizer_config.json").read_text()
    )
    return folder
