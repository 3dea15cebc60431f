"""The state of a batch run in OpenAI's words, kept beside its results in `<output>.job.json`.

It remembers what the results were made from, so that a run is never resumed with another input or other settings.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InflashError
from .result_file import replace_file

STATUSES = ("validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled")
WINDOW = "unlimited"  # the Batch object must have one; this run takes what it takes
STAMPS = tuple(f"{status}_at" for status in STATUSES if status != "validating")
_COUNTS = ("total", "completed", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A batch run, as the Batch object describes it.

    Attributes:
      id: "batch_" and a random part.
      endpoint: of all its requests; empty while that is not known.
      input_file_id, output_file_id, error_file_id: the files' paths.
      input_sha256: of the input file; empty while that is not known.
      settings: what else decides the results (model, options), in JSON's types.
      total, completed, failed: requests of the input, those with status 200, those refused or failed.
      status: one of STATUSES.
      errors: for status "failed": line (None for what is no line's), code and message of each fault.
      created_at and the others: Unix times in seconds; None for what did not happen (yet).
    """

    id: str
    endpoint: str = ""
    input_file_id: str
    output_file_id: str
    error_file_id: str | None = None
    input_sha256: str = ""
    settings: dict[str, Any]
    total: int = 0
    completed: int = 0
    failed: int = 0
    status: str = "validating"
    errors: tuple[tuple[int | None, str, str], ...] = ()
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.settings, dict):
            raise InflashError(f"batch job: settings should be an object, found {self.settings!r}")
        if not isinstance(self.error_file_id, str | None):
            raise InflashError(f"batch job: error_file_id should be a string or null, found {self.error_file_id!r}")
        if self.status not in STATUSES:
            raise InflashError(f"batch job: status should be one of {', '.join(STATUSES)}, found {self.status!r}")

    def now(self, status: str, *, errors: Sequence[tuple[int | None, str, str]] = (), **counts: int) -> "BatchJob":
        """The job in another state, with other counts (`completed`, `failed`), and the time noted.

        A job that goes on forgets how it ended before.
        """
        times: dict[str, int | None] = {}
        if status == "in_progress":
            times = dict.fromkeys(STAMPS) | {"in_progress_at": self.in_progress_at or int(time.time())}
        elif f"{status}_at" in STAMPS:
            times[f"{status}_at"] = int(time.time())
        return replace(self, status=status, errors=tuple(errors), **times, **counts)

    def write(self, output: str | Path) -> None:
        """Writes `<output>.job.json`, whole or not at all.

        Raises:
          InflashError: if that is not possible.
        """
        replace_file(job_path(output), [json.dumps(self.to_json(), indent=2).encode(), b"\n"])

    def to_json(self) -> dict[str, Any]:
        """The Batch object, and `input_sha256` and `settings`."""
        document: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        counts = {name: document.pop(name) for name in _COUNTS}
        errors = [{"code": code, "line": line, "message": message, "param": None} for line, code, message in self.errors]
        document["errors"] = {"object": "list", "data": errors} if errors else None
        return document | {"object": "batch", "completion_window": WINDOW, "request_counts": counts}


def job_path(output: str | Path) -> Path:
    """Where the job that writes `output` keeps its state."""
    output = Path(output)
    return output.with_name(output.name + ".job.json")


def new_job(input_file: Path, output: Path, error_file: Path | None) -> BatchJob:
    """A job of which nothing is known yet but its files."""
    return BatchJob(
        id=f"batch_{uuid.uuid4().hex}",
        input_file_id=str(input_file),
        output_file_id=str(output),
        error_file_id=None if error_file is None else str(error_file),
        settings={},
        created_at=int(time.time()),
    )


def resumed_job(new: BatchJob, output: Path, held: Path | None = None) -> BatchJob:
    """The job that left results in `output`, if it is the same one as `new`. Writes nothing.

    Args:
      new: a job whose input and settings are known.
      output: the result file.
      held: the file that has the results, if that is another one.

    Raises:
      InflashError: if the results there were made from another input or with other settings, or nobody knows from what.
    """
    old, settings = _read_job(output, held or output), json.loads(json.dumps(new.settings))
    differing = [] if old.input_sha256 == new.input_sha256 else ["the input file's content"]
    for name in sorted({*old.settings, *settings}):
        before, after = old.settings.get(name), settings.get(name)
        if before != after:
            differing.append(f"{name} (was {json.dumps(before)}, is {json.dumps(after)})")
    if (before := old.error_file_id) and _holds_results(before, new.error_file_id):  # else they would fail again, in another file
        differing.append(f"error-file (was {before}, is {new.error_file_id or 'none'})")
    if differing:
        raise InflashError(
            f"result file {output} was made with something else: {', '.join(differing)}; "
            "run as before, choose another output, or --no-resume to overwrite it"
        )
    return replace(new, id=old.id, created_at=old.created_at, in_progress_at=old.in_progress_at)


def _holds_results(file: str, now: str | None) -> bool:
    """Whether there is something in a file other than the one that is given now."""
    path = Path(file)
    return path.is_file() and path.stat().st_size > 0 and (now is None or path.resolve() != Path(now).resolve())


def _read_job(output: Path, held: Path) -> BatchJob:
    path = job_path(output)
    try:
        document = json.loads(path.read_bytes())
        kept = (
            "id",
            "input_file_id",
            "output_file_id",
            "error_file_id",
            "input_sha256",
            "settings",
            "created_at",
            "in_progress_at",
        )
        return BatchJob(**{name: document[name] for name in kept})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InflashError(
            f"result file {held} holds results, but {path}, which says what they were made from, cannot be read ({error}); "
            f"choose another {'output' if held == output else 'error file'}, or --no-resume to overwrite it"
        ) from error
