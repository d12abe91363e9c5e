"""A ComfyUI server over HTTP: queue, follow, cancel, download."""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ..errors import QueueError, RowFailed, Unreachable
from .refusals import node_label, one_line, refusal

Prompt = dict[str, Any]

TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 1.0
CANCEL_SECONDS = 10.0
# A reply larger than this is not one of ComfyUI's.
MAX_REPLY = 1 << 28
CHUNK = 1 << 18
FAILURES = (OSError, http.client.HTTPException)


class Picture(NamedTuple):
    """A file a workflow saved, as the server's /view finds it."""

    filename: str
    subfolder: str
    type: str


@dataclass(frozen=True)
class Outcome:
    """How a queued workflow ended: what it saved, or why it failed."""

    pictures: list[Picture]
    error: str = ""


class Server:
    """One ComfyUI server, by its address. Raises QueueError where the address is none."""

    def __init__(self, url: str) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not url.isascii() or any(mark in url for mark in "@?# "):
            raise QueueError(f"{url} is no server; expected an address like http://127.0.0.1:8188")

    def check(self) -> None:
        """Raises QueueError where nothing answers, or something that is not ComfyUI."""
        self._queue()

    def input_types(self, class_type: str) -> dict[str, Any]:
        """The inputs of a node by name: "INT", "STRING", ... or a list of choices.

        Raises QueueError where the server has no such node.
        """
        path = f"/object_info/{urllib.parse.quote(class_type, safe='')}"
        info = self._get(path)
        if class_type not in info:
            raise QueueError(
                f"the server has no node {class_type}; install the pack that has it there"
            )
        with self._reading(path):
            declared = info[class_type]["input"]
            inputs = {**declared.get("required", {}), **declared.get("optional", {})}
            return {name: config[0] for name, config in inputs.items()}

    def submit(self, prompt: Prompt, prompt_id: str) -> None:
        """Queue a workflow under a UUID of ours.

        Raises QueueError where the server refuses it, or a part of it: ComfyUI answers 200 and
        runs the rest where only some outputs are wrong.
        """
        body = {"prompt": prompt, "prompt_id": prompt_id}
        refused = None
        try:
            reply = self._post("/prompt", body)
        except _Status as status:
            refused, reply = status, status.reply
        with self._reading("/prompt"):
            complaint = refusal(reply, prompt)
        if complaint:
            self.cancel([prompt_id])
            raise QueueError(complaint)
        if refused:
            raise refused
        if reply.get("prompt_id") != prompt_id:
            raise self._foreign("/prompt")

    def outcome(self, prompt_id: str, patience: float = 0.0) -> Outcome | None:
        """How a workflow ended, or None while it has not; silence is borne for `patience` s."""
        path = f"/history/{prompt_id}"
        entry = self._get(path, patience).get(prompt_id)
        if entry is None:
            return None
        with self._reading(path):
            status = entry.get("status") or {}
            if status.get("status_str") == "error":
                return Outcome([], _failure(status.get("messages") or [], entry))
            saved = [
                Picture(str(file["filename"]), str(file.get("subfolder", "")), "output")
                for output in entry["outputs"].values()
                for file in output.get("images") or []
                if file.get("type") == "output"
            ]
        return Outcome(saved, "" if saved else "it saved no picture; add a SaveImage node")

    def holds(self, prompt_id: str, patience: float = 0.0) -> bool:
        """Whether a workflow waits, runs, or has ended here: False after a restart."""
        # In this order: a workflow goes from the queue to the history in one step.
        queued = any(prompt_id in part for part in self._queue(patience))
        return queued or self.outcome(prompt_id, patience) is not None

    def cancel(self, prompt_ids: Collection[str], seconds: float = CANCEL_SECONDS) -> bool:
        """Take workflows off the queue and interrupt them; whether they all ended in time."""
        interrupted: set[str] = set()
        deadline = time.monotonic() + seconds
        while True:
            self._post("/queue", {"delete": list(prompt_ids)})
            running, waiting = self._queue()
            for prompt_id in running.intersection(prompt_ids) - interrupted:
                self._post("/interrupt", {"prompt_id": prompt_id})
                interrupted.add(prompt_id)
            if not (running | waiting).intersection(prompt_ids):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def download(self, picture: Picture, target: BinaryIO) -> None:
        """Write a saved file's bytes. Raises RowFailed where the server no longer has it."""
        query = urllib.parse.urlencode(picture._asdict(), errors="replace")
        try:
            with self._open(urllib.request.Request(f"{self.url}/view?{query}")) as reply:
                while part := self._read(reply, CHUNK):
                    target.write(part)
        except _Status as status:
            raise RowFailed(
                f"the server no longer has {one_line(picture.filename)} (status {status.code}); "
                "restart it, or change the seed, to have it made again"
            ) from None
        if reply.length:
            raise Unreachable(f"{self.url} broke off in the middle of a picture")

    def _queue(self, patience: float = 0.0) -> tuple[set[str], set[str]]:
        """The ids that run and those that wait."""
        queue = self._get("/queue", patience)
        with self._reading("/queue"):
            running = {item[1] for item in queue["queue_running"]}
            return running, {item[1] for item in queue["queue_pending"]}

    def _get(self, path: str, patience: float = 0.0) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._json(urllib.request.Request(self.url + path), path)
            except Unreachable:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(RETRY_SECONDS)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return self._json(request, path)

    def _json(self, request: urllib.request.Request, path: str) -> dict[str, Any]:
        try:
            with self._open(request) as reply:
                text = self._read(reply, MAX_REPLY)
            found = json.loads(text) if text else {}
        except QueueError:
            raise
        except (ValueError, RecursionError):
            raise self._foreign(path) from None
        if not isinstance(found, dict):
            raise self._foreign(path)
        return found

    def _open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Raises _Status for a status that is no success, Unreachable where nothing answers."""
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise _Status(self.url, error) from None
        except FAILURES as error:
            raise self._unreachable(error) from None

    def _read(self, reply: http.client.HTTPResponse, size: int) -> bytes:
        """Up to `size` bytes; raises Unreachable where the connection breaks."""
        try:
            return reply.read(size)
        except FAILURES as error:
            raise self._unreachable(error) from None

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        """Raises QueueError for JSON that does not have what ComfyUI's has."""
        try:
            yield
        except (LookupError, TypeError, AttributeError):
            raise self._foreign(path) from None

    def _unreachable(self, error: Exception) -> Unreachable:
        reason = one_line(getattr(error, "reason", None) or error or type(error).__name__)
        return Unreachable(
            f"no ComfyUI server answers at {self.url} ({reason}); start it, or check the address"
        )

    def _foreign(self, path: str) -> QueueError:
        return QueueError(
            f"{self.url}{path} does not answer as ComfyUI does; check the address and its port"
        )


class _Status(QueueError):
    """An answer with an error status; `reply` is its JSON, or empty."""

    def __init__(self, url: str, error: urllib.error.HTTPError) -> None:
        self.code, self.reply = error.code, {}
        try:
            found = json.loads(error.read(MAX_REPLY))
            self.reply = found if isinstance(found, dict) else {}
        except (ValueError, RecursionError, *FAILURES):
            pass
        path = urllib.parse.urlsplit(error.url).path
        super().__init__(
            f"{url} answers {error.code} ({one_line(error.reason)}) to {path}; "
            "check that this is ComfyUI's address, and ComfyUI's log"
        )


def _failure(messages: list[Any], entry: dict[str, Any]) -> str:
    """One line from the messages of a workflow that failed."""
    for kind, data in messages:
        if kind == "execution_interrupted":
            return "it was interrupted on the server"
        if kind == "execution_error":
            graph = entry["prompt"][2] if len(entry.get("prompt") or []) > 2 else {}
            where = node_label(graph, str(data.get("node_id")))
            return f"{where}: {one_line(data.get('exception_message') or 'failed')}"
    return "it failed; ComfyUI's log says why"
