"""docs/examples/comfyui_client.py on a stand-in for ComfyUI."""

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from queue_fake import GRAPH, PICTURE, FakeComfyUI

pytest.importorskip("requests", reason="the example needs requests")
pytest.importorskip("websockets", reason="the example needs websockets")

FILE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "comfyui_client.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("comfyui_client", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake():
    with FakeComfyUI() as running:
        yield running


def test_it_is_short():
    assert len(FILE.read_text("utf-8").splitlines()) < 100


def test_progress_and_previews_over_lost_connections(example, fake):
    fake.polls = 3
    server = example.ComfyUI(fake.url)
    job = server.queue(GRAPH)
    other = {"type": "progress", "data": {"prompt_id": "other", "value": 9, "max": 9}}
    step = {"type": "progress", "data": {"prompt_id": job, "value": 1, "max": 2}}
    last = {"type": "executing", "data": {"node": None, "prompt_id": job}}
    fake.events = [
        [{"type": "status", "data": {}}, other, step, struct.pack(">II", 1, 1) + b"jpeg"],
        [struct.pack(">II", 3, 1) + b"text", last],
    ]
    steps, previews = [], []
    entry = server.follow(job, lambda *step: steps.append(step), previews.append)
    assert steps == [(1, 2)] and previews == [b"jpeg"]
    assert len(fake.connections) == 3 and len(set(fake.connections)) == 1
    assert list(server.pictures(entry)) == [("p_00001_.png", PICTURE)]


def test_errors_at_either_status_leave_nothing_queued(example, fake):
    server = example.ComfyUI(fake.url)
    fake.refuse = (200, {"node_errors": {"3": {"errors": [{"message": "not in list"}]}}})
    with pytest.raises(ValueError, match="not in list"):
        server.queue(GRAPH)
    assert len(fake.interrupted) == 1 and not fake.queue
    fake.refuse = (400, {"error": {"message": "no outputs"}, "node_errors": {}})
    with pytest.raises(ValueError, match="no outputs"):
        server.queue(GRAPH)


def test_failures_interrupts_and_restarts(example, fake):
    server = example.ComfyUI(fake.url)
    fake.errors = {"a cat": [["execution_error", {"exception_message": "out of memory"}]]}
    with pytest.raises(RuntimeError, match="out of memory"):
        list(server.pictures(server.follow(server.queue(GRAPH))))
    fake.polls = 10**9
    jobs = [server.queue(GRAPH), server.queue(GRAPH)]
    for job in reversed(jobs):
        server.interrupt(job)
    assert fake.deleted == jobs[1:] and fake.interrupted == jobs[:1]
    job = server.queue(GRAPH)
    fake.forget()
    with pytest.raises(LookupError, match="restarted"):
        server.follow(job)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", '\ufeff1.text,2.seed\n"a\ndog",4\n'),
        ("r.jsonl", '{"1.text": "a\\ndog", "2.seed": 4}\n'),
    ],
)
def test_as_a_program(fake, tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    fake.polls = 0
    command = [sys.executable, str(FILE), fake.url, "graph.json", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p_00001_.png").read_bytes() == PICTURE
    (graph,) = fake.submitted
    assert graph["1"]["inputs"]["text"] == "a\ndog" and int(graph["2"]["inputs"]["seed"]) == 4
