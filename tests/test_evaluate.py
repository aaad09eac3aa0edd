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
import torchvision
from conftest import run
from modules import normalise, to_uint8
from PIL import Image
from tiny_models import tiny_clip, tiny_flux


# ------------------------------------------------------------------------------------------------------ FID and KID
@pytest.mark.parametrize("n, m, d", [(300, 200, 20), (30, 30, 64), (30, 200, 64)])
def test_fid_agrees_with_the_textbook(n, m, d):
    def ours(*sets):
        return evaluate.fid(*[evaluate.moments(torch.from_numpy(z), torch.ones(len(z)).double()) for z in sets]).item()

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) / math.sqrt(d) + 0.3
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = scipy.linalg.eigh(s1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # of s1, symmetric
    cross = np.sqrt(scipy.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1 + s2) - 2 * cross
    assert ours(x, y) == pytest.approx(expected, rel=1e-6)
    assert ours(x, x + 0.5) == pytest.approx(d * 0.25, rel=1e-9)
    assert ours(x, x) == pytest.approx(0, abs=1e-9)


def test_inception_is_torchvisions_with_the_pooling_of_2015(monkeypatch):
    """The reference swaps the pooling function under torchvision's blocks; ours hooks the blocks."""
    generator, last = torch.Generator().manual_seed(1), []
    weights = evaluate.fid_inception("random").state_dict()
    for name, value in weights.items():
        if "running" in name:
            value.uniform_(0.5, 1.5, generator=generator)
    reference = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    reference.load_state_dict(weights)
    reference.Mixed_7c.register_forward_pre_hook(lambda *_: last.append(True))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: weights)
    net, x = evaluate.fid_inception("inception"), torch.rand(2, 3, 299, 299, generator=generator)

    def pool(x, **window):
        return F.max_pool2d(x, **window) if last else F.avg_pool2d(x, **window, count_include_pad=False)

    monkeypatch.setattr(torchvision.models.inception, "F",
                        SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d, avg_pool2d=pool))
    features, h = evaluate.inception_features(net, x, [2048, 64, 192, 768]), 2 * x - 1
    with torch.no_grad():
        for name, layer in list(reference.named_children())[:-3]:
            h = layer(h)
            d = {"maxpool1": 64, "maxpool2": 192, "Mixed_6e": 768, "Mixed_7c": 2048}.get(name)
            if d:
                expected = h.mean((2, 3))
                assert torch.allclose(features.pop(d), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert last and not features

    # It runs only as deep as asked, and its random weights are the same each time.
    net.Conv2d_3b_1x1.register_forward_hook(lambda *_: pytest.fail("deeper than 64 dims ask for"))
    assert list(evaluate.inception_features(net, x, [64])) == [64]
    again = evaluate.fid_inception("random").state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights if name.endswith("conv.weight"))


def test_kid_agrees_with_three_sums():
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64) + 0.4
    one, i, j = torch.ones(1, 70, dtype=torch.float64), torch.arange(40), torch.arange(40, 70)

    def mean(a, b, same):
        values = [(float(p @ q) / 5 + 1) ** 3 for k, p in enumerate(a) for l, q in enumerate(b) if not same or k != l]
        return sum(values) / len(values)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert evaluate.kid((x, i), (y, j), one).item() == pytest.approx(expected, rel=1e-9)
    assert evaluate.kid((x, i), (x, i), one).item() == pytest.approx(0, abs=1e-12)


# ------------------------------------------------------------------------------------------------------ intervals
@pytest.mark.parametrize("paired", [True, False])
def test_coverage_of_the_intervals(paired, monkeypatch):
    """Nominal 95 % intervals of FID_diff and KID_diff hold the truth in 90 to 98 % of Gaussian experiments."""
    monkeypatch.setattr(evaluate, "tqdm", lambda x, *_, **__: x)
    generator, n, d = torch.Generator().manual_seed(0), 200, 4
    scales = torch.tensor([1.0, 1.3, 1.1]).double()     # distilled, baseline, enhanced
    means = torch.tensor([0.0, 0.8, 0.6]).double()
    to_distilled, to_baseline = [d * ((means[2] - means[k]) ** 2 + (scales[2] - scales[k]) ** 2) for k in (0, 1)]
    intervals = []
    for seed in range(150):
        own, shared = torch.randn(4, n, d, generator=generator, dtype=torch.float64).split([3, 1])
        features = means[:, None, None] + scales[:, None, None] * (0.8 * shared + 0.6 * own if paired else own)
        sets = [(x, torch.arange(n) + (0 if paired else k * n)) for k, x in enumerate(features)]
        weights = evaluate.bootstrap_weights(3 * n, 60, seed)
        intervals.append([evaluate.interval(values[:, 2, 0] - values[:, 2, 1])
                          for values in evaluate.fid_and_kid(sets, weights)])
    fid, kid = np.transpose(intervals, (1, 2, 0))
    for (_, low, high), truth in ((fid, (to_distilled - to_baseline).item()), (kid, kid[0].mean())):  # KID is unbiased
        assert 0.90 <= np.mean((low <= truth) & (truth <= high)) <= 0.98


def test_shared_scenes_narrow_the_interval():
    x, weights = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)), evaluate.bootstrap_weights(200, 200)
    own, other = weights.split(100, dim=1)
    same, others = [evaluate.interval((evaluate.average(x + 0.1, w) - evaluate.average(x, own))[:, 0])
                    for w in (own, other)]
    assert same[2] - same[1] < 1e-6 < 0.3 < others[2] - others[1]


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
    assert evaluate.net_pattern(picture[0, :, :40]).isnan().all()
    assert evaluate.net_pattern(torch.zeros(3, 64, 64))[:3].abs().max() < 1e-4  # flat: nothing stands out


def test_fixed_pattern_is_what_all_images_share():
    changes = 10 * np.random.default_rng(0).normal(size=(40, 3, 36, 36))
    stripes = np.zeros((36, 36))
    stripes[:, ::3] = 6

    def ours(changes):
        details = [evaluate.detail(torch.from_numpy(change)) for change in changes]
        return evaluate.fixed_pattern(len(details), sum(details), sum(h.square().mean().item() for h in details))

    for values in (changes, changes + stripes, changes + 30):
        h = values - scipy.ndimage.uniform_filter(values, (1, 1, 9, 9), mode="mirror")
        expected = math.sqrt(max(0, (40 * np.mean(h.mean(0) ** 2) - np.mean(h ** 2)) / 39))
        assert ours(values) == pytest.approx(expected, abs=1e-6)
    assert ours(changes) < 0.5 and ours(changes + 30) < 0.5  # neither noise nor another brightness is a pattern
    assert ours(changes + stripes) == pytest.approx(6 * math.sqrt(2) / 3, rel=0.05)  # their standard deviation
    assert math.isnan(ours(changes[:1]))


def test_blobs_and_tint_by_their_definitions():
    change = 25 * np.random.default_rng(0).normal(size=(3, 40, 50))
    change[0, 10:16, 20:26] -= 90
    median = scipy.ndimage.median_filter(change, (1, 15, 15), mode="mirror")
    expected = 100 * (abs(change - median).max(0) > 40).mean()
    assert 1 < expected < 50 and evaluate.blobs(torch.from_numpy(change)) == pytest.approx(expected)
    strong = torch.zeros(3, 64, 64)
    strong[:, :, 30:] = 39
    assert evaluate.blobs(strong) == 0 and evaluate.blobs(strong - 200) == 0

    source = torch.tensor([[100, 100, 90], [200, 117, 90], [100, 100, 116]], dtype=torch.uint8).T[..., None]
    change = torch.tensor([[3.0, 0, 0], [9, 0, 0], [7, 7, 7]]).T[..., None]  # of near-gray, of colour, without a tint
    assert evaluate.neutral_tint(source, change) == (pytest.approx(math.sqrt(6)), 2)


def row_of(fid_distilled, fid_baseline, change, net=0.0, fixed=0.0, blobs=0.0, tint=0.0):
    features = {"kind": "random", "FID_distilled": fid_distilled, "FID_baseline": [fid_baseline, 0, 1],
                "FID_baseline_change": [change, change - 0.01, change + 0.01], "FID_diff": [0.1, 0, 0.2]}
    return {"images": "head", "N": 64, "features": {64: features}, "SSIM": [0.9, 0.8, 1], "neutral_tint": [tint, 0, 2],
            "fixed_pattern": fixed, "net_pattern_dB": {2: [net, net - 0.5, net + 0.5]}, "blobs_percent": [blobs, 0, 1]}


def test_the_verdict_names_what_the_distance_hides():
    def verdict(*args, **kwargs):
        lines = evaluate.verdict(row_of(*args, **kwargs), rows, 64)
        assert len(lines) == 3 and max(map(len, lines)) <= 110
        return lines

    good = dict(fid_distilled=0.06, fid_baseline=0.02, change=-0.08, net=1.4, fixed=0.5, blobs=0.29, tint=2.9)
    rows = [row_of(0, 0.1, 0), row_of(0.1, 0, -0.1, blobs=0.3, tint=1)]  # the models differ by blobs and tint
    first, second, last = verdict(**good)
    assert "20% of the input's 0.1 (nearer)" in first and "random features, 64 dims" in second
    assert last == "No fault found"
    faults = {"overshoot": dict(fid_distilled=0.11), "net pattern": dict(net=1.6), "fixed pattern": dict(fixed=0.6),
              "blobs": dict(blobs=0.31), "tint": dict(tint=3.1)}
    for fault, values in faults.items():
        last = verdict(**good | values)[2]
        assert last.startswith("Faults: ") and [other for other in faults if other in last] == [fault]
    assert all(fault in verdict(0.11, 0.02, -0.08, 19.05, 10.11, 14.35, 12.1)[2] for fault in faults)
    rows[1] |= {"blobs_percent": [math.nan] * 3, "neutral_tint": [math.nan] * 3}  # unpaired: 0.1 % and 2 gray levels
    last = verdict(**good)[2]
    assert "blobs" in last and "tint" in last
    assert "(farther)" in verdict(0.06, 0.2, 0.1)[0] and "(no nearer" in verdict(0.06, 0.1, 0.005)[0]


def test_principal_components_separate_clusters():
    x = torch.cat([torch.randn(30, 10) + 20 * torch.eye(10)[k] for k in range(3)])
    y = evaluate.principal_components(x).reshape(3, 30, 2)
    spread = (y - y.mean(1, keepdim=True)).norm(dim=-1).max()
    assert torch.pdist(y.mean(1)).min() > 2 * spread and y.min() == 0 and y.max() == 1


# ----------------------------------------------------------------------------------------------- the command lines
@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """distilled and enhanced: 12 scenes of 64x64, enhanced as WebP. baseline: 9 others, larger, one gray."""
    root, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)

    def write(path, smooth, noise, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(smooth, np.ones((16, 16, 1))) + rng.normal(0, noise, (16 * len(smooth), 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path)

    for i in range(12):
        smooth = rng.integers(100, 140, (4, 4, 3))
        write(root / f"distilled/{i:03d}.png", smooth, 1)
        write(root / f"enhanced/{i:03d}.webp", smooth, 25)
    for i in range(9):
        write(root / f"baseline/more/{i:03d}.PNG", rng.integers(100, 140, (5, 4, 3)), 25, "RGB" if i else "L")
    (root / "baseline/broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_quality(folders, clip, tmp_path):
    done = run("evaluate.py", "quality", folders / "enhanced", folders / "distilled", "--distilled",
               folders / "distilled", "--baseline", folders / "baseline", "--features", "random", "--dims", 64, 192,
               "--clip", clip, "--json", "q.json", cwd=tmp_path)
    assert "broken.png" in done.stderr and "N = 12, 9, 12, 12 at 192 dims: FID falls as N grows" in done.stderr
    first, second, _ = done.stdout.splitlines()[-3:]  # the nearest folder comes last
    assert first.startswith(f"{folders / 'enhanced'} (N = 12): FID_baseline") and first.endswith("(nearer)")
    assert "random features, 64 dims" in second
    with Image.open(tmp_path / "comparison.jpg") as sheet:
        assert sheet.width == 4 * 256
    content = json.loads((tmp_path / "q.json").read_text())
    distilled, baseline, enhanced, same = content["rows"]
    assert [row["N"] for row in content["rows"]] == [12, 9, 12, 12]  # without broken.png
    assert content["flags"]["features"] == "random"
    for d in ("64", "192"):
        of_input, of_baseline, one, copy = [row["features"][d] for row in content["rows"]]
        assert of_input["FID_distilled"] == of_baseline["FID_baseline"][0] == 0
        assert of_baseline["FID_diff"][0] == pytest.approx(-of_input["FID_diff"][0])
        assert one["FID_diff"][0] == pytest.approx(one["FID_distilled"] - one["FID_baseline"][0])
        assert one["FID_baseline_change"][0] == pytest.approx(one["FID_baseline"][0] - of_input["FID_baseline"][0])
        assert all(one[name][1] < one[name][2] for name in ("FID_diff", "KID_diff", "FID_baseline_change"))
        assert copy["FID_diff"] == pytest.approx(of_input["FID_diff"], abs=1e-6)
    assert same["SSIM"][0] == pytest.approx(1) and 0 < enhanced["SSIM"][0] < 0.95 and baseline["SSIM"][0] is None
    assert same["net_pattern_dB"]["4"] == [0, 0, 0] and baseline["blobs_percent"][0] is None
    assert same["fixed_pattern"] == same["blobs_percent"][0] == same["neutral_tint"][0] == 0
    assert enhanced["blobs_percent"][0] > 1 and enhanced["neutral_tint"][0] > 10 and enhanced["fixed_pattern"] < 5
    assert all(0 < row["CLIP-IQA"][0] < 1 for row in content["rows"])


def test_quality_without_a_baseline(folders, tmp_path):
    """Images of another kind: no FID, the rest. Folders without common names are said to tell nothing."""
    done = run("evaluate.py", "quality", folders / "enhanced", folders / "baseline", "--distilled",
               folders / "distilled", "--clip", "none", cwd=tmp_path)
    _, enhanced, _, unmatched = done.stdout.splitlines()[-4:]
    assert "FID" not in done.stdout and "Faults: " in enhanced and "blobs" in enhanced and "tint" in enhanced
    assert "Faults cannot be seen" in unmatched


def test_bad_input_is_refused_in_one_line(folders, tmp_path, monkeypatch):
    def refused(reason, command, *args, **settings):
        with pytest.raises(SystemExit) as error:
            command(*args, *([SimpleNamespace(**settings)] if settings else []))
        assert reason in str(error.value) and "\n" not in str(error.value)

    def no_network(*_, **__):
        raise OSError("Name or service not known")

    one, empty = tmp_path / "one", tmp_path / "empty"
    one.mkdir(), empty.mkdir()
    Image.new("RGB", (64, 64)).save(one / "a.png")
    refused(f"{one} holds 1 readable image(s)", evaluate.quality, folders=[one], distilled=folders / "distilled",
            baseline=None, clip="none", features="inception", dims=[64], json=None, sheet=tmp_path / "sheet.jpg")
    assert not (tmp_path / "sheet.jpg").exists()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    refused(f"put it into {tmp_path / 'torch'}/hub/checkpoints", evaluate.fid_inception, "inception")
    refused("hf download openai/clip", evaluate.load_clip, str(empty))
    refused("holds no image", evaluate.by_name, empty)
    refused("multiples of 16", evaluate.time_all, head_only=True, sizes=[100])
    monkeypatch.setattr(evaluate, "CUDA", False)
    refused("timing FLUX needs a CUDA GPU", evaluate.time_all, head_only=False, sizes=[64])
    refused("no folder holds", evaluate.runs, folders=[str(empty)], json=None)


def test_diversity(folders, clip, tmp_path):
    done = run("evaluate.py", "diversity", folders / "distilled", folders / "baseline", "--clip", clip,
               "--json", "d.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert [row["N"] for row in rows] == [12, 9] and "broken.png" in done.stderr
    assert "DeepFace" in done.stdout and "ArcFace" in done.stdout
    for row in rows:
        for attribute, choices in (("gender", 2), ("age", 3), ("ethnicity", 6)):
            shares, low, high = np.transpose(list(row[attribute].values()))
            assert len(shares) == choices and shares.sum() == pytest.approx(100)
            for limit in (low, high):  # Wilson's: 1.96 of its own standard errors from the share, at 0 and 100 % too
                off = abs(shares - limit) - 1.96 * np.sqrt(limit * (100 - limit) / row["N"])
                assert (abs(off) < 0.01).all() and (low < high).all()
    with Image.open(tmp_path / "map.jpg") as image:
        colours = np.asarray(image)[60:].astype(int)
    assert (abs(colours - np.array([0, 114, 178])).max(-1) < 30).any()  # a frame of the first folder's blue


def test_time_of_the_head(head, tmp_path):
    done = run("evaluate.py", "time", "--head-only", "--model", head, "--sizes", 32, 64, "--repeats", 2, "--json",
               "t.json", cwd=tmp_path)
    content = json.loads((tmp_path / "t.json").read_text())
    assert [row["size"] for row in content["rows"]] == [32, 64]
    assert all(row["head"][0] > 0 and row["batch"] == 1 for row in content["rows"])
    assert "CPU" in content["device"] and "8-bit to 8-bit" in done.stdout and "memory" not in done.stdout


TINY_FLUX = dict(
    transformer=dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                     joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)),
    clip=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), t5=dict(d_model=32, num_layers=1),
    vae=dict(evaluate.FLUX["vae"], block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4,
             norm_num_groups=2))


@pytest.mark.parametrize("student", [False, True], ids=["random schnell", "a student that embeds guidance"])
def test_time_of_flux_at_toy_size(student, monkeypatch, tmp_path, capsys):
    """All of `time` but the refusal to run FLUX on a CPU, with a FLUX of some kilobytes."""
    calls, outputs, generate = set(), [], evaluate.generate

    def recorded(pipe, size, steps, guidance, tokens, head=None):
        calls.add((steps, guidance, tokens, head is not None))
        outputs.append(generate(pipe, size, steps, guidance, tokens, head))

    for name, value in dict(generate=recorded, FLUX=TINY_FLUX, fail=print, ResnetGenerator=torch.nn.Identity).items():
        monkeypatch.setattr(evaluate, name, value)
    folders = {name: str(tiny_flux(tmp_path / name, guidance_embeds=True)) for name in ("distilled", "baseline")
               if student}
    evaluate.time_all(SimpleNamespace(
        head_only=False, random_weights=not student, model=None, sizes=[32], repeats=1, distilled_steps=1,
        baseline_steps=3, guidance=3.0, json=str(tmp_path / "t.json"), **folders))
    call = (1, 3.0, 512) if student else (1, 0.0, 256)
    assert calls == {(3, 3.0, 512, False), (*call, False), (*call, True)}
    assert all(image.dtype == torch.uint8 and image.shape == (1, 3, 32, 32) for image in outputs)
    row = json.loads((tmp_path / "t.json").read_text())["rows"][0]
    assert row["saved"] == pytest.approx(1 - row["distilled + head"][0] / row["baseline"][0])
    output = capsys.readouterr().out
    assert "about 19 steps" in output and "distilled + head saves" in output.splitlines()[-1]


def test_full_size_flux_has_the_published_parameter_counts(monkeypatch):
    monkeypatch.setattr(evaluate, "DEVICE", torch.device("meta"))
    counts = [[sum(weight.numel() for weight in part.parameters()) for part in
               (pipe.transformer, pipe.text_encoder_2, pipe.text_encoder, pipe.vae)]
              for pipe in map(evaluate.random_flux, (True, False))]
    assert counts == [[11_901_408_320, 4_762_310_656, 123_060_480, 83_819_683],
                      [11_891_178_560, 4_762_310_656, 123_060_480, 83_819_683]]


def test_runs(tmp_path):
    def write(name, epochs, **settings):
        (tmp_path / name).mkdir()
        settings = dict(attention="esa", lambda_cycle=2.0, lr=1e-4, decay_start=1, size=512, fraction=0.2) | settings
        (tmp_path / name / "args.json").write_text(json.dumps(settings))
        (tmp_path / name / "log.csv").write_text("epoch,loss_G,cycle_ssim\n" + "".join(
            f"{i + 1},{loss},{similarity}\n" for i, (loss, similarity) in enumerate(epochs)))
        return tmp_path / name

    # The cell of λ 2 shows neither epoch 1, before the decay, nor epoch 4, broken, nor the worse seed.
    done = run("evaluate.py", "runs", tmp_path, write("a", [(0.1, 0.99), (1.5, 0.95), (1.25, 0.96), (1.0, 0.7)]),
               write("seed", [(1.5, 0.95)]), write("b", [(2.5, 0.97), (2.0, 0.8)], lambda_cycle=5.0, lr=2e-4),
               write("c", [(3.0, 0.91)], norm="none"),
               write("search", [(9.0, 0.9), (0.5, 0.99)], size=256, fraction=1))
    assert f"{tmp_path} is no CycleGAN run" in done.stderr
    search, older, newer = done.stdout.split("attention esa, norm ")[1:4]
    assert search.startswith("instance, 256 px") and "| 0.5 (0.990)" in search
    assert older.splitlines()[0] == "instance, 512 px, 20.0% of the data" and newer.startswith("none, 512 px")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in older.splitlines() if line[:2] == "| "]
    assert table[0] == ["λ", "lr 0.0001", "lr 0.0002"]
    assert table[2:] == [["2", "1.25 (0.960)", "-"], ["5", "-", "2 (0.800)"]]
    assert "3 (0.910)" in newer and "values significantly below 0.9 indicated poor-quality results" in newer
    last = done.stdout.splitlines()[-1]
    assert f"folder {tmp_path / 'a'}," in last and "The loss contains λ" in last
