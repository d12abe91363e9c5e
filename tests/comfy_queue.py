"""A real ComfyUI server on the CPU, started on a folder of its own, and a small client for it."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180
PREVIEW_FRAME = 1


@dataclass
class Run:
    """What the websocket told of one queued prompt."""

    prompt_id: str
    ending: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)


class Server:
    """One ComfyUI process; a context manager."""

    def __init__(self, checkout: Path, base: Path, *options: str) -> None:
        self.base, self.checkout, self.options = base, checkout, options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True)
        os.symlink(ROOT, base / "custom_nodes" / "ComfyUI-Chroma", target_is_directory=True)
        for picture in (ROOT / "workflows" / "api" / "inputs").glob("*"):
            shutil.copy(picture, base / "input")
        self.log_file = base / "log.txt"

    def __enter__(self) -> "Server":
        command = [
            sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--preview-method", "latent2rgb",
            "--database-url", "sqlite:///:memory:", *self.options,
        ]  # fmt: skip
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as reply:
            body = reply.read()
        return json.loads(body) if reply.headers.get_content_type().endswith("json") else body

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, text = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else {}

    def run(self, prompt: dict[str, Any], *, interrupt_at: int | None = None) -> Run:
        """Queue a prompt and follow it to its end; interrupt once a progress value is reached."""
        from websockets.sync.client import connect

        client = uuid.uuid4().hex
        url = f"ws://127.0.0.1:{self.port}/ws?clientId={client}"
        with connect(url, max_size=None, ping_interval=None) as socket_:
            status, reply = self.post("/prompt", {"prompt": prompt, "client_id": client})
            assert status == 200 and not reply["node_errors"], reply
            run = Run(reply["prompt_id"])
            while not run.ending:
                message = socket_.recv(timeout=300)
                if isinstance(message, bytes):
                    if struct.unpack(">I", message[:4])[0] == PREVIEW_FRAME:
                        run.previews.append(message[8:])
                    continue
                event = json.loads(message)
                data = event.get("data", {})
                if data.get("prompt_id", run.prompt_id) != run.prompt_id:
                    continue
                if event["type"] == "progress":
                    run.progress.append((data["node"], data["value"], data["max"]))
                    if interrupt_at is not None and data["value"] == interrupt_at:
                        self.post("/interrupt", {})
                elif event["type"] in (
                    "execution_success", "execution_error", "execution_interrupted"
                ):  # fmt: skip
                    run.ending, run.data = event["type"], data
        return run

    def outputs(self, run: Run) -> dict[str, Any]:
        """What its nodes showed and saved. The history follows the last event a moment later."""
        for _ in range(100):
            if history := self.get(f"/history/{run.prompt_id}"):
                break
            time.sleep(0.1)
        return history[run.prompt_id]["outputs"]

    def pictures(self, run: Run) -> list[Path]:
        """The files a run saved, by node and name: what is cached is saved before the rest."""
        nodes = sorted(self.outputs(run).items(), key=lambda item: (len(item[0]), item[0]))
        return [
            self.base / "output" / image["subfolder"] / image["filename"]
            for _, output in nodes
            for image in sorted(output.get("images", []), key=lambda image: image["filename"])
            if image["type"] == "output"
        ]
