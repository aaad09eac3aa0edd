"""Networks, losses and images against references written here, independently of modules.py."""
import json
import multiprocessing
import os
import shutil
import socket
import struct
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
from conftest import Evil
from modules import CBAM, ESA, DetailDiscriminator, PatchDiscriminator, ResnetGenerator, UNet

CLASSIC = dict(attention="none", classic=True)
FORK = multiprocessing.get_context("fork")  # processes that need no imports


# ---------------------------------------------------------------------------------------------------------- networks
def test_parameter_counts_of_the_reference_design():
    generator, classic, small, patches = (sum(weights.numel() for weights in network.parameters()) for network in (
        ResnetGenerator(), ResnetGenerator(**CLASSIC), ResnetGenerator(attention="none"), PatchDiscriminator()))
    assert (classic, patches) == (11_378_179, 2_764_737)
    # A 3x3 conv weighs as much as its transpose; a gray residual has a third of the last layer's weights.
    assert small == classic - 2 * (7 * 7 * 64 + 1)
    assert generator / classic == pytest.approx(1.146, abs=1e-3)  # what ESA costs


def reference_generator(x, weights):
    """The classic CycleGAN generator written out with functional calls; `weights` yields (weight, bias) in order."""
    def conv(x, pad=0, **options):
        return F.conv2d(F.pad(x, [pad] * 4, mode="reflect") if pad else x, *next(weights), **options)

    x = F.instance_norm(conv(x, pad=3)).relu()
    for _ in range(2):
        x = F.instance_norm(conv(x, stride=2, padding=1)).relu()
    for _ in range(9):
        x = x + F.instance_norm(conv(F.instance_norm(conv(x, pad=1)).relu(), pad=1))
    for _ in range(2):
        x = F.instance_norm(F.conv_transpose2d(x, *next(weights), stride=2, padding=1, output_padding=1)).relu()
    return torch.tanh(conv(x, pad=3))


def reference_discriminator(x, weights):
    """The 70x70 PatchGAN likewise."""
    for number, stride in enumerate((2, 2, 2, 1)):
        x = F.conv2d(x, *next(weights), stride=stride, padding=1)
        x = F.leaky_relu(F.instance_norm(x) if number else x, 0.2)
    return F.conv2d(x, *next(weights), padding=1)


@pytest.mark.parametrize("network, reference", [
    (ResnetGenerator(**CLASSIC), reference_generator), (PatchDiscriminator(), reference_discriminator)])
def test_classic_networks_compute_the_reference(network, reference):
    torch.manual_seed(0)
    weights = [(layer.weight, layer.bias) for layer in network.double().modules() if hasattr(layer, "stride")]
    for _, bias in weights:
        nn.init.normal_(bias, 0, 0.02)  # biases start at zero, which would hide a missing one
    x = torch.rand(2, 3, 64, 48, dtype=torch.double) * 2 - 1
    assert torch.allclose(network(x), reference(x, iter(weights)), atol=1e-10)


def test_the_discriminator_sees_detail_at_each_size_and_no_colour():
    """A gradient penalty against its definition, scores against shifts of colour and of brightness."""
    torch.manual_seed(0)
    D, x = DetailDiscriminator(4, sizes=2).double(), torch.rand(2, 3, 96, 80, dtype=torch.double) * 2 - 1
    scores, tint = D(x), torch.tensor([0.2, -0.3, 0.1], dtype=torch.double)[:, None, None]
    assert scores.shape == (2, 2) and ((scores - D(modules.box_blur(x, 3))).abs() > 1e-5).all()
    assert torch.allclose(scores, D(x + tint), atol=1e-9) and torch.allclose(scores, D(x + 0.1), atol=1e-9)
    D_tone = DetailDiscriminator(4, sizes=2, tone=True).double()
    assert torch.allclose(D_tone(x), D_tone(x + tint), atol=1e-9) and ((D_tone(x) - D_tone(x + 0.1)).abs() > 1e-5).all()

    penalty = train_cyclegan.gradient_penalty(D, x)
    slope = torch.autograd.functional.jacobian(lambda x: D(x).mean(1), x)  # (2, 2, 3, H, W)
    assert penalty.item() == pytest.approx((slope ** 2).sum().item() / 2, rel=1e-6)
    penalty.backward()
    assert all(body[0].weight.grad.abs().sum() > 0 for body in D.bodies)  # the penalty teaches, too


def test_the_discriminator_alone_tells_detail_from_its_lack(mini_data):
    """AUC on test images after 150 steps against two fixed sets, the miniature's; the classic one stays blind."""
    torch.manual_seed(0)
    (real, fake), (real_test, fake_test) = (
        [torch.cat(list(modules.read_together(zip(modules.list_images(mini_data / split / domain)), 64)))
         for domain in ("baseline", "distilled")] for split in ("train", "test"))
    for D, least, most in ((DetailDiscriminator(16, sizes=1), 0.95, 1), (PatchDiscriminator(16), 0, 0.8)):
        adam = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.5, 0.999))
        for _ in range(150):
            top, left = torch.randint(33, (2,))
            crops = (images[torch.randint(24, (4,)), :, top:top + 32, left:left + 32] for images in (real, fake))
            train_cyclegan.discriminator_loss(D, *crops, classic=isinstance(D, PatchDiscriminator)).backward()
            adam.step()
            adam.zero_grad()
        with torch.no_grad():
            scores = [D(images).flatten(1).mean(1) for images in (real_test, fake_test)]
        assert least <= (scores[0][:, None] > scores[1]).float().mean().item() <= most


@pytest.mark.parametrize("network", [
    ResnetGenerator(8, 1), ResnetGenerator(8, 1, **CLASSIC), UNet(8), UNet(8, attention="none")])
def test_output_size_is_input_size(network):
    with torch.inference_mode():
        for size in ((1, 1), (3, 50), (17, 33), (64, 64), (70, 131)):
            assert network.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


def test_global_skip_starts_at_the_identity():
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert torch.equal(ResnetGenerator(8, 1)(x), x) and torch.equal(UNet(8, global_skip=True)(x), x)


def test_attention_follows_its_equations():
    """ESA in four steps; CBAM gates channels, then places."""
    torch.manual_seed(0)
    esa, cbam, x = ESA(16), CBAM(16), torch.randn(2, 16, 40, 36)
    reduced = F.conv2d(x, esa.reduce.weight, esa.reduce.bias)
    y = F.max_pool2d(F.conv2d(reduced, esa.stride.weight, esa.stride.bias, stride=2), 7, 3)
    for number in (0, 2, 4):
        y = F.conv2d(y.relu() if number else y, esa.convs[number].weight, esa.convs[number].bias, padding=1)
    y = F.interpolate(y, (40, 36), mode="bilinear") + F.conv2d(reduced, esa.shortcut.weight, esa.shortcut.bias)
    mask = 1 / (1 + torch.exp(-F.conv2d(y, esa.expand.weight, esa.expand.bias)))
    assert torch.allclose(esa(x), x * mask, atol=1e-6)
    assert esa.reduce.out_channels == 4
    assert ESA(4)(torch.rand(1, 4, 4, 5)).shape == (1, 4, 4, 5)  # below 15x15 the pool shrinks

    def mlp(v):
        hidden = (v @ cbam.mlp[0].weight[:, :, 0, 0].T + cbam.mlp[0].bias).relu()
        return hidden @ cbam.mlp[2].weight[:, :, 0, 0].T + cbam.mlp[2].bias
    y = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.flatten(2).max(2).values))[:, :, None, None]
    maps = torch.stack([y.max(1).values, y.mean(1)], 1)
    gate = F.conv2d(maps, cbam.spatial.weight, cbam.spatial.bias, padding=3)
    assert torch.allclose(cbam(x), y * torch.sigmoid(gate), atol=1e-6)
    assert CBAM(8).mlp[0].out_channels == 1  # 8 / 16, guarded


def test_upsampling_is_torch_s_and_keeps_the_layout():
    ours, x = modules.NearestUpsample(), torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    y, z = ours(x), F.interpolate(x, scale_factor=2, mode="nearest")
    assert torch.equal(y, z)
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


def test_ssim_of_flat_equal_and_tiny_images():
    x = torch.rand(3, 3, 24, 24)
    for size in (24, 5, 1):
        assert torch.equal(modules.ssim(x[..., :size], x[..., :size], 1), torch.ones(3, dtype=torch.float64))
    for white, gray in ((255, 254), (255, 253), (200, 199)):  # variances are 0: what remains is the luminance term
        flat = [torch.full((1, 3, 32, 32), value, dtype=torch.uint8) for value in (white, gray)]
        expected = (2 * white * gray + 2.55 ** 2) / (white ** 2 + gray ** 2 + 2.55 ** 2)
        assert modules.ssim(*flat, data_range=255).item() == pytest.approx(expected, abs=1e-9)


def test_gradient_loss_sees_edges_not_brightness():
    x, step = torch.rand(1, 3, 16, 16), torch.tensor([0., 0., 1., 1.]).expand(1, 1, 4, 4)
    assert modules.gradient_loss(x, x + 0.3).item() == pytest.approx(0, abs=1e-6)
    assert modules.gradient_loss(torch.zeros_like(step), step).item() == pytest.approx(4 / 12)  # 4 of 12 differences


# ------------------------------------------------------------------------------------------------------------ images
def test_uint8_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(modules.to_uint8(modules.normalise(x)), x)


def test_read_image_is_upright_rgb_on_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "turned.png", exif=exif)
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


STEPS = np.arange(16) * 17


@pytest.mark.parametrize("values, bits, photometric, sample_format, read", [
    (STEPS.astype("<u2") * 257, 16, 1, 1, True), ((65535 - STEPS * 257).astype("<u2"), 16, 0, 1, True),  # 0 is white
    ((STEPS * 257 - 32768).astype("<i2"), 16, 1, 2, False), ((STEPS - 128).astype("i1"), 8, 1, 2, False),  # signed
    (np.zeros(24, np.uint8), 12, 1, 1, False), ((STEPS * 16843009).astype("<u4"), 32, 1, 1, False)])
def test_gray_of_any_depth(values, bits, photometric, sample_format, read, tmp_path):
    """Sixteen steps from black to white in a TIFF come out as such, or are refused: never negative or nearly black."""
    tags = {256: 4, 257: 4, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 4, 279: values.nbytes,
            339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "x.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes()
                                     + struct.pack("<H", len(tags)) + entries + bytes(4))
    if read:
        gray = np.asarray(modules.read_image(tmp_path / "x.tif"))[..., 0].ravel()
        assert abs(gray.astype(int) - STEPS).max() <= 1
    else:
        with pytest.raises(modules.UnreadableImage, match="x.tif: .*convert it to 8 bits"):
            modules.read_image(tmp_path / "x.tif")


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
    assert f"{tmp_path / 'old'} is left out" in text and len(modules.list_images(tmp_path / "old")) == 2


@pytest.mark.parametrize("reference, names, expected", [
    ("s.png s.bmp", "s.png s.bmp.png", {"s.png": "s.png", "s.bmp.png": "s.bmp"}),  # as enhance.py names them
    ("0.jpg 0.png", "0.jpg", {"0.jpg": "0.jpg"}), ("0.jpg 0.png", "0.webp", {}),  # which of the two?
    ("a.jpg below/a.jpg", "a.png below/a.png", {"a.png": "a.jpg", "below/a.png": "below/a.jpg"}),
    ("v1.2.png v1.3.png", "v1.2.jpg", {"v1.2.jpg": "v1.2.png"}),
    ("s.bmp", "s.bmp.png s.bmp.jpg", {}), ("a.png", "b.png", {})])
def test_partners(reference, names, expected):
    assert modules.partners(reference.split(), names.split()) == expected


def test_a_failed_or_killed_write_leaves_the_old_file(tmp_path):
    """What is half-written when the process dies has a name that the next write of the same file uses."""
    path, other = tmp_path / "x.png", tmp_path / "x.json"

    def killed():
        os.replace = lambda *paths: os._exit(9)
        modules.write_atomically(path, b"half")

    modules.write_image(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()
    with pytest.raises(OSError):
        modules.write_image(Image.new("F", (2, 2)), path)  # PNG holds no floats
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]
    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9 and path.read_bytes() == before and len(list(tmp_path.glob(".*.tmp"))) == 1
    modules.write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(tmp_path) == ["x.png"]
    modules.write_json(other, {"a": float("nan"), "path": tmp_path, "pair": (1, 2)})
    assert json.loads(other.read_text()) == {"a": None, "path": os.path.realpath(tmp_path), "pair": [1, 2]}


# ------------------------------------------------------------------------------------------------------------- heads
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


@pytest.mark.parametrize("config, weights", [
    (None, None), ("{", None), ('{"width": 3}', b""), ('{"depth": 6}', b"damaged"), ('{"channels": 8}', Evil)])
def test_what_is_no_head_is_one_line_and_a_pickle_is_not_read(config, weights, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(config)
    if isinstance(weights, bytes):
        (tmp_path / "model.safetensors").write_bytes(weights)
    for name in ("pytorch_model.bin", "model.safetensors") if weights is Evil else ():
        torch.save(Evil(tmp_path / "ran"), tmp_path / name)
    with pytest.raises(SystemExit) as error:
        modules.load_head(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_hub_without_answer(tmp_path, head, monkeypatch):
    """A network that swallows everything costs seconds; what was fetched earlier is used without one."""
    def model_info(self, name, timeout=999, ask=modules.HfApi.model_info):
        return ask(self, name, timeout=timeout / 10)  # a tenth of a user's wait

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(modules.HfApi, "model_info", model_info)
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


# ---------------------------------------------------------------------------------------------------- output folders
def test_settings_are_compared_as_json(tmp_path):
    kept, settings = tmp_path / "args.json", dict(size=64, dims=(64, 2048), data=Path("data"), lr=1e-4)
    assert modules.check_settings(kept, settings) is None
    modules.write_json(kept, settings)
    assert modules.check_settings(kept, settings) == {}
    assert modules.check_settings(kept, settings | {"lr": 1e-3}, {"lr"}) == {"lr": (1e-4, 1e-3)}
    assert modules.check_settings(kept, settings | {"size": 32}, started=False) == {"size": (64, 32)}
    with pytest.raises(SystemExit) as error:
        modules.check_settings(kept, settings | {"size": 32, "lr": 1, "data": "other", "test_fraction": 0.5}, {"lr"})
    for words in ("--size was 64, is 32", f"--data was {os.path.realpath('data')}, is other", "another --out",
                  "--test-fraction was None, is 0.5"):
        assert words in str(error.value)
    assert "--lr" not in str(error.value) and "\n" not in str(error.value)
    for damaged in ("", "[]", "{", "null", '{"a": 1', "\0\0"):
        kept.write_text(damaged)
        with pytest.raises(SystemExit, match=r"^error: .*args.json is damaged.*another --out"):
            modules.check_settings(kept, settings)


def test_a_folder_is_locked_until_its_process_dies(tmp_path, monkeypatch):
    """Also where that process has children of its own, which outlast it for a moment: DataLoader's workers."""
    def hold():
        modules.lock_folder(tmp_path)
        FORK.Process(target=time.sleep, args=(5,)).start()
        locked.set()
        time.sleep(60)

    locked, holder = FORK.Event(), FORK.Process(target=hold)
    holder.start()
    assert locked.wait(30)
    with pytest.raises(SystemExit, match="another process is at work"):
        modules.lock_folder(tmp_path)
    with monkeypatch.context() as patch:  # torchrun's second process
        patch.setattr(modules, "RANK", 1)
        modules.lock_folder(tmp_path)
    holder.kill()
    holder.join()
    modules.lock_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", ".lock1"]


# ----------------------------------------------------------------------------------------------------- training data
def batches_of(batch_size, rank, world_size, epoch=3):
    """The batches of image numbers that one process of several sees in an epoch."""
    args = SimpleNamespace(size=16, crop=0, seed=1, batch_size=batch_size, workers=0)
    process = SimpleNamespace(num_processes=world_size, process_index=rank, device=torch.device("cpu"))
    loader = modules.training_loader({"distilled": [None] * 12, "baseline": [None] * 5}, args, process, paired=False)
    loader.sampler.set_epoch(epoch)
    return list(loader.batch_sampler)


def test_epochs_cover_everything_once_and_alike_for_any_number_of_processes():
    one = batches_of(4, 0, 1)
    assert sorted(i for batch in one for i in batch) == list(range(12)) and one != batches_of(4, 0, 1, epoch=4)
    for processes in (2, 4):
        several = zip(*(batches_of(4 // processes, rank, processes) for rank in range(processes)))
        assert [sorted(batch) for batch in one] == [sorted(sum(batches, [])) for batches in several]


def test_an_image_s_crop_and_partner_follow_from_its_number(tmp_path):
    files = [tmp_path / f"{name}.png" for name in "abcdef"]
    for path, pixels in zip(files, np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(path)
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

    files[0].write_bytes(b"damaged")  # the next image stands in for it
    distilled, _, unreadable = modules.TrainingImages(files, files[1:3], 32, 8, seed=0, paired=False)[0]
    assert unreadable == 1 and distilled.shape == (3, 8, 8)
    with pytest.raises(modules.UnreadableImage):
        modules.TrainingImages(files[:1], files[1:2], 32, 0, seed=0, paired=False)[0]
