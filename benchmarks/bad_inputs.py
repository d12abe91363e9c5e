"""How many bad inputs were tried, and how each kind of them ended.

    COMFYUI_PATH=... python benchmarks/bad_inputs.py --json benchmarks/results/bad_inputs.json

The table of `tests/bad_run.py` runs in a process for each part of the pack, under limits of time
and memory; `--count` inputs of each kind are made up by hypothesis; with a ComfyUI in COMFYUI_PATH,
run in its environment, the bad requests go to a real server. Ends with status 1 if anything ended
otherwise than in one clear error, or if a good picture is not the same afterwards.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from bad_fuzz import FUZZED, fuzz
from bad_requests import BODIES, REQUESTS, ask, post_raw, write_files
from bad_run import SURFACES, by_class, cases, complaint, run_surface
from bad_workflows import small_graph
from comfy_queue import Server


def table() -> tuple[dict[str, dict[str, int]], list[str]]:
    """{part: {class of error: how many}}, and what is wrong."""
    counts, wrong = {}, []
    for surface in SURFACES:
        outcomes, same = run_surface(surface)
        counts[surface] = dict(by_class(outcomes))
        pairs = zip(cases(surface), outcomes, strict=True)
        found = [(case.name, complaint(case, outcome)) for case, outcome in pairs]
        wrong += [f"{surface}, {name}: {told}" for name, told in found if told]
        wrong += [] if same else [f"{surface}: a good picture changed"]
    return counts, wrong


def requests(checkout: Path) -> tuple[str, dict[str, int], list[str]]:
    """ComfyUI's version, {ending: how many} of the requests to it, and what is wrong."""
    counts: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder, Server(checkout, Path(folder) / "b") as server:
        version = server.get("/system_stats")["system"]["comfyui_version"]
        write_files(server)
        for request in REQUESTS:
            ending, told = ask(server, request)
            counts[f"status {ending}" if ending.isdigit() else ending] += 1
            if ending != request.ending or request.says not in told:
                wrong.append(f"request, {request.name}: {ending} {told[:200]}")
        for body in BODIES.values():
            counts[f"status {post_raw(server, body)}"] += 1
        if server.run(small_graph()).ending != "execution_success":
            wrong.append("the server draws no more")
    return version, dict(counts), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="made-up inputs of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    args = parser.parse_args()
    found, wrong = table()
    version, checkout = "without ComfyUI", os.environ.get("COMFYUI_PATH")
    if checkout:
        version, found["requests"], more = requests(Path(checkout))
        wrong += more
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: dict(fuzz(kind, args.count, Path(folder))) for kind in FUZZED}
    for part, counts in (*found.items(), *made.items()):
        ends = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        print(f"{part}: {sum(counts.values())} tried: {ends}")
    tried = sum(sum(counts.values()) for counts in found.values())
    print(f"table: {tried} bad inputs, {len(wrong)} not as they should be")
    print(*wrong, sep="\n")
    if args.json is not None:
        result = {"python": platform.python_version(), "table": found, "made up": made,
                  "wrong": wrong}  # fmt: skip
        known = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps({**known, version: result}, indent=2) + "\n", "utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
