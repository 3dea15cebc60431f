"""`report.html`: the figures of a profile drawn for the browser, in one file that needs nothing else."""

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .amounts import rate_text, size_text
from .svg_chart import Axes, Series, lines, nothing, split_bar, stacked_bars

TEMPLATE = Path(__file__).with_name("profile_report.html")
_PARTS = (("I/O wait", "io_wait_ms"), ("memory management", "memory_ms"), ("compute", "compute_ms"))
_COLOURS = 6
_MOST_BINS = 120

Profile = dict[str, Any]


def write_report(file: Path, profile: Profile) -> None:
    """Draws a document of `profile_document` into an HTML file."""
    run, token, model = profile["run"], profile["token"], profile["model"]
    values = {
        "title": escape(f"Profile of {Path(model['path']).name}"),
        "summary": escape(
            f"{run['tokens']} tokens in {run['steps']} steps, {run['tokens_per_s']:.1f} tokens a second; {model['num_layers']} layers, "
            f"d_model {model['d_model']}, d_ff {model['d_ff']}, {model['dtype']}; {profile['kernels']} kernels; "
            f"{profile['machine']['processors']} processors. Steps: median {token['median_ms']:.1f} ms, mean {token['total_ms']:.1f} ms."
        ),
        "command": escape(shlex.join(["inflash", *profile["command"]])),
        "warnings": "".join(f'<p class="warning">{escape(text)}</p>' for text in _warnings(profile)),
        "limits": "".join(f"<li>{escape(sentence)}</li>" for sentence in profile["limits"]),
        "sections": "\n".join(section(profile) for section in _SECTIONS),
        "colours": "".join(
            f".bar.c{n}, .mark.c{n}, .dot.c{n} {{ fill: var(--c{n}); }} .line.c{n} {{ stroke: var(--c{n}); }} "
            for n in range(_COLOURS)
        ),
        "footer": escape(
            f"inflash {profile['version']}. Watching took {profile['profiler_cpu_s']:.2f} s of processor time. trace.json beside this file "
            "opens in ui.perfetto.dev; profile.json has these figures."
        ),
    }
    file.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")


def _warnings(profile: Profile) -> list[str]:
    texts = []
    if profile["ended"]["exit_code"]:
        texts.append(f"This run did not complete: {profile['ended']['what']}. The figures are of what was recorded until then.")
    lost = {name: count for name, count in profile["lost_records"].items() if count}
    if lost:
        names = ", ".join(f"{count} of {name}" for name, count in lost.items())
        texts.append(f"The run was longer than its trace: the oldest spans were replaced ({names}). What is drawn is its end.")
    return texts


def _section(title: str, text: str, *figures: str, wide: bool = False) -> str:
    body = "".join(f"<figure>{figure}</figure>" for figure in figures)
    if len(figures) > 1:
        body = f'<div class="pair">{body}</div>'
    return f'<section{" class=wide" if wide else ""}><h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{body}</section>'


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _token(profile: Profile) -> str:
    token = profile["token"]
    text = (
        "Mean of the decoding steps. I/O wait: the engine waited for loaders and had nothing to compute. Memory management: looking "
        "neurons up, giving them slots, writing requests. Compute: the rest. "
        f"Sampling comes on top, {_ms(token['sampling_ms'])}; of compute, {_ms(token['head_ms'])} are the output head and what was left "
        "before it."
    )
    if not token["steps"]:
        return _section("Where a token's time goes", text, nothing(), wide=True)
    parts = [(name, token[key]) for name, key in _PARTS]
    return _section(
        f"Where a token's {token['total_ms']:.1f} ms go", text, split_bar(parts, _ms, "a token's time by part"), wide=True
    )


def _layers(profile: Profile) -> str:
    series = [
        Series(name=name, points=[(layer["layer"], layer[key]) for layer in profile["layers"]], style=style)
        for style, (name, key) in enumerate(_PARTS)
    ]
    axes = Axes(x_label="layer", y_label="ms a token")
    text = (
        "A layer's compute shows where the engine waits for it: attention and predictor in the layer itself, the neurons that were read "
        "in the next."
    )
    return _section("Time by layer", text, stacked_bars(series, axes, "time by layer and part"))


def _course(profile: Profile) -> str:
    course = profile["course"]
    named = (("I/O wait", "io_wait_ms", 0), ("memory management", "memory_ms", 1), ("all of the step", "total_ms", 2))
    series = [
        Series(name=name, points=list(zip(course["step"], course[key], strict=True)), style=style) for name, key, style in named
    ]
    axes = Axes(x_label="step", y_label="ms")
    return _section(
        "Time, step by step", "The first steps fill the cache, and are slower.", lines(series, axes, "time of each step")
    )


def _hit_rate(profile: Profile) -> str:
    rates = [(layer["layer"], layer["hit_rate"]) for layer in profile["layers"] if layer["hit_rate"] is not None]
    course = profile["course"]
    steps = [
        (step, hits / (hits + misses))
        for step, hits, misses in zip(course["step"], course["hits"], course["misses"], strict=True)
        if hits + misses
    ]
    by_layer = Axes(x_label="layer", y_label="found in memory", y_text=_percent, top=1)
    by_step = Axes(x_label="step", y_label="found in memory", y_text=_percent, top=1)
    share = profile["cache"]["share"]
    text = (
        "Of the neurons named, those that were in memory or on their way; all layers together "
        f"{_percent(profile['run']['cache_hit_rate'])}."
    )
    if share is not None:
        text += f" The cache holds {_percent(share)} of each layer."
    return _section(
        "Hits of the neuron cache",
        text,
        stacked_bars([Series(name="", points=rates, style=3)] if rates else [], by_layer, "hit rate by layer"),
        lines([Series(name="", points=steps, style=3)] if steps else [], by_step, "hit rate step by step"),
        wide=True,
    )


def _sizes(profile: Profile) -> str:
    sizes = profile["reads"]["sizes"]
    series = [
        Series(name=name, points=[(place, size[key]) for place, size in enumerate(sizes)], style=style)
        for name, key, style in (
            ("neurons picked one by one", "picked", 0),
            ("stretches in order (prompts, streams)", "in_order", 2),
        )
    ]
    axes = Axes(
        x_label="bytes of a read, up to",
        y_label="reads",
        x_text=lambda place: size_text(sizes[int(place)]["up_to_bytes"]) if 0 <= place < len(sizes) else "",
        y_text=lambda value: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}",
        x_ticks=range(len(sizes)),
    )
    reads = profile["reads"]
    text = (
        f"All reads of the run. A token made {reads['per_step']:.0f}, {size_text(reads['mean_bytes'])} each on average, "
        f"{reads['bytes_per_step'] / 2**20:.1f} MiB together; a request took {_ms(reads['request_ms'])} (median)."
    )
    return _section("How large the reads were", text, stacked_bars(series if sizes else [], axes, "reads by size"))


def _rates(profile: Profile) -> str:
    reads, curve = profile["reads"], profile["device"]["read_curve"]
    series = [
        Series(
            name=f"disk, {depth} under way",
            points=sorted((point["size"] / 1024, point["bytes_per_s"] / 1e6) for point in curve if point["depth"] == depth),
            style=1 + place % 5,
        )
        for place, depth in enumerate(sorted({point["depth"] for point in curve}))
    ]
    if reads["bytes_per_s"]:
        here = (reads["mean_bytes"] / 1024, reads["bytes_per_s"] / 1e6)
        series.append(Series(name=f"this run, {reads['mean_under_way']:.1f} under way", points=[here], marks=True))
    ticks = sorted({point["size"] / 1024 for point in curve}) or None
    axes = Axes(x_label="KiB of a read", y_label="MB/s", log_x=True, log_y=True, x_ticks=ticks)
    text = (
        f"While reads were under way ({_percent(reads['busy_share'])} of the decoding time) this run got "
        f"{rate_text(reads['bytes_per_s'])}, with {reads['mean_under_way']:.1f} reads under way of {reads['depth']} allowed. The lines are "
        f"what this disk gives to random reads: {profile['device']['source']}."
    )
    return _section("Rate of the reads beside the disk's own", text, lines(series, axes, "rates by size of read"))


def _cpu(profile: Profile) -> str:
    series = []
    for style, (name, process) in enumerate(profile["processes"].items()):
        samples = process["samples"]
        at, cpu = np.array(samples["at_s"]), np.array(samples["user_s"]) + np.array(samples["system_s"])
        series.append(Series(name=name, points=_slopes(at, cpu), style=style % _COLOURS))
    axes = Axes(x_label="seconds since the start", y_label="processors", top=1)
    text = "How many processors each process kept busy."
    return _section("Processors", text, lines([one for one in series if one.points], axes, "processors by process over time"))


def _slopes(at: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
    """Growth a second, over at most `_MOST_BINS` stretches."""
    stride = max(1, len(at) // _MOST_BINS)
    at, values = at[::stride], values[::stride]
    seconds = np.diff(at)
    return list(zip(at[1:].tolist(), (np.diff(values) / np.maximum(seconds, 1e-9)).tolist(), strict=True))


def _memory(profile: Profile) -> str:
    series = []
    for style, (name, process) in enumerate(profile["processes"].items()):
        samples = process["samples"]
        known = [(at, size / 2**30) for at, size in zip(samples["at_s"], samples["pss_bytes"], strict=True) if size is not None]
        series.append(Series(name=name, points=known, style=style % _COLOURS))
    axes = Axes(x_label="seconds since the start", y_label="GiB")
    text = "Proportional set size: pages that several processes map, such as the neuron cache, are divided among them."
    return _section("Memory", text, lines([one for one in series if one.points], axes, "memory by process over time"))


def _processes(profile: Profile) -> str:
    head = (
        "process",
        "user s",
        "system s",
        "waited for a processor s",
        "major faults",
        "minor faults",
        "switches: own / forced",
        "read from disk",
    )
    rows = []
    for name, process in profile["processes"].items():
        last = {
            key: next((value for value in reversed(values) if value is not None), None)
            for key, values in process["samples"].items()
        }
        cells = (
            f"{name} ({process['pid']})", f"{last['user_s']:.2f}", f"{last['system_s']:.2f}", _or_dash(last["queue_wait_s"], "{:.2f}"),
            f"{last['major_faults']}", f"{last['minor_faults']}",
            f"{_or_dash(last['voluntary_switches'], '{}')} / {_or_dash(last['involuntary_switches'], '{}')}",
            "-" if last["read_bytes"] is None else size_text(last["read_bytes"]),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table = f'<div class="scroll"><table><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    share = profile["engine_queue_wait_share"]
    text = "Totals since each process began, as last seen."
    if share is not None:
        text += (
            f" When the engine's threads were ready to run, they stood in line for a processor for {_percent(share)} of the time."
        )
    return _section("Processes", text, table if rows else nothing(), wide=True)


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _working_set(profile: Profile) -> str:
    points = profile["working_set"]
    layers = sorted({point["layer"] for point in points})
    series = [
        Series(
            name=f"layer {layer}",
            points=[(point["tokens"], point["share"]) for point in points if point["layer"] == layer],
            style=style % _COLOURS,
        )
        for style, layer in enumerate(layers)
    ]
    ticks = sorted({point["tokens"] for point in points}) or None
    axes = Axes(
        x_label="the last k tokens",
        y_label="neurons named",
        y_text=lambda share: f"{100 * share:.3g} %",
        log_x=True,
        x_ticks=ticks,
    )
    text = (
        "How many of a layer's neurons the last k tokens named together: where the curve flattens, a cache of that size finds most of the "
        f"next token's. Of {len(layers)} layers, the last {profile['working_set_steps']} steps."
    )
    return _section("Growth of the working set with the window", text, lines(series, axes, "working set by window"))


def _predictor(profile: Profile) -> str:
    recall = profile["predictor_recall"]
    if recall is None:
        why = "Not measured in this run: it takes --predictor exact, which knows the truth, on a store that has a predictor. "
        return _section(
            "Recall of the predictor",
            why + "`inflash eval` measures it on a text.",
            nothing(f"Predictor: {profile['predictor']}."),
        )
    points = [(float(place), layer["recall"]) for place, layer in enumerate(recall["layers"])]
    axes = Axes(
        x_label="layer", y_label="recall", y_text=_percent, top=1, x_ticks=range(len(points)),
        x_text=lambda place: str(recall["layers"][int(place)]["layer"]) if 0 <= place < len(points) else "",
    )  # fmt: skip
    text = (
        f"Of the neurons that were active, how many the store's predictor would have named, in {recall['steps']} steps. "
        f"It names {recall['named_per_active']:.2f} neurons for each active one."
    )
    return _section(
        "Recall of the predictor", text, stacked_bars([Series(name="", points=points, style=4)], axes, "recall by layer")
    )


def _energy(profile: Profile) -> str:
    energy = profile["energy"]
    parts = list(energy["joules"].items())
    if energy["estimated"]:
        text = (
            f"An estimate, as this machine's meters cannot be read: {energy['joules_per_token']:.3g} J a decoded token, from the bytes "
            f"read and the operations. Its constants: {energy['constants']}."
        )
    else:
        each = f"{energy['joules_per_token']:.3g} J a token"
        text = f"Read from the machine's meters, over the whole run and everything on the machine: {each}."
    chart = split_bar(parts, lambda value: f"{value:.3g} J", "energy by part") if energy["total_joules"] else nothing()
    return _section("Energy", text, chart, wide=True)


_SECTIONS: Sequence[Any] = (
    _token, _layers, _course, _rates, _sizes, _hit_rate, _working_set, _predictor, _cpu, _memory, _processes, _energy,
)  # fmt: skip
