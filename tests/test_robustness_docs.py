"""The figures of docs/robustness.md are those that the benchmarks recorded."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "robustness.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
NEWEST = "0.33.0"


def rows():
    """The cells of every row of the page's tables."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def test_bad_inputs():
    found = results("bad_inputs")
    assert all(not one["wrong"] for one in found.values()) and set(found) == {"0.3.64", NEWEST}
    counts = [row for row in rows() if len(row) in (3, 4) and row[1].isdigit()]
    kinds = [*found[NEWEST]["table"].values(), *found[NEWEST]["made up"].values()]
    assert [int(row[1]) for row in counts] == [sum(classes.values()) for classes in kinds]
    for (_, _, ended, *taken), classes in zip(counts, kinds, strict=True):
        told = sorted(int(number) for number in re.findall(r"(\d+) [a-zA-Z]", ended))
        kept = {name: count for name, count in classes.items() if name != "taken"}
        assert told == sorted(kept.values()), ended
        assert [int(cell) for cell in taken] == ([classes["taken"]] if taken else [])
    old = found["0.3.64"]["table"]["requests"]
    assert f"answers {old['status 500']} of them so, and {old['status 400']} with 400" in PAGE


def test_soak():
    found = results("soak")
    shown = {row[0]: row[1:] for row in rows() if len(row) == 3 and not row[1].isdigit()}
    for column, version in enumerate(("0.3.64", NEWEST)):
        one = found[version]
        assert not one["verdict"] and not one["failures"] and not one["new files"]
        jobs, memory, counts = one["jobs"], one["memory"], one["counts"]
        endings = ("picture", "interrupted", "cancelled while queued", "refused when posted",
                   "stopped by an error")  # fmt: skip
        told = shown["jobs: pictures, interrupted, cancelled, refused, errors"][column]
        assert told == ", ".join(str(jobs[ending]) for ending in endings)
        told = shown["pictures computed again, of these not equal bit by bit"][column]
        assert told == f"{one['repeated pictures']}, {len(one['not equal'])}"
        for name, title in (("rss", "resident"), ("anonymous", "anonymous")):
            growth, error = memory[name]["growth"], memory[name]["standard error"]
            told = shown[f"{title} memory in the second half"][column]
            assert told.endswith(f"+{growth:.2%} ± {error * 100:.2f}".replace("%", " %"))
        first, last = memory["rss"]["first MB"], memory["rss"]["last MB"]
        assert f"{first} to {last} MB" in shown["resident memory in the second half"][column]
        threads, pool = counts["threads"], counts["pool_threads"]
        both = [a + b for a, b in zip(threads, pool, strict=True)]
        told = shown["threads, open files, live tensors, at the start and end of it"][column]
        assert both[0] == both[1] and counts["open_files"][0] == counts["open_files"][1]
        assert counts["tensors"][0] == counts["tensors"][1]
        assert told == f"{both[0]}, {counts['open_files'][0]}, {counts['tensors'][0]}: the same"
