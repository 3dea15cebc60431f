"""Reads the small JSON files that lie beside weights."""

import json
from pathlib import Path
from typing import Any

from ..errors import InflashError


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      InflashError: the file is missing or unreadable, or is not one JSON object in UTF-8.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InflashError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise InflashError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(document, dict):
        raise InflashError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document
