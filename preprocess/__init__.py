"""The offline half: datasets, formatting, tokenization, resizing, and the job of building."""
