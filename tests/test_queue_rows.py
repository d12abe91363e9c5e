"""Batches as files, and their rows as workflows."""

import json

import pytest
from chroma_nodes.chroma.errors import ChromaError
from chroma_nodes.chroma.queue import Row, Server, make_jobs, read_rows
from queue_fake import GRAPH, FakeComfyUI


@pytest.fixture(scope="module")
def server():
    with FakeComfyUI() as fake:
        yield Server(fake.url)


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_csv_as_a_spreadsheet_writes_it(tmp_path):
    text = '\ufeffPrompt.text,2.seed\r\n"a ""red"", round\r\napple",7\r\n\r\n,8\r\nnull,\r\n'
    rows = read_rows(written(tmp_path, "rows.CSV", text))
    assert rows == [
        Row("rows.CSV line 3", {"Prompt.text": 'a "red", round\r\napple', "2.seed": "7"}, True),
        Row("rows.CSV line 5", {"2.seed": "8"}, True),
        Row("rows.CSV line 6", {"Prompt.text": "null"}, True),
    ]


def test_json_lines(tmp_path):
    text = '{"Prompt.text": "é", "2.seed": 18446744073709551615}\n\n{"1.upper": true}\n'
    rows = read_rows(written(tmp_path, "r.jsonl", text))
    assert rows == [
        Row("r.jsonl line 1", {"Prompt.text": "é", "2.seed": 2**64 - 1}),
        Row("r.jsonl line 3", {"1.upper": True}),
    ]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("r.txt", "a", "r.txt is no batch; expected a file ending in .jsonl or .csv"),
        ("r.jsonl", "", "has no rows"),
        ("r.csv", "1.text\n", "has no rows"),
        ("r.csv", "", "has no rows"),
        ("r.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("r.csv", b"1.text\n\xff", "cannot be read"),
        ("r.jsonl", "{}\n{'a': 1}", "r.jsonl line 2 is not JSON"),
        ("r.jsonl", "[" * 100_000, "r.jsonl line 1 is not JSON"),
        ("r.jsonl", '["a cat"]', "line 1: expected an object"),
        ("r.jsonl", '{"1.text": ["2", 0]}', "line 1, 1.text: [\"2\", 0] is no value"),
        ("r.jsonl", '{"1.text": null}', "null is no value"),
        ("r.jsonl", '{"1.strength": NaN}', "NaN is not a number"),
        ("r.jsonl", '{"1.text": "a", "1.text": "b"}', "a field comes twice"),
        ("r.csv", "1.text,1.text\na,b\n", "a field is empty or comes twice"),
        ("r.csv", "1.text,\na,b\n", "a field is empty or comes twice"),
        ("r.csv", "1.text\na cat, sleeping\n", "r.csv line 2: 2 cells for 1 fields"),
        ("r.csv", '1.text\n"a" cat\n', "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_no_batch(tmp_path, name, text, says):
    with pytest.raises(ChromaError) as error:
        read_rows(written(tmp_path, name, text))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ChromaError, match=r"no\.csv does not exist"):
        read_rows(tmp_path / "no.csv")


def test_each_row_has_a_graph_of_its_own(server):
    rows = [
        Row("1", {"Prompt.text": "null", "Seed.seed": "7", "1.upper": "True"}, True),
        Row("2", {"1.text": 5, "1.strength": 0.5}),
        Row("3", {}),
    ]
    before = json.dumps(GRAPH)
    jobs = make_jobs(server, GRAPH, ["Save.prefix=q"], rows)
    assert json.dumps(GRAPH) == before
    assert jobs[0].prompt["1"]["inputs"] == {"text": "null", "upper": True}
    assert jobs[0].prompt["2"]["inputs"] == {"seed": 7}
    assert jobs[1].prompt["1"]["inputs"] == {"text": 5, "strength": 0.5}
    assert jobs[2].prompt == {**GRAPH, "3": {**GRAPH["3"], "inputs": {"prefix": "q"}}}
    assert [job.number for job in jobs] == [1, 2, 3]


def test_the_key_is_the_content(server):
    def key(graph, values, overrides=()):
        return make_jobs(server, graph, overrides, [Row("x", values)])[0].key

    renamed = {**GRAPH, "2": {**GRAPH["2"], "_meta": {"title": "Noise"}}}
    turned = dict(reversed(GRAPH.items()))
    same = key(GRAPH, {})
    assert same == key(renamed, {}) == key(turned, {}) == key(GRAPH, {"1.text": "a cat"})
    others = [
        key(GRAPH, {"1.text": "a dog"}), key(GRAPH, {"2.seed": 2}), key(GRAPH, {}, ["2.seed=3"]),
        key(GRAPH, {"2.seed": "1"}), key({**GRAPH, "3": {**GRAPH["3"], "class_type": "Noise"}}, {}),
    ]  # fmt: skip
    assert len({same, *others}) == 6


@pytest.mark.parametrize(
    ("overrides", "values", "says"),
    [
        ([], {"prompt": "x"}, "rows line 2, field prompt: expected node.input"),
        ([], {"Promt.text": "x"}, "field Promt.text: there is no node Promt; did you mean Prompt?"),
        (
            [],
            {"Prompt.txt": "x"},
            "node 1 'Prompt' (Encode) has no input txt; expected one of clip",
        ),
        ([], {"9.a": "x"}, "there is no node 9"),
        ([], {"Seed.seed": "1.5"}, "field Seed.seed: '1.5' is not usable; expected a whole number"),
        ([], {"1.strength": "inf"}, "expected a number"),
        ([], {"1.upper": "maybe"}, "expected true or false"),
        (["5.text=x"], {}, "--set 5.text=x: there is no node 5"),
        (["Prompt.txt=x"], {}, "--set Prompt.txt=x: node 1 'Prompt' (Encode) has no input txt"),
        (["text"], {}, "--set text: expected node.input=value"),
    ],
)
def test_fields_that_are_not_there(server, overrides, values, says):
    with pytest.raises(ChromaError) as error:
        make_jobs(server, GRAPH, overrides, [Row("rows line 2", values, True)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_node_the_server_does_not_have(server):
    graph = {"1": {"class_type": "Other/Node", "inputs": {"a": 1}}}
    with pytest.raises(ChromaError, match="the server has no node Other/Node; install the pack"):
        make_jobs(server, graph, [], [Row("r", {"1.a": 2})])
