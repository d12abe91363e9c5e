"""`chroma-nodes generate`: from prompts to pictures."""

import argparse
from pathlib import Path
from typing import Any

from ..samplers.options import OPTIONS as SAMPLER_OPTIONS
from ..schedulers.options import OPTIONS as SCHEDULE_OPTIONS
from .caching import CacheSettings
from .cli_run import new_context, run_context
from .errors import CheckpointError, ImageError, PromptError, SamplingError
from .guidance.cli import add_guidance_arguments, guidance_from
from .image import load_image
from .lora.arguments import add_lora_arguments, loras_from
from .nag import NAGSettings
from .option import Options
from .pipeline import Settings
from .presets import BASE
from .quant.products import EIGHT_BIT
from .tiny import files as small
from .workflow import REGISTRY
from .workflow.insert_loras import insert_loras, lora_files
from .workflow.nodes_chroma import DTYPES
from .workflow.single import Extras, text_to_image

# Of an image to image run; one with a mask starts from pure noise.
IMAGE_DENOISE = 0.6
CACHE_OFF = CacheSettings()
NAG_ON = NAGSettings()
# More samplers take these than have options of their own.
SHARED_ADVICE = {
    "eta": "Noise that each step adds anew: 0 none, 1 in full. Only for samplers that can.",
    "s_noise": "Factor on the noise that steps add.",
}


def add_generate_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Define `generate`; returns its parser."""
    generate = commands.add_parser("generate", help="prompts to pictures")
    generate.add_argument("prompt", nargs="?")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line instead")
    generate.add_argument("--negative", default="", metavar="TEXT")
    generate.add_argument("--width", type=int, help="pixels, in 16s (1024; small model 128)")
    generate.add_argument("--height", type=int, help="pixels, in 16s (1024; small model 128)")
    generate.add_argument("--steps", type=int, default=BASE.steps)
    generate.add_argument("--cfg", type=float, default=BASE.cfg)
    generate.add_argument("--seed", type=int, default=0, help="of the first picture")
    generate.add_argument(
        "--count", type=int, default=1, help="pictures of each prompt; the seed counts up"
    )
    generate.add_argument(
        "--batch", type=int, default=1, help="pictures at a time; each is as its seed gives it"
    )
    generate.add_argument("--sampler", default=BASE.sampler)
    generate.add_argument("--scheduler", default=BASE.scheduler)
    _add_files(generate)
    add_lora_arguments(generate)
    _add_picture(generate)
    _add_shift(generate)
    _add_options(generate.add_argument_group("options of samplers"), SAMPLER_OPTIONS)
    _add_options(generate.add_argument_group("options of schedules"), SCHEDULE_OPTIONS)
    add_guidance_arguments(generate)
    _add_nag(generate)
    _add_cache(generate)
    generate.set_defaults(function=generate_pictures)
    return generate


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="FILE", help="else the small model")
    parser.add_argument("--text-encoder", type=Path, metavar="FILE", help="else the small one")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of T5")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="else the small one")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES, *EIGHT_BIT),
        help="of weights; int8 and fp8 also multiply the transformer's blocks in 8 bits",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("chroma.png"), metavar="FILE.png",
        help="several pictures are FILE_00001_.png and so on",
    )  # fmt: skip


def _add_picture(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image to image, inpainting")
    group.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    group.add_argument(
        "--denoise", type=float, metavar="SHARE",
        help=f"how much of the picture is new: 0 to 1 ({IMAGE_DENOISE}; with a mask 1)",
    )  # fmt: skip
    group.add_argument("--mask", type=Path, metavar="FILE", help="white where it may change")
    group.add_argument(
        "--mask-channel", default="red", choices=("alpha", "red", "green", "blue"),
        help="of the mask; alpha takes what is transparent for white",
    )  # fmt: skip


def _add_shift(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shift and sigmas")
    group.add_argument(
        "--shift-mode", default="constant", choices=("constant", "resolution"),
        help="resolution: grows with the picture, as in Flux",
    )  # fmt: skip
    group.add_argument("--shift", type=float, default=BASE.shift, help="constant only")
    group.add_argument("--base-shift", type=float, default=Extras.base_shift, metavar="MU")
    group.add_argument("--max-shift", type=float, default=Extras.max_shift, metavar="MU")
    group.add_argument("--compat", action="store_true", help="sigmas rounded as in ComfyUI")


def _add_options(group: argparse._ArgumentGroup, tables: Options) -> None:
    """One flag for each option, which several of the tables may have; a value or None."""
    for name in _names(tables):
        having = {k: o for k, options in tables.items() for o in options if o.name == name}
        lines = [f"{owner}: {o.advice} ({o.default:g})" for owner, o in having.items()]
        kind = type(next(iter(having.values())).default)
        group.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X",
            help=SHARED_ADVICE.get(name, " ".join(lines)),
        )  # fmt: skip


def _add_nag(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("NAG, the negative prompt inside the attention, for --cfg 1")
    group.add_argument("--nag-scale", type=float, metavar="X", help="5 is usual; else it is off")
    for name in ("tau", "alpha", "sigma-end"):
        default = getattr(NAG_ON, name.replace("-", "_"))
        group.add_argument(f"--nag-{name}", type=float, metavar="X", help=f"({default:g})")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("block cache, which skips passes that change little")
    group.add_argument(
        "--cache-threshold", type=float, metavar="X", help="0.1 is usual; else it is off"
    )
    group.add_argument("--cache-sigma-start", type=float, metavar="SIGMA", help="from there (1)")
    group.add_argument("--cache-sigma-end", type=float, metavar="SIGMA", help="to there (0)")
    group.add_argument("--cache-max-skips", type=int, metavar="N", help="in a row; 0 no limit (0)")


def generate_pictures(args: argparse.Namespace) -> list[str]:
    """Build the graph of the run and execute it; what `run_context` tells."""
    if args.out.suffix.lower() != ".png":
        raise ImageError(f"--out {args.out}: expected a name ending in .png")
    if (args.text_encoder is None) != (args.vae is None):
        raise CheckpointError(
            "expected --text-encoder and --vae together: the small model's do not fit other files"
        )
    prompts = _prompts(args)
    files = _files(args)
    names = {folder: name for folder, name in files}
    prompt = text_to_image(
        prompts, args.negative, _settings(args),
        {
            "model": names.get("diffusion_models", small.LABEL),
            "text_encoder": names.get("text_encoders", small.LABEL),
            "vae": names.get("vae", small.LABEL),
        },
        args.dtype, _extras(args, len(prompts)),
    )  # fmt: skip
    _check_files(args)
    loras = loras_from(args)
    prompt = insert_loras(prompt, loras, REGISTRY)
    context = new_context(args, prompt, Path(), Path(), args.out.parent)
    if len(prompts) * args.count == 1:
        context.out_file = args.out
    context.files = files | lora_files(loras)
    if args.tokenizer is not None:
        context.files["text_encoders", "tokenizer.json"] = args.tokenizer
    return run_context(context)


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt is None) == (args.prompts is None):
        raise PromptError("expected a prompt, or a file of them with --prompts")
    if args.prompt is not None:
        return [args.prompt]
    try:
        lines = args.prompts.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--prompts {args.prompts} cannot be read as text ({error})") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise PromptError(f"--prompts {args.prompts} holds no prompt; expected one a line")
    return prompts


def _check_files(args: argparse.Namespace) -> None:
    for flag in ("model", "text_encoder", "tokenizer", "vae", "image", "mask"):
        path = getattr(args, flag)
        picture = flag in ("image", "mask")
        if path is not None and not path.is_file() and (picture or not path.is_dir()):
            error = ImageError if picture else CheckpointError
            raise error(f"--{flag.replace('_', '-')}: there is no file {path}; give its whole path")


def _files(args: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """The files given, by the folder and the name that the graph has for them."""
    given = {
        "diffusion_models": args.model, "text_encoders": args.text_encoder, "vae": args.vae,
        "input": args.image,
    }  # fmt: skip
    files = {(folder, path.name): path for folder, path in given.items() if path is not None}
    if args.mask is not None:
        files["input", _mask_name(args)] = args.mask
    return files


def _mask_name(args: argparse.Namespace) -> str:
    shared = args.image is not None and args.image.name == args.mask.name
    return f"mask-{args.mask.name}" if shared and args.image != args.mask else args.mask.name


def _settings(args: argparse.Namespace) -> Settings:
    side = small.SIZE if args.model is None else 1024
    width, height = args.width, args.height
    denoise = 1.0
    if args.image is not None:
        if (width, height) != (None, None):
            raise ImageError(
                f"--width and --height are those of --image {args.image}; leave them out"
            )
        height, width = load_image(args.image)[0].shape[1:3]
        denoise = IMAGE_DENOISE if args.mask is None else 1.0
    return Settings(
        width=side if width is None else width, height=side if height is None else height,
        steps=args.steps, cfg=args.cfg, seed=args.seed,
        sampler=args.sampler, scheduler=args.scheduler, shift=args.shift,
        denoise=denoise if args.denoise is None else args.denoise,
        schedule_options=_given(args, SCHEDULE_OPTIONS),
    )  # fmt: skip


def _extras(args: argparse.Namespace, prompts: int) -> Extras:
    return Extras(
        guidance_from(args), _nag(args), _cache(args), _given(args, SAMPLER_OPTIONS),
        args.shift_mode, args.base_shift, args.max_shift, args.compat,
        None if args.image is None else args.image.name,
        None if args.mask is None else _mask_name(args),
        args.mask_channel, args.count, args.batch,
        "Chroma" if prompts * args.count == 1 else args.out.stem,
    )  # fmt: skip


def _names(tables: Options) -> list[str]:
    return list(dict.fromkeys(option.name for options in tables.values() for option in options))


def _given(args: argparse.Namespace, tables: Options) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in _names(tables)}
    return {name: value for name, value in values.items() if value is not None}


def _nag(args: argparse.Namespace) -> NAGSettings | None:
    given = _group(args, "nag", "scale", ("tau", "alpha", "sigma_end"))
    return NAGSettings(**given) if given else None


def _cache(args: argparse.Namespace) -> CacheSettings | None:
    given = _group(args, "cache", "threshold", ("sigma_start", "sigma_end", "max_skips"))
    return CacheSettings(**given) if given else None


def _group(
    args: argparse.Namespace, group: str, main: str, others: tuple[str, ...]
) -> dict[str, Any]:
    """What is given of a group of flags. Raises SamplingError if its main one is missing."""
    values = {name: getattr(args, f"{group}_{name}") for name in (main, *others)}
    given = {name: value for name, value in values.items() if value is not None}
    if given and main not in given:
        name = next(iter(given)).replace("_", "-")
        raise SamplingError(f"--{group}-{name} needs --{group}-{main}, which turns it on")
    return given
