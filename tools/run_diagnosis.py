"""What limits a run, computed from its figures: where the time goes, why, and what would help."""

from typing import Any

from .amounts import ms_text, percent_text, rate_text, size_text
from .disk_curve import DiskCurve
from .run_advice import Advice, loader_busy, tight_cache

Profile = dict[str, Any]


def limits(profile: Profile, found: list[Advice]) -> list[str]:
    """Three texts, for the report and the terminal; the second may have several lines, the third says what `advice` has found."""
    token = profile["token"]
    if not token["steps"]:
        return [
            "No token was decoded, so nothing can be said about decoding.",
            f"Prompts took {profile['prompts']['s']:.2f} s for {profile['prompts']['tokens']} tokens.",
            "Generate a few dozen tokens (--max-tokens 64) to profile decoding.",
        ]
    largest = largest_part(token)
    because = {"io_wait": _io_bound, "memory": _memory_bound, "compute": _compute_bound}[largest](profile)
    return [_where(token, largest, profile["sequences"]), because, _to_be_faster(largest, found)]


def largest_part(token: dict[str, float]) -> str:
    return max(("io_wait", "memory", "compute"), key=lambda name: token[f"{name}_ms"])


def _where(token: dict[str, float], largest: str, sequences: float) -> str:
    what = {
        "io_wait": "the engine waited for neurons from the disk and had nothing to compute",
        "memory": "the engine looked neurons up, gave them slots and wrote requests",
        "compute": "the engine computed",
    }[largest]
    ms = token[f"{largest}_ms"]
    who = "A token" if sequences < 1.05 else f"A step, which makes a token for each of {sequences:.3g} texts,"
    return f"{who} took {ms_text(token['total_ms'])}. For {ms_text(ms)} of it ({percent_text(ms / token['total_ms'])}) {what}."


def advice_text(one: Advice, total_ms: float) -> str:
    """The whole of it, for a list."""
    title = one.title[:1].upper() + one.title[1:]
    why = " It comes first because the cache hardly holds more than one token needs." if one.first else ""
    return f"{title}: {one.text}. Saves at most {ms_text(one.saves_ms)} of {ms_text(total_ms)}.{why}"


def _to_be_faster(largest: str, found: list[Advice]) -> str:
    if found:
        each = ", ".join(f"{one.title} ({ms_text(one.saves_ms)})" for one in found)
        return f"What may help, and what it can save of a token at most: {each}."
    if largest == "io_wait":
        return "No flag would save much: a faster disk, more memory, or a predictor that names fewer neurons would help."
    return "No flag would save much: a predictor that names fewer neurons, or a smaller model, would help."


def _io_bound(profile: Profile) -> str:
    return "\n".join(filter(None, (_cache(profile), _reads(profile), _disk(profile), _loaders(profile))))


def _cache(profile: Profile) -> str:
    share, layers = profile["cache"]["share"], profile["layers"]
    if share is None or not layers:
        return ""
    named, missed = (sum(layer[key] for layer in layers) / len(layers) for key in ("hits", "misses"))
    named += missed
    if not named:
        return ""  # layers were read in order
    text = (
        f"The cache holds {share * profile['model']['d_ff']:.0f} neurons of a layer; a token uses {named:.0f} there and misses "
        f"{missed:.0f} of them."
    )
    return text + (" So it hardly holds more than one token needs." if tight_cache(profile) else "")


def _reads(profile: Profile) -> str:
    reads = profile["reads"]
    return (
        f"The loaders fetched {size_text(reads['bytes_per_step'])} a token in {reads['per_step']:.0f} reads of "
        f"{size_text(reads['mean_bytes'])} on average, {reads['mean_under_way']:.1f} under way at a time ({reads['depth']} allowed), "
        f"at {rate_text(reads['bytes_per_s'])}."
    )


def _disk(profile: Profile) -> str:
    curve, size = DiskCurve(profile["device"]["read_curve"]), profile["reads"]["mean_bytes"]
    if not curve.depths or not size:
        return ""
    depth, best = max(profile["reads"]["mean_under_way"], 1.0), curve.best_depth(size)
    text = f"For reads of this size, this disk gives {rate_text(curve.rate(size, depth))} with as many under way"
    return text + (f", and {rate_text(curve.rate(size, best))} with {best}." if best > depth else ".")


def _loaders(profile: Profile) -> str:
    """Where loaders spend more of the wait on a processor than the disk does on reading, or long in line for one."""
    decoding, reads = profile["decoding"], profile["reads"]["per_step"]
    busy, cpu_ms, waited_ms = loader_busy(profile), decoding["loader_cpu_ms"], decoding["loader_queue_wait_ms"] or 0.0
    if not reads or not busy:
        return ""
    texts = []
    if busy > 0.5:
        texts.append(
            f"While they had something to read, loaders spent {percent_text(min(busy, 1.0))} of the time on a processor, "
            f"{1e3 * cpu_ms / reads:.0f} us a read: to hand it to the kernel and take it back. That takes more of the wait than the "
            "disk does; it is less for a read when many go together."
        )
    if (in_line := busy * waited_ms / cpu_ms) > 0.2:
        share = percent_text(min(in_line, 1.0))
        texts.append(f"Loaders stood in line for a processor for {share} of the time that they had something to read.")
    return " ".join(texts)


def _memory_bound(profile: Profile) -> str:
    layers = profile["layers"]
    named = sum(layer["hits"] + layer["misses"] for layer in layers)
    us = 1e3 * profile["token"]["memory_ms"] / max(len(layers), 1)
    return f"It handled {named:.0f} predicted neurons a token in {len(layers)} layers, {us:.0f} us a layer."


def _compute_bound(profile: Profile) -> str:
    moved = profile["traffic"]["dram_bytes_per_step"]
    rate = moved / max(profile["token"]["compute_ms"] / 1e3, 1e-9)
    return (
        f"It reads about {moved / 2**30:.2f} GiB of weights from DRAM a token, {rate_text(rate)} over the time of computing. "
        f"Reads from the disk were under way {percent_text(profile['reads']['busy_share'])} of the time."
    )
