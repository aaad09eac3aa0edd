"""evaluate.py: its metrics against independent references, and every sub-command through its real command line."""
import itertools
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
import torchvision
from conftest import REPO
from modules import normalise, to_uint8
from PIL import Image
from tiny_models import tiny_clip, tiny_flux


# ------------------------------------------------------------------------------------------------------ FID and KID
@pytest.mark.parametrize("n, m, d", [(300, 200, 20), (30, 30, 64), (30, 200, 64)])
def test_fid_agrees_with_the_textbook(n, m, d):
    def ours(*sets):
        return evaluate.fid(*[evaluate.moments(torch.from_numpy(z), torch.ones(len(z)).double()) for z in sets])

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + 0.3
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(scipy.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1 + s2) - 2 * cross
    assert ours(x, y) == pytest.approx(expected, rel=1e-6)
    assert ours(x, x + 0.5) == pytest.approx(d * 0.25, rel=1e-9)
    assert ours(x, x) == ours(x, x[::-1].copy()) == 0  # no rounding is left to divide by


def test_inception_is_torchvisions_with_the_pooling_of_2015(monkeypatch):
    """The reference swaps the pooling function under torchvision's blocks; ours hooks the blocks."""
    def pool(x, **window):
        return F.max_pool2d(x, **window) if name == "Mixed_7c" else F.avg_pool2d(x, **window, count_include_pad=False)

    generator, weights = torch.Generator().manual_seed(1), evaluate.fid_inception("random").state_dict()
    for name, value in weights.items():
        if "running" in name:
            value.uniform_(-0.1, 0.1, generator=generator).add_("var" in name)
    reference = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    reference.load_state_dict(weights)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: weights)
    net, x = evaluate.fid_inception("inception"), torch.rand(2, 3, 299, 299, generator=generator)
    features, h = evaluate.inception_features(net, x, [2048, 64, 192, 768]), 2 * x - 1
    monkeypatch.setattr(torchvision.models.inception, "F",
                        SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d, avg_pool2d=pool))
    with torch.no_grad():
        for name, layer in list(reference.named_children())[:-3]:
            h = layer(h)
            d = {"maxpool1": 64, "maxpool2": 192, "Mixed_6e": 768, "Mixed_7c": 2048}.get(name)
            if d:
                expected = h.mean((2, 3))
                assert (expected > 0).float().mean() > 0.5  # not dead
                assert torch.allclose(features.pop(d), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert not features

    # It runs only as deep as asked, and its random weights are the same each time.
    net.Conv2d_3b_1x1.register_forward_hook(lambda *_: pytest.fail("deeper than 64 dims ask for"))
    assert list(evaluate.inception_features(net, x, [64])) == [64]
    again = evaluate.fid_inception("random").state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights if name.endswith("conv.weight"))


def test_kid_agrees_with_three_sums():
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64) + 0.4
    i, j = torch.arange(40), torch.arange(30, 60)  # ten scenes are shared

    def mean(a, b, first):  # over pairs of different scenes; scene 0 of b is scene `first` of a
        values = [(float(p @ q) / 5 + 1) ** 3 for k, p in enumerate(a) for l, q in enumerate(b) if k != first + l]
        return sum(values) / len(values)

    expected = mean(x, x, 0) + mean(y, y, 0) - 2 * mean(x, y, 30)
    assert evaluate.kid((x, i), (y, j)) == pytest.approx(expected, rel=1e-9)
    assert evaluate.kid((x, i), (x, i)) == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ intervals
@pytest.mark.parametrize("paired", [True, False])
def test_coverage_of_the_intervals(paired):
    """Nominal 95 % intervals of FID_diff hold the truth in 90 to 98 % of Gaussian experiments."""
    generator, n, d = torch.Generator().manual_seed(0), 200, 4
    means, scales = torch.tensor([[0.0, 0.8, 0.6], [1.0, 1.3, 1.1]]).double()  # of distilled, baseline, enhanced
    to_distilled, to_baseline = [d * ((means[2] - means[k]) ** 2 + (scales[2] - scales[k]) ** 2) for k in (0, 1)]
    held = []
    for seed in range(150):
        own, shared = torch.randn(4, n, d, generator=generator, dtype=torch.float64).split([3, 1])
        features = means[:, None, None] + scales[:, None, None] * (0.8 * shared + 0.6 * own if paired else own)
        orders = enumerate(torch.rand(3, n, generator=generator).argsort())  # each folder has an order
        sets = [(features[k, order], order + (0 if paired else k * n)) for k, order in orders]
        _, low, high = evaluate.distances(sets, evaluate.bootstrap_weights(3 * n, 60, seed))[2]["FID_diff"]
        held.append(low <= to_distilled - to_baseline <= high)
    assert 0.90 <= np.mean(held) <= 0.98


# --------------------------------------------------------------------------------------- what a head does to an image
def test_net_pattern_measures_a_net_and_nothing_else():
    def level(images):
        return torch.stack([evaluate.net_pattern(image) for image in images]).mean(0)

    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(8, 1, 512, 512, generator=generator).expand(-1, 3, -1, -1)
    net = torch.zeros(512, 512)
    net[::4, ::4] = -0.15
    gain = level(noise + net) - level(noise)
    # Every line of the comb has amplitude 0.15/16; a Hann tile gathers (2/3 * 128)² times that power over the noise's,
    # which has the function's floor of one gray level on top.
    expected = 10 * math.log10(1 + (0.15 / 16) ** 2 * (2 / 3 * 128) ** 2 / (0.1 ** 2 + (2 / 255) ** 2))
    assert level(noise).abs().max() < 0.5  # white noise has no net
    assert (gain[:2] - expected).abs().max() < 0.5 and gain[2:].abs().max() < 0.05

    # A picture-like spectrum, noise that falls off as 1/f: other noise, contrast, or blur is no net.
    f = torch.fft.fftfreq(512).square()
    fall = 1 / (f[:, None] + f + 1e-5).sqrt()
    picture = torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 3, 512, 512, generator=generator)) * fall).real
    picture = normalise(to_uint8(0.3 * picture / picture.std()))
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(picture.numpy(), (0, 0, 1, 1)))
    for other in (picture + 0.05 * torch.randn(picture.shape, generator=generator), 0.7 * picture - 0.1, blurred):
        assert (level(normalise(to_uint8(other))) - level(picture)).abs().max() < 0.5
    assert evaluate.net_pattern(picture[0, :, :40]).isnan().tolist() == [False, False, True, True]  # tiles of 16 px
    assert evaluate.net_pattern(torch.zeros(3, 64, 64))[:3].abs().max() < 1e-4  # flat: nothing stands out


def test_fixed_pattern_is_what_all_images_share():
    changes = 10 * np.random.default_rng(0).normal(size=(40, 3, 36, 36))
    stripes = 6 * (np.arange(36) % 3 == 0)

    def level(changes):  # of images and the inputs from which they differ by these
        images = torch.from_numpy(128 + changes).round().clamp(0, 255).to(torch.uint8)
        details = [evaluate.against_input(image, torch.full_like(image, 128))[1].double() for image in images]
        level = evaluate.fixed_pattern(len(details), sum(details), sum(h.square().mean().item() for h in details))
        n, h = len(images), images.double().numpy() - 128
        h = h - scipy.ndimage.uniform_filter(h, (1, 1, 9, 9), mode="mirror")
        expected = math.sqrt(max(0, (n * np.mean(h.mean(0) ** 2) - np.mean(h ** 2)) / (n - 1))) if n > 1 else math.nan
        assert level == pytest.approx(expected, abs=1e-4, nan_ok=True)
        return level

    assert level(changes) < 0.5 and level(changes + 30) < 0.5  # neither noise nor another brightness is a pattern
    assert level(changes + stripes) == pytest.approx(6 * math.sqrt(2) / 3, rel=0.05)  # their standard deviation
    assert math.isnan(level(changes[:1]))


def test_blobs_and_tint_by_their_definitions():
    rng = np.random.default_rng(0)
    source, noise = rng.integers(100, 120, (3, 40, 50)), 25 * rng.normal(size=(3, 40, 50))
    noise[0, 10:16, 20:26] -= 90
    noise[:, :, 35:] += 80  # neither is an edge a blob nor another brightness
    source, image = [torch.from_numpy(x.clip(0, 255).astype(np.uint8)) for x in (source, source + noise)]
    change = image.double().numpy() - source.numpy()
    padded = np.pad(change, ((0, 0), (7, 7), (7, 7)), "reflect")
    squares = np.lib.stride_tricks.sliding_window_view(padded, (15, 15), (1, 2))
    record, _ = evaluate.against_input(image, source)
    assert record["blobs_percent"] == 100 * (abs(change - np.median(squares, (3, 4))).max(0) > 40).mean() > 1

    source, image = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    source[:, 0, :3] = torch.tensor([[100, 100, 100], [100, 117, 100], [90, 100, 116]])  # gray, coloured, nearly gray
    image[:, 0, :3] = source[:, 0, :3] + torch.tensor([[3, 9, 7], [0, 0, 7], [0, 0, 7]])  # the last without a tint
    record, _ = evaluate.against_input(image, source)
    assert (record["tint"], record["neutral"]) == (pytest.approx(math.sqrt(6), rel=1e-5), 32 * 32 - 1)


def test_curves_carry_the_quantiles_of_one_set_of_pixels_to_the_other():
    rng = np.random.default_rng(0)
    a = rng.normal(120, 40, (3, 100000)).clip(0, 255).astype(np.uint8)
    b = rng.normal((90, 120, 150), (25, 40, 50), (100000, 3)).T.clip(0, 255).astype(np.uint8)
    a[0, :30000] = 0  # one level can be many quantiles
    counts = [[np.bincount(channel, minlength=256) for channel in pixels] for pixels in (a, b, b)]
    curves, own = [np.reshape(evaluate.colour_curves(*pair), (3, 256)) for pair in itertools.pairwise(counts)]
    assert (np.diff(curves) >= 0).all() and curves.min() >= 0 and curves.max() <= 255
    for curve, x, y in zip(curves, a, b):
        for level in (60, 120, 180):  # the share of darker pixels, half of the equal ones included, stays what it is
            rank = (x < level).mean() + (x == level).mean() / 2
            assert curve[level] == pytest.approx(np.quantile(y, rank), abs=1.5)
    assert curves[0, 0] == pytest.approx(np.sort(b[0])[:(a[0] == 0).sum()].mean(), abs=1)  # black, too
    assert all((curve[np.unique(y)] == np.unique(y)).all() for curve, y in zip(own, b))


def test_the_filter_carries_one_mean_spectrum_to_another():
    """White noise, weakened at 1/4 and below of a cycle a pixel, comes back, at two sizes; gray only, brightness stays."""
    rng, sums = np.random.default_rng(0), [0, 0]
    pairs = []
    for side in (64, 100) * 8:
        gray = rng.normal(0, 20, (side, side))
        low = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)) < 1 / 4
        weak = np.fft.ifft2(np.fft.fft2(gray) * np.where(low, 0.5, 1)).real
        pairs.append([Image.fromarray((128 + x[..., None] + [20, 0, -20]).round().astype(np.uint8))
                      for x in (weak, gray)])
        sums = [total + evaluate.power_spectrum(picture) for total, picture in zip(sums, pairs[-1])]
    change = evaluate.spectrum_filter(*sums)
    for weak, gray in pairs:
        before, after, aim = (np.asarray(picture, float) for picture in (weak, change(weak), gray))
        assert np.square(after - aim).mean() < 0.4 * np.square(before - aim).mean()
        assert np.ptp(after - before - (after - before).mean(2, keepdims=True)) <= 1.5
        assert abs((after - before).mean()) < 0.5


def test_tone_and_fine_detail_by_their_definitions():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8)
    gray = np.asarray(Image.fromarray(pixels).convert("L"), float)

    def box(image, side):  # the mean of side x side pixels, by hand
        padded = np.pad(image, side // 2, mode="reflect")
        return np.lib.stride_tricks.sliding_window_view(padded, (side, side)).mean((2, 3))

    measured = evaluate.tone(Image.fromarray(pixels))
    assert measured.pop("luma") == pytest.approx(gray.mean(), rel=1e-6)
    for (name, value), (a, b) in zip(measured.items(), ((1, 3), (3, 5), (5, 9), (9, 17), (17, 33)), strict=True):
        assert name == f"{a}-{b} px" and value == pytest.approx((box(gray, a) - box(gray, b)).std(), rel=1e-4)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    record = evaluate.against_baseline(image // 2, image // 2 + 5)
    expected = np.mean([(channel - box(channel, 3)) ** 2 for channel in (image // 2).double().numpy()])
    assert record["fine"] == pytest.approx(expected, rel=1e-9) and record["fine_baseline"] == pytest.approx(expected)


@pytest.mark.parametrize("value, text, short", [
    (math.nan, "-", "-"), ([math.nan] * 3, "-", "-"), (2.2e-16, "0", "0"), (0.0123456, "0.01235", "0.01235"),
    ([0.41, 0.352, 0.468], "0.410 [0.352, 0.468]", "0.41±0.06"), (12, "12", "12"),
    ([1 / 3, 1 / 3 - 1e-18, 1 / 3 + 1e-16], "0.3333", "0.3333"),
    ([3e-17, -1e-17, 8e-17], "0", "0"), ([250.0, 130.0, 370.0], "250 [130, 370]", "250±120"),
    ("a/path/that/is/longer/than/a/column", "nger/than/a/column"[-23:], None)])
def test_cells_have_as_many_decimals_as_they_mean(value, text, short):
    assert evaluate.cell(value).endswith(text) and short in (None, evaluate.cell(value, short=True))


def test_the_verdict_names_what_the_distance_hides():
    def around(value, half=0.01):
        return [value, value - half, value + half]

    def row_of(fid=(0.06, 0.02), nearer=0.08, net=0.0, fixed=0.0, blobs=0.0, tint=0.0, gain=0.0, ssim=0.5):
        features = {"FID_distilled": fid[0], "FID_baseline": around(fid[1]), "FID_gain": around(nearer),
                    "FID_over_control": around(nearer - 0.08), "FID_control": "colour curves (control)"}
        return {**{name: around(math.nan) for name in evaluate.NETS}, "net 4 px": around(net, 0.5),
                "images": "head", "N": 64, "compared": 60, "random 64": features, "fixed_pattern": fixed,
                "blobs_percent": around(blobs), "neutral_tint": around(tint), "SSIM_baseline": around(ssim),
                "PSNR_gain": around(gain), "PSNR_over_control": around(gain - 2),
                "PSNR_control": "filter (control)"}

    def verdict(**values):
        return evaluate.verdict(row_of(**values), rows, "random 64")

    good = dict(net=1.4, fixed=0.5, blobs=0.29, tint=2.9)
    rows = [row_of(fid=(0, 0.1)), row_of(fid=(0.1, 0), blobs=0.3, tint=1)]  # the models differ by blobs and tint
    first, to_input, to_control, last = verdict(**good)  # pairs that are not aligned: FID leads
    assert first == "head (N = 64)" and last == "no fault found, in 60 of 64 images"
    assert to_input == "nearer to the baseline than the input by FID (random 64 dims): 0.080 [0.070, 0.090]"
    assert to_control.startswith("no nearer for certain to the baseline than the colour curves by FID")
    assert all(line.startswith("farther") for line in verdict(nearer=-0.1)[1:3])
    faults = {"overshoot": dict(fid=(0.11, 0.02)), "net 4 px": dict(net=1.6), "fixed pattern": dict(fixed=0.6),
              "blobs": dict(blobs=0.31), "tint": dict(tint=3.1)}
    for fault, values in faults.items():
        assert [other for other in faults if other in verdict(**good | values)[-1]] == [fault]
    assert all(fault in verdict(fid=(0.11, 0.02), net=19., fixed=10., blobs=14., tint=12.)[-1] for fault in faults)
    rows[0]["SSIM_baseline"] = around(0.95)  # aligned pairs: PSNR leads
    assert [line.split(":")[0] for line in verdict(gain=1.0)[1:3]] == [
        "nearer to the baseline than the input by PSNR", "farther from the baseline than the filter by PSNR"]
    rows[1] |= {"blobs_percent": [math.nan] * 3, "neutral_tint": [math.nan] * 3}  # unpaired: 0.1 % and 2 gray levels
    assert "blobs" in verdict(**good)[-1] and "tint" in verdict(**good)[-1]


# ----------------------------------------------------------------------------------------------- the command lines
def noisy(path, seed, noise, shape=(64, 64), mode="RGB"):
    """Writes a picture whose scene and whose noise hang on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(100, 140, (5, 4, 3)).repeat(16, 0).repeat(16, 1)
    pixels = pixels[:shape[1], :shape[0]]
    pixels = pixels + np.random.default_rng(seed + 1000).normal(0, noise, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """distilled and enhanced: 12 scenes of 64x64, enhanced as WebP. baseline: six of them at that size and one larger,
    one that can be read by nobody, and two scenes of its own. clip: a tiny CLIP."""
    root = tmp_path_factory.mktemp("evaluate")
    for i in range(12):
        noisy(root / f"distilled/{i:03d}.png", i, 1)
        noisy(root / f"enhanced/{i:03d}.webp", i, 25)
    for i in (0, 1, 2, 3, 4, 5, 7):
        noisy(root / f"baseline/{i:03d}.png", i, 15, (64, 80) if i == 7 else (64, 64))
    for mode in ("L", "RGB"):
        noisy(root / f"baseline/more/{mode}.PNG", 50, 15, mode=mode)
    (root / "baseline/006.jpg").write_bytes(b"no image")
    tiny_clip(root / "clip")
    return root


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """main(command) runs evaluate.py in this process and in tmp_path: what it printed, its error, and its n.json."""
    monkeypatch.chdir(tmp_path)

    def call(command):
        error, content = "", {}
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *command.split()])
        try:
            runpy.run_path(str(REPO / "evaluate.py"), run_name="__main__")
            content = json.loads(Path("n.json").read_text()) if "--json n.json" in command else {}
        except SystemExit as end:
            error = str(end)
        return SimpleNamespace(error=error, **capsys.readouterr()._asdict(), **content)
    return call


def test_quality(main, folders):
    """The rows of the controls are those of folders which they have made; PSNR is taken where name and size agree."""
    curves = evaluate.colour_curves(*[
        sum(np.reshape(Image.open(path).convert("RGB").histogram(), (3, 256)) for path in folder.rglob("*.[pP]*"))
        for folder in (folders / "distilled", folders / "baseline")])
    Path("made").mkdir()
    for path in (folders / "distilled").iterdir():
        Image.open(path).point(curves).save(Path("made", path.name))

    done = main(f"quality {folders}/enhanced {folders}/distilled made --distilled {folders}/distilled --baseline "
                f"{folders}/baseline --features random --dims 64 192 --clip {folders}/clip --json n.json")
    assert not done.error and "006.jpg" in done.err
    assert "2048 detail as well" in done.out and "FLUX's, are not aligned" in done.out
    assert max(len(line) for line in done.out.splitlines() if line[:1] == "|") <= 110
    assert f"\n{folders / 'enhanced'} (N = 12)\n  nearer to the baseline than the input by FID (random 64" in done.out
    assert Image.open("comparison.jpg").width == 7 * 256
    _, baseline, control, filtered, enhanced, same, made = done.rows
    assert [row["images"] for row in done.rows[:4]] == ["input", "baseline", "colour curves (control)",
                                                        "filter (control)"]
    assert [[row[name] for row in done.rows] for name in ("N", "compared", "compared_baseline")] == [
        [12, 9, 12, 12, 12, 12, 12], [12, 6, 12, 12, 12, 12, 12], [6, 9, 6, 6, 6, 6, 6]]
    for d in ("random 64", "random 192"):
        of_input, of_baseline, of_control, of_filter, one, copy, curved = [row[d] for row in done.rows]
        stronger = min(of_control, of_filter, key=lambda found: found["FID_baseline"][0])
        assert of_input["FID_distilled"] == of_baseline["FID_baseline"][0] == 0
        assert of_baseline["FID_diff"][0] == pytest.approx(-of_input["FID_diff"][0])
        assert one["FID_diff"][0] == pytest.approx(one["FID_distilled"] - one["FID_baseline"][0])
        assert one["FID_gain"][0] == pytest.approx(of_input["FID_baseline"][0] - one["FID_baseline"][0])
        assert one["FID_over_control"][0] == pytest.approx(stronger["FID_baseline"][0] - one["FID_baseline"][0])
        assert one["FID_control"] == ("filter (control)" if stronger is of_filter else "colour curves (control)")
        assert all(one[name][1] < one[name][2] for name in ("FID_diff", "FID_gain")) and one["KID_diff"] != 0
        assert copy["FID_diff"] == pytest.approx(of_input["FID_diff"], abs=1e-6)
        assert all(curved[name] == of_control[name] if name == "FID_control" else
                   curved[name] == pytest.approx(of_control[name], rel=1e-5, abs=1e-9) for name in curved)
    for name in made.keys() - {"images", "random 64", "random 192", "PSNR_control"}:
        assert made[name] == pytest.approx(control[name], abs=1e-6), name

    pixels = [np.array([np.asarray(Image.open(folders / name.format(i)), float) for i in range(6)])
              for name in ("enhanced/00{}.webp", "distilled/00{}.png", "baseline/00{}.png")]
    psnr, of_input = [np.mean(10 * np.log10(255 ** 2 / ((x - pixels[2]) ** 2).mean((1, 2, 3)))) for x in pixels[:2]]
    assert enhanced["PSNR_baseline"][0] == pytest.approx(psnr, abs=1e-3)
    assert enhanced["PSNR_gain"][0] == pytest.approx(psnr - of_input, abs=1e-3)
    stronger = max(control, filtered, key=lambda row: row["PSNR_baseline"][0])
    assert enhanced["PSNR_over_control"][0] == pytest.approx(psnr - stronger["PSNR_baseline"][0], abs=1e-3)
    assert stronger["PSNR_over_control"] == [0, 0, 0]  # one scene has one weight
    assert [baseline[name][0] for name in ("PSNR_baseline", "SSIM_baseline", "fine_detail")] == [100, 1, 1]
    assert enhanced["fine_detail"][0] > 1
    assert same["SSIM"][0] == pytest.approx(1) and same["net 4 px"] == [0, 0, 0]
    assert 0 < enhanced["SSIM"][1] + 1e-3 < enhanced["SSIM"][0] < enhanced["SSIM"][2] - 1e-3 < 0.95
    assert same["fixed_pattern"] == same["blobs_percent"][0] == same["neutral_tint"][0] == 0
    assert enhanced["blobs_percent"][0] > 1 and enhanced["neutral_tint"][0] > 10 and enhanced["fixed_pattern"] < 5
    assert all(0 < row["CLIP-IQA"][0] < 1 for row in done.rows)


def test_what_is_one_scene_and_what_is_compared(main, folders):
    """Other pictures under one stem, other sizes and suffixes, pictures that another reader sees otherwise, and folders
    without common names. Without a baseline there is no FID, but the rest."""
    distilled, enhanced = Path("distilled"), Path("enhanced")
    for i in range(3):
        noisy(distilled / f"s{i}.png", i, 5)
        noisy(distilled / f"s{i}.bmp", 10 + i, 5)
        noisy(enhanced / f"s{i}.png", i, 5)
        noisy(enhanced / f"s{i}.bmp.png", 10 + i, 5)
        noisy(distilled / f"sub/t{i}.png", 20 + i, 5)
        noisy(enhanced / f"sub/t{i}.webp", 20 + i, 5, (32, 64))  # another size
        noisy(Path(f"faulty/sub/t{i}.webp"), 20 + i, 25)
        noisy(distilled / f"c{i}.tif", 30 + i, 5, mode="CMYK")
        Image.open(distilled / f"c{i}.tif").convert("RGB").save(enhanced / f"c{i}.png")
        noisy(distilled / f"clear{i}.png", 40 + i, 5)
        image, mask = Image.open(distilled / f"clear{i}.png"), Image.new("L", (64, 64), 255)
        mask.paste(0, (0, 0, 64, 20))  # hidden colours, on white in the other
        Image.composite(image, Image.new("RGB", (64, 64), "white"), mask).save(enhanced / f"clear{i}.png")
        image.putalpha(mask)
        image.save(distilled / f"clear{i}.png")
    noisy(enhanced / "alone.png", 7, 5)
    done = main(f"quality enhanced faulty {folders}/baseline --distilled distilled --features random --json n.json")
    _, row, _, unmatched = done.rows
    assert (row["N"], row["compared"]) == (16, 12) and row["SSIM"] == pytest.approx([1, 1, 1], abs=1e-6)
    assert "1 of 16 images" in done.err and "alone.png" in done.err
    assert unmatched["SSIM"][0] is None and "FID" not in done.out
    of_enhanced, of_faulty, of_unmatched = done.out.splitlines()[-5::2]
    assert of_enhanced == "  no fault found, in 12 of 16 images" and of_unmatched.endswith("in 0 of 9 images")
    assert "blobs" in of_faulty and "tint" in of_faulty and of_faulty.endswith("found, in 3 of 3 images")


def test_bad_input_is_refused_in_one_line(main, folders, tmp_path, monkeypatch):
    """Above all a result that could not be written, and before the work."""
    monkeypatch.setenv("TORCH_HOME", "file")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    noisy(Path("one/a.png"), 0, 1)
    kept = Path("one/a.png").read_bytes()
    Path("empty").mkdir()
    Path("file").touch()
    quality = f"quality --distilled {folders}/distilled --baseline {folders}/baseline"
    reasons = {f"{quality} one --features random --dims 64": "one holds fewer than two readable images",
               f"{quality} --clip none": "put it into file/hub/checkpoints",
               f"{quality} --clip empty": "hf download openai/clip",
               "quality --distilled empty --features random": "holds no image",
               "time --model empty": "timing FLUX needs a CUDA GPU",
               "runs empty --curves one/a.png": "no folder holds"}
    for command in ("quality --distilled nowhere --sheet", "diversity nowhere --clip empty --map",
                    "runs nowhere --curves", "time --head-only --model nowhere --json"):
        for target in ("/proc/no/x.jpg", tmp_path, "file/x.jpg", *(["x.unknown"] if "time" not in command else [])):
            reasons[f"{command} {target}"] = f"error: cannot write {target} ("
    for command, reason in reasons.items():
        error = main(command).error
        assert reason in error and "\n" not in error
    assert Path("one/a.png").read_bytes() == kept and len(list(Path("one").iterdir())) == 1


def test_diversity(main, folders):
    noisy(Path("one/a.png"), 3, 1)
    done = main(f"diversity {folders}/distilled {folders}/baseline one --clip {folders}/clip --json n.json")
    assert [row["N"] for row in done.rows] == [12, 9, 1] and "006.jpg" in done.err
    assert "DeepFace" in done.out and "ArcFace" in done.out
    for row in done.rows:
        for choices in evaluate.PEOPLE:
            shares, low, high = np.transpose([row[choice] for choice in choices])
            assert shares.sum() == pytest.approx(100)
            for limit in (low, high):  # Wilson's: 1.96 of its own standard errors from the share, at 0 and 100 % too
                off = abs(shares - limit) - 1.96 * np.sqrt(limit * (100 - limit) / row["N"])
                assert (abs(off) < 0.01).all() and (low < high).all()
    with Image.open("map.jpg") as image:  # a column a folder: 12, 9 and one picture of 64 px
        columns = (np.asarray(image.convert("L"))[100:] < 200).reshape(1200, 3, 1200).sum((0, 2)) / 64 ** 2
    assert 1 < columns[0] <= 12.5 and 1 < columns[1] <= 9.5 and 0.8 < columns[2] < 1.2
    assert not main(f"diversity one --clip {folders}/clip --map one.png").error  # one image alone


def test_time_of_the_head(main, head, tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi, whose power counts; without one, and where it knows no power, there is a dash."""
    script = tmp_path / "bin/nvidia-smi"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    for power in ("250.5", "[N/A]"):
        script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/calls\necho '{power}'\n")
        script.chmod(0o755)
        done = main(f"time --head-only --model {head} --sizes 32 --json n.json")
        row, = done.rows
        assert (row["size"], row["what"], row["GB"]) == (32, "head", None)
        assert row["joules"] == (pytest.approx(250.5 * row["seconds"][0]) if power == "250.5" else None)
        assert "CPU" in done.device and "8-bit to 8-bit" in done.out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) > 10 and set(calls) == {"--query-gpu=power.draw --format=csv,noheader,nounits"}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("timeit.repeat", lambda *_, **__: [1.0, 5.0, 2.0, 4.0, 3.0])
    done = main(f"time --head-only --model {head} --sizes 32 64 --batch-size 4 --json n.json")
    assert done.rows[0]["seconds"] == [0.75, 0.25, 1.25] and "4 image(s) at once" in done.out
    lines = done.out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["32", "64"] and lines[3].endswith("| -      | -  |")


TINY_FLUX = dict(
    transformer=dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                     joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
    clip=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), t5=dict(d_model=32, num_layers=1),
    vae=dict(evaluate.FLUX["vae"], block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4,
             norm_num_groups=2))


@pytest.mark.parametrize("student", [False, True], ids=["random schnell", "a student from a folder, offloaded"])
def test_time_of_flux_at_toy_size(student, monkeypatch, tmp_path, capsys):
    """All of `time` but the refusal to run FLUX on a CPU, with a FLUX of some kilobytes."""
    calls, outputs, generate = set(), [], evaluate.generate

    def recorded(pipe, size, *call):
        calls.add((*call[:3], len(call) == 4))
        outputs.append(generate(pipe, size, *call))

    for name, value in dict(generate=recorded, FLUX=TINY_FLUX, fail=print, ResnetGenerator=torch.nn.Identity).items():
        monkeypatch.setattr(evaluate, name, value)
    models = {name: str(tiny_flux(tmp_path / name, guidance_embeds=True)) for name in ("distilled", "baseline")
              if student}
    content, picture = evaluate.time_all(SimpleNamespace(
        head_only=False, random_weights=not student, model=None, sizes=[32], batch_size=1, distilled_steps=1,
        baseline_steps=3, distilled_tokens=77, baseline_tokens=99, offload=student, **models))
    assert calls == {(3, 99, 3.0, False), (1, 77, 0.0, False), (1, 77, 0.0, True)} and picture is None
    assert all(image.dtype == torch.uint8 and image.shape == (1, 3, 32, 32) for image in outputs)
    times = {row["what"]: row["seconds"][0] for row in content["rows"]}
    assert list(times) == ["head", "baseline", "distilled", "distilled + head"]
    output = capsys.readouterr().out
    saved = 1 - times["distilled + head"] / times["baseline"]
    assert "about 19 steps" in output and f"distilled + head saves {saved:.1%} at 32 px" in output.splitlines()[-1]


def test_full_size_flux_has_the_published_parameter_counts(monkeypatch):
    monkeypatch.setattr(evaluate, "DEVICE", torch.device("meta"))
    counts = [[sum(weight.numel() for weight in part.parameters()) for part in
               (pipe.transformer, pipe.text_encoder_2, pipe.text_encoder, pipe.vae)]
              for pipe in (evaluate.random_flux(guided, offload=False) for guided in (True, False))]
    others = [4_762_310_656, 123_060_480, 83_819_683]
    assert counts == [[11_901_408_320, *others], [11_891_178_560, *others]]


def test_runs(main):
    for name, log, settings in (
            ("a", [(0.1, 0.99), (1.5, 0.95), (1.25, 0.96), (1.0, 0.7)], {}), ("seed", [(9.0, 0.9), (1.5, 0.95)], {}),
            ("b", [(2.5, 0.97), (2.0, 0.8)], dict(lambda_cycle=5.0, lr=2e-4)),
            ("classic", [(5.0, 0.93)], dict(classic=True)), ("search", [(0.5, 0.99)], dict(size=256, fraction=1))):
        Path(name).mkdir()
        defaults = dict(attention="esa", classic=False, lambda_cycle=2.0, lr=1e-4, epochs=3, size=512, fraction=0.2)
        Path(name, "args.json").write_text(json.dumps(defaults | settings))
        Path(name, "log.csv").write_text("epoch,loss_G,loss_D,cycle_ssim,lr\n" + "".join(
            f"{i + 1},{loss},{0.5 / (i + 1)},{similarity},1e-5\n" for i, (loss, similarity) in enumerate(log)))

    # The cell of λ 2 shows neither epoch 1, before the decay, nor epoch 4, broken, nor the worse seed.
    done = main("runs . a seed b classic search")
    assert ": . is no CycleGAN run" in done.err
    classic, search, ours = done.out.split("attention esa, ")[1:4]
    assert search.startswith("ours, 256 px") and "| 0.5 (0.990)" in search
    assert ours.splitlines()[0] == "ours, 512 px, 20.0% of the data"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ours.splitlines() if line[:2] == "| "]
    assert table[0] == ["λ", "lr 0.0001", "lr 0.0002"]
    assert table[2:] == [["2", "1.25 (0.960)", "-"], ["5", "-", "2 (0.800)"]]
    assert "values significantly below 0.9 indicated poor-quality results" in done.out
    assert classic.startswith("classic, ") and "5 (0.930)" in classic
    assert "fraction: a. The loss contains λ" in done.out
    with Image.open("curves.jpg") as sheet:  # a panel of 400x300 for each of five runs
        pixels = np.asarray(sheet)[33:].astype(int).reshape(300, 5, 400, 3)
    for channel in range(3):  # a line of each colour in the three that have several epochs
        tint = pixels[..., channel] - np.delete(pixels, channel, -1).max(-1)
        assert ((tint > 40).sum((0, 2))[:3] > 50).all()
