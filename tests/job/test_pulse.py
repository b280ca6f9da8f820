from __future__ import annotations

import os
from array import array

import pytest

from harnessd.job import pulse


def test_page_is_seen_through_every_mapping_of_it() -> None:
    fd = pulse.create()
    mine, theirs = pulse.attach(fd), pulse.attach(fd)
    os.close(fd)
    mine[pulse.POLLS] += 3
    assert theirs[pulse.POLLS] == 3 and theirs[pulse.WAITING] == 0
    mine.release()
    theirs.release()


def test_a_run_cannot_take_the_page_away_from_whoever_looks_into_it() -> None:
    fd = pulse.create()
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_a_claim_is_seen_in_the_page_and_counts_nothing() -> None:
    fd = pulse.create()
    page = pulse.attach(fd)
    for pid in (4242, pulse.VOID):
        pulse.claim(fd, pid)
        assert page.tolist()[: pulse.CLAIM + 2] == [0, 0, pid, 0]
    assert pulse.next_number(fd) == 1
    page.release()
    os.close(fd)


def test_page_of_a_forked_child_is_the_same() -> None:
    fd = pulse.create()
    page = pulse.attach(fd)
    pid = os.fork()
    if pid == 0:
        page[pulse.POLLS] += 1
        pulse.next_number(fd)
        os._exit(0)
    os.waitpid(pid, 0)
    assert page[pulse.POLLS] == 1
    assert pulse.next_number(fd) == 2
    page.release()
    os.close(fd)


def test_descriptor_of_the_page_is_not_inherited_by_what_is_executed() -> None:
    fd = pulse.create()
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_no_two_processes_are_given_the_same_number() -> None:
    fd = pulse.create()
    pipes = [os.pipe() for _ in range(4)]
    children = []
    for _, end in pipes:
        pid = os.fork()
        if pid == 0:
            os.write(end, array("H", [pulse.next_number(fd) for _ in range(10_000)]).tobytes())
            os._exit(0)
        children.append(pid)
        os.close(end)
    numbers: list[int] = []
    for end, _ in pipes:
        with open(end, "rb") as file:
            numbers += array("H", file.read())
    for pid in children:
        os.waitpid(pid, 0)
    os.close(fd)
    assert sorted(numbers) == list(range(1, 40_001))
