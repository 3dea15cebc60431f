"""What processes used while tokens were decoded."""

import pytest

from inflash.tools.decoding_usage import TOTALS, decoding_usage, growth


def test_growth_is_of_the_time_asked_for() -> None:
    at = [0.0, 1.0, 2.0, 3.0]
    assert growth(at, [0.0, 10.0, 11.0, 13.0], 1.0, 3.0) == pytest.approx(3)  # what it was before does not count
    assert growth(at, [0.0, 10.0, 11.0, 13.0], 1.5, 2.5) == pytest.approx(0.5 + 1.0)


def test_a_total_that_is_seen_rarely_goes_on_at_its_pace() -> None:
    at = [0.0, 1.0, 2.0, 3.0]
    assert growth(at, [None, 4.0, 6.0, None], 0.0, 4.0) == pytest.approx(8)
    assert growth(at, [None, 4.0, None, None], 0.0, 4.0) is None
    assert growth(at, [0.0, 1.0, None, None], 2.0, 3.0) is None  # it was not seen in that time


def test_every_total_has_its_growth() -> None:
    samples = {"at_s": [0.0, 2.0], **{name: [1.0, 5.0] for name in TOTALS}}
    assert decoding_usage(samples, 0.0, 1.0) == pytest.approx(dict.fromkeys(TOTALS, 2.0))
