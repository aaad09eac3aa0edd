"""What the scripts share: networks, losses, images, heads, training data, and the folder of a training run.

Images are float tensors (N, 3, H, W) in [-1, 1] wherever a network or a loss is concerned, and uint8 in files.
Reading order: blocks -> networks -> losses -> images -> heads -> output folders -> training data -> training runs ->
the small tools of every script (ending with one line, printing, torchrun's processes).
"""
import argparse
import errno
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import HfApi, PyTorchModelHubMixin, snapshot_download
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, TiffImagePlugin
from safetensors.torch import load_model, save
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26, 2 ** 28  # Pillow refuses a text above 1 MB
TiffImagePlugin.READ_LIBTIFF = True  # Pillow itself reads separate planes of 16 bits as noise
FORMATS = Image.registered_extensions()  # {".jpg": "JPEG", ...}


# ------------------------------------------------------------------------------------------------- blocks
class ESA(nn.Module):
    """Enhanced Spatial Attention: (N, C, H, W) -> the same, times a mask in (0, 1).

    The form of RFANet (Liu et al., CVPR 2020), whose steps are the four that section 4.2 of the paper lists: reduce and
    pool, convolve, resize back, multiply. The work that the paper cites for "ESA-CycleGAN" (Wang et al. 2021) expands
    the three letters as "edge feature and self-attention", which is something else.
    At full size it adds 3.1 % to the generator's FLOPs and 14.6 % to its parameters.
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
        # The 7x7 pool needs features of 15x15; smaller ones get the largest window that fits.
        window = min(7, wide.shape[-2]), min(7, wide.shape[-1])
        wide = self.convs(F.max_pool2d(wide, window, stride=3))
        wide = F.interpolate(wide, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.expand(wide + self.shortcut(reduced)))


class CBAM(nn.Module):
    """Convolutional Block Attention Module (Woo et al., ECCV 2018): channel attention, then spatial attention.

    Built from the equations of the CBAM paper. Its authors' code also has a BatchNorm in the spatial gate.
    """

    def __init__(self, channels):
        super().__init__()
        hidden = max(channels // 16, 1)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        # max().values, not amax(): under torch.compile and bf16 the gradient of amax is NaN (pytorch issue 186799).
        mean, largest = x.mean((2, 3), keepdim=True), x.flatten(2).max(2).values[..., None, None]
        x = x * torch.sigmoid(self.mlp(mean) + self.mlp(largest))
        maps = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.spatial(maps))


class NearestUpsample(nn.Module):
    """Doubles height and width by repetition. Unlike nn.Upsample's, its compiled gradient needs no atomic additions."""

    def forward(self, x):
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
        return pixels.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def upsampler(channels_in, channels_out, padding_mode="zeros"):
    """Doubles height and width: a 3x3 convolution after repetition, as transposed ones draw checkerboards."""
    return nn.Sequential(NearestUpsample(),
                         nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode=padding_mode))


def pad_to_multiple(x, multiple, least=16):
    """Pads right and bottom by reflection to sides that are multiples of `multiple` and at least `least` pixels."""
    height, width = x.shape[-2:]
    bottom = max(math.ceil(height / multiple) * multiple, least) - height
    right = max(math.ceil(width / multiple) * multiple, least) - width
    if not bottom and not right:
        return x
    # Reflection cannot pad by more than the image holds; images that small are continued by their border.
    return F.pad(x, (0, right, 0, bottom), mode="reflect" if bottom < height and right < width else "replicate")


def init_weights(module, std=None):
    """Zero biases and N(0, std) weights; without `std` He-normal ones, with which activations keep their scale through
    the depth where no norm sees to it. Use with `network.apply`."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        if std:
            nn.init.normal_(module.weight, 0.0, std)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


BAND_SIDES = 3, 7, 15, 31  # pixels


def box_blur(x, side):
    """Mean over squares of side x side pixels (odd), the image reflected at its border: (N, C, H, W) -> the same."""
    # Reflection cannot pad by more than the image holds; images that small are continued by their border.
    x = F.pad(x, (side // 2,) * 4, mode="reflect" if side // 2 < min(x.shape[-2:]) else "replicate")
    return F.avg_pool2d(F.avg_pool2d(x, (side, 1), stride=1), (1, side), stride=1)


def detail_bands(x):
    """x by the size of what it shows: detail below 3 px, 3 to 7, 7 to 15 and 15 to 31, and the rest; their sum is x."""
    blurred = [x, *(box_blur(x, side) for side in BAND_SIDES)]
    return [*(a - b for a, b in zip(blurred, blurred[1:])), blurred[-1]]


# ----------------------------------------------------------------------------------------------- networks
MODEL_CARD = """---
{{ card_data }}
---

# A head that gives a fast diffusion model's portraits a slow model's look

A network of the kit for [arXiv 2505.02255](https://arxiv.org/abs/2505.02255), which names the settings in `config.json`
and reads the weights in `model.safetensors`. With the kit at hand:

```
python enhance.py photos --model THIS_FOLDER_OR_REPOSITORY
```
"""
HUB = dict(pipeline_tag="image-to-image", tags=["portrait-enhancement", "arxiv:2505.02255"],
           model_card_template=MODEL_CARD)


class ResidualBlock(nn.Module):
    """x + branch(x), the residual block of the CycleGAN generator, with ESA at the end of the branch."""

    def __init__(self, channels, attention, norm):
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norm(channels), nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), norm(channels),
            ESA(channels) if attention == "esa" else nn.Identity())

    def forward(self, x):
        return x + self.branch(x)


class ResnetGenerator(nn.Module, PyTorchModelHubMixin, **HUB):
    """The generator, and the head that ships: (N, 3, H, W) in [-1, 1] -> the same, for any H and W.

    classic=True, attention="none" is the generator of CycleGAN (Zhu et al. 2017): 11,378,179 parameters. The default
    is ours and differs in four things:
    - It draws nothing: it makes the input's own detail stronger or weaker, pixel by pixel. What the network gives is a
      gain for each of detail_bands(x), the same for the three colours, and output = input + residual, the sum of gain
      times band, less its mean over wide squares. So the residual starts at zero and holds no light and no tint, which
      no discriminator would see drift; grays stay gray. With `tone`, whose discriminators see brightness, the residual
      is instead one gray share of the light: black stays black. There is no tanh: where both generators saturate one,
      G(x) = x - 1 and F(y) = y + 1 have a cycle loss of 0 and no gradient. The output may leave [-1, 1]; to_uint8
      clamps it.
    - The first features are added to those before the last layer: fine detail does not survive a quarter of the size.
    - No InstanceNorm. It can pass on strength only as a local spike, seen as a blob (StyleGAN2's explanation of its
      droplets), and ties the head to the size and content of its training images. Instead: He-normal weights, branches
      that start at a tenth, and a last layer divided by the root of its fan-in (the equalised learning rate of
      Progressive GAN, for one layer), as Adam's first steps there are too long otherwise.
    - Convolutions reflect the image at its border, because zeros there tell the network where it is, and it then paints
      the same stripes into every image; and up-sampling repeats pixels, as transposed convolutions draw checkerboards.
    """

    def __init__(self, channels: int = 64, blocks: int = 9, attention: str = "esa", classic: bool = False,
                 tone: bool = False):
        super().__init__()
        c, self.classic, self.tone = channels, classic, tone
        if classic:
            norm, padding = nn.InstanceNorm2d, "zeros"
            up = partial(nn.ConvTranspose2d, kernel_size=3, stride=2, padding=1, output_padding=1)
        else:
            norm, padding = nn.Identity, "reflect"
            up = partial(upsampler, padding_mode=padding)
        self.first = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, c, 7), norm(c), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            # down to a quarter of the size
            nn.Conv2d(c, 2 * c, 3, 2, 1, padding_mode=padding), norm(2 * c), nn.ReLU(inplace=True),
            nn.Conv2d(2 * c, 4 * c, 3, 2, 1, padding_mode=padding), norm(4 * c), nn.ReLU(inplace=True),
            # the work is done there
            *[ResidualBlock(4 * c, attention, norm) for _ in range(blocks)],
            # and up again
            up(4 * c, 2 * c), norm(2 * c), nn.ReLU(inplace=True),
            up(2 * c, c), norm(c), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(c, 3 if classic else 1 if tone else len(BAND_SIDES), 7))
        if classic:
            self.apply(partial(init_weights, std=0.02))
        else:
            self.apply(init_weights)
            self.last_gain = (1 if tone else 4) / math.sqrt(7 * 7 * c)
            nn.init.zeros_(self.last[1].weight)
            with torch.no_grad():
                for block in self.body[6:6 + blocks]:
                    block.branch[5].weight.mul_(0.1)  # its second convolution

    def forward(self, x):
        height, width = x.shape[-2:]
        features = self.first(pad_to_multiple(x, 4))
        deep = self.body(features)
        # Under autocast the features have 16 bits, too few for a tanh or for adding the input.
        if self.classic:
            return torch.tanh(self.last(deep)[..., :height, :width].to(x.dtype))
        gains = self.last_gain * self.last(deep + features)[..., :height, :width].to(x.dtype)
        if self.tone:
            return x + gains * (1 + x.mean(1, keepdim=True))
        residual = sum(gain * band for gain, band in zip(gains.split(1, 1), detail_bands(x)))
        return x + residual - box_blur(residual, BAND_SIDES[-1])


class PatchDiscriminator(nn.Module):
    """70x70 PatchGAN (Isola et al. 2017), 2,764,737 parameters: (N, 3, H, W) in [-1, 1] -> (N, 1, h, w), 1 = real.

    The classic one. On small crops its InstanceNorm makes it blind: two sets that differ in detail look alike to it.
    """

    def __init__(self, channels=64):
        super().__init__()
        c = channels
        layers = [nn.Conv2d(3, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for width, stride in ((c, 2), (2 * c, 2), (4 * c, 1)):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1), nn.InstanceNorm2d(2 * width),
                       nn.LeakyReLU(0.2, inplace=True)]
        self.body = nn.Sequential(*layers, nn.Conv2d(8 * c, 1, 4, padding=1))
        self.apply(partial(init_weights, std=0.02))

    def forward(self, x):
        return self.body(x)


class DetailDiscriminator(nn.Module):
    """Sees gray pictures as detail for its surroundings: (N, 3, H, W) in [-1, 1] -> (N, sizes) scores. Ours.

    At each size (the image's, then half of the one before) a network of four convolutions sees the two finest of
    detail_bands, divided by how strong both are around each pixel, that strength, and with `tone` also brightness; its
    scores are averaged. So it sees not only how much detail there is, which a filter can match, but where it belongs:
    texture without edges, edges without texture. What a discriminator sees, the generators bring about, and nothing
    else. Gray, because a few hundred images do not tell how colours differ, and discriminators that saw colour rewarded
    tints. No norm: InstanceNorm makes it blind on small crops.
    """

    def __init__(self, channels=64, sizes=2, tone=False):
        super().__init__()
        c, half, self.tone = channels, max(channels // 2, 1), tone
        self.bodies = nn.ModuleList(nn.Sequential(
            nn.Conv2d(3 + tone, half, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(half, c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * c, 1, 3, padding=1)) for _ in range(sizes))
        self.apply(init_weights)
        for body in self.bodies:
            body[-1].apply(partial(init_weights, std=0.02))  # scores start near 0

    def forward(self, x):
        gray, scores = x.mean(1, keepdim=True), []
        for body in self.bodies:
            fine, wide, *rest = detail_bands(gray)
            strength = (box_blur((fine + wide).square(), 7) + 0.05 ** 2).sqrt()
            seen = [fine / strength, wide / strength, strength.log() + 2, sum(rest)]  # of about one scale
            scores.append(body(torch.cat(seen[:3 + self.tone], 1)).mean((1, 2, 3)))
            gray = F.avg_pool2d(gray, 2)
        return torch.stack(scores, 1)


class UNetBlock(nn.Module):
    """Residual block with CBAM at the end of its branch. GroupNorm (ours): it does not depend on the batch."""

    def __init__(self, channels_in, channels, attention):
        super().__init__()
        groups = math.gcd(8, channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.attention = CBAM(channels) if attention == "cbam" else nn.Identity()
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x):
        # On CUDA, autocast's GroupNorm returns 32 bits; the casts keep the network in 16.
        y = self.conv1(x)
        y = F.relu(self.norm1(y).to(y.dtype))
        y = self.conv2(y)
        y = self.attention(self.norm2(y).to(y.dtype))
        return F.relu(self.shortcut(x) + y)


class UNet(nn.Module, PyTorchModelHubMixin, **HUB):
    """The paper's paired network (section 4.1), of six levels with residual connections and CBAM:
    (N, 3, H, W) in [-1, 1] -> the same, for any H and W.

    Widths of channels x (1, 2, 4, 8, 8, 8), GroupNorm and the place of CBAM are ours. With global_skip, output = input
    + residual, which starts at zero. attention="none" leaves CBAM out.
    """

    def __init__(self, channels: int = 64, depth: int = 6, attention: str = "cbam", global_skip: bool = False):
        super().__init__()
        widths = [channels * min(2 ** level, 8) for level in range(depth)]
        self.multiple = 2 ** (depth - 1)
        self.global_skip = global_skip
        self.encoder = nn.ModuleList([UNetBlock(a, b, attention) for a, b in zip([3] + widths, widths)])
        self.down = nn.ModuleList([nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.up = nn.ModuleList([upsampler(b, a) for a, b in zip(widths, widths[1:])])
        self.decoder = nn.ModuleList([UNetBlock(2 * w, w, attention) for w in widths[:-1]])
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
        y = torch.tanh(self.last(features)[..., :height, :width].to(x.dtype))
        return x + y if self.global_skip else y


# ------------------------------------------------------------------------------------------------- losses
def ssim(x, y, data_range):
    """Structural similarity (Wang et al. 2004), 11x11 Gaussian window, sigma 1.5, valid area: (N, C, H, W) -> (N,).

    `data_range` is the distance from the darkest to the lightest value: 1 for [0, 1], 255 for uint8. The luminance term
    wants images whose black is 0, so [-1, 1] will not do. Of sides below 11 pixels the middle counts.
    In float64: on flat bright areas a variance is the small difference of two large numbers.
    """
    blur = partial(gaussian_filter, sigma=1.5, truncate=3.5, axes=(-2, -1))  # truncated at 5 pixels
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for a, b in zip(x.cpu().double().numpy(), y.cpu().double().numpy()):
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a ** 2, blur(b * b) - mean_b ** 2
        covariance = blur(a * b) - mean_a * mean_b
        similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                      / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
        height, width = a.shape[1:]
        top, left = min(5, (height - 1) // 2), min(5, (width - 1) // 2)
        values.append(similarity[:, top:height - top, left:width - left].clip(max=1).mean())
    return torch.tensor(values)


# ------------------------------------------------------------------------------------------------- images
class UnreadableImage(ValueError):
    """A file that is no image or a damaged one. The message names it."""


def list_images(folder):
    """Every image file below `folder`, sorted. Notes tell what is left out, but for hidden and other tools' files."""
    if not os.path.isdir(folder):
        fail(f"there is no folder {printable(folder)}")
    # Checkpoints, thumbnails, wastebaskets and resource forks, by the names that other tools give them
    hidden = re.compile(r"(?i)\.|(@eaDir|[@#]recycle|\$RECYCLE\.BIN|#snapshot|__MACOSX)$")
    paths, left = [], defaultdict(list)
    for root, folders, names in os.walk(folder, onerror=lambda error: left["closed folders"].append(error.filename)):
        if ".enhance.json" in names and root != str(folder):
            left["folders that enhance.py made"].append(root)
            folders[:] = names[:] = []
        folders[:] = [name for name in folders if not hidden.match(name)]
        left["links to folders"] += filter(os.path.islink, map(partial(os.path.join, root), folders))
        for path in (Path(root, name) for name in names if not hidden.match(name)):
            suffix = path.suffix.lower()
            if FORMATS.get(suffix) not in Image.OPEN:
                left["files that Pillow cannot read"].append(suffix or "no suffix")
            elif not os.path.exists(path):
                left["links to nothing, or files out of reach"].append(str(path))
            else:
                paths.append(path)
    for what, found in left.items():
        if found:
            print_once(f"note: {len(found)} {what} in {printable(folder)} are left out: "
                       + printable(", ".join(sorted(set(found))[:9])))
    if not paths:
        fail(f"the folder {printable(folder)} holds no image")
    return sorted(paths)


def partners(reference, names):
    """Which files of two folders show the same thing: {one of `names`: its partner in `reference`}, relative names.

    First the same name, then the reference's with a suffix more (enhance.py makes s.bmp.png of s.bmp where there is an
    s.png too), then the same name but for the suffix. Where a rule fits several of either side, it matches none.
    """
    def stem(name):
        return os.path.splitext(name)[0]

    found = {}
    for key_of_reference, key_of_name in ((str, str), (str, stem), (stem, stem)):
        sides = defaultdict(lambda: ([], []))
        for name in set(reference) - set(found.values()):
            sides[key_of_reference(name)][0].append(name)
        for name in set(names) - set(found):
            sides[key_of_name(name)][1].append(name)
        found |= {theirs[0]: ours[0] for ours, theirs in sides.values() if len(ours) == len(theirs) == 1}
    return found


@dataclass(eq=False)
class Picture:
    """An image file as every script sees it."""
    rgb: Image.Image  # upright, 8 bits a channel
    alpha: Image.Image | None  # its opacity, likewise
    file: Image.Image  # as Pillow opened it, for what else the file holds
    notes: list  # what of the file is in none of them


def open_picture(path):
    """The Picture of a file: the one way of reading. Raises UnreadableImage.

    RGB keeps its values, whatever its colour profile: they are what a network sees and what is compared. Gray, CMYK and
    Lab become sRGB by their profile, which is then taken out of `file.info`.
    """
    notes = []
    try:
        if not Path(path).is_file():
            raise OSError("not a regular file, or a link to none")  # to open a pipe would be to wait for ever
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            tags, info = dict(getattr(image, "tag_v2", {})), image.info
            # Such as "mode=RGB planes=2 numbers=(1, 1, 1) [... args='RGB;16L']"; planes and numbers are tags of TIFF.
            kind = f"mode={image.mode} planes={tags.get(284)} numbers={tags.get(339)} {image.tile}"
            if (re.search(r"mode=(F|L[Aa] planes=2)|numbers=.[2356]|I;12|I;32", kind)
                    or "transparency" in info and re.search(";16|L;[24]", kind)
                    # Right is one channel of 8 to 16 bits, or several of 8: else Pillow misses white or makes it black.
                    or image.format == "JPEG2000" and not re.search(
                        rb"(?s)\xff\x4f\xff\x51.{36}(\x00\x01[\x07-\x0f\x87-\x8f]|..([\x07\x87]..)+\xff)", data)):
                raise ValueError("Pillow gets pixels of this kind wrong: convert it to PNG of 8 bits")
            if re.search(r"mode=I|(?<!BGR);16|SGI16|'ppm'.*, \d{4,}\)", kind):
                notes.append("more than 8 bits a channel become 8")
            # A BMP whose header says 16 bits, and which of them are opacity: Pillow reads the colours alone.
            if re.match(rb"(?s)BM.{12}[8-\xff]\x00{3}.{10}\x10\x00\x03\x00{3}.{32}(?!\x00{4})", data):
                notes.append("transparency of 16-bit BMP is left out")
            if getattr(image, "n_frames", 1) > 1:
                notes.append("animated or of several pages: the first picture only" if image.format != "MPO" else
                             "further pictures in the file, such as gain maps and previews, are left out")
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except Exception:  # as below
                info.pop("exif", None)
                notes.append("damaged EXIF is left out")
            pixels = image.convert("LA") if image.mode == "La" else image
            alpha = pixels.convert("RGBA").getchannel("A") if image.has_transparency_data else None
            if image.mode.startswith("I"):  # gray of 16 bits, whose values Pillow leaves as they are
                gray = (np.asarray(image).astype(int).clip(0, 65535) * 255 + 32767) // 65535
                pixels = Image.fromarray((255 - gray if tags.get(262) == 0 else gray).astype(np.uint8))
            return Picture(to_rgb(pixels, info, notes), alpha, image, notes)
    except Exception as error:  # Pillow's decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        reason = re.sub("cannot ident.*", "no image, damaged, or of a kind that Pillow cannot read", first_line(error))
        raise UnreadableImage(f"{printable(path)}: {reason}") from error


def to_rgb(image, info, notes):
    """A PIL image of any mode of 8 bits as RGB, by the colour profile in `info` where it is not of RGB."""
    space = (info.get("icc_profile") or b"")[16:20]  # Pillow gives None for a damaged one
    if image.mode != "LAB" and space in (b"", b"RGB ") and not (space and image.mode == "CMYK"):
        return image.convert("RGB")
    profile = io.BytesIO(info.pop("icc_profile", None))
    if image.mode == "LAB":
        profile = ImageCms.createProfile("LAB")
    try:
        return ImageCms.profileToProfile(image.convert("L") if image.mode in ("1", "LA") else image, profile,
                                         ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # as with Pillow's decoders
        notes.append("an unusable colour profile is left out")
        return image.convert("RGB")


def on_white(rgb, alpha):
    """The picture as it looks on white paper; `alpha` may be None."""
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha) if alpha else rgb


def read_image(path):
    """The picture as PIL RGB, transparent parts on white. Raises UnreadableImage."""
    picture = open_picture(path)
    return on_white(picture.rgb, picture.alpha)


def write_atomically(path, content):
    """Writes bytes to a temporary file and renames that: `path` holds all of them, or what it held before.

    The temporary name follows from the target's, so what a killed run leaves is overwritten by the next.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_image(image, path, **options):
    """Writes a PIL image in the format of the path's suffix, whole or not at all. `options` go to Pillow's save."""
    content = io.BytesIO()  # Pillow itself overlooks it when a full disk takes only the first part of a JPEG
    image.save(content, format=FORMATS[Path(path).suffix.lower()], **options)
    write_atomically(path, content.getvalue())


def write_json(path, content):
    """Writes `content`, whole or not at all. NaN and infinity, which JSON does not know, become null."""
    write_atomically(path, json.dumps(as_json(content), indent=2).encode())


def as_json(content):
    """`content` as JSON gives it back: paths as texts that say where they lead, tuples as lists."""
    return json.loads(json.dumps(content, default=os.path.realpath), parse_constant=lambda name: None)


def normalise(x):
    """uint8 -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8, rounded and clamped; to_uint8(normalise(x)) == x."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize_and_crop(image, size):
    """A size x size PIL image: shorter side resized to `size`, centre cut out. No resampling where it already fits."""
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def contact_sheet(rows, titles):
    """Rows of equally sized PIL images under column titles, as one PIL image."""
    width, height = rows[0][0].size
    bar, most = max(12, width // 12), max(1, 16383 // width)  # a WebP is no wider, so what is longer is wrapped
    if len(titles) > most:
        parts = [contact_sheet([row[i:i + most] for row in rows], titles[i:i + most])
                 for i in range(0, len(titles), most)]
        sheet = Image.new("RGB", (parts[0].width, len(parts) * parts[0].height), "white")
        for i, part in enumerate(parts):
            sheet.paste(part, (0, i * part.height))
        return sheet
    sheet = Image.new("RGB", (width * len(titles), bar + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + 2, 0), title, fill="black", font=ImageFont.load_default(bar * 0.75))
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * width, bar + r * height))
    return sheet


# -------------------------------------------------------------------------------------------------- heads
def save_head(head, folder):
    """Writes config.json (the network's settings), model.safetensors and a model card; each file is replaced whole.

    It is the format of head.save_pretrained and head.push_to_hub, so all three make what load_head can read.
    """
    weights = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    files = {"config.json": json.dumps(head._hub_mixin_config, sort_keys=True, indent=2).encode(),
             "README.md": str(head.generate_model_card()).encode(),
             "model.safetensors": save(weights, {"format": "pt"})}
    for name, content in files.items():
        write_atomically(Path(folder, name), content)


def load_head(path_or_hub_id):
    """The head of a folder or a Hugging Face Hub id, in eval mode, on the CPU. Reads JSON and safetensors only."""
    folder, no_answer = Path(path_or_hub_id), None
    if not folder.is_dir():
        try:
            # Asked first, with a time limit: without network, snapshot_download may wait for a minute or for ever.
            HfApi().model_info(str(path_or_hub_id), timeout=5)
        except Exception as error:  # not found, no network, gated, no valid id: each has its own class
            no_answer = error
        try:  # without an answer, what was fetched earlier
            folder = Path(snapshot_download(str(path_or_hub_id), allow_patterns=["config.json", "model.safetensors"],
                                            local_files_only=no_answer is not None))
        except Exception as error:
            fail(f"there is no folder {path_or_hub_id}, and no head of that name could be fetched from the Hugging "
                 f"Face Hub: {first_line(no_answer or error)}")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        fail(f"{path_or_hub_id} is not a head: {weights.name} is missing (train_unet.py and train_cyclegan.py write "
             "heads to runs/<name>/best and runs/<name>/last)")
    try:
        config = json.loads((folder / "config.json").read_text())
        head = (UNet if "depth" in config else ResnetGenerator)(**config)  # only a U-Net has a depth
        load_model(head, weights)
        return head.eval()
    except Exception as error:  # wrong JSON, wrong network, damaged or foreign weights
        if weights.read_bytes().startswith(b"version https://git-lfs"):
            fail(f"{weights} is a pointer of Git LFS, not the file itself: `git lfs pull` fetches that")
        fail(f"{path_or_hub_id} is damaged or not a head of this kit ({type(error).__name__}: {first_line(error)})")


@torch.inference_mode()
def enhance(head, image, strength=1.0):
    """One PIL image through the head, in Python: output = image + strength * (head(image) - image), same size."""
    x = normalise(pil_to_tensor(image.convert("RGB"))[None].to(next(head.parameters()).device))
    return to_pil_image(to_uint8(x + strength * (head(x) - x))[0].cpu())


def place_pipeline(pipe, device, offload=None):
    """Moves a diffusers pipeline to `device`; with `offload` layer by layer, each for as long as it works. Same pixels.

    By default (None) where the GPU has less than 40 GB: FLUX.1 in bf16 takes 36. Its 34 GB of weights then stay in the
    CPU's memory, where a GPU reads them fast only from pinned blocks, which PyTorch rounds up to about 50 GB.
    """
    device = torch.device(device)
    if offload is None and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        offload = memory < 40
        if offload:
            print_once(f"GPU of {memory:.0f} GB: --offload, which keeps the weights in the CPU's memory (about 50 GB a "
                       "GPU for FLUX.1) and is slower; --no-offload for small models")
    if not offload:
        return pipe.to(device)
    # On a stream of its own the next layer travels while one works.
    pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")
    return pipe


# ------------------------------------------------------------------------------------------ output folders
def check_settings(path, new, may_change=(), started=True):
    """What differs between the settings `new` and those kept in the JSON file `path`: {name: (old, new)}.

    None where there is no such file. Once something is `started`, only what `may_change` names can differ, and anything
    else ends the program: two settings would mix in one folder.
    """
    if not Path(path).exists():
        return None
    try:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
        changed = {name: (old.get(name), value) for name, value in as_json(new).items() if old.get(name) != value}
    except (OSError, ValueError, AttributeError) as error:  # a crash of the machine may leave a file empty
        fail(f"{path} is damaged or not of this kit ({first_line(error)}): restore it, or choose another --out")
    refused = [f"--{name.replace('_', '-')} was {before}, is {now}"
               for name, (before, now) in changed.items() if name not in may_change]
    if started and refused:
        fail(f"{Path(path).parent} was begun with other settings ({'; '.join(refused)}): the same settings continue "
             "it, another --out starts a new one")
    return changed


def wait_for_file(path, ready=Path.exists):
    """Returns when `ready(path)`: network file systems may show late what the first process writes."""
    for _ in range(1200):
        if ready(path):
            return
        time.sleep(0.1)
    fail(f"the first process's {printable(path)} is not seen here: --out must be a folder that all nodes share")


LOCKS = []  # open files, each with a lock that ends with this process


def lock_folder(folder):
    """Makes sure that no other process works in `folder`; torchrun's processes have a lock each."""
    path = Path(folder, f".lock{RANK or ''}")
    path.parent.mkdir(parents=True, exist_ok=True)
    LOCKS.append(open(path, "a"))
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(LOCKS[-1].fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            # Not flock: that would live on in the workers of a DataLoader, which outlast a killed process.
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            fail(f"another process is at work in {folder}: wait until it has ended, or choose another --out")
        print_once(f"note: {folder} cannot be locked ({error.strerror}): start no second run in it")


# ------------------------------------------------------------------------------------------ training data
def training_files(args, paired):
    """The images to train on and some held-out ones to look at: {"distilled", "baseline", "samples": list of paths}.

    `args.data` is a folder of generate_pairs.py; `args.distilled` and `args.baseline` are two plain folders instead.
    With `paired`, both lists hold partners in the same order. `args.fraction` keeps a deterministic subset that depends
    on names only: fractions are nested, and pairs stay pairs.
    """
    if bool(args.distilled) != bool(args.baseline):
        fail("--distilled and --baseline go together: two folders of images")
    train, held_out = Path(args.data, "train"), Path(args.data, "test", "distilled")
    folders = {domain: getattr(args, domain) or train / domain for domain in ("distilled", "baseline")}
    if not args.distilled and not train.is_dir():
        fail(f"there is no training data in {args.data}. Get some:\n"
             "  python generate_pairs.py --mini       a miniature, in seconds; then train with --mini\n"
             "  python generate_pairs.py --names ...  pairs by FLUX, on a GPU\n"
             "  --distilled DIR --baseline DIR        two folders of your own images, which need not be pairs\n"
             "  a public set for those two folders: SFHQ-T2I (Kaggle, MIT licence; 58,034 schnell and 7,273 dev "
             "portraits)")
    files = {domain: list_images(folder) for domain, folder in folders.items()}
    x, y, test, out = map(os.path.realpath, (*folders.values(), held_out.parent, args.out))
    for inner, outer in [*permutations((x, y, out), 2), (out, test)]:
        if Path(inner).is_relative_to(outer):
            fail(f"{printable(inner)} is or lies in {printable(outer)}: distilled images, baseline images, test images "
                 "and --out need folders of their own, or the ones would be taken for the others")
    if paired:
        x, y = ({path.relative_to(folders[domain]).as_posix(): path for path in files[domain]} for domain in folders)
        pairs = partners(y, x)
        if not pairs:
            fail(f"no name of {folders['distilled']} is in {folders['baseline']}: paired training needs pairs, "
                 "train_cyclegan.py does not")
        alone = (x.keys() | y.keys()) - pairs.keys() - set(pairs.values())
        if alone:
            print_once(f"left out: {len(alone)} images without a partner that is theirs alone, such as {min(alone)}")
        partner = {x[name]: y[pairs[name]] for name in sorted(pairs)}
        files["distilled"] = list(partner)

    def subset(paths):
        order = sorted(paths, key=lambda path: zlib.crc32(f"{args.seed} ".encode() + os.fsencode(path.stem)))
        return order[:max(1, round(len(paths) * args.fraction))]

    files["distilled"] = subset(files["distilled"])
    files["baseline"] = [partner[path] for path in files["distilled"]] if paired else subset(files["baseline"])
    found = not args.distilled and any(held_out.glob("*"))
    files["samples"] = list_images(held_out) if found else files["distilled"]
    return files


@dataclass(eq=False)
class TrainingImages(Dataset):
    """dataset[i] -> (distilled, baseline, unreadable): two uint8 (3, side, side), and how many files were passed over.

    An epoch goes once through the larger set. Unpaired, the other image is drawn at random from the smaller one.
    Images are brought to size x size; `crop` > 0 then cuts a random square, and every second image is flipped. With
    `zoom`, the square has any side from `crop` to `size` and is reduced to `crop`. All of it is drawn from a generator
    seeded by (seed, epoch, i): a resumed run sees what an undisturbed one would, with any number of workers. Set
    `epoch` before each epoch.
    """

    distilled: list
    baseline: list
    size: int
    crop: int
    seed: int
    paired: bool
    zoom: bool = False
    epoch: int = 0

    def __len__(self):
        return max(len(self.distilled), len(self.baseline))

    def __getitem__(self, i):
        rng = random.Random(f"{self.seed} {self.epoch} {i}")
        for unreadable in range(10):  # the next image stands in for a damaged one, so that the run goes on
            a = b = (i + unreadable) % len(self)
            if not self.paired and len(self.distilled) < len(self):
                a = rng.randrange(len(self.distilled))
            elif not self.paired:
                b = rng.randrange(len(self.baseline))
            try:
                images = read_image(self.distilled[a]), read_image(self.baseline[b])
            except UnreadableImage as error:
                if self.epoch == 0:  # named once; log.csv counts them in every epoch
                    print(f"passed over: {error}", file=sys.stderr)
                continue
            state = rng.getstate()
            distilled = self.augment(images[0], rng)
            if self.paired:  # the same crop and flip for both images of a pair
                rng.setstate(state)
            return distilled, self.augment(images[1], rng), unreadable
        raise UnreadableImage("ten training images in a row cannot be read; "
                              f"{printable(self.distilled[a])} or its partner is one")

    def augment(self, image, rng):
        image = resize_and_crop(image, self.size)
        if self.crop:
            side = round(self.crop * (self.size / self.crop) ** rng.random()) if self.zoom else self.crop
            left, top = rng.randint(0, self.size - side), rng.randint(0, self.size - side)
            image = image.resize((self.crop, self.crop), box=(left, top, left + side, top + side))  # bicubic
        return pil_to_tensor(ImageOps.mirror(image) if rng.random() < 0.5 else image)


def training_loader(files, args, accelerator, paired):
    """DataLoader over this process's share of the images; start_epoch tells it each epoch's number.

    Kept out of accelerator.prepare: torch's sampler gives 1, 2 and 4 processes the same global batches.
    """
    dataset = TrainingImages(files["distilled"], files["baseline"], args.size, args.crop, args.seed, paired,
                             zoom=getattr(args, "tone", False))
    sampler = DistributedSampler(dataset, accelerator.num_processes, accelerator.process_index, shuffle=True,
                                 seed=args.seed, drop_last=True)
    loader = DataLoader(dataset, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True,
                        pin_memory=accelerator.device.type == "cuda")
    if not len(loader):
        fail(f"{len(dataset)} training images do not fill one batch of {args.batch_size} on "
             f"{accelerator.num_processes} process(es): a smaller --batch-size, a larger --fraction, or more images")
    return loader


def start_epoch(epoch, loader, args, accelerator):
    """All that is random in an epoch follows from seed, epoch and process: a continued run draws the same again."""
    loader.sampler.set_epoch(epoch)  # the order
    loader.dataset.epoch = epoch  # partners, crops and flips
    random.seed(f"{args.seed} {epoch} {accelerator.process_index}")  # anything else
    torch.manual_seed(random.getrandbits(63))


def to_network(images, device):
    """uint8 (N, 3, H, W) from the loader -> float in [-1, 1] on the device, channels_last as tensor cores want it."""
    images = normalise(images.to(device, non_blocking=True))
    return images.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------ training runs
def between(least, most):
    """A type of flags: numbers of the kind of `least`. argparse adds which flag refuses."""
    def number(text):
        if least <= type(least)(text) <= most:
            return type(least)(text)
        raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
    return number


# Whole numbers from 1 and from 0, numbers from 0, and shares of a whole, which are above 0
positive, whole = between(1, 2 ** 31 - 1), between(0, 2 ** 63 - 1)
number, share = between(0.0, sys.float_info.max), between(sys.float_info.min, 1.0)


def training_parser(doc):
    """A parser of flags that begins with those of both trainers; parse_training_args adds their last ones."""
    parser = argparse.ArgumentParser(description=doc, usage="%(prog)s [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--mini", action="store_true", help="train on data/mini in minutes on a CPU (ours)")
    flag("--data", type=Path, default="data", help="a folder of generate_pairs.py (ours: %(default)s)")
    flag("--distilled", type=Path, metavar="DIR", help="instead of --data: the fast model's images (ours)")
    return parser


def parse_training_args(parser, mini, paper_fraction):
    """What the flags of `parser` and those on seed and machine are on the command line. --mini sets other defaults."""
    flag = parser.add_argument
    flag("--seed", type=whole, default=0, help="decides weights, subset, order, crops (ours: 0)")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto",
         help="auto = bf16 on GPUs that have it, else fp32 (ours)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
         help="torch.compile the networks (ours: on CUDA)")
    flag("--workers", type=whole, default=2, help="processes per GPU that read images (ours: 2)")
    args = parser.parse_args()
    if args.mini:
        parser.set_defaults(**mini)
        args = parser.parse_args()  # once more: flags given by hand win over the miniature's
        use_threads(1)  # its layers are too small to share
    if args.fraction is None:  # the paper's share is one of its own dataset
        args.fraction = 1.0 if args.distilled else paper_fraction
    if args.crop > args.size:
        fail(f"--crop {args.crop} does not fit into --size {args.size}")
    # The smallest side that leaves something of the image at the bottom of the discriminators, LPIPS, and the U-Net
    side, least = args.crop or args.size, max(24, 2 ** (getattr(args, "depth", 1) - 1))
    if side < least:
        fail(f"--{'crop' if args.crop else 'size'} {side} is too small: these networks train on {least} pixels or more")
    return args


def start_accelerator(args):
    """(accelerator, autocast): accelerate's Accelerator for device and DDP, and the context to compute losses in.

    args.precision becomes what "auto" stands for here.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        print_once(f"note: {name} is passed over")  # it would change the gradient, or ask for a package
        del os.environ[name]
    from accelerate import Accelerator
    torch.set_float32_matmul_precision("high")  # TF32 where float32 remains: tensor cores do not take full float32
    torch.backends.cudnn.benchmark = True  # shapes are fixed, so trying all algorithms pays
    # torch.compile in one graph: cut at DDP's buckets, the U-Net gets wrong gradients in PyTorch 2.11.
    torch._dynamo.config.optimize_ddp = False
    if args.precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if has_bf16 else "fp32"
    # Left alone, accelerate runs torchrun's processes side by side, not together, where there is no GPU; and its own
    # mixed precision would put an autocast into the networks.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    torch.manual_seed(args.seed)
    return accelerator, partial(torch.autocast, accelerator.device.type, torch.bfloat16, args.precision == "bf16")


def start_from(args, networks):
    """Gives `networks`, {name: network}, other weights to start from, where a new run has --init.

    The first one takes the weights of the head there, a folder or Hub id. Where it is a run folder, all of them take
    those of its last state. Fails, naming the setting, where the head there is another network.
    """
    path = args.init
    if not path or Path(args.out, "log.csv").exists():
        return
    log, head = read_log(path), next(iter(networks.values()))
    there = load_head(Path(path, "last") if log else path)
    other = dict(sorted(there._hub_mixin_config.items() - head._hub_mixin_config.items()))
    if other:
        fail(f"--init {path} is another network, a {type(there).__name__} with {other}: give the flags that made it")
    if log:
        load_state(path, log, networks)
    else:
        head.load_state_dict(there.state_dict())
    print_once(f"starts from {path}" + f", all networks after epoch {len(log)}" * bool(log))


def fingerprint(files):
    """Tells one set of training images from another by numbers, names and some sizes, wherever it lies."""
    both = files["distilled"], files["baseline"]
    facts = [[path.name for path in paths] + [path.stat().st_size for path in paths[:1000] if path.is_file()]
             for paths in both]
    return f"{len(both[0])} and {len(both[1])} files, {zlib.crc32(json.dumps(facts).encode()):08x}"


# What changes how a run goes on, and not what it makes, may change when it is continued. Folders may move: what counts
# is the images in them, of which start_run itself speaks.
MAY_CHANGE = {"epochs", "patience", "batch_size", "lr", "lambda_cycle", "r1", "workers", "compile", "precision",
              "world_size", "device", "torch", "data", "distilled", "baseline", "images"}
RUN_FOLDER = {"args.json", "log.csv", "samples", "best", "last", "state"}


def start_run(args, files, accelerator, parts):
    """Locks the run folder, records the settings there, and returns its log so far: [] for a new run.

    `parts` take the state after the last epoch of an unfinished run. As long as no epoch is finished, new settings
    replace old ones. Later, those of MAY_CHANGE may change, and args.json tells from which epoch on; with others the
    program ends rather than mix two runs.
    """
    out, kept = Path(args.out), Path(args.out, "args.json")
    settings = vars(args) | {"images": fingerprint(files), "world_size": accelerator.num_processes,
                             "device": accelerator.device.type, "torch": torch.__version__}
    del settings["out"], settings["mini"]
    key = torch.tensor([zlib.crc32(settings["images"].encode())], device=accelerator.device)
    if (accelerator.gather(key) != key).any():
        fail(f"the processes see different images; process {accelerator.process_index} sees {settings['images']}")
    if {path.name for path in out.glob("[!.]*")} - RUN_FOLDER and not (out / "log.csv").exists():
        fail(f"{printable(out)} is not empty and not a run: choose another --out")
    lock_folder(out)
    log = read_log(out)
    changed = check_settings(kept, settings, MAY_CHANGE, started=bool(log))
    if log and changed is None:
        fail(f"{kept} is missing: restore it, or start a new run from these weights with --init {out} --out ANOTHER")
    if log and "images" in changed:
        fail(f"{out} was begun with other images (numbers of files, checksum of names and sizes: "
             f"{' -> '.join(changed['images'])}): put those back, or start a new run from its weights with "
             f"--init {out} --out ANOTHER")
    if len(log) >= args.epochs:
        return log
    settings["changes"] = {}
    if log:
        load_state(out, log, parts)
        words = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        print_once(f"continues after epoch {len(log)} with "
                   f"{words or 'the same settings: bit for bit as if it had not stopped'}")
        settings["changes"] = json.loads(kept.read_text())["changes"]
        if changed:
            settings["changes"].setdefault(f"epoch {len(log) + 1}", {}).update(changed)
    if accelerator.is_main_process:
        write_json(kept, settings)
    accelerator.wait_for_everyone()
    wait_for_file(kept)
    return log


def save_epoch(out, log, parts, accelerator):
    """Writes all that an exact continuation needs, then the log, whose length says that it is whole.

    `parts` are networks and optimizers, {name: part}, the same on every process. Even and odd epochs have a file each,
    so that one is whole at any moment.
    """
    if accelerator.is_main_process:
        state = io.BytesIO()  # into a file, torch.save would not tell a full disk from a bug
        torch.save({name: part.state_dict() for name, part in parts.items()}, state)
        write_atomically(Path(out, f"state/{len(log) % 2}.pt"), state.getvalue())
        names = {name: name for row in log for name in row}  # rows of an earlier version may have fewer
        text = "".join(",".join(str(row.get(name, "")) for name in names) + "\n" for row in [names, *log])
        write_atomically(Path(out, "log.csv"), text.encode())
    accelerator.wait_for_everyone()


def load_state(out, log, parts):
    """Restores what save_epoch wrote into `parts`, or some of them; optimizers bring their old learning rate along."""
    file, before = Path(out, f"state/{len(log) % 2}.pt"), Path(out, f"state/{(len(log) - 1) % 2}.pt")
    load = partial(torch.load, map_location="cpu", weights_only=True)  # runs no code that the file may hold
    try:
        state = load(file)
    except Exception as error:  # cut short, missing, no such file: each has its own class
        advice = f"--init {Path(out, 'last')} --out ANOTHER starts a new run from the head"
        with suppress(Exception):
            load(before)
            advice = f"{before} is whole: without the last line of log.csv, the same command goes on from there"
        fail(f"cannot load {file}: it is damaged, or too large for the memory. {advice} ({first_line(error)})")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:  # as above
        fail(f"{file} was made with another --size or --crop ({first_line(error)})")


def epoch_row(epoch, losses, unreadable, start, loader, accelerator, args):
    """A row of log.csv: the mean of each loss over the epoch and all processes, pairs/s, seconds, and peak memory.

    `losses` maps names to sums over this process's steps, `start` is the epoch's time.perf_counter(). Ends the run
    when a loss is not finite, or when more than a tenth of the files cannot be read: the state before stays.
    """
    means = {name: accelerator.reduce(total, "mean").item() / len(loader) for name, total in losses.items()}
    unreadable = int(accelerator.reduce(torch.tensor(unreadable, device=accelerator.device)))
    seconds = time.perf_counter() - start  # after .item(), which waits for the GPU
    pairs = len(loader) * loader.batch_size * accelerator.num_processes
    if not all(map(math.isfinite, means.values())):
        fail(f"a loss is no longer finite in epoch {epoch}: the same command with a lower --lr"
             f"{' or with --precision fp32' * (args.precision != 'fp32')} tries that epoch again")
    if unreadable > 0.1 * pairs:
        fail(f"{unreadable} times in an epoch of {pairs} pairs a file cannot be read: check the data")
    row = {"epoch": epoch, **means, "pairs_per_s": pairs / seconds, "seconds": seconds, "unreadable": unreadable}
    if accelerator.device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


class DamagedLog(ValueError):
    """A log.csv that cannot be understood. The message names it and says what to do."""


def read_log(out):
    """The rows of log.csv as dicts of numbers, [] where there is none yet. Raises DamagedLog."""
    path = Path(out, "log.csv")
    if not path.exists():
        return []
    try:
        names, *rows = (line.split(",") for line in path.read_text().splitlines())
        return [{name: json.loads(cell) for name, cell in zip(names, row, strict=True) if cell} for row in rows]
    except ValueError as error:  # a crash of the machine may leave a file empty
        raise DamagedLog(f"{path} is damaged ({first_line(error)}): restore it, or start a new run from the head with "
                         f"--init {Path(out, 'last')} --out ANOTHER") from error


def read_together(groups, size):
    """Yields the images of each tuple of paths, (k, 3, size, size) in [-1, 1], but of those with a damaged file."""
    for paths in groups:
        try:
            images = [pil_to_tensor(resize_and_crop(read_image(path), size)) for path in paths]
        except UnreadableImage as error:
            print_once(f"left out: {error}")
        else:
            yield normalise(torch.stack(images))


def write_samples(out, epoch, **columns):
    """out/samples/epoch_NNNN.jpg: one titled column for each keyword, one row for each of its first 8 images."""
    rows = [[to_pil_image(to_uint8(image).cpu()) for image in row] for row in list(zip(*columns.values()))[:8]]
    write_image(contact_sheet(rows, list(columns)), Path(out, f"samples/epoch_{epoch:04d}.jpg"), quality=95)


class Lines:
    """A stream for tqdm where there is no terminal: each state of the bar becomes a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


def progress_bar(*what, **options):
    """tqdm's bar over `what`, with its speed and the time left, on the first process; without a terminal, a line every
    30 s."""
    if not getattr(sys.stderr, "isatty", bool)():
        options |= dict(file=Lines(), mininterval=30, delay=30, miniters=1, leave=False)
    return tqdm(*what, disable=RANK > 0, **options)


# A pattern in an error's text -> what it means for a user
KNOWN_ERRORS = {
    "out of memory|can't allocate memory|MemoryError":
        "out of memory: a smaller --batch-size continues this run, a smaller --crop or --size another",
    r"DataLoader worker \(pid|</torch|ancdata": "a process that reads images has died, mostly for too little memory, "
        "too little /dev/shm or too few open files (`ulimit -n`): use fewer --workers (0: none)",
    "Connection (closed|reset) by peer|ncclRemoteError":
        "another process of this run has ended; its own message says why"}


def run_training(main, args):
    """main(args), with one line instead of a traceback for what can happen to any run."""
    try:
        main(args)
        # Not in main: a DDP wrapper that outlasts its process group can hang for ever, on gloo in PyTorch 2.11.
        wait_for_ranks()
        return
    except DamagedLog as error:
        fail(error)
    except torch._dynamo.exc.TorchDynamoException as error:
        message = f"torch.compile does not work here ({first_line(error)}): use --no-compile"
    except (UnreadableImage, OSError) as error:  # a worker's comes with its traceback above its text
        message = "cannot read or write: " + str(error).splitlines()[-1].removeprefix("modules.UnreadableImage: ")
    except (RuntimeError, MemoryError) as error:
        message = next((advice for sign, advice in KNOWN_ERRORS.items() if re.search(sign, repr(error))), None)
        if message is None:
            raise
    except KeyboardInterrupt:
        message = "interrupted"
    fail(f"{message}. The same command continues after the last whole epoch in {args.out}")


# ------------------------------------------------------------------- the small tools of every script
def fail(message):
    """Ends the program with one line on stderr and exit code 1: for what a user can mend."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """The first line of an exception's message; where that only announces the next one, both."""
    return re.sub(r":\s+", ": ", str(error).strip() or type(error).__name__).splitlines()[0]


def printable(path):
    """A path for the terminal: control characters and broken encodings are escaped."""
    return str(path) if str(path).isprintable() else repr(str(path))


# torchrun sets these for each process: its number, that number on its node, and how many there are. Other launchers set
# RANK, WORLD_SIZE and MASTER_ADDR. Else they are left over, as in a job's shell, and would cost half of the images.
if not dist.is_torchelastic_launched() and not {"MASTER_ADDR", "RANK", "WORLD_SIZE"} <= os.environ.keys():
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.pop(name, None) is not None:
            print(f"note: {name} is passed over, as torchrun did not start this process", file=sys.stderr)
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
if WORLD_SIZE > 1 and not dist.is_torchelastic_launched():
    print(f"process {RANK} waits for all {WORLD_SIZE}, as RANK, WORLD_SIZE and MASTER_ADDR say", file=sys.stderr)


# An OpenMP thread that waits for another spins, and that one may wait for a core: beside one busy program, two threads
# on two cores had a fifth of the speed of one, and with small layers a fiftieth. So by default one core stays free.
def use_threads(number=max(1, torch.get_num_threads() - 1)):
    """Lets PyTorch use this many threads, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(number)


use_threads()


def print_once(message):
    """Prints on the first process only."""
    if RANK == 0:
        print(message)


class SafeStream:
    """A stream of text for people that never fails: what is printed must not cost what is made."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # Python's is None where there is none, as with pythonw

    def write(self, text):
        try:
            print(text, end="", file=self.stream, flush=True)
        except UnicodeEncodeError:  # a letter that the stream does not know
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:  # the reader has gone, the disk is full, the stream is closed
            self.__init__(None)
            print(f"note: what is printed from here on is lost: {first_line(error)}", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def make_printing_safe():
    """The first thing that each script does."""
    while os.open(os.devnull, os.O_RDWR) < 3:  # else the next file to be opened takes the place of a closed stderr
        pass
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)


def wait_for_ranks():
    """Returns when all of torchrun's processes are here: as soon as one ends with an error, it stops the others."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=99))
    if dist.is_initialized():
        dist.barrier(device_ids=[LOCAL_RANK] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()  # not at the interpreter's end, where gloo's threads may wait for Python's lock
