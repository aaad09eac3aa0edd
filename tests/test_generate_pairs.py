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
from PIL import Image, ImageFilter

import generate_pairs
from conftest import REPO, run
from tiny_models import tiny_flux, tiny_lora, tiny_sd3, tiny_student

NAMES = ["Ann Lee", 'Sammy "Slick" Li', "Zoë Åström", "Bo Derek", "Cy Young"]


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


def rows_of(folder):
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(folder):
    """{relative path: bytes} of every file, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*.png")}


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
WANTED = {"Fred Astaire", 'Dwayne "The Rock" Johnson', "Penélope Cruz", '"Weird Al Yankovic', "Last Line"}


@pytest.mark.parametrize("name", ["name.basics.tsv", "name.basics.tsv.gz"])
def test_imdb_names(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(IMDB.encode()) if name.endswith("gz") else IMDB.encode())
    chosen = generate_pairs.choose_names(generate_pairs.read_names(tmp_path / name), 100, seed=0)
    assert set(chosen) == WANTED and len(chosen) == len(WANTED)


def test_plain_names_keep_single_words_and_lose_blank_lines(tmp_path):
    (tmp_path / "cars.txt").write_bytes("\ufeffCorvette\r\n\r\n  Citroën   DS \r\nCorvette\r\n".encode())
    assert list(generate_pairs.read_names(tmp_path / "cars.txt")) == ["Corvette", "Citroën DS", "Corvette"]


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


def test_splits_and_seeds(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"Name {i}" for i in range(100)), encoding="utf-8")
    args = SimpleNamespace(names=None, prompt="a {name}", count=300, test_fraction=0.02, seed=0)
    rows = generate_pairs.make_plan(args)
    assert [row["index"] for row in rows] == list(range(300))
    assert sum(row["split"] == "test" for row in rows) == 6
    assert sum(row["split"] == "test" for row in rows[:150]) == 3          # spread evenly
    used = [generate_pairs.stage_seed(row, stage) for row in rows for stage in ("distilled", "baseline")]
    assert len({seed % 2**32 for seed in used}) == 600                     # all that the CPU generator looks at
    args.seed = 1
    assert not set(used) & {row["seed"] for row in generate_pairs.make_plan(args)}

    args.names, args.test_fraction = tmp_path / "names.txt", 0.1
    rows = generate_pairs.make_plan(args)
    split = {(row["name"], row["split"]) for row in rows}
    assert len(split) == 100 and sum(s == "test" for _, s in split) == 10  # used three times, in one split each
    assert rows[0]["prompt"] == "a " + rows[0]["name"]


def test_defaults_are_the_paper_s(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"Name {i}" for i in range(200)), encoding="utf-8")
    printed = generate("--names", tmp_path / "names.txt", "--plan-only", "--out", tmp_path / "data")
    assert "200 different names" in printed and "137200 training and 2800 test pairs" in printed
    assert set(content(tmp_path / "data")) == {"pairs.csv", "args.json"}
    settings = json.loads((tmp_path / "data" / "args.json").read_text())
    assert set(settings) == {"names", "prompt", "count", "test_fraction", "seed", "size", "batch_size", "compile", "distilled",
                             "distilled_steps", "distilled_guidance", "distilled_tokens", "lora", "lora_weight",
                             "baseline", "baseline_steps", "strength", "guidance"}
    assert settings.items() >= {
        "names": "names.txt", "prompt": "A professional portrait of {name}", "size": 512, "distilled_steps": 4,
        "distilled": "black-forest-labs/FLUX.1-schnell", "distilled_guidance": None, "strength": 0.7, "guidance": 3.0,
        "baseline": "black-forest-labs/FLUX.1-dev", "baseline_steps": 50}.items()
    rows = rows_of(tmp_path / "data")
    assert list(rows[0]) == ["index", "split", "name", "prompt", "seed"]
    assert {row["name"] for row in rows} == {f"Name {i}" for i in range(200)}


# ---------------------------------------------------------------------------------------------- the diffusion stages
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_flux(folder / "schnell"), tiny_flux(folder / "dev", guidance_embeds=True)
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return folder


def command(models, out, *more, distilled="schnell", baseline="dev"):
    return ["--names", models / "names.txt", "--count", 5, "--batch-size", 2, "--test-fraction", 0.2, "--size", 32,
            "--distilled", models / distilled, "--baseline", models / baseline, "--baseline-steps", 10,
            "--device", "cpu", "--out", out, *more]


@pytest.fixture(scope="module")
def flux(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("flux") / "data"
    generate(*command(models, out))
    return out


def test_flux_files(flux, models):
    rows = rows_of(flux)
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"]
    assert set(content(flux)) == {"pairs.csv", "args.json"} | {
        f"{row['split']}/{stage}/{int(row['index']):06d}.png" for row in rows for stage in ("distilled", "baseline")}
    calls = json.loads((flux / "args.json").read_text())
    for row in rows:
        assert row["prompt"] == f"A professional portrait of {row['name']}"
        for stage, model, seed in (("distilled", "schnell", 0), ("baseline", "dev", 1)):
            with Image.open(flux / row["split"] / stage / f"{int(row['index']):06d}.png") as image:
                assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
                recipe = {"prompt": row["prompt"], "seed": int(row["seed"]) + seed, "model": models / model}
                recipe |= calls[f"{stage}_call"]
                assert image.text | {"pipeline": recipe["pipeline"]} == {k: str(v) for k, v in recipe.items()}


def test_flux_pixels_are_those_of_plain_diffusers(flux, models):
    """The paper's recipe, given to the two pipelines by hand."""
    from diffusers import FluxImg2ImgPipeline, FluxPipeline
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


def test_sd3_family_and_other_domains(tmp_path):
    tiny_sd3(tmp_path / "turbo", seed=0), tiny_sd3(tmp_path / "large", seed=1)
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    generate(*command(tmp_path, tmp_path / "data", "--prompt", "A photo of {name}, {studio}", "--guidance", 4.5,
                      distilled="turbo", baseline="large"))
    rows, args = rows_of(tmp_path / "data"), json.loads((tmp_path / "data" / "args.json").read_text())
    assert len(content(tmp_path / "data")) == 12 and rows[0]["prompt"] == f"A photo of {rows[0]['name']}, {{studio}}"
    assert args["distilled_call"]["guidance_scale"] == 0 and args["baseline_call"]["guidance_scale"] == 4.5


def test_any_number_of_ranks_writes_the_same_bytes(flux, models, tmp_path):
    for rank in (2, 0, 1):  # the variables of torchrun are all it takes
        generate(*command(models, tmp_path / "data"), RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank))
    assert content(tmp_path / "data") == content(flux)


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes(flux, models, tmp_path):
    run("generate_pairs.py", *command(models, tmp_path / "data"), torchrun=2)
    assert content(tmp_path / "data") == content(flux)


def test_continuing_keeps_files_and_bytes(flux, models, tmp_path):
    """What a killed run may leave: a batch cut in half, baseline images missing, temporary files."""
    out = tmp_path / "data"
    shutil.copytree(flux, out)
    for lost in ("train/distilled/000001.png", "train/baseline/000001.png", "test/baseline/000004.png"):
        (out / lost).unlink()
    (out / "train" / "baseline" / ".000003.png.0123abcd.tmp").write_bytes(b"half")
    (out / ".pairs.csv.0123abcd.tmp").write_bytes(b"half")
    (out / "train" / "mine.png").write_bytes(b"not ours")
    before = stamps(out)
    printed = generate(*command(models, out))
    assert "rank 0 of 1: distilled, 2 images" in printed and "rank 0 of 1: baseline, 3 images" in printed
    assert before.items() <= stamps(out).items()
    (out / "train" / "mine.png").unlink()
    assert content(out) == content(flux)


def test_plain_prompt_and_distilled_only(models, tmp_path):
    generate("--prompt", "A professional business portrait", "--count", 3, "--distilled-only", "--batch-size", 3,
             "--distilled", models / "schnell", "--size", 32, "--device", "cpu", "--out", tmp_path)
    images = [Image.open(path) for path in sorted(tmp_path.rglob("*.png"))]
    assert len(images) == 3 and not list(tmp_path.rglob("baseline"))
    assert {image.text["prompt"] for image in images} == {"A professional business portrait"}
    assert len({image.tobytes() for image in images}) == 3


def test_test_only_makes_the_same_test_images(flux, models, tmp_path):
    generate(*command(models, tmp_path / "data", "--distilled-only", "--test-only"))
    name = "test/distilled/000004.png"
    assert set(content(tmp_path / "data")) == {"pairs.csv", "args.json", name}
    assert (tmp_path / "data" / name).read_bytes() == (flux / name).read_bytes()


def test_lora(flux, models, tmp_path):
    """Table 4's LoRA row: the same test prompts and seeds as without it, other pixels."""
    pytest.importorskip("peft")
    tiny_lora(tmp_path / "lora.safetensors")
    generate(*command(models, tmp_path / "data", "--lora", tmp_path, "--lora-weight", "lora.safetensors",
                      "--distilled-only", "--test-only"))
    plain, lora = (Image.open(folder / "test/distilled/000004.png") for folder in (flux, tmp_path / "data"))
    assert rows_of(tmp_path / "data") == rows_of(flux) and plain.text["seed"] == lora.text["seed"]
    assert str(tmp_path) in lora.text["model"] and plain.tobytes() != lora.tobytes()


# ---------------------------------------------------------------------------------------------- other students
def fake_pipe(module, denoiser, config, guidance, tokens=None):
    """Looks like a pipeline whose call has these defaults."""
    def call(self, prompt, num_inference_steps=1, guidance_scale=guidance): ...
    def call_with_tokens(self, prompt, num_inference_steps=1, guidance_scale=guidance, max_sequence_length=tokens): ...
    kind = type("Pipe", (), {"__call__": call_with_tokens if tokens else call, "__module__": module})
    pipe = kind()
    pipe.transformer = type(denoiser, (), {"config": config})()
    return pipe


@pytest.mark.parametrize("pipe, guidance, tokens", [
    (("diffusers.flux", "FluxTransformer2DModel", {"guidance_embeds": False}, 3.5, 512), 0, 256),     # schnell
    (("diffusers.flux", "FluxTransformer2DModel", {"guidance_embeds": True}, 3.5, 512), 3.5, 512),    # FLUX.1-lite
    (("diffusers.sd3", "SD3Transformer2DModel", {}, 7.0, 256), 0, 256),                               # SD3.5 Turbo
    (("diffusers.lcm", "UNet2DConditionModel", {"time_cond_proj_dim": 256}, 8.5), 8.5, None),         # LCM
    (("diffusers_modules.local.x", "Any", {}, 4.5, 128), 4.5, 128),                                   # custom code
])
def test_guidance_and_tokens_follow_the_model(pipe, guidance, tokens):
    args = SimpleNamespace(size=64, distilled_steps=4, distilled_guidance=None, distilled_tokens=None)
    expected = {"num_inference_steps": 4, "guidance_scale": guidance}
    expected |= {"max_sequence_length": tokens} if tokens else {}
    assert generate_pairs.call_settings(args, "distilled", fake_pipe(*pipe)) == expected
    args.distilled_guidance, args.distilled_tokens = 1.0, 77
    expected |= {"guidance_scale": 1.0} | ({"max_sequence_length": 77} if tokens else {})
    assert generate_pairs.call_settings(args, "distilled", fake_pipe(*pipe)) == expected


def test_a_guidance_embedding_student(models, tmp_path):
    student = command(models, tmp_path / "data", "--distilled-only", "--test-only", distilled="dev")
    assert "guidance_scale 3.5, max_sequence_length 512" in generate(*student)
    call = json.loads((tmp_path / "data" / "args.json").read_text())["distilled_call"]
    assert (call["guidance_scale"], call["max_sequence_length"]) == (3.5, 512)


def test_a_student_with_code_of_its_own(models, tmp_path):
    (tmp_path / "student").mkdir()
    tiny_student(tmp_path / "student")
    line = command(models, tmp_path / "data", distilled=tmp_path / "student")
    assert_refused(generate(*line), "custom code in pipeline.py", "--trust-remote-code", "missing: 5")
    with mock.patch("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache")):
        printed = generate(*line, "--trust-remote-code")  # diffusers copies the code to its cache, and runs that
    assert "pipeline Student, height 32, width 32, num_inference_steps 4, guidance_scale 4.5\n" in printed
    assert len(list((tmp_path / "data").rglob("*.png"))) == 10


def test_a_scheduler_that_does_not_fit(models, tmp_path):
    from diffusers import DDIMScheduler
    tiny_flux(tmp_path / "misfit", scheduler=DDIMScheduler())
    message = generate(*command(models, tmp_path / "data", distilled=tmp_path / "misfit"))
    assert_refused(message, f"--distilled {tmp_path / 'misfit'}", "ValueError in ", "DDIMScheduler", "--plan-only")


def test_distilled_images_made_elsewhere(models, tmp_path):
    """--plan-only, then a script of the user's own, which forgets one and takes the wrong size for another."""
    out = tmp_path / "data"
    line = command(models, out, distilled="student.pt")
    generate(*line, "--plan-only")
    paths = [out / row["split"] / "distilled" / f"{int(row['index']):06d}.png" for row in rows_of(out)]
    for path, mode in zip(paths[:4], ("RGB", "RGBA", "L", "P")):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert(mode).save(path)
    before = stamps(out)
    assert_refused(generate(*line), "student.pt", "missing: 1", str(paths[4]), "--plan-only", "--trust-remote-code")
    paths[4].parent.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(paths[4])
    assert_refused(generate(*line), str(paths[4]), "64x64", "--size 32")
    Image.new("RGB", (32, 32)).save(paths[4])
    printed = generate(*line)
    assert "distilled, all images exist" in printed and "baseline, 5 images" in printed
    assert before.items() <= stamps(out).items() and len(list(out.rglob("baseline/*.png"))) == 5


# ------------------------------------------------------------------------------------------------- kill and bad input
def kill_and_restart(arguments, out, expected, rng, least):
    """Kills a run once a random number of images is there, starts it again, and compares everything."""
    process = subprocess.Popen([sys.executable, REPO / "generate_pairs.py", *map(str, arguments), "--out", out],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = rng.randrange(least, len(expected) * 3 // 4)
    while len(list(out.rglob("*.png"))) < enough and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = stamps(out)
    for path in before:
        Image.open(path).load()                                           # whole, or not there
    generate(*arguments, "--out", out)
    assert before.items() <= stamps(out).items()                          # none rewritten
    assert content(out) == expected                                       # no temporary file either


MINI = ["--mini", "--count", 40, "--batch-size", 4, "--size", 256]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "data"
    generate(*MINI, "--out", out)
    return out


def test_mini_on_two_ranks_in_two_goes(mini, tmp_path):
    generate(*MINI, "--distilled-only", "--out", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("baseline"))
    run("generate_pairs.py", *MINI, "--out", tmp_path / "data", torchrun=2)
    assert content(tmp_path / "data") == content(mini)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 11))])
def test_sigkill_and_restart(mini, tmp_path, seed):
    kill_and_restart(MINI, tmp_path / "data", content(mini), random.Random(seed), least=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_and_restart_flux(flux, models, tmp_path, seed):
    kill_and_restart(command(models, None)[:-2], tmp_path / "data", content(flux), random.Random(seed), least=0)


@pytest.mark.parametrize("flag, value", [("--strength", 0.5), ("--seed", 1), ("--batch-size", 8), ("--prompt", "a hat"),
                                         ("--baseline", "other"), ("--count", 41), ("--distilled-guidance", 3.5)])
def test_other_settings_than_the_plan_s_are_refused(mini, flag, value):
    before = content(mini)
    assert_refused(generate(*MINI, flag, value, "--out", mini), f"{flag} ", repr(value), "args.json", "--out")
    assert content(mini) == before


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
])
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("ok.txt").write_text("Ann Lee")
    Path("empty.txt").write_text("\n \n")
    Path("nobody.tsv").write_text(IMDB.replace("act", "backst"), encoding="utf-8")
    Path("latin1.txt").write_bytes("Zoë Kravitz".encode("latin1"))
    Path("cut.tsv.gz").write_bytes(gzip.compress(IMDB.encode())[:-20])
    assert_refused(generate(*flags, "--device", "cpu"), *words)
    assert not Path("data").exists()


def test_a_model_that_is_not_available(models, tmp_path):
    """Neither a folder nor, without the network, a model of the hub; then a folder with damaged weights."""
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        message = generate(*command(models, tmp_path / "a", "--distilled", "black-forest-labs/FLUX.9-schnell"))
    assert_refused(message, "--distilled black-forest-labs/FLUX.9-schnell", "licence", "hf auth login", "local folder")
    shutil.copytree(models / "schnell", tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    message = generate(*command(models, tmp_path / "b", distilled=tmp_path / "broken"))
    assert_refused(message, f"--distilled {tmp_path}/broken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_no_gpu(tmp_path):
    assert_refused(generate("--prompt", "p", "--out", tmp_path / "data"), "CUDA", "36 GB", "--mini", "--plan-only")
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_lora_without_peft():
    assert_refused(generate("--prompt", "p", "--lora", "some/lora", "--device", "cpu"), "pip install peft")


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for the full disk: both fail a write halfway, with an OSError."""
    shell = f"ulimit -f 5; exec {sys.executable} {REPO}/generate_pairs.py --mini --count 8 --out {tmp_path}/data"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert_refused(done.stderr, "File too large", "continues")
    assert set(content(tmp_path / "data")) == {"pairs.csv", "args.json"}


@pytest.mark.slow
def test_a_million_rows_take_little_memory(tmp_path):
    code = ("import resource as r, sys, generate_pairs as g; peak = lambda: r.getrusage(r.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); g.choose_names(g.read_names(sys.argv[1]), 140_000, 0); print(peak() - before)")
    with open(tmp_path / "names.tsv", "w", encoding="utf-8") as file:
        file.write(IMDB.splitlines(True)[0])
        file.writelines(f"nm{i}\tFirst{i} Last{i % 9}\t1950\t\\N\tactor,writer\ttt1\n" for i in range(1_000_000))
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "names.tsv"], cwd=REPO, check=True,
                          capture_output=True, text=True)
    assert int(done.stdout) < 200_000  # KiB, on Linux


# ------------------------------------------------------------------------------------------------------ the miniature
def test_mini_by_default(tmp_path):
    out = tmp_path / "mini"
    assert "256 training and 64 test pairs" in generate("--mini", "--out", out)
    for split, count in (("train", 256), ("test", 64)):
        folders = [sorted(path.name for path in (out / split / stage).iterdir()) for stage in ("distilled", "baseline")]
        assert len(folders[0]) == count and folders[0] == folders[1]
    assert len({path.read_bytes() for path in out.rglob("*.png")}) == 640


def test_mini_pixels():
    """Tile and filter, written anew with NumPy."""
    row, args = {"index": 47}, SimpleNamespace(size=64)
    tile = Image.open(REPO / "assets" / "portraits.jpg").crop((7 * 128, 2 * 128, 8 * 128, 3 * 128))
    baseline, = generate_pairs.mini_images(args, "baseline", [row])
    assert np.array_equal(baseline, tile.resize((64, 64), Image.Resampling.LANCZOS))
    x = np.asarray(tile.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.MedianFilter(3))) / 255
    x = 1.25 * x - 0.25 * x.mean(2, keepdims=True)
    x = (x + 0.35 * np.maximum(x @ [0.299, 0.587, 0.114] - 0.5, 0)[..., None]) * [1.06, 1, 0.9]
    expected = Image.fromarray(np.uint8(x.clip(0, 1) * 255 + 0.5)).resize((64, 64), Image.Resampling.LANCZOS)
    distilled, = generate_pairs.mini_images(args, "distilled", [row])
    assert np.abs(np.int16(distilled) - np.int16(expected)).max() <= 2  # rounding
