"""enhance.py as its users run it, its parts against independent references, and the files and accidents that ten
thousand images of every origin bring along."""
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin, TiffTags
from torch import nn

import enhance
import modules
from conftest import REPO, run
from modules import ResnetGenerator, load_head, save_head

HEIGHT, WIDTH = 24, 32
SETTINGS = ".enhance.json"


def noise(channels=3, height=HEIGHT, width=WIDTH, seed=0, dtype=np.uint8):
    shape, most = (height, width, channels), np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, most, shape, dtype, endpoint=True).squeeze()


def smooth():
    """A picture that JPEG keeps within a few levels and that looks different from every side."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) * 255 // (HEIGHT + WIDTH)], -1).astype(np.uint8)


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
    nn.init.normal_(network.last[1].weight)
    save_head(network, folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Five noise images of two sizes in two folders."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for seed, name in enumerate(("a", "b", "c", "below/d", "below/e")):
        height, width = (40, 48) if seed % 2 else (33, 50)
        Image.fromarray(noise(3, height, width, seed)).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


@pytest.fixture
def command(head, capsys, monkeypatch):
    """command(arguments) -> output of enhance.py in this process, which saves the imports; with the tiny head unless
    --model is given. It has to end with the exit code `expect`, or with one line that has the text `expect` in it."""
    def run_here(*args, expect=0):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["enhance.py", "--model", str(head), *map(str, args)])
            patch.setattr(signal, "signal", lambda *handler: None)  # pytest keeps its own
            runpy.run_path(str(REPO / "enhance.py"), run_name="__main__")
        for lock in modules.LOCKS:  # they end with their process
            lock.close()
        output, code = "".join(capsys.readouterr()), end.value.code
        if isinstance(expect, str):
            line = output.splitlines()[-1].partition(": ")[2] if code == 2 else str(code)  # argparse's goes to stderr
            assert re.fullmatch(f"error: .*{re.escape(expect)}.*", line), (expect, code, output)
        else:
            assert code == expect, (code, output)
        return output
    return run_here


# ------------------------------------------------------------------------------------------- what users do
def test_folder(tmp_path, photos, head):
    """Pixels, structure, result line."""
    out = tmp_path / "out"
    done = run("enhance.py", photos, "--model", head, "--out", out, "--batch-size", 2, "--strength", 0.7,
               "--precision", "fp32")
    assert written(out) == {"a.png", "b.png", "c.png", "below/d.png", "below/e.png"}
    for name in written(out):
        assert abs(pixels(out / name) - reference(head, photos / name, 0.7)).max() <= 0.51
        assert abs(pixels(out / name) - pixels(photos / name)).mean() > 2, "a head that does nothing proves nothing"
    assert re.fullmatch(r"5 images enhanced in [\d.]+ s \([\d.]+ images/s in fp32\) -> .*out; 0 failed\n", done.stdout)
    assert not done.stderr, "no progress bar where there is no terminal"


def test_files_folders_formats(tmp_path, photos, head, command):
    """What a format cannot hold, or a name that becomes too long, is that file's fault alone."""
    long = photos / f"{'a' * 251}.png"  # too long with .webp
    shutil.copy(photos / "a.png", long)
    args = photos / "a.png", photos / "below", long, photos / "b.png", "--out", tmp_path / "out", "--format", "webp"
    text = command(*args, expect=1)
    assert "4 images enhanced" in text and text.count("failed: ") == 1 and f"{long}: File name too long\n" in text
    assert written(tmp_path / "out") == {"a.webp", "b.webp", "below/d.webp", "below/e.webp"}
    Image.new("RGB", (65501, 1)).save(photos / "wide.png")
    sizes, jpg = [], tmp_path / "jpg" / "a.jpg"
    for quality in (30, 95):
        args = photos, "--out", jpg.parent, "--format", "jpg", "--quality", quality, "--overwrite"
        text = command(*args, expect=1)
        assert "wide.png: JPEG takes at most 65500 pixels a side: try --format png" in text
        assert "6 images enhanced" in text and Image.open(jpg).size == (50, 33)
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
    save_head(ResnetGenerator(channels=8, blocks=1), model)
    assert enhanced() == 5, "trained further"
    cases = {"--strength was 1.0, is 0.5": ["--strength", 0.5], "--compare was False, is": ["--compare"],
             "--quality was 95, is 90": ["--quality", 90], f"--model {other} made them": ["--model", other]}
    for expect, more in cases.items():
        command(*args, *more, expect=expect)
    os.utime(out / "c.png", (later, later))  # as if another computer's clock were fast
    assert enhanced("--strength", 0.5, "--overwrite") == 5
    os.utime(out / "a.png", (later - 1000, later - 1000))  # as if that run had been cut off before this image
    assert enhanced("--strength", 0.5) == 1
    (out / SETTINGS).unlink()
    command(*args, "--strength", 0.5, expect="holds images of these names, and no .enhance.json")


def test_a_folder_that_is_moved_away(tmp_path, photos, command, monkeypatch):
    """What is made anew in its place can be gone on with."""
    def write(image, path, write_image=modules.write_image, **options):
        if path.name == "c.png":
            os.rename(tmp_path / "out", tmp_path / "moved")
        write_image(image, path, **options)

    monkeypatch.setattr(modules, "write_image", write)
    command(photos, "--out", tmp_path / "out")
    monkeypatch.undo()
    command(photos, "--out", tmp_path / "out")
    assert len(written(tmp_path / "out")) == 5


def test_refusals(tmp_path, photos, head, command):
    """One line each, nothing written, no original touched."""
    (tmp_path / "empty").mkdir()
    twin = shutil.copytree(photos / "below", tmp_path / "twin" / "below")
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    pointer = shutil.copytree(head, tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    cases = {
        "there is no file or folder": [tmp_path / "nothing"],
        "holds no image": [tmp_path / "empty"],
        "never overwritten": [photos, "--out", photos],
        "where the originals are": [photos / "a.png", "--out", tmp_path / "link"],
        "one of the originals": [photos / "below", twin.parent, "--out", tmp_path / "link"],
        "would both become": [photos / "below", twin],
        "there is no folder": [photos, "--model", tmp_path / "nothing"],
        "model.safetensors is missing": [photos, "--model", tmp_path / "empty"],
        "`git lfs pull` fetches": [photos, "--model", pointer],
        "--device abacus": [photos, "--device", "abacus"],
        "cannot write to": [photos, "--out", photos / "a.png" / "out"],
        "cannot write to /proc": [photos, "--out", "/proc"],  # a folder that exists; not even root may write there
    }
    for flag, value in {"--quality": 0, "--strength": "nan", "--batch-size": 0, "--tile": -8}.items():
        cases[f"{flag}: {value} is not"] = [photos, flag, value]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for expect, args in cases.items():
        command("--out", tmp_path / "out", *args, expect=expect)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")} and not (tmp_path / "out").exists()


def test_two_ranks(tmp_path, photos, head, command):
    """torchrun: each image once, the same pixels; each rank reports its own; a failure stops nobody else."""
    for name in ("deep1.png", "deep2.png"):  # neighbours go to different ranks
        Image.fromarray(noise(1, dtype=np.uint16)).save(photos / name)
    command(photos, "--out", tmp_path / "alone")
    missing = shutil.ignore_patterns(".lock", "a.png", "c.png", "e.png", "deep*")
    both = shutil.copytree(tmp_path / "alone", tmp_path / "both", ignore=missing)
    (photos / "bad.png").write_text("bad")
    done = run("enhance.py", photos, "--model", head, "--out", both, torchrun=2, check=False)
    assert done.returncode == 1 and re.findall(r"^failed: .*/(.*?): ", done.stderr, re.M) == ["bad.png"]
    last = re.findall(r"^rank (\d) of 2: (\d) images .*?; (?:(\d) were there .*?; )?(\d) failed$", done.stdout, re.M)
    assert [rank for rank, *_ in sorted(last)] == ["0", "1"], done.stdout
    assert [sum(int(counts[i] or 0) for counts in last) for i in (1, 2, 3)] == [5, 2, 1]
    assert done.stdout.count("8 bits a channel become 8 (1 images") == 2
    assert len(written(both)) == 7 and {path.name for path in both.glob(".*")} == {SETTINGS, ".lock", ".lock1"}
    for name in written(both):
        assert (both / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_precision(tmp_path, photos, command, monkeypatch):
    """auto is bf16 where the hardware computes in it, by whatever functions this torch has, and says so."""
    for native, name in ((lambda: True, "bf16"), (lambda: False, "fp32"), (None, "fp32")):
        if native:
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", native, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        assert f"images/s in {name})" in command(photos, "--out", tmp_path / name, "--overwrite")
    assert 0 < max(abs(pixels(tmp_path / "bf16" / name) - pixels(tmp_path / "fp32" / name)).max()
                   for name in written(photos)) <= 8
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert enhance.choose_precision(torch.device("cuda"), None) == "fp32", "a T4 emulates it"


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(enhance, "LOCAL_RANK", 99)
    with pytest.raises(SystemExit, match="--device cuda:99 is not available"):
        enhance.choose_device("auto")


def test_no_rank_writes_before_the_settings_are_there(tmp_path, monkeypatch):
    """Else the first rank, if slower, would find images that no settings file speaks of, and refuse its own run."""
    monkeypatch.setattr(enhance, "RANK", 1)
    monkeypatch.setattr(modules, "RANK", 1)
    settings = {"model": "m", "weights": "w"}
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(enhance.prepare, tmp_path, [tmp_path / "a.png"], settings, overwrite=False)
        time.sleep(0.5)
        assert not ready.done() and not (tmp_path / SETTINGS).exists()
        modules.write_json(tmp_path / SETTINGS, settings)
        ready.result(timeout=10)


# -------------------------------------------------------------------------------- the network's accidents
class Hungry(nn.Module):
    """Returns -x; has no memory for more than 33 x 50 pixels at once, or another trouble with them."""

    def forward(self, x):
        self.batches.append(len(x))
        if x[:, 0].numel() > 33 * 50:
            raise self.error
        return -x


@pytest.mark.parametrize("error, reason", [
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: try --tile 512"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: try --tile 512"),
    (RuntimeError("input tensor must fit into 32-bit index math"), "input tensor must fit into 32-bit index math")])
def test_what_fails_together_is_tried_alone(tmp_path, photos, command, monkeypatch, error, reason):
    """A batch that does not fit is done one by one; what does not fit alone is named, with an advice."""
    hungry, raised, out = Hungry(), [], tmp_path / "out"
    hungry.error, hungry.batches = error, []
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: raised.append(sys.exc_info()[1]))
    shutil.copy(photos / "c.png", photos / "f.png")  # of one size in a row: a; b, d; e, c, f
    text = command(photos, "--device", "cpu", "--out", out, "--batch-size", 3, expect=1)
    assert text.count(f".png: {reason}\n") == 2 and "4 images enhanced" in text
    assert hungry.batches == [1, 2, 1, 1, 3, 1, 1, 1] and written(out) == {"a.png", "below/e.png", "c.png", "f.png"}
    assert raised and not any(raised), "an exception in flight still holds the tensors"
    for name in written(out):
        assert abs(pixels(out / name) - (255 - pixels(photos / name))).max() <= 1


def test_other_errors(tmp_path, photos, command, monkeypatch):
    """A failing GPU ends the run; what is not finite is not written."""
    hungry = Hungry()
    hungry.error, hungry.batches = torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), []
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        command(photos, "--out", tmp_path / "out")
    monkeypatch.setattr(Hungry, "forward", lambda self, x: torch.where(x < 0, torch.nan, x))
    Image.new("RGB", (20, 20), "white").save(photos / "white.png")
    text = command(photos, "--out", tmp_path / "nan", "--precision", "fp32", expect=1)
    assert text.count("output in fp32 is not finite") == 5 and written(tmp_path / "nan") == {"white.png"}


def test_order_and_memory():
    """Neighbours of one size go together, on a GPU as many as the budget of pixels allows; the memory holds a few
    pictures, however many there are; results come in order."""
    sizes = [(512, 512)] * 40 + [(1024, 2048)] * 5 + [(9000, 9000)] * 2 + [(512, 512)]
    tasks = [SimpleNamespace(picture=SimpleNamespace(rgb=SimpleNamespace(size=size))) for size in sizes]
    for device, batch_size, expected in (("cuda", 0, [32, 8, 4, 1, 1, 1, 1]), ("cpu", 0, [1] * 48),
                                         ("cpu", 30, [30, 10, 5, 2, 1])):
        found = list(enhance.batches(iter(tasks), SimpleNamespace(batch_size=batch_size), torch.device(device)))
        assert [len(batch) for batch in found] == expected and sum(found, []) == tasks
    taken = []
    with ThreadPoolExecutor(4) as pool:
        results = enhance.in_order(pool, lambda number: number ** 2, (taken.append(i) or i for i in range(200)))
        for number, result in enumerate(results):
            assert result == number ** 2 and len(taken) <= number + 2 * enhance.THREADS + 1
    assert len(taken) == 200


def test_tiles_are_exact(tmp_path, photos, command):
    """Without norm and attention, tiles are the whole image; the margin is as small as it may be."""
    torch.manual_seed(0)
    for blocks in (1, 2):
        network = ResnetGenerator(4, blocks, attention="none").double().eval()
        nn.init.normal_(network.last[1].weight)
        margin = enhance.tile_margin(network)
        for size in ((130, 171), (64 + 2 * margin + 1, 64 + 2 * margin), (10, 200)):
            x = torch.rand(1, 3, *size, dtype=torch.double) * 2 - 1
            with torch.inference_mode():
                whole = network(x)
                torch.testing.assert_close(enhance.tiled(network, x, 64, margin), whole, atol=1e-10, rtol=0)
                assert (enhance.tiled(network, x, 64, margin - 8) - whole).abs().max() > 1e-6
    Image.fromarray(noise(3, 70, 200)).save(photos / "wide.png")
    model, out = tmp_path / "model", tmp_path / "out"
    for network, notes in ((ResnetGenerator(4, 1), 0), (ResnetGenerator(4, 1, classic=True), 1),
                           (modules.UNet(channels=4, depth=3), 1)):
        save_head(network, model)
        text = command(photos, "--model", model, "--out", out, "--tile", 64, "--strength", 0, "--overwrite")
        assert text.count("may drift from tile to tile") == notes
        assert all((pixels(out / name) == pixels(photos / name)).all() for name in written(photos))


# ------------------------------------------------------------------------------------------- hostile files
# EXIF orientation -> what turns the stored array upright (EXIF 2.32, table 6)
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}


def png_chunk(part):
    """A chunk of PNG, given as its name and content in one."""
    return struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))


def png(rows, *parts, size=None):
    """A PNG file by hand, for what Pillow does not write, with chunks behind its header."""
    height, width, channels = np.atleast_3d(rows).shape
    header = struct.pack(">IIBBBBB", *size or (width, height), 8 * rows.itemsize, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(rows.dtype.newbyteorder(">")).tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, [b"IHDR" + header, *parts, b"IDAT" + data, b"IEND"]))


def icc(space, connection, kind, tags):
    """An ICC version 2 profile by hand: header, tag table, data."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = (struct.pack(">I4sI4s4s4s12x4s28x", 128 + len(table) + len(body), b"lcms", 0x02400000, kind, space,
                          connection, b"acsp") + struct.pack(">iii", 63190, 65536, 54061))
    return header.ljust(128, b"\0") + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
LINEAR_GRAY = icc(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": WHITE, b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0)})
# CMYK whose lightness depends on black alone, L = 100 (1 - K), so that cyan ink is shown as white
INK = icc(b"CMYK", b"Lab ", b"prtr", {b"wtpt": WHITE, b"A2B0": b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(
    ">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536) + bytes(range(256)) * 4 + bytes(
    value for corner in range(16) for value in (0 if corner & 1 else 255, 128, 128)) + bytes(range(256)) * 3})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def fill(folder):
    """Writes the hostile folder. Returns {output name: (pixels that it must have, tolerance)} at strength 0, and the
    names of the files that must be reported."""
    expected, rgb, soft = {}, noise(), Image.fromarray(smooth())

    def add(name, image, result, tolerance=0, out=None, **options):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(folder / name, **options)
        expected[out or name] = result, tolerance

    # Names and places
    for name in ("plain.png", "same.png", "new\nline.png", "größe-写真.png", "写" * 83 + ".png", "a" * 251 + ".png",
                 "-x.png", "folder.png/inside.png", os.fsdecode(b"\xff\xfe.png")):
        add(name, rgb, rgb, format="PNG")
    add("same.bmp", rgb, rgb, out="same.bmp.png")
    (folder / "link.png").symlink_to("plain.png")
    expected["link.png"] = rgb, 0
    (folder / "again").symlink_to(folder, target_is_directory=True)
    for name in (".hidden.png", "notes.txt", "iphone.HEIC", f"earlier/{SETTINGS}", "earlier/result.png"):
        modules.write_atomically(folder / name, b"nobody opens it")

    # Sizes, modes, depths, transparency
    one, long, gray, clear = noise(3, 1, 1)[None, None], noise(3, 3000, 3), noise(1), noise(4)
    add("one.png", one, one)
    add("long.png", long, long)
    add("gray.png", gray, np.dstack([gray] * 3))
    add("bits.png", gray > 127, np.dstack([gray > 127] * 3) * 255)
    add("gray_alpha.png", Image.fromarray(noise(2), "LA"), noise(2)[..., [0, 0, 0, 1]])
    add("rgba.tif", clear, clear, out="rgba.png")
    add("rgba.webp", clear, clear, lossless=True, exact=True)
    palette = Image.fromarray(rgb).quantize(16)
    index, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    add("palette_clear.png", palette, np.dstack([colours, index * 16]), transparency=bytes(range(0, 256, 16)))
    add("palette_clear.gif", palette, np.dstack([colours, np.where(index == 3, 0, 255)]), transparency=3,
        out="palette_clear.gif.png")
    opaque = (rgb != rgb[2, 3]).any(-1)
    add("colour_key.png", rgb, np.dstack([rgb, opaque * 255]), transparency=tuple(rgb[2, 3].tolist()))
    for name, channels, tolerance in (("gray16.png", 1, 0.5), ("rgb16.png", 3, 1), ("rgba16.png", 4, 1)):
        deep = noise(channels, dtype=np.uint16)
        (folder / name).write_bytes(png(deep))
        expected[name] = (np.dstack([deep] * 3) if channels == 1 else deep) / 257, tolerance

    # Colour spaces, orientation
    cyan, ones = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0)), np.ones((HEIGHT, WIDTH, 3), np.uint8)
    add("cmyk.jpg", cyan, ones * (0, 255, 255), 2, quality=95)
    add("cmyk_profile.jpg", cyan, ones * 255, 2, quality=95, icc_profile=INK)  # white with these inks
    add("gray_profile.png", ones[..., 0] * 128, ones * 188, 1, icc_profile=LINEAR_GRAY)  # half the light, in sRGB
    add("wrong_profile.png", rgb, rgb, icc_profile=LINEAR_GRAY)
    add("bad_profile.png", rgb, rgb, icc_profile=b"rubbish" * 30)
    (folder / "damaged_profile.png").write_bytes(png(rgb, b"iCCPx\0\0no stream of zlib's"))  # None, as Pillow sees it
    expected["damaged_profile.png"] = rgb, 0
    for orientation, turn in UPRIGHT.items():
        exif, only = Image.Exif(), Image.Exif()
        exif[274], exif[271], only[274] = orientation, "Maker", orientation
        exif.get_ifd(0x8825)[1] = "N"  # the GPS block
        add(f"turned{orientation}.jpg", soft, turn(smooth()), 4, quality=95, subsampling=0, exif=exif)
        add(f"orientation{orientation}.jpg", soft, turn(smooth()), 4, quality=95, subsampling=0, exif=only)
    add("turned_alpha.png", clear, UPRIGHT[8](clear), exif=exif)
    add("bad_exif.png", rgb, rgb, exif=b"Exif\0\0MM rubbish")
    for name in ("photo.jpg", "same.jpg", "SHOUT.JPG"):
        add(name, soft, smooth(), 8, quality=95)
    add("liar.jpg", soft, smooth(), 4, format="PNG")
    add("moving.webp", soft, smooth(), save_all=True, append_images=[Image.fromarray(rgb), soft], lossless=True)
    add("moving.gif", palette, colours, out="moving.png", save_all=True, append_images=[soft.quantize(16)] * 2)

    # What cannot be read
    whole, photo = (folder / "plain.png").read_bytes(), (folder / "photo.jpg").read_bytes()
    bad = {"cut.png": whole[:len(whole) // 2], "cut.jpg": photo[:len(photo) // 2], "text.png": b"hello",
           "empty.png": b"", "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:], "new\nbad.png": b"bad",
           "locked.png": whole, "bomb.png": png(rgb, size=(30000, 30000)),
           "deep_key.png": png(deep[..., :3], b"tRNS" + deep[0, 0, :3].astype(">u2").tobytes())}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "locked.png").chmod(0)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "lost+found").mkdir(0)
    Image.new("F", (WIDTH, HEIGHT), 0.5).save(folder / "float.tif")
    return expected, {*bad, "pipe.png", "float.tif"}


def test_hostile_folder(tmp_path, head):
    """The bad is named, the rest is done and right; the originals stay as they are, and outputs are no inputs."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (expected, bad), out = fill(folder), folder / "enhanced"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "locked.png"}
    # Root may read and write everything; without two capabilities it is held to the permission bits like anyone.
    user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    texts, stamps = [], []
    for path in (out, folder / "earlier" / ".." / "enhanced"):
        words = [*user, sys.executable, REPO / "enhance.py", folder, "--model", head, "--strength", "0", "--out", path]
        done = subprocess.run([*words, "--batch-size", "4"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        reported = re.findall(r"^failed: (.*?): .{5}", done.stderr, re.M)  # a name and some reason
        assert len(reported) == done.stderr.count("\n") == len(bad)
        assert set(reported) == {str(folder / name) if name.isprintable() else repr(str(folder / name)) for name in bad}
        texts.append(done.stdout)
        stamps.append({path: path.stat().st_mtime_ns for path in out.rglob("*.*g")})
    assert stamps[0] == stamps[1], "done twice"
    assert before == {path: path.read_bytes() for path in before}
    assert written(out) == set(expected) and {path.name for path in out.glob(".*")} == {SETTINGS, ".lock"}
    done_and_failed = rf"^{len(expected)} images enhanced in .*; {len(bad)} failed$"
    nothing_new = rf"^0 .*; {len(expected)} were there already \(--overwrite .*\); {len(bad)} failed$"
    assert re.search(done_and_failed, texts[0], re.M) and re.search(nothing_new, texts[1], re.M), texts
    for count, note in ((2, "animated"), (3, "8 bits a channel"), (1, "damaged EXIF"), (2, "unusable colour profile")):
        assert re.search(rf"^note: .*{note}.*\({count} images, ", texts[0], re.M), (note, texts[0])
    assert re.search(r"1 folders that enhance.py made in .* are left out: .*/earlier$", texts[0], re.M)
    assert re.search(r"2 files that Pillow cannot read in .* are left out: .heic, .txt$", texts[0], re.M)
    for note in ("2 links to nothing, or files out of reach", "1 links to folders", "1 closed folders"):
        assert f"note: {note} in {folder} are left out: {folder}/" in texts[0]
    for name, (values, tolerance) in expected.items():
        with Image.open(out / name) as image:
            assert image.mode == ("RGBA" if values.shape[2] == 4 else "RGB"), name
            assert getattr(image, "n_frames", 1) == 1 and np.asarray(image).shape == values.shape, name
            assert (abs(np.asarray(image) - values.astype(float)) <= tolerance).all(), name
            assert "turned" not in name or image.getexif().get(274, 1) == 1 and image.getexif()[271] == "Maker"
            assert "profile" not in name or "icc_profile" not in image.info, name
    assert Image.open(out / "liar.jpg").format == "JPEG", "the suffix says what is written"


# ------------------------------------------------------------------------------------------------ metadata
def ifd(next_offset, *entries):
    """A directory of EXIF: (tag, type, count, value) each, and where the next one is."""
    return struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack(
        "<I", next_offset)


THUMBNAIL = b"\xff\xd8\xff\xe0 the old picture \xff\xd9"
NOTE = b"MAKER" + struct.pack("<I", 56) + b"..."  # makers' notes hold offsets within the block: they must not move
EXIF = b"Exif\0\0II*\0" + struct.pack("<I", 8) + ifd(68, (271, 2, 4, 0x00636241), (0x8769, 4, 1, 38)) + ifd(
    0, (0x927C, 7, 12, 56)) + NOTE + ifd(0, (259, 3, 1, 6), (513, 4, 1, 110), (514, 4, 1, len(THUMBNAIL))) + THUMBNAIL
RAW_EXIF = b"zTXtRaw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(EXIF):8}\n{EXIF.hex()}\n".encode())
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" note="%s"/>'
IPTC = b"\x1c\x02\x78\0\x09a caption"
BLOCKS = [b"8BIM" + struct.pack(">HHI", code, 0, len(content)) + content + bytes(len(content) % 2)
          for code, content in ((0x040C, THUMBNAIL), (0x0404, IPTC))]
SEGMENTS = b"".join(b"\xff" + marker + struct.pack(">H", len(content) + 2) + content for marker, content in (
    (b"\xfe", b"seed 7"), (b"\xfe", b"a portrait"), (b"\xed", b"".join([b"Photoshop 3.0\0", *BLOCKS]))))
TEXTS = [b"tEXtparameters\0a portrait\nseed: 7", b"tEXtSame\0one", b"tEXtSame\0two",
         b"zTXtworkflow\0\0" + zlib.compress(b"node " * 500000),  # above the megabyte at which Pillow stops
         "iTXtTitle\0\0\0de\0Titel\0größe".encode(), b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + XMP % b"kept"]
COLOURS = [b"gAMA" + struct.pack(">I", 100000), b"cICP\x0c\x0d\0\x01", b"sRGB\0"]
PNGS = {
    "full.png": png(noise(), *COLOURS, *TEXTS, b"eXIf" + EXIF[6:]),
    # the profile, as large as some are, is applied; then the gamma fits no longer either
    "gray.png": png(noise(1), b"iCCPgray\0\0" + zlib.compress(LINEAR_GRAY + bytes(2_000_000)), COLOURS[0]),
    "magick.png": png(noise(), RAW_EXIF),
    "damaged.png": png(noise(), b"eXIfII*\0" + bytes([255]) * 9)}  # in a way that Pillow does not mind
ANNOUNCED = ("google.com/photos/1.0/camera/", "google.com/photos/1.0/depthmap/", "adobe.com/hdr-gain-map/1.0/",
             "apple.com/HDRGainMap/1.0/", "adobe.com/xap/1.0/g/img/", "adobe.com/xmp/note/")


def test_metadata(tmp_path, command):
    """Carried over where format and Pillow can, else noted, and the image is written; what is gone is not announced; no
    thumbnail shows the old picture."""
    photos, soft, clear = tmp_path / "photos", Image.fromarray(smooth()), noise(4)
    for name, content in PNGS.items():
        modules.write_atomically(photos / name, content)
    full = {"exif": EXIF, "xmp": XMP % b"kept", "icc_profile": SRGB}
    soft.save(photos / "full.jpg", quality=95, dpi=(300, 300), extra=SEGMENTS, **full)
    for i, namespace in enumerate(ANNOUNCED):
        with open(photos / f"announces{i}.jpg", "wb") as file:
            soft.save(file, "JPEG", dpi=(300, 300), xmp=XMP % f"http://ns.{namespace}".encode())
            file.write(b"ftypmp42")  # such as a video behind it
    Image.fromarray(noise()).save(photos / "full.webp", lossless=True, **full)
    Image.fromarray(noise()).save(photos / "big.webp", exif=EXIF + bytes(70000), xmp=XMP % (b"x" * 70000))
    Image.fromarray(noise(1)).save(photos / "comment.gif", comment=b"seed 7")
    Image.fromarray(noise()).save(photos / "scan.tif", dpi=(300, 300), description="a scan", artist="Abc")
    Image.fromarray(clear).save(photos / "clear.png")
    kept, jpg, webp = tmp_path / "keep", tmp_path / "jpg", tmp_path / "webp"
    notes = {kept: {"XMP is left out": 6, "TIFF tags": 1, "damaged EXIF": 1},
             jpg: {"JPEG cannot hold exif of that length": 1, "JPEG cannot hold xmp of that length": 1,
                   "JPEG cannot hold PNG texts": 1, "JPEG cannot hold PNG colours": 1, "JPEG has no transparency": 1},
             webp: {"WEBP cannot hold comment": 2, "WEBP cannot hold IPTC": 1, "WEBP cannot hold dpi": 8,
                    "WEBP cannot hold PNG texts": 1}}
    for out in notes:
        text = command(photos, "--out", out, "--strength", 0, "--format", out.name)
        assert len(written(out)) == len(os.listdir(photos))
        for note, count in notes[out].items():
            assert re.search(rf"^note: {note}.*\({count} images, ", text, re.M), (note, text)

    images = {name: Image.open(kept / name) for name in written(kept)}
    info = {name: image.info for name, image in images.items()}
    assert info["full.jpg"]["comment"] == b"seed 7\na portrait" and info["full.jpg"]["photoshop"] == {0x0404: IPTC}
    assert info["full.jpg"]["icc_profile"] == info["full.webp"]["icc_profile"] == SRGB
    assert info["full.jpg"]["xmp"] == info["full.png"]["xmp"] == info["full.webp"]["xmp"] == XMP % b"kept"
    for name in ("full.jpg", "full.png", "full.webp"):
        exif = info[name]["exif"].removeprefix(b"Exif\0\0")
        assert b"old picture" not in exif and exif[56:68] == NOTE and exif[:30] == EXIF[6:36], name
        assert images[name].getexif()[271] == "Abc" and not images[name].getexif().get_ifd(1), name
    data = (kept / "full.png").read_bytes()
    assert not [part[:40] for part in COLOURS + TEXTS if png_chunk(part) not in data]
    assert info["full.jpg"]["dpi"] == (300, 300) and round(info["scan.png"]["dpi"][0]) == 300
    assert np.array_equal(np.asarray(images["full.webp"]), noise()), "lossless it was"
    assert info["comment.png"]["Comment"] == "seed 7" and Image.open(jpg / "comment.jpg").info["comment"] == b"seed 7"
    assert [images["scan.png"].getexif()[tag] for tag in (270, 315)] == ["a scan", "Abc"]
    assert images["magick.png"].getexif()[271] == "Abc" and "Raw profile type exif" not in info["magick.png"]
    assert not {"gamma", "icc_profile"} & info["gray.png"].keys() and "exif" not in info["damaged.png"]
    assert not any("xmp" in info[name] for name in info if "announces" in name)
    assert len(Image.open(webp / "big.webp").info["exif"]) > 70000
    alpha = clear[..., 3:] / 255
    assert abs(pixels(jpg / "clear.jpg") - clear[..., :3] * alpha - 255 * (1 - alpha)).mean() < 6, "composed on white"


def test_a_tag_that_cannot_be_written_is_no_end(tmp_path, command):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[270], tags[270] = TiffTags.DOUBLE, 0.5  # a description that is no text
    Image.fromarray(noise()).save(tmp_path / "x.tif", tiffinfo=tags)
    text = command(tmp_path / "x.tif", "--out", tmp_path / "out", "--strength", 0)
    assert "note: damaged EXIF is left out (1 images" in text and (pixels(tmp_path / "out/x.png") == noise()).all()


# ------------------------------------------------------------------------------------------ interruptions
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 pictures that take the small head a few seconds."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(150):
        Image.fromarray(noise(height=256, width=256, seed=i)).save(folder / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


def test_interrupted_runs_go_on(tmp_path, head, many, command):
    out, before = tmp_path / "out", 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, REPO / "enhance.py", many, "--model", head, "--out", out,
                                    "--tile", "64"],  # slow enough to be met at work, and as exact
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored below `&`
        while process.poll() is None and len(written(out)) < before + 3:
            time.sleep(0.01)
        if number == signal.SIGINT:
            command(many, "--out", out, expect="another process")  # two at once would do everything twice
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        present = {out / name: (out / name).stat().st_mtime_ns for name in written(out)}
        assert before + 3 <= len(present) < 150 and all(pixels(path).shape == (256, 256, 3) for path in present)
        if number == signal.SIGKILL:
            assert process.returncode == -number and not errors
        else:
            line = f"error: interrupted; {len(present) - before} of {150 - before} images are done, the same command "
            assert process.returncode == 1 and errors == line + "does the rest\n" and not list(out.glob(".*.tmp"))
        before = len(present)
    assert command(many, "--out", out).splitlines()[-1].startswith(f"{150 - before} images enhanced")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in present.items()) and len(written(out)) == 150
    assert all(pixels(out / name).shape == (256, 256, 3) for name in written(out)) and not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_full_disk_stops_the_run_with_one_line(tmp_path, many, command, suffix):
    """A limit on file size stands for the full disk: it too cuts writes short, which Pillow overlooks in a JPEG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, limits[1]))
    try:
        text = command(many, "--out", tmp_path, "--format", suffix, "--quality", 40, "--strength", 0,
                       expect="; 0 of 150 images are done, the same command does the rest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not written(tmp_path) and not text
