"""`chroma-nodes queue`, as a user runs it, on a stand-in for ComfyUI."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chroma_nodes.chroma.cli import main
from chroma_nodes.chroma.queue.state import NAME
from queue_fake import GRAPH, PICTURE, FakeComfyUI, heed_interrupts

COMMAND = [sys.executable, "-m", "chroma_nodes", "queue"]


@pytest.fixture
def fake():
    with FakeComfyUI() as running:
        yield running


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "rows.csv").write_text("Prompt.text\na cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def queue(capsys):
    """Run the command in this process; (exit status, output, errors)."""

    def run(*arguments):
        status = main(["queue", *map(str, arguments), "--quiet"])
        return status, *capsys.readouterr()

    return run


def test_a_batch_and_the_same_again(fake, folder, queue):
    arguments = (fake.url, "graph.json", "--batch", "rows.csv", "--set", "2.seed=5", "--out", "o")
    status, output, errors = queue(*arguments)
    assert (status, errors) == (0, "")
    *pictures, last = output.splitlines()
    assert last == "2 rows; 2 pictures saved in o"
    assert [(folder / path).read_bytes() for path in pictures] == [PICTURE] * 2
    assert [graph["2"]["inputs"]["seed"] for graph in fake.submitted] == [5, 5]
    _, output, _ = queue(*arguments)
    assert output == "2 rows, 2 of them done before; 0 pictures saved in o\n"
    assert len(fake.submitted) == 2


def test_once_without_a_batch(fake, folder, queue):
    _, output, _ = queue(fake.url, "graph.json", "--set", "Prompt.text=x")
    assert output.splitlines()[-1] == "1 rows; 1 pictures saved in output"
    assert [graph["1"]["inputs"]["text"] for graph in fake.submitted] == ["x"]


def test_a_failed_row(fake, folder, queue, caplog):
    fake.errors = {"a dog": [["execution_error", {"node_id": "9", "exception_message": "bad"}]]}
    status, output, errors = queue(fake.url, "graph.json", "--batch", "rows.csv")
    assert (status, output) == (2, "")
    assert caplog.messages == ["rows.csv line 3: node 9 (unknown): bad"]
    assert errors == (
        "error: 1 of 2 rows failed, the first: rows.csv line 3: node 9 (unknown): bad; "
        "1 pictures were saved, and the same command tries the others again\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("http://127.0.0.1:9", "graph.json"), "no ComfyUI server answers at http://127.0.0.1:9 ("),
        (("FAKE", "no.json"), "no.json does not exist"),
        (("FAKE", "rows.csv"), "rows.csv is not a JSON file"),
        (("FAKE", "graph.json", "--batch", "no.csv"), "no.csv does not exist"),
        (("FAKE", "graph.json", "--set", "7.x=1"), "--set 7.x=1: there is no node 7"),
    ],
)
def test_errors_are_one_line(fake, folder, queue, arguments, says):
    status, _, errors = queue(*(fake.url if a == "FAKE" else a for a in arguments))
    assert status == 2 and says in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process of its own")
def test_ctrl_c_leaves_nothing_of_ours_and_the_rest_alone(fake, folder, queue):
    fake.polls = 10**9
    fake.queue["somebody else's"] = GRAPH
    command = [*COMMAND, fake.url, "graph.json", "--batch", "rows.csv", "--quiet"]
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        deadline = time.monotonic() + 300
        while len(fake.submitted) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert list(fake.queue) == ["somebody else's"] and len(fake.deleted) == 2
    assert [path.name for path in (folder / "output").iterdir()] == [NAME]
    fake.queue.clear()
    fake.polls = 1
    assert queue(*command[4:-1])[0] == 0
    assert len(fake.submitted) == 4
