"""The T5 encoder against transformers' T5EncoderModel on small random models."""

import dataclasses

import pytest
import torch
from chroma_nodes.chroma.errors import CheckpointError
from chroma_nodes.chroma.text.t5 import MAX_TOKENS, PadRule, T5Config, T5Encoder, position_buckets

transformers = pytest.importorskip("transformers")
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

PAD, EOS = 0, 1
# heads * d_kv differs from d_model: 3 * 8 = 24 beside 16.
CONFIG = T5Config(vocab_size=50, d_model=16, heads=3, d_kv=8, d_ff=40, layers=3)


def hf_model(config=CONFIG, seed=0):
    """A random transformers encoder in fp32, wide enough in its weights to tell rules apart."""
    torch.manual_seed(seed)
    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        num_heads=config.heads,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = transformers.T5EncoderModel(settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in name:
                weight.normal_(0, 2)
            elif "shared" not in name:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model.requires_grad_(False)


def weights_of(model):
    return {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}


def ours(model, **kw):
    state = weights_of(model)
    encoder = T5Encoder(T5Config.from_state_dict(state), **kw)
    encoder.load_state_dict(state, strict=True)
    return encoder.requires_grad_(False)


def prompt(n, seed=0):
    """n tokens, the last one the end token, (1, n)."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(2, CONFIG.vocab_size, (1, n), generator=generator)
    row[0, -1] = EOS
    return row


def padded(tokens, length):
    return torch.nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=PAD)


def flow_oracle(model, tokens):
    """Hidden states of the trainer: 512 tokens, an outer-product mask added to the position bias.

    Everything a pad query sees is shifted by the same huge number, in which fp32 loses the scores
    and the position bias: it attends all 512 keys alike. Built from transformers' own modules.
    """
    n = tokens.shape[1]
    keep = torch.zeros(1, MAX_TOKENS)
    keep[:, :n] = 1
    outer = keep[:, None, :, None] * keep[:, None, None, :]
    mask = (1 - outer) * torch.finfo(torch.float32).min
    encoder = model.encoder
    attention: T5Attention = encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(MAX_TOKENS, MAX_TOKENS) + mask
    x = model.shared(padded(tokens, MAX_TOKENS))
    for block in encoder.block:
        layer = block.layer[0]
        a = layer.SelfAttention
        h = layer.layer_norm(x)
        q, k, v = (
            f(h).view(1, MAX_TOKENS, a.n_heads, a.key_value_proj_dim).transpose(1, 2)
            for f in (a.q, a.k, a.v)
        )
        probabilities = (q @ k.transpose(2, 3) + bias).softmax(-1)
        x = x + a.o((probabilities @ v).transpose(1, 2).reshape(1, MAX_TOKENS, -1))
        x = block.layer[1](x)
    return encoder.final_layer_norm(x)


def expected(model, tokens, rule):
    """What transformers' model says under one pad rule, cut to the tokens the rule keeps."""
    n = tokens.shape[1]
    if rule is PadRule.COMFY_NOPAD:
        return model(tokens).last_hidden_state
    if rule is PadRule.COMFY_PAD1:
        return model(padded(tokens, n + 1)).last_hidden_state
    if rule is PadRule.REFERENCE:
        return flow_oracle(model, tokens)[:, : n + 1]
    full = padded(tokens, MAX_TOKENS)
    mask = torch.ones_like(full)
    if rule is PadRule.HF:
        mask[:, n:] = 0
    return model(full, attention_mask=mask).last_hidden_state[:, : n + 1]


def run(encoder, tokens, rule):
    """One unbatched prompt through our encoder."""
    n = tokens.shape[1]
    length = {PadRule.COMFY_NOPAD: n, PadRule.UNMASKED512: MAX_TOKENS}.get(rule, n + 1)
    kept = n if rule is PadRule.COMFY_NOPAD else n + 1
    return encoder(padded(tokens, length), torch.tensor([n]), rule)[:, :kept]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, d_model=32, heads=4, d_kv=4, layers=2),
        dataclasses.replace(CONFIG, buckets=32, heads=2, d_kv=8, layers=1),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_equals_transformers(config, length):
    model = hf_model(config)
    tokens = prompt(length)
    torch.testing.assert_close(
        ours(model)(tokens), model(tokens).last_hidden_state, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("rule", PadRule)
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_pad_rule(rule, n):
    model = hf_model(seed=n)
    tokens = prompt(n, seed=n)
    torch.testing.assert_close(
        run(ours(model), tokens, rule), expected(model, tokens, rule), atol=2e-5, rtol=0
    )


def test_pad_rules_differ():
    encoder = ours(hf_model())
    pads = {rule: run(encoder, prompt(5), rule)[0, -1] for rule in PadRule}
    del pads[PadRule.COMFY_NOPAD]
    values = list(pads.values())
    for i, first in enumerate(values):
        for second in values[i + 1 :]:
            assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize("rule", PadRule)
def test_batch_of_unequal_lengths_equals_single_runs(rule):
    encoder = ours(hf_model())
    prompts = [prompt(n, seed=n) for n in (3, 1, 20, 11)]
    longest = MAX_TOKENS if rule is PadRule.UNMASKED512 else 21
    batch = encoder(
        torch.cat([padded(row, longest) for row in prompts]), torch.tensor([3, 1, 20, 11]), rule
    )
    for row, tokens in zip(batch, prompts, strict=True):
        single = run(encoder, tokens, rule)[0]
        torch.testing.assert_close(row[: len(single)], single, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", PadRule)
def test_full_length_prompt_has_no_pad(rule):
    model = hf_model()
    tokens = prompt(MAX_TOKENS)
    out = ours(model)(tokens, torch.tensor([MAX_TOKENS]), rule)
    torch.testing.assert_close(out, model(tokens).last_hidden_state, atol=1e-5, rtol=0)


def test_buckets_equal_transformers():
    index = torch.arange(400)
    theirs = T5Attention._relative_position_bucket(index[None, :] - index[:, None], True, 32, 128)
    assert torch.equal(position_buckets(400, 32, 128), theirs)


def test_every_weight_gets_the_gradient_of_transformers():
    model = hf_model()
    encoder = ours(model).requires_grad_(True)
    model.requires_grad_(True)
    tokens = prompt(9)
    target = torch.randn(1, 9, CONFIG.d_model)
    (encoder(tokens) * target).sum().backward()
    (model(tokens).last_hidden_state * target).sum().backward()
    theirs = dict(model.named_parameters())
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-3, rtol=1e-3, msg=name)


def test_pad_row_is_differentiable():
    encoder = ours(hf_model()).requires_grad_(True)
    encoder(padded(prompt(4), 7), torch.tensor([4]), PadRule.REFERENCE)[0, 4].sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype):
    model = hf_model()
    tokens = prompt(12)
    out = ours(model).to(dtype)(tokens)
    assert out.dtype == torch.float32
    exact = ours(model).to(dtype).float()(tokens)
    similarity = torch.nn.functional.cosine_similarity(out, exact, dim=-1)
    assert similarity.min() > (0.999 if dtype == torch.float16 else 0.98)


def test_fp16_survives_activations_beyond_its_range():
    model = hf_model()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(4e4)
    tokens = prompt(12)
    last = model.encoder.block[-1].layer[1].DenseReluDense
    seen = []
    last.register_forward_hook(lambda _module, _inputs, out: seen.append(out.abs().max()))
    exact = model(tokens).last_hidden_state
    assert seen[0] > 65504
    out = ours(model).half()(tokens)
    similarity = torch.nn.functional.cosine_similarity(out, exact, dim=-1)
    assert similarity.min() > 0.99


def test_operations_build_every_weighted_layer():
    class Operations:
        built = 0

        class Linear(torch.nn.Linear):
            def __init__(self, *args, **kw):
                super().__init__(*args, **kw)
                Operations.built += 1

        class Embedding(torch.nn.Embedding):
            def __init__(self, *args, **kw):
                super().__init__(*args, **kw)
                Operations.built += 1

    T5Encoder(CONFIG, Operations, device="meta", dtype=torch.bfloat16)
    assert Operations.built == 2 + 7 * CONFIG.layers


def test_compiles_without_graph_breaks():
    encoder = ours(hf_model())
    tokens, lengths = padded(prompt(6), 9), torch.tensor([6])
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, lengths), encoder(tokens, lengths))


def test_config_of_t5_xxl():
    shapes = {
        "shared.weight": (32128, 4096),
        "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (10240, 4096),
        "encoder.block.1.layer.0.SelfAttention.q.weight": (4096, 4096),
    }
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = T5Config.from_state_dict(state)
    assert config == T5Config(32128, 4096, 64, 64, 10240, 2, 32, 128)


def test_missing_tensor_is_named():
    state = weights_of(hf_model())
    key = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    del state[key]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        T5Config.from_state_dict(state)


def test_heads_that_do_not_divide_are_refused():
    state = weights_of(hf_model())
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    state[key] = state[key][:-1]
    with pytest.raises(CheckpointError, match="multiple of its 3 heads"):
        T5Config.from_state_dict(state)
