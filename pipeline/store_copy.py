"""One copy of a store a node, from a place that all nodes share: whoever comes first copies, the others wait."""

import fcntl
import glob
import os
import shutil
from pathlib import Path

from ..errors import InflashError
from ..storage.store import open_store

_ROOT = "zarr.json"


def local_copy(shared: str | Path, folder: str | Path) -> Path:
    """The copy of a store in this node's own folder, made if it is not there.

    Args:
      shared: the store, somewhere that this node reaches.
      folder: on this node's fastest disk; made if it is not there.

    Returns:
      `folder / shared.name`. A copy that was interrupted is not there: it is renamed when it is whole.

    Raises:
      InflashError: `shared` is no store, there is another one of its name in `folder`, or no room.
    """
    shared, folder = Path(shared), Path(folder)
    open_store(shared)
    copy = folder / shared.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{shared.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.glob(f".{glob.escape(shared.name)}.*.tmp"):  # of who was killed: nobody else holds the lock
                shutil.rmtree(left, ignore_errors=True)
            if not copy.exists():
                aside = folder / f".{shared.name}.{os.getpid()}.tmp"
                try:
                    shutil.copytree(shared, aside)
                    aside.rename(copy)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        if (copy / _ROOT).read_bytes() != (shared / _ROOT).read_bytes():
            raise InflashError(f"{copy} is another store than {shared}; remove it, or give another folder")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise InflashError(f"{shared} cannot be copied to {folder}: {where}{error.strerror}") from error
    return copy
