"""evaluate.py: its metrics against independent references, and every sub-command through its real command line."""
import json
import math
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from conftest import run
from modules import normalise, to_uint8
from PIL import Image
from tiny_models import tiny_clip, tiny_flux


# ------------------------------------------------------------------------------------------------------ FID and KID
def plain_fid(x, y):
    """FID of two feature sets by the textbook formula, with the symmetric matrix square root."""
    (m1, s1), (m2, s2) = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    values, vectors = scipy.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return np.sum((m1 - m2) ** 2) + np.trace(s1 + s2) - 2 * cross


def our_fid(x, y):
    return evaluate.fid(*[evaluate.moments(torch.from_numpy(z), torch.ones(len(z)).double()) for z in (x, y)]).item()


@pytest.mark.parametrize("n, m, d", [(300, 200, 20), (30, 30, 64), (30, 200, 64)])
def test_fid_agrees_with_the_textbook(n, m, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + 0.3
    assert our_fid(x, y) == pytest.approx(plain_fid(x, y), rel=1e-6)
    assert our_fid(x, x + 0.5) == pytest.approx(d * 0.25, rel=1e-9)
    assert our_fid(x, x) == pytest.approx(0, abs=1e-9)


def test_inception_is_torchvisions_with_the_pooling_of_2015(monkeypatch):
    """The reference swaps the pooling function under torchvision's blocks; ours hooks the blocks."""
    import torchvision
    generator = torch.Generator().manual_seed(1)
    reference = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: reference.state_dict())
    net = evaluate.fid_inception("inception")

    last = []
    reference.Mixed_7c.register_forward_pre_hook(lambda *_: last.append(True))
    pools = SimpleNamespace(**{name: getattr(F, name) for name in ("relu", "max_pool2d")})
    pools.avg_pool2d = lambda x, kernel_size, stride, padding: (
        F.max_pool2d(x, kernel_size, stride, padding) if last else
        F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False))
    monkeypatch.setattr(torchvision.models.inception, "F", pools)
    x = torch.rand(2, 3, 299, 299, generator=generator)
    expected, h = {}, 2 * x - 1
    with torch.no_grad():
        for name, layer in reference.named_children():
            h = layer(h) if name not in ("dropout", "fc") else h
            expected[name] = h.mean((2, 3))
    features = evaluate.inception_features(net, x, [2048, 64, 192, 768])
    for d, name in ((64, "maxpool1"), (192, "maxpool2"), (768, "Mixed_6e"), (2048, "Mixed_7c")):
        assert features[d].shape == (2, d)
        assert torch.allclose(features[d], expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item())


def test_inception_runs_only_as_deep_as_asked():
    net = evaluate.fid_inception("random")
    net.Conv2d_3b_1x1.register_forward_hook(lambda *_: pytest.fail("deeper than 64 dims ask for"))
    assert list(evaluate.inception_features(net, torch.rand(1, 3, 299, 299), [64])) == [64]
    again = evaluate.fid_inception("random")
    assert torch.equal(net.Mixed_7c.branch1x1.conv.weight, again.Mixed_7c.branch1x1.conv.weight)  # seeded


def test_kid_agrees_with_three_sums():
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64) + 0.4
    one, i, j = torch.ones(1, 70, dtype=torch.float64), torch.arange(40), torch.arange(40, 70)

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    expected = (sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (40 * 39)
                + sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (30 * 29)
                - 2 * sum(k(a, b) for a in x for b in y) / (40 * 30))
    assert evaluate.kid(x, y, i, j, one).item() == pytest.approx(expected, rel=1e-9)
    assert evaluate.kid(x, x, i, i, one).item() == pytest.approx(0, abs=1e-12)
    halves = [evaluate.kid(x[a:a + 20], y[b:b + 15], i[:20], j[:15], one).item() for a, b in ((0, 0), (20, 15))]
    assert evaluate.kid(x, y, i, j, one, block=20).item() == pytest.approx(sum(halves) / 2, rel=1e-9)


# ------------------------------------------------------------------------------------------------------ intervals
@pytest.mark.parametrize("paired", [True, False])
def test_coverage_of_the_intervals(paired, monkeypatch):
    """Nominal 95 % intervals of FID_diff and KID_diff hold the truth in 90 to 98 % of Gaussian experiments."""
    monkeypatch.setattr(evaluate, "tqdm", lambda x, *_, **__: x)
    generator = torch.Generator().manual_seed(0)
    n, d, experiments = 200, 4, 150
    scales = torch.tensor([[1.0] * d, [1.3] * d, [1.1] * d]).double()     # distilled, baseline, enhanced
    means = torch.tensor([[0.0] * d, [0.8] * d, [0.6] * d]).double()
    truth = {"FID": sum(((means[2] - means[k]) ** 2 + (scales[2] - scales[k]) ** 2).sum() * sign
                        for k, sign in ((0, 1), (1, -1))).item()}
    intervals = {"FID": [], "KID": []}
    for seed in range(experiments):
        shared = torch.randn(n, d, generator=generator, dtype=torch.float64)
        own = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
        sets = means[:, None] + scales[:, None] * (0.8 * shared + 0.6 * own if paired else own)
        scenes = [torch.arange(n) + (0 if paired else k * n) for k in range(3)]
        weights = evaluate.bootstrap_weights(n * (1 if paired else 3), 60, seed)
        for name, values in zip(intervals, evaluate.fid_and_kid(list(sets), scenes, weights)):
            intervals[name].append(evaluate.interval(values[:, 2, 0] - values[:, 2, 1]))
    truth["KID"] = np.mean([value for value, _, _ in intervals["KID"]])  # unbiased, so its mean will do
    for name, limits in intervals.items():
        assert 0.90 <= np.mean([low <= truth[name] <= high for _, low, high in limits]) <= 0.98


def test_shared_scenes_narrow_the_interval():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    weights = evaluate.bootstrap_weights(200, 200)

    def width(scenes):
        _, low, high = evaluate.interval((evaluate.average(x + 0.1, scenes, weights)
                                          - evaluate.average(x, torch.arange(100), weights))[:, 0])
        return high - low

    assert width(torch.arange(100)) < 1e-6 < 0.3 < width(torch.arange(100, 200))


# --------------------------------------------------------------------------------------- what a head does to an image
def net_of(images):
    return torch.stack([evaluate.net_pattern(image) for image in images]).mean(0)


def test_net_pattern_measures_a_net_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(8, 1, 512, 512, generator=generator).expand(-1, 3, -1, -1)
    level = net_of(noise)
    assert level.abs().max() < 0.5  # white noise has no net
    net = torch.zeros(512, 512)
    net[::4, ::4] = -0.15
    gain = net_of(noise + net) - level
    # Every line of the comb has amplitude 0.15/16; a Hann tile gathers (2/3 * 128)² times that power over the noise's,
    # which has the function's floor of one gray level on top.
    expected = 10 * math.log10(1 + (0.15 / 16) ** 2 * (2 / 3 * 128) ** 2 / (0.1 ** 2 + (2 / 255) ** 2))
    assert gain[0] == pytest.approx(expected, abs=0.5) and gain[1] == pytest.approx(expected, abs=0.5)
    assert gain[2:].abs().max() < 0.05

    # A picture-like spectrum: noise that falls off as 1/f.
    f = torch.fft.fftfreq(512).square()
    fall = 1 / (f[:, None] + f + 1e-5).sqrt()
    picture = torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 3, 512, 512, generator=generator)) * fall).real
    picture = normalise(to_uint8(0.3 * picture / picture.std()))
    level = net_of(picture)
    taps = torch.exp(-torch.arange(-4, 5).float().square() / 2)
    blur = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 9, 9)
    for other in (picture + 0.05 * torch.randn(picture.shape, generator=generator), 0.7 * picture - 0.1,
                  F.conv2d(F.pad(picture, (4,) * 4, mode="reflect"), blur, groups=3)):
        assert (net_of(normalise(to_uint8(other))) - level).abs().max() < 0.5
    assert evaluate.net_pattern(picture[0, :, :40]).isnan().all()
    assert evaluate.net_pattern(torch.zeros(3, 64, 64))[:3].abs().max() < 1e-4  # flat: nothing stands out


def test_fixed_pattern_is_what_all_images_share():
    changes = 10 * np.random.default_rng(0).normal(size=(40, 3, 36, 36))
    stripes = np.zeros((36, 36))
    stripes[:, ::3] = 6

    def ours(changes):
        details = [evaluate.detail(torch.from_numpy(change)) for change in changes]
        return evaluate.fixed_pattern(len(details), sum(details), sum(h.square().mean().item() for h in details))

    def formula(changes):
        h = changes - scipy.ndimage.uniform_filter(changes, (1, 1, 9, 9), mode="mirror")
        m, n = h.mean(0), len(h)
        return math.sqrt(max(0, (n * np.mean(m ** 2) - np.mean(h ** 2)) / (n - 1)))

    for values in (changes, changes + stripes, changes + 30):
        assert ours(values) == pytest.approx(formula(values), abs=1e-6)
    assert ours(changes) < 0.5 and ours(changes + 30) < 0.5  # neither noise nor another brightness is a pattern
    assert ours(changes + stripes) == pytest.approx(6 * math.sqrt(2) / 3, rel=0.05)  # their standard deviation
    assert math.isnan(ours(changes[:1]))


def test_blobs_and_tint_by_their_definitions():
    rng = np.random.default_rng(0)
    change = 25 * rng.normal(size=(3, 40, 50))
    change[0, 10:16, 20:26] -= 90
    median = scipy.ndimage.median_filter(change, (1, 15, 15), mode="mirror")
    expected = 100 * (abs(change - median).max(0) > 40).mean()
    assert 1 < expected < 50 and evaluate.blobs(torch.from_numpy(change)) == pytest.approx(expected)
    strong = torch.zeros(3, 64, 64)
    strong[:, :, 30:] = 39
    assert evaluate.blobs(strong) == 0 and evaluate.blobs(strong - 200) == 0
    strong[2, 10:15, 10:15] = -60
    assert evaluate.blobs(strong) == pytest.approx(100 * 25 / 64 ** 2)

    source = torch.tensor([[100, 100, 90], [200, 117, 90], [100, 100, 116]], dtype=torch.uint8).T[..., None]
    change = torch.tensor([[3.0, 0, 0], [9, 0, 0], [7, 7, 7]]).T[..., None]  # of near-gray, of colour, without a tint
    assert evaluate.neutral_tint(source, change) == (pytest.approx(math.sqrt(6)), 2)


def row_of(fid_distilled, fid_baseline, change, net=0.0, fixed=0.0, blobs=0.0):
    features = {"kind": "random", "FID_distilled": fid_distilled, "FID_baseline": [fid_baseline, 0, 1],
                "FID_baseline_change": [change, change - 0.01, change + 0.01], "FID_diff": [0.1, 0, 0.2]}
    return {"features": {64: features}, "SSIM": [0.9, 0.8, 1], "neutral_tint": [1, 0, 2], "fixed_pattern": fixed,
            "net_pattern_dB": {2: [net, net - 0.5, net + 0.5]}, "blobs_percent": [blobs, 0, 1]}


def test_the_verdict_names_what_the_distance_hides():
    rows, good = [row_of(0, 0.1, 0), row_of(0.1, 0, -0.1, blobs=0.3)], dict(fid_distilled=0.06, fid_baseline=0.02,
                                                                          change=-0.08, net=1.4, fixed=0.5, blobs=0.29)
    clean = evaluate.verdict(row_of(**good), rows, 64)
    assert "20 % of the untouched input's 0.1 (nearer)" in clean and clean.endswith("No fault found")
    faults = {"overshoot": dict(fid_distilled=0.11), "net pattern": dict(net=1.6), "fixed pattern": dict(fixed=0.6),
              "blobs": dict(blobs=0.31)}
    for fault, values in faults.items():
        named = evaluate.verdict(row_of(**good | values), rows, 64).split("Faults: ")[1]
        assert [other in named for other in faults] == [other == fault for other in faults]
    assert "(farther)" in evaluate.verdict(row_of(0.06, 0.2, 0.1), rows, 64)
    assert "no nearer" in evaluate.verdict(row_of(0.06, 0.1, 0.005), rows, 64)


def test_principal_components_separate_clusters():
    x = torch.cat([torch.randn(30, 10) + 20 * torch.eye(10)[k] for k in range(3)])
    y = evaluate.principal_components(x).reshape(3, 30, 2)
    spread = (y - y.mean(1, keepdim=True)).norm(dim=-1).max()
    assert torch.pdist(y.mean(1)).min() > 2 * spread and y.min() == 0 and y.max() == 1
    for few in (torch.ones(20, 5), torch.ones(1, 5)):
        assert evaluate.principal_components(few).shape == (len(few), 2)


# ----------------------------------------------------------------------------------------------- the command lines
@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """distilled and enhanced: 12 scenes of 64x64, enhanced as WebP. baseline: 9 others, larger, one gray."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)

    def write(path, smooth, noise, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (smooth + rng.normal(0, noise, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)

    for i in range(12):
        smooth = np.kron(rng.integers(100, 140, (4, 4, 3)), np.ones((16, 16, 1)))
        write(root / f"distilled/{i:03d}.png", smooth, 1)
        write(root / f"enhanced/{i:03d}.webp", smooth, 25)
    for i in range(9):
        write(root / f"baseline/more/{i:03d}.PNG", np.kron(rng.integers(100, 140, (5, 4, 3)), np.ones((16, 20, 1))), 25,
              "L" if i == 0 else "RGB")
    (root / "baseline/broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def references(folders):
    return "--distilled", folders / "distilled", "--baseline", folders / "baseline"


def test_quality(folders, clip, tmp_path):
    done = run("evaluate.py", "quality", folders / "enhanced", folders / "distilled", *references(folders),
               "--features", "random", "--dims", 64, 192, "--clip", clip, "--json", "q.json", cwd=tmp_path)
    for warning in ("broken.png", "different numbers of images (12, 9, 12, 12)", "9 images are fewer than 192 dims"):
        assert warning in done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"1. {folders / 'enhanced'}: FID to the baseline")
    assert "(nearer)" in done.stdout.splitlines()[-1] and "random features, 64 dims" in done.stdout
    with Image.open(tmp_path / "comparison.jpg") as sheet:
        assert sheet.width == 4 * 256
    content = json.loads((tmp_path / "q.json").read_text())
    distilled, baseline, enhanced, same = content["rows"]
    assert [(row["N"], row["unreadable"]) for row in content["rows"]] == [(12, 0), (9, 1), (12, 0), (12, 0)]
    assert content["flags"]["features"] == "random" and "torch" in content["versions"]
    for d in ("64", "192"):
        f = {row["images"]: row["features"][d] for row in content["rows"]}
        assert f["distilled"]["FID_distilled"] == f["baseline"]["FID_baseline"][0] == 0
        assert f["baseline"]["FID_diff"][0] == pytest.approx(-f["distilled"]["FID_diff"][0])
        one, gap = f[str(folders / "enhanced")], f["distilled"]["FID_baseline"][0]
        assert one["FID_diff"][0] == pytest.approx(one["FID_distilled"] - one["FID_baseline"][0])
        assert one["FID_baseline_change"][0] == pytest.approx(one["FID_baseline"][0] - gap)
        assert all(one[name][1] < one[name][2] for name in ("FID_diff", "KID_diff", "FID_baseline_change"))
        assert f[str(folders / "distilled")]["FID_diff"] == pytest.approx(f["distilled"]["FID_diff"], abs=1e-6)
    assert same["SSIM"][0] == pytest.approx(1) and 0 < enhanced["SSIM"][0] < 0.95 and baseline["SSIM"][0] is None
    assert same["net_pattern_dB"]["4"] == [0, 0, 0] and baseline["blobs_percent"][0] is None
    assert same["fixed_pattern"] == same["blobs_percent"][0] == same["neutral_tint"][0] == 0
    assert enhanced["blobs_percent"][0] > 1 and enhanced["neutral_tint"][0] > 10 and enhanced["fixed_pattern"] < 5
    assert all(0 < row["CLIP-IQA"][0] < 1 for row in content["rows"])


def test_quality_without_a_baseline(folders, tmp_path, monkeypatch, capsys):
    """Images of another kind: no FID, the rest. Folders without common names are said to tell nothing."""
    monkeypatch.chdir(tmp_path)
    for baseline in (None, str(folders / "distilled")):
        evaluate.quality(SimpleNamespace(folders=[str(folders / "enhanced"), str(folders / "baseline")], clip="none",
                                         distilled=str(folders / "distilled"), baseline=baseline, dims=[64, 2048],
                                         features="inception", sheet="sheet.jpg", json=None))
        output = capsys.readouterr().out
        enhanced, unmatched = output.splitlines()[-2:]
        assert "FID" not in output and "Faults: " in enhanced and "blobs in" in enhanced
        assert "SSIM to the input -" in unmatched and "Faults cannot be seen" in unmatched


def test_quality_refuses_bad_input_in_one_line(folders, tmp_path, monkeypatch):
    for name in ("one", "empty"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one/a.png")
    done = run("evaluate.py", "quality", tmp_path / "one", *references(folders), "--features", "random", "--dims", 64,
               check=False, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"error: {tmp_path / 'one'} holds 1 readable image(s); a covariance needs 2, a useful interval some hundreds"]
    assert not (tmp_path / "comparison.jpg").exists()

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    for message, refused in (
            (f"put it into {tmp_path / 'torch'}/hub/checkpoints", lambda: evaluate.fid_inception("inception")),
            ("hf download openai/clip", lambda: evaluate.load_clip(str(tmp_path / "empty"))),
            ("holds no image", lambda: evaluate.by_name(tmp_path / "empty"))):
        with pytest.raises(SystemExit, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def test_diversity(folders, clip, tmp_path):
    done = run("evaluate.py", "diversity", folders / "distilled", folders / "baseline", "--clip", clip,
               "--json", "d.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [row["N"] for row in rows] == [12, 9] and "broken.png" in done.stderr
    assert "DeepFace" in done.stdout and "ArcFace" in done.stdout
    for row in rows:
        for attribute, choices in (("gender", 2), ("age", 3), ("ethnicity", 6)):
            shares = np.array(list(row[attribute].values()))
            assert shares.shape == (choices, 3) and shares[:, 0].sum() == pytest.approx(100)
            assert (0 <= shares[:, 1]).all() and (shares[:, 1] <= shares[:, 2]).all() and (shares[:, 2] < 100.01).all()
    with Image.open(tmp_path / "map.jpg") as image:
        colours = np.asarray(image)[60:].astype(int)
    assert (abs(colours - np.array([0, 114, 178])).max(-1) < 30).any()  # a frame of the first folder's blue


def test_time_of_the_head(head, tmp_path):
    done = run("evaluate.py", "time", "--head-only", "--model", head, "--sizes", 32, 64, "--repeats", 2, "--json",
               "t.json", cwd=tmp_path)
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["rows"]["64"]["head"][0] > 0 and content["rows"]["64"]["batch"] == 1
    assert "CPU" in content["device"] and content["peak_memory_gb"] is None and "8-bit to 8-bit" in done.stdout


def refusal(command, **settings):
    with pytest.raises(SystemExit) as error:
        command(SimpleNamespace(**settings))
    return str(error.value)


def test_time_refuses_odd_sizes_and_flux_on_a_cpu(monkeypatch):
    monkeypatch.setattr(evaluate, "DEVICE", torch.device("cpu"))
    assert "multiples of 16" in refusal(evaluate.time_all, head_only=True, sizes=[100])
    assert "timing FLUX needs a CUDA GPU" in refusal(evaluate.time_all, head_only=False, sizes=[64])


TINY_FLUX = dict(
    transformer=dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                     joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
    clip=dict(vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2,
              bos_token_id=0, eos_token_id=1),
    t5=dict(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4),
    vae=dict(evaluate.FLUX["vae"], block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4,
             norm_num_groups=2))


@pytest.mark.parametrize("models", ["random", "schnell and dev", "student that embeds guidance"])
def test_time_of_flux_at_toy_size(models, monkeypatch, tmp_path, capsys):
    """All of `time` but the refusal to run FLUX on a CPU, with a FLUX of some kilobytes."""
    calls, outputs = set(), []

    def recorded(pipe, size, steps, guidance, tokens, head=None):
        calls.add((steps, guidance, tokens, head is not None))
        outputs.append(generate(pipe, size, steps, guidance, tokens, head))
        return outputs[-1]

    class Negative(torch.nn.Module):
        def forward(self, x):
            return -x

    generate = evaluate.generate
    monkeypatch.setattr(evaluate, "generate", recorded)
    monkeypatch.setattr(evaluate, "FLUX", TINY_FLUX)
    monkeypatch.setattr(evaluate, "fail", lambda message: None)
    monkeypatch.setattr(evaluate, "ResnetGenerator", Negative)
    student = models.startswith("student")
    folders = [] if models == "random" else [str(tiny_flux(tmp_path / name, guidance_embeds=embeds))
                                             for name, embeds in (("distilled", student), ("baseline", True))]
    evaluate.time_all(SimpleNamespace(
        head_only=False, random_weights=models == "random", model=None, sizes=[32], repeats=1, distilled_steps=1,
        baseline_steps=3, distilled_guidance=None, guidance=3.0, distilled_tokens=None, tokens=512,
        json=str(tmp_path / "t.json"), **dict(zip(("distilled", "baseline"), folders))))
    guidance, tokens = (3.5, 512) if student else (0.0, 256)
    assert calls == {(3, 3.0, 512, False), (1, guidance, tokens, False), (1, guidance, tokens, True)}
    assert all(image.dtype == torch.uint8 and image.shape == (1, 3, 32, 32) for image in outputs)
    row = json.loads((tmp_path / "t.json").read_text())["rows"]["32"]
    assert row["saved"] == pytest.approx(1 - row["distilled + head"][0] / row["baseline"][0])
    output = capsys.readouterr().out
    assert "about 19 steps" in output and "distilled + head saves" in output.splitlines()[-1]


def test_full_size_flux_has_the_published_parameter_counts():
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    with torch.device("meta"):
        models = (FluxTransformer2DModel(guidance_embeds=True, **evaluate.FLUX["transformer"]),
                  FluxTransformer2DModel(guidance_embeds=False, **evaluate.FLUX["transformer"]),
                  T5EncoderModel(T5Config(**evaluate.FLUX["t5"])),
                  CLIPTextModel(CLIPTextConfig(**evaluate.FLUX["clip"])),
                  AutoencoderKL(**evaluate.FLUX["vae"]))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        11_901_408_320, 11_891_178_560, 4_762_310_656, 123_060_480, 83_819_683]


def test_runs(tmp_path):
    def write(name, epochs, **settings):
        folder = tmp_path / name
        folder.mkdir()
        settings = dict(attention="esa", lambda_cycle=2.0, lr=1e-4, decay_start=1, size=512, fraction=0.2) | settings
        (folder / "args.json").write_text(json.dumps(settings))
        (folder / "log.csv").write_text("epoch,loss_G,cycle_ssim\n" + "".join(
            f"{i + 1},{loss},{similarity}\n" for i, (loss, similarity) in enumerate(epochs)))

    write("a", [(0.1, 0.99), (1.5, 0.95), (1.25, 0.96), (1.0, 0.7)])
    write("b", [(2.5, 0.97), (2.0, 0.8)], lambda_cycle=5.0, lr=2e-4)
    write("c", [(3.0, 0.91)], attention="none")
    write("search", [(9.0, 0.9), (0.5, 0.99)], size=256, fraction=0.02)
    (tmp_path / "unet").mkdir()
    done = run("evaluate.py", "runs", *(tmp_path / name for name in ("a", "b", "c", "search", "unet")))
    assert "1.250 / 0.960" in done.stdout        # not epoch 1, before the decay; not epoch 4, broken
    assert "2.000 / 0.800" in done.stdout and "3.000 / 0.910" in done.stdout
    assert "values significantly below 0.9 indicated poor-quality results" in done.stdout
    search, final = done.stdout.split("ESA-CycleGAN, 256 px, 0.02 of the data")[1].split("CycleGAN, 512 px", 1)
    assert "0.500 / 0.990" in search and "0.500 / 0.990" not in final
    assert "unet is no CycleGAN run" in done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"The best run at 512 px on 0.2 of the data is {tmp_path / 'a'}")
    assert "no folder holds" in refusal(evaluate.runs, folders=[str(tmp_path / "unet")], json=None)
