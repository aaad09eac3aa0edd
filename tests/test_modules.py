"""Networks, losses and images against references written here, independently of modules.py."""
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import modules
import train_cyclegan
from conftest import REPO
from modules import CBAM, ESA, PatchDiscriminator, ResnetGenerator, UNet


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# ---------------------------------------------------------------------------------------------------------- networks
CLASSIC = dict(attention="none", classic=True)


def test_parameter_counts_of_the_reference_design():
    assert parameters(ResnetGenerator(**CLASSIC)) == 11_378_179
    # A 3x3 conv weighs as much as its transpose; a gray residual has a third of the last layer's weights.
    assert parameters(ResnetGenerator(attention="none")) == 11_378_179 - 2 * (7 * 7 * 64 + 1)
    assert parameters(PatchDiscriminator()) == 2_764_737
    assert parameters(ResnetGenerator()) / 11_378_179 == pytest.approx(1.146, abs=1e-3)  # what ESA costs


def reference_generator(x, weights):
    """The classic CycleGAN generator written out with functional calls; `weights` yields (weight, bias) in order."""
    def conv(x, pad=0, **options):
        weight, bias = next(weights)
        return F.conv2d(F.pad(x, [pad] * 4, mode="reflect") if pad else x, weight, bias, **options)

    def norm(x):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    x = norm(conv(x, pad=3)).relu()
    for _ in range(2):
        x = norm(conv(x, stride=2, padding=1)).relu()
    for _ in range(9):
        x = x + norm(conv(norm(conv(x, pad=1)).relu(), pad=1))
    for _ in range(2):
        weight, bias = next(weights)
        x = norm(F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)).relu()
    return torch.tanh(conv(x, pad=3))


def test_classic_generator_computes_the_reference():
    torch.manual_seed(0)
    network = ResnetGenerator(**CLASSIC).double()
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    for layer in layers:
        nn.init.normal_(layer.bias, 0, 0.02)  # biases start at zero, which would hide a missing one
    x = torch.rand(2, 3, 64, 48, dtype=torch.double) * 2 - 1
    expected = reference_generator(x, iter([(layer.weight, layer.bias) for layer in layers]))
    assert torch.allclose(network(x), expected, atol=1e-10)


def test_discriminator_computes_the_reference():
    torch.manual_seed(0)
    network = PatchDiscriminator().double()
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    x = torch.rand(1, 3, 80, 96, dtype=torch.double)
    expected = x
    for number, (layer, stride) in enumerate(zip(layers, (2, 2, 2, 1, 1))):
        expected = F.conv2d(expected, layer.weight, layer.bias, stride=stride, padding=1)
        if 0 < number < 4:
            expected = F.instance_norm(expected)
        if number < 4:
            expected = F.leaky_relu(expected, 0.2)
    assert torch.allclose(network(x), expected, atol=1e-10)


def test_a_patch_score_sees_70_pixels():
    network = PatchDiscriminator(channels=4)
    network.body = nn.Sequential(*[layer for layer in network.body if not isinstance(layer, nn.InstanceNorm2d)])
    x = torch.rand(1, 3, 160, 160, requires_grad=True)
    scores = network(x)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_the_discriminator_sees_detail_at_each_size_and_no_colour():
    """A gradient penalty against its definition, scores against shifts of colour and of brightness."""
    torch.manual_seed(0)
    D, x = modules.DetailDiscriminator(4, sizes=2).double(), torch.rand(2, 3, 96, 80, dtype=torch.double) * 2 - 1
    scores = D(x)
    assert scores.shape == (2, 2)
    tint = torch.tensor([0.2, -0.3, 0.1], dtype=torch.double)[:, None, None]
    assert torch.allclose(scores, D(x + tint), atol=1e-9) and torch.allclose(scores, D(x + 0.1), atol=1e-9)
    assert ((scores - D(modules.box_blur(x, 3))).abs() > 1e-5).all()
    D_tone = modules.DetailDiscriminator(4, sizes=2, tone=True).double()
    assert torch.allclose(D_tone(x), D_tone(x + tint), atol=1e-9) and ((D_tone(x) - D_tone(x + 0.1)).abs() > 1e-5).all()

    penalty = train_cyclegan.gradient_penalty(D, x)
    slope = torch.autograd.functional.jacobian(lambda x: D(x).mean(1), x)  # (2, 2, 3, H, W)
    assert penalty.item() == pytest.approx((slope ** 2).sum().item() / 2, rel=1e-6)
    penalty.backward()
    assert all(body[0].weight.grad.abs().sum() > 0 for body in D.bodies)  # the penalty teaches, too


def test_the_discriminator_alone_tells_detail_from_its_lack(mini_data):
    """AUC on test images after at most 600 steps against two fixed sets, the miniature's; the classic one stays blind."""
    torch.manual_seed(0)
    train, test = ({domain: torch.stack([modules.normalise(modules.pil_to_tensor(modules.read_image(path)))
                                         for path in modules.list_images(mini_data / split / domain)])
                    for domain in ("baseline", "distilled")} for split in ("train", "test"))
    auc = {}
    for D in (modules.DetailDiscriminator(16, sizes=1), PatchDiscriminator(16)):
        adam = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.5, 0.999))
        for _ in range(150):
            top, left = torch.randint(33, (2,))
            real, fake = (images[torch.randint(len(images), (4,))][..., top:top + 32, left:left + 32] for images in train.values())
            loss = train_cyclegan.discriminator_loss(D, real, fake, classic=isinstance(D, PatchDiscriminator))
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            real, fake = (D(images).flatten(1).mean(1) for images in test.values())
        auc[type(D).__name__] = (real[:, None] > fake).float().mean().item()
    assert auc["DetailDiscriminator"] >= 0.95 and auc["PatchDiscriminator"] < 0.8, auc


@pytest.mark.parametrize("network", [
    ResnetGenerator(8, 1), ResnetGenerator(8, 1, **CLASSIC), UNet(8), UNet(8, attention="none")])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (17, 33), (64, 64), (70, 131)])
def test_output_size_is_input_size(network, size):
    with torch.inference_mode():
        assert network.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("network", [ResnetGenerator(8, 1), UNet(8, global_skip=True)])
def test_global_skip_starts_at_the_identity(network):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(network(x), x)


def test_esa_follows_its_four_steps():
    torch.manual_seed(0)
    esa, x = ESA(16), torch.randn(2, 16, 40, 36)
    a, b, c = esa.convs[0], esa.convs[2], esa.convs[4]
    reduced = F.conv2d(x, esa.reduce.weight, esa.reduce.bias)
    y = F.max_pool2d(F.conv2d(reduced, esa.stride.weight, esa.stride.bias, stride=2), 7, 3)
    y = F.conv2d(y, a.weight, a.bias, padding=1).relu()
    y = F.conv2d(F.conv2d(y, b.weight, b.bias, padding=1).relu(), c.weight, c.bias, padding=1)
    y = F.interpolate(y, (40, 36), mode="bilinear") + F.conv2d(reduced, esa.shortcut.weight, esa.shortcut.bias)
    mask = 1 / (1 + torch.exp(-F.conv2d(y, esa.expand.weight, esa.expand.bias)))
    assert torch.allclose(esa(x), x * mask, atol=1e-6)
    assert esa.reduce.out_channels == 4
    assert ESA(4)(torch.rand(1, 4, 4, 5)).shape == (1, 4, 4, 5)  # below 15x15 the pool shrinks


def test_cbam_gates_channels_then_places():
    cbam, x = CBAM(8), torch.randn(2, 8, 10, 12)
    average, largest = x.mean((2, 3)), x.flatten(2).max(2).values

    def mlp(v):
        hidden = (v @ cbam.mlp[0].weight[:, :, 0, 0].T + cbam.mlp[0].bias).relu()
        return hidden @ cbam.mlp[2].weight[:, :, 0, 0].T + cbam.mlp[2].bias

    y = x * torch.sigmoid(mlp(average) + mlp(largest))[:, :, None, None]
    maps = torch.stack([y.max(1).values, y.mean(1)], 1)
    gate = F.conv2d(maps, cbam.spatial.weight, cbam.spatial.bias, padding=3)
    assert torch.allclose(cbam(x), y * torch.sigmoid(gate), atol=1e-6)
    assert CBAM(8).mlp[0].out_channels == 1  # 8 / 16, guarded


def test_upsampling_is_torch_s_and_keeps_the_layout():
    ours, x = modules.NearestUpsample(), torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    y, z = ours(x), F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.allclose(y, z, atol=1e-12)
    assert torch.allclose(*(torch.autograd.grad((image ** 2).sum(), x)[0] for image in (y, z)))
    channels_last = x.detach().contiguous(memory_format=torch.channels_last)
    assert ours(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_the_generator_does_not_know_where_it_is():
    """Constant images come out constant; with zeros at the border of the strided convolutions, stripes stand there."""
    torch.manual_seed(0)
    network, image = ResnetGenerator(8, 2, attention="none"), torch.full((1, 3, 64, 64), 0.3)  # ESA keeps its zeros
    nn.init.normal_(network.last[1].weight)
    with torch.inference_mode():
        assert network(image).flatten(2).std(2).max() < 1e-4
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "zeros"
        assert network(image).flatten(2).std(2).max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ losses
def test_ssim_against_a_direct_sum():
    """One window at a time in numpy, as in the definition."""
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 17)), rng.random((20, 17))
    y = 0.7 * x + 0.3 * y
    taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for i in range(10):
        for j in range(7):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma ** 2, (window * b * b).sum() - mb ** 2
            ab = (window * a * b).sum() - ma * mb
            values.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    ours = modules.ssim(*(torch.tensor(z)[None, None] for z in (x, y)), data_range=1)
    assert ours.item() == pytest.approx(np.mean(values), abs=1e-10)


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not a requirement of the kit")
    rng = np.random.default_rng(1)
    x = rng.random((48, 40))
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1)
    options = dict(data_range=1, gaussian_weights=True, use_sample_covariance=False, full=True)
    _, full = metrics.structural_similarity(x, y, **options)
    ours = modules.ssim(*(torch.tensor(z)[None, None] for z in (x, y)), data_range=1)
    assert ours.item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-6)


def test_ssim_of_flat_equal_and_tiny_images():
    x = torch.rand(3, 3, 24, 24)
    for size in (24, 5, 1):
        assert torch.equal(modules.ssim(x[..., :size], x[..., :size], 1), torch.ones(3, dtype=torch.float64))
    for white, gray in ((255, 254), (255, 253), (200, 199)):  # variances are 0: what remains is the luminance term
        flat = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (white, gray)]
        expected = (2 * white * gray + 2.55 ** 2) / (white ** 2 + gray ** 2 + 2.55 ** 2)
        assert modules.ssim(*flat, data_range=255).item() == pytest.approx(expected, abs=1e-9)


def test_gradient_loss_sees_edges_not_brightness():
    x = torch.rand(1, 3, 16, 16)
    assert modules.gradient_loss(x, x + 0.3).item() == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    assert modules.gradient_loss(torch.zeros_like(step), step).item() == pytest.approx(4 / 12)  # 4 of 12 differences


# ------------------------------------------------------------------------------------------------------------ images
def test_uint8_round_trip():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    assert torch.equal(modules.to_uint8(modules.normalise(x)), x)


def test_read_image_is_upright_rgb_on_white(tmp_path):
    image, exif = Image.new("RGB", (4, 2), (255, 0, 0)), Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert modules.read_image(tmp_path / "turned.png").size == (2, 4)
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "clear.png")  # a fifth of black
    assert modules.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (204, 204, 204)
    picture = modules.open_picture(tmp_path / "clear.png")
    assert picture.rgb.getpixel((0, 0)) == (0, 0, 0) and picture.alpha.getpixel((0, 0)) == 51
    Image.new("LAB", (2, 2), (128, 128, 128)).save(tmp_path / "lab.tif")
    assert np.ptp(modules.read_image(tmp_path / "lab.tif").getpixel((0, 0))) <= 1
    Image.new("F", (2, 2), 0.5).save(tmp_path / "float.tif")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("float.tif", "broken.png", "."):
        with pytest.raises(modules.UnreadableImage, match=name):
            modules.read_image(tmp_path / name)


def write_tiff(path, values, bits, photometric=1, sample_format=1):
    """A gray TIFF by hand: `values` are the bytes of a 4x4 picture."""
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 4, 279: len(values),
            339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(values))
    path.write_bytes(header + values + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_gray_of_any_depth(tmp_path):
    """Sixteen steps from black to white come out as such, or are refused: never as a negative or nearly black."""
    steps = np.arange(16) * 17
    cases = {"plain": (steps.astype("<u2") * 257, 16), "inverted": ((65535 - steps * 257).astype("<u2"), 16, 0),
             "signed": ((steps * 257 - 32768).astype("<i2"), 16, 1, 2), "twelve": (np.zeros(24, np.uint8), 12),
             "long": ((steps * 16843009).astype("<u4"), 32), "short": ((steps - 128).astype("i1"), 8, 1, 2)}
    for name, (values, *how) in cases.items():
        write_tiff(tmp_path / f"{name}.tif", values.tobytes(), *how)
        if name in ("plain", "inverted"):
            gray = np.asarray(modules.read_image(tmp_path / f"{name}.tif"))[..., 0]
            assert abs(gray.ravel().astype(int) - steps).max() <= 1, (name, gray)
        else:
            with pytest.raises(modules.UnreadableImage, match=f"{name}.tif: .*convert it to 8 bits"):
                modules.read_image(tmp_path / f"{name}.tif")


def test_list_images(tmp_path, capsys):
    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png", "deep/er/c.webp", "folder.png/d.png", "e.heic",
                 "deep/f.JXL", "g.heic", "old/.enhance.json", "old/h.png", "old/below/i.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)
    names = [path.relative_to(tmp_path).as_posix() for path in modules.list_images(tmp_path)]
    assert names == ["a.jpg", "b.PNG", "deep/er/c.webp", "folder.png/d.png"]
    text = capsys.readouterr().out
    assert text.count("\n") == 2 and "cannot read it: .JXL, .heic, .txt\n" in text
    assert f"{tmp_path / 'old'} is left out" in text
    assert len(modules.list_images(tmp_path / "old")) == 2


@pytest.mark.parametrize("reference, names, expected", [
    (["s.png", "s.bmp"], ["s.png", "s.bmp.png"], {"s.png": "s.png", "s.bmp.png": "s.bmp"}),  # as enhance.py names them
    (["0.jpg", "0.png"], ["0.jpg"], {"0.jpg": "0.jpg"}),
    (["0.jpg", "0.png"], ["0.webp"], {}),  # which of the two?
    (["a.jpg", "below/a.jpg"], ["a.png", "below/a.png"], {"a.png": "a.jpg", "below/a.png": "below/a.jpg"}),
    (["v1.2.png", "v1.3.png"], ["v1.2.jpg"], {"v1.2.jpg": "v1.2.png"}),
    (["s.bmp"], ["s.bmp.png", "s.bmp.jpg"], {}), (["a.png"], ["b.png"], {})])
def test_partners(reference, names, expected):
    assert modules.partners(reference, names) == expected


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.png"
    modules.write_image(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()
    with pytest.raises(OSError):
        modules.write_image(Image.new("F", (2, 2)), path)  # PNG holds no floats
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_killed_write_leaves_nothing_for_long(tmp_path):
    """What is half-written when the process dies has a name that the next write of the same file uses."""
    script = ("import os, sys, modules\nfrom pathlib import Path\n"
              "os.replace = lambda *paths: os._exit(9); modules.write_atomically(sys.argv[1], b'half')")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "x.json"], cwd=modules.__file__.rpartition("/")[0])
    assert done.returncode == 9 and [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    modules.write_json(tmp_path / "x.json", {"a": float("nan"), "path": tmp_path, "pair": (1, 2)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "path": os.path.realpath(tmp_path), "pair": [1, 2]}


# ------------------------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("network", [ResnetGenerator(8, 2, classic=True), UNet(8, depth=4)])
def test_a_head_describes_itself(network, tmp_path):
    """What save_head writes and what the Hub's own save_pretrained writes can both be loaded, and say the same."""
    modules.save_head(network, tmp_path / "ours")
    network.save_pretrained(tmp_path / "hub")
    x = torch.rand(1, 3, 40, 40)
    for folder in (tmp_path / "ours", tmp_path / "hub"):
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        loaded = modules.load_head(folder)
        assert type(loaded) is type(network) and not loaded.training and torch.equal(loaded(x), network.eval()(x))
    for name in ("README.md", "config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "hub" / name).read_text()
    assert type(network).from_pretrained(tmp_path / "ours")(x).equal(network(x))


@pytest.mark.parametrize("content", [
    {}, {"config.json": "{"}, {"config.json": '{"width": 3}', "model.safetensors": ""},
    {"config.json": '{"depth": 6}', "model.safetensors": "damaged"}])
def test_no_head_is_one_line(content, tmp_path):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as error:
        modules.load_head(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_in_a_model_folder_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()
    modules.save_head(ResnetGenerator(8, 1), tmp_path / "head")
    (tmp_path / "head/model.safetensors").unlink()
    torch.save(Evil(), tmp_path / "head/pytorch_model.bin")
    torch.save(Evil(), tmp_path / "head/model.safetensors")  # and a pickle under the right name
    with pytest.raises(SystemExit):
        modules.load_head(tmp_path / "head")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------- output folders
def test_settings_are_compared_as_json(tmp_path):
    kept = tmp_path / "args.json"
    settings = dict(size=64, dims=(64, 2048), data=Path("data"), lr=1e-4)
    assert modules.check_settings(kept, settings) is None
    modules.write_json(kept, settings)
    assert modules.check_settings(kept, settings) == {}
    assert modules.check_settings(kept, settings | {"lr": 1e-3}, {"lr"}) == {"lr": (1e-4, 1e-3)}
    assert modules.check_settings(kept, settings | {"size": 32}, started=False) == {"size": (64, 32)}
    other = settings | {"size": 32, "lr": 1e-3, "data": "other", "test_fraction": 0.5}
    with pytest.raises(SystemExit) as error:
        modules.check_settings(kept, other, {"lr"})
    for words in ("--size was 64, is 32", f"--data was {os.path.realpath('data')}, is other", "another --out",
                  "--test-fraction was None, is 0.5"):
        assert words in str(error.value)
    assert "--lr" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"a": 1', "\0\0"])
def test_damaged_settings_are_one_line(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    with pytest.raises(SystemExit, match=r"^error: .*args.json is damaged.*another --out"):
        modules.check_settings(tmp_path / "args.json", {"a": 1})


def test_a_folder_is_locked_until_its_process_dies(tmp_path):
    """Also where that process has children of its own, which outlast it for a moment: DataLoader's workers."""
    hold = (f"import sys, os; sys.path[:0] = [{str(REPO)!r}]; import modules, time\n"
            f"modules.lock_folder({str(tmp_path)!r}); os.fork() and print('locked', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(SystemExit, match="another process is at work"):
            modules.lock_folder(tmp_path)
        with pytest.MonkeyPatch.context() as patch:  # torchrun's second process
            patch.setattr(modules, "RANK", 1)
            modules.lock_folder(tmp_path)
        holder.kill()
        holder.wait()
        modules.lock_folder(tmp_path)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock1"]


def test_a_hub_without_answer(tmp_path, head, monkeypatch):
    """A network that swallows everything costs seconds; what was fetched earlier is used without one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        start = time.perf_counter()
        with pytest.raises(SystemExit, match="no head of that name could be fetched"):
            modules.load_head("nobody/nothing")
        assert time.perf_counter() - start < 15
    repository = tmp_path / "models--somebody--a-head"
    shutil.copytree(head, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert isinstance(modules.load_head("somebody/a-head"), ResnetGenerator)


# ----------------------------------------------------------------------------------------------------- training data
def indices_of(batch_size, rank, world_size, epoch=3):
    """The batches of image numbers that one process of several sees in an epoch."""
    args = SimpleNamespace(size=16, crop=0, seed=1, batch_size=batch_size, workers=0)
    process = SimpleNamespace(num_processes=world_size, process_index=rank, device=torch.device("cpu"))
    loader = modules.training_loader({"distilled": [None] * 12, "baseline": [None] * 5}, args, process, paired=False)
    loader.sampler.set_epoch(epoch)
    return list(loader.batch_sampler)


def test_epochs_cover_everything_once_and_alike_for_any_number_of_processes():
    one = indices_of(4, 0, 1)
    assert sorted(i for batch in one for i in batch) == list(range(12)) and one != indices_of(4, 0, 1, epoch=4)
    for processes in (2, 4):
        several = zip(*(indices_of(4 // processes, rank, processes) for rank in range(processes)))
        assert [sorted(batch) for batch in one] == [sorted(sum(batches, [])) for batches in several]


def test_an_image_s_crop_and_partner_follow_from_its_number(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    files = modules.list_images(tmp_path)
    unpaired = modules.TrainingImages(files[:2], files[2:], 32, 12, seed=0, paired=False)
    assert len(unpaired) == 4
    first, again = unpaired[1], unpaired[1]
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2]))
    unpaired.epoch = 1
    assert not torch.equal(unpaired[1][1], first[1])
    partners = {bytes(unpaired[i][0].numpy()) for i in range(4) for unpaired.epoch in range(9)}
    assert len(partners) > 2  # crops of both images of the smaller set
    for i in range(6):  # the images of a pair are cropped and flipped alike
        distilled, baseline, _ = modules.TrainingImages(files, files, 32, 12, seed=0, paired=True)[i]
        assert torch.equal(distilled, baseline)


def test_damaged_training_images_are_replaced_and_counted(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").write_bytes(b"damaged")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    distilled, _, unreadable = modules.TrainingImages(files, files[1:], 16, 8, seed=0, paired=False)[0]
    assert unreadable == 1 and distilled.shape == (3, 8, 8)
    with pytest.raises(modules.UnreadableImage):
        modules.TrainingImages(files[:1], files[1:], 16, 0, seed=0, paired=False)[0]
