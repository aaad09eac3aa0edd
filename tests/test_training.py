"""Both trainers through their command lines: two processes, kills, resumption, bad input, bad luck."""
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, run
from PIL import Image
from safetensors.torch import load_file

import modules
import train_cyclegan
import train_unet

TINY = {  # an epoch in about a second
    "train_cyclegan.py": ["--mini", "--channels", "4", "--blocks", "1", "--batch-size", "2", "--workers", "0", "--lr", "2e-4"],
    "train_unet.py": ["--mini", "--channels", "4", "--depth", "3", "--batch-size", "2", "--workers", "0", "--size", "32"]}
BOTH = pytest.mark.parametrize("script", TINY)


def train(script, data, out, *flags, **options):
    return run(script, *TINY[script], "--data", data, "--out", out, *flags, **options)


def log_of(out):
    return list(csv.DictReader(open(out / "log.csv", newline="")))


def state_of(out):
    """The folder of the state after the last whole epoch."""
    return out / "state" / str(len(log_of(out)) % 2)


def weights_of(out):
    """Everything in the last state that is a safetensors file, and the heads: {file/tensor name: tensor}."""
    files = [*state_of(out).glob("*.safetensors"), *out.glob("*/model.safetensors")]
    return {f"{file.parent.name}/{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal_runs(a, b):
    a_weights, b_weights = weights_of(a), weights_of(b)
    assert a_weights.keys() == b_weights.keys() and a_weights
    different = [name for name in a_weights if not torch.equal(a_weights[name], b_weights[name])]
    assert not different
    columns = ("seconds", "pairs_per_s")
    for x, y in zip(log_of(a), log_of(b), strict=True):
        assert {k: v for k, v in x.items() if k not in columns} == {k: v for k, v in y.items() if k not in columns}


@pytest.fixture(scope="module")
def undisturbed(mini_data, tmp_path_factory):
    """{script: run folder} of three epochs that nobody disturbed."""
    runs = {}
    for script in TINY:
        runs[script] = tmp_path_factory.mktemp("run") / script
        train(script, mini_data, runs[script], "--epochs", 3)
    return runs


# ------------------------------------------------------------------------------------------------------ what a run is
@BOTH
def test_run_folder(script, undisturbed):
    out = undisturbed[script]
    assert {p.name for p in out.iterdir()} == {"args.json", "log.csv", "samples", "best", "last", "state"}
    settings = json.loads((out / "args.json").read_text())
    assert settings["lr"] and settings["world_size"] == 1 and settings["versions"]["torch"] == torch.__version__.split("+")[0]
    rows = log_of(out)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert Image.open(out / "samples" / "epoch_0003.jpg").width == 3 * json.loads((out / "args.json").read_text())["size"]
    assert sorted(p.name for p in (out / "state").iterdir()) == ["0", "1"]
    for head in ("best", "last"):
        assert type(modules.load_head(out / head)).__name__ == ("UNet" if "unet" in script else "ResnetGenerator")


@BOTH
def test_training_moves_the_head(script, undisturbed):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert not torch.allclose(modules.load_head(undisturbed[script] / "last")(x), x, atol=1e-3)  # it began at the identity


@BOTH
def test_no_test_image_is_trained_on(script, mini_data):
    args = train_args(script, data=str(mini_data))
    files = modules.training_files(args, paired=script == "train_unet.py")
    assert all(mini_data / "train" in path.parents for domain in ("distilled", "baseline") for path in files[domain])
    assert all(mini_data / "test" in path.parents for path in files["samples"])


def train_args(script, **changes):
    from types import SimpleNamespace
    return SimpleNamespace(**{**dict(data="data", distilled=None, baseline=None, fraction=1.0, seed=0), **changes})


# ---------------------------------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("compiled", [[], pytest.param(["compiled"], marks=pytest.mark.slow)])
@BOTH
def test_two_processes_give_the_gradients_of_one(script, compiled, tmp_path):
    """Batch 1 on each of two processes against batch 2 on one, in double precision, relative 1e-5."""
    for processes, flags in ((1, []), (2, compiled)):
        run("tests/ddp_gradients.py", script, tmp_path / str(processes), processes, *flags, torchrun=processes, timeout=900)
    one, two = load_file(tmp_path / "1"), load_file(tmp_path / "2")
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        if gradient.norm() > 1e-12:  # biases before a normalisation have none
            assert (gradient - two[name]).norm() / gradient.norm() < 1e-5, name
    assert sum(gradient.norm() > 1e-12 for gradient in one.values()) > len(one) / 2


@BOTH
def test_torchrun_with_two_processes_in_bf16(script, mini_data, tmp_path):
    train(script, mini_data, tmp_path / "run", "--epochs", 1, "--precision", "bf16", torchrun=2)
    assert json.loads((tmp_path / "run/args.json").read_text())["world_size"] == 2
    assert len(log_of(tmp_path / "run")) == 1
    assert len(list((tmp_path / "run/state/1").glob("rank_*"))) == 2


# -------------------------------------------------------------------------------------------------- kills and continuing
def kill_when(script, data, out, epochs, moment, seconds=0.0):
    """Starts a run and sends SIGKILL to it `seconds` after moment(out) first holds. Returns whether it was still running."""
    command = [sys.executable, str(REPO / script), *TINY[script], "--data", str(data), "--out", str(out),
               "--epochs", str(epochs)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not moment(out):
        time.sleep(0.005)
    time.sleep(seconds)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return running


def epochs_done(out):
    return len(log_of(out)) if (out / "log.csv").exists() else 0


@BOTH
def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, mini_data, undisturbed, tmp_path):
    out = tmp_path / "run"
    # right after the first epoch is committed, then somewhere inside the writing of the second state
    assert kill_when(script, mini_data, out, 3, lambda out: epochs_done(out) == 1)
    kill_when(script, mini_data, out, 3, lambda out: (out / "state/0").exists(), random.random() * 0.02)
    train(script, mini_data, out, "--epochs", 3)
    assert_equal_runs(undisturbed[script], out)


@pytest.mark.slow
@BOTH
def test_ten_kills_at_random_moments(script, mini_data, undisturbed, tmp_path):
    kills = runs = 0
    while kills < 10:
        runs += 1
        while epochs_done(tmp_path / str(runs)) < 3 and kills < 10:
            kills += kill_when(script, mini_data, tmp_path / str(runs), 3, lambda out: True, random.uniform(3, 9))
        train(script, mini_data, tmp_path / str(runs), "--epochs", 3)
        assert_equal_runs(undisturbed[script], tmp_path / str(runs))


@pytest.mark.slow
@BOTH
def test_compiled_bf16_on_two_processes_survives_a_kill(script, mini_data, tmp_path):
    flags = ["--epochs", "2", "--compile", "--precision", "bf16"]
    train(script, mini_data, tmp_path / "calm", *flags, torchrun=2, timeout=900)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPO / script),
               *TINY[script], "--data", str(mini_data), "--out", str(tmp_path / "killed"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not epochs_done(tmp_path / "killed"):
        time.sleep(0.02)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(script, mini_data, tmp_path / "killed", *flags, torchrun=2, timeout=900)
    assert_equal_runs(tmp_path / "calm", tmp_path / "killed")


@BOTH
def test_a_finished_run_says_so_and_changes_nothing(script, mini_data, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed[script].rglob("*") if path.is_file()}
    again = train(script, mini_data, undisturbed[script], "--epochs", 3)
    assert "is finished: another --out" in again.stdout and str(undisturbed[script] / "best") in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed[script].rglob("*") if path.is_file()}


@BOTH
def test_what_does_not_fit_is_refused(script, undisturbed, mini_data, tmp_path):
    out = shutil.copytree(undisturbed[script], tmp_path / "run")
    other = train(script, mini_data, out, "--epochs", 3, "--lr", "0.5", check=False)
    assert other.returncode == 1 and "lr was" in other.stderr and "Traceback" not in other.stderr
    for file in sorted(state_of(out).iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:len(content) // 2])
    damaged = train(script, mini_data, out, "--epochs", 3, check=False)
    assert damaged.returncode == 1 and "damaged" in damaged.stderr and "Traceback" not in damaged.stderr
    (out / "log.csv").write_text((out / "log.csv").read_text().rsplit(",", 1)[0])
    cut = train(script, mini_data, out, "--epochs", 3, check=False)
    assert cut.returncode == 1 and "cannot continue" in cut.stderr and "Traceback" not in cut.stderr


def test_a_pickle_in_a_state_runs_nothing(mini_data, undisturbed, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    out = shutil.copytree(undisturbed["train_cyclegan.py"], tmp_path / "run")
    for file in state_of(out).iterdir():
        torch.save(Evil(), file)
    evil = train("train_cyclegan.py", mini_data, out, "--epochs", 3, check=False)
    assert evil.returncode == 1 and "Traceback" not in evil.stderr and not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------ bad input
@BOTH
def test_no_data_says_how_to_get_some(script, tmp_path):
    done = run(script, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for word in ("--mini", "generate_pairs.py", "--distilled DIR --baseline DIR", "SFHQ-T2I"):
        assert word in done.stderr


def test_bad_folders_are_one_line(mini_data, tmp_path):
    (tmp_path / "empty").mkdir()
    good = mini_data / "train/distilled"
    for flags, word in (((tmp_path / "missing", good), "missing"), ((good, tmp_path / "empty"), "holds no image")):
        done = run("train_cyclegan.py", "--distilled", flags[0], "--baseline", flags[1], "--out", tmp_path / "run", check=False)
        assert done.returncode == 1 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_head_in_the_way_is_not_overwritten(mini_data, tmp_path):
    (tmp_path / "run/best").mkdir(parents=True)
    for script in TINY:
        done = train(script, mini_data, tmp_path / "run", check=False)
        assert done.returncode == 1 and "not empty and not a run" in done.stderr and (tmp_path / "run/best").exists()


@pytest.mark.parametrize("flags", [("--epochs", 0), ("--batch-size", 0), ("--size", "x"), ("--fraction", 2), ("--crop", 999),
                                   ("--precision", "fp16"), ("--distilled", "x")])
def test_nonsense_is_refused(flags, mini_data, tmp_path):
    done = train("train_unet.py", mini_data, tmp_path / "run", *flags, check=False)
    assert done.returncode and "error: " in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_one_image_each_is_too_few_for_a_batch(tmp_path):
    for domain in ("a", "b"):
        (tmp_path / domain).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / domain / "x.png")
    done = run("train_cyclegan.py", "--distilled", tmp_path / "a", "--baseline", tmp_path / "b", "--fraction", 1,
               "--out", tmp_path / "run", check=False)
    assert done.returncode == 1 and "smaller --batch-size" in done.stderr


def test_plain_folders_with_a_corrupt_image(mini_data, tmp_path):
    for domain, suffix in (("distilled", "PNG"), ("baseline", "jpg")):
        for number, path in enumerate(modules.list_images(mini_data / "train" / domain)[:24 if suffix == "PNG" else 10]):
            (tmp_path / domain / "deep").mkdir(parents=True, exist_ok=True)
            Image.open(path).save(tmp_path / domain / "deep" / f"{domain} {number}.{suffix}")
    (tmp_path / "distilled/deep/distilled 3.PNG").write_bytes(b"damaged")
    flags = [flag for flag in TINY["train_cyclegan.py"] if flag != "--mini"]
    run("train_cyclegan.py", *flags, "--size", 64, "--crop", 32, "--fraction", 1, "--epochs", 1, "--out", tmp_path / "run",
        "--distilled", tmp_path / "distilled", "--baseline", tmp_path / "baseline")
    assert log_of(tmp_path / "run")[0]["unreadable"] == "1"


def test_too_many_corrupt_images_end_the_run(mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "data")
    for path in modules.list_images(data / "train/distilled")[::2]:
        path.write_bytes(b"damaged")
    done = train("train_cyclegan.py", data, tmp_path / "run", "--epochs", 1, check=False)
    assert done.returncode == 1 and "cannot be read: check" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state(mini_data, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed["train_cyclegan.py"], tmp_path / "run")
    settings = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**settings, "epochs": 6, "lr": 1e30}))
    done = train("train_cyclegan.py", mini_data, out, "--epochs", 6, "--lr", 1e30, "--decay-start", 1, check=False)
    assert done.returncode == 1 and "in epoch 4" in done.stderr and "Traceback" not in done.stderr
    assert epochs_done(out) == 3 and load_file(state_of(out) / "model.safetensors")


# -------------------------------------------------------------------------------------------------------- torch.compile
@pytest.mark.parametrize("script", ["train_unet.py", pytest.param("train_cyclegan.py", marks=pytest.mark.slow)])
def test_compiled_in_bf16(script, mini_data, tmp_path):
    """The U-Net's gradients were NaN there once: the backward pass of amax under bf16 (pytorch issue 186799)."""
    train(script, mini_data, tmp_path / "run", "--epochs", 1, "--compile", "--precision", "bf16", timeout=600)
    assert all(math.isfinite(float(value)) for value in log_of(tmp_path / "run")[0].values())


def test_no_compiler_is_one_line(mini_data, tmp_path):
    env = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = train("train_unet.py", mini_data, tmp_path / "run", "--epochs", 1, "--compile", check=False, env=env)
    assert done.returncode == 1 and "--no-compile" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------- the parts
def test_replay_pool_returns_fakes_then_mixes():
    pool = train_cyclegan.ReplayPool(size=4)
    pool.rng.seed(0)
    gray = lambda level: torch.full((1, 1, 1, 1), level / 127.5 - 1)  # the pool keeps 8 bits
    first = torch.cat([gray(level) for level in range(4)])
    assert torch.equal(pool.query(first), first)
    answers = torch.cat([pool.query(gray(10 + k)) for k in range(200)]).flatten()
    old = sum(answer != gray(10 + k).item() for k, answer in enumerate(answers))
    assert 70 < old < 130  # half of the answers are older fakes
    assert len(pool.images) == 4 and len(answers.unique()) > 150


def test_learning_rate_is_constant_then_falls_to_zero():
    from types import SimpleNamespace
    args = SimpleNamespace(lr=2.0, epochs=10, decay_start=5)
    rates = [train_cyclegan.learning_rate(args, epoch) for epoch in range(11)]
    assert rates == pytest.approx([2] * 6 + [1.6, 1.2, 0.8, 0.4, 0])


def test_best_epoch_wants_a_sound_cycle():
    rows = [dict(epoch=1, loss_G=0.1, cycle_ssim=0.99), dict(epoch=2, loss_G=0.5, cycle_ssim=0.95),
            dict(epoch=3, loss_G=0.3, cycle_ssim=0.85), dict(epoch=4, loss_G=0.4, cycle_ssim=0.91)]
    assert modules.best_cyclegan_row(rows, decay_start=1)["epoch"] == 4
    assert modules.best_cyclegan_row(rows[:1], decay_start=1)["epoch"] == 1


def test_fractions_are_nested_and_pairs_stay_pairs(mini_data):
    def chosen(fraction, **changes):
        return modules.training_files(train_args("", data=str(mini_data), fraction=fraction, **changes), paired=False)
    small, large = chosen(0.25), chosen(0.5)
    assert len(small["distilled"]) == 6 and set(small["distilled"]) < set(large["distilled"])
    assert [p.name for p in small["distilled"]] == [p.name for p in small["baseline"]]
    assert set(chosen(0.25, seed=1)["distilled"]) != set(small["distilled"])


def test_the_cyclegan_of_2017_by_flags(mini_data, tmp_path):
    train("train_cyclegan.py", mini_data, tmp_path / "run", "--epochs", 1, "--norm", "instance", "--attention", "none",
          "--upsample", "transpose", "--no-global-skip", "--lambda-rise", 0)
    config = json.loads((tmp_path / "run/last/config.json").read_text())
    assert config["norm"] == "instance" and not config["global_skip"]
    x = torch.rand(1, 3, 64, 64)
    assert modules.load_head(tmp_path / "run/last")(x).abs().max() <= 1  # a tanh at the end


def test_the_parts_of_the_generator_loss():
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 8, 8)
    twice, plus_one, half = (lambda z: 2 * z), (lambda z: z + 1), (lambda z: z.new_full((1, 1, 1, 1), 0.5))
    total, gan, cycle, fake_A, fake_B = train_cyclegan.generator_loss(x, y, twice, plus_one, half, half, 3.0)
    assert torch.equal(fake_B, 2 * x) and torch.equal(fake_A, y + 1) and gan == 0.5
    assert cycle.item() == pytest.approx(((x + 1).mean() + (y + 2).mean()).item())  # 2x + 1 - x, 2(y + 1) - y
    assert total.item() == pytest.approx((gan + 3 * cycle).item())


def test_gan_loss():
    assert train_cyclegan.gan_loss(torch.tensor([1.0, 0.0]), real=True).item() == 0.5
    assert train_cyclegan.gan_loss(torch.tensor([1.0, 3.0]), real=False).item() == 5.0


def test_neutral_loss_sees_colour_on_gray_only():
    x = torch.zeros(1, 3, 2, 2)
    x[:, 0, 0, 0] = 0.6  # one red pixel, three gray ones
    assert train_cyclegan.neutral_loss(x, x + 0.3) == 0  # brighter, as gray as before
    red = torch.tensor([0.3, 0.0, 0.0])[:, None, None]
    assert train_cyclegan.neutral_loss(x, x + red).item() == pytest.approx(0.75 * (0.2 + 0.1 + 0.1) / 3)


def test_unet_stops_on_a_plateau(mini_data, tmp_path):
    done = train("train_unet.py", mini_data, tmp_path / "run", "--epochs", 9, "--lr", 0, "--patience", 2)
    assert "stopped early" in done.stdout and len(log_of(tmp_path / "run")) == 3


def test_unet_leaves_out_what_has_no_partner(mini_data, tmp_path):
    data = shutil.copytree(mini_data, tmp_path / "data")
    paths = modules.list_images(data / "train/baseline")
    paths[0].unlink()
    done = train("train_unet.py", data, tmp_path / "run", "--epochs", 1)
    assert "left out: 1 images without a partner" in done.stdout


@pytest.mark.parametrize("structure", ["l1", "none"])
def test_unet_ablations(structure, mini_data, tmp_path):
    train("train_unet.py", mini_data, tmp_path / "run", "--epochs", 1, "--structure", structure, "--attention", "none")
    row = log_of(tmp_path / "run")[0]
    assert (float(row["loss_structure"]) == 0) == (structure == "none")


def test_unet_overfits_eight_pairs(mini_data):
    """LPIPS to the target falls by 5x when the network sees the same eight pairs again and again."""
    torch.manual_seed(0)
    paths = [modules.list_images(mini_data / "train" / domain)[:8] for domain in ("distilled", "baseline")]
    x, y = (modules.read_samples(p, 64)[..., 8:40, 16:48] for p in paths)  # hair and face
    network = modules.UNet(16, depth=4, global_skip=True)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    perceptual = train_unet.perceptual_loss("random", torch.device("cpu"))
    before = perceptual(x, y).mean().item()
    for _ in range(100):
        loss = train_unet.paired_loss(x, y, network(x), "grad", perceptual)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = perceptual(network.eval()(x), y).mean().item()
    assert after < before / 5
