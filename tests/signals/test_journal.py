"""What stands between who records and the disk."""

import os
import signal
import threading

import pytest

from attnscope.signals.journal import interrupts_wait

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of a process")


@pytest.fixture(autouse=True)
def handler_of_python():
    """Processes that a shell starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_heard_when_the_block_is_written():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("written")
    assert done == ["written"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_leaves_the_handler_of_the_script_in_its_place():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mine = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ValueError, match="disk"), interrupts_wait():
            raise ValueError("disk")
        assert signal.getsignal(signal.SIGINT) is mine and came == []
        with interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            assert came == []
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_ignores_ctrl_c_goes_on_doing_so_and_other_threads_have_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    said = []

    def elsewhere():
        with interrupts_wait():
            said.append("here")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["here"]
