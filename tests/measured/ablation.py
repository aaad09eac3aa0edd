"""A cell of the ablations in assets/TRIALS.md: trains on the miniature with one part changed, prints a line of JSON.

    python generate_pairs.py --mini
    OMP_NUM_THREADS=1 python tests/measured/ablation.py "no long skip" 0         # unpaired: a part of PARTS, and a seed
    OMP_NUM_THREADS=1 python tests/measured/ablation.py unet 0 grad 1            # paired: --structure, a shift in px

The unpaired head trains for 7 epochs of 64 steps, in which the whole schedule runs; the paired one as with --mini.
PSNR in dB and SSIM are to the true baseline images, detail is the strength of fine detail over theirs.
"""
import copy
import json
import math
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import modules
import train_cyclegan
import train_unet
from evaluate import against_baseline

DATA = Path("data/mini")


def colour_residual():
    def patched(self, *args, init=modules.ResnetGenerator.__init__, **settings):
        init(self, *args, **settings)
        self.last[1] = torch.nn.Conv2d(self.last[1].in_channels, 3, 7)
        torch.nn.init.zeros_(self.last[1].weight)
        torch.nn.init.zeros_(self.last[1].bias)
    modules.ResnetGenerator.__init__ = patched


def no_long_skip():
    modules.ResnetGenerator.forward = lambda self, x: x + self.last_gain * self.last(self.body(self.first(x)))


def discriminator(bands, pool):
    """Another forward pass of DetailDiscriminator at one size, as crops of 32 px have."""
    def patched(self, x):
        scores = self.bodies[0](bands(x))
        return scores.mean((1, 2, 3))[:, None] if pool else scores.flatten(1)
    modules.DetailDiscriminator.forward = patched


def kit_bands(x):
    gray = x.mean(1, keepdim=True)
    fine, wide = modules.box_blur(gray, 3), modules.box_blur(gray, 9)
    return torch.cat([4 * (gray - fine), 2 * (fine - wide)], 1)


def colour_bands():
    def patched(self, *args, init=modules.DetailDiscriminator.__init__):
        init(self, *args)
        self.bodies[0][0] = torch.nn.Conv2d(6, self.bodies[0][0].out_channels, 3, padding=1)
        self.bodies[0][0].apply(modules.init_weights)
    modules.DetailDiscriminator.__init__ = patched

    def bands(x):
        fine, wide = modules.box_blur(x, 3), modules.box_blur(x, 9)
        return torch.cat([4 * (x - fine), 2 * (fine - wide)], 1)
    discriminator(bands, pool=True)
    colour_residual()


def least_squares():
    adversarial, discriminate = train_cyclegan.adversarial_loss, train_cyclegan.discriminator_loss
    train_cyclegan.adversarial_loss = lambda D, fake, real, classic: adversarial(D, fake, real, True)
    train_cyclegan.discriminator_loss = lambda D, real, fake, classic: discriminate(D, real, fake, True)


def penalty_on_real_images():
    both = train_cyclegan.gradient_penalty
    train_cyclegan.gradient_penalty = lambda D, images: both(D, images[:len(images) // 2])


PARTS = {"nothing": lambda: None, "no long skip": no_long_skip, "no gradient penalty": ["--r1", "0"],
         "no bands": lambda: discriminator(lambda x: x.mean(1, keepdim=True).expand(-1, 2, -1, -1), pool=True),
         "colour": colour_bands, "a residual of three channels": colour_residual,
         "one score a patch": lambda: discriminator(kit_bands, pool=False), "least squares": least_squares,
         "penalty on real images only": penalty_on_real_images, "no ESA": ["--attention", "none"]}


def shifted(pixels):
    """A copy of the data, whose distilled training images are moved by so many pixels, signs at random."""
    if not pixels:
        return DATA
    folder = DATA.with_name(f"shifted{pixels}")
    for path in modules.list_images(DATA):
        image, rng = Image.open(path), random.Random(path.name)
        if "train/distilled" in path.as_posix():
            left, top = pixels * (1 + rng.choice((-1, 1))), pixels * (1 + rng.choice((-1, 1)))
            wide = Image.fromarray(np.pad(np.asarray(image), [(pixels, pixels)] * 2 + [(0, 0)], "reflect"))
            image = wide.crop((left, top, left + image.width, top + image.height))
        modules.write_image(image, folder / path.relative_to(DATA))
    return folder


def measure(head):
    """{measure: value} over the test portraits, from 8-bit to 8-bit images."""
    found = Counter()
    for x, y in zip(*(modules.list_images(DATA / "test" / domain) for domain in ("distilled", "baseline"))):
        z, truth = modules.enhance(head, modules.read_image(x)), modules.read_image(y)
        found.update(against_baseline(pil_to_tensor(z), pil_to_tensor(truth)) | {"images": 1})
    return {"PSNR": found["PSNR_baseline"] / found["images"], "SSIM": found["SSIM_baseline"] / found["images"],
            "detail": math.sqrt(found["fine"] / found["fine_baseline"])}


def main(part, seed, structure="none", shift=0):
    torch.set_num_threads(1)
    trainer, words = train_cyclegan, ["--epochs", "7"]
    if part == "unet":
        trainer, words = train_unet, ["--structure", structure, "--data", str(shifted(int(shift)))]
    elif callable(PARTS[part]):
        PARTS[part]()
    else:
        words += PARTS[part]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [f"{trainer.__name__}.py", "--mini", "--workers", "0", "--seed", seed, "--out", folder, *words]
        heads = {}  # in memory: what was changed is not in a head's config.json
        trainer.save_head = lambda head, where: heads.update({where.name: copy.deepcopy(head).eval()})
        modules.run_training(trainer.main, trainer.parse_args())
        print(json.dumps({"part": part, "seed": int(seed), "structure": structure, "shift": int(shift)}
                         | measure(heads["best" if part == "unet" else "last"])), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
