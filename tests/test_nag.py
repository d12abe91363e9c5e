"""Normalized Attention Guidance against a naive doubled batch, and its effect on pictures."""

import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from chroma_nodes.chroma.config import THETA
from chroma_nodes.chroma.errors import SamplingError
from chroma_nodes.chroma.nag import NAG, NAGSettings, combine
from chroma_nodes.chroma.noise import make_noise
from chroma_nodes.chroma.pipeline import Pipeline, decode
from chroma_nodes.chroma.sampling import sample_latent
from chroma_nodes.chroma.text.encoder import TextEmbedding
from chroma_nodes.chroma.tiny.dataset import COLOURS
from chroma_nodes.chroma.workflow import nodes_nag
from chroma_nodes.chroma.workflow.values import Model
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.schedulers import get_sigmas
from einops import rearrange
from oracles import SMALL, random_transformer
from torch.nn import functional as F

STRONG = NAGSettings(scale=6.0, tau=1.3, alpha=0.6)


@pytest.fixture(scope="module")
def model():
    return random_transformer()


def case(batch=2, h=8, w=6, tokens=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 16, h, w, generator=g)
    context = torch.randn(batch, tokens, SMALL.context_dim, generator=g)
    return latent, torch.full((batch,), 0.6), context


def negative(settings, lengths=(5,), seed=9):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(lengths), max(lengths), SMALL.context_dim, generator=g)
    return NAG(settings, hidden, tuple(lengths))


# The oracle: two whole sequences, [positive, image] and [negative, image], in float64


class Naive:
    """Every row of both sequences computed in every block, for one picture without padding."""

    def __init__(self, model, settings):
        self.w = {name: value.double() for name, value in model.state_dict().items()}
        self.config, self.settings = model.config, settings

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def rms(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.scale"]

    def norm(self, x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def heads(self, norm, qkv):
        q, k, v = rearrange(qkv, "n (three h d) -> three h n d", three=3, h=self.config.heads)
        return self.rms(f"{norm}.query_norm", q), self.rms(f"{norm}.key_norm", k), v

    def attention(self, q, k, v):
        q, k = self.turn(q), self.turn(k)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        return rearrange(weights @ v, "h n d -> n (h d)")

    def turn(self, x):
        """Rotary positions as complex products, (H, T + L, D); text does not turn."""
        angle = F.pad(self.angle, (0, 0, x.shape[1] - len(self.angle), 0))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def guide(self, plus, minus):
        s = self.settings
        away = s.scale * plus - (s.scale - 1) * minus
        ratio = away.abs().sum(-1, keepdim=True) / plus.abs().sum(-1, keepdim=True)
        return s.alpha * away * ratio.clamp_max(s.tau) / ratio + (1 - s.alpha) * plus

    def __call__(self, latent, vectors, texts):
        """Velocity of latent (16, h, w) under texts (positive, negative), each (T, C)."""
        c, h, w = self.config, *latent.shape[1:]
        rows = torch.arange(h // 2).repeat_interleave(w // 2)
        columns = torch.arange(w // 2).repeat(h // 2)
        self.angle = torch.cat([
            position[:, None] * THETA ** -(torch.arange(0, d, 2).double() / d)
            for position, d in zip((rows * 0, rows, columns), c.rope_axes, strict=True)
        ], dim=1)  # fmt: skip
        img = self.linear("img_in", rearrange(latent, "c (h p) (w q) -> (h w) (c p q)", p=2, q=2))
        txt = [self.linear("txt_in", text) for text in texts]
        single, image, text = vectors[:-2].split(
            [3 * c.single_depth, 6 * c.double_depth, 6 * c.double_depth]
        )
        for i in range(c.double_depth):
            img, txt = self.double(f"double_blocks.{i}", img, txt, image[6 * i :], text[6 * i :])
        for i in range(c.single_depth):
            img, txt = self.single(f"single_blocks.{i}", img, txt, single[3 * i :])
        out = self.linear("final_layer.linear", self.norm(img, *vectors[-2:]))
        return rearrange(out, "(h w) (c p q) -> c (h p) (w q)", h=h // 2, p=2, q=2)

    def double(self, name, img, txt, im, tm):
        parts = self.heads(
            f"{name}.img_attn.norm", self.linear(f"{name}.img_attn.qkv", self.norm(img, *im[:2]))
        )
        outs = []
        for t in txt:
            own = self.heads(
                f"{name}.txt_attn.norm", self.linear(f"{name}.txt_attn.qkv", self.norm(t, *tm[:2]))
            )
            both = [torch.cat(pair, dim=1) for pair in zip(own, parts, strict=True)]
            outs.append(self.attention(*both))
        guided = self.guide(*(out[len(t) :] for out, t in zip(outs, txt, strict=True)))
        texts = [
            self.after(name, "txt", t, out[: len(t)], tm)
            for out, t in zip(outs, txt, strict=True)
        ]  # fmt: skip
        return self.after(name, "img", img, guided, im), texts

    def after(self, name, side, x, out, mod):
        x = x + mod[2] * self.linear(f"{name}.{side}_attn.proj", out)
        inner = self.linear(f"{name}.{side}_mlp.0", self.norm(x, *mod[3:5]))
        return x + mod[5] * self.linear(f"{name}.{side}_mlp.2", F.gelu(inner, approximate="tanh"))

    def single(self, name, img, txt, mod):
        outs, mlps = [], []
        for t in txt:
            x = torch.cat([t, img])
            fused = self.linear(f"{name}.linear1", self.norm(x, *mod[:2]))
            outs.append(
                self.attention(*self.heads(f"{name}.norm", fused[:, : 3 * self.config.hidden]))
            )
            mlps.append(F.gelu(fused[:, 3 * self.config.hidden :], approximate="tanh"))
        guided = self.guide(*(out[len(t) :] for out, t in zip(outs, txt, strict=True)))
        done = []
        for t, out, mlp in zip(txt, outs, mlps, strict=True):
            both = torch.cat([torch.cat([out[: len(t)], guided]), mlp], dim=1)
            done.append(torch.cat([t, img]) + mod[2] * self.linear(f"{name}.linear2", both))
        images = [x[len(t) :] for x, t in zip(done, txt, strict=True)]
        assert torch.allclose(*images, atol=1e-10)
        return images[0], [x[: len(t)] for x, t in zip(done, txt, strict=True)]


def naive(model, settings, latent, sigma, context, lengths, nag):
    """The oracle's velocity for a batch, each picture alone and without padding."""
    vectors = model.modulation_table(sigma, None, torch.float32).vectors.double()
    negatives = [nag.hidden[i, :n].double() for i, n in enumerate(nag.lengths)]
    runs = [
        Naive(model, settings)(
            latent[i].double(), vectors[i],
            [context[i, : lengths[i]].double(), negatives[i % len(negatives)]],
        )
        for i in range(len(latent))
    ]  # fmt: skip
    return torch.stack(runs)


def close(actual, wanted, tolerance=1e-5):
    error = (actual - wanted).abs().max() / wanted.std()
    assert error <= tolerance, float(error)


@pytest.mark.parametrize(
    ("lengths", "negatives"),
    [((7,), (7,)), ((7,), (3,)), ((2, 7), (5,)), ((7, 7), (5, 2)), ((4, 7, 1, 7), (6, 2, 6, 1))],
)
@torch.no_grad()
def test_equals_the_doubled_batch(model, lengths, negatives):
    latent, sigma, context = case(len(lengths))
    nag = negative(STRONG, negatives)
    wanted = naive(model, STRONG, latent, sigma, context, lengths, nag)
    ours = model(latent, sigma, context, torch.tensor(lengths), nag=nag)
    close(ours, wanted)
    plain = model(latent, sigma, context, torch.tensor(lengths))
    assert (ours - plain).abs().max() > 0.05 * plain.std()


@torch.no_grad()
def test_the_oracle_without_guidance_is_the_plain_pass(model):
    latent, sigma, context = case(1)
    nag = negative(NAGSettings())
    wanted = naive(model, NAGSettings(scale=1.0), latent, sigma, context, (7,), nag)
    close(model(latent, sigma, context), wanted)


@pytest.mark.parametrize(
    "settings",
    [NAGSettings(scale=1.0), NAGSettings(alpha=0.0), NAGSettings(sigma_end=0.61)],
)
@torch.no_grad()
def test_neutral_values_are_the_plain_pass_to_the_bit(model, settings):
    tokens = []
    handle = model.txt_in.register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
    latent, sigma, context = case()
    guided = model(latent, sigma, context, nag=negative(settings))
    handle.remove()
    assert torch.equal(guided, model(latent, sigma, context))
    assert tokens == [7]


@torch.no_grad()
def test_the_same_text_on_both_sides_changes_nothing(model):
    latent, sigma, context = case(1)
    nag = NAG(NAGSettings(scale=9.0, alpha=1.0), context, (7,))
    close(model(latent, sigma, context, nag=nag), model(latent, sigma, context))


@torch.no_grad()
def test_sigma_end_counts_for_each_row(model):
    latent, _, context = case()
    sigma = torch.tensor([0.8, 0.2])
    nag, off = negative(NAGSettings(sigma_end=0.8)), negative(NAGSettings(sigma_end=0.9))
    ours = model(latent, sigma, context, nag=nag)
    always = model(latent, sigma, context, nag=negative(NAGSettings()))
    plain = model(latent, sigma, context, nag=off)
    close(ours[:1], always[:1])
    close(ours[1:], plain[1:])
    assert (always - plain).abs().amax((1, 2, 3)).min() > 0.05 * plain.std()


@torch.no_grad()
def test_the_image_passes_each_layer_once(model):
    latent, sigma, context = case(1)
    seen = {}

    def count(name):
        def hook(_, args, out):
            seen[name] = tuple(out.shape[:2])

        return hook

    names = ("img_in", "double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.0",
             "double_blocks.0.txt_attn.qkv", "single_blocks.2.linear1")  # fmt: skip
    handles = [model.get_submodule(n).register_forward_hook(count(n)) for n in names]
    model(latent, sigma, context, nag=negative(NAGSettings()))
    for handle in handles:
        handle.remove()
    image, text = 12, 7 + 5
    assert seen == dict(
        zip(names, [(1, image)] * 3 + [(1, text), (1, text + image)], strict=True)
    )  # fmt: skip


# The formula


def test_tau_limits_the_length_of_every_token():
    g = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(2, 3, 50, 64, generator=g, dtype=torch.float64)
    minus[:, ::2] = plus[:, ::2] + 0.01 * minus[:, ::2]
    length = plus.abs().sum(-1)
    for tau in (1.0, 1.7, 4.0):
        out = combine(plus, minus, NAGSettings(scale=8.0, tau=tau, alpha=1.0))
        free = combine(plus, minus, NAGSettings(scale=8.0, tau=10.0, alpha=1.0))
        grown = out.abs().sum(-1) / length
        assert grown.max() <= tau * (1 + 1e-12)
        torch.testing.assert_close(grown[:, 1::2], torch.full_like(grown[:, 1::2], tau))
        kept = free.abs().sum(-1) <= tau * length
        torch.testing.assert_close(out[kept], free[kept])
    assert kept.any()


def test_alpha_blends_and_the_scale_counts_from_one():
    plus, minus = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, 2.5]]])
    out = combine(plus, minus, NAGSettings(scale=3.0, tau=10.0, alpha=0.5))
    torch.testing.assert_close(out, torch.tensor([[[1.5, 1.5]]]))


def test_zeros_and_half_precision_stay_finite():
    zero = torch.zeros(1, 2, 8)
    assert torch.equal(combine(zero, zero, NAGSettings()), zero)
    assert torch.isfinite(combine(zero, zero + 1, NAGSettings())).all()
    big = torch.full((1, 1, 3072), 30.0, dtype=torch.float16)
    out = combine(big, -big, NAGSettings(alpha=1.0))
    torch.testing.assert_close(out, big * 2.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": math.nan}, "NAG's scale nan"),
        ({"scale": -1.0}, r"scale -1\.0 is not usable; expected a number from 0 to 50"),
        ({"tau": 0.9}, r"tau 0\.9 is not usable; expected a number from 1 to 10"),
        ({"alpha": 1.1}, r"alpha 1\.1"),
        ({"sigma_end": 2.0}, r"sigma_end 2\.0"),
    ],
)
def test_unusable_settings(options, says):
    with pytest.raises(SamplingError, match=says):
        NAGSettings(**options)


@torch.no_grad()
def test_prompts_that_do_not_fit(model):
    latent, sigma, context = case(3)
    with pytest.raises(SamplingError, match="2 negative prompts do not fit a batch of 3"):
        model(latent, sigma, context, nag=negative(NAGSettings(), (4, 4)))
    narrow = NAG(NAGSettings(), torch.randn(1, 4, 40), (4,))
    with pytest.raises(SamplingError, match="vectors of 40, the positive one of 48"):
        model(latent, sigma, context, nag=narrow)


# Its place in a workflow, and its effect


def test_the_workflow_node_hands_over_the_prompt():
    @dataclass(frozen=True)
    class GuidedModel(Model):
        nag: NAG | None = None

    (node,) = nodes_nag.NODES
    negative = TextEmbedding(torch.randn(2, 5, SMALL.context_dim), torch.tensor([5, 3]))
    values = {spec.name: spec.default for spec in node.inputs if spec.is_widget}
    before = GuidedModel(random_transformer(), shift=2.0)
    (after,) = node.run(None, model=before, negative=negative, **{**values, "tau": 1.5})
    assert before.nag is None and after.shift == 2.0
    assert after.nag.settings == NAGSettings(tau=1.5) and after.nag.lengths == (5, 3)
    assert torch.equal(after.nag.hidden, negative.hidden)


PROMPT = "an emoji of a cat"


@pytest.fixture(scope="module")
def pictures():
    """How to paint with the small model at cfg 1: (noise, negative or None) -> pictures."""
    cpu = torch.device("cpu")
    pipeline = Pipeline.load(device=cpu, dtype=torch.float32)
    cond = pipeline.text_encoder.encode([PROMPT]).hidden

    @torch.no_grad()
    def paint(noise, words=None):
        nag = None
        if words is not None:
            text = pipeline.text_encoder.encode([words])
            nag = NAG(NAGSettings(), text.hidden, tuple(text.lengths.tolist()))

        def denoise(x, sigma, **_):
            context = cond.expand(len(x), -1, -1)
            return x - sigma.view(-1, 1, 1, 1) * pipeline.transformer(x, sigma, context, nag=nag)

        latent = sample_latent(
            denoise, SAMPLERS["euler"], get_sigmas("simple", 5, shift=1.0), noise,
            torch.zeros_like(noise), disable_progress=True,
        )  # fmt: skip
        return decode(pipeline.autoencoder, latent)

    return paint


def distance(pictures, colour):
    """Largest channel difference of each picture's top and bottom edge from a colour, 0 to 1."""
    edges = torch.cat([pictures[:, :6], pictures[:, -6:]], dim=1).mean(dim=(1, 2))
    return (edges - torch.tensor(colour) / 255).abs().amax(-1)


def test_a_background_in_the_negative_prompt_goes_away(pictures):
    red, noise = COLOURS["red"], make_noise((32, 16, 16, 16), 3)
    noise = noise[distance(pictures(noise), red) < 0.15]
    assert len(noise) >= 5
    without = distance(pictures(noise, f"{PROMPT} on a red background"), red)
    other = distance(pictures(noise, f"{PROMPT} on a blue background"), red)
    assert statistics.median(without.tolist()) > 0.3
    assert statistics.median(other.tolist()) < 0.15
