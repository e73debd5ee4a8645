"""Small functions of arrays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dspfx.utils.arrays import equal_rows, is_run


@given(st.integers(0, 12), st.integers(1, 11), st.integers(0, 2**31))
def test_equal_rows_are_grouped_in_the_order_of_their_first(n: int, c: int, seed: int) -> None:
    rows = np.random.default_rng(seed).random((n, c)) < 0.2
    group, distinct = equal_rows(rows)
    assert np.array_equal(distinct[group], rows)
    assert len(np.unique(distinct, axis=0)) == len(distinct)
    firsts = [int(np.flatnonzero(group == number)[0]) for number in range(len(distinct))]
    assert firsts == sorted(firsts)


def test_runs_are_consecutive_and_start_at_zero_or_later() -> None:
    found = [is_run(np.array(numbers, np.int64)) for numbers in ([3, 4, 5], [7], [3, 5], [-1, 0])]
    assert found == [True, True, False, False]
    assert not is_run(np.zeros(0, np.int64))
