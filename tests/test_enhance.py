"""enhance.py as its users run it, and its parts against independent references."""
import errno
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import enhance
import modules
from conftest import REPO, run
from modules import load_head


@pytest.fixture
def photos(tmp_path):
    """Five noise images of two sizes in two folders."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.png", "c.png", "below/d.png", "below/e.png")):
        size = (40, 48, 3) if i % 2 else (33, 50, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(arguments) -> (exit code or error line, stdout): the command line in this process, saving the imports."""
    def run_here(*args):
        monkeypatch.setattr(sys, "argv", ["enhance.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = 0
        try:
            runpy.run_path(str(REPO / "enhance.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        return code, "".join(capsys.readouterr())
    return run_here


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def reference(head, path, strength):
    """The definition, image by image: x + strength (head(x) - x)."""
    x = torch.from_numpy(pixels(path)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        y = x + strength * (load_head(head)(x) - x)
    return ((y[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()


def test_folder(tmp_path, photos, head):
    """Pixels, structure, result line; a second run finds all done, a third does exactly what is missing."""
    out = tmp_path / "out"
    args = photos, "--model", head, "--out", out, "--batch-size", 2, "--strength", 0.7
    done = run("enhance.py", *args)
    names = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == names
    for name in names:
        assert abs(pixels(out / name) - reference(head, photos / name, 0.7)).max() <= 0.51
        assert abs(pixels(out / name) - pixels(photos / name)).mean() > 10, "a head that does nothing proves nothing"
    assert re.fullmatch(r"5 images enhanced in [\d.]+ s \([\d.]+ images/s, peak memory [\d.]+ GB\) -> .*out; 0 failed",
                        done.stdout.splitlines()[-1])
    assert run("enhance.py", *args).stdout == f"all 5 images are in {out} already (--overwrite makes them anew)\n"
    (out / "below" / "d.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    done = run("enhance.py", *args)
    assert re.match(r"1 images enhanced .*; 4 were there already; 0 failed", done.stdout.splitlines()[-1])
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps} and (out / "below" / "d.png").is_file()


def test_what_is_older_than_its_input_or_the_head_is_made_anew(tmp_path, photos, head, command):
    head = shutil.copytree(head, tmp_path / "head")
    args = photos, "--model", head, "--out", tmp_path / "out"
    assert command(*args)[1].splitlines()[-1].startswith("5 images enhanced")
    later = time.time() + 100
    os.utime(photos / "b.png", (later, later))
    assert command(*args)[1].splitlines()[-1].startswith("1 images enhanced")
    os.utime(photos / "b.png", (later - 1000, later - 1000))
    os.utime(head / "model.safetensors", (later, later))
    assert command(*args)[1].splitlines()[-1].startswith("5 images enhanced")


def test_files_folders_formats(tmp_path, photos, head, command):
    code, text = command(photos / "a.png", photos / "below", photos / "b.png", "--model", head,
                         "--out", tmp_path / "out", "--format", "webp")
    assert code == 0 and text.splitlines()[-1].startswith("4 images enhanced")
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")} == {
        "a.webp", "b.webp", "below/d.webp", "below/e.webp"}
    sizes = []
    for quality in (30, 95):
        code, _ = command(photos / "a.png", "--model", head, "--out", tmp_path / "jpg", "--format", "jpg",
                          "--quality", quality, "--overwrite")
        assert code == 0 and Image.open(tmp_path / "jpg" / "a.jpg").size == (50, 33)
        sizes.append((tmp_path / "jpg" / "a.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    code, _ = command(photos / "a.png", "--model", head, "--out", tmp_path / "look", "--compare")
    sheet = pixels(tmp_path / "look" / "a.png")
    assert code == 0 and sheet.shape[1] == 100
    assert (sheet[-33:, :50] == pixels(photos / "a.png")).all()
    assert abs(sheet[-33:, 50:] - reference(head, photos / "a.png", 1)).max() <= 0.51


def test_output_beside_and_inside_the_input(photos, head, command):
    """Outputs below the input are not enhanced again, whatever way the folder is named."""
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    for times in range(2):
        code, text = command(photos, "--model", head, "--out", photos / "below" / ".." / "better", "--overwrite")
        assert code == 0 and "5 images enhanced" in text
    assert len(list((photos / "better").rglob("*.png"))) == 5
    assert before == {path: path.read_bytes() for path in before}


def test_refusals(tmp_path, photos, head, command):
    """One line each, nothing written, no original touched."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin" / "below").mkdir(parents=True)
    (tmp_path / "twin" / "below" / "d.png").write_bytes((photos / "a.png").read_bytes())
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    out, model = ("--out", tmp_path / "out"), ("--model", head)
    cases = {
        "there is no file or folder": [tmp_path / "nothing", *model, *out],
        "holds no image": [tmp_path / "empty", *model, *out],
        "never overwritten": [photos, *model, "--out", photos],
        "where the originals are": [photos / "a.png", *model, "--out", tmp_path / "link"],
        "one of the originals": [photos / "below", tmp_path / "twin", *model, "--out", tmp_path / "link"],
        "would both become": [photos / "below", tmp_path / "twin" / "below", *model, *out],
        "no image but those in --out": [tmp_path / "onlyout", *model, "--out", tmp_path / "onlyout" / "out"],
        "there is no folder": [photos, "--model", tmp_path / "nothing", *out],
        "model.safetensors is missing": [photos, "--model", tmp_path / "broken", *out],
        "--quality is 0": [photos, *model, *out, "--quality", 0],
        "--strength is nan": [photos, *model, *out, "--strength", "nan"],
        "--batch-size is 0": [photos, *model, *out, "--batch-size", 0],
        "--tile is 8": [photos, *model, *out, "--tile", 8],
        "--device abacus": [photos, *model, *out, "--device", "abacus"],
        "cannot write to": [photos, *model, "--out", photos / "a.png" / "out"],
    }
    if not (REPO / "weights").is_dir():
        cases["which head?"] = [photos, *out]
    (tmp_path / "onlyout" / "out").mkdir(parents=True)
    (tmp_path / "onlyout" / "out" / "a.png").write_bytes((photos / "a.png").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    for expected, args in cases.items():
        code, text = command(*args)
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code, (expected, code, text)
        assert expected in code, (expected, code)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


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
    for files, expected in (({"pytorch_model.bin", "model.safetensors"}, 0), ({"pytorch_model.bin"}, "is missing"),
                            ({"pickled"}, "damaged")):
        model = tmp_path / "-".join(sorted(files))
        model.mkdir()
        (model / "config.json").write_bytes((head / "config.json").read_bytes())
        if "model.safetensors" in files:
            (model / "model.safetensors").write_bytes((head / "model.safetensors").read_bytes())
        for name in ("pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pkl"):
            (model / name).write_bytes(evil)
        if "pickled" in files:
            (model / "model.safetensors").write_bytes(evil)
        code, _ = command(photos, "--model", model, "--out", tmp_path / "out" / model.name)
        assert code == expected or expected and expected in code, code
        assert not (tmp_path / "pwned").exists()
    for config in ({"network": "os.system"}, {"network": "ResnetGenerator", "channels": "__import__('os')"}, []):
        (model / "config.json").write_text(json.dumps(config))
        code, _ = command(photos, "--model", model, "--out", tmp_path / "out" / "config")
        assert code.startswith("error: ") and "\n" not in code


class Hungry(nn.Module):
    """Returns -x; has no memory for more than `pixels` pixels at once."""

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
        (photos / f"{name}.png").write_bytes((photos / "a.png").read_bytes())  # with a, c, e: ten of one size
    hungry = Hungry(3 * 33 * 50, error)
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    code, text = command(photos, "--model", "any", "--out", tmp_path / "out", "--batch-size", 8)
    assert code == 0 and "12 images enhanced" in text
    assert hungry.batches[:4] == [8, 4, 2, 2] and hungry.batches.count(8) == 1, "learns from the first failure"
    for path in photos.rglob("*.png"):
        assert abs(pixels(tmp_path / "out" / path.relative_to(photos)) - (255 - pixels(path))).max() <= 1

    hungry = Hungry(33 * 50, error)  # the two images of 40x48 never fit
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    code, text = command(photos, "--model", "any", "--out", tmp_path / "less", "--batch-size", 8)
    assert code == 1 and text.count("out of memory at --batch-size 1: try --tile") == 2 and "10 images enhanced" in text


def test_other_errors_are_not_taken_for_memory(tmp_path, photos, command, monkeypatch):
    hungry = Hungry(0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(modules, "load_head", lambda path: hungry)
    with pytest.raises(RuntimeError, match="illegal"):
        command(photos, "--model", "any", "--out", tmp_path / "out")


def test_not_a_number_is_never_written(tmp_path, photos, command, monkeypatch):
    monkeypatch.setattr(modules, "load_head", lambda path: nn.LeakyReLU(float("nan")))  # NaN for x < 0
    Image.new("RGB", (20, 20), "white").save(photos / "white.png")
    code, text = command(photos, "--model", "any", "--out", tmp_path / "out")
    assert code == 1 and text.count("output in fp32 is not finite") == 5
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["white.png"]


def test_disk_errors_stop_the_run(tmp_path, photos, head, command, monkeypatch):
    """A full disk ends it with one line; a name that is too long costs its image only."""
    def broken(code):
        def write_image(image, path, **options):
            if path.name == "b.png":
                raise OSError(code, "broken")
            real(image, path, **options)
        return write_image
    real = modules.write_image
    for code, stops in ((errno.ENOSPC, True), (errno.EROFS, True), (errno.ENAMETOOLONG, False)):
        monkeypatch.setattr(modules, "write_image", broken(code))
        result, text = command(photos, "--model", head, "--out", tmp_path / str(code))
        if stops:
            assert result.startswith("error: cannot write to ") and "of 5 images are done" in result
        else:
            assert result == 1 and "4 images enhanced" in text and text.count("failed: ") == 1


def test_tiles():
    """Without statistics, tiles change nothing; with them, the ramps leave no step at the seams."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 150, 211) * 2 - 1
    local = nn.Conv2d(3, 3, 1)
    for tile in (0, 64, 150, 300):
        torch.testing.assert_close(enhance.tiled(local, x, tile), local(x), atol=1e-5, rtol=0)
    seen = []

    def mean(tile):
        seen.append(tuple(tile.shape[-2:]))
        return tile.mean((2, 3), keepdim=True).expand_as(tile)
    slope = torch.linspace(-1, 1, 400).expand(1, 3, 100, 400)
    blended = enhance.tiled(mean, slope, 64)
    assert set(seen) == {(64, 64)}, "every tile is of the same size"
    assert blended.diff(dim=-1).abs().max() < 0.03, "the means of neighbours differ by 0.24: a hard seam would show it"
    assert (blended.diff(dim=-1) > -1e-5).all() and blended.diff(dim=-2).abs().max() < 1e-5


def test_tile_flag(tmp_path, photos, head, command):
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 200, 3), np.uint8)).save(photos / "wide.png")
    code, text = command(photos, "--model", head, "--out", tmp_path / "out", "--tile", 64, "--strength", 0)
    assert code == 0 and text.count("instance normalisation") == 1
    for path in photos.rglob("*.png"):
        assert (pixels(tmp_path / "out" / path.relative_to(photos)) == pixels(path)).all()


def test_compile(tmp_path, photos, head, command, monkeypatch):
    """One image size is compiled (here without Inductor, which takes half a minute), the other runs as it is."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    code, _ = command(photos, "--model", head, "--out", tmp_path / "out", "--compile")
    assert code == 0 and compiled
    for path in photos.rglob("*.png"):
        assert abs(pixels(tmp_path / "out" / path.relative_to(photos)) - reference(head, path, 1)).max() <= 0.51


def test_batches():
    """Equal sizes come together, in mixed folders too; what is held back stays bounded."""
    def picture(size):
        return enhance.Picture(None, torch.empty(3, *size), None, {}, {}, [])
    mixed = [picture((4, 5) if i % 3 else (5, 4)) for i in range(30)]
    batches = list(enhance.equal_sizes(mixed, lambda rgb: 4))
    assert all(len({entry.rgb.shape for entry in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [2, 4, 4, 4, 4, 4, 4, 4]
    assert {id(entry) for batch in batches for entry in batch} == set(map(id, mixed))
    held = 0

    def counted():
        nonlocal held
        for i in range(1, 100):
            held += 1
            yield picture((i, 1))
    for batch in enhance.equal_sizes(counted(), lambda rgb: 4):
        assert held <= 17
        held -= len(batch)
    assert held == 0
