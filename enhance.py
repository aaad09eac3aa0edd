"""Makes the fast model's portraits look like the slow model's: images in, enhanced images of the same size out.

python enhance.py photos                                             with the head in assets/head -> enhanced/
python enhance.py photo.png --model runs/cyclegan/last --out mine    with a head of one's own
python enhance.py photos --compare --out side-by-side                input and output side by side
python enhance.py photos --model someone/some-head --out other       with a head from the Hugging Face Hub
torchrun --nproc_per_node=8 enhance.py photos                        the files shared out over eight GPUs

What is in --out already is skipped, so after an interruption the same command does the rest. Transparency, EXIF, ICC
profile and PNG texts are carried over. A file that cannot be read is named at the end; all others are done.

One image's way: output_paths -> header_size (what goes together) -> read_picture -> enhance_batch -> write_picture
"""
import argparse
import errno
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modules import (contact_sheet, fail, first_line, gray_to_8_bits, list_images, load_head, normalise,
                     pad_to_multiple, to_uint8, write_atomically, write_image)

SHIPPED_HEAD = Path(__file__).resolve().parent / "assets" / "head"
SETTINGS = ".enhance.json"  # in --out: how the images there were made
FORMATS = Image.registered_extensions()  # {".jpg": "JPEG", ...}
GPU_BATCH_PIXELS = 32 * 512 * 512
WORKERS_FROM = 64  # images on a GPU: for fewer, starting the processes that read takes longer than reading
COMPILE_FROM = 1000  # images on a GPU: a guess at how many pay for compiling, not a measurement
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
warnings.filterwarnings("ignore", module="PIL")  # odd tags, large sizes: what matters raises


# -------------------------------------------------------------------------------------------------- paths
def without_links(path):
    """The folder with links resolved, the name as it is: writing to a link replaces the link, not its target."""
    return path.parent.resolve() / path.name


def printable(path):
    """A path for the terminal: control characters and broken encodings are escaped."""
    return str(path) if str(path).isprintable() else repr(str(path))


def output_paths(inputs, out, form):
    """{input path: output path}. Fails where an original or another output would be overwritten.

    One folder is mirrored in `out` itself; of several inputs, each folder gets one of its own there, as with `cp -r`.
    """
    names = {}  # of the outputs, relative to `out`, still with the inputs' suffixes
    for path in inputs:
        if not os.path.lexists(path):
            fail(f"there is no file or folder {printable(path)}")
        if out.exists() and out.samefile(path if path.is_dir() else path.parent):
            fail(f"--out {printable(out)} is where the originals are, and they are never overwritten: "
                 "choose another --out")
        if path.is_dir():
            root, target, files = path.resolve(), out.resolve(), list_images(path)
            if target.is_relative_to(root):  # what earlier runs made is no input
                files = [file for file in files if not file.is_relative_to(path / target.relative_to(root))]
            top = root.name if len(inputs) > 1 else ""
            names |= {file: top / file.relative_to(path) for file in files}
        else:
            names[path] = Path(path.name)
    if not names:
        fail("there is no image but those in --out")

    # The three formats that carry all metadata stay, the others become PNG: a.bmp -> a.png.
    kept = {"PNG", "JPEG", "WEBP"} if form == "keep" else {FORMATS["." + form]}
    suffix = ".png" if form == "keep" else "." + form
    changed = {path for path, name in names.items() if FORMATS.get(name.suffix.lower()) not in kept}
    if changed and form == "keep":
        others = " ".join(sorted({path.suffix for path in changed}))
        print(f"note: {len(changed)} images become .png ({others} is not kept)")
    wanted = {path: name.with_suffix(suffix) if path in changed else name for path, name in names.items()}
    count, originals, origin = Counter(wanted.values()), set(map(without_links, names)), {}
    for path, name in wanted.items():
        if path in changed and count[name] > 1:  # a.bmp.png where there is an a.png too
            name = names[path].with_name(names[path].name + suffix)
        target = out / name
        other = origin.setdefault(target, path)
        if without_links(other) != without_links(path):
            fail(f"{printable(other)} and {printable(path)} would both become {printable(target)}: "
                 "give each its own --out")
        if without_links(target) in originals:
            fail(f"{printable(target)} is one of the originals, and they are never overwritten: choose another --out")
    return {path: target for target, path in origin.items()}


def prepare(out, targets, settings, overwrite):
    """Makes the output folder, removes what killed runs left half-written in it, and writes the settings down.

    Returns the time before which nothing there counts as done. Fails if what is there was made with other settings.
    """
    earlier = {}
    if not overwrite:
        try:
            earlier = json.loads((out / SETTINGS).read_text())
        except (OSError, ValueError):
            if any(target.exists() for target in targets):
                fail(f"{printable(out)} holds images of these names, but no {SETTINGS} that says how they were made: "
                     "choose another --out, or let --overwrite replace them")
    if earlier.get("weights") == settings["weights"]:
        earlier["model"] = settings["model"]  # the same head by another name
    for name, value in settings.items():
        if earlier and name != "weights" and earlier.get(name) != value:
            fail(f"{printable(out)} was made with --{name} {earlier.get(name)}, not {value}: choose another --out, "
                 "or let --overwrite make the images anew")
    alike = earlier == settings  # if not, all is to be made: there is nothing yet, or the head was trained further
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in {target.parent for target in targets}:
            for path in folder.glob(f".*.{'[0-9a-f]' * 32}.tmp"):  # the names of write_atomically
                path.unlink()
        if not alike:
            write_atomically(out / SETTINGS, lambda path: path.write_text(json.dumps(settings, indent=2)))
        return (out / SETTINGS).stat().st_mtime if alike else math.inf
    except OSError as error:
        fail(f"cannot write to {printable(out)}: {error.strerror}")


# ------------------------------------------------------------------------------------------ read and write
@dataclass(eq=False)
class Picture:
    """An image on its way through the program, and what of its file the network does not see."""
    path: Path
    rgb: np.ndarray | None = None  # uint8 (H, W, 3), upright
    alpha: Image.Image | None = None
    metadata: dict | None = None  # arguments of Pillow's save: icc_profile, exif, xmp, dpi
    text: dict | None = None  # PNG texts; many image generators write the prompt there
    notes: list | None = None  # what is not carried over
    output: np.ndarray | None = None  # uint8 (H, W, 3)
    error: str | None = None  # why it cannot be read or enhanced


def header_size(path):
    """(height, width) of the upright image by the file's header, None if there is none; no pixel is decoded."""
    try:
        with Image.open(path if path.is_file() else os.devnull) as image:  # opening a pipe would wait for ever
            turned = "exif" in image.info and image.getexif().get(0x0112, 1) >= 5  # the tag "orientation"
            return image.size if turned else image.size[::-1]
    except Exception:  # read_picture meets the error again and reports it
        return None


def read_picture(path):
    """The Picture of a file. Raises whatever Pillow's decoders raise, which is nearly everything."""
    if not path.is_file():
        raise OSError("not a regular file, or a link to none")
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
            if deep and "transparency" in info:
                raise ValueError("a transparent colour in 16 bits: convert it to an alpha channel")
            alpha = image.convert("RGBA").getchannel("A")
        return Picture(path, np.array(to_rgb(image, metadata, notes)), alpha, metadata, text, notes)


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
    return image.convert("RGB")


class Pictures(Dataset):
    """Pictures()[path] -> Picture, with an error where the file cannot be read."""

    def __getitem__(self, path):
        try:
            return read_picture(path)
        except Exception as error:  # of a decoder
            return Picture(path, error=first_line(error))


def write_picture(picture, target, quality, compare):
    """Writes the picture's output with its alpha and metadata, whole or not at all."""
    image, kind, options = Image.fromarray(picture.output), FORMATS[target.suffix.lower()], dict(picture.metadata)
    if compare:
        image = contact_sheet([[Image.fromarray(picture.rgb), image]], ["input", "output"])
    elif picture.alpha is not None and kind == "JPEG":
        image = Image.composite(image, Image.new("RGB", image.size, "white"), picture.alpha)
        picture.notes.append("JPEG has no transparency: composed on white")
    elif picture.alpha is not None:
        image.putalpha(picture.alpha)
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        for key, value in picture.text.items():
            options["pnginfo"].add_text(key, value)
        if "xmp" in options and "XML:com.adobe.xmp" not in picture.text:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", options["xmp"].decode(errors="replace"))
        options["compress_type"] = zlib.Z_RLE  # a quarter of the default's time for files 2 % larger
    else:
        if picture.text:
            picture.notes.append(f"{kind} cannot hold PNG texts")
        options |= {"quality": quality, "subsampling": 0, "exact": True}  # the last is WebP's: keep hidden colours
    write_image(image, target, **options)


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
    return head._hub_mixin_config.get("norm") == "none"


def tile_margin(head):
    """How many pixels around a tile the generator's output depends on, in whole cells of its grid of strides.

    Each block sees 8 pixels further (two 3x3 convolutions at a quarter of the size), the other layers 14 together, and
    17 where up-sampling is bilinear.
    ESA sees further, faintly. A norm over the image and the U-Net see everything: there no margin is enough.
    """
    config = head._hub_mixin_config
    return 8 * config.get("blocks", 14) + (20 if config.get("upsample") == "bilinear" else 16)


def tiled(head, x, tile, margin):
    """head(x) in parts that need less memory: each is read with a margin, of which the network's view is kept free."""
    height, width = x.shape[-2:]
    if not tile or max(height, width) <= tile + 2 * margin:
        return head(x)
    # Windows begin on the grid of the network's strides and have one size: the last is shifted inwards.
    multiple = getattr(head, "multiple", 4)
    x, tile = pad_to_multiple(x, multiple), math.ceil(tile / multiple) * multiple
    side = tile + 2 * margin
    tops, lefts = ([min(start, max(length - side, 0)) for start in range(0, max(length - 2 * margin, 1), tile)]
                   for length in x.shape[-2:])
    y = torch.empty_like(x)
    for top in tops:
        for left in lefts:
            # The margin above and to the left is dropped, but for the image's border; below and to the right the
            # next windows overwrite it.
            window = head(x[..., top:top + side, left:left + side])
            skip = margin if top else 0, margin if left else 0
            y[..., top + skip[0]:top + side, left + skip[1]:left + side] = window[..., skip[0]:, skip[1]:]
    return y[..., :height, :width]


@torch.inference_mode()
def enhance_batch(network, pictures, args, device, precision):
    """Gives each of the pictures, all of one size, its output: x + strength * (network(x) - x)."""
    x = torch.stack([torch.from_numpy(picture.rgb) for picture in pictures])
    x = normalise(x.to(device)).permute(0, 3, 1, 2)  # channels_last, as it lies in files
    with torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, precision != "fp32"):
        y = tiled(network, x, args.tile, tile_margin(network))
    y = x + args.strength * (y.float() - x)
    finite = y.isfinite().flatten(1).all(1).tolist()
    for i, output in enumerate(to_uint8(y).permute(0, 2, 3, 1).cpu().numpy()):
        pictures[i].output = output
        pictures[i].error = None if finite[i] else f"the head's output in {precision} is not finite"


def in_halves(run, pictures):
    """run(pictures), and where that fails the same with both halves, down to single pictures, which get an error.

    Memory may be short for all of them together, or one has pixels of another size than its header tells.
    """
    try:
        return run(pictures)
    except torch.AcceleratorError:
        raise  # the GPU itself failed, and no image would succeed after it
    except RuntimeError as caught:
        error = first_line(caught)
        signs = "out of memory", "allocate memory", "enough memory", "ALLOC_FAILED"
        if any(sign in str(caught) for sign in signs):
            error = "out of memory: try --tile 512"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # not above: there the exception still holds the tensors
    if len(pictures) == 1:
        pictures[0].error = error
    else:
        half = len(pictures) // 2
        in_halves(run, pictures[:half])
        in_halves(run, pictures[half:])


# --------------------------------------------------------------------------------------------------- main
def enhance_files(todo, head, args, device, precision, hide_bar):
    """Reads, enhances and writes `todo`, {input path: output path}.

    Returns the list of inputs that are done, {input that failed: reason}, and a list of (note, input). Ctrl-C, SIGTERM
    and a full disk end the program here; what is being written at that moment is finished first.
    """
    # Files of one size go through the network together. A CPU gains nothing by batches, nor by processes that read
    # ahead: the network keeps all its cores busy.
    cuda, threads = device.type == "cuda", min(8, os.cpu_count() or 1)
    writers, sizes, batches = ThreadPoolExecutor(threads), defaultdict(list), []
    for path, size in zip(todo, writers.map(header_size, todo)):
        sizes[size].append(path)
    for size, paths in sorted(sizes.items(), key=lambda item: -len(item[1])):  # the most frequent size first
        count = args.batch_size or (max(1, GPU_BATCH_PIXELS // math.prod(size)) if cuda and size else 1)
        batches += [paths[start:start + count] for start in range(0, len(paths), count)]
    loader = DataLoader(Pictures(), batch_sampler=batches, collate_fn=list,
                        num_workers=threads if cuda and len(todo) >= WORKERS_FROM else 0)
    done, failed, notes, pending = [], {}, [], deque()

    # Batches like the first are compiled: each other shape would cost as long again.
    compiled, shape = head, None
    if args.compile or args.compile is None and cuda and len(todo) >= COMPILE_FROM:
        compiled, torch.backends.cudnn.benchmark = torch.compile(head, dynamic=False), True

    def run(pictures):
        nonlocal compiled, shape
        this = len(pictures), *pictures[0].rgb.shape
        shape = shape or this
        try:
            return enhance_batch(compiled if this == shape else head, pictures, args, device, precision)
        except torch.OutOfMemoryError:
            shape = None  # the halves are the next to be compiled
            raise
        except torch._dynamo.exc.TorchDynamoException:
            print("note: torch.compile does not work here (is there a C compiler?), so the head runs uncompiled")
        compiled = head
        enhance_batch(head, pictures, args, device, precision)

    def write(picture):
        try:
            write_picture(picture, todo[picture.path], args.quality, args.compare)
            done.append(picture.path)
            notes.extend((note, picture.path) for note in picture.notes)
        except Exception as error:  # of an encoder
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise  # the next image would fail as well
            failed[picture.path] = first_line(error)

    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with tqdm(total=len(todo), unit=" images", disable=True if hide_bar else None) as bar:
            for batch in loader:
                if readable := [picture for picture in batch if not picture.error]:
                    in_halves(run, readable)
                failed |= {picture.path: picture.error for picture in batch if picture.error}
                pending.extend(writers.submit(write, picture) for picture in batch if not picture.error)
                # The writers encode behind the network, a bounded number of images later.
                while pending and (len(pending) > 2 * (threads + len(batch)) or pending[0].done()):
                    pending.popleft().result()
                bar.update(len(done) + len(failed) - bar.n)
            for future in pending:
                future.result()
            bar.update(len(done) + len(failed) - bar.n)
    except (KeyboardInterrupt, OSError) as stopped:  # a signal, or the disk: all else is per file
        writers.shutdown(cancel_futures=True)  # waits for what is being written
        rest = f"{len(done)} of {len(todo)} images are done, the same command does the rest"
        if isinstance(stopped, OSError):
            fail(f"cannot write to {printable(args.out)}: {stopped.strerror}; {rest}")
        print(f"interrupted; {rest}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    return done, failed, notes


def main(args):
    if not 0 <= args.strength < math.inf:
        fail(f"--strength is {args.strength}: 0 gives the input, 1 the head's output")
    if not 1 <= args.quality <= 100:
        fail(f"--quality is {args.quality}: it goes from 1 to 100")
    if args.batch_size < 0:
        fail(f"--batch-size is {args.batch_size}: 1 or more, or 0 for the default")
    if args.tile != 0 and args.tile < 64:
        fail(f"--tile is {args.tile}: 0, or a side of 64 pixels and more")

    # Under torchrun each process does its share of the files. Rank 0 plans and reports; each names its own failures.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")
    targets = output_paths(args.inputs, args.out, args.format) if rank == 0 else None

    # The network
    device = choose_device(args.device)
    head = load_head(args.model)
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in head.state_dict().values())).hexdigest()
    head = head.to(device)
    if device.type != "mps":
        head = head.to(memory_format=torch.channels_last)  # on CPUs, too: 0.82 of the time
    precision = choose_precision(device, head) if args.precision == "auto" else args.precision
    if args.tile and not without_norm(head):
        print("note: this head's norm sees one tile at a time: with --tile, brightness and colour may drift from tile "
              "to tile. Whole images are better where the memory allows it")

    # The plan, made by rank 0. As with make: done is what these settings made after the input was last changed.
    settings = {"model": str(args.model), "weights": weights, "strength": args.strength,
                "tile": 0 if without_norm(head) else args.tile, "compare": args.compare, "quality": args.quality}
    plan = [(targets, prepare(args.out, targets.values(), settings, args.overwrite))] if rank == 0 else [None]
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.broadcast_object_list(plan)
    targets, since = plan[0]
    share = list(targets.items())[rank::world]
    todo = {path: target for path, target in share if not target.is_file()
            or target.stat().st_mtime < max(since, path.stat().st_mtime if path.is_file() else 0)}

    # The work
    start = time.perf_counter()
    done, failed, notes = enhance_files(todo, head, args, device, precision, hide_bar=rank > 0)

    # The report, of all ranks together
    for path, error in sorted(failed.items()):
        print(f"failed: {printable(path)}: {error}", file=sys.stderr, flush=True)
    reports = [(len(done), len(failed), len(share) - len(todo), notes)]
    if world > 1:
        reports *= world
        dist.all_gather_object(reports, reports[rank])  # waits for the slowest
    done, failed, present = (sum(report[i] for report in reports) for i in range(3))
    notes = [note for report in reports for note in report[3]]
    for note, count in sorted(Counter(note for note, _ in notes).items()):
        print(f"note: {note} ({count} images, {printable(dict(notes)[note])} is one)")
    seconds = time.perf_counter() - start
    cuda = device.type == "cuda"
    memory = f", peak memory {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GB" if cuda else ""
    present = f"{present} were there already (--overwrite makes them anew); " if present else ""
    print(f"{done} images enhanced in {seconds:.1f} s ({done / seconds:.1f} images/s in {precision}{memory}) -> "
          f"{printable(args.out)}; {present}{failed} failed", flush=True)
    if world > 1:
        dist.barrier()  # torchrun ends all ranks as soon as one of them has failed
        dist.destroy_process_group()
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
    flag("--batch-size", type=int, default=0, metavar="N", help="images of one size that go through the network "
         "together (default: 8 megapixels on a GPU, which is 32 images at 512x512; 1 elsewhere)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one (default: auto)")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
         help="auto = bf16 on GPUs that compute in it, and for heads without a norm on such CPUs (1.2 to 1.4 times as "
              "fast), else fp32; the last line says which (default: auto)")
    flag("--strength", type=float, default=1.0, help="0 = input, 1 = the head's output; blends between and beyond "
         "(default: 1)")
    flag("--compare", action="store_true", help="write input and output side by side instead of the output alone")
    flag("--tile", type=int, default=0, metavar="N",
         help="work in tiles of this side and a margin, where images are too large for the memory: exact for heads "
              "with norm none and attention none, with ESA at most 2 gray levels off (measured at 1024 to 1300 px); "
              "colours of other heads may drift from tile to tile. 0 = whole images (default: 0)")
    flag("--overwrite", action="store_true", help="make images anew that are in --out already")
    flag("--format", choices=["keep", "png", "jpg", "webp"], default="keep",
         help="keep = PNG, JPEG and WebP stay, all others become PNG (default: keep)")
    flag("--quality", type=int, default=95, help="of JPEG and WebP files, 1 to 100 (default: 95)")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the head for the most frequent size: "
         f"slow to start, then faster (default: on CUDA from {COMPILE_FROM} images on)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt as stopped:  # before or after the loop
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
