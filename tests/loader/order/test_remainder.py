"""The remainder of an epoch: what lanes have not read yet, end to end, each place once."""

import numpy as np
import pytest

from loader.order.remainder import EpochRemainder


class ThreeLanes:
    """Lanes of 5, 3 and 4 samples. Samples are 100 * lane + place."""

    lengths = np.array([5, 3, 4])

    def samples(self, track, count):
        assert (count < self.lengths[track]).all()
        return 100 * track + count


@pytest.mark.parametrize(
    ("taken", "samples"),
    [
        ([5, 3, 4], []),
        ([4, 3, 3], [4, 203]),
        ([0, 2, 4], [0, 1, 2, 3, 4, 102]),
        ([5, 0, 3], [100, 101, 102, 203]),
    ],
)
def test_remainder_is_what_lanes_would_have_read_up_to_the_end_of_the_epoch(taken, samples):
    rest = EpochRemainder(ThreeLanes(), taken=np.array(taken))
    assert (rest.length, rest.num_tracks) == (len(samples), 3)
    assert rest.samples(np.arange(len(samples))).tolist() == samples


def test_remainder_can_be_asked_for_in_any_order():
    rest = EpochRemainder(ThreeLanes(), taken=np.array([1, 1, 1]))
    assert rest.samples(np.array([8, 0, 4, 3])).tolist() == [203, 1, 101, 4]
