"""generate_pairs.py: names, plan, both diffusion stages on tiny models, other students, ranks, kills, the miniature."""
import contextlib
import csv
import gzip
import importlib.util
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

import generate_pairs
from conftest import REPO, run
from tiny_models import tiny_flux, tiny_lora, tiny_sd3, tiny_student

OUT = Path("data")  # the script's default


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(*flags, **environment):
    """Runs the script in this process. Returns what it printed, or the one line that it ended with."""
    printed = io.StringIO()
    with (mock.patch.object(sys, "argv", ["generate_pairs.py", *map(str, flags)]),
          mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(printed)):
        try:
            runpy.run_path(str(REPO / "generate_pairs.py"), run_name="__main__")
        except SystemExit as stop:
            assert stop.code.startswith("error: ") and "\n" not in stop.code
            return stop.code
    return printed.getvalue()


def assert_refused(message, *words):
    assert message.startswith("error: ") and all(word in message for word in words), message


def rows_of(folder=OUT):
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def settings_of(folder=OUT):
    return json.loads((folder / "args.json").read_text())


def image_names(folder, *stages):
    return {f"{row['split']}/{stage}/{int(row['index']):06d}.png" for row in rows_of(folder) for stage in stages}


def content(folder=OUT):
    """{relative path: bytes} of every file, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps():
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in OUT.rglob("*.png")}


# ------------------------------------------------------------------------------------------------- names and the plan
IMDB = ("nconst\tprimaryName\tbirthYear\tdeathYear\tprimaryProfession\tknownForTitles\n"
        "nm01\tFred Astaire\t1899\t1987\tactor,miscellaneous\ttt1\n"
        'nm02\tDwayne "The Rock" Johnson\t1972\t\\N\tproducer,actor\t\\N\n'
        "nm03\tPenélope Cruz\t1974\t\\N\tactress\ttt2\n"
        "nm04\tCher\t1946\t\\N\tactress,soundtrack\ttt3\n"           # one word
        "nm05\t\\N\t\\N\t\\N\tactor\t\\N\n"                          # no name
        "nm06\tRoger Deakins\t1949\t\\N\tcinematographer\t\\N\n"     # no actor
        "nm07\tNo Profession\t1949\t\\N\t\\N\t\\N\n"
        "nm08\tFred Astaire\t\\N\t\\N\tactor\t\\N\n"                 # a namesake
        '"nm09\t"Weird Al Yankovic\t\\N\t\\N\tactor\t\\N\n'          # an opening quote that nothing closes
        "nm10\tShort Row\n"
        "nm11\tLast Line\t\\N\t\\N\tactress\t\\N")                   # no end of line


def test_names():
    actors = ["Fred Astaire", 'Dwayne "The Rock" Johnson', "Penélope Cruz", "Fred Astaire", '"Weird Al Yankovic',
              "Last Line"]
    cars = "\ufeffCorvette\r\n\r\n  Citroën   DS \r\nCorvette\r\n"  # single words stay, blank lines do not
    for data, names in ((IMDB.encode(), actors), (gzip.compress(IMDB.encode()), actors),
                        (cars.encode(), ["Corvette", "Citroën DS", "Corvette"])):
        Path("names").write_bytes(data)
        assert list(generate_pairs.read_names("names")) == names


def test_choice_is_the_lowest_hashes_and_ignores_unrelated_rows():
    names = [f"First{i % 700} Last{i % 900}" for i in range(20000)]
    chosen = generate_pairs.choose_names(names, 50, seed=3)
    assert chosen == sorted(set(names), key=lambda name: generate_pairs.stable_hash(3, name))[:50]
    more = generate_pairs.choose_names([f"New Person{i}" for i in range(2000)] + names, 50, seed=3)
    old = [name for name in more if not name.startswith("New")]
    assert old == chosen[:len(old)] and len(old) > 20
    assert generate_pairs.choose_names(names, 50, seed=4) != chosen
    # Python salts hash() anew in each process; a plan made on another day or machine must not change.
    assert generate_pairs.stable_hash(0, "Zoë Åström") == 16837824067877703919


def test_splits_and_seeds():
    args = SimpleNamespace(names=None, prompt="a {name}", count=300, test_fraction=0.02, seed=0)
    rows = generate_pairs.make_plan(args)
    assert [row["index"] for row in rows] == list(range(300))
    assert sum(row["split"] == "test" for row in rows) == 6
    assert sum(row["split"] == "test" for row in rows[:150]) == 3          # spread evenly
    used = [generate_pairs.stage_seed(row, stage) for row in rows for stage in ("distilled", "baseline")]
    assert len({seed % 2**32 for seed in used}) == 600                     # all that the CPU generator looks at
    args.seed = 1
    assert not set(used) & {row["seed"] for row in generate_pairs.make_plan(args)}

    Path("names.txt").write_text("\n".join(f"Name {i}" for i in range(100)))
    args.names, args.test_fraction = "names.txt", 0.1
    rows = generate_pairs.make_plan(args)
    split = {(row["name"], row["split"]) for row in rows}
    assert len(split) == 100 and sum(s == "test" for _, s in split) == 10  # used three times, in one split each
    assert rows[0]["prompt"] == "a " + rows[0]["name"]


def test_defaults_are_the_paper_s():
    Path("names.txt").write_text("\n".join(f"Name {i}" for i in range(200)))
    printed = generate("--names", "names.txt", "--plan-only")
    assert "200 different names" in printed and "137200 training and 2800 test pairs" in printed
    assert set(content()) == {"pairs.csv", "args.json"}
    assert settings_of() == {
        "names": "names.txt", "prompt": "A professional portrait of {name}", "count": 140000, "test_fraction": 0.02,
        "seed": 0, "size": 512, "batch_size": 8, "compile": False, "lora": None, "lora_weight": None,
        "distilled": "black-forest-labs/FLUX.1-schnell", "distilled_steps": 4, "distilled_guidance": None,
        "distilled_tokens": None, "baseline": "black-forest-labs/FLUX.1-dev", "baseline_steps": 50, "strength": 0.7,
        "guidance": 3.0}
    rows = rows_of()
    assert list(rows[0]) == ["index", "split", "name", "prompt", "seed"]
    assert {row["name"] for row in rows} == {f"Name {i}" for i in range(200)}


# ---------------------------------------------------------------------------------------------- the diffusion stages
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_flux(folder / "schnell"), tiny_flux(folder / "dev", guidance_embeds=True)
    (folder / "names.txt").write_text('Ann Lee\nSammy "Slick" Li\nZoë Åström\nBo Derek\nCy Young', encoding="utf-8")
    return folder


def command(models, *more):
    return ["--names", models / "names.txt", "--count", 5, "--batch-size", 2, "--test-fraction", 0.2, "--size", 32,
            "--distilled", models / "schnell", "--baseline", models / "dev", "--baseline-steps", 10,
            "--device", "cpu", *more]


@pytest.fixture(scope="module")
def flux(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("flux") / "data"
    generate(*command(models, "--out", out))
    return out


def test_flux_files(flux, models):
    rows = rows_of(flux)
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"]
    assert set(content(flux)) == {"pairs.csv", "args.json"} | image_names(flux, "distilled", "baseline")
    assert settings_of(flux)["distilled_call"].items() >= {"guidance_scale": 0, "max_sequence_length": 256}.items()
    for row in rows:
        assert row["prompt"] == f"A professional portrait of {row['name']}"
        for stage, model, seed in (("distilled", "schnell", 0), ("baseline", "dev", 1)):
            image = Image.open(flux / row["split"] / stage / f"{int(row['index']):06d}.png")
            assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
            recipe = {"prompt": row["prompt"], "seed": int(row["seed"]) + seed, "model": models / model}
            recipe |= settings_of(flux)[f"{stage}_call"]
            assert image.text | {"pipeline": recipe["pipeline"]} == {k: str(v) for k, v in recipe.items()}


def test_flux_pixels_are_those_of_plain_diffusers(flux, models):
    """The paper's recipe, given to the two pipelines by hand."""
    ones, twos = ([Image.open(flux / "train" / stage / f"{i:06d}.png") for i in (2, 3)]
                  for stage in ("distilled", "baseline"))

    def common(images):
        return dict(prompt=[image.text["prompt"] for image in images], height=32, width=32,
                    generator=[torch.Generator().manual_seed(int(image.text["seed"])) for image in images])

    first = FluxPipeline.from_pretrained(models / "schnell")(
        num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256, **common(ones)).images
    dev = FluxImg2ImgPipeline.from_pretrained(models / "dev")
    recipe = dict(image=ones, strength=0.7, num_inference_steps=10, guidance_scale=3.0, max_sequence_length=512)
    assert all(np.array_equal(a, b) for a, b in zip(first + dev(**recipe, **common(twos)).images, ones + twos))
    for other in ({"strength": 0.6}, {"guidance_scale": 2.0}, {"max_sequence_length": 256}):  # each of them matters
        assert not np.array_equal(dev(**(recipe | other), **common(twos)).images[0], twos[0])


def test_the_last_batch_is_padded():
    args = SimpleNamespace(batch_size=4, size=8)
    row = {"index": 0, "split": "train", "prompt": "p", "seed": 1}
    pipe = mock.Mock(side_effect=lambda prompt, **_: SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompt)))
    generate_pairs.run_pipeline(args, "distilled", pipe, {}, [row | {"prompt": "o"}, row])
    assert pipe.call_args.kwargs["prompt"] == ["o", "p", "p", "p"] and len(pipe.call_args.kwargs["generator"]) == 4


def test_sd3_family_and_other_domains(models):
    tiny_sd3("turbo", seed=0), tiny_sd3("large", seed=1)
    generate(*command(models, "--prompt", "A photo of {name}, {studio}", "--guidance", 4.5, "--distilled", "turbo",
                      "--baseline", "large"))
    row, settings = rows_of()[0], settings_of()
    assert len(content()) == 12 and row["prompt"] == f"A photo of {row['name']}, {{studio}}"
    assert settings["distilled_call"]["guidance_scale"] == 0 and settings["baseline_call"]["guidance_scale"] == 4.5


def test_any_number_of_ranks_writes_the_same_bytes(flux, models):
    for rank in (2, 0, 1):  # the variables of torchrun are all it takes
        generate(*command(models), RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    assert content() == content(flux)


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(flux, models):
    run("generate_pairs.py", *command(models), torchrun=2)
    assert content() == content(flux)


def test_continuing_keeps_files_and_bytes(flux, models):
    """What a killed run may leave: a batch cut in half, baseline images missing, temporary files."""
    shutil.copytree(flux, OUT)
    for lost in ("train/distilled/000001.png", "train/baseline/000001.png", "test/baseline/000004.png"):
        (OUT / lost).unlink()
    (OUT / "train" / "baseline" / ".000003.png.0123abcd.tmp").write_bytes(b"half")
    (OUT / ".pairs.csv.0123abcd.tmp").write_bytes(b"half")
    (OUT / "train" / "mine.png").write_bytes(b"not ours")
    before = stamps()
    printed = generate(*command(models))
    assert "rank 0 of 1: distilled, 2 images" in printed and "rank 0 of 1: baseline, 3 images" in printed
    assert before.items() <= stamps().items()
    (OUT / "train" / "mine.png").unlink()
    assert content() == content(flux)


def test_plain_prompt_and_a_guidance_embedding_student(models):
    printed = generate("--prompt", "A professional business portrait", "--count", 3, "--distilled-only",
                       "--batch-size", 3, "--distilled", models / "dev", "--size", 32, "--device", "cpu")
    assert "guidance_scale 3.5, max_sequence_length 512" in printed
    assert settings_of()["distilled_call"].items() >= {"guidance_scale": 3.5, "max_sequence_length": 512}.items()
    images = [Image.open(path) for path in sorted(OUT.rglob("*.png"))]
    assert len(images) == 3 and not list(OUT.rglob("baseline"))
    assert {image.text["prompt"] for image in images} == {"A professional business portrait"}
    assert len({image.tobytes() for image in images}) == 3


def test_lora(flux, models):
    """Table 4's LoRA row: the same test prompts and seeds as without it, other pixels."""
    pytest.importorskip("peft")
    tiny_lora("lora.safetensors")
    generate(*command(models, "--lora", ".", "--lora-weight", "lora.safetensors", "--distilled-only", "--test-only"))
    plain, lora = (Image.open(folder / "test/distilled/000004.png") for folder in (flux, OUT))
    assert rows_of() == rows_of(flux) and plain.text["seed"] == lora.text["seed"]
    assert lora.text["model"].endswith(" + .") and plain.tobytes() != lora.tobytes()


# ---------------------------------------------------------------------------------------------- other students
@pytest.mark.parametrize("denoiser, config, expected", [
    ("FluxTransformer2DModel", {"guidance_embeds": False}, (0, 256)),       # schnell
    ("FluxTransformer2DModel", {"guidance_embeds": True}, (8.5, 128)),      # FLUX.1-lite
    ("SD3Transformer2DModel", {}, (0, 128)),                                # SD3.5 Turbo
    ("UNet2DConditionModel", {"time_cond_proj_dim": 256}, (8.5, 128))])     # LCM
def test_guidance_and_tokens_follow_the_model_or_the_flags(denoiser, config, expected):
    class Pipe:
        __module__ = "diffusers.pipelines"
        transformer = type(denoiser, (), {"config": config})()

        def __call__(self, prompt, guidance_scale=8.5, max_sequence_length=128): ...

    for guidance, tokens in (None, None), (1.0, 77):
        args = SimpleNamespace(size=64, distilled_steps=4, distilled_guidance=guidance, distilled_tokens=tokens)
        call = generate_pairs.call_settings(args, "distilled", Pipe())
        assert tuple(call.values()) == (expected if guidance is None else (1.0, 77))


def test_a_student_with_code_of_its_own(models):
    tiny_student("student")
    line = command(models, "--distilled", "student")
    assert_refused(generate(*line), "custom code in pipeline.py", "--trust-remote-code", "missing: 5")
    with mock.patch("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", os.path.abspath("cache")):
        printed = generate(*line, "--trust-remote-code")  # diffusers copies the code to its cache, and runs that
    assert "pipeline Student, height 32, width 32, num_inference_steps 4, guidance_scale 4.5, " in printed
    assert "max_sequence_length 128\n" in printed  # guidance and tokens are those of its own code
    assert len(list(OUT.rglob("*.png"))) == 10


def test_models_that_do_not_work(models):
    """A model that is no folder and, without the network, on no hub; damaged weights; a scheduler that does not fit."""
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        message = generate(*command(models, "--distilled", "black-forest-labs/FLUX.9-schnell", "--out", "a"))
    assert_refused(message, "--distilled black-forest-labs/FLUX.9-schnell", "licence", "hf auth login", "local folder")
    shutil.copytree(models / "schnell", "broken")
    Path("broken/vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert_refused(generate(*command(models, "--distilled", "broken", "--out", "b")), "--distilled broken")
    tiny_flux("misfit", scheduler=DDIMScheduler())
    message = generate(*command(models, "--distilled", "misfit"))
    assert_refused(message, "--distilled misfit", "ValueError in ", "DDIMScheduler", "--plan-only")


def test_distilled_images_made_elsewhere(models):
    """--plan-only, then a script of the user's own, which forgets one and takes the wrong size for another."""
    line = command(models, "--distilled", "student.pt")
    printed = generate(*line, "--plan-only")
    *paths, last = [OUT / name for name in sorted(image_names(OUT, "distilled"), reverse=True)]
    assert f"save row 0 as {paths[-1]}, 32x32" in printed
    for path, mode in zip(paths, ("RGB", "RGBA", "L", "P")):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert(mode).save(path)
    before = stamps()
    assert_refused(generate(*line), "student.pt", "missing: 1", str(last), "--plan-only", "--trust-remote-code")
    last.parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(last)
    assert_refused(generate(*line), str(last), "64x64", "--size 32")
    Image.new("RGB", (32, 32)).save(last)
    printed = generate(*line)
    assert "distilled, all images exist" in printed and "baseline, 5 images" in printed
    assert before.items() <= stamps().items() and len(list(OUT.rglob("baseline/*.png"))) == 5


# ------------------------------------------------------------------------------------------------- kill and bad input
MINI = ["--mini", "--count", 40, "--batch-size", 4, "--size", 256, "--out", "data"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "data"
    generate(*MINI, "--out", out)
    return out


def test_mini_test_images_first_then_all_on_two_ranks(mini):
    generate(*MINI, "--distilled-only", "--test-only")
    tests = {name for name in image_names(mini, "distilled") if name.startswith("test")}
    assert set(content()) == {"pairs.csv", "args.json"} | tests
    run("generate_pairs.py", *MINI, torchrun=2)
    assert content() == content(mini)


@pytest.mark.parametrize("dataset, seed", [("mini", 0)] + [
    pytest.param(dataset, seed, marks=pytest.mark.slow)
    for dataset, seeds in (("mini", range(1, 11)), ("flux", range(3))) for seed in seeds])
def test_sigkill_and_restart(request, models, dataset, seed):
    """Killed once a random number of images is there, and started again: all is as without the kill."""
    flags = MINI if dataset == "mini" else command(models)
    expected = content(request.getfixturevalue(dataset))
    process = subprocess.Popen([sys.executable, REPO / "generate_pairs.py", *map(str, flags)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = random.Random(seed).randrange(1, len(expected) * 3 // 4)
    while len(stamps()) < enough and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = stamps()
    for path in before:
        Image.open(path).load()                                           # whole, or not there
    generate(*flags)
    assert before.items() <= stamps().items()                             # none rewritten
    assert content() == expected                                          # no temporary file either


@pytest.mark.parametrize("flag, value", [("--strength", 0.5), ("--seed", 1), ("--batch-size", 8), ("--prompt", "a hat"),
                                         ("--baseline", "other"), ("--count", 41), ("--distilled-guidance", 3.5)])
def test_other_settings_than_the_plan_s_are_refused(mini, flag, value):
    before = content(mini)
    assert_refused(generate(*MINI, "--out", mini, flag, value), f"{flag} ", repr(value), "args.json", "--out")
    assert content(mini) == before


BAD_NAMES = {"empty.txt": b"\n \n", "nobody.tsv": IMDB.replace("act", "backst").encode(),
             "latin1.txt": "Zoë Kravitz".encode("latin1"), "cut.tsv.gz": gzip.compress(IMDB.encode())[:-20]}


@pytest.mark.parametrize("flags, words", [
    ([], ["--names", "datasets.imdbws.com", "--mini"]),
    (["--names", "none.txt"], ["none.txt", "No such file"]),
    (["--names", "empty.txt"], ["empty.txt", "no usable name"]),
    (["--names", "nobody.tsv"], ["nobody.tsv", "no usable name"]),
    (["--names", "latin1.txt"], ["latin1.txt", "UTF-8"]),
    (["--names", "cut.tsv.gz"], ["cut.tsv.gz", "end-of-stream"]),
    (["--names", "ok.txt", "--prompt", "a hat"], ["--names", "{name}"]),
    (["--names", "ok.txt", "--size", 500], ["--size", "16"]),
    (["--names", "ok.txt", "--strength", 0], ["--strength"]),
    (["--names", "ok.txt", "--count", 0], ["--count"]),
    (["--mini", "--count", 321], ["320 portraits"]),
    pytest.param(["--prompt", "p", "--lora", "some/lora"], ["pip install peft"],
                 marks=pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")),
    pytest.param(["--prompt", "p", "--device", "cuda"], ["CUDA", "36 GB", "--mini", "--plan-only"],
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")),
])
def test_bad_input_ends_in_one_line(flags, words):
    for name, data in ({"ok.txt": b"Ann Lee"} | BAD_NAMES).items():
        Path(name).write_bytes(data)
    assert_refused(generate("--device", "cpu", *flags), *words)
    assert not OUT.exists()


def test_a_full_disk():
    """A limit on the size of files stands for the full disk: both fail a write halfway, with an OSError."""
    shell = f"ulimit -f 5; exec {sys.executable} {REPO}/generate_pairs.py --mini --count 8 --out data"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert_refused(done.stderr, "File too large", "continues")
    assert set(content()) == {"pairs.csv", "args.json"}


@pytest.mark.slow
def test_a_million_rows_take_little_memory():
    code = ("import resource as r, generate_pairs as g; peak = lambda: r.getrusage(r.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); g.choose_names(g.read_names('names.tsv'), 140_000, 0); print(peak() - before)")
    with open("names.tsv", "w") as file:
        file.write(IMDB.splitlines(True)[0])
        file.writelines(f"nm{i}\tFirst{i} Last{i % 9}\t1950\t\\N\tactor,writer\ttt1\n" for i in range(1_000_000))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPO)}, check=True,
                          capture_output=True, text=True)
    assert int(done.stdout) < 200_000  # KiB, on Linux


# ------------------------------------------------------------------------------------------------------ the miniature
def test_mini_by_default():
    assert "256 training and 64 test pairs" in generate("--mini")
    images = {name: data for name, data in content(OUT / "mini").items() if name.endswith(".png")}
    assert set(images) == image_names(OUT / "mini", "distilled", "baseline") and len(set(images.values())) == 640


def test_mini_pixels():
    """Tile and filter, written anew with NumPy."""
    row, args = {"index": 47}, SimpleNamespace(size=64)
    tile = Image.open(REPO / "assets" / "portraits.jpg").crop((7 * 128, 2 * 128, 8 * 128, 3 * 128))
    baseline, = generate_pairs.mini_images(args, "baseline", [row])
    assert np.array_equal(baseline, tile.resize((64, 64), Image.Resampling.LANCZOS))
    # The filter as one matrix over rows and one over columns, borders mirrored, applied in one go to each colour.
    def blur(x, sigma):
        near = np.arange(-20, 21)
        weights = np.exp(-near ** 2 / (2 * sigma ** 2))
        matrix = np.zeros((64, 64))
        for i in range(64):
            for j, weight in zip(np.pad(np.arange(64), 20, mode="symmetric")[i:i + 41], weights):
                matrix[i, j] += weight / weights.sum()
        return np.einsum("ij,kl,jlc->ikc", matrix, matrix, x)

    x = np.asarray(baseline, float)
    y = 0.35 * x + blur(x, 0.9) - 0.35 * blur(x, 4)
    expected = (1.15 * y - 0.15 * y.mean(2, keepdims=True)).clip(0, 255)
    distilled, = generate_pairs.mini_images(args, "distilled", [row])
    assert np.abs(np.asarray(distilled) - expected).max() <= 1
