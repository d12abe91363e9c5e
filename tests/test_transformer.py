"""The transformer against diffusers' ChromaTransformer2DModel and against its own invariants."""

import pytest
import torch
from chroma_nodes.chroma.config import ChromaConfig
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.latents import pack, unpack
from oracles import SMALL, diffusers_transformer, diffusers_velocity, random_transformer


@pytest.fixture(scope="module")
def model():
    return random_transformer()


@pytest.fixture(scope="module")
def theirs(model):
    return diffusers_transformer(model)


def inputs(batch: int, h: int, w: int, text: int, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 16, h, w, generator=g)
    sigma = torch.rand(batch, generator=g)
    return latent, sigma, torch.randn(batch, text, SMALL.context_dim, generator=g)


@pytest.mark.parametrize(
    ("lengths", "h", "w"),
    [([9], 8, 8), ([9, 9, 9], 6, 10), ([2, 9, 5], 8, 4), ([1, 9, 3], 12, 6)],
)
@torch.no_grad()
def test_velocity_equals_diffusers(model, theirs, lengths, h, w):
    latent, sigma, context = inputs(len(lengths), h, w, 9)
    lengths = torch.tensor(lengths)
    expected = diffusers_velocity(theirs, latent, sigma, context, lengths)
    assert expected.std() >= 1
    assert (model(latent, sigma, context, lengths) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(("h", "w"), [(7, 8), (8, 5), (7, 9)])
@torch.no_grad()
def test_odd_latents_equal_diffusers_on_the_wrapped_latent(model, theirs, h, w):
    latent, sigma, context = inputs(2, h, w, 6)
    even = torch.cat([latent, latent[:, :, : h % 2]], dim=2)
    even = torch.cat([even, even[..., : w % 2]], dim=3)
    expected = diffusers_velocity(theirs, even, sigma, context, torch.tensor([6, 6]))
    ours = model(latent, sigma, context)
    assert ours.shape == latent.shape
    assert (ours - expected[..., :h, :w]).abs().max() <= 1e-4


@torch.no_grad()
def test_hidden_text_changes_nothing(model):
    latent, sigma, context = inputs(2, 8, 8, 9)
    lengths = torch.tensor([4, 9])
    batch = model(latent, sigma, context, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = model(latent[i : i + 1], sigma[i : i + 1], context[i : i + 1, :n])
        assert (batch[i : i + 1] - alone).abs().max() <= 1e-4


@torch.no_grad()
def test_approximator_runs_one_row_per_distinct_sigma(model):
    rows = []
    handle = model.distilled_guidance_layer.register_forward_hook(
        lambda _, args, out: rows.append(tuple(out.shape))
    )
    latent, _, context = inputs(4, 4, 4, 5)
    model(latent, torch.full((4,), 0.7), context)
    model(latent, torch.tensor([0.1, 0.2, 0.3, 0.4]), context)
    handle.remove()
    assert [shape[0] for shape in rows] == [1, 4]
    assert rows[0][1] == 3 * 3 + 2 * 6 * 2 + 2


@torch.no_grad()
def test_a_shared_table_gives_the_same_velocity(model):
    latent, _, context = inputs(2, 8, 8, 5)
    sigma = torch.full((2,), 0.3)
    table = model.modulation_table(sigma[:1], None, latent.dtype)
    assert torch.equal(model(latent, sigma, context, table=table), model(latent, sigma, context))


@torch.no_grad()
def test_bf16_keeps_the_embedding_of_sigma_exact():
    """Two sigmas that bf16 cannot tell apart must still give different velocities."""
    model = random_transformer(dtype=torch.bfloat16)
    latent, _, context = (x.bfloat16() for x in inputs(1, 4, 4, 5))
    near = [model(latent, torch.tensor([s]), context) for s in (0.9961, 0.9970)]
    assert torch.tensor([0.9961]).bfloat16() == torch.tensor([0.9970]).bfloat16()
    assert not torch.equal(*near)


def test_gradients_reach_every_weight(model):
    latent, sigma, context = inputs(2, 4, 4, 5)
    model.zero_grad()
    model(latent, sigma, context, torch.tensor([2, 5])).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The final text MLP feeds nothing: text is dropped after the single blocks only.
    assert missing == []


def test_pack_is_channel_major_and_invertible():
    from einops import rearrange

    latent = torch.randn(2, 16, 6, 8)
    expected = rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    assert torch.equal(pack(latent), expected)
    assert torch.equal(unpack(pack(latent), 6, 8), latent)


def test_config_is_read_from_shapes():
    config = ChromaConfig(
        context_dim=24, hidden=96, heads=3, mlp_hidden=200, double_depth=1, single_depth=4,
        approximator_in=32, approximator_hidden=40, approximator_depth=3,
    )  # fmt: skip
    state = random_transformer(config).state_dict()
    assert ChromaConfig.from_state_dict(state) == config
    state["single_blocks.1000000000.linear1.weight"] = torch.ones(1, 1)
    assert ChromaConfig.from_state_dict(state) == config
    del state["txt_in.weight"]
    with pytest.raises(CheckpointError, match=r"txt_in\.weight"):
        ChromaConfig.from_state_dict(state)


def test_the_defaults_are_chroma1():
    """Parameter count of the published model (model card: 8.9B)."""
    from chroma_nodes.chroma.transformer import ChromaTransformer

    with torch.device("meta"):
        model = ChromaTransformer(ChromaConfig())
    assert sum(p.numel() for p in model.parameters()) == 8_899_983_424
    assert model.config.modulations == 344
    assert model.config.rope_axes == (16, 56, 56)
