"""What samples cost: the bytes of baked variants; and where unfinished files are."""

import errno
import tempfile
from pathlib import Path

import pytest

from preprocess.fetch.blobs import BlobCache
from preprocess.job import build
from preprocess.job.build import BuildContext, sample_size, scratch_folder, variant_bytes
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.tokens import Tokenizer, load_tokenizer
from shardspec.errors import StorageError
from shardspec.manifest import canonical_json
from shardspec.sample import spans_table

ONE = 1_000_000


def test_variants_cost_their_rows_and_the_tokens_that_only_they_use():
    texts = [
        (0, 0, 0, 3, 3, 9, ONE),  # the first: prompt 0..3, response 3..9
        (0, 0, 9, 14, 3, 9, ONE),  # another prompt of 5 tokens, the same response
        (0, 0, 0, 3, 3, 9, ONE),  # a repeated draw: its row only
        (1, 0, 14, 16, 16, 20, ONE),  # a turn of one variant costs nothing extra
    ]
    assert variant_bytes(spans_table(texts, [])) == 2 * 32 + 5 * 4


def test_a_sample_of_one_variant_has_no_variant_bytes():
    assert variant_bytes(spans_table([(0, 0, 0, 3, 3, 9, ONE)], [])) == 0


@pytest.mark.parametrize("num_variants", [1, 8])
def test_measured_sample_counts_the_variants_of_the_recipe(tmp_path, num_variants):
    policy = TextPolicy(num_variants=num_variants)
    preparer = Preparer(recipe=Recipe(text=policy), tokenizer=load_tokenizer())
    message = {"style": "long_caption", "text": "a caption of some words " * 20}
    row = {"key": "k", "image": None, "example": {"message_list": [message]}}
    size = sample_size(preparer, row, cache=BlobCache(tmp_path))
    assert (size.variant_bytes > 0) == (num_variants > 1)
    # The response is stored once: far less than eight times its tokens.
    assert size.variant_bytes < 4 * size.num_tokens


encode = Tokenizer.encode


def encode_or_fail(tokenizer, text):
    """Encodes as tokenizers without a token for what is unknown: some texts end in an error."""
    if "no token" in text:
        raise Exception("Missing [UNK] token")  # noqa: TRY002 - theirs
    return encode(tokenizer, text)


def built(folder, monkeypatch, *, block):
    """Builds a shard of images and texts, some of which are refused early or late."""
    monkeypatch.setattr(build, "_BLOCK_ROWS", block)
    monkeypatch.setattr(Tokenizer, "encode", encode_or_fail)
    preparer = Preparer(recipe=Recipe(), tokenizer=load_tokenizer())
    context = BuildContext(
        preparer=preparer, dataset="d", split="train", out=str(folder), num_shards=1,
        build_key="b", blobs=str(folder / "blobs"), scratch=str(folder / "scratch"),
    )  # fmt: skip
    texts = ["a ball", "<|endoftext|>", "two balls", " ", "three balls", "no token " * 40, "four"]
    lines = [
        canonical_json(
            {
                "key": f"k{i}",
                "position": i,
                "image": {"kind": "scene", "seed": 0, "idx": i} if i < 3 else None,
                "example": {"message_list": [{"style": "long_caption", "text": text}]},
            }
        )
        for i, text in enumerate(texts)
    ]
    url = Path(build.rows_url(str(folder), "train", 0))
    url.parent.mkdir(parents=True)
    url.write_bytes(b"".join(lines))
    told = []
    shard = build.build_shard(context, 0, told.append)
    with shard.scratch:
        return shard.path.read_bytes(), shard.index, shard.quarantined, shard.receipt, told


def test_rows_are_the_same_however_many_are_opened_at_a_time(tmp_path, monkeypatch):
    alone = built(tmp_path / "alone", monkeypatch, block=1)
    reasons = ["control_token", "message_fields", "row_error"]
    assert [reason for reason in alone[-1] if reason] == reasons
    for block in (2, 3, 5, 64):
        assert built(tmp_path / str(block), monkeypatch, block=block) == alone


def test_a_disk_that_has_no_room_for_a_folder_is_full(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError) as caught, scratch_folder(str(tmp_path / "scratch")):
        pass
    assert caught.value.reason == "no_space"
