"""Bad requests to a real ComfyUI server: each is one clear error, and the server lives on.

Set COMFYUI_PATH to a checkout.
"""

import os
from pathlib import Path

import psutil
import pytest
from bad_requests import BODIES, FAILED, REQUESTS, ask, escaped, post_raw, write_files
from bad_workflows import small_graph
from comfy_queue import Server
from PIL import Image

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="COMFYUI_PATH is not set: no real ComfyUI to test against"
)
MEMORY = 512 * 1024 * 1024


def draw(server, seed):
    """The pixels of a good picture."""
    prompt = small_graph()
    prompt["8"]["inputs"]["noise_seed"] = seed
    run = server.run(prompt)
    assert run.ending == "execution_success", run.data
    # What is in ComfyUI's cache is not saved again.
    saved = server.pictures(run)
    if not saved:
        return None
    with Image.open(saved[0]) as picture:
        return picture.tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(Path(CHECKOUT or ""), tmp_path_factory.mktemp("comfy") / "base") as running:
        write_files(running)
        yield running


@pytest.fixture(scope="module")
def before(server):
    """Pixels of seed 5, and the server's memory once it has drawn."""
    pixels = draw(server, 5)
    return pixels, psutil.Process(server.process.pid).memory_info().rss


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_one_clear_error(server, before, request_):
    ending, told = ask(server, request_)
    assert ending == request_.ending, told
    assert request_.says in told and 0 < len(told) < 20_000
    if ending == FAILED:
        assert "\n" not in told and len(told) < 1500


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_prompt(server, before, name):
    assert post_raw(server, BODIES[name]) in (400, 413, 500)


def test_the_server_lives_and_draws_as_before(server, before):
    assert server.process.poll() is None
    assert draw(server, 6) is not None  # another seed takes the first picture out of the cache
    assert draw(server, 5) == before[0]
    assert psutil.Process(server.process.pid).memory_info().rss < before[1] + MEMORY
    assert not escaped(server)
