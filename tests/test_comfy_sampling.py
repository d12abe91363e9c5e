"""Samplers' options and seeds in ComfyUI: the nodes beside the standalone ones, and batches.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.workflow import REGISTRY
from chroma_nodes.chroma.workflow.nodes_sampling import SAMPLER_NODES
from chroma_nodes.samplers import SAMPLERS, takes
from chroma_nodes.samplers.options import OPTIONS
from comfy_inprocess import import_comfyui, write_small_files

import_comfyui()

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
from chroma_nodes import nodes as pack
from chroma_nodes.nodes import host_sampling, sampling, scheduling
from chroma_nodes.nodes.host_model import build_model
from comfy_extras.nodes_custom_sampler import RandomNoise, SamplerCustomAdvanced

import nodes

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
OURS = [node for node in pack.NODES if node.__name__ in REGISTRY]
NOISY = [name for name, sampler in SAMPLERS.items() if takes(sampler, "eta")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    files = write_small_files(tmp_path_factory.mktemp("models"))
    return build_model(files["diffusion_models"], torch.float32)


def result(output):
    return output.result[0]


def noise_of(seed):
    # A V3 node in newer versions, an old one in older ones.
    if hasattr(RandomNoise, "execute"):
        return result(RandomNoise.execute(seed))
    return RandomNoise().get_noise(seed)[0]


def picture(model, noise, sampler, batch, mask=None):
    """SamplerCustomAdvanced on an empty latent, in model space."""
    g = torch.Generator().manual_seed(3)
    cond = [[torch.randn(1, 5, 48, generator=g), {"pooled_output": None}]]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(cond, [[cond[0][0].flip(1), {"pooled_output": None}]])
    guider.set_cfg(3.0)
    latent = {"samples": torch.zeros(batch, 16, 4, 6)}
    if mask is not None:
        latent = {"samples": torch.ones(batch, 16, 4, 6), "noise_mask": mask}
    node = SamplerCustomAdvanced
    run = node.execute if hasattr(node, "execute") else node().sample
    out = run(noise, guider, sampler, SIGMAS, latent)
    return (out.result if hasattr(out, "result") else out)[0]["samples"]


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("node", OURS, ids=lambda node: node.__name__)
def test_inputs_are_those_of_the_standalone_node(node):
    ours = {spec.name: spec for spec in REGISTRY[node.__name__].inputs}
    theirs = {spec.id: spec for spec in node.define_schema().inputs}
    assert list(ours) == list(theirs)
    for name, spec in ours.items():
        if spec.type in ("INT", "FLOAT"):
            wanted = (theirs[name].default, theirs[name].min, theirs[name].max)
            assert (spec.default, spec.minimum, spec.maximum) == wanted, name
        if spec.type in ("INT", "FLOAT", "BOOLEAN"):
            assert theirs[name].get_io_type() == spec.type, name


def test_every_sampler_with_options_has_its_node():
    nodes = {node.__name__: node for node in pack.NODES}
    assert {nodes[i].SAMPLER[0]: i for i in SAMPLER_NODES.values()} == SAMPLER_NODES
    assert OPTIONS.keys() - SAMPLER_NODES.keys() == {"res_2s_ode"}  # res_2s with eta 0


@pytest.mark.parametrize("name", SAMPLER_NODES)
def test_options_reach_the_sampler_in_comfyui(model, name):
    node = getattr(sampling, SAMPLER_NODES[name])
    usual = {option.name: option.default for option in OPTIONS[name]}
    plain = picture(model, noise_of(4), comfy.samplers.KSAMPLER(SAMPLERS[name]), 1)
    assert torch.equal(picture(model, noise_of(4), result(node.execute(**usual)), 1), plain)
    one = "eta" if "eta" in usual else OPTIONS[name][0].name
    other = {**usual, one: 2}
    changed = picture(model, noise_of(4), result(node.execute(**other)), 1)
    direct = comfy.samplers.KSAMPLER(SAMPLERS[name], {one: 2})
    assert torch.equal(changed, picture(model, noise_of(4), direct, 1))
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("name", ["flow_pec", "heun", *NOISY])
def test_each_picture_of_a_batch_is_that_of_its_seed_alone(model, name):
    options = {"eta": 1.0} if name in NOISY else {}
    sampler = comfy.samplers.KSAMPLER(SAMPLERS[name], options)
    noise = result(sampling.ChromaBatchNoise.execute(2**64 - 2))
    together = picture(model, noise, sampler, 3)
    for seed, one in zip((2**64 - 2, 2**64 - 1, 0), together, strict=True):
        close(one[None], picture(model, noise_of(seed), sampler, 1))
    assert float((together[0] - together[1]).abs().mean()) > 0.05


def test_a_part_of_a_batch_keeps_its_seeds():
    noise = result(sampling.ChromaBatchNoise.execute(7))
    whole = {"samples": torch.zeros(4, 16, 4, 4)}
    drawn = noise.generate_noise(whole)
    (part,) = nodes.LatentFromBatch().frombatch(whole, 1, 2)
    assert torch.equal(noise.generate_noise(part), drawn[1:3])
    assert noise.seed.take(2) == [8, 9]
    assert torch.equal(noise.generate_noise(whole), drawn) and noise.seed.take(2) == [7, 8]


def test_seeds_of_a_batch_with_a_mask(model):
    sampler = comfy.samplers.KSAMPLER(SAMPLERS["euler_ancestral"])
    mask = torch.zeros(1, 1, 32, 48)
    mask[..., 24:] = 1
    noise = result(sampling.ChromaBatchNoise.execute(5))
    together = picture(model, noise, sampler, 2, mask)
    for seed, one in zip((5, 6), together, strict=True):
        close(one[None], picture(model, noise_of(seed), sampler, 1, mask))
    close(together[..., :2], torch.ones(2, 16, 4, 2))


def test_samplers_that_know_one_seed_take_the_first(model):
    theirs = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler_ancestral)
    noise = result(sampling.ChromaBatchNoise.execute(5))
    close(picture(model, noise, theirs, 1), picture(model, noise_of(5), theirs, 1))
    assert bool(picture(model, noise, theirs, 2).isfinite().all())


def test_a_node_refuses_what_its_sampler_cannot_use():
    with pytest.raises(SamplingError, match="flow_pec: order 1 is not usable"):
        sampling.ChromaFlowPECSampler.execute(order=1, kappa=0.0, eta=0.0, s_noise=1.0)


def test_a_model_that_returns_no_numbers_is_one_line(tmp_path):
    broken = build_model(write_small_files(tmp_path)["diffusion_models"], torch.float32)
    torch.nn.init.constant_(broken.model.diffusion_model.img_in.bias, float("nan"))
    sampler = comfy.samplers.KSAMPLER(SAMPLERS["flow_pec"])
    with pytest.raises(SamplingError, match=r"returned NaN or infinity at sigma 1\.0000"):
        picture(broken, noise_of(1), sampler, 1)


def test_schedules_and_shifts_are_for_flow_models(model):
    other = model.clone()
    kinds = (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS)
    sampling_of_others = type("Eps", kinds, {})()
    other.add_object_patch("model_sampling", sampling_of_others)
    for use in (
        lambda: scheduling.ChromaScheduler.execute(other, 8, "beta", 1.0, False),
        lambda: scheduling.ChromaModelShift.execute(other, "constant", 1.0, 0.5, 1.15, 64, 64),
        lambda: sampling.ChromaPreset.execute(other, "Flash"),
        lambda: host_sampling.exact("beta", sampling_of_others, 8),
    ):
        with pytest.raises(SamplingError, match="this MODEL is not a flow model; expected Chroma"):
            use()


def test_a_resolution_that_shifts_too_far_is_one_line(model):
    with pytest.raises(SamplingError, match=r"4096 x 4096 pixels give mu .* lower max_shift"):
        scheduling.ChromaModelShift.execute(model, "resolution", 1.0, 0.5, 1.15, 4096, 4096)
