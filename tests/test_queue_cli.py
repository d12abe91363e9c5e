"""`chroma-nodes queue`, as a user runs it, on a stand-in for ComfyUI."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chroma_nodes.chroma.queue.state import NAME
from queue_fake import GRAPH, PICTURE, FakeComfyUI

COMMAND = [sys.executable, "-m", "chroma_nodes", "queue"]


@pytest.fixture
def fake():
    with FakeComfyUI() as running:
        yield running


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "rows.csv").write_text("Prompt.text\na cat\na dog\n")
    return tmp_path


def queue(folder, *arguments):
    command = [*COMMAND, *map(str, arguments), "--quiet"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_batch_and_the_same_again(fake, folder):
    arguments = (fake.url, "graph.json", "--batch", "rows.csv", "--set", "2.seed=5", "--out", "o")
    done = queue(folder, *arguments)
    assert done.returncode == 0 and not done.stderr, done.stderr
    *pictures, last = done.stdout.splitlines()
    assert last == "2 rows; 2 pictures saved in o"
    assert [(folder / path).read_bytes() for path in pictures] == [PICTURE] * 2
    assert [graph["2"]["inputs"]["seed"] for graph in fake.submitted] == [5, 5]
    again = queue(folder, *arguments)
    assert again.stdout == "2 rows, 2 of them done before; 0 pictures saved in o\n"
    assert len(fake.submitted) == 2


def test_once_without_a_batch(fake, folder):
    done = queue(folder, fake.url, "graph.json", "--set", "Prompt.text=x")
    assert done.stdout.splitlines()[-1] == "1 rows; 1 pictures saved in output", done.stderr
    assert [graph["1"]["inputs"]["text"] for graph in fake.submitted] == ["x"]


def test_errors_are_one_line(fake, folder):
    fake.errors = {"a dog": [["execution_error", {"node_id": "9", "exception_message": "bad"}]]}
    arguments = (fake.url, "graph.json", "--batch", "rows.csv")
    done = queue(folder, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "WARNING: rows.csv line 3: node 9 (unknown): bad",
        "error: 1 of 2 rows failed, the first: rows.csv line 3: node 9 (unknown): bad; "
        "1 pictures were saved, and the same command tries the others again",
    ]
    for arguments, says in [
        (("http://127.0.0.1:9", "graph.json"), "no ComfyUI server answers at http://127.0.0.1:9 ("),
        ((fake.url, "no.json"), "no.json does not exist"),
        ((fake.url, "rows.csv"), "rows.csv is not a JSON file"),
        ((fake.url, "graph.json", "--batch", "no.csv"), "no.csv does not exist"),
        ((fake.url, "graph.json", "--set", "7.x=1"), "--set 7.x=1: there is no node 7"),
    ]:
        done = queue(folder, *arguments)
        assert done.returncode == 2 and says in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process of its own")
def test_ctrl_c_leaves_nothing_of_ours_and_the_rest_alone(fake, folder):
    fake.polls = 10**9
    fake.queue["somebody else's"] = GRAPH
    command = [*COMMAND, fake.url, "graph.json", "--batch", "rows.csv", "--quiet"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(fake.submitted) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert list(fake.queue) == ["somebody else's"] and len(fake.deleted) == 2
    assert [path.name for path in (folder / "output").iterdir()] == [NAME]
    fake.queue.clear()
    fake.polls = 1
    assert queue(folder, *command[4:-1]).returncode == 0
    assert len(fake.submitted) == 4
