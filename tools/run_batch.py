"""`inflash run-batch`: a file of requests in, a file of responses out, whatever happens in between."""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..pipeline.batch_file import BatchFile, read_batch
from ..pipeline.batch_job import BatchJob, open_job
from ..pipeline.batch_results import ResultWriter, drop_unsuccessful, failed_line, finished_ids, refused_line, success_line
from ..pipeline.model_files import generation_config
from ..storage.store import open_store
from . import arguments as flags
from .progress import progress_bar
from .table import cost_table

FREE_OPTIONS = frozenset(
    {"prefetch", "overlap", "merge_gap", "loaders", "queue_depth", "verify", "max_num_seqs", "max_model_len"}
)
"""What may change when a run is resumed: it decides how much memory and time a run takes, not what it is asked for."""


def run(arguments: argparse.Namespace) -> int:
    options = flags.engine_options(arguments)
    output, error_file = arguments.output_file, arguments.error_file
    _check_files(arguments)
    batch = read_batch(arguments.input_file, generation_config=generation_config(open_store(arguments.model)))
    finished: dict[str, bool] = {}
    if arguments.resume:
        finished = finished_ids(output) | (finished_ids(error_file) if error_file else {})
    kept = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    settings = {"model": str(arguments.model.resolve()), **kept}
    job = open_job(output, input_sha256=batch.sha256, settings=settings, total=len(batch.requests), finished=finished)
    if arguments.resume and arguments.retry_failed:
        for path in filter(None, (output, error_file)):
            drop_unsuccessful(path)
        finished = {custom_id: True for custom_id, succeeded in finished.items() if succeeded}
    with _terminating_like_interrupt():
        return _run_job(arguments, batch, job, finished)


def _run_job(arguments: argparse.Namespace, batch: BatchFile, job: BatchJob, finished: dict[str, bool]) -> int:
    from ..pipeline.llm import LLM

    counts = {"completed": sum(finished.values()), "failed": len(finished) - sum(finished.values())}
    summary: dict[str, Any] = {}
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(arguments.model, **asdict(flags.engine_options(arguments))))
        writer = stack.enter_context(ResultWriter(arguments.output_file, resume=arguments.resume))
        error_writer = writer
        if arguments.error_file:
            error_writer = stack.enter_context(ResultWriter(arguments.error_file, resume=arguments.resume))
        job = job.now("in_progress", **counts)
        job.write(arguments.output_file)
        try:
            for line, succeeded in _answers(llm, batch, finished, arguments):
                (writer if succeeded else error_writer).write(line)
                counts["completed" if succeeded else "failed"] += 1
        except KeyboardInterrupt:
            job.now("cancelled", **counts).write(arguments.output_file)
            raise
        except BaseException:
            job.now("failed", **counts).write(arguments.output_file)
            raise
        summary = llm.run_summary()
    job.now("completed", **counts).write(arguments.output_file)
    counts = {"total": len(batch.requests), **counts}
    if arguments.json:
        print(json.dumps({"output_file": str(arguments.output_file), "request_counts": counts, "run": summary}))
    else:
        print(f"{counts['completed']} completed, {counts['failed']} failed of {counts['total']}: {arguments.output_file}")
        print(cost_table(summary))
    return 0


def _answers(
    llm: Any, batch: BatchFile, finished: dict[str, bool], arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The result line of every request that has none yet, and whether it succeeded, as they come."""
    model = str(arguments.model)
    requests = []
    for number, entry in enumerate(batch.requests):
        if entry.custom_id in finished:
            continue
        try:
            requests.append(llm.make_request(entry.custom_id, entry.prompt, entry.sampling_params, number))
        except InflashError as error:
            yield refused_line(entry.custom_id, str(error), param="prompt"), False
    with progress_bar(total=len(batch.requests), initial=len(batch.requests) - len(requests), unit="request") as bar:
        tokens, began = 0, time.monotonic()

        def count(num_tokens: int) -> None:
            nonlocal tokens, began
            began = began if tokens else time.monotonic()  # what came before the first token was compiling
            tokens += num_tokens
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - began, 1e-3):.1f} tokens/s", refresh=False)
            bar.update(0)

        for output in llm.stream(requests, count):
            failure = next((completion.failure for completion in output.outputs if completion.failure), None)
            if failure is None:
                yield success_line(output.request_id, output, model, int(time.time())), True
            else:
                yield failed_line(output.request_id, "model_error", failure), False
            bar.update()


def _check_files(arguments: argparse.Namespace) -> None:
    paths: dict[str, Path | None] = {
        "--input-file": arguments.input_file,
        "--output-file": arguments.output_file,
        "--error-file": arguments.error_file,
    }
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            raise InflashError(f"{path}: {other} and {name} name the same file; give each its own")


@contextmanager
def _terminating_like_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: what is finished is in the file, the job says cancelled."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
