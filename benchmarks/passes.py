"""What fewer passes through the transformer cost: steps, guidance intervals and the block cache.

    python benchmarks/passes.py WORK --font NotoColorEmoji.ttf --json benchmarks/results/passes.json

On the small model, 200 held-out prompts at cfg 4 in fp32 (WORK and --font as small_model.py takes
them). A step with guidance is two passes for each picture. A pass that the cache ends after the
first block does not count. See sampling_judge.py for the figures.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from chroma_nodes.chroma.caching import CacheSettings
from chroma_nodes.chroma.guidance.plan import Guidance
from chroma_nodes.samplers import SAMPLERS
from sampling_judge import Judge
from sampling_ways import sigmas

CFG = 4.0


@dataclass(frozen=True)
class Way:
    """How to spend passes; guidance is on between these sigmas."""

    sampler: str
    steps: int
    start: float = 1.0
    end: float = 0.0
    cache: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}"]
        if (self.start, self.end) != (1.0, 0.0):
            parts.append(f"guidance {self.start:g} to {self.end:g}")
        if self.cache:
            parts.append(f"cache {self.cache:g}")
        return ", ".join(parts)


WAYS = [
    *(Way("flow_pec", steps) for steps in (26, 15, 13, 10, 8)),
    Way("euler", 26), Way("res_multistep", 26), Way("res_multistep", 15),
    *(Way("flow_pec", 26, end=end) for end in (0.2, 0.5)),
    *(Way("flow_pec", 26, cache=threshold) for threshold in (0.1, 0.2)),
    Way("flow_pec", 16, end=0.2), Way("flow_pec", 16, cache=0.1),
    Way("flow_pec", 16, end=0.2, cache=0.1), Way("flow_pec", 13, end=0.2, cache=0.1),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--font", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    judge = Judge(args.work, args.font, args.count, CFG)
    found = {}
    for way in WAYS:
        guidance = Guidance(CFG, interval_start=way.start, interval_end=way.end)
        cache = CacheSettings(way.cache) if way.cache else None
        sampler = partial(SAMPLERS[way.sampler], disable=True)
        levels = sigmas("beta .6", way.steps).float()
        found[str(way)] = judge.figures(sampler, levels, guidance, cache)
        print(f"{way!s:44}", json.dumps(found[str(way)]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
