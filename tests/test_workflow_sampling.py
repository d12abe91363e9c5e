"""The nodes of samplers and seeds without ComfyUI, the shift by resolution, the order of a run."""

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError, WorkflowError
from chroma_nodes.chroma.noise import make_noise
from chroma_nodes.chroma.pipeline import Settings
from chroma_nodes.chroma.workflow import REGISTRY, Context, check
from chroma_nodes.chroma.workflow.nodes_sampling import SAMPLER_NODES
from chroma_nodes.chroma.workflow.run import branch_by_branch, prompts_first
from chroma_nodes.chroma.workflow.single import Extras, text_to_image
from chroma_nodes.chroma.workflow.values import Model
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.samplers.options import OPTIONS
from oracles import random_transformer

CPU = torch.device("cpu")
FAR = {"base_shift": 0.5, "max_shift": 1.15, "width": 4096, "height": 4096}


def call(kind, **inputs):
    return REGISTRY[kind].run(Context(CPU, None, None, None, {}), **inputs)


@pytest.mark.parametrize(("name", "node"), SAMPLER_NODES.items())
def test_the_node_of_a_sampler_gives_it_its_options(name, node):
    usual = {spec.name: spec.default for spec in REGISTRY[node].inputs}
    assert usual == {option.name: option.default for option in OPTIONS[name]}
    (sampler,) = call(node, **usual)
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.4, 0.2, 0.1, 0.0])

    def run(function, **options):
        return function(
            lambda x, sigma, **_: 0.3 * (2 * x).sin(), x, sigmas, extra_args={"seed": 1},
            disable=True, **options,
        )  # fmt: skip

    assert torch.equal(run(sampler), run(SAMPLERS[name]))
    for option in OPTIONS[name]:
        other = {**usual, option.name: option.high if option.default == option.low else option.low}
        if name == "flow_pec" and option.name in ("s_noise", "kappa"):
            other |= {
                "eta": 1.0,
                "kappa": 1.0,
            }  # Without these it adds no noise and is not limited.
        (changed,) = call(node, **other)
        assert torch.equal(run(changed), run(SAMPLERS[name], **other))
        assert not torch.equal(run(changed), run(sampler)), option.name


def test_options_out_of_reach_name_the_sampler():
    with pytest.raises(SamplingError, match="flow_pec: order 1 is not usable"):
        call("ChromaFlowPECSampler", order=1, kappa=0.0, eta=0.0, s_noise=1.0)


def test_batch_noise_counts_up():
    (noise,) = call("ChromaBatchNoise", noise_seed=41)
    drawn = make_noise((3, 16, 4, 4), noise.seed)
    for i in range(3):
        torch.manual_seed(41 + i)
        assert torch.equal(drawn[i], torch.randn(16, 4, 4))


def test_a_repeated_latent_keeps_its_masks():
    samples, masks = torch.rand(2, 16, 4, 4), torch.rand(2, 1, 8, 8)
    (out,) = call("RepeatLatentBatch", samples={"samples": samples, "noise_mask": masks}, amount=3)
    assert out["samples"].shape == (6, 16, 4, 4) and out["noise_mask"].shape == (6, 1, 8, 8)
    assert torch.equal(out["samples"][2:4], samples) and torch.equal(out["noise_mask"][4:], masks)
    (out,) = call(
        "RepeatLatentBatch", samples={"samples": samples, "noise_mask": masks[:1]}, amount=3
    )
    assert torch.equal(out["noise_mask"], masks[:1])


@pytest.mark.parametrize(
    ("node", "more"), [("ModelSamplingFlux", {}), ("ChromaModelShift", {"mode": "resolution"})]
)
def test_a_resolution_that_shifts_too_far_is_one_line(node, more):
    more = {"shift": 1.0, **more} if more else more
    with pytest.raises(SamplingError, match=r"4096 x 4096 pixels give mu .* lower max_shift"):
        call(node, model=Model(random_transformer()), **FAR, **more)
    near = {**FAR, "width": 1024, "height": 1024}
    (model,) = call(node, model=Model(random_transformer()), **near, **more)
    torch.testing.assert_close(model.table, Model(random_transformer()).table, rtol=0, atol=1e-7)


def test_pictures_come_one_by_one_and_prompts_first():
    prompt = text_to_image(["a", "b"], "", Settings(), extras=Extras(count=2))
    order = [n.type.id for n in prompts_first(branch_by_branch(check(prompt, REGISTRY)))]
    assert sorted(order) == sorted(n["class_type"] for n in prompt.values())
    encoded = [i for i, kind in enumerate(order) if kind == "ChromaTextEncode"]
    assert max(encoded) < order.index("ChromaLoadModel")
    rest = [k for k in order if k in ("SamplerCustomAdvanced", "SaveImage")]
    assert rest == ["SamplerCustomAdvanced", "SaveImage"] * 4


def test_what_no_output_needs_is_left_out():
    prompt = text_to_image(["a"], "", Settings())
    spare = {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}, "_meta": {"title": "x"}}
    order = branch_by_branch(check({**prompt, "99": spare}, REGISTRY))
    assert "99" not in [node.id for node in order] and len(order) == len(prompt)


def test_a_seed_out_of_range_names_its_node():
    with pytest.raises(WorkflowError, match="input noise_seed: -1 is not usable"):
        check(text_to_image(["a"], "", Settings(seed=-1), extras=Extras(count=2)), REGISTRY)
