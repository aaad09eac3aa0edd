"""Makes the fast model's portraits look like the slow model's: images in, enhanced images of the same size out.

python enhance.py photos                                             with the head in assets/head -> enhanced/
python enhance.py photo.png --model runs/cyclegan/last --out mine    with a head of one's own
python enhance.py photos --compare --out side-by-side                input and output side by side
python enhance.py photos --model someone/some-head --out other       with a head from the Hugging Face Hub
torchrun --nproc_per_node=8 enhance.py photos                        the files shared out over eight GPUs

What is in --out already is skipped, so after an interruption the same command does the rest. Transparency, EXIF, XMP,
IPTC, colour profiles, comments and PNG texts are carried over where the format can hold them; notes tell what is not.
A file that cannot be read is named at the end; all others are done.

One image's way: output_paths -> read -> batches -> enhance_batch -> write. Threads read ahead and write behind.
"""
import argparse
import errno
import hashlib
import math
import os
import re
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from modules import (FORMATS, LOCAL_RANK, RANK, WORLD_SIZE, Picture, ResidualBlock, UnreadableImage, between,
                     check_settings, contact_sheet, fail, first_line, list_images, load_head, lock_folder,
                     make_printing_safe, normalise, number, on_white, open_picture, positive, print_once, printable,
                     progress_bar, to_uint8, wait_for_file, wait_for_ranks, whole, write_image, write_json)

SHIPPED_HEAD = Path(__file__).resolve().parent / "assets" / "head"
GPU_BATCH_PIXELS = 32 * 512 * 512
THREADS = min(8, os.cpu_count() or 1)
SETTINGS = ".enhance.json"  # in --out
DISK_ERRORS = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO".split()
warnings.filterwarnings("ignore", module="PIL")  # odd tags, large sizes: what matters raises


@dataclass(eq=False)
class Task:
    """One input file and what becomes of it."""
    source: Path
    target: Path
    picture: Picture = None
    options: dict = None  # see save_options
    output: Image.Image = None
    notes: list = ()  # what of the file is not carried over
    error: str = None  # why it cannot be read, enhanced or written
    done: bool = False


# -------------------------------------------------------------------------------------------------- paths
def without_links(path):
    """The folder with links resolved, the name as it is: writing to a link replaces the link, not its target."""
    return path.parent.resolve() / path.name


def output_paths(inputs, out, form):
    """[(input path, output path)] in order. Fails where an original or another output would be overwritten.

    One folder is mirrored in `out` itself; of several inputs, each folder gets one of its own there, as with `cp -r`.
    """
    advice = "and originals are never overwritten: choose another --out"
    names = {}  # of the outputs, relative to `out`, still with the inputs' suffixes
    for path in inputs:
        if not os.path.lexists(path):
            fail(f"there is no file or folder {printable(path)}")
        files, folder = (list_images(path), path) if path.is_dir() else ([path], path.parent)
        if out.exists() and out.samefile(folder):
            fail(f"--out {printable(out)} is where the originals are, {advice}")
        top = folder.resolve().name if path.is_dir() and len(inputs) > 1 else ""
        names |= {file: top / file.relative_to(folder) for file in files}

    # The three formats that carry all metadata stay, the others become PNG: a.bmp -> a.png.
    kept, suffix = ({"PNG", "JPEG", "WEBP"}, ".png") if form == "keep" else ({FORMATS["." + form]}, "." + form)
    changed = {path: name.with_suffix(suffix) for path, name in names.items()
               if FORMATS.get(name.suffix.lower()) not in kept}
    if changed and form == "keep":
        others = " ".join(sorted({path.suffix for path in changed}))
        print_once(f"note: {len(changed)} images become .png ({others} is not kept)")
    count, originals, origin = Counter((names | changed).values()), set(map(without_links, names)), {}
    for path, name in names.items():
        if path in changed:  # to a.bmp.png where there is an a.png too
            name = changed[path] if count[changed[path]] == 1 else name.with_name(name.name + suffix)
        target = out / name
        if target in origin:
            fail(f"{printable(origin[target])} and {printable(path)} would both become {printable(target)}: "
                 "give each its own --out")
        if without_links(target) in originals:
            fail(f"{printable(target)} is one of the originals, {advice}")
        origin[target] = path
    return [(path, target) for target, path in origin.items()]


def prepare(out, targets, settings, overwrite):
    """Makes the output folder and writes the settings down. Returns the time before which nothing there counts as done.

    Fails where what is there was made otherwise. The same --model with other weights was trained further: all anew.
    """
    path, present = out / SETTINGS, not overwrite and any(map(os.path.exists, targets))
    try:
        lock_folder(out)
        changed = check_settings(path, settings, may_change=("model", "weights"), started=present)
        if present and (changed is None or len(changed) == 2):
            fail(f"{printable(out)} holds images of these names, and no {path.name} that says that --model "
                 f"{settings['model']} made them: choose another --out, or let --overwrite make them anew")
        if not overwrite and changed is not None and "weights" not in changed:
            return path.stat().st_mtime
        if RANK == 0:
            write_json(path, settings)
        wait_for_file(path, lambda path: check_settings(path, settings, started=False) == {})
        return math.inf
    except OSError as error:
        fail(f"cannot write to {printable(out)}: {error.strerror}")


def is_done(path, target, since):
    """As with make: whether an output is newer than its input, and than `since`, which prepare() returns."""
    since = max(since, path.stat().st_mtime) if path.is_file() else since
    return os.path.isfile(target) and target.stat().st_mtime >= since


# ----------------------------------------------------------------------------------------------- metadata
# How many bytes of what a format can hold, where there is a limit.
LIMITS = {"PNG": {"IPTC": 0}, "WEBP": {"dpi": 0, "comment": 0, "IPTC": 0, "PNG texts": 0, "PNG colours": 0},
          "JPEG": {"icc_profile": 255 * 65519, "exif": 65533, "xmp": 65504, "comment": 65533, "IPTC": 65500,
                   "PNG texts": 0, "PNG colours": 0}}
TIFF_TAGS = {270, 271, 272, 305, 306, 315, 33432}  # description, make, model, software, time, artist, copyright
# Namespaces of XMP that speaks of gain maps, depth maps, videos, thumbnails, or a second block of XMP.
ANNOUNCES = (rb"(?i)hdr-?gain-?map|google.com/photos/(1.0/(camera|container|depthmap|image|audio)|dd)/|xmp/note/|"
             rb"xap/1.0/g/img/|AuxiliaryImage")


def png_chunks(data):
    """Yields a PNG file's chunks: four letters of name, and content."""
    position = 8
    while position < len(data):
        end = position + 8 + int.from_bytes(data[position:position + 4], "big")
        yield data[position + 4:end]
        position = end + 4  # behind the checksum


def without_thumbnail(exif):
    """EXIF without small copies of the old picture. Nothing else moves in it, as makers' notes hold offsets."""
    tiff = exif.removeprefix(b"Exif\0\0")
    tiff = re.sub(rb"(?s)\xff\xd8\xff.*?\xff\xd9", lambda match: bytes(len(match[0])), tiff)
    order = "<" if tiff.startswith(b"II") else ">"
    directory, = struct.unpack_from(order + "I", tiff, 4)
    link = directory + 2 + 12 * struct.unpack_from(order + "H", tiff, directory)[0]  # to the thumbnail's directory
    return b"Exif\0\0" + tiff[:link] + bytes(4) + tiff[link + 4:]


def read_metadata(path, image, notes):
    """What goes from a file into its output besides pixels, {name as in LIMITS: value}. `image` is the upright one."""
    data, info = path.read_bytes(), image.info
    metadata = {name: info[name] for name in ("icc_profile", "exif", "xmp", "comment")
                if isinstance(info.get(name), bytes)}
    if isinstance(info.get("dpi"), tuple) and all(0 < value < 2 ** 16 for value in info["dpi"]):
        metadata["dpi"] = info["dpi"]
    metadata["lossless"] = image.format == "WEBP" and b"VP8L" in data
    if image.format in ("JPEG", "MPO"):
        metadata["comment"] = b"\n".join(content for name, content in image.applist if name == "COM")
        metadata["IPTC"] = info.get("photoshop", {}).get(0x0404, b"")
    if image.format == "PNG":
        chunks = list(png_chunks(data))
        metadata["PNG texts"] = [chunk for chunk in chunks if re.match(
            b"(tEXt|zTXt|iTXt)(?!XML:com.adobe.xmp\0|Raw profile type exif\0)", chunk)]
        if "icc_profile" in metadata or b"iCCP" not in {chunk[:4] for chunk in chunks}:  # else the profile is applied
            metadata["PNG colours"] = [chunk for chunk in chunks if re.match(b"gAMA|cHRM|sRGB|cICP", chunk)]
    if re.search(ANNOUNCES, metadata.get("xmp", b"")):
        del metadata["xmp"]
        notes.append("XMP is left out, as it speaks of gain maps, depth maps, videos or thumbnails that are left out")
    try:
        if image.format == "TIFF":
            exif, tags = Image.Exif(), image.getexif()
            exif.update({tag: tags[tag] for tag in TIFF_TAGS & set(tags)})
            metadata["exif"] = exif.tobytes() if exif else b""
            notes.append("TIFF tags are left out, but for description, camera, author, time, resolution, profile, XMP")
        elif "Raw profile type exif" in info:  # ImageMagick's way before PNG had a chunk for it
            metadata["exif"] = image.getexif().tobytes()
        if metadata.get("exif"):
            metadata["exif"] = without_thumbnail(metadata["exif"])
    except Exception:  # as with Pillow's decoders
        metadata.pop("exif", None)
        notes.append("damaged EXIF is left out")
    return metadata


def save_options(options, kind, notes):
    """Makes of metadata what Pillow's save takes to write it in the format `kind`. Notes tell what that cannot hold."""
    for name, limit in LIMITS[kind].items():
        if len(options.get(name, "")) > limit:
            notes.append(f"{kind} cannot hold {name}" + (" of that length" if limit else ""))
            del options[name]
    if kind == "PNG":
        options["pnginfo"] = chunks = PngInfo()
        for chunk in options.get("PNG texts", []) + options.get("PNG colours", []):
            chunks.add(chunk[:4], chunk[4:])
        if comment := options.get("comment"):
            chunks.add_text("Comment", comment.decode(errors="backslashreplace"))
        if xmp := options.get("xmp"):
            chunks.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"))
    if iptc := options.get("IPTC"):  # a segment of Photoshop's with this one block
        block = struct.pack(">14s4sHHI", b"Photoshop 3.0", b"8BIM", 0x0404, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    return options


# ------------------------------------------------------------------------------------------ read and write
def read(task):
    """Fills in the task's picture and save options, or why it cannot."""
    try:
        task.picture = open_picture(task.source)
        task.notes = task.picture.notes
        metadata = read_metadata(task.source, task.picture.file, task.notes)
        task.options = save_options(metadata, FORMATS[task.target.suffix.lower()], task.notes)
        task.picture.file = None  # its pixels are in `rgb`
    except (UnreadableImage, OSError) as error:
        task.error = str(error)
    return task


def write(task, args):
    """Writes the task's output with alpha and metadata, whole or not at all, and gives its memory back."""
    image, alpha, jpeg = task.output, task.picture.alpha, FORMATS[task.target.suffix.lower()] == "JPEG"
    if args.compare:
        image = contact_sheet([[task.picture.rgb, image]], ["input", "output"])
    elif alpha and jpeg:
        image = on_white(image, alpha)
        task.notes.append("JPEG has no transparency: composed on white")
    elif alpha:
        image.putalpha(alpha)
    try:
        if jpeg and max(image.size) > 65500:
            raise ValueError("JPEG takes at most 65500 pixels a side: try --format png")
        write_image(image, task.target, **task.options, quality=args.quality, subsampling=0,
                    exact=True,  # WebP's: keep hidden colours
                    compress_type=zlib.Z_RLE)  # PNG's: a quarter of the default's time, files 2 % larger
        task.done, settings = True, args.out / SETTINGS
        if not settings.exists():  # somebody moved --out away: it has just been made anew
            write_json(settings, args.settings)
    except (OSError, ValueError) as error:  # of an encoder
        if errno.errorcode.get(getattr(error, "errno", None)) in DISK_ERRORS:
            raise  # the next image would fail as well
        task.error = f"{printable(task.source)}: {getattr(error, 'strerror', 0) or first_line(error)}"  # no long names
    task.picture = task.options = task.output = None


# ------------------------------------------------------------------------------------------------ network
def choose_device(name):
    """torch.device of --device; "auto" is this process's GPU, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = (f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such name or card, built without it
        fail(f"--device {name} is not available: {first_line(error)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # is_bf16_supported goes by it
    return device


def choose_precision(device, head):
    """bf16 where the hardware computes in it rather than emulates it. On CPUs only without a norm in the head, where
    ten portraits came out within 2 gray levels of fp32; with InstanceNorm differences reached 11."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = (device.type == "cpu" and without_norm(head)
                  and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    return "bf16" if native else "fp32"


def without_norm(head):
    """Whether nothing in the head looks at the whole image: what a tile comes to does not depend on the others."""
    return not any(isinstance(layer, (nn.InstanceNorm2d, nn.GroupNorm)) for layer in head.modules())


def tile_margin(head):
    """How many pixels around a tile the generator's output depends on, in whole cells of its grid of strides.

    Each block sees 8 pixels further (two 3x3 convolutions at a quarter of the size), the other layers 14 together, and
    the means over 31 pixels 15.
    ESA sees further, faintly. A norm over the image and the U-Net see everything: there no margin is enough.
    """
    blocks = sum(isinstance(layer, ResidualBlock) for layer in head.modules())
    return 8 * blocks + 32 if blocks else 128


def tiled(head, x, tile, margin):
    """head(x) in halves of halves, which need less memory: each is read with a margin, which is cut off again."""
    side = 2 if x.shape[2] > x.shape[3] else 3
    length, multiple = x.shape[side], getattr(head, "multiple", 4)
    if not tile or length <= max(tile, 4 * multiple) + 2 * margin:
        return head(x)
    middle = length // 2 // multiple * multiple  # the network's strides have a grid: both begin on it
    before = tiled(head, x.narrow(side, 0, middle + margin), tile, margin).narrow(side, 0, middle)
    behind = tiled(head, x.narrow(side, middle - margin, length - middle + margin), tile, margin)
    return torch.cat([before, behind.narrow(side, margin, length - middle)], side)


def batches(tasks, args, device):
    """Yields lists of consecutive tasks with pictures of one size: several on a GPU, else one, as more gain nothing."""
    for (width, height), group in groupby(tasks, lambda task: task.picture.rgb.size):
        fitting = max(1, GPU_BATCH_PIXELS // (width * height)) if device.type == "cuda" else 1
        while batch := list(islice(group, args.batch_size or fitting)):
            yield batch


@torch.inference_mode()
def enhance_batch(head, batch, args, device, precision):
    """Gives each task, all of one size, its output x + strength * (head(x) - x), or an error."""
    try:
        x = torch.stack([pil_to_tensor(task.picture.rgb) for task in batch])
        x = normalise(x.to(device, memory_format=torch.channels_last))
        with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            y = tiled(head, x, args.tile, tile_margin(head))
        y = x + args.strength * (y.float() - x)
        finite = y.isfinite().flatten(1).all(1).tolist()
        for task, pixels, good in zip(batch, to_uint8(y).cpu(), finite):
            task.output = to_pil_image(pixels)
            task.error = None if good else f"{printable(task.source)}: the head's output in {precision} is not finite"
        return
    except torch.AcceleratorError:
        raise  # the GPU itself failed, and no image would succeed after it
    except RuntimeError as error:
        short = re.search("memory|ALLOC_FAILED", str(error))
        advice = "a smaller --tile, or --device cpu" if args.tile else "--tile 512"
        reason = f"out of memory: try {advice}" if short else first_line(error)
    # Here the exception, which held the tensors, is gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        batch[0].error = f"{printable(batch[0].source)}: {reason}"
    else:
        for task in batch:
            enhance_batch(head, [task], args, device, precision)


# --------------------------------------------------------------------------------------------------- main
def in_order(pool, function, items):
    """Yields function(item) for all items, in their order. The pool's threads go ahead by a bounded number of them."""
    futures = []
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > 2 * THREADS:
            yield futures.pop(0).result()
    while futures:
        yield futures.pop(0).result()


def enhance_files(tasks, head, args, device, precision):
    """Reads, enhances and writes all tasks. Ctrl-C, SIGTERM and a full disk end the program here; what is being written
    at that moment is finished first."""
    def enhanced(tasks):
        for batch in batches((task for task in tasks if not task.error), args, device):
            enhance_batch(head, batch, args, device, precision)
            yield from (task for task in batch if not task.error)

    pool = ThreadPoolExecutor(THREADS)
    try:
        with progress_bar(in_order(pool, read, tasks), total=len(tasks), unit=" images") as bar:
            for _ in in_order(pool, lambda task: write(task, args), enhanced(bar)):
                pass
    except (KeyboardInterrupt, OSError) as stopped:  # a signal, or the disk: all else is per file
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the program at once
        pool.shutdown(cancel_futures=True)  # waits for what is being written
        reason = f"cannot write to {printable(args.out)}: {stopped.strerror}" if stopped.args else "interrupted"
        done = sum(task.done for task in tasks)
        fail(f"{reason}; {done} of {len(tasks)} images are done, the same command does the rest")


def main(args):
    files = output_paths(args.inputs, args.out, args.format)

    # The network
    device = choose_device(args.device)
    head = load_head(args.model)
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in head.state_dict().values())).hexdigest()
    head = head.to(device)
    if device.type != "mps":
        head = head.to(memory_format=torch.channels_last)  # on CPUs, too: 0.82 of the time
    precision = choose_precision(device, head) if args.precision == "auto" else args.precision
    if args.tile and not without_norm(head):
        print_once("note: this head's norm sees one tile at a time: with --tile, brightness and colour may drift from "
                   "tile to tile. Whole images are better where the memory allows it")

    # The plan
    args.settings = {"model": str(args.model), "weights": weights, "strength": args.strength,
                     "tile": 0 if without_norm(head) else args.tile, "compare": args.compare, "quality": args.quality}
    since = prepare(args.out, [target for _, target in files], args.settings, args.overwrite)
    mine = files[RANK::WORLD_SIZE]
    tasks = [Task(path, target) for path, target in mine if not is_done(path, target, since)]

    # The work
    start = time.perf_counter()
    enhance_files(tasks, head, args, device, precision)
    seconds = time.perf_counter() - start

    # The report
    done, errors = sum(task.done for task in tasks), [task.error for task in tasks if task.error]
    for error in errors:
        print(f"failed: {error}", file=sys.stderr)
    for note in sorted({note for task in tasks for note in task.notes}):
        sources = [task.source for task in tasks if note in task.notes]
        print(f"note: {note} ({len(sources)} images, {printable(sources[-1])} is one)")
    rank = f"rank {RANK} of {WORLD_SIZE}: " if WORLD_SIZE > 1 else ""
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GB" if device.type == "cuda" else ""
    present = len(mine) - len(tasks)
    skipped = f"{present} were there already (--overwrite makes them anew); " if present else ""
    print(f"{rank}{done} images enhanced in {seconds:.1f} s ({done / seconds:.1f} images/s in {precision}{memory}) -> "
          f"{printable(args.out)}; {skipped}{len(errors)} failed")
    wait_for_ranks()
    sys.exit(bool(errors))


if __name__ == "__main__":
    make_printing_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER",
         help="images, and folders that are searched for images")
    flag("--model", metavar="DIR|HUB_ID", default=SHIPPED_HEAD,
         help="the head: a folder with config.json and model.safetensors, or a Hugging Face Hub repository (default: "
              "assets/head beside this script)")
    flag("--out", type=Path, metavar="DIR", default="enhanced", help="output folder (default: %(default)s)")
    flag("--batch-size", type=positive, metavar="N", help="consecutive images of one size that go through the "
         "network together (default: 8 megapixels on a GPU, which is 32 images at 512x512; 1 elsewhere)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one (default: auto)")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto",
         help="auto = bf16 on GPUs that compute in it, and for heads without a norm on such CPUs (1.2 to 1.4 times as "
              "fast), else fp32; the last line says which (default: auto)")
    flag("--strength", type=number, default=1.0, help="0 = input, 1 = the head's output, above 1 more than that "
         "(default: 1)")
    flag("--compare", action="store_true", help="write input and output side by side instead of the output alone")
    flag("--tile", type=whole, default=0, metavar="N",
         help="for images that are too large for the memory: work in tiles of this side and a margin; 0 = whole images "
              "(default: 0). Exact for heads without norm and attention, with ESA at most 2 gray levels off (measured "
              "at 1024 to 1300 px); colours of other heads may drift from tile to tile")
    flag("--overwrite", action="store_true", help="make images anew that are in --out already")
    flag("--format", choices=["keep", "png", "jpg", "webp"], default="keep",
         help="keep = PNG, JPEG and WebP stay, lossless where they are; all others become PNG (default: keep)")
    flag("--quality", type=between(1, 100), default=95,
         help="of JPEG and WebP files, 1 to 100 (default: 95)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:  # before or after enhance_files, which handles its own
        fail("interrupted")
