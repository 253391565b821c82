"""A fork at an awkward moment, for tests of what holds locks."""

import os
import signal
import threading


def goes_on_in_a_child(work, *, forked_under):
    """Tells whether `work` ends well in a child that is forked while a thread holds a lock.

    Python 3.12 warns of forking beside threads: the test has to ignore that.
    """
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with forked_under:
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(60)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # ends it where it hangs
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(child, 0)[1] == 0
    finally:
        leave.set()
        thread.join()
