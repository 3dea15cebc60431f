"""Rates between measured points."""

import pytest
from made_up_profile import CURVE

from inflash.tools.disk_curve import DiskCurve


def test_rates_are_interpolated_in_logarithms_and_end_at_what_was_measured() -> None:
    curve = DiskCurve(CURVE)
    assert curve.rate(4096, 1) == pytest.approx(40e6) and curve.rate(65536, 128) == pytest.approx(1.6e9)
    assert curve.rate(16384, 1) == pytest.approx((40e6 * 300e6) ** 0.5)
    assert curve.rate(4096, 128**0.5) == pytest.approx((40e6 * 400e6) ** 0.5)
    assert curve.rate(512, 1) == pytest.approx(40e6) and curve.rate(1 << 24, 1000) == pytest.approx(1.6e9)


def test_the_best_depth_is_the_least_that_gives_nearly_the_most() -> None:
    assert DiskCurve(CURVE).best_depth(4096) == 128
    flat = [{"size": 4096, "depth": depth, "bytes_per_s": rate} for depth, rate in ((1, 10.0), (16, 95.0), (128, 100.0))]
    assert DiskCurve(flat).best_depth(4096) == 16
    assert DiskCurve([]).depths == []
