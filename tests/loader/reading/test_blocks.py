import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loader.order import BLOCK_SIZE, plan_order
from loader.reading.blocks import Block, block_rows, coalesce, fitting_block_bytes, missing
from loader.reading.network import Network, blocks_of
from shardspec.manifest import FileEntry

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=60)
SPANS = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 80)), max_size=12).map(
    lambda pairs: [(start, start + length) for start, length in pairs]
)


def covered(spans):
    return {byte for start, stop in spans for byte in range(start, stop)}


@given(sizes=SIZES, block_bytes=st.integers(1, 500))
def test_blocks_cover_a_shard_once_and_stay_near_their_size(sizes, block_bytes):
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
    blocks = [block_rows(offsets, row, block_bytes=block_bytes) for row in range(len(sizes))]
    for row, (first, stop) in enumerate(blocks):
        assert first <= row < stop
        assert all(other == (first, stop) for other in blocks[first:stop])
        # Only the last sample may reach beyond the cut.
        assert sum(sizes[first : stop - 1]) < block_bytes


@given(spans=SPANS, gap=st.integers(0, 50), most=st.integers(1, 200))
def test_joined_spans_cover_the_single_ones_and_waste_gaps_at_most(spans, gap, most):
    joined = coalesce(spans, gap=gap, most=most)
    assert covered(spans) <= covered(joined)
    assert joined == sorted(joined)
    for start, stop in joined:
        inside = [s for s in spans if start <= s[0] and s[1] <= stop]
        assert min(inside)[0] == start
        assert max(stop for _, stop in inside) == stop
        assert stop - start <= most or any(s[1] - s[0] > most for s in inside) or len(inside) > 1
    for span in spans:
        assert any(start <= span[0] and span[1] <= stop for start, stop in joined)


@given(spans=SPANS, start=st.integers(0, 300), length=st.integers(1, 300))
def test_missing_spans_are_exactly_what_the_others_leave(spans, start, length):
    gaps = missing(start, start + length, spans)
    assert covered(gaps) == set(range(start, start + length)) - covered(spans)
    assert gaps == sorted(gaps)


def test_a_block_is_named_by_content_not_by_place():
    block = Block(url="s3://a/b.tar", start=5, stop=9, total=20, sha256="ab" * 32)
    assert block.name == "ab" * 16 + "-5-9.block"
    assert block.num_bytes == 4


def shard_of(num_bytes, num_samples, name="a"):
    return FileEntry(
        url=f"{name}.tar",
        index_url=f"{name}.npy",
        nsamples=num_samples,
        num_bytes=num_bytes,
        sha256=name,
        index_bytes=1,
        index_sha256="",
    )


@given(sample_bytes=st.integers(1, 10**8), num_samples=st.integers(1, 10**6))
def test_blocks_follow_from_the_samples_of_a_shard_alone(sample_bytes, num_samples):
    size = fitting_block_bytes(sample_bytes * num_samples, num_samples)
    assert size == fitting_block_bytes(sample_bytes, 1)  # however many
    assert 2**18 <= size <= 2**24
    assert size % 2**16 == 0
    together = BLOCK_SIZE * sample_bytes
    if 2**19 <= together <= 2**25:
        assert abs(size - together // 2) <= 2**15
    assert size <= fitting_block_bytes(sample_bytes + 1, 1)
    # Of any shard: another name, place or content says nothing.
    shards = [shard_of(sample_bytes * num_samples, num_samples, name) for name in "ab"]
    assert [blocks_of(Network(requests=3), shard) for shard in shards] == [size, size]
    assert blocks_of(Network(block_bytes=77), shards[0], cached=False) == 77
    assert blocks_of(Network(), shards[0], cached=False) == max(size, 4 * 2**20)


def test_the_size_that_blocks_aim_for_is_the_orders():
    wide = plan_order(10**8, global_batch_size=64, seed=0, canonical_ranks=64)
    assert BLOCK_SIZE * 3 // 4 <= wide.block_size <= BLOCK_SIZE * 3 // 2
