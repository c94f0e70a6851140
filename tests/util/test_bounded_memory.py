"""Memory that some lines of code may take: the kernel's own bound, put back afterwards."""

from __future__ import annotations

import resource
import sys
import threading

import pytest

from cartridge_distill.util.bounded_memory import bounded_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")


def limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_DATA)


def test_more_is_refused_and_the_limit_is_put_back() -> None:
    before = limits()
    with pytest.raises(MemoryError), bounded_memory(2**27):
        bytearray(2**28)
    assert limits() == before
    with bounded_memory(2**28):
        bytearray(2**26)
    assert limits() == before
    assert len(bytearray(2**28)) == 2**28


def test_two_threads_put_back_what_was_there() -> None:
    before = limits()

    def often() -> None:
        for _ in range(50):
            with bounded_memory(2**30):
                pass

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limits() == before
