"""How a module of this package is run in a process of its own.

A new interpreter rather than multiprocessing's: users' scripts need no `if __name__ == "__main__"`.
"""

import os
import sys


def module_command(module: str, *words: str) -> list[str]:
    """The command that runs a module, such as "pipeline.loader", with these arguments; wants `module_environment`."""
    return [sys.executable, "-P", "-m", f"inflash.{module}", *words]


def module_environment() -> dict[str, str]:
    """This process's environment, with the places where it finds its own modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
