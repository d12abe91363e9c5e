"""`generate` on the command line: its options, batches, prompt files, pictures to start from."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from chroma_nodes.chroma.cli import main, parse
from chroma_nodes.chroma.image import load_image, save_png
from chroma_nodes.chroma.pipeline import Pipeline, Settings, decode, generate
from chroma_nodes.chroma.tiny import files as small
from chroma_nodes.chroma.workflow import REGISTRY, check
from chroma_nodes.chroma.workflow.single import Extras, text_to_image
from chroma_nodes.samplers import SAMPLERS
from chroma_nodes.samplers.options import OPTIONS as SAMPLER_OPTIONS
from chroma_nodes.schedulers import SCHEDULERS
from chroma_nodes.schedulers.options import OPTIONS as SCHEDULE_OPTIONS
from PIL import Image

CPU = torch.device("cpu")
PROMPT = "a 3d emoji of a cat"
SMALL = ("--width", 64, "--height", 64, "--dtype", "fp32", "--device", "cpu", "--quiet")


@pytest.fixture
def chroma(tmp_path, monkeypatch, capsys):
    """Run `generate` in a fresh folder: the pictures' names, all of what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, size=True):
        side = SMALL if size else SMALL[4:]
        code = main(["generate", *map(str, arguments), *map(str, side)])
        done = capsys.readouterr()
        assert code == 0, done.err
        return [line for line in done.out.splitlines() if line.endswith(".png")], done.out

    return run


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The one line of an error of `generate`, which leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        before = set(tmp_path.iterdir())
        assert main(["generate", *map(str, arguments), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1
        assert set(tmp_path.iterdir()) == before
        return error

    return run


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(device=CPU, dtype=torch.float32)


def pixels(name):
    with Image.open(name) as file:
        return np.asarray(file).astype(int)


def graph(name):
    with Image.open(name) as file:
        nodes = json.loads(file.text["prompt"]).values()
    return {node["class_type"]: node["inputs"] for node in nodes}


def close(name, picture):
    """A saved picture beside (1, H, W, 3) in [0, 1]."""
    assert (load_image(name)[0] - picture).abs().max() <= 1.5 / 255


# Batches


def test_pictures_of_a_batch_are_those_of_their_seeds(chroma):
    options = [PROMPT, "--steps", 3, "--sampler", "euler_ancestral"]
    names, told = chroma(*options, "--seed", 4, "--count", 3, "--batch", 2, "--out", "o/cat.png")
    assert names == [f"o/cat_0000{i}_.png" for i in (1, 2, 3)]
    assert "6 steps, 18 passes," in told
    for seed, name in enumerate(names, 4):
        alone, _ = chroma(*options, "--seed", seed, "--out", "one.png")
        assert np.abs(pixels(alone[0]) - pixels(name)).max() <= 1
    assert np.abs(pixels(names[0]) - pixels(names[1])).mean() > 2


def test_a_file_of_prompts(chroma, tmp_path):
    prompts = [PROMPT, "a flat emoji of a tree", "a 3d emoji of a large red apple, centred"]
    (tmp_path / "p.txt").write_text("\n\n".join(prompts) + "\n", "utf-8")
    options = ["--steps", 2, "--count", 2]
    together, _ = chroma("--prompts", "p.txt", *options, "--batch", 4, "--out", "all.png")
    for i, name in enumerate(together):
        alone, _ = chroma(prompts[i // 2], "--steps", 2, "--seed", i, "--out", "one.png")
        assert np.abs(pixels(alone[0]) - pixels(name)).max() <= 1


def test_each_picture_is_saved_before_the_next_is_begun(chroma, tmp_path, monkeypatch):
    from chroma_nodes.chroma.workflow import nodes_core

    before, original = [], nodes_core.sample_latent

    def sample(*args, **kw):
        before.append(len(list(tmp_path.glob("*.png"))))
        return original(*args, **kw)

    monkeypatch.setattr(nodes_core, "sample_latent", sample)
    chroma(PROMPT, "--steps", 1, "--count", 3)
    assert before == [0, 1, 2]


# Options


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_and_its_options(name, pipeline, chroma):
    chosen = {o.name: (o.default + o.high) / 2 for o in SCHEDULE_OPTIONS.get(name, ())}
    flags = itertools.chain(*((f"--{k.replace('_', '-')}", v) for k, v in chosen.items()))
    names, _ = chroma(PROMPT, "--steps", 2, "--scheduler", name, *flags)
    settings = Settings(width=64, height=64, steps=2, scheduler=name, schedule_options=chosen)
    close(names[0], generate(pipeline, [PROMPT], "", settings, disable_progress=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_its_options(name, pipeline, chroma):
    chosen = {o.name: o.high for o in SAMPLER_OPTIONS.get(name, ()) if o.name != "eta"}
    flags = itertools.chain(*((f"--{k.replace('_', '-')}", v) for k, v in chosen.items()))
    names, _ = chroma(PROMPT, "--steps", 2, "--sampler", name, *flags)
    settings = Settings(width=64, height=64, steps=2, sampler=name)
    expected = generate(
        pipeline, [PROMPT], "", settings, sampler_options=chosen, disable_progress=True
    )
    close(names[0], expected)


def test_guidance_nag_and_cache_make_nodes_with_what_was_given(chroma):
    names, told = chroma(
        PROMPT, "--negative", "blurry", "--steps", 4, "--cfg-interval", 0.9, 0.4,
        "--cfg-rescale", 0.5, "--zero-star", "--apg-eta", 0.2, "--nag-scale", 3, "--nag-alpha", 0.4,
        "--cache-threshold", 10, "--cache-max-skips", 1,
    )  # fmt: skip
    nodes = graph(names[0])
    guider = nodes["ChromaGuider"]
    assert guider | {
        "cfg": 4.0, "interval_start": 0.9, "interval_end": 0.4, "rescale": 0.5, "zero_star": True,
        "apg_eta": 0.2, "curve": "constant",
    } == guider  # fmt: skip
    assert nodes["ChromaNAG"] | {"scale": 3.0, "tau": 2.5, "alpha": 0.4} == nodes["ChromaNAG"]
    cache = nodes["ChromaBlockCache"]
    assert (cache["threshold"], cache["max_skips"], cache["sigma_start"]) == (10.0, 1, 1.0)
    # Of the levels 1, .84, .5, .16 the middle two are guided; each prompt's second pass is skipped.
    told_passes, skipped = map(int, re.search(r"(\d+) passes \((\d+) of them", told).groups())
    assert told_passes == 6 and 2 <= skipped <= 3


def test_only_what_is_given_is_in_the_graph(chroma):
    nodes = graph(chroma(PROMPT, "--steps", 1)[0][0])
    assert "CFGGuider" in nodes and nodes["ChromaSampler"] == {"sampler_name": "flow_pec"}
    assert not nodes.keys() & {"ChromaGuider", "ChromaNAG", "ChromaBlockCache", "LoadImage"}
    assert nodes["ChromaModelShift"]["mode"] == "constant"
    shifted = chroma(PROMPT, "--steps", 1, "--shift-mode", "resolution", "--max-shift", 2)[0][0]
    shift = graph(shifted)["ChromaModelShift"]
    assert (shift["mode"], shift["max_shift"], shift["width"]) == ("resolution", 2.0, 64)


def test_graphs_are_valid_for_every_sampler_and_schedule():
    for sampler, scheduler in itertools.product(SAMPLERS, SCHEDULERS):
        own = {o.name: o.default for o in SAMPLER_OPTIONS.get(sampler, ())}
        settings = Settings(sampler=sampler, scheduler=scheduler)
        extras = Extras(sampler_options=own, count=5, batch=2)
        assert check(text_to_image(["a", "b"], "", settings, extras=extras), REGISTRY)


def test_what_pictures_share_is_one_node():
    nodes = text_to_image(["x"], "x", Settings(seed=3), extras=Extras(count=3))
    kinds = [node["class_type"] for node in nodes.values()]
    titles = [node["_meta"]["title"] for node in nodes.values()]
    assert kinds.count("ChromaTextEncode") == 2 and kinds.count("EmptySD3LatentImage") == 1
    assert kinds.count("CFGGuider") == 1 and kinds.count("SamplerCustomAdvanced") == 3
    assert len(set(titles)) == len(titles) and {"Seed", "Seed #2", "Seed #3"} <= set(titles)
    seeds = [n["inputs"]["noise_seed"] for n in nodes.values() if n["class_type"] == "RandomNoise"]
    assert seeds == [3, 4, 5]


# Pictures to start from


@pytest.fixture
def photo(chroma, tmp_path):
    """A picture of another size than the model's own, and a mask whose right half is white."""
    picture = torch.rand(1, 6, 9, 3, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(picture.movedim(-1, 1), (48, 80), mode="bilinear")
    save_png(tmp_path / "photo.png", picture[0].movedim(0, -1))
    white = torch.zeros(48, 80, 3)
    white[:, 40:] = 1
    (tmp_path / "masks").mkdir()
    save_png(tmp_path / "masks" / "photo.png", white)
    return load_image(tmp_path / "photo.png")[0]


def through_vae(pipeline, picture):
    with torch.no_grad():
        latent = pipeline.autoencoder.encode(picture.movedim(-1, 1) * 2 - 1)
        return decode(pipeline.autoencoder, latent)


def test_image_to_image(chroma, photo, pipeline):
    still, _ = chroma(PROMPT, "--image", "photo.png", "--denoise", 0, size=False)
    close(still[0], through_vae(pipeline, photo))
    names, _ = chroma(PROMPT, "--image", "photo.png", "--steps", 3, size=False)
    settings = Settings(width=80, height=48, steps=3, denoise=0.6)
    expected = generate(pipeline, [PROMPT], "", settings, image=photo, disable_progress=True)
    close(names[0], expected)
    batch, _ = chroma(
        PROMPT, "--image", "photo.png", "--steps", 3, "--count", 2, "--batch", 2, "--out", "b.png",
        size=False,
    )  # fmt: skip
    close(batch[0], expected)
    assert np.abs(pixels(batch[0]) - pixels(batch[1])).max() > 20


def test_inpainting_changes_what_is_white(chroma, photo, pipeline):
    options = [PROMPT, "--image", "photo.png", "--mask", "masks/photo.png", "--steps", 3]
    names, _ = chroma(*options, "--count", 2, "--batch", 2, size=False)
    before = through_vae(pipeline, photo)[0]
    for name in names:
        change = (load_image(name)[0][0] - before).abs().mean(-1)
        assert change[:, :8].max() < 0.1 < change[:, 48:].mean()
    settings = Settings(width=80, height=48, steps=3)
    mask = torch.zeros(1, 48, 80)
    mask[..., 40:] = 1
    expected = generate(
        pipeline, [PROMPT], "", settings, image=photo, mask=mask, disable_progress=True
    )
    close(names[0], expected)


# Errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x", "--order", 4], "flow_pec: order 4 is not usable"),
        (["x", "--substeps", 2], "the sampler flow_pec has no substeps"),
        (["x", "--sampler", "euler", "--eta", 0.5], "the sampler euler has no eta"),
        (["x", "--p", 2], "the scheduler beta has no option p; expected alpha or beta"),
        (["x", "--scheduler", "simple", "--a", 2], "simple has no option a; expected none"),
        (["x", "--alpha", 0], "input alpha: 0.0 is not usable"),
        (["x", "--cfg-rescale", 2], "rescale 2.0 is not usable"),
        (["x", "--cfg-interval", 0.1, 0.9], "interval_start 0.1 is below interval_end 0.9"),
        (["x", "--nag-tau", 2], "--nag-tau needs --nag-scale"),
        (["x", "--nag-scale", 99], "NAG's scale 99.0 is not usable"),
        (["x", "--cache-max-skips", 2], "--cache-max-skips needs --cache-threshold"),
        (["x", "--cache-threshold", -1], "the cache's threshold -1.0 is not usable"),
        (["x", "--count", 0], "count 0 is not usable"),
        (["x", "--count", 2, "--batch", -1], "batch -1 is not usable"),
        (["x", "--denoise", 0.5], "denoise needs a picture to start from"),
        (["x", "--mask", "m.png"], "a mask needs a picture to start from"),
        (["x", "--image", "no.png"], "no.png does not exist"),
        (["x", "--image", "no.png", "--width", 64], "--width and --height are those of --image"),
        (
            [
                "x",
                "--shift-mode",
                "resolution",
                "--max-shift",
                4,
                "--width",
                2048,
                "--height",
                2048,
            ],
            "give mu",
        ),
        ([], "expected a prompt, or a file of them with --prompts"),
        (["x", "--prompts", "no.txt"], "expected a prompt, or a file of them with --prompts"),
        (["--prompts", "no.txt"], "--prompts no.txt cannot be read"),
    ],
)
def test_what_cannot_be_used_is_one_line(refused, arguments, says):
    assert says in refused(*arguments)


def test_an_empty_file_of_prompts(refused, tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    assert "p.txt holds no prompt" in refused("--prompts", "p.txt")


def test_the_help_page_tells_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["generate", "--help"])
    page = capsys.readouterr().out
    assert left.value.code == 0
    for tables in (SAMPLER_OPTIONS, SCHEDULE_OPTIONS):
        for option in itertools.chain(*tables.values()):
            assert f"--{option.name.replace('_', '-')} " in page


def test_a_model_in_a_folder(chroma, tmp_path):
    """As diffusers saves one, with the file's name for that."""
    folder = tmp_path / "Chroma1"
    folder.mkdir()
    shutil.copy(small.TRANSFORMER, folder / "diffusion_pytorch_model.safetensors")
    texts = ("--text-encoder", small.TEXT_ENCODER, "--tokenizer", small.TOKENIZER)
    (name,), _ = chroma(
        PROMPT, "--model", folder, *texts, "--vae", small.VAE, "--steps", 1, "--out", "a.png"
    )
    assert Image.open(tmp_path / name).size == (64, 64)
