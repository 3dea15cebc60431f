"""How a module of this package is run in a process of its own, and ends with the one that started it.

A new interpreter rather than multiprocessing's: users' scripts need no `if __name__ == "__main__"`.
"""

import os
import select
import signal
import sys
import threading

_PARENT = "INFLASH_PARENT"


def module_command(module: str, *words: str) -> list[str]:
    """The command that runs a module, such as "pipeline.loader", with these arguments; wants `module_environment`."""
    return [sys.executable, "-P", "-m", f"inflash.{module}", *words]


def module_environment() -> dict[str, str]:
    """This process's environment, with the places where it finds its own modules, and who it is."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), _PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Has this process get one SIGTERM when the one that started it with `module_environment` ends, however that comes; or now."""
    parent = int(os.environ.get(_PARENT, os.getppid()))
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:  # it has ended, or Linux is older than 5.3
        descriptor = None
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
    elif descriptor is not None:
        threading.Thread(target=_end_after, args=(descriptor,), name="end-with-parent", daemon=True).start()


def _end_after(descriptor: int) -> None:
    """Waits for a process to end; `prctl` would tell of each of its threads."""
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
