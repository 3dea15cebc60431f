"""How amounts are written."""

import pytest

from inflash.tools.amounts import ms_text, percent_text, rate_text, size_text, whole_percents


def test_amounts_have_units() -> None:
    assert [size_text(2.0**power) for power in (12, 20, 31)] == ["4 KiB", "1.0 MiB", "2.00 GiB"]
    assert (rate_text(41e6), rate_text(2.5e9)) == ("41 MB/s", "2.50 GB/s")
    assert [ms_text(ms) for ms in (0.123, 5.67, 220.5)] == ["0.12 ms", "5.7 ms", "220 ms"] and percent_text(0.125) == "12 %"


@pytest.mark.parametrize(
    ("amounts", "shares"),
    [([173.4, 5.8, 41.3], [79, 2, 19]), ([1, 1, 1], [34, 33, 33]), ([0.0, 0.0], [0, 0]), ([], []), ([5], [100])],
)
def test_shares_sum_to_a_hundred(amounts: list[float], shares: list[int]) -> None:
    found = whole_percents(amounts)
    assert found == shares and sum(found) == (100 if sum(amounts) else 0)
