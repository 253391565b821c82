import json
import posixpath
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ConfigError, ManifestError
from shardspec.manifest import (
    EXTENDED_VERSION,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    Receipt,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    canonical_json,
    differences,
    encode_receipt,
    fingerprint,
    load_manifest,
    parse_manifest,
    parse_receipt,
    require_manifest,
    sealed,
)


def shard(split="train", i=0, *, nsamples=3):
    return ShardEntry(
        url=f"{split}/tiny-{split}-{i:05d}-of-00002.tar",
        split=split,
        nsamples=nsamples,
        num_bytes=10240,
        sha256="a" * 64,
        index_bytes=464,
        index_sha256="b" * 64,
        num_images=3,
        num_tokens=40,
        num_loss_tokens=30,
    )


def split_entry(*shards, build_key="k"):
    return SplitEntry(
        build_key=build_key,
        source={"kind": "sample", "limit": None},
        num_samples=sum(entry.nsamples for entry in shards),
        num_images=6,
        num_tokens=80,
        num_loss_tokens=60,
        num_bytes=20480,
        quarantined={"image_decode": 1},
    )


def manifest(*, recipe=None, splits=("train",)):
    made = Manifest(
        dataset="tiny",
        recipe=recipe or {"image": {"codec": "raw", "quality": 95}},
        tokenizer=TokenizerEntry(
            name="embedded",
            sha256="c" * 64,
            probe_sha256="d" * 64,
            vocab_size=1000,
            embedding_size=1008,
            special_ids={"bos": 1, "eos": 2, "pad": 0, "<im_col>": 1000, "<im_patch>": 1001},
            special_tokens={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
        ),
        libraries={"pillow": "11.0"},
        splits={},
        shards=(),
    )
    for split in splits:
        shards = (shard(split, 0), shard(split, 1))
        made = made.with_split(split, split_entry(*shards), shards)
    return made


def document(**changes):
    return {**json.loads(manifest().encode()), **changes}


def refusal(value):
    payload = value if isinstance(value, bytes) else sealed(value)
    with pytest.raises(ManifestError) as raised:
        parse_manifest(payload, where="s3://b/tiny/manifest.json")
    assert raised.value.where == "s3://b/tiny/manifest.json"
    return raised.value


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**64, 2**64 - 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
RECIPES = st.dictionaries(st.text(max_size=4), JSON, max_size=4)


@given(recipe=RECIPES, splits=st.sets(st.sampled_from(["train", "validation", "test"])))
def test_manifest_reads_back_as_it_was_written(recipe, splits):
    made = manifest(recipe=recipe, splits=sorted(splits))
    payload = made.encode()
    assert parse_manifest(payload, where="") == made
    assert parse_manifest(payload, where="").encode() == payload


@given(st.permutations(["train", "validation", "test"]))
def test_order_in_which_splits_are_built_leaves_no_trace(order):
    assert (
        manifest(splits=order).encode() == manifest(splits=["test", "train", "validation"]).encode()
    )


def test_rebuilt_split_replaces_its_shards_only():
    old = manifest(splits=["train", "validation"])
    new = shard("train", 0, nsamples=9)
    changed = old.with_split("train", split_entry(new, build_key="other"), (new,))
    assert changed.select("train") == (new,)
    assert changed.select("validation") == old.select("validation")
    assert changed.splits["train"].build_key == "other"
    assert old.splits["train"].build_key == "k"


def test_shards_of_a_split_come_in_order_of_their_names():
    made = manifest().with_split(
        "train", split_entry(shard(i=1), shard(i=0)), (shard(i=1), shard(i=0))
    )
    assert [entry.url for entry in made.select("train")] == [shard(i=0).url, shard(i=1).url]


def test_index_lies_beside_its_shard():
    assert shard().index_url == "train/tiny-train-00000-of-00002.index.npy"


def test_manifest_is_a_wids_index_too():
    read = document()
    assert (read["__kind__"], read["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [(e["url"], e["nsamples"]) for e in read["shardlist"]] == [
        (shard(i=0).url, 3),
        (shard(i=1).url, 3),
    ]


def test_unknown_split_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'train'") as raised:
        manifest().select("trian")
    assert raised.value.reason == "unknown_split"
    assert raised.value.facts["splits"] == ["train"]


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe", manifest().encode()[:-100]])
def test_manifest_that_is_not_json_is_refused(payload):
    assert refusal(payload).reason == "manifest_json"


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_manifest_of_another_version_is_refused(version):
    error = refusal(document(format_version=version))
    assert error.reason == "manifest_version"
    assert error.facts == {"got": version, "want": f"{FORMAT_VERSION} or {EXTENDED_VERSION}"}


@pytest.mark.parametrize("value", [[], 1, "text", None, {}])
def test_json_that_is_not_a_manifest_is_of_no_known_version(value):
    assert refusal(json.dumps(value).encode()).reason == "manifest_version"


@pytest.mark.parametrize("apart", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_any_changed_bit_of_a_manifest_is_noticed(apart):
    """In steps of 7 bits: each byte once or twice, in turn each of its bits."""
    payload = manifest(splits=["train", "validation"]).encode()
    for number in range(0, 8 * len(payload), apart):
        changed = bytearray(payload)
        changed[number // 8] ^= 1 << number % 8
        error = refusal(bytes(changed))
        assert error.reason in ("manifest_digest", "manifest_json", "manifest_version")


@pytest.mark.parametrize("name", ["cut", "doubled", "formatted", "reordered", "appended"])
def test_a_manifest_that_says_the_same_in_other_bytes_is_refused(name):
    payload, read = manifest().encode(), document()
    changed = {
        "cut": payload[:-1],
        "doubled": payload.replace(b' "name"', b' "name": "tiny",\n "name"', 1),
        "formatted": json.dumps(read, sort_keys=True).encode(),
        "reordered": json.dumps(dict(reversed(read.items())), indent=1).encode(),
        "appended": payload + b"\n",
    }[name]
    error = refusal(changed)
    if name == "doubled":  # is no document of ours at all
        assert error.reason == "manifest_json"
    else:
        assert (error.reason, error.fix[:4]) == ("manifest_digest", "copy")


def test_a_manifest_of_the_time_before_digests_is_refused_with_the_remedy():
    read = document()
    del read["digest"]
    error = refusal(canonical_json(read, indent=1))
    assert error.reason == "manifest_digest"
    assert "it was written before" in error.what
    assert "`make shards`" in error.fix


@pytest.mark.parametrize("value", [None, 1, "", "0" * 63, "A" * 64, ["0" * 64], {}])
def test_a_digest_of_another_form_is_refused(value):
    assert refusal(canonical_json(document(digest=value), indent=1)).reason == "manifest_digest"


SYMBOLS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>")


@pytest.mark.parametrize("name", SYMBOLS)
@pytest.mark.parametrize("i", [0, 1, 999, *range(1000, 1006), 1006, 1007, 1008, 10**6])
def test_one_changed_image_symbol_is_named(name, i):
    ids = {"bos": 1, "eos": 2, "pad": 0, **{s: 1000 + k for k, s in enumerate(SYMBOLS)}}
    entry = {**document()["tokenizer"], "embedding_size": 1008}
    parse_manifest(sealed(document(tokenizer={**entry, "special_ids": ids})), where="")
    changed = {**ids, name: i}
    if changed == ids:
        return
    value = sealed(document(tokenizer={**entry, "special_ids": changed}))
    if sorted(changed.values())[3:] == list(range(1001, 1007)):
        return  # the first symbol moved to behind the last one: the tokenizer's copy cannot tell
    assert "tokenizer.special_ids" in refusal(value).facts["problems"]


@pytest.mark.parametrize(
    "ids, problem",
    [
        ({"bos": 1, "eos": 2}, "tokenizer.special_ids.pad: missing"),
        ({"bos": 1008, "eos": 2, "pad": 0}, "special_ids.bos: 1008, the embedding has 1008 rows"),
        ({"bos": 1000, "eos": 2, "pad": 0, "<a>": 1000}, "is an image symbol and another token"),
        ({"bos": 1, "eos": 2, "pad": 0, "<a>": 999}, "special_ids.<a>: 999, an id of a text token"),
        ({"bos": 1, "eos": 2, "pad": 0, "<a>": 1001, "<b>": 1001}, "not consecutive"),
    ],
)
def test_special_ids_that_contradict_the_embedding_are_named(ids, problem):
    entry = {**document()["tokenizer"], "special_ids": ids}
    assert problem in refusal(document(tokenizer=entry)).facts["problems"]


def test_a_tokenizer_without_bos_and_padding_uses_its_eos():
    ids, tokens = dict.fromkeys(("bos", "eos", "pad"), 2), dict.fromkeys(("bos", "eos", "pad"), "x")
    entry = {**document()["tokenizer"], "special_ids": ids, "special_tokens": tokens}
    assert parse_manifest(sealed(document(tokenizer=entry)), where="").tokenizer.special_ids == ids


def test_every_problem_is_named_at_once():
    read = document(recipe=[], dataset=None)
    del read["libraries"]
    del read["tokenizer"]["vocab_size"]
    read["tokenizer"]["special_ids"] = {"bos": "1"}
    read["splits"]["train"]["num_samples"] = "6"
    read["splits"]["validation"] = 7
    read["shardlist"][0]["sha1"] = "x"
    read["shardlist"][1]["num_bytes"] = True
    read["shardlist"].append({})
    error = refusal(read)
    assert error.reason == "manifest_fields"
    names = {problem.split(": ")[0] for problem in error.facts["problems"].split("; ")}
    assert names == {
        "recipe",
        "dataset",
        "libraries",
        "tokenizer.vocab_size",
        "tokenizer.special_ids",
        "splits.train.num_samples",
        "splits.validation",
        "shardlist[0].sha1",
        "shardlist[1].num_bytes",
        *(f"shardlist[2].{name}" for name in asdict(shard())),
    }


@pytest.mark.parametrize("section", ["tokenizer", "splits", "shardlist", "recipe", "libraries"])
@pytest.mark.parametrize("value", [None, 3, "text"])
def test_section_of_another_type_is_named(section, value):
    assert f"{section}: want" in refusal(document(**{section: value})).facts["problems"]


def every_field():
    read = document()
    yield from ((("tokenizer",), name) for name in read["tokenizer"])
    yield from ((("splits", "train"), name) for name in read["splits"]["train"])
    yield from ((("shardlist", 1), name) for name in read["shardlist"][1])


@pytest.mark.parametrize("path, name", list(every_field()))
@pytest.mark.parametrize("value", ["missing", None, [], -1, 1.5, True])
def test_field_that_is_missing_or_of_another_type_is_named(path, name, value):
    read = document()
    entry = read
    for step in path:
        entry = entry[step]
    entry[name] = value
    if value == "missing":
        del entry[name]
    error = refusal(read)
    assert error.reason == "manifest_fields"
    assert name in error.facts["problems"]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"split": "validation"}, "of split 'validation', not in splits"),
        ({"nsamples": 4}, "splits.train.num_samples: 6, its shards have 7"),
        ({"url": shard(i=1).url}, "is named 2 times"),
        ({"url": "/etc/secret.tar"}, "below the manifest"),
        ({"url": "../other/a.tar"}, "below the manifest"),
        ({"url": "train/../../a.tar"}, "below the manifest"),
        ({"url": "s3://other/a.tar"}, "below the manifest"),
        ({"url": "train/a.zip"}, "below the manifest"),
        ({"url": ""}, "below the manifest"),
    ],
)
def test_parts_that_contradict_each_other_are_named(change, problem):
    read = document()
    read["shardlist"][0].update(change)
    assert problem in refusal(read).facts["problems"]


@pytest.mark.parametrize("base", ["memory://room/tiny", None])
def test_manifest_is_found_below_a_datasets_url(base, tmp_path):
    from shardspec import storage

    url = base or str(tmp_path)
    assert load_manifest(url) is None
    with pytest.raises(ManifestError) as raised:
        require_manifest(url)
    assert raised.value.reason == "manifest_missing"
    assert raised.value.where == posixpath.join(url, MANIFEST_NAME)
    storage.publish_bytes(storage.join(url, MANIFEST_NAME), manifest().encode())
    assert load_manifest(url) == require_manifest(url) == manifest()
    storage.delete(url)


RECEIPT = Receipt(build_key="k", shard=shard(), quarantined={"image_decode": 2})


def test_receipt_reads_back_as_it_was_written():
    payload = encode_receipt(RECEIPT)
    assert parse_receipt(payload, where="") == RECEIPT
    assert encode_receipt(parse_receipt(payload, where="")) == payload


@given(st.integers(0, len(encode_receipt(RECEIPT)) - 2))
def test_receipt_cut_anywhere_is_none(cut):
    assert parse_receipt(encode_receipt(RECEIPT)[:cut], where="") is None


@pytest.mark.parametrize(
    "change",
    [
        {"build_key": None},
        {"build_key": 3},
        {"shard": None},
        {"shard": {}},
        {"shard": {**asdict(shard()), "nsamples": "3"}},
        {"quarantined": [1]},
        {"quarantined": "text"},
        {"quarantined": {"x": "y"}},
        {"quarantined": None},
    ],
)
def test_document_that_is_not_a_receipt_is_none(change):
    read = {**json.loads(encode_receipt(RECEIPT)), **change}
    assert parse_receipt(json.dumps(read).encode(), where="") is None


@pytest.mark.parametrize("payload", [b"[]", b"null", b"\xff", b"{}"])
def test_bytes_that_are_not_a_receipt_are_none(payload):
    assert parse_receipt(payload, where="") is None


@given(JSON)
def test_canonical_json_is_canonical(value):
    payload = canonical_json(value)
    assert json.loads(payload) == value
    assert canonical_json(json.loads(payload)) == payload
    assert canonical_json(json.loads(canonical_json(value, indent=1))) == payload


@given(RECIPES)
def test_fingerprint_ignores_the_order_of_fields(recipe):
    assert fingerprint(dict(reversed(recipe.items()))) == fingerprint(recipe)


def test_fingerprint_never_changes():
    # sha256sum of the line {"a":[1,null],"b":"ü"}
    assert fingerprint({"b": "ü", "a": [1, None]}) == (
        "e482a6076a1d6866be7b11ad72cce5e4c325a4d919210b22e8e0f7f5ca764994"
    )


@given(RECIPES, RECIPES)
def test_differences_are_empty_exactly_for_equal_documents(old, new):
    assert (differences(old, new, "x") == []) == (old == new)


def test_differences_name_fields_that_only_one_side_has():
    assert differences({"a": 1, "c": None}, {"b": {"c": 2}}, "recipe") == [
        "recipe.a: 1 here, (nothing) asked",
        "recipe.b: (nothing) here, {'c': 2} asked",
        "recipe.c: None here, (nothing) asked",
    ]


def test_tuples_and_lists_are_the_same_to_json():
    assert differences({"size": (1, 2)}, {"size": [1, 2]}, "x") == []
    assert differences([1, 2], [1, 3], "x") == ["x: [1, 2] here, [1, 3] asked"]
