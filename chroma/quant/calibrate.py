"""What a model's layers are fed while it runs: the calibration of learned rounding."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ChromaError
from ..pipeline import Pipeline, Settings, generate
from ..tiny.files import SIZE

# Inputs of a layer that are kept: 63 MB of the widest of Chroma1's, where H would be 944 MB.
ROWS = 2048
_STEPS = 6
SMALL_PROMPTS = (
    "",
    "a tiger",
    "an emoji of a tree on a blue background",
    "a flat emoji of a cat on a red background",
    "a 3d emoji of a pizza on a white background",
    "a flat emoji of a rocket on a black background, small, top left",
    "a 3d emoji of a smiling face on a pink background",
    "a drawn emoji of a car on a yellow background, large",
)

# Takes a layer's name and its inputs, (n, K) fp32 on the layer's device.
Receive = Callable[[str, Tensor], None]


def collect(model: nn.Module, run: Callable[[], None], names: Iterable[str]) -> dict[str, Tensor]:
    """H = X^T X / n of the named linear layers over all their inputs in `run()`, (K, K) fp32, CPU.

    That is 4 K^2 bytes a layer; `sample` needs less for wide ones. Raises ChromaError for a name
    that the model lacks, and for a layer that `run` does not use.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def receive(name: str, x: Tensor) -> None:
        product = x.T @ x
        if name in sums:
            sums[name] += product
        else:
            sums[name] = product
        counts[name] = counts.get(name, 0) + len(x)

    names = list(names)
    with _watching(model, names, receive):
        run()
    _check_used(names, sums)
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}


def sample(
    model: nn.Module,
    run: Callable[[], None],
    names: Iterable[str],
    *,
    rows: int = ROWS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A random choice of the named linear layers' inputs in `run()`, (up to rows, K) bf16, CPU.

    Every input has the same chance. Raises ChromaError as `collect` does.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def receive(name: str, x: Tensor) -> None:
        # The inputs with the largest random numbers stay, whenever they came.
        keys = torch.rand(len(x), generator=generator)
        before = kept.get(name, (keys[:0], torch.empty(0, x.shape[1], dtype=torch.bfloat16)))
        keys, index = torch.cat([before[0], keys]).sort(descending=True, stable=True)
        index = index[:rows]
        new = index >= len(before[0])
        chosen = torch.empty(len(index), x.shape[1], dtype=torch.bfloat16)
        chosen[~new] = before[1][index[~new]]
        chosen[new] = x[(index[new] - len(before[0])).to(x.device)].to("cpu", torch.bfloat16)
        kept[name] = keys[:rows], chosen

    names = list(names)
    with _watching(model, names, receive):
        run()
    _check_used(names, kept)
    return {name: chosen for name, (_, chosen) in kept.items()}


@contextmanager
def _watching(model: nn.Module, names: Iterable[str], receive: Receive) -> Iterator[None]:
    modules = dict(model.named_modules())
    hooks = []

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            receive(name, x.reshape(-1, x.shape[-1]).float())

        return before

    try:
        for name in names:
            if name not in modules:
                raise ChromaError(f"the model has no layer {name}; check the names to calibrate")
            hooks.append(modules[name].register_forward_pre_hook(watch(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_used(names: Iterable[str], found: Iterable[str]) -> None:
    if missing := sorted(set(names) - set(found)):
        raise ChromaError(f"{missing[0]} was never used while calibrating; let the run use it")


def small_model(*, text_encoder: bool = False) -> dict[str, Tensor]:
    """H of every linear layer of the included model's transformer, or of its text encoder.

    From a few of its own pictures; takes about half a minute on a CPU.
    """
    pipeline = Pipeline.load(dtype=torch.float32, device=torch.device("cpu"))
    model = pipeline.text_encoder.model if text_encoder else pipeline.transformer
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def run() -> None:
        if text_encoder:
            pipeline.text_encoder.encode(SMALL_PROMPTS)
            return
        settings = Settings(width=SIZE, height=SIZE, steps=_STEPS, cfg=1.0)
        generate(pipeline, SMALL_PROMPTS, settings=settings, disable_progress=True)

    return collect(model, run, names)
