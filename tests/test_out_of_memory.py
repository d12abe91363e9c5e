"""When memory runs out: one line with what to try, and nothing of the failed run is kept."""

import gc
import weakref

import pytest
import torch
from bad_workflows import INPUTS, good_picture, small_graph
from chroma_nodes.chroma.cli import main
from chroma_nodes.chroma.errors import OutOfMemoryError, WorkflowError
from chroma_nodes.chroma.image import load_image
from chroma_nodes.chroma.out_of_memory import REMEDY, is_out_of_memory, telling_out_of_memory
from chroma_nodes.chroma.workflow import nodes_chroma, nodes_core, run_workflow
from PIL import Image

CPU = torch.device("cpu")
ERRORS = {
    "torch's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nGPU 0 has"),
    "the CPU allocator's": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Windows'": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 67108864 bytes."
    ),
    "Apple's": RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    "cuBLAS'": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "Python's": MemoryError(),
}
# Where it happens: (module, function that a fake stands in for, the node that is named).
PLACES = {
    "loading": (nodes_chroma, "load_transformer", "ChromaLoadModel"),
    "sampling": (nodes_core, "sample_latent", "SamplerCustomAdvanced"),
    "decoding": (nodes_core, "to_picture", "VAEDecode"),
}


def run(folder):
    return run_workflow(small_graph(), input_dir=INPUTS, output_dir=folder, device=CPU)


def test_the_allocators_own_error_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes disagree"), ValueError("out of memory")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, telling_out_of_memory():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_one_line_names_the_node_and_what_to_try(monkeypatch, tmp_path, place, kind):
    module, name, node = PLACES[place]
    kept = []

    def full(*_, **__):
        filling = torch.ones(1000)
        kept.append(weakref.ref(filling))
        raise ERRORS[kind]

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(WorkflowError) as told:
            run(tmp_path)
    message = str(told.value)
    assert f"({node}): out of memory" in message and REMEDY in message and "\n" not in message
    assert kept and kept[0]() is None
    assert list(tmp_path.iterdir()) == []
    assert good_picture(tmp_path)


@pytest.mark.parametrize(
    ("kind", "asked"), [("torch's", "2.50 GiB"), ("the CPU allocator's", "4000000000000 bytes")]
)
def test_it_tells_how_much_was_asked_for(kind, asked):
    with pytest.raises(OutOfMemoryError, match=f"asked for {asked} more"), telling_out_of_memory():
        raise ERRORS[kind]


def test_nothing_of_the_models_is_left_behind(monkeypatch, tmp_path):
    models = []

    def full(*_, **__):
        raise ERRORS["torch's"]

    original = nodes_chroma.load_transformer

    def load(*args, **kw):
        model = original(*args, **kw)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(nodes_chroma, "load_transformer", load)
    monkeypatch.setattr(nodes_core, "sample_latent", full)
    with pytest.raises(WorkflowError):
        run(tmp_path)
    gc.collect()
    assert models and models[0]() is None


def test_the_command_line_tells_it_in_one_line(monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("chroma_nodes.chroma.cli_files.inspect_file", full)
    assert main(["inspect", "x.safetensors"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"error: out of memory; {REMEDY}\n"


def test_a_picture_for_which_there_is_no_memory_is_not_called_damaged(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(OutOfMemoryError), telling_out_of_memory():
        load_image(path)
