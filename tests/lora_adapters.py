"""One random adapter of every kind, for a weight of N = 48 rows and K = 32 columns."""

import torch
from chroma_nodes.chroma.lora import adapters as kinds

N, K = 48, 32
SHAPE = (N, K)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=generator(seed))


def base(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return random(*shape, seed=seed, scale=shape[1] ** -0.5)


def low_rank(r=4, seed=1, n=N, k=K, **options):
    down, up = random(r, k, seed=seed, scale=0.1), random(n, r, seed=seed + 1, scale=0.2)
    return kinds.LowRank(down, up, **options)


def loha(r=2, seed=1, n=N, alpha=1.0):
    a = [random(n, r, seed=seed + i, scale=0.4) for i in (0, 1)]
    b = [random(r, K, seed=seed + i, scale=0.4) for i in (2, 3)]
    return kinds.LoHa(a[0], b[0], a[1], b[1], alpha)


def lokr(seed=1, n=N, whole=(True, True), alpha=3.0):
    factors = []
    for i, (rows, columns) in enumerate(((n // 8, 4), (8, K // 4))):
        if whole[i]:
            factors.append(random(rows, columns, seed=seed + i, scale=0.3))
        else:
            a, b = random(rows, 2, seed=seed + i), random(2, columns, seed=seed + 7 + i)
            factors.append((0.5 * a, 0.5 * b))
    return kinds.LoKr(*factors, alpha)


def glora(r=3, seed=1, n=N, alpha=2.0):
    a1, a2 = random(K, r, seed=seed, scale=0.2), random(r, K, seed=seed + 1, scale=0.2)
    b1, b2 = random(n, r, seed=seed + 2, scale=0.2), random(r, K, seed=seed + 3, scale=0.2)
    return kinds.GLoRA(a1, a2, b1, b2, alpha)


def dora(per_row, inner=None, seed=1, n=N):
    magnitude = random(n if per_row else K, seed=seed + 5).abs() + 0.5
    return kinds.DoRA(inner or low_rank(seed=seed, n=n), magnitude, per_row)


def oft(seed=1, n=N, rescaled=False, constraint=None):
    rescale = 1 + random(n, 1, seed=seed + 1, scale=0.1) if rescaled else None
    return kinds.OFT(random(n // 8, 8, 8, seed=seed, scale=0.2), rescale, constraint)


def boft(seed=1, n=N, rescaled=False, constraint=None):
    rescale = 1 + random(n, 1, seed=seed + 1, scale=0.1) if rescaled else None
    return kinds.BOFT(random(3, n // 4, 4, 4, seed=seed, scale=0.2), rescale, constraint)


def oftv2(seed=1, blocks=4, size=8, **options):
    vectors = random(blocks, size * (size - 1) // 2, seed=seed, scale=0.05)
    return kinds.OFTv2(vectors, **options)


# Of a weight with n rows.
MAKERS = {
    "lora": lambda n: low_rank(n=n, alpha=2.0),
    "rslora": lambda n: low_rank(n=n, alpha=2.0, rank_stabilised=True),
    "lora with mid": lambda n: low_rank(n=n, mid=random(4, 4, seed=9)),
    "loha": lambda n: loha(n=n),
    "loha of high rank": lambda n: loha(r=6, n=n),
    "lokr": lambda n: lokr(n=n),
    "lokr in factors": lambda n: lokr(n=n, whole=(True, False)),
    "glora": lambda n: glora(n=n),
    "dora of rows": lambda n: dora(True, n=n),
    "dora of columns": lambda n: dora(False, n=n),
    "dora of a loha": lambda n: dora(True, loha(n=n), n=n),
    "dora of a lokr, columns": lambda n: dora(False, lokr(n=n), n=n),
    "dora of a glora": lambda n: dora(True, glora(n=n), n=n),
    "oft": lambda n: oft(n=n, rescaled=True),
    "boft": lambda n: boft(n=n, rescaled=True),
    "oftv2": lambda n: oftv2(),
    "oftv2, one block for all": lambda n: oftv2(blocks=1),
    "diff": lambda n: kinds.Diff(random(n, K, seed=3, scale=0.1)),
    "set": lambda n: kinds.SetWeight(random(n, K, seed=4, scale=0.1)),
    "ia3 of rows": lambda n: kinds.IA3(random(n, seed=5, scale=0.2), on_input=False),
    "ia3 of columns": lambda n: kinds.IA3(random(K, seed=6, scale=0.2), on_input=True),
}
