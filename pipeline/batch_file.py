"""The input of a batch run: OpenAI's Batch JSONL, checked whole before the first token is generated."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InflashError
from .sampling_params import SamplingParams

URL = "/v1/completions"
SHOWN_PROBLEMS = 20
LINE_FIELDS = ("custom_id", "method", "url", "body")
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {  # OpenAI's fields that are taken only where they ask for nothing
    "stream": (None, False),
    "stream_options": (None,),
    "echo": (None, False),
    "best_of": (None,),  # or as many as n
    "suffix": (None, ""),
    "logit_bias": (None, {}),
}
BODY_FIELDS = ("model", "prompt", "user", *SAMPLING_FIELDS, *NEUTRAL_VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """One line of a batch file.

    Attributes:
      custom_id: the user's name for it, unique in its file.
      line: its line number, from 1.
      model: the name that the line gives; None where it gives none.
      prompt: text, or token ids (not yet checked against a vocabulary).
      sampling_params: how to continue it.
    """

    custom_id: str
    line: int
    model: str | None
    prompt: str | tuple[int, ...]
    sampling_params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFile:
    """A batch file without a fault.

    Attributes:
      path: where it lies.
      sha256: of its bytes, hexadecimal.
      requests: its lines in order; blank ones are passed over.
    """

    path: Path
    sha256: str
    requests: tuple[BatchRequest, ...]


def read_batch(
    path: str | Path,
    *,
    command_line: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> BatchFile:
    """Reads and checks every line of a batch file.

    Args:
      path: the file, UTF-8.
      command_line: `SamplingParams` fields for requests that do not give them.
      generation_config: the model's defaults for what neither gives.

    Raises:
      InflashError: one that lists the bad lines (the first 20 and their number), or says why there is nothing to read.
    """
    path = Path(path)
    SamplingParams.from_defaults(generation_config or {})  # a fault of the model's file is no line's fault
    digest = hashlib.sha256()
    num_bad = 0
    problems: list[str] = []
    requests: dict[str, BatchRequest] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                try:
                    request = _parse_line(line, number, command_line or {}, generation_config or {})
                    if request.custom_id in requests:
                        first = requests[request.custom_id].line
                        raise InflashError(
                            f"custom_id {_shown(request.custom_id)} is already that of line {first}; make it unique"
                        )
                    requests[request.custom_id] = request
                except InflashError as error:
                    num_bad += 1
                    problems += [f"line {number}: {error}"] if num_bad <= SHOWN_PROBLEMS else []
    except OSError as error:
        raise InflashError(f"batch file {path} cannot be read: {error.strerror}") from error
    if problems:
        raise InflashError(_report(path, problems, num_bad))
    if not requests:
        raise InflashError(f"batch file {path} is empty; expected one JSON object a line, with {', '.join(LINE_FIELDS)}")
    return BatchFile(path=path, sha256=digest.hexdigest(), requests=tuple(requests.values()))


def _report(path: Path, problems: list[str], num_bad: int) -> str:
    count = f"{num_bad} bad line{'s' if num_bad > 1 else ''}"
    more = [f"... and {num_bad - len(problems)} more"] if num_bad > len(problems) else []
    return "\n  ".join([f"batch file {path}: {count}, so nothing was run; correct and start again", *problems, *more])


def _parse_line(line: bytes, number: int, command_line: Mapping[str, Any], generation_config: Mapping[str, Any]) -> BatchRequest:
    document = _parse_json(line)
    _no_unknown(document, LINE_FIELDS, "line")
    custom_id = _text(document, "custom_id")
    if document.get("method") != "POST":
        raise InflashError(f"method should be 'POST', found {_shown(document.get('method'))}")
    if document.get("url") != URL:
        raise InflashError(f"url should be '{URL}' (the only one supported so far), found {_shown(document.get('url'))}")
    body = document.get("body")
    if not isinstance(body, dict):
        raise InflashError(f"body should be an object, found {_shown(body)}")
    _no_unknown(body, BODY_FIELDS, "body")
    _only_neutral(body)
    for name in ("model", "user"):
        if body.get(name) is not None:
            _text(body, name, least=0)
    given = {name: body[name] for name in SAMPLING_FIELDS if body.get(name) is not None}
    params = SamplingParams.from_defaults(generation_config, **{**command_line, **given})
    for string in params.stop_strings:
        _encodable(string, "stop")
    return BatchRequest(
        custom_id=custom_id, line=number, model=body.get("model"), prompt=_prompt(body.get("prompt")), sampling_params=params
    )


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise InflashError(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise InflashError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise InflashError(f"not JSON that can be read: {error}") from error
    if not isinstance(document, dict):
        raise InflashError(f"expected a JSON object, found {_shown(document)}")
    return document


def _refuse_constant(name: str) -> None:
    raise InflashError(f"not JSON: {name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise InflashError(f"fields given twice: {_names(twice)}")
    return document


def _no_unknown(document: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = [name for name in document if name not in known]
    if unknown:
        raise InflashError(f"{where} has unknown fields {_names(unknown)}; supported are {', '.join(known)}")


def _only_neutral(body: dict[str, Any]) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        value = body.get(name)
        if name == "best_of":
            neutral = (None, body.get("n") or 1)
        if not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise InflashError(f"body asks for {name} = {_shown(value)}, which is not supported; leave {name} out")


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        _encodable(prompt, "prompt")
        if prompt:
            return prompt
    elif isinstance(prompt, list) and prompt and all(isinstance(item, (str, list)) for item in prompt):
        raise InflashError("prompt is a list of prompts, of which a line takes one; give each its own line and custom_id")
    elif isinstance(prompt, list):
        for place, token in enumerate(prompt):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise InflashError(f"prompt[{place}] should be a token id (an integer of at least 0), found {_shown(token)}")
        if prompt:
            return tuple(prompt)
    else:
        raise InflashError(f"prompt should be a string or a list of token ids, found {_shown(prompt)}")
    raise InflashError("prompt should not be empty")


def _text(document: dict[str, Any], name: str, *, least: int = 1) -> str:
    value = document.get(name)
    if not isinstance(value, str) or len(value) < least:
        raise InflashError(f"{name} should be a string{', not empty' if least else ''}, found {_shown(value)}")
    _encodable(value, name)
    return value


def _encodable(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InflashError(f"{name} holds half a character (an unpaired surrogate) at character {error.start + 1}") from error


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):  # may be nested too deeply to print
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _names(names: list[str]) -> str:
    return ", ".join(_shown(name) for name in names[:SHOWN_PROBLEMS])
