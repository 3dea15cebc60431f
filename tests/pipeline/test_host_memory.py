import os
import subprocess
import sys
from pathlib import Path

import pytest

from inflash.errors import InflashError
from inflash.pipeline import host_memory
from inflash.pipeline.host_memory import available_bytes, check_fits
from inflash.pipeline.interpreter import module_environment

MIB = 1 << 20
MANY_THREADS = """
import ctypes, sys, threading
from inflash.pipeline.host_memory import keep_few_arenas
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fdopen.restype = ctypes.c_void_p, ctypes.c_void_p
keep_few_arenas()
together = threading.Barrier(100)
threads = [threading.Thread(target=lambda: (libc.malloc(5000), together.wait())) for _ in range(100)]
for thread in threads: thread.start()
for thread in threads: thread.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def version_1(group: Path, limit: int, used: int, cache: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"cache 5\ninactive_file 1\ntotal_inactive_file {cache}\n")


def version_2(group: Path, limit: int | str, used: int, cache: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "_CGROUP_ROOT", tmp_path)
    return tmp_path


def test_the_machine_has_some() -> None:
    assert 0 < available_bytes() < 1 << 50


@pytest.mark.parametrize("controller", ["memory", ""])
def test_the_tightest_group_on_the_way_up_counts(mount: Path, controller: str) -> None:
    write = version_1 if controller else version_2
    write(mount / controller / "a/b", 900 * MIB, 100 * MIB, 0)
    write(mount / controller / "a", 500 * MIB, 300 * MIB, 50 * MIB)
    assert host_memory._cgroup_room(controller, "/a/b") == 250 * MIB  # the page cache gives way


def test_no_limit_is_no_limit(mount: Path) -> None:
    version_1(mount / "memory/a", (1 << 63) - 4096, 5, 0)
    version_2(mount / "a", "max", 5, 0)
    assert host_memory._cgroup_room("memory", "/a") is None
    assert host_memory._cgroup_room("", "/a") is None


def test_inside_a_container_the_mount_is_the_group(mount: Path) -> None:
    """/proc/self/cgroup then names a path of the host's."""
    version_2(mount, 700 * MIB, 100 * MIB, 0)
    assert host_memory._cgroup_room("", "/docker/0123") == 600 * MIB


def test_without_a_controller(mount: Path) -> None:
    assert host_memory._cgroup_room("memory", "/") is None


def test_what_does_not_fit_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100 * MIB)
    check_fits({"neurons": 60 * MIB, "KV cache": 40 * MIB}, "sell something")
    with pytest.raises(InflashError) as error:
        check_fits({"neurons": 60 * MIB, "nothing": 0, "KV cache": 41 * MIB}, "sell something")
    message = "memory: this run needs 101 MiB (neurons 60, KV cache 41), found 100 MiB available; sell something"
    assert str(error.value) == message


def test_processors_and_plugins_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_(processors: int, plugins: list[str]) -> int:
        host_memory.engine_bytes.cache_clear()
        monkeypatch.setattr(host_memory.os, "sched_getaffinity", lambda process: set(range(processors)))
        monkeypatch.setattr(host_memory.metadata, "entry_points", lambda group: plugins if group == "jax_plugins" else ["other"])
        return host_memory.engine_bytes()

    try:
        alone = with_(1, [])
        assert with_(2, []) == alone
        assert with_(16, []) - alone == 28 * MIB
        assert with_(16, ["xla_cuda13"]) - with_(16, []) == 90 * MIB
    finally:
        host_memory.engine_bytes.cache_clear()


@pytest.mark.skipif(not hasattr(host_memory._libc, "malloc_info"), reason="another malloc than glibc's")
def test_threads_neither_share_one_arena_nor_have_one_each() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], env=module_environment(), capture_output=True, check=True)
    assert done.stdout.count(b"<heap nr=") == len(os.sched_getaffinity(0)) + 2
