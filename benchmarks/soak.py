"""A real ComfyUI server under hundreds of mixed jobs: what fails, what differs, what is left over.

    COMFYUI_PATH=... python benchmarks/soak.py --json benchmarks/results/soak.json

Runs on the CPU with the small model in several formats, with LoRAs, interrupts, cancelled jobs and
bad requests (soak_jobs.py). Rounds of jobs are queued at once; each ends with the same reference
job, after which the server's memory, threads and open files are measured. The first half of the
run is warm-up. Every job must end as it is meant to; pictures of a seed must be equal bit by bit;
no file, thread or open file may be left over; resident and anonymous memory may not grow by GROWTH
over the second half (line of least squares). USS is told only: it falls and rises with other
processes that have the same libraries open. Exits with 1 if anything is wrong.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import struct
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_queue import Run, Server
from soak_jobs import Job, Kind, make_files, rounds

PROBE = Path(__file__).with_name("soak_probe.py")
GROWTH = 0.01
# Below so many measurements in the second half, a line through them says nothing.
FEWEST = 8
# For glibc: tensors go back to the system when they are freed, and threads share one heap. What it
# keeps else, now more and now less, hides a growth of a percent.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
COUNTS = ("threads", "pool_threads", "open_files", "tensors", "tensor_bytes", "objects")
MESSAGE_SECONDS = 300
IDLE_SECONDS = 60
ENDINGS = {
    "execution_success": Kind.PICTURE,
    "execution_interrupted": Kind.INTERRUPTED,
    "execution_error": Kind.FAILING,
}


@dataclass
class Ended:
    """What became of a job."""

    job: Job
    run: Run
    kind: Kind | None = None
    message: str = ""
    hashes: list[str] = field(default_factory=list)
    is_flat: bool = False

    @property
    def failure(self) -> str:
        """What is wrong with it, in one line; nothing if it ended as it was meant to."""
        told = self.message.strip()
        if self.kind is not self.job.kind:
            ending = self.kind.value if self.kind else "no ending"
            return f"{ending} instead of {self.job.kind.value}: {told[:300]!r}"
        if self.job.message not in told:
            return f"the error does not say {self.job.message!r}: {told[:300]!r}"
        if self.kind is Kind.FAILING and "\n" in told:
            return f"the error is not one line: {told[:300]!r}"
        if self.kind is Kind.PICTURE and (not self.hashes or self.is_flat):
            return "the picture is of one colour" if self.hashes else "no picture"
        return ""


@dataclass(frozen=True)
class Sample:
    """The idle server after a reference job and a garbage collection; sizes in bytes."""

    jobs: int
    rss: int
    uss: int
    anonymous: int
    threads: int  # without asyncio's pool, which is bounded
    pool_threads: int
    open_files: int
    objects: int
    tensors: int
    tensor_bytes: int
    core_keys: int


class Round:
    """Jobs that are queued at once, on a connection of their own."""

    def __init__(self, server: Server, jobs: Sequence[Job]) -> None:
        self.server, self.jobs = server, jobs
        self.client = uuid.uuid4().hex
        self.ended: dict[str, Ended] = {}

    def run(self) -> list[Ended]:
        """Every job's ending, in order."""
        from websockets.sync.client import connect

        url = f"ws://127.0.0.1:{self.server.port}/ws?clientId={self.client}"
        with connect(url, max_size=None, ping_interval=None) as socket:
            for number, job in enumerate(self.jobs):
                self._post(job, f"refused-{number}")
            while any(one.kind is None for one in self.ended.values()):
                self._take(socket.recv(timeout=MESSAGE_SECONDS))
        wait_until_idle(self.server)
        for one in self.ended.values():
            self._read(one)
        self.server.post("/history", {"clear": True})
        return list(self.ended.values())

    def _post(self, job: Job, refused: str) -> None:
        body = {"prompt": job.graph, "client_id": self.client}
        status, reply = self.server.post("/prompt", body)
        queued = status == 200 and not reply["node_errors"]
        run = Run(reply["prompt_id"] if queued else refused)
        ended = self.ended[run.prompt_id] = Ended(job, run)
        if not queued:
            ended.kind, ended.message = Kind.REFUSED, json.dumps(reply)

    def _take(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            return
        event = json.loads(message)
        data = event.get("data", {})
        one = self.ended.get(data.get("prompt_id", ""))
        if one is None:
            return
        if event["type"] == "progress":
            one.run.progress.append((data["node"], data["value"], data["max"]))
            if one.job.interrupt_at == data["value"]:
                self._interrupt(one)
        elif event["type"] in ENDINGS:
            one.kind = ENDINGS[event["type"]]
            one.message = data.get("exception_message", "")

    def _interrupt(self, running: Ended) -> None:
        """Stop it, after the job right behind it is gone from the queue if that is to be."""
        order = list(self.ended.values())
        behind = order[order.index(running) + 1 :][:1]
        for one in behind:
            if one.job.kind is Kind.CANCELLED:
                self.server.post("/queue", {"delete": [one.run.prompt_id]})
                one.kind = Kind.CANCELLED
        self.server.post("/interrupt", {"prompt_id": running.run.prompt_id})

    def _read(self, one: Ended) -> None:
        """Hash the pixels of its pictures, and delete them."""
        cancelled = one.kind is Kind.CANCELLED
        if cancelled and self.server.get(f"/history/{one.run.prompt_id}"):
            one.kind, one.message = None, "a cancelled job was run"
        if one.kind is not Kind.PICTURE:
            return
        for path in self.server.pictures(one.run):
            with Image.open(path) as image:
                shape = struct.pack("<2I", *image.size)
                pixels = shape + image.mode.encode() + image.tobytes()
                one.is_flat |= all(low == high for low, high in image.getextrema())
            one.hashes.append(hashlib.sha256(pixels).hexdigest())
            path.unlink()


def wait_until_idle(server: Server) -> None:
    """Until nothing runs or waits; the history is complete then."""
    deadline = time.monotonic() + IDLE_SECONDS
    while any(server.get("/queue").values()):
        if time.monotonic() > deadline:
            raise RuntimeError("the queue did not become empty")
        time.sleep(0.05)


def measure(server: Server, jobs: int) -> Sample:
    counts = server.get("/soak/collect")
    process = psutil.Process(server.process.pid)
    memory = process.memory_full_info()
    anonymous = sum(part.anonymous for part in process.memory_maps())
    threads = process.num_threads() - counts["pool_threads"]
    return Sample(
        jobs, memory.rss, memory.uss, anonymous, threads, open_files=process.num_fds(), **counts
    )


def left_files(server: Server) -> set[str]:
    """Every file below the server's folders that is not part of ComfyUI or of this pack."""
    pack = (server.base / "custom_nodes", server.log_file)
    return {
        str(path.relative_to(server.base))
        for path in server.base.rglob("*")
        if path.is_file() and not any(path.is_relative_to(own) for own in pack)
    }


def growth(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """By which share of its start the line of least squares rises, and the standard error."""
    slope, start = statistics.linear_regression(x, y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    error = (left / (len(x) * statistics.pvariance(x))) ** 0.5
    share = (x[-1] - x[0]) / (start + slope * x[0])
    return slope * share, error * share


def rises(values: Sequence[int]) -> bool:
    """Whether a count of the last quarter is always above all of the second quarter."""
    quarter = max(1, len(values) // 4)
    return min(values[-quarter:]) > max(values[quarter : 2 * quarter] or values[:1])


def repeats(ended: Sequence[Ended]) -> tuple[int, list[str]]:
    """How many pictures were computed again, and what of those came out differently."""
    first: dict[str, list[str]] = {}
    again, unequal = 0, []
    for one in ended:
        if one.kind is not Kind.PICTURE or not one.run.progress:
            continue  # ComfyUI had the picture still
        if one.job.name in first:
            again += len(one.hashes)
            if one.hashes != first[one.job.name]:
                unequal.append(one.job.name)
        else:
            first[one.job.name] = one.hashes
    return again, unequal


class Soak:
    """One server, all rounds, and the figures."""

    def __init__(self, server: Server, jobs: int, seed: int) -> None:
        self.server, self.jobs, self.seed = server, jobs, seed
        self.ended: list[Ended] = []
        self.samples: list[Sample] = []
        self.files: set[str] = set()

    def run(self) -> dict[str, Any]:
        start = time.monotonic()
        for jobs in rounds(self.jobs, self.seed):
            self.ended += Round(self.server, jobs).run()
            self.samples.append(measure(self.server, len(self.ended)))
            if len(self.ended) <= max(self.jobs / 2, len(jobs)):
                self.files = left_files(self.server)
            self._tell(time.monotonic() - start)
        return self._result(time.monotonic() - start)

    def _tell(self, seconds: float) -> None:
        last, failures = self.samples[-1], sum(bool(one.failure) for one in self.ended)
        print(
            f"{last.jobs}/{self.jobs} jobs, {failures} failures, {seconds / last.jobs:.2f} s each, "
            f"RSS {last.rss / 1e6:.1f} MB, USS {last.uss / 1e6:.1f}, anonymous "
            f"{last.anonymous / 1e6:.1f}, {last.threads} + {last.pool_threads} threads, "
            f"{last.open_files} open files, {last.tensors} tensors of "
            f"{last.tensor_bytes / 1e6:.1f} MB, {last.objects} objects",
            file=sys.stderr,
        )

    def _result(self, seconds: float) -> dict[str, Any]:
        again, unequal = repeats(self.ended)
        late = [one for one in self.samples if one.jobs > self.jobs / 2]
        counts = Counter(one.kind.value for one in self.ended if one.kind)
        result = {
            "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "jobs": {"all": len(self.ended), **counts},
            "different pictures": len({o.job.name for o in self.ended if o.kind is Kind.PICTURE}),
            "repeated pictures": again,
            "not equal": sorted(set(unequal)),
            "failures": [f"{o.job.name}: {o.failure}" for o in self.ended if o.failure],
            "new files": sorted(left_files(self.server) - self.files),
            "memory": {name: _memory(name, late) for name in ("rss", "uss", "anonymous")},
            "keys dropped from ComfyUI's cache": sum(one.core_keys for one in self.samples),
            "counts": {name: [getattr(late[0], name), getattr(late[-1], name)] for name in COUNTS},
        }
        result["verdict"] = self._verdict(result)
        return result

    def _verdict(self, result: dict[str, Any]) -> list[str]:
        """What is not as it should be."""
        wrong = [name for name in ("failures", "not equal", "new files") if result[name]]
        for name in ("rss", "anonymous"):
            if (result["memory"][name]["growth"] or 0) >= GROWTH:
                wrong.append(f"{name} grows")
        if len(self.samples) >= 2 * FEWEST:
            for name in ("threads", "open_files", "tensors", "tensor_bytes"):
                if rises([getattr(sample, name) for sample in self.samples]):
                    wrong.append(f"{name} rise")
        return wrong


def _memory(name: str, late: Sequence[Sample]) -> dict[str, float | None]:
    jobs, sizes = [one.jobs for one in late], [getattr(one, name) for one in late]
    rise, error = growth(jobs, sizes) if len(late) >= FEWEST else (None, None)
    return {
        "first MB": round(sizes[0] / 1e6, 1), "last MB": round(sizes[-1] / 1e6, 1),
        "smallest MB": round(min(sizes) / 1e6, 1), "largest MB": round(max(sizes) / 1e6, 1),
        "growth": rise and round(rise, 5), "standard error": error and round(error, 5),
    }  # fmt: skip


def soak(checkout: Path, jobs: int, seed: int) -> tuple[str, dict[str, Any]]:
    """ComfyUI's version, and the figures."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(checkout, Path(folder) / "base")
        make_files(server.base / "models")
        probe = server.base / "custom_nodes" / "soak_probe"
        probe.mkdir()
        shutil.copy(PROBE, probe / "__init__.py")
        temporary = server.base / "tmp"
        temporary.mkdir()
        # The server's: to see what it leaves in its folder for temporary files.
        os.environ |= {"TMPDIR": str(temporary), **ALLOCATOR}
        with server:
            version = server.get("/system_stats")["system"]["comfyui_version"]
            return version, Soak(server, jobs, seed).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to this file")
    args = parser.parse_args()
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout:
        parser.error("COMFYUI_PATH is not set: no real ComfyUI to run")
    version, result = soak(Path(checkout), args.jobs, args.seed)
    print(json.dumps(result, indent=2))
    if args.json:
        known = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps({**known, version: result}, indent=2) + "\n", "utf-8")
    return 1 if result["verdict"] else 0


if __name__ == "__main__":
    sys.exit(main())
