"""Networks, losses and images against references written here, independently of modules.py."""
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import modules
from conftest import EVIL, REPO
from modules import CBAM, ESA, DetailDiscriminator, PatchDiscriminator, ResnetGenerator, UNet
from train_cyclegan import discriminator_loss, gradient_penalty
from train_unet import gradient_loss


def reference_generator(x, weights):
    """The classic CycleGAN generator written out with functional calls; `weights` yields (weight, bias) in order."""
    def conv(x, pad):
        return F.conv2d(F.pad(x, [pad] * 4, mode="reflect"), *next(weights))

    x = F.instance_norm(conv(x, 3)).relu()
    for _ in range(2):
        x = F.instance_norm(F.conv2d(x, *next(weights), stride=2, padding=1)).relu()
    for _ in range(9):
        x = x + F.instance_norm(conv(F.instance_norm(conv(x, 1)).relu(), 1))
    for _ in range(2):
        x = F.instance_norm(F.conv_transpose2d(x, *next(weights), stride=2, padding=1, output_padding=1)).relu()
    return torch.tanh(conv(x, 3))


def reference_discriminator(x, weights):
    """The 70x70 PatchGAN likewise."""
    for number, stride in enumerate((2, 2, 2, 1)):
        x = F.conv2d(x, *next(weights), stride=stride, padding=1)
        x = F.leaky_relu(F.instance_norm(x) if number else x, 0.2)
    return F.conv2d(x, *next(weights), padding=1)


@pytest.mark.parametrize("network, reference, parameters", [
    (ResnetGenerator(attention="none", classic=True), reference_generator, 11_378_179),
    (PatchDiscriminator(), reference_discriminator, 2_764_737), (ResnetGenerator(), None, 13_045_956)])  # and ours
def test_classic_networks_compute_the_reference(network, reference, parameters):
    weights, x = [*network.double().parameters()], torch.rand(1, 3, 64, 48, dtype=torch.double) * 2 - 1
    assert sum(map(torch.numel, weights)) == parameters
    for bias in weights[1::2]:
        nn.init.normal_(bias, 0, 0.02)  # biases start at zero, which would hide a missing one
    assert reference is None or torch.allclose(network(x), reference(x, zip(weights[::2], weights[1::2])), atol=1e-10)


def test_the_discriminator_sees_detail_at_each_size_and_no_colour():
    """Scores against shifts of colour and of brightness, and the gradient penalty against its definition."""
    torch.manual_seed(0)
    x, tint = torch.rand(2, 3, 96, 80, dtype=torch.double), torch.tensor([[[0.2]], [[-0.3]], [[0.1]]]).double()
    for tone in (True, False):
        D = DetailDiscriminator(4, sizes=2, tone=tone).double()
        assert D(x).shape == (2, 2) and ((D(x) - D(modules.box_blur(x, 3))).abs() > 1e-5).all()
        assert torch.allclose(D(x), D(x + tint), atol=1e-9) and torch.allclose(D(x), D(x + 0.1), atol=1e-9) != tone
    penalty, slope = gradient_penalty(D, x), torch.autograd.functional.jacobian(lambda x: D(x).mean(1), x)
    assert penalty.item() == pytest.approx((slope ** 2).sum().item() / 2 * 96 * 80 / 32 ** 2, rel=1e-6)
    penalty.backward()
    assert all(body[0].weight.grad.abs().sum() > 0 for body in D.bodies)  # the penalty teaches, too


def test_the_discriminator_alone_tells_detail_from_its_lack(mini_data):
    """AUC on test images after 150 steps against two fixed sets, the miniature's. The classic one stays blind."""
    torch.manual_seed(0)
    real, fake, real_test, fake_test = (
        torch.cat(list(modules.read_together(zip(modules.list_images(mini_data / split / domain)), 64)))
        for split in ("train", "test") for domain in ("baseline", "distilled"))
    for D, least, most in ((DetailDiscriminator(16, sizes=1), 0.95, 1), (PatchDiscriminator(16), 0, 0.8)):
        adam = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.5, 0.999))
        for _ in range(150):
            top, left = torch.randint(33, (2,))
            crops = (images[torch.randint(24, (4,)), :, top:top + 32, left:left + 32] for images in (real, fake))
            discriminator_loss(D, *crops, classic=least == 0).backward()
            adam.step()
            adam.zero_grad()
        scores = [D(images).flatten(1).mean(1) for images in (real_test, fake_test)]
        assert least <= (scores[0][:, None] > scores[1]).float().mean() <= most


@pytest.mark.parametrize("network, identity", [
    (ResnetGenerator(8, 1), True), (ResnetGenerator(8, 1, attention="none", classic=True), False),
    (UNet(8, global_skip=True), True), (UNet(8, attention="none"), False)])
def test_output_size_is_input_size_and_training_starts_at_the_identity(network, identity):
    for size in ((1, 1), (3, 50), (17, 33), (64, 64), (70, 131)):
        x = torch.rand(1, 3, *size) * 2 - 1
        assert network(x).shape == x.shape and torch.equal(network(x), x) == identity


def test_constant_images_stay_constant():
    """Zeros at a border would tell the generator where it is, and draw stripes there. (ESA keeps its zeros.)"""
    network = ResnetGenerator(8, 2, attention="none")
    nn.init.normal_(network.last[1].weight)
    assert network(torch.full((1, 3, 64, 64), 0.3)).flatten(2).std(2).max() < 1e-4


def test_the_residual_is_detail_of_the_input_whatever_the_weights():
    """No light and no tint that no discriminator would see drift. With tone, black stays black."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 192, 192) - 0.5 + torch.linspace(-0.4, 0.4, 192)
    network, tone, bands = ResnetGenerator(8, 1), ResnetGenerator(8, 1, tone=True), modules.detail_bands(x)
    assert len(bands) == 5 and torch.allclose(sum(bands), x, atol=1e-6)
    gray, black = x.mean(1, keepdim=True).expand_as(x), torch.full_like(x, -1)
    for net in (network, tone):
        nn.init.normal_(net.last[1].weight)
        assert net(gray).std(1).max() < 1e-5 and torch.allclose(net(black), black)
    assert (tone(x) - x).mean().abs() > 0.01
    del network.last  # gains of each band's own sign: without the mean taken off, everything gets lighter
    network.last = lambda features: torch.cat([band.mean(1, keepdim=True).sign() for band in bands[:4]], 1)
    residual = network(x) - x
    assert residual.std() > 0.05 and abs(residual.mean()) < 1e-3
    assert modules.box_blur(residual, 63)[..., 32:-32, 32:-32].abs().max() < 0.05 * residual.std()


def test_blocks_follow_their_equations():
    """ESA in four steps; CBAM gates channels, then places; up-sampling is torch's and keeps the layout."""
    def conv(layer, x, **options):
        return F.conv2d(x, layer.weight, layer.bias, **options)

    torch.manual_seed(0)
    esa, cbam, up, x = ESA(16), CBAM(16), modules.NearestUpsample(), torch.randn(2, 16, 40, 36)
    reduced = conv(esa.reduce, x)
    y = F.max_pool2d(conv(esa.stride, reduced, stride=2), 7, 3)
    y = conv(esa.convs[2], conv(esa.convs[0], y, padding=1).relu(), padding=1).relu()
    y = F.interpolate(conv(esa.convs[4], y, padding=1), (40, 36), mode="bilinear") + conv(esa.shortcut, reduced)
    assert torch.allclose(esa(x), x / (1 + torch.exp(-conv(esa.expand, y))), atol=1e-6)
    assert esa.reduce.out_channels == 4
    assert ESA(4)(torch.rand(1, 4, 4, 5)).shape == (1, 4, 4, 5)  # below 15x15 the pool shrinks

    pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    y = x * torch.sigmoid(sum(conv(cbam.mlp[2], conv(cbam.mlp[0], values).relu()) for values in pooled))
    gate = conv(cbam.spatial, torch.stack([y.amax(1), y.mean(1)], 1), padding=3)
    assert torch.allclose(cbam(x), y * torch.sigmoid(gate), atol=1e-6)
    assert CBAM(8).mlp[0].out_channels == 1  # 8 / 16, guarded

    assert torch.equal(up(x), F.interpolate(x, scale_factor=2, mode="nearest"))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert up(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_ssim_and_grad():
    """SSIM one window at a time in numpy, as in the definition; then of flat, equal and tiny images."""
    x, y = np.random.default_rng(0).random((2, 20, 17))
    y = 0.7 * x + 0.3 * y
    taps, values = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2)), []
    window = np.outer(taps, taps) / taps.sum() ** 2
    for i, j in np.ndindex(10, 7):
        a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * a * a).sum() - ma ** 2, (window * b * b).sum() - mb ** 2
        ab = (window * a * b).sum() - ma * mb
        values.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    ours = modules.ssim(*(torch.tensor(z)[None, None] for z in (x, y)), data_range=1)
    assert ours.item() == pytest.approx(np.mean(values), abs=1e-10)

    for size in (24, 5, 1):
        x = torch.rand(3, 3, 24, size)
        assert torch.equal(modules.ssim(x, x, 1), torch.ones(3, dtype=torch.float64))
    for white, gray in ((255, 254), (255, 253), (200, 199)):  # variances are 0: what remains is the luminance term
        flat = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (white, gray)]
        expected = (2 * white * gray + 2.55 ** 2) / (white ** 2 + gray ** 2 + 2.55 ** 2)
        assert modules.ssim(*flat, data_range=255).item() == pytest.approx(expected, abs=1e-9)

    x, step = torch.rand(1, 1, 4, 4), torch.tensor([0., 0., 1., 1.])  # GRAD sees edges, not brightness
    assert gradient_loss(x, x + 0.3 + step).item() == pytest.approx(4 / 12)  # 4 of 12 differences


def test_read_image_is_upright_rgb_on_white(tmp_path):
    x, exif, path = torch.arange(256, dtype=torch.uint8), Image.Exif(), tmp_path / "x.png"
    assert torch.equal(modules.to_uint8(modules.normalise(x)), x)
    exif[274] = 6  # turn by 90 degrees
    Image.new("RGB", (4, 2), "red").save(path, exif=exif)
    assert modules.read_image(path).size == (2, 4)
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(path)  # a fifth of black
    assert modules.read_image(path).getpixel((0, 0)) == (204, 204, 204)
    Image.new("LAB", (2, 2), (128, 128, 128)).save(tmp_path / "lab.tif")
    assert np.ptp(modules.read_image(tmp_path / "lab.tif").getpixel((0, 0))) <= 1
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tif")
    path.write_bytes(b"no image")
    for name in ("float.tif", "x.png", "."):
        with pytest.raises(modules.UnreadableImage, match=name):
            modules.read_image(tmp_path / name)


STEPS = np.arange(16) * 17
WRONG = "Pillow gets pixels of this kind wrong: convert it to PNG of 8 bits"


def tiff(values, order="<", bits=None, photometric=1, **more):
    """A TIFF of 4x4 pixels by hand, uncompressed; a plane for each row of `values`. `more`: tags such as t339=[1]."""
    planes, size, data = len(values), values[0].nbytes, values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: [4], 257: [4], 258: [bits or 8 * values.itemsize] * planes, 259: [1], 262: [photometric], 278: [4],
            273: [8 + size * i for i in range(planes)], 277: [planes], 279: [size] * planes, 284: [min(planes, 2)]}
    lists, entries = b"", b""
    for tag, numbers in sorted((tags | {int(tag[1:]): numbers for tag, numbers in more.items()}).items()):
        at = [8 + len(data) + len(lists)] if len(numbers) > 1 else numbers
        entries += struct.pack(order + "HHII", tag, 4, len(numbers), *at)
        lists += struct.pack(f"{order}{len(numbers)}I", *numbers)
    start, count = 8 + len(data) + len(lists), len(entries) // 12
    return struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, start) + data + lists + struct.pack(
        order + "H", count) + entries + bytes(4)


def jp2(mode, bits):
    """White in JPEG 2000, of 8 bits if in colour; the header is then made to say another number."""
    image, file = Image.new(mode, (8, 8), 65535 if mode == "I;16" else "white"), io.BytesIO()
    image.save(file, "JPEG2000")
    head, mark, tail = file.getvalue().partition(b"\xff\x4f\xff\x51")
    colours = b"".join(bytes([bits - 1]) + tail[at:at + 2] for at in range(39, 39 + 3 * len(image.getbands()), 3))
    return head + mark + tail[:38] + colours + tail[38 + len(colours):]


def gray_png(bits, key):
    """A row of PNG that counts from 0 again and again; the gray `key` is transparent."""
    row = int("".join(format(x % 2 ** bits, f"0{bits}b") for x in range(16)), 2).to_bytes(2 * bits, "big")
    parts = (struct.pack(">4sIIBBBBB", b"IHDR", 16, 1, bits, 0, 0, 0, 0), struct.pack(">4sH", b"tRNS", key),
             b"IDAT" + zlib.compress(b"\0" + row), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)


def bmp(mask):
    """A red BMP of 16 bits, whose header says which of them are opacity."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII4I52x", 250, 0, 0, 122, 108, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0,
                               0x7c00, 0x3e0, 0x1f, mask) + b"\0\x7c" * 64


DEEP = STEPS.astype(np.uint16) * 257
PLANES = np.stack([DEEP, DEEP[::-1], DEEP * 0 + 771])
HALF = np.stack([STEPS // 2, STEPS * 0 + 128], 1).astype(np.uint8).reshape(1, -1)  # half opaque


@pytest.mark.parametrize("content, expected, opacity", [
    (tiff(DEEP[None]), STEPS, 255), (tiff(65535 - DEEP[None], photometric=0), STEPS, 255),  # 0 is white
    (tiff((DEEP - 32768).astype("i2")[None], t339=[2]), WRONG, 0), (tiff(STEPS.astype("i1")[None], t339=[2]), WRONG, 0),
    (tiff(np.zeros((1, 24), np.uint8), bits=12), WRONG, 0), (tiff(DEEP.astype("u4")[None] * 65537), WRONG, 0),
    (tiff(PLANES, photometric=2), np.stack([STEPS, STEPS[::-1], STEPS * 0 + 3], -1), 255),
    (tiff(PLANES[[0, 0, 0, 1]], ">", photometric=2, t338=[2]), STEPS, STEPS[::-1]),
    (tiff(PLANES[:2].astype(np.uint8), t338=[2]), WRONG, 0),  # gray and opacity in planes
    (tiff(HALF, t258=[8, 8], t277=[2], t279=[32], t338=[1]), STEPS, 128),  # premultiplied
    (jp2("RGB", 8), 255, 255), (jp2("I;16", 16), 255, 255), *((jp2("RGB", bits), WRONG, 0) for bits in (4, 12, 16)),
    (jp2("LA", 16), WRONG, 0), (gray_png(2, 1), WRONG, 0), (gray_png(4, 15), WRONG, 0),
    (gray_png(8, 7), np.arange(16), 255 * (np.arange(16) != 7)), (bmp(0x8000), [[255, 0, 0]], 255),
    (b"nothing", "no image, damaged, or of a kind that Pillow cannot read", 0)])
def test_pixels_come_out_right_or_are_refused(content, expected, opacity, tmp_path):
    """By what a file says about itself: never negative, nearly black, or noise."""
    (tmp_path / "x").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(modules.UnreadableImage, match=f"x: {expected}"):
            modules.open_picture(tmp_path / "x")
    else:
        picture = modules.open_picture(tmp_path / "x")
        found, expected = np.asarray(picture.rgb).astype(int).reshape(-1, 3), np.array(expected)
        assert abs(found - (expected if expected.ndim == 2 else expected.reshape(-1, 1))).max() <= 2
        assert abs(np.asarray(picture.alpha or 255).astype(int).ravel() - opacity).max() <= 1
        assert ("transparency of 16-bit BMP is left out" in picture.notes) == (content == bmp(0x8000))


def test_list_images(tmp_path, capsys):
    """Notes name what is left out, but for what is hidden or what other tools put there."""
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "deep/er/c.webp", "folder.png/d.png", "e.heic",
                 "deep/f.JXL", "g.heic", "deep/new\nline", "old/.enhance.json", "old/h.png", "old/below/i.png",
                 ".ipynb_checkpoints/a.png", "deep/@eaDir/a.jpg", "__MACOSX/a.png", "$RECYCLE.BIN/x.png", "@me/j.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    for name, target in {"gone.png": "nowhere.png", "me.png": "me.png", "whole.png": "a.jpg"}.items():
        (tmp_path / name).symlink_to(target)
    names = [path.relative_to(tmp_path).as_posix() for path in modules.list_images(tmp_path)]
    assert names == ["@me/j.png", "a.jpg", "b.PNG", "deep/er/c.webp", "folder.png/d.png", "whole.png"]
    notes = [line.partition(f" in {tmp_path} are left out: ")[::2] for line in capsys.readouterr().out.splitlines()]
    assert dict(notes) == {"note: 5 files that Pillow cannot read": ".heic, .jxl, .txt, no suffix",
                           "note: 1 folders that enhance.py made": f"{tmp_path}/old",
                           "note: 1 links to folders": f"{tmp_path}/deep/loop",
                           "note: 2 links to nothing, or files out of reach": f"{tmp_path}/gone.png, {tmp_path}/me.png"}
    assert len(modules.list_images(tmp_path / "old")) == 2


@pytest.mark.parametrize("error", [None, BrokenPipeError(32, "no reader"), OSError(28, "full"), ValueError("closed")])
def test_printing_never_fails(error, monkeypatch):
    """To what a notebook or a logger puts in the place of stdout, which writes some letters, or no more."""
    def write(text):
        if error:
            raise error
        shown.append(text.encode("cp1252").decode("cp1252"))

    shown, warned = [], []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, flush=bool))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=warned.append, flush=bool))
    modules.make_printing_safe()
    print("λ = é", flush=True)
    modules.progress_bar([1]).close()  # a terminal or not?
    assert "".join(warned).count("is lost: ") == bool(error)
    assert "".join(shown) == ("" if error else "\\u03bb = \\xe9\n")


@pytest.mark.parametrize("words, redirection", [
    ("enhance.py . --out out --model", "2>&-"), ("enhance.py . --out out --model", "> /dev/full"),
    ("evaluate.py quality --distilled . --clip none --json r.json --sheet", "| true"),
    ("evaluate.py quality --distilled . --clip none --json r.json --sheet", ">&- 2>&-")])
def test_no_reader_costs_no_work(words, redirection, tmp_path, head):
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 90, 99)).save(tmp_path / f"{i}.bmp")
    last = head if "enhance" in words else "s.jpg"
    command = f"set -o pipefail; '{sys.executable}' -u '{REPO}'/{words} '{last}' {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    assert len(list(tmp_path.glob("out/*.png"))) == 3 or (tmp_path / "r.json").exists() and (tmp_path / last).exists()


@pytest.mark.parametrize("reference, names, expected", [
    ("s.png s.bmp", "s.png s.bmp.png", {"s.png": "s.png", "s.bmp.png": "s.bmp"}),  # as enhance.py names them
    ("0.jpg 0.png", "0.jpg", {"0.jpg": "0.jpg"}), ("0.jpg 0.png", "0.webp", {}),  # which of the two?
    ("a.jpg below/a.jpg", "a.png below/a.png", {"a.png": "a.jpg", "below/a.png": "below/a.jpg"}),
    ("v1.2.png v1.3.png", "v1.2.jpg", {"v1.2.jpg": "v1.2.png"}),
    ("s.bmp", "s.bmp.png s.bmp.jpg", {}), ("a.png", "b.png", {})])
def test_partners(reference, names, expected):
    assert modules.partners(reference.split(), names.split()) == expected


def test_a_failed_or_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """What is half-written when the process dies has a name that the next write of the same file uses."""
    path, fork = tmp_path / "x.json", multiprocessing.get_context("fork")
    modules.write_json(path, {"a": float("nan"), "path": tmp_path, "pair": (1, 2)})
    before = path.read_text()
    assert json.loads(before) == {"a": None, "path": os.path.realpath(tmp_path), "pair": [1, 2]}
    with pytest.raises(OSError):
        modules.write_image(Image.new("F", (2, 2)), tmp_path / "x.png")  # PNG holds no floats
    assert os.listdir(tmp_path) == ["x.json"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: os._exit(9))
        killed = fork.Process(target=modules.write_json, args=(path, "half"))
        killed.start()
        killed.join()
    assert killed.exitcode == 9 and path.read_text() == before and len(os.listdir(tmp_path)) == 2
    modules.write_json(path, "whole")
    assert path.read_text() == '"whole"' and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("network", [ResnetGenerator(8, 2, classic=True), UNet(8, depth=4)])
def test_a_head_describes_itself(network, tmp_path):
    """What save_head writes and what the Hub's own save_pretrained writes can both be loaded, and say the same."""
    ours, hub, x = tmp_path / "ours", tmp_path / "hub", torch.rand(1, 3, 40, 40)
    modules.save_head(network, ours)
    network.save_pretrained(hub)
    for folder in (ours, hub):
        assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
        loaded = modules.load_head(folder)
        assert type(loaded) is type(network) and not loaded.training and torch.equal(loaded(x), network.eval()(x))
    assert all((ours / name).read_text() == (hub / name).read_text() for name in ("README.md", "config.json"))
    assert type(network).from_pretrained(ours)(x).equal(network(x))
    save_file(load_file(ours / "model.safetensors") | {"foreign": x}, ours / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match='Unexpected key.*"foreign"'):
        modules.load_head(ours)


@pytest.mark.parametrize("config, weights", [
    (None, None), ("{", None), ('{"width": 3}', ""), ('{"depth": 6}', "damaged"), ('{"channels": 8}', EVIL)])
def test_what_is_no_head_is_one_line_and_a_pickle_is_not_read(config, weights, tmp_path):
    for name, text in {"config.json": config, "model.safetensors": weights, "pytorch_model.bin": weights}.items():
        if text is not None:
            (tmp_path / name).write_text(text.replace("{}", str(tmp_path / "loaded")))
    with pytest.raises(SystemExit) as error:
        modules.load_head(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "loaded").exists()


def test_a_hub_without_answer(tmp_path, head, monkeypatch):
    """A network that swallows everything costs seconds; what was fetched earlier is used without one."""
    def model_info(self, name, timeout=999, ask=modules.HfApi.model_info):
        return ask(self, name, timeout=timeout / 10)  # a tenth of a user's wait

    monkeypatch.setattr(modules.HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, start = tmp_path / "models--somebody--a-head", time.perf_counter()
    shutil.copytree(head, repository / "snapshots" / ("0" * 40))
    modules.write_atomically(repository / "refs" / "main", b"0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SystemExit, match="no head of that name could be fetched"):
            modules.load_head("nobody/nothing")
        assert isinstance(modules.load_head("somebody/a-head"), ResnetGenerator)
    assert time.perf_counter() - start < 30


def test_settings_are_compared_as_json(tmp_path):
    kept, settings = tmp_path / "args.json", dict(size=64, dims=(64, 2048), data=Path("data"), lr=1e-4)
    assert modules.check_settings(kept, settings) is None
    modules.write_json(kept, settings)
    assert modules.check_settings(kept, settings) == {}
    assert modules.check_settings(kept, settings | {"lr": 1e-3}, {"lr"}) == {"lr": (1e-4, 1e-3)}
    assert modules.check_settings(kept, settings | {"size": 32}, started=False) == {"size": (64, 32)}
    with pytest.raises(SystemExit) as error:
        modules.check_settings(kept, settings | {"size": 32, "lr": 1, "data": "other", "test_fraction": 0.5}, {"lr"})
    assert all(words in str(error.value) for words in (
        f"--data was {os.path.realpath('data')}, is other", "another --out", "--test-fraction was None, is 0.5"))
    assert "--lr" not in str(error.value) and "\n" not in str(error.value)
    for damaged in ("", "[]", "{", "null", '{"a": 1', "\0\0"):
        kept.write_text(damaged)
        with pytest.raises(SystemExit, match=r"^error: .*args.json is damaged.*another --out"):
            modules.check_settings(kept, settings)


def test_epochs_cover_everything_once_and_alike_for_any_number_of_processes():
    def batches_of(batch_size, rank, world_size, epoch=3):  # of image numbers, as one process of several sees them
        args = SimpleNamespace(size=16, crop=0, seed=1, batch_size=batch_size, workers=0)
        process = SimpleNamespace(num_processes=world_size, process_index=rank, device=torch.device("cpu"))
        loader = modules.training_loader({"distilled": [0] * 12, "baseline": [0] * 5}, args, process, paired=False)
        modules.start_epoch(epoch, loader, args, process)
        assert loader.dataset.epoch == epoch  # what crops and partners follow from
        return list(loader.batch_sampler)

    one = batches_of(4, 0, 1)
    assert sorted(sum(one, [])) == list(range(12)) and one != batches_of(4, 0, 1, epoch=4)
    for processes in (2, 4):
        several = zip(*(batches_of(4 // processes, rank, processes) for rank in range(processes)))
        assert [sorted(batch) for batch in one] == [sorted(sum(batches, [])) for batches in several]


def test_an_image_s_crop_and_partner_follow_from_its_number(tmp_path):
    files = [tmp_path / f"{name}.png" for name in "abcdef"]
    for path, pixels in zip(files, np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(path)
    unpaired = modules.TrainingImages(files[:2], files[2:], 32, 12, seed=0, paired=False)
    first, again = unpaired[1], unpaired[1]
    assert len(unpaired) == 4 and all(torch.equal(a, b) for a, b in zip(first[:2], again[:2]))
    unpaired.epoch = 1
    assert not torch.equal(unpaired[1][1], first[1])
    partners = {bytes(unpaired[i][0].numpy()) for i in range(4) for unpaired.epoch in range(9)}
    assert len(partners) > 2  # crops of both images of the smaller set
    paired = modules.TrainingImages(files, files, 32, 12, seed=0, paired=True)
    assert all(torch.equal(*paired[i][:2]) for i in range(6))  # the images of a pair are cropped and flipped alike

    files[0].write_bytes(b"damaged")  # the next image stands in for it
    distilled, _, unreadable = modules.TrainingImages(files, files[1:3], 32, 8, seed=0, paired=False)[0]
    assert unreadable == 1 and distilled.shape == (3, 8, 8)
    with pytest.raises(modules.UnreadableImage):
        modules.TrainingImages(files[:1], files[1:2], 32, 0, seed=0, paired=False)[0]


def test_ranks_that_are_left_over_are_passed_over():
    """Half of the images would be missing. Another launcher than torchrun names a MASTER_ADDR."""
    show = [sys.executable, "-c", "import modules; print(modules.RANK, modules.WORLD_SIZE, modules.LOCAL_RANK)"]
    clean = {name: value for name, value in os.environ.items() if not re.search("RANK|WORLD|MASTER|ELASTIC", name)}
    for given, ranks, note in (({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": ""}, "0 1 0", "RANK is passed over"),
                               ({"PMI_SIZE": "2"}, "0 1 0", "PMI_SIZE is passed over"), ({"MASTER_ADDR": "h"}, "0 1 0", ""),
                               ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h"}, "1 2 0", "waits for all 2")):
        done = subprocess.run(show, cwd=REPO, env=clean | given, capture_output=True, text=True)
        assert done.stdout.strip() == ranks and note in done.stderr and bool(note) == bool(done.stderr), done.stderr
