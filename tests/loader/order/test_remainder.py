"""The rest of an epoch: what lanes still owe, end to end, each place once."""

import numpy as np
import pytest

from loader.order.remainder import EpochRemainder

LENGTHS = np.array([5, 3, 4])


class ThreeLanes:
    """Lanes of 5, 3 and 4 samples; their epochs begin with 2. Samples are 100 * lane + place."""

    first_epoch = 2

    def ends(self, epoch):
        return (epoch - 1) * LENGTHS

    def take(self, track, count):
        return 2 + count // LENGTHS[track], 100 * track + count % LENGTHS[track]


@pytest.mark.parametrize(
    ("taken", "first_epoch", "pairs"),
    [
        ([0, 0, 0], 2, []),
        ([5, 3, 4], 3, []),
        ([4, 3, 3], 3, [(2, 4), (2, 203)]),
        # The first lane is an epoch ahead, so the others owe that one too.
        ([7, 2, 4], 4, [(3, 2), (3, 3), (3, 4), (2, 102), (3, 100), (3, 101), (3, 102)]
         + [(3, 200), (3, 201), (3, 202), (3, 203)]),
    ],
)  # fmt: skip
def test_rest_is_what_lanes_would_have_taken_up_to_the_end_of_the_last_epoch_begun(
    taken, first_epoch, pairs
):
    rest = EpochRemainder(ThreeLanes(), taken=np.array(taken))
    assert (rest.first_epoch, rest.length, rest.num_tracks) == (first_epoch, len(pairs), 3)
    epoch, sample = rest.take(np.arange(len(pairs)))
    assert list(zip(epoch.tolist(), sample.tolist(), strict=True)) == pairs


def test_rest_can_be_asked_for_in_any_order():
    rest = EpochRemainder(ThreeLanes(), taken=np.array([1, 1, 1]))
    place = np.array([8, 0, 4, 3])
    assert rest.take(place)[1].tolist() == [203, 1, 101, 4]
