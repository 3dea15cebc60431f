"""Charts of a profile: where a token's time goes, reads beside the disk's curve, the neuron cache."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from .amounts import ms_text, percent_text, rate_text, size_text
from .disk_curve import DiskCurve
from .run_advice import windows
from .svg_chart import Axes, Series, lines, nothing, plain, split_bar, stacked_bars

Profile = dict[str, Any]

_PARTS = (
    ("waiting for the disk", "io_wait_ms", "wait"),
    ("memory management", "memory_ms", "manage"),
    ("computing", "compute_ms", "compute"),
)
_DASHES = 6  # that the style sheet has
_DISK_STYLES = 3


def section(title: str, text: str, *figures: str, wide: bool = False) -> str:
    """A card with a heading, a caption and its charts."""
    body = "".join(f"<figure>{figure}</figure>" for figure in figures)
    if len(figures) > 1:
        body = f'<div class="pair">{body}</div>'
    return f'<section{" class=wide" if wide else ""}><h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{body}</section>'


def _token(profile: Profile) -> str:
    token = profile["token"]
    text = (
        "The mean of all steps. Waiting: the engine needed neurons that the loaders were still reading, and had nothing to compute. Memory "
        "management: looking neurons up in the cache, giving them places, writing requests. Computing: the rest, "
        f"{ms_text(token['head_ms'])} of it waiting for the last layer and the output head. Choosing the token comes on top: "
        f"{ms_text(token['sampling_ms'])}."
    )
    if not token["steps"]:
        return section("Where a token's time goes", text, nothing(), wide=True)
    parts = [(name, style, token[key]) for name, key, style in _PARTS]
    title = f"Where a token's {ms_text(token['total_ms'])} go"
    return section(title, text, split_bar(parts, ms_text, "a token's time by part"), wide=True)


def _layers(profile: Profile) -> str:
    series = [
        Series(name=name, points=[(layer["layer"], layer[key]) for layer in profile["layers"]], style=style)
        for name, key, style in _PARTS
    ]
    text = (
        "Computing counts where the engine waits for its result: attention and predictor in the layer itself, what is computed with the "
        "neurons that were read in the next layer."
    )
    return section(
        "Time by layer", text, stacked_bars(series, Axes(x_label="layer", y_label="ms a token"), "time by layer and part")
    )


def _course(profile: Profile) -> str:
    course = profile["course"]
    named = (*((name, key, style, 0) for name, key, style in _PARTS[:2]), ("the whole step", "total_ms", "step", 2))
    series = [
        Series(name=name, points=list(zip(course["step"], course[key], strict=True)), style=style, dash=dash)
        for name, key, style, dash in named
    ]
    chart = lines(series, Axes(x_label="step", y_label="ms"), "time of each step")
    return section("Time, step by step", course_text(course["total_ms"]), chart)


def course_text(total_ms: Sequence[float]) -> str:
    """What the steps' times show: how far apart they are, and whether the beginning differs from the rest."""
    if not total_ms:
        return "No step was completed."
    text = f"From {ms_text(min(total_ms))} to {ms_text(max(total_ms))}."
    quarter = len(total_ms) // 4
    if quarter:
        first, rest = sum(total_ms[:quarter]) / quarter, sum(total_ms[quarter:]) / (len(total_ms) - quarter)
        text += f" The first quarter of the steps took {ms_text(first)} on average, the others {ms_text(rest)}."
    return text


def _rates(profile: Profile) -> str:
    reads, points = profile["reads"], profile["device"]["read_curve"]
    curve = DiskCurve(points)
    series = [
        Series(
            name=f"this disk, {depth} under way",
            points=sorted((point["size"], point["bytes_per_s"] / 1e6) for point in points if point["depth"] == depth),
            style=f"disk{place % _DISK_STYLES}",
            dash=place % _DASHES,
        )
        for place, depth in enumerate(curve.depths)
    ]
    if reads["bytes_per_s"]:
        here = (reads["mean_bytes"], reads["bytes_per_s"] / 1e6)
        series.append(Series(name=f"this run, {reads['mean_under_way']:.1f} under way", points=[here], marks=True, style="run"))
    ticks = sorted({point["size"] for point in points}) or None
    axes = Axes(x_label="size of a read", y_label="MB/s", log_x=True, log_y=True, x_ticks=ticks, x_text=size_text)
    return section(
        "Rate of the reads beside the disk's own",
        _rates_text(reads, profile["device"], curve),
        lines(series, axes, "rates by size of read"),
    )


def _rates_text(reads: dict[str, Any], device: dict[str, Any], curve: DiskCurve) -> str:
    text = (
        f"Reads were under way for {percent_text(reads['busy_share'])} of the time, {reads['mean_under_way']:.1f} at a time of "
        f"{reads['depth']} allowed, and gave {rate_text(reads['bytes_per_s'])}."
    )
    if curve.depths and reads["bytes_per_s"]:
        known = curve.rate(reads["mean_bytes"], max(reads["mean_under_way"], 1.0))
        text += (
            f" The lines are what this disk gave to random reads and nothing else ({device['source']}): {rate_text(known)} for this "
            f"size with as many under way. The run got {reads['bytes_per_s'] / known:.2f} times that."
        )
    return text + " A read counts from the call that hands it to the kernel until it is taken back, here and in the lines."


def _sizes(profile: Profile) -> str:
    reads, sizes = profile["reads"], profile["reads"]["sizes"]
    series = [
        Series(name=name, points=[(place, size[key]) for place, size in enumerate(sizes)], style=style)
        for name, key, style in (
            ("missed neurons", "picked", "disk2"),
            ("whole pieces in order, for prompts and streamed matrices", "in_order", "disk0"),
        )
    ]
    axes = Axes(
        x_label="size of a read, up to",
        y_label="reads",
        x_text=lambda place: size_text(sizes[int(place)]["up_to_bytes"]) if 0 <= place < len(sizes) else "",
        y_text=lambda value: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}",
        x_ticks=range(len(sizes)),
    )
    text = (
        f"A token made {reads['per_step']:.0f} reads of {size_text(reads['mean_bytes'])} on average, for "
        f"{size_text(reads['bytes_per_step'])} of neurons. A request, a layer's missed neurons together, took "
        f"{ms_text(reads['request_ms'])} (median). The bars count all reads of the run, those for its prompts as well."
    )
    return section("How large the reads were", text, stacked_bars(series if sizes else [], axes, "reads by size"))


def _hit_rate(profile: Profile) -> str:
    rates = [(layer["layer"], layer["hit_rate"]) for layer in profile["layers"] if layer["hit_rate"] is not None]
    if profile["cache"]["share"] is None or not rates:
        return ""
    course, share = profile["course"], profile["cache"]["share"]
    steps = [
        (step, hits / (hits + misses))
        for step, hits, misses in zip(course["step"], course["hits"], course["misses"], strict=True)
        if hits + misses
    ]
    axes = {
        label: Axes(x_label=label, y_label="hits of predicted neurons", y_text=percent_text, top=1) for label in ("layer", "step")
    }
    text = (
        "Hits: the share of a token's predicted neurons that were in the cache, or on their way to it. All layers together: "
        f"{percent_text(profile['run']['cache_hit_rate'])}."
    )
    text += f" The cache holds {percent_text(share)} of a layer's neurons."
    return section(
        "Hits of the neuron cache",
        text,
        stacked_bars([Series(name="", points=rates, style="neurons")] if rates else [], axes["layer"], "hit rate by layer"),
        lines([Series(name="", points=steps, style="neurons")] if steps else [], axes["step"], "hit rate step by step"),
        wide=True,
    )


def _working_set(profile: Profile) -> str:
    points, share, layers = profile["working_set"], profile["cache"]["share"], profile["layers"]
    if share is None or not points:
        return ""
    by_layer = [
        Series(
            name=f"layer {layer}",
            points=[(point["tokens"], point["share"]) for point in points if point["layer"] == layer],
            style="neurons",
            dash=place % _DASHES,
        )
        for place, layer in enumerate(sorted({point["layer"] for point in points}))
    ]
    ticks = sorted({point["tokens"] for point in points}) or None
    growth = Axes(
        x_label="the last k tokens", y_label="of a layer's neurons", y_text=_fine_percent, log_x=True, x_ticks=ticks,
    )  # fmt: skip
    model = profile["model"]
    layer_mib = model["d_ff"] * model["bundle_bytes"] / 2**20
    missed = [
        Series(
            name="holding what the last k tokens used",
            points=[(w["share"] * layer_mib, w["missed"]) for w in windows(profile)],
            style="neurons",
        )
    ]
    named = sum(layer["hits"] + layer["misses"] for layer in layers)
    if named:
        now = sum(layer["misses"] + layer["prefetched"] for layer in layers) / named
        missed.append(Series(name="this run", points=[(share * layer_mib, min(now, 1.0))], marks=True, style="run"))
    sizes = Axes(x_label="MiB of cache a layer", y_label="read for the next token", y_text=percent_text, top=1)
    return section(
        "How large the cache should be",
        _working_set_text(profile),
        lines(by_layer, growth, "working set by window"),
        lines([one for one in missed if one.points], sizes, "misses by size of cache"),
        wide=True,
    )


def _fine_percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _working_set_text(profile: Profile) -> str:
    measured, share = windows(profile), profile["cache"]["share"]
    text = (
        f"Left: how many of a layer's neurons the last k tokens used together, in the last {profile['working_set_steps']} steps. Right: "
        "a cache that held just those, and the share of the next token's neurons that it would have missed. "
        "The point of this run counts all of its steps, from an empty cache on."
    )
    if not measured:
        return text
    fits = [window for window in measured if window["share"] <= share]
    held = _windows_text(fits[-1]["tokens"]) if fits else "less than one token uses"
    text += f" This run's cache, {percent_text(share)} of a layer, has room for {held}."
    last = measured[-1]
    if last in fits:
        return text
    needed, missed = percent_text(last["share"]), percent_text(last["missed"])
    return text + f" For {_windows_text(last['tokens'])} it would take {needed}, and {missed} would be missed."


def _windows_text(tokens: float) -> str:
    return "what one token uses" if tokens == 1 else f"what the last {tokens} tokens use"


def _predictor(profile: Profile) -> str:
    recall, title = profile["predictor_recall"], "Recall of the predictor"
    if recall is None:
        text = (
            "Not measured in this run. It takes --predictor exact, which computes the truth, on a store that has another predictor to "
            "judge; `inflash eval` measures it on a text."
        )
        return section(title, text, wide=True)
    points = [(float(place), layer["recall"]) for place, layer in enumerate(recall["layers"])]
    axes = Axes(
        x_label="layer", y_label="recall", y_text=percent_text, top=1, x_ticks=range(len(points)),
        x_text=lambda place: str(recall["layers"][int(place)]["layer"]) if 0 <= place < len(points) else plain(place),
    )  # fmt: skip
    text = (
        f"Of the neurons that were active, the share that the store's predictor would have predicted, in {recall['steps']} steps. "
        f"It predicts {recall['named_per_active']:.2f} neurons for each active one."
    )
    chart = stacked_bars([Series(name="", points=points, style="predictor")], axes, "recall by layer")
    return section(title, text, chart, wide=True)


PROFILE_SECTIONS: tuple[Callable[[Profile], str], ...] = (
    _token,
    _layers,
    _course,
    _rates,
    _sizes,
    _hit_rate,
    _working_set,
    _predictor,
)
