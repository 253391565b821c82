import numpy as np
import torch

from loader.assembly.collate import MMCollator
from loader.cli.readable import describe_batch, readable_rows

IMAGE_IDS = {128: "<im_start>", 129: "<im_end>", 130: "<im_patch>", 131: "<im_col>"}
BLOCK = [128, 130, 130, 130, 130, 129]
PAD = ord("#")


def decode(ids):
    return "".join(map(chr, ids))


def example(*parts, images=()):
    """Makes an example of texts, (learned text,) tuples and image blocks, aligned as `lay_out`."""
    ids, learned = [ord("^")], [False]
    for part in parts:
        tokens = part if isinstance(part, list) else list(map(ord, "".join(part)))
        ids += tokens
        learned += [isinstance(part, tuple)] * len(tokens)
    ends = [i for i in range(len(ids)) if learned[i] and not (learned + [False])[i + 1]]
    labels = [t if m else -100 for t, m in zip(ids[1:], learned[1:], strict=True)] + [-100]
    for end in ends:
        labels[end] = ord("$")  # the branch's EOS, a target only
    metadata = {"images": [dict(zip(("width", "height", "crops"), i, strict=True)) for i in images]}
    return {"input_ids": np.array(ids), "labels": np.array(labels), "metadata": metadata}


def batch_of(*examples, pad_mode="batch_max"):
    collate = MMCollator(
        sequence_length=64,
        pad_mode=pad_mode,
        pad_token_id=PAD,
        image_shape=(3, 28, 28),
        num_patches=4,
        with_metadata=True,
    )
    return collate(examples)


def readable(*examples, pad_mode="batch_max"):
    batch = batch_of(*examples, pad_mode=pad_mode)
    return readable_rows(batch, decode=decode, image_ids=IMAGE_IDS)


def test_learned_text_is_marked_and_nothing_else():
    assert readable(example("say: ", ("hello",))) == ["^say: ⟦hello⟧"]


def test_image_block_becomes_one_word():
    (row,) = readable(example(BLOCK, "say: ", ("hello",), images=[(640, 480, 1)]))
    assert row == "^<image 640×480, 1 crop>say: ⟦hello⟧"


def test_an_overview_and_its_tiles_are_one_image():
    tiles = [128, 130, 130, 131, 130, 130, 131, 129]
    (row,) = readable(example(BLOCK, tiles, ("x",), images=[(784, 1008, 12)]))
    assert row == "^<image 784×1008, 12 crops>⟦x⟧"


def test_several_images_are_named_in_order():
    parts = (BLOCK, "and ", BLOCK, BLOCK, ("x",))
    (row,) = readable(example(*parts, images=[(1, 2, 1), (3, 4, 1), (5, 6, 1)]))
    assert row == "^<image 1×2, 1 crop>and <image 3×4, 1 crop><image 5×6, 1 crop>⟦x⟧"


def test_every_branch_shows_what_is_learned_of_it():
    assert readable(example("a: ", ("b",), "c: ", ("d",))) == ["^a: ⟦b⟧c: ⟦d⟧"]


def test_padding_is_not_shown():
    texts = [example("a", ("b",)), example("longer text ", ("and answer",))]
    for pad_mode in ("batch_max", "max_len", "to_8"):
        assert readable(*texts, pad_mode=pad_mode) == ["^a⟦b⟧", "^longer text ⟦and answer⟧"]


def test_row_without_loss_has_no_marks():
    assert readable(example("only given")) == ["^only given"]


def test_response_right_after_bos_is_marked_whole():
    assert readable(example(("hello",))) == ["^⟦hello⟧"]


def test_table_names_each_tensor_with_type_shape_and_range():
    batch = batch_of(example("a", ("bc",)), example("a", ("b",)))
    lines = describe_batch(batch).splitlines()
    assert [line.split()[0] for line in lines] == list(batch)
    assert lines[0].split() == ["input_ids", "int64", "[2,", "4]", "35", "to", "99"]
    assert lines[1].split() == ["labels", "int64", "[2,", "4]", "-100", "to", "99"]
    images = next(line for line in lines if line.startswith("images"))
    assert images.split() == ["images", "uint8", "[2,", "0,", "3,", "28,", "28]", "empty"]


def test_table_has_fractions_and_lists_too():
    lines = describe_batch({"x": torch.tensor([0.5, -1.25]), "metadata": [{}, {}, {}]}).splitlines()
    assert lines[0].split() == ["x", "float32", "[2]", "-1.25", "to", "0.5"]
    assert lines[1].split() == ["metadata", "list", "3"]
