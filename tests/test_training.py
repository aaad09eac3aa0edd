"""Both trainers by their command lines: continuing, kills, several processes, bad input, bad luck; their losses."""
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import ddp_gradients
import pytest
import torch
from accelerate import Accelerator
from conftest import EVIL, REPO, run
from PIL import Image
from safetensors.torch import load_file

import modules
import train_cyclegan
import train_unet

TINY = {  # an epoch in half a second
    "train_cyclegan": "--mini --channels 4 --blocks 1 --batch-size 4 --workers 0".split(),
    "train_unet": "--mini --channels 4 --depth 3 --batch-size 4 --workers 0 --size 32".split()}
for_both = pytest.mark.parametrize("script", TINY)
perceptual_loss = functools.cache(train_unet.perceptual_loss)  # a second each time


def command(script, data, out, *flags):
    return [f"{script}.py", *TINY[script], *map(str, ("--data", data, "--out", out, *flags))]


def train(script, data, out, *flags):
    """As on the command line, but in this process. Returns how it ended: None, or the text of its one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(script, data, out, *flags))
        patch.setattr(train_unet, "perceptual_loss", perceptual_loss)
        try:
            modules.run_training(sys.modules[script].main, sys.modules[script].parse_args())
        except SystemExit as end:
            assert "\n" not in str(end) or "there is no training data" in str(end)
            return str(end)


def contents(out):
    """What a run folder holds: settings, rows of the log but for times, last state and heads."""
    log = [row | {"seconds": 0, "pairs_per_s": 0} for row in modules.read_log(out)]
    state = torch.load(out / f"state/{len(log) % 2}.pt", weights_only=True) if log else {}
    heads = {path.parent.name: load_file(path) for path in out.glob("*/model.safetensors")}
    return json.loads((out / "args.json").read_text()), log, state | heads


def assert_equal_runs(a, b):
    """To the last bit, but for the settings."""
    torch.testing.assert_close(contents(a)[1:], contents(b)[1:], rtol=0, atol=0)


@pytest.fixture(scope="module")
def undisturbed(mini_data, tmp_path_factory):
    """{script: run folder} of three epochs that nobody disturbed."""
    runs = {script: tmp_path_factory.mktemp("run") / script for script in TINY}
    assert all(train(script, mini_data, out, "--epochs", 3) is None for script, out in runs.items())
    return runs


@for_both
def test_run_folder(script, undisturbed, mini_data, capsys):
    out, heads = undisturbed[script], ["last"] if script == "train_cyclegan" else ["best", "last"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(script, mini_data, out, "--epochs", 3) is None
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    said, (settings, log, _) = capsys.readouterr().out, contents(out)
    assert "is finished: another --out" in said and str(out / heads[0]) in said
    assert set(os.listdir(out)) == {".lock", "args.json", "log.csv", "samples", "state", *heads}
    assert settings["lr"] and settings["world_size"] == 1 and settings["torch"] == torch.__version__
    assert [row["epoch"] for row in log] == [1, 2, 3] and all(math.isfinite(x) for row in log for x in row.values())
    assert Image.open(out / "samples" / "epoch_0003.jpg").width == 3 * settings["size"]
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    for head in (modules.load_head(out / name) for name in heads):
        assert type(head).__name__ == ("UNet" if script == "train_unet" else "ResnetGenerator")
        assert not torch.equal(head(x), x)  # it began at the identity


def test_training_files(mini_data, tmp_path, capsys):
    """Fractions are nested, pairs stay pairs, test images are only looked at; all processes have to see the same."""
    def files_of(data, paired, fraction=1.0, seed=0):
        args = SimpleNamespace(data=data, distilled=None, baseline=None, fraction=fraction, seed=seed, out="run")
        return modules.training_files(args, paired)

    small, large, other = (files_of(mini_data, *how) for how in ((False, 0.25), (True, 0.5), (False, 0.25, 1)))
    assert len(small["distilled"]) == 6 and set(small["distilled"]) < set(large["distilled"]) != set(other["distilled"])
    assert [path.name for path in small["distilled"]] == [path.name for path in small["baseline"]]
    assert all(mini_data / "train" in path.parents for path in large["distilled"] + large["baseline"])
    assert all(mini_data / "test" in path.parents for path in large["samples"])

    data = shutil.copytree(mini_data / "train", tmp_path / "train").parent
    first, second, third, *_ = modules.list_images(data / "train/baseline")
    first.unlink()
    shutil.copy(second, data / "train/distilled" / f"{second.stem}.jpg")  # another picture of that stem
    shutil.copy(third, third.with_suffix(".bmp"))
    shutil.copy(third, data / "train/distilled" / f"{third.stem}.bmp.png")  # as enhance.py would name it
    files = files_of(data, paired=True)
    assert [path.name.replace(".bmp.png", ".bmp") for path in files["distilled"]] == [p.name for p in files["baseline"]]
    assert f"left out: 2 images without a partner that is theirs alone, such as {first.name}" in capsys.readouterr().out

    gather, cpu = (lambda key: torch.stack([key, key + 1])), torch.device("cpu")
    one = SimpleNamespace(gather=gather, num_processes=2, process_index=0, device=cpu)
    with pytest.raises(SystemExit, match="see different images"):
        modules.start_run(SimpleNamespace(out=tmp_path / "run", mini=True), files, one, {})
    assert not (tmp_path / "run").exists()
    files["distilled"][0].unlink()  # between the listing and its use
    images = modules.TrainingImages(files["distilled"], files["baseline"], 64, 0, seed=0, paired=True)
    assert f"{len(images)} and" in modules.fingerprint(files) and images[0][2] == 1


@for_both
def test_networks_are_gone_before_the_process_group(script, undisturbed, mini_data, monkeypatch):
    """A DDP wrapper that outlasts it hangs for ever now and then, on gloo in PyTorch 2.11."""
    networks, before, left, prepare = weakref.WeakSet(), [], [], Accelerator.prepare

    def recorded(self, network):
        networks.add(network)
        return prepare(self, network)

    monkeypatch.setattr(Accelerator, "prepare", recorded)
    monkeypatch.setattr(modules, "lock_folder", lambda out: before.append(len(networks)))
    monkeypatch.setattr(modules, "wait_for_ranks", lambda: left.append(len(networks)))
    assert train(script, mini_data, undisturbed[script], "--epochs", 3) is None
    assert before[0] > 0 and left == [0]


@pytest.mark.parametrize("compiled", [[], pytest.param(["compiled"], marks=pytest.mark.slow)])
def test_two_processes_give_the_gradients_of_one(compiled, tmp_path):
    """Batch 1 on each of two processes against batch 2 on one, in double precision, gradient penalty included."""
    run("tests/ddp_gradients.py", tmp_path / "two", *compiled, torchrun=2, timeout=900)
    one, two = ddp_gradients.gradients(), load_file(tmp_path / "two")
    seen = [name for name, gradient in one.items() if gradient.norm() > 1e-12]  # biases before a norm have none
    assert one.keys() == two.keys() and len(seen) > 0.9 * len(one)
    assert max((one[name] - two[name]).norm() / one[name].norm() for name in seen) < 1e-5


@for_both
def test_more_processes_and_other_settings_continue_a_run(script, mini_data, tmp_path, capsys, monkeypatch):
    """Also with the same images at another place, and named by relative paths."""
    out, moved = tmp_path / "run", shutil.copytree(mini_data, tmp_path / "moved")
    run(*command(script, mini_data, out, "--epochs", 1, "--precision", "bf16", "--batch-size", 2), torchrun=2)
    assert (out / ".lock1").exists()
    (out / ".DS_Store").touch()
    monkeypatch.chdir(tmp_path)
    new = {"epochs": 3, "batch_size": 4, "lr": 2e-5, "precision": "fp32"}
    new |= {"patience": 5} if script == "train_unet" else {"r1": 1.0, "lambda_cycle": 3.0}
    flags = [word for name, value in new.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert train(script, "moved/", "run/", *flags) is None and "world_size 2 -> 1" in capsys.readouterr().out
    settings, log, state = contents(out)
    new |= {"data": os.path.realpath(moved), "world_size": 1}
    assert len(log) == 3 and {name: value for name, (_, value) in settings["changes"]["epoch 2"].items()} == new
    optimizer = state["optimizer" if script == "train_unet" else "optimizer_G"]
    assert 2e-5 >= log[2]["lr"] == optimizer["param_groups"][0]["lr"]


@for_both
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(processes, script, mini_data, undisturbed, tmp_path,
                                                         monkeypatch):
    """SIGKILL at work in the second epoch, and variables of another launcher. The slow one is compiled, in bf16, on two
    processes, where the U-Net's gradients were NaN once: the backward pass of amax (pytorch issue 186799)."""
    for name, value in {"GRADIENT_ACCUMULATION_STEPS": "4", "USE_DEEPSPEED": "true", "DYNAMO_BACKEND": "x"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    calm, out, flags, launcher = undisturbed[script], tmp_path / "run", ["--epochs", 3, "--workers", 1], []
    if processes == 2:
        calm, flags = tmp_path / "calm", [*flags, "--compile", "--precision", "bf16"]
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        run(*command(script, mini_data, calm, *flags), torchrun=2, timeout=900)
    with subprocess.Popen([sys.executable, *launcher, *command(script, mini_data, out, *flags)], cwd=REPO) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (modules.read_log(out) and children.read_text()):
            assert process.poll() is None, "it has ended before"
            time.sleep(0.005)
        with pytest.raises(SystemExit, match="another process is at work"):
            modules.lock_folder(out)
        time.sleep(0.1 * random.random())
        # Of one process, the worker that reads images outlasts it for a moment, and must not keep the lock.
        victims = [process.pid, *map(int, children.read_text().split() if launcher else ())]
        assert process.poll() is None, "it has ended before"
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
    if processes == 2:
        run(*command(script, mini_data, out, *flags), torchrun=2, timeout=900)
    else:
        assert train(script, mini_data, out, *flags) is None
    assert contents(out)[0]["changes"] == {}
    assert_equal_runs(calm, out)


@pytest.mark.slow
def test_a_worker_of_two_nodes_is_killed_and_the_run_goes_on(mini_data, tmp_path):
    """Two torchrun agents on one machine, as two nodes: the run ends as if nothing had happened."""
    script, flags = "train_cyclegan", ("--epochs", 4, "--batch-size", 1)
    run(*command(script, mini_data, tmp_path / "calm", *flags), torchrun=2, timeout=900)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
             "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
             *command(script, mini_data, tmp_path / "killed", *flags)]
    # Each round has a store of its own. In the shared one, torchrun's default, the restarted processes may find each
    # other's addresses of the round before, which nobody answers at any more ("Gloo connectFullMesh failed").
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    logs = [tmp_path / "node0.txt", tmp_path / "node1.txt"]
    agents = [subprocess.Popen(words, cwd=REPO, env=env, stdout=open(log, "w"), stderr=subprocess.STDOUT)
              for log in logs]
    try:
        while not (tmp_path / "killed/log.csv").exists() and agents[1].poll() is None:
            time.sleep(0.01)
        time.sleep(0.3)  # into the next epoch
        children = subprocess.check_output(["ps", "-o", "pid=,args=", "--ppid", str(agents[1].pid)], text=True)
        trainer = next(int(line.split()[0]) for line in children.splitlines() if script in line)
        os.kill(trainer, signal.SIGKILL)
        codes = [agent.wait(timeout=900) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it takes its worker along
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert_equal_runs(tmp_path / "calm", tmp_path / "killed")


@for_both
def test_bad_luck_costs_an_epoch_and_what_is_damaged_is_refused(script, mini_data, undisturbed, tmp_path):
    out, new = shutil.copytree(undisturbed[script], tmp_path / "run"), tmp_path / "new"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a full disk: room for the heads, not for the state
        resource.setrlimit(resource.RLIMIT_FSIZE, ((out / "state/1.pt").stat().st_size - 100, limits[1]))
        assert all("cannot read or write" in train(script, mini_data, run, "--epochs", 4) for run in (out, new))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for run, epoch, precision in ((out, 4, "fp32"), (new, 1, "bf16")):
        end = train(script, mini_data, run, "--epochs", 4, "--lr", 1e38, "--precision", precision)
        assert f"no longer finite in epoch {epoch}: the same command with a lower --lr" in end and "epoch 0" not in end
        assert ("--precision fp32" in end) == (precision == "bf16")
    assert len(contents(out)[1]) == 3 and train(script, mini_data, out, "--epochs", 4) is None
    # A run without a finished epoch takes new settings
    assert not contents(new)[1] and train(script, mini_data, new, "--epochs", 1, "--channels", 8, "--seed", 1) is None
    assert contents(new)[0]["channels"] == 8 and contents(new)[0]["changes"] == {}

    (out / "log.csv").rename(out / "thesis.txt")
    assert "not empty and not a run" in train(script, mini_data, out)


@for_both
def test_the_way_out_of_a_run_that_cannot_go_on(script, mini_data, undisturbed, tmp_path):
    """The newest state, both, log.csv, args.json or images are damaged or gone: what the message says works."""
    calm, data, out = undisturbed[script], shutil.copytree(mini_data, tmp_path / "data"), tmp_path / "run"
    evil, log = EVIL.format(tmp_path / "loaded"), (calm / "log.csv").read_text()
    images = [f"../data/train/{domain}/{next((data / 'train' / domain).glob('*3.png')).name}" for domain in
              ("distilled", "baseline")]
    for names, text, words, start in (
            (["state/1.pt"], evil, "state/0.pt is whole: without the last line of log.csv, the same command", None),
            (["state/1.pt", "state/0.pt"], evil, "cannot load", "last"), (["log.csv"], "", "is damaged", "last"),
            (["log.csv"], log.rsplit(",", 1)[0], "is damaged", "last"),
            (["args.json"], None, "args.json is missing", ""), (images, None, "begun with other images", "")):
        shutil.copytree(calm, out, dirs_exist_ok=True)
        for name in names:
            (out / name).unlink() if text is None else (out / name).write_text(text)
        end = train(script, data, out, "--epochs", 4)
        assert words in end and "The same command" not in end and not (tmp_path / "loaded").exists()
        if start is None:
            (out / "log.csv").write_text(log[:log.rindex("\n", 0, -1) + 1])
            assert train(script, data, out, "--epochs", 3) is None
            assert_equal_runs(calm, out)
        else:
            new = tmp_path / f"after {words}{len(text or '')}"
            assert f"--init {out / start} --out ANOTHER" in end
            assert train(script, data, new, "--epochs", 1, "--init", out / start) is None


def test_a_log_of_an_earlier_version_gains_a_column(mini_data, undisturbed, tmp_path):
    """That of the gradient penalty, which --classic does not have. evaluate.py reads them all."""
    out, classic = shutil.copytree(undisturbed["train_cyclegan"], tmp_path / "run"), tmp_path / "classic"
    rows = [{name: row[name] for name in row if name != "gradient_penalty"} for row in modules.read_log(out)]
    (out / "log.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in (rows[0], *map(dict.values, rows))))
    assert train("train_cyclegan", mini_data, out, "--epochs", 4) is None
    *earlier, last = modules.read_log(out)
    assert earlier == rows and last["gradient_penalty"] > 0
    assert train("train_cyclegan", mini_data, classic, "--epochs", 1, "--classic") is None
    assert "gradient_penalty" not in contents(classic)[1][0]
    run("evaluate.py", "runs", out, classic, "--json", tmp_path / "runs.json", cwd=tmp_path)
    assert len(json.loads((tmp_path / "runs.json").read_text())["rows"]) == 2


def test_threads(mini_data, monkeypatch):
    """All but one of the cores, one with --mini: beside a busy process, more wait for each other most of the time."""
    count, used = "import torch; n = torch.get_num_threads(); import modules; print(n, torch.get_num_threads())", []
    words = ["env", "-u", "OMP_NUM_THREADS", sys.executable, "-c", count]
    before, after = map(int, subprocess.check_output(words, cwd=REPO).split())
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(sys, "argv", command("train_unet", mini_data, "run"))
    train_unet.parse_args()
    assert after == max(1, before - 1) and not used  # conftest.py sets OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    train_unet.parse_args()
    assert used == [1]


def test_init_starts_from_a_head_or_from_a_run_s_networks(mini_data, undisturbed, tmp_path):
    source = undisturbed["train_cyclegan"]
    before = contents(source)[2]
    for start, names in ((source, ("G_AB", "G_BA", "D_A", "D_B")), (source / "last", ("G_AB",))):
        out = tmp_path / start.name
        assert train("train_cyclegan", mini_data, out, "--epochs", 1, "--init", start, "--lr", 0) is None
        after = contents(out)[2]
        equal = [name for name in ("G_AB", "G_BA", "D_A", "D_B")
                 if all(torch.equal(after[name][key], before[name][key]) for key in after[name])]
        assert equal == [*names]
        before["G_AB"] = load_file(source / "last/model.safetensors")


BOTH, GAN = [*TINY], ["train_cyclegan"]


@pytest.mark.parametrize("scripts, flags, words", [
    *[(BOTH, flags, flags.split()[:1]) for flags in (  # named by the flag
        "--epochs 0", "--batch-size 0", "--batch-size ²", "--batch-size 99", "--size x", "--size 4000000000",
        "--size 8 --crop 0", "--crop 999", "--crop -1", "--crop 13", "--fraction 2", "--fraction nan", "--seed -1",
        "--seed 9223372036854775808", "--lr nan", "--lr -1", "--lr inf", "--workers -1", "--precision fp16")],
    *[(BOTH, f"--out RUN --epochs 4 {flags}", ["begun with other settings", f"{flags.split()[0]} was"]) for flags in (
        "--channels 8", "--size 48 --crop 40", "--seed 1", "--fraction 0.5", "--attention none", "--init x")],
    (BOTH, "--out RUN --epochs 4 --distilled DATA/train/baseline --baseline DATA/train/distilled",
     ["begun with other images"]),
    *[(BOTH, flags, ["folders of their own"]) for flags in (
        "--out DATA", "--out DATA/train/baseline", "--out DATA/train/distilled/runs/a", "--out DATA/test/run",
        "--out LINK/run", "--distilled DATA/train/baseline --baseline DATA/train/baseline",
        "--distilled DATA/train --baseline DATA/train/baseline", "--distilled LINK --baseline DATA/train/../train")],
    (BOTH, "--data none", ["--mini", "generate_pairs.py", "--distilled DIR --baseline DIR", "SFHQ-T2I"]),
    (BOTH, "--distilled x", ["go together"]), (BOTH, "--distilled x --baseline x", ["no folder x"]),
    (GAN, "--init RUN --channels 8", ["'channels': 4"]), (GAN, "--init RUN --attention none", ["'attention': 'esa'"]),
    (GAN, "--init RUN --size 512 --crop 512", ["another --size or --crop", "Missing key"]),
    (GAN, "--init a/b", ["no folder a/b"])])
def test_refused_before_anything_is_written(scripts, flags, words, mini_data, undisturbed, tmp_path, capsys):
    for script in scripts:
        settings = (undisturbed[script] / "args.json").read_bytes()
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(mini_data / "train/distilled", target_is_directory=True)
        paths = {"RUN": undisturbed[script], "DATA": mini_data, "LINK": tmp_path / "link"}
        given = re.sub("RUN|DATA|LINK", lambda match: str(paths[match[0]]), flags).split()
        end = train(script, mini_data, tmp_path / "run", *given) + capsys.readouterr().err  # argparse's
        assert all(word in end for word in words) and not (tmp_path / "run").exists()
        assert (undisturbed[script] / "args.json").read_bytes() == settings


@pytest.mark.parametrize("content", [b"<html>", b"", b"PK\3\4 cut short"])
def test_a_damaged_trunk_is_one_line_with_its_path(content, mini_data, tmp_path, monkeypatch):
    file = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    end = train("train_unet", mini_data, tmp_path / "run", "--perceptual", "vgg")
    assert str(file) in end and "delete it, or use --perceptual random" in end and not (tmp_path / "run").exists()


def test_plain_folders_of_odd_names_and_damaged_files(mini_data, tmp_path, capfd):
    for domain, suffix, count in (("distilled", "PNG", 24), ("baseline", "jpg", 10)):
        (tmp_path / domain / "deep").mkdir(parents=True)
        for number, path in enumerate(modules.list_images(mini_data / "train" / domain)[:count]):
            shutil.copy(path, tmp_path / domain / "deep" / f"{domain} {number}.{suffix}")
    (tmp_path / "distilled/deep/distilled 3.PNG").write_bytes(b"damaged")
    os.rename(tmp_path / "distilled/deep/distilled 4.PNG", os.fsencode(tmp_path) + b"/distilled/deep/\xe9\n.png")
    folders = ["--epochs", 1, "--distilled", tmp_path / "distilled", "--baseline", tmp_path / "baseline"]
    assert train("train_cyclegan", "", tmp_path / "run", *folders) is None
    assert contents(tmp_path / "run")[1][0]["unreadable"] == 1 and "passed over: " in capfd.readouterr().err
    for path in modules.list_images(tmp_path / "baseline")[::2]:
        path.write_bytes(b"damaged")
    assert "cannot be read: check" in train("train_cyclegan", "", tmp_path / "many", *folders)


def test_a_killed_reader_is_one_line(mini_data, tmp_path, monkeypatch):
    def read_image(path, real=modules.read_image):
        if torch.utils.data.get_worker_info():  # in a DataLoader's worker
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)
    monkeypatch.setattr(modules, "read_image", read_image)
    assert "use fewer --workers" in train("train_cyclegan", mini_data, tmp_path, "--epochs", 1, "--workers", 1)


@pytest.mark.parametrize("error, advice", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "a smaller --batch-size continues"),
    (MemoryError(), "a smaller --batch-size continues"), (KeyboardInterrupt(), "interrupted"),
    (RuntimeError("CUDA error: out of memory"), "a smaller --batch-size continues"),
    (torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no c++"), None), "--no-compile"),
    (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "/dev/shm"),
    (RuntimeError("gloo/tcp/pair.cc:545 Read error: Connection reset by peer."), "another process of this run"),
    (OSError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: too many files"), "too many files"),
    (RuntimeError("Caught KeyError in DataLoader worker process 0."), None)])
def test_known_errors_are_one_line_and_unknown_ones_are_bugs(error, advice):
    def main(args):
        raise error
    with pytest.raises(SystemExit if advice else RuntimeError, match=advice):
        modules.run_training(main, SimpleNamespace(out="run"))


def test_without_a_terminal_a_line_every_30_seconds(capsys, monkeypatch):
    now = iter(range(10 ** 6))
    monkeypatch.setattr("tqdm.std.time", lambda: next(now))  # a second passes with each look at the clock
    bar = modules.progress_bar(total=200, unit=" pairs")
    for _ in range(100):
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("200" in line and "pairs/s" in line for line in lines)


@pytest.mark.parametrize("classic, expected", [(True, 2 * 0.25), (False, 2 * math.log(2))])
def test_the_parts_of_the_generator_loss(classic, expected):
    x, y = torch.rand(2, 1, 3, 8, 8)
    total, gan, cycle, fake_A, fake_B = train_cyclegan.generator_loss(
        x, y, lambda z: 2 * z, lambda z: z + 1, *[lambda z: z.new_full((1, 1), 0.5)] * 2, 3.0, classic)
    assert torch.equal(fake_B, 2 * x) and torch.equal(fake_A, y + 1) and gan.item() == pytest.approx(expected)
    assert cycle.item() == pytest.approx(((x + 1).mean() + (y + 2).mean()).item())  # 2x + 1 - x, 2(y + 1) - y
    assert total.item() == pytest.approx((gan + 3 * cycle).item())


def test_replay_pool_and_decay():
    """The pool returns fakes, then mixes; the rate is constant, then falls to zero."""
    random.seed(0)
    pool, fakes = train_cyclegan.ReplayPool(size=4), modules.normalise(torch.arange(204)).reshape(-1, 1, 1, 1)
    assert torch.equal(pool.query(fakes[:4]), fakes[:4])
    answers = torch.cat([pool.query(fake[None]) for fake in fakes[4:]])
    assert 70 < (answers != fakes[4:]).sum() < 130  # half of the answers are older fakes
    assert len(pool.images) == 4 and len(answers.unique()) > 150
    factors = [train_cyclegan.decay(SimpleNamespace(epochs=10), epoch) for epoch in range(11)]
    assert factors == pytest.approx([1] * 6 + [0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize("script, flags, epochs", [
    *[(script, f"--epochs 1 {flags} {sides}", 1) for sides in ("--size 64 --crop 24", "--size 24 --crop 0")
      for script, flags in (("train_cyclegan", "--classic"), ("train_unet", "--depth 5"))],
    *[("train_unet", f"--epochs 9 --lr 0 --patience 1 --no-global-skip --structure {structure}", 2)
      for structure in ("grad", "l1")]])
def test_the_smallest_sides_can_be_trained_on_and_a_plateau_ends_it(script, flags, epochs, mini_data, tmp_path, capsys):
    assert train(script, mini_data, tmp_path, *flags.split()) is None and len(contents(tmp_path)[1]) == epochs
    said = capsys.readouterr().out
    assert ("stopped early" in said) == ("--patience" in flags) and ("replay pool" in said) == ("--classic" in flags)
    assert "--patience" not in flags or contents(tmp_path)[1][0]["loss_structure"] > 0


def test_unet_overfits_eight_pairs(mini_data):
    """LPIPS to the target falls by 5x when the network sees the same eight pairs again and again."""
    torch.manual_seed(0)
    pairs = zip(*(modules.list_images(mini_data / "train" / domain)[:8] for domain in ("distilled", "baseline")))
    x, y = torch.stack(list(modules.read_together(pairs, 64)))[..., 8:24, 16:32].unbind(1)  # hair
    network, perceptual = modules.UNet(16, depth=4, global_skip=True), perceptual_loss("random", x.device)
    optimizer, before = torch.optim.Adam(network.parameters(), 2e-3), perceptual(x, y).mean().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = train_unet.paired_loss(x, y, network(x), "none", perceptual)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < before / 5
