"""What would make a run faster, and how much of a token each change can save at most.

Every saving is an upper bound from this run's figures: what a part of the token takes, less what would be left of it. Savings overlap, so
they do not add up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from .amounts import ms_text, percent_text, size_text
from .disk_curve import DiskCurve

_LEAST = 0.03  # of a token, that advice has to be able to save
_MOST_ADVICE = 4
_LARGEST_BATCH = 64  # reads that a loader waits for together
_WIDEST_GAP = 64  # neurons
_BATCH = 8  # sequences together that advice reckons with

Profile = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change.

    Attributes:
      title: what it is, in a few words.
      text: how to do it, and what it would do.
      saves_ms: of a token, at most.
      first: it comes before everything else.
    """

    title: str
    text: str
    saves_ms: float
    first: bool = False


def advice(profile: Profile) -> list[Advice]:
    """What is worth trying, what may save most first."""
    io = _Waiting(profile)
    found = [*_larger_cache(profile, io), *_deeper(profile, io), *_wider_gap(profile, io), *_more_loaders(profile, io)]
    found += [*_sparse(profile), *_ahead(profile), *_computing(profile), *_together(profile)]
    worth = [one for one in found if one.saves_ms >= _LEAST * profile["token"]["total_ms"]]
    return sorted(worth, key=lambda one: (not one.first, -one.saves_ms))[:_MOST_ADVICE]


class _Waiting:
    """The wait for the disk, cut into what changes with how it is asked.

    Attributes:
      ms: all of it, of a token.
      reading_ms: reads were under way.
      handling_ms: loaders had requests, but no read under way: planning them, and taking reads back.
      curve: of the disk.
      depth: reads under way while there were any.
      size: bytes of a read.
      better_depth: where more under way would be faster: how many of a layer's reads; else None.
      left: the shares of reading and handling that this would leave.
    """

    def __init__(self, profile: Profile) -> None:
        reads, layers = profile["reads"], max(len(profile["layers"]), 1)
        self.ms = profile["token"]["io_wait_ms"]
        self.reading_ms = min(reads["wait_reading_ms"], self.ms)
        self.handling_ms = max(0.0, min(reads["wait_asked_ms"], self.ms) - self.reading_ms)
        self.curve, self.depth, self.size = (
            DiskCurve(profile["device"]["read_curve"]),
            reads["mean_under_way"],
            reads["mean_bytes"],
        )
        self.better_depth, self.left = None, (1.0, 1.0)
        if self.curve.depths and self.size > 0 and self.depth >= reads["depth"] / 2:
            better = min(self.curve.best_depth(self.size), reads["per_step"] / layers)
            if better >= 2 * self.depth:
                slower = self.curve.rate(self.size, self.depth) / self.curve.rate(self.size, better)
                self.better_depth = better
                self.left = min(slower, 1.0), max(self.depth, 1.0) / min(better, _LARGEST_BATCH)

    def saved_ms(self, reading_left: float, handling_left: float) -> float:
        return self.reading_ms * (1 - reading_left) + self.handling_ms * (1 - handling_left)


def tight_cache(profile: Profile) -> bool:
    """Whether the cache holds less than two tokens' neurons: then nearly every token throws out what the next one needs."""
    share = profile["cache"]["share"]
    return share is not None and share < 1 and share < 2 * _named(profile) / (len(profile["layers"]) * profile["model"]["d_ff"])


def _named(profile: Profile) -> float:
    """Neurons predicted for a token, in all layers."""
    return sum(layer["hits"] + layer["misses"] for layer in profile["layers"]) or 1.0


def _fetched(profile: Profile) -> float:
    """Neurons that a token has read, in all layers."""
    return sum(layer["misses"] + layer["prefetched"] for layer in profile["layers"])


def windows(profile: Profile) -> list[dict[str, float]]:
    """Of the working set's curve, the means over layers by window: "tokens", "share" of a layer named, "missed" of the next token's."""
    means = []
    for tokens, points in groupby(sorted(profile["working_set"], key=itemgetter("tokens")), key=itemgetter("tokens")):
        found = list(points)
        if all(point["missed"] is not None for point in found):
            mean = {key: sum(point[key] for point in found) / len(found) for key in ("share", "missed")}
            means.append({"tokens": tokens, **mean})
    return means


def _by_slot(profile: Profile) -> bool:
    """Whether missed neurons are picked, mostly, rather than whole layers read in order."""
    return profile["options"]["ffn"] == "sparse" and profile["run"]["dense_share"] < 0.5


def _larger_cache(profile: Profile, io: _Waiting) -> Iterator[Advice]:
    """The smallest measured window that saves half of what the largest does."""
    share, model = profile["cache"]["share"], profile["model"]
    if not _by_slot(profile) or share is None or share >= 1:
        return
    now = _fetched(profile) / _named(profile)
    larger = [window for window in windows(profile) if window["share"] > 1.1 * share and window["missed"] < now]
    if not larger:
        return
    most = max(now - window["missed"] for window in larger)
    window = next(window for window in larger if now - window["missed"] >= most / 2)
    neurons = round(window["share"] * model["d_ff"])
    layer_bytes = neurons * model["bundle_bytes"]
    more_bytes = (window["share"] - share) * model["d_ff"] * model["num_layers"] * model["bundle_bytes"]
    flag = f"--cache-neurons {window['share']:.2g}" if profile["options"]["memory"] is None else "a larger --memory"
    yield Advice(
        title="a larger cache",
        text=(
            f"{flag} gives it {neurons} of {model['d_ff']} neurons a layer ({size_text(layer_bytes)} a layer, "
            f"{size_text(more_bytes)} more in all), as many as {window['tokens']} tokens use together. A token would then miss about "
            f"{percent_text(window['missed'])} of its neurons; now {percent_text(now)} are read"
        ),
        saves_ms=io.ms * (1 - window["missed"] / now),
        first=tight_cache(profile) and io.ms > profile["token"]["compute_ms"],
    )


def _deeper(profile: Profile, io: _Waiting) -> Iterator[Advice]:
    if io.better_depth is None:
        return
    loaders = profile["options"]["loaders"]
    was, wanted = profile["reads"]["depth"] // loaders, -(-io.curve.best_depth(io.size) // loaders)
    yield Advice(
        title="more reads at a time",
        text=(
            f"--queue-depth {wanted} instead of {was}. With {io.better_depth:.0f} under way this disk reads "
            f"{1 / io.left[0]:.1f} times as fast, and loaders handle many reads at a time"
        ),
        saves_ms=io.saved_ms(*io.left),
    )


def _wider_gap(profile: Profile, io: _Waiting) -> Iterator[Advice]:
    """Fewer, larger reads with neurons between them that nobody needs, at the depth that the disk should be asked with anyway."""
    neuron, gap = profile["model"]["bundle_bytes"], profile["options"]["merge_gap"]
    missed = _fetched(profile) / (max(len(profile["layers"]), 1) * profile["model"]["d_ff"])
    if not _by_slot(profile) or not io.curve.depths or not 0 < missed < 1:
        return
    depth = max(io.better_depth or io.depth, 1.0)
    reads, seconds = _merged(missed, gap // neuron, neuron, io.curve, depth)
    choices = []
    for skipped in range(gap // neuron + 1, _WIDEST_GAP + 1):
        fewer, faster = _merged(missed, skipped, neuron, io.curve, depth)
        reading, handling = (left * share for left, share in zip(io.left, (faster / seconds, fewer / reads), strict=True))
        choices.append((io.saved_ms(reading, handling) - io.saved_ms(*io.left), skipped, fewer / reads))
    saved_ms, skipped, share = max(choices, default=(0.0, 0, 1.0))
    yield Advice(
        title="fewer, larger reads",
        text=(
            f"--merge-gap {skipped * neuron} reads up to {skipped} neurons in vain where two that are needed lie so close. "
            f"That leaves {percent_text(share)} of the reads, if missed neurons lie anywhere"
        ),
        saves_ms=saved_ms,
    )


def _merged(missed: float, skipped: int, neuron_bytes: int, curve: DiskCurve, depth: float) -> tuple[float, float]:
    """Reads and seconds for each missed neuron where gaps of up to `skipped` neurons are read along.

    Neurons are missed independently of each other with the probability `missed`, so gaps are geometric.
    """
    stays = 1 - missed
    reads = stays ** (skipped + 1)
    vain = sum(gap * missed * stays**gap for gap in range(skipped + 1))
    num_bytes = neuron_bytes * (1 + vain)
    return reads, num_bytes / curve.rate(num_bytes / reads, depth)


def _more_loaders(profile: Profile, io: _Waiting) -> Iterator[Advice]:
    """Where loaders are busy with themselves and a processor is left for another one and the engine."""
    loaders, processors = profile["options"]["loaders"], profile["machine"]["processors"] or 1
    if loader_busy(profile) > 0.5 and loaders + 1 < processors:
        yield Advice(
            title="one more loader",
            text=f"--loaders {loaders + 1} shares the work of handling reads between {loaders + 1} processes",
            saves_ms=io.ms / (loaders + 1),
        )


def loader_busy(profile: Profile) -> float:
    """Of the time that loaders had requests to serve, the share that a loader spent on a processor; 0 where it is not known."""
    served_ms = profile["reads"]["asked_share"] * profile["token"]["total_ms"] * profile["options"]["loaders"]
    return (profile["decoding"]["loader_cpu_ms"] or 0.0) / served_ms if served_ms else 0.0


def _sparse(profile: Profile) -> Iterator[Advice]:
    if profile["options"]["ffn"] in ("hybrid", "naive"):
        text = f"--ffn sparse reads those and no others, where {profile['options']['ffn']} reads all of them"
        yield Advice(title="only predicted neurons", text=text, saves_ms=profile["token"]["io_wait_ms"])


def _ahead(profile: Profile) -> Iterator[Advice]:
    if profile["prefetch"] is None and profile["options"]["prefetch"] == "none" and profile["look_ahead"]:
        yield Advice(
            title="reading ahead",
            text="with --prefetch auto the next layer's neurons are read while this one is computed",
            saves_ms=min(profile["token"]["io_wait_ms"], profile["token"]["compute_ms"]),
        )


def _computing(profile: Profile) -> Iterator[Advice]:
    compute_ms, waited_ms = profile["token"]["compute_ms"], profile["decoding"]["engine_queue_wait_ms"] or 0.0
    share = profile["engine_queue_wait_share"]
    if share is not None and share >= 0.2:
        text = (
            "when the engine's threads were ready to run, other programs, or threads and loaders of its own, had the processors for "
            f"{percent_text(share)} of the time, {ms_text(waited_ms)} a token over all threads"
        )
        yield Advice(title="more free processors", text=text, saves_ms=min(waited_ms, compute_ms + profile["token"]["memory_ms"]))
    if profile["kernels"] != "native":
        text = "`inflash build-kernels` compiles them, once; they speed up computing"
        yield Advice(title="native kernels", text=text, saves_ms=compute_ms)


def _together(profile: Profile) -> Iterator[Advice]:
    """Sequences that are decoded together share weights and look-ups."""
    if profile["sequences"] < 1.5:
        shared = profile["token"]["compute_ms"] + profile["token"]["memory_ms"]
        text = (
            f"where there are more to write, run-batch decodes up to --max-num-seqs of them together; {_BATCH} tokens share the reading "
            "of weights from DRAM"
        )
        yield Advice(title="several texts at once", text=text, saves_ms=shared * (1 - 1 / _BATCH))
