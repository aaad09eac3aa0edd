"""Every table and figure of the paper (arXiv 2505.02255), one sub-command each.

    python evaluate.py quality enhanced --distilled data/test/distilled --baseline data/test/baseline  # Table 4, Fig. 7
    python evaluate.py time --random-weights                   # Fig. 6 on a CUDA GPU, without FLUX's weights or licence
    python evaluate.py time --head-only                        # the head alone, on anything
    python evaluate.py diversity data/plain/train/distilled data/train/distilled                       # Table 1, Fig. 3
    python evaluate.py runs runs/*                             # Tables 2 and 3

`quality` compares folders of images with the distilled and the baseline model's. The folders may hold different numbers
of images; where relative names match (suffix aside), images count as the same scene, which makes intervals narrower.
Numbers come with their N and feature layer, and what is compared with a 95 % interval: no use without.
"""
import argparse
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from modules import (ResnetGenerator, UnreadableImage, best_cyclegan_row, contact_sheet, fail, first_line, fit,
                     list_images, load_head, peak_memory_gb, read_image, read_log, ssim, to_tensor, write_atomically,
                     write_image)

torch.backends.cudnn.allow_tf32 = False  # FID is compared across machines to 1e-3; TF32 alone moves features by that
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -------------------------------------------------------------------------------------------- images, output, intervals
def prefetch(work, items, ahead):
    """work(item) for each item, in order, computed by threads that stay at most `ahead` items in front."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        queue = deque()
        for item in items:
            queue.append(pool.submit(work, item))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def by_name(folder):
    """{relative name without suffix: path} of a folder's images; names that would collide keep their suffix."""
    files = {}
    for path in list_images(folder):
        name = path.relative_to(folder)
        files[str(name if str(name.with_suffix("")) in files else name.with_suffix(""))] = path
    return files


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def print_table(head, rows):
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def show(value, low, high, unit=""):
    """"0.410 [0.352, 0.468]": two digits of the half width; "0.410" without an interval; "-" without a value."""
    if not low < high:
        return "-" if value != value else f"{value:.4g}{unit}"
    decimals = min(max(1 - math.floor(math.log10((high - low) / 2)), 0), 6)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]{unit}"


def write_json(args, **content):
    """Writes the numbers, all flags and the versions to the file of --json, if there is one."""
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "transformers")}
        content |= {"flags": {key: value for key, value in vars(args).items() if key != "run"}, "versions": versions}
        content = json.loads(json.dumps(content), parse_constant=lambda _: None)  # NaN is no JSON
        write_atomically(args.json, lambda path: path.write_text(json.dumps(content, indent=2)))


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

    FID grows as N falls, and not alike for two references, so FID_diff is biased. Resampling adds about the same bias
    once more: the interval is the estimate minus that, +- 1.96 standard errors. It is about what infinitely many images
    would give; where it excludes the estimate itself, N is too small for so many dims.
    """
    centre, half = 2 * values[0] - values[1:].mean(), 1.96 * values[1:].std()
    return [values[0].item(), (centre - half).item(), (centre + half).item()]


def average(values, scenes, weights):
    """Weighted means of values (N, ...) whose scenes are (N,) indices: (R, ...). Values that are nan do not count."""
    values = values.double()
    known = ~values.isnan()
    w = weights[:, scenes]
    return torch.einsum("rn,n...->r...", w, values.nan_to_num()) / torch.einsum("rn,n...->r...", w, known.double())


# --------------------------------------------------------------------------------------------------- Inception features
FID_WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
DIMS_AFTER = {"maxpool1": 64, "maxpool2": 192, "Mixed_6e": 768, "avgpool": 2048}


def fid_inception(features):
    """The Inception-v3 of 2015-12-05 that FID is defined by; features="random": the same with seeded random weights."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval
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
    for module in net.modules():
        if hasattr(module, "bn"):  # one pass over memory instead of two
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), torch.nn.Identity()
    return net.to(DEVICE, memory_format=torch.channels_last)


def fid_resize(image):
    """uint8 (3, H, W) -> float (3, 299, 299) in [0, 1], the way FID is defined: bilinear, no antialias."""
    return F.interpolate(image[None] / 255, (299, 299), mode="bilinear", align_corners=False)[0]


@torch.inference_mode()
def inception_features(net, x, dims):
    """(N, 3, 299, 299) in [0, 1] -> {d: (N, d)} for each d of dims, in one pass that ends at the deepest of them."""
    x = 2 * x.to(DEVICE, memory_format=torch.channels_last) - 1
    found = {}
    for name, layer in net.named_children():
        x = layer(x)
        if DIMS_AFTER.get(name) in dims:
            found[DIMS_AFTER[name]] = x.mean((2, 3)).cpu()
        if len(found) == len(dims):
            return found


# ---------------------------------------------------------------------------------------------------------- FID and KID
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


# ---------------------------------------------------------------------------------------------------------- net pattern
PERIODS = (2, 4, 8, 16)


def net_pattern(image):
    """How far the power spectrum stands out at the frequencies of a net: (..., 3, H, W) in [-1, 1] -> (..., 4) dB.

    One level per period of 2, 4, 8, 16 px. The spectrum is Welch's, averaged over half-overlapping Hann-windowed tiles
    of the gray image: 128, 64 or 32 px, the largest that fits twice. A frequency whose two parts are multiples of
    1/period (but not both of a smaller period's) is held against the log-mean of the 16 frequencies two bins around it,
    which the window keeps free of anything that is on the lattice; the ratios' mean is taken in dB. nan where the tile
    is too small for the period, and for sides below 64. Natural images are not at 0: report output minus input.
    Ours; it makes the net-like patterns that the paper sees in its U-Net's hair and beards a number.
    """
    side = min(image.shape[-2:])
    if side < 64:
        return torch.full((*image.shape[:-3], len(PERIODS)), torch.nan)
    tile = max(t for t in (128, 64, 32) if 2 * t <= side)
    tiles = image.float().mean(-3).unfold(-2, tile, tile // 2).unfold(-2, tile, tile // 2)
    window = torch.hann_window(tile, device=image.device)
    window = window[:, None] * window
    spectrum = torch.fft.fft2((tiles - tiles.mean((-2, -1), keepdim=True)) * window).abs().square().mean((-4, -3))
    log = (spectrum + window.square().sum() * (2 / 255) ** 2).log()  # on white noise of one gray level: less is unseen
    ring = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if max(abs(dy), abs(dx)) == 2]
    ratio = (log - sum(log.roll(shift, (-2, -1)) for shift in ring) / len(ring)).exp()
    levels, seen = [], torch.zeros(tile, tile, dtype=torch.bool, device=image.device)
    seen[0, 0] = True
    for period in PERIODS:
        lattice = torch.zeros_like(seen)
        lattice[::tile // period, ::tile // period] = True
        level = 10 * ratio[..., lattice & ~seen].mean(-1).log10()
        levels.append(level if 4 * period <= tile else torch.full_like(level, torch.nan))
        seen |= lattice
    return torch.stack(levels, -1)


# ----------------------------------------------------------------------------------------------------------------- CLIP
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
        found = model.get_text_features(**processor(text=prompts, padding=True, return_tensors="pt").to(DEVICE))
    else:
        found = model.get_image_features(pixel_values=pixels.to(DEVICE))
    return F.normalize(getattr(found, "pooler_output", found), dim=-1).cpu()  # a tensor in transformers 4


# --------------------------------------------------------------------------------------------- quality: Table 4, Fig. 7
def measure(files, dims, net, clip=None):
    """One pass over all folders; `files` holds a {scene name: path} for each, the distilled images first.

    Returns for each folder {"scene": (N,) indices, d: (N, d) features for each d of dims, "pattern": (N, 4) dB, "ssim":
    (N,) to the distilled image of the scene, "CLIP-IQA": (N,) if clip}, and the paths that cannot be read.
    """
    names, columns, unreadable = sorted(set().union(*files)), [{} for _ in files], []
    good_and_bad = clip and clip_embed(clip, prompts=["Good photo.", "Bad photo."])

    def look(scene):
        """All that has to be known of one scene's images: [(folder, values)]."""
        seen, source = [], None
        for folder, paths in enumerate(files):
            try:
                picture = read_image(paths[names[scene]]) if names[scene] in paths else None
            except UnreadableImage as error:
                warn(f"left out: {error}")
                unreadable.append(str(paths[names[scene]]))
                picture = None
            if picture:
                image = to_tensor(picture)
                source = image if folder == 0 else source
                known = source is not None and source.shape == image.shape
                values = {"scene": torch.tensor(scene), "inception": fid_resize(image),
                          "pattern": net_pattern(image / 127.5 - 1),
                          "ssim": ssim(image[None], source[None], 255)[0] if known else torch.tensor(torch.nan)}
                seen.append((folder, values | ({"clip": clip_pixels(clip, picture)} if clip else {})))
        return seen

    images = (item for seen in prefetch(look, range(len(names)), ahead=64) for item in seen)
    with tqdm(total=sum(map(len, files)), unit=" images", disable=None) as bar:
        while batch := list(islice(images, 32)):
            found = inception_features(net, torch.stack([values.pop("inception") for _, values in batch]), dims)
            if clip:
                embedded = clip_embed(clip, torch.stack([values.pop("clip") for _, values in batch]))
                found["CLIP-IQA"] = (100 * embedded @ good_and_bad.T).softmax(1)[:, 0]  # of "Good photo."
            for i, (folder, values) in enumerate(batch):
                for name, value in [*values.items(), *((name, x[i]) for name, x in found.items())]:
                    columns[folder].setdefault(name, []).append(value)
            bar.update(len(batch))
    return [{name: torch.stack(column) for name, column in folder.items()} for folder in columns], unreadable


def quality(args):
    folders, labels = [args.distilled, args.baseline, *args.folders], ["distilled", "baseline", *args.folders]
    files = [by_name(folder) for folder in folders]
    args.clip = args.clip or ("none" if args.features == "random" else CLIP)
    clip = None if args.clip == "none" else load_clip(args.clip)
    columns, unreadable = measure(files, args.dims, fid_inception(args.features), clip)
    counts = [len(column.get("scene", [])) for column in columns]
    for folder, count in zip(folders, counts):
        if count < 2:
            fail(f"{folder} holds {count} readable image(s); a covariance needs 2, a useful interval some hundreds")
    if min(counts) < max(args.dims):
        warn(f"{min(counts)} images are fewer than {max(args.dims)} dims: FID with more dims than images mostly "
             "measures N; compare it only at the same N")
    if len(set(counts)) > 1:
        warn(f"the folders hold different numbers of images ({', '.join(map(str, counts))}): FID falls as N grows, so "
             "FID_diff leans towards the larger reference; KID does not")

    scenes = [column["scene"] for column in columns]
    weights = bootstrap_weights(max(int(s.max()) for s in scenes) + 1, 200)
    rows = [{"images": label, "folder": folder, "N": count, "features": {}}
            for label, folder, count in zip(labels, folders, counts)]
    for d in args.dims:
        for name, values in zip(("FID", "KID"), fid_and_kid([column[d] for column in columns], scenes, weights)):
            for k, row in enumerate(rows):
                row["features"].setdefault(d, {"kind": args.features}).update({
                    f"{name}_distilled": values[0, k, 0].item(), f"{name}_baseline": values[0, k, 1].item(),
                    f"{name}_diff": interval(values[:, k, 0] - values[:, k, 1]), f"{name}_resamples": len(values) - 1})
    patterns = [average(column["pattern"], s, weights) for column, s in zip(columns, scenes)]
    for row, column, s, pattern in zip(rows, columns, scenes, patterns):
        row["SSIM"] = interval(average(column["ssim"], s, weights))
        row["CLIP-IQA"] = interval(average(column["CLIP-IQA"], s, weights)) if clip else [math.nan] * 3
        row["net_pattern_dB"] = {period: interval(gain) for period, gain in zip(PERIODS, (pattern - patterns[0]).T)}

    print_table(["images", "N", "features", "FID_distilled", "FID_baseline", "FID_diff [95 %]", "1000 KID_diff [95 %]"],
                [[row["images"], str(row["N"]), f"{f['kind']} {d}", f"{f['FID_distilled']:.4g}",
                  f"{f['FID_baseline']:.4g}", show(*f["FID_diff"]), show(*[1000 * x for x in f["KID_diff"]])]
                 for row in rows for d, f in row["features"].items()])
    print("Intervals: Bayesian bootstrap over images; resamples of FID: " + ", ".join(
        f"{f['FID_resamples']} at {d} dims" for d, f in rows[0]["features"].items()) + "; of all else: 200\n")
    # The strongest period; nan stands for a period that the images are too small for.
    strongest = [max(row["net_pattern_dB"].items(), key=lambda item: (not math.isnan(item[1][0]), item[1][0]))
                 for row in rows]
    print_table(["images", "N", "SSIM to distilled", f"CLIP-IQA ({args.clip})", "net pattern over distilled"],
                [[row["images"], str(row["N"]), show(*row["SSIM"]), show(*row["CLIP-IQA"]),
                  show(*values, f" dB at {period} px")] for row, (period, values) in zip(rows, strongest)])
    write_json(args, rows=rows, unreadable=sorted(unreadable))
    write_image(comparison(files, columns, labels), args.sheet)
    print(f"\n{args.sheet}: input | {'each folder | ' if args.folders else ''}baseline")

    best = max(rows[2:] or rows[:1], key=lambda row: row["features"][args.dims[0]]["FID_diff"][0])
    f = best["features"][args.dims[0]]
    _, low, high = f["FID_diff"]
    said = ("what an enhancement starts from" if not args.folders else
            "nearer to the baseline than to the distilled images" if low > 0 else
            "nearer to the distilled than to the baseline images" if high < 0 else
            "as near to the baseline as to the distilled images, as far as so few can tell")
    print(f"{best['images']} is {said}: FID_diff = {show(*f['FID_diff'])} (95 % interval, {f['kind']} features, "
          f"{args.dims[0]} dims, N = {best['N']})"
          + ("; no published number compares" if args.features == "random" else ""))


def comparison(files, columns, labels, count=6, side=256):
    """Contact sheet as in Fig. 1 and 7: input | each method | baseline. A folder without the scene shows any image."""
    names = sorted(set().union(*files))
    readable = [[names[i] for i in column["scene"].tolist()] for column in columns]
    shared = sorted(set(readable[0]).intersection(*readable[2:])) or readable[0]
    order, rows = [0, *range(2, len(files)), 1], []
    for i in range(min(count, len(shared))):
        scene = shared[i * len(shared) // min(count, len(shared))]
        chosen = [scene if scene in readable[k] else readable[k][i % len(readable[k])] for k in order]
        rows.append([fit(read_image(files[k][name]), side) for k, name in zip(order, chosen)])
    return contact_sheet(rows, [Path(labels[k]).name for k in order])


# --------------------------------------------------------------------------------------------------------- time: Fig. 6
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
def generate(pipe, size, steps, guidance, tokens):
    """One image from text, text encoders included; random_flux has no tokenizers and reads a prompt of zeros."""
    prompt = dict(prompt="A professional portrait of a person")
    if pipe.tokenizer is None:
        ids = torch.zeros(1, tokens, dtype=torch.long, device=pipe.device)
        prompt = dict(prompt_embeds=pipe.text_encoder_2(ids)[0],
                      pooled_prompt_embeds=pipe.text_encoder(ids[:, :77]).pooler_output)
    return pipe(**prompt, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                max_sequence_length=tokens, output_type="pt").images


def clock(work, repeats):
    """[median, fastest, slowest] seconds of `repeats` runs of work(), after one that warms up."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # kernels run behind Python's back
        seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])]


def time_head(head, size, repeats):
    """(seconds for one image as in clock(), images/s, the batch size that gives them): bf16 on CUDA, fp32 on a CPU."""
    cuda, seconds = DEVICE.type == "cuda", {}
    for batch in (1, 2, 4, 8, 16, 32) if cuda else (1,):
        x = torch.rand(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last) * 2 - 1
        try:
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=cuda):
                seconds[batch] = clock(lambda: head(x), repeats)
        except torch.OutOfMemoryError:
            break
    speed, batch = max((batch / seconds[batch][0], batch) for batch in seconds)
    return seconds[1], speed, batch


def time_all(args):
    cuda = DEVICE.type == "cuda"
    if not args.head_only and not cuda:
        fail("timing FLUX needs a CUDA GPU; --head-only times the head on a CPU")
    if any(size < 16 or size % 16 for size in args.sizes):
        fail("--sizes must be multiples of 16")
    head = (load_head(args.model) if args.model else ResnetGenerator().eval())
    head = head.to(DEVICE, memory_format=torch.channels_last)
    rows = {size: {} for size in args.sizes}
    for size in args.sizes:
        rows[size]["head"], rows[size]["head images/s"], rows[size]["batch"] = time_head(head, size, args.repeats)
    if not args.head_only:
        # One pipeline at a time: both need 58 GB of memory, one 34.
        for kind, steps, guidance, tokens in (("baseline", args.baseline_steps, 3.0, 512),
                                              ("distilled", args.distilled_steps, 0.0, 256)):
            pipe = random_flux(kind == "distilled", FLUX) if args.random_weights else load_pipeline(getattr(args, kind))
            pipe.set_progress_bar_config(disable=True)
            for size in tqdm(args.sizes, kind, disable=None):
                rows[size][kind] = clock(lambda: generate(pipe, size, steps, guidance, tokens), args.repeats)
            del pipe
            torch.cuda.empty_cache()
        for row in rows.values():
            row["distilled + head"] = [a + b for a, b in zip(row["distilled"], row["head"])]
            row["saved"] = 1 - row["distilled + head"][0] / row["baseline"][0]
    report_times(rows, args, torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} thread(s)")


def report_times(rows, args, device):
    """Fig. 6 as a table, as bars and in a sentence; `rows` is {size: {kind: seconds}}."""
    kinds = ["head"] if args.head_only else ["baseline", "distilled", "head", "distilled + head"]
    steps = "" if args.head_only else (f"; baseline {args.baseline_steps} steps, distilled {args.distilled_steps} steps"
                                       + (", random weights" if args.random_weights else ""))
    memory = peak_memory_gb(DEVICE)
    print(f"Seconds per image (fastest to slowest of {args.repeats}) on {device}{steps}; peak memory {memory:.1f} GB")
    print_table(["size", *kinds, "head images/s (batch)", "saved"],
                [[str(size), *("{:.4g} ({:.4g} to {:.4g})".format(*row[kind]) for kind in kinds),
                  f"{row['head images/s']:.4g} ({row['batch']})", f"{row['saved']:.1%}" if "saved" in row else "-"]
                 for size, row in rows.items()])
    print()
    longest = max(row[kind][0] for row in rows.values() for kind in kinds)
    for size, row in rows.items():
        for kind in kinds:
            print(f"{size:5d} {kind:16s} {'█' * max(1, round(60 * row[kind][0] / longest))} {row[kind][0]:.3g} s")
    if not args.head_only:
        print("distilled + head saves " + ", ".join(f"{row['saved']:.1%} at {size} px" for size, row in rows.items())
              + " of the baseline's time (paper: 82 %)")
    write_json(args, device=device, rows=rows, peak_memory_gb=memory)


# ------------------------------------------------------------------------------------------- diversity: Table 1, Fig. 3
# CLIP's choice among these prompts, where the paper used DeepFace. Both say how a face is perceived, no more.
ATTRIBUTES = {
    "gender": {"woman": "a portrait of a woman", "man": "a portrait of a man"},
    "age": {"18-30": "a portrait of a person between 18 and 30 years old",
            "31-50": "a portrait of a person between 31 and 50 years old",
            "50+": "a portrait of a person over 50 years old"},
    "ethnicity": {"Asian": "a portrait of an East Asian person", "Black": "a portrait of a Black person",
                  "Indian": "a portrait of an Indian person", "Latino": "a portrait of a Latino or Hispanic person",
                  "Middle Eastern": "a portrait of a Middle Eastern person", "White": "a portrait of a white person"}}


def tsne(x, perplexity=30, steps=1000, seed=0):
    """Exact t-SNE (van der Maaten and Hinton, 2008): (N, d) -> (N, 2). O(N²) a step; for up to some thousand points."""
    n = len(x)
    x = x.float()
    distance = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    # For each point the precision beta at which its neighbourhood has the perplexity asked for, by bisection.
    target = math.log(max(min(perplexity, (n - 1) / 3), 1.0))
    low, high = torch.zeros(n), torch.full((n,), torch.inf)
    beta = 1 / (x - x.mean(0)).square().sum(1).mean().clamp(min=1e-12).expand(n)
    for _ in range(60):
        p = (-beta[:, None] * distance).softmax(1)
        wide = -torch.xlogy(p, p).sum(1) > target
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * low, (low + high) / 2)
    p = (p + p.T) / (2 * n)

    # The two principal components as a start keep the large structure; the noise sets duplicates apart.
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = (x - x.mean(0)) @ axes[:2].T
    y = 1e-4 * y / y.std().clamp(min=1e-12) + 1e-6 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(n / 48, 50.0)  # Belkina et al. 2019
    for step in tqdm(range(steps), "t-SNE", disable=None):
        early = step < 250
        near = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
        pull = ((12 if early else 1) * p - near / near.sum()) * near
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient * velocity > 0, gains * 0.8, gains + 0.2).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
    return y - y.mean(0)


def diversity(args):
    clip = load_clip(args.clip)
    texts = {name: clip_embed(clip, prompts=list(choices.values())) for name, choices in ATTRIBUTES.items()}

    def look(path):
        try:
            image = read_image(path)
        except UnreadableImage as error:
            return warn(f"left out: {error}")
        return clip_pixels(clip, image), fit(image, 64)

    embeddings, thumbnails = [], []
    for folder in args.folders:
        paths = tqdm(list_images(folder), folder, unit=" images", disable=None)
        images, batches = filter(None, prefetch(look, paths, ahead=64)), []
        while batch := list(islice(images, 32)):
            pixels, small = zip(*batch)
            batches.append((clip_embed(clip, torch.stack(pixels)), small))
        if not batches:
            fail(f"{folder} holds no readable image")
        embeddings.append(torch.cat([embedded for embedded, _ in batches]))
        thumbnails.append([small for _, batch in batches for small in batch])

    rows = [{"images": folder, "N": len(x)} for folder, x in zip(args.folders, embeddings)]
    for attribute, choices in ATTRIBUTES.items():
        most = math.log2(len(choices))
        for row, x in zip(rows, embeddings):
            chosen = F.one_hot((x @ texts[attribute].T).argmax(1), len(choices))
            shares = average(chosen, torch.arange(len(x)), bootstrap_weights(len(x), 1000))
            entropy = interval((torch.special.entr(shares).sum(1) / math.log(2)))
            row[attribute] = {"shares": dict(zip(choices, shares[0].tolist())),
                              "entropy_bits": [min(max(x, 0.0), most) for x in entropy]}
        print_table([f"{attribute}, perceived", "N", *choices, f"entropy of {most:.2f} bits [95 %]"],
                    [[row["images"], str(row["N"]), *(f"{share:.1%}" for share in row[attribute]["shares"].values()),
                      show(*row[attribute]["entropy_bits"])] for row in rows])
        print()
    write_json(args, prompts=ATTRIBUTES, rows=rows)
    if sum(map(len, embeddings)) < 4:
        warn("fewer than 4 images make no map")
    else:
        write_image(thumbnail_map(embeddings, thumbnails, args.folders), args.map)
        print(f"{args.map}: t-SNE of CLIP's image embeddings")
    widest = max(rows, key=lambda row: row["ethnicity"]["entropy_bits"][0])
    print(f"{widest['images']} is the most varied in perceived ethnicity: {show(*widest['ethnicity']['entropy_bits'])} "
          f"bits (95 % interval, CLIP {args.clip} where the paper used DeepFace, N = {widest['N']})")


def thumbnail_map(embeddings, thumbnails, titles, most=2000, side=2400):
    """t-SNE of all folders together, each image drawn at its place in a frame of its folder's colour."""
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # told apart by colour-blind readers
    every = -(-sum(map(len, embeddings)) // most)
    if every > 1:
        warn(f"the map shows every {every}th image: t-SNE takes {most} at most")
    place = tsne(torch.cat([x[::every] for x in embeddings]))
    place = ((place - place.amin(0)) / (place.amax(0) - place.amin(0)).clamp(min=1e-12) * (side - 80)).int().tolist()
    sheet = Image.new("RGB", (side, side + 60), "white")
    drawn = [(image, folder) for folder, images in enumerate(thumbnails) for image in images[::every]]
    for (image, folder), (x, y) in zip(drawn, place):
        sheet.paste(ImageOps.expand(image, 4, colours[folder % len(colours)]), (x, y + 60))
    left = 10
    for folder, title in enumerate(titles):
        font = ImageFont.load_default(32)
        ImageDraw.Draw(sheet).text((left, 10), title, fill=colours[folder % len(colours)], font=font)
        left += round(font.getlength(title)) + 40
    return sheet


# ------------------------------------------------------------------------------------------------- runs: Tables 2 and 3
def runs(args):
    cells = []
    for folder in map(Path, args.folders):
        try:
            settings = json.loads((folder / "args.json").read_text())
            log = read_log(folder)
            kind, row, column = settings["attention"], settings["lambda_cycle"], settings["lr"]
            best = best_cyclegan_row(log, settings["decay_start"])
            loss, similarity = best["loss_G"], best["cycle_ssim"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            warn(f"left out: {folder} is no CycleGAN run with a finished epoch ({type(error).__name__}: {error})")
            continue
        cells.append((kind, row, column, loss, similarity, str(folder)))
    if not cells:
        fail("no folder holds the args.json and log.csv of train_cyclegan.py")
    for kind, title in (("none", "CycleGAN"), ("esa", "ESA-CycleGAN")):
        mine = [cell for cell in cells if cell[0] == kind]
        columns = sorted({cell[2] for cell in mine})
        if mine:
            print(f"{title}: best generator loss / cycle SSIM there (below 0.9 = broken)")
            print_table(["λ_cycle", *(f"lr {lr:g}" for lr in columns)],
                        [[f"{value:g}", *(", ".join(
                            f"{loss:.3f} / {similarity:.3f}{' broken' if similarity < 0.9 else ''}"
                            for _, row, lr, loss, similarity, _ in mine if (row, lr) == (value, column)) or "-"
                            for column in columns)] for value in sorted({cell[1] for cell in mine})])
            print()
    names = ("attention", "lambda_cycle", "lr", "loss_G", "cycle_ssim", "folder")
    write_json(args, rows=[dict(zip(names, cell)) for cell in cells])
    kind, row, column, loss, similarity, folder = min(cells, key=lambda cell: (cell[4] < 0.9, cell[3]))
    print(f"The best of {len(cells)} run(s) is {folder}: attention {kind}, λ {row:g}, lr {column:g}, "
          f"generator loss {loss:.3f}, cycle SSIM {similarity:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("quality", help="Table 4: FID, FID_diff, KID, CLIP-IQA, SSIM, net pattern")
    p.add_argument("folders", nargs="*", metavar="FOLDER", help="enhanced images, one folder for each method")
    p.add_argument("--distilled", required=True, metavar="DIR", help="images of the distilled model: what was enhanced")
    p.add_argument("--baseline", required=True, metavar="DIR", help="images of the baseline model: what is aimed at")
    p.add_argument("--dims", type=int, nargs="+", choices=[64, 192, 768, 2048], default=[64, 2048],
                   help="Inception layers (ours: 64 2048; the paper does not say, its values are of the size of 64)")
    p.add_argument("--features", choices=["inception", "random"], default="inception",
                   help="random: seeded random weights, which need no download and compare with nothing published")
    p.add_argument("--clip", metavar="ID", help="CLIP for CLIP-IQA: a Hub id, a local folder, or none "
                   f"(ours: {CLIP}; with --features random: none)")
    p.add_argument("--sheet", default="comparison.jpg", metavar="F", help="contact sheet (default: comparison.jpg)")
    p.add_argument("--json", metavar="F", help="write every number to this file")
    p.set_defaults(run=quality)

    p = commands.add_parser("time", help="Fig. 6: seconds per image of baseline, distilled, distilled + head")
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
    p.add_argument("--repeats", type=int, default=5, help="runs after the warm-up (ours: 5)")
    p.add_argument("--json", metavar="F", help="write every number to this file")
    p.set_defaults(run=time_all)

    p = commands.add_parser("diversity", help="Table 1 and Fig. 3: perceived gender, age, ethnicity; map of the images")
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="images, one folder for each prompt")
    p.add_argument("--clip", default=CLIP, metavar="ID", help="Hub id or local folder (ours: %(default)s)")
    p.add_argument("--map", default="map.jpg", metavar="F", help="map of thumbnails (default: map.jpg)")
    p.add_argument("--json", metavar="F", help="write every number to this file")
    p.set_defaults(run=diversity)

    p = commands.add_parser("runs", help="Tables 2 and 3: best generator loss and cycle SSIM for each λ and lr")
    p.add_argument("folders", nargs="+", metavar="RUN", help="run folders of train_cyclegan.py: runs/*")
    p.add_argument("--json", metavar="F", help="write every number to this file")
    p.set_defaults(run=runs)

    args = parser.parse_args()
    args.run(args)
