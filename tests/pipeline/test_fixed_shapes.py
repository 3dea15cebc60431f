"""What varies is padded to the next of a few sizes."""

import pytest

from inflash.pipeline.fixed_shapes import doublings, fitting


def test_sizes_double_up_to_the_most_and_the_first_that_holds_is_taken() -> None:
    sizes = doublings(64, 300)
    assert sizes == [64, 128, 256, 300]
    assert [fitting(count, sizes) for count in (0, 64, 65, 257, 300)] == [64, 64, 128, 300, 300]


def test_more_than_the_largest_is_told() -> None:
    """Not by StopIteration, which a generator on the way would take for its own end."""
    with pytest.raises(ValueError, match="301 of something: kernels are compiled for 300 at most"):
        fitting(301, doublings(64, 300))
