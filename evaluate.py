"""Every table and figure of the paper (arXiv 2505.02255), one sub-command each.

    python evaluate.py quality enhanced --distilled data/test/distilled --baseline data/test/baseline  # Table 4, Fig. 7
    python evaluate.py quality enhanced/other --distilled photos                   # images no head was trained on
    python evaluate.py time --random-weights                   # Fig. 6 on a CUDA GPU, without FLUX's weights or licence
    python evaluate.py time --head-only                        # the head alone, on anything
    python evaluate.py diversity data/plain/train/distilled data/train/distilled                       # Table 1, Fig. 3
    python evaluate.py runs runs/*                             # Tables 2 and 3

`quality` judges a folder by its distance to the baseline and by what a head must not add (nets, fixed patterns, blobs):
FID_diff, the paper's column, rises with overshoot, stripes and dots as well. Where relative names match (suffix aside),
images count as the same scene: intervals get narrower, and output minus input can be looked at. Folders may hold
different numbers of images. Outside a head's domain there often is no baseline. Without --baseline, `quality` gives the
measures that need none: on images that have nothing to gain, SSIM should be near 1 and the others near 0.
"""
import argparse
import gc
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from modules import (ResnetGenerator, UnreadableImage, best_cyclegan_row, contact_sheet, fail, first_line, list_images,
                     load_head, normalise, read_image, read_log, resize_and_crop, ssim, to_uint8, write_atomically,
                     write_image)

torch.backends.cudnn.allow_tf32 = False  # FID is compared across machines to 1e-3; TF32 alone moves features by that
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK = 32  # images that are read and measured by threads before the networks see them


# ----------------------------------------------------------------------------------------------- files and output
def by_name(folder):
    """{relative name without suffix: path} of a folder's images; names that would collide keep their suffix."""
    files = {}
    for path in list_images(folder):
        name = path.relative_to(folder)
        files[str(name if str(name.with_suffix("")) in files else name.with_suffix(""))] = path
    return files


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def read_or_warn(path):
    """The image; None and a warning where there is none to be read."""
    try:
        return read_image(path)
    except UnreadableImage as error:
        warn(f"left out: {error}")


def print_table(titles, rows):
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for row in (titles, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def number(value, low=0, high=0, unit=""):
    """"0.410 [0.352, 0.468]": two digits of the half width; "0.410" without an interval; "-" without a value."""
    if not low < high:
        return "-" if math.isnan(value) else f"{value:.4g}{unit}"
    decimals = min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 6)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]{unit}"


def write_json(args, **content):
    """Writes the numbers, all flags and the versions to the file of --json, if there is one."""
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "transformers")}
        content |= {"flags": {key: value for key, value in vars(args).items() if key != "run"}, "versions": versions}
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # NaN is no JSON
        write_atomically(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


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


def average(values, scenes, weights):
    """Weighted means of values (N, ...) whose scenes are (N,) indices: (R, ...). Values that are nan do not count."""
    values = values.double()
    known = ~values.isnan()
    w = weights[:, scenes]
    return torch.einsum("rn,n...->r...", w, values.nan_to_num()) / torch.einsum("rn,n...->r...", w, known.double())


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


def fid_resize(image):
    """uint8 (3, H, W) -> float (3, 299, 299) in [0, 1], the way FID is defined: bilinear, no antialias."""
    return F.interpolate(image[None] / 255, (299, 299), mode="bilinear", align_corners=False)[0]


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
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return ((mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross).clamp(min=0)


def kid(x, y, scenes_x, scenes_y, weights, block=1000):
    """Kernel distance: unbiased MMD² of features (N, d) and (M, d) under ((x·y)/d + 1)³, for each of R weights: (R,).

    More than `block` images are cut into blocks and averaged. Pairs of one scene are left out of the cross term as
    well, else KID between an image set and its own enhancement would be biased downwards.
    """
    def mean_kernel(a, b, scenes_a, scenes_b):
        different = (scenes_a[:, None] != scenes_b).double()
        kernel = (a @ b.T / a.shape[1] + 1) ** 3 * different
        w_a, w_b = weights[:, scenes_a], weights[:, scenes_b]
        return ((w_a @ kernel) * w_b).sum(1) / ((w_a @ different) * w_b).sum(1)

    blocks = max(1, min(-(-max(len(x), len(y)) // block), min(len(x), len(y)) // 2))
    parts = [tensor.tensor_split(blocks) for tensor in (x, y, scenes_x, scenes_y)]
    return sum(mean_kernel(a, a, i, i) + mean_kernel(b, b, j, j) - 2 * mean_kernel(a, b, i, j)
               for a, b, i, j in zip(*parts)) / blocks


def to_references(distance, sets):
    """Distances of each set to the first two, which are the distilled and the baseline images: (sets, 2, ...)."""
    gap = distance(sets[0], sets[1])
    rows = [(0 * gap, gap), (gap, 0 * gap)] + [(distance(s, sets[0]), distance(s, sets[1])) for s in sets[2:]]
    return torch.stack([torch.stack(row) for row in rows])


def fid_and_kid(features, scenes, weights):
    """Features (N_k, d) and scene indices (N_k,) of each folder -> FIDs (R, folders, 2), KIDs (200+1, folders, 2).

    R is 1 + the number of bootstrap resamples of FID: 200, fewer where a resample takes seconds, at least 25.
    """
    features = [x.double() for x in features]
    size = min(max(map(len, features)), features[0].shape[1])
    resamples = min(200, max(25, round(200 * (400 / size) ** 3)))
    fids = [to_references(fid, [moments(x, w[s]) for x, s in zip(features, scenes)])
            for w in tqdm(weights[:1 + resamples], f"FID intervals at {features[0].shape[1]} dims", disable=None)]
    kids = to_references(lambda a, b: kid(a[0], b[0], a[1], b[1], weights), list(zip(features, scenes)))
    return torch.stack(fids), kids.permute(2, 0, 1)


# ---------------------------------------------------------------------------------- what a head does to an image (ours)
PERIODS = (2, 4, 8, 16)


def net_pattern(image):
    """How far the power spectrum stands out at the frequencies of a net: (3, H, W) in [-1, 1] -> (4,) dB.

    One level per period of 2, 4, 8, 16 px; nan where the image is too small for it. The spectrum is Welch's, averaged
    over half-overlapping Hann-windowed tiles of the gray image. The frequencies of a net of period p are the multiples
    of 1/p, in both directions. Each is held against the log-mean of the 16 frequencies two bins around it, which the
    window keeps free of anything on the lattice. Natural images are not at 0: report output minus input.
    It makes the net-like patterns that the paper sees in its U-Net's hair and beards a number.
    """
    side = min(image.shape[-2:])
    if side < 64:
        return torch.full((len(PERIODS),), torch.nan)
    tile = max(t for t in (128, 64, 32) if 2 * t <= side)
    tiles = image.float().mean(0).unfold(0, tile, tile // 2).unfold(1, tile, tile // 2)
    window = torch.hann_window(tile)
    window = window[:, None] * window
    spectrum = torch.fft.fft2((tiles - tiles.mean((-2, -1), keepdim=True)) * window).abs().square().mean((0, 1))
    log = (spectrum + window.square().sum() * (2 / 255) ** 2).log()  # on white noise of one gray level: less is unseen
    ring = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if max(abs(dy), abs(dx)) == 2]
    ratio = (log - sum(log.roll(shift, (0, 1)) for shift in ring) / len(ring)).exp()
    levels = torch.full((len(PERIODS),), torch.nan)
    for k, period in enumerate(PERIODS):
        if 4 * period <= tile:
            lattice = torch.zeros(tile, tile, dtype=torch.bool)
            lattice[::tile // period, ::tile // period] = True
            lattice[::2 * tile // period, ::2 * tile // period] = False  # those of a net with half the period
            levels[k] = 10 * ratio[lattice].mean().log10()
    return levels


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
    # The median lies between the extremes, so that only pixels far off one of them need it: few, for most heads.
    highest, lowest = F.max_pool2d(padded, width, stride=1), -F.max_pool2d(-padded, width, stride=1)
    candidates = (highest - change > limit) | (change - lowest > limit)
    squares = padded.unfold(1, width, 1).unfold(2, width, 1)
    blob = torch.zeros_like(candidates)
    for index in candidates.nonzero().split(10000):
        c, y, x = index.T
        blob[c, y, x] = (change[c, y, x] - squares[c, y, x].flatten(1).median(1).values).abs() > limit
    return 100 * blob.any(0).double().mean()


def neutral_tint(source, change):
    """(sum, number): length of the change of chroma, in gray levels, summed over the near-neutral pixels of `source`.

    Chroma is rgb minus its mean over the channels; near-neutral are pixels whose channels lie within 16 of 255: gray
    walls, white shirts, black suits, where a tint is seen first.
    """
    neutral = source.amax(0) - source.amin(0) <= 16
    return (change - change.mean(0)).norm(dim=0)[neutral].sum().double(), neutral.sum().double()


# ------------------------------------------------------------------------------------------------------------- CLIP
CLIP = "openai/clip-vit-base-patch32"


def load_clip(name):
    """(model, processor) of a CLIP in transformers' format: a local folder or a Hub id."""
    import huggingface_hub
    import transformers
    huggingface_hub.logging.set_verbosity_error()  # the line below says it better than six retries
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return (transformers.CLIPModel.from_pretrained(name).float().eval().to(DEVICE),
                transformers.CLIPProcessor.from_pretrained(name))
    except Exception as error:  # no network, no such model, a folder of something else: each has its own class
        fail(f"cannot load CLIP {name} ({first_line(error)}): where there is a network, "
             f"`hf download {CLIP} --local-dir clip`; then pass --clip clip")


def clip_pixels(clip, image):
    """PIL image -> CLIP's input (3, S, S)."""
    return clip[1].image_processor(image, return_tensors="pt")["pixel_values"][0]


@torch.inference_mode()
def clip_embed(clip, pixels=None, prompts=None):
    """(N, 3, S, S) pixels or N prompts -> unit vectors (N, d)."""
    model, processor = clip
    if prompts:
        embedding = model.get_text_features(**processor(text=prompts, padding=True, return_tensors="pt").to(DEVICE))
    else:
        embedding = model.get_image_features(pixel_values=pixels.to(DEVICE))
    return F.normalize(getattr(embedding, "pooler_output", embedding), dim=-1).cpu()  # a tensor in transformers 4


# ----------------------------------------------------------------------------------------- quality: Table 4, Fig. 7
def measure(files, inputs, size, net, clip, dims):
    """One pass over a folder; `files` and `inputs`, the distilled images, are {scene number: path}.

    Returns {measure: (N, ...) values} and the fixed pattern of the images of `size`. What compares with the input is
    nan where that is missing or of another size. Memory grows with the Inception features only.
    """
    columns, number_of_images, total, power = defaultdict(list), 0, 0.0, 0.0
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    if clip:
        good_and_bad = clip_embed(clip, prompts=["Good photo.", "Bad photo."])

    def measure_image(scene):
        """{measure: value} of one image, in a thread."""
        picture = read_or_warn(files[scene])
        if picture is None:
            return None
        image = pil_to_tensor(picture)
        values = dict.fromkeys(("SSIM", "CLIP-IQA", "blobs_percent", "tint", "neutral"), nan)
        values |= {"scene": torch.tensor(scene), "size": torch.tensor(picture.size), "net_pattern_dB": nan.repeat(4),
                   "inception": net and fid_resize(image), "pixels": clip and clip_pixels(clip, picture)}
        source = picture if files is inputs else read_or_warn(inputs[scene]) if scene in inputs else None
        if source and source.size == picture.size and min(source.size) > 8:
            source = pil_to_tensor(source)
            change = image.float() - source
            values["SSIM"] = ssim(image[None], source[None], 255)[0].double()
            values["net_pattern_dB"] = (net_pattern(normalise(image)) - net_pattern(normalise(source))).double()
            values["blobs_percent"] = blobs(change)
            values["tint"], values["neutral"] = neutral_tint(source, change)
            values["detail"] = detail(change).double() if picture.size == size else None
        return values

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(range(0, len(files), CHUNK), "chunks of images", disable=None):
            batch = list(filter(None, pool.map(measure_image, sorted(files)[start:start + CHUNK])))
            if not batch:
                continue
            for h in filter(lambda h: h is not None, [values.pop("detail", None) for values in batch]):
                number_of_images, total, power = number_of_images + 1, total + h, power + h.square().mean().item()
            inception, pixels = [[values.pop(name) for values in batch] for name in ("inception", "pixels")]
            if net:
                for d, features in inception_features(net, torch.stack(inception), dims).items():
                    columns[d].extend(features)
            if clip:
                likeness = 100 * clip_embed(clip, torch.stack(pixels)) @ good_and_bad.T
                for values, (good, _) in zip(batch, likeness.softmax(1)):
                    values["CLIP-IQA"] = good.double()
            for values in batch:
                for name, value in values.items():
                    columns[name].append(value)
    columns = {name: torch.stack(column) for name, column in columns.items()}
    return columns, fixed_pattern(number_of_images, total, power)


def quality(args):
    # Folders in this order everywhere: distilled, baseline if there is one, the enhanced ones.
    has_baseline = args.baseline and Path(args.baseline).resolve() != Path(args.distilled).resolve()
    labels = ["distilled", "baseline"][:1 + bool(has_baseline)] + args.folders
    folders = [args.distilled, args.baseline][:1 + bool(has_baseline)] + args.folders
    files = [by_name(folder) for folder in folders]
    numbers = {name: i for i, name in enumerate(sorted(set().union(*files)))}
    files = [{numbers[name]: path for name, path in folder.items()} for folder in files]
    args.clip = args.clip or ("none" if args.features == "random" else CLIP)
    clip = None if args.clip == "none" else load_clip(args.clip)
    net = fid_inception(args.features) if has_baseline else None

    rows, columns, size = [], [], None
    weights = bootstrap_weights(len(numbers), 200)
    for label, folder, paths in zip(labels, folders, files):
        column, fixed = measure(paths, files[0], size, net, clip, args.dims)
        count = len(column.get("scene", []))
        if count < 2:
            fail(f"{folder} holds {count} readable image(s); a covariance needs 2, a useful interval some hundreds")
        if size is None:  # most of the distilled images have this one; their own change is 0
            size, fixed = Counter(map(tuple, column["size"].tolist())).most_common(1)[0][0], 0.0
        row = {"images": label, "folder": folder, "N": count, "unreadable": len(paths) - count, "fixed_pattern": fixed}
        means = {name: average(column[name], column["scene"], weights) for name in
                 ("SSIM", "CLIP-IQA", "blobs_percent", "tint", "neutral", "net_pattern_dB")}
        row |= {name: interval(means[name]) for name in ("SSIM", "CLIP-IQA", "blobs_percent")}
        row["neutral_tint"] = interval(means["tint"] / means["neutral"])
        row["net_pattern_dB"] = {period: interval(gain) for period, gain in zip(PERIODS, means["net_pattern_dB"].T)}
        rows.append(row)
        columns.append(column)
    if has_baseline:
        add_distances(rows, columns, weights, args)

    print_table(["images", "N", "SSIM", f"CLIP-IQA ({args.clip})", "net pattern", "fixed pattern", "blobs, %",
                 "neutral tint"],
                [[row["images"], str(row["N"]), number(*row["SSIM"]), number(*row["CLIP-IQA"]), strongest_net(row),
                  number(row["fixed_pattern"]), number(*row["blobs_percent"]), number(*row["neutral_tint"])]
                 for row in rows])
    print("All but CLIP-IQA: against the distilled images of the same names and sizes; fixed pattern and tint in gray\n"
          "levels of 255" + ("; the baseline's row is what the two models differ by: compare that of a head with it.\n"
                             if has_baseline else ".\n"))
    write_json(args, rows=rows)
    write_image(comparison(files, columns, rows, has_baseline), args.sheet)
    print(f"{args.sheet}: input{' | each folder' if args.folders else ''}{' | baseline' if has_baseline else ''}")

    # Last, the verdict on each folder; where there are several, the one nearest to the baseline at the end.
    heads = rows[len(rows) - len(args.folders):]
    if has_baseline:
        heads.sort(key=lambda row: -row["features"][args.dims[0]]["FID_baseline"][0])
    for rank, row in zip(range(len(heads), 0, -1), heads):
        ranked = f"{rank}. " if has_baseline and len(heads) > 1 else ""
        print(f"{ranked}{row['images']}: {verdict(row, rows, args.dims[0])} (95 % intervals, N = {row['N']})")


def add_distances(rows, columns, weights, args):
    """FID and KID to the distilled and the baseline images, into each row and as a table."""
    for row in rows:
        row["features"] = {}
    for d in args.dims:
        fids, kids = fid_and_kid([column[d] for column in columns], [column["scene"] for column in columns], weights)
        for k, row in enumerate(rows):
            estimate, low, high = interval(fids[:, k, 1])
            row["features"][d] = {
                "kind": args.features, "resamples": len(fids) - 1, "FID_distilled": fids[0, k, 0].item(),
                "FID_baseline": [estimate, max(low, 0.0), max(high, 0.0)],
                "FID_baseline_change": interval(fids[:, k, 1] - fids[:, 0, 1]),  # what the head did; below 0 is good
                "FID_diff": interval(fids[:, k, 0] - fids[:, k, 1]),
                "KID_baseline": kids[0, k, 1].item(), "KID_diff": interval(kids[:, k, 0] - kids[:, k, 1])}

    counts = [row["N"] for row in rows]
    if min(counts) < max(args.dims):
        warn(f"{min(counts)} images are fewer than {max(args.dims)} dims: FID with more dims than images mostly "
             "measures N; compare it only at the same N")
    if len(set(counts)) > 1:
        warn(f"the folders hold different numbers of images ({', '.join(map(str, counts))}): FID falls as N grows, so "
             "FID_diff leans towards the larger reference; KID does not")
    print_table(["images", "N", "features", "FID_distilled", "FID_baseline [95 %]", "minus the input's [95 %]",
                 "FID_diff [95 %]", "1000 KID_diff [95 %]"],
                [[row["images"], str(row["N"]), f"{f['kind']} {d}", number(f["FID_distilled"]),
                  number(*f["FID_baseline"]), number(*f["FID_baseline_change"]), number(*f["FID_diff"]),
                  number(*[1000 * x for x in f["KID_diff"]])] for row in rows for d, f in row["features"].items()])
    print("FID_diff = FID_distilled - FID_baseline. Intervals: Bayesian bootstrap over images; resamples of FID: "
          + ", ".join(f"{f['resamples']} at {d} dims" for d, f in rows[0]["features"].items()) + "; of all else: 200\n")


def strongest_net(row):
    """The net pattern at its strongest period; nan stands for a period that the images are too small for."""
    period, gain = max(row["net_pattern_dB"].items(), key=lambda item: (not math.isnan(item[1][0]), item[1][0]))
    return number(*gain, f" dB at {period} px")


def verdict(row, rows, d):
    """How much of the distance to the baseline is left, and each fault by its name."""
    sentence = f"SSIM to the input {number(*row['SSIM'])}, neutral tint {number(*row['neutral_tint'])} gray levels"
    faults, normal_blobs = [], 0.1
    if "features" in row:
        f, gap = row["features"][d], rows[0]["features"][d]["FID_baseline"][0]
        left, (_, low, high) = f["FID_baseline"][0] / max(gap, 1e-12), f["FID_baseline_change"]
        moved = "nearer" if high < 0 else "farther" if low > 0 else "no nearer, as far as so few images can tell"
        sentence = (f"FID to the baseline {number(*f['FID_baseline'])}, {100 * left:.0f} % of the untouched input's "
                    f"{gap:.3g} ({moved}); FID_diff {number(*f['FID_diff'])}; {f['kind']} features, {d} dims"
                    + (", no published number compares" if f["kind"] == "random" else ""))
        if f["FID_distilled"] > gap:
            faults.append(f"overshoot (FID to distilled {f['FID_distilled']:.3g}, the baseline's own is {gap:.3g})")
        if rows[1]["blobs_percent"][0] > normal_blobs:  # the two models may differ that much; nan without common names
            normal_blobs = rows[1]["blobs_percent"][0]
    if any(low > 1 for _, low, _ in row["net_pattern_dB"].values()):
        faults.append(f"net pattern of {strongest_net(row)}")
    if row["fixed_pattern"] > 0.5:
        faults.append(f"fixed pattern of {row['fixed_pattern']:.2g} gray levels")
    if row["blobs_percent"][0] > normal_blobs:
        faults.append(f"blobs in {row['blobs_percent'][0]:.2g} % of the pixels")
    if math.isnan(row["SSIM"][0]):
        return f"{sentence}. Faults cannot be seen: no image has the name and size of a distilled one"
    return f"{sentence}. {'Faults: ' + ', '.join(faults) if faults else 'No fault found'}"


def comparison(files, columns, rows, has_baseline, count=6, side=256):
    """Contact sheet as in Fig. 1 and 7: input | each method | baseline. A folder without the scene shows any image."""
    order = [0, *range(2, len(files)), 1] if has_baseline else range(len(files))
    readable = [column["scene"].tolist() for column in columns]
    shared = sorted(set(readable[0]).intersection(*readable[1 + bool(has_baseline):])) or readable[0]
    pictures = []
    for i in range(min(count, len(shared))):
        scene = shared[i * len(shared) // min(count, len(shared))]
        chosen = [scene if scene in readable[k] else readable[k][i % len(readable[k])] for k in order]
        pictures.append([resize_and_crop(read_image(files[k][n]), side) for k, n in zip(order, chosen)])
    return contact_sheet(pictures, [Path(rows[k]["images"]).name for k in order])


# ----------------------------------------------------------------------------------------------------- time: Fig. 6
# FLUX.1 as diffusers and transformers build it. The transformer's numbers are diffusers' defaults.
FLUX = dict(
    transformer={},
    clip=dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768, hidden_act="quick_gelu"),
    t5=dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu"),
    vae=dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=16,
             block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=0.3611, shift_factor=0.1159,
             use_quant_conv=False, use_post_quant_conv=False, sample_size=1024))


def random_flux(distilled, shape):
    """FLUX.1-schnell (distilled) or -dev with random bf16 weights and no tokenizers: a text-to-image pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            parts = dict(transformer=FluxTransformer2DModel(guidance_embeds=not distilled, **shape["transformer"]),
                         text_encoder=CLIPTextModel(CLIPTextConfig(**shape["clip"])),
                         text_encoder_2=T5EncoderModel(T5Config(**shape["t5"])), vae=AutoencoderKL(**shape["vae"]))
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0) if distilled else FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    return FluxPipeline(scheduler=scheduler, tokenizer=None, tokenizer_2=None,
                        **{name: part.eval() for name, part in parts.items()})


def load_pipeline(name):
    from diffusers import AutoPipelineForText2Image
    try:
        return AutoPipelineForText2Image.from_pretrained(name, dtype=torch.bfloat16).to(DEVICE)
    except Exception as error:  # diffusers' own message ("not a valid model identifier") misleads when a model is gated
        fail(f"cannot load {name} ({type(error).__name__}): accept the licence on its Hugging Face page, then `hf auth "
             "login` or set HF_TOKEN; or pass a local folder; or --random-weights")


@torch.inference_mode()
def generate(pipe, size, steps, guidance, tokens, head=None):
    """One image from text, through the head if there is one: uint8 (1, 3, size, size) in the CPU's memory."""
    prompt = dict(prompt="A professional portrait of a person")
    if pipe.tokenizer is None:  # random_flux reads a prompt of zeros
        ids = torch.zeros(1, tokens, dtype=torch.long, device=pipe.device)
        prompt = dict(prompt_embeds=pipe.text_encoder_2(ids)[0],
                      pooled_prompt_embeds=pipe.text_encoder(ids[:, :77]).pooler_output)
    image = pipe(**prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                 max_sequence_length=tokens, output_type="pt").images
    image = to_uint8(2 * image.float() - 1)
    return (run_head(head, image) if head else image).cpu()


@torch.inference_mode()
def run_head(head, images):
    """uint8 (N, 3, H, W) -> uint8, as enhance.py does it: bf16 and channels_last on CUDA, fp32 on a CPU."""
    cuda = DEVICE.type == "cuda"
    x = normalise(images).contiguous(memory_format=torch.channels_last if cuda else torch.contiguous_format)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=cuda):
        return to_uint8(head(x))


def clock(work, repeats):
    """[median, fastest, slowest] seconds of `repeats` runs of work(), after two that compile and warm up."""
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # kernels run behind Python's back
        seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]), min(seconds[2:]), max(seconds[2:])]


def compile_head(head, **options):
    """The head as enhance.py runs it: on CUDA compiled for one shape, on a CPU as it is."""
    if DEVICE.type == "cpu":
        return head
    torch.compiler.reset()  # forget other sizes: there is a limit to how often one function is compiled
    return torch.compile(head, dynamic=False, **options)


def time_head(head, size, repeats):
    """{"head": clock() of one image, on CUDA "head, CUDA graph" too, "images/s" and "batch" of the fastest batch}."""
    cuda, seconds, row = DEVICE.type == "cuda", {}, {}
    images = torch.randint(0, 256, (32 if cuda else 1, 3, size, size), dtype=torch.uint8, device=DEVICE)
    compiled = compile_head(head)
    for batch in (1, 8, 32) if cuda else (1,):
        try:
            seconds[batch] = clock(lambda: run_head(compiled, images[:batch]), repeats)
        except torch.OutOfMemoryError:
            break
    if cuda:  # one image: starting some 300 kernels takes longer than their work, unless they are recorded as a graph
        graph = compile_head(head, mode="reduce-overhead")
        row["head, CUDA graph"] = clock(lambda: run_head(graph, images[:1]), repeats)
    speed, batch = max((batch / seconds[batch][0], batch) for batch in seconds)
    return {"head": seconds[1], **row, "images/s": speed, "batch": batch}


def time_all(args):
    cuda = DEVICE.type == "cuda"
    if not args.head_only and not cuda:
        fail("timing FLUX needs a CUDA GPU; --head-only times the head on a CPU")
    if any(size < 16 or size % 16 for size in args.sizes):
        fail("--sizes must be multiples of 16")
    torch.backends.cudnn.benchmark = cuda  # as in enhance.py
    head = load_head(args.model) if args.model else ResnetGenerator().eval()
    head = head.to(DEVICE, memory_format=torch.channels_last if cuda else torch.preserve_format)
    try:
        rows = {size: time_head(head, size, args.repeats) for size in args.sizes}
    except torch._dynamo.exc.TorchDynamoException as error:
        fail(f"cannot compile the head ({first_line(error)}): torch.compile needs a C compiler and Python.h")
    for kind in () if args.head_only else ("baseline", "distilled"):
        pipe = random_flux(kind == "distilled", FLUX) if args.random_weights else load_pipeline(getattr(args, kind))
        pipe.set_progress_bar_config(disable=True)
        steps, guidance, tokens = args.baseline_steps, args.guidance, args.tokens
        if kind == "distilled":  # a student that embeds its guidance must not run at 0; schnell ignores it
            embeds = getattr(pipe.transformer.config, "guidance_embeds", False)
            steps, guidance, tokens = args.distilled_steps, args.distilled_guidance, args.distilled_tokens
            guidance = guidance if guidance is not None else 3.5 if embeds else 0.0
            tokens = tokens or (512 if embeds else 256)
        for size, row in tqdm(rows.items(), kind, disable=None):
            row[kind] = clock(lambda: generate(pipe, size, steps, guidance, tokens), args.repeats)
            if kind == "distilled":
                compiled = compile_head(head)
                row["distilled + head"] = clock(lambda: generate(pipe, size, steps, guidance, tokens, compiled),
                                                args.repeats)
                row["saved"] = 1 - row["distilled + head"][0] / row["baseline"][0]
        # One pipeline at a time: both need 58 GB of memory, one 36. The transformer sits in a reference cycle.
        del pipe
        gc.collect()
        torch.cuda.empty_cache()
    report_times(rows, args, torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} thread(s)")


def report_times(rows, args, device):
    """Fig. 6 as a table and in a sentence; `rows` is {size: {kind: seconds}}."""
    kinds = [kind for kind in ("baseline", "distilled", "distilled + head", "head", "head, CUDA graph")
             if kind in rows[args.sizes[0]]]
    memory = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None
    print(f"Seconds per image (fastest to slowest of {args.repeats}) on {device}"
          + (f", peak memory {memory:.1f} GB" if memory else ""))
    print_table(["size", *kinds, "head, images/s (batch)", "saved"],
                [[str(size), *("{:.4g} ({:.4g} to {:.4g})".format(*row[kind]) for kind in kinds),
                  f"{row['images/s']:.4g} ({row['batch']})", f"{row['saved']:.1%}" if "saved" in row else "-"]
                 for size, row in rows.items()])
    print("head: from 8-bit to 8-bit images on the device, " + ("bf16, compiled" if DEVICE.type == "cuda" else "fp32"))
    if not args.head_only:
        print(f"""The models draw from text in {args.baseline_steps} and {args.distilled_steps} steps{
            ", with random weights" if args.random_weights else ""}. Each time is that of one call: text encoders, all
steps, decoder, 8-bit image; for distilled + head also the head and its 8-bit image; copied to the CPU. Loading,
compiling and PNG are left out. The paper gives no step counts for its Fig. 6: by FLOPs, 4 steps against 50 save
92 to 94 %, and its 82 % correspond to about 19 steps of the baseline.""")
        print("distilled + head saves " + ", ".join(f"{row['saved']:.1%} at {size} px" for size, row in rows.items())
              + " of the baseline's time (paper: 82 %)")
    write_json(args, device=device, rows=rows, peak_memory_gb=memory)


# --------------------------------------------------------------------------------------- diversity: Table 1, Fig. 3
# CLIP's choice among these prompts, where the paper used DeepFace. Both say how a face is perceived, no more.
ATTRIBUTES = {
    "gender": {"woman": "a portrait of a woman", "man": "a portrait of a man"},
    "age": {"18-30": "a portrait of a person between 18 and 30 years old",
            "31-50": "a portrait of a person between 31 and 50 years old",
            "50+": "a portrait of a person over 50 years old"},
    "ethnicity": {"Asian": "a portrait of an East Asian person", "Black": "a portrait of a Black person",
                  "Indian": "a portrait of an Indian person", "Latino": "a portrait of a Latino or Hispanic person",
                  "Middle Eastern": "a portrait of a Middle Eastern person", "White": "a portrait of a white person"}}


def embed_folder(clip, folder):
    """CLIP embeddings (N, d) of a folder's images, and their thumbnails."""
    embeddings, thumbnails, paths = [], [], list_images(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(range(0, len(paths), CHUNK), folder, disable=None):
            images = list(filter(None, pool.map(read_or_warn, paths[start:start + CHUNK])))
            thumbnails += pool.map(lambda image: resize_and_crop(image, 64), images)
            if images:
                pixels = torch.stack(list(pool.map(lambda image: clip_pixels(clip, image), images)))
                embeddings.append(clip_embed(clip, pixels))
    if not embeddings:
        fail(f"{folder} holds no readable image")
    return torch.cat(embeddings), thumbnails


def diversity(args):
    clip = load_clip(args.clip)
    embeddings, thumbnails = zip(*[embed_folder(clip, folder) for folder in args.folders])
    rows = [{"images": folder, "N": len(x)} for folder, x in zip(args.folders, embeddings)]
    for attribute, choices in ATTRIBUTES.items():
        texts = clip_embed(clip, prompts=list(choices.values()))
        for row, x in zip(rows, embeddings):
            chosen = F.one_hot((x @ texts.T).argmax(1), len(choices))
            shares = average(100 * chosen, torch.arange(len(x)), bootstrap_weights(len(x), 1000))
            # Quantiles and not interval(): a share near 0 or 100 % has no symmetric one.
            low, high = shares[1:].quantile(torch.tensor([0.025, 0.975]).double(), 0).tolist()
            row[attribute] = dict(zip(choices, zip(shares[0].tolist(), low, high)))
        print_table([f"{attribute}, perceived, % [95 %]", "N", *choices],
                    [[row["images"], str(row["N"]), *(number(*share) for share in row[attribute].values())]
                     for row in rows])
        print()
    write_json(args, prompts=ATTRIBUTES, rows=rows)
    write_image(thumbnail_map(embeddings, thumbnails, args.folders), args.map)
    print(f"Perceived by CLIP ({args.clip}) among prompts, where the paper used DeepFace.\n{args.map}: the first two "
          "principal components of CLIP's image embeddings, where the paper has t-SNE of ArcFace's")


def principal_components(x):
    """(N, d) -> (N, 2), scaled to [0, 1]."""
    x = x.double() - x.double().mean(0)
    components = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T
    components = F.pad(components, (0, 2 - components.shape[1]))  # a single image has one component
    low, high = components.amin(0), components.amax(0)
    return (components - low) / (high - low).clamp(min=1e-12)


def thumbnail_map(embeddings, thumbnails, titles, side=2400):
    """All folders in one map, each image drawn at its position in a frame of its folder's colour."""
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # told apart by colour-blind readers
    sheet = Image.new("RGB", (side, side + 60), "white")
    positions = iter((principal_components(torch.cat(embeddings)) * (side - 80)).int().tolist())
    left, font = 10, ImageFont.load_default(32)
    for title, images, colour in zip(titles, thumbnails, itertools.cycle(colours)):
        ImageDraw.Draw(sheet).text((left, 10), title, fill=colour, font=font)
        left += round(font.getlength(title)) + 40
        for image, (x, y) in zip(images, positions):
            sheet.paste(ImageOps.expand(image, 4, colour), (x, y + 60))
    return sheet


# --------------------------------------------------------------------------------------------- runs: Tables 2 and 3
def runs(args):
    cells = []
    for folder in map(Path, args.folders):
        try:
            settings = json.loads((folder / "args.json").read_text())
            best = best_cyclegan_row(read_log(folder), settings["decay_start"])
            keys = ("size", "fraction", "attention", "lambda_cycle", "lr")
            cell = {key: settings[key] for key in keys} | {key: best[key] for key in ("loss_G", "cycle_ssim")}
        except (OSError, ValueError, LookupError, TypeError) as error:
            warn(f"left out: {folder} is no CycleGAN run with a finished epoch ({type(error).__name__}: {error})")
            continue
        cells.append(cell | {"folder": str(folder)})
    if not cells:
        fail("no folder holds the args.json and log.csv of train_cyclegan.py")

    # The search (256 px, 0.5 to 2 % of the data) and the final runs (512 px, 20 %) do not compare: a table for each.
    names = {"none": "CycleGAN", "esa": "ESA-CycleGAN"}
    for size, fraction, attention in sorted({(c["size"], c["fraction"], c["attention"]) for c in cells}):
        table = [c for c in cells if (c["size"], c["fraction"], c["attention"]) == (size, fraction, attention)]
        rates, weights = sorted({c["lr"] for c in table}), sorted({c["lambda_cycle"] for c in table})
        print(f"{names[attention]}, {size} px, {fraction:.3g} of the data: best generator loss / cycle SSIM there")
        print_table(["λ_cycle", *(f"lr {lr:g}" for lr in rates)],
                    [[f"{weight:g}", *(", ".join(f"{c['loss_G']:.3f} / {c['cycle_ssim']:.3f}" for c in table
                                                 if (c["lambda_cycle"], c["lr"]) == (weight, lr)) or "-"
                                       for lr in rates)] for weight in weights])
        print()
    print('"values significantly below 0.9 indicated poor-quality results" (the paper, of the cycle SSIM)')
    write_json(args, rows=cells)
    best = min(cells, key=lambda c: (-c["size"], -c["fraction"], c["cycle_ssim"] < 0.9, c["loss_G"]))
    print(f"The best run at {best['size']} px on {best['fraction']:.3g} of the data is {best['folder']}: attention "
          f"{best['attention']}, λ {best['lambda_cycle']:g}, lr {best['lr']:g}, generator loss {best['loss_G']:.3f}, "
          f"cycle SSIM {best['cycle_ssim']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    json_flag = argparse.ArgumentParser(add_help=False)
    json_flag.add_argument("--json", metavar="F", help="write every number to this file")

    p = commands.add_parser("quality", parents=[json_flag],
                            help="Table 4: FID, KID, CLIP-IQA, SSIM, and what a head must not add")
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="enhanced images, one folder for each method")
    p.add_argument("--distilled", required=True, metavar="DIR", help="images of the distilled model: what was enhanced")
    p.add_argument("--baseline", metavar="DIR", help="images of the baseline model: what is aimed at; without it (or "
                   "with the distilled ones again) only the measures that need none, for images of any kind")
    p.add_argument("--dims", type=int, nargs="+", choices=[64, 192, 768, 2048], default=[64, 2048],
                   help="Inception layers, the first for the verdict (ours: 64 2048; the paper does not say, its "
                   "values are of the size of 64)")
    p.add_argument("--features", choices=["inception", "random"], default="inception",
                   help="random: seeded random weights, which need no download and compare with nothing published")
    p.add_argument("--clip", metavar="ID", help="CLIP for CLIP-IQA: a Hub id, a local folder, or none "
                   f"(ours: {CLIP}; with --features random: none)")
    p.add_argument("--sheet", default="comparison.jpg", metavar="F", help="contact sheet (default: comparison.jpg)")
    p.set_defaults(run=quality)

    p = commands.add_parser("time", parents=[json_flag],
                            help="Fig. 6: seconds per image of baseline, distilled, distilled + head")
    p.add_argument("--model", metavar="DIR", help="head to time: folder or Hub id (default: an untrained "
                   "generator; time does not depend on weights)")
    p.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768, 1024], metavar="S",
                   help="image sides in pixels (ours: 256 512 768 1024)")
    p.add_argument("--random-weights", action="store_true", help="full-size FLUX with random weights: no download")
    p.add_argument("--head-only", action="store_true", help="only the head; works on a CPU")
    p.add_argument("--distilled", default="black-forest-labs/FLUX.1-schnell", metavar="ID", help="default: paper's")
    p.add_argument("--baseline", default="black-forest-labs/FLUX.1-dev", metavar="ID", help="default: paper's")
    p.add_argument("--distilled-steps", type=int, default=4, help="ours: 4; the paper does not say")
    p.add_argument("--baseline-steps", type=int, default=50, help="paper: 50")
    p.add_argument("--distilled-guidance", type=float, help="ours: 3.5 where the model embeds guidance, else 0")
    p.add_argument("--guidance", type=float, default=3.0, help="of the baseline model (paper: 3.0)")
    p.add_argument("--distilled-tokens", type=int, help="prompt length (ours: 512 with guidance, else 256)")
    p.add_argument("--tokens", type=int, default=512, help="of the baseline model (ours: 512)")
    p.add_argument("--repeats", type=int, default=5, help="runs after the warm-up (ours: 5)")
    p.set_defaults(run=time_all)

    p = commands.add_parser("diversity", parents=[json_flag],
                            help="Table 1 and Fig. 3: perceived gender, age, ethnicity; map of the images")
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="images, one folder for each prompt")
    p.add_argument("--clip", default=CLIP, metavar="ID", help="Hub id or local folder (ours: %(default)s)")
    p.add_argument("--map", default="map.jpg", metavar="F", help="map of thumbnails (default: map.jpg)")
    p.set_defaults(run=diversity)

    p = commands.add_parser("runs", parents=[json_flag],
                            help="Tables 2 and 3: best generator loss and cycle SSIM for each λ and lr")
    p.add_argument("folders", nargs="+", metavar="RUN", help="run folders of train_cyclegan.py: runs/*")
    p.set_defaults(run=runs)

    args = parser.parse_args()
    args.run(args)
