"""The pack without the gguf package, as after cloning it without installing what it needs."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from chroma_nodes.chroma.checkpoint.container import open_checkpoint
from chroma_nodes.chroma.errors import CheckpointError
from stored_files import gguf_file

CODE = """
import sys
sys.modules["gguf"] = None
from pathlib import Path
from chroma_nodes.chroma.checkpoint.quantise import quantise_file
from chroma_nodes.chroma.pipeline import Pipeline, Settings, generate
from chroma_nodes.chroma.tiny import files as small

quantise_file(small.TRANSFORMER, "q8_0", Path(sys.argv[1]))
pipeline = Pipeline.load(Path(sys.argv[1]), small.TEXT_ENCODER, small.TOKENIZER, small.VAE)
settings = Settings(width=64, height=64, steps=1)
print(*generate(pipeline, ["a cat"], settings=settings, disable_progress=True).shape)
"""


def test_it_runs_with_q8_0(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path / "q8_0.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "64", "64", "3"]), done.stderr


def test_common_formats_are_read_and_the_others_say_what_is_missing(tmp_path, monkeypatch):
    common, rare = tmp_path / "common.gguf", tmp_path / "rare.gguf"
    name = "img_in.weight"
    meant = gguf_file("Q8_0")({name: torch.randn(8, 256)}, common)
    writer = gguf.GGUFWriter(rare, "flux")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor(name, np.zeros((8, 8 * 18), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(rare).read({name: name})
    monkeypatch.setitem(sys.modules, "gguf", None)
    stored = open_checkpoint(common).read({name: name})[name]
    assert torch.equal(stored.dequantise(torch.float32), meant[name])
    with pytest.raises(CheckpointError, match=r"rare.gguf: .* in IQ4_NL, .* pip install -U gguf"):
        open_checkpoint(rare).read({name: name})
