"""The nodes of schedules, and the picture of a sigma curve.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.schedulers import SCHEDULERS, get_sigmas
from chroma_nodes.schedulers.options import OPTIONS
from comfy_inprocess import complaint, import_comfyui

import_comfyui()

from chroma_nodes.nodes import host_sampling
from chroma_nodes.nodes.scheduling import (
    ChromaBongTangentScheduler,
    ChromaLinearQuadraticScheduler,
    ChromaPowerOddsScheduler,
    ChromaScheduler,
    ChromaSigmaCurve,
)
from test_nodes import files, model, result

__all__ = ["files", "model"]  # fixtures


def model_shift(model):
    return host_sampling.model_shift(model.get_model_object("model_sampling"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_by_its_name(model, name):
    exact = result(ChromaScheduler.execute(model, 12, name, 1.0, False))
    assert torch.equal(exact, get_sigmas(name, 12, shift=model_shift(model)))
    assert complaint(ChromaScheduler, scheduler_name=name) is None
    told = complaint(ChromaScheduler, scheduler_name="karras")
    assert told and "scheduler_name 'karras' is not in the list" in told
    picture = result(ChromaSigmaCurve.execute(exact, name))
    assert picture.shape == (1, 480, 768, 3) and 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize(
    "node", [ChromaPowerOddsScheduler, ChromaBongTangentScheduler, ChromaLinearQuadraticScheduler]
)
def test_schedules_with_options(model, node):
    name = node.SCHEDULE[0]
    usual = {option.name: option.default for option in OPTIONS[name]}
    plain = result(ChromaScheduler.execute(model, 12, name, 1.0, False))
    assert torch.equal(result(node.execute(model, 12, 1.0, False, **usual)), plain)
    for option in OPTIONS[name]:
        changed = {**usual, option.name: (option.default + option.high) / 2}
        assert not torch.equal(result(node.execute(model, 12, 1.0, False, **changed)), plain)
