"""What a batch run has done so far, in Prometheus' text format, for a node exporter's textfile collector or anybody who looks."""

import time
from pathlib import Path

from .batch_run import BatchRun
from .result_file import replace_file
from .step_times import StepTimes

Sample = tuple[str, float]
"""Labels, as they are written, and the value."""


def write_metrics(path: Path, run: BatchRun, times: StepTimes, began: float) -> None:
    """Writes the file, whole or not at all.

    Args:
      path: the file.
      run: whose requests are counted.
      times: of its engine.
      began: when it began, in seconds of the monotonic clock.

    Raises:
      InflashError: it cannot be written.
    """
    replace_file(path, [metrics_text(run, times, time.monotonic() - began).encode()])


def metrics_text(run: BatchRun, times: StepTimes, run_s: float) -> str:
    """The metrics of a run that has taken `run_s` seconds."""
    lines: list[str] = []
    for name, kind, text, samples in _families(run, times, run_s):
        lines += [f"# HELP inflash_{name} {text}", f"# TYPE inflash_{name} {kind}"]
        lines += [f"inflash_{name}{{{labels}}} {value}" if labels else f"inflash_{name} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _families(run: BatchRun, times: StepTimes, run_s: float) -> list[tuple[str, str, str, list[Sample]]]:
    """Name, kind, what it is, and the samples of each."""
    compute_ns = max(times.decode_ns - times.io_wait_ns - times.memory_ns, 0)
    return [
        (
            "requests_total",
            "counter",
            "Requests that have an answer, those of earlier runs of the job included.",
            [('status="completed"', run.completed), ('status="refused"', run.refused), ('status="failed"', run.failed)],
        ),
        ("requests_in_flight", "gauge", "Requests that are being answered.", [("", run.in_flight)]),
        ("requests_waiting", "gauge", "Requests that are not begun.", [("", run.waiting)]),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were processed.", [("", times.prompt_tokens)]),
        ("cached_tokens_total", "counter", "Tokens of prompts that another prompt began with.", [("", times.cached_tokens)]),
        ("decoded_tokens_total", "counter", "Tokens that decoding steps made.", [("", times.tokens)]),
        ("decode_steps_total", "counter", "Decoding steps.", [("", times.steps)]),
        (
            "engine_seconds_total",
            "counter",
            "Wall time of the engine by part: prompts; and of decoding waiting for reads, managing memory, the rest.",
            [
                ('part="prompt"', times.prompt_ns / 1e9),
                ('part="io_wait"', times.io_wait_ns / 1e9),
                ('part="memory"', times.memory_ns / 1e9),
                ('part="compute"', compute_ns / 1e9),
            ],
        ),
        (
            "neurons_total",
            "counter",
            "Predicted neurons by whether they were in the cache, or on their way there.",
            [('result="hit"', times.hits), ('result="miss"', times.misses)],
        ),
        ("prefetched_neurons_total", "counter", "Neurons that were read because of a guess.", [("", times.prefetched)]),
        (
            "read_bytes_total",
            "counter",
            "Bytes of weights that were asked of the loaders.",
            [('phase="prompt"', times.prompt_bytes), ('phase="decode"', times.decode_bytes)],
        ),
        ("run_seconds", "gauge", "How long this run has lasted.", [("", run_s)]),
        ("updated_timestamp_seconds", "gauge", "When this was written, as Unix time.", [("", time.time())]),
    ]
