"""What a watched run was, in one document: `profile.json`, from which the report is drawn, and beside it `trace.json`."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InflashError
from ..pipeline.live import about_run
from ..pipeline.options import EngineOptions
from ..pipeline.plan import plan_from_options
from ..pipeline.step_times import StepTimes
from ..pipeline.trace import REQUEST, STEP
from ..pipeline.trace_area import WriterTrace
from ..storage.layout import bundles_path
from ..storage.predictor_layout import predictor_bytes
from ..storage.read_rate import read_rate
from ..storage.shard_index import open_raw_array
from ..storage.store import Store
from .chrome_trace import write_trace
from .energy import estimate
from .profile_figures import engine_figures, read_figures, recall_figures, working_set
from .profile_report import write_report
from .profiler import Watch, exit_code
from .run_diagnosis import limits

_CURVE_SIZES, _CURVE_DEPTHS, _CURVE_S = (4096, 16384, 65536, 262144), (1, 16, 128), 0.08  # and a bundle's own size


def write_outputs(folder: Path, store: Store, watch: Watch, words: list[str], device: dict[str, Any] | None) -> list[str]:
    """Writes `trace.json`, `profile.json` and `report.html` into `folder`; returns the sentences about what limits the run."""
    traces = [watch.area.read(number) for number in watch.area.process_ids()]
    document = profile_document(store, watch, traces, words, device or measure_device(store))
    notes = {"command": document["command"], "ended": document["ended"], "lost_records": document["lost_records"]}
    write_trace(folder / "trace.json", traces, document["processes"], watch.origin_ns, notes)
    (folder / "profile.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    write_report(folder / "report.html", document)
    return document["limits"]


def _about_nothing(store: Store) -> dict[str, Any]:
    """For a run that ended before its engine could tell: one that has not even looked for a predictor."""
    options = EngineOptions(ffn="hybrid")
    return about_run(store, options, plan_from_options(store, options), native=False)


def profile_document(
    store: Store, watch: Watch, traces: list[WriterTrace], words: list[str], device: dict[str, Any]
) -> dict[str, Any]:
    """The whole document; docs/cli.md lists its keys."""
    engine, loaders = traces[0], traces[1:]
    about = watch.about or _about_nothing(store)
    times = watch.counters.times if watch.counters else StepTimes()
    steps = engine.records[engine.records["kind"] == STEP]
    layers, named = watch.area.named_neurons()
    sampled = watch.sampler.document(watch.origin_ns)
    document: dict[str, Any] = {
        "version": __version__,
        "command": words,
        "machine": {"processors": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()},
        "model": _model(store),
        "options": about["options"],
        "predictor": about["predictor"],
        "prefetch": about["prefetch"],
        "kernels": about["kernels"],
        "ended": {"exit_code": exit_code(watch.code), "what": _ending(watch.code, loaders)},
        "lost_records": {trace.name: trace.lost for trace in traces},
        "run": times.summary(),
        "sequences": float(steps["value"].mean()) if len(steps) else 0.0,
        "cache": {"share": about["cache_share"]},
        **engine_figures(engine.records),
        "reads": read_figures(engine.records, loaders, about["queue_depth"] * len(loaders)),
        "device": device,
        "working_set": working_set(watch.area.sampled, named),
        "working_set_steps": len(layers),
        "processes": {trace.name: sampled[trace.name] for trace in traces if trace.name in sampled},
        "predictor_recall": recall_figures(engine.records),
        "profiler_cpu_s": watch.own_cpu_s,
    }
    document["engine_queue_wait_share"] = _queue_wait_share(document["processes"].get("engine"))
    document["traffic"] = traffic(store, document)
    document["energy"] = _energy(watch, document)
    document["limits"] = limits(document)
    return document


def _model(store: Store) -> dict[str, Any]:
    config = store.config
    sizes = {name: getattr(config, name) for name in ("num_layers", "d_model", "d_ff", "vocab_size")}
    return {"path": str(store.path), **sizes, "dtype": store.dtype, "bundle_bytes": store.bundles.bundle_bytes}


def _ending(code: int, loaders: list[WriterTrace]) -> str:
    """How the run ended, in words."""
    unfinished = [trace.name for trace in loaders if ((trace.records["kind"] == REQUEST) & (trace.records["end_ns"] == 0)).any()]
    what = {0: "completed", 1: "failed while running", 2: "refused its input", 130: "interrupted"}.get(code, f"ended with {code}")
    if code < 0:
        what = f"the engine was ended by signal {-code}"
    return f"{what}; in the middle of a read: {', '.join(unfinished)}" if code and unfinished else what


def _queue_wait_share(engine: dict[str, Any] | None) -> float | None:
    """Of the time that the engine's threads were ready to run, how much they stood in line for a processor."""
    if engine is None:
        return None
    samples = engine["samples"]
    waits = [
        (wait, user + system)
        for wait, user, system in zip(*(samples[k] for k in ("queue_wait_s", "user_s", "system_s")), strict=True)
    ]
    known = [(wait, cpu) for wait, cpu in waits if wait is not None]
    if len(known) < 2:
        return None
    waited, ran = known[-1][0] - known[0][0], known[-1][1] - known[0][1]
    return waited / (waited + ran) if waited + ran > 0 else None


def traffic(store: Store, document: dict[str, Any]) -> dict[str, float]:
    """Bytes of weights that a decoding step reads from DRAM, and its multiplications with additions; docs/performance.md has the sum."""
    config, options = store.config, document["options"]
    item = 4 if "float32" in (options["compute_dtype"], store.dtype) else 2
    layer_weights = config.num_layers * 4 * config.d_model**2 + config.vocab_size * config.embed_dim
    named = sum(layer["hits"] + layer["misses"] for layer in document["layers"])
    if options["ffn"] != "sparse":
        named = config.num_layers * config.d_ff
    neurons = named * config.num_parts * config.d_model
    predictors = [store.predictors[name] for name in (document["predictor"], document["prefetch"]) if name in store.predictors]
    predicting = sum(predictor_bytes(config, info) for info in predictors)
    if document["predictor"] == "exact":
        predicting = config.num_layers * config.d_ff * config.d_model * item
    return {
        "dram_bytes_per_step": layer_weights * item + neurons * store.bundles.row_bytes / config.d_model + predicting,
        "operations_per_step": document["sequences"] * (layer_weights + neurons + predicting / item),
    }


def _energy(watch: Watch, document: dict[str, Any]) -> dict[str, Any]:
    joules = watch.meter.joules()
    tokens = max(document["run"]["tokens"], 1)
    if joules is not None:
        total = sum(joules.values())
        return {
            "estimated": False,
            "joules": joules,
            "total_joules": total,
            "joules_per_token": total / tokens,
            "constants": None,
        }
    steps, moved = document["token"]["steps"], document["traffic"]
    found = estimate(
        flash_bytes=steps * document["reads"]["bytes_per_step"],
        dram_bytes=steps * moved["dram_bytes_per_step"],
        operations=steps * moved["operations_per_step"],
    )
    return {**found, "joules_per_token": found["total_joules"] / tokens}


def measure_device(store: Store) -> dict[str, Any]:
    """A short curve of random reads of the store's own first layer, past the page cache; empty where that is refused."""
    file, size = open_raw_array(store.path / bundles_path(0)).file, store.bundles.layer_bytes
    curve: list[dict[str, Any]] = []
    try:
        for read in sorted({*(read for read in _CURVE_SIZES if read <= size), -(-store.bundles.bundle_bytes // 4096) * 4096}):
            for depth in _CURVE_DEPTHS:
                rate = max(read_rate(file, size, read, depth, _CURVE_S) for _ in range(2))  # what disturbs one spares the other
                curve.append({"size": read, "depth": depth, "bytes_per_s": rate})
    except (InflashError, OSError) as error:
        return {"source": f"not measured: {error}", "read_curve": []}
    return {"source": "measured after the run", "read_curve": curve}
