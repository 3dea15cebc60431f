"""Charts of a profile's processes: processors, memory, what each used while decoding, energy."""

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np

from .amounts import percent_text, size_text
from .profile_charts import Profile, section
from .svg_chart import Axes, Series, lines, nothing, split_bar

_MOST_BINS = 120
_DASHES = 6
_ENERGY_STYLES = {"flash": "disk2", "DRAM": "dram", "arithmetic": "compute", "package": "engine"}


def _style(name: str) -> tuple[str, int]:
    """Of a process's lines: the loaders have one colour and are told apart by dashes."""
    return ("engine", 0) if name == "engine" else ("loader", (1 + int(name.split()[-1])) % _DASHES)


def _over_time(profile: Profile, points: Callable[[dict[str, Any]], list[tuple[float, float]]]) -> list[Series]:
    found = []
    for name, process in profile["processes"].items():
        style, dash = _style(name)
        found.append(Series(name=name, points=points(process["samples"]), style=style, dash=dash))
    return [one for one in found if one.points]


def _when(profile: Profile) -> str:
    begin = profile["decoding"]["begin_s"]
    return "Over the whole run" + (f"; decoding began after {begin:.1f} s." if begin is not None else ".")


def _cpu(profile: Profile) -> str:
    def slopes(samples: dict[str, Any]) -> list[tuple[float, float]]:
        return _slopes(np.array(samples["at_s"]), np.array(samples["user_s"]) + np.array(samples["system_s"]))

    axes = Axes(x_label="seconds since the start", y_label="processors", top=1)
    text = f"How many processors each process kept busy. {_when(profile)}"
    return section("Processors", text, lines(_over_time(profile, slopes), axes, "processors by process over time"))


def _slopes(at: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
    """Growth a second, over at most `_MOST_BINS` pieces of time."""
    stride = max(1, len(at) // _MOST_BINS)
    at, values = at[::stride], values[::stride]
    seconds = np.diff(at)
    return list(zip(at[1:].tolist(), (np.diff(values) / np.maximum(seconds, 1e-9)).tolist(), strict=True))


def _memory(profile: Profile) -> str:
    def sizes(samples: dict[str, Any]) -> list[tuple[float, float]]:
        return [(at, size / 2**30) for at, size in zip(samples["at_s"], samples["pss_bytes"], strict=True) if size is not None]

    axes = Axes(x_label="seconds since the start", y_label="GiB")
    text = "Proportional set size: pages that several processes map, such as the neuron cache, are divided among them. " + _when(
        profile
    )
    return section("Memory", text, lines(_over_time(profile, sizes), axes, "memory by process over time"))


def _processes(profile: Profile) -> str:
    head = (
        "process", "user\u00a0s", "system\u00a0s", "in line for a\u00a0processor\u00a0s", "major faults", "minor faults",
        "switches: own / forced", "read from disk",
    )  # fmt: skip
    rows = []
    for name, used in profile["decoding"]["processes"].items():
        cells = (
            f"{name} ({profile['processes'][name]['pid']})", _or_dash(used["user_s"], "{:.2f}"), _or_dash(used["system_s"], "{:.2f}"),
            _or_dash(used["queue_wait_s"], "{:.2f}"), _or_dash(used["major_faults"], "{:.0f}"), _or_dash(used["minor_faults"], "{:.0f}"),
            f"{_or_dash(used['voluntary_switches'], '{:.0f}')} / {_or_dash(used['involuntary_switches'], '{:.0f}')}",
            "-" if used["read_bytes"] is None else size_text(used["read_bytes"]),
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table = f'<div class="scroll"><table><thead>{header}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    text = (
        f"What each used in the {profile['decoding']['s']:.1f} s of decoding. In line: its threads were ready to run and waited for a "
        "processor, all threads together."
    )
    share = profile["engine_queue_wait_share"]
    if share is not None:
        text += f" For the engine this was {percent_text(share)} of the time in which its threads ran or could have run."
    return section("Processes", text, table if rows else nothing(), wide=True)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _energy(profile: Profile) -> str:
    energy = profile["energy"]
    if not energy["total_joules"]:
        return section("Energy", "Of decoded tokens.", nothing(), wide=True)
    tokens = energy["total_joules"] / energy["joules_per_token"]
    parts = [(name, _ENERGY_STYLES.get(name, "step"), 1e3 * joules / tokens) for name, joules in energy["joules"].items()]
    total = (
        f"{1e3 * energy['joules_per_token']:.3g} mJ a token, {energy['total_joules']:.3g} J for the {tokens:.0f} decoded tokens"
    )
    if energy["estimated"]:
        text = f"{total}. An estimate from the bytes and the operations, as this machine's meters cannot be read: {energy['constants']}."
    else:
        text = f"{total}, by the machine's meters while decoding; everything else that ran on the machine is in it."
    chart = split_bar(parts, lambda value: f"{value:.3g} mJ a token", "energy of a token by part")
    return section("Energy", text, chart, wide=True)


PROCESS_SECTIONS: tuple[Callable[[Profile], str], ...] = (_cpu, _memory, _processes, _energy)
