"""enhance.py as its users run it, its parts against independent references, and the files and accidents that ten
thousand images of every origin bring along."""
import errno
import hashlib
import json
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch import nn
from torch.utils.data import DataLoader

import enhance
import modules
from conftest import REPO, run
from modules import ResnetGenerator, load_head, save_head

HEIGHT, WIDTH = 24, 32


def noise(channels=3, height=HEIGHT, width=WIDTH, seed=0, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (height, width, channels), dtype).squeeze()


def pixels(path, mode="RGB"):
    with Image.open(path) as image:
        assert image.mode == mode, f"{path.name} is {image.mode}"
        return np.asarray(image).astype(int)


def written(out):
    """The images in a folder, whatever is hidden there left out."""
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name[0] != "."}


def reference(head, path, strength=1.0):
    """The definition, image by image: x + strength (head(x) - x)."""
    x = torch.from_numpy(pixels(path)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        y = x + strength * (load_head(head)(x) - x)
    return ((y[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A tiny head that changes its input."""
    torch.manual_seed(0)
    network = ResnetGenerator(channels=8, blocks=1)
    nn.init.normal_(network.body[-1].weight)
    save_head(network, tmp_path_factory.mktemp("head"))
    return tmp_path_factory.getbasetemp() / "head0"


@pytest.fixture
def photos(tmp_path):
    """Five noise images of two sizes in two folders."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.png", "below/d.png", "below/e.png")):
        Image.fromarray(noise(3, *((40, 48) if i % 2 else (33, 50)), seed=i)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(arguments) -> (exit code or error line, output): the command line in this process, saving the imports."""
    def run_here(*args):
        monkeypatch.setattr(sys, "argv", ["enhance.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            runpy.run_path(str(REPO / "enhance.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return code, "".join(capsys.readouterr())
    return run_here


# ------------------------------------------------------------------------------------------- what users do
def test_folder(tmp_path, photos, head, command):
    """Pixels, structure, result line; a second run finds all done, a third does exactly what is missing."""
    out = tmp_path / "out"
    args = photos, "--model", head, "--out", out, "--batch-size", 2, "--strength", 0.7, "--precision", "fp32"
    done = run("enhance.py", *args)
    assert written(out) == {"a.png", "b.png", "c.png", "below/d.png", "below/e.png"}
    for name in written(out):
        assert abs(pixels(out / name) - reference(head, photos / name, 0.7)).max() <= 0.51
        assert abs(pixels(out / name) - pixels(photos / name)).mean() > 2, "a head that does nothing proves nothing"
    assert re.fullmatch(r"5 images enhanced in [\d.]+ s \([\d.]+ images/s in fp32\) -> .*out; 0 failed\n", done.stdout)
    (out / "below" / "d.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    for enhanced, present in ((1, 4), (0, 5)):
        last = command(*args)[1].splitlines()[-1]
        assert re.match(rf"{enhanced} images .*; {present} were there already \(--overwrite .*\); 0 failed", last), last
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and (out / "below" / "d.png").is_file()


def test_files_folders_formats(tmp_path, photos, head, command):
    code, text = command(photos / "a.png", photos / "below", photos / "b.png", "--model", head,
                         "--out", tmp_path / "out", "--format", "webp")
    assert code == 0 and text.splitlines()[-1].startswith("4 images enhanced")
    assert written(tmp_path / "out") == {"a.webp", "b.webp", "below/d.webp", "below/e.webp"}
    sizes = []
    for quality in (30, 95):
        code, _ = command(photos / "a.png", "--model", head, "--out", tmp_path / "jpg", "--format", "jpg",
                          "--quality", quality, "--overwrite")
        assert code == 0 and Image.open(tmp_path / "jpg" / "a.jpg").size == (50, 33)
        sizes.append((tmp_path / "jpg" / "a.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    code, _ = command(photos / "a.png", "--model", head, "--out", tmp_path / "look", "--compare", "--precision", "fp32")
    sheet = pixels(tmp_path / "look" / "a.png")
    assert code == 0 and sheet.shape[1] == 100
    assert (sheet[-33:, :50] == pixels(photos / "a.png")).all()
    assert abs(sheet[-33:, 50:] - reference(head, photos / "a.png")).max() <= 0.51


def test_what_is_done(tmp_path, photos, head, command):
    """Anew: newer inputs, a head trained further, all that a cut-off --overwrite left. Other settings: refused."""
    model, other, out = shutil.copytree(head, tmp_path / "model"), tmp_path / "other", tmp_path / "out"

    def enhanced(*args, model=model):
        code, text = command(photos, "--out", out, "--model", model, *args)
        return int(text.splitlines()[-1].split()[0]) if code == 0 else code
    assert enhanced() == 5 and enhanced() == 0
    later = time.time() + 100
    os.utime(photos / "b.png", (later, later))
    assert enhanced() == 1
    os.utime(photos / "b.png", (later - 1000, later - 1000))
    assert enhanced(model=shutil.copytree(model, other)) == 0, "the same head by another name"
    torch.manual_seed(1)
    save_head(ResnetGenerator(channels=8, blocks=1), model)
    assert enhanced() == 5, "trained further"
    for args, line in ((("--strength", 0.5), "--strength 1.0, not 0.5"),
                       (("--compare",), "--compare False, not True"), (("--quality", 90), "--quality 95, not 90")):
        assert f"out was made with {line}: choose another --out, or let --overwrite" in enhanced(*args)
    assert f"was made with --model {model}, not {other}" in enhanced(model=other)
    assert enhanced("--strength", 0.5, "--overwrite") == 5
    os.utime(out / "a.png", (later - 1000, later - 1000))  # as if that run had been cut off before this image
    assert enhanced("--strength", 0.5) == 1
    (out / enhance.SETTINGS).unlink()
    assert "holds images of these names, but no .enhance.json" in enhanced("--strength", 0.5)


def test_output_inside_the_input(photos, head, command):
    """Outputs below the input are not enhanced again, whatever way the folder is named."""
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    for times in range(2):
        code, text = command(photos, "--model", head, "--out", photos / "below" / ".." / "better", "--overwrite")
        assert code == 0 and "5 images enhanced" in text
    assert len(written(photos / "better")) == 5
    assert before == {path: path.read_bytes() for path in before}


def test_refusals(tmp_path, photos, head, command, monkeypatch):
    """One line each, nothing written, no original touched."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin" / "below").mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "twin" / "below" / "d.png")
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "outputs" / "out").mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "outputs" / "out" / "a.png")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody listens
    out, model = ("--out", tmp_path / "out"), ("--model", head)
    cases = {
        "there is no file or folder": [tmp_path / "nothing", *model, *out],
        "holds no image": [tmp_path / "empty", *model, *out],
        "never overwritten": [photos, *model, "--out", photos],
        "where the originals are": [photos / "a.png", *model, "--out", tmp_path / "link"],
        "one of the originals": [photos / "below", tmp_path / "twin", *model, "--out", tmp_path / "link"],
        "would both become": [photos / "below", tmp_path / "twin" / "below", *model, *out],
        "no image but those in --out": [tmp_path / "outputs", *model, "--out", tmp_path / "outputs" / "out"],
        "there is no folder": [photos, "--model", tmp_path / "nothing", *out],
        "no head of that name": [photos, "--model", "nobody/nothing", *out],
        "model.safetensors is missing": [photos, "--model", tmp_path / "broken", *out],
        "--quality is 0": [photos, *model, *out, "--quality", 0],
        "--strength is nan": [photos, *model, *out, "--strength", "nan"],
        "--batch-size is -1": [photos, *model, *out, "--batch-size", -1],
        "--tile is 8": [photos, *model, *out, "--tile", 8],
        "--device abacus": [photos, *model, *out, "--device", "abacus"],
        "cannot write to": [photos, *model, "--out", photos / "a.png" / "out"],
    }
    if not (REPO / "assets" / "head").is_dir():
        cases["assets/head, is missing: give --model"] = [photos, *out]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for expected, args in cases.items():
        code, text = command(*args)
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, (expected, code, text)
        assert expected in code, (expected, code)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


def test_two_ranks(tmp_path, photos, head):
    """torchrun: each image once, the same pixels, failures named once by their rank, one sum by rank 0."""
    Image.fromarray(noise(1, high=65536, dtype=np.uint16)).save(photos / "deep.png")
    alone = run("enhance.py", photos, "--model", head, "--out", tmp_path / "alone")
    (photos / "bad.png").write_text("bad")
    for enhanced, present in ((6, ""), (0, r"6 were there already .*; ")):
        both = run("enhance.py", photos, "--model", head, "--out", tmp_path / "both", torchrun=2, check=False)
        assert both.returncode == 1 and re.findall(r"^failed: .*/(.*?): ", both.stderr, re.M) == ["bad.png"]
        notes = 1 if enhanced else 0
        assert re.fullmatch(r"note: 16 bits.* \(1 images.*\n" * notes + rf"{enhanced} images enhanced .*; {present}1 "
                            "failed\n", both.stdout), both.stdout
    assert written(tmp_path / "both") == written(tmp_path / "alone") and "6 images" in alone.stdout
    both = run("enhance.py", photos, "--out", tmp_path / "both", "--model", head, "--strength", 2, torchrun=2,
               check=False)
    assert both.stderr.count("error: ") == 1 and "made with --strength 1.0, not 2.0" in both.stderr, both.stderr
    for name in written(tmp_path / "alone"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_precision(tmp_path, photos, head, command, monkeypatch):
    """auto is bf16 where the hardware computes in it, by whatever functions this torch has, and says so."""
    for native, name in ((lambda: True, "bf16"), (lambda: False, "fp32"), (None, "fp32")):
        if native:
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", native, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        code, text = command(photos, "--model", head, "--out", tmp_path / name, "--overwrite")
        assert code == 0 and f"images/s in {name})" in text
    assert 0 < max(abs(pixels(tmp_path / "bf16" / name) - pixels(tmp_path / "fp32" / name)).max()
                   for name in written(photos)) <= 3
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert enhance.choose_precision(torch.device("cuda"), None) == "fp32", "a T4 emulates it"


# --------------------------------------------------------------------------------------------------- heads
class Malice:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('pwned').write_text('it ran')",)


def test_a_model_is_data(tmp_path, photos, head, command, monkeypatch):
    """A pickle in a model folder is never read: beside good weights, instead of them, or under their name."""
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Malice())
    pickle.loads(evil)
    assert (tmp_path / "pwned").exists(), "the pickle of this test is harmless"
    (tmp_path / "pwned").unlink()
    for weights, expected in (((head / "model.safetensors").read_bytes(), 0), (None, "is missing"), (evil, "damaged")):
        model = shutil.copytree(head, tmp_path / f"model {expected}")
        (model / "model.safetensors").unlink()
        if weights:
            (model / "model.safetensors").write_bytes(weights)
        for name in ("pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pkl"):
            (model / name).write_bytes(evil)
        code, _ = command(photos, "--model", model, "--out", tmp_path / "out" / model.name)
        assert code == expected or expected and expected in code, code
        assert not (tmp_path / "pwned").exists()
    for config in ({"network": "os.system"}, {"network": "ResnetGenerator", "channels": "__import__('os')"}, []):
        (model / "config.json").write_text(json.dumps(config))
        code, _ = command(photos, "--model", model, "--out", tmp_path / "out" / "config")
        assert code.startswith("error: ") and "\n" not in code


def test_heads_of_the_first_version(tmp_path):
    """Their config names the network and no norm: InstanceNorm was the only one."""
    torch.manual_seed(0)
    network = ResnetGenerator(channels=8, blocks=1, norm="instance", global_skip=False).eval()
    save_head(network, tmp_path)
    config = {"network": "ResnetGenerator", "channels": 8, "blocks": 1, "attention": "esa", "upsample": "resize"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_head(tmp_path)(x), network(x))


def test_a_hub_without_answer(tmp_path, head, monkeypatch):
    """A network that swallows everything costs seconds; what was fetched earlier is used without one."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        start = time.perf_counter()
        with pytest.raises(SystemExit, match="no head of that name could be fetched"):
            load_head("nobody/nothing")
        assert time.perf_counter() - start < 15
    repository = tmp_path / "models--somebody--a-head"
    shutil.copytree(head, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert isinstance(load_head("somebody/a-head"), ResnetGenerator)


# -------------------------------------------------------------------------------- the network's accidents
class Hungry(nn.Module):
    """Returns -x; has no memory for more than `pixels` pixels at once, or another trouble with them."""

    def __init__(self, pixels, error):
        super().__init__()
        self.pixels, self.error, self.batches = pixels, error, []

    def forward(self, x):
        self.batches.append(len(x))
        if x[:, 0].numel() > self.pixels:
            raise self.error
        return -x


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_halves_the_batch(tmp_path, photos, command, monkeypatch, error):
    for name in "fghijkl":
        shutil.copy(photos / "a.png", photos / f"{name}.png")  # with a, c, e: ten of one size
    hungry = Hungry(3 * 33 * 50, error)
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    code, text = command(photos, "--model", "any", "--out", tmp_path / "out", "--batch-size", 8)
    assert code == 0 and "12 images enhanced" in text
    assert hungry.batches == [8, 4] + 6 * [2]
    for path in photos.rglob("*.png"):
        assert abs(pixels(tmp_path / "out" / path.relative_to(photos)) - (255 - pixels(path))).max() <= 1

    hungry.pixels = 33 * 50  # the two images of 40x48 never fit
    code, text = command(photos, "--model", "any", "--out", tmp_path / "less", "--batch-size", 8)
    assert code == 1 and text.count("out of memory: try --tile 512") == 2 and "10 images" in text


def test_other_errors(tmp_path, photos, command, monkeypatch):
    """An error of the network is its image's; one of the GPU ends the run; what is not finite is not written."""
    hungry = Hungry(33 * 50, RuntimeError("input tensor must fit into 32-bit index math"))
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    code, text = command(photos, "--model", "any", "--out", tmp_path / "out", "--batch-size", 4)
    assert code == 1 and text.count("must fit into 32-bit") == 2 and "3 images enhanced" in text
    assert sorted(hungry.batches) == [1, 1, 1, 1, 1, 2, 3]
    hungry.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        command(photos, "--model", "any", "--out", tmp_path / "out")
    monkeypatch.setattr(modules, "load_head", lambda path: nn.LeakyReLU(float("nan")))  # NaN for x < 0
    Image.new("RGB", (20, 20), "white").save(photos / "white.png")
    code, text = command(photos, "--model", "any", "--out", tmp_path / "nan", "--precision", "fp32")
    assert code == 1 and text.count("output in fp32 is not finite") == 5 and written(tmp_path / "nan") == {"white.png"}


def test_disk_errors_stop_the_run(tmp_path, photos, head, command, monkeypatch):
    """A full disk ends it with one line; a name that is too long costs its image only."""
    real = modules.write_image
    for code, stops in ((errno.ENOSPC, True), (errno.EROFS, True), (errno.ENAMETOOLONG, False)):
        def write_image(image, path, **options):
            if path.name == "b.png":
                raise OSError(code, "broken")
            real(image, path, **options)
        monkeypatch.setattr(modules, "write_image", write_image)
        result, text = command(photos, "--model", head, "--out", tmp_path / str(code))
        if stops:
            assert result.startswith("error: cannot write to ") and "of 5 images are done" in result
        else:
            assert result == 1 and "4 images enhanced" in text and text.count("failed: ") == 1


def test_tiles_are_exact(tmp_path, photos, head, command):
    """Without norm and attention, tiles are the whole image; the margin is as small as it may be."""
    for settings in ({"blocks": 1}, {"blocks": 3}, {"blocks": 1, "upsample": "transpose"}):
        torch.manual_seed(0)
        network = ResnetGenerator(channels=4, attention="none", **settings).double().eval()
        nn.init.normal_(network.body[-1].weight)
        margin = enhance.tile_margin(network)
        for size in ((150, 211), (64 + 2 * margin + 1, 64 + 2 * margin), (10, 300), (128, 300)):
            x = torch.rand(2, 3, *size, dtype=torch.double) * 2 - 1
            with torch.inference_mode():
                whole = network(x)
                torch.testing.assert_close(enhance.tiled(network, x, 64, margin), whole, atol=1e-10, rtol=0)
                assert (enhance.tiled(network, x, 64, margin - 8) - whole).abs().max() > 1e-6
    sizes = set()

    def mean(window):
        sizes.add(tuple(window.shape[-2:]))
        return window.mean((2, 3), keepdim=True).expand_as(window)
    enhance.tiled(mean, torch.zeros(1, 3, 301, 402), 64, 16)
    assert sizes == {(96, 96)}, "every window has one size, that of the compiled network"
    Image.fromarray(noise(3, 70, 200)).save(photos / "wide.png")
    save_head(ResnetGenerator(channels=4, blocks=1, norm="instance"), tmp_path / "instance")
    for model, notes in ((head, 0), (tmp_path / "instance", 1)):
        code, text = command(photos, "--model", model, "--out", tmp_path / f"out{notes}", "--tile", 64, "--strength", 0)
        assert code == 0 and text.count("may drift from tile to tile") == notes
        for name in written(photos):
            assert (pixels(tmp_path / f"out{notes}" / name) == pixels(photos / name)).all()


def test_compile(tmp_path, photos, head, command, monkeypatch):
    """Whole batches of the most frequent size are compiled (here without Inductor, which takes half a minute), again
    after a lack of memory; where compiling fails, all goes on without it, and says so once."""
    for name in "fghijkl":
        shutil.copy(photos / "a.png", photos / f"{name}.png")  # with a, c, e: ten of one size
    shapes, memory, broken, compile_ = [], 4, False, torch.compile

    def backend(graph, inputs):
        if broken:
            raise OSError("no C compiler")

        def forward(*args):
            images = next(arg for arg in args if arg.ndim == 4 and arg.shape[1] == 3 and arg.shape[-1] == 50)
            shapes.append(len(images))
            if len(images) > memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*args)
        return forward
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    args = photos, "--model", head, "--compile", "--precision", "fp32", "--batch-size"
    for case, batch_size, expected, notes in (("short", 5, [5, 2, 2, 2, 2], 0), ("broken", 5, [], 1)):
        broken, shapes[:] = case == "broken", []
        torch._dynamo.reset()
        code, text = command(*args, batch_size, "--out", tmp_path / case)
        assert code == 0 and "12 images enhanced" in text and text.count("the head runs uncompiled") == notes, text
        assert shapes == expected
        for name in written(photos):
            assert abs(pixels(tmp_path / case / name) - reference(head, photos / name)).max() <= 0.51


# ------------------------------------------------------------------------------------------- hostile files
# EXIF orientation -> what turns the stored array upright (EXIF 2.32, table 6)
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}


def smooth(height=HEIGHT, width=WIDTH):
    """A picture that JPEG keeps within a few levels and that looks different from every side."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows):
    """A PNG file by hand, for what Pillow does not write."""
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def icc(space, connection, kind, tags):
    """An ICC version 2 profile by hand: header, tag table, data."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = (struct.pack(">I4sI4s4s4s12x4s28x", 132 - 4 + len(table) + len(body), b"lcms", 0x02400000, kind, space,
                          connection, b"acsp") + struct.pack(">iii", 63190, 65536, 54061))
    return header.ljust(128, b"\0") + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
LINEAR_GRAY = icc(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": WHITE, b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0)})


def ink_profile():
    """A CMYK profile whose lightness depends on black alone: L = 100 (1 - K), so that cyan ink is shown as white."""
    grid = bytes(value for corner in range(16) for value in (0 if corner & 1 else 255, 128, 128))
    lut = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
           + bytes(range(256)) * 4 + grid + bytes(range(256)) * 3)
    return icc(b"CMYK", b"Lab ", b"prtr", {b"wtpt": WHITE, b"A2B0": lut})


def fill(folder):
    """Writes the hostile folder. Returns the names of the files that must be reported."""
    (folder / "nested" / "deep").mkdir(parents=True)
    rgb = Image.fromarray(noise())
    rgb.save(folder / "plain.png")
    Image.fromarray(smooth()).save(folder / "photo.jpg", quality=95)
    Image.fromarray(smooth()).save(folder / "modern.webp", lossless=True)
    Image.fromarray(noise(height=1, width=1).reshape(1, 1, 3)).save(folder / "one.png")
    Image.fromarray(noise(height=5000, width=3)).save(folder / "long.png")
    Image.fromarray(noise(1, high=65536, dtype=np.uint16)).save(folder / "gray16.png")
    deep = noise(high=65536, dtype=np.uint16).astype(">u2")
    (folder / "rgb16.png").write_bytes(png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    rgb.quantize(16).save(folder / "palette.png")
    rgb.quantize(16).save(folder / "palette_clear.png", transparency=bytes(range(0, 256, 16)))
    rgb.quantize(16).save(folder / "palette_clear.gif", transparency=3)
    rgb.save(folder / "colour_key.png", transparency=tuple(noise()[2, 3].tolist()))
    Image.fromarray(noise(1)).save(folder / "gray.png")
    Image.fromarray(noise(1) > 127).save(folder / "bits.png")
    Image.fromarray(noise(2), "LA").save(folder / "gray_alpha.png")
    Image.fromarray(noise(4)).save(folder / "rgba.png")
    Image.fromarray(noise(4)).save(folder / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(noise(4)).save(folder / "rgba.tif")
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    cyan.save(folder / "cmyk.jpg", quality=95)
    cyan.save(folder / "cmyk_profile.jpg", quality=95, icc_profile=ink_profile())
    Image.new("L", (WIDTH, HEIGHT), 128).save(folder / "gray_profile.png", icc_profile=LINEAR_GRAY)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        Image.fromarray(smooth()).save(folder / name, icc_profile=srgb)
    rgb.save(folder / "bad_profile.png", icc_profile=b"rubbish" * 30)
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[274], exif[271] = orientation, "Maker"
        exif.get_ifd(0x8825)[1] = "N"  # the GPS block
        Image.fromarray(smooth()).save(folder / f"turned{orientation}.jpg", quality=95, subsampling=0, exif=exif)
        rgb.save(folder / f"turned{orientation}.png", exif=exif)
    Image.fromarray(noise(4)).save(folder / "turned_alpha.png", exif=exif)
    rgb.save(folder / "bad_exif.png", exif=b"Exif\0\0MM rubbish")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a portrait, steps: 4\nseed: 7")
    texts.add_itxt("Title", "größe 写真", "de", "Titel")
    texts.add_text("icc_profile", "a text that is named like a field")
    rgb.save(folder / "texts.png", pnginfo=texts, dpi=(300, 300))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" note="kept"/>'
    Image.fromarray(smooth()).save(folder / "xmp.jpg", xmp=xmp)
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames = [frame.quantize(16) for frame in frames]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    rgb.save(folder / "SHOUT.JPG")
    for name in ("with space.png", "new\nline.png", "größe-写真.png", "写" * 83 + ".png", "a" * 251 + ".png",
                 "-x.png", "nested/deep/inner.png", "liar.jpg", os.fsdecode(b"\xff\xfe.png")):
        rgb.save(folder / name, format="PNG")
    for suffix in ("png", "jpg", "bmp"):
        rgb.save(folder / f"same.{suffix}")
    (folder / "folder.png").mkdir()
    rgb.save(folder / "folder.png" / "inside.png")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "link.png").symlink_to("plain.png")
    rgb.save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image, and not named like one")

    whole = (folder / "plain.png").read_bytes(), (folder / "photo.jpg").read_bytes()
    (folder / "cut.png").write_bytes(whole[0][:len(whole[0]) // 2])
    (folder / "cut.jpg").write_bytes(whole[1][:len(whole[1]) // 2])
    (folder / "flipped.png").write_bytes(whole[0][:60] + bytes([whole[0][60] ^ 255]) + whole[0][61:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "bomb.png").write_bytes(png(30000, 30000, 8, 0, b""))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(noise(1).astype(np.float32) / 255).save(folder / "float.tif")
    rgb.save(folder / "locked.png")
    (folder / "locked.png").chmod(0)
    rgb.save(folder / "new\nbad.png")
    (folder / "new\nbad.png").write_bytes(b"bad")
    return {"cut.png", "cut.jpg", "flipped.png", "empty.png", "text.png", "bomb.png", "loop.png", "dangling.png",
            "pipe.png", "float.tif", "locked.png", "new\nbad.png"}


def cli(*args, **options):
    """enhance.py in a process of its own. Root may read and write everything; without two capabilities it is held to
    the permission bits like anyone."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run([*drop, sys.executable, str(REPO / "enhance.py"), *map(str, args)], capture_output=True,
                          text=True, timeout=300, **options)


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and os.stat(path).st_mode & 0o400}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, head):
    """The folder, the names that must fail, the output folder inside it, and two runs: all of it, and once more."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = fill(folder)
    before = hashes(folder)
    out = folder / "enhanced"
    first = cli(folder, "--model", head, "--out", out, "--strength", 0, "--batch-size", 4)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = cli(folder, "--model", head, "--out", out, "--strength", 0)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, "done twice"
    assert {path: hashed for path, hashed in hashes(folder).items() if not path.is_relative_to(out)} == before
    return folder, bad, out, first, second


def test_hostile_folder_reports_the_bad_and_does_the_rest(hostile):
    folder, bad, out, first, second = hostile
    for done in (first, second):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        reported = re.findall(r"^failed: (.*?): ", done.stderr, re.M)
        expected = {str(folder / name) if name.isprintable() else repr(str(folder / name)) for name in bad}
        assert set(reported) == expected and len(reported) == len(bad)
        assert done.stdout.splitlines()[-1].endswith(f"; {len(bad)} failed")
        for line in done.stderr.splitlines():
            assert len(line.split(": ", 2)[2]) > 5, f"no reason given: {line}"
    inputs = {path.relative_to(folder) for path in folder.rglob("*")
              if not path.is_relative_to(out) and not path.name.startswith(".") and path.name != "notes.txt"
              and path.is_file() and not path.is_relative_to(folder / "again")}
    good = {path for path in inputs if path.name not in bad}
    special = {"same.bmp": "same.bmp.png", "palette_clear.gif": "palette_clear.gif.png", "moving.gif": "moving.png",
               "rgba.tif": "rgba.tif.png"}
    expected = {path.with_name(special.get(path.name, path.name)) for path in good}
    assert written(out) == set(map(str, expected))
    assert first.stdout.splitlines()[-1].startswith(f"{len(good)} images enhanced in ")
    assert f" {len(good)} were there already" in second.stdout.splitlines()[-1]
    assert not leftovers(folder)
    assert "2 images, " in next(line for line in first.stdout.splitlines() if "animated" in line)
    assert "2 images, " in next(line for line in first.stdout.splitlines() if "16 bits" in line)


def test_hostile_pixels(hostile):
    folder, _, out, *_ = hostile
    for name in ("plain.png", "one.png", "long.png", "with space.png", "new\nline.png", "größe-写真.png",
                 "写" * 83 + ".png", "a" * 251 + ".png", "-x.png",
                 "nested/deep/inner.png", "folder.png/inside.png", "link.png", "same.png",
                 "profile.png", "texts.png", "bad_exif.png", "bad_profile.png", os.fsdecode(b"\xff\xfe.png")):
        assert (pixels(out / name) == pixels(folder / name)).all(), name
    for name in ("photo.jpg", "modern.webp", "xmp.jpg", "profile.jpg", "profile.webp"):
        assert abs(pixels(out / name) - pixels(folder / name)).mean() < 3, name
    assert (pixels(out / "same.bmp.png") == noise()).all()
    assert abs(pixels(out / "gray16.png") - noise(1, high=65536, dtype=np.uint16)[..., None] / 257).max() <= 0.5
    assert abs(pixels(out / "rgb16.png") - noise(high=65536, dtype=np.uint16) / 257).max() <= 1
    assert (pixels(out / "gray.png") == noise(1)[..., None]).all()
    assert (pixels(out / "bits.png") == np.where(noise(1) > 127, 255, 0)[..., None]).all()
    palette = np.asarray(Image.fromarray(noise()).quantize(16).convert("RGB")).astype(int)
    assert (pixels(out / "palette.png") == palette).all()
    for name in ("rgba.png", "rgba.tif.png", "turned_alpha.png"):
        expected = UPRIGHT[8](noise(4)) if name == "turned_alpha.png" else noise(4)
        assert (pixels(out / name, "RGBA") == expected).all(), name
    assert (pixels(out / "rgba.webp", "RGBA")[..., 3] == noise(4)[..., 3]).all()
    assert (pixels(out / "gray_alpha.png", "RGBA") == noise(2)[..., [0, 0, 0, 1]]).all()
    index = np.asarray(Image.fromarray(noise()).quantize(16))
    assert (pixels(out / "palette_clear.png", "RGBA") == np.dstack([palette, index * 16])).all()
    assert (pixels(out / "palette_clear.gif.png", "RGBA")[..., 3] == np.where(index == 3, 0, 255)).all()
    key = (noise() == noise()[2, 3]).all(-1)
    assert (pixels(out / "colour_key.png", "RGBA") == np.dstack([noise(), np.where(key, 0, 255)])).all()
    for orientation, turn in UPRIGHT.items():
        assert (pixels(out / f"turned{orientation}.png") == turn(noise())).all(), orientation
        assert abs(pixels(out / f"turned{orientation}.jpg") - turn(smooth())).max() < 12, orientation
    assert abs(pixels(out / "cmyk.jpg") - (0, 255, 255)).max() <= 2
    assert abs(pixels(out / "cmyk_profile.jpg") - 255).max() <= 2, "shown without the profile of its inks"
    assert abs(pixels(out / "gray_profile.png") - 188).max() <= 1, "half the light is 188 in sRGB"
    for name in ("moving.webp", "moving.png"):
        with Image.open(out / name) as image:
            assert getattr(image, "n_frames", 1) == 1
    with Image.open(folder / "moving.gif") as image:
        assert (pixels(out / "moving.png") == np.asarray(image.convert("RGB"))).all()


def test_hostile_metadata(hostile):
    folder, _, out, *_ = hostile
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        assert Image.open(out / name).info["icc_profile"] == Image.open(folder / name).info["icc_profile"], name
    for name in ("cmyk_profile.jpg", "gray_profile.png", "bad_profile.png", "texts.png"):
        assert "icc_profile" not in Image.open(out / name).info or name == "texts.png"
    for orientation in UPRIGHT:
        for name in (f"turned{orientation}.jpg", f"turned{orientation}.png"):
            exif = Image.open(out / name).getexif()
            assert exif.get(274, 1) == 1 and exif[271] == "Maker" and exif.get_ifd(0x8825)[1] == "N", name
    image = Image.open(out / "texts.png")
    assert image.text["parameters"] == "a portrait, steps: 4\nseed: 7"
    title = image.text["Title"]
    assert (title, title.lang, title.tkey) == ("größe 写真", "de", "Titel")
    assert image.text["icc_profile"] == "a text that is named like a field"
    assert round(image.info["dpi"][0]) == 300
    assert Image.open(out / "xmp.jpg").info["xmp"] == Image.open(folder / "xmp.jpg").info["xmp"]
    assert Image.open(out / "liar.jpg").format == "JPEG", "the suffix says what is written"


def test_other_formats_keep_what_they_can(tmp_path, head, hostile):
    """The same files as JPEG: transparent parts on white, names that would meet kept apart, losses announced."""
    folder = hostile[0]
    names = ["rgba.png", "texts.png", "same.png", "same.jpg", "xmp.jpg", "turned6.png"]
    done = cli(*[folder / name for name in names], "--model", head, "--out", tmp_path, "--strength", 0,
                   "--format", "jpg")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path) == {"rgba.jpg", "texts.jpg", "same.png.jpg", "same.jpg", "xmp.jpg", "turned6.jpg"}
    alpha = noise(4)[..., 3:] / 255
    expected = noise(4)[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(pixels(tmp_path / "rgba.jpg") - expected).mean() < 6
    assert Image.open(tmp_path / "turned6.jpg").getexif()[271] == "Maker"
    assert "composed on white (1 images" in done.stdout and "JPEG cannot hold PNG texts (1 images" in done.stdout


def test_header_sizes_and_readers(tmp_path, head, hostile):
    """What goes together is known from headers; one that tells another size does no harm, nor does another process."""
    folder = hostile[0]
    paths = sorted(path for path in folder.glob("*") if path.name in ("plain.png", "one.png", "modern.webp", "pipe.png")
                   or path.name.startswith("turned"))
    batches = [[0, 1], list(range(2, len(paths)))]
    loader = DataLoader(enhance.Pictures(paths), batch_sampler=batches, collate_fn=list, num_workers=1,
                        multiprocessing_context="spawn")  # as on Windows and macOS
    pictures = [entry for batch in loader for entry in batch]
    assert [path for path, _, _ in pictures] == paths and len(pictures) == 21
    for path, picture, error in pictures:
        assert enhance.header_size(path) == (picture.rgb.shape[:2] if picture else None), path
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(noise()).save(tmp_path / "in" / f"{name}.png")
    exif, whole = Image.Exif(), (tmp_path / "in" / "b.png").read_bytes()
    exif[274] = 6
    (tmp_path / "in" / "b.png").write_bytes(whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:])
    assert enhance.header_size(tmp_path / "in" / "b.png") == (HEIGHT, WIDTH), "EXIF behind the pixels"
    done = cli(tmp_path / "in", "--model", head, "--out", tmp_path / "out", "--strength", 0, "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    assert (pixels(tmp_path / "out" / "b.png") == UPRIGHT[6](noise())).all()
    assert (pixels(tmp_path / "out" / "c.png") == noise()).all()


# ------------------------------------------------------------------------------------------ interruptions
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty pictures that take the small head a few seconds."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(40):
        Image.fromarray(noise(height=256, width=256, seed=i)).save(folder / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


def assert_whole(folder):
    for name in written(folder):
        with Image.open(folder / name) as image:
            image.load()  # raises on a truncated file
            assert image.size == (256, 256)


def start(folder, out, head, images, *args):
    """A run on its way, as soon as it has written `images` images."""
    process = subprocess.Popen([sys.executable, REPO / "enhance.py", folder, "--model", head, "--out", out, *args],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(written(out)) < images:
        time.sleep(0.01)
    return process


def test_interrupted_runs_go_on(tmp_path, head, many):
    out, before = tmp_path / "out", 0
    for number, images in ((signal.SIGINT, 3), (signal.SIGTERM, 10), (signal.SIGKILL, 20)):
        process = start(many, out, head, images)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        present = {out / name: (out / name).stat().st_mtime_ns for name in written(out)}
        assert images <= len(present) < 40 and "Traceback" not in errors
        assert_whole(out)
        if number == signal.SIGKILL:
            assert process.returncode == -number
            (out / f".photo.jpg.{'0' * 32}.tmp").write_bytes(b"half")  # what a kill inside a write leaves behind
            (out / ".mine.tmp").write_bytes(b"not ours")
        else:
            assert process.returncode == 128 + number
            line = re.fullmatch(r"interrupted; (\d+) of \d+ images are done, the same command does the rest\n", errors)
            assert line and int(line[1]) == len(present) - before, errors
            assert not leftovers(out)
        before = len(present)
    done = cli(many, "--model", head, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{40 - before} images enhanced"), done.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in present.items())
    assert_whole(out)
    assert leftovers(out) == [out / ".mine.tmp"] and len(written(out)) == 40


def test_full_disk_stops_the_run_with_one_line(tmp_path, head, many):
    """A limit on file size stands for the full disk: it too cuts writes short, which Pillow overlooks in a JPEG."""
    for suffix in ("jpg", "png", "webp"):
        out = tmp_path / suffix
        done = cli(many, "--model", head, "--out", out, "--format", suffix, "--quality", 40, "--strength", 0,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, 10_001)))
        assert done.returncode == 1 and not written(out), suffix
        assert re.fullmatch(r"error: cannot write to .*; 0 of 40 images are done, the same command does the rest\n",
                            done.stderr), done.stderr


def test_output_that_cannot_be_written(tmp_path, head, many):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (tmp_path / "file").write_text("no folder")
    for out in (locked, tmp_path / "file" / "below"):
        done = cli(many, "--model", head, "--out", out)
        assert done.returncode == 1 and re.fullmatch(r"error: cannot write to .*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path, head, many):
    """SIGKILL, SIGTERM and SIGINT between the start of Python and the end of the work: nothing half-written, ever."""
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for kill in range(32):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[kill % 4]
        if kill % 8 == 0:
            for path in out.glob("*"):
                path.unlink()
        process = start(many, out, head, 0, "--batch-size", str(rng.integers(1, 5)))
        time.sleep(rng.uniform(0.1, 6))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, -number, 128 + number)
        if out.is_dir():
            assert_whole(out)
    assert cli(many, "--model", head, "--out", out).returncode == 0
    assert len(list(out.iterdir())) == 41  # and the settings
    assert_whole(out)


@pytest.mark.slow
def test_really_full_disk(tmp_path, head, many):
    """A tmpfs of one megabyte, in a mount namespace of its own."""
    kept = tmp_path.parent / f"{tmp_path.name}-kept"  # what was on it is gone with the namespace
    script = (f"mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} {REPO}/enhance.py {many} --model {head} "
              f"--out {tmp_path}/out --strength 0; code=$?; cp -r {tmp_path}/out {kept}; exit $code")
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 1 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    assert 0 < len(written(kept)) < 40 and not leftovers(kept)
    assert_whole(kept)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(tmp_path, head, many):
    peaks = []
    for count in (40, 400):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.jpg").symlink_to(many / f"{i % 40 // 2 * 2:03d}.jpg")
        process = start(folder, tmp_path / f"out{count}", head, 0, "--batch-size", "4")
        peaks.append(os.wait4(process.pid, 0)[2].ru_maxrss / 2 ** 20)
    assert len(written(tmp_path / "out400")) == 400 and peaks[1] <= peaks[0] + 0.1, peaks
