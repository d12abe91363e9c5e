"""Run a ComfyUI workflow once for each row of a file, with requests and websockets.

python comfyui_client.py http://127.0.0.1:8188 workflow_api.json prompts.csv  # fields: 5.text,...
"""

import csv
import io
import json
import sys
import time
import uuid
from pathlib import Path

import requests
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect


class ComfyUI:
    def __init__(self, url):
        self.url, self.client_id = url.rstrip("/"), uuid.uuid4().hex

    def call(self, path, body=None):
        reply = requests.request("POST" if body else "GET", self.url + path, json=body, timeout=60)
        if reply.status_code != 400:  # a refused workflow, explained in the body
            reply.raise_for_status()
        return reply.json() if reply.content else {}

    def queue(self, prompt):
        reply = self.call("/prompt", {"prompt": prompt, "client_id": self.client_id})
        # Status 200 may come with errors as well: then the outputs that have none are queued.
        if reply.get("error") or reply["node_errors"]:
            self.interrupt(reply.get("prompt_id", "none"))
            raise ValueError(json.dumps(reply.get("node_errors") or reply["error"]))
        return reply["prompt_id"]

    def interrupt(self, prompt_id):
        self.call("/queue", {"delete": [prompt_id]})  # if it waits
        self.call("/interrupt", {"prompt_id": prompt_id})  # if it runs

    def ended(self, prompt_id):
        """The history's entry, or None while the workflow waits or runs."""
        queue = self.call("/queue")
        if entry := self.call(f"/history/{prompt_id}").get(prompt_id):
            return entry
        if not any(prompt_id == job[1] for jobs in queue.values() for job in jobs):
            raise LookupError("the server does not know this workflow; was it restarted?")

    def follow(self, prompt_id, progress=print, preview=lambda jpeg: None):
        """Tell of events until the end, over lost connections too; the entry in the history."""
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        while True:
            try:
                with connect(address, max_size=None) as socket:
                    while not (entry := self.ended(prompt_id)):  # events may have been missed
                        self.listen(socket, prompt_id, progress, preview)
                    return entry
            except (OSError, WebSocketException):
                time.sleep(1)

    def listen(self, socket, prompt_id, progress, preview):
        try:
            while message := socket.recv(timeout=10):
                if isinstance(message, str):
                    event, data = (found := json.loads(message))["type"], found["data"]
                    if event == "progress" and data["prompt_id"] == prompt_id:
                        progress(data["value"], data["max"])
                    if event == "executing" and data["node"] is None:
                        return  # a workflow has ended, well or not, and is in the history
                elif message[:4] == b"\0\0\0\1":  # then 4 bytes for the format, then JPEG
                    preview(message[8:])
        except TimeoutError:
            return

    def pictures(self, entry):
        if entry["status"]["status_str"] != "success":
            raise RuntimeError(json.dumps(entry["status"]["messages"][-1])[:500])
        for file in [f for output in entry["outputs"].values() for f in output.get("images", [])]:
            view = requests.get(f"{self.url}/view", params=file, timeout=60)
            view.raise_for_status()
            yield Path(file["filename"]).name, view.content


if __name__ == "__main__":
    url, workflow, rows = sys.argv[1:]
    server, lines = ComfyUI(url), io.StringIO(Path(rows).read_text("utf-8-sig"))
    for row in csv.DictReader(lines) if rows.endswith(".csv") else map(json.loads, lines):
        graph = json.loads(Path(workflow).read_text("utf-8"))
        for field in row:
            graph[field.split(".")[0]]["inputs"][field.split(".")[1]] = row[field]
        job = server.queue(graph)
        try:
            for name, picture in server.pictures(server.follow(job)):
                Path(name).write_bytes(picture)
        finally:
            server.interrupt(job)  # for Ctrl-C; does nothing where it has ended
