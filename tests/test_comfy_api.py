"""docs/api.md and its clients on a real ComfyUI server. Set COMFYUI_PATH to a checkout."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest
from PIL import Image
from queue_fake import heed_interrupts
from workflow_files import ROOT, load

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against"
)
for package in ("requests", "websockets", "comfy_api_simplified"):
    pytest.importorskip(package, reason=f"a client of docs/api.md needs {package}")

DOCS = ROOT / "docs" / "api.md"
SMALL = ROOT / "workflows" / "api" / "chroma-small.json"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
STATE = "chroma-queue.json"


@pytest.fixture(scope="module")
def example():
    file = ROOT / "docs" / "examples" / "comfyui_client.py"
    spec = importlib.util.spec_from_file_location("comfyui_client", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Where the documents' commands run: the pack's folder, and theirs to write into."""
    for name in ("docs", "workflows"):
        os.symlink(ROOT / name, tmp_path / name, target_is_directory=True)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "chroma-nodes"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m chroma_nodes "$@"\n')
    script.chmod(0o755)
    os.symlink(sys.executable, tmp_path / "bin" / "python")
    return tmp_path


def url(server):
    return f"http://127.0.0.1:{server.port}"


def execute(server, folder, command):
    place = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # A link to the interpreter has no environment of its own; this one's packages are named.
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = {**os.environ, "PATH": place}
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (os.environ.get("PYTHONPATH"), packages) if part
    )
    command = [part.replace("http://127.0.0.1:8188", url(server)) for part in command]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def graph_with(**inputs):
    """The small model's graph, with inputs set where a node has one of that name."""
    graph = load(SMALL)
    for node in graph.values():
        node["inputs"] |= {k: v for k, v in inputs.items() if k in node["inputs"]}
    return graph


def pictures(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".png")


def graph_of(path):
    with Image.open(path) as picture:
        assert picture.size == (128, 128)
        return json.loads(picture.text["prompt"])


def queue(server, folder, *arguments):
    command = [sys.executable, "-m", "chroma_nodes", "queue", url(server), *map(str, arguments)]
    return subprocess.run(
        [*command, "--quiet"], cwd=folder, capture_output=True, text=True, timeout=600
    )


def test_every_command_of_the_document(server, folder):
    if not (shutil.which("bash") and shutil.which("curl")):
        pytest.skip("bash or curl is not installed")
    script = "".join(text for language, text in BLOCKS if language == "sh")
    assert script.count("chroma-nodes queue") == 3 and script.count("curl") == 9
    done = execute(server, folder, ["bash", "-e", "-o", "pipefail", "-c", script])
    made = [graph_of(path) for path in pictures(folder / "pictures")]
    texts = [graph["5"]["inputs"]["text"] for graph in made]
    assert len(made) == 5 and "a flat emoji of a tiger" in texts
    assert "a flat emoji of a fox, on a green background" in texts
    owl = next(graph for graph in made if "an owl" in graph["5"]["inputs"]["text"])
    assert owl["9"]["inputs"]["sampler_name"] == "euler"
    assert graph_of(folder / "picture.png") == load(SMALL)
    # As a program, the example saves two rows under the server's names.
    assert len(pictures(folder)) == 3
    assert '"ChromaSampler"' in done.stdout and '"queue_running"' in done.stdout
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_every_program_of_the_document(server, folder, block):
    done = execute(server, folder, ["python", "-c", block])
    (saved,) = pictures(folder)
    text = graph_of(saved)["5"]["inputs"]["text"]
    assert text in block
    if "preview=" in block:
        assert "step 26 of 26" in done.stdout
        with Image.open(folder / "preview.jpg") as preview:
            assert preview.format == "JPEG"


def test_the_documents_rows_are_those_of_the_files():
    rows = {language: text for language, text in BLOCKS if language in ("json", "csv")}
    examples = ROOT / "docs" / "examples"
    assert rows["json"] == (examples / "prompts.jsonl").read_text("utf-8")
    assert rows["csv"] == (examples / "prompts.csv").read_text("utf-8")


def two_outputs(**inputs):
    """A graph whose second output is refused: it has no pictures to save."""
    save = {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}
    return graph_with(**inputs) | {"15": save}


def test_a_workflow_refused_in_part_at_status_200(server, example, folder):
    graph = two_outputs(steps=400, noise_seed=31)
    status, reply = server.post("/prompt", {"prompt": graph, "prompt_id": str(uuid.uuid4())})
    assert status == 200 and reply["node_errors"], "ComfyUI no longer queues the rest"
    example.ComfyUI(url(server)).interrupt(reply["prompt_id"])
    with pytest.raises(ValueError, match="required_input_missing"):
        example.ComfyUI(url(server)).queue(graph)
    (folder / "two.json").write_text(json.dumps(graph))
    done = queue(server, folder, "two.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "two.json: node 15 (SaveImage), Required input is missing: images" in done.stderr
    wait_until_idle(server)


def wait_until_idle(server):
    for _ in range(100):
        if server.get("/queue") == {"queue_running": [], "queue_pending": []}:
            return
        time.sleep(0.1)
    raise AssertionError("something still runs")


def test_refusals_name_the_node_and_the_choices(server, folder):
    done = queue(server, folder, SMALL, "--set", "Model.model_name=chroma-hd.safetensors")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    # The rest is ComfyUI's or this pack's wording, whichever checks menus.
    for part in (
        "node 1 'Model' (ChromaLoadModel), input model_name: ",
        "'chroma-hd.safetensors'",
        "small Chroma (included)",
    ):
        assert part in done.stderr
    (folder / "r.csv").write_text("Prompt.text,Size.widht\na cat,64\n")
    done = queue(server, folder, SMALL, "--batch", "r.csv")
    assert (
        "r.csv line 2, field Size.widht: node 7 (EmptySD3LatentImage) has no input" in done.stderr
    )
    (folder / "other.json").write_text('{"1": {"class_type": "NoSuchNode", "inputs": {}}}')
    done = queue(server, folder, "other.json")
    assert done.returncode == 2 and "NoSuchNode" in done.stderr and done.stderr.count("\n") == 1


def test_a_row_that_fails_on_the_server(server, folder):
    models = server.base / "models" / "diffusion_models"
    models.mkdir(exist_ok=True)
    (models / "broken.safetensors").write_bytes(b"\x10" * 40)
    rows = [{"Model.model_name": "broken.safetensors"}, {"Seed.noise_seed": 77, "Sigmas.steps": 2}]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = queue(server, folder, SMALL, "--batch", "r.jsonl", "--out", "o")
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert "r.jsonl line 1: node 1 'Model' (ChromaLoadModel): " in warning
    assert "broken.safetensors is damaged" in warning and "1 of 2 rows failed" in error
    (saved,) = pictures(folder / "o")
    assert graph_of(saved)["8"]["inputs"]["noise_seed"] == 77


def test_what_is_done_is_not_done_again(server, folder):
    (folder / "r.csv").write_text("Seed.noise_seed\n501\n502\n")
    arguments = (SMALL, "--set", "Sigmas.steps=2", "--batch", "r.csv", "--out", "o")
    before = len(server.get("/history"))
    assert queue(server, folder, *arguments).returncode == 0
    (folder / "r.csv").write_text("Seed.noise_seed\n502\n503\n501\n")
    done = queue(server, folder, *arguments)
    assert done.stdout.splitlines()[-1] == "3 rows, 2 of them done before; 1 pictures saved in o"
    assert len(server.get("/history")) - before == 3 and len(pictures(folder / "o")) == 3


class Breaking:
    """A relay to a server that breaks every connection to a websocket once it has told enough."""

    def __init__(self, port: int, enough: int) -> None:
        self.target, self.enough, self.broken = port, enough, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                first = near.recv(1 << 16)
                far.sendall(first)
                limit = self.enough if b"/ws?" in first else None
                for a, b, most in ((near, far, None), (far, near, limit)):
                    threading.Thread(target=self.copy, args=(a, b, most), daemon=True).start()

    def copy(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        told = 0
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and (most is None or told < most):
                target.sendall(data)
                told += len(data)
            self.broken += most is not None
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.listener.close()


def test_the_example_reconnects(server, example):
    relay = Breaking(server.port, enough=4000)
    client = example.ComfyUI(f"http://127.0.0.1:{relay.port}")
    steps, previews = [], []
    job = client.queue(graph_with(steps=150, noise_seed=91))
    entry = client.follow(job, lambda *step: steps.append(step), previews.append)
    ((name, picture),) = client.pictures(entry)
    relay.close()
    assert relay.broken >= 1 and steps and previews and name.endswith(".png")
    with Image.open(io.BytesIO(picture)) as found:
        assert found.size == (128, 128)


def test_the_example_interrupts(server, example):
    client = example.ComfyUI(url(server))
    job = client.queue(graph_with(steps=2000, noise_seed=92))
    waiting = client.queue(graph_with(steps=2000, noise_seed=93))

    def stop(step, _):
        if step == 2:
            client.interrupt(waiting)
            client.interrupt(job)

    entry = client.follow(job, stop)
    with pytest.raises(RuntimeError, match="execution_interrupted"):
        list(client.pictures(entry))
    with pytest.raises(LookupError):
        client.ended(waiting)
    wait_until_idle(server)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process of its own")
def test_ctrl_c_leaves_nothing_of_ours_and_the_rest_alone(server, folder):
    _, other = server.post("/prompt", {"prompt": graph_with(steps=100, noise_seed=94)})
    (folder / "r.csv").write_text("Seed.noise_seed\n601\n602\n603\n")
    command = [sys.executable, "-m", "chroma_nodes", "queue", url(server), str(SMALL), "--batch",
               "r.csv", "--set", "Sigmas.steps=3000", "--quiet"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not runs_ours(server, folder):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    entry = server.get(f"/history/{other['prompt_id']}")[other["prompt_id"]]
    assert entry["status"]["status_str"] == "success"


def runs_ours(server, folder):
    """Whether a row of the batch runs and another waits behind it."""
    state = folder / "output" / STATE
    if not state.exists():
        return False
    ours = {row["prompt_id"] for row in json.loads(state.read_text("utf-8"))["rows"].values()}
    running, waiting = (
        [j[1] for j in jobs] for _, jobs in sorted(server.get("/queue").items())[::-1]
    )
    return ours.issuperset(running + waiting) and bool(running) and bool(waiting)


def test_a_restart_in_the_middle(server, folder):
    (folder / "r.csv").write_text("Seed.noise_seed,Sigmas.steps\n701,2\n702,1500\n")
    command = [sys.executable, "-m", "chroma_nodes", "queue", url(server), str(SMALL), "--batch",
               "r.csv", "--quiet"]  # fmt: skip
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (
            (folder / "output").exists() and pictures(folder / "output")
        ):
            time.sleep(0.1)
        server.process.terminate()
        server.process.wait(30)
        server.__enter__()
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "r.csv line 3: the server no longer knows it, so it was restarted" in errors
    (folder / "r.csv").write_text("Seed.noise_seed,Sigmas.steps\n701,2\n702,3\n")
    done = queue(server, folder, SMALL, "--batch", "r.csv")
    assert "2 rows, 1 of them done before; 1 pictures saved" in done.stdout, done.stderr
