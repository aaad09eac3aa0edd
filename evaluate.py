"""The tables of the paper (arXiv 2505.02255), and its Fig. 1, 3, 6 and 7, one sub-command each.

    python evaluate.py quality enhanced --distilled data/test/distilled --baseline data/test/baseline  # Table 4, Fig. 7
    python evaluate.py quality enhanced/other --distilled photos                   # images no head was trained on
    python evaluate.py time --random-weights                   # Fig. 6 on a CUDA GPU, without FLUX's weights or licence
    python evaluate.py time --head-only                        # the head alone, on anything
    python evaluate.py diversity data/plain/train/distilled data/train/distilled                       # Table 1, Fig. 3
    python evaluate.py runs runs/*                             # Tables 2 and 3

`quality` judges a folder by its distance to the baseline, held against that of the input and of a control, which is
what three colour curves can do, and by what a head must not add (nets, fixed patterns, blobs, tints): FID_diff, the
paper's column, rises with those as well. Images of one name (modules.partners) are one scene.
"""
import argparse
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.ndimage import median_filter, uniform_filter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from modules import (ResnetGenerator, UnreadableImage, box_blur, contact_sheet, fail, first_line, list_images,
                     load_head, make_printing_safe, normalise, partners, place_pipeline, positive, printable,
                     progress_bar, read_image, read_log, resize_and_crop, ssim, to_uint8, write_image, write_json)

torch.backends.cudnn.allow_tf32 = False  # FID is compared across machines to 1e-3; TF32 alone moves features by that
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
POOL = ThreadPoolExecutor(os.cpu_count())  # reads and measures images


# ----------------------------------------------------------------------------------------------- files and output
@cache  # each message once
def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def scenes_of(folder, reference=None):
    """{scene: path} of a folder's images. A scene bears its image's name in the folder of inputs, whose scenes are
    `reference`; an image that modules.partners finds none for there is a scene of its own."""
    files = {path.relative_to(folder).as_posix(): path for path in list_images(folder)}
    partner = partners(reference or files, files)
    alone = files.keys() - partner
    if partner and alone:
        warn(f"{len(alone)} of {len(files)} images in {printable(folder)} have no input of their name, or several: "
             f"{printable(min(alone))}, ...")
    return {partner.get(name, f"{folder}//{name}"): path for name, path in files.items()}


def read(path, change=None):
    """The PIL image at `path`, changed if so wanted; None where there is none, or a damaged one."""
    try:
        image = path and read_image(path)
    except UnreadableImage as error:
        return warn(f"left out: {error}")
    return change(image) if image and change else image


def in_chunks(files, change=None, size=32):
    """{scene: path} -> yields {scene: image} of 32 files at a time, as a folder may be larger than the memory."""
    for start in progress_bar(range(0, len(files), size), f"chunks of {size} images"):
        chunk = sorted(files)[start:start + size]
        images = POOL.map(partial(read, change=change), map(files.get, chunk))
        images = {scene: image for scene, image in zip(chunk, images) if image}
        if images:
            yield images


def check_writable(path, write):
    """Ends the program before the work if write(path) could not succeed after it. What is at `path` stays."""
    try:
        probe = Path(path).with_stem(".probe")
        write(probe)
        probe.unlink()
        if Path(path).is_dir():
            raise OSError("it is a folder")
    except (OSError, LookupError, ValueError) as error:  # no right, no space, a file as folder, no such image format
        fail(f"cannot write {path} ({type(error).__name__}: {first_line(error)}): choose a folder that can be "
             "written to, and for a picture a suffix such as .jpg")


def cell(value, short=False):
    """A table's text: of [estimate, low, high] "0.410 [0.352, 0.468]", or if `short` "0.41±0.06", with half of the
    interval's width; "-" for nan; of a text itself. Below 1e-9 all is rounding."""
    if isinstance(value, list):
        half = (value[2] - value[1]) / 2
        if half > 1e-5:
            decimals = max(1 - short - math.floor(math.log10(half)), 0)
            value, low, high, half = [f"{x:.{decimals}f}" for x in (*value, half)]
            return f"{value}±{half}" if short else f"{value} [{low}, {high}]"
        value = value[0]
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}" if abs(value) > 1e-9 else "0"
    return str(value)


def short_names(paths):
    """{path: its end for a table}, or the whole of it where another one ends alike."""
    ends = Counter(path[-23:] for path in set(paths))
    return {path: path[-23:] if ends[path[-23:]] == 1 else path for path in paths}


def print_table(rows, *names, short=False):
    """A Markdown table of dicts, columns aligned: of the values of these names, or of all."""
    names, ends = names or list(rows[0]), short_names([row["images"] for row in rows if "images" in row])
    lines = [names, *([ends.get(cell(row[name], short), cell(row[name], short)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


# ------------------------------------------------------------------------------------------------------ intervals
def bootstrap_weights(scenes, resamples, seed=0):
    """(1 + resamples, scenes) weights: first all ones, for the estimate; then Bayesian bootstrap draws (Rubin 1981).

    Exp(1) weights keep every image, so that no resample has a covariance of lower rank than the data's. A scene has one
    weight in all folders that hold it: differences between scenes cancel.
    """
    draws = torch.empty(resamples, scenes, dtype=torch.float64)
    draws.exponential_(generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.ones(1, scenes, dtype=torch.float64), draws])


def interval(values):
    """(1 + resamples,) -> [estimate, low, high]: the bias-corrected normal bootstrap interval, nominally 95 %.

    FID grows as N falls, and resampling adds about the same bias once more: the interval is the estimate minus that,
    +- 1.96 standard errors. Where it excludes the estimate itself, N is too small for so many dims.
    """
    centre, half = 2 * values[0] - values[1:].mean(), 1.96 * values[1:].std()
    return [values[0].item(), (centre - half).item(), (centre + half).item()]


def weighted_mean(values, weights):
    """Means of values (N,) under weights (R, N): (R,). Values that are nan do not count."""
    return weights @ values.nan_to_num() / (weights @ (~values.isnan()).double())


# ---------------------------------------------------------------------------------------------- Inception features
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
DIMS_AFTER = {"maxpool1": 64, "maxpool2": 192, "Mixed_6e": 768, "avgpool": 2048}


def fid_inception(features):
    """The Inception-v3 of 2015-12-05 that FID is defined by; features="random": the same with seeded random weights."""
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    if features == "random":
        torch.manual_seed(0)
        for weight in net.parameters():
            if weight.dim() == 4:  # He-normal: activations keep their scale through the depth
                torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    else:
        try:
            net.load_state_dict(torch.hub.load_state_dict_from_url(FID_WEIGHTS, map_location="cpu", check_hash=True))
        except Exception as error:  # no network, wrong hash, truncated file: each has its own class
            fail(f"cannot load the FID network ({first_line(error)}): fetch {FID_WEIGHTS} and put it into "
                 f"{torch.hub.get_dir()}/checkpoints (TORCH_HOME moves that), or use --features random")

    # TensorFlow averages without the zero padding, and takes the maximum in the last block. torchvision's blocks pool
    # inside forward, so the input of the block is kept and what reaches the pooling branch's convolution is replaced.
    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            pool = F.max_pool2d if name == "Mixed_7c" else partial(F.avg_pool2d, count_include_pad=False)
            block.register_forward_pre_hook(lambda block, inputs: setattr(block, "inputs", inputs))
            block.branch_pool.register_forward_pre_hook(
                lambda conv, _, block=block, pool=pool: pool(*block.inputs, 3, stride=1, padding=1))
    return net.to(DEVICE, memory_format=torch.channels_last)


@torch.inference_mode()
def inception_features(net, x, dims):
    """(N, 3, 299, 299) in [0, 1] -> {d: (N, d)} for each d of dims, in one pass that ends at the deepest of them."""
    x = 2 * x.to(DEVICE, memory_format=torch.channels_last) - 1
    features = {}
    for name, layer in net.named_children():
        x = layer(x)
        if DIMS_AFTER.get(name) in dims:
            features[DIMS_AFTER[name]] = x.mean((2, 3)).cpu()
        if max(dims) in features:
            return features


# ------------------------------------------------------------------------------------------------------ FID and KID
def moments(x, w):
    """Features (N, d), weights (N,) -> mean (d,) and a matrix A with AᵀA = covariance (unbiased), at most d rows."""
    p = w / w.sum()
    mean = p @ x
    root = (p / (1 - p.square().sum())).sqrt()[:, None] * (x - mean)
    return mean, root if len(root) <= len(mean) else torch.linalg.qr(root, mode="r").R


def fid(a, b):
    """Fréchet distance ‖μ₁−μ₂‖² + Tr Σ₁ + Tr Σ₂ − 2 Tr √(Σ₁Σ₂) of two moments().

    With Σ₁ = AᵀA and Σ₂ = BᵀB, Tr √(Σ₁Σ₂) is the sum of the singular values of ABᵀ: never negative or imaginary.
    """
    (mean_a, root_a), (mean_b, root_b) = a, b
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    scale = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum()
    return F.threshold(scale - 2 * cross, 1e-10 * scale.item(), 0.0).item()  # what is left of equal sets is rounding


def kid(a, b):
    """Kernel distance: unbiased MMD² under ((x·y)/d + 1)³ of features (N, d) with scene indices (N,).

    Pairs of one scene never count, else KID between images and their own enhancement would be biased downwards.
    """
    def mean_kernel(a, b):
        (x, scenes_x), (y, scenes_y) = a, b
        return ((x @ y.T / x.shape[1] + 1) ** 3)[scenes_x[:, None] != scenes_y].mean().item()

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def distances(sets, weights, controls=("control",)):
    """Float64 features (N, d) and scene indices (N,) of the input, the baseline, the controls and others -> {measure:
    value} of each. FID_control names the control that is nearest to the baseline."""
    dims = sets[0][0].shape[1]
    resamples = 200 if min(dims, max(len(x) for x, _ in sets)) <= 400 else 25  # one takes seconds
    fids = []
    for w in progress_bar(weights[:1 + resamples], f"FID intervals at {dims} dims"):
        folders = [moments(x, w[scenes]) for x, scenes in sets]
        fids.append([[fid(a, b) for b in folders[:2]] for a in folders])
    fids = torch.tensor(fids, dtype=torch.float64).permute(1, 2, 0)  # (folders, 2, 1 + resamples)
    strongest = fids[2:2 + len(controls), 1, 0].argmin()
    return [{"FID_distilled": to_input[0].item(),
             "FID_baseline": [max(limit, 0.0) for limit in interval(to_baseline)],
             "FID_gain": interval(fids[0, 1] - to_baseline), "FID_control": controls[strongest],
             "FID_over_control": interval(fids[2 + strongest, 1] - to_baseline), "FID_diff": interval(to_input - to_baseline),
             "KID_baseline": kid(x, sets[1]), "KID_diff": kid(x, sets[0]) - kid(x, sets[1])}
            for x, (to_input, to_baseline) in zip(sets, fids)]


# ---------------------------------------------------------------------------------- what a head does to an image (ours)
PERIODS = (2, 4, 8, 16)
SCALES = (1, 3, 5, 9, 17, 33)
NETS = [f"net {period} px" for period in PERIODS]
TONES = [*(f"{a}-{b} px" for a, b in itertools.pairwise(SCALES)), "luma"]


def net_pattern(image):
    """How far the power spectrum stands out at the frequencies of a net: (3, H, W) in [-1, 1] -> (4,) dB.

    One level per period of 2, 4, 8, 16 px; nan where the image is too small for it. The spectrum is Welch's, over
    half-overlapping Hann-windowed tiles of the gray image. The frequencies of a net of period p are the multiples of
    1/p, in both directions. Each is held against the log-mean of the 16 frequencies two bins around it. Natural images
    are not at 0: report output minus input. It measures what the paper sees in its U-Net's hair and beards.
    """
    tile = min(128, 2 ** min(image.shape[-2:]).bit_length() // 4)  # 128 from 256 px on, 64 from 128, 32 from 64
    tiles = image.float().mean(0).unfold(0, tile, tile // 2).unfold(1, tile, tile // 2)
    window = torch.hann_window(tile)
    window = window[:, None] * window
    spectrum = torch.fft.fft2((tiles - tiles.mean((-2, -1), keepdim=True)) * window).abs().square().mean((0, 1))
    unseen = window.square().sum() * (2 / 255) ** 2  # white noise of one gray level
    log = (spectrum + unseen).log().double().numpy()
    # The ring is a square of 5x5 bins without the 3x3 in its middle.
    ring = (25 * uniform_filter(log, 5, mode="wrap") - 9 * uniform_filter(log, 3, mode="wrap")) / 16
    ratio, k = torch.from_numpy(np.exp(log - ring)), np.arange(tile)
    period = torch.from_numpy(tile // np.gcd(np.gcd.outer(k, k), tile))  # of the net that a frequency belongs to
    return torch.stack([10 * ratio[(period == p) & (4 * p <= tile)].mean().log10() for p in PERIODS])


def fixed_pattern(n, total, power):
    """Amplitude, in gray levels, of what is added at the same place in each of n images: stripes, ghosts at borders.

    h is an image's change minus its 9-px box blur, `total` the sum of h, `power` that of each mean h². With m the mean
    of h over the images: √((n · mean m² − mean h²) / (n − 1)), as n unrelated images give mean m² = mean h² / n.
    """
    if n < 2:
        return math.nan
    return math.sqrt(max(0.0, (n * (total / n).square().mean().item() - power / n) / (n - 1)))


def against_input(image, source):
    """What was changed in an image's input, both uint8 (3, H, W): {measure: value}, and h of fixed_pattern().

    blobs: share of pixels, in %, that change by more than 40/255 off the median change in the 15x15 px around, in any
    channel, as dark or coloured spots do. tint: the change of chroma, rgb minus its mean, in gray levels, summed over
    the near-neutral pixels, whose channels lie within 16 of 255, as of gray walls; neutral: how many these are.
    """
    change = image.float() - source
    spots = abs(change.numpy() - median_filter(change.numpy(), (1, 15, 15), mode="mirror")) > 40
    neutral = source.amax(0) - source.amin(0) <= 16
    nets = net_pattern(normalise(image)) - net_pattern(normalise(source))
    record = {"SSIM": ssim(image[None], source[None], 255).item(), "blobs_percent": 100 * spots.any(0).mean(),
              "tint": (change - change.mean(0)).norm(dim=0)[neutral].sum().item(), "neutral": neutral.sum().item(),
              **dict(zip(NETS, nets.tolist()))}
    return record, change - box_blur(change, 9)


def against_baseline(image, truth):
    """{measure: value} of two uint8 images (3, H, W) of a scene: PSNR in dB, 100 at most, SSIM, and fine detail, the
    mean square of what a 3x3 mean takes away, of each."""
    def fine(x):
        return np.square(x - uniform_filter(x, (0, 3, 3), mode="mirror")).mean()

    a, b = image.double().numpy(), truth.double().numpy()
    return {"PSNR_baseline": -10 * math.log10(np.square((a - b) / 255).mean() + 1e-10),
            "SSIM_baseline": ssim(image[None], truth[None], 255).item(), "fine": fine(a), "fine_baseline": fine(b)}


def tone(picture):
    """{measure: value} of a PIL image, in gray levels: luma, and the strength of detail at five scales, which is the
    standard deviation of the difference between the means over boxes of two SCALES."""
    gray = np.asarray(picture.convert("L"), np.float32)
    means = [uniform_filter(gray, side, mode="mirror") for side in SCALES]
    return dict(zip(TONES, [*((a - b).std().item() for a, b in itertools.pairwise(means)), gray.mean().item()]))


# ------------------------------------------------------------------------------------------------------------- CLIP
CLIP = "openai/clip-vit-base-patch32"


def load_clip(name):
    """(model, processor) of a CLIP in transformers' format: a local folder or a Hub id."""
    import transformers
    try:
        return (transformers.CLIPModel.from_pretrained(name).float().eval().to(DEVICE),
                transformers.CLIPProcessor.from_pretrained(name))
    except Exception as error:  # no network, no such model, a folder of something else: each has its own class
        fail(f"cannot load CLIP {name} ({first_line(error)}): where there is a network, "
             f"`hf download {CLIP} --local-dir clip`; then pass --clip clip")


@torch.inference_mode()
def clip_embed(clip, **inputs):
    """images=[PIL image, ...] or text=[prompt, ...] -> unit vectors (N, d)."""
    model, processor = clip
    inputs = processor(**inputs, padding=True, return_tensors="pt").to(DEVICE)
    embed = model.get_text_features if "input_ids" in inputs else model.get_image_features
    return F.normalize(embed(**inputs).pooler_output, dim=-1).cpu()


# ----------------------------------------------------------------------------------------- quality: Table 4, Fig. 7
@dataclass(eq=False)
class Folder:
    """A row of the tables: a folder of images, or a control, which is the inputs after a simple change."""
    label: str
    files: dict  # {scene: path}
    change: Callable | None = None  # PIL image -> PIL image
    # What measure() finds
    records: dict = field(default_factory=dict)  # {scene: {measure: value}}
    features: dict = field(default_factory=dict)  # {d: (N, d)}
    scenes: torch.Tensor | None = None  # (N,) numbers of the scenes
    fixed: float = math.nan  # the fixed pattern of the images that have the size of the first
    counts: int = 0  # (3, 256) numbers of pixels at each level, for colour_curves()
    spectrum: int = 0  # for spectrum_filter()


def colour_curves(counts, target):
    """What colour alone can do (ours): a monotone curve a channel that carries 513 quantiles of one set's colours to
    another's. Both are (3, 256) numbers of pixels at each level. Returns the 768 values that PIL's point() takes."""
    curves = []
    for channel in zip(counts, target):
        a, b = [np.quantile(range(256), np.linspace(0, 1, 513), weights=c, method="inverted_cdf") for c in channel]
        levels, index = np.unique(a, return_inverse=True)  # one level, such as black, can be many quantiles: their mean
        curve = np.interp(range(256), levels, np.bincount(index, b) / np.bincount(index))
        curves += curve.round().astype(int).tolist()
    return curves


RINGS = np.geomspace(1 / 1024, 0.72, 80)  # frequencies in cycles a pixel, for images of any size


def frequencies(height, width):
    """Of each value of np.fft.rfft2, in cycles a pixel."""
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))


def power_spectrum(picture):
    """(2, rings): the sum of a PIL image's power in gray by frequency, and the number of values in it."""
    gray = np.asarray(picture, float).mean(2)
    window = np.hanning(gray.shape[0])[:, None] * np.hanning(gray.shape[1])
    power = np.abs(np.fft.rfft2((gray - gray.mean()) * window)) ** 2 / max(np.square(window).sum(), 1e-9)
    ring = np.digitize(frequencies(*gray.shape), RINGS).ravel()
    return np.stack([np.bincount(ring, values, len(RINGS) + 1) for values in (power.ravel(), None)])


def spectrum_filter(spectrum, target):
    """What a filter can do (ours): gray by frequency gets the gain that carries one set's mean spectrum to another's,
    both sums of power_spectrum(). Returns PIL image -> PIL image; brightness and colours stay."""
    known = (spectrum.min(0) > 0) & (target.min(0) > 0) & (np.arange(len(RINGS) + 1) > 0)
    gains = np.sqrt(target[0, known] / target[1, known] / (spectrum[0, known] / spectrum[1, known]))
    middles = RINGS[np.nonzero(known)[0] - 1] * (RINGS[1] / RINGS[0]) ** 0.5

    def change(picture):
        x = np.asarray(picture, float)
        gray, (height, width) = x.mean(2), x.shape[:2]
        mirrored = np.pad(gray, ((0, height), (0, width)), "symmetric")
        gain = np.interp(frequencies(2 * height, 2 * width), middles, gains) if len(gains) else np.ones(1)
        gain.flat[0] = 1  # brightness
        changed = np.fft.irfft2(np.fft.rfft2(mirrored) * gain, mirrored.shape)[:height, :width]
        return Image.fromarray((x + (changed - gray)[..., None]).clip(0, 255).round().astype(np.uint8))
    return change


def look(picture, source, truth):
    """All measures of a PIL image, {measure: value}, h of fixed_pattern() or None, and its power_spectrum(), given the
    paths, or None, of its input and of the baseline's image of the scene."""
    record, h, image = tone(picture), None, pil_to_tensor(picture)
    source, truth = [pil_to_tensor(other) if other and other.size == picture.size and min(other.size) > 8 else None
                     for other in map(read, (source, truth))]
    if source is not None:
        changes, h = against_input(image, source)
        record |= changes
    if truth is not None:
        record |= against_baseline(image, truth)
    return record, h, power_spectrum(picture)


def measure(folder, inputs, truths, net, clip, dims, numbers):
    """One pass over the files of a Folder, which gets what is measured; `inputs` and `truths` are {scene: path}."""
    features, number, total, power = defaultdict(list), 0, 0.0, 0.0
    for pictures in in_chunks(folder.files, folder.change):
        found = POOL.map(look, pictures.values(), map(inputs.get, pictures), map(truths.get, pictures))
        for (scene, picture), (folder.records[scene], h, spectrum) in zip(pictures.items(), found):
            folder.counts = folder.counts + np.reshape(picture.histogram(), (3, 256))
            folder.spectrum = folder.spectrum + spectrum
            if h is not None and (not number or h.shape == total.shape):
                number, total, power = number + 1, total + h.double(), power + h.double().square().mean().item()
        if net:  # FID's own resizing: bilinear without antialias
            x = [F.interpolate(pil_to_tensor(picture)[None] / 255, (299, 299), mode="bilinear", align_corners=False)
                 for picture in pictures.values()]
            for d, values in inception_features(net, torch.cat(x), dims).items():
                features[d].append(values.double())
        if clip:  # CLIP-IQA: how much likelier the first text is than the second, from 0 to 1
            texts = clip_embed(clip, text=["Good photo.", "Bad photo."])
            likeness = (100 * clip_embed(clip, images=list(pictures.values())) @ texts.T).softmax(1)
            for scene, (good, _) in zip(pictures, likeness.tolist()):
                folder.records[scene]["CLIP-IQA"] = good
    folder.features = {d: torch.cat(parts) for d, parts in features.items()}
    folder.fixed = fixed_pattern(number, total, power)
    folder.scenes = torch.tensor([numbers[scene] for scene in folder.records])
    if len(folder.scenes) < 2:
        fail(f"{folder.label} holds fewer than two readable images; an interval needs some hundreds")


MEANS = ("SSIM", "blobs_percent", *NETS, "PSNR_baseline", "SSIM_baseline", *TONES, "CLIP-IQA")


def summary(folder, inputs, controls, weights):
    """A row of the tables: the mean of each measure with its interval."""
    def column(name, folder=folder):
        values = [record.get(name, math.nan) for record in folder.records.values()]
        return weighted_mean(torch.tensor(values, dtype=torch.float64), weights[:, folder.scenes])

    gains, records = {"PSNR_gain": interval(column("PSNR_baseline") - column("PSNR_baseline", inputs))}, folder.records
    if controls:
        control = max(controls, key=lambda control: column("PSNR_baseline", control)[0])
        gains |= {"PSNR_control": control.label,
                  "PSNR_over_control": interval(column("PSNR_baseline") - column("PSNR_baseline", control))}
    return {"images": folder.label, "N": len(records), "compared": sum("SSIM" in r for r in records.values()),
            "compared_baseline": sum("SSIM_baseline" in r for r in records.values()),
            "fixed_pattern": folder.fixed, "neutral_tint": interval(column("tint") / column("neutral")),
            "fine_detail": interval((column("fine") / column("fine_baseline")).sqrt()), **gains,
            **{name: interval(column(name)) for name in MEANS}}


def quality(args):
    args.clip = args.clip or ("none" if args.features == "random" else CLIP)
    clip = None if args.clip == "none" else load_clip(args.clip)
    net = fid_inception(args.features) if args.baseline else None

    inputs = Folder("input", scenes_of(args.distilled))
    baseline = Folder("baseline", scenes_of(args.baseline, inputs.files) if args.baseline else {})
    heads, controls = [Folder(folder, scenes_of(folder, inputs.files)) for folder in args.folders], []
    every = set().union(*[folder.files for folder in (inputs, baseline, *heads)])
    look_at = partial(measure, inputs=inputs.files, truths=baseline.files, net=net, clip=clip, dims=args.dims,
                      numbers={scene: i for i, scene in enumerate(sorted(every))})
    look_at(inputs)
    if args.baseline:
        look_at(baseline)
        curves = colour_curves(inputs.counts, baseline.counts)
        controls = [Folder("colour curves (control)", inputs.files, lambda picture: picture.point(curves)),
                    Folder("filter (control)", inputs.files,
                           spectrum_filter(inputs.spectrum, baseline.spectrum))]
    for folder in controls + heads:
        look_at(folder)
    # In this order everywhere
    folders = [inputs, *([baseline] if args.baseline else []), *controls, *heads]
    weights = bootstrap_weights(len(every), 200)
    rows = [summary(folder, inputs, controls, weights) for folder in folders]

    if args.baseline:
        table = []
        for d in args.dims:
            found = distances([(folder.features[d], folder.scenes) for folder in folders], weights,
                              [control.label for control in controls])
            for row, measures in zip(rows, found):
                row[f"{args.features} {d}"] = measures
                table.append({"images": row["images"], "dims": d} | measures)
        print_table(table, "images", "dims", "FID_baseline", "FID_diff", "KID_diff")
        print(f"""FID to the baseline [95 % interval, Bayesian bootstrap over images]. diff: distance to the input less
that to the baseline. Inception's first 64 dims see mostly colour, its last 2048 detail as well. FID falls as
N grows, most where N is below the dims, and FID_diff leans towards the larger reference; KID does not.
Features: {args.features}
""")
        print_table(rows, "images", "compared_baseline", "PSNR_baseline", "SSIM_baseline", "fine_detail", short=True)
        print("""Against the baseline's images of the same name and size: PSNR in dB, SSIM, and the strength of fine
detail, which is what a 3x3 mean takes away, over the baseline's. Pairs whose input has an SSIM below 0.9, as
FLUX's, are not aligned: a blurred image is nearer there, and FID counts.
""")
    print_table(rows, "images", "compared", "SSIM", "blobs_percent", "neutral_tint", "fixed_pattern", short=True)
    print_table(rows, "images", *NETS, *(["CLIP-IQA"] if clip else []), short=True)
    print("""Against the inputs of the same name and size. Blobs: % of the pixels. Neutral tint and fixed pattern: gray
levels of 255. Nets in dB, a fault by the interval's lower end. The baseline's row is what the models differ by.
CLIP-IQA needs no input: likeness to a good photo by CLIP.
""")
    print_table(rows, "images", "N", *TONES, short=True)
    print("""Strength of detail between two widths of a box mean, and luma, in gray levels. They need no pairs: the
baseline's row is the aim. ±: half of the 95 % interval.
""")
    for row in rows[len(rows) - len(heads):]:
        print("\n  ".join(verdict(row, rows, f"{args.features} {args.dims[0]}")))
    return {"rows": rows}, comparison([inputs, *controls, *heads] + [baseline] * bool(args.baseline))


def verdict(row, rows, features):
    """Lines about a folder: is it nearer to the baseline than the input and the control are, and its faults by name."""
    # What the two models differ by is no fault. It is nan without common names, and max(x, nan) is x.
    models = rows[1] if features in row else rows[0]
    faults = [("blobs", row["blobs_percent"][0], max(0.1, models["blobs_percent"][0])),
              ("tint", row["neutral_tint"][0], max(2.0, models["neutral_tint"][0] + 2)),
              ("fixed pattern", row["fixed_pattern"], 0.5), *((name, row[name][1], 1.0) for name in NETS)]
    lines, gains = [f"{row['images']} (N = {row['N']})"], []
    if rows[0]["SSIM_baseline"][0] >= 0.9:  # inputs and baseline images show the same pixels, as the miniature's do
        gains.append(("PSNR", "PSNR", row))
    if features in row:
        found = row[features]
        gains.append((f"FID ({features} dims)", "FID", found))
        faults.append(("overshoot", found["FID_distilled"], rows[0][features]["FID_baseline"][0]))
    for measure, name, found in gains:
        control = found[f"{name}_control"].removesuffix(" (control)")  # the stronger one
        for than, gain in (("input", found[f"{name}_gain"]), (control, found[f"{name}_over_control"])):
            how = "nearer to" if gain[1] > 0 else "farther from" if gain[2] < 0 else "no nearer for certain to"
            lines.append(f"{how} the baseline than the {than} by {measure}: {cell(gain)}")
    found = [f"{name} {value:.2g} > {allowed:.2g}" for name, value, allowed in faults if value > allowed]
    lines.append(f"{', '.join(found) or 'no fault'} found, in {row['compared']} of {row['N']} images")
    return lines


def comparison(folders):
    """Contact sheet of six scenes as in Fig. 1 and 7, a column a folder; white where it lacks the scene."""
    everywhere = set.intersection(*[set(folder.records) for folder in folders])
    scenes = sorted(everywhere or folders[0].records)
    white = Image.new("RGB", (256, 256), "white")
    rows = [[resize_and_crop(read(folder.files.get(scene), folder.change) or white, 256)
             for folder in folders] for scene in scenes[::math.ceil(len(scenes) / 6)]]
    return contact_sheet(rows, [Path(folder.label).name for folder in folders])


# ----------------------------------------------------------------------------------------------------- time: Fig. 6
# FLUX.1 as diffusers and transformers build it: what differs from their defaults.
FLUX = dict(
    transformer={},
    clip=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    t5=dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
    vae=dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=16,
             block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.3611, shift_factor=0.1159,
             use_quant_conv=False, use_post_quant_conv=False))


def random_flux(guided, offload):
    """FLUX.1-dev (guided) or -schnell with random bf16 weights and no tokenizers: a text-to-image pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cpu" if offload else DEVICE):
        parts = dict(transformer=FluxTransformer2DModel(guidance_embeds=guided, **FLUX["transformer"]).eval(),
                     text_encoder=CLIPTextModel(CLIPTextConfig(**FLUX["clip"])).eval(),
                     text_encoder_2=T5EncoderModel(T5Config(**FLUX["t5"])).eval(),
                     vae=AutoencoderKL(**FLUX["vae"]).eval())
    torch.set_default_dtype(torch.float32)
    # Of the scheduler only the number of steps takes time.
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), tokenizer=None, tokenizer_2=None, **parts)


def pretrained(name):
    from diffusers import AutoPipelineForText2Image
    try:
        return AutoPipelineForText2Image.from_pretrained(name, dtype=torch.bfloat16)
    except Exception as error:  # diffusers' own message ("not a valid model identifier") misleads when a model is gated
        fail(f"cannot load {name} ({type(error).__name__}): accept the licence on its Hugging Face page, then `hf auth "
             "login` or set HF_TOKEN; or pass a local folder; or --random-weights")


@torch.inference_mode()
def from_8_to_8_bits(head, images):
    """uint8 (N, 3, H, W) -> uint8 through the head, on CUDA in bf16."""
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        return to_uint8(head(x))


@torch.inference_mode()
def generate(pipe, size, steps, tokens, guidance, head=None):
    """One image from text, through the head if there is one: uint8 (1, 3, size, size) in the CPU's memory."""
    prompt = dict(prompt="A professional portrait of a person")
    if pipe.tokenizer is None:  # random_flux reads a prompt of zeros
        ids = torch.zeros(1, tokens, dtype=torch.long, device=DEVICE)
        prompt = dict(prompt_embeds=pipe.text_encoder_2(ids)[0],
                      pooled_prompt_embeds=pipe.text_encoder(ids[:, :77]).pooler_output)
    image = pipe(**prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                 max_sequence_length=tokens, output_type="pt").images
    image = to_uint8(2 * image.float() - 1)
    return (from_8_to_8_bits(head, image) if head else image).cpu()


def clock(work, *inputs, images=1):
    """What each of the images costs that work(*inputs) makes: {column: value}."""
    def once():
        work(*inputs)
        if CUDA:
            torch.cuda.synchronize()  # kernels run behind Python's back

    once()  # warms up
    once()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = sorted(timeit.repeat(once, number=1, repeat=5))
    # nvidia-smi gives a mean power over up to a second: the work is repeated for three, and the median counts.
    watts, command = [], ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    if CUDA:
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}")
    if shutil.which("nvidia-smi"):
        repeated = POOL.submit(timeit.timeit, once, number=math.ceil(3 / seconds[2]))
        while not repeated.done():
            time.sleep(0.1)
            text = subprocess.run(command, capture_output=True, text=True).stdout
            watts.append(float(text) if text[:1].isdigit() else math.nan)  # "[N/A]", as for a part of a GPU
        repeated.result()
    return {"seconds": [seconds[i] / images for i in (2, 0, 4)],
            "joules": np.median(watts or [math.nan]) * seconds[2] / images,
            "GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan}


def time_all(args):
    if not args.head_only and not CUDA:
        fail("timing FLUX needs a CUDA GPU; --head-only times the head on a CPU")
    torch.backends.cudnn.benchmark = True  # shapes are fixed, so trying all algorithms pays
    head = load_head(args.model) if args.model else ResnetGenerator()
    head, costs = head.eval().to(DEVICE, memory_format=torch.channels_last), {}
    for size in args.sizes:
        images = torch.randint(0, 256, (args.batch_size, 3, size, size), dtype=torch.uint8, device=DEVICE)
        costs[size, "head"] = clock(from_8_to_8_bits, head, images, images=args.batch_size)
    for kind in () if args.head_only else ("baseline", "distilled"):
        pipe = random_flux(kind == "baseline", args.offload) if args.random_weights else pretrained(getattr(args, kind))
        pipe = place_pipeline(pipe, DEVICE, args.offload)
        pipe.set_progress_bar_config(disable=True)
        for size in progress_bar(args.sizes, kind):
            # Guidance takes no time in FLUX, and twice the time in Stable Diffusion.
            call = (generate, pipe, size, getattr(args, f"{kind}_steps"), getattr(args, f"{kind}_tokens"),
                    3.0 if kind == "baseline" else 0.0)
            costs[size, kind] = clock(*call)
            if kind == "distilled":
                costs[size, "distilled + head"] = clock(*call, head)
        # One pipeline at a time: both need 58 GB of memory, one 36. The transformer sits in a reference cycle.
        del pipe, call
        gc.collect()
        torch.cuda.empty_cache()

    # Fig. 6 as a table and in a sentence
    rows = [{"size": size, "what": what} | cost for (size, what), cost in costs.items()]
    print_table(rows)
    device = torch.cuda.get_device_name() if CUDA else f"a CPU, {torch.get_num_threads()} thread(s)"
    precision = "bf16" if CUDA else "fp32"
    print(f"""Seconds of an image, median [fastest, slowest] of 5; energy of the GPU by nvidia-smi; GB: its peak memory.
On {device}. The head: {args.batch_size} image(s) at once, from 8-bit to 8-bit on the device, in {precision}.""")
    if not args.head_only:
        weights = ", with random weights" if args.random_weights else ""
        print(f"""The models draw from text in {args.baseline_steps} and {args.distilled_steps} steps{weights}.
Each time is that of one call: text encoders, steps, decoder, 8-bit image; the head and its 8-bit image; copy to the
CPU. Loading and PNG are left out. The paper gives no step counts for its Fig. 6: by FLOPs, 4 steps against 50 save 92
to 94 %, and its 82 % correspond to about 19 steps of the baseline.""")
        for size in args.sizes:
            ours, slow = [costs[size, what]["seconds"][0] for what in ("distilled + head", "baseline")]
            print(f"distilled + head saves {1 - ours / slow:.1%} at {size} px (paper: 82 % on average over its sizes)")
    return {"device": device, "rows": rows}, None


# --------------------------------------------------------------------------------------- diversity: Table 1, Fig. 3
# CLIP's choice among portraits of these, where the paper used DeepFace. Both say how a face is perceived, no more.
PEOPLE = [["a woman", "a man"],
          ["a person between 18 and 30 years old", "a person between 31 and 50 years old",
           "a person over 50 years old"],
          ["an Asian person", "a Black person", "an Indian person", "a Latino or Hispanic person",
           "a Middle Eastern person", "a white person"]]


def diversity(args):
    from scipy.stats import binomtest
    clip, rows, embeddings, thumbnails = load_clip(args.clip), [], [], []
    for folder in args.folders:
        found, images = [], []
        for chunk in in_chunks(scenes_of(folder)):
            found.append(clip_embed(clip, images=list(chunk.values())))
            images += [resize_and_crop(image, 64) for image in chunk.values()]
        if not found:
            fail(f"{printable(folder)} holds no readable image")
        embeddings.append(torch.cat(found))
        thumbnails.append(images)
        row = {"images": folder, "N": len(images)}
        for choices in PEOPLE:
            texts = clip_embed(clip, text=[f"a portrait of {choice}" for choice in choices])
            chosen = (embeddings[-1] @ texts.T).argmax(1).tolist()
            for i, choice in enumerate(choices):
                share = binomtest(chosen.count(i), len(chosen))
                row[choice] = [100 * x for x in (share.statistic, *share.proportion_ci(method="wilson"))]
        rows.append(row)
    ends = short_names(args.folders)
    print_table([{"%": name} | {ends[row["images"]]: row[name] for row in rows} for name in list(rows[0])[1:]])
    print(f"""Share [95 % interval, Wilson], as perceived by CLIP ({args.clip}) among prompts, where the paper used
DeepFace. {args.picture}: the first two principal components of CLIP's embeddings of images; there ArcFace's t-SNE""")
    x = torch.cat(embeddings).double()
    x = x @ torch.linalg.eigh(x.T.cov(correction=0)).eigenvectors[:, [-1, -2]]
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0)).clamp(min=1e-9)
    maps, places = [], iter((1136 * x).int().tolist())
    for images in thumbnails:
        maps.append(Image.new("RGB", (1200, 1200), "white"))
        for image in images:
            maps[-1].paste(image, next(places))
    return {"rows": rows}, contact_sheet([maps], args.folders)


# --------------------------------------------------------------------------------------------- runs: Tables 2 and 3
def plot(logs):
    """A panel for each of {run: rows of log.csv}, with its losses and cycle SSIM over the epochs."""
    panels = [Image.new("RGB", (400, 300), "white") for _ in logs]
    for name, colour in (("loss_G", "blue"), ("loss_D", "red"), ("cycle_ssim", "green")):
        top = max(row[name] for log in logs.values() for row in log)
        for panel, log in zip(panels, logs.values()):
            points = [(400 * i / len(log), 299 - 298 * row[name] / top) for i, row in enumerate(log)]
            ImageDraw.Draw(panel).line(points, colour, 2)
    return contact_sheet([panels], list(logs))


def runs(args):
    found, logs, grids = [], {}, defaultdict(dict)
    for folder in args.folders:
        try:
            run, log = json.loads(Path(folder, "args.json").read_text()), read_log(folder)
            run["network"] = "classic" if run["classic"] else "ours"
            # The paper compares runs by their lowest generator loss. Ours: only epochs of the decay count, because an
            # untrained discriminator is easily fooled; and those whose cycle SSIM is at least 0.9 go first.
            decay = [row for row in log if row["epoch"] > run["epochs"] // 2] or log[-1:]
            run["best"] = min(decay, key=lambda row: (row["cycle_ssim"] < 0.9, row["loss_G"]))
            found.append({"folder": folder} | run)
            logs[folder] = log
        except (OSError, ValueError, LookupError, TypeError) as error:
            warn(f"left out: {folder} is no CycleGAN run of this version with a finished epoch "
                 f"({type(error).__name__}: {error})")
    if not found:
        fail("no folder holds the args.json and log.csv of train_cyclegan.py")

    # The search (256 px, 0.5 to 2 % of the data) and the final runs (512 px, 20 %) do not compare: a grid for each.
    found.sort(key=lambda run: (-run["size"], -run["fraction"], run["best"]["cycle_ssim"] < 0.9,
                              run["best"]["loss_G"]))
    for run in found:  # the best first: of several seeds, its cell shows that one
        grid = grids["attention {attention}, {network}, {size} px, {fraction:.1%} of the data".format(**run)]
        grid.setdefault((run["lambda_cycle"], run["lr"]), "{loss_G:.3g} ({cycle_ssim:.3f})".format(**run["best"]))
    for title, grid in sorted(grids.items()):
        print(f"\nBest generator loss (cycle SSIM there): {title}")
        lambdas, rates = [sorted(set(values)) for values in zip(*grid)]
        print_table([{"λ": weight} | {f"lr {lr}": grid.get((weight, lr), "-") for lr in rates} for weight in lambdas])
    print(f"""
"values significantly below 0.9 indicated poor-quality results" (the paper, of the cycle SSIM)
The best run of the largest size and fraction: {found[0]['folder']}. The loss contains λ times the cycle loss, so that
only cells of one λ compare. {args.picture}, over the epochs: generator loss blue, discriminator loss red, cycle SSIM
green, each from 0 to the largest of all runs""")
    return {"rows": found}, plot(logs)


if __name__ == "__main__":
    make_printing_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    flag = commands.add_parser("quality", help="Table 4, Fig. 1 and 7, and what a head must not add").add_argument
    flag("folders", nargs="*", help="enhanced images, one folder for each method")
    flag("--distilled", required=True, metavar="DIR", help="images of the distilled model: what was enhanced")
    flag("--baseline", metavar="DIR",
         help="images of the baseline model: what is aimed at; without it only the measures that need none")
    flag("--dims", type=int, nargs="+", choices=DIMS_AFTER.values(), default=[64, 2048],
         help="Inception layers, the first for the verdict (ours: 64 2048; the paper's values are of the size of 64)")
    flag("--features", choices=["inception", "random"], default="inception",
         help="random: seeded random weights, which need no download and compare with nothing published")
    flag("--clip", help=f"CLIP for CLIP-IQA: Hub id, local folder, or none (ours: {CLIP}; with random features: none)")
    flag("--sheet", dest="picture", default="comparison.jpg",
         help="input | controls | each folder | baseline (default: comparison.jpg)")

    flag = commands.add_parser("time", help="Fig. 6: seconds per image, with and without the head").add_argument
    flag("--model", metavar="DIR", help="head to time: folder or Hub id (default: an untrained generator)")
    flag("--sizes", type=positive, nargs="+", default=[256, 512, 768, 1024],
         help="image sides in pixels, multiples of 16 (ours: 256 512 768 1024)")
    flag("--batch-size", type=positive, default=1, help="images that the head works on at once (ours: 1)")
    flag("--random-weights", action="store_true", help="full-size FLUX with random weights: no download")
    flag("--head-only", action="store_true", help="only the head; works on a CPU")
    for kind, model, steps, tokens in (("distilled", "FLUX.1-schnell", 4, 256), ("baseline", "FLUX.1-dev", 50, 512)):
        flag(f"--{kind}", default=f"black-forest-labs/{model}", help=f"folder or Hub id (the paper's: {model})")
        flag(f"--{kind}-steps", type=positive, default=steps, help=f"ours: {steps}; the paper: none")
        flag(f"--{kind}-tokens", type=positive, default=tokens, help=f"length of the prompt (ours: {tokens})")
    flag("--offload", action=argparse.BooleanOptionalAction,
         help="weights in the CPU's memory, for small GPUs (default: where the GPU has less than 40 GB)")

    flag = commands.add_parser("diversity", help="Table 1 and Fig. 3: perceived gender, age, ethnicity").add_argument
    flag("folders", nargs="+", help="images, one folder for each prompt")
    flag("--clip", default=CLIP, help=f"Hub id or local folder (ours: {CLIP})")
    flag("--map", dest="picture", default="map.jpg", help="map of thumbnails (default: map.jpg)")

    flag = commands.add_parser("runs", help="Tables 2 and 3: generator loss and cycle SSIM by λ and lr").add_argument
    flag("folders", nargs="+", help="run folders of train_cyclegan.py: runs/*")
    flag("--curves", dest="picture", default="curves.jpg", help="losses and cycle SSIM by epoch (default: curves.jpg)")

    for command in commands.choices.values():
        command.add_argument("--json", help="write every number to this file")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json, partial(write_json, content={}))
    if "picture" in args:
        check_writable(args.picture, partial(write_image, Image.new("RGB", (1, 1))))
    try:
        content, picture = dict(quality=quality, time=time_all, diversity=diversity, runs=runs)[args.command](args)
        if args.json:
            write_json(args.json, content | {"flags": vars(args)})
        if picture:
            write_image(picture, args.picture)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in repr(error).lower():
            raise
        fail("out of memory: smaller --sizes, a smaller --batch-size, or --offload")
    except OSError as error:
        fail(f"cannot read or write: {error}")
