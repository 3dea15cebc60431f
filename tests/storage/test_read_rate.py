import pytest

from inflash.storage.read_rate import worthwhile_gap


@pytest.mark.parametrize("start_bytes", [0, 8192, 100_000])
def test_a_gap_pays_while_it_takes_less_time_than_a_read_takes_to_start(start_bytes: int) -> None:
    points = [
        (size, size / (size + start_bytes) * 2e9 / (3 if depth == 1 else 1))
        for size in (4096, 65536, 1 << 20)
        for depth in (1, 64)
    ]
    assert worthwhile_gap(points) == pytest.approx(start_bytes, abs=2)
    assert worthwhile_gap(points[:2]) == 0
