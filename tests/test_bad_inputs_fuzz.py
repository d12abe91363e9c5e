"""Inputs that hypothesis makes up, a few hundred of each kind."""

import pytest
from bad_fuzz import FUZZED, TAKEN, fuzz

COUNT = 300


@pytest.mark.parametrize("kind", FUZZED)
def test_taken_or_refused_in_one_line(kind, tmp_path):
    found = fuzz(kind, COUNT, tmp_path)
    assert sum(found.values()) >= COUNT / 2
    # Both sides of every reader are reached; parse_weights refuses nothing.
    assert len(found) > 1 or kind == "prompt weights"
    if kind == "prompt weights":
        assert set(found) == {TAKEN}
