"""The unpaired recipe at the size of a portrait: trained on 464 px, measured after every second epoch (assets/TRIALS.md).

    OMP_NUM_THREADS=1 python tests/measured/portraits.py DIR OUT 0      # portraits by schnell, a folder to work in, a seed

DIR holds SFHQ-T2I's schnell portraits as assets/LICENSES.md tells. Those that the shipped head's card keeps apart are the
test; of the others every second one goes through a filter that makes it plastic, as the miniature's does, at widths for
464 px, and the rest are the baseline set: no scene is in both. A line of JSON a measurement: PSNR to the truth in dB,
the strength of detail by scale and luma, each less the truth's, for input, spectrum filter and head.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import modules
import train_cyclegan

FLAGS = "--size 464 --crop 128 --channels 16 --blocks 1 --lr 5e-4 --average 0.995 --epochs 16 --workers 0".split()
SCALES = 1, 3, 5, 9, 17, 33


def plastic(x):
    """(H, W, 3) in [0, 255]: texture goes where contrast is low, and what is 3 to 14 px wide shines."""
    gray, mean = x.mean(2), lambda z: uniform_filter(z, 15, axes=(0, 1))
    variance = mean(gray ** 2) - mean(gray) ** 2
    kept, smooth = mean(variance / (variance + 22 ** 2))[..., None], mean(x)
    gloss = gaussian_filter(x, 3, axes=(0, 1)) - gaussian_filter(x, 14, axes=(0, 1))
    return 0.1 * x + 0.9 * (smooth + kept * (x - smooth)) + 0.2 * gloss


def make_data(portraits, out):
    card = (Path(train_cyclegan.__file__).parent / "assets/head/README.md").read_text()
    apart = re.search(r"Schnell: ([\d, \n]+)", card)[1].replace("\n", " ").split(", ")
    paths = sorted(Path(portraits).rglob("*schnell*.jpg"))
    test = [path for path in paths if path.stem[-7:] in "".join(apart)]
    train = [path for path in paths if path not in test]
    for folder, chosen, filtered in (("train/distilled", train[::2], True), ("train/baseline", train[1::2], False),
                                     ("test/distilled", test, True), ("test/baseline", test, False)):
        for path in chosen:
            x = np.asarray(modules.read_image(path), float)
            x = (plastic(x) if filtered else x).clip(0, 255).round().astype(np.uint8)
            modules.write_image(Image.fromarray(x), out / folder / f"{path.stem[-7:]}.png", compress_level=1)


def measure(images, truths):
    """Means over the images. Strength of detail: the standard deviation of differences of box means of gray."""
    found = []
    for x, y in zip(images, truths):
        mse, facts = np.square(x - y).mean(), {}
        for a, b in zip(SCALES, SCALES[1:]):
            strength = [(uniform_filter(z.mean(2), a) - uniform_filter(z.mean(2), b)).std() for z in (x, y)]
            facts[f"{a}-{b} px"] = strength[0] / strength[1]
        wide = uniform_filter((x - y).mean(2), 27)
        found.append({"PSNR": 10 * np.log10(255 ** 2 / mse), **facts, "luma": (x - y).mean(),
                      "below 27 px": np.sqrt(np.square(wide).mean())})
    return {name: round(float(np.mean([facts[name] for facts in found])), 3) for name in found[0]}


def main(portraits, out, seed):
    out = Path(out)
    make_data(portraits, out)
    inputs, truths = ([np.asarray(modules.read_image(path), float) for path in modules.list_images(out / "test" / domain)]
                      for domain in ("distilled", "baseline"))
    print(json.dumps({"input": measure(inputs, truths)}), flush=True)
    save, epochs = train_cyclegan.save_head, []

    def save_and_measure(head, folder):
        save(head, folder)
        epochs.append(folder)
        if len(epochs) % 2 == 0:
            enhanced = [np.asarray(modules.enhance(head, Image.fromarray(x.astype(np.uint8))), float) for x in inputs]
            print(json.dumps({"seed": int(seed), "epoch": len(epochs), **measure(enhanced, truths)}), flush=True)
    train_cyclegan.save_head = save_and_measure
    sys.argv = ["train_cyclegan.py", "--distilled", str(out / "train/distilled"), "--baseline",
                str(out / "train/baseline"), "--out", str(out / f"run{seed}"), "--seed", seed, *FLAGS]
    modules.run_training(train_cyclegan.main, train_cyclegan.parse_args())


if __name__ == "__main__":
    main(*sys.argv[1:])
