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
import importlib.util
import inspect
import json
import os
import statistics
import time
import traceback
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from modules import UnreadableImage, fail, first_line, print_once, read_image, write_atomically, write_image

# torchrun sets these. No process group is needed: ranks share the work out, and never talk.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
STAGES = ["distilled", "baseline"]
NO_BAR = None if RANK == 0 else True  # for tqdm: rank 0 shows progress where there is a terminal


# ------------------------------------------------------------------------------------------------- names
def stable_hash(*parts):
    """A 64-bit integer that is the same in every process; Python's own hash() of a text is not."""
    text = "\t".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_names(path):
    """Yields the names in IMDb's name.basics.tsv, or in a text file with one name a line; gzipped or not.

    IMDb: only actors and actresses with two words or more ("first and last names", says the paper). Repetitions stay.
    """
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig") as lines:
        imdb = False
        for line in tqdm(lines, "reading names", unit=" rows", unit_scale=True, disable=NO_BAR):
            imdb = imdb or line.startswith("nconst\t")  # IMDb's header, which is nobody's row either
            if imdb:
                # nconst, primaryName, birthYear, deathYear, primaryProfession, ...; quotes mean nothing here
                fields = line.split("\t")
                if len(fields) < 5 or not {"actor", "actress"} & set(fields[4].split(",")):
                    continue
                line = fields[1] if len(fields[1].split()) > 1 else ""
            if name := " ".join(line.split()):
                yield name


def choose_names(names, count, seed):
    """The `count` different names of lowest hash: what IMDb adds or drops daily leaves the rest of the choice as is."""
    return heapq.nsmallest(count, set(names), key=partial(stable_hash, seed))


# ------------------------------------------------------------------------------------------------- the plan
# What may differ between the runs of one dataset. All other flags settle its pixels, and are kept in its args.json.
FREE = {"mini", "out", "plan_only", "distilled_only", "test_only", "trust_remote_code", "device"}


def make_plan(args):
    """The rows of pairs.csv. Fewer names than `count` are used again with other seeds, each in one split only."""
    names = []
    if args.names:
        try:
            names = choose_names(read_names(args.names), args.count, args.seed)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            fail(f"cannot read --names {args.names} as UTF-8, gzipped or not: {error}")
        if not names:
            fail(f"no usable name in --names {args.names}: give IMDb's name.basics.tsv.gz (its actors with two words "
                 "or more are used) or a text file with one name a line")
        if len(names) < args.count:
            print_once(f"{len(names)} different names for {args.count} pairs: used again, with other seeds")
    rows = []
    for index in range(args.count):
        number = index % len(names) if names else index
        name = names[number] if names else ""
        # The test share is spread evenly: a row is a test row where the running total passes a whole number.
        is_test = int((number + 1) * args.test_fraction + 1e-9) > int(number * args.test_fraction + 1e-9)
        # Torch's CPU generator takes 32 bits. Steps of two leave seed + 1 to the second stage.
        seed = (stable_hash(args.seed) + 2 * index) % 2**32
        rows.append({"index": index, "split": "test" if is_test else "train", "name": name,
                     "prompt": args.prompt.replace("{name}", name), "seed": seed})
    return rows


def write_csv(rows, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(values, path):
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2)))


def load_plan(args):
    """The rows of OUT/pairs.csv, which the first run writes and later runs continue, with the same settings."""
    plan, settings = args.out / "pairs.csv", args.out / "args.json"
    new = {name: value for name, value in vars(args).items() if name not in FREE}
    new["names"] = args.names and args.names.name  # the file may move, and IMDb renews it daily
    if settings.exists():
        old = json.loads(settings.read_text())
        for name, value in new.items():
            if old.get(name) != value:
                fail(f"{settings} says --{name.replace('_', '-')} {old.get(name)!r}, not {value!r}: "
                     "give the same settings to continue, or choose another --out")
    elif plan.exists():
        fail(f"{plan} has no args.json beside it, so its settings are unknown: choose another --out")
    if not plan.exists():
        rows = make_plan(args)  # every rank comes to the same bytes by itself, so any may be first
        with suppress(FileNotFoundError):  # rank 0 was first, and removed this rank's file as a leftover
            if not settings.exists():
                write_json(new, settings)
            write_atomically(plan, partial(write_csv, rows))
    with open(plan, newline="", encoding="utf-8") as file:
        return [row | {"index": int(row["index"]), "seed": int(row["seed"])} for row in csv.DictReader(file)]


def rank_batches(args, rows):
    """This rank's batches of rows, with the paths of their images. They are cut alike for any ranks and files, because
    bf16 rounds differently in another batch: any number of GPUs, and of stops, gives the same pixels."""
    batches = []
    for split in ["test"] if args.test_only else ["test", "train"]:
        part = [row | {stage: args.out / split / stage / f"{row['index']:06d}.png" for stage in STAGES}
                for row in rows if row["split"] == split]
        batches += [part[i:i + args.batch_size] for i in range(0, len(part), args.batch_size)]
    return batches[RANK::WORLD_SIZE]


# ------------------------------------------------------------------------------------------------- the two stages
def stage_seed(row, stage):
    return row["seed"] + (stage == "baseline")  # the same noise in both stages would tie their images together


def model_name(args, stage):
    return getattr(args, stage) + (f" + {args.lora}" if args.lora and stage == "distilled" else "")


def load_pipeline(args, stage, batches):
    """The diffusers pipeline of a stage, on its device. `batches` are those that it is loaded for."""
    import diffusers
    import transformers
    warnings.filterwarnings("ignore", module="huggingface_hub")  # diffusers calls it with deprecated arguments
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    try:
        if stage == "distilled":
            # Loads the class that the model names, its own code included if --trust-remote-code allows it.
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                args.distilled, dtype=dtype, trust_remote_code=args.trust_remote_code)
            if args.lora:
                pipe.load_lora_weights(args.lora, weight_name=args.lora_weight)
        else:
            pipe = diffusers.AutoPipelineForImage2Image.from_pretrained(args.baseline, dtype=dtype)
        pipe.to(args.device)
        pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "vae", None):
            pipe.vae.to(memory_format=torch.channels_last)
        if args.compile:  # each kind of block once, instead of the whole network; shapes never change
            denoiser_of(pipe).compile_repeated_blocks(fullgraph=True, dynamic=False)
        return pipe
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # hub, files, configs, weights and custom code each fail in ways of their own
        missing = [row[stage] for batch in batches for row in batch if not row[stage].exists()]
        fail_model(args, stage, "cannot be loaded", error,
                   f"Images missing: {len(missing)}, the first is {missing[0]}. For a gated model accept the licence "
                   "on its page at https://huggingface.co, then `hf auth login` or set HF_TOKEN; or give a local "
                   "folder; if it has code of its own, read that and add --trust-remote-code")


def fail_model(args, stage, problem, error, advice):
    """Ends with one line for a model that cannot be loaded, or whose parts do not work together."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
    fail(f"--{stage} {model_name(args, stage)} {problem}: {where}: {first_line(error).rstrip('.')[:300]}. {advice}. "
         "Or make the missing images yourself: --plan-only tells how")


def denoiser_of(pipe):
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)


def call_settings(args, stage, pipe):
    """What `pipe` is called with in every batch: the arguments that it accepts, but those that differ by row.

    Guidance and tokens that no flag gives follow the model. A pipeline's own defaults are for guided models, such as
    3.5 and 512 tokens for FLUX.1-dev. A distilled model that embeds no guidance runs without any; schnell was made
    with 256 tokens, and FLUX attends to the prompt's padding.
    """
    steps, guidance, tokens = args.distilled_steps, args.distilled_guidance, args.distilled_tokens
    if stage == "baseline":
        steps, guidance, tokens = args.baseline_steps, args.guidance, None
    denoiser = denoiser_of(pipe)
    config = getattr(denoiser, "config", {})
    if not (config.get("guidance_embeds") or config.get("time_cond_proj_dim")):  # in FLUX; in the U-Nets of LCM
        if guidance is None and type(pipe).__module__.startswith("diffusers."):
            guidance = 0.0  # a pipeline that comes with the model keeps its own default
        if tokens is None and type(denoiser).__name__ == "FluxTransformer2DModel":
            tokens = 256
    settings = {"height": args.size, "width": args.size, "num_inference_steps": steps, "guidance_scale": guidance,
                "max_sequence_length": tokens} | ({"strength": args.strength} if stage == "baseline" else {})
    accepted = inspect.signature(pipe.__call__).parameters  # SDXL's image-to-image takes no height and width
    call = {name: accepted[name].default if value is None else value
            for name, value in settings.items() if name in accepted}
    return {name: value for name, value in call.items() if value is not inspect.Parameter.empty}


def run_pipeline(args, stage, pipe, call, batch):
    """The PIL images of a batch of rows. Each has a generator of its own, so its noise depends on its row alone."""
    rows = batch + batch[-1:] * (args.batch_size - len(batch))  # the last batch is padded: one shape for all
    inputs = {"prompt": [row["prompt"] for row in rows],
              "generator": [torch.Generator().manual_seed(stage_seed(row, stage)) for row in rows]}
    if stage == "baseline":
        inputs["image"] = [read_image(row["distilled"]) for row in rows]
        for row, image in zip(rows, inputs["image"]):
            if image.size != (args.size, args.size):  # made by a script of the user's own
                fail(f"{row['distilled']} is {image.width}x{image.height}, not --size {args.size}")
    images = pipe(**call, **inputs).images
    if [image.size for image in images] != [(args.size, args.size)] * len(rows):
        raise ValueError(f"{len(images)} images of {images[0].size} for {len(rows)} prompts at --size {args.size}")
    return images


# ------------------------------------------------------------------------------------------------- the loop
def remove_leftovers(args, batches):
    """Deletes the temporary files of killed runs, of this rank's files only: other ranks are writing theirs."""
    names = {f"{row['index']:06d}" for batch in batches for row in batch} | ({"pairs", "args"} if RANK == 0 else set())
    for path in args.out.rglob(".*.tmp"):
        if path.name.split(".")[1] in names:
            path.unlink(missing_ok=True)


def save(args, stage, call, row, image):
    """Writes an image with its recipe as PNG text. One that is there stays, though its batch was made again whole."""
    if row[stage].exists():
        return
    text = PngImagePlugin.PngInfo()
    recipe = {"prompt": row["prompt"], "seed": stage_seed(row, stage), "model": model_name(args, stage)} | call
    for key, value in recipe.items():
        text.add_text(key, str(value))
    write_image(image, row[stage], pnginfo=text, compress_level=1)


def make_stage(args, stage, batches):
    """Makes the missing images of one stage, and prints what they cost."""
    todo = [batch for batch in batches if not all(row[stage].exists() for row in batch)]
    if not todo:
        print(f"rank {RANK} of {WORLD_SIZE}: {stage}, all images exist")
        return
    call = {}
    if not args.mini:
        pipe = load_pipeline(args, stage, todo)
        call = call_settings(args, stage, pipe)
        if RANK == 0:  # args.json also keeps what the flags came to
            used = {"pipeline": type(pipe).__name__} | call
            print(f"{stage}: {getattr(args, stage)}, " + ", ".join(f"{name} {value}" for name, value in used.items()))
            path = args.out / "args.json"
            write_json(json.loads(path.read_text()) | {f"{stage}_call": used}, path)

    seconds, writes = [], ()
    count = sum(map(len, todo))
    with ThreadPoolExecutor(4) as writers, tqdm(total=count, desc=stage, unit=" images", disable=NO_BAR) as bar:
        for batch in todo:
            start = time.perf_counter()
            try:
                images = mini_images(args, stage, batch) if args.mini else run_pipeline(args, stage, pipe, call, batch)
            except (torch.OutOfMemoryError, OSError, UnreadableImage):
                raise
            except Exception as error:
                if seconds or args.mini:  # the first batch shows whether it all fits; what fails later is a bug
                    raise
                advice = "Try it without --compile" if args.compile else "Its parts may not fit together"
                fail_model(args, stage, "was loaded, but does not run", error, advice)
            # PNG files are compressed and written while the next batch is made; then their errors are raised.
            list(writes)
            writes = writers.map(partial(save, args, stage, call), batch, images)
            seconds.append((time.perf_counter() - start) / args.batch_size)
            bar.update(len(batch))
        list(writes)
    peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else ""
    print(f"rank {RANK} of {WORLD_SIZE}: {stage}, {count} images, "
          f"{statistics.median(seconds):.3g} s each (median over batches of {args.batch_size}){peak}")


def check(args):
    """Ends with one line where the settings cannot work, before anything is planned or loaded."""
    if args.count < 1 or args.batch_size < 1 or not 0 <= args.test_fraction < 1:
        fail("--count and --batch-size must be at least 1, and --test-fraction from 0 to below 1")
    if args.mini and args.count > 320:
        fail(f"--mini has 320 portraits, not --count {args.count}")
    if ("{name}" in args.prompt) != bool(args.names):
        fail("{name} in --prompt and --names FILE need each other: name.basics.tsv.gz of https://datasets.imdbws.com, "
             "or a text file with one name a line. To try the kit without any: --mini")
    if not args.mini and (args.size < 16 or args.size % 16):
        fail(f"--size {args.size} must be a multiple of 16")
    if not 0 < args.strength <= 1 or args.baseline_steps * args.strength < 1 or args.distilled_steps < 1:
        fail(f"--strength {args.strength} must be above 0 and at most 1, and every stage must run at least one step")
    if args.lora and not args.plan_only and not importlib.util.find_spec("peft"):
        fail("--lora needs peft: pip install peft")
    if args.device == "cuda" and not args.plan_only and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"no CUDA GPU for local rank {LOCAL_RANK} ({torch.cuda.device_count()} found). FLUX.1 needs 36 GB of GPU "
             "memory; without a GPU: --mini, or --plan-only to see the prompts")


def main(args):
    check(args)
    rows = load_plan(args)
    tests = sum(row["split"] == "test" for row in rows)
    print_once(f"{args.out / 'pairs.csv'}: {len(rows) - tests} training and {tests} test pairs planned")
    if args.plan_only:
        first = args.out / rows[0]["split"] / "distilled" / "000000.png"
        print(f"To make distilled images yourself: save row 0 as {first}, {args.size}x{args.size} pixels, and so on. "
              "The same command without --plan-only makes the rest.")
        return
    batches = rank_batches(args, rows)
    remove_leftovers(args, batches)
    for stage in STAGES[:1] if args.distilled_only else STAGES:
        make_stage(args, stage, batches)
        # Give the model's memory back before the next one is loaded: for FLUX.1 36 GB at a time instead of 60.
        if args.compile:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- the miniature
@cache
def portraits():
    """One sheet of real FLUX.1 portraits: 20 columns and 16 rows of tiles of 128 pixels."""
    return read_image(Path(__file__).parent / "assets" / "portraits.jpg")


def soften_and_gloss(image):
    """A filter in the place of the distilled model: fine detail fades, and what is a few pixels wide shines.

    The widths are those of 64x64 images and grow with the size. Curves over the colours cannot undo it.
    """
    x, scale = np.asarray(image) / 255, image.width / 64
    fine, wide = (gaussian_filter(x, (sigma * scale, sigma * scale, 0), mode="reflect") for sigma in (0.9, 4))
    y = wide + 1.35 * (fine - wide) + 0.35 * (x - fine)
    gray = y.mean(2, keepdims=True)
    y = gray + 1.15 * (y - gray)  # stronger colours
    return Image.fromarray((y.clip(0, 1) * 255).round().astype(np.uint8))


def mini_images(args, stage, batch):
    """Row n is tile n, reduced; the distilled image is the filter's."""
    images = []
    for row in batch:
        left, top = row["index"] % 20 * 128, row["index"] // 20 * 128
        tile = portraits().crop((left, top, left + 128, top + 128))
        image = tile.resize((args.size, args.size), Image.Resampling.LANCZOS)
        images.append(soften_and_gloss(image) if stage == "distilled" else image)
    return images


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--mini", action="store_true", help="320 pairs at 64x64 in seconds: FLUX.1 portraits, and a filter in the "
                                           "place of the distilled model (ours)")
    flag("--out", type=Path, default=Path("data"), help="the dataset's folder (default: data, data/mini with --mini)")
    flag("--names", type=Path, help="IMDb's name.basics.tsv.gz (paper), or a text file with one name a line")
    flag("--prompt", default="A professional portrait of {name}", help="{name} is filled in (default: the paper's)")
    flag("--count", type=int, default=140000, help="number of pairs (paper: close to 140,000)")
    flag("--test-fraction", type=float, default=0.02, help="share that goes to test/ (ours: 0.02)")
    flag("--seed", type=int, default=0, help="settles the choice of names and all noise (ours: 0)")
    flag("--plan-only", action="store_true", help="write pairs.csv, and tell how to make the distilled images yourself")
    flag("--distilled-only", action="store_true", help="no baseline images: the plain-prompt and LoRA sets (paper)")
    flag("--test-only", action="store_true", help="no training images: the LoRA row of Table 4 needs the test ones")
    flag("--distilled", default="black-forest-labs/FLUX.1-schnell", help="text-to-image model, id or folder (paper)")
    flag("--distilled-steps", type=int, default=4, help="its steps (ours: 4; the paper does not say)")
    flag("--distilled-guidance", type=float, help="its guidance scale (default: the model's: schnell 0, dev 3.5)")
    flag("--distilled-tokens", type=int, help="length of the prompt (default: the model's: schnell 256, dev 512)")
    flag("--trust-remote-code", action="store_true", help="run the pipeline code that --distilled brings along")
    flag("--lora", help="LoRA on the distilled model, such as hugovntr/flux-schnell-realism (paper, Table 4)")
    flag("--lora-weight", help="its file, such as schnell-realism_v1.safetensors (ours; the paper does not say)")
    flag("--baseline", default="black-forest-labs/FLUX.1-dev", help="image-to-image model, id or folder (paper)")
    flag("--baseline-steps", type=int, default=50, help="its steps, of which --strength is the share run (paper: 50)")
    flag("--strength", type=float, default=0.7, help="how much of the distilled image is made anew (paper: 0.7)")
    flag("--guidance", type=float, default=3.0, help="guidance scale of the baseline model (paper: 3.0)")
    flag("--size", type=int, default=512, help="width and height in pixels (paper: 512)")
    flag("--batch-size", type=int, default=8, help="images at once per GPU (ours: 8)")
    flag("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying tiny models (default: cuda)")
    flag("--compile", action="store_true", help="compile the transformers' blocks: starts later, then runs faster")
    args = parser.parse_args()
    if args.mini:
        parser.set_defaults(out=Path("data/mini"), count=320, test_fraction=0.2, size=64, device="cpu",
                            prompt="a tile of assets/portraits.jpg", baseline="assets/portraits.jpg",
                            distilled="a filter that softens and glosses assets/portraits.jpg")
        args = parser.parse_args()
    try:
        main(args)
    except torch.OutOfMemoryError:
        fail("out of GPU memory (FLUX.1 in bf16 takes about 36 GB): use a smaller --batch-size with another --out")
    except (OSError, UnreadableImage, KeyboardInterrupt) as error:
        fail(f"stopped in {args.out}: {first_line(error)}. Finished images stay, and the same command continues there")
