import pytest
import torch

from loader import StreamingDataset, make_dataloader
from loader.assembly.pixels import normalize
from loader.device import DevicePrefetcher
from shardspec.errors import ConfigError

NUM, BATCH = 12, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def only_where_there_is_one(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i, num_images=i % 3) for i in range(NUM)]
    return write_dataset(tmp_path_factory.mktemp("device") / "set", samples, several=True)


def make(url, **options):
    dataset = StreamingDataset(url, seed=7, rank=0, world_size=1, canonical_ranks=1)
    return make_dataloader(
        dataset, global_batch_size=BATCH, sequence_length=64, with_metadata=True, **options
    )


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_unchanged_contiguous_and_in_their_sequence(device, url):
    want = list(make(url))
    got = list(DevicePrefetcher(make(url), device))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert list(one) == list(other)
        assert one["metadata"] == other["metadata"]
        for name in set(one) - {"metadata"}:
            assert one[name].device.type == device
            assert one[name].is_contiguous(), name
            assert torch.equal(one[name].cpu(), other[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pictures_are_normalised_and_converted_there(device, dtype, url):
    for got, want in zip(
        DevicePrefetcher(make(url), device, normalization="siglip", dtype=dtype),
        make(url),
        strict=True,
    ):
        images = normalize(want["images"], kind="siglip").to(dtype or torch.float32)
        assert got["images"].dtype == images.dtype
        assert torch.allclose(got["images"].cpu(), images, atol=1e-6)
        assert got["images"].is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_are_kept_stay_what_they_were(device, url):
    loader = make(url)
    kept, copies = [], []
    for _ in range(4):
        for batch in DevicePrefetcher(loader, device):
            kept.append(batch["images"])
            copies.append(batch["images"].clone())
    assert all(map(torch.equal, kept, copies))


def test_unknown_normalisation_is_refused_at_once(url):
    with pytest.raises(ConfigError) as caught:
        DevicePrefetcher(make(url), "cpu", normalization="siglap")
    assert caught.value.reason == "normalization"


@pytest.mark.parametrize("device", DEVICES)
def test_state_is_that_after_the_batch_handed_out_last(device, url):
    want = list(make(url))
    first = DevicePrefetcher(make(url), device)
    next(iter(first))
    second = DevicePrefetcher(make(url), device)
    second.load_state_dict(first.state_dict())
    got = next(iter(second))
    assert torch.equal(got["input_ids"].cpu(), want[1]["input_ids"])


@pytest.mark.parametrize("device", DEVICES)
def test_pass_that_was_left_continues_after_the_batch_handed_out_last(device, url):
    want = [batch["metadata"] for batch in make(url)]
    prefetcher = DevicePrefetcher(make(url), device)
    got = []
    for _ in want:
        for batch in prefetcher:
            got.append(batch["metadata"])
            break
    assert got == want


def test_batch_that_was_sent_ahead_is_sent_again_where_the_pass_was_left(url):
    """The same without a device to send to."""
    want = [batch["metadata"] for batch in make(url)]
    prefetcher = DevicePrefetcher(make(url), "cpu")
    got = []
    for _ in want:
        for batch in prefetcher._one_ahead(dict):
            got.append(batch["metadata"])
            break
    assert got == want
    assert prefetcher.state_dict()["step"] == len(want)


def leave(prefetcher, num=1):
    """Takes so many batches of a pass without a device, and leaves it."""
    got = []
    for batch in prefetcher._one_ahead(dict):
        got.append(batch["metadata"])
        if len(got) == num:
            break
    return got


def rest(prefetcher):
    return [batch["metadata"] for batch in prefetcher._one_ahead(dict)]


@pytest.mark.parametrize("options", [{}, {"pack": True, "max_crops": 2}, {"bucket_steps": 2}])
def test_change_after_a_pass_that_was_left_begins_at_the_next_batch(url, options):
    num = options.get("bucket_steps", 1)  # a change is possible between groups only
    plain = make(url, **options)
    for _ in zip(range(num), plain, strict=False):
        pass
    plain.change(global_batch_size=2)
    want = [batch["metadata"] for batch in plain]
    loader = make(url, **options)
    prefetcher = DevicePrefetcher(loader, "cpu")
    leave(prefetcher, num)
    assert loader.step == num
    loader.change(global_batch_size=2)
    assert prefetcher.state_dict() == loader.state_dict()
    assert rest(prefetcher) == want


def test_change_within_a_pass_loses_no_batch(url):
    want = [key for batch in make(url) for key in batch["metadata"]]
    loader = make(url)
    prefetcher = DevicePrefetcher(loader, "cpu")
    got = []
    for batch in prefetcher._one_ahead(dict):
        got += batch["metadata"]
        loader.change(global_batch_size=2)
        break
    sizes = [len(batch) for batch in rest(prefetcher)]
    assert sizes == [BATCH, 2, 2]
    assert len(want) == len(got) + sum(sizes)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("is_kept", [False, True], ids=["left", "iterator kept"])
def test_loader_that_was_sent_elsewhere_between_two_passes_stays_there(url, step, is_kept):
    want = [batch["metadata"] for batch in make(url)]
    loader = make(url)
    states = [loader.state_dict()] + [loader.state_dict() for _ in loader]
    loader.load_state_dict(states[0])
    prefetcher = DevicePrefetcher(loader, "cpu")
    first = prefetcher._one_ahead(dict)
    next(first)
    if not is_kept:
        del first
    loader.load_state_dict(states[step])
    assert rest(prefetcher) == want[step:]


def test_iterator_that_is_still_kept_gives_no_batch_twice(url):
    want = [batch["metadata"] for batch in make(url)]
    prefetcher = DevicePrefetcher(make(url), "cpu")
    first = prefetcher._one_ahead(dict)
    got = [next(first)["metadata"] for _ in range(2)]
    got += rest(prefetcher)
    assert list(first) == []
    assert got == want
    assert prefetcher.state_dict()["step"] == len(want)


def test_batch_that_was_sent_is_not_lost_where_the_next_one_fails(url):
    want = [batch["metadata"] for batch in make(url)]
    prefetcher = DevicePrefetcher(make(url), "cpu")
    got = []
    sent = []

    def send(batch):
        sent.append(batch["metadata"])
        if len(sent) == 3:
            raise RuntimeError("out of memory")
        return dict(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        got.extend(batch["metadata"] for batch in prefetcher._one_ahead(send))
    assert got == want[:1]
    assert prefetcher.state_dict()["step"] == 1
    assert got + rest(prefetcher) == want


@pytest.mark.parametrize("device", DEVICES)
def test_change_after_a_pass_on_the_device_begins_at_the_next_batch(device, url):
    loader = make(url)
    prefetcher = DevicePrefetcher(loader, device)
    for _ in prefetcher:
        break
    loader.change(global_batch_size=2)
    assert [len(batch["input_ids"]) for batch in prefetcher] == [2] * 4


@pytest.mark.parametrize("device", DEVICES)
def test_batches_without_pictures_are_sent_too(device):
    batches = [{"input_ids": torch.arange(6).reshape(2, 3).T, "names": ["a"]}] * 3
    got = list(DevicePrefetcher(batches, device, normalization="siglip", dtype=torch.bfloat16))
    assert len(got) == 3
    for batch in got:
        assert list(batch) == ["input_ids", "names"]
        assert batch["input_ids"].is_contiguous()
        assert torch.equal(batch["input_ids"].cpu(), batches[0]["input_ids"])


@pytest.mark.parametrize("device", ["gpu7", "cuda:99", "cpu:x", "", torch.device("cuda", 99)])
def test_a_device_that_is_not_there_is_refused_before_the_first_batch(device):
    with pytest.raises(ConfigError) as caught:
        DevicePrefetcher([], device)
    assert caught.value.reason == "device"
    assert repr(device) in str(caught.value)
