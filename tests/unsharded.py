"""Examples of shards beside those of the unsharded path."""

import numpy as np

from loader import DeterministicDataset, MolmoPreprocessor, StreamingDataset
from shardspec.keyed import dataset_seed


def require_unsharded(url, rows, prepare, *, view, seed, epochs, num_images):
    """Requires that each example of a dataset is that of the unsharded path, in its epochs.

    Args:
      url: The dataset.
      rows: What it was built of.
      prepare: The preparer that it was built with.
      view, seed: Of the run.
      epochs: How many are compared.
      num_images: Of each example.
    """
    stream = StreamingDataset(url, seed=seed, view=view)
    prepared = {sample.key: sample for sample in map(prepare, (rows[i] for i in range(len(rows))))}
    keys = [stream.reader.read(number).key for number in range(stream.num_samples)]
    assert sorted(keys) == sorted(prepared)

    class Stored:
        def __len__(self):
            return len(keys)

        def get(self, item, rng):  # noqa: ARG002
            return prepared[keys[item]]

    other = DeterministicDataset(
        Stored(),
        MolmoPreprocessor(lambda s: s, special_ids=prepare.tokenizer.special_ids, view=view),
        seed=dataset_seed(seed, stream.manifest.dataset),
    )
    for number in range(len(keys)):
        for epoch in range(epochs):
            got, want = stream.example(number, epoch=epoch), other.get(number, epoch=epoch)
            assert len(got["images"]) == num_images
            for name in ("input_ids", "labels", "images", "image_input_idx"):
                assert np.array_equal(got[name], want[name]), name
