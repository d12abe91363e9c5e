"""A stand-in for ComfyUI's HTTP queue: the routes that clients use, and ways to misbehave."""

import base64
import hashlib
import json
import signal
import struct
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
OBJECT_INFO = {
    "Encode": {
        "input": {
            "required": {"clip": ["CLIP"], "text": ["STRING", {"multiline": True}]},
            "optional": {"strength": ["FLOAT", {}], "upper": ["BOOLEAN", {}]},
        }
    },
    "Noise": {"input": {"required": {"seed": ["INT", {}]}}},
    "Save": {"input": {"required": {"prefix": ["STRING", {}], "kind": [["png", "webp"], {}]}}},
}
GRAPH = {
    "1": {"class_type": "Encode", "inputs": {"text": "a cat"}, "_meta": {"title": "Prompt"}},
    "2": {"class_type": "Noise", "inputs": {"seed": 1}, "_meta": {"title": "Seed"}},
    "3": {"class_type": "Save", "inputs": {"prefix": "p"}, "_meta": {"title": "Save"}},
}


class FakeComfyUI:
    """Ends every workflow after `polls` looks at the history; a context manager.

    `errors` are messages of workflows by the text of node 1; `refuse` answers POST /prompt;
    `files` are what a workflow saves; `replies` answer paths in place of what is right; `events`
    are what one websocket after another is sent before it breaks.
    """

    def __init__(self) -> None:
        self.polls = 1
        self.errors: dict[str, list[Any]] = {}
        self.refuse: tuple[int, dict[str, Any]] | None = None
        self.files = [{"filename": "p_00001_.png", "subfolder": "", "type": "output"}]
        self.replies: dict[str, tuple[int, bytes]] = {}
        self.cut_pictures = False
        self.events: list[list[Any]] = []
        self.connections: list[str] = []
        self.submitted: list[dict[str, Any]] = []
        self.queue: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[str, Any]] = {}
        self.looks: dict[str, int] = {}
        self.interrupted: list[str] = []
        self.deleted: list[str] = []

    def __enter__(self) -> "FakeComfyUI":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.answer(self, None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.answer(self, json.loads(body))

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def forget(self) -> None:
        """What a restart does."""
        self.queue.clear()
        self.history.clear()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        path = urllib.parse.urlsplit(handler.path).path
        route = path.split("/")[1]
        if route == "ws":
            return self.on_ws(handler)
        if route in self.replies:
            status, content = self.replies[route]
        elif route == "view":
            status, content = 200, PICTURE
        else:
            status, found = getattr(self, f"on_{route}")(path, body)
            content = json.dumps(found).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:1000] if route == "view" and self.cut_pictures else content)

    def on_object_info(self, path: str, _: object) -> tuple[int, dict[str, Any]]:
        name = urllib.parse.unquote(path.rpartition("/")[2])
        return 200, {name: OBJECT_INFO[name]} if name in OBJECT_INFO else {}

    def on_prompt(self, _: str, body: Any) -> tuple[int, dict[str, Any]]:
        if self.refuse and self.refuse[0] != 200:
            return self.refuse
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        self.submitted.append(body["prompt"])
        self.queue[prompt_id] = body["prompt"]
        reply = {"prompt_id": prompt_id, "number": 1, "node_errors": {}}
        return 200, reply | (self.refuse[1] if self.refuse else {})

    def on_queue(self, _: str, body: Any) -> tuple[int, dict[str, Any]]:
        if body:
            for prompt_id in body["delete"]:
                if prompt_id in list(self.queue)[1:]:
                    self.deleted.append(prompt_id)
                    del self.queue[prompt_id]
            return 200, {}
        items = [[n, prompt_id, graph, {}, []] for n, (prompt_id, graph) in self.numbered()]
        return 200, {"queue_running": items[:1], "queue_pending": items[1:]}

    def numbered(self) -> list[tuple[int, tuple[str, dict[str, Any]]]]:
        return list(enumerate(list(self.queue.items())))

    def on_interrupt(self, _: str, body: Any) -> tuple[int, dict[str, Any]]:
        if body["prompt_id"] == next(iter(self.queue), None):
            self.interrupted.append(body["prompt_id"])
            self.end(body["prompt_id"], [["execution_interrupted", {}]])
        return 200, {}

    def on_history(self, path: str, _: object) -> tuple[int, dict[str, Any]]:
        prompt_id = path.rpartition("/")[2]
        self.looks[prompt_id] = self.looks.get(prompt_id, 0) + 1
        if prompt_id == next(iter(self.queue), None) and self.looks[prompt_id] > self.polls:
            text = self.queue[prompt_id]["1"]["inputs"]["text"]
            self.end(prompt_id, self.errors.get(text, []))
        found = self.history.get(prompt_id)
        return 200, {prompt_id: found} if found else {}

    def on_ws(self, handler: BaseHTTPRequestHandler) -> None:
        """RFC 6455: the handshake, then frames no longer than 65535 bytes; no closing frame."""
        self.connections.append(handler.path)
        guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        digest = hashlib.sha1((handler.headers["Sec-WebSocket-Key"] + guid).encode()).digest()
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(101)
        handler.send_header("Upgrade", "websocket")
        handler.send_header("Connection", "Upgrade")
        handler.send_header("Sec-WebSocket-Accept", base64.b64encode(digest).decode())
        handler.end_headers()
        for message in self.events.pop(0) if self.events else []:
            data = message if isinstance(message, bytes) else json.dumps(message).encode()
            kind = 0x82 if isinstance(message, bytes) else 0x81
            handler.wfile.write(struct.pack(">BBH", kind, 126, len(data)) + data)
        handler.close_connection = True

    def end(self, prompt_id: str, messages: list[Any]) -> None:
        self.history[prompt_id] = {
            "prompt": [1, prompt_id, self.queue.pop(prompt_id), {}, []],
            "outputs": {} if messages else {"3": {"images": self.files}},
            "status": {
                "status_str": "error" if messages else "success",
                "completed": not messages,
                "messages": [["execution_start", {}], *messages],
            },
        }


def heed_interrupts() -> None:
    """For a child process: shells let what they start in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
