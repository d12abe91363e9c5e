"""A ComfyUI server over HTTP: queue, follow, cancel, download."""

import http.client
import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors import QueueError, RowFailed, Unreachable
from .refusals import node_label, one_line, refusal

Prompt = dict[str, Any]

TIMEOUT_SECONDS = 30.0
RETRY_SECONDS = 1.0
CANCEL_SECONDS = 10.0
# A reply larger than this is not one of ComfyUI's.
MAX_REPLY = 1 << 28
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
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise QueueError(f"{url} is no server; expected an address like http://127.0.0.1:8188")
        self.url = parts.geturl().rstrip("/")

    def input_types(self, class_type: str) -> dict[str, Any]:
        """The inputs of a node by name: "INT", "STRING", ... or a list of choices.

        Raises QueueError where the server has no such node.
        """
        info = self._get(f"/object_info/{urllib.parse.quote(class_type, safe='')}")
        if class_type not in info:
            raise QueueError(
                f"the server has no node {class_type}; install the pack that has it there"
            )
        declared = info[class_type].get("input", {})
        inputs = {**declared.get("required", {}), **declared.get("optional", {})}
        return {name: config[0] for name, config in inputs.items()}

    def submit(self, prompt: Prompt, prompt_id: str) -> None:
        """Queue a workflow under a UUID of ours.

        Raises QueueError where the server refuses it, or a part of it: ComfyUI answers 200 and
        runs the rest where only some outputs are wrong.
        """
        body = {"prompt": prompt, "prompt_id": prompt_id}
        try:
            reply = self._post("/prompt", body)
        except _Status as status:
            reply = status.reply
            if not refusal(reply, prompt):
                raise
        if complaint := refusal(reply, prompt):
            self.cancel([prompt_id])
            raise QueueError(complaint)
        if reply.get("prompt_id") != prompt_id:
            raise self._foreign("/prompt")

    def outcome(self, prompt_id: str, patience: float = 0.0) -> Outcome | None:
        """How a workflow ended, or None while it has not; silence is borne for `patience` s."""
        entry = self._get(f"/history/{prompt_id}", patience).get(prompt_id)
        if entry is None:
            return None
        status = entry.get("status") or {}
        if status.get("status_str") == "error":
            return Outcome([], _failure(status.get("messages") or [], entry))
        saved = [
            Picture(str(file["filename"]), str(file.get("subfolder", "")), "output")
            for output in entry.get("outputs", {}).values()
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
                expected = reply.headers.get("Content-Length")
                shutil.copyfileobj(_Arriving(reply, self), target)
        except _Status as status:
            name = one_line(picture.filename)
            raise RowFailed(f"the server no longer has {name} (status {status.code})") from None
        if expected is not None and target.tell() != int(expected):
            raise Unreachable(f"{self.url} broke off in the middle of a picture")

    def _queue(self, patience: float = 0.0) -> tuple[set[str], set[str]]:
        """The ids that run and those that wait."""
        queue = self._get("/queue", patience)
        running, waiting = (
            {item[1] for item in queue.get(part, [])} for part in ("queue_running", "queue_pending")
        )
        return running, waiting

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
                text = _Arriving(reply, self).read(MAX_REPLY)
            found = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, QueueError) else self._foreign(path) from None
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
            raise self.unreachable(error) from None

    def unreachable(self, error: Exception) -> Unreachable:
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


class _Arriving:
    """A reply whose connection may break while it is read."""

    def __init__(self, reply: http.client.HTTPResponse, server: Server) -> None:
        self._reply, self._server = reply, server

    def read(self, size: int) -> bytes:
        try:
            return self._reply.read(size)
        except FAILURES as error:
            raise self._server.unreachable(error) from None


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
