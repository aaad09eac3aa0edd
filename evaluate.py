"""The tables of the paper (arXiv 2505.02255), and its Fig. 1, 3, 6 and 7, one sub-command each.

    python evaluate.py quality enhanced --distilled data/test/distilled --baseline data/test/baseline  # Table 4, Fig. 7
    python evaluate.py quality enhanced/other --distilled photos                   # images no head was trained on
    python evaluate.py time --random-weights                   # Fig. 6 on a CUDA GPU, without FLUX's weights or licence
    python evaluate.py time --head-only                        # the head alone, on anything
    python evaluate.py diversity data/plain/train/distilled data/train/distilled                       # Table 1, Fig. 3
    python evaluate.py runs runs/*                             # Tables 2 and 3

`quality` judges a folder by its distance to the baseline, held against that of the input and of a control, which is
what three colour curves can do, and by what a head must not add (nets, fixed patterns, blobs, tints): FID_diff, the
paper's column, rises with overshoot, stripes and dots as well. Images of one name (modules.partners) are one scene:
intervals get narrower, and output minus input can be looked at. Without --baseline, as outside a head's domain, it
gives the measures that need none: where there is nothing to gain, SSIM should be near 1 and the others near 0.
"""
import argparse
import gc
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import timeit
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.ndimage import uniform_filter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from modules import (ResnetGenerator, UnreadableImage, contact_sheet, fail, first_line, list_images, load_head,
                     normalise, partners, place_pipeline, positive, printable, read_image, read_log, resize_and_crop,
                     ssim, to_uint8, write_image, write_json)

torch.backends.cudnn.allow_tf32 = False  # FID is compared across machines to 1e-3; TF32 alone moves features by that
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
POOL = ThreadPoolExecutor(os.cpu_count())  # reads and measures images


# ----------------------------------------------------------------------------------------------- files and output
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


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def read_through(curves, path):
    """The PIL image at `path`, its colours changed by colour_curves() if there are any. Raises UnreadableImage."""
    image = read_image(path)
    return image.point(curves) if curves else image


def in_chunks(files, curves=None, size=32):
    """{scene: path} -> yields {scene: image} of 32 files at a time, as a folder may be larger than the memory.

    Threads read them. What cannot be read is left out with a warning.
    """
    def read(scene):
        try:
            return read_through(curves, files[scene])
        except UnreadableImage as error:
            warn(f"left out: {error}")

    scenes = sorted(files)
    for start in tqdm(range(0, len(scenes), size), f"chunks of {size} images", disable=None):
        chunk = scenes[start:start + size]
        images = {scene: image for scene, image in zip(chunk, POOL.map(read, chunk)) if image}
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


RANGE, PLUS_MINUS = "{0} [{1}, {2}]", "{0}±{3}"


def cell(value, form=RANGE):
    """A table's text: "0.410", or of [estimate, low, high] "0.410 [0.352, 0.468]"; "-" where there is no value.

    In the form PLUS_MINUS with half of the interval's width, to one digit less. Of a dict, its largest value.
    Intervals narrower than 1e-6 and numbers below 1e-9 are what rounding leaves.
    """
    if isinstance(value, dict):
        value = max(value.values(), default=math.nan)
    if isinstance(value, list):
        half = (value[2] - value[1]) / 2
        if half > 5e-7:
            decimals = min(max((form is RANGE) - math.floor(math.log10(half)), 0), 6)
            return form.format(*[f"{x:.{decimals}f}" for x in (*value, half)])
        value = value[0]
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}" if abs(value) > 1e-9 else "0"
    return str(value)


def print_table(rows, form=RANGE):
    """A Markdown table of dicts with the same keys, columns aligned. Of long texts, as paths are, the end is shown."""
    lines = [list(rows[0]), *([cell(value, form) for value in row.values()] for row in rows)]
    lines = [[text if len(text) < 33 else "…" + text[-22:] for text in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


# ------------------------------------------------------------------------------------------------------ intervals
def bootstrap_weights(scenes, resamples, seed=0):
    """(1 + resamples, scenes) weights: first all ones, for the estimate; then Bayesian bootstrap draws (Rubin 1981).

    Exp(1) weights do what drawing with replacement does, but keep every image, so that no resample has a covariance of
    lower rank than the data's. A scene has one weight in all folders that hold it: differences between scenes cancel.
    """
    draws = torch.empty(resamples, scenes, dtype=torch.float64)
    draws.exponential_(generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.ones(1, scenes, dtype=torch.float64), draws])


def interval(values):
    """(1 + resamples,) -> [estimate, low, high]: the bias-corrected normal bootstrap interval, nominally 95 %.

    FID grows as N falls, and not alike for two references. Resampling adds about the same bias once more: the interval
    is the estimate minus that, +- 1.96 standard errors. It is about what infinitely many images would give; where it
    excludes the estimate itself, N is too small for so many dims.
    """
    centre, half = 2 * values[0] - values[1:].mean(), 1.96 * values[1:].std()
    return [values[0].item(), (centre - half).item(), (centre + half).item()]


def average(values, weights):
    """Means of values (N,) under weights (R, N): (R,). Values that are nan do not count."""
    return weights @ values.nan_to_num() / (weights @ (~values.isnan()).double())


def median(values, weights):
    """Medians of values (N,) under weights (R, N): (R,)."""
    values, order = values.sort()
    sums = weights[:, order].cumsum(1)
    low, high = [values[torch.searchsorted(sums, sums[:, -1:] / 2, right=right)] for right in (False, True)]
    return ((low + high) / 2)[:, 0]


# ---------------------------------------------------------------------------------------------- Inception features
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
DIMS_AFTER = {"maxpool1": 64, "maxpool2": 192, "Mixed_6e": 768, "avgpool": 2048}


def fid_inception(features):
    """The Inception-v3 of 2015-12-05 that FID is defined by; features="random": the same with seeded random weights."""
    from torchvision.models import inception_v3

    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    if features == "random":
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):  # He-normal: activations keep their scale through the depth
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
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
        if len(features) == len(set(dims)):
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

    With Σ₁ = AᵀA and Σ₂ = BᵀB, Tr √(Σ₁Σ₂) is the sum of the singular values of ABᵀ: never negative or imaginary, exact
    for singular covariances, and of size min(N, d), so that few images cost little.
    """
    (mean_a, root_a), (mean_b, root_b) = a, b
    if a is b:
        return mean_a.new_zeros(())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    scale = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum()
    return F.threshold(scale - 2 * cross, 1e-10 * scale.item(), 0.0)  # what is left of equal sets is rounding


def kid(a, b, weights):
    """Kernel distance: unbiased MMD² under ((x·y)/d + 1)³, for each of R weights: (R,).

    `a` and `b` are features (N, d) with scene indices (N,). Pairs of one scene are left out of the cross term as well,
    else KID between an image set and its own enhancement would be biased downwards. 10,000 images take 3 GB.
    """
    def mean_kernel(a, b):
        (x, scenes_x), (y, scenes_y) = a, b
        different = (scenes_x[:, None] != scenes_y).double()
        kernel = (x @ y.T / x.shape[1] + 1) ** 3 * different
        w_x, w_y = weights[:, scenes_x], weights[:, scenes_y]
        return ((w_x @ kernel) * w_y).sum(1) / ((w_x @ different) * w_y).sum(1)

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def fid_and_kid(sets, weights):
    """Float64 features (N, d) and scene indices (N,) of each folder -> FIDs (R, folders, 2), KIDs (200+1, folders, 2):
    to the first two folders, which are the distilled and the baseline images.

    R is 1 + the number of bootstrap resamples of FID: 200, fewer where a resample takes seconds, at least 25.
    """
    dims = sets[0][0].shape[1]
    size = min(max(len(x) for x, _ in sets), dims)
    resamples = min(200, max(25, round(200 * (400 / size) ** 3)))
    fids = []
    for w in tqdm(weights[:1 + resamples], f"FID intervals at {dims} dims", disable=None):
        folders = [moments(x, w[scenes]) for x, scenes in sets]
        fids += [fid(a, b) for a in folders for b in folders[:2]]
    kids = [kid(a, b, weights) if a is not b else 0 * weights[:, 0] for a in sets for b in sets[:2]]
    return torch.stack(fids).reshape(-1, len(sets), 2), torch.stack(kids, 1).reshape(-1, len(sets), 2)


# ---------------------------------------------------------------------------------- what a head does to an image (ours)
PERIODS = (2, 4, 8, 16)
SCALES = (1, 3, 5, 9, 17, 33)
TONES = [*(f"{a}-{b} px" for a, b in itertools.pairwise(SCALES)), "luma"]


def net_pattern(image):
    """How far the power spectrum stands out at the frequencies of a net: (3, H, W) in [-1, 1] -> (4,) dB.

    One level per period of 2, 4, 8, 16 px; nan where the image is too small for it. The spectrum is Welch's, averaged
    over half-overlapping Hann-windowed tiles of the gray image. The frequencies of a net of period p are the multiples
    of 1/p, in both directions. Each is held against the log-mean of the 16 frequencies two bins around it, which the
    window keeps free of anything on the lattice. Natural images are not at 0: report output minus input.
    It makes the net-like patterns that the paper sees in its U-Net's hair and beards a number.
    """
    tile = min(128, 2 ** min(image.shape[-2:]).bit_length() // 4)  # 128 from 256 px on, 64 from 128, 32 from 64
    if tile < 32:
        return torch.full((len(PERIODS),), torch.nan)
    tiles = image.float().mean(0).unfold(0, tile, tile // 2).unfold(1, tile, tile // 2)
    window = torch.hann_window(tile)
    window = window[:, None] * window
    spectrum = torch.fft.fft2((tiles - tiles.mean((-2, -1), keepdim=True)) * window).abs().square().mean((0, 1))
    log = (spectrum + window.square().sum() * (2 / 255) ** 2).log()  # on white noise of one gray level: less is unseen
    ring = [shift for shift in itertools.product(range(-2, 3), repeat=2) if 2 in map(abs, shift)]
    ratio = (log - sum(log.roll(shift, (0, 1)) for shift in ring) / len(ring)).exp()
    k = torch.arange(tile)
    period = tile // torch.gcd(torch.gcd(k[:, None], k), torch.tensor(tile))  # of the net that a frequency belongs to
    return torch.stack([10 * ratio[(period == p) & (4 * p <= tile)].mean().log10() for p in PERIODS])


def detail(change):
    """The change (3, H, W) minus its 9-px box blur."""
    return change - F.avg_pool2d(F.pad(change, (4,) * 4, mode="reflect"), 9, stride=1)


def fixed_pattern(n, total, power):
    """Amplitude, in gray levels, of what is added at the same place in each of n images: stripes, ghosts at borders.

    With h = detail(change) and m its mean over the images: sqrt((n * mean m^2 - mean h^2) / (n - 1)), 0 where negative:
    n unrelated images would give mean m^2 = mean h^2 / n. `total` is the sum of h, `power` the sum of each mean h^2.
    """
    if n < 2:
        return math.nan
    return math.sqrt(max(0.0, (n * (total / n).square().mean().item() - power / n) / (n - 1)))


def blobs(change, width=15, limit=40):
    """Share of pixels, in %, whose change (3, H, W) is more than 40/255 off the median of the change around them.

    The median is taken over a square of 15 px, channel by channel, the image reflected at its border; the largest
    channel counts. A change of a whole face or background is no blob, however strong; a dark or coloured spot of up to
    some 10 px is one.
    """
    padded = F.pad(change, (width // 2,) * 4, mode="reflect")
    squares = padded.unfold(1, width, 1).unfold(2, width, 1)
    # The median lies between the extremes, so that only pixels far off one of them need it: few, for most heads.
    highest, lowest = F.max_pool2d(padded, width, stride=1), -F.max_pool2d(-padded, width, stride=1)
    blob = torch.maximum(highest - change, change - lowest) > limit
    for part in blob.nonzero().split(10000):
        index = tuple(part.T)
        blob[index] = (change[index] - squares[index].flatten(1).median(1).values).abs() > limit
    return 100 * blob.any(0).double().mean()


def neutral_tint(source, change):
    """(sum, number): length of the change of chroma, in gray levels, summed over the near-neutral pixels of `source`.

    Chroma is rgb minus its mean over the channels; near-neutral are pixels whose channels lie within 16 of 255: gray
    walls, white shirts, black suits, where a tint is seen first.
    """
    neutral = source.amax(0) - source.amin(0) <= 16
    return (change - change.mean(0)).norm(dim=0)[neutral].sum(), neutral.sum()


# ------------------------------------------------------------------------------------------------------------- CLIP
CLIP = "openai/clip-vit-base-patch32"


def load_clip(name):
    """(model, processor) of a CLIP in transformers' format: a local folder or a Hub id."""
    import transformers
    transformers.logging.set_verbosity_error()
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


def clip_iqa(clip, images):
    """How much likelier "Good photo." is than "Bad photo." for each of the PIL images, from 0 to 1."""
    prompts = clip_embed(clip, text=["Good photo.", "Bad photo."])
    likeness = 100 * clip_embed(clip, images=list(images)) @ prompts.T
    return likeness.softmax(1)[:, 0].tolist()


# ----------------------------------------------------------------------------------------- quality: Table 4, Fig. 7
def colour_curves(counts, target):
    """What colour alone can do (ours): a monotone curve a channel that carries the colours of one set to another's.

    Both sets are (3, 256) numbers of pixels at each level, which is exact for 8 bits, however many images there are.
    513 quantiles of the first are mapped to those of the second. Returns the 768 values that PIL's point() takes.
    """
    curves = []
    for channel in zip(counts, target):
        a, b = [np.quantile(range(256), np.linspace(0, 1, 513), weights=c, method="inverted_cdf") for c in channel]
        levels, index = np.unique(a, return_inverse=True)  # one level, such as black, can be many quantiles: their mean
        curve = np.interp(range(256), levels, np.bincount(index, b) / np.bincount(index))
        curves += curve.round().astype(int).tolist()
    return curves


def tone(picture):
    """{measure: value} of a PIL image: strength of detail at five scales, and luma, all in gray levels (ours).

    Strength of detail: the standard deviation of the difference between the means over boxes of two SCALES.
    """
    gray = np.asarray(picture.convert("L"), np.float32)
    means = [uniform_filter(gray, side, mode="mirror") for side in SCALES]
    return dict(zip(TONES, [*((a - b).std().item() for a, b in itertools.pairwise(means)), gray.mean().item()]))


def against_input(image, source):
    """What was changed in an image's input, both uint8 (3, H, W): {measure: value}, and the change's detail()."""
    change = image.float() - source
    tint, neutral = neutral_tint(source, change)
    gains = net_pattern(normalise(image)) - net_pattern(normalise(source))
    return {"SSIM": ssim(image[None], source[None], 255), "blobs_percent": blobs(change), "tint": tint,
            "neutral": neutral, **{f"net {period}": gain for period, gain in zip(PERIODS, gains)}}, detail(change)


def psnr(image, truth):
    """Peak signal-to-noise ratio of two uint8 images in dB, 100 at most."""
    return -10 * (((image.double() - truth) / 255).square().mean() + 1e-10).log10().item()


def fine_power(image):
    """Mean square of what a mean over 3x3 takes away from a uint8 image (3, H, W)."""
    x = image.double().numpy()
    return np.square(x - uniform_filter(x, (0, 3, 3), mode="mirror")).mean()


def look(picture, source, truth, curves):
    """All measures of a PIL image, {measure: value}, and the detail() of its change or None.

    `source` and `truth` are the paths of its input and of the baseline's image of the scene, or None.
    """
    def same_size(path):
        try:
            image = path and read_image(path)
        except UnreadableImage:  # in_chunks says so where it is the turn of its own folder
            return None
        return image if image and image.size == picture.size and min(image.size) >= 9 else None

    image, source, truth = pil_to_tensor(picture), same_size(source), same_size(truth)
    record, change = tone(picture), None
    if source:
        changes, change = against_input(image, pil_to_tensor(source))
        record |= changes
    if truth:
        truth = pil_to_tensor(truth)
        record |= {"PSNR_baseline": psnr(image, truth), "SSIM_baseline": ssim(image[None], truth[None], 255),
                   "fine": fine_power(image), "fine_baseline": fine_power(truth)}
        for name, other in (("PSNR_gain", source), ("PSNR_over_control", source and curves and source.point(curves))):
            if other:
                record[name] = record["PSNR_baseline"] - psnr(pil_to_tensor(other), truth)
    return record, change


def measure(folder, references, curves, net, clip, dims):
    """One pass over a folder. Memory grows with the Inception features only.

    `folder` has "files", {scene: path}, as both `references` are: the inputs and the baseline's images. It gets
    "records", {scene: {measure: value}} of what can be read, "features", {d: (N, d)} of Inception, "fixed", the fixed
    pattern of the images that have the size of the first, and "counts", (3, 256) for colour_curves().
    """
    records, features, counts, number, total, power = {}, defaultdict(list), 0, 0, 0.0, 0.0
    for pictures in in_chunks(folder["files"], folder.get("curves")):
        paths = [map(reference.get, pictures) for reference in references]
        found = POOL.map(look, pictures.values(), *paths, itertools.repeat(curves))
        for scene, (records[scene], h) in zip(pictures, found):
            if h is not None and (not number or h.shape == total.shape):
                number, total, power = number + 1, total + h.double(), power + h.double().square().mean().item()
        if net:  # FID's own resizing: bilinear without antialias
            x = [F.interpolate(pil_to_tensor(picture)[None] / 255, (299, 299), mode="bilinear", align_corners=False)
                 for picture in pictures.values()]
            for d, values in inception_features(net, torch.cat(x), dims).items():
                features[d].append(values.double())
        if clip:
            for scene, likeness in zip(pictures, clip_iqa(clip, pictures.values())):
                records[scene]["CLIP-IQA"] = likeness
        counts = counts + sum(np.reshape(picture.histogram(), (3, 256)) for picture in pictures.values())
    features = {d: torch.cat(parts) for d, parts in features.items()}
    folder |= dict(records=records, features=features, fixed=fixed_pattern(number, total, power), counts=counts)


MEANS = ("SSIM", "blobs_percent", "CLIP-IQA", "PSNR_baseline", "SSIM_baseline", "PSNR_gain", "PSNR_over_control")


def summary(folder, weights):
    """A row of the tables: each measure's mean, of the TONES the median, with its interval."""
    records = folder["records"].values()

    def column(name, statistic=average):
        values = [record.get(name, math.nan) for record in records]
        return statistic(torch.tensor(values, dtype=torch.float64), weights)

    nets = {period: interval(column(f"net {period}")) for period in PERIODS}
    return {"images": folder["label"], "N": len(records), "compared": sum("SSIM" in record for record in records),
            "compared_baseline": sum("PSNR_baseline" in record for record in records), "fixed_pattern": folder["fixed"],
            "net_pattern_dB": {period: gain for period, gain in nets.items() if not math.isnan(gain[0])},
            "neutral_tint": interval(column("tint") / column("neutral")),
            "fine_detail": interval((column("fine") / column("fine_baseline")).sqrt()),
            **{name: interval(column(name)) for name in MEANS},
            **{name: interval(column(name, median)) for name in TONES}}


def quality(args):
    args.clip = args.clip or ("none" if args.features == "random" else CLIP)
    clip = None if args.clip == "none" else load_clip(args.clip)
    net = fid_inception(args.features) if args.baseline else None

    # In this order everywhere: the input; the baseline and the control, if there is a baseline; the enhanced folders.
    inputs = scenes_of(args.distilled)
    truths = scenes_of(args.baseline, inputs) if args.baseline else {}
    folders = [dict(label="input", files=inputs)]
    if truths:
        folders += [dict(label="baseline", files=truths), dict(label="colour curves (control)", files=inputs)]
    first = len(folders)
    folders += [dict(label=folder, files=scenes_of(folder, inputs)) for folder in args.folders]
    numbers = {scene: i for i, scene in enumerate(sorted(set().union(*[folder["files"] for folder in folders])))}
    weights, rows, curves = bootstrap_weights(len(numbers), 200), [], None
    for folder in folders:
        if len(rows) == 2 < first:
            curves = folder["curves"] = colour_curves(folders[0]["counts"], folders[1]["counts"])
        measure(folder, (inputs, truths), curves, net, clip, args.dims)
        if len(folder["records"]) < 2:
            fail(f"{folder['label']} holds {len(folder['records'])} readable image(s); a covariance needs 2, an "
                 "interval some hundreds")
        folder["scenes"] = torch.tensor([numbers[scene] for scene in folder["records"]])
        rows.append(summary(folder, weights[:, folder["scenes"]]))

    def show(*names):  # each by its first word
        print_table([{name.partition("_")[0]: row[name] for name in names} for row in rows], PLUS_MINUS)

    if truths:
        add_distances(rows, folders, weights, args)
    if any(row["compared_baseline"] for row in rows[2:]):
        show("images", "compared_baseline", "PSNR_baseline", "SSIM_baseline", "fine_detail")
        print("""Against the baseline's images of the same name and size: PSNR in dB, SSIM, and the strength of fine
detail, which is what a 3x3 mean takes away, over the baseline's. They count where pairs show the same
pixels, as the miniature's do. FLUX's pairs are not aligned: a blurred image is nearer there, and FID counts.
""")
    show("images", "compared", "SSIM", "net_pattern_dB", "fixed_pattern", "blobs_percent", "neutral_tint")
    print("""Against the inputs of the same name and size. Net: at its strongest period, in dB, a fault by its interval's
lower end. Fixed pattern and neutral tint: gray levels of 255. Blobs: % of the pixels. The baseline's row is
what the two models differ by.
""")
    show("images", "N", *TONES)
    print("""Strength of detail between two widths of a box mean, and luma: gray levels, medians over N images. They need
no pairs: the baseline's row is the aim. ±: half of the 95 % interval.
""")
    if clip:
        show("images", "CLIP-IQA")
        print(f"Likeness to a good photo by CLIP ({args.clip})\n")

    # Last, the verdict on each folder, the one nearest to the baseline at the end.
    d = args.dims[0]
    for row in sorted(rows[first:], key=lambda row: row["PSNR_baseline"][0] if row["compared_baseline"] else
                      -row["features"][d]["FID_baseline"][0] if truths else 0):
        print("\n  ".join(verdict(row, rows, d)))
    return {"rows": rows}, comparison([folders[0], *folders[2:], folders[1]] if truths else folders)


def add_distances(rows, folders, weights, args):
    """FID and KID to the distilled and the baseline images, into each row and as a table."""
    table = []
    for d in args.dims:
        fids, kids = fid_and_kid([(folder["features"][d], folder["scenes"]) for folder in folders], weights)
        for row, f, k in zip(rows, fids.unbind(1), kids.unbind(1)):
            found = row.setdefault("features", {})[d] = {
                "kind": args.features, "resamples": len(f) - 1, "FID_distilled": f[0, 0].item(),
                "FID_baseline": [max(limit, 0.0) for limit in interval(f[:, 1])],
                "FID_baseline_change": interval(f[:, 1] - fids[:, 0, 1]),  # what the head did; below 0 is good
                "FID_over_control": interval(f[:, 1] - fids[:, 2, 1]),
                "FID_diff": interval(f[:, 0] - f[:, 1]),
                "KID_baseline": k[0, 1].item(), "KID_diff": interval(k[:, 0] - k[:, 1])}
            table.append({"images": row["images"], "dims": d, "FID_baseline": found["FID_baseline"],
                          "FID_diff": found["FID_diff"],
                          "1000 KID": cell([1000 * x for x in found["KID_diff"]], PLUS_MINUS)})
    counts = [row["N"] for row in rows]
    if min(counts) < max(args.dims) or len(set(counts)) > 1:
        warn(f"N = {', '.join(map(str, counts))} at {max(args.dims)} dims: FID falls as N grows, most where N is below "
             "the dims, and FID_diff leans towards the larger reference; KID does not")
    print_table(table)
    print(f"""FID to the baseline [95 % interval, by Bayesian bootstrap over images]. diff: distance to the input less
that to the baseline; of KID a thousand times that. Inception's first 64 dims see mostly colour, its last
2048 detail as well. Features: {args.features}
""")


def verdict(row, rows, d):
    """Lines about a folder: is it nearer to the baseline than the input and the control are, and its faults by name."""
    lines = [f"{row['images']} (N = {row['N']})"]
    nets = [low for _, low, _ in row["net_pattern_dB"].values()]
    # What the two models differ by is no fault. It is nan without common names, and max(x, nan) is x.
    models = rows[1] if "features" in row else rows[0]
    faults = [("net pattern", max(nets, default=math.nan), 1.0), ("fixed pattern", row["fixed_pattern"], 0.5),
              ("blobs", row["blobs_percent"][0], max(0.1, models["blobs_percent"][0])),
              ("tint", row["neutral_tint"][0], max(2.0, models["neutral_tint"][0] + 2))]

    def nearer(unit, sign, *gains):
        for than, gain in zip(("input", "colour curves"), gains):
            low, high = sorted(sign * limit for limit in gain[1:])
            how = "nearer" if low > 0 else "farther" if high < 0 else "no nearer for certain"
            lines.append(f"{how} than the {than}: {cell(gain)}{unit}")

    if row["compared_baseline"]:
        lines[0] += (f": PSNR to the baseline {cell(row['PSNR_baseline'])} dB, SSIM {row['SSIM_baseline'][0]:.3f}, "
                     f"fine detail {row['fine_detail'][0]:.2f} of its")
        nearer(" dB", 1, row["PSNR_gain"], row["PSNR_over_control"])
    if "features" in row:
        f, gap = row["features"][d], rows[0]["features"][d]["FID_baseline"][0]
        left = f["FID_baseline"][0] / gap if gap else math.nan
        share = f"{left:.0%} of the input's {cell(gap)}" if left < 10 else f"the input's is {cell(gap)}"
        lines.append(f"FID_baseline {cell(f['FID_baseline'])}, {share}; FID_diff {cell(f['FID_diff'])}")
        note = ": no published number compares" if f["kind"] == "random" else ""
        lines.append(f"{f['kind']} features, {d} dims{note}")
        nearer("", -1, f["FID_baseline_change"], f["FID_over_control"])
        faults.append(("overshoot", f["FID_distilled"], gap))
    found = [f"{name} {value:.2g} > {allowed:.2g}" for name, value, allowed in faults if value > allowed]
    last = f"Faults: {', '.join(found)}" if found else "No fault found"
    if not row["compared"]:
        return [*lines, "Faults cannot be seen: no image has the name and size of an input"]
    return [*lines, f"{last}, in {row['compared']} of {row['N']} images"]


def comparison(folders, count=6):
    """Contact sheet as in Fig. 1 and 7, a column a folder; white where it lacks the scene."""
    scenes = sorted(set(folders[0]["records"]).intersection(*[folder["records"] for folder in folders])
                    or folders[0]["records"])
    white = Image.new("RGB", (256, 256), "white")
    rows = [[resize_and_crop(read_through(folder.get("curves"), folder["files"][scene]), 256)
             if scene in folder["records"] else white for folder in folders]
            for scene in scenes[::-(-len(scenes) // count)]]
    return contact_sheet(rows, [Path(folder["label"]).name for folder in folders])


# ----------------------------------------------------------------------------------------------------- time: Fig. 6
# FLUX.1 as diffusers and transformers build it: the transformer's depth, and what differs from their defaults.
FLUX = dict(
    transformer=dict(num_layers=19, num_single_layers=38),
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


def compiled(head):
    """The head compiled for one size, on CUDA."""
    torch.compiler.reset()  # forget other sizes: there is a limit to how often one function is compiled
    return torch.compile(head, dynamic=False) if CUDA else head


@torch.inference_mode()
def from_8_to_8_bits(head, images):
    """uint8 (N, 3, H, W) -> uint8 through the head, on CUDA in bf16."""
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        return to_uint8(head(x))


@torch.inference_mode()
def generate(pipe, size, steps, guidance, tokens, head=None):
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


def joules(work, seconds):
    """The GPU's energy for work(), which takes `seconds`, by nvidia-smi; nan where there is none.

    nvidia-smi gives a mean power over up to a second: so the work is repeated for three in another thread, and the
    median counts.
    """
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    if CUDA:
        command.append(f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}")
    if not shutil.which("nvidia-smi"):
        return math.nan
    watts, repeated = [], POOL.submit(timeit.timeit, work, number=math.ceil(3 / seconds))
    while not watts or not repeated.done():
        time.sleep(0.1)
        text = subprocess.run(command, capture_output=True, text=True).stdout
        watts.append(float(text.split()[0]) if text[:1].isdigit() else math.nan)  # "[N/A]", as for a part of a GPU
    repeated.result()
    return statistics.median(watts) * seconds


def clock(repeats, images, work, *inputs):
    """What an image costs when work(*inputs) makes `images` of them: {column: value}."""
    def once():
        work(*inputs)
        if CUDA:
            torch.cuda.synchronize()  # kernels run behind Python's back

    timeit.repeat(once, number=1, repeat=2)  # compiles and warms up
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = timeit.repeat(once, number=1, repeat=repeats)
    median = statistics.median(seconds)
    return {"seconds": [x / images for x in (median, min(seconds), max(seconds))], "images/s": images / median,
            "joules": joules(once, median) / images,
            "GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan}


def time_head(head, size, repeats):
    """A row for each batch size that fits into the GPU's memory; one image at a time on a CPU."""
    rows, head = [], compiled(head)
    for batch in (1, 8, 32) if CUDA else (1,):
        images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
        try:
            cost = clock(repeats, batch, from_8_to_8_bits, head, images)
        except torch.OutOfMemoryError:
            break
        except torch._dynamo.exc.TorchDynamoException as error:
            fail(f"cannot compile the head ({first_line(error)}): torch.compile needs a C compiler and Python.h")
        rows.append({"size": size, "what": "head", "batch": batch} | cost)
    return rows


def time_all(args):
    if not args.head_only and not CUDA:
        fail("timing FLUX needs a CUDA GPU; --head-only times the head on a CPU")
    if any(size % 16 for size in args.sizes):
        fail("--sizes must be multiples of 16")
    torch.backends.cudnn.benchmark = True  # as in enhance.py
    head = load_head(args.model) if args.model else ResnetGenerator().eval()
    head = head.to(DEVICE, memory_format=torch.channels_last)
    rows = [row for size in args.sizes for row in time_head(head, size, args.repeats)]
    for kind in () if args.head_only else ("baseline", "distilled"):
        pipe = random_flux(kind == "baseline", args.offload) if args.random_weights else pretrained(getattr(args, kind))
        pipe = place_pipeline(pipe, DEVICE, args.offload)
        pipe.set_progress_bar_config(disable=True)
        # A student that embeds its guidance is run as the baseline is; schnell takes no guidance and shorter prompts.
        guided = kind == "baseline" or getattr(pipe.transformer.config, "guidance_embeds", False)
        call = (getattr(args, f"{kind}_steps"), args.guidance if guided else 0.0,
                getattr(args, f"{kind}_tokens") or (512 if guided else 256))
        for size in tqdm(args.sizes, kind, disable=None):
            for what in (kind,) if kind == "baseline" else (kind, "distilled + head"):
                inputs = pipe, size, *call, *([compiled(head)] if "head" in what else [])
                rows.append({"size": size, "what": what, "batch": 1} | clock(args.repeats, 1, generate, *inputs))
        # One pipeline at a time: both need 58 GB of memory, one 36. The transformer sits in a reference cycle.
        del pipe, inputs
        gc.collect()
        torch.cuda.empty_cache()

    # Fig. 6 as a table and in a sentence
    rows.sort(key=lambda row: row["size"])
    print_table(rows)
    device = torch.cuda.get_device_name() if CUDA else f"a CPU, {torch.get_num_threads()} thread(s)"
    print(f"""Seconds of an image, median [fastest, slowest] of {args.repeats}, and energy, the GPU's by nvidia-smi; GB: peak memory
of the GPU. On {device}. The head: from 8-bit to 8-bit images on the device, {'bf16, compiled' if CUDA else 'fp32'}.""")
    if not args.head_only:
        weights = ", with random weights" if args.random_weights else ""
        print(f"""The models draw from text in {args.baseline_steps} and {args.distilled_steps} steps{weights}.
Each time is that of one call: text encoders, steps, decoder, 8-bit image; the head and its 8-bit image; copy to the
CPU. Loading, compiling and PNG are left out. The paper gives no step counts for its Fig. 6: by FLOPs, 4 steps against
50 save 92 to 94 %, and its 82 % correspond to about 19 steps of the baseline.""")
        seconds = {(row["size"], row["what"]): row["seconds"][0] for row in rows}
        for size in args.sizes:
            saved = 1 - seconds[size, "distilled + head"] / seconds[size, "baseline"]
            print(f"distilled + head saves {saved:.1%} at {size} px (paper: 82 % on average over its sizes)")
    return {"device": device, "rows": rows}, None


# --------------------------------------------------------------------------------------- diversity: Table 1, Fig. 3
# CLIP's choice among these prompts, where the paper used DeepFace. Both say how a face is perceived, no more.
ATTRIBUTES = {
    "gender": {"woman": "a portrait of a woman", "man": "a portrait of a man"},
    "age": {"18-30": "a portrait of a person between 18 and 30 years old",
            "31-50": "a portrait of a person between 31 and 50 years old",
            "50+": "a portrait of a person over 50 years old"},
    "ethnicity": {"Asian": "a portrait of an Asian person", "Black": "a portrait of a Black person",
                  "Indian": "a portrait of an Indian person", "Latino": "a portrait of a Latino or Hispanic person",
                  "Middle Eastern": "a portrait of a Middle Eastern person", "White": "a portrait of a white person"}}


def diversity(args):
    from scipy.stats import binomtest
    clip, rows, embeddings, thumbnails = load_clip(args.clip), [], [], []
    for folder in args.folders:
        found = []
        for images in in_chunks(scenes_of(folder)):
            found.append(clip_embed(clip, images=list(images.values())))
            thumbnails += [(len(rows), resize_and_crop(image, 64)) for image in images.values()]
        if not found:
            fail(f"{printable(folder)} holds no readable image")
        embeddings.append(torch.cat(found))
        rows.append({"images": folder, "N": len(embeddings[-1])})
    for attribute, choices in ATTRIBUTES.items():
        texts = clip_embed(clip, text=list(choices.values()))
        for row, x in zip(rows, embeddings):
            row[attribute] = {}
            for choice, n in zip(choices, (x @ texts.T).argmax(1).bincount(minlength=len(choices)).tolist()):
                low, high = binomtest(n, len(x)).proportion_ci(method="wilson")
                row[attribute][choice] = [100 * n / len(x), 100 * low, 100 * high]
        print_table([{f"{attribute}, %": choice} | {f"{row['images']} (N = {row['N']})": row[attribute][choice]
                                                    for row in rows} for choice in choices])
        print()
    print(f"""Share [95 % interval, Wilson], as perceived by CLIP ({args.clip}) among prompts, where the paper used
DeepFace. {args.picture}: the first two principal components of CLIP's image embeddings, where it has ArcFace's t-SNE""")
    sheet, _, top = titled_sheet(args.folders, 2400, 2400)
    for (k, image), (x, y) in zip(thumbnails, (principal_components(torch.cat(embeddings)) * 2320).int().tolist()):
        sheet.paste(ImageOps.expand(image, 4, COLOURS[k % len(COLOURS)]), (x, y + top))
    return {"rows": rows}, sheet


def principal_components(x):
    """(N, d) -> (N, 2), scaled to [0, 1]."""
    u, s, _ = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    components = F.pad(u * s, (0, 1))[:, :2]  # one image alone has one component
    low, high = components.amin(0), components.amax(0)
    return (components - low) / (high - low).clamp(min=1e-12)


COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # told apart by colour-blind readers


def titled_sheet(titles, width, height):
    """A white sheet with a line of text on top for each title, in its colour: (sheet, its draw, height of the text)."""
    sheet = Image.new("RGB", (width, 40 * len(titles) + height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, title in enumerate(titles):
        draw.text((10, 40 * k), str(title), COLOURS[k % len(COLOURS)], ImageFont.load_default(32))
    return sheet, draw, 40 * len(titles)


# --------------------------------------------------------------------------------------------- runs: Tables 2 and 3
def best_epoch(log, decay_start):
    """The row of log.csv with the lowest generator loss, by which the paper compares its runs.

    Ours: only epochs of the decay count, because an untrained discriminator is easily fooled and the loss starts low;
    and rows whose cycle SSIM is at least 0.9 go before all others.
    """
    rows = [row for row in log if row["epoch"] > decay_start] or log[-1:]
    return min(rows, key=lambda row: (row["cycle_ssim"] < 0.9, row["loss_G"]))


def plot(logs, height=300):
    """The losses and the cycle SSIM of {title: rows of log.csv} over the epochs: a panel each, a line a run."""
    names = [name for name in next(iter(logs.values()))[0] if "loss" in name or name == "cycle_ssim"]
    sheet, draw, top = titled_sheet(logs, 1200, height * len(names))
    epochs = max(map(len, logs.values()))
    for name in names:
        lines = [np.array([row[name] for row in log if name in row]) for log in logs.values()]
        low, high = [at(np.concatenate(lines)) for at in (np.min, np.max)]
        title = f"{name}: {low:.3g} to {high:.3g} in {epochs} epochs"
        draw.text((10, top), title, "black", ImageFont.load_default(24))
        top += height
        for line, colour in zip(lines, itertools.cycle(COLOURS)):
            y = top - 10 - (height - 60) * (line - low) / max(high - low, 1e-9)
            draw.line(list(zip(np.arange(len(y)) * 1180 / epochs, y)), colour, 2)
    return sheet


def runs(args):
    found, logs, grids = [], {}, defaultdict(dict)
    for folder in args.folders:
        try:
            settings, log = json.loads(Path(folder, "args.json").read_text()), read_log(folder)
            older = f"norm {settings.get('norm', 'instance')}"  # before there was --classic
            settings["network"] = {True: "classic", False: "ours"}.get(settings.get("classic"), older)
            best = best_epoch(log, settings.get("decay_start", settings["epochs"] // 2)) | settings
            found.append({"folder": folder} | {key: best[key] for key in (
                "size", "fraction", "attention", "network", "lambda_cycle", "lr", "loss_G", "cycle_ssim")})
            logs[folder] = log
        except (OSError, ValueError, LookupError, TypeError) as error:
            warn(f"left out: {folder} is no CycleGAN run with a finished epoch ({type(error).__name__}: {error})")
    if not found:
        fail("no folder holds the args.json and log.csv of train_cyclegan.py")

    # The search (256 px, 0.5 to 2 % of the data) and the final runs (512 px, 20 %) do not compare: a grid for each.
    found.sort(key=lambda run: (-run["size"], -run["fraction"], run["cycle_ssim"] < 0.9, run["loss_G"]))
    for run in found:  # the best first: of several seeds, its cell shows that one
        grid = grids["attention {attention}, {network}, {size} px, {fraction:.1%} of the data".format(**run)]
        grid.setdefault((run["lambda_cycle"], run["lr"]), "{loss_G:.3g} ({cycle_ssim:.3f})".format(**run))
    for title, grid in sorted(grids.items()):
        print(f"\nBest generator loss (cycle SSIM there): {title}")
        lambdas, rates = [sorted(set(values)) for values in zip(*grid)]
        print_table([{"λ": weight} | {f"lr {lr}": grid.get((weight, lr), "-") for lr in rates} for weight in lambdas])
    print('\n"values significantly below 0.9 indicated poor-quality results" (the paper, of the cycle SSIM)')
    print("The best run of the largest size and fraction: " + ", ".join(f"{k} {v}" for k, v in found[0].items())
          + ". The loss contains λ times the cycle loss, so that only cells of one λ compare")
    print(f"Losses and cycle SSIM over the epochs: {args.picture}")
    return {"rows": found}, plot(logs)


if __name__ == "__main__":
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
         help="input | colour curves | each folder | baseline (default: comparison.jpg)")

    flag = commands.add_parser("time", help="Fig. 6: seconds per image, with and without the head").add_argument
    flag("--model", metavar="DIR", help="head to time: folder or Hub id (default: an untrained generator)")
    flag("--sizes", type=positive, nargs="+", default=[256, 512, 768, 1024],
         help="image sides in pixels (ours: 256 512 768 1024)")
    flag("--random-weights", action="store_true", help="full-size FLUX with random weights: no download")
    flag("--head-only", action="store_true", help="only the head; works on a CPU")
    for kind, model, steps, tokens in (("distilled", "FLUX.1-schnell", 4, "512 where it takes guidance, else 256"),
                                       ("baseline", "FLUX.1-dev", 50, "512")):
        flag(f"--{kind}", metavar="ID", default=f"black-forest-labs/{model}", help=f"default: {model}, the paper's")
        flag(f"--{kind}-steps", type=positive, metavar="N", default=steps, help=f"ours: {steps}; the paper: none")
        flag(f"--{kind}-tokens", type=positive, metavar="N", help=f"length of the prompt (ours: {tokens})")
    flag("--offload", action=argparse.BooleanOptionalAction,
         help="weights in the CPU's memory, for small GPUs (default: where the GPU has less than 40 GB)")
    flag("--guidance", type=float, default=3.0, help="of models that take one (ours: 3.0, as for the pairs)")
    flag("--repeats", type=positive, default=5, help="runs after the warm-up (ours: 5)")

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
    except torch.OutOfMemoryError:
        fail("out of GPU memory: smaller --sizes, or --offload")
    except OSError as error:
        fail(f"cannot read or write: {error}")
