"""Processes that end with the one that started them, also where it was killed."""

import os
import select
import signal
import subprocess
import sys

from inflash.pipeline.interpreter import module_environment

WAIT_S = 60.0
CHILD = "import time; from inflash.pipeline.interpreter import end_with_parent; end_with_parent(); print('up', flush=True); time.sleep(600)"
PARENT = f"""
import subprocess, sys, time
from inflash.pipeline.interpreter import module_environment
subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=module_environment())
time.sleep(600)
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], env=module_environment(), stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.send_signal(signal.SIGKILL)
        # The child has the pipe's other end, too: it closes when both have ended.
        assert select.select([parent.stdout], [], [], WAIT_S)[0] and parent.stdout.read() == b""


def test_a_child_that_begins_after_its_parent_has_ended_ends_at_once() -> None:
    """As where the parent is killed while the interpreter still starts."""
    gone = {**module_environment(), "INFLASH_PARENT": str(os.getppid())}
    done = subprocess.run([sys.executable, "-c", CHILD], env=gone, capture_output=True, timeout=WAIT_S, check=False)
    assert done.returncode == -signal.SIGTERM and done.stdout == b""
