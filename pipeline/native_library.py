"""The compiled form of `kernels/native.cc`: where it lies, how it is built and loaded, and whether this process uses it.

A library's name says what it was built from and for: source, jaxlib, processor and compiler flags. Another of any of these finds no library
rather than a wrong one.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import jax

from ..errors import InflashError, RunError
from ..kernels import native

SOURCES = [
    Path(__file__).parents[1] / "kernels" / name for name in ("native.cc", "native_rows.h", "native_many.h")
]  # the first is compiled
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
MACHINE_FLAGS = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler knows; some call it -mcpu on ARM
CHOICES = ("auto", "native", "xla")
_BUILD_TIMEOUT_S = 600
_CPU_KEYS = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A library that was just compiled, and the command that did it."""

    path: Path
    command: tuple[str, ...]


def _wanted() -> str:
    """The environment's choice of kernels: auto, native or xla.

    Raises:
      InflashError: it is something else.
    """
    choice = os.environ.get("INFLASH_KERNELS") or "auto"
    if choice not in CHOICES:
        raise InflashError(f"INFLASH_KERNELS should be one of {', '.join(CHOICES)}, found {choice}")
    return choice


def path() -> Path:
    """Where the library for this machine and this version lies, or would lie, in the user's cache."""
    parts = (
        *(source.read_text() for source in SOURCES),
        metadata.version("jaxlib"),
        platform.system(),
        platform.machine(),
        *processor(),
        repr((FLAGS, MACHINE_FLAGS)),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / "inflash" / f"kernels-{digest}.so"


def build(check: Callable[[Path], None] = lambda _: None) -> Build:
    """Compiles the library to where `path` says; one that is there is replaced in one step.

    Args:
      check: called with the new library before anyone else can find it; what it raises leaves things as they were.

    Raises:
      InflashError: there is no C++ compiler, or the one that CXX names is not there.
      RunError: the compiler cannot compile the kernels.
    """
    compiler, library = _compiler(), path()
    library.parent.mkdir(parents=True, exist_ok=True)
    complaint = ""
    with tempfile.TemporaryDirectory(prefix=".building-", dir=library.parent) as folder:
        new = Path(folder) / library.name
        for machine_flags in MACHINE_FLAGS:
            command = (*compiler, *FLAGS, *machine_flags, "-isystem", jax.ffi.include_dir(), str(SOURCES[0]), "-o", str(new))
            try:
                ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_BUILD_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RunError(f"{shlex.join(compiler)} does not compile the native kernels: {error}") from error
            if ended.returncode == 0:
                check(new)
                new.replace(library)
                return Build(path=library, command=command)
            complaint = complaint or _complaint(ended.stderr)
    raise RunError(f"{shlex.join(compiler)} does not compile the native kernels: {complaint}")


def load(library: Path) -> None:
    """Makes the library's kernels known to XLA; the first one that a process loads stays.

    Raises:
      InflashError: it does not load.
    """
    try:
        native.register(ctypes.CDLL(str(library)))
    except (OSError, AttributeError) as error:
        raise InflashError(f"{library} does not load ({error}): run inflash build-kernels") from error


@cache
def choose() -> bool:
    """Whether this process uses the native kernels, as INFLASH_KERNELS says; the first call loads the library and settles it.

    `auto` (the default) takes the library if there is one, `native` insists on it, `xla` does without.

    Raises:
      InflashError: INFLASH_KERNELS has another value, or is native and there is no library that loads.
    """
    wanted, library = _wanted(), path()
    if wanted == "xla":
        return False
    try:
        if not library.is_file():
            raise InflashError(
                f"there are no native kernels for this machine and version, expected {library}: run inflash build-kernels"
            )
        load(library)
    except InflashError as error:
        if wanted == "native":
            raise InflashError(f"INFLASH_KERNELS=native, but {error}") from error
        if library.is_file():
            warnings.warn(f"the native kernels are not used: {error}", RuntimeWarning, stacklevel=2)
        return False
    native.use(True)
    return True


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return folder if folder.is_absolute() else Path.home() / ".cache"


def processor() -> list[str]:
    """What the first processor says of itself; a build for it may not run on another."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return [platform.processor()]
    pairs = [line.partition(":")[::2] for line in first.splitlines()]
    return [" ".join(sorted(value.split())) for key, value in pairs if key.strip() in _CPU_KEYS]


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise InflashError(f"CXX names the C++ compiler {named[0]}, which is not there: install it, or unset CXX")
        return named
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise InflashError(f"no C++ compiler was found: install one of {', '.join(COMPILERS)}, or name another in CXX")


def _complaint(stderr: str) -> str:
    """The first error of a compiler's many lines."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
