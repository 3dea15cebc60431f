"""Three sentences of what limits a run, computed from its figures: where the time goes, why, and what would help."""

from collections.abc import Sequence
from typing import Any

_BUSY = 0.5  # of the wait reads are under way: then the disk, or how it is asked, decides
_SHALLOW = 0.6  # of the best rate at this size: deeper would be faster


def limits(profile: dict[str, Any]) -> list[str]:
    """The sentences, for the report and the terminal."""
    token = profile["token"]
    if not token["steps"]:
        return [
            "No token was decoded, so nothing can be said about decoding.",
            f"Prompts took {profile['prompts']['s']:.2f} s for {profile['prompts']['tokens']} tokens.",
            "Generate a few dozen tokens (--max-tokens 64) to profile decoding.",
        ]
    parts = {name: token[f"{name}_ms"] for name in ("io_wait", "memory", "compute")}
    largest = max(parts, key=lambda name: parts[name])
    because, advice = {"io_wait": _io_bound, "memory": _memory_bound, "compute": _compute_bound}[largest](profile)
    return [_where(token, largest, parts[largest]), because, advice]


def _where(token: dict[str, float], largest: str, ms: float) -> str:
    share = 100 * ms / max(token["total_ms"], 1e-9)
    what = {
        "io_wait": "the engine waited for neurons from the disk and had nothing to compute",
        "memory": "the engine looked neurons up, gave them slots and wrote requests",
        "compute": "the engine computed",
    }[largest]
    return f"A token took {token['total_ms']:.1f} ms, and for {ms:.1f} ms of it ({share:.0f} %) {what}."


def _io_bound(profile: dict[str, Any]) -> tuple[str, str]:
    reads = profile["reads"]
    now = (
        f"The loaders had reads under way {100 * reads['busy_share']:.0f} % of the time, {reads['mean_under_way']:.1f} at once of "
        f"{reads['depth']} allowed, of {size_text(reads['mean_bytes'])} each, and got {rate_text(reads['bytes_per_s'])} for the "
        f"{size_text(reads['bytes_per_step'])} that a token missed"
    )
    curve = profile["device"]["read_curve"]
    remedies = [*_deeper(reads, curve), *_larger(reads, curve), *_more_cache(profile)]
    deepest = best_rate(curve, reads["mean_bytes"])
    if deepest:
        rate, point = deepest
        now += f"; this disk gives {rate_text(rate)} at {size_text(point['size'])} with {point['depth']} under way"
    return now + "." + _between_reads(profile), _join(remedies, profile)


def _between_reads(profile: dict[str, Any]) -> str:
    """Where the engine waited much longer than the disk read: what loaders did meanwhile."""
    waited, read = profile["token"]["io_wait_ms"] / max(profile["token"]["total_ms"], 1e-9), profile["reads"]["busy_share"]
    if read > _BUSY * waited:
        return ""
    return (
        f" So for most of the {100 * waited:.0f} % that the engine waited no read was under way: loaders were handing reads in and taking "
        "them back, which costs processor time each time, and less for a read the more of them go together."
    )


def _deeper(reads: dict[str, Any], curve: Sequence[dict[str, Any]]) -> list[str]:
    best = best_rate(curve, reads["mean_bytes"])
    if best is None:
        return ["raise --queue-depth"] if reads["depth"] < 32 else []
    rate, point = best
    if reads["bytes_per_s"] < _SHALLOW * rate and reads["depth"] < point["depth"]:
        times = rate / max(reads["bytes_per_s"], 1)
        return [f"raise --queue-depth from {reads['depth']} to {point['depth']} (up to {times:.1f} times the rate)"]
    return []


def _larger(reads: dict[str, Any], curve: Sequence[dict[str, Any]]) -> list[str]:
    """Merging pays where the disk gives a multiple for larger reads."""
    small, large = best_rate(curve, reads["mean_bytes"]), best_rate(curve, 8 * reads["mean_bytes"])
    if small is None or large is None or large[0] < 2 * small[0]:
        return []
    return [
        f"read neighbours together (--merge-gap): at {size_text(large[1]['size'])} the disk gives {rate_text(large[0])}, "
        f"{large[0] / small[0]:.1f} times as much as at {size_text(small[1]['size'])}"
    ]


def _more_cache(profile: dict[str, Any]) -> list[str]:
    rate, share = profile["run"]["cache_hit_rate"], profile["cache"]["share"]
    if profile["options"]["ffn"] != "sparse":
        return ["use --ffn sparse, which reads predicted neurons only"]
    if share is None or share >= 1:
        return []
    return [
        f"keep more neurons in memory: {100 * rate:.0f} % of those named were in a cache of {100 * share:.0f} % (--cache-neurons)"
    ]


def _memory_bound(profile: dict[str, Any]) -> tuple[str, str]:
    named = sum(layer["hits"] + layer["misses"] for layer in profile["layers"])
    because = (
        f"It handled {named:.0f} named neurons a token in {len(profile['layers'])} layers, "
        f"{1e3 * profile['token']['memory_ms'] / max(len(profile['layers']), 1):.0f} us a layer."
    )
    waiting = _queue_wait(profile)
    remedies = ["decode several sequences together (--max-num-seqs), which share the look-up"]
    return because, _join([*([waiting] if waiting else []), *remedies], profile)


def _compute_bound(profile: dict[str, Any]) -> tuple[str, str]:
    moved = profile["traffic"]["dram_bytes_per_step"]
    rate = moved / max(profile["token"]["compute_ms"] / 1e3, 1e-9)
    because = (
        f"It reads about {moved / 2**30:.2f} GiB of weights from memory a token, {rate_text(rate)} over the time of computing"
    )
    because += f", and the disk was busy {100 * profile['reads']['busy_share']:.0f} % of the time."
    remedies = []
    if (waiting := _queue_wait(profile)) is not None:
        remedies.append(waiting)
    if profile["kernels"] != "native":
        remedies.append("compile the native kernels (inflash build-kernels)")
    if profile["sequences"] < 1.5:
        remedies.append("decode several sequences together (run-batch, --max-num-seqs), which share these weights")
    return because, _join(remedies or ["use a predictor that names fewer neurons, or a smaller model"], profile)


def _queue_wait(profile: dict[str, Any]) -> str | None:
    """Whether the engine's threads stood in line for a processor."""
    share = profile["engine_queue_wait_share"]
    if share is None or share < 0.2:
        return None
    return f"leave the processor to inflash: when its threads were ready they stood in line for one for {100 * share:.0f} % of the time"


def _join(remedies: Sequence[str], profile: dict[str, Any]) -> str:
    if not remedies:
        return "The disk gives no more for such reads: a faster disk, more memory, or a predictor that names fewer neurons would help."
    return "To be faster: " + "; ".join(remedies) + "."


def best_rate(curve: Sequence[dict[str, Any]], size: float) -> tuple[float, dict[str, Any]] | None:
    """The fastest measured point of the size nearest to one (by ratio), and its rate; None: nothing was measured."""
    if not curve or size <= 0:
        return None
    nearest = min(sorted({point["size"] for point in curve}), key=lambda known: max(known / size, size / known))
    point = max((point for point in curve if point["size"] == nearest), key=lambda point: point["bytes_per_s"])
    return point["bytes_per_s"], point


def rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def size_text(num_bytes: float) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 1024:.0f} KiB"
