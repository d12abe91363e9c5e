"""Guidance inside ComfyUI: Chroma Guider and Chroma Guidance beside ComfyUI's own guider.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import logging
import re
import threading

import pytest
import torch
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.guidance import Denoiser, Guidance
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.chroma.workflow import nodes_guidance
from chroma_nodes.samplers import SAMPLERS
from comfy_inprocess import complaint, import_comfyui, write_small_files
from oracles import SMALL, random_transformer

import_comfyui()

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
from chroma_nodes.nodes import guiding, host_guider
from chroma_nodes.nodes.host_model import build_model
from comfy_extras.nodes_apg import APG

SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
NEUTRAL = {i.id: i.default for i in guiding.ChromaGuider.define_schema().inputs[3:]}
RULES = {i.id: i.default for i in guiding.ChromaGuidance.define_schema().inputs[1:]}
EVERYTHING = {"rescale": 0.6, "zero_star": True, "zero_init": 1, "apg_eta": 0.3,
              "apg_norm": 15.0, "apg_momentum": -0.4}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_small_files(tmp_path_factory.mktemp("models"))


@pytest.fixture
def model(files):
    return build_model(files["diffusion_models"], torch.float32)


@pytest.fixture
def rows(model):
    """The batch sizes that went through the transformer."""
    seen = []
    module = model.model.diffusion_model.img_in
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def embedding(seed, tokens=7):
    g = torch.Generator().manual_seed(seed)
    return TextEmbedding(
        torch.randn(1, tokens, SMALL.context_dim, generator=g), torch.tensor([tokens])
    )


POSITIVE, NEGATIVE = embedding(3), embedding(4)


def conditioning(text):
    return [[text.hidden, {"pooled_output": None}]]


def chroma_guider(model, **options):
    texts = conditioning(POSITIVE), conditioning(NEGATIVE)
    return guiding.ChromaGuider.execute(model, *texts, **{**NEUTRAL, **options}).result[0]


def core_guider(model, cfg=4.0):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(POSITIVE), conditioning(NEGATIVE))
    guider.set_cfg(cfg)
    return guider


def patched(model, **rules):
    return guiding.ChromaGuidance.execute(model, **{**RULES, **rules}).result[0]


def noise(batch=1):
    return torch.randn(batch, 16, 6, 8, generator=torch.Generator().manual_seed(2))


def run(guider, sampler=SAMPLERS["euler"], batch=1, callback=None):
    start = noise(batch)
    return guider.sample(
        start, torch.zeros_like(start), comfy.samplers.KSAMPLER(sampler), SIGMAS,
        callback=callback, disable_pbar=True, seed=5,
    )  # fmt: skip


def standalone(plan, sampler="euler"):
    denoiser = Denoiser(random_transformer(), POSITIVE, NEGATIVE, plan)
    out = sample_latent(
        denoiser, SAMPLERS[sampler], SIGMAS, noise(), torch.zeros_like(noise()),
        disable_progress=True,
    )  # fmt: skip
    return out, denoiser.passes


def to_latent(model, out):
    return model.model.process_latent_in(out)


def close(actual, wanted, tolerance=1e-4):
    torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * float(wanted.std()))


def passes_in(caplog):
    return [int(n) for n in re.findall(r"Chroma Guider: (\d+) forward passes", caplog.text)]


# Chroma Guider


@pytest.mark.parametrize("cfg", (1.0, 4.0))
@pytest.mark.parametrize("sampler", ("euler", "heun"))
def test_neutral_is_comfyuis_guider_bit_for_bit(model, cfg, sampler):
    ours = run(chroma_guider(model, cfg=cfg), SAMPLERS[sampler], batch=2)
    assert torch.equal(ours, run(core_guider(model, cfg), SAMPLERS[sampler], batch=2))


def test_outside_of_the_interval_the_rows_are_halved(model, rows, caplog):
    with caplog.at_level(logging.INFO, "chroma"):
        run(chroma_guider(model, interval_start=0.8, interval_end=0.6), batch=3)
    assert sum(rows) == 3 * (1 + 2 + 2 + 1 + 1) and passes_in(caplog) == [7]
    assert "3 fewer than with guidance everywhere" in caplog.text
    rows.clear()
    run(chroma_guider(model), batch=3)
    assert sum(rows) == 3 * 2 * 5


@pytest.mark.parametrize("sampler", ("euler", "heun"))
@pytest.mark.parametrize(
    "options",
    (
        {"interval_start": 0.9, "interval_end": 0.3},
        {"curve": "cosine", "cfg_end": 2.0},
        EVERYTHING,
        {**EVERYTHING, "curve": "linear", "interval_end": 0.3},
    ),
)
def test_the_same_numbers_and_passes_as_without_comfyui(model, sampler, options, caplog):
    with caplog.at_level(logging.INFO, "chroma"):
        ours = run(chroma_guider(model, **options), SAMPLERS[sampler])
    wanted, passes = standalone(Guidance(4.0, **options), sampler)
    close(to_latent(model, ours), wanted)
    assert passes_in(caplog) == [passes]


def test_what_a_run_remembers_ends_with_it(model):
    guider = chroma_guider(model, **EVERYTHING)
    first, second = run(guider), run(guider)
    assert torch.equal(first, second)
    assert not hasattr(guider, "run")


def test_runs_in_two_threads_do_not_mix(model):
    """Two guiders of one MODEL, whose calls take turns."""
    alone = run(chroma_guider(model, **EVERYTHING))
    turn, results = threading.Barrier(2, timeout=60), {}

    def start(name):
        with torch.inference_mode():
            results[name] = run(chroma_guider(model, **EVERYTHING), callback=lambda *_: turn.wait())

    threads = [threading.Thread(target=start, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["a"], alone) and torch.equal(results["b"], alone)


@pytest.mark.parametrize("node", ("cfg", "apg", "post", "pre"))
def test_guidance_functions_of_other_nodes_keep_working(model, node):
    changed, scales = model.clone(), []

    def note(args):
        scales.append(args["cond_scale"])

    def cfg(args):
        note(args)
        return args["cond"] + 2 * (args["cond"] - args["uncond"])

    def post(args):
        note(args)
        return args["denoised"] + 0.1 * (args["cond_denoised"] - args["uncond_denoised"])

    def pre(args):
        note(args)
        cond, uncond = args["conds_out"]
        return [cond + 0.1 * (cond - uncond), uncond]

    if node == "cfg":
        changed.set_model_sampler_cfg_function(cfg)
    elif node == "post":
        changed.set_model_sampler_post_cfg_function(post)
    elif node == "pre":
        changed.set_model_sampler_pre_cfg_function(pre)
    else:
        changed = APG.execute(model, 0.5, 10.0, 0.0)[0]
    assert torch.equal(run(chroma_guider(changed)), run(core_guider(changed)))
    scales.clear()
    # From sigma 1 to 0.6 with guidance, then without: there the function has nothing to change.
    ours = run(chroma_guider(changed, interval_end=0.5))
    assert scales in ([], [4.0, 4.0, 4.0, 1.0, 1.0])
    x = noise()
    for part, guider in ((SIGMAS[:4], core_guider(changed)), (SIGMAS[3:], core_guider(model, 1.0))):
        x = sample_part(guider, x, part)
    close(to_latent(model, ours), x)


def sample_part(guider, x, sigmas):
    """Some steps from x at sigmas[0] to x at the last, in the transformer's latents."""
    function, kept = SAMPLERS["euler"], []

    def sampler(wrapped, _, sigmas, **kw):
        kept.append(function(wrapped, x, sigmas, **kw))
        return kept[0]

    guider.sample(
        x, torch.zeros_like(x), comfy.samplers.KSAMPLER(sampler), sigmas, disable_pbar=True
    )
    return kept[0]


def test_another_nodes_cfg_function_combines_between_our_rules(model):
    changed = model.clone()
    changed.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])
    )
    rules = {"zero_star": True, "apg_eta": 0.4, "rescale": 0.5}
    close(run(chroma_guider(changed, **rules)), run(chroma_guider(model, **rules)))


@pytest.mark.parametrize("options", ({}, {"interval_start": 0.5}))
def test_cfg_pp_samplers_get_the_negative_prediction_everywhere(model, rows, options):
    sampler = comfy.k_diffusion.sampling.sample_euler_cfg_pp
    ours = run(chroma_guider(model, cfg=1.0, **options), sampler)
    assert sum(rows) == 2 * 5
    assert torch.equal(ours, run(core_guider(model, 1.0), sampler))


def test_cfg_pp_samplers_may_hold_still(model):
    sampler = comfy.k_diffusion.sampling.sample_euler_cfg_pp
    assert torch.isfinite(run(chroma_guider(model, zero_init=2), sampler)).all()


def test_an_interrupt_leaves_nothing_running(model):
    guider = chroma_guider(model, **EVERYTHING)
    whole = run(guider)

    def stop(step, *_):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(guider, callback=stop)
    assert not hasattr(guider, "run")
    assert torch.equal(run(guider), whole)


# Chroma Guidance


def test_a_neutral_patch_changes_nothing(model):
    clone = patched(model)
    assert clone is not model and clone.model_options == model.model_options
    assert torch.equal(run(core_guider(clone)), run(core_guider(model)))


@pytest.mark.parametrize("sampler", ("euler", "heun"))
def test_the_patch_gives_the_guiders_numbers(model, sampler):
    ours = run(core_guider(patched(model, **EVERYTHING)), SAMPLERS[sampler])
    assert torch.equal(ours, run(chroma_guider(model, **EVERYTHING), SAMPLERS[sampler]))


def test_the_patch_works_in_ksampler_and_behind_clones_run_after_run(model):
    clone = patched(model, **EVERYTHING).clone()
    outs = [
        comfy.sample.sample(
            clone, noise(), 5, 4.0, "euler", "simple", conditioning(POSITIVE),
            conditioning(NEGATIVE), torch.zeros_like(noise()), disable_pbar=True, seed=1,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*outs)
    sigmas = comfy.samplers.calculate_sigmas(clone.get_model_object("model_sampling"), "simple", 5)
    guider, start = chroma_guider(model, **EVERYTHING), noise()
    expected = guider.sample(
        start, torch.zeros_like(start), comfy.samplers.ksampler("euler"), sigmas,
        disable_pbar=True, seed=1,
    )  # fmt: skip
    assert torch.equal(outs[0], expected)


def test_at_cfg_one_the_patch_does_nothing(model, rows):
    rules = {k: v for k, v in EVERYTHING.items() if k != "zero_init"}
    ours = run(core_guider(patched(model, **rules), 1.0))
    assert rows == [1] * 5
    close(ours, run(core_guider(model, 1.0)), 1e-5)


def test_a_second_patch_replaces_the_first(model):
    first = patched(model, rescale=0.9, zero_init=2)
    assert torch.equal(
        run(core_guider(patched(first, **EVERYTHING))),
        run(core_guider(patched(model, **EVERYTHING))),
    )
    assert torch.equal(run(core_guider(patched(first))), run(core_guider(model)))


def test_the_patch_keeps_another_nodes_cfg_function(model):
    changed = model.clone()
    changed.set_model_sampler_cfg_function(lambda args: 3 * args["cond"] - 2 * args["uncond"])
    ours = run(core_guider(patched(changed, zero_star=True)))
    close(ours, run(core_guider(patched(model, zero_star=True), 3.0)))
    assert torch.equal(run(core_guider(patched(changed))), run(core_guider(changed)))


# Nodes


def test_guidance_twice_is_an_error(model):
    with pytest.raises(SamplingError, match="comes from Chroma Guidance already; remove that node"):
        chroma_guider(patched(model, rescale=0.5).clone())


def test_only_flow_models_are_guided(model):
    other = model.clone()
    sampling = type(
        "Eps", (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS), {}
    )
    other.add_object_patch("model_sampling", sampling())
    for use in (chroma_guider, patched):
        with pytest.raises(SamplingError, match="is not a flow model; expected Chroma"):
            use(other)


def test_unusable_options_are_one_line(model):
    with pytest.raises(SamplingError, match=r"^interval_start 0\.2 is below interval_end 0\.7"):
        chroma_guider(model, interval_start=0.2, interval_end=0.7)
    told = complaint(guiding.ChromaGuider, curve="square")
    assert told and "curve 'square' is not in the list" in told
    assert complaint(guiding.ChromaGuider, curve="cosine") is None


def test_a_sampler_that_goes_around_the_guider_is_told(model):
    patch = host_guider.GuidancePatch(Guidance(4.0, rescale=0.5), None)
    with pytest.raises(SamplingError, match="does not start its runs through ComfyUI's guiders"):
        patch({"model_options": {}})


@pytest.mark.parametrize("node", (guiding.ChromaGuider, guiding.ChromaGuidance))
def test_without_comfyui_the_nodes_have_the_same_inputs(node):
    schema = node.define_schema()
    (alike,) = (n for n in nodes_guidance.NODES if n.id == schema.node_id)
    assert [i.name for i in alike.inputs] == [i.id for i in schema.inputs]
    for ours, theirs in zip(alike.inputs, schema.inputs, strict=True):
        if ours.is_widget:
            limits = (getattr(theirs, "min", None), getattr(theirs, "max", None))
            assert (ours.default, ours.minimum, ours.maximum) == (theirs.default, *limits)
    assert [name for name, _ in alike.outputs] == [o.display_name for o in schema.outputs]
