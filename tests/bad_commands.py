"""Bad command lines, and how each must end: one line on stderr, and exit status 2."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from bad_case import Case
from bad_files import HUGE, entry, gguf, pair, safetensors, tensor, written
from bad_workflows import small_graph
from chroma_nodes.chroma.cli import main
from chroma_nodes.chroma.tiny import files as small
from safetensors.torch import save_file


class CommandError(Exception):
    """The command told an error of the pack's own in one line."""


class UsageError(Exception):
    """The command line itself was refused, with a short usage."""


def command(*arguments: object) -> object:
    """Run one command in this process; raises how it ended unless that was well."""
    told = io.StringIO()
    try:
        with redirect_stderr(told), redirect_stdout(io.StringIO()):
            status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        assert exit_.code == 2, exit_.code
        *usage, last = told.getvalue().splitlines()
        assert usage[0].startswith("usage: chroma-nodes"), told.getvalue()
        raise UsageError(last) from None
    if status == 0:
        return None
    assert status == 2, status
    *warnings, last = told.getvalue().splitlines()
    assert last.startswith("error: "), told.getvalue()
    assert all(line.startswith("WARNING: ") for line in warnings), warnings
    raise CommandError(last)


def cli(name: str, says: str, arguments: Callable[[Path], list], error: str = "CommandError"):
    return Case(name, error, says, lambda folder: command(*arguments(folder)))


def _named(arguments: tuple[object, ...]) -> str:
    """The arguments as a case's name, which must not depend on where the pack lies."""
    return " ".join(map(str, arguments)).replace(str(small.FOLDER), "tiny")


def usage(says: str, *arguments: object) -> Case:
    return cli(_named(arguments)[:60] or "nothing", says, lambda _: [*arguments],
               "UsageError")  # fmt: skip


def _draw(says: str, *flags: object) -> Case:
    """`generate` with these flags, at the small model's smallest size."""
    return cli(
        f"generate {_named(flags)[:50]!a}", says,
        lambda folder: ["generate", "a cat", "--out", folder / "x.png", "--quiet", "--device",
                        "cpu", "--width", 64, "--height", 64, "--steps", 1, *flags],
    )  # fmt: skip


def _bad_model(folder: Path) -> Path:
    huge = safetensors({"a": entry(shape=[HUGE], offsets=[0, 4 * HUGE])})
    return written(folder, "bad.safetensors", huge)


def _bad_gguf(folder: Path) -> Path:
    return written(folder, "bad.gguf", gguf([tensor(dims=[HUGE])]))


def _bad_lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file(pair("diffusion_model.blocks.0.self_attn.q"), path)
    return path


def _workflow(folder: Path, content: object) -> Path:
    return written(folder, "bad.json", json.dumps(content).encode())


def _nan_calibration(folder: Path) -> Path:
    path = folder / "inputs.safetensors"
    save_file({"x": torch.tensor([torch.nan])}, path)
    return path


_QUIET = ("--quiet",)
COMMANDS = (
    usage("required"),
    usage("invalid choice", "explode"),
    usage("unrecognized", "generate", "x", "--explode"),
    usage("invalid", "generate", "x", "--steps", "many"),
    usage("invalid", "generate", "x", "--cfg", "high"),
    usage("invalid", "generate", "x", "--steps", "9x" * 9),
    usage("expected one argument", "generate", "x", "--seed"),
    usage("invalid choice", "generate", "x", "--dtype", "int1"),
    usage("expected 2 arguments", "generate", "x", "--cfg-interval", 1),
    usage("required", "run"),
    usage("required", "inspect"),
    usage("invalid choice", "quantize", "x", "--to", "q1", "--out", "y"),
    usage("required", "quantize", "x", "--to", "q8_0"),
    usage("required", "lora"),
    usage("required", "lora", "merge", "--out", "y"),
    cli("generate without a prompt", "expected a prompt", lambda f: ["generate", *_QUIET]),
    cli("generate with two kinds of prompts", "expected a prompt",
        lambda f: ["generate", "x", "--prompts", f / "p.txt", *_QUIET]),
    cli("prompts: missing", "cannot be read",
        lambda f: ["generate", "--prompts", f / "p.txt", *_QUIET]),
    cli("prompts: no text", "cannot be read",
        lambda f: ["generate", "--prompts", written(f, "p", b"\xff\xfe\x00"), *_QUIET]),
    cli("prompts: empty", "holds no prompt",
        lambda f: ["generate", "--prompts", written(f, "p", b"\n\n"), *_QUIET]),
    cli("prompts: a folder", "cannot be read", lambda f: ["generate", "--prompts", f, *_QUIET]),
    _draw("half of a Unicode", "--negative", "\ud800"),
    _draw("ending in .png", "--out", "x.exe"),
    _draw("cannot write", "--out", "/dev/null/x.png"),
    _draw("", "--width", 0),
    _draw("", "--width", -64),
    _draw("", "--width", 10**12),
    _draw("", "--steps", 0),
    _draw("", "--steps", 10**12),
    _draw("", "--cfg", "nan"),
    _draw("", "--cfg", "inf"),
    _draw("", "--seed", -1),
    _draw("", "--seed", 2**64),
    _draw("", "--count", 0),
    _draw("", "--count", 10**9),
    _draw("", "--batch", 0),
    _draw("", "--shift", 0),
    _draw("", "--shift", "nan"),
    _draw("", "--sampler", "x"),
    _draw("", "--scheduler", "x"),
    _draw("", "--denoise", 0.5, "--mask", "/nowhere.png"),
    _draw("has no", "--sampler", "euler", "--order", 3),
    _draw("which turns it on", "--nag-alpha", 1),
    _draw("which turns it on", "--cache-max-skips", 1),
    _draw("cannot be used", "--device", "tpu:99"),
    _draw("cannot be used", "--device", "\n"),
    _draw("there is no file /nowhere/x.safe", "--model", "/nowhere/x.safetensors"),
    _draw("together", "--vae", small.VAE),
    _draw("there is no such file", "--lora", "/nowhere/x.safetensors"),
    _draw("is not a file", "--lora", "/nowhere/x.safetensors:0.5"),
    _draw("the strength is nan", "--lora", f"{small.VAE}:nan"),
    _draw("not a LoRA", "--lora", str(small.VAE)),
    cli("generate: a model of 10^12 elements", "the file has", lambda f: [
        "generate", "x", "--model", _bad_model(f), "--out", f / "x.png", *_QUIET]),
    cli("generate: a GGUF model of 10^12 elements", "is incomplete", lambda f: [
        "generate", "x", "--model", _bad_gguf(f), "--out", f / "x.png", *_QUIET]),
    cli("generate: a picture that is none", "cannot be read", lambda f: [
        "generate", "x", "--image", written(f, "i.png", b"x"), "--out", f / "x.png", *_QUIET]),
    cli("generate: a picture and a size", "leave them out", lambda f: [
        "generate", "x", "--image", f / "i.png", "--width", 64, "--out", f / "x.png", *_QUIET]),
    cli("generate: a LoRA of Wan", "Wan", lambda f: [
        "generate", "x", "--lora", _bad_lora(f), "--out", f / "x.png", *_QUIET]),
    cli("generate: --tokenizer that is none", "tokenizer", lambda f: [
        "generate", "x", "--text-encoder", small.TEXT_ENCODER, "--vae", small.VAE,
        "--tokenizer", written(f, "t.json", b"{"), "--out", f / "x.png", *_QUIET]),
    cli("run: missing", "does not exist", lambda f: ["run", f / "x.json", *_QUIET]),
    cli("run: no JSON", "is not a JSON file",
        lambda f: ["run", written(f, "x.json", b"{"), *_QUIET]),
    cli("run: a model file", "is not a JSON file", lambda f: ["run", small.VAE, *_QUIET]),
    cli("run: the interface's format", "Export (API)",
        lambda f: ["run", _workflow(f, {"nodes": [], "links": []}), *_QUIET]),
    cli("run: unknown node", "unknown node",
        lambda f: ["run", _workflow(f, {"1": {"class_type": "Evil"}}), *_QUIET]),
    cli("run: --set nothing", "expected node.input=value",
        lambda f: ["run", _workflow(f, small_graph()), "--set", "", *_QUIET]),
    cli("run: --set an unknown node", "there is no node",
        lambda f: ["run", _workflow(f, small_graph()), "--set", "zz.steps=1", *_QUIET]),
    cli("run: --set a name that leads out", "leads out", lambda f: [
        "run", _workflow(f, small_graph()), "--set", "14.filename_prefix=../x", *_QUIET]),
    cli("run: --set a model that is missing", "is not in", lambda f: [
        "run", _workflow(f, small_graph()), "--set", "1.model_name=x.gguf", *_QUIET]),
    cli("run: an output folder that is a file", "cannot write", lambda f: [
        "run", _workflow(f, small_graph()), "--out", f / "bad.json", *_QUIET]),
    cli("run: --lora without a model", "loads a MODEL", lambda f: [
        "run", _workflow(f, {"1": small_graph()["3"]}), "--lora", _bad_lora(f), *_QUIET]),
    cli("inspect: missing", "does not exist", lambda f: ["inspect", f / "x.safetensors"]),
    cli("inspect: a folder", "holds no model", lambda f: ["inspect", f]),
    cli("inspect: 10^12 elements", "the file has", lambda f: ["inspect", _bad_model(f)]),
    cli("inspect: GGUF of 10^12 elements", "is incomplete", lambda f: ["inspect", _bad_gguf(f)]),
    cli("inspect: a good file and a bad one", "is incomplete",
        lambda f: ["inspect", small.VAE, _bad_gguf(f)]),
    cli("inspect: a name of two lines", "does not exist",
        lambda f: ["inspect", f / "a\nb.safetensors"]),
    cli("quantize: missing", "does not exist", lambda f: [
        "quantize", f / "x.sft", "--to", "q8_0", "--out", f / "y.gguf", *_QUIET]),
    cli("quantize: an autoencoder", "a Flux autoencoder", lambda f: [
        "quantize", small.VAE, "--to", "q8_0", "--out", f / "y.gguf", *_QUIET]),
    cli("quantize: the wrong ending", "", lambda f: [
        "quantize", small.TRANSFORMER, "--to", "q8_0", "--out", f / "y.safetensors", *_QUIET]),
    cli("quantize: into a folder that is a file", "", lambda f: [
        "quantize", small.TRANSFORMER, "--to", "q8_0", "--out",
        written(f, "x", b"") / "y.gguf", *_QUIET]),
    cli("quantize: calibration of NaN", "", lambda f: [
        "quantize", small.TRANSFORMER, "--to", "fp8-learned", "--calibration",
        _nan_calibration(f), "--out", f / "y.safetensors", *_QUIET]),
    cli("quantize: a report that cannot be written", "", lambda f: [
        "quantize", small.TRANSFORMER, "--to", "bf16", "--out", f / "y.gguf",
        "--report", f / "no" / "r.json", *_QUIET]),
    cli("lora info: a model", "not a LoRA", lambda f: ["lora", "info", small.TRANSFORMER]),
    cli("lora info: missing", "does not exist", lambda f: ["lora", "info", f / "x.safetensors"]),
    cli("lora info: of Wan", "Wan", lambda f: ["lora", "info", _bad_lora(f)]),
    cli("lora merge: missing", "no such file", lambda f: [
        "lora", "merge", "--lora", f / "x", "--out", f / "y.safetensors", *_QUIET]),
    cli("lora merge: an unknown device", "cannot be used", lambda f: [
        "lora", "merge", "--lora", _bad_lora(f), "--out", f / "y.safetensors", "--device", "x",
        *_QUIET]),
    cli("lora resize: no rank", "", lambda f: [
        "lora", "resize", _bad_lora(f), "--out", f / "y.safetensors", *_QUIET]),
    cli("lora extract: two kinds of file", "", lambda f: [
        "lora", "extract", small.TRANSFORMER, small.VAE, "--out", f / "y.safetensors", *_QUIET]),
    cli("lora convert: a model", "", lambda f: [
        "lora", "convert", small.VAE, "--to", "kohya", "--out", f / "y.safetensors"],
        ),
)  # fmt: skip
