"""Makes the fast model's portraits look like the slow model's: images in, enhanced images of the same size out.

python enhance.py photo.png --model runs/cyclegan/best                       one image -> enhanced/photo.png
python enhance.py photos --model runs/cyclegan/best --out better             a folder, with all folders below it
python enhance.py photos --model runs/cyclegan/best --out look --compare     input and output side by side
python enhance.py photos --model someone/some-head --strength 0.5            a head from the Hugging Face Hub, at half

Files that are in --out already are skipped: after an interruption, the same command does the rest. Transparency, EXIF,
ICC profile and PNG texts are carried over. A file that cannot be read is named at the end; all others are done.

Threads decode ahead of the network and encode behind it, so that it never waits for a file:
plan -> read_picture -> batches of equal size -> enhance_batch -> write_picture
"""
import argparse
import errno
import io
import math
import os
import re
import signal
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo, iTXt
from tqdm import tqdm

from modules import (contact_sheet, fail, first_line, gray_to_8_bits, list_images, load_head, normalise,
                     peak_memory_gb, to_image, to_tensor, to_uint8, write_image)

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the head that comes with the kit, where one does
KINDS = Image.registered_extensions()  # {".jpg": "JPEG", ...}
GPU_BATCH_PIXELS = 32 * 512 * 512
COMPILE_FROM = 1000  # images on a GPU: a guess at how many pay for compiling, not a measurement
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


# -------------------------------------------------------------------------------------------------------------- plan
def place(path):
    """Where a file lies, however it was named. Writing to a link replaces the link, so links are not followed."""
    return path.parent.resolve() / path.name


def shown(path):
    """A path for the terminal: control characters and broken encodings are escaped."""
    return str(path) if str(path).isprintable() else repr(str(path))


def plan(inputs, out, form):
    """Which file goes where: {input path: output path}. Fails where an original or another output would be overwritten.

    One folder is mirrored in `out` itself; of several inputs, each folder gets one of its own there, as with `cp -r`.
    """
    names = {}  # of the outputs, relative to `out`, with the suffix that they have now
    for path in map(Path, inputs):
        if not os.path.lexists(path):
            fail(f"there is no file or folder {shown(path)}")
        if out.exists() and out.samefile(path if path.is_dir() else path.parent):
            fail(f"--out {shown(out)} is where the originals are, and they are never overwritten: choose another --out")
        if path.is_dir():
            root, target = path.resolve(), out.resolve()
            outputs = path / target.relative_to(root) if target.is_relative_to(root) else None
            top = root.name if len(inputs) > 1 else ""
            names |= {file: top / file.relative_to(path) for file in list_images(path)
                      if not outputs or not file.is_relative_to(outputs)}  # of an earlier run
        else:
            names[path] = Path(path.name)
    if not names:
        fail("there is no image but those in --out")

    kept = {"PNG", "JPEG", "WEBP"} if form == "keep" else {KINDS["." + form]}
    suffix = ".png" if form == "keep" else "." + form
    changed = {path for path, name in names.items() if KINDS.get(name.suffix.lower()) not in kept}
    if changed and form == "keep":
        others = " ".join(sorted({path.suffix for path in changed}))
        print(f"note: {len(changed)} images become .png ({others} is not kept)")
    count = Counter(name.with_suffix(suffix) if path in changed else name for path, name in names.items())
    originals, origin = set(map(place, names)), {}
    for path, name in names.items():
        if path in changed:  # a.bmp -> a.png, or a.bmp.png where there is an a.png too
            alone = count[name.with_suffix(suffix)] == 1
            name = name.with_suffix(suffix if alone else name.suffix + suffix)
        other = origin.setdefault(out / name, path)
        if place(other) != place(path):
            fail(f"{shown(other)} and {shown(path)} would both become {shown(out / name)}: give each its own --out")
        if place(out / name) in originals:
            fail(f"{shown(out / name)} is one of the originals, and they are never overwritten: choose another --out")
    return {path: target for target, path in origin.items()}


# ---------------------------------------------------------------------------------------------------------- pictures
@dataclass
class Picture:
    """An image on its way through the program, and what of its file the network does not see."""
    path: Path
    rgb: torch.Tensor  # uint8 (3, H, W), upright
    alpha: Image.Image | None
    metadata: dict  # arguments of Pillow's save: icc_profile, exif, xmp, dpi
    text: dict  # PNG texts; many image generators write the prompt there
    notes: list  # what is not carried over


def read_picture(path):
    """The Picture of a file. Raises whatever Pillow's decoders raise, which is nearly everything."""
    if not path.is_file():
        raise OSError("no regular file, or a link to none")
    notes, alpha = [], None
    with Image.open(path) as image:
        deep = image.mode.startswith("I") or ";16" in str(image.tile)
        if deep:
            notes.append("16 bits per channel become 8")
        if image.format != "MPO" and getattr(image, "is_animated", False):  # further pictures of an MPO are previews
            notes.append("animated or of several pages: the first picture only")
        if image.format == "TIFF":
            notes.append("TIFF tags are left out, but for colour profile and resolution")
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # as with decoders
            image.info.pop("exif", None)
            notes.append("damaged EXIF is left out")
        info = image.info
        text = {key: info[key] if isinstance(info.get(key), str) else value
                for key, value in getattr(image, "text", {}).items()}  # info holds those that uprighting has corrected
        metadata = {key: info[key] for key in ("icc_profile", "exif", "xmp") if isinstance(info.get(key), bytes)}
        if isinstance(info.get("dpi"), tuple) and all(0 < value < 2 ** 16 for value in info["dpi"]):
            metadata["dpi"] = info["dpi"]
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range: convert them to 8 or 16 bits")
        if image.has_transparency_data:
            if deep:
                raise ValueError("a transparent colour in 16 bits: convert it to an alpha channel")
            alpha = image.convert("RGBA").getchannel("A")
        return Picture(path, to_tensor(to_rgb(image, metadata, notes)), alpha, metadata, text, notes)


def to_rgb(image, metadata, notes):
    """8-bit RGB. A profile of another colour space is applied and taken out of `metadata`: it would no longer fit."""
    if image.mode.startswith("I"):
        image = gray_to_8_bits(image)
    space = metadata.get("icc_profile", b"")[16:20]
    if space and (space != b"RGB " or image.mode == "CMYK"):
        profile = io.BytesIO(metadata.pop("icc_profile"))
        try:
            return ImageCms.profileToProfile(image.convert("L") if space == b"GRAY" else image, profile,
                                             ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("an unusable colour profile is left out")
    if image.mode == "P":  # by way of RGBA, which knows palettes with transparency
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def write_picture(picture, output, target, quality, compare):
    """Writes uint8 (3, H, W) with the picture's alpha and metadata, whole or not at all."""
    image, kind, options = to_image(output), KINDS[target.suffix.lower()], dict(picture.metadata)
    if compare:
        image = contact_sheet([[to_image(picture.rgb), image]], ["input", "output"])
    elif picture.alpha is not None and kind == "JPEG":
        image = Image.composite(image, Image.new("RGB", image.size, "white"), picture.alpha)
        picture.notes.append("JPEG knows no transparency: shown on white")
    elif picture.alpha is not None:
        image.putalpha(picture.alpha)
    if kind == "PNG":
        texts = {"XML:com.adobe.xmp": iTXt(options["xmp"].decode(errors="replace"))} if "xmp" in options else {}
        options["pnginfo"] = PngInfo()
        for key, value in (picture.text | texts).items():
            options["pnginfo"].add_text(key, value)
        options["compress_type"] = zlib.Z_RLE  # a quarter of the default's time for files 2 % larger
    else:
        if picture.text:
            picture.notes.append(f"{kind} has no place for PNG texts")
        options |= {"quality": quality, "subsampling": 0} if kind == "JPEG" else {"quality": quality, "exact": True}
    write_image(image, target, **options)


# ----------------------------------------------------------------------------------------------------------- batches
def read_ahead(paths, pool, threads, most, failed):
    """Yields the Pictures of the files in order. How much is read in advance depends on batches, not on the folder."""
    waiting, ahead = deque(), 2 * threads
    for path in [*paths, None]:
        if path:
            waiting.append((path, pool.submit(read_picture, path)))
        while waiting and (len(waiting) > ahead or not path):
            origin, future = waiting.popleft()
            try:
                picture = future.result()
            except Exception as error:
                failed[origin] = why(error)
                continue
            ahead = 2 * (threads + most(picture.rgb))
            yield picture


def equal_sizes(pictures, most):
    """Yields lists of up to most(rgb) Pictures of one size. In mixed folders they wait for their like, but not long."""
    groups = defaultdict(list)
    for picture in pictures:
        group = groups[picture.rgb.shape]
        group.append(picture)
        if len(group) >= most(picture.rgb):
            yield groups.pop(picture.rgb.shape)
        elif sum(map(len, groups.values())) > 4 * most(picture.rgb):
            yield groups.pop(next(iter(groups)))  # the group that began first
    yield from groups.values()


# ----------------------------------------------------------------------------------------------------------- network
def tiled(head, x, tile):
    """The head over overlapping tiles, blended by linear ramps, for images that do not fit the memory; 0 = no tiles."""
    height, width = x.shape[-2:]
    if not tile or max(height, width) <= tile:
        return head(x)
    overlap = tile // 4

    def starts(side):
        return sorted({min(start, max(side - tile, 0)) for start in range(0, max(side - overlap, 1), tile - overlap)})

    def ramp(side):
        steps = torch.arange(1, side + 1, device=x.device)
        return torch.minimum(steps, steps.flip(0)).clamp(max=overlap) / overlap

    total, weights = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for top in starts(height):
        for left in starts(width):
            area = ..., slice(top, top + tile), slice(left, left + tile)
            weight = ramp(x[area].shape[-2])[:, None] * ramp(x[area].shape[-1])
            total[area] += weight * head(x[area])
            weights[area] += weight
    return total / weights


@torch.inference_mode()
def enhance_batch(head, batch, strength, tile, device, precision):
    """uint8 (N, 3, H, W) on the CPU -> x + strength * (head(x) - x) likewise; and (N,), whether it is finite.

    Both come with an event on a GPU, which is not waited for: they are there when the event has happened.
    """
    cuda = device.type == "cuda"
    x = normalise((batch.pin_memory() if cuda else batch).to(device, non_blocking=True))
    if cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, precision != "fp32"):
        y = tiled(head, x, tile)
    y = x + strength * (y.float() - x)
    output = to_uint8(y).to("cpu", non_blocking=cuda), y.isfinite().flatten(1).all(1).to("cpu", non_blocking=cuda)
    ready = torch.cuda.Event() if cuda else None
    if ready:
        ready.record()
    return *output, ready


def halving(enhance, pictures):
    """Yields (part of the pictures, enhance(part)): halves while memory is short; (one, None) if that is no help."""
    result = None
    try:
        result = enhance(torch.stack([picture.rgb for picture in pictures]))
    except RuntimeError as error:
        signs = "out of memory", "allocate memory", "enough memory", "ALLOC_FAILED"
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
            raise
    if result or len(pictures) == 1:
        yield pictures, result
    else:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # only here: the exception held the tensors
        yield from halving(enhance, pictures[:len(pictures) // 2])
        yield from halving(enhance, pictures[len(pictures) // 2:])


# -------------------------------------------------------------------------------------------------------------- main
def why(error):
    """What an exception says about a file, in one line and without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return "this is no image that Pillow can read"
    return getattr(error, "strerror", None) or first_line(error)


def choose_device(name):
    """torch.device of --device; "auto" is the first of CUDA, Apple's MPS and the CPU that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name, no such card, built without it
        fail(f"--device {name} is not to be had: {str(error).splitlines()[0]}")


def prepare(out, targets):
    """Makes the output folder and removes what killed runs left half-written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in {target.parent for target in targets}:
            for path in folder.glob(".*.tmp"):
                if re.search(r"\.[0-9a-f]{32}\.tmp$", path.name):  # the names of write_atomically
                    path.unlink()
    except OSError as error:
        fail(f"cannot write to {shown(out)}: {error.strerror}")


def main(args):
    for name, right, rule in (("strength", 0 <= args.strength < math.inf, "0 gives the input, 1 the head's output"),
                              ("quality", 1 <= args.quality <= 100, "it goes from 1 to 100"),
                              ("tile", args.tile == 0 or args.tile >= 64, "0, or a side of 64 pixels and more"),
                              ("batch_size", args.batch_size is None or args.batch_size >= 1, "1 or more")):
        if not right:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: {rule}")
    if not args.model:
        fail("which head? --model takes a folder such as runs/cyclegan/best (train_cyclegan.py and train_unet.py write "
             "them) or the name of a repository on the Hugging Face Hub")
    out = Path(args.out)
    targets = plan(args.inputs, out, args.format)
    prepare(out, targets.values())
    weights = Path(args.model, "model.safetensors")
    made = weights.stat().st_mtime if weights.is_file() else 0
    # As with make: done is what is there and newer than its input and the head.
    todo = [path for path, target in targets.items() if args.overwrite or not target.is_file()
            or target.stat().st_mtime < max(made, path.stat().st_mtime if path.is_file() else 0)]
    present = len(targets) - len(todo)
    if not todo:
        print(f"all {present} images are in {shown(out)} already (--overwrite makes them anew)")
        return

    warnings.filterwarnings("ignore", module="PIL")  # odd tags, large sizes: what matters raises
    device = choose_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    head = load_head(args.model).to(device)
    if device.type == "cuda":
        head = head.to(memory_format=torch.channels_last)  # a gain on tensor cores, a loss on CPUs
    compiled = head
    if args.compile or args.compile is None and device.type == "cuda" and len(todo) >= COMPILE_FROM:
        compiled, torch.backends.cudnn.benchmark = torch.compile(head, dynamic=False), True
    if args.tile:
        print("note: with --tile, instance normalisation sees one tile at a time: brightness and colour may drift from "
              "tile to tile. Whole images are better where the memory allows it")

    fits = {}  # shape -> the largest batch, where memory was short
    shape = None  # the one that is compiled; any other would cost as long again

    def most(rgb):
        auto = max(1, GPU_BATCH_PIXELS // rgb[0].numel()) if device.type == "cuda" else 1  # a CPU gains nothing
        return fits.get(rgb.shape) or args.batch_size or auto

    def network(x):
        nonlocal shape
        shape = shape or x.shape
        return (compiled if x.shape == shape else head)(x)

    def enhance(batch):
        return enhance_batch(network, batch, args.strength, args.tile, device, precision)

    def write(picture, output, finite, ready):
        try:
            if ready:
                ready.synchronize()
            if not finite:
                raise ValueError(f"the head's output in {precision} is not finite")
            write_picture(picture, output, targets[picture.path], args.quality, args.compare)
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise  # the next image would fail as well
            failed[picture.path] = why(error)
        else:
            done.append(picture.path)
            for note in picture.notes:
                notes[note].append(picture.path)

    done, failed, notes, pending, stopped = [], {}, defaultdict(list), deque(), None
    threads = min(8, os.cpu_count() or 1)
    readers, writers = ThreadPoolExecutor(threads), ThreadPoolExecutor(threads)
    start = time.perf_counter()
    try:
        with tqdm(total=len(todo), unit=" images", disable=None) as bar:
            for pictures in equal_sizes(read_ahead(todo, readers, threads, most, failed), most):
                for part, result in halving(enhance, pictures):
                    if len(part) < len(pictures):
                        fits[part[0].rgb.shape] = len(part)
                    for i, picture in enumerate(part):
                        if result:
                            output, finite, ready = result
                            pending.append(writers.submit(write, picture, output[i], finite[i], ready))
                        else:
                            failed[picture.path] = "out of memory at --batch-size 1: try --tile 512"
                while pending and (len(pending) > 2 * (threads + len(pictures)) or pending[0].done()):
                    pending.popleft().result()
                bar.update(len(done) + len(failed) - bar.n)
            for future in pending:
                future.result()
                bar.update(len(done) + len(failed) - bar.n)
    except (KeyboardInterrupt, OSError) as error:  # a signal, or the disk: all else is per file
        stopped = error
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
        writers.shutdown(cancel_futures=True)  # waits for what is being written
    if stopped:
        rest = f"{len(done)} of {len(todo)} images are done, the same command does the rest"
        if isinstance(stopped, OSError):
            fail(f"cannot write to {shown(out)}: {stopped.strerror}; {rest}")
        print(f"interrupted; {rest}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])

    seconds = time.perf_counter() - start
    for note, paths in sorted(notes.items()):
        print(f"note: {note} ({len(paths)} images, {shown(paths[0])} is one)")
    for path, reason in sorted(failed.items()):
        print(f"failed: {shown(path)}: {reason}", file=sys.stderr)
    print(f"{len(done)} images enhanced in {seconds:.1f} s ({len(done) / seconds:.1f} images/s, peak memory "
          f"{peak_memory_gb(device):.1f} GB) -> {shown(out)}; "
          f"{f'{present} were there already; ' if present else ''}{len(failed)} failed")
    sys.exit(1 if failed else 0)


def interrupt(number, frame):
    """On Ctrl-C and SIGTERM: ends the run in an orderly way. A second one ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders that are searched for images")
    flag("--model", metavar="DIR|HUB_ID", default=WEIGHTS if WEIGHTS.is_dir() else None,
         help="the head: a folder with config.json and model.safetensors, or a Hugging Face Hub repository "
              "(default: weights/ beside this script, if there is one)")
    flag("--out", metavar="DIR", default="enhanced", help="output folder (default: %(default)s)")
    flag("--batch-size", type=int, metavar="N", help="images of one size that go through the network together "
         "(default: 8 megapixels on a GPU, which is 32 images at 512x512; 1 elsewhere)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one (default: auto)")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto = bf16 on GPUs that have "
         "it, else fp32; some CPUs are twice as fast in bf16 (default: auto)")
    flag("--strength", type=float, default=1.0, help="0 = input, 1 = the head's output; blends between and beyond "
         "(default: 1)")
    flag("--compare", action="store_true", help="write input and output side by side instead of the output alone")
    flag("--tile", type=int, default=0, metavar="N", help="work in overlapping tiles of this side, where images are "
         "too large for the memory; 0 = whole images, which look better (default: 0)")
    flag("--overwrite", action="store_true", help="make images anew that are in --out already")
    flag("--format", choices=["keep", "png", "jpg", "webp"], default="keep",
         help="keep = PNG, JPEG and WebP stay, all others become PNG (default: keep)")
    flag("--quality", type=int, default=95, help="of JPEG and WebP files, 1 to 100 (default: 95)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the head for the first image size: "
         f"slow to start, then faster (default: on CUDA from {COMPILE_FROM} images on)")
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main(parser.parse_args())
    except KeyboardInterrupt as stopped:  # before or after the work
        sys.exit(128 + stopped.args[0])
