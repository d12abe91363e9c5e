"""The soak benchmark: a short run on a real ComfyUI server, and what it objects to."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import soak
from comfy_queue import Run
from soak import Ended, growth, repeats, rises
from soak_jobs import FORMATS, LORAS, WORKFLOWS, Job, Kind, rounds

CHECKOUT = os.environ.get("COMFYUI_PATH")
JOBS = 12


@pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against")
def test_a_short_run_ends_as_it_is_meant_to(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, soak.__file__, "--jobs", str(JOBS), "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{JOBS}/{JOBS} jobs, 0 failures" in done.stderr
    (result,) = json.loads(out.read_text("utf-8")).values()
    meant = Counter(job.kind.value for jobs in rounds(JOBS, 0) for job in jobs)
    assert result["jobs"] == {"all": JOBS, **meant}
    assert result["repeated pictures"] > 0
    assert result["verdict"] == result["failures"] == result["not equal"] == []
    assert result["memory"]["rss"]["growth"] is None


def test_a_long_run_has_everything_and_repeats_it():
    every = list(rounds(500, 0))
    assert every == list(rounds(500, 0)) != list(rounds(500, 1))
    jobs = [job for one in every for job in one]
    assert len(jobs) == 500 and all(one[-1].name == "reference" for one in every)
    counts = Counter(job.name for job in jobs if job.kind is Kind.PICTURE)
    assert min(counts.values()) > 1
    for names in (WORKFLOWS, FORMATS, LORAS):
        for name in names:
            assert any(name in job.name.split(", ") for job in jobs), name
    for one in every:
        for before, job in zip([None, *one], one, strict=False):
            if job.kind is Kind.CANCELLED:
                assert before.kind is Kind.INTERRUPTED


def test_growth_is_the_rise_of_the_line_over_its_start():
    noise = random.Random(0)
    x = range(100, 351, 10)
    level = [100 + noise.gauss(0, 0.1) for _ in x]
    rising = [y * (1 + 0.02 * (jobs - 100) / 250) for jobs, y in zip(x, level, strict=True)]
    for values, expected in ((level, 0.0), (rising, 0.02)):
        share, error = growth(x, values)
        assert abs(share - expected) < 4 * error < 0.01
    assert growth(x, [3.0 * jobs for jobs in x]) == pytest.approx((2.5, 0.0))


def test_counts_rise_only_if_the_end_is_above_all_that_was_before():
    assert rises([4, 4, 5, 5, 6, 6, 7, 7])
    assert not rises([4, 4, 7, 5, 6, 7, 7, 7])
    assert not rises([9, 9, 5, 5, 5, 5, 5, 5])


def ended(kind, meant=None, message="", expected="", hashes=(), name="a", flat=False):
    """A job that ended as `kind` after one step."""
    run = Run("id", progress=[("12", 1, 2)])
    return Ended(Job(meant or kind, name, {}, expected), run, kind, message, list(hashes), flat)


def test_every_ending_that_was_not_meant_is_a_failure():
    good = ended(Kind.PICTURE, hashes=["x"])
    assert not good.failure
    assert "no picture" in ended(Kind.PICTURE).failure
    assert "one colour" in ended(Kind.PICTURE, hashes=["x"], flat=True).failure
    failed = ended(Kind.FAILING, Kind.PICTURE, "out of memory")
    assert "instead of picture" in failed.failure and "out of memory" in failed.failure
    assert "no ending" in ended(None, Kind.INTERRUPTED).failure
    told = {"message": "x.gguf is damaged", "expected": "damaged"}
    assert not ended(Kind.FAILING, **told).failure
    assert "does not say" in ended(Kind.FAILING, message="KeyError: 'x'", expected="x.gguf").failure
    assert "one line" in ended(Kind.FAILING, message="a\nb", expected="a").failure


def test_repeats_are_compared_with_the_first_of_their_job():
    first = ended(Kind.PICTURE, hashes=["x", "y"])
    other = ended(Kind.PICTURE, hashes=["z"], name="b")
    wrong = ended(Kind.PICTURE, hashes=["x", "z"])
    assert repeats([first, other, first]) == (2, [])
    assert repeats([first, other, wrong]) == (2, ["a"])
    kept = ended(Kind.PICTURE, hashes=["q"])
    kept.run.progress.clear()
    assert repeats([first, kept]) == (0, [])
