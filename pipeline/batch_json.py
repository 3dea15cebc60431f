"""One line of a batch file as strict JSON, and how its values are told in a message."""

import json
from collections import Counter
from typing import Any

from ..errors import InflashError

MOST_NAMES = 20


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
      InflashError: not UTF-8, not JSON (NaN and Infinity are not), no object, or a field given twice.
    """
    try:
        document = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise InflashError(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise InflashError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise InflashError(f"not JSON that can be read: {error}") from error
    if not isinstance(document, dict):
        raise InflashError(f"expected a JSON object, found {shown(document)}")
    return document


def text_field(document: dict[str, Any], name: str, *, least: int = 1) -> str:
    """A field that should be a string.

    Raises:
      InflashError: it is not, is shorter than `least`, or is no text that UTF-8 can hold.
    """
    value = document.get(name)
    if not isinstance(value, str) or len(value) < least:
        raise InflashError(f"{name} should be a string{', not empty' if least else ''}, found {shown(value)}")
    check_encodable(value, name)
    return value


def check_encodable(text: str, name: str) -> None:
    """Refuses half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InflashError(f"{name} holds half a character (an unpaired surrogate) at character {error.start + 1}") from error


def check_known(document: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuses fields that nobody would look at."""
    unknown = [name for name in document if name not in known]
    if unknown:
        raise InflashError(f"{where} has unknown fields {_names(unknown)}; supported are {', '.join(known)}")


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, (dict, list)):  # may be nested too deeply to print
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> None:
    raise InflashError(f"not JSON: {name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise InflashError(f"fields given twice: {_names(twice)}")
    return document


def _names(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:MOST_NAMES])
