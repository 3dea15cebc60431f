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
from ..pipeline.trace import PROMPT, REQUEST, STEP
from ..pipeline.trace_area import WriterTrace
from ..storage.layout import bundles_path
from ..storage.predictor_layout import predictor_bytes
from ..storage.read_rate import read_rate
from ..storage.shard_index import open_raw_array
from ..storage.store import Store
from .chrome_trace import write_trace
from .decoding_usage import decoding_usage
from .energy import estimate
from .profile_figures import decoding_span_ns, engine_figures, read_figures, recall_figures, working_set
from .profile_report import write_report
from .profiler import Watch, exit_code
from .run_advice import advice
from .run_diagnosis import advice_text, limits

_CURVE_SIZES, _CURVE_DEPTHS, _CURVE_S = (4096, 16384, 65536, 262144), (1, 16, 128), 0.08  # and a bundle's own size


def write_outputs(folder: Path, store: Store, watch: Watch, words: list[str], device: dict[str, Any] | None) -> list[str]:
    """Writes `trace.json`, `profile.json` and `report.html` into `folder`; returns what limits the run and what would help."""
    traces = [watch.area.read(number) for number in watch.area.process_ids()]
    document = profile_document(store, watch, traces, words, device or measure_device(store))
    notes = {"command": document["command"], "ended": document["ended"], "lost_records": document["lost_records"]}
    write_trace(folder / "trace.json", traces, document["processes"], watch.origin_ns, notes)
    (folder / "profile.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    write_report(folder / "report.html", document)
    return [*document["limits"], *(one["text"] for one in document["advice"])]


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
    steps, span = engine.records[engine.records["kind"] == STEP], decoding_span_ns(engine.records)
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
        "look_ahead": sorted(name for name, info in store.predictors.items() if info.ahead),
        **engine_figures(engine.records),
        "start_s": _start_s(engine, watch.origin_ns),
        "reads": read_figures(engine.records, loaders, about["queue_depth"] * len(loaders)),
        "device": device,
        "working_set": working_set(watch.area.sampled, named),
        "working_set_steps": len(layers),
        "processes": {trace.name: sampled[trace.name] for trace in traces if trace.name in sampled},
        "predictor_recall": recall_figures(engine.records),
        "profiler_cpu_s": watch.own_cpu_s,
    }
    _conclude(document, store, watch, span)
    return document


def _conclude(document: dict[str, Any], store: Store, watch: Watch, span: tuple[int, int] | None) -> None:
    """Adds what follows from the figures: what decoding used, and what would make it faster."""
    document["decoding"] = _decoding(document, span, watch.origin_ns)
    document["engine_queue_wait_share"] = _queue_wait_share(document["decoding"]["processes"].get("engine"))
    document["traffic"] = traffic(store, document)
    document["energy"] = _energy(watch, document, span)
    found = advice(document) if document["token"]["steps"] else []
    document["advice"] = [
        {"title": one.title, "text": advice_text(one, document["token"]["total_ms"]), "saves_ms": one.saves_ms} for one in found
    ]
    document["limits"] = limits(document, found)


def _model(store: Store) -> dict[str, Any]:
    config = store.config
    sizes = {name: getattr(config, name) for name in ("num_layers", "d_model", "d_ff", "vocab_size")}
    return {"path": str(store.path), **sizes, "dtype": store.dtype, "bundle_bytes": store.bundles.bundle_bytes}


def _ending(code: int, loaders: list[WriterTrace]) -> str:
    """How the run ended, in words."""
    unfinished = [trace.name for trace in loaders if ((trace.records["kind"] == REQUEST) & (trace.records["end_ns"] == 0)).any()]
    words = {0: "completed", 1: "failed while running", 2: "refused its input", 130: "interrupted", 143: "ended by SIGTERM"}
    what = words.get(code, f"ended with {code}")
    if code < 0:
        what = f"the engine was ended by signal {-code}"
    return f"{what}; in the middle of a read: {', '.join(unfinished)}" if code and unfinished else what


def _start_s(engine: WriterTrace, origin_ns: int) -> float | None:
    """From the command until the first prompt was begun; None: none was, or the spans of that time are lost."""
    prompts = engine.records[engine.records["kind"] == PROMPT]
    return None if engine.lost or not len(prompts) else (int(prompts["begin_ns"][0]) - origin_ns) / 1e9


def _decoding(document: dict[str, Any], span: tuple[int, int] | None, origin_ns: int) -> dict[str, Any]:
    """What processes used from the first decoding step to the last: by process, and the sums that advice needs, in ms a step."""
    begin_s, end_s = ((at - origin_ns) / 1e9 for at in span or (origin_ns, origin_ns))
    used = {name: decoding_usage(process["samples"], begin_s, end_s) for name, process in document["processes"].items()}
    steps = max(document["token"]["steps"], 1)
    loaders = [process for name, process in used.items() if name != "engine"]

    def ms(processes: list[dict[str, float | None]], *totals: str) -> float | None:
        amounts = [process[total] for process in processes for total in totals]
        known = [amount for amount in amounts if amount is not None]
        return 1e3 * sum(known) / steps if known else None

    return {
        "begin_s": begin_s if span else None,
        "s": end_s - begin_s,
        "loader_cpu_ms": ms(loaders, "user_s", "system_s"),
        "loader_queue_wait_ms": ms(loaders, "queue_wait_s"),
        "engine_queue_wait_ms": ms([used["engine"]], "queue_wait_s") if "engine" in used else None,
        "processes": used,
    }


def _queue_wait_share(engine: dict[str, float | None] | None) -> float | None:
    """Of the time that the engine's threads were ready to run while decoding, how much they stood in line for a processor."""
    if engine is None or engine["queue_wait_s"] is None or engine["user_s"] is None or engine["system_s"] is None:
        return None
    waited, ran = engine["queue_wait_s"], engine["user_s"] + engine["system_s"]
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


def _energy(watch: Watch, document: dict[str, Any], span: tuple[int, int] | None) -> dict[str, Any]:
    """Of decoding, by the machine's meters where they can be read."""
    joules = watch.meter.joules(*span) if span else None
    if joules is not None:
        found: dict[str, Any] = {"estimated": False, "joules": joules, "total_joules": sum(joules.values()), "constants": None}
    else:
        steps, moved = document["token"]["steps"], document["traffic"]
        found = estimate(
            flash_bytes=steps * document["reads"]["per_step"] * document["reads"]["mean_bytes"],
            dram_bytes=steps * moved["dram_bytes_per_step"],
            operations=steps * moved["operations_per_step"],
        )
    return {**found, "joules_per_token": found["total_joules"] / max(document["run"]["tokens"], 1)}


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
