"""The check for leaks finds what it is meant to find. Needs no cluster."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.core.helpers import wait_until

MARK = "SKATE_TEST_RUN"  # as in conftest.py


@pytest.fixture
def before(belongings):
    return belongings.now()


def expect_leak(before, kind):
    with pytest.raises(pytest.fail.Exception, match=kind):
        before.expect_nothing_more(deadline_s=0.05)


def test_nothing_is_found_where_nothing_was_left(before):
    before.expect_nothing_more()


def test_a_process_is_found_although_it_has_another_parent(before):
    # The shell ends at once, so that the process it started is adopted.
    command = f"{sys.executable} -c 'import time; time.sleep(50)' >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout)
    wait_until(lambda: MARK in Path(f"/proc/{pid}/environ").read_text(), what="start of the process")
    try:
        expect_leak(before, f"process: {pid}")
    finally:
        os.kill(pid, 9)
    before.expect_nothing_more()


def test_a_thread_is_found(before):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        expect_leak(before, "thread")
    finally:
        stop.set()
        thread.join()
    before.expect_nothing_more()


def test_a_socket_is_found(before):
    with socket.socket():
        expect_leak(before, "descriptor: socket")
    before.expect_nothing_more()


def test_a_memory_file_is_found(before):
    descriptor = os.memfd_create("segment")
    try:
        expect_leak(before, "descriptor: /memfd:segment")
    finally:
        os.close(descriptor)
    before.expect_nothing_more()


def test_a_directory_is_found(before):
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        (Path(directory) / "session").mkdir()
        expect_leak(before, "temporary file: ")
    before.expect_nothing_more()
