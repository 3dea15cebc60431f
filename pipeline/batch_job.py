"""The state of a batch run in OpenAI's words, kept beside its results in `<output>.job.json`.

It remembers what the results were made from, so that a run is never resumed with another input or other settings.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InflashError
from .batch_file import URL
from .batch_results import replace_file

STATUSES = ("validating", "failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """A batch run, as the Batch object describes it.

    Attributes:
      id: "batch_" and a random part.
      input_sha256: of the input file.
      settings: what else decides the results (model, options), in JSON's types.
      total, completed, failed: requests of the input, those with status 200, those refused or failed.
      status: one of STATUSES.
      created_at, in_progress_at, completed_at: Unix times in seconds; None for what did not happen yet.
    """

    id: str
    input_sha256: str
    settings: dict[str, Any]
    total: int
    completed: int = 0
    failed: int = 0
    status: str = "validating"
    created_at: int
    in_progress_at: int | None = None
    completed_at: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.settings, dict):
            raise InflashError(f"batch job: settings should be an object, found {self.settings!r}")
        if self.status not in STATUSES:
            raise InflashError(f"batch job: status should be one of {', '.join(STATUSES)}, found {self.status!r}")

    def now(self, status: str, **counts: int) -> "BatchJob":
        """The job in another state, with other counts (`completed`, `failed`) and the time of its first entry noted."""
        stamp = f"{status}_at"
        times = {stamp: int(time.time())} if stamp in ("in_progress_at", "completed_at") and getattr(self, stamp) is None else {}
        return replace(self, status=status, **times, **counts)

    def write(self, output: str | Path) -> None:
        """Writes `<output>.job.json`, whole or not at all.

        Raises:
          InflashError: if that is not possible.
        """
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        counts = {name: document.pop(name) for name in ("total", "completed", "failed")}
        document |= {"object": "batch", "endpoint": URL, "request_counts": counts}
        replace_file(job_path(output), [json.dumps(document, indent=2).encode(), b"\n"])


def job_path(output: str | Path) -> Path:
    """Where the job that writes `output` keeps its state."""
    output = Path(output)
    return output.with_name(output.name + ".job.json")


def open_job(
    output: str | Path, *, input_sha256: str, settings: dict[str, Any], total: int, finished: Mapping[str, bool]
) -> BatchJob:
    """A new job, or the one that left results in `output`. Writes nothing.

    Args:
      output: the result file.
      input_sha256: of the input file.
      settings: what else decides the results, in JSON's types.
      total: requests of the input.
      finished: what `finished_ids` finds in the output (and in the error file, if there is one); empty for a new job.

    Raises:
      InflashError: if the results there were made from another input or with other settings, or nobody knows from what.
    """
    settings = json.loads(json.dumps(settings))
    new = BatchJob(
        id=f"batch_{uuid.uuid4().hex}",
        input_sha256=input_sha256,
        settings=settings,
        total=total,
        created_at=int(time.time()),
    )
    if not finished:
        return new
    old = _read_job(output)
    differing = [] if old.input_sha256 == input_sha256 else ["the input file's content"]
    for name in sorted({*old.settings, *settings}):
        before, after = old.settings.get(name), settings.get(name)
        if before != after:
            differing.append(f"{name} (was {json.dumps(before)}, is {json.dumps(after)})")
    if differing:
        raise InflashError(
            f"result file {output} was made with something else: {', '.join(differing)}; "
            "run as before, choose another output, or --no-resume to overwrite it"
        )
    completed = sum(finished.values())
    return replace(old, completed=completed, failed=len(finished) - completed, completed_at=None)


def _read_job(output: str | Path) -> BatchJob:
    path = job_path(output)
    try:
        document = json.loads(path.read_bytes())
        counts = document.pop("request_counts")
        known = {field.name for field in fields(BatchJob)} & set(document)
        return BatchJob(**{name: document[name] for name in known}, total=counts["total"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InflashError(
            f"result file {output} holds results, but {path}, which says what they were made from, cannot be read ({error}); "
            "choose another output, or --no-resume to overwrite it"
        ) from error
