"""The commands for LoRA files: `chroma-nodes lora info | convert | merge | extract | resize`."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ..config import ChromaConfig
from ..devices import parse_device
from ..errors import LoraError
from .arguments import parse_lora
from .tools.base import open_base
from .tools.concatenate import concatenate_loras
from .tools.convert import convert_lora
from .tools.extract import extract_lora
from .tools.info import lora_info
from .tools.merge import BASE, TARGETS, merge_into_checkpoint
from .tools.resize import resize_lora
from .tools.rules import RankRule
from .tools.save import DTYPES
from .tools.spell import COMFYUI, STYLES

_Progress = Callable[[int, int, str], None]


def add_lora_commands(commands: argparse._SubParsersAction) -> None:
    """Define `lora` and what is below it."""
    lora = commands.add_parser("lora", help="tools for LoRA files")
    tools = lora.add_subparsers(dest="tool", required=True)
    _add_info(tools)
    _add_convert(tools)
    _add_merge(tools)
    _add_extract(tools)
    _add_resize(tools)


def _add_info(tools: argparse._SubParsersAction) -> None:
    info = tools.add_parser("info", help="what a LoRA file is and what it changes")
    info.add_argument("files", type=Path, nargs="+", metavar="FILE")
    info.add_argument("--json", action="store_true", help="everything, for programs")
    _add_model(info)
    info.set_defaults(function=show_info)


def _add_convert(tools: argparse._SubParsersAction) -> None:
    convert = tools.add_parser("convert", help="spell a LoRA as another program has it")
    convert.add_argument("source", type=Path, metavar="IN")
    convert.add_argument("--to", required=True, choices=STYLES)
    _add_out(convert)
    _add_model(convert)
    convert.set_defaults(function=convert_file)


def _add_merge(tools: argparse._SubParsersAction) -> None:
    merge = tools.add_parser("merge", help="LoRAs into a checkpoint, or into one LoRA")
    merge.add_argument("--base", type=Path, metavar="FILE", help="checkpoint; without, one LoRA")
    merge.add_argument("--lora", action="append", required=True, metavar="FILE[:STRENGTH]",
                       help="may be given several times")  # fmt: skip
    merge.add_argument("--to", choices=(*TARGETS, *STYLES),
                       help="checkpoint: the base's own format (default) or bf16; "
                       "LoRA: its spelling, else the first one's")  # fmt: skip
    _add_out(merge)
    _add_rank(merge, "of one LoRA, the largest rank of its modules; without, the sum is exact")
    _add_dtype(merge, None)
    _add_model(merge)
    _add_running(merge)
    merge.set_defaults(function=merge_files)


def _add_extract(tools: argparse._SubParsersAction) -> None:
    extract = tools.add_parser("extract", help="the difference of two checkpoints as a LoRA")
    extract.add_argument("original", type=Path, metavar="ORIGINAL")
    extract.add_argument("tuned", type=Path, metavar="TUNED")
    extract.add_argument("--rank", type=int, help="the largest rank of its modules")
    extract.add_argument("--energy", type=float,
                         help="part of the squared difference to keep, such as 0.9")  # fmt: skip
    extract.add_argument("--clamp-quantile", type=float, default=1.0, metavar="Q",
                         help="clamp factors to this quantile (sd-scripts: 0.99)")  # fmt: skip
    extract.add_argument("--to", choices=STYLES, default=COMFYUI, help="its spelling")
    _add_out(extract)
    _add_dtype(extract, "fp16")
    _add_running(extract)
    extract.set_defaults(function=extract_file)


def _add_resize(tools: argparse._SubParsersAction) -> None:
    resize = tools.add_parser("resize", help="a LoRA of other ranks")
    resize.add_argument("source", type=Path, metavar="IN")
    _add_rank(resize, "the largest rank of its modules")
    resize.add_argument("--to", choices=STYLES, help="its spelling, else as it is")
    _add_out(resize)
    _add_dtype(resize, None)
    _add_model(resize)
    _add_running(resize)
    resize.set_defaults(function=resize_file)


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE",
                        help="the transformer it is for, if not of Chroma1's size")  # fmt: skip


def _add_rank(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--rank", type=int, help=text)
    parser.add_argument("--sv-ratio", type=float, metavar="R",
                        help="keep singular values above the largest divided by this")  # fmt: skip
    parser.add_argument("--sv-fro", type=float, metavar="P", help="part of the norm to keep")
    parser.add_argument("--sv-cumulative", type=float, metavar="P",
                        help="part of the singular values' sum to keep")  # fmt: skip


def _add_dtype(parser: argparse.ArgumentParser, default: str | None) -> None:
    other = default or "as it is, or fp32 where that would round"
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default=default, help=f"of the tensors ({other})"
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="what computes (cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def show_info(args: argparse.Namespace) -> list[str]:
    """Lines, or one JSON text, about each file. Raises LoraError."""
    found = [lora_info(path, _config(args)) for path in args.files]
    if args.json:
        return [json.dumps([asdict(one) for one in found], indent=2)]
    return [line for one in found for line in one.lines()]


def convert_file(args: argparse.Namespace) -> list[str]:
    """Write the file in another spelling. Raises LoraError."""
    return convert_lora(args.source, args.to, args.out, _config(args)).lines()


def merge_files(args: argparse.Namespace) -> list[str]:
    """Write a checkpoint with the LoRAs in it, or one LoRA. Raises a ChromaError."""
    loras = [(one.path, one.strength) for one in map(parse_lora, args.lora)]
    rule = _rule(args)
    with _bar(args, "" if args.base else "module") as progress:
        if args.base is None:
            if args.to in TARGETS:
                raise LoraError(f"--to {args.to} is for a checkpoint; give it with --base")
            return concatenate_loras(
                loras, args.out, rule, style=args.to, dtype=DTYPES.get(args.dtype),
                config=_config(args), device=parse_device(args.device), progress=progress,
            ).lines()  # fmt: skip
        if args.to in STYLES or rule.bounded or args.dtype is not None:
            raise LoraError(
                "--rank, --sv-*, --dtype and spellings are for LoRAs; with --base expected --to "
                f"{' or '.join(TARGETS)}"
            )
        return merge_into_checkpoint(
            args.base, loras, args.out, args.to or BASE, progress,
            device=parse_device(args.device), config=_config(args),
        ).lines()  # fmt: skip


def extract_file(args: argparse.Namespace) -> list[str]:
    """Write the difference of two checkpoints. Raises a ChromaError."""
    rule = RankRule(rank=args.rank, energy=args.energy)
    with _bar(args, "tensor") as progress:
        return extract_lora(
            args.original, args.tuned, args.out, rule, clamp_quantile=args.clamp_quantile,
            style=args.to, dtype=DTYPES[args.dtype], device=parse_device(args.device),
            progress=progress,
        ).lines()  # fmt: skip


def resize_file(args: argparse.Namespace) -> list[str]:
    """Write the LoRA with other ranks. Raises a ChromaError."""
    with _bar(args, "module") as progress:
        return resize_lora(
            args.source, args.out, _rule(args), style=args.to, dtype=DTYPES.get(args.dtype),
            config=_config(args), device=parse_device(args.device), progress=progress,
        ).lines()  # fmt: skip


def _rule(args: argparse.Namespace) -> RankRule:
    return RankRule(args.rank, args.sv_ratio, args.sv_fro, args.sv_cumulative)


def _config(args: argparse.Namespace) -> ChromaConfig | None:
    """The sizes of the model that --model names; None: Chroma1's. Raises a ChromaError."""
    if args.model is None:
        return None
    config = open_base(args.model).config
    if not isinstance(config, ChromaConfig):
        raise LoraError(f"--model {args.model.name} is a text encoder, expected a transformer")
    return config


@contextmanager
def _bar(args: argparse.Namespace, unit: str) -> Iterator[_Progress]:
    with tqdm(total=1, unit=unit, unit_scale=unit == "", disable=args.quiet) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name[-40:], refresh=False)
            bar.update(done - bar.n)

        yield progress
