"""Makes the paper's dataset: portraits by a fast model (distilled) and a slow, photorealistic one (baseline).

    python generate_pairs.py --mini                                         # data/mini: seconds on a CPU, no download
    torchrun --nproc_per_node=8 generate_pairs.py --names name.basics.tsv.gz --count 140000           # FLUX.1 pairs
    python generate_pairs.py --prompt "A professional business portrait" --count 10000 --distilled-only --out data/plain
    python generate_pairs.py --names name.basics.tsv.gz --plan-only         # pairs.csv alone: read it before paying

Names -> prompts -> the plan (pairs.csv, args.json) -> all distilled images -> all baseline images, each made from the
saved distilled one. To continue after a stop, give the same command again. An image that exists is never made again,
and a model whose images all exist is not even loaded, so distilled images may also come from a script of your own.
The miniature is made of real FLUX.1 portraits, with a filter in the place of the distilled model.
"""
import argparse
import csv
import gc
import gzip
import hashlib
import heapq
import inspect
import io
import os
import re
import time
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter, uniform_filter

from modules import (LOCAL_RANK, RANK, WORLD_SIZE, UnreadableImage, between, check_settings, fail, first_line,
                     lock_folder, make_printing_safe, number, place_pipeline, positive, print_once, progress_bar,
                     read_image, share, wait_for_ranks, whole, write_atomically, write_image, write_json)

STAGES, SPLITS = ["distilled", "baseline"], ["test", "train"]
COLUMNS = ["index", "split", "name", "prompt", "seed"]
NOT_TEXT = re.compile("[\\0-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")  # control characters, and bytes that are not UTF-8


# ------------------------------------------------------------------------------------------------- names
def stable_hash(*parts):
    """A 64-bit integer that is the same in every process; Python's own hash() of a text is not."""
    text = "\t".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_names(path):
    """Yields the names in IMDb's name.basics.tsv, or in a text file with one name a line; gzipped or not.

    IMDb: only actors and actresses with two words or more ("first and last names", says the paper). Repetitions stay.
    Raises OSError, EOFError, zlib.error and ValueError for what is neither.
    """
    with open(path, "rb") as file:  # once: a pipe cannot be read again
        plain = gzip.open(file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        lines = io.TextIOWrapper(plain, "utf-8-sig")
        imdb = False
        for row, line in enumerate(lines, 1):
            imdb = imdb or re.match(r"(nconst|nm\d+)\t", line)  # IMDb's header, or a row where it was cut off
            if imdb:
                # nconst, primaryName, birthYear, deathYear, primaryProfession, ...; quotes mean nothing here
                fields = line.split("\t")
                if len(fields) < 5 or not {"actor", "actress"} & set(fields[4].split(",")):
                    continue
                line = fields[1] if len(fields[1].split()) > 1 else ""
            # One spelling a person: composed letters, and no invisible ones but the two that some scripts are written with
            name = unicodedata.normalize("NFC", "".join(
                letter for letter in line if unicodedata.category(letter) != "Cf" or letter in "\u200c\u200d"))
            name = " ".join(name.split())
            if "\t" in line.strip() or NOT_TEXT.search(name):
                raise ValueError(f"line {row} has tabs or control characters, as tables and UTF-16 have")
            if name:
                yield name


def choose_names(names, count, seed):
    """The `count` different names of lowest hash: what IMDb adds or drops daily leaves the rest of the choice as is."""
    return heapq.nsmallest(count, set(names), key=partial(stable_hash, seed))


# ------------------------------------------------------------------------------------------------- the plan
# What may differ between the runs of one dataset. All other flags settle its pixels, and are kept in its args.json.
FREE = set("mini out plan_only distilled_only test_only trust_remote_code device offload".split())
GOES_ON = {"count", "batch_size", "compile"}  # kept as well, but these may change once there are images
# All other flags concern FLUX.
MINI_HAS = set("mini out count test_fraction seed size batch_size plan_only distilled_only test_only".split())


def make_plan(args):
    """The rows of pairs.csv. Fewer names than `count` are used again with other seeds, each in one split only."""
    names = [""] * args.count  # what a prompt without {name} needs
    if args.names:
        if WORLD_SIZE > 1 and args.names.is_fifo():
            fail("--names is a pipe, which only one process can read: give --plan-only first, without torchrun")
        try:
            names = choose_names(read_names(args.names), args.count, args.seed)
            if not names:
                raise ValueError("no usable name; of IMDb's, actors and actresses with two words or more are used")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            fail(f"cannot read --names {args.names} as IMDb's table or UTF-8 text, gzipped or not: {error}")
    rows = []
    for index in range(args.count):
        place = index % len(names)
        # The test share is spread evenly: a row is a test row where the running total passes a whole number.
        is_test = ((place + 1) * args.test_fraction + 1e-9) % 1 < args.test_fraction
        # Torch's CPU generator takes 32 bits. Steps of two leave seed + 1 to the second stage.
        seed = (stable_hash(args.seed) + 2 * index) % 2**32
        rows.append({"index": index, "split": "test" if is_test else "train", "name": names[place],
                     "prompt": args.prompt.replace("{name}", names[place]), "seed": seed})
    return rows


def read_plan(path):
    """The rows of pairs.csv. Ends the program where they are not as load_plan writes them."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *table = csv.reader(file)
        rows = [dict(zip(COLUMNS, (int(index), split, name, prompt, int(seed))))
                for index, split, name, prompt, seed in table]
        if not rows or header != COLUMNS or any(
                row["index"] != place or row["split"] not in SPLITS or NOT_TEXT.search(row["prompt"])
                for place, row in enumerate(rows)):
            raise ValueError
        return rows
    except (ValueError, csv.Error):
        fail(f"{path} is not as this script wrote it: has a spreadsheet saved it? Restore it, or choose another --out")


def load_plan(args):
    """The rows of OUT/pairs.csv. The first run writes it, and its settings to args.json; later runs continue both.
    Every rank comes to the same rows by itself, and rank 0 writes them."""
    plan, settings = args.out / "pairs.csv", args.out / "args.json"
    started = any(args.out.glob("*/*/*.png"))  # maybe by a faster rank, before there is a plan
    if started and plan.exists() != settings.exists():
        fail(f"{plan} and args.json belong together, and one is missing: restore it, or choose another --out")
    new = {name: value for name, value in vars(args).items() if name not in FREE}
    new["names"] = args.names and args.names.name  # the file may move, and IMDb renews it daily
    changed = check_settings(settings, new, GOES_ON, started)
    # Before the first image a plan of other settings is replaced. After it, one may only become longer.
    old = read_plan(plan) if plan.exists() and (started or changed == {}) else []
    rows = old if len(old) == args.count else make_plan(args)
    if rows[:len(old)] != old:
        fail(f"--count would not keep the rows of {plan}: it can only grow, and with the --names file of the first run")
    if old and changed:
        print_once(f"{args.out} goes on with {', '.join(changed)} changed: images that exist stay, and pixels are the "
                   "same only for the same batches")
    if RANK == 0:
        if not old:  # new settings are never seen beside an old plan
            plan.unlink(missing_ok=True)
        write_json(settings, new)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([COLUMNS, *map(dict.values, rows)])
        write_atomically(plan, table.getvalue().encode())
    return rows


def rank_batches(args, rows):
    """This rank's batches of rows, with the paths of their images. They are cut alike for any ranks and files, because
    bf16 rounds differently in another batch: any number of GPUs, and of stops, gives the same pixels."""
    batches = []
    for split in SPLITS[:1] if args.test_only else SPLITS:
        part = [row | {stage: args.out / split / stage / f"{row['index']:06d}.png" for stage in STAGES}
                for row in rows if row["split"] == split]
        batches += [part[i:i + args.batch_size] for i in range(0, len(part), args.batch_size)]
    return batches[RANK::WORLD_SIZE]


# ------------------------------------------------------------------------------------------------- the two stages
def stage_seed(row, stage):
    return row["seed"] + (stage == "baseline")  # the same noise in both stages would tie their images together


def call_settings(args, stage, pipe):
    """What `pipe` is called with in every batch: the arguments that it accepts, but those that differ by row.

    A pipeline's own defaults are for guided models, such as 3.5 and 512 tokens for FLUX.1-dev. A distilled model that
    embeds no guidance runs without any; schnell was made with 256 tokens, and FLUX attends to the prompt's padding.
    """
    steps, guidance, tokens = args.baseline_steps, args.guidance, None
    if stage == "distilled":
        steps, guidance, tokens = args.distilled_steps, args.distilled_guidance, args.distilled_tokens
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    config = getattr(denoiser, "config", {})
    if not (config.get("guidance_embeds") or config.get("time_cond_proj_dim")):  # in FLUX; in the U-Nets of LCM
        if guidance is None and type(pipe).__module__.startswith("diffusers."):
            guidance = 0.0  # a pipeline that comes with the model keeps its own default
        if tokens is None and type(denoiser).__name__ == "FluxTransformer2DModel":
            tokens = 256
    settings = {"height": args.size, "width": args.size, "num_inference_steps": steps, "guidance_scale": guidance,
                "max_sequence_length": tokens, "strength": args.strength, "output_type": "np"}
    accepted = inspect.signature(pipe.__call__).parameters  # strength is for image-to-image alone
    return {name: accepted[name].default if value is None else value
            for name, value in settings.items() if name in accepted}


def refuse_cut_prompts(args, stage, pipe, tokens, prompts):
    """Ends the program where none of the model's text encoders reads the whole of a prompt: its end would be lost, and
    with it a name. CLIP reads as many tokens as its tokenizer says, others as many as the pipeline is called with."""
    lengths, limits = [], []
    for suffix in ("", "_2", "_3"):
        if tokenizer := getattr(pipe, f"tokenizer{suffix}", None):
            is_clip = "CLIP" in type(getattr(pipe, f"text_encoder{suffix}", None)).__name__
            limits.append(tokenizer.model_max_length if is_clip or not tokens else tokens)
            lengths.append([len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts])
    spare = [max(limit - length for limit, length in zip(limits, own)) for own in zip(*lengths)]
    if cut := [prompt for prompt, left in zip(prompts, spare) if left < 0]:
        fail(f"{len(cut)} of {len(prompts)} prompts are longer than the {max(limits)} tokens that --{stage} "
             f"{getattr(args, stage)} reads, and would lose their end: ...{cut[0][-40:]!r}. Give a shorter --prompt")


def prepare_model(args, stage, prompts):
    """Loads a stage's model. Returns what makes the images of a batch, and the recipe to write into them."""
    import diffusers
    import transformers
    warnings.filterwarnings("ignore", module="huggingface_hub")  # diffusers calls it with deprecated arguments
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        torch.cuda.reset_peak_memory_stats()
    kind = diffusers.DiffusionPipeline if stage == "distilled" else diffusers.AutoPipelineForImage2Image
    model, dtype = getattr(args, stage), torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = kind.from_pretrained(model, dtype=dtype, trust_remote_code=args.trust_remote_code)
    if args.lora and stage == "distilled":
        pipe.load_lora_weights(args.lora, weight_name=args.lora_weight)
        # diffusers passes over what fits no layer, such as a LoRA of another family of models.
        state = pipe.lora_state_dict(args.lora, weight_name=args.lora_weight)
        state = state[0] if isinstance(state, tuple) else state
        wanted = sum(bool(weight.any()) for name, weight in state.items() if ".lora_B." in name or ".up." in name)
        works = sum(bool(weight.any()) for part in pipe.get_list_adapters()
                    for name, weight in getattr(pipe, part).named_parameters() if ".lora_B." in name)
        if works < max(wanted, 1):
            raise ValueError(f"--lora {args.lora} changes {wanted} layers, and {works} of this model")
        model += f" + {args.lora}"
    if getattr(pipe, "vae", None):
        pipe.vae.to(memory_format=torch.channels_last)
    place_pipeline(pipe, args.device, False if args.compile else args.offload)
    pipe.set_progress_bar_config(disable=True)
    if args.compile:  # each kind of block once, instead of the whole network; shapes never change
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    call = call_settings(args, stage, pipe)
    refuse_cut_prompts(args, stage, pipe, call.get("max_sequence_length"), prompts)
    recipe = {"model": model, "pipeline": type(pipe).__name__} | call
    print_once(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
    return partial(run_pipeline, args, stage, pipe, call), recipe


def source_image(args, row):
    """The saved distilled image, which the baseline image is made from; None where it is of no use."""
    try:
        image = read_image(row["distilled"])
    except UnreadableImage:
        return None
    return image if image.size == (args.size, args.size) and not image.getcolors(1) else None


def run_pipeline(args, stage, pipe, call, batch):
    """The PIL images of a batch of rows, None in the place of one that is of no use. Each has a generator of its own:
    its noise depends on its row alone."""
    rows = batch + batch[-1:] * (args.batch_size - len(batch))  # the last batch is padded: one shape for all
    inputs = {"prompt": [row["prompt"] for row in rows],
              "generator": [torch.Generator().manual_seed(stage_seed(row, stage)) for row in rows]}
    if stage == "baseline":
        inputs["image"] = [row["image"] for row in rows]
    made = pipe(**call, **inputs)
    unsafe = getattr(made, "nsfw_content_detected", None) or [False] * len(rows)
    images = []
    for image, useless in zip(made.images, unsafe, strict=True):
        if isinstance(image, np.ndarray):  # floats: 8 bits would hide a NaN
            useless = useless or not np.isfinite(image).all()
            image, = pipe.numpy_to_pil(np.nan_to_num(image))
        if image.size != (args.size, args.size):
            raise ValueError(f"its images have another size, {image.size}")
        images.append(None if useless or image.getcolors(1) else image)  # one colour: a safety checker's black
    return images


# ------------------------------------------------------------------------------------------------- the loop
def is_made(row, stage):
    """Whether an image is there, with its beginning and its end: an empty or a cut file is made again. Ends the program
    where its prompt is not the plan's."""
    path, prompt = row[stage], row["prompt"]
    try:
        with Image.open(path) as image:
            # Only what this script wrote: other tools keep other things under that name.
            if {"seed", "model"} <= image.info.keys() and image.info.get("prompt") != prompt:
                fail(f"{path} shows {image.info['prompt']!r}, and pairs.csv plans {prompt!r}: restore pairs.csv, or "
                     "choose another --out")
            return image.format != "PNG" or b"IEND\xae\x42\x60\x82" in path.read_bytes()  # more may follow
    except OSError:  # Pillow's UnidentifiedImageError is one
        return False


def save(stage, recipe, row, image):
    """Writes an image with its recipe as PNG text. One that is there stays, though its batch was made again whole."""
    if image is None or is_made(row, stage):
        return
    text = PngImagePlugin.PngInfo()
    for key, value in ({"prompt": row["prompt"], "seed": stage_seed(row, stage)} | recipe).items():
        text.add_text(key, str(value))
    write_image(image, row[stage], pnginfo=text, compress_level=1)


def make_stage(args, stage, batches):
    """Makes the missing images of one stage, and prints what they cost. Returns the paths of those still missing."""
    missing = {row[stage]: row for batch in batches for row in batch
               if not is_made(row, stage) and (stage == "distilled" or is_made(row, "distilled"))}
    todo = [batch for batch in batches if any(row[stage] in missing for row in batch)]
    rank = f"rank {RANK} of {WORLD_SIZE}: {stage},"
    if not todo:
        print(rank, "nothing to make")
        return []
    works, writes, writers = False, (), ThreadPoolExecutor(4)
    try:
        make, recipe = mini_model(args, stage) if args.mini else prepare_model(
            args, stage, sorted({row["prompt"] for row in missing.values()}))
        start = time.perf_counter()
        for batch in progress_bar(todo, stage, unit=" images", unit_scale=args.batch_size):
            if stage == "baseline":
                batch = [row | {"image": image} for row in batch if (image := source_image(args, row))]
            images = make(batch) if batch else []
            works = True  # the first batch shows whether it all fits together
            # PNG files are compressed and written while the next batch is made; then their errors are raised.
            list(writes)
            writes = writers.map(partial(save, stage, recipe), batch, images)
        list(writes)
    except Exception as error:  # hub, files, configs, weights and custom code each fail in ways of their own
        if works or isinstance(error, torch.OutOfMemoryError):  # not the model: a bug, or a full disk
            raise
        fail(f"--{stage} {getattr(args, stage)} does not work: {type(error).__name__}: {first_line(error)[:300]} -- A "
             "gated model: accept the licence on its page at https://huggingface.co, then `hf auth login`. No network: "
             "give a folder. Code of its own: --trust-remote-code. --lora: pip install peft. With --compile: leave it "
             f"out. Or make the missing ones yourself, by --plan-only: {len(missing)}, the first is {min(missing)}")
    count = sum(map(len, todo))
    peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else ""
    print(rank, f"{count} images, {(time.perf_counter() - start) / count:.3g} s each{peak}")
    return sorted(path for path, row in missing.items() if not is_made(row, stage))


def check(args):
    """Ends with one line where the settings cannot work, before anything is planned or loaded."""
    for name, value in vars(args).items():
        if NOT_TEXT.search(str(value)):
            fail(f"--{name} {str(value)!r} has control characters, or is not UTF-8")
    if args.mini and args.count > 320:
        fail("--mini has 320 portraits: give no higher --count")
    if ("{name}" in args.prompt) != bool(args.names):
        fail("{name} in --prompt and --names FILE need each other: name.basics.tsv.gz of https://datasets.imdbws.com "
             "or one name a line. To try the kit without any: --mini")
    if args.size % 16 and not args.mini:
        fail("--size must be a multiple of 16")
    if args.baseline_steps * args.strength < 1:
        fail("--strength is less than one of the --baseline-steps: give more of either")
    if args.compile and args.offload:
        fail("--compile needs the whole model on the GPU: leave out --compile or --offload")
    if args.lora_weight and not args.lora:
        fail("--lora-weight is a file of a --lora: give both")
    if args.device == "cuda" and not args.plan_only and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"there is no CUDA GPU {LOCAL_RANK}: --mini works without, and --plan-only, to see the prompts")


def main(args):
    check(args)
    lock_folder(args.out)
    rows = load_plan(args)
    tests = sum(row["split"] == "test" for row in rows)
    if tests == len(rows) and not args.test_only:
        fail(f"all {tests} pairs would be test pairs: give a smaller --test-fraction, or --test-only if that is meant")
    print_once(f"{args.out / 'pairs.csv'}: {len(rows) - tests} training and {tests} test pairs planned")
    if args.plan_only:
        print(f"To make distilled images yourself: save row 0 as {args.out}/{rows[0]['split']}/distilled/000000.png, "
              f"{args.size}x{args.size} pixels, and so on. The same command without --plan-only makes the rest.")
        return
    batches, failed = rank_batches(args, rows), []
    for stage in STAGES[:1] if args.distilled_only else STAGES:
        failed += make_stage(args, stage, batches)
        # Give the model's memory back before the next one is loaded: for FLUX.1 36 GB at a time instead of 60.
        if args.compile:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    wait_for_ranks()
    if failed:
        fail(f"{len(failed)} images could not be made: {', '.join(map(str, failed[:20]))}. A model gave NaN or one "
             "colour, or a safety checker held them back, or the distilled image is damaged, of another --size or one "
             "colour. All others are there; the same command tries again, and training does without")


# ------------------------------------------------------------------------------------------------- the miniature
def make_plastic(image):
    """A filter in the place of the distilled model: texture goes where contrast is low, as on skin, edges stay, and
    what is a few pixels wide shines.

    A guided filter with the image as its own guide (He et al. 2010). What it takes away differs from place to place, so
    that neither curves over the colours nor a filter that is the same everywhere undoes it. The widths are those of
    64x64 images and grow with the size.
    """
    x, scale = np.asarray(image, float), image.width / 64
    mean = partial(uniform_filter, size=2 * round(3 * scale) + 1, axes=(0, 1))
    gray = x.mean(2)
    variance = mean(gray ** 2) - mean(gray) ** 2
    kept = mean(variance / (variance + 40 ** 2))[..., None]  # near 1 along edges, near 0 on skin
    smooth = mean(x)
    fine, wide = (gaussian_filter(x, sigma * scale, axes=(0, 1)) for sigma in (0.9, 4))
    y = 0.1 * x + 0.9 * (smooth + kept * (x - smooth)) + 0.2 * (fine - wide)
    return Image.fromarray(y.clip(0, 255).round().astype(np.uint8))


def mini_model(args, stage):
    """As prepare_model. Row n is tile n of a sheet of real FLUX.1 portraits: 20 columns, 16 rows, 128 pixels each."""
    sheet = read_image(Path(__file__).parent / "assets" / "portraits.jpg")

    def make(batch):
        tiles = []
        for row in batch:
            x, y = row["index"] % 20 * 128, row["index"] // 20 * 128
            tiles.append(sheet.crop((x, y, x + 128, y + 128)).resize((args.size, args.size), Image.Resampling.LANCZOS))
        return tiles if stage == "baseline" else [*map(make_plastic, tiles)]
    return make, {"model": getattr(args, stage)}


def resolved(model):
    """One of a folder's many names; a Hub id stays as it is."""
    return os.path.realpath(model) if os.path.exists(model) else model


if __name__ == "__main__":
    make_printing_safe()
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--mini", action="store_true", help="320 portraits by FLUX.1 at 64x64, and a filter in its place (ours)")
    flag("--out", type=Path, default=Path("data"), help="the dataset's folder (default: data, data/mini with --mini)")
    flag("--names", type=Path, help="IMDb's name.basics.tsv.gz (paper), or one name a line; too few are used again")
    flag("--prompt", default="A professional portrait of {name}", help="{name} is filled in (default: the paper's)")
    flag("--count", type=positive, default=140000, help="number of pairs (paper: close to 140,000)")
    flag("--test-fraction", type=between(0.0, 1.0), default=0.02,
         help="share that goes to test/ (ours: 0.02)")
    flag("--seed", type=whole, default=0, help="settles the choice of names and all noise (ours: 0)")
    flag("--plan-only", action="store_true", help="write pairs.csv, and tell how to make the distilled images yourself")
    flag("--distilled-only", action="store_true", help="no baseline images: the plain-prompt and LoRA sets (paper)")
    flag("--test-only", action="store_true", help="no training images: the LoRA row of Table 4 needs the test ones")
    flag("--distilled", type=resolved, default="black-forest-labs/FLUX.1-schnell", help="text to image (paper)")
    flag("--distilled-steps", type=positive, default=4, help="its steps (ours: 4; the paper does not say)")
    flag("--distilled-guidance", type=number, help="its guidance scale (default: the model's: schnell 0, dev 3.5)")
    flag("--distilled-tokens", type=positive, help="length of the prompt (default: the model's: schnell 256, dev 512)")
    flag("--trust-remote-code", action="store_true", help="run the code that the models bring along")
    flag("--lora", type=resolved, help="LoRA on it, such as hugovntr/flux-schnell-realism (paper, Table 4)")
    flag("--lora-weight", help="its file, such as schnell-realism_v1.safetensors (ours; the paper does not say)")
    flag("--baseline", type=resolved, default="black-forest-labs/FLUX.1-dev", help="image to image (paper)")
    flag("--baseline-steps", type=positive, default=50, help="its steps; --strength is the share run (paper: 50)")
    flag("--strength", type=share, default=0.7, help="how much of the distilled image is made anew (paper: 0.7)")
    flag("--guidance", type=number, default=3.0, help="guidance scale of the baseline model (paper: 3.0)")
    flag("--size", type=positive, default=512, help="width and height in pixels (paper: 512)")
    flag("--batch-size", type=positive, default=8, help="images at once per GPU (ours: 8)")
    flag("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying tiny models (default: cuda)")
    flag("--compile", action="store_true", help="compile the transformers' blocks: starts later, then runs faster")
    flag("--offload", action=argparse.BooleanOptionalAction,
         help="keep the weights in the CPU's memory, for FLUX.1 50 GB a GPU (default: on GPUs below 40 GB)")
    args = parser.parse_args()
    if args.mini:
        parser.set_defaults(out=Path("data/mini"), count=320, test_fraction=0.2, size=64, device="cpu",
                            prompt="a tile of assets/portraits.jpg", baseline="the tiles of assets/portraits.jpg",
                            distilled="a filter that makes assets/portraits.jpg plastic")
        args = parser.parse_args()
        given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if foreign := sorted(given - MINI_HAS):
            fail(f"--mini has no --{', --'.join(foreign).replace('_', '-')}")
    try:
        main(args)
    except torch.OutOfMemoryError:
        fail("out of GPU memory (FLUX.1 in bf16 takes about 36 GB): use a smaller --batch-size, or --offload")
    except (OSError, KeyboardInterrupt) as error:
        fail(f"stopped in {args.out}: {first_line(error)}. Finished images stay, and the same command continues there")
