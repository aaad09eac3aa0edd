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


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB", f"{path.name} is {image.mode}"
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
    network, folder = ResnetGenerator(channels=8, blocks=1), tmp_path_factory.mktemp("head")
    nn.init.normal_(network.body[-1].weight)
    save_head(network, folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five noise images of two sizes in two folders."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.png", "below/d.png", "below/e.png")):
        Image.fromarray(noise(3, *((40, 48) if i % 2 else (33, 50)), seed=i)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def command(head, monkeypatch, capsys):
    """command(arguments) -> output: the command line in this process, which saves the imports. It has to end with the
    exit code `expect`, or with one line that has the text `expect` in it. Without --model it uses the tiny head."""
    def run_here(*args, expect=0):
        monkeypatch.setattr(sys, "argv", ["enhance.py", "--model", str(head), *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / "enhance.py"), run_name="__main__")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        output, code = "".join(capsys.readouterr()), end.value.code
        if isinstance(expect, str):
            assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, (expect, code, output)
            assert expect in code
        else:
            assert code == expect, (code, output)
        return output
    return run_here


# ------------------------------------------------------------------------------------------- what users do
def test_folder(tmp_path, photos, head, command):
    """Pixels, structure, result line; a second run does exactly what is missing, a third finds all done."""
    out = tmp_path / "out"
    args = photos, "--model", head, "--out", out, "--batch-size", 2, "--strength", 0.7, "--precision", "fp32"
    done = run("enhance.py", *args)
    assert written(out) == {"a.png", "b.png", "c.png", "below/d.png", "below/e.png"}
    for name in written(out):
        assert abs(pixels(out / name) - reference(head, photos / name, 0.7)).max() <= 0.51
        assert abs(pixels(out / name) - pixels(photos / name)).mean() > 2, "a head that does nothing proves nothing"
    assert re.fullmatch(r"5 images enhanced in [\d.]+ s \([\d.]+ images/s in fp32\) -> .*out; 0 failed\n", done.stdout)
    assert not done.stderr, "no progress bar where there is no terminal"
    (out / "below" / "d.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    for enhanced, present in ((1, 4), (0, 5)):
        last = command(*args).splitlines()[-1]
        assert re.match(rf"{enhanced} images .*; {present} were there already \(--overwrite .*\); 0 failed", last), last
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and (out / "below" / "d.png").is_file()


def test_files_folders_formats(tmp_path, photos, head, command):
    text = command(photos / "a.png", photos / "below", photos / "b.png", "--out", tmp_path / "out", "--format", "webp")
    assert text.splitlines()[-1].startswith("4 images enhanced")
    assert written(tmp_path / "out") == {"a.webp", "b.webp", "below/d.webp", "below/e.webp"}
    sizes, jpg = [], tmp_path / "jpg" / "a.jpg"
    for quality in (30, 95):
        command(photos / "a.png", "--out", jpg.parent, "--format", "jpg", "--quality", quality, "--overwrite")
        assert Image.open(jpg).size == (50, 33)
        sizes.append(jpg.stat().st_size)
    assert sizes[0] < sizes[1]
    command(photos / "a.png", "--out", tmp_path / "look", "--compare", "--precision", "fp32")
    sheet = pixels(tmp_path / "look" / "a.png")
    assert sheet.shape[1] == 100 and (sheet[-33:, :50] == pixels(photos / "a.png")).all()
    assert abs(sheet[-33:, 50:] - reference(head, photos / "a.png")).max() <= 0.51


def test_what_is_done(tmp_path, photos, head, command):
    """Anew: newer inputs, a head trained further, all that a cut-off --overwrite left. Other settings: refused."""
    model, other, out = shutil.copytree(head, tmp_path / "model"), tmp_path / "other", tmp_path / "out"
    args = photos, "--out", out, "--model", model

    def enhanced(*more):
        return int(command(*args, *more).splitlines()[-1].split()[0])
    assert enhanced() == 5 and enhanced() == 0
    later = time.time() + 100
    os.utime(photos / "b.png", (later, later))
    assert enhanced() == 1
    os.utime(photos / "b.png", (later - 1000, later - 1000))
    assert enhanced("--model", shutil.copytree(model, other)) == 0, "the same head by another name"
    torch.manual_seed(1)
    save_head(ResnetGenerator(channels=8, blocks=1), model)
    assert enhanced() == 5, "trained further"
    for more, line in ((("--strength", 0.5), "--strength 1.0, not 0.5"), (("--quality", 90), "--quality 95, not 90"),
                       (("--compare",), "--compare False, not True"),
                       (("--model", other), f"--model {model}, not {other}")):
        command(*args, *more, expect=f"out was made with {line}: choose another --out, or let --overwrite")
    os.utime(out / "c.png", (later, later))  # as if another computer's clock were fast
    assert enhanced("--strength", 0.5, "--overwrite") == 5
    os.utime(out / "a.png", (later - 1000, later - 1000))  # as if that run had been cut off before this image
    assert enhanced("--strength", 0.5) == 1
    (out / enhance.SETTINGS).unlink()
    command(*args, "--strength", 0.5, expect="holds images of these names, but no .enhance.json")


def test_refusals(tmp_path, photos, command, monkeypatch):
    """One line each, nothing written, no original touched."""
    for name in ("empty", "twin/below", "broken", "outputs/out"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(photos / "a.png", tmp_path / "twin" / "below" / "d.png")
    shutil.copy(photos / "a.png", tmp_path / "outputs" / "out" / "a.png")
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    (tmp_path / "broken" / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nobody listens
    out = "--out", tmp_path / "out"
    cases = {
        "there is no file or folder": [tmp_path / "nothing", *out],
        "holds no image": [tmp_path / "empty", *out],
        "never overwritten": [photos, "--out", photos],
        "where the originals are": [photos / "a.png", "--out", tmp_path / "link"],
        "one of the originals": [photos / "below", tmp_path / "twin", "--out", tmp_path / "link"],
        "would both become": [photos / "below", tmp_path / "twin" / "below", *out],
        "no image but those in --out": [tmp_path / "outputs", "--out", tmp_path / "outputs" / "out"],
        "there is no folder": [photos, "--model", tmp_path / "nothing", *out],
        "no head of that name": [photos, "--model", "nobody/nothing", *out],
        "model.safetensors is missing": [photos, "--model", tmp_path / "broken", *out],
        "--quality is 0": [photos, *out, "--quality", 0],
        "--strength is nan": [photos, *out, "--strength", "nan"],
        "--batch-size is -1": [photos, *out, "--batch-size", -1],
        "--tile is 8": [photos, *out, "--tile", 8],
        "--device abacus": [photos, *out, "--device", "abacus"],
        "cannot write to": [photos, "--out", photos / "a.png" / "out"],
        "cannot write to /proc": [photos, "--out", "/proc"],  # a folder that exists; not even root may write there
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for expect, args in cases.items():
        command(*args, expect=expect)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


def test_two_ranks(tmp_path, photos, head, command):
    """torchrun: each image once, the same pixels, failures named once by their rank, one sum by rank 0."""
    for name in ("deep1.png", "deep2.png"):  # neighbours go to different ranks
        Image.fromarray(noise(1, high=65536, dtype=np.uint16)).save(photos / name)
    command(photos, "--out", tmp_path / "alone")
    both = shutil.copytree(tmp_path / "alone", tmp_path / "both")
    for name in ("a.png", "c.png", "below/e.png", "deep1.png", "deep2.png"):
        (both / name).unlink()
    (photos / "bad.png").write_text("bad")
    args = photos, "--model", head, "--out", both
    done = run("enhance.py", *args, torchrun=2, check=False)
    assert done.returncode == 1 and re.findall(r"^failed: .*/(.*?): ", done.stderr, re.M) == ["bad.png"]
    assert re.fullmatch(r"note: 16 bits.* \(2 images.*\n5 images enhanced .*; 2 were there already .*; 1 failed\n",
                        done.stdout), done.stdout
    assert len(written(both)) == 7
    for name in written(both):
        assert (both / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    done = run("enhance.py", *args, "--strength", 2, torchrun=2, check=False)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "made with --strength 1.0, not 2.0" in done.stderr, done.stderr


def test_precision(tmp_path, photos, command, monkeypatch):
    """auto is bf16 where the hardware computes in it, by whatever functions this torch has, and says so."""
    for native, name in ((lambda: True, "bf16"), (lambda: False, "fp32"), (None, "fp32")):
        if native:
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", native, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        assert f"images/s in {name})" in command(photos, "--out", tmp_path / name, "--overwrite")
    assert 0 < max(abs(pixels(tmp_path / "bf16" / name) - pixels(tmp_path / "fp32" / name)).max()
                   for name in written(photos)) <= 3
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert enhance.choose_precision(torch.device("cuda"), None) == "fp32", "a T4 emulates it"


# --------------------------------------------------------------------------------------------------- heads
def test_a_model_is_data(tmp_path, photos, head, command):
    """A pickle beside good weights is not read (in their place: test_modules.py); config.json's names mean nothing."""
    model, ran = shutil.copytree(head, tmp_path / "model"), tmp_path / "ran"

    class Malice:
        def __reduce__(self):
            return ran.touch, ()
    evil = pickle.dumps(Malice())
    pickle.loads(evil)
    assert ran.exists(), "the pickle of this test is harmless"
    ran.unlink()
    for name in ("pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pkl"):
        (model / name).write_bytes(evil)
    command(photos, "--model", model, "--out", tmp_path / "out")
    (model / "model.safetensors").write_bytes(evil)
    command(photos, "--model", model, "--out", tmp_path / "evil", expect="damaged")
    for config in ({"network": "os.system"}, {"network": "ResnetGenerator", "channels": "__import__('os')"}, []):
        (model / "config.json").write_text(json.dumps(config))
        command(photos, "--model", model, "--out", tmp_path / "config", expect="damaged")
    assert not ran.exists()


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
    with socket.create_server(("127.0.0.1", 0)) as silent:
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
    _hub_mixin_config = {}

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
    hungry, raised = Hungry(3 * 33 * 50, error), []
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    assert "12 images enhanced" in command(photos, "--out", tmp_path / "out", "--batch-size", 8)
    assert hungry.batches == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    for path in photos.rglob("*.png"):
        assert abs(pixels(tmp_path / "out" / path.relative_to(photos)) - (255 - pixels(path))).max() <= 1

    hungry.pixels = 33 * 50  # the two images of 40x48 never fit
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: raised.append(sys.exc_info()[1]))
    text = command(photos, "--device", "cpu", "--out", tmp_path / "less", "--batch-size", 8, expect=1)
    assert text.count("out of memory: try --tile 512") == 2 and "10 images" in text
    assert raised and not any(raised), "an exception in flight still holds the tensors"


def test_other_errors(tmp_path, photos, command, monkeypatch):
    """An error of the network is its image's; one of the GPU ends the run; what is not finite is not written."""
    hungry = Hungry(33 * 50, RuntimeError("input tensor must fit into 32-bit index math"))
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    text = command(photos, "--out", tmp_path / "out", "--batch-size", 4, expect=1)
    assert text.count("must fit into 32-bit") == 2 and "3 images enhanced" in text
    assert sorted(hungry.batches) == [1, 1, 1, 1, 1, 2, 2, 3]
    hungry.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        command(photos, "--out", tmp_path / "out")
    monkeypatch.setattr(Hungry, "forward", lambda self, x: torch.where(x < 0, torch.nan, x))
    Image.new("RGB", (20, 20), "white").save(photos / "white.png")
    text = command(photos, "--out", tmp_path / "nan", "--precision", "fp32", expect=1)
    assert text.count("output in fp32 is not finite") == 5 and written(tmp_path / "nan") == {"white.png"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG])
def test_disk_errors_stop_the_run(tmp_path, photos, command, monkeypatch, code):
    """A full disk ends it with one line; a name that is too long costs its image only."""
    def write_image(image, path, real=modules.write_image, **options):
        if path.name == "b.png":
            raise OSError(code, "broken")
        real(image, path, **options)
    monkeypatch.setattr(modules, "write_image", write_image)
    if code == errno.ENAMETOOLONG:
        text = command(photos, "--out", tmp_path / "out", expect=1)
        assert "4 images enhanced" in text and text.count("failed: ") == 1
    else:
        command(photos, "--out", tmp_path / "out", expect="of 5 images are done")


def test_tiles_are_exact(tmp_path, photos, head, command):
    """Without norm and attention, tiles are the whole image; the margin is as small as it may be."""
    for blocks, upsample in ((1, "resize"), (3, "resize"), (1, "bilinear"), (1, "transpose")):
        torch.manual_seed(0)
        network = ResnetGenerator(4, blocks, attention="none", upsample=upsample).double().eval()
        nn.init.normal_(network.body[-1].weight)
        margin = enhance.tile_margin(network)
        for size in ((150, 211), (64 + 2 * margin + 1, 64 + 2 * margin), (10, 300), (128, 300)):
            x = torch.rand(2, 3, *size, dtype=torch.double) * 2 - 1
            with torch.inference_mode():
                whole = network(x)
                torch.testing.assert_close(enhance.tiled(network, x, 64, margin), whole, atol=1e-10, rtol=0)
                assert (enhance.tiled(network, x, 64, margin - 8) - whole).abs().max() > 1e-6
    Image.fromarray(noise(3, 70, 200)).save(photos / "wide.png")
    save_head(ResnetGenerator(channels=4, blocks=1, norm="instance"), tmp_path / "instance")
    for model, notes in ((head, 0), (tmp_path / "instance", 1)):
        text = command(photos, "--model", model, "--out", tmp_path / f"out{notes}", "--tile", 64, "--strength", 0)
        assert text.count("may drift from tile to tile") == notes
        for name in written(photos):
            assert (pixels(tmp_path / f"out{notes}" / name) == pixels(photos / name)).all()


def test_compile(tmp_path, photos, head, command, monkeypatch):
    """Batches like the first are compiled (here without Inductor, which takes half a minute), its halves where memory is
    short; where compiling fails, all goes on without it, and says so once."""
    for name in "fghijkl":
        shutil.copy(photos / "a.png", photos / f"{name}.png")  # with a, c, e: ten of one size
    shapes, broken, compile_ = [], False, torch.compile

    def backend(graph, inputs):
        if broken:
            raise OSError("no C compiler")

        def forward(*args):
            images = next(arg for arg in args if arg.ndim == 4 and arg.shape[1] == 3 and arg.shape[-1] == 50)
            shapes.append(len(images))
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*args)
        return forward
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    args = photos, "--model", head, "--compile", "--precision", "fp32", "--batch-size"
    for case, batch_size, expected, notes in (("fits", 4, [4, 4], 0), ("short", 5, [5, 2], 0), ("broken", 5, [], 1)):
        broken, shapes[:] = case == "broken", []
        torch._dynamo.reset()
        text = command(*args, batch_size, "--out", tmp_path / case)
        assert "12 images enhanced" in text and text.count("the head runs uncompiled") == notes, text
        assert shapes == expected
        for name in written(photos):
            assert abs(pixels(tmp_path / case / name) - reference(head, photos / name)).max() <= 0.51


# ------------------------------------------------------------------------------------------- hostile files
# EXIF orientation -> what turns the stored array upright (EXIF 2.32, table 6)
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}


def smooth():
    """A picture that JPEG keeps within a few levels and that looks different from every side."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) * 255 // (HEIGHT + WIDTH)], -1).astype(np.uint8)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, *chunks):
    """A PNG file by hand, for what Pillow does not write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + png_chunk(b"IEND", b"")


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
    """Writes the hostile folder. Returns {output name: (pixels that it must have, tolerance)} at strength 0, and the
    names of the files that must be reported."""
    expected, rgb, soft = {}, Image.fromarray(noise()), Image.fromarray(smooth())

    def add(name, image, result, tolerance=0, out=None, **options):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name, **options)
        expected[out or name] = result, tolerance

    # Names and places
    for name in ("plain.png", "same.png", "with space.png", "new\nline.png", "größe-写真.png", "写" * 83 + ".png",
                 "a" * 251 + ".png", "-x.png", "nested/deep/inner.png", "folder.png/inside.png",
                 os.fsdecode(b"\xff\xfe.png")):
        add(name, rgb, noise(), format="PNG")
    add("same.bmp", rgb, noise(), out="same.bmp.png")
    (folder / "link.png").symlink_to("plain.png")
    expected["link.png"] = noise(), 0
    (folder / "again").symlink_to(folder, target_is_directory=True)
    rgb.save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image, and not named like one")

    # Sizes, modes, depths, transparency
    one, long = noise(3, 1, 1)[None, None], noise(3, 5000, 3)
    add("one.png", Image.fromarray(one), one)
    add("long.png", Image.fromarray(long), long)
    gray = np.dstack([noise(1)] * 3)
    add("gray.png", Image.fromarray(noise(1)), gray)
    add("bits.png", Image.fromarray(noise(1) > 127), np.where(gray > 127, 255, 0))
    add("gray_alpha.png", Image.fromarray(noise(2), "LA"), noise(2)[..., [0, 0, 0, 1]])
    add("rgba.png", Image.fromarray(noise(4)), noise(4))
    add("rgba.tif", Image.fromarray(noise(4)), noise(4), out="rgba.tif.png")
    alpha = np.dstack([smooth(), noise(1)])
    add("rgba.webp", Image.fromarray(alpha), alpha, (10, 10, 10, 0), lossless=True, exact=True)
    palette = rgb.quantize(16)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    add("palette.png", palette, colours)
    add("palette_clear.png", palette, np.dstack([colours, index * 16]), transparency=bytes(range(0, 256, 16)))
    add("palette_clear.gif", palette, np.dstack([colours, np.where(index == 3, 0, 255)]), transparency=3,
        out="palette_clear.gif.png")
    key = (noise() == noise()[2, 3]).all(-1)
    add("colour_key.png", rgb, np.dstack([noise(), np.where(key, 0, 255)]), transparency=tuple(noise()[2, 3].tolist()))
    for name, kind, channels in (("gray16.png", 0, 1), ("rgb16.png", 2, 3), ("rgba16.png", 6, 4)):
        deep = noise(channels, high=65536, dtype=np.uint16)
        (folder / name).write_bytes(png(WIDTH, HEIGHT, 16, kind, deep.astype(">u2")))
        expected[name] = ((np.dstack([deep] * 3) if channels == 1 else deep) / 257, 0.5 if channels == 1 else 1)

    # Colour spaces, orientation, metadata
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    plane = np.ones((HEIGHT, WIDTH, 3))
    add("cmyk.jpg", cyan, plane * (0, 255, 255), 2, quality=95)
    add("cmyk_profile.jpg", cyan, plane * 255, 2, quality=95, icc_profile=ink_profile())  # white with these inks
    half = Image.new("L", (WIDTH, HEIGHT), 128)
    add("gray_profile.png", half, plane * 188, 1, icc_profile=LINEAR_GRAY)  # half the light is 188 in sRGB
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    add("profile.png", soft, smooth(), icc_profile=srgb)
    add("profile.jpg", soft, smooth(), 8, icc_profile=srgb, quality=95)
    add("profile.webp", soft, smooth(), 10, icc_profile=srgb, lossless=True)
    add("bad_profile.png", rgb, noise(), icc_profile=b"rubbish" * 30)
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[274], exif[271] = orientation, "Maker"
        exif.get_ifd(0x8825)[1] = "N"  # the GPS block
        add(f"turned{orientation}.jpg", soft, turn(smooth()), 4, quality=95, subsampling=0, exif=exif)
        add(f"turned{orientation}.png", rgb, turn(noise()), exif=exif)
    add("turned_alpha.png", Image.fromarray(noise(4)), UPRIGHT[8](noise(4)), exif=exif)
    add("bad_exif.png", rgb, noise(), exif=b"Exif\0\0MM rubbish")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a portrait, steps: 4\nseed: 7")
    texts.add_itxt("Title", "größe 写真", "de", "Titel")
    texts.add_text("icc_profile", "a text that is named like a field")
    add("texts.png", rgb, noise(), pnginfo=texts, dpi=(300, 300))
    add("xmp.jpg", soft, smooth(), 8, quality=95, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" note="kept"/>')
    for name in ("photo.jpg", "same.jpg", "SHOUT.JPG"):
        add(name, soft, smooth(), 8, quality=95)
    add("liar.jpg", soft, smooth(), 4, format="PNG")
    frames = [Image.fromarray(np.rot90(smooth(), 2 * i)) for i in range(3)]
    add("moving.webp", soft, smooth(), 10, save_all=True, append_images=frames[1:], lossless=True)
    add("moving.gif", palette, colours, out="moving.png", save_all=True,
        append_images=[frame.quantize(16) for frame in frames])

    # What cannot be read
    whole, photo = (folder / "plain.png").read_bytes(), (folder / "photo.jpg").read_bytes()
    key = png_chunk(b"tRNS", deep[0, 0, :3].astype(">u2").tobytes())
    bad = {"cut.png": whole[:len(whole) // 2], "cut.jpg": photo[:len(photo) // 2], "text.png": b"hello",
           "empty.png": b"", "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:], "new\nbad.png": b"bad",
           "bomb.png": png(30000, 30000, 8, 0, []), "locked.png": whole,
           "deep_key.png": png(WIDTH, HEIGHT, 16, 2, deep[..., :3].astype(">u2"), key)}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "locked.png").chmod(0)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(noise(1).astype(np.float32) / 255).save(folder / "float.tif")
    return expected, {*bad, "loop.png", "dangling.png", "pipe.png", "float.tif"}


def cli(*args):
    """enhance.py in a process of its own. Root may read and write everything; without two capabilities it is held to
    the permission bits like anyone."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run([*drop, sys.executable, str(REPO / "enhance.py"), *map(str, args)], capture_output=True,
                          text=True, timeout=300)


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and os.stat(path).st_mode & 0o400}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, head):
    """The folder, what fill returns, the output folder inside it, and two runs: all of it, and once more. The originals
    stay as they are, and outputs are no inputs, whatever way their folder is named."""
    folder = tmp_path_factory.mktemp("hostile")
    expected, bad = fill(folder)
    out, before, args = folder / "enhanced", hashes(folder), ("--model", head, "--strength", 0)
    first = cli(folder, *args, "--out", out, "--batch-size", 4)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = cli(folder, *args, "--out", folder / "nested" / ".." / "enhanced")
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, "done twice"
    assert {path: hashed for path, hashed in hashes(folder).items() if not path.is_relative_to(out)} == before
    return folder, expected, bad, out, first, second


def test_hostile_folder_reports_the_bad_and_does_the_rest(hostile):
    folder, expected, bad, out, first, second = hostile
    for done in (first, second):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        reported = re.findall(r"^failed: (.*?): .{5}", done.stderr, re.M)  # a name and some reason
        assert len(reported) == done.stderr.count("\n") == len(bad)
        assert set(reported) == {str(folder / name) if name.isprintable() else repr(str(folder / name)) for name in bad}
        assert done.stdout.splitlines()[-1].endswith(f"; {len(bad)} failed")
    assert written(out) == set(expected) and not leftovers(folder)
    assert first.stdout.splitlines()[-1].startswith(f"{len(expected)} images enhanced in ")
    assert f" {len(expected)} were there already" in second.stdout.splitlines()[-1]
    for count, note in ((2, "animated"), (3, "16 bits"), (1, "damaged EXIF"), (1, "unusable colour profile")):
        assert f"({count} images, " in next(line for line in first.stdout.splitlines() if note in line)


def test_hostile_pixels(hostile):
    _, expected, _, out, *_ = hostile
    for name, (values, tolerance) in expected.items():
        with Image.open(out / name) as image:
            assert image.mode == ("RGBA" if values.shape[2] == 4 else "RGB"), name
            assert getattr(image, "n_frames", 1) == 1 and np.asarray(image).shape == values.shape, name
            assert (abs(np.asarray(image) - values.astype(float)) <= tolerance).all(), name


def test_hostile_metadata(hostile):
    folder, _, _, out, *_ = hostile
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        assert Image.open(out / name).info["icc_profile"] == Image.open(folder / name).info["icc_profile"], name
    for name in ("cmyk_profile.jpg", "gray_profile.png", "bad_profile.png"):
        assert "icc_profile" not in Image.open(out / name).info, name
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


def test_other_formats_keep_what_they_can(tmp_path, hostile, command):
    """The same files as JPEG: transparent parts on white, names that would meet kept apart, losses announced."""
    names = ["rgba.png", "texts.png", "same.png", "same.jpg", "xmp.jpg", "turned6.png"]
    jpg, png = tmp_path / "jpg", tmp_path / "png"
    text = command(*[hostile[0] / name for name in names], "--out", jpg, "--strength", 0, "--format", "jpg")
    assert written(jpg) == {"rgba.jpg", "texts.jpg", "same.png.jpg", "same.jpg", "xmp.jpg", "turned6.jpg"}
    alpha = noise(4)[..., 3:] / 255
    expected = noise(4)[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(pixels(jpg / "rgba.jpg") - expected).mean() < 6
    assert Image.open(jpg / "turned6.jpg").getexif()[271] == "Maker"
    assert "composed on white (1 images" in text and "JPEG cannot hold PNG texts (1 images" in text
    command(hostile[0] / "xmp.jpg", "--out", png, "--strength", 0, "--format", "png")
    assert Image.open(png / "xmp.png").info["xmp"] == Image.open(hostile[0] / "xmp.jpg").info["xmp"]


def test_header_sizes_and_readers(tmp_path, hostile, command):
    """What goes together is known from headers; one that tells another size does no harm, nor does another process."""
    folder = hostile[0]
    paths = sorted(path for path in folder.glob("*") if path.name in ("plain.png", "one.png", "modern.webp", "pipe.png")
                   or path.name.startswith("turned"))
    loader = DataLoader(enhance.Pictures(), batch_sampler=[paths[:2], paths[2:]], collate_fn=list, num_workers=1,
                        multiprocessing_context="spawn")  # as on Windows and macOS
    pictures = [picture for batch in loader for picture in batch]
    assert [picture.path for picture in pictures] == paths and len(pictures) == 20
    for picture in pictures:
        assert enhance.header_size(picture.path) == (None if picture.error else picture.rgb.shape[:2]), picture.path
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(noise()).save(tmp_path / "in" / f"{name}.png")
    exif, whole = Image.Exif(), (tmp_path / "in" / "b.png").read_bytes()
    exif[274] = 6
    (tmp_path / "in" / "b.png").write_bytes(whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:])
    assert enhance.header_size(tmp_path / "in" / "b.png") == (HEIGHT, WIDTH), "EXIF behind the pixels"
    command(tmp_path / "in", "--out", tmp_path / "out", "--strength", 0, "--batch-size", 3)
    for name, expected in (("a", noise()), ("b", UPRIGHT[6](noise())), ("c", noise())):
        assert (pixels(tmp_path / "out" / f"{name}.png") == expected).all()


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


def test_interrupted_runs_go_on(tmp_path, head, many, command):
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
    assert command(many, "--out", out).splitlines()[-1].startswith(f"{40 - before} images enhanced")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in present.items())
    assert_whole(out)
    assert leftovers(out) == [out / ".mine.tmp"] and len(written(out)) == 40


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_full_disk_stops_the_run_with_one_line(tmp_path, many, command, suffix):
    """A limit on file size stands for the full disk: it too cuts writes short, which Pillow overlooks in a JPEG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, limits[1]))
    try:
        text = command(many, "--out", tmp_path, "--format", suffix, "--quality", 40, "--strength", 0,
                       expect="; 0 of 40 images are done, the same command does the rest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not written(tmp_path) and not text


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
