"""generate_pairs.py: names, plan, both diffusion stages on tiny models, ranks, kill and resume, the miniature."""
import csv
import gzip
import importlib.util
import json
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import generate_pairs
from conftest import REPO, run
from tiny_models import tiny_flux, tiny_sd3

NAMES = ["Ann Lee", 'Sammy "Slick" Li', "Zoë Åström", "Bo Derek", "Cy Young"]


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
    random.Random(0).shuffle(names)
    assert generate_pairs.choose_names(names, 50, seed=3) == chosen
    more = generate_pairs.choose_names(names + [f"New Person{i}" for i in range(2000)], 50, seed=3)
    old = [name for name in more if not name.startswith("New")]
    assert old == chosen[:len(old)] and len(old) > 20
    assert generate_pairs.choose_names(names, 50, seed=4) != chosen


def test_the_hash_is_no_process_s_own():
    """Python salts hash() anew in each process; a plan made on another day or machine must not change."""
    assert generate_pairs.stable_hash(0, "Zoë Åström") == 16837824067877703919


def make_args(**changes):
    args = dict.fromkeys(generate_pairs.SETTINGS.values()) | dict(
        names=None, prompt="a {name}", count=300, test_fraction=0.02, seed=0)
    return type("Args", (), args | changes)()


def test_splits_and_seeds(tmp_path):
    rows = generate_pairs.make_plan(make_args())
    assert [row["index"] for row in rows] == list(range(300))
    assert sum(row["split"] == "test" for row in rows) == 6
    assert sum(row["split"] == "test" for row in rows[:150]) == 3          # spread evenly
    used = [generate_pairs.stage_seed(row, stage) for row in rows for stage in ("distilled", "baseline")]
    assert len({seed % 2**32 for seed in used}) == 600                     # all that the CPU generator looks at
    assert not set(used) & {row["seed"] for row in generate_pairs.make_plan(make_args(seed=1))}

    (tmp_path / "names.txt").write_text("\n".join(f"Name {i}" for i in range(100)), encoding="utf-8")
    rows = generate_pairs.make_plan(make_args(names=tmp_path / "names.txt", test_fraction=0.1))
    split = {(row["name"], row["split"]) for row in rows}
    assert len(split) == 100 and sum(s == "test" for _, s in split) == 10  # used three times, in one split each
    assert rows[0]["prompt"] == "a " + rows[0]["name"]


# ---------------------------------------------------------------------------------------------- the diffusion stages
RECORDER = """
import json, runpy, sys
import diffusers
log = open(sys.argv.pop(1), "a")
def record(owner, name, describe):
    inner = getattr(owner, name)
    def outer(self, *args, **kwargs):
        log.write(json.dumps([type(self).__name__, describe(self, kwargs)]) + "\\n"), log.flush()
        return inner(self, *args, **kwargs)
    import functools
    setattr(owner, name, functools.wraps(inner)(outer))
record(diffusers.FluxTransformer2DModel, "forward", lambda self, k: [
    None if k["guidance"] is None else k["guidance"].tolist(), list(k["encoder_hidden_states"].shape)])
record(diffusers.SD3Transformer2DModel, "forward", lambda self, k: list(k["hidden_states"].shape))
for name in ("FluxPipeline", "FluxImg2ImgPipeline", "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"):
    record(getattr(diffusers, name), "encode_prompt", lambda self, k: k["prompt"])
script = sys.argv.pop(1)
sys.argv[0] = script
sys.path.insert(0, script.rsplit("/", 1)[0])
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_flux(folder / "schnell"), tiny_flux(folder / "dev", guidance_embeds=True)
    tiny_sd3(folder / "turbo"), tiny_sd3(folder / "large", seed=1)
    (folder / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return folder


def command(models, out, *more, distilled="schnell", baseline="dev"):
    return ["--names", models / "names.txt", "--count", 5, "--batch-size", 2, "--test-fraction", 0.2, "--size", 32,
            "--distilled", models / distilled, "--baseline", models / baseline, "--device", "cpu", "--out", out, *more]


def recorded(models, out, log, *more, **names):
    """Runs generate_pairs.py with every call of prompt encoder and transformer written down."""
    done = subprocess.run([sys.executable, "-c", RECORDER, str(log), str(REPO / "generate_pairs.py"),
                           *map(str, command(models, out, *more, **names))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def flux(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    return folder / "data", recorded(models, folder / "data", folder / "log")


def test_flux_runs_the_paper_s_recipe(flux, models):
    out, calls = flux
    schnell = [what for who, what in calls if who == "FluxTransformer2DModel" and what[0] is None]
    dev = [what for who, what in calls if who == "FluxTransformer2DModel" and what[0] is not None]
    assert len(schnell) == 3 * 4 and len(dev) == 3 * 35                    # 3 batches; 35 of 50 steps at strength 0.7
    assert all(shape == [2, 256, 32] for _, shape in schnell)              # the last batch, of one row, is padded
    assert all(guidance == [3.0, 3.0] and shape == [2, 512, 32] for guidance, shape in dev)
    rows = rows_of(out)
    assert sorted(row["name"] for row in rows) == sorted(NAMES)
    for pipeline in ("FluxPipeline", "FluxImg2ImgPipeline"):
        prompts = [prompt for who, what in calls if who == pipeline for prompt in what]
        assert prompts == [f"A professional portrait of {row['name']}" for row in rows + rows[-1:]]


def test_flux_files(flux, models):
    out, _ = flux
    rows = rows_of(out)
    assert [row["index"] for row in rows] == list("01234")
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"]
    assert set(content(out)) == {"pairs.csv"} | {f"{row['split']}/{stage}/{int(row['index']):06d}.png"
                                                 for row in rows for stage in ("distilled", "baseline")}
    for row in rows:
        assert (row["strength"], row["guidance"], row["baseline_steps"]) == ("0.7", "3.0", "50")
        for stage, seed, steps in (("distilled", 0, "4"), ("baseline", 1, "50")):
            with Image.open(out / row["split"] / stage / f"{int(row['index']):06d}.png") as image:
                assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
                model = models / {"distilled": "schnell", "baseline": "dev"}[stage]
                assert image.text == {"prompt": row["prompt"], "seed": str(int(row["seed"]) + seed),
                                      "steps": steps, "model": str(model)}


def test_flux_pixels_are_those_of_plain_diffusers(flux, models):
    """The recipe of the PNG text, given to the two pipelines by hand, each with encoders of its own."""
    from diffusers import FluxImg2ImgPipeline, FluxPipeline
    out, _ = flux
    ones, twos = ([Image.open(out / "train" / stage / f"{i:06d}.png") for i in (2, 3)]
                  for stage in ("distilled", "baseline"))

    def common(images):
        return dict(prompt=[image.text["prompt"] for image in images], height=32, width=32,
                    generator=[torch.Generator().manual_seed(int(image.text["seed"])) for image in images])

    first = FluxPipeline.from_pretrained(models / "schnell")(
        num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256, **common(ones)).images
    second = FluxImg2ImgPipeline.from_pretrained(models / "dev")(
        image=ones, strength=0.7, num_inference_steps=50, guidance_scale=3.0, max_sequence_length=512,
        **common(twos)).images
    assert all(np.array_equal(a, b) for a, b in zip(first + second, ones + twos))
    assert all(np.abs(np.float32(a) - np.float32(b)).mean() > 1 for a, b in zip(ones, twos))  # it does something


def test_sd3_family_and_other_domains(models, tmp_path):
    calls = recorded(
        models, tmp_path / "data", tmp_path / "log", "--prompt", "A photo of {name}, {studio}", "--distilled-steps", 2,
        "--baseline-steps", 10, "--guidance", 4.5, distilled="turbo", baseline="large")
    shapes = [what for who, what in calls if who == "SD3Transformer2DModel"]
    assert shapes.count([2, 4, 4, 4]) == 3 * 2
    assert shapes.count([4, 4, 4, 4]) == 3 * 7                             # guidance doubles the batch
    rows = rows_of(tmp_path / "data")
    assert len(content(tmp_path / "data")) == 11 and rows[0]["prompt"] == f"A photo of {rows[0]['name']}, {{studio}}"


@pytest.mark.parametrize("ranks, more", [pytest.param(2, [], marks=pytest.mark.slow), (3, ["--offload"])])
def test_any_number_of_ranks_writes_the_same_bytes(flux, models, tmp_path, ranks, more):
    run("generate_pairs.py", *command(models, tmp_path / "data", *more), torchrun=ranks)
    assert content(tmp_path / "data") == content(flux[0])


def test_resume_keeps_files_and_bytes(flux, models, tmp_path):
    """What a killed run may leave: a batch cut in half, baseline images missing, temporary files."""
    out = tmp_path / "data"
    shutil.copytree(flux[0], out)
    for lost in ("train/distilled/000001.png", "train/baseline/000001.png", "test/baseline/000004.png"):
        (out / lost).unlink()
    (out / "train" / "baseline" / ".000003.png.0123abcd.tmp").write_bytes(b"half")
    (out / ".pairs.csv.0123abcd.tmp").write_bytes(b"half")
    (out / "train" / "mine.png").write_bytes(b"not ours")
    before = stamps(out)
    assert "rank 0 of 1: distilled + baseline, 3 pairs" in run("generate_pairs.py", *command(models, out)).stdout
    assert before.items() <= stamps(out).items()
    (out / "train" / "mine.png").unlink()
    assert content(out) == content(flux[0])


def test_plain_prompt_needs_no_names(models, tmp_path):
    run("generate_pairs.py", "--prompt", "A professional business portrait", "--count", 3, "--distilled-only",
        "--distilled", models / "schnell", "--size", 32, "--device", "cpu", "--batch-size", 3, "--out", tmp_path)
    images = [Image.open(path) for path in sorted(tmp_path.rglob("*.png"))]
    assert len(images) == 3 and not list(tmp_path.rglob("baseline"))
    assert {image.text["prompt"] for image in images} == {"A professional business portrait"}
    assert len({image.tobytes() for image in images}) == 3


# ------------------------------------------------------------------------------------------------- kill and bad input
def kill_and_restart(arguments, out, expected, rng, least):
    """Kills a run once a random number of images is there, starts it again, and compares everything."""
    process = subprocess.Popen([sys.executable, REPO / "generate_pairs.py", *map(str, arguments), "--out", out],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    enough = rng.randrange(least, len(expected) - 5)
    while len(list(out.rglob("*.png"))) < enough and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = stamps(out)
    for path in before:
        Image.open(path).load()                                           # whole, or not there
    run("generate_pairs.py", *arguments, "--out", out)
    assert before.items() <= stamps(out).items()                          # none rewritten
    assert content(out) == expected                                       # no temporary file either


MINI = ["--mini", "--count", 40, "--batch-size", 4]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    out = tmp_path_factory.mktemp("mini") / "data"
    run("generate_pairs.py", *MINI, "--out", out)
    return out


def test_mini_on_two_ranks_in_two_goes(mini, tmp_path):
    run("generate_pairs.py", *MINI, "--distilled-only", "--out", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("baseline"))
    run("generate_pairs.py", *MINI, "--out", tmp_path / "data", torchrun=2)
    assert content(tmp_path / "data") == content(mini)


@pytest.mark.parametrize("seed", [0, 1])
def test_sigkill_and_restart(mini, tmp_path, seed):
    kill_and_restart(MINI, tmp_path / "data", content(mini), random.Random(seed), least=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_sigkill_and_restart_many_times(mini, tmp_path, seed):
    kill_and_restart(MINI, tmp_path / "data", content(mini), random.Random(100 + seed), least=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_and_restart_flux(flux, models, tmp_path, seed):
    arguments = command(models, None)[:-2]
    kill_and_restart(arguments, tmp_path / "data", content(flux[0]), random.Random(seed), least=1)


def assert_one_line(done, *words):
    """Exit code 1, and one line on stderr that starts with "error:" and has the words in it."""
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """A function from command line to error message. Runs the script in this process: a tenth of a second each."""
    def refuse(*flags):
        monkeypatch.setattr(sys, "argv", ["generate_pairs.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(REPO / "generate_pairs.py"), run_name="__main__")
        assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
        return stop.value.code
    monkeypatch.chdir(tmp_path)
    return refuse


@pytest.mark.parametrize("flag, value", [("--strength", 0.5), ("--seed", 1), ("--batch-size", 8), ("--prompt", "a hat"),
                                         ("--baseline", "other"), ("--count", 41), ("--lora-weight", "w.safetensors")])
def test_other_settings_than_the_plan_s_are_refused(mini, refusal, flag, value):
    before = content(mini)
    message = refusal(*MINI, flag, value, "--out", mini)
    assert all(word in message for word in (f"{flag} ", repr(str(value)), "pairs.csv", "--out"))
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
])
def test_bad_input_ends_in_one_line(tmp_path, refusal, flags, words):
    (tmp_path / "ok.txt").write_text("Ann Lee")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "nobody.tsv").write_text(IMDB.replace("act", "backst"), encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("Zoë Kravitz".encode("latin1"))
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(IMDB.encode())[:-20])
    message = refusal(*flags, "--device", "cpu")
    assert all(word in message for word in words), message
    assert not (tmp_path / "data").exists()


def test_a_model_that_cannot_be_had(models, tmp_path):
    """Neither a folder nor, without the network, a model of the hub; then a folder with damaged weights."""
    done = run("generate_pairs.py", *command(models, tmp_path / "a", "--baseline", "black-forest-labs/FLUX.9-dev"),
               check=False, env={"HF_HUB_OFFLINE": "1"})
    assert_one_line(done, "--baseline black-forest-labs/FLUX.9-dev", "licence", "hf auth login", "local folder")
    shutil.copytree(models / "schnell", tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    done = run("generate_pairs.py", *command(models, tmp_path / "b", "--distilled", tmp_path / "broken"), check=False)
    assert_one_line(done, f"--distilled {tmp_path}/broken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_no_gpu(tmp_path):
    (tmp_path / "ok.txt").write_text("Ann Lee")
    assert_one_line(run("generate_pairs.py", "--names", "ok.txt", check=False, cwd=tmp_path), "CUDA", "60 GB", "--mini")
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_lora_without_peft(refusal):
    assert "pip install peft" in refusal("--prompt", "p", "--lora", "some/lora", "--device", "cpu")


def test_a_full_disk(tmp_path):
    """A limit on the size of files stands for the full disk: both fail a write halfway, with an OSError."""
    shell = f"ulimit -f 5; exec {sys.executable} {REPO}/generate_pairs.py --mini --count 8 --out {tmp_path}/data"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert_one_line(done, "File too large", "goes on")
    assert set(content(tmp_path / "data")) == {"pairs.csv"}


@pytest.mark.slow
def test_a_million_rows_at_constant_memory(tmp_path):
    """The peak may not grow with the file: 100,000 and 1,000,000 rows, of which 1,000 are chosen."""
    code = ("import resource, sys, generate_pairs as g; names = g.choose_names(g.read_names(sys.argv[1]), 1000, 0); "
            "assert len(names) == 1000; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for rows in (100_000, 1_000_000):
        with open(tmp_path / "names.tsv", "w", encoding="utf-8") as file:
            file.write(IMDB.splitlines(True)[0])
            file.writelines(f"nm{i}\tFirst{i} Last{i % 9}\t1950\t\\N\tactor,writer\ttt1\n" for i in range(rows))
        peaks.append(int(subprocess.run([sys.executable, "-c", code, str(tmp_path / "names.tsv")], cwd=REPO, check=True,
                                        capture_output=True, text=True).stdout))
    assert peaks[1] < peaks[0] + 10_000  # KiB


# ------------------------------------------------------------------------------------------------------ the miniature
def test_mini_by_default(tmp_path):
    out = run("generate_pairs.py", "--mini", cwd=tmp_path).stdout
    assert "256 training and 64 test pairs" in out
    for split, count in (("train", 256), ("test", 64)):
        folders = [sorted(path.name for path in (tmp_path / "data" / "mini" / split / stage).iterdir())
                   for stage in ("distilled", "baseline")]
        assert len(folders[0]) == count and folders[0] == folders[1]
    assert len({path.read_bytes() for path in (tmp_path / "data" / "mini").rglob("*.png")}) == 640


def test_mini_is_pure_and_paired():
    """Same scene and style, same pixels; edges of a pair agree; the baseline is darker and has finer texture."""
    def edges(x):  # strength of the luma's gradient
        return np.hypot(np.diff(x, axis=0)[:, :-1], np.diff(x, axis=1)[:-1])
    def draw(seed, style):
        return np.float32(generate_pairs.draw_portrait(generate_pairs.random_scene(seed), style, 64).convert("L"))
    same, other, darker, finer = [], [], [], []
    for seed in range(12):
        distilled, baseline = draw(seed, "distilled"), draw(seed, "baseline")
        assert np.array_equal(distilled, draw(seed, "distilled"))
        match = lambda a, b: np.corrcoef(edges(a).ravel(), edges(b).ravel())[0, 1]
        same.append(match(distilled, baseline)), other.append(match(distilled, draw(seed + 100, "baseline")))
        darker.append(baseline.mean() < distilled.mean())
        detail = lambda x: np.abs(np.diff(x, n=2, axis=1)[12:40, 18:46]).mean() / x[12:40, 18:46].mean()
        finer.append(detail(baseline) > detail(distilled))
    assert all(darker) and all(finer) and min(same) > max(other)
