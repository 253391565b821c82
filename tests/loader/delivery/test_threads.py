import gc
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from loader import StreamingDataset, make_dataloader
from loader.assembly.augment import Augment
from loader.assembly.collate import MMCollator
from loader.assembly.draft import Draft
from loader.assembly.view import View
from loader.delivery import AheadLimit, Task, make_in_threads
from loader.delivery.prepared import PreparedBatches
from loader.reading.reader import ShardReader
from loader.stream import PreparedBuilder
from shardspec.errors import ConfigError, ShardError
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView

ROOT = Path(__file__).parents[3]
NUM, BATCH = 24, 4
VIEW = ImageView(size_px=112, patch_px=14)


@pytest.fixture(scope="module")
def samples(tiny_sample):
    return [tiny_sample(i, num_images=1 + i % 2, size=(112, 112)) for i in range(NUM)]


@pytest.fixture(scope="module")
def url(samples, write_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("making") / "set"
    # As if made for a larger view: every view of 112 px and less is there.
    return write_dataset(folder, samples, several=True, codec="png", view=ImageView())


def stream(url, *, view=None, **options):
    view = view or View(image=VIEW)
    return StreamingDataset(url, seed=7, view=view, rank=0, world_size=1, **options)


def make(dataset, **options):
    settings = {"global_batch_size": BATCH, "sequence_length": 256, "with_metadata": True}
    return make_dataloader(dataset, **{**settings, **options})


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one if name != "metadata"
    )


VIEWS = {
    "in place": View(image=VIEW),
    "augmented": View(image=VIEW, augment=Augment.standard()),
    "patches": View(image=VIEW, pixels="patches"),
    "normalised": View(image=VIEW, normalize="siglip"),
    "normalised patches": View(image=VIEW, normalize="openai", pixels="patches"),
    "smaller": View(image=ImageView(size_px=56, patch_px=14)),
    "padded": View(image=ImageView(size_px=98, patch_px=14, fit="pad")),
    "tiled": View(
        image=ImageView(
            size_px=56, crop_mode="overlap-and-resize-c2", max_crops=4, margin_patches=(1, 1)
        )
    ),
    "tiled patches": View(
        pixels="patches",
        augment=Augment(flip_probability=0.5, contrast=0.3),
        image=ImageView(
            size_px=56, crop_mode="overlap-and-resize-c2", max_crops=4, margin_patches=(1, 1)
        ),
    ),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_pictures_decoded_into_the_batch_are_those_of_the_collated_examples(view, url):
    dataset = stream(url, view=view)
    patches = view.pixels == "patches"
    image = view.image
    collate = MMCollator(
        sequence_length=512,
        image_shape=(image.num_patches, 14 * 14 * 3)
        if patches
        else (3, image.size_px, image.size_px),
        num_patches=image.num_patches,
        with_metadata=True,
    )
    loader = make(dataset, sequence_length=512, decode_threads=2)
    for step, batch in enumerate(loader):
        slots = loader._order.slots(step, range(BATCH))
        pairs = zip(slots.sample.tolist(), slots.epoch.tolist(), strict=True)
        want = collate([loader.dataset.example(n, epoch=e) for n, e in pairs])
        assert same(batch, want)
        assert batch["metadata"] == want["metadata"]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_kept_batches_stay_what_they_were_while_others_use_memory_again(threads, url):
    loader = make(stream(url), decode_threads=threads)
    kept = list(loader)
    copies = [{k: v.clone() for k, v in b.items() if k != "metadata"} for b in kept]
    places = set()
    for _ in range(4):
        for batch in loader:
            places.add(batch["images"].data_ptr())
            batch["images"].fill_(7)  # the consumer may write to what is its own
            del batch
    for got, want in zip(kept, copies, strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(places) <= 2 * threads + 2
    assert places.isdisjoint(batch["images"].data_ptr() for batch in kept)


def test_without_threads_batches_are_made_in_the_consumers_own(url, monkeypatch):
    makers = set()
    stored = ShardReader.stored

    def noted(self, sample_id):
        makers.add(threading.current_thread())
        return stored(self, sample_id)

    monkeypatch.setattr(ShardReader, "stored", noted)
    loader = make(stream(url), decode_threads=0)
    batches = iter(loader)
    next(batches)
    assert makers == {threading.current_thread()}
    assert loader._planned == 1  # nothing is made ahead, and nothing planned


def test_leaving_a_pass_waits_for_no_more_than_the_samples_at_hand(url, monkeypatch):
    stored = ShardReader.stored
    left = threading.Event()
    late = []

    def slow(self, sample_id):
        if left.is_set():
            late.append(sample_id)
        time.sleep(0.2)
        return stored(self, sample_id)

    monkeypatch.setattr(ShardReader, "stored", slow)
    batches = iter(make(stream(url), decode_threads=2))
    next(batches)
    left.set()
    batches.close()
    assert len(late) <= 4  # one sample in each thread, or two where the flag came in between


def test_a_pass_that_one_of_its_own_threads_collects_as_garbage_ends_without_an_error(
    url, monkeypatch
):
    ignored, dropped, collected = [], threading.Event(), threading.Event()
    stored = ShardReader.stored
    number = iter(range(NUM))

    def collecting(self, sample_id):
        if next(number) == BATCH:  # of the second batch; the first one is handed out
            dropped.wait(60)
            gc.collect()
            collected.set()
        return stored(self, sample_id)

    monkeypatch.setattr(ShardReader, "stored", collecting)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    gc.disable()  # or this thread may find the garbage
    try:
        batches = iter(make(stream(url), decode_threads=1))
        next(batches)
        cycle = [batches]
        cycle.append(cycle)
        del batches, cycle
        dropped.set()
        assert collected.wait(60)
    finally:
        gc.enable()
    assert [str(each.exc_value) for each in ignored] == []


def test_torch_starts_no_threads_in_ours_and_as_many_as_before_elsewhere(url, monkeypatch):
    inside = []
    stored = ShardReader.stored

    def noted(self, sample_id):
        inside.append(torch.get_num_threads())
        return stored(self, sample_id)

    monkeypatch.setattr(ShardReader, "stored", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(make(stream(url), decode_threads=2))
        outside = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: outside.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {1}
    assert outside == [3, 3]


def test_system_that_grants_no_more_threads_is_an_error_and_leaves_none_behind(url, monkeypatch):
    start = threading.Thread.start

    def refuse(self):
        if self.name == "decode_1":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    batches = iter(make(stream(url), decode_threads=3))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(batches)
    # One that still waited for the others would keep the process from ending.
    assert not [each for each in threading.enumerate() if each.name.startswith("decode")]


def break_picture(url, number):
    """Flips a bit in the middle of a sample's first picture; gives its key."""
    reader = ShardReader(url, require_manifest(url), split="train")
    stored = reader.stored(number)
    path = Path(url, reader.segments[0].file.url)
    payload = path.read_bytes()
    at = payload.index(bytes(stored.pictures[0].payload)) + len(stored.pictures[0].payload) // 2
    path.write_bytes(payload[:at] + bytes([payload[at] ^ 1]) + payload[at + 1 :])
    return stored.key


@pytest.fixture
def broken(samples, write_dataset, tmp_path):
    url = write_dataset(tmp_path / "set", samples, several=True, codec="png", view=VIEW)
    return url, [break_picture(url, number) for number in (3, 11, 12, 20)]


@pytest.mark.parametrize("options", [{"decode_threads": 0}, {"decode_threads": 2}, {"pack": True}])
def test_broken_pictures_are_substituted_as_broken_samples_are(options, broken):
    url, keys = broken
    loader = make(stream(url, on_bad="substitute", check="size"), **options)
    entries = [
        part
        for batch in loader
        for entry in batch["metadata"]
        for part in entry.get("examples", [entry])
    ]
    assert not {entry["key"] for entry in entries} & set(keys)
    replaced = [entry["substitutes"] for entry in entries if "substitutes" in entry]
    assert {entry["reason"] for entry in replaced} == {"image_decode"}
    assert loader.dataset.bad["image_decode"] >= len(replaced)
    if "pack" not in options:
        assert Counter(entry["sample"] for entry in replaced) == Counter([3, 11, 12, 20])


def test_substitutes_of_broken_pictures_are_those_of_the_examples(broken):
    url, _ = broken
    dataset = stream(url, on_bad="substitute", check="size")
    loader = make(dataset, decode_threads=2)
    for step, batch in enumerate(loader):
        slots = loader._order.slots(step, range(BATCH))
        for row, number in enumerate(slots.sample.tolist()):
            want = loader.dataset.example(number)
            assert batch["metadata"][row] == want["metadata"]
            count = len(want["images"])
            assert np.array_equal(batch["images"][row, :count].numpy(), want["images"])


def replaced_one_by_one(self, rows, planned, *, all_of_them):  # noqa: ARG001
    """Substitutes the first broken sample alone: what the batch must not differ from."""
    for row, own in zip(rows, planned, strict=True):
        for i, (ref, one) in enumerate(zip(row, own, strict=True)):
            if one.draft.error is not None:
                own[i] = self._plan(ref, after_failed=one)
                return True
    return False


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"pack": True, "sequence_length": 96}, marks=pytest.mark.slow)]
)
def test_a_batch_with_many_broken_pictures_is_rendered_a_few_times(
    options, samples, write_dataset, tmp_path, monkeypatch
):
    url = write_dataset(tmp_path / "set", samples, several=True, codec="png", view=VIEW)
    for number in range(1, NUM, 2):
        break_picture(url, number)
    rendered = []
    render = Draft.write_images
    monkeypatch.setattr(
        Draft, "write_images", lambda self, out: (rendered.append(self.key), render(self, out))
    )

    def batches():
        rendered.clear()
        dataset = stream(url, on_bad="substitute", check="size")
        made = make(dataset, decode_threads=0, global_batch_size=NUM // 2, **options)
        found = [next(iter(made))]
        return found, len(rendered), dict(made.dataset.bad)

    found, times, bad = batches()
    with monkeypatch.context() as old:
        old.setattr(PreparedBatches, "_replace_broken", replaced_one_by_one)
        wanted, before, bad_before = batches()
    assert same(found[0], wanted[0])
    assert found[0]["metadata"] == wanted[0]["metadata"]
    assert bad == bad_before
    drafts = sum(len(entry.get("examples", [entry])) for entry in found[0]["metadata"])
    assert bad["image_decode"] > 5
    # Two batches up to a broken one, each example alone, and the batch itself.
    assert times <= 4 * drafts + bad["image_decode"] < before


def test_broken_picture_stops_the_loop_where_it_is_not_to_be_substituted(broken):
    url, keys = broken
    with pytest.raises(ShardError) as caught:
        list(make(stream(url, check="size")))
    assert caught.value.reason == "image_decode"
    assert any(caught.value.where.endswith(key) for key in keys)


@pytest.mark.parametrize(
    "options", [{"decode_threads": -1}, {"workers": -1}, {"prefetch_bytes": 0}]
)
def test_impossible_numbers_are_refused(options, url):
    with pytest.raises(ConfigError) as caught:
        make(stream(url), **options)
    assert caught.value.reason == "loader_range"


def test_batches_ahead_are_bounded_in_batches_and_in_bytes():
    ahead = AheadLimit(most=5, most_bytes=1000, batch_bytes=300)
    assert ahead.batches == 3
    ahead.note(90)
    assert ahead.batches == 3  # the guess holds until a larger one is seen
    ahead.note(600)
    assert ahead.batches == 1
    ahead.note(5000)
    assert ahead.batches == 1  # one is always made
    assert AheadLimit(most=5, most_bytes=10**9, batch_bytes=1).batches == 5


@pytest.mark.parametrize("prefetch_bytes, most", [(1, 1), (1 << 30, 5)])
def test_no_more_is_made_ahead_than_the_bytes_allow(prefetch_bytes, most, url):
    loader = make(stream(url), decode_threads=2, prefetch_bytes=prefetch_bytes)
    ahead = loader._ahead()
    planned = []

    def plans():
        for step in range(6):
            planned.append(step)
            yield Task(step=step, rows=loader._plan(step)[0])

    made = make_in_threads(plans(), loader._maker, threads=2, allocate=np.empty, ahead=ahead)
    for taken in range(1, 7):
        next(made)
        assert len(planned) <= taken - 1 + most
    assert ahead.batches == most


FLAT = """
import sys
from pathlib import Path
from loader import StreamingDataset, make_dataloader

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

dataset = StreamingDataset(sys.argv[1], rank=0, world_size=1)
loader = make_dataloader(dataset, global_batch_size=8, sequence_length=256, decode_threads=2)
sizes = []
for epoch in range(10):
    for batch in loader:
        batch["images"].max()
    del batch
    sizes.append(resident())
print(*sizes)
"""


@pytest.mark.slow
def test_memory_after_ten_epochs_is_that_after_one(tiny_sample, write_dataset, tmp_path):
    view = ImageView(size_px=336, patch_px=14)
    samples = [tiny_sample(i, size=(336, 336)) for i in range(64)]
    url = write_dataset(tmp_path / "set", samples, codec="jpeg", view=view)
    done = subprocess.run(
        [sys.executable, "-c", FLAT, url], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sizes = [int(size) for size in done.stdout.split()]
    assert len(sizes) == 10
    assert sizes[-1] <= 1.05 * sizes[0], sizes


def test_ctrl_c_does_not_wait_for_the_read_at_hand(url, monkeypatch):
    reads, done = threading.Semaphore(0), threading.Event()
    plan = PreparedBuilder.plan_example

    def hanging(self, ref, **options):
        reads.release()
        assert done.wait(60)
        return plan(self, ref, **options)

    def interrupt():
        reads.acquire()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(PreparedBuilder, "plan_example", hanging)
    loader = make(stream(url), decode_threads=2)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))
    assert not done.is_set()
    (*left,) = (t for t in threading.enumerate() if t.name.startswith("decode"))
    assert left
    done.set()
    for thread in left:
        thread.join(60)
        assert not thread.is_alive()
    assert loader.state_dict()["step"] == 0


ENDS = """
import sys
from loader import StreamingDataset, make_dataloader

dataset = StreamingDataset(sys.argv[1], rank=0, world_size=1)
loader = make_dataloader(dataset, global_batch_size=2, sequence_length=4096, decode_threads=2)
batches = iter(loader)
batch = next(batches)
"""


@pytest.mark.slow
def test_a_script_that_ends_inside_a_pass_says_nothing(url):
    done = subprocess.run(
        [sys.executable, "-c", ENDS, url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
