"""How amounts are written for people: sizes, rates, times, and shares that add up."""

from collections.abc import Sequence


def rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def size_text(num_bytes: float) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 1024:.0f} KiB"


def ms_text(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def percent_text(share: float) -> str:
    return f"{100 * share:.0f} %"


def whole_percents(amounts: Sequence[float]) -> list[int]:
    """Shares in whole per cent that sum to 100, each at most one from the exact one; only zeros stay zeros."""
    total = sum(amounts)
    if total <= 0:
        return [0] * len(amounts)
    exact = [100 * amount / total for amount in amounts]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: shares[place] - exact[place])
    for place in by_rest[: 100 - sum(shares)]:
        shares[place] += 1
    return shares
