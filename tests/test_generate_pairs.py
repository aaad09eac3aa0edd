"""generate_pairs.py: names, plan, both diffusion stages on tiny models, other students, ranks, kills, the miniature."""
import csv
import gzip
import io
import json
import os
import runpy
import shutil
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
from safetensors.torch import load_file, save_file

import generate_pairs
import modules
from conftest import REPO, run
from tiny_models import tiny_flux, tiny_sd3, tiny_student

OUT = Path("data")  # the script's default
STAGES = "distilled", "baseline"
PLAN = {"pairs.csv", "args.json"}
MINI = "--mini --count 40 --batch-size 4 --size 128 --out data".split()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def generate(*flags, **replaced):
    """Runs the script in this process, some of modules.py replaced. Returns its output, with the line that ended it."""
    printed, errors = io.StringIO(), io.StringIO()
    with (mock.patch.multiple(sys, argv=["generate_pairs.py", *map(str, flags)], stdout=printed, stderr=errors),
          mock.patch.multiple(modules, **{"RANK": 0} | replaced)):
        try:
            runpy.run_path(str(REPO / "generate_pairs.py"), run_name="__main__")
        except SystemExit as stop:
            line = stop.code if stop.code != 2 else errors.getvalue().split("generate_pairs.py: ")[-1]  # 2: argparse
            assert line.startswith("error: ") and "\n" not in line.strip()
            print(line.strip())
    return printed.getvalue()


def assert_refused(printed, *words):
    message = printed.splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message


def rows_of(folder=OUT):
    return list(csv.DictReader((folder / "pairs.csv").read_text(encoding="utf-8").splitlines()))


def image_names(rows, *stages):
    return {f"{row['split']}/{stage}/{int(row['index']):06d}.png" for row in rows for stage in stages}


def content(folder=OUT):
    """{relative path: bytes} of every file, hidden ones but the locks included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not path.name.startswith(".lock")}


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


def test_names_from_files_and_pipes():
    actors = ["Fred Astaire", 'Dwayne "The Rock" Johnson', "Penélope Cruz", "Fred Astaire", '"Weird Al Yankovic',
              "Last Line"]
    cars = "\ufeffCorvette\r\n\r\n  Citroën   DS \r\nCorvette\r\n"  # single words stay, blank lines do not
    for data, names in ((IMDB.encode(), actors), (gzip.compress(IMDB.encode()), actors),
                        (IMDB.split("\n", 1)[1].encode(), actors),  # without the header
                        (cars.encode(), ["Corvette", "Citroën DS", "Corvette"])):
        Path("names").write_bytes(data)
        assert list(generate_pairs.read_names("names")) == names
        reader, writer = os.pipe()
        os.write(writer, data), os.close(writer)
        assert list(generate_pairs.read_names(f"/dev/fd/{reader}")) == names
        os.close(reader)


def test_one_spelling_a_person():
    """Composed and decomposed letters, and what nobody sees; but a joiner that some scripts are written with stays."""
    Path("names").write_text("Jos\u00e9 F\nJose\u0301 F\n\ufeffAda L\nA\u00adda\u200b L\n\u200fAda L\n\u0646\u200c\u0645\n")
    assert [*generate_pairs.read_names("names")] == ["Jos\u00e9 F"] * 2 + ["Ada L"] * 3 + ["\u0646\u200c\u0645"]


def test_choice_is_the_lowest_hashes_and_ignores_unrelated_rows():
    names = [f"First{i % 700} Last{i % 900}" for i in range(20000)]
    chosen = generate_pairs.choose_names(names, 50, seed=3)
    assert chosen == sorted(set(names), key=lambda name: generate_pairs.stable_hash(3, name))[:50]
    more = generate_pairs.choose_names([f"New Person{i}" for i in range(2000)] + names, 50, seed=3)
    assert [name for name in more if not name.startswith("New")] == chosen[:sum(not n.startswith("New") for n in more)]
    # Python salts hash() anew in each process; a plan made on another day or machine must not change.
    assert generate_pairs.stable_hash(0, "Zoë Åström") == 16837824067877703919


def test_splits_and_seeds():
    args = SimpleNamespace(names=None, prompt="a {name}", count=300, test_fraction=0.02, seed=0)
    rows = generate_pairs.make_plan(args)
    assert [row["index"] for row in rows] == list(range(300))
    assert [row["index"] for row in rows if row["split"] == "test"] == [49, 99, 149, 199, 249, 299]
    used = [generate_pairs.stage_seed(row, stage) for row in rows for stage in STAGES]
    assert len({seed % 2**32 for seed in used}) == 600  # all that the CPU generator looks at
    args.seed = 1
    assert not set(used) & {row["seed"] for row in generate_pairs.make_plan(args)}

    Path("names.txt").write_text("\n".join(f"Name {i}" for i in range(100)))
    args.names, args.test_fraction = Path("names.txt"), 0.1
    rows = generate_pairs.make_plan(args)
    split = {(row["name"], row["split"]) for row in rows}
    assert len(split) == 100 and sum(s == "test" for _, s in split) == 10  # used three times, in one split each
    assert rows[0]["prompt"] == "a " + rows[0]["name"]
    for args.count in (40, 100, 250):  # a larger --count keeps the rows, with names to spare or not
        assert generate_pairs.make_plan(args) == rows[:args.count]


def test_defaults_are_the_paper_s():
    Path("names.txt").write_text("\n".join(f"Name {i}" for i in range(200)))
    assert "137200 training and 2800 test pairs" in generate("--names", "names.txt", "--plan-only")
    assert set(content()) == PLAN
    assert json.loads((OUT / "args.json").read_text()).items() >= {
        "prompt": "A professional portrait of {name}", "size": 512, "distilled": "black-forest-labs/FLUX.1-schnell",
        "baseline": "black-forest-labs/FLUX.1-dev", "baseline_steps": 50, "strength": 0.7, "guidance": 3.0}.items()


# ---------------------------------------------------------------------------------------------- the diffusion stages
def command(made, *more):
    return ["--names", made / "names.txt", "--count", 5, "--test-fraction", 0.2, "--size", 32, "--batch-size", 2,
            "--distilled", made / "schnell", "--baseline", made / "dev", "--baseline-steps", 10,
            "--device", "cpu", *more]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two models, names, and two datasets made in one go, which others must equal to the byte."""
    folder = tmp_path_factory.mktemp("made")
    tiny_flux(folder / "schnell"), tiny_flux(folder / "dev", guidance_embeds=True)
    (folder / "names.txt").write_text('Ann Lee\nSammy "Slick" Li\nZoë Åström\nBo Derek\nCy Young', encoding="utf-8")
    generate(*command(folder, "--out", folder / "flux"))
    generate(*MINI, "--out", folder / "mini")
    return folder


def test_flux_pixels_are_those_of_plain_diffusers(made):
    """The paper's recipe, given to the two pipelines by hand; and what each image's text says of it."""
    rows = rows_of(made / "flux")
    assert [row["split"] for row in rows] == ["train"] * 4 + ["test"]
    assert set(content(made / "flux")) == PLAN | image_names(rows, *STAGES)
    ones, twos = ([Image.open(made / f"flux/train/{stage}/{i:06d}.png") for i in (2, 3)] for stage in STAGES)
    for images, seed, model in ((ones, 0, "schnell"), (twos, 1, "dev")):
        for image, row in zip(images, rows[2:]):
            assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
            assert row["prompt"] == image.text["prompt"] == f"A professional portrait of {row['name']}"
            assert image.text["seed"] == str(int(row["seed"]) + seed) and image.text["model"] == str(made / model)

    def common(images):
        return dict(prompt=[image.text["prompt"] for image in images], height=32, width=32,
                    generator=[torch.Generator().manual_seed(int(image.text["seed"])) for image in images])

    first = FluxPipeline.from_pretrained(made / "schnell")(
        num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256, **common(ones)).images
    dev = FluxImg2ImgPipeline.from_pretrained(made / "dev")
    recipe = dict(image=ones, strength=0.7, num_inference_steps=10, guidance_scale=3.0, max_sequence_length=512)
    assert all(np.array_equal(a, b) for a, b in zip(first + dev(**recipe, **common(twos)).images, ones + twos))
    for other in ({"strength": 0.6}, {"guidance_scale": 2.0}, {"max_sequence_length": 256}):  # each of them matters
        assert not np.array_equal(dev(**(recipe | other), **common(twos)).images[0], twos[0])


def test_any_ranks_and_stops_write_the_same_bytes(made):
    """Ranks are torchrun's variables. A killed run may leave half a batch, no baseline images, and damaged ones."""
    for rank in (2, 0, 1):
        printed = generate(*command(made), "--offload", RANK=rank, WORLD_SIZE=3)
        assert f"rank {rank} of 3: distilled, {[1, 2, 2][rank]} images" in printed
    assert content() == content(made / "flux")
    lost = [OUT / name for name in ("train/distilled/000000.png", "test/distilled/000004.png",
                                    "train/distilled/000001.png", "train/baseline/000001.png")]
    for path, left in zip(lost, (0, -100, None, None)):  # bytes of it, or nothing at all
        path.unlink() if left is None else path.write_bytes(path.read_bytes()[:left])
    before = {path: stamp for path, stamp in stamps().items() if path not in lost}
    printed = generate(*command(made, "--distilled", f"{made}/schnell/"))
    assert "rank 0 of 1: distilled, 3 images" in printed and "rank 0 of 1: baseline, 2 images" in printed
    assert before.items() <= stamps().items() and content() == content(made / "flux")
    lost[0].write_bytes(lost[0].read_bytes() + bytes(100))  # what some tools put behind the end is no damage
    before = stamps()
    assert "distilled, nothing to make" in generate(*command(made)) and before == stamps()


def test_a_prompt_is_the_plans_and_is_read_whole(made):
    """An image of another prompt than the plan's, as after a spreadsheet; and a prompt longer than the model reads."""
    shutil.copytree(made / "flux", OUT)
    plan = OUT / "pairs.csv"
    name = rows_of()[0]["name"]
    plan.write_text(plan.read_text().replace(name, "1-May"))
    next(OUT.rglob("baseline/*.png")).unlink()
    before = stamps()
    assert_refused(generate(*command(made)), f"of {name}", "of 1-May", "restore pairs.csv")
    assert stamps() == before
    printed = generate(*command(made, "--prompt", "soft light, " * 30 + "{name}", "--out", "long"))
    assert_refused(printed, "5 of 5 prompts", "256 tokens", "shorter --prompt")
    assert not any(Path("long").rglob("*.png"))


def test_small_gpus_offload_by_default(capsys):
    for gigabytes, offload, offloads in ((24, None, True), (80, None, False), (24, False, False), (80, True, True)):
        pipe, gpu = mock.Mock(), SimpleNamespace(total_memory=gigabytes * 1e9)
        with mock.patch("torch.cuda.get_device_properties", return_value=gpu):
            modules.place_pipeline(pipe, "cuda", offload)
        assert pipe.enable_group_offload.called == offloads == (not pipe.to.called)
        assert ("--offload" in capsys.readouterr().out) == (offload is None and offloads)


@pytest.mark.slow
def test_torchrun_writes_the_same_bytes_and_stops_no_rank_early(made):
    """One rank's images are of no use: it fails only when the other has made its own."""
    run("generate_pairs.py", *command(made), torchrun=2)
    assert content() == content(made / "flux")
    Image.new("RGB", (32, 32)).save(OUT / "train/distilled/000000.png")
    shutil.rmtree(OUT / "train/baseline"), shutil.rmtree(OUT / "test/baseline")
    done = run("generate_pairs.py", *command(made), torchrun=2, check=False)
    assert done.returncode == 1 and "1 images could not be made: data/train/baseline/000000.png" in done.stderr
    assert len(list(OUT.rglob("baseline/*.png"))) == 4


def test_other_models_and_domains(made):
    """The SD3 family; and the plain-prompt set by a student that embeds its guidance."""
    tiny_sd3("turbo", seed=0), tiny_sd3("large", seed=1)
    generate(*command(made, "--prompt", "{name}, {studio}", "--distilled", "turbo", "--baseline", "large"))
    row = rows_of()[0]
    assert len(content()) == 12 and row["prompt"] == f"{row['name']}, {{studio}}"
    assert [Image.open(OUT / f"train/{stage}/000000.png").text["guidance_scale"] for stage in STAGES] == ["0.0", "3.0"]
    printed = generate("--prompt", "A business portrait", "--count", 3, "--distilled-only", "--out", "b",
                       "--batch-size", 3, "--distilled", made / "dev", "--size", 32, "--device", "cpu")
    assert "guidance_scale 3.5, max_sequence_length 512" in printed and not list(Path("b").rglob("baseline"))
    assert len({Image.open(path).tobytes() for path in Path("b").rglob("*.png")}) == 3


def test_lora(made):
    """Table 4's LoRA row: the same prompts and seeds, other pixels."""
    pytest.importorskip("peft")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.eye(4, 32), f"{layer}.lora_B.weight": torch.eye(32, 4)}, "x.safetensors")
    generate(*command(made, "--lora", ".", "--lora-weight", "x.safetensors", "--distilled-only"))
    plain, lora = (Image.open(folder / "test/distilled/000004.png") for folder in (made / "flux", OUT))
    assert rows_of() == rows_of(made / "flux") and plain.text["seed"] == lora.text["seed"]
    assert lora.text["model"].endswith(f" + {os.getcwd()}") and plain.tobytes() != lora.tobytes()


@pytest.mark.parametrize("listed, weight, keys", [(True, 1.0, 1), (True, 0.0, 1), (False, 1.0, 1), (True, 1.0, 2)])
def test_every_key_of_a_lora_must_fit(made, listed, weight, keys):
    """A stand-in for peft leaves in the pipeline what loading does: nothing where the keys fit no layer."""
    def load(pipe, *_, **__):
        pipe.transformer.proj_out.lora_B = torch.nn.Linear(4, 32, bias=False)
        torch.nn.init.constant_(pipe.transformer.proj_out.lora_B.weight, weight)

    adapters = {"transformer": ["default_0"]} if listed else {}
    state = {f"{i}.lora_B.weight": torch.full((4, 4), weight) for i in range(keys)}
    with mock.patch.multiple(FluxPipeline, load_lora_weights=load, get_list_adapters=lambda _: adapters,
                             lora_state_dict=lambda *_, **__: state):
        printed = generate(*command(made, "--lora", "x", "--distilled-only", "--test-only"))
    works = listed and weight and keys == 1
    wrong = f"--lora x changes {keys * bool(weight)} layers, and {int(listed and weight > 0)} of this model"
    assert (wrong in printed) == (not works) != any(OUT.rglob("*.png"))


# ---------------------------------------------------------------------------------------------- other students
@pytest.mark.parametrize("denoiser, config, expected", [
    ("FluxTransformer2DModel", {"guidance_embeds": False}, (0, 256)),  # schnell
    ("FluxTransformer2DModel", {"guidance_embeds": True}, (8.5, 128)),  # FLUX.1-lite
    ("SD3Transformer2DModel", {}, (0, 128)),  # SD3.5 Turbo
    ("UNet2DConditionModel", {"time_cond_proj_dim": 256}, (8.5, 128))])  # LCM
def test_guidance_and_tokens_follow_the_model_or_the_flag(denoiser, config, expected):
    class Pipe:
        __module__ = "diffusers.pipelines"
        transformer = type(denoiser, (), {"config": config})()

        def __call__(self, prompt, guidance_scale=8.5, max_sequence_length=128): ...

    for guidance, tokens in (None, None), (1.0, 77):
        args = mock.Mock(distilled_guidance=guidance, distilled_tokens=tokens)
        call = generate_pairs.call_settings(args, "distilled", Pipe())
        assert (*call.values(),) == (guidance or expected[0], tokens or expected[1])


def test_a_student_with_code_of_its_own(made):
    """Its safety checker blackens one image, which is then neither saved nor given a baseline."""
    tiny_student("student")
    line = command(made, "--distilled", "student")
    assert_refused(generate(*line), "custom code in pipeline.py", "--trust-remote-code", ": 5, the first")
    with mock.patch("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", os.path.abspath("cache")):
        printed = generate(*line, "--trust-remote-code")  # diffusers copies the code to its cache, and runs that
    assert ("pipeline Student, height 32, width 32, num_inference_steps 4, guidance_scale 4.5, "
            "max_sequence_length 128\n" in printed)  # guidance and tokens are those of its own code
    lost = [row for row in rows_of() if row["name"] == "Bo Derek"]
    assert_refused(printed, "1 images could not be made", *image_names(lost, "distilled"))
    assert set(content()) == PLAN | image_names(rows_of(), *STAGES) - image_names(lost, *STAGES)


def test_images_of_no_use(made):
    """A NaN in one channel; in a batch, images that are NaN, black or marked unsafe; the last batch is padded."""
    shutil.copytree(made / "schnell", "nan")
    weights = load_file(path := "nan/vae/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    line = command(made, "--distilled", "nan")
    assert_refused(generate(*line), "5 images could not be made", "000004.png")
    waits = mock.Mock(side_effect=SystemExit("error: waits"))  # for other ranks, before the failure would stop them
    assert_refused(generate(*line, wait_for_ranks=waits), "error: waits")
    assert set(content()) == PLAN

    images = np.random.default_rng(0).uniform(size=(6, 8, 8, 3))
    images[1, 3, 3, 0], images[2] = np.nan, 0
    result = SimpleNamespace(images=images, nsfw_content_detected=[False, False, False, True, False, False])
    pipe = mock.Mock(return_value=result, numpy_to_pil=FluxPipeline.numpy_to_pil)
    args, row = SimpleNamespace(batch_size=6, size=8), {"prompt": "p", "seed": 1}
    images = generate_pairs.run_pipeline(args, "distilled", pipe, {}, [row] * 5)
    assert [image is not None for image in images] == [True, False, False, False, True, True]
    pipe.assert_called_once_with(prompt=["p"] * 6, generator=mock.ANY)


def test_models_that_do_not_work(made):
    """A model that, without the network, is on no hub; damaged weights; a scheduler that does not fit."""
    shutil.copytree(made / "schnell", "broken")
    Path("broken/vae/diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    tiny_flux("misfit", scheduler=DDIMScheduler())
    for model, *words in (("black-forest-labs/FLUX.9", "FLUX.9 does not work", "licence", "hf auth login", "folder"),
                          ("broken", "/broken does not work: "),
                          ("misfit", "/misfit does not work: ValueError: ", "DDIMScheduler", "--plan-only")):
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            assert_refused(generate(*command(made, "--distilled", model)), "--distilled ", *words)


def test_distilled_images_made_elsewhere(made):
    """--plan-only, then a script of the user's own, which forgets one, and gets two others wrong."""
    line = command(made, "--distilled", "student.pt")
    printed = generate(*line, "--plan-only")
    *paths, last = [OUT / name for name in sorted(image_names(rows_of(), "distilled"), reverse=True)]
    assert f"save row 0 as {paths[-1]}, 32x32" in printed
    for path, mode in zip(paths, ("RGB", "RGBA", "L", "P")):
        modules.write_image(Image.effect_noise((32, 32), 50).convert(mode), path)
    before = stamps()
    assert_refused(generate(*line), "student.pt", "1, the first is " + str(last), "--plan-only", "--trust-remote-code")
    for wrong in (Image.effect_noise((64, 64), 50), Image.new("RGB", (32, 32))):
        modules.write_image(wrong, last)
        printed = generate(*line)
        assert_refused(printed, str(last).replace("distilled", "baseline"), "another --size or one colour")
    assert "distilled, nothing to make" in printed and len(list(OUT.rglob("baseline/*.png"))) == 4
    Image.effect_noise((32, 32), 50).save(last, "JPEG")  # whatever Pillow reads
    assert "baseline, 1 images" in generate(*line)
    assert before.items() <= stamps().items()


# ----------------------------------------------------------------------------------------------- going on, and kills
def test_settings_that_may_change(made):
    """Before the first image all of them; then --batch-size, and --count upwards, with the same names."""
    generate(*MINI, "--count", 30, "--seed", 5, "--test-fraction", 0.1, "--plan-only")
    generate(*MINI, "--count", 20, "--distilled-only", "--test-only")  # replaces the plan
    tests = [row for row in rows_of() if row["split"] == "test"]
    assert set(content()) == PLAN | image_names(tests, "distilled") and len(rows_of()) == 20
    before = stamps()
    printed = generate(*MINI, "--batch-size", 3)
    assert "goes on with count, batch_size changed" in printed and "same batches" in printed
    assert '"batch_size": 3' in (OUT / "args.json").read_text() and before.items() <= stamps().items()
    generate(*MINI)
    assert content() == content(made / "mini")
    assert_refused(generate(*MINI, "--count", 39), "the rows of data/pairs.csv", "can only grow")

    shutil.copytree(made / "flux", "flux")
    Path("names.txt").write_text("\n".join(f"New Name{i}" for i in range(9)))
    line = command(made, "--out", "flux", "--names", "names.txt")
    assert "distilled, nothing to make" in generate(*line)  # the file may be renewed meanwhile
    assert_refused(generate(*line, "--count", 6), "--count would not keep the rows", "first run")
    for flag, value in {"strength": 0.5, "seed": 1, "prompt": "{name}!", "baseline": "x", "size": 64}.items():
        assert_refused(generate(*line, f"--{flag}", value), f"--{flag} was ", f"is {value}", "another --out")
    assert content(Path("flux")) == content(made / "flux")


def test_a_damaged_plan_is_refused():
    line = "--mini", "--count", 8, "--out", "data"
    generate(*line, "--distilled-only")
    plan, settings = (OUT / name for name in ("pairs.csv", "args.json"))
    whole = plan.read_bytes()
    replaced = (b",", b";"), (b"train", b"Training"), (b"tile", b"t\xefle"), (b"tile", b"ti\0le"), (b"\n3", b"\n4")
    for path, *damages in ((plan, None, b"", whole.splitlines(True)[0], whole + b"8,train\n",
                            *(whole.replace(*change) for change in replaced)), (settings, None, b"", b"[]")):
        before = path.read_bytes()
        for damage in damages:
            path.unlink() if damage is None else path.write_bytes(damage)
            assert_refused(generate(*line), "one is missing" if damage is None else str(path), "estore it, or")
            assert not list(OUT.rglob("baseline"))
        path.write_bytes(before)
    plan.write_bytes(b"\xef\xbb\xbf" + whole)  # a mark at the start does no harm
    assert "baseline, 8 images" in generate(*line)


def test_sigkill_and_restart(made):
    """Killed once some images are there, and started again: all is as without the kill."""
    process = subprocess.Popen([sys.executable, REPO / "generate_pairs.py", *MINI], stdout=subprocess.DEVNULL)
    while len(stamps()) < 25 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() < 0
    before = stamps()
    generate(*MINI)  # what was there was whole: it stays, with the right bytes; and no temporary file is left
    assert before.items() <= stamps().items() and content() == content(made / "mini")


BAD_NAMES = {  # a file's name, what it holds, what is said of it
    "empty": (b"\n \n", "no usable name"), "nobody.tsv": (IMDB.replace("act", "x").encode(), "no usable name"),
    "latin1": ("Zoë".encode("latin1"), "UTF-8"), "cut.tsv.gz": (gzip.compress(IMDB.encode())[:-20], "end-of-stream"),
    "utf16": ("Ann Lee\nBo X\n".encode("utf-16-le"), "line 1"), "nul": (b"Ann Lee\nBo \0X", "line 2"),
    "table": (b"Ann Lee\nBo X\t1900\tactor\n", "line 2")}


@pytest.mark.parametrize("line, words", [
    ("", ["--names", "datasets.imdbws.com", "--mini"]), ("--names none", ["none", "No such file"]),
    *((f"--names {name}", [name, word]) for name, (_, word) in BAD_NAMES.items()),
    ("--names none --prompt hat", ["--names", "{name}"]), ("--prompt a\rhat", ["--prompt", r"a\rhat"]),
    ("--prompt caf\udce9", ["--prompt", "UTF-8"]), ("--prompt p --distilled caf\udce9", ["--distilled", "UTF-8"]),
    ("--prompt p --size 500", ["--size", "16"]), ("--mini --size 0", ["--size: 0"]),
    ("--prompt p --strength 0", ["--strength"]), ("--prompt p --strength 0.01", ["one of the --baseline-steps"]),
    ("--mini --test-fraction 2", ["between 0.0 and 1.0"]), ("--prompt p --count 0", ["--count"]),
    ("--mini --test-fraction 1", ["all 320 pairs", "--test-fraction"]), ("--mini --count 321", ["320 portraits"]), ("--prompt p --lora-weight x", ["--lora: give both"]),
    ("--mini --lora x --distilled-steps 2", ["--mini has no --distilled-steps, --lora"]),
    ("--prompt p --compile --offload", ["leave out"]), ("--prompt p --device cuda", ["CUDA", "--mini", "--plan-only"])])
def test_bad_input_ends_in_one_line(line, words):
    for name, (data, _) in BAD_NAMES.items():
        Path(name).write_bytes(data)
    with mock.patch("torch.cuda.device_count", return_value=0):
        assert_refused(generate("--device", "cpu", *filter(None, line.split(" "))), *words)
    assert not any(Path().rglob("*.png"))


def test_mini():
    """By default 320 pairs; pixels of tile and filter, written anew."""
    assert "256 training and 64 test pairs" in generate("--mini")
    files = content(OUT / "mini")
    assert set(files) == PLAN | image_names(rows_of(OUT / "mini"), *STAGES) and len(set(files.values())) == 642

    distilled, baseline = (Image.open(OUT / f"mini/train/{stage}/000047.png") for stage in STAGES)
    tile = Image.open(REPO / "assets/portraits.jpg").crop((7 * 128, 2 * 128, 8 * 128, 3 * 128))
    assert np.array_equal(baseline, tile.resize((64, 64), Image.Resampling.LANCZOS))

    def mean(x, weights):  # as one matrix over rows and columns, borders mirrored, applied in one go
        mirrored = np.pad(np.eye(64), ((20, 20), (0, 0)), mode="symmetric")
        matrix = np.stack([weights @ mirrored[i:i + 41] for i in range(64)]) / weights.sum()
        return np.einsum("ij,kl,jlc->ikc", matrix, matrix, x)

    x = np.asarray(baseline, float)
    places, gray = np.arange(-20, 21), x.mean(2, keepdims=True)
    box, (fine, wide) = abs(places) <= 3, (np.exp(-places ** 2 / (2 * sigma ** 2)) for sigma in (0.9, 4))
    variance = mean(gray ** 2, box) - mean(gray, box) ** 2
    kept = mean(variance / (variance + 1600), box)
    y = x - 0.9 * (1 - kept) * (x - mean(x, box)) + 0.2 * (mean(x, fine) - mean(x, wide))
    assert np.abs(np.asarray(distilled) - y.clip(0, 255)).max() <= 1
