"""Where the figures of `inflash probe` are kept, and whether they still fit: they are for one machine, one file system and one version."""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..errors import InflashError
from . import native_library
from .device import Device, assumed_device

_PROBE_AGAIN = "run inflash probe again"


def machine_of(folder: Path) -> dict[str, str]:
    """What figures of a folder's disk depend on, by name."""
    mount = _mount_of(folder)
    return {
        "inflash": __version__,
        "jaxlib": metadata.version("jaxlib"),
        "processor": hashlib.sha256("\0".join(native_library.processor()).encode()).hexdigest()[:16],
        "kernels": "native" if native_library.choose() else "xla",
        "system": f"{platform.system()} {platform.machine()}",
        "disk": mount,
    }


def _mount_of(folder: Path) -> str:
    """The file system that holds a folder: its device's number, type and source."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            kind, source = fields[fields.index("-") + 1 :][:2]
            return f"{number} {kind} {source}"
    return number


def device_path(folder: Path) -> Path:
    """Where the figures of a folder's disk are kept."""
    digest = hashlib.sha256(_mount_of(folder).encode()).hexdigest()[:16]
    return native_library.cache_folder() / "inflash" / f"device-{digest}.json"


def read_device(file: Path) -> Device:
    """A file of `inflash probe`.

    Raises:
      InflashError: it cannot be read, or is no such file.
    """
    try:
        return Device.from_json(json.loads(file.read_bytes()))
    except OSError as error:
        raise InflashError(f"{file}: cannot be read: {error.strerror}; {_PROBE_AGAIN}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InflashError(f"{file}: expected a file of inflash probe, found other content ({error}); {_PROBE_AGAIN}") from error


def find_device(folder: Path) -> tuple[Device, str]:
    """The figures for a folder's disk, or assumed ones, and a sentence on them: "" where they were measured here and still fit."""
    file = device_path(folder)
    if not file.exists():
        return assumed_device(), f"nothing was measured here, so rates are assumed: run inflash probe {folder}"
    try:
        device = read_device(file)
    except InflashError as error:
        return assumed_device(), f"rates are assumed: {error}"
    now = machine_of(folder)
    if changed := [name for name in now if device.machine.get(name) != now[name]]:
        listed = ", ".join(f"{name} (was {device.machine.get(name)}, is {now[name]})" for name in changed)
        return device, f"rates were measured with something else: {listed}; run inflash probe {folder}"
    return device, ""
