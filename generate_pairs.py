"""Makes the paper's dataset: pairs of portraits by a distilled model (fast, plastic) and its baseline (slow, real).

    python generate_pairs.py --mini                                                    # data/mini, drawn on the CPU
    torchrun --nproc_per_node=8 generate_pairs.py --names name.basics.tsv.gz --count 140000            # FLUX.1 pairs
    python generate_pairs.py --prompt "A professional business portrait" --count 10000 --distilled-only --out data/plain

Names -> prompts -> pairs.csv (the plan) -> distilled text-to-image -> baseline image-to-image on the saved result.
The plan is cut into batches that never change and rank r of n makes every n-th of them, so any number of GPUs writes
the same pixels, and no process group is needed. To go on after a stop, give the same command again.
"""
import argparse
import csv
import gc
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import math
import os
import statistics
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, PngImagePlugin
from tqdm import tqdm

from modules import UnreadableImage, fail, first_line, read_image, write_atomically, write_image

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # torchrun sets them
QUIET = None if RANK == 0 else True  # tqdm's `disable`: rank 0 shows progress if there is a terminal


# ------------------------------------------------------------------------------------------------- names and the plan
# Column of pairs.csv -> flag, of everything that settles the pixels: another value would mix two datasets.
SETTINGS = {"template": "prompt", "base_seed": "seed"} | {flag: flag for flag in (
    "names", "count", "test_fraction", "size", "batch_size", "distilled", "distilled_steps", "distilled_guidance",
    "lora", "lora_weight", "baseline", "baseline_steps", "strength", "guidance", "compile")}


def settings_of(args):
    """{column: text}. Of the names file only its name counts: it may move, and IMDb renews it daily."""
    values = {column: getattr(args, flag) for column, flag in SETTINGS.items()}
    return {column: "" if value is None else str(getattr(value, "name", value)) for column, value in values.items()}


def stable_hash(*parts):
    """A 64-bit integer that is the same in every process, which Python's salted hash() is not."""
    return int.from_bytes(hashlib.blake2b("\t".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def read_names(path):
    """Yields the names in IMDb's name.basics.tsv, or in a text file with one name a line; gzipped or not.

    Of IMDb's rows only actors and actresses whose name has two words or more. Repetitions stay in.
    """
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        imdb = None
        for line in tqdm(lines, "reading names", unit=" rows", unit_scale=True, disable=QUIET):
            if imdb is None:
                imdb = line.startswith("nconst\t")
                if imdb:
                    continue
            if imdb:
                fields = line.split("\t")  # without the csv module, because quotes are literal in this file
                if len(fields) < 5 or not {"actor", "actress"} & set(fields[4].split(",")):
                    continue
                line = fields[1] if len(fields[1].split()) > 1 else ""
            if name := " ".join(line.split()):
                yield name


def choose_names(names, count, seed):
    """The `count` different names whose hash with `seed` is lowest, in that order; memory is proportional to `count`.

    It is heapq.nsmallest for input with repetitions. As the hash looks at one name alone, rows that come or go in the
    file leave the rest of the choice as it was.
    """
    heap, chosen = [], set()  # hashes are negated, so that the top of the heap is the name to drop next
    for name in names:
        key = -stable_hash(seed, name)
        if name in chosen or len(heap) == count and key < heap[0][0]:
            continue
        chosen.add(name)
        if len(heap) < count:
            heapq.heappush(heap, (key, name))
        else:
            chosen.remove(heapq.heappushpop(heap, (key, name))[1])
    return [name for _, name in sorted(heap, reverse=True)]


def make_plan(args):
    """The rows of pairs.csv; every rank comes to the same ones by itself.

    The test share is spread evenly, so that a run stopped early has both splits. Fewer names than `count` are used
    again with other seeds, and a name is only ever in one split.
    """
    names = []
    if args.names:
        try:
            names = choose_names(read_names(args.names), args.count, args.seed)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            fail(f"cannot read --names {args.names} as UTF-8 text, gzipped or not: {error}")
        if not names:
            fail(f"no usable name in --names {args.names}: give IMDb's name.basics.tsv.gz, of which actors with two "
                 "words or more are taken, or a text file with one name a line")
        if len(names) < args.count and RANK == 0:
            print(f"{len(names)} different names for {args.count} pairs: they are used again, with other seeds")
    rows = []
    for index in range(args.count):
        place = index % len(names) if names else index
        name = names[place] if names else ""
        is_test = int((place + 1) * args.test_fraction + 1e-9) > int(place * args.test_fraction + 1e-9)
        # Torch's CPU generator takes 32 bits. Steps of two leave seed + 1 to the second stage.
        seed = (stable_hash(args.seed) + 2 * index) % 2**32
        rows.append({"index": index, "split": "test" if is_test else "train", "name": name,
                     "prompt": args.prompt.replace("{name}", name), "seed": seed} | settings_of(args))
    return rows


def write_csv(rows, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load_plan(args):
    """The rows of OUT/pairs.csv, written first where there is none; refuses one that was made with other settings."""
    path = args.out / "pairs.csv"
    if not path.exists():
        # Ranks that get here together write the same bytes, and may sweep each other's temporary file when one is done.
        with suppress(FileNotFoundError):
            write_atomically(path, partial(write_csv, make_plan(args)))
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column, new in settings_of(args).items():
        old = rows[0].get(column) if rows else None
        if old != new:
            fail(f"{path} was made with --{SETTINGS[column].replace('_', '-')} {old!r}, not {new!r}: "
                 "go on with the same settings, or choose another --out")
    return [row | {"index": int(row["index"]), "seed": int(row["seed"])} for row in rows]


def sweep(out, batches):
    """Removes the temporary files of killed runs, of this rank's images only: the other ranks are writing theirs."""
    mine = {"pairs"} | {f"{row['index']:06d}" for batch in batches for row in batch}
    for path in out.rglob(".*.tmp"):
        if path.name.split(".")[1] in mine:
            path.unlink(missing_ok=True)


# -------------------------------------------------------------------------- the miniature: portraits drawn on the CPU
CANVAS = 256  # shapes are drawn at four times the usual 64 pixels and then reduced, which is their anti-aliasing
SKIN = [(250, 220, 200), (240, 200, 172), (224, 178, 142), (202, 150, 112), (168, 116, 80), (128, 84, 56), (92, 60, 42)]
HAIR = [(30, 26, 26), (54, 38, 30), (90, 60, 40), (128, 68, 38), (170, 124, 72), (206, 170, 112)]  # dark to fair
CLOTH = [(38, 42, 54), (60, 64, 76), (112, 36, 42), (40, 74, 84), (150, 142, 130), (74, 88, 58), (206, 204, 200)]
IRIS = [(74, 48, 30), (58, 84, 58), (66, 104, 142), (96, 106, 110)]
CUTS = {"bald": (0, 0, 0, 0), "crop": (1.07, -0.66, -0.2, 0), "short": (1.17, -0.56, 0, 0),
        "quiff": (1.34, -0.6, -0.1, 0), "bob": (1.2, -0.5, 0.6, 1.1), "curls": (1.36, -0.52, 0.3, 0.9),
        "long": (1.18, -0.55, 1, 2.1)}  # heights: top, hairline, ends of the sides, end of the hair behind the head


def mix(a, b, share):
    return tuple(int(p + (q - p) * share) for p, q in zip(a, b))


def random_scene(seed):
    """What the two images of a pair share. Lengths are in face units: the face spans -1..1 both ways."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[rng.integers(len(options))]
    woman, age, tone = rng.random() < 0.5, rng.random(), rng.random() * 5.99
    hair = mix(pick(HAIR[:3] if tone > 3.5 else HAIR), (188, 186, 184), max(0, age - 0.65) * 2.6)
    return dict(
        seed=seed, woman=woman, age=age, hair=hair, skin=mix(SKIN[int(tone)], SKIN[int(tone) + 1], tone % 1),
        cut=pick(["bob", "curls", "long", "long"] if woman else ["bald", "crop", "short", "short", "quiff", "curls"]),
        iris=pick(IRIS), cloth=pick(CLOTH), collar=pick(["suit", "round", "high"]), glasses=rng.random() < 0.17,
        wall=rng.uniform(40, 125) + rng.uniform(-22, 22, 3), light=pick([-1, 1]) * rng.uniform(0.4, 0.8),
        centre=rng.normal((0.5, 0.47), 0.012), half=rng.uniform((0.185, 0.255), (0.215, 0.285)),
        tilt=rng.normal(0, 0.06), jaw=rng.uniform(0.14, 0.26) + 0.1 * woman, part=rng.uniform(-0.5, 0.5),
        eye=rng.uniform(0.9, 1.2), gaze=rng.uniform(-0.05, 0.05), brow=rng.uniform(-0.1, 0.06),
        nose=rng.uniform(0.14, 0.2) - 0.03 * woman, mouth=rng.uniform(0.26, 0.36), smile=rng.uniform(-0.03, 0.1),
        teeth=rng.random() < 0.25, neck=0.56 if woman else 0.7, shoulder=rng.uniform(1.8, 2.1),
        beard="" if woman else pick(["", "", "stubble", "full", "moustache"]))


def place(scene, points):
    """Face units -> canvas pixels."""
    (cx, cy), (w, h), cos, sin = scene["centre"], scene["half"], math.cos(scene["tilt"]), math.sin(scene["tilt"])
    return [(CANVAS * (cx + w * x * cos - h * y * sin), CANVAS * (cy + w * x * sin + h * y * cos)) for x, y in points]


def oval(x, y, rx, ry, start=0, end=360):
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in np.radians(np.linspace(start, end, 40))]


def mirrored(points):
    return points + [(-x, y) for x, y in reversed(points)]


def draw_shapes(s, image, rng, catchlight):
    """Draws scene `s` flat on `image`, back to front; returns where hair, skin, cloth, shadow and gloss go."""
    layers = {name: Image.new("L", image.size) for name in ("hair", "skin", "cloth", "shade", "gloss")}

    def draw(points, colour=None, gain=1.0, width=0, **masks):  # a polygon, or a line if it has a width
        points, targets = place(s, points), [(layers[name], value) for name, value in masks.items()]
        if colour is not None:
            targets.append((image, tuple(min(255, int(c * gain)) for c in colour)))
        for target, value in targets:
            pen = ImageDraw.Draw(target)
            pen.line(points, value, width, "curve") if width else pen.polygon(points, value)

    top, hairline, sides, back = CUTS[s["cut"]]
    n, b, m, lit = s["neck"], s["shoulder"], s["mouth"], math.copysign(1, s["light"])
    if back:
        draw([(x, y if y < 0 else y * back / top) for x, y in oval(0, 0, 1.24, top)], s["hair"], 0.7, hair=255)
    draw(mirrored([(0, 1.1), (n, 1.15), (b * 0.75, 1.4), (b, 1.65), (b + 0.3, 3)]), s["cloth"], rng.uniform(0.8, 1.2),
         hair=0, cloth=255)
    if s["collar"] == "suit":
        draw(mirrored([(n * 1.15, 1.1), (n * 1.2, 1.4), (0, 2.4)]), (250, 250, 252))
    draw(mirrored([(n, 0.5), (n, 1.15), (n * 1.2, 1.3), (0, 1.65)]), s["skin"], 0.88, hair=0, cloth=0, skin=255)
    if s["collar"] == "suit":
        draw(mirrored([(0.12, 1.66), (0.17, 2.6), (0, 2.7)]), rng.uniform(30, 150, 3))
    if s["collar"] == "high":
        draw(mirrored([(n * 1.08, 1), (n * 1.2, 1.45), (0, 1.5)]), s["cloth"], 1.12, cloth=255, skin=0)
    draw(oval(0, 1, 0.75, 0.32), shade=170)
    for side in (-1, 1):
        draw(oval(side, 0.02, 0.12, 0.2), s["skin"], 0.88, skin=255)
    face = [(math.copysign(abs(x) ** 0.85, x) * (1 - s["jaw"] * max(0, y) ** 2), y) for x, y in oval(0, 0, 1, 1)]
    draw(face, s["skin"], hair=0, skin=255, shade=0)

    if s["beard"] in ("full", "stubble"):
        full = s["beard"] == "full"
        draw([p for p in face if p[1] > 0.1], mix(s["skin"], s["hair"], 1 if full else 0.35), hair=255 * full)
        draw(oval(0, 0.12, 0.72, 0.32), s["skin"], hair=0)
    if s["beard"] in ("full", "moustache"):
        draw(oval(0, 0.44, 0.36, 0.1), s["hair"], hair=255)
    for side in (-1, 1):
        x, y, eye = side * 0.42, -0.08, s["eye"]
        draw(oval(x, y - 0.02, 0.3, 0.16), shade=100)
        draw(oval(x, y, 0.2, 0.09 * eye), (234, 230, 226))
        draw(oval(x + s["gaze"], y, 0.095, 0.09 * eye), s["iris"])
        draw(oval(x + s["gaze"], y, 0.045, 0.045 * eye), (14, 12, 12))
        if catchlight:
            draw(oval(x + s["gaze"] + 0.04 * s["light"], y - 0.04, 0.04, 0.033), (255, 255, 255))
        draw(oval(x, y + 0.02, 0.22, 0.115 * eye, 190, 350), s["hair"], 0.35, width=4)
        brow = [(x + side * t, y - 0.24 - 0.05 * math.cos(5 * t) - s["brow"] * t) for t in np.linspace(-0.2, 0.24, 9)]
        draw(brow, s["hair"], 0.65, width=4 if s["woman"] else 6)
        draw([(side * 0.32, 0.26), (side * (m + 0.14), 0.54)], width=4, shade=int(130 * s["age"]))
        draw([(x - 0.15, y + 0.19), (x + 0.15, y + 0.19)], width=3, shade=int(110 * s["age"]))
        draw(oval(side * 0.56, 0.2, 0.17, 0.1), gloss=150)
        if s["glasses"]:
            draw(oval(x, y + 0.02, 0.32, 0.2), (32, 30, 30), width=4)
            draw([(0, y - 0.03), (side * 0.12, y)], (32, 30, 30), width=4)
    draw([(-lit * 0.03, -0.12), (-lit * s["nose"], 0.22), (-lit * s["nose"] * 1.2, 0.3), (0, 0.3)], shade=110)
    draw(oval(0, 0.31, s["nose"] * 1.1, 0.045), shade=170)
    draw([(lit * 0.03, -0.15), (lit * 0.03, 0.12)], width=6, gloss=130)
    draw(oval(lit * 0.02, 0.21, 0.07, 0.06), gloss=230)
    draw(oval(lit * 0.25, -0.5, 0.33, 0.14), gloss=150)
    lip = lambda rise: [(t * m, 0.57 - s["smile"] * t * t + rise * (1 - t * t)) for t in np.linspace(-1, 1, 15)]
    red = mix(s["skin"], (150, 50, 56), 0.5 if s["woman"] else 0.3)
    draw(lip(-0.05) + lip(0.11 + 0.5 * s["smile"])[::-1], red, 0.92, hair=0)
    draw(lip(0.02), red, 0.5, width=3)
    if s["teeth"]:
        draw(lip(0) + lip(0.04 + 0.5 * s["smile"])[::-1], (238, 234, 228))
    draw(oval(0, 0.74, m * 0.7, 0.035), shade=100)

    if top:  # the hair in front lies between an arc over the skull and the hairline
        arc, low = oval(0, 0, 1.1 + 0.1 * (top - 1), top, 180, 360), min(sides, 0.5)
        rise = lambda x: 0.2 * (1 - abs(x)) - 0.16 * abs(x - s["part"]) ** 1.5
        edge = [(x, hairline - rise(x)) for x in np.linspace(0.8, -0.8, 25)]
        draw([(x, y + 0.07) for x, y in edge], width=8, shade=110)
        draw([(arc[0][0], sides), *arc, (arc[-1][0], sides), (0.86, low), *edge, (-0.86, low)], s["hair"], hair=255)
        draw([(x * 0.75, y * 0.76) for x, y in arc[8:-8]], width=10, gloss=180)
    return layers


def draw_portrait(s, style, size):
    """Scene `s` as a PIL image; shapes are the scene's, texture and light the style's.

    "distilled" is plastic: smooth skin and hair, bright, orange, glossy. "baseline" has strands of hair, grain on the
    skin, light in the eyes and from the side. The wall's tint and the clothes differ a little, as in real pairs.
    """
    real = style == "baseline"
    rng = np.random.default_rng([s["seed"], real])
    v, u = np.mgrid[0:CANVAS:2, 0:CANVAS:2].astype(np.float32) / CANVAS  # light is computed on half the canvas
    glow = 1.15 - 0.9 * np.hypot(u - 0.5 - 0.2 * s["light"], v - 0.35)[..., None]
    wall = np.clip(glow * (s["wall"] + rng.uniform(-9, 9, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(wall).resize((CANVAS, CANVAS))
    layers = draw_shapes(s, image, rng, catchlight=real)
    half = lambda layer: np.float32(layer.reduce(2)).reshape(CANVAS // 2, CANVAS // 2, -1) / 255
    hair, skin, cloth = (half(layers[name]) for name in ("hair", "skin", "cloth"))
    shade, gloss = (half(layers[name].filter(ImageFilter.GaussianBlur(4))) for name in ("shade", "gloss"))
    x, y = (u - s["centre"][0]) / s["half"][0], (v - s["centre"][1]) / s["half"][1]
    light = 0.62 * np.sqrt(np.clip(1.5 - 0.8 * x * x - 0.25 * y * y, 0.05, None)) + 0.35 * s["light"] * x - 0.08 * y
    light, body, bare = np.clip(light, 0.3, 1.2)[..., None], np.clip(hair + skin + cloth, 0, 1), skin * (1 - hair)
    rgb = 255 * half(image)
    if real:
        strands, t = Image.new("L", image.size, 127), np.linspace(0, 1, 9)
        for end in rng.uniform(-1.5, 1.5, 150):  # quadratic Bezier curves from the parting over the skull and down
            wave = 0.12 * np.sin(14 * t + 9 * end) * (s["cut"] == "curls")
            curve = zip(s["part"] * (1 - t) ** 2 + 2.2 * end * t * (1 - t) + end * t * t + wave,
                        -1.1 * (1 - t) ** 2 - 3 * t * (1 - t) + 2 * t * t)
            ImageDraw.Draw(strands).line(place(s, curve), int(127 + rng.choice([-1, 1]) * rng.uniform(30, 110)), 3)
        strands = (half(strands) * 2 - 1) * hair
        grain = Image.fromarray(rng.normal(0, 1, (64, 64)).astype(np.float32)).resize(strands.shape[:2], Image.BICUBIC)
        rgb = rgb * (1 + body * (0.62 * light - 0.62)) * (1 - 0.5 * shade) + 8 * gloss * bare
        rgb = rgb * (1 + 0.55 * strands) + 26 * np.maximum(strands, 0)
        rgb = rgb * (1 + (0.015 + 0.03 * bare) * np.asarray(grain)[..., None]) * (0.97, 0.91, 0.88)
    else:
        rgb = rgb * (1 + body * (0.36 * light - 0.28)) * (1 - 0.34 * shade)
        rgb = (rgb + gloss * (1 - 0.45 * hair) * (110, 100, 88)) * (1.07, 1.02, 0.92)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).resize((size, size), Image.LANCZOS)


def draw_batch(size, style, batch):
    return [draw_portrait(random_scene(row["seed"]), style, size) for row in batch]


# ------------------------------------------------------------------------------------------- the two diffusion models
def load_stages(args, stages):
    """{stage: function from a batch of rows to its PIL images}, for any models that diffusers' AutoPipelines load."""
    import diffusers
    import transformers
    warnings.filterwarnings("ignore", module="huggingface_hub")  # diffusers calls it with deprecated arguments
    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    pipes, families = {}, {}
    for stage in stages:
        auto = diffusers.AutoPipelineForText2Image if stage == "distilled" else diffusers.AutoPipelineForImage2Image
        lora = args.lora if stage == "distilled" else None
        model = getattr(args, stage)
        try:
            families[stage] = diffusers.DiffusionPipeline.load_config(model)["_class_name"]
            shared = {}
            if pipes and not args.lora and len(set(families.values())) == 1:  # saves 10 of FLUX's 34 GB
                shared = {name: part for name, part in pipes["distilled"].components.items()
                          if name.startswith(("text_encoder", "tokenizer", "vae"))}
            pipe = auto.from_pretrained(model, dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
                                        **shared)
            if lora:
                pipe.load_lora_weights(lora, weight_name=args.lora_weight)
            pipes[stage] = pipe.to(args.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # hub, files, configs and weights each fail in ways of their own
            reason = first_line(error).rstrip(".")[:300]
            fail(f"cannot load --{stage} {model}{' with --lora ' + lora if lora else ''}: {reason}. If the model is "
                 "gated, accept the licence on its page at https://huggingface.co, then `hf auth login` or set "
                 "HF_TOKEN; a local folder in diffusers' format works too")
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.to(memory_format=torch.channels_last)
        if args.compile:  # each kind of block once, instead of the whole network; shapes never change
            denoiser = getattr(pipe, "transformer", None) or pipe.unet
            denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False)
    return {stage: partial(run_pipeline, args, stage, pipe) for stage, pipe in pipes.items()}


def run_pipeline(args, stage, pipe, batch):
    """The PIL images of a batch of rows. Each has a generator of its own, so its noise depends on its row alone."""
    rows = batch + batch[-1:] * (args.batch_size - len(batch))  # bf16 rounds differently in a smaller batch
    call = {"prompt": [row["prompt"] for row in rows], "height": args.size, "width": args.size,
            "generator": [torch.Generator().manual_seed(stage_seed(row, stage)) for row in rows]}
    if stage == "distilled":
        call |= {"num_inference_steps": args.distilled_steps, "guidance_scale": args.distilled_guidance}
    else:
        call |= {"num_inference_steps": args.baseline_steps, "guidance_scale": args.guidance, "strength": args.strength,
                 "image": [read_image(image_path(args.out, row, "distilled")) for row in rows]}
    if type(pipe).__name__ in ("FluxPipeline", "FluxImg2ImgPipeline"):
        # FLUX attends to the prompt's padding, and schnell, which embeds no guidance, was made with half as much.
        call["max_sequence_length"] = 512 if pipe.transformer.config.guidance_embeds else 256
    accepted = inspect.signature(pipe.__call__).parameters  # SDXL's image-to-image takes no height and width
    return pipe(**{name: value for name, value in call.items() if name in accepted}).images


# --------------------------------------------------------------------------------------------------------------- main
def image_path(out, row, stage):
    return out / row["split"] / stage / f"{row['index']:06d}.png"


def stage_seed(row, stage):
    return row["seed"] + (stage == "baseline")  # the same noise in both stages would tie their images together


def is_done(out, batch, stages):
    return all(image_path(out, row, stage).exists() for row in batch for stage in stages)


def save(args, stage, row, image):
    """Writes an image with its recipe as PNG text. One that is there stays: a batch cut in half is made again whole."""
    path = image_path(args.out, row, stage)
    if path.exists():
        return
    model, steps = getattr(args, stage), getattr(args, f"{stage}_steps")
    if args.lora and stage == "distilled":
        model += f" + {args.lora}"
    text = PngImagePlugin.PngInfo()
    for key, value in {"prompt": row["prompt"], "seed": stage_seed(row, stage), "model": model, "steps": steps}.items():
        text.add_text(key, str(value))
    write_image(image, path, pnginfo=text, compress_level=1)


def finish(writes):
    """Waits for the writer threads and raises what went wrong in them."""
    while writes:
        writes.pop().result()


def generate(args):
    """Makes the missing images of this rank's batches, and prints what they cost."""
    rows = load_plan(args)
    batches = [rows[i:i + args.batch_size] for i in range(0, len(rows), args.batch_size)][RANK::WORLD_SIZE]
    sweep(args.out, batches)
    share = sum(map(len, batches))
    passes = [["distilled"]] if args.distilled_only else [["distilled"], ["baseline"]]
    for stages in passes if args.offload else [sum(passes, [])]:
        todo = [batch for batch in batches if not is_done(args.out, batch, stages)]
        if not todo:
            continue
        if args.mini:
            makers = {stage: partial(draw_batch, args.size, stage) for stage in stages}
        else:
            makers = load_stages(args, stages)
        seconds, writes, what = [], [], " + ".join(stages)
        unit = " pairs" if len(stages) == 2 else " images"
        with ThreadPoolExecutor(4) as writers, tqdm(
                total=share, initial=share - sum(map(len, todo)), desc=what, unit=unit, disable=QUIET) as bar:
            for batch in todo:
                start = time.perf_counter()
                for stage in stages:
                    if is_done(args.out, batch, [stage]):
                        continue
                    if stage == "baseline":
                        finish(writes)  # it starts from the 8-bit images of the stage before
                    images = makers[stage](batch)
                    finish(writes)
                    writes += [writers.submit(save, args, stage, row, image) for row, image in zip(batch, images)]
                seconds.append((time.perf_counter() - start) / args.batch_size)
                bar.update(len(batch))
            finish(writes)
        peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else ""
        print(f"rank {RANK} of {WORLD_SIZE}: {what}, {sum(map(len, todo))}{unit}, "
              f"{statistics.median(seconds):.3g} s each (median over batches of {args.batch_size}){peak}")
        del makers
        gc.collect()
        torch.cuda.empty_cache()
    if RANK == 0:
        tests = sum(row["split"] == "test" for row in rows)
        print(f"{args.out}: {len(rows) - tests} training and {tests} test pairs planned, rank 0's share is complete")


def check(args):
    """Ends with one line where the settings cannot work, before anything is planned or loaded."""
    if args.count < 1 or args.batch_size < 1 or not 0 <= args.test_fraction < 1:
        fail("--count and --batch-size must be at least 1, and --test-fraction from 0 to below 1")
    if args.mini:
        return
    if "{name}" in args.prompt and not args.names:
        fail("--prompt asks for a {name}, so --names is needed: name.basics.tsv.gz of https://datasets.imdbws.com, or "
             "a text file with one name a line. To try the kit without any: python generate_pairs.py --mini")
    if args.names and "{name}" not in args.prompt:
        fail("--names is of no use, because --prompt has no {name}")
    if args.size < 16 or args.size % 16:
        fail(f"--size {args.size} must be a multiple of 16")
    if not 0 < args.strength <= 1 or args.baseline_steps * args.strength < 1 or args.distilled_steps < 1:
        fail(f"--strength {args.strength} must be above 0 and at most 1, and every stage must run at least one step")
    if args.lora and not importlib.util.find_spec("peft"):
        fail("--lora needs peft: pip install peft")
    if args.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"no CUDA GPU for local rank {LOCAL_RANK} ({torch.cuda.device_count()} found). FLUX.1 needs about 60 GB "
             "of GPU memory for both models, 36 GB with --offload; without a GPU: python generate_pairs.py --mini")


def main(args):
    check(args)
    try:
        generate(args)
    except torch.OutOfMemoryError:
        fail("out of GPU memory: use --offload (FLUX.1: about 36 GB instead of 60), or a smaller --batch-size with "
             "another --out")
    except (OSError, UnreadableImage) as error:
        fail(f"stopped in {args.out}: {error}. Finished images stay, and the same command goes on from there")
    except KeyboardInterrupt:
        fail("interrupted. Finished images stay, and the same command goes on from there")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mini", action="store_true", help="draw 320 portrait pairs at 64x64 on the CPU in seconds (ours)")
    add("--out", type=Path, default=Path("data"), help="the dataset's folder (default: data, data/mini with --mini)")
    add("--names", type=Path, help="IMDb's name.basics.tsv.gz (paper), or a text file with one name a line")
    add("--prompt", default="A professional portrait of {name}", help="{name} is filled in (default: the paper's)")
    add("--count", type=int, default=140000, help="number of pairs (paper: 140000)")
    add("--test-fraction", type=float, default=0.02, help="share that goes to test/ (ours: 0.02)")
    add("--distilled", default="black-forest-labs/FLUX.1-schnell", help="text-to-image model, id or folder (paper)")
    add("--distilled-steps", type=int, default=4, help="its steps (ours: 4; the paper does not say)")
    add("--distilled-guidance", type=float, default=0.0, help="its guidance scale, which schnell ignores (ours: 0)")
    add("--lora", help="LoRA on the distilled model, such as hugovntr/flux-schnell-realism (paper, Table 4)")
    add("--lora-weight", help="its file, such as schnell-realism_v1.safetensors")
    add("--distilled-only", action="store_true", help="no baseline images, for the plain-prompt and LoRA sets (paper)")
    add("--baseline", default="black-forest-labs/FLUX.1-dev", help="image-to-image model, id or folder (paper)")
    add("--baseline-steps", type=int, default=50, help="its steps, of which --strength is the share run (paper: 50)")
    add("--strength", type=float, default=0.7, help="how much of the distilled image is made anew (paper: 0.7)")
    add("--guidance", type=float, default=3.0, help="guidance scale of the baseline model (paper: 3.0)")
    add("--size", type=int, default=512, help="width and height in pixels (paper: 512)")
    add("--seed", type=int, default=0, help="settles the choice of names and all noise (ours: 0)")
    add("--batch-size", type=int, default=8, help="images at once per GPU (ours: 8)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying tiny models (default: cuda)")
    add("--offload", action="store_true", help="one model in GPU memory: all distilled images, then all baseline ones")
    add("--compile", action="store_true", help="compile the transformers' blocks: starts later, then runs faster")
    args = parser.parse_args()
    if args.mini:
        parser.set_defaults(out=Path("data/mini"), count=320, test_fraction=0.2, size=64, prompt="a drawn portrait",
                            distilled="drawn", baseline="drawn", device="cpu")
        args = parser.parse_args()
    main(args)
