"""What the five scripts share: networks, losses, images, heads, and the parts of a training run.

Images are (N, 3, H, W) tensors in [-1, 1] wherever a network or a loss is concerned, and uint8 in files and queues.
Reading order: blocks -> networks -> losses -> images -> heads -> training runs.
"""
import argparse
import csv
import errno
import importlib.metadata
import json
import math
import os
import random
import resource
import shutil
import statistics
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save, save_file
from torch import nn
from tqdm import tqdm


def fail(message):
    """Ends the program with one line on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(message):
    """Prints once, however many processes torchrun has started."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


# ------------------------------------------------------------------------------------------------------------ blocks
class ESA(nn.Module):
    """Enhanced Spatial Attention of RFANet (Liu et al., CVPR 2020): (N, C, H, W) -> the same, times a mask in (0, 1).

    The mask looks at a wide, strided and pooled neighbourhood at a quarter of the channels, so it costs about 1 %.
    The ESA-CycleGAN paper that 2505.02255 cites spells ESA "edge feature and self-attention"; the four steps that
    2505.02255 itself describes are these.
    """

    def __init__(self, channels):
        super().__init__()
        width = max(channels // 4, 1)
        self.reduce = nn.Conv2d(channels, width, 1)
        self.stride = nn.Conv2d(width, width, 3, stride=2)
        self.convs = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1))
        self.shortcut = nn.Conv2d(width, width, 1)
        self.expand = nn.Conv2d(width, channels, 1)

    def forward(self, x):
        reduced = self.reduce(x)
        wide = self.stride(reduced)
        # The 7x7 pool needs 15x15 features; smaller maps get the largest window that fits.
        wide = F.max_pool2d(wide, (min(7, wide.shape[-2]), min(7, wide.shape[-1])), stride=3)
        wide = F.interpolate(self.convs(wide), x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.expand(wide + self.shortcut(reduced)))


class SumOverProcesses(torch.autograd.Function):
    """All-reduce that gradients pass through: the gradient of a sum over processes is the sum of their gradients."""

    @staticmethod
    def forward(context, x):
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    backward = forward


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d over the images of all processes, so that DDP computes what one process would.

    torch.nn.SyncBatchNorm does the same, but not on a CPU, where the tests and the miniature run.
    """

    def forward(self, x):
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        world_size, dtype = torch.distributed.get_world_size(), x.dtype
        x = x.to(self.weight.dtype)  # autocast hands over 16 bits, too few for a variance
        mean = SumOverProcesses.apply(x.mean((0, 2, 3))) / world_size
        x = x - mean[:, None, None]
        variance = SumOverProcesses.apply(x.square().mean((0, 2, 3))) / world_size
        with torch.no_grad():
            count = x.numel() / x.shape[1] * world_size
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


class CBAM(nn.Module):
    """Convolutional Block Attention Module (Woo et al., ECCV 2018): channel attention, then spatial attention."""

    def __init__(self, channels):
        super().__init__()
        hidden = max(channels // 16, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        self.spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), SyncedBatchNorm(1))

    def forward(self, x):
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.spatial(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)))


def upsampler(channels_in, channels_out, kind):
    """Doubles height and width: "resize" (nearest, then 3x3 conv) or "transpose" (the classic; draws checkerboards)."""
    if kind == "resize":
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels_in, channels_out, 3, padding=1))
    return nn.ConvTranspose2d(channels_in, channels_out, 3, stride=2, padding=1, output_padding=1)


def pad_to_multiple(x, multiple, least=16):
    """Pads right and bottom by reflection to sides that are multiples of `multiple` and at least `least` pixels."""
    height, width = x.shape[-2:]
    bottom = max(math.ceil(height / multiple) * multiple, least) - height
    right = max(math.ceil(width / multiple) * multiple, least) - width
    if not bottom and not right:
        return x
    # Reflection cannot pad by more than the image holds; images that small are continued by their border.
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if bottom < height and right < width else "replicate")


# ---------------------------------------------------------------------------------------------------------- networks
class ResidualBlock(nn.Module):
    """x + [ESA of] (conv, norm, ReLU, conv, norm), the residual block of the CycleGAN generator."""

    def __init__(self, channels, attention):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
            ESA(channels) if attention == "esa" else nn.Identity())

    def forward(self, x):
        return x + self.branch(x)


class ResnetGenerator(nn.Module, PyTorchModelHubMixin):
    """The CycleGAN generator (Zhu et al. 2017), with ESA in its residual blocks: (N, 3, H, W) in [-1, 1] -> the same.

    attention="none", upsample="transpose" is the classic form: 11,378,179 parameters. With global_skip the network
    predicts a residual, output = input + residual, that is zero before training.
    """

    def __init__(self, channels: int = 64, blocks: int = 9, attention: str = "esa", upsample: str = "resize",
                 global_skip: bool = False):
        super().__init__()
        c = channels
        self.global_skip = global_skip
        self.body = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, c, 7), nn.InstanceNorm2d(c), nn.ReLU(inplace=True),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.InstanceNorm2d(2 * c), nn.ReLU(inplace=True),
            nn.Conv2d(2 * c, 4 * c, 3, stride=2, padding=1), nn.InstanceNorm2d(4 * c), nn.ReLU(inplace=True),
            *[ResidualBlock(4 * c, attention) for _ in range(blocks)],
            upsampler(4 * c, 2 * c, upsample), nn.InstanceNorm2d(2 * c), nn.ReLU(inplace=True),
            upsampler(2 * c, c, upsample), nn.InstanceNorm2d(c), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(3), nn.Conv2d(c, 3, 7))
        self.apply(init_normal)
        if global_skip:
            nn.init.zeros_(self.body[-1].weight)

    def forward(self, x):
        height, width = x.shape[-2:]
        residual = torch.tanh(self.body(pad_to_multiple(x, 4)))[..., :height, :width]
        return x + residual if self.global_skip else residual


class PatchDiscriminator(nn.Module):
    """70x70 PatchGAN (Isola et al. 2017), 2,764,737 parameters: (N, 3, H, W) in [-1, 1] -> (N, 1, h, w), 1 = real."""

    def __init__(self, channels=64):
        super().__init__()
        c = channels
        layers = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for width, stride in ((c, 2), (2 * c, 2), (4 * c, 1)):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1),
                       nn.InstanceNorm2d(2 * width), nn.LeakyReLU(0.2, inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(8 * c, 1, 4, padding=1))
        self.apply(init_normal)

    def forward(self, x):
        return self.body(x)


class UNetBlock(nn.Module):
    """Residual block with CBAM at the end of its branch. GroupNorm (ours): it does not depend on the batch."""

    def __init__(self, channels_in, channels):
        super().__init__()
        groups = math.gcd(8, channels)
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1), nn.GroupNorm(groups, channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(groups, channels), CBAM(channels))
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.branch(x))


class UNet(nn.Module, PyTorchModelHubMixin):
    """The paper's paired network: six levels, residual blocks with CBAM: (N, 3, H, W) in [-1, 1] -> the same.

    Widths are ours: channels x (1, 2, 4, 8, 8, 8). global_skip as in ResnetGenerator.
    """

    def __init__(self, channels: int = 64, depth: int = 6, upsample: str = "resize", global_skip: bool = False):
        super().__init__()
        widths = [channels * min(2 ** level, 8) for level in range(depth)]
        self.multiple = 2 ** (depth - 1)
        self.global_skip = global_skip
        self.encoder = nn.ModuleList([UNetBlock(a, b) for a, b in zip([3] + widths, widths)])
        self.down = nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.up = nn.ModuleList([upsampler(b, a, upsample) for a, b in zip(widths, widths[1:])])
        self.decoder = nn.ModuleList([UNetBlock(2 * w, w) for w in widths[:-1]])
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        if global_skip:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x):
        height, width = x.shape[-2:]
        features = self.encoder[0](pad_to_multiple(x, self.multiple, least=2 * self.multiple))
        skips = []
        for down, block in zip(self.down, self.encoder[1:]):
            skips.append(features)
            features = block(down(features))
        for up, block, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips)):
            features = block(torch.cat([up(features), skip], 1))
        residual = torch.tanh(self.last(features))[..., :height, :width]
        return x + residual if self.global_skip else residual


def init_normal(module):
    """N(0, 0.02) weights and zero biases, as CycleGAN trains from. Use with `network.apply`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------ losses
def gan_loss(scores, real):
    """Least-squares GAN loss (Mao et al. 2017): mean squared distance of the scores to 1 (real) or 0 (fake)."""
    return (scores - 1.0 if real else scores).square().mean()


def gradient_loss(x, z):
    """GRAD of the paper: mean absolute difference between the finite differences of x and z, both (N, 3, H, W)."""
    difference = z - x
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def ssim(x, y, data_range):
    """Structural similarity (Wang et al. 2004), 11x11 Gaussian window, sigma 1.5, valid area: (N, C, H, W) -> (N,).

    `data_range` is the distance from the darkest to the lightest possible value: 2 for [-1, 1]. Sides below 11 pixels
    get the largest window that fits.
    """
    x, y = x.float(), y.float()
    channels, (height, width) = x.shape[1], x.shape[-2:]
    taps = torch.exp(-torch.arange(-5, 6, device=x.device).float().square() / (2 * 1.5 ** 2))

    def blur(image):
        for dim, side in ((2, height), (3, width)):
            half = (min(side, 11) - 1) // 2
            kernel = taps[5 - half:6 + half]
            shape = (1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1)
            image = F.conv2d(image, (kernel / kernel.sum()).reshape(shape).repeat(channels, 1, 1, 1), groups=channels)
        return image

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                  / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)))
    return similarity.mean((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------ images
class UnreadableImage(ValueError):
    """A file that is no image or a damaged one. The message names it."""


def list_images(folder):
    """Every image file below `folder`, sorted. Links to folders and names that begin with a dot are left out."""
    folder = Path(folder)
    if not folder.is_dir():
        fail(f"there is no folder {folder}")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}

    def unreadable_folder(error):
        fail(f"cannot read the folder {error.filename}: {error.strerror}")

    paths = [Path(root, name) for root, _, names in os.walk(folder, onerror=unreadable_folder) for name in names
             if Path(name).suffix.lower() in suffixes and not name.startswith(".")]
    if not paths:
        fail(f"the folder {folder} holds no image")
    return sorted(paths)


def gray_to_8_bits(image):
    """16-bit gray, which Pillow keeps in modes that begin with I, to 8 bits; Pillow's own conversion clips at 255."""
    return Image.fromarray(((np.asarray(image, dtype=np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))


def read_image(path):
    """The image as upright 8-bit RGB (EXIF rotation applied). Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return (gray_to_8_bits(upright) if upright.mode.startswith("I") else upright).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"{path}: {error}") from error


def image_size(path):
    """(width, height) from the file's header, None where there is none."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None


def write_atomically(path, write):
    """Calls write(temporary path), then renames: `path` holds the whole content or what it held before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:50]}.{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_image(image, path, **options):
    """Writes a PIL image in the format of the path's suffix, whole or not at all. `options` go to Pillow's save."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]

    def save(temporary):
        image.save(temporary, format=kind, **options)
        # Pillow overlooks it when a full disk takes only the first part of a JPEG; the end marker is missing then.
        if kind == "JPEG" and temporary.read_bytes()[-2:] != b"\xff\xd9":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_atomically(path, save)


def to_tensor(image):
    """PIL RGB image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(tensor):
    """uint8 (3, H, W) -> PIL RGB image."""
    return Image.fromarray(tensor.permute(1, 2, 0).cpu().contiguous().numpy())


def normalise(x):
    """uint8 -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, rounded and clamped; to_uint8(normalise(x)) == x."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(rows, titles):
    """Rows of equally sized PIL images under column titles, as one PIL image."""
    width, height = rows[0][0].size
    bar = max(12, width // 12)
    sheet = Image.new("RGB", (width * len(titles), bar + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 0), title, fill="black", font=ImageFont.load_default(bar * 0.75))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * width, bar + r * height))
    return sheet


# ------------------------------------------------------------------------------------------------------------- heads
NETWORKS = {"ResnetGenerator": ResnetGenerator, "UNet": UNet}


def save_head(head, folder):
    """Writes config.json (which network, which settings) and model.safetensors; each file is replaced whole.

    The format is PyTorchModelHubMixin's, so head.push_to_hub(...) and <network>.from_pretrained(...) work as well.
    """
    config = {"network": type(head).__name__, **head._hub_mixin_config}
    weights = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_atomically(Path(folder) / "config.json", lambda path: path.write_text(json.dumps(config, indent=2)))
    write_atomically(Path(folder) / "model.safetensors", lambda path: path.write_bytes(save(weights, {"format": "pt"})))


def load_head(path_or_hub_id):
    """The head of a folder or a Hugging Face Hub id, in eval mode, on the CPU. Reads JSON and safetensors only."""
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:  # not found, no network, gated, no valid id: each has its own class
            fail(f"there is no folder {path_or_hub_id}, and no head of that name could be fetched from the Hugging Face "
                 f"Hub: {first_line(error)}")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            fail(f"{path_or_hub_id} is no head: {name} is missing (train_unet.py and train_cyclegan.py write heads "
                 "to runs/<name>/best and runs/<name>/last)")
    try:
        config = json.loads((folder / "config.json").read_text())
        head = NETWORKS[config.pop("network")](**config)
        load_model(head, folder / "model.safetensors")
        return head.eval()
    except Exception as error:  # wrong JSON, wrong network, damaged or foreign weights
        fail(f"{path_or_hub_id} is no head of this kit or is damaged ({type(error).__name__}: {first_line(error)})")


def enhance(head, image, strength=1.0):
    """One PIL image through the head, in Python: output = image + strength * (head(image) - image), same size."""
    device = next(head.parameters()).device
    with torch.inference_mode():
        x = normalise(to_tensor(image.convert("RGB")).unsqueeze(0).to(device))
        return to_image(to_uint8(x + strength * (head(x) - x))[0])


# ----------------------------------------------------------------------------------------------------- training data
def training_files(args, paired):
    """The training images and a few held-out ones to look at: {"distilled", "baseline", "samples"} -> list of paths.

    `args.data` is a folder of generate_pairs.py; `args.distilled` and `args.baseline` are two plain folders instead.
    With `paired`, both lists hold the same relative names in the same order. `args.fraction` keeps a deterministic
    subset that depends on names only: fractions are nested, and pairs stay pairs.
    """
    if bool(args.distilled) != bool(args.baseline):
        fail("--distilled and --baseline go together: two folders of images")
    if args.distilled:
        folders, samples = {"distilled": Path(args.distilled), "baseline": Path(args.baseline)}, None
    else:
        data = Path(args.data)
        if not (data / "train").is_dir():
            fail(f"there is no training data in {data}. Get some:\n"
                 "  python generate_pairs.py --mini       a miniature, drawn in seconds; then train with --mini\n"
                 "  python generate_pairs.py --names ...  pairs by FLUX, on a GPU\n"
                 "  --distilled DIR --baseline DIR        two folders of your own images, which need not be pairs\n"
                 "  a public set for those two folders: SFHQ-T2I (Kaggle, MIT licence; 58,034 schnell and 7,273 dev "
                 "portraits)")
        folders = {domain: data / "train" / domain for domain in ("distilled", "baseline")}
        samples = data / "test" / "distilled"
    files = {domain: list_images(folder) for domain, folder in folders.items()}
    if paired:
        names = {domain: {path.relative_to(folders[domain]).with_suffix("").as_posix(): path for path in paths}
                 for domain, paths in files.items()}
        common = sorted(names["distilled"].keys() & names["baseline"].keys())
        alone = len(names["distilled"].keys() ^ names["baseline"].keys())
        if not common:
            fail(f"no name of {folders['distilled']} is in {folders['baseline']}: paired training needs pairs, "
                 "train_cyclegan.py does not")
        if alone:
            say(f"left out: {alone} images without a partner of the same name")
        files = {domain: [names[domain][name] for name in common] for domain in files}
    for domain, paths in files.items():
        keep = max(1, round(len(paths) * args.fraction))
        files[domain] = sorted(paths, key=lambda path: zlib.crc32(f"{args.seed} {path.stem}".encode()))[:keep]
    if paired:
        pairs = list(zip(files["distilled"], files["baseline"]))
        equal = [(x, y) for x, y in pairs if image_size(x) == image_size(y)]
        if not equal:
            fail("all pairs are of unequal size")
        if len(equal) < len(pairs):
            say(f"left out: {len(pairs) - len(equal)} pairs of unequal size")
        files = dict(zip(files, map(list, zip(*equal))))
    held_out = samples is not None and samples.is_dir() and any(samples.iterdir())
    files["samples"] = list_images(samples) if held_out else files["distilled"]
    return files


class TrainingImages(torch.utils.data.Dataset):
    """dataset[i, j, seed] -> {"distilled", "baseline": uint8 (3, crop, crop), "unreadable": files passed over}.

    Images are resized and centre-cropped to `size`; `crop` > 0 then cuts a random square, and every second image is
    flipped. `seed` decides both, alike for the two images of a pair and independently for unpaired ones.
    """

    def __init__(self, distilled, baseline, size, crop, paired):
        self.distilled, self.baseline, self.size, self.crop, self.paired = distilled, baseline, size, crop, paired

    def __getitem__(self, key):
        i, j, seed = key
        for unreadable in range(10):  # the next image stands in for a damaged one, so that the run goes on
            try:
                distilled = read_image(self.distilled[(i + unreadable) % len(self.distilled)])
                baseline = read_image(self.baseline[(j + unreadable) % len(self.baseline)])
            except UnreadableImage:
                continue
            return {"distilled": self.augment(distilled, seed),
                    "baseline": self.augment(baseline, seed if self.paired else seed + 1), "unreadable": unreadable}
        raise UnreadableImage(f"ten training images in a row cannot be read; {self.distilled[i]} is one")

    def augment(self, image, seed):
        rng = random.Random(seed)
        image = fit(image, self.size)
        if self.crop:
            left, top = rng.randint(0, self.size - self.crop), rng.randint(0, self.size - self.crop)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


def fit(image, size):
    """A size x size PIL image: shorter side resized to `size`, centre cut out. No resampling where it already fits."""
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


class EpochBatches(torch.utils.data.Sampler):
    """Batches of keys (i, j, seed) for TrainingImages: this rank's share of epoch `self.epoch`.

    An epoch goes once through the larger folder and repeats the smaller one, each in an order of its own (pairs: in
    one order). All of it is a function of (seed, epoch), so that a resumed run sees what an undisturbed one would.
    """

    def __init__(self, distilled, baseline, batch_size, seed, paired, rank, world_size):
        self.lengths, self.batch_size, self.seed, self.paired = (distilled, baseline), batch_size, seed, paired
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        if not len(self):
            fail(f"{max(self.lengths)} training images do not fill one batch of {batch_size} on {world_size} "
                 "process(es): a smaller --batch-size, a larger --fraction, or more images")

    def __len__(self):
        return max(self.lengths) // (self.batch_size * self.world_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        total = max(self.lengths)
        i, j = (torch.cat([torch.randperm(n, generator=generator) for _ in range(math.ceil(total / n))]).tolist()
                for n in self.lengths)
        seeds = torch.randint(2 ** 62, (total,), generator=generator).tolist()
        keys = list(zip(i, i if self.paired else j, seeds))
        for batch in range(len(self)):  # rank r of w takes every w-th key of the global batch
            start = batch * self.batch_size * self.world_size
            yield keys[start + self.rank:start + self.batch_size * self.world_size:self.world_size]


def training_loader(files, args, accelerator, paired):
    """DataLoader over this process's share of files["distilled"] and files["baseline"]; set .batch_sampler.epoch.

    It must not go through accelerator.prepare: EpochBatches shares out the images itself, so that resuming is exact.
    """
    batches = EpochBatches(len(files["distilled"]), len(files["baseline"]), args.batch_size, args.seed, paired,
                           accelerator.process_index, accelerator.num_processes)
    images = TrainingImages(files["distilled"], files["baseline"], args.size, args.crop, paired)
    cuda = accelerator.device.type == "cuda"
    return torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=args.workers, pin_memory=cuda,
                                       persistent_workers=args.workers > 0)


# ----------------------------------------------------------------------------------------------------- training runs
def add_training_flags(parser, **defaults):
    """The flags that both trainers share. `defaults` holds the values that differ between them."""
    flag = parser.add_argument
    parser.set_defaults(paper_fraction=defaults["fraction"])
    flag("--mini", action="store_true", help="train on data/mini in minutes on a CPU, from the start (ours); run "
         "generate_pairs.py --mini first")
    flag("--data", default="data", help="a folder of generate_pairs.py (ours: %(default)s)")
    flag("--distilled", metavar="DIR", help="instead of --data: a plain folder of the fast model's images (ours)")
    flag("--baseline", metavar="DIR", help="instead of --data: a plain folder of the slow model's images (ours)")
    flag("--out", default=defaults["out"], help="run folder (ours: %(default)s)")
    flag("--fraction", type=float, help=f"share of the images to train on (paper: {defaults['fraction']} of its 140,000 "
         "pairs, the default with --data; ours: 1 with --distilled and --baseline)")
    flag("--size", type=positive, default=512, help="side in pixels that images are brought to (paper: %(default)s)")
    flag("--crop", type=int, default=0, help="train on random squares of this side, 0 = whole images (ours: 0)")
    flag("--epochs", type=positive, default=defaults["epochs"], help=defaults["epochs_help"])
    flag("--lr", type=float, default=defaults["lr"], help="Adam's learning rate (paper: %(default)s)")
    flag("--batch-size", type=positive, default=defaults["batch_size"], help="images per GPU (ours: %(default)s)")
    flag("--channels", type=positive, default=64, help="width of the first layer (ours: 64, as CycleGAN has)")
    flag("--upsample", choices=["resize", "transpose"], default="resize", help="nearest + convolution, or transposed "
         "convolutions, which draw checkerboards (ours: resize)")
    flag("--global-skip", action=argparse.BooleanOptionalAction, default=False,
         help="output = input + residual, starting at the identity (ours: off)")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
         help="auto = bf16 on GPUs that have it, else fp32 (ours)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
         help="torch.compile the networks (ours: on CUDA)")
    flag("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)),
         help="processes per GPU that read images (ours: half of the cores, 8 at most)")
    flag("--seed", type=int, default=0, help="decides weights, subset, order, crops (ours: 0)")
    flag("--resume", action="store_true", help="go on from the state in --out, or start where there is none (ours)")
    flag("--benchmark", type=positive, metavar="N", help="only time N steps on images in memory; writes nothing (ours)")


def positive(text):
    """The type of flags that count something: an integer above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def parse_training_args(parser, mini):
    """parser.parse_args(), with the values of the dict `mini` as defaults when --mini is given."""
    args = parser.parse_args()
    if args.mini:
        parser.set_defaults(**mini)
        args = parser.parse_args()  # once more: flags given by hand win over the miniature's
    paper_fraction = vars(args).pop("paper_fraction")
    if args.fraction is None:  # the paper's share is one of its own dataset
        args.fraction = 1.0 if args.distilled else paper_fraction
    if not 0 <= args.crop <= args.size:
        fail(f"--crop {args.crop} does not fit into --size {args.size}")
    if not 0 < args.fraction <= 1:
        fail(f"--fraction is a share between 0 and 1, not {args.fraction}")
    return args


def memory_format(device):
    """channels_last on CUDA, where tensor cores want it. Not on a CPU: torch's instance_norm gets the gradient of a
    single channels_last image wrong there (seen in torch 2.15), and it would not be faster."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def start_accelerator(args):
    """Accelerate's Accelerator for this process: device, DDP under torchrun, mixed precision."""
    from accelerate import Accelerator
    torch.set_float32_matmul_precision("high")  # TF32 where float32 remains: tensor cores do not take full float32
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # shapes are fixed, so trying all algorithms pays
    precision, cuda = args.precision, torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and not cuda:
        fail("--precision fp16 needs a CUDA GPU")
    # Left alone, accelerate runs torchrun's processes side by side, not together, where there is no GPU.
    gloo = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=gloo)
    torch.manual_seed(args.seed)
    return accelerator


MAY_CHANGE = {"out", "resume", "workers", "compile", "benchmark"}  # between a run and its resumption


def start_run(args, files, accelerator):
    """Prepares the run folder args.out and returns (epochs done, log rows so far). Fails rather than mix two runs."""
    out = Path(args.out)
    record = {**vars(args), "images": {domain: len(paths) for domain, paths in files.items()},
              "world_size": accelerator.num_processes, "device": str(accelerator.device.type),
              "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "accelerate")}}
    state = last_state(out)
    try:
        before = json.loads((out / "args.json").read_text())
    except (OSError, ValueError):
        before = {}
    # A miniature is trained in minutes and may be trained again; nothing else is ever overwritten.
    if (state or (out / "best").exists()) and not args.resume and not (args.mini and before.get("mini")):
        fail(f"{out} holds a run or a head already: --resume goes on with a run, another --out starts anew")
    log, done = [], 0
    if state and args.resume:
        if not before:
            fail(f"cannot resume {out}: its args.json is missing or damaged")
        try:
            changed = [name for name in record if name not in MAY_CHANGE | {"versions"}
                       and before.get(name) != record[name]]
            done = int(state.name.removeprefix("epoch_"))
            log = read_log(out)[:done]
            if len(log) != done:
                raise ValueError(f"log.csv has {len(log)} of {done} epochs")
        except (OSError, ValueError) as error:
            fail(f"cannot resume {out}: {error}")
        if changed:
            fail(f"cannot resume {out}: it was made with other settings: "
                 + ", ".join(f"{name} was {before.get(name)}, is {record[name]}" for name in changed))
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if accelerator.is_main_process and not done:
        for name in ("state", "samples", "best", "last"):  # of a miniature that is trained again
            shutil.rmtree(out / name, ignore_errors=True)
        write_atomically(out / "args.json", lambda path: path.write_text(json.dumps(record, indent=2)))
    accelerator.wait_for_everyone()
    for _ in range(60):  # network file systems may show a new file late
        if (out / "args.json").exists():
            break
        time.sleep(1)
    else:
        fail(f"this node does not see {out} of the first one: --out must be a folder that all nodes share")
    return done, log


def last_state(out):
    """The newest complete state folder of a run, or None. A folder gets its name only when all of it is written."""
    states = (Path(out) / "state").glob("epoch_[0-9]*[0-9]")
    return max(states, key=lambda path: int(path.name.removeprefix("epoch_")), default=None)


def save_state(out, epoch, accelerator, extra=None):
    """Writes everything an exact resume needs to out/state/epoch_NNNN; the state before it is deleted only then.

    `extra` is a dict of this process's own tensors (each process keeps its own, such as its replay pool).
    """
    states = Path(out) / "state"  # no name is reused, so a kill at any moment leaves at least one complete folder
    temporary = states / f"epoch_{epoch:04d}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    save_file(extra or {}, temporary / f"rank_{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(temporary, states / f"epoch_{epoch:04d}")
        for old in states.iterdir():
            if old.name != f"epoch_{epoch:04d}":
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_state(out, accelerator):
    """Restores what save_state wrote and returns this process's `extra`. Fails in one line when that does not work."""
    state = last_state(out)
    try:
        accelerator.load_state(str(state))
        return load_file(state / f"rank_{accelerator.process_index}.safetensors")
    except Exception as error:  # truncated zip, safetensors header, missing file, shapes: each has its own class
        fail(f"cannot load {state}: it is damaged, or there is not enough memory ({first_line(error)})")


def best_cyclegan_row(log, decay_start):
    """The row with the lowest generator loss, the paper's measure, among those whose cycle SSIM is at least 0.9.

    Only epochs of the decay count (ours): an untrained discriminator is easily fooled, so the loss starts low.
    """
    rows = [row for row in log if row["epoch"] > decay_start] or log[-1:]
    return min(rows, key=lambda row: (row["cycle_ssim"] < 0.9, row["loss_G"]))


def read_log(out):
    """The rows of log.csv as dicts of numbers. Raises OSError and ValueError."""
    with open(Path(out) / "log.csv", newline="") as file:
        return [{name: json.loads(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_log(out, rows):
    """log.csv with one row per epoch, written whole."""
    def write(path):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(Path(out) / "log.csv", write)


def read_samples(paths, size):
    """The images at `paths`, each made size x size: (N, 3, size, size) in [-1, 1]. Unreadable ones are left out."""
    images = []
    for path in paths:
        try:
            images.append(to_tensor(fit(read_image(path), size)))
        except UnreadableImage as error:
            say(f"left out of the samples: {error}")
    if not images:
        fail("none of the sample images can be read")
    return normalise(torch.stack(images))


def write_samples(out, epoch, **columns):
    """out/samples/epoch_NNNN.jpg: one row for each image, one titled column for each keyword, in [-1, 1]."""
    rows = [[to_image(to_uint8(image.reshape(image.shape[-3:]))) for image in row] for row in zip(*columns.values())]
    write_image(contact_sheet(rows, list(columns)), Path(out) / f"samples/epoch_{epoch:04d}.jpg", quality=95)


def progress_bar(loader, args, epochs_done, accelerator):
    """One bar over all images of the run, with images/s and time left; silent where the output is no terminal."""
    images = len(loader) * args.batch_size * accelerator.num_processes
    return tqdm(total=args.epochs * images, initial=epochs_done * images, unit="img", smoothing=0.1,
                disable=None if accelerator.is_main_process else True)


def train_epoch(epoch, loader, train_step, names, accelerator, bar, out):
    """One epoch of train_step(x, y) -> stacked losses called `names`. Returns their means over all processes, and
    images/s, seconds, peak memory and the number of unreadable files, as a dict that is a row of log.csv.

    x and y are (N, 3, H, W) in [-1, 1] on the device. Ends the run when a loss is not finite, or when more than a tenth
    of the files cannot be read: the state of the epoch before stays.
    """
    loader.batch_sampler.epoch = epoch
    device, images = accelerator.device, len(loader) * loader.batch_sampler.batch_size * accelerator.num_processes
    totals, unreadable, start = torch.zeros(len(names), device=device), 0, time.perf_counter()
    for step, batch in enumerate(loader, 1):
        x, y = (normalise(batch[domain].to(device, non_blocking=True)).contiguous(memory_format=memory_format(device))
                for domain in ("distilled", "baseline"))
        totals += train_step(x, y)
        unreadable += int(batch["unreadable"].sum())
        if step % 20 == 0 or step == len(loader):  # looking at a value waits for the GPU, so not at every step
            means = (totals / step).tolist()
            if not all(map(math.isfinite, means)):
                fail(f"a loss is no longer finite in epoch {epoch + 1}; the state after epoch {epoch} is kept in "
                     f"{out}. Try a lower --lr, or --precision fp32")
            bar.set_postfix_str(f"epoch {epoch + 1}, {names[0]} {means[0]:.3f}")
        bar.update(len(x) * accelerator.num_processes)
    seconds = time.perf_counter() - start
    unreadable = int(accelerator.reduce(torch.tensor(unreadable, device=device)))
    if unreadable > 0.1 * images:
        fail(f"{unreadable} times in an epoch of {images} images a file cannot be read: check the data")
    means = (accelerator.reduce(totals, "mean") / len(loader)).tolist()
    return {**dict(zip(names, means)), "images_per_s": images / seconds, "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(device), "unreadable": unreadable}


def validation_mean(pairs, size, loss, accelerator):
    """Mean of loss(x, y) over (input, target) paths, whole images one at a time, shared out over all processes.

    An unreadable pair is left out. Every process gets the same number.
    """
    total = torch.zeros(2, device=accelerator.device)
    for pair in pairs[accelerator.process_index::accelerator.num_processes]:
        try:
            x, y = (normalise(to_tensor(fit(read_image(path), size))[None].to(accelerator.device)) for path in pair)
        except UnreadableImage:
            continue
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            total += torch.stack([loss(x, y).float(), torch.ones((), device=accelerator.device)])
    total = accelerator.reduce(total)
    mean = (total[0] / total[1]).item()
    if not math.isfinite(mean):
        fail("the validation loss is not finite, or no validation pair can be read")
    return mean


def peak_memory_gb(device):
    """Most memory so far in GB (1e9 bytes): of the tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def benchmark(train_step, args, accelerator):
    """Times args.benchmark calls of train_step on random images in memory and prints pairs/s (median), TFLOP/s, and
    their share of what one large matrix product reaches on the same device in the same precision."""
    from torch.utils.flop_counter import FlopCounterMode
    device, side = accelerator.device, args.crop or args.size
    x, y = (torch.rand(args.batch_size, 3, side, side, device=device).mul(2).sub(1)
            .contiguous(memory_format=memory_format(device)) for _ in range(2))

    def seconds(work):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        train_step(x, y)
    for _ in range(3):  # compiles, lets cuDNN choose
        seconds(lambda: train_step(x, y))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = statistics.median(seconds(lambda: train_step(x, y)) for _ in range(args.benchmark))
    memory = peak_memory_gb(device)
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    product = statistics.median(seconds(lambda: a @ b) for _ in range(10))
    precision = accelerator.mixed_precision.replace("no", "fp32")
    rate, limit = counter.get_total_flops() / step, 2 * n ** 3 / product
    accelerator.print(
        f"{args.batch_size / step * accelerator.num_processes:.2f} pairs/s at {side}x{side}, batch {args.batch_size} "
        f"on {accelerator.num_processes} x {device.type}, {precision}, compile {args.compile}: "
        f"{step * 1e3:.1f} ms a step, {counter.get_total_flops() / args.batch_size / 1e12:.3g} TFLOP a pair, "
        f"{rate / 1e12:.3g} TFLOP/s = {rate / limit:.0%} of a {n}x{n} {str(dtype)[6:]} matrix product's "
        f"{limit / 1e12:.3g}; peak memory {memory:.2f} GB")


def run_training(main, args):
    """main(args), with one line instead of a traceback for what can happen to any run."""
    try:
        main(args)
        return
    except torch.OutOfMemoryError:
        message = "out of GPU memory: try a smaller --batch-size, --crop or --size"
    except UnreadableImage as error:  # from a worker it comes with its traceback; the last line says it
        message = str(error).strip().splitlines()[-1].removeprefix("modules.UnreadableImage: ")
    except (OSError, SafetensorError) as error:
        message = f"cannot read or write: {error}"
    except KeyboardInterrupt:
        message = "interrupted"
    state = last_state(args.out)
    fail(message + (f"; {state} is complete, --resume goes on from it" if state else ""))
