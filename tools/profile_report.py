"""`report.html`: the figures of a profile drawn for the browser, in one file that needs nothing else."""

import shlex
from html import escape
from pathlib import Path
from string import Template

from .amounts import percent_text, size_text
from .process_charts import PROCESS_SECTIONS
from .profile_charts import PROFILE_SECTIONS, Profile

TEMPLATE = Path(__file__).with_name("profile_report.html")
_STYLES = (
    "wait",
    "manage",
    "compute",
    "step",
    "neurons",
    "predictor",
    "disk0",
    "disk1",
    "disk2",
    "run",
    "engine",
    "loader",
    "dram",
)
_WORDS = (
    ("neuron", "one hidden unit of a feed-forward layer: a row and a column of weights, side by side on the disk"),
    ("predicted", "a neuron that the predictor expects a token to use; only those are computed"),
    ("hit, miss", "a predicted neuron that is in the cache, or on its way to it; one that has to be read from the disk"),
    ("loader", "a process that reads missed neurons from the disk"),
    ("request", "what the engine asks a loader for at one time: the missed neurons of one layer"),
    ("read", "one call for consecutive bytes of the disk: one neuron, or several that lie side by side"),
    ("step", "one pass through the model: one token for each text that is being written"),
)


def write_report(file: Path, profile: Profile) -> None:
    """Draws a document of `profile_document` into an HTML file."""
    values = {
        "title": escape(f"Profile of {Path(profile['model']['path']).name}"),
        "command": escape(shlex.join(["inflash", *profile["command"]])),
        "warnings": "".join(f'<p class="warning">{escape(text)}</p>' for text in _warnings(profile)),
        "limits": "".join(f"<li>{escape(sentence)}</li>" for sentence in profile["limits"][: 2 if profile["advice"] else 3]),
        "advice": _advice(profile),
        "facts": _terms(facts(profile)),
        "words": _terms(_WORDS),
        "sections": "\n".join(section(profile) for section in (*PROFILE_SECTIONS, *PROCESS_SECTIONS)),
        "colours": "".join(
            f".bar.{name}, .mark.{name}, .dot.{name} {{ fill: var(--{name}); }} .line.{name} {{ stroke: var(--{name}); }} "
            for name in _STYLES
        ),
        "footer": escape(
            f"inflash {profile['version']}. Watching took {profile['profiler_cpu_s']:.2f} s of processor time. trace.json beside this file "
            "opens in ui.perfetto.dev; profile.json has these figures."
        ),
    }
    file.write_text(Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")


def _advice(profile: Profile) -> str:
    if not profile["advice"]:
        return ""
    items = "".join(f"<li>{escape(one['text'])}</li>" for one in profile["advice"])
    return f"<strong>What would help</strong><ol>{items}</ol><p>Savings overlap, so they do not add up.</p>"


def _terms(terms: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in terms) + "</dl>"


def facts(profile: Profile) -> list[tuple[str, str]]:
    """What was run, by name: for somebody who has not seen the command."""
    model, options, reads = profile["model"], profile["options"], profile["reads"]
    gap = options["merge_gap"]
    together = f"neurons up to {size_text(gap)} apart are read together" if gap else "only neurons side by side are read together"
    found = [
        (
            "model",
            f"{model['num_layers']} layers, d_model {model['d_model']}, {model['dtype']}; {model['d_ff']} neurons a layer, "
            f"{size_text(model['bundle_bytes'])} each on disk",
        ),
        ("cache", _cache(profile)),
        ("predictor", _predictor(profile)),
        (
            "reads",
            _in_order(profile)
            + f"loaders: {options['loaders']}; reads under way at a time: {reads['depth']} at most; {together}",
        ),
        ("machine", f"{profile['machine']['processors']} processors; {profile['kernels']} kernels"),
    ]
    return found + _times(profile)


def _cache(profile: Profile) -> str:
    share, model = profile["cache"]["share"], profile["model"]
    if share is None:
        return f"none: --ffn {profile['options']['ffn']}"
    neurons = share * model["d_ff"]
    layers = sum(layer["hit_rate"] is not None for layer in profile["layers"]) or model["num_layers"]
    layer_bytes = neurons * model["bundle_bytes"]
    return (
        f"{neurons:.0f} neurons a layer ({percent_text(share)}), {size_text(layer_bytes)} a layer, {size_text(layers * layer_bytes)} in "
        f"{layers} layers"
    )


def _in_order(profile: Profile) -> str:
    share = profile["run"]["dense_share"]
    return f"in {percent_text(share)} of layers and steps all neurons in order, else missed ones; " if share else ""


def _predictor(profile: Profile) -> str:
    name = profile["predictor"]
    if name is None:
        return "none: every neuron is used"
    made = " (made with the model by `inflash synth`)" if name == "planted" else ""
    ahead = profile["prefetch"]
    return f"{name}{made}; " + (f"{ahead} guesses the next layer's neurons" if ahead else "nothing is read ahead of its layer")


def _times(profile: Profile) -> list[tuple[str, str]]:
    prompts, run, token = profile["prompts"], profile["run"], profile["token"]
    found = []
    if profile["start_s"] is not None:
        found.append(("start", f"{profile['start_s']:.1f} s until the first prompt: loading and compiling"))
    found.append(("prompt", f"{prompts['tokens']} tokens in {prompts['s']:.2f} s"))
    if token["steps"]:
        text = (
            f"{run['tokens']} tokens in {token['steps']} steps, {profile['decoding']['s']:.1f} s, {run['tokens_per_s']:.1f} tokens a "
            "second. A text's first token comes out of its prompt and is not counted here. Everything below is of this time, unless it "
            "says otherwise"
        )
        if (texts := profile["sequences"]) >= 1.05:
            text += f". {texts:.3g} texts were decoded together: what is said of a token is of a step, a token for each of them"
        found.append(("decoding", text))
    return found


def _warnings(profile: Profile) -> list[str]:
    texts = []
    if profile["ended"]["exit_code"]:
        texts.append(f"This run did not complete: {profile['ended']['what']}. The figures are of what was recorded until then.")
    lost = {name: count for name, count in profile["lost_records"].items() if count}
    if lost:
        names = ", ".join(f"{count} of {name}" for name, count in lost.items())
        texts.append(f"The run was longer than its trace: the oldest spans were replaced ({names}). What is drawn is its end.")
    return texts
