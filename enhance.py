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
import re
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
from PIL.PngImagePlugin import PngInfo, iTXt
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
    for path in map(Path, inputs):
        if not os.path.lexists(path):
            fail(f"there is no file or folder {printable(path)}")
        if out.exists() and out.samefile(path if path.is_dir() else path.parent):
            fail(f"--out {printable(out)} is where the originals are, and they are never overwritten: "
                 "choose another --out")
        if path.is_dir():
            root, target = path.resolve(), out.resolve()
            earlier = path / target.relative_to(root) if target.is_relative_to(root) else None
            top = root.name if len(inputs) > 1 else ""
            names |= {file: top / file.relative_to(path) for file in list_images(path)
                      if not earlier or not file.is_relative_to(earlier)}
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
    count = Counter(name.with_suffix(suffix) if path in changed else name for path, name in names.items())
    originals, origin = set(map(without_links, names)), {}
    for path, name in names.items():
        if path in changed:  # a.bmp.png where there is an a.png too
            alone = count[name.with_suffix(suffix)] == 1
            name = name.with_suffix(suffix if alone else name.suffix + suffix)
        other = origin.setdefault(out / name, path)
        if without_links(other) != without_links(path):
            fail(f"{printable(other)} and {printable(path)} would both become {printable(out / name)}: "
                 "give each its own --out")
        if without_links(out / name) in originals:
            fail(f"{printable(out / name)} is one of the originals, and they are never overwritten: "
                 "choose another --out")
    return {path: target for target, path in origin.items()}


def made_alike(out, settings, targets):
    """Whether the images in `out` were made with these settings. Fails if they were made with others; False if there
    is none yet, or if the weights of the same head have changed since."""
    try:
        earlier = json.loads((out / SETTINGS).read_text())
    except (OSError, ValueError):
        if any(target.exists() for target in targets):
            fail(f"{printable(out)} holds images of these names, but no {SETTINGS} that says how they were made: "
                 "choose another --out, or let --overwrite replace them")
        return False
    if earlier.get("weights") == settings["weights"]:
        earlier["model"] = settings["model"]  # the same head by another name
    for name in settings.keys() - {"weights"}:
        if earlier.get(name) != settings[name]:
            fail(f"{printable(out)} was made with --{name} {earlier.get(name)}, not {settings[name]}: choose another "
                 "--out, or let --overwrite make the images anew")
    return earlier == settings


def prepare(out, targets, settings, alike):
    """Makes the output folder, removes what killed runs left half-written in it, and writes new settings down.
    Returns the time before which nothing there counts as done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in {target.parent for target in targets}:
            for path in folder.glob(".*.tmp"):
                if re.search(r"\.[0-9a-f]{32}\.tmp$", path.name):  # the names of write_atomically
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
    rgb: np.ndarray  # uint8 (H, W, 3), upright
    alpha: Image.Image | None
    metadata: dict  # arguments of Pillow's save: icc_profile, exif, xmp, dpi
    text: dict  # PNG texts; many image generators write the prompt there
    notes: list  # what is not carried over


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
            if deep:
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
    if image.mode == "P":  # by way of RGBA, which knows palettes with transparency
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


class Pictures(Dataset):
    """The files as (path, Picture, None), or (path, None, reason) where one cannot be read."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, index):
        try:
            return self.paths[index], read_picture(self.paths[index]), None
        except Exception as error:  # of a decoder
            return self.paths[index], None, first_line(error)


def write_picture(picture, output, target, quality, compare):
    """Writes uint8 (H, W, 3) with the picture's alpha and metadata, whole or not at all."""
    image, kind, options = Image.fromarray(output), FORMATS[target.suffix.lower()], dict(picture.metadata)
    if compare:
        image = contact_sheet([[Image.fromarray(picture.rgb), image]], ["input", "output"])
    elif picture.alpha is not None and kind == "JPEG":
        image = Image.composite(image, Image.new("RGB", image.size, "white"), picture.alpha)
        picture.notes.append("JPEG has no transparency: composed on white")
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
            picture.notes.append(f"{kind} cannot hold PNG texts")
        options |= {"quality": quality, "subsampling": 0} if kind == "JPEG" else {"quality": quality, "exact": True}
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
        torch.cuda.set_device(device)  # pinned memory and events go by it
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
    return getattr(head, "_hub_mixin_config", {}).get("norm") == "none"


def tile_margin(head):
    """How many pixels around a tile the generator's output depends on, in whole cells of its grid of strides.

    Each block sees 8 pixels further (two 3x3 convolutions at a quarter of the size), the other layers 14 together.
    ESA sees further, faintly. A norm over the image and the U-Net see everything: there no margin is enough.
    """
    return 8 * getattr(head, "_hub_mixin_config", {}).get("blocks", 14) + 16


def tiled(head, x, tile, margin):
    """head(x) in parts that need less memory: each is read with a margin, of which the network's view is kept free."""
    height, width = x.shape[-2:]
    if not tile or max(height, width) <= tile + 2 * margin:
        return head(x)
    # Windows begin on the grid of the network's strides and have one size: the last is shifted inwards.
    multiple = getattr(head, "multiple", 4)
    tile, margin = (math.ceil(length / multiple) * multiple for length in (tile, margin))
    x, side = pad_to_multiple(x, multiple), tile + 2 * margin
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
def enhance_batch(network, pictures, strength, device, precision):
    """Pictures of one size -> x + strength * (network(x) - x) as uint8 (N, H, W, 3), and (N,): is all of it finite?

    Both come with an event on a GPU, which is not waited for: they are there when the event has happened.
    """
    cuda = device.type == "cuda"
    batch = torch.stack([torch.from_numpy(picture.rgb) for picture in pictures])
    batch = (batch.pin_memory() if cuda else batch).to(device, non_blocking=cuda)
    x = normalise(batch).permute(0, 3, 1, 2)  # channels_last, as it lies in files
    with torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, precision != "fp32"):
        y = network(x)
    y = x + strength * (y.float() - x)
    finite = y.isfinite().flatten(1).all(1).to("cpu", non_blocking=cuda)
    output = to_uint8(y).permute(0, 2, 3, 1).contiguous().to("cpu", non_blocking=cuda)
    event = torch.cuda.Event(blocking=True) if cuda else None  # blocking: threads that wait for it sleep
    if event:
        event.record()
    return output, finite, event


def in_parts(run, pictures, batch_sizes):
    """Yields (part, run(part), None), or ([picture], None, why it failed). The parts are pictures of one size, at most
    batch_sizes[size], which is halved where memory is short. Other errors of the network fail image by image."""
    while pictures:
        # The whole batch, unless a header tells another size than the pixels have.
        size = pictures[0].rgb.shape[:2]
        equal = [picture for picture in pictures if picture.rgb.shape[:2] == size]
        part, result = equal[:batch_sizes.setdefault(size, len(equal))], None
        try:
            result, error = run(part), None
        except torch.AcceleratorError:
            raise  # the GPU itself failed, and no image would succeed after it
        except RuntimeError as caught:
            error = first_line(caught)
            signs = "out of memory", "allocate memory", "enough memory", "ALLOC_FAILED"
            short = isinstance(caught, torch.OutOfMemoryError) or any(sign in str(caught) for sign in signs)
        if error and short:
            error = "out of memory: try --tile 512"
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # not above: there the exception still holds the tensors
        if error and len(part) > 1:
            batch_sizes[size] = len(part) // 2 if short else 1
            continue
        yield part, result, error
        pictures = [picture for picture in pictures if picture not in part]


# --------------------------------------------------------------------------------------------------- main
def main(args):
    for name, valid, rule in (("strength", 0 <= args.strength < math.inf, "0 gives the input, 1 the head's output"),
                              ("quality", 1 <= args.quality <= 100, "it goes from 1 to 100"),
                              ("batch-size", args.batch_size >= 0, "1 or more, or 0 for the default"),
                              ("tile", args.tile == 0 or args.tile >= 64, "0, or a side of 64 pixels and more")):
        if not valid:
            fail(f"--{name} is {getattr(args, name.replace('-', '_'))}: {rule}")
    if args.model == SHIPPED_HEAD and not SHIPPED_HEAD.is_dir():
        fail("the head that comes with the kit, assets/head, is missing: give --model a folder such as "
             "runs/cyclegan/last, which train_cyclegan.py writes, or a Hugging Face Hub repository")

    # Under torchrun each process does its share of the files. Rank 0 plans and reports; each names its own failures.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        sys.stdout = open(os.devnull, "w")
    out = Path(args.out)
    targets = output_paths(args.inputs, out, args.format) if rank == 0 else None

    # The network
    device = choose_device(args.device)
    head = load_head(args.model)
    precision = choose_precision(device, head) if args.precision == "auto" else args.precision
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in head.state_dict().values())).hexdigest()
    head = head.to(device)
    if device.type != "mps":
        head = head.to(memory_format=torch.channels_last)  # on CPUs, too: 0.82 of the time
    seamless = without_norm(head)
    if args.tile and not seamless:
        print("note: this head's norm sees one tile at a time: with --tile, brightness and colour may drift from tile "
              "to tile. Whole images are better where the memory allows it")

    # As with make: done is what these settings made after the input was last changed.
    settings = {"model": str(args.model), "weights": weights, "strength": args.strength,
                "tile": 0 if seamless else args.tile, "compare": args.compare, "quality": args.quality}
    plan = None
    if rank == 0:
        alike = not args.overwrite and made_alike(out, settings, targets.values())
        plan = targets, prepare(out, targets.values(), settings, alike)
    if world > 1:
        plans = [plan]
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        dist.broadcast_object_list(plans)
        plan = plans[0]
    targets, since = plan
    share = list(targets.items())[rank::world]
    todo = [path for path, target in share if not target.is_file()
            or target.stat().st_mtime < max(since, path.stat().st_mtime if path.is_file() else 0)]

    # Files of one size go through the network together. A CPU gains nothing by batches, nor by processes that read
    # ahead: the network keeps all its cores busy.
    threads = min(8, os.cpu_count() or 1)
    writers, groups = ThreadPoolExecutor(threads), defaultdict(list)
    for index, size in enumerate(writers.map(header_size, todo)):
        groups[size].append(index)
    cuda = device.type == "cuda"
    batch_sizes = {size: args.batch_size or (max(1, GPU_BATCH_PIXELS // math.prod(size)) if cuda and size else 1)
                   for size in groups}
    batches = [indices[start:start + batch_sizes[size]] for size, indices in groups.items()
               for start in range(0, len(indices), batch_sizes[size])]
    loader = DataLoader(Pictures(todo), batch_sampler=batches, collate_fn=list,
                        num_workers=threads if cuda and len(todo) >= WORKERS_FROM else 0)

    # Whole batches of the most frequent size are compiled: any other shape would cost as long again.
    compiled, frequent = None, max(groups, key=lambda size: len(groups[size]), default=None)
    if args.compile or args.compile is None and cuda and len(todo) >= COMPILE_FROM:
        compiled, torch.backends.cudnn.benchmark = torch.compile(head, dynamic=False), True

    def run(pictures):
        nonlocal compiled
        whole = pictures[0].rgb.shape[:2] == frequent and len(pictures) == batch_sizes[frequent]
        network = compiled if whole and compiled is not None else head
        try:
            return enhance_batch(lambda x: tiled(network, x, args.tile, margin), pictures, args.strength, device,
                                 precision)
        except RuntimeError as error:
            if network is head or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
        print("note: torch.compile does not work here (is there a C compiler?), so the head runs uncompiled")
        compiled = None
        return run(pictures)

    def write(picture, output, finite, event):
        try:
            if event:
                event.synchronize()
            if not finite:
                raise ValueError(f"the head's output in {precision} is not finite")
            write_picture(picture, output.numpy(), targets[picture.path], args.quality, args.compare)
            done.append(picture.path)
            for note in picture.notes:
                notes[note].append(picture.path)
        except Exception as error:  # of an encoder
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise  # the next image would fail as well
            failed[picture.path] = first_line(error)

    # The loop: read, enhance; the writers encode behind it, a bounded number of images later. On Ctrl-C and SIGTERM it
    # ends in an orderly way, on a second one at once.
    def interrupt(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    done, failed, notes, pending = [], {}, defaultdict(list), deque()
    margin, start = tile_margin(head), time.perf_counter()
    try:
        with tqdm(total=len(todo), unit=" images", disable=True if rank else None) as bar:
            for batch in loader:
                failed |= {path: error for path, _, error in batch if error}
                pictures = [picture for _, picture, _ in batch if picture]
                for part, result, error in in_parts(run, pictures, batch_sizes):
                    if error:
                        failed[part[0].path] = error
                        continue
                    output, finite, event = result
                    for i, picture in enumerate(part):
                        pending.append(writers.submit(write, picture, output[i], finite[i], event))
                while pending and (len(pending) > 2 * (threads + len(batch)) or pending[0].done()):
                    pending.popleft().result()
                bar.update(len(done) + len(failed) - bar.n)
            for future in pending:
                future.result()
            bar.update(len(todo) - bar.n)
    except (KeyboardInterrupt, OSError) as stopped:  # a signal, or the disk: all else is per file
        writers.shutdown(cancel_futures=True)  # waits for what is being written
        rest = f"{len(done)} of {len(todo)} images are done, the same command does the rest"
        if isinstance(stopped, OSError):
            fail(f"cannot write to {printable(out)}: {stopped.strerror}; {rest}")
        print(f"interrupted; {rest}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])

    # The report, of all ranks together
    for path, error in sorted(failed.items()):
        print(f"failed: {printable(path)}: {error}", file=sys.stderr, flush=True)
    reports = [(len(done), len(failed), len(share) - len(todo), notes)]
    if world > 1:
        reports *= world
        dist.all_gather_object(reports, reports[rank])  # waits for the slowest
    done, failed, present = (sum(report[i] for report in reports) for i in range(3))
    for note in sorted({note for report in reports for note in report[3]}):
        paths = [path for report in reports for path in report[3].get(note, [])]
        print(f"note: {note} ({len(paths)} images, {printable(paths[0])} is one)")
    seconds = time.perf_counter() - start
    memory = f", peak memory {torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GB" if cuda else ""
    present = f"{present} were there already (--overwrite makes them anew); " if present else ""
    print(f"{done} images enhanced in {seconds:.1f} s ({done / seconds:.1f} images/s in {precision}{memory}) -> "
          f"{printable(out)}; {present}{failed} failed", flush=True)
    if world > 1:
        dist.barrier()  # torchrun ends all ranks as soon as one of them has failed
        dist.destroy_process_group()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders that are searched for images")
    flag("--model", metavar="DIR|HUB_ID", default=SHIPPED_HEAD,
         help="the head: a folder with config.json and model.safetensors, or a Hugging Face Hub repository "
              "(default: assets/head beside this script)")
    flag("--out", metavar="DIR", default="enhanced", help="output folder (default: %(default)s)")
    flag("--batch-size", type=int, default=0, metavar="N", help="images of one size that go through the network "
         "together (default: 8 megapixels on a GPU, which is 32 images at 512x512; 1 elsewhere)")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one (default: auto)")
    flag("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto = bf16 on GPUs that compute "
         "in it, and for heads without a norm on such CPUs (1.2 to 1.4 times as fast), else fp32; the last line says "
         "which (default: auto)")
    flag("--strength", type=float, default=1.0, help="0 = input, 1 = the head's output; blends between and beyond "
         "(default: 1)")
    flag("--compare", action="store_true", help="write input and output side by side instead of the output alone")
    flag("--tile", type=int, default=0, metavar="N", help="work in tiles of this side and a margin, where images are too "
         "large for the memory: exact for heads with norm none and attention none, with ESA at most 1 gray level off "
         "(measured at 1024 px); colours of other heads may drift from tile to tile. 0 = whole images (default: 0)")
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
