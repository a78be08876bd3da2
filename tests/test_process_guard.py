"""The guard itself: it refuses every way to start a process or server, except in tests with certain marks."""

import contextlib
import multiprocessing
import os
import socketserver
import subprocess
import sys

import pytest
from process_guard import ProcessStarted, active, guarded, no_processes

TRUE = [sys.executable, "-c", ""]


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(TRUE),
        lambda: os.system("true"),
        lambda: os.fork(),
        lambda: os.posix_spawn(TRUE[0], TRUE, {}),
        lambda: multiprocessing.get_context("fork").Process(target=nothing).start(),
        lambda: multiprocessing.get_context("spawn").Process(target=nothing).start(),
        lambda: multiprocessing.get_context("spawn").Pool(1),
        lambda: socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler),
    ],
    ids=["subprocess", "system", "fork", "posix_spawn", "fork process", "spawn process", "pool", "server"],
)
def test_a_start_is_refused_and_listed(start):
    with no_processes() as refused, pytest.raises(ProcessStarted, match="mark the test `slow`"):
        start()
    assert len(refused) == 1


def test_code_that_catches_the_refusal_does_not_hide_it():
    caught = pytest.raises(ProcessStarted, match=r"caught this refusal: subprocess\.Popen")
    with caught, guarded({}), contextlib.suppress(ProcessStarted):
        subprocess.run(TRUE)


@pytest.mark.slow
def test_a_test_that_is_marked_may_start_processes():
    for mark in ("slow", "full"):
        with guarded({mark: True}):
            assert subprocess.run(TRUE).returncode == 0


def test_every_test_runs_under_the_guard(request):
    """conftest puts a guard around each test."""
    assert not {"slow", "full"} & set(request.node.keywords)
    assert active() == 1
