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
        try:
            runpy.run_path(str(REPO / "enhance.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())
    return run_here


# ------------------------------------------------------------------------------------------- what users do
def test_folder(tmp_path, photos, head, command):
    """Pixels, structure, result line; a second run finds all done but what is missing."""
    out = tmp_path / "out"
    args = photos, "--model", head, "--out", out, "--batch-size", 2, "--strength", 0.7, "--precision", "fp32"
    assert re.fullmatch(r"5 images enhanced in [\d.]+ s \([\d.]+ images/s in fp32\) -> .*out; 0 failed\n",
                        command(*args)[1])
    assert written(out) == {"a.png", "b.png", "c.png", "below/d.png", "below/e.png"}
    for name in written(out):
        assert abs(pixels(out / name) - reference(head, photos / name, 0.7)).max() <= 0.51
        assert abs(pixels(out / name) - pixels(photos / name)).mean() > 2, "a head that does nothing proves nothing"
    (out / "below" / "d.png").unlink()
    assert re.match(r"1 images .*; 4 were there already \(--overwrite .*\); 0 failed", command(*args)[1])


def test_files_folders_formats(tmp_path, photos, head, command):
    code, text = command(photos / "a.png", photos / "below", photos / "b.png", "--model", head,
                         "--out", tmp_path / "out", "--format", "webp")
    assert code == 0 and "4 images enhanced" in text
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
        return int(text.split()[0]) if code == 0 else code
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
        "--quality: ": [photos, *model, *out, "--quality", 0],
        "--strength: ": [photos, *model, *out, "--strength", "nan"],
        "--batch-size: ": [photos, *model, *out, "--batch-size", -1],
        "--tile: ": [photos, *model, *out, "--tile", 8],
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


def test_two_ranks(tmp_path, photos, head, command):
    """torchrun: each image once, the same pixels, failures named once by their rank, one sum; refusals once."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    command(photos, "--model", head, "--out", alone)
    (photos / "bad.png").write_text("bad")
    args = "enhance.py", photos, "--model", head, "--out", both
    done = run(*args, torchrun=2, check=False)
    assert done.returncode == 1 and re.findall(r"^failed: .*/(.*?): ", done.stderr, re.M) == ["bad.png"]
    assert re.fullmatch(r"5 images enhanced .*; 1 failed\n", done.stdout), done.stdout
    assert written(both) == written(alone)
    for name in written(alone):
        assert (both / name).read_bytes() == (alone / name).read_bytes()
    done = run(*args, "--strength", 2, torchrun=2, check=False)
    assert done.stderr.count("error: ") == 1 and "made with --strength 1.0, not 2.0" in done.stderr, done.stderr


def test_precision(tmp_path, photos, head, command, monkeypatch):
    """auto is bf16 where the hardware computes in it, on CPUs without InstanceNorm only, and says so."""
    save_head(ResnetGenerator(channels=4, blocks=1, norm="instance"), tmp_path / "instance")
    for model, native, name in ((head, True, "bf16"), (head, False, "fp32"), (tmp_path / "instance", True, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        out = tmp_path / f"{model.name} {name}"
        code, text = command(photos, "--model", model, "--out", out)
        assert code == 0 and f"images/s in {name})" in text
    assert 0 < max(abs(pixels(tmp_path / f"{head.name} bf16" / name) - pixels(tmp_path / f"{head.name} fp32" / name))
                   .max() for name in written(photos)) <= 3
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert enhance.choose_precision(torch.device("cuda"), "none") == "fp32", "a T4 emulates it"


# --------------------------------------------------------------------------------------------------- heads
class Malice:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('pwned').write_text('it ran')",)


def test_a_model_is_data(tmp_path, photos, head, command, monkeypatch):
    """A pickle in a model folder is never read: beside good weights, or under their name."""
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Malice())
    pickle.loads(evil)
    assert (tmp_path / "pwned").exists(), "the pickle of this test is harmless"
    (tmp_path / "pwned").unlink()
    model = shutil.copytree(head, tmp_path / "model")
    for name in ("pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pkl"):
        (model / name).write_bytes(evil)
    assert command(photos, "--model", model)[0] == 0
    (model / "model.safetensors").write_bytes(evil)
    assert "damaged" in command(photos, "--model", model)[0] and not (tmp_path / "pwned").exists()


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


@pytest.fixture
def ten(photos):
    """Twelve photos, ten of them of one size."""
    for name in "fghijkl":
        shutil.copy(photos / "a.png", photos / f"{name}.png")
    return photos


def test_what_a_network_can_raise(tmp_path, ten, command, monkeypatch):
    """Memory: smaller batches. Another error: its image's. One of the GPU: the end. Not finite: not written."""
    hungry = Hungry(3 * 33 * 50, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)

    def enhanced(out, batch_size):
        return command(ten, "--model", "any", "--out", tmp_path / out, "--batch-size", batch_size)
    code, text = enhanced("out", 8)
    assert code == 0 and "12 images enhanced" in text
    assert hungry.batches == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    for path in ten.rglob("*.png"):
        assert abs(pixels(tmp_path / "out" / path.relative_to(ten)) - (255 - pixels(path))).max() <= 1
    hungry.pixels = 33 * 50  # the two images of 40x48 never fit
    for error, line in ((RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: try"),
                        (RuntimeError("input tensor must fit into 32-bit index math"), "must fit into 32-bit")):
        hungry.error = error
        code, text = enhanced(f"{line[:3]} again", 4)
        assert code == 1 and text.count(line) == 2 and "10 images" in text
    hungry.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        enhanced("gpu", 4)
    monkeypatch.setattr(modules, "load_head", lambda path: nn.LeakyReLU(float("nan")))  # NaN for x < 0
    Image.new("RGB", (20, 20), "white").save(ten / "white.png")
    code, text = enhanced("nan", 4)
    assert code == 1 and text.count("output in fp32 is not finite") == 12 and written(tmp_path / "nan") == {"white.png"}


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
    for settings in ({"blocks": 3}, {"blocks": 1, "upsample": "transpose"}):
        torch.manual_seed(0)
        network = ResnetGenerator(channels=4, attention="none", **settings).double().eval()
        nn.init.normal_(network.body[-1].weight)
        margin, shapes = enhance.tile_margin(network), set()
        network.register_forward_pre_hook(lambda module, x: shapes.add(x[0].shape))
        for size in ((150, 211), (64 + 2 * margin + 1, 64 + 2 * margin), (10, 300)):
            x = torch.rand(2, 3, *size, dtype=torch.double) * 2 - 1
            with torch.inference_mode():
                whole = network(x)
                shapes.clear()
                torch.testing.assert_close(enhance.tiled(network, x, 64, margin), whole, atol=1e-10, rtol=0)
                assert len(shapes) == 1, "every window has one size, that of the compiled network"
                assert (enhance.tiled(network, x, 64, margin - 8) - whole).abs().max() > 1e-6
    Image.fromarray(noise(3, 70, 200)).save(photos / "wide.png")
    save_head(ResnetGenerator(channels=4, blocks=1, norm="instance"), tmp_path / "instance")
    for model, notes in ((head, 0), (tmp_path / "instance", 1)):
        code, text = command(photos, "--model", model, "--out", tmp_path / f"out{notes}", "--tile", 64, "--strength", 0)
        assert code == 0 and text.count("may drift from tile to tile") == notes
        for name in written(photos):
            assert (pixels(tmp_path / f"out{notes}" / name) == pixels(photos / name)).all()


def test_compile(tmp_path, ten, head, command, monkeypatch):
    """Batches of the most frequent size are compiled (here without Inductor, which takes half a minute), smaller ones
    after a lack of memory; where compiling fails, all goes on without it, and says so once."""
    shapes, compile_ = [], torch.compile

    def compiled(graph, inputs):
        def forward(*args):
            images = next(arg for arg in args if arg.ndim == 4 and arg.shape[1] == 3 and arg.shape[-1] == 50)
            shapes.append(len(images))
            if len(images) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*args)
        return forward

    def broken(graph, inputs):
        raise OSError("no C compiler")
    for backend, expected in ((compiled, [5, 2, 2, 2]), (broken, [])):
        monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
        torch._dynamo.reset()
        shapes.clear()
        out = tmp_path / backend.__name__
        code, text = command(ten, "--model", head, "--compile", "--precision", "fp32", "--batch-size", 5, "--out", out)
        assert code == 0 and "12 images enhanced" in text and shapes == expected
        assert text.count("the head runs uncompiled") == (backend is broken), text
        for name in written(ten):
            assert abs(pixels(out / name) - reference(head, ten / name)).max() <= 0.51


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


def linear_gray():
    """An ICC version 2 profile by hand, of gray that is proportional to light: header, tag table, data."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 176, len(curve))
    header = struct.pack(">I4sI4s4s4s12x4s28x", 188, b"lcms", 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return (header + white[8:]).ljust(128, b"\0") + table + white + curve


BAD = {"cut.png", "cut.jpg", "flipped.png", "empty.png", "text.png", "bomb.png", "loop.png", "dangling.png", "pipe.png",
       "float.tif", "locked.png", "new\nbad.png"}
SAME = ["with space.png", "new\nline.png", "größe-写真.png", "写" * 83 + ".png", "a" * 251 + ".png", "-x.png",
        "nested/deep/inner.png", "folder.png/inside.png", os.fsdecode(b"\xff\xfe.png"), "plain.png"]
DEEP, DEEP_GRAY = noise(high=65536, dtype=np.uint16), noise(1, high=65536, dtype=np.uint16)


def fill(folder):
    """Writes the hostile folder."""
    def save(name, array, mode=None, **options):
        Image.fromarray(array, mode).save(folder / name, **options)

    # Names and kinds of files
    for name in SAME + ["liar.jpg", ".hidden.png", "locked.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(name, noise(), format="PNG")
    for name in ("same.png", "same.jpg", "same.bmp", "SHOUT.JPG"):
        save(name, noise())
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "link.png").symlink_to("plain.png")
    (folder / "notes.txt").write_text("no image, and not named like one")

    # Depths, palettes, transparency, inks
    save("photo.jpg", smooth(), quality=95)
    save("modern.webp", smooth(), lossless=True)
    save("one.png", noise(height=1, width=1).reshape(1, 1, 3))
    save("long.png", noise(height=5000, width=3))
    save("gray16.png", DEEP_GRAY)
    rows = b"".join(b"\0" + row.tobytes() for row in DEEP.astype(">u2"))
    (folder / "rgb16.png").write_bytes(png(WIDTH, HEIGHT, 16, 2, rows))
    palette = Image.fromarray(noise()).quantize(16)
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_clear.png", transparency=bytes(range(0, 256, 16)))
    palette.save(folder / "palette_clear.gif", transparency=3)
    save("colour_key.png", noise(), transparency=tuple(noise()[2, 3].tolist()))
    save("gray.png", noise(1))
    save("bits.png", noise(1) > 127)
    save("gray_alpha.png", noise(2), "LA")
    for name, options in (("rgba.png", {}), ("rgba.webp", {"lossless": True, "exact": True}), ("rgba.tif", {})):
        save(name, noise(4), **options)
    Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(folder / "cmyk.jpg", quality=95)
    save("gray_profile.png", np.full((HEIGHT, WIDTH), 128, np.uint8), icc_profile=linear_gray())

    # Metadata, several pictures
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        save(name, smooth(), icc_profile=srgb)
    save("bad_profile.png", noise(), icc_profile=b"rubbish" * 30)
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[274], exif[271] = orientation, "Maker"
        exif.get_ifd(0x8825)[1] = "N"  # the GPS block
        save(f"turned{orientation}.jpg", smooth(), quality=95, subsampling=0, exif=exif)
        save(f"turned{orientation}.png", noise(), exif=exif)
    save("turned_alpha.png", noise(4), exif=exif)
    save("bad_exif.png", noise(), exif=b"Exif\0\0MM rubbish")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a portrait, steps: 4\nseed: 7")
    texts.add_itxt("Title", "größe 写真", "de", "Titel")
    texts.add_text("icc_profile", "a text that is named like a field")
    save("texts.png", noise(), pnginfo=texts, dpi=(300, 300))
    save("xmp.jpg", smooth(), xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" note="kept"/>')
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames = [frame.quantize(16) for frame in frames]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])

    # The bad ones
    for name, whole in (("cut.png", folder / "plain.png"), ("cut.jpg", folder / "photo.jpg")):
        (folder / name).write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    whole = (folder / "plain.png").read_bytes()
    for name, content in (("flipped.png", whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]), ("empty.png", b""),
                          ("text.png", b"hello"), ("bomb.png", png(30000, 30000, 8, 0, b"")), ("new\nbad.png", b"bad")):
        (folder / name).write_bytes(content)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    save("float.tif", noise(1).astype(np.float32) / 255)
    (folder / "locked.png").chmod(0)


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
    """The folder, the output folder inside it, and two runs: all of it, and once more."""
    folder = tmp_path_factory.mktemp("hostile")
    fill(folder)
    before, out = hashes(folder), folder / "enhanced"
    first = cli(folder, "--model", head, "--out", out, "--strength", 0, "--batch-size", 4)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = cli(folder, "--model", head, "--out", out, "--strength", 0)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}, "done twice"
    assert {path: hashed for path, hashed in hashes(folder).items() if not path.is_relative_to(out)} == before
    return folder, out, first, second


def good_inputs(folder, out):
    """The good inputs."""
    return {path for path in folder.rglob("*") if path.is_file() and path.name not in BAD | {"notes.txt"}
            and path.name[0] != "." and not {out, folder / "again"} & set(path.parents)}


def test_hostile_folder_reports_the_bad_and_does_the_rest(hostile):
    folder, out, first, second = hostile
    good = {str(path.relative_to(folder)) for path in good_inputs(folder, out)}
    for done in (first, second):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        reported = re.findall(r"^failed: (.*?): .{5}", done.stderr, re.M)
        assert sorted(reported) == sorted(enhance.printable(folder / name) for name in BAD)
        assert done.stdout.endswith(f"; {len(BAD)} failed\n")
    renamed = {"same.bmp": "same.bmp.png", "palette_clear.gif": "palette_clear.gif.png", "moving.gif": "moving.png",
               "rgba.tif": "rgba.tif.png"}
    assert written(out) == {renamed.get(name, name) for name in good}
    assert first.stdout.startswith(f"{len(good)} images enhanced in ")
    assert f" {len(good)} were there already" in second.stdout
    assert not leftovers(folder)
    for note in ("animated or of several pages", "16 bits per channel"):
        assert re.search(f"^note: {note}.* \\(2 images, ", first.stderr, re.M), first.stderr


def test_hostile_pixels(hostile):
    folder, out, *_ = hostile
    palette = Image.fromarray(noise()).quantize(16)
    index, key = np.asarray(palette), (noise() == noise()[2, 3]).all(-1)
    rgb = dict.fromkeys([*SAME, "link.png", "same.png", "same.bmp.png", "texts.png", "bad_exif.png", "bad_profile.png"],
                        noise())
    rgb |= {f"turned{orientation}.png": turn(noise()) for orientation, turn in UPRIGHT.items()}
    rgb |= {name: pixels(folder / name) for name in ("one.png", "long.png", "profile.png")}
    rgb |= {"gray.png": noise(1)[..., None], "bits.png": np.where(noise(1) > 127, 255, 0)[..., None],
            "palette.png": np.asarray(palette.convert("RGB")),
            "moving.png": np.asarray(Image.open(folder / "moving.gif").convert("RGB"))}
    rgba = {"rgba.png": noise(4), "rgba.tif.png": noise(4), "turned_alpha.png": UPRIGHT[8](noise(4)),
            "gray_alpha.png": noise(2)[..., [0, 0, 0, 1]],
            "palette_clear.png": np.dstack([rgb["palette.png"], index * 16]),
            "colour_key.png": np.dstack([noise(), np.where(key, 0, 255)])}
    for mode, exact in (("RGB", rgb), ("RGBA", rgba)):
        for name, expected in exact.items():
            assert (pixels(out / name, mode) == expected).all(), name
    for name, alpha in (("rgba.webp", noise(4)[..., 3]), ("palette_clear.gif.png", np.where(index == 3, 0, 255))):
        assert (pixels(out / name, "RGBA")[..., 3] == alpha).all(), name
    near = {"cmyk.jpg": ((0, 255, 255), 2), "gray_profile.png": (188, 1),  # half the light is 188 in sRGB
            "gray16.png": (DEEP_GRAY[..., None] / 257, 0.5), "rgb16.png": (DEEP / 257, 1)}
    near |= {f"turned{orientation}.jpg": (turn(smooth()), 12) for orientation, turn in UPRIGHT.items()}
    for name, (expected, tolerance) in near.items():
        assert abs(pixels(out / name) - expected).max() <= tolerance, name
    for name in ("photo.jpg", "modern.webp", "xmp.jpg", "profile.jpg", "profile.webp"):
        assert abs(pixels(out / name) - pixels(folder / name)).mean() < 3, name
    assert getattr(Image.open(out / "moving.webp"), "n_frames", 1) == 1


def test_hostile_metadata(hostile):
    folder, out, *_ = hostile
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        assert Image.open(out / name).info["icc_profile"] == Image.open(folder / name).info["icc_profile"], name
    for name in ("gray_profile.png", "bad_profile.png"):
        assert "icc_profile" not in Image.open(out / name).info
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


def test_other_formats_keep_what_they_can(tmp_path, head, hostile, command):
    """The same files as JPEG: transparent parts on white, names that would meet kept apart, losses announced."""
    names = ["rgba.png", "texts.png", "same.png", "same.jpg", "turned6.png"]
    code, text = command(*[hostile[0] / name for name in names], "--model", head, "--out", tmp_path, "--strength", 0,
                         "--format", "jpg")
    assert code == 0 and written(tmp_path) == {"rgba.jpg", "texts.jpg", "same.png.jpg", "same.jpg", "turned6.jpg"}
    alpha = noise(4)[..., 3:] / 255
    assert abs(pixels(tmp_path / "rgba.jpg") - noise(4)[..., :3] * alpha - 255 * (1 - alpha)).mean() < 6
    assert Image.open(tmp_path / "turned6.jpg").getexif()[271] == "Maker"
    assert "composed on white (1 images" in text and "JPEG cannot hold PNG texts (1 images" in text


def test_header_sizes_and_readers(tmp_path, head, hostile, command):
    """What goes together is known from headers; one that tells another size does no harm, nor does another process."""
    paths = sorted(path for path in hostile[0].glob("*") if path.name in ("plain.png", "modern.webp", "pipe.png")
                   or path.name.startswith("turned"))
    assert pickle.loads(pickle.dumps(enhance.read_pictures)), "as processes on Windows and macOS get it"
    loader = DataLoader(paths, batch_size=7, collate_fn=enhance.read_pictures, num_workers=1)
    pictures = [entry for batch in loader for entry in batch]
    assert [path for path, _, _ in pictures] == paths and len(pictures) == 20
    for path, picture, error in pictures:
        assert enhance.header_size(path) == (picture.rgb.shape[:2] if picture else None), path
    photos, exif = tmp_path / "in", Image.Exif()
    photos.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(noise()).save(photos / name)
    exif[274], whole = 6, (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + whole[-12:])
    assert enhance.header_size(photos / "b.png") == (HEIGHT, WIDTH), "EXIF behind the pixels"
    code, _ = command(photos, "--model", head, "--out", tmp_path / "out", "--strength", 0, "--batch-size", 3)
    assert code == 0 and (pixels(tmp_path / "out" / "b.png") == UPRIGHT[6](noise())).all()
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


def test_interrupted_runs_go_on(tmp_path, head, many, command):
    out, before = tmp_path / "out", 0
    for number, images in ((signal.SIGINT, 3), (signal.SIGKILL, 10)):
        process = start(many, out, head, images)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        present = {out / name: (out / name).stat().st_mtime_ns for name in written(out)}
        assert images <= len(present) < 40 and "Traceback" not in errors
        assert_whole(out)
        if number == signal.SIGINT:
            expected = f"error: interrupted; {len(present)} of 40 images are done, the same command does the rest\n"
            assert process.returncode == 1 and errors == expected and not leftovers(out)
    (out / f".photo.jpg.{'0' * 32}.tmp").write_bytes(b"half")  # what a kill inside a write leaves behind
    (out / ".mine.tmp").write_bytes(b"not ours")
    code, text = command(many, "--model", head, "--out", out)
    assert code == 0 and f"{40 - len(present)} images enhanced" in text
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in present.items())
    assert_whole(out)
    assert leftovers(out) == [out / ".mine.tmp"] and len(written(out)) == 40


def test_full_disk_stops_the_run_with_one_line(tmp_path, head, many):
    """A limit on file size stands for the full disk: it too cuts writes short, which Pillow overlooks in a JPEG."""
    done = cli(many, "--model", head, "--out", tmp_path, "--format", "jpg", "--quality", 40, "--strength", 0,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, 10_001)))
    assert done.returncode == 1 and not written(tmp_path)
    assert re.fullmatch(r"error: cannot write to .*; 0 of 40 images are done, the same command does the rest\n",
                        done.stderr), done.stderr


def test_output_that_cannot_be_written(tmp_path, head, many):
    tmp_path.chmod(0o555)
    done = cli(many, "--model", head, "--out", tmp_path)
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
        assert process.returncode in (0, 1, -number)  # 1: interrupted, with a line that says so
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
