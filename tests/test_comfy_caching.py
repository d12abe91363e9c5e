"""The block cache in ComfyUI: the same passes skipped as outside of it, and what keeps it off.

Needs COMFYUI_PATH, the folder of a ComfyUI checkout, and runs in that ComfyUI's environment.
"""

# ruff: noqa: E402  (ComfyUI can be imported only after import_comfyui)

import logging
from types import SimpleNamespace

import pytest
import torch
from chroma_nodes.chroma.caching import BlockCache, CacheSettings
from chroma_nodes.chroma.errors import CheckpointError, SamplingError
from chroma_nodes.chroma.nag import NAG, NAGSettings
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.samplers import SAMPLERS
from comfy_inprocess import import_comfyui, write_small_files
from oracles import SMALL, random_transformer
from torch import nn

import_comfyui()

import comfy.model_management
import comfy.sample
import comfy.samplers
from chroma_nodes.nodes.caching import ChromaBlockCache
from chroma_nodes.nodes.host_caching import RUN, CachePatch, CacheRun
from chroma_nodes.nodes.host_model import build_model
from chroma_nodes.nodes.host_nag import OVERRIDE
from chroma_nodes.nodes.host_transformer import HostTransformer
from chroma_nodes.nodes.nag import ChromaNAG
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from test_comfy_host import close, native_patcher

SIGMAS = torch.linspace(1, 0, 13)
STEPS = len(SIGMAS) - 1
DEFAULT = {i.id: i.default for i in ChromaBlockCache.define_schema().inputs[1:]}
SOME = {**DEFAULT, "threshold": 1.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain():
    return random_transformer()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    files = write_small_files(tmp_path_factory.mktemp("models"))
    return build_model(files["diffusion_models"], torch.float32)


@pytest.fixture(autouse=True)
def listen(caplog):
    caplog.set_level(logging.INFO, "chroma")


@pytest.fixture
def rows(own):
    """The batch sizes that went through the last block."""
    seen = []
    layer = own.model.diffusion_model.single_blocks[2].linear2
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def told(caplog):
    """What the block cache has logged since the last call."""
    lines = [r.getMessage() for r in caplog.records if "Block Cache" in r.getMessage()]
    caplog.clear()
    return lines


def counted(cache):
    return [f"Chroma Block Cache: {cache}"]


def text(prompt):
    tokens, seed = prompt
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, SMALL.context_dim, generator=g)


def conditioning(*prompts, **extra):
    return [[text(prompt), {"pooled_output": None, **extra}] for prompt in prompts]


def noise(batch=2, h=8, w=12):
    return torch.randn(batch, 16, h, w, generator=torch.Generator().manual_seed(2))


def cached(model, **changes):
    return ChromaBlockCache.execute(model, **{**SOME, **changes}).result[0]


def run(model, positive, negative, cfg=4.0, start=None, sampler="euler", callback=None):
    start = noise() if start is None else start
    out = comfy.sample.sample_custom(
        model, start, cfg, comfy.samplers.KSAMPLER(SAMPLERS[sampler]), SIGMAS, positive, negative,
        torch.zeros_like(start), callback=callback, disable_pbar=True,
    )  # fmt: skip
    return model.model.process_latent_in(out)


@torch.no_grad()
def ours(model, positives, negative, settings, cfg=4.0, nag=None, sampler="euler", sigmas=SIGMAS):
    """The run outside of ComfyUI, one prompt at a time, and its cache; prompts are averaged."""
    cache = BlockCache(settings)

    def velocity(x, sigma, prompt, **kw):
        context, cached = text(prompt).repeat(len(x), 1, 1), cache.rows([prompt], sigma)
        return model(x, sigma, context, cached=cached, **kw)

    def denoise(x, sigma, **_):
        v = torch.stack([velocity(x, sigma, p, nag=nag) for p in positives]).mean(0)
        if cfg != 1:
            u = velocity(x, sigma, negative)
            v = u + cfg * (v - u)
        return x - sigma.view(-1, 1, 1, 1) * v

    out = sample_latent(
        denoise, SAMPLERS[sampler], sigmas, noise(), torch.zeros_like(noise()),
        disable_progress=True,
    )  # fmt: skip
    return out, cache


COND, SAME, SHORT = (7, 3), (7, 5), (4, 6)


@pytest.mark.parametrize("adopted", (False, True))
@pytest.mark.parametrize("negative", (SAME, SHORT), ids=("batched", "apart"))
@pytest.mark.parametrize("sampler", ("euler", "heun"))
def test_the_same_passes_are_skipped_as_outside(own, plain, caplog, adopted, negative, sampler):
    model = cached(native_patcher() if adopted else own)
    theirs = run(model, conditioning(COND), conditioning(negative), sampler=sampler)
    wanted, cache = ours(plain, [COND], negative, CacheSettings(1.0), sampler=sampler)
    assert told(caplog) == counted(cache)
    assert 0.2 < cache.skipped / cache.passes < 0.8
    close(theirs, wanted, 1e-3)
    without, _ = ours(plain, [COND], negative, CacheSettings(), sampler=sampler)
    assert (without - wanted).abs().max() > 0.05 * wanted.std()


@torch.no_grad()
def test_one_prompt_of_a_batch_can_be_skipped_alone(own, rows):
    """The first prompt's latents move, the second's do not."""
    transformer, texts = own.model.diffusion_model, [text(p).repeat(2, 1, 1) for p in (COND, SAME)]
    together, apart = ({RUN: CacheRun(BlockCache(CacheSettings(0.1)), None)} for _ in range(2))

    def forward(latents, context, sides, options):
        options = {**options, "cond_or_uncond": sides, "uuids": [f"id {side}" for side in sides]}
        sigma = torch.full((len(latents),), 0.6)
        return transformer(latents, sigma, context, transformer_options=options)

    for k in range(4):
        latents = noise().roll(k, dims=-1), noise()
        wanted = [forward(latents[i], texts[i], [i], apart) for i in (1, 0)]
        rows.clear()
        both = forward(torch.cat(latents), torch.cat(texts), [0, 1], together)
        assert rows == [4 if k == 0 else 2]
        close(both, torch.cat(wanted[::-1]))


def test_ksampler_custom_sampling_and_a_second_run_agree(own, caplog):
    model, texts = cached(own), (conditioning(COND), conditioning(SAME))
    first = run(model, *texts)
    lines = told(caplog)
    assert len(lines) == 1
    assert torch.equal(run(model, *texts), first) and told(caplog) == lines
    guider = comfy.samplers.CFGGuider(model.clone())
    guider.set_conds(*texts)
    guider.set_cfg(4.0)
    sampler, latent = comfy.samplers.KSAMPLER(SAMPLERS["euler"]), torch.zeros_like(noise())
    advanced = guider.sample(noise(), latent, sampler, SIGMAS, disable_pbar=True)
    assert torch.equal(model.model.process_latent_in(advanced), first)
    assert told(caplog) == lines
    direct = comfy.sample.sample(
        model, noise(), STEPS, 4.0, "euler", "simple", *texts, latent, sigmas=SIGMAS,
        disable_pbar=True,
    )  # fmt: skip
    close(model.model.process_latent_in(direct), first, 1e-3)
    assert told(caplog) == lines


def test_an_interrupted_run_leaves_nothing_behind(own, caplog):
    runs, texts = [], (conditioning(COND), conditioning(SAME))

    def watch(executor, *args, **kwargs):
        runs.append(args[5][RUN])
        return executor(*args, **kwargs)

    def interrupt(step, *_):
        if step == 4:
            assert runs[-1].cache._prompts
            raise InterruptProcessingException

    model = cached(own)
    whole = run(model, *texts)
    told(caplog)
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, watch)
    with pytest.raises(InterruptProcessingException):
        run(model, *texts, callback=interrupt)
    assert not runs[-1].cache._prompts and told(caplog) == []
    assert RUN not in model.model_options["transformer_options"]
    count = len(runs)
    assert torch.equal(run(model, *texts), whole)
    assert runs[count] is runs[-1] is not runs[0]
    assert not runs[-1].cache._prompts


def test_threshold_zero_is_no_cache_at_all(own, caplog):
    texts = conditioning(COND), conditioning(SAME)
    without = run(own, *texts)
    off = cached(cached(own), threshold=0.0)
    assert torch.equal(run(off, *texts), without) and told(caplog) == []
    native = native_patcher()
    left = cached(native, threshold=0.0).get_model_object("diffusion_model")
    assert left is native.model.diffusion_model and not isinstance(left, HostTransformer)


def test_the_last_node_counts_and_the_input_stays_as_it_is(own, plain, caplog):
    texts = conditioning(COND), conditioning(SAME)
    first = cached(own)
    second = cached(first, threshold=1e9, max_skips=2)
    run(second, *texts)
    _, cache = ours(plain, [COND], SAME, CacheSettings(1e9, max_skips=2))
    assert told(caplog) == counted(cache) and cache.skipped * 3 == cache.passes * 2
    run(own, *texts)
    assert told(caplog) == []
    run(first, *texts)
    assert told(caplog) == counted(ours(plain, [COND], SAME, CacheSettings(1.0))[1])


def test_several_prompts_have_states_of_their_own(own, plain, caplog):
    positives = (COND, (7, 8), SHORT)
    theirs = run(cached(own), conditioning(*positives), conditioning(SAME))
    wanted, cache = ours(plain, positives, SAME, CacheSettings(1.0))
    assert told(caplog) == counted(cache) and cache.skipped > 0
    close(theirs, wanted, 1e-3)


def test_areas_of_the_picture_have_states_of_their_own(own, caplog, monkeypatch, rows):
    """ComfyUI runs both sides of an area under one id, at once or one by one."""
    positive = conditioning(COND) + conditioning((7, 8), area=(8, 6, 0, 6))
    together = run(cached(own), positive, conditioning(SAME))
    lines = told(caplog)
    assert f"of {8 * STEPS} passes" in lines[0] and ": 0 of" not in lines[0]
    assert max(rows) == 4
    monkeypatch.setattr(own.model, "memory_required", lambda *_, **__: 1e18)
    rows.clear()
    apart = run(cached(own), positive, conditioning(SAME))
    assert told(caplog) == lines and max(rows) == 2
    close(together, apart, 1e-3)


def test_attention_of_other_nodes_takes_part_with_all_rows(own, plain, caplog, rows):
    def override(function, q, *args, **kwargs):
        seen.append(len(q))
        return function(q, *args, **kwargs)

    model, seen = cached(own), []
    model.model_options["transformer_options"][OVERRIDE] = override
    theirs = run(model, conditioning(COND), conditioning(SHORT))
    wanted, cache = ours(plain, [COND], SHORT, CacheSettings(1.0))
    assert told(caplog) == counted(cache) and len(seen) > 0
    close(theirs, wanted, 1e-3)
    rows.clear()
    run(model, conditioning(COND), conditioning(SAME))
    assert set(rows) == {4} and len(rows) < STEPS


def test_nag_is_cached_too(own, plain, caplog):
    options = {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "sigma_end": 0.0}
    model = ChromaNAG.execute(cached(own), conditioning(SHORT), **options).result[0]
    theirs = run(model, conditioning(COND), conditioning(SAME), cfg=1.0)
    nag = NAG(NAGSettings(**options), text(SHORT), SHORT[:1])
    wanted, _ = ours(plain, [COND], SAME, CacheSettings(1.0), cfg=1.0, nag=nag)
    (line,) = told(caplog)
    assert "passes ended after the first block" in line and ": 0 of" not in line
    close(theirs, wanted, 1e-3)


# What keeps it off


def through(args, extra):
    return extra["original_block"](args)


def test_a_replaced_block_keeps_it_off(own, caplog):
    texts = conditioning(COND), conditioning(SAME)
    model = cached(own)
    model.set_model_patch_replace(through, "dit", "single_block", 1)
    assert torch.equal(run(model, *texts), run(own, *texts))
    assert told(caplog) == ["Chroma Block Cache is off where another node replaces blocks"]


def add_first(n):
    return {"input": [torch.ones(2, 24, SMALL.hidden)] * n}


def attend(function, *args, **kwargs):
    return function(*args, **kwargs)


@pytest.mark.parametrize(
    ("control", "options", "why"),
    [
        ({"output": [torch.ones(2, 24, SMALL.hidden)]}, {}, "ControlNet acts"),
        (None, {"patches_replace": {"dit": {("double_block", 1): through}}}, "replaces blocks"),
        (None, {"patches": {"attn1_output_patch": [lambda x, _: 2 * x]}}, "patches the attention"),
        (None, {"patches": {"attn1_patch": [print]}}, "patches the attention"),
        (None, {OVERRIDE: attend}, "replaces the attention in some passes"),
        (None, {"uuids": None}, "does not tell prompts apart"),
    ],
)
@torch.no_grad()
def test_passes_with_patches_neither_use_nor_change_what_is_stored(
    own, caplog, control, options, why
):
    transformer, sigma = own.model.diffusion_model, torch.full((2,), 0.6)
    context = text(COND).repeat(2, 1, 1)
    cache_run = CacheRun(BlockCache(CacheSettings(1e9)), None)
    cached = {RUN: cache_run, "uuids": ["a"], "cond_or_uncond": [0]}

    def forward(x, control=None, **options):
        return transformer(x, sigma, context, control=control, transformer_options=options)

    forward(noise(), **cached)
    second = forward(noise() * 0.9, **cached)
    assert (cache_run.cache.passes, cache_run.cache.skipped) == (4, 2)
    for _ in range(2):
        with_patch = forward(noise() * 0.5, control, **{**cached, **options})
        assert torch.equal(with_patch, forward(noise() * 0.5, control, **options))
    assert (cache_run.cache.passes, cache_run.cache.skipped) == (4, 2)
    assert torch.equal(forward(noise() * 0.9, **cached), second)
    (line,) = told(caplog)
    assert line.startswith("Chroma Block Cache is off where ") and line.endswith(why)


def test_weights_by_prompt_keep_it_off(caplog):
    def executor(*args):
        return args

    conds = {"positive": [{"hooks": object()}], "negative": [{}]}
    executor.class_obj = SimpleNamespace(conds=conds, model_options={})
    assert CachePatch(CacheSettings(0.1)).start_run(executor, 1, 2) == (1, 2)
    assert executor.class_obj.model_options == {}
    assert told(caplog) == ["Chroma Block Cache is off: prompts bring weights of their own (hooks)"]


def test_a_run_past_our_blocks_says_so(own, caplog):
    def elsewhere(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    model = cached(own)
    model.add_wrapper(WrappersMP.DIFFUSION_MODEL, elsewhere)
    run(model, conditioning(COND), conditioning(SAME))
    assert told(caplog) == [
        "Chroma Block Cache is off: torch.compile or another node runs all blocks"
    ]


def test_other_models_and_unusable_values_are_refused(own):
    other = ModelPatcher(nn.Module(), CPU, CPU)
    other.model.diffusion_model = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"this MODEL is Linear.*expected Chroma") as caught:
        cached(other)
    assert "\n" not in str(caught.value)
    with pytest.raises(SamplingError, match="sigma_start"):
        cached(own, sigma_start=0.1, sigma_end=0.5)
