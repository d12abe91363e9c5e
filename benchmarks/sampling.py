"""Error of every sampler and schedule at equal numbers of model evaluations.

    COMFYUI_PATH=... python benchmarks/sampling.py --json benchmarks/results/sampling.json

On flows whose solution is known (tests/flows.py) and on the small model at cfg 4 in fp32, against
its trajectory in 400 steps of Heun's method: the median relative error of the final latent.
What --json names is added to. With --work and --font (see small_model.py) also, for the samplers
named by --judge, how many of 200 held-out prompts are obeyed, and how far the set of pictures is
from that of converged ones.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chroma_nodes.chroma.guidance import Denoiser
from chroma_nodes.chroma.pipeline import Pipeline
from chroma_nodes.samplers.heun import sample_heun
from pictures import PROMPTS
from sampling_judge import Judge
from sampling_ways import SCHEDULES, Way, comfyui, ours, sigmas
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
REFERENCE_STEPS = 400


@dataclass(frozen=True)
class Task:
    """A flow: its model, the noise to start from, and where the exact trajectory ends."""

    name: str
    model: Callable[..., Tensor]
    noise: Tensor
    error: Callable[[Tensor], float]

    def run(self, way: Way, schedule: str, steps: int) -> float:
        """The error at the end."""
        levels = sigmas(schedule, steps).to(self.noise.dtype)
        return self.error(way.sample(self.model, levels[0] * self.noise, levels))


def small_model(prompts: list[str], seed: int = 5) -> Task:
    """The shipped model at cfg 4."""
    pipeline = Pipeline.load(dtype=torch.float32)
    model = Denoiser(
        pipeline.transformer, pipeline.text_encoder.encode(prompts),
        pipeline.text_encoder.encode([""]), 4.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), 16, 16, 16, generator=generator)
    levels = sigmas("beta .6", REFERENCE_STEPS).float()
    solution = sample_heun(model, noise, levels, disable=True).flatten(1)

    def error(x: Tensor) -> float:
        away = (x.flatten(1) - solution).norm(dim=1) / solution.norm(dim=1)
        return float(away.median())

    return Task("small model", model, noise, error)


def toys() -> list[Task]:
    """The analytic flows, in fp64."""
    from flows import all_flows

    # On straight lines every sampler is exact.
    flows = [flow for flow in all_flows() if flow.name != "straight"]
    return [Task(flow.name, flow.model, flow.noise, flow.error) for flow in flows]


def grid(tasks: list[Task], ways: list[Way], budgets: list[int], schedules: list[str]) -> dict:
    """{task: {schedule: {way: {evaluations: figures}}}}"""
    result: dict[str, Any] = {}
    steps = {(way.name, calls): way.steps(calls) for way in ways for calls in budgets}
    for task in tasks:
        rows = result.setdefault(task.name, {})
        started = time.perf_counter()
        for schedule in schedules:
            for way in ways:
                cells = rows.setdefault(schedule, {}).setdefault(way.name, {})
                for calls in budgets:
                    if count := steps[way.name, calls]:
                        cells[str(calls)] = task.run(way, schedule, count)
        print(f"{task.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return result


def median_error(result: dict, way: str, calls: int, schedules: list[str]) -> float:
    """Geometric mean over schedules and tasks."""
    errors = [
        result[task][schedule][way][str(calls)]
        for task in result
        for schedule in schedules
        if str(calls) in result[task][schedule][way]
    ]
    usable = [max(e, 1e-9) for e in errors if math.isfinite(e)]
    return math.exp(statistics.fmean(map(math.log, usable))) if usable else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 13, 16, 26, 52])
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="else every one")
    parser.add_argument("--skip", nargs="*", default=[], choices=("toys", "small"))
    parser.add_argument("--work", type=Path, help="artwork, as small_model.py takes it")
    parser.add_argument("--font", type=Path)
    parser.add_argument("--judge", nargs="+", default=[], metavar="sampler/schedule/evaluations")
    parser.add_argument("--count", type=int, default=200, help="prompts to judge")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    ways = ours() + comfyui()
    result: dict[str, Any] = {
        "machine": {"torch": torch.__version__, "machine": platform.machine()},
        "errors": {},
    }
    tasks = [] if "toys" in args.skip else toys()
    if "small" not in args.skip:
        tasks.append(small_model(PROMPTS))
    compared = [way for way in ways if args.samplers is None or way.name in args.samplers]
    if tasks:
        result["errors"] = grid(tasks, compared, args.budgets, args.schedules)
        print(f"{'geometric mean':28}" + "".join(f"{calls:>9}" for calls in args.budgets))
        for way in compared:
            row = [
                median_error(result["errors"], way.name, c, args.schedules) for c in args.budgets
            ]
            print(f"{way.name:28}" + "".join(f"{error:9.4f}" for error in row))
    if args.judge:
        judge = Judge(args.work, args.font, args.count)
        by_name = {way.name: way for way in ways}
        result["pictures"] = {}
        for choice in args.judge:
            sampler, schedule, calls = choice.split("/")
            way = by_name[sampler]
            levels = sigmas(schedule, way.steps(int(calls))).float()
            result["pictures"][choice] = judge.figures(way.sample, levels)
            print(choice, json.dumps(result["pictures"][choice]), flush=True)
    if args.json:
        earlier = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(merged(earlier, result), indent=1) + "\n")


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Both, the later one's figures where they meet: a long table can be made in parts."""
    both = {**earlier, **later}
    for key in earlier.keys() & later.keys():
        if isinstance(earlier[key], dict) and isinstance(later[key], dict):
            both[key] = merged(earlier[key], later[key])
    return both


if __name__ == "__main__":
    main()
