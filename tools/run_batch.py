"""`inflash run-batch`: a file of requests in, a file of responses out, whatever happens in between."""

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..errors import InflashError, RunError
from ..pipeline.batch_file import STANDARD_INPUT, BatchFile, BatchFileError, read_batch
from ..pipeline.batch_job import BatchJob, new_job, resumed_job
from ..pipeline.batch_outputs import OPEN, SUCCEEDED, UNSUCCESSFUL, BatchOutputs
from ..pipeline.model_files import generation_config
from ..pipeline.result_file import STANDARD_OUTPUT
from ..pipeline.result_writer import ResultWriter
from ..pipeline.step_times import StepTimes
from ..storage.store import Store, open_store
from . import arguments as flags
from .progress import bytes_bar, progress_bar
from .table import cost_table

if TYPE_CHECKING:
    from ..pipeline.batch_run import BatchRun
    from ..pipeline.run_size import RunSize

DONE, STOPPED = 0, 3
_COLLECTED_EVERY = 20_000  # objects; a run makes few cycles, and JAX does work of its own at each collection
FREE_OPTIONS = frozenset(
    {"prefetch", "overlap", "merge_gap", "loaders", "queue_depth", "verify", "max_num_seqs", "max_model_len"}
)
"""What may change when a run is resumed: it decides how much memory and time a run takes, not what it is asked for."""


class _State:
    """The job as it stands, and its file, if it has one."""

    def __init__(self, job: BatchJob, path: Path | None) -> None:
        self.job, self._path = job, path

    def now(self, status: str, **changes: Any) -> None:
        self.job = self.job.now(status, **changes)
        self.write()

    def write(self) -> None:
        if self._path is not None:
            self.job.write(self._path)

    def note(self, status: str, **changes: Any) -> None:
        """Says it where that is possible: a disk that takes nothing must not cost finished results."""
        try:
            self.now(status, **changes)
        except InflashError as error:
            _tell(str(error))


def run(arguments: argparse.Namespace) -> int:
    _check_files(arguments)
    flags.engine_options(arguments)
    store, stop = open_store(arguments.model), _Stop()
    with stop.hearing(), BatchOutputs(arguments.output_file, arguments.error_file) as outputs:
        if not outputs.resumable:
            _tell("results go to standard output or a pipe: this run cannot be resumed")
        job = new_job(arguments.input_file, arguments.output_file, arguments.error_file)
        state = _State(job, arguments.output_file if outputs.resumable else None)
        if outputs.fresh:
            state.write()
        try:
            with _read(arguments, store) as batch:
                return _run_checked(arguments, store, batch, outputs, state, stop)
        except InflashError as error:
            if outputs.fresh and state.job.status == "validating":
                problems = error.problems if isinstance(error, BatchFileError) else [(None, str(error))]
                state.note("failed", errors=[(line, "invalid_request", message) for line, message in problems])
            raise
        except KeyboardInterrupt:
            if outputs.fresh and state.job.status == "validating":
                state.note("cancelled")
            raise


def _read(arguments: argparse.Namespace, store: Store) -> BatchFile:
    path: Path = arguments.input_file
    size = path.stat().st_size if path != STANDARD_INPUT and path.is_file() else None
    with bytes_bar(size, "checking") as bar:
        return read_batch(path, generation_config=generation_config(store), on_bytes=bar.update)


def _run_checked(
    arguments: argparse.Namespace, store: Store, batch: BatchFile, outputs: BatchOutputs, state: _State, stop: "_Stop"
) -> int:
    """Finds out what is left to do, and does it."""
    settings = _settings(arguments, store)
    state.job = replace(state.job, endpoint=batch.url, input_sha256=batch.sha256, settings=settings, total=len(batch))
    finished = _finished(arguments, outputs, batch, state)
    counts = {"completed": int(np.sum(finished == SUCCEEDED)), "failed": int(np.sum(finished == UNSUCCESSFUL))}
    state.job = replace(state.job, **counts)
    if np.all(finished != OPEN):  # there is nothing to load a model for
        outputs.begin(resume=True)
        state.now("completed")
        _report(arguments, state.job, {**StepTimes().summary(), "predicted": None})
        return DONE
    return _run_job(arguments, batch, outputs, finished, state, stop)


def _settings(arguments: argparse.Namespace, store: Store) -> dict[str, Any]:
    """What decides the texts beside the requests."""
    from ..pipeline.predictors import choose_predictor

    options = flags.engine_options(arguments)
    kept = {name: value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    if options.ffn == "sparse":
        kept["predictor"] = choose_predictor(store, options.predictor)  # "auto" may mean another one tomorrow
    return {"model": str(arguments.model.resolve()), **kept}


def _finished(arguments: argparse.Namespace, outputs: BatchOutputs, batch: BatchFile, state: _State) -> np.ndarray:
    """What earlier runs have answered, as `BatchOutputs.finished` says it."""
    if outputs.fresh or not arguments.resume or not outputs.resumable:
        return np.full(len(batch), OPEN, np.int8)
    state.job = resumed_job(state.job, arguments.output_file, outputs.held)
    finished = outputs.finished(batch)
    if arguments.retry_failed:
        outputs.drop_unsuccessful()
        finished[finished == UNSUCCESSFUL] = OPEN
    return finished


def _run_job(
    arguments: argparse.Namespace, batch: BatchFile, outputs: BatchOutputs, finished: np.ndarray, state: _State, stop: "_Stop"
) -> int:
    from ..pipeline.batch_run import BatchRun
    from ..pipeline.llm import LLM

    running: BatchRun | None = None

    def counts() -> dict[str, int]:
        return {} if running is None else {"completed": running.completed, "failed": running.refused + running.failed}

    try:
        with LLM(arguments.model, **asdict(flags.engine_options(arguments))) as llm:
            limit = {"pause_limit_s": arguments.pause_limit, "tell": _tell}
            with ResultWriter(*outputs.take(), **limit) as writer:
                running = BatchRun(llm, batch, finished != OPEN, writer, model=str(arguments.model))
                running.completed, running.failed = state.job.completed, state.job.failed
                with progress_bar(total=int(np.sum(finished == OPEN)), unit="request", desc="measuring", delay=2) as bar:
                    size = running.measure(bar.update)
                # Only now: what is to be overwritten may be all there is.
                outputs.begin(resume=arguments.resume and outputs.resumable)
                state.now("in_progress", **counts())
                _answer(arguments, running, size, state, stop)
                if running.draining and not writer.ready:
                    writer.close(hurry=True)
                state.note("finalizing", **counts())
            summary = llm.run_summary()
    except KeyboardInterrupt:
        state.note("cancelled", **counts())
        raise
    except BaseException as error:
        state.note("failed", errors=[(None, "run_failed", str(error) or type(error).__name__)], **counts())
        raise
    stopped = running.waiting > 0
    state.note("cancelled" if stopped else "completed", **counts())
    _report(arguments, state.job, summary)
    return STOPPED if stopped else DONE


def _answer(arguments: argparse.Namespace, run: "BatchRun", size: "RunSize", state: _State, stop: "_Stop") -> None:
    """Runs what is open, with progress, reports and an ear for signals."""
    from ..pipeline.metrics import write_metrics
    from ..pipeline.reporter import Reporter

    def keep_job() -> None:
        counts = {"completed": run.completed, "failed": run.refused + run.failed}
        if run.draining and state.job.status == "in_progress":
            state.job = state.job.now("cancelling")
        state.job = replace(state.job, **counts)
        state.write()

    actions = [keep_job]
    if arguments.metrics is not None:
        actions.append(partial(write_metrics, arguments.metrics, run, run.times, time.monotonic()))
        actions[-1]()  # a file that cannot be written is found before the work begins
    answered = run.completed + run.refused + run.failed
    with (
        Reporter(actions, _tell),
        progress_bar(total=answered + run.waiting, initial=answered, unit="request") as bar,
        stop.draining(run),
    ):
        tokens, began = 0, 0.0

        def on_tokens(num_tokens: int) -> None:
            nonlocal tokens, began
            if not began:
                began = time.monotonic()  # time runs from the first tokens on: what came before them was compiling
                return
            tokens += num_tokens
            times = run.times
            hits = f", {times.hits / (times.hits + times.misses):.0%} hits" if times.hits else ""
            bar.set_postfix_str(f"{tokens / (time.monotonic() - began):.1f} tokens/s{hits}", refresh=False)
            bar.update(0)

        gc.freeze()  # modules and compiled kernels stay: no collection needs to go through them again
        thresholds = gc.get_threshold()
        gc.set_threshold(_COLLECTED_EVERY, *thresholds[1:])
        try:
            with _told_as_failures():
                run.run(size, on_tokens, bar.update)
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()


@contextmanager
def _told_as_failures() -> Iterator[None]:
    """The file and the flags were sound: what is wrong now came while running."""
    try:
        yield
    except (RunError, BrokenPipeError):
        raise
    except InflashError as error:
        raise RunError(f"{error}; finished results are kept, run again to go on") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(f"{where}{error.strerror or error}; finished results are kept, run again to go on") from error


def _report(arguments: argparse.Namespace, job: BatchJob, summary: dict[str, Any]) -> None:
    counts = {"total": job.total, "completed": job.completed, "failed": job.failed}
    if arguments.json:
        document = {"output_file": str(arguments.output_file), "status": job.status, "request_counts": counts, "run": summary}
        print(json.dumps(document))
        return
    file = sys.stderr if arguments.output_file == STANDARD_OUTPUT else sys.stdout
    stopped = "; stopped, run again to go on" if job.status == "cancelled" else ""
    print(f"{job.completed} completed, {job.failed} failed of {job.total}: {arguments.output_file}{stopped}", file=file)
    print(cost_table(summary), file=file)


def _check_files(arguments: argparse.Namespace) -> None:
    paths: dict[str, Path | None] = {
        "--input-file": arguments.input_file if arguments.input_file != STANDARD_INPUT else None,
        "--output-file": arguments.output_file if arguments.output_file != STANDARD_OUTPUT else None,
        "--error-file": arguments.error_file,
        "--metrics": arguments.metrics,
    }
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            raise InflashError(f"{path}: {other} and {name} name the same file; give each its own")
    if arguments.metrics is not None and not arguments.metrics.parent.is_dir():
        raise InflashError(
            f"--metrics {arguments.metrics}: there is no folder {arguments.metrics.parent}; make it, or choose another place"
        )
    if arguments.json and arguments.output_file == STANDARD_OUTPUT:
        raise InflashError("--json prints to standard output, where -o - writes the results; leave one of them out")


def _tell(message: str) -> None:
    """A line on standard error, above the progress bar."""
    tqdm.write(f"inflash: {message}", file=sys.stderr)


class _Stop:
    """Hears SIGTERM and Ctrl-C: what is in flight may finish; the second of them, or one when nothing runs, ends at once."""

    def __init__(self) -> None:
        self.run: BatchRun | None = None

    def __call__(self, *_: object) -> None:
        if self.run is None or self.run.draining:
            raise KeyboardInterrupt
        self.run.draining = True
        message = (
            f"\ninflash: stopping: requests are being finished ({self.run.in_flight} in flight), once more to stop at once\n"
        )
        os.write(2, message.encode())  # print might be in the middle of another line

    @contextmanager
    def hearing(self) -> Iterator[None]:
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def draining(self, run: "BatchRun") -> Iterator[None]:
        self.run = run
        try:
            yield
        finally:
            self.run = None
