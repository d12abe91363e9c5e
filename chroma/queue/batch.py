"""Run the jobs of a batch on a server, and save what they make."""

import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import QueueError, RowFailed, Unreachable
from .jobs import Job
from .server import Picture, Server
from .state import State, whole

log = logging.getLogger("chroma")

# Two, so that the server has the next one at hand when it finishes one.
IN_FLIGHT = 2
POLL_SECONDS = 0.5
CHECK_SECONDS = 5.0
# A restart of ComfyUI with many packs, or a network that fails for a moment.
PATIENCE_SECONDS = 300.0
# The server names its files; what it calls a picture must not become a program here.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".mp4", ".webm")


@dataclass
class Report:
    """The pictures saved now, the number of rows done before, and a line on each that failed."""

    saved: list[Path] = field(default_factory=list)
    before: int = 0
    failed: list[str] = field(default_factory=list)


class _Batch:
    def __init__(self, server: Server, jobs: Sequence[Job], out: Path, patience: float) -> None:
        self.server, self.out, self.patience = server, out, patience
        self.state, self.report = State(out), Report()
        self.rows = Counter(job.key for job in jobs)
        by_key = {job.key: job for job in reversed(jobs) if not self.state.is_done(job.key)}
        self.backlog = deque(sorted(by_key.values(), key=lambda job: job.number))
        self.report.before = len(jobs) - sum(self.rows[key] for key in by_key)
        self.waiting: dict[str, Job] = {}

    def start(self, job: Job) -> None:
        """Queue a job, or take up again what an earlier run left on the server."""
        earlier = self.state.prompt_id(job.key)
        if earlier is not None and self._is_alive(earlier):
            self.waiting[earlier] = job
            return
        prompt_id = str(uuid.uuid4())
        self.state.queued(job.key, prompt_id)
        self.waiting[prompt_id] = job
        # In a thread, because Ctrl-C must not break off a request that the server then obeys.
        with ThreadPoolExecutor(1) as sender:
            try:
                sender.submit(self.server.submit, job.prompt, prompt_id).result()
            except QueueError as error:
                kind = Unreachable if isinstance(error, Unreachable) else QueueError
                raise kind(f"{job.where}: {error}") from None

    def _is_alive(self, prompt_id: str) -> bool:
        if not self.server.holds(prompt_id):
            return False
        outcome = self.server.outcome(prompt_id)
        return outcome is None or not outcome.error

    def collect(self) -> int:
        """Save what has ended since; the number of rows that have."""
        ended = 0
        for prompt_id, job in list(self.waiting.items()):
            outcome = self.server.outcome(prompt_id, self.patience)
            if outcome is None:
                continue
            try:
                if outcome.error:
                    raise RowFailed(outcome.error)
                self.save(job, prompt_id, outcome.pictures)
            except RowFailed as error:
                self.report.failed.append(f"{job.where}: {error}")
                self.state.forget(job.key)
                log.warning("%s", self.report.failed[-1])
            del self.waiting[prompt_id]
            ended += self.rows[job.key]
        return ended

    def save(self, job: Job, prompt_id: str, pictures: list[Picture]) -> None:
        names = [_name(job, i, picture) for i, picture in enumerate(pictures)]
        for name, picture in zip(names, pictures, strict=True):
            with whole(self.out / name) as part, part.open("xb") as file:
                self.server.download(picture, file)
        self.state.done(job.key, prompt_id, names)
        self.report.saved += [self.out / name for name in names]

    def check_held(self) -> None:
        """Raises QueueError where the server has lost a job."""
        for prompt_id, job in self.waiting.items():
            if not self.server.holds(prompt_id, self.patience):
                raise QueueError(
                    f"{job.where}: the server no longer knows it, so it was restarted or its "
                    "queue was cleared; run the same command again to go on"
                )

    def stop(self) -> None:
        """Leave nothing of ours on the server, if it still answers."""
        if not self.waiting:
            return
        try:
            if not self.server.cancel(list(self.waiting)):
                log.warning("the server was told to stop, but is still busy with its current step")
        except Unreachable:
            # The error that ended the batch says so.
            log.debug("nothing to cancel: the server is gone")
        except QueueError as error:
            log.warning("what was queued could not be cancelled: %s", error)


def run_batch(
    server: Server,
    jobs: Sequence[Job],
    out: Path,
    *,
    progress: Callable[[int], object] = lambda rows: None,
    poll: float = POLL_SECONDS,
    patience: float = PATIENCE_SECONDS,
) -> Report:
    """Run the jobs that the state in `out` does not call done; `progress` is told of rows that end.

    A row that fails on the server is reported and the rest goes on. Raises QueueError where the
    server refuses a workflow, is gone for longer than `patience` seconds, or has forgotten a job.
    However it ends, nothing of the batch stays on the server.
    """
    batch = _Batch(server, jobs, out, patience)
    check_at = time.monotonic() + CHECK_SECONDS
    progress(batch.report.before)
    try:
        while batch.backlog or batch.waiting:
            while batch.backlog and len(batch.waiting) < IN_FLIGHT:
                batch.start(batch.backlog.popleft())
            ended = batch.collect()
            progress(ended)
            if not ended:
                time.sleep(poll)
            if time.monotonic() > check_at:
                batch.check_held()
                check_at = time.monotonic() + CHECK_SECONDS
    except Unreachable as error:
        raise Unreachable(f"{error}; the same command goes on from there") from None
    finally:
        batch.stop()
    return batch.report


def _name(job: Job, index: int, picture: Picture) -> str:
    """A name of our own, the same for the same job: row, key, and a number behind the first.

    Raises RowFailed for a file that is no picture.
    """
    suffix = PurePosixPath(picture.filename).suffix.lower()
    if suffix not in SUFFIXES:
        raise RowFailed(
            f"the server offers a file of type {suffix[:20]!r}; expected {', '.join(SUFFIXES)}"
        )
    return f"{job.number:04d}-{job.key[:8]}{f'-{index + 1}' if index else ''}{suffix}"
