from hypothesis import given
from hypothesis import strategies as st

from loader.reading.lookahead import LookaheadWindow


@given(
    ahead=st.integers(0, 20),
    stride=st.integers(1, 5),
    start=st.integers(0, 50),
    length=st.integers(1, 80),
)
def test_every_worker_announces_each_of_its_steps_once_and_in_time(ahead, stride, start, length):
    window, stop = LookaheadWindow(ahead, stride=stride), start + length
    announced = {worker: [] for worker in range(stride)}
    for step in range(start, stop):
        own = announced[step % stride]
        own += window.next_steps(step, stop=stop)
        assert not ahead or step in own
        assert all(later <= step + (ahead + 1) * stride for later in own)
    if ahead:
        for steps in announced.values():
            assert steps == sorted(set(steps))
        everything = sorted(step for steps in announced.values() for step in steps)
        assert everything == list(range(start, stop))
    else:
        assert not any(announced.values())


def test_the_first_step_does_not_wait_for_the_planning_of_others():
    window = LookaheadWindow(64)
    assert list(window.next_steps(7, stop=10_000)) == [7]
    assert len(window.next_steps(8, stop=10_000)) <= 8
