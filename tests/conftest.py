"""What holds for every test: strict JAX, fresh random examples without deadlines, and nothing left behind."""

import atexit
import fcntl
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

if "INFLASH_TEST_RUN" not in os.environ:  # pytest-xdist's workers inherit it
    os.environ["INFLASH_TEST_RUN"] = tempfile.mkdtemp(prefix="inflash-tests-")
    atexit.register(shutil.rmtree, os.environ["INFLASH_TEST_RUN"], ignore_errors=True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Test processes, and commands that tests run, compile the same kernels: one run shares what it has compiled.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["INFLASH_TEST_RUN"], "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ["JAX_PLATFORMS"] = "cpu"  # whatever JAX finds; test_llm.py has another default device in a process of its own
os.environ["INFLASH_KERNELS"] = "xla"  # whatever the user has built; commands that tests run inherit it

import jax

from inflash.errors import InflashError
from inflash.pipeline import native_library

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("inflash", deadline=None, print_blob=True)  # the first example of a jitted function compiles it
settings.load_profile("inflash")

SHARED = Path(os.environ["INFLASH_TEST_RUN"])
"""What all processes of one test run share."""
SHARED_MEMORY = Path("/dev/shm")
OURS = ("psm_", "sem.", "inflash")  # multiprocessing's names and any that we might give
GRACE_S = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-large", action="store_true", help="also run what takes gigabytes and minutes")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of values made by an independent implementation, each beside the script that made it."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def build_output() -> str:
    """What `inflash build-kernels` said; it takes a compiler 20 seconds, so it runs once, with `SHARED` for a cache folder."""
    try:
        native_library._compiler()
    except InflashError as error:
        pytest.skip(str(error))
    said = SHARED / "build-kernels.txt"
    with (SHARED / "build-kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            environment = {**os.environ, "XDG_CACHE_HOME": str(SHARED), "INFLASH_KERNELS": "auto"}
            command = [sys.executable, "-m", "inflash.tools.cli", "build-kernels"]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
            assert (ended.returncode, ended.stderr) == (0, "")
            said.write_text(ended.stdout)
    return said.read_text()


@pytest.fixture(scope="session")
def built(build_output: str) -> Path:
    """The cache folder with native kernels, loaded; not used but where a test says so."""
    (library,) = (SHARED / "inflash").iterdir()
    native_library.load(library)
    return SHARED


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test that leaves a child process or shared memory behind."""
    processes, names = child_processes(), shared_memory()
    yield
    end = time.monotonic() + GRACE_S
    while (left := child_processes().keys() - processes.keys()) and time.monotonic() < end:
        time.sleep(0.01)
    commands = [child_processes().get(pid, "ended since") for pid in left]
    assert not left, f"the test left child processes behind: {commands}"
    assert not shared_memory() - names, f"the test left entries in {SHARED_MEMORY}: {sorted(shared_memory() - names)}"


def child_processes() -> dict[int, str]:
    """Command lines of this process's living or unreaped children by process id, without multiprocessing's own resource tracker."""
    multiprocessing.active_children()  # reaps those that have ended
    found: dict[int, str] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            for pid in map(int, (task / "children").read_text().split()):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip() or "a zombie"
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread or child that ended meanwhile
    return {pid: command for pid, command in found.items() if "multiprocessing.resource_tracker" not in command}


def shared_memory() -> set[str]:
    if not SHARED_MEMORY.is_dir():
        return set()
    return {entry.name for entry in os.scandir(SHARED_MEMORY) if entry.name.startswith(OURS)}
