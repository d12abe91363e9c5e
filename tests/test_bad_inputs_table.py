"""Each bad input of the table ends in one clear error within bounds, and harms nothing after it.

The cases run in a process of their own, whose memory and time are limited. Linux only.
"""

import sys
from functools import cache

import pytest

if sys.platform != "linux":
    pytest.skip("limits of memory are set as on Linux", allow_module_level=True)

from bad_run import SURFACES, Outcome, cases, complaint, run_surface

LEAST = 150
ALL = [(surface, i, case) for surface in SURFACES for i, case in enumerate(cases(surface))]


@cache
def outcomes(surface: str) -> tuple[list[Outcome], bool]:
    return run_surface(surface)


def test_there_are_enough_cases_and_each_has_a_name_of_its_own():
    assert len(ALL) >= LEAST
    names = [(surface, case.name) for surface, _, case in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("surface", "i", "case"), ALL, ids=lambda value: getattr(value, "name", str(value))[:70]
)
def test_one_clear_error(surface, i, case):
    outcome = outcomes(surface)[0][i]
    assert outcome.name == case.name
    assert not complaint(case, outcome)


@pytest.mark.parametrize("surface", SURFACES)
def test_a_good_picture_is_the_same_afterwards(surface):
    assert outcomes(surface)[1]
