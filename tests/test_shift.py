"""Shifts of schedules, and the tables that hold them."""

import math

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.schedulers.shift import (
    apply_shift,
    check_shift,
    discrete_table,
    flux_shift,
    flux_table,
    table_shift,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_cases import SHIFTS


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), SHIFTS, SHIFTS)
def test_shifts_multiply_and_undo_each_other(sigma, first, second):
    s = torch.tensor([sigma], dtype=torch.float64)
    twice, once = apply_shift(apply_shift(s, first), second), apply_shift(s, first * second)
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(apply_shift(apply_shift(s, first), 1 / first), s, atol=1e-9, rtol=0)
    assert torch.equal(apply_shift(s, 1.0), s)
    assert 0 <= float(apply_shift(s, first)) <= 1 + 1e-12


@settings(max_examples=200, deadline=None)
@given(SHIFTS)
def test_tables_rise_to_one_and_tell_their_shift(shift):
    for table in (discrete_table(shift), flux_table(math.log(shift))):
        # A small shift a divides by 1 + (a - 1), which fp32 rounds.
        rounding = 2.5e-7 * max(1, 1 / shift)
        assert table.dtype == torch.float32 and table[-1] == pytest.approx(1, abs=rounding)
        assert bool((table[1:] >= table[:-1]).all()) and table[0] > 0
        assert table_shift(table) == pytest.approx(shift, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 256), st.integers(1, 256), st.floats(-2, 2), st.floats(-2, 2)
)  # fmt: skip
def test_flux_shift_is_diffusers_or_says_that_it_is_unusable(columns, rows, base, top):
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    mu = flux.calculate_shift(columns * rows, 256, 4096, base, top)
    assume(abs(abs(mu) - math.log(100)) > 1e-6)
    if abs(mu) > math.log(100):
        with pytest.raises(SamplingError, match=r"pixels give mu .*lower max_shift"):
            flux_shift(16 * columns, 16 * rows, base, top)
    else:
        shift = flux_shift(16 * columns, 16 * rows, base, top)
        assert check_shift(shift) == pytest.approx(math.exp(mu), rel=1e-9)


def test_flux_shift_at_the_sizes_people_use():
    sizes = [(512, 512), (768, 768), (1024, 1024), (1152, 1152), (1536, 1536), (2048, 2048)]
    shifts = [flux_shift(*size) for size in sizes]
    np.testing.assert_allclose(shifts, [1.88, 2.33, 3.16, 3.80, 7.5, 25.3], rtol=5e-3)


@pytest.mark.parametrize(
    ("size", "line"), [((4096, 4096), {}), ((256, 256), {"base_shift": math.nan})]
)
def test_a_flux_shift_out_of_range_is_one_line(size, line):
    with pytest.raises(SamplingError, match=r"pixels give mu .*expected mu from -4\.6 to 4\.6"):
        flux_shift(*size, **line)
