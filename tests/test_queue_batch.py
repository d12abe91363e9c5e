"""Batches on a stand-in for ComfyUI: what is done stays done, and what can go wrong."""

import json
import threading

import pytest
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.queue import Row, Server, make_jobs, run_batch
from chroma_nodes.chroma.queue import batch as batch_module
from chroma_nodes.chroma.queue.state import NAME
from queue_fake import GRAPH, PICTURE, FakeComfyUI

TEXTS = ["a cat", "a dog", "an owl"]


@pytest.fixture
def fake():
    with FakeComfyUI() as running:
        yield running


def jobs_of(fake, texts=TEXTS):
    rows = [Row(f"rows line {i}", {"Prompt.text": text}) for i, text in enumerate(texts, 1)]
    return make_jobs(Server(fake.url), GRAPH, [], rows)


def run(fake, out, texts=TEXTS, **options):
    return run_batch(
        Server(fake.url), jobs_of(fake, texts), out, **{"poll": 0.01, "patience": 0.0, **options}
    )


def sent(fake):
    return [graph["1"]["inputs"]["text"] for graph in fake.submitted]


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def refused(fake, out, **options):
    with pytest.raises(ChromaError) as error:
        run(fake, out, **options)
    assert "\n" not in str(error.value)
    assert not [name for name in files(out) if name.endswith(".part")]
    return str(error.value)


def test_every_row_is_made_once(fake, tmp_path):
    told = []
    first = run(fake, tmp_path / "new" / "out", progress=told.append)
    assert sent(fake) == TEXTS
    keys = [job.key[:8] for job in jobs_of(fake)]
    assert [path.name for path in first.saved] == [f"000{i + 1}-{keys[i]}.png" for i in range(3)]
    assert all(path.read_bytes() == PICTURE for path in first.saved)
    assert sum(told) == 3
    again = run(fake, tmp_path / "new" / "out", ["a fox", *reversed(TEXTS)])
    assert sent(fake)[3:] == ["a fox"]
    assert again.before == 3 and [path.name[:4] for path in again.saved] == ["0001"]
    assert len(files(tmp_path / "new" / "out")) == 5


def test_equal_rows_are_one(fake, tmp_path):
    told = []
    report = run(fake, tmp_path, ["a cat"] * 3, progress=told.append)
    assert sent(fake) == ["a cat"] and len(report.saved) == 1 and sum(told) == 3


def test_a_row_without_its_picture_is_made_again(fake, tmp_path):
    run(fake, tmp_path).saved[1].unlink()
    assert [path.name[:4] for path in run(fake, tmp_path).saved] == ["0002"]
    assert sent(fake)[3:] == ["a dog"]


def test_the_server_always_has_the_next_one_but_no_more(fake, tmp_path):
    longest = 0
    look = fake.on_history

    def on_history(path, body):
        nonlocal longest
        longest = max(longest, len(fake.queue))
        return look(path, body)

    fake.on_history = on_history
    run(fake, tmp_path, [str(i) for i in range(6)])
    assert longest == 2


def test_several_pictures_and_those_of_previews(fake, tmp_path):
    fake.files = [
        {"filename": "a.png", "subfolder": "x", "type": "output"},
        {"filename": "preview.png", "subfolder": "", "type": "temp"},
        {"filename": "a.WEBP", "subfolder": "", "type": "output"},
    ]
    (key,) = (job.key[:8] for job in jobs_of(fake, ["a cat"]))
    run(fake, tmp_path, ["a cat"])
    assert files(tmp_path) == [f"0001-{key}-2.webp", f"0001-{key}.png", NAME]


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/x.png", "..\\x.png", "C:\\x.png", "a\0.png", "\ud800.png", "x.png" * 99],
)
def test_the_servers_names_never_name_our_files(fake, tmp_path, name):
    fake.files = [{"filename": name, "subfolder": "../..", "type": "output"}]
    (tmp_path / "a" / "b").mkdir(parents=True)
    run(fake, tmp_path / "a" / "b", ["a cat"])
    assert len(files(tmp_path)) == 4 and len(files(tmp_path / "a" / "b")) == 2


@pytest.mark.parametrize("name", ["x.exe", "x", "x.png.py", ".png", "x.html"])
def test_what_is_no_picture_is_not_saved(fake, tmp_path, name):
    fake.files = [{"filename": name, "subfolder": "", "type": "output"}]
    (line,) = run(fake, tmp_path, ["a cat"]).failed
    assert "expected .png" in line and files(tmp_path) == [NAME]


def test_a_failed_row_does_not_stop_the_others(fake, tmp_path, caplog):
    error = {"node_id": "2", "node_type": "Noise", "exception_message": "out of\nmemory\n"}
    fake.errors = {"a dog": [["execution_error", error]]}
    report = run(fake, tmp_path)
    assert report.failed == ["rows line 2: node 2 'Seed' (Noise): out of memory"]
    assert report.failed == caplog.messages and len(report.saved) == 2
    fake.errors = {}
    again = run(fake, tmp_path)
    assert sent(fake)[3:] == ["a dog"] and again.before == 2 and not again.failed


def test_interrupted_by_somebody_else_and_nothing_saved(fake, tmp_path):
    fake.errors = {"a cat": [["execution_interrupted", {}]]}
    assert run(fake, tmp_path, ["a cat"]).failed == [
        "rows line 1: it was interrupted on the server"
    ]
    fake.files = []
    assert "add a SaveImage node" in run(fake, tmp_path, ["a dog"]).failed[0]


CHOICES = [f"model-{i:02}.safetensors" for i in range(20)]
NODE_ERROR = {
    "type": "value_not_in_list",
    "message": "Value not in list",
    "details": "kind: 'model-1.safetensors' not in (list of length 20)",
    "extra_info": {
        "input_name": "kind",
        "input_config": [CHOICES, {}],
        "received_value": "model-1.safetensors",
    },
}
MISSING = {
    "type": "required_input_missing", "message": "Required input is missing", "details": "clip",
}  # fmt: skip
OUTPUTS = {
    "type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation",
}  # fmt: skip
CONFIGS = [[CHOICES, {}], ["COMBO", {"options": CHOICES}]]


def node_errors(*errors):
    return {"3": {"errors": list(errors), "class_type": "Save", "dependent_outputs": ["3"]}}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_the_server_does_not_have(fake, tmp_path, config):
    error = {**NODE_ERROR, "extra_info": {**NODE_ERROR["extra_info"], "input_config": config}}
    fake.refuse = (400, {"error": OUTPUTS, "node_errors": node_errors(error, MISSING)})
    line = refused(fake, tmp_path)
    assert line.startswith(
        "rows line 1: node 3 'Save' (Save), input kind: the server has no 'model-1.safetensors', "
        "but model-1"
    )
    assert "and 12 more" in line and "server's folder" in line and "(and 1 more)" in line


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (
            {"error": OUTPUTS, "node_errors": node_errors(MISSING)},
            "Required input is missing: clip",
        ),
        (
            {"error": {"type": "missing_node_type", "message": "Node 'X' not found."}},
            "Node 'X' not found.; install the pack",
        ),
        (
            {"error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs"}},
            "Prompt has no outputs; add a SaveImage node",
        ),
        ({"error": "no prompt", "node_errors": []}, "no prompt"),
        (
            {
                "node_errors": node_errors(
                    {
                        "type": "custom_validation_failed",
                        "message": "Custom validation failed for node",
                        "details": "kind - 'x - y' is not in the list",
                    }
                )
            },
            "node 3 'Save' (Save), input kind: 'x - y' is not in the list",
        ),
        ({}, "answers 400 (Bad Request) to /prompt"),
        ({"error": {"message": "a\nb" * 500}}, "a ba b"),
        ({"node_errors": ["x"]}, "does not answer as ComfyUI does"),
    ],
)
def test_refusals(fake, tmp_path, reply, says):
    fake.refuse = (400, reply)
    line = refused(fake, tmp_path)
    assert line.startswith("rows line 1: ") and says in line and len(line) < 700


def test_a_part_refused_at_status_200_is_taken_off_the_server(fake, tmp_path):
    fake.polls = 10**9
    fake.refuse = (200, {"node_errors": node_errors(MISSING)})
    assert "node 3 'Save' (Save), Required input is missing: clip" in refused(fake, tmp_path)
    assert len(fake.submitted) == len(fake.interrupted) == 1 and not fake.queue


def test_a_later_refusal_stops_what_waits(fake, tmp_path):
    fake.polls = 10**9
    take = fake.on_prompt

    def on_prompt(path, body):
        if fake.submitted:
            return 400, {"error": {"message": "no"}, "node_errors": {}}
        return take(path, body)

    fake.on_prompt = on_prompt
    assert refused(fake, tmp_path).startswith("rows line 2: no")
    assert len(fake.interrupted) == 1 and not fake.queue


def test_no_server_and_other_servers(fake, tmp_path):
    url = fake.url
    for path, reply in [
        ("queue", (404, b"")), ("queue", (200, b"<html>")), ("queue", (200, b"[]")),
        ("queue", (200, b"{}")), ("queue", (500, b"x")), ("queue", (200, b"[" * 100_000)),
        ("queue", (200, b'{"queue_running": [1], "queue_pending": []}')),
    ]:  # fmt: skip
        fake.replies = {path: reply}
        with pytest.raises(ChromaError, match=f"{url}.*check"):
            jobs_of(fake)
    fake.__exit__()
    with pytest.raises(ChromaError, match=rf"no ComfyUI server answers at {url} \(.*\); start it"):
        make_jobs(Server(url), GRAPH, [], [])
    fake.__enter__()


@pytest.mark.parametrize(
    "url",
    [
        "", "file:///etc/passwd", "ftp://h", "http://", "http://h:x", "http://[", "http://u:p@h",
        "h?q", "h/ a", "http://\u2603",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(ChromaError, match="is no server; expected an address"):
        Server(url)


def test_an_address_may_leave_out_the_scheme_and_have_a_path():
    assert Server("127.0.0.1:8188/").url == "http://127.0.0.1:8188"
    assert Server("https://host/comfy/").url == "https://host/comfy"


@pytest.mark.parametrize("entry", [{}, [], 3, {"outputs": {"3": {"images": [{"type": "output"}]}}}])
def test_a_history_that_is_none(fake, tmp_path, entry):
    fake.on_history = lambda path, _: (200, {path.rpartition("/")[2]: entry})
    assert "does not answer as ComfyUI does" in refused(fake, tmp_path) and not fake.queue


def test_a_server_that_was_restarted(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "CHECK_SECONDS", 0.05)
    fake.polls = 10**9
    threading.Timer(0.2, fake.forget).start()
    line = refused(fake, tmp_path)
    assert line.startswith("rows line 1: the server no longer knows it, so it was restarted")
    fake.polls = 1
    assert len(run(fake, tmp_path).saved) == 3
    assert sent(fake) == [*TEXTS[:2], *TEXTS]


def test_a_server_that_stops_answering(fake, tmp_path):
    fake.polls = 10**9
    real, stopping = fake.on_history, []

    def on_history(path, body):
        if not stopping:
            stopping.append(threading.Thread(target=fake.__exit__))
            stopping[0].start()
        return real(path, body)

    fake.on_history = on_history
    line = refused(fake, tmp_path)
    assert "no ComfyUI server answers" in line and line.endswith("goes on from there")
    stopping[0].join()
    fake.polls, fake.on_history = 1, real
    fake.__enter__()
    # What a server without a restart still has is waited for, not queued again.
    assert len(run(fake, tmp_path).saved) == 3 and sent(fake) == TEXTS


def test_a_short_silence_is_borne(fake, tmp_path):
    fake.polls = 3
    real, silent = fake.on_history, []

    def on_history(path, body):
        if len(silent) < 2:
            silent.append(path)
            raise ConnectionAbortedError
        return real(path, body)

    fake.on_history = on_history
    fake.server.handle_error = lambda *_: None
    assert len(run(fake, tmp_path, ["a cat"], patience=30.0).saved) == 1 and len(silent) == 2


def test_a_picture_that_breaks_off_is_fetched_again_but_not_made_again(fake, tmp_path):
    fake.cut_pictures = True
    assert "goes on from there" in refused(fake, tmp_path)
    assert files(tmp_path) == [NAME]
    fake.cut_pictures = False
    assert len(run(fake, tmp_path).saved) == 3
    assert sent(fake).count("a cat") == 1


def test_a_picture_that_is_gone(fake, tmp_path):
    fake.replies = {"view": (404, b"")}
    (line,) = run(fake, tmp_path, ["a cat"]).failed
    assert "no longer has p_00001_.png (status 404)" in line and files(tmp_path) == [NAME]


def test_no_place_for_pictures(fake, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused(fake, tmp_path / "file") and not fake.submitted


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "rows": {}}', '{"version": 1, "rows": []}',
     '{"version": 1, "rows": {"k": 1}}', '{"version": 1, "rows": {"k": {"prompt_id": 1}}}',
     '{"version": 1, "rows": {"k": {"prompt_id": "i", "pictures": ["../x"]}}}',
     '{"version": 1, "rows": {"k": {"prompt_id": "i", "pictures": "x"}}}', "\udcff"],
)  # fmt: skip
def test_a_state_that_is_none_is_kept(fake, tmp_path, text):
    (tmp_path / NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "is not the state of a batch; move it away" in refused(fake, tmp_path)
    assert (tmp_path / NAME).read_bytes() == text.encode("utf-8", "surrogateescape")
    assert not fake.submitted


def test_the_state_is_whole_at_every_moment(fake, tmp_path):
    seen = []
    look = fake.on_history

    def on_history(path, body):
        seen.append(json.loads((tmp_path / NAME).read_text("utf-8"))["rows"])
        return look(path, body)

    fake.on_history = on_history
    run(fake, tmp_path)
    # What is on the server is in the state before it is done.
    assert sum("pictures" not in row for row in seen[0].values()) == 2
    assert [name for name in files(tmp_path) if name.endswith(".part")] == []
