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
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from tqdm import tqdm

from modules import (InstanceNorm, Picture, ResidualBlock, UnreadableImage, check_settings, contact_sheet, fail,
                     first_line, list_images, load_head, lock_folder, normalise, on_white, open_picture,
                     pad_to_multiple, print_once, printable, to_uint8, write_image, write_json)

SHIPPED_HEAD = Path(__file__).resolve().parent / "assets" / "head"
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FORMATS = Image.registered_extensions()  # {".jpg": "JPEG", ...}
GPU_BATCH_PIXELS = 32 * 512 * 512
THREADS = min(8, os.cpu_count() or 1)
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
warnings.filterwarnings("ignore", module="PIL")  # odd tags, large sizes: what matters raises


@dataclass(eq=False)
class Task:
    """A picture on its way through the program."""
    source: Path
    target: Path
    picture: Picture | None = None
    metadata: dict | None = None  # see read_metadata
    output: Image.Image | None = None
    notes: frozenset = frozenset()  # what of the file is not carried over
    error: str | None = None  # why it cannot be read, enhanced or written
    done: bool = False


# -------------------------------------------------------------------------------------------------- paths
def without_links(path):
    """The folder with links resolved, the name as it is: writing to a link replaces the link, not its target."""
    return path.parent.resolve() / path.name


def output_paths(inputs, out, form):
    """[(input path, output path)] in order. Fails where an original or another output would be overwritten.

    One folder is mirrored in `out` itself; of several inputs, each folder gets one of its own there, as with `cp -r`.
    """
    names = {}  # of the outputs, relative to `out`, still with the inputs' suffixes
    for path in inputs:
        if not os.path.lexists(path):
            fail(f"there is no file or folder {printable(path)}")
        files, folder = (list_images(path), path) if path.is_dir() else ([path], path.parent)
        if out.exists() and out.samefile(folder):
            fail(f"--out {printable(out)} is where the originals are, and they are never overwritten: "
                 "choose another --out")
        root, target = folder.resolve(), out.resolve()
        if root in target.parents:  # what earlier runs made is no input
            files = [file for file in files if target not in without_links(file).parents]
        top = root.name if path.is_dir() and len(inputs) > 1 else ""
        names |= {file: top / file.relative_to(folder) for file in files}
    if not names:
        fail("there is no image but those in --out")

    # The three formats that carry all metadata stay, the others become PNG: a.bmp -> a.png.
    kept = {"PNG", "JPEG", "WEBP"} if form == "keep" else {FORMATS["." + form]}
    suffix = ".png" if form == "keep" else "." + form
    changed = {path for path, name in names.items() if FORMATS.get(name.suffix.lower()) not in kept}
    if changed and form == "keep":
        others = " ".join(sorted({path.suffix for path in changed}))
        print_once(f"note: {len(changed)} images become .png ({others} is not kept)")
    wanted = names | {path: names[path].with_suffix(suffix) for path in changed}
    count, originals, origin = Counter(wanted.values()), set(map(without_links, names)), {}
    for path, name in wanted.items():
        if path in changed and count[name] > 1:  # a.bmp.png where there is an a.png too
            name = names[path].with_name(names[path].name + suffix)
        other = origin.setdefault(out / name, path)
        if without_links(other) != without_links(path):
            fail(f"{printable(other)} and {printable(path)} would both become {printable(out / name)}: "
                 "give each its own --out")
        if without_links(out / name) in originals:
            fail(f"{printable(out / name)} is one of the originals, and they are never overwritten: "
                 "choose another --out")
    return [(path, target) for target, path in origin.items()]


def prepare(out, targets, settings, overwrite):
    """Makes the output folder and writes the settings down. Returns the time before which nothing there counts as done.

    Fails where what is there was made with other settings. Of the model only the weights count; the same path with
    other weights is a head that was trained further, and all images are made anew.
    """
    path, present = out / ".enhance.json", not overwrite and any(map(os.path.exists, targets))
    advice = "choose another --out, or let --overwrite make them anew"
    try:
        lock_folder(out)
        changed = check_settings(path, settings, may_change=("model", "weights"), started=present)
        if present and changed is None:
            fail(f"{printable(out)} holds images of these names, but no {path.name} that says how they were made: "
                 f"{advice}")
        if present and len(changed) == 2:
            fail("{} was made with --model {}, not {}: {}".format(printable(out), *changed["model"], advice))
        if not overwrite and changed is not None and "weights" not in changed:
            return path.stat().st_mtime
        if RANK == 0:
            write_json(path, settings)
        for _ in range(1200):  # the other ranks wait for it
            if check_settings(path, settings, started=False) == {}:
                return math.inf
            time.sleep(0.1)
        fail(f"the first process's {printable(path)} is not seen here: --out must be a folder that all nodes share")
    except OSError as error:
        fail(f"cannot write to {printable(out)}: {error.strerror}")


# ------------------------------------------------------------------------------------------ read and write
# How many bytes of what a format can hold, where there is a limit. The names are those of Pillow's save, if it has one.
LIMITS = {"PNG": {"IPTC": 0}, "WEBP": {"dpi": 0, "comment": 0, "IPTC": 0, "PNG texts": 0, "PNG colours": 0},
          "JPEG": {"icc_profile": 255 * 65519, "exif": 65533, "xmp": 65504, "comment": 65533, "IPTC": 65500,
                   "PNG texts": 0, "PNG colours": 0}}
TIFF_TAGS = {270, 271, 272, 305, 306, 315, 33432}  # description, make, model, software, time, artist, copyright
# How the parts of a file begin that read_metadata or Pillow takes care of, or that tell how the old pixels are packed.
KNOWN = re.compile(rb"tEXt|iTXt|zTXt|gAMA|cHRM|sRGB|cICP|IHDR|PLTE|tRNS|IDAT|IEND|iCCP|eXIf|pHYs|acTL|fcTL|fdAT|iDOT|"
                   rb"COM|APP0|APP1Exif\0|APP1http://ns.adobe.com/xap/1.0/\0|APP2ICC_PROFILE|APP2MPF|APP13Photoshop|"
                   rb"APP14|VP8|ALPH|ANIM|ANMF|ICCP|EXIF|XMP |NETSCAPE2.0|ANIMEXTS1.0")
# Namespaces of XMP that speaks of gain maps, depth maps, videos, thumbnails, or a second block of XMP.
ANNOUNCES = re.compile(rb"hdr-?gain-?map|google.com/photos/(1.0/(camera|container|depthmap|image|audio)|dd)/|xmp/note/|"
                       rb"xap/1.0/g/img/|AuxiliaryImage", re.IGNORECASE)


def file_parts(data, image):
    """[(name, content)] of a file's PNG or WebP chunks, JPEG segments, or GIF extensions."""
    if image.format == "GIF":
        return [(name, b"") for name in re.findall(rb"!\xff\x0b([ -~]{11})", data)]
    parts = [(name.encode(), content) for name, content in getattr(image, "applist", [])]  # Pillow's, of JPEG
    png, position = image.format == "PNG", {"PNG": 8, "WEBP": 12}.get(image.format, len(data))
    while position + 8 <= len(data) and (b"IEND", b"") not in parts[-1:]:
        length, name = struct.unpack_from(">I4s", data, position)
        if not png:
            name, length = struct.unpack_from("<4sI", data, position)
        parts.append((name, data[position + 8:position + 8 + length]))
        position += length + (12 if png else 8 + length % 2)
    return parts


def without_thumbnail(exif):
    """EXIF without small copies of the old picture. Nothing else moves in it, as makers' notes hold offsets."""
    tiff = exif.removeprefix(b"Exif\0\0")
    tiff = re.sub(rb"\xff\xd8\xff.*?\xff\xd9", lambda match: bytes(len(match[0])), tiff, flags=re.DOTALL)
    order = "<" if tiff.startswith(b"II") else ">"
    directory, = struct.unpack_from(order + "I", tiff, 4)
    link = directory + 2 + 12 * struct.unpack_from(order + "H", tiff, directory)[0]  # to the thumbnail's directory
    return b"Exif\0\0" + tiff[:link] + bytes(4) + tiff[link + 4:]


def read_metadata(path, image, notes):
    """What goes from a file into its output besides pixels, {name as in LIMITS: value}. `image` is the upright one."""
    data, info, kind = path.read_bytes(), image.info, image.format
    parts = file_parts(data, image)
    metadata = {name: info[name] for name in ("icc_profile", "exif", "xmp", "comment")
                if isinstance(info.get(name), bytes)}
    if isinstance(info.get("dpi"), tuple) and all(0 < value < 2 ** 16 for value in info["dpi"]):
        metadata["dpi"] = info["dpi"]
    if kind in ("JPEG", "MPO"):
        metadata["comment"] = b"\n".join(content for name, content in parts if name == b"COM")
        metadata["IPTC"] = info.get("photoshop", {}).pop(0x0404, b"")
    metadata["PNG texts"] = [part for part in parts if part[0] in (b"tEXt", b"zTXt", b"iTXt") and not
                             part[1].startswith((b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"))]
    if "icc_profile" in metadata or b"iCCP" not in dict(parts):  # else the profile has been applied
        metadata["PNG colours"] = [part for part in parts if part[0] in (b"gAMA", b"cHRM", b"sRGB", b"cICP")]
    metadata["lossless"] = kind == "WEBP" and b"VP8L" in data

    notes += [f"{kind} block {name.decode('latin-1')} is left out" for name, content in parts
              if not KNOWN.match(name + content)]
    if info.get("photoshop"):
        notes.append("Photoshop's blocks are left out, but for IPTC")
    if kind == "TIFF":
        notes.append("TIFF tags are left out, but for description, camera, author, time, resolution, profile and XMP")
    if kind in ("PNG", "JPEG", "MPO") and not data.rstrip(b"\0").endswith((b"\xff\xd9", b"IEND\xaeB`\x82")):
        notes.append("data behind the picture, such as a video, is left out")
    if ANNOUNCES.search(metadata.get("xmp", b"")):
        del metadata["xmp"]
        notes.append("XMP is left out, as it speaks of gain maps, depth maps, videos or thumbnails that are left out")
    try:
        if kind == "TIFF":
            exif = Image.Exif()
            exif.update((tag, value) for tag, value in image.getexif().items() if tag in TIFF_TAGS)
            metadata["exif"] = exif.tobytes() if exif else b""
        elif "Raw profile type exif" in info:  # ImageMagick's way before PNG had a chunk for it
            metadata["exif"] = image.getexif().tobytes()
        if metadata.get("exif"):
            metadata["exif"] = without_thumbnail(metadata["exif"])
    except Exception:  # as with Pillow's decoders
        metadata["exif"] = b""
        notes.append("damaged EXIF is left out")
    return {name: value for name, value in metadata.items() if value}


def read(task):
    """Fills in the task's picture and metadata, or why it cannot."""
    try:
        task.picture = open_picture(task.source)
        task.metadata = read_metadata(task.source, task.picture.file, task.picture.notes)
        task.picture.file = None  # its pixels are in `rgb`
    except (UnreadableImage, OSError) as error:
        task.error = str(error)
    return task


def write(task, args):
    """Writes the task's output with alpha and metadata, whole or not at all, and gives its memory back."""
    image, kind, metadata = task.output, FORMATS[task.target.suffix.lower()], task.metadata
    notes, alpha = task.picture.notes, task.picture.alpha
    options = {"quality": args.quality, "subsampling": 0, "exact": True,  # the last is WebP's: keep hidden colours
               "lossless": metadata.pop("lossless", False)}
    if args.compare:
        image = contact_sheet([[task.picture.rgb, image]], ["input", "output"])
    elif alpha and kind == "JPEG":
        image = on_white(image, alpha)
        notes.append("JPEG has no transparency: composed on white")
    elif alpha:
        image.putalpha(alpha)
    for name, limit in LIMITS[kind].items():
        if len(metadata.get(name, "")) > limit:
            notes.append(f"{kind} cannot hold {name}" + (" of that length" if limit else ""))
            del metadata[name]
    if kind == "PNG":
        chunks = PngInfo()
        for chunk in metadata.pop("PNG texts", []) + metadata.pop("PNG colours", []):
            chunks.add(*chunk)
        if "comment" in metadata:
            chunks.add_text("Comment", metadata["comment"].decode(errors="backslashreplace"))
        if "xmp" in metadata:
            chunks.add_itxt("XML:com.adobe.xmp", metadata["xmp"].decode(errors="replace"))
        options = {"pnginfo": chunks, "compress_type": zlib.Z_RLE}  # a quarter of the default's time, files 2 % larger
    if "IPTC" in metadata:  # a segment of Photoshop's with this one block
        content = metadata["IPTC"] + bytes(len(metadata["IPTC"]) % 2)
        block = struct.pack(">14s4sHHI", b"Photoshop 3.0", b"8BIM", 0x0404, 0, len(metadata["IPTC"])) + content
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(block) + 2) + block
    try:
        if kind == "JPEG" and max(image.size) > 65500:
            raise ValueError("JPEG takes at most 65500 pixels a side: try --format png")
        write_image(image, task.target, **metadata, **options)
        task.done = True
    except (OSError, ValueError) as error:  # of an encoder
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise  # the next image would fail as well
        task.error = f"{printable(task.source)}: {first_line(error)}"
    task.notes, task.picture, task.metadata, task.output = frozenset(notes), None, None, None


# ------------------------------------------------------------------------------------------------ network
def choose_device(name):
    """torch.device of --device; "auto" is this process's GPU, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such name or card, built without it
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
                  and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return "bf16" if native else "fp32"


def without_norm(head):
    """Whether nothing in the head looks at the whole image: what a tile comes to does not depend on the others."""
    return not any(isinstance(layer, (InstanceNorm, nn.GroupNorm)) for layer in head.modules())


def tile_margin(head):
    """How many pixels around a tile the generator's output depends on, in whole cells of its grid of strides.

    Each block sees 8 pixels further (two 3x3 convolutions at a quarter of the size), the other layers 14 together.
    ESA sees further, faintly. A norm over the image and the U-Net see everything: there no margin is enough.
    """
    blocks = sum(isinstance(layer, ResidualBlock) for layer in head.modules())
    return 8 * blocks + 16 if blocks else 128


def tiled(head, x, tile, margin):
    """head(x) in parts that need less memory: each is read with a margin, which is cut off again."""
    if not tile or max(x.shape[-2:]) <= tile + 2 * margin:
        return head(x)
    y, multiple = torch.empty_like(x), getattr(head, "multiple", 4)
    tile = math.ceil(tile / multiple) * multiple  # the network's strides have a grid: all parts begin on it
    for top in range(0, x.shape[-2], tile):
        for left in range(0, x.shape[-1], tile):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = head(x[..., above:top + tile + margin, before:left + tile + margin])
            y[..., top:top + tile, left:left + tile] = part[..., top - above:, left - before:][..., :tile, :tile]
    return y


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
        x = torch.from_numpy(np.stack([np.asarray(task.picture.rgb) for task in batch]))
        x = normalise(x.to(device)).permute(0, 3, 1, 2)  # channels_last, as it lies in files
        with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            y = tiled(head, x, args.tile, tile_margin(head))
        y = x + args.strength * (y.float() - x)
        finite = y.isfinite().flatten(1).all(1).tolist()
        for task, pixels, good in zip(batch, to_uint8(y).permute(0, 2, 3, 1).cpu().numpy(), finite):
            task.output = Image.fromarray(pixels)
            task.error = None if good else f"{printable(task.source)}: the head's output in {precision} is not finite"
        return
    except torch.AcceleratorError:
        raise  # the GPU itself failed, and no image would succeed after it
    except RuntimeError as error:
        short = "memory" in str(error) or "ALLOC_FAILED" in str(error)
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
    futures = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > 2 * THREADS:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def enhance_files(tasks, head, args, device, precision):
    """Reads, enhances and writes all tasks. Ctrl-C, SIGTERM and a full disk end the program here; what is being written
    at that moment is finished first."""
    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)

    def enhanced(tasks):
        for batch in batches((task for task in tasks if not task.error), args, device):
            enhance_batch(head, batch, args, device, precision)
            yield from (task for task in batch if not task.error)

    pool = ThreadPoolExecutor(THREADS)
    try:
        with tqdm(in_order(pool, read, tasks), total=len(tasks), unit=" images", disable=True if RANK else None) as bar:
            for _ in in_order(pool, lambda task: write(task, args), enhanced(bar)):
                pass
    except (KeyboardInterrupt, OSError) as stopped:  # a signal, or the disk: all else is per file
        pool.shutdown(cancel_futures=True)  # waits for what is being written
        rest = f"{sum(task.done for task in tasks)} of {len(tasks)} images are done, the same command does the rest"
        if isinstance(stopped, OSError):
            fail(f"cannot write to {printable(args.out)}: {stopped.strerror}; {rest}")
        print(f"interrupted; {rest}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])


def main(args):
    if not 0 <= args.strength < math.inf:
        fail(f"--strength is {args.strength}: 0 gives the input, 1 the head's output")
    if not 1 <= args.quality <= 100:
        fail(f"--quality is {args.quality}: it goes from 1 to 100")
    if args.batch_size < 0:
        fail(f"--batch-size is {args.batch_size}: 1 or more, or 0 for the default")
    if args.tile != 0 and args.tile < 64:
        fail(f"--tile is {args.tile}: 0, or a side of 64 pixels and more")
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

    # The plan. As with make: done is what these settings made after the input was last changed.
    settings = {"model": str(args.model), "weights": weights, "strength": args.strength,
                "tile": 0 if without_norm(head) else args.tile, "compare": args.compare, "quality": args.quality}
    since = prepare(args.out, [target for _, target in files], settings, args.overwrite)
    share = files[RANK::WORLD_SIZE]
    tasks = [Task(path, target) for path, target in share if not os.path.isfile(target)
             or target.stat().st_mtime < max(since, path.stat().st_mtime if path.is_file() else 0)]

    # The work
    start = time.perf_counter()
    enhance_files(tasks, head, args, device, precision)
    seconds = time.perf_counter() - start

    # The report
    for task in tasks:
        if task.error:
            print(f"failed: {task.error}", file=sys.stderr)
    notes = [(note, task.source) for task in tasks for note in task.notes]
    for note, count in sorted(Counter(note for note, _ in notes).items()):
        print(f"note: {note} ({count} images, {printable(dict(notes)[note])} is one)")
    done, failed = sum(task.done for task in tasks), sum(task.error is not None for task in tasks)
    rank = f"rank {RANK} of {WORLD_SIZE}: " if WORLD_SIZE > 1 else ""
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GB" if device.type == "cuda" else ""
    present = f"{len(share) - len(tasks)} were there already (--overwrite makes them anew); "
    print(f"{rank}{done} images enhanced in {seconds:.1f} s ({done / seconds:.1f} images/s in {precision}{memory}) -> "
          f"{printable(args.out)}; {present if len(share) > len(tasks) else ''}{failed} failed", flush=True)
    if WORLD_SIZE > 1:  # torchrun ends all processes when one fails, so that none may before all are through
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.barrier()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER",
         help="images, and folders that are searched for images")
    flag("--model", metavar="DIR|HUB_ID", default=SHIPPED_HEAD,
         help="the head: a folder with config.json and model.safetensors, or a Hugging Face Hub repository (default: "
              "assets/head beside this script)")
    flag("--out", type=Path, metavar="DIR", default="enhanced", help="output folder (default: %(default)s)")
    flag("--batch-size", type=int, default=0, metavar="N", help="consecutive images of one size that go through the "
         "network together (default: 8 megapixels on a GPU, which is 32 images at 512x512; 1 elsewhere)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one (default: auto)")
    flag("--precision", choices=["auto", "bf16", "fp32"], default="auto",
         help="auto = bf16 on GPUs that compute in it, and for heads without a norm on such CPUs (1.2 to 1.4 times as "
              "fast), else fp32; the last line says which (default: auto)")
    flag("--strength", type=float, default=1.0, help="0 = input, 1 = the head's output; blends between and beyond "
         "(default: 1)")
    flag("--compare", action="store_true", help="write input and output side by side instead of the output alone")
    flag("--tile", type=int, default=0, metavar="N",
         help="work in tiles of this side and a margin, where images are too large for the memory: exact for heads "
              "without norm and attention, with ESA at most 2 gray levels off (measured at 1024 to 1300 px); "
              "colours of other heads may drift from tile to tile. 0 = whole images (default: 0)")
    flag("--overwrite", action="store_true", help="make images anew that are in --out already")
    flag("--format", choices=["keep", "png", "jpg", "webp"], default="keep",
         help="keep = PNG, JPEG and WebP stay, lossless where they are; all others become PNG (default: keep)")
    flag("--quality", type=int, default=95, help="of JPEG and WebP files, 1 to 100 (default: 95)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt as stopped:  # before or after the loop
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
