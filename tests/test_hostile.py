"""enhance.py on the files and accidents that ten thousand images of every origin bring along."""
import hashlib
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from conftest import REPO

HEIGHT, WIDTH = 24, 32
# EXIF orientation -> what turns the stored array upright (EXIF 2.32, table 6)
UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
           6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}


def noise(channels=3, height=HEIGHT, width=WIDTH, seed=0, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (height, width, channels), dtype).squeeze()


def smooth(height=HEIGHT, width=WIDTH):
    """A picture that JPEG keeps within a few levels and that looks different from every side."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], -1).astype(np.uint8)


def pixels(path, mode="RGB"):
    with Image.open(path) as image:
        assert image.mode == mode, f"{path.name} is {image.mode}"
        return np.asarray(image).astype(int)


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows):
    """A PNG file by hand, for what Pillow does not write."""
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def icc(space, connection, kind, tags):
    """An ICC version 2 profile by hand: header, tag table, data."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = (struct.pack(">I4sI4s4s4s12x4s28x", 132 - 4 + len(table) + len(body), b"lcms", 0x02400000, kind, space,
                          connection, b"acsp") + struct.pack(">iii", 63190, 65536, 54061))
    return header.ljust(128, b"\0") + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
LINEAR_GRAY = icc(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": WHITE, b"kTRC": b"curv\0\0\0\0" + struct.pack(">I", 0)})


def ink_profile():
    """A CMYK profile whose lightness depends on black alone: L = 100 (1 - K), so that cyan ink is shown as white."""
    grid = bytes(value for corner in range(16) for value in (0 if corner & 1 else 255, 128, 128))
    lut = (b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
           + bytes(range(256)) * 4 + grid + bytes(range(256)) * 3)
    return icc(b"CMYK", b"Lab ", b"prtr", {b"wtpt": WHITE, b"A2B0": lut})


def fill(folder):
    """Writes the hostile folder. Returns the names of the files that must be reported."""
    (folder / "nested" / "deep").mkdir(parents=True)
    rgb = Image.fromarray(noise())
    rgb.save(folder / "plain.png")
    Image.fromarray(smooth()).save(folder / "photo.jpg", quality=95)
    Image.fromarray(smooth()).save(folder / "modern.webp", lossless=True)
    Image.fromarray(noise(height=1, width=1).reshape(1, 1, 3)).save(folder / "one.png")
    Image.fromarray(noise(height=5000, width=3)).save(folder / "long.png")
    Image.fromarray(noise(1, high=65536, dtype=np.uint16)).save(folder / "gray16.png")
    deep = noise(high=65536, dtype=np.uint16).astype(">u2")
    (folder / "rgb16.png").write_bytes(png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    rgb.quantize(16).save(folder / "palette.png")
    rgb.quantize(16).save(folder / "palette_clear.png", transparency=bytes(range(0, 256, 16)))
    rgb.quantize(16).save(folder / "palette_clear.gif", transparency=3)
    rgb.save(folder / "colour_key.png", transparency=tuple(noise()[2, 3].tolist()))
    Image.fromarray(noise(1)).save(folder / "gray.png")
    Image.fromarray(noise(1) > 127).save(folder / "bits.png")
    Image.fromarray(noise(2), "LA").save(folder / "gray_alpha.png")
    Image.fromarray(noise(4)).save(folder / "rgba.png")
    Image.fromarray(noise(4)).save(folder / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(noise(4)).save(folder / "rgba.tif")
    cyan = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    cyan.save(folder / "cmyk.jpg", quality=95)
    cyan.save(folder / "cmyk_profile.jpg", quality=95, icc_profile=ink_profile())
    Image.new("L", (WIDTH, HEIGHT), 128).save(folder / "gray_profile.png", icc_profile=LINEAR_GRAY)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        Image.fromarray(smooth()).save(folder / name, icc_profile=srgb)
    rgb.save(folder / "bad_profile.png", icc_profile=b"rubbish" * 30)
    for orientation in UPRIGHT:
        exif = Image.Exif()
        exif[274], exif[271] = orientation, "Maker"
        exif.get_ifd(0x8825)[1] = "N"  # the GPS block
        Image.fromarray(smooth()).save(folder / f"turned{orientation}.jpg", quality=95, subsampling=0, exif=exif)
        rgb.save(folder / f"turned{orientation}.png", exif=exif)
    Image.fromarray(noise(4)).save(folder / "turned_alpha.png", exif=exif)
    rgb.save(folder / "bad_exif.png", exif=b"Exif\0\0MM rubbish")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a portrait, steps: 4\nseed: 7")
    texts.add_itxt("Title", "größe 写真", "de", "Titel")
    texts.add_text("icc_profile", "a text that is named like a field")
    rgb.save(folder / "texts.png", pnginfo=texts, dpi=(300, 300))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" note="kept"/>'
    Image.fromarray(smooth()).save(folder / "xmp.jpg", xmp=xmp)
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames = [frame.quantize(16) for frame in frames]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    rgb.save(folder / "SHOUT.JPG")
    for name in ("with space.png", "new\nline.png", "größe-写真.png", "写" * 83 + ".png", "a" * 251 + ".png", "-x.png",
                 "nested/deep/inner.png", "liar.jpg", os.fsdecode(b"\xff\xfe.png")):
        rgb.save(folder / name, format="PNG")
    for suffix in ("png", "jpg", "bmp"):
        rgb.save(folder / f"same.{suffix}")
    (folder / "folder.png").mkdir()
    rgb.save(folder / "folder.png" / "inside.png")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "link.png").symlink_to("plain.png")
    rgb.save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image, and not named like one")

    whole = (folder / "plain.png").read_bytes(), (folder / "photo.jpg").read_bytes()
    (folder / "cut.png").write_bytes(whole[0][:len(whole[0]) // 2])
    (folder / "cut.jpg").write_bytes(whole[1][:len(whole[1]) // 2])
    (folder / "flipped.png").write_bytes(whole[0][:60] + bytes([whole[0][60] ^ 255]) + whole[0][61:])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello")
    (folder / "bomb.png").write_bytes(png(30000, 30000, 8, 0, b""))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(noise(1).astype(np.float32) / 255).save(folder / "float.tif")
    rgb.save(folder / "locked.png")
    (folder / "locked.png").chmod(0)
    rgb.save(folder / "new\nbad.png")
    (folder / "new\nbad.png").write_bytes(b"bad")
    return {"cut.png", "cut.jpg", "flipped.png", "empty.png", "text.png", "bomb.png", "loop.png", "dangling.png",
            "pipe.png", "float.tif", "locked.png", "new\nbad.png"}


def obey_permissions(command):
    """Root may read and write everything; without two capabilities it is held to the permission bits like anyone."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    return [*(drop if os.geteuid() == 0 else []), *map(str, command)]


def enhance(*args, **options):
    command = obey_permissions([sys.executable, REPO / "enhance.py", *args])
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and os.stat(path).st_mode & 0o400}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, head):
    """The folder, the names that must fail, the output folder inside it, and two runs: all of it, and once more."""
    folder = tmp_path_factory.mktemp("hostile")
    bad = fill(folder)
    before = hashes(folder)
    out = folder / "enhanced"
    first = enhance(folder, "--model", head, "--out", out, "--strength", 0, "--batch-size", 4)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = enhance(folder, "--model", head, "--out", out, "--strength", 0)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}, "done twice"
    assert {path: hashed for path, hashed in hashes(folder).items() if not path.is_relative_to(out)} == before
    return folder, bad, out, first, second


def test_hostile_folder_reports_the_bad_and_does_the_rest(hostile):
    folder, bad, out, first, second = hostile
    for done in (first, second):
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        reported = re.findall(r"^failed: (.*?): ", done.stderr, re.M)
        expected = {str(folder / name) if name.isprintable() else repr(str(folder / name)) for name in bad}
        assert set(reported) == expected and len(reported) == len(bad)
        assert done.stdout.splitlines()[-1].endswith(f"; {len(bad)} failed")
        for line in done.stderr.splitlines():
            assert len(line.split(": ", 2)[2]) > 5, f"no reason given: {line}"
    inputs = {path.relative_to(folder) for path in folder.rglob("*")
              if not path.is_relative_to(out) and not path.name.startswith(".") and path.name != "notes.txt"
              and path.is_file() and not path.is_relative_to(folder / "again")}
    good = {path for path in inputs if path.name not in bad}
    special = {"same.bmp": "same.bmp.png", "palette_clear.gif": "palette_clear.gif.png", "moving.gif": "moving.png",
               "rgba.tif": "rgba.tif.png"}
    expected = {path.with_name(special.get(path.name, path.name)) for path in good}
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == expected
    assert first.stdout.splitlines()[-1].startswith(f"{len(good)} images enhanced in ")
    assert f" {len(good)} were there already" in second.stdout.splitlines()[-1]
    assert not leftovers(folder)
    assert "2 images, " in next(line for line in first.stdout.splitlines() if "animated" in line)
    assert "2 images, " in next(line for line in first.stdout.splitlines() if "16 bits" in line)


def test_hostile_pixels(hostile):
    folder, _, out, *_ = hostile
    for name in ("plain.png", "one.png", "long.png", "with space.png", "new\nline.png", "größe-写真.png",
                 "写" * 83 + ".png", "a" * 251 + ".png", "-x.png",
                 "nested/deep/inner.png", "folder.png/inside.png", "link.png", "same.png",
                 "profile.png", "texts.png", "bad_exif.png", "bad_profile.png", os.fsdecode(b"\xff\xfe.png")):
        assert (pixels(out / name) == pixels(folder / name)).all(), name
    for name in ("photo.jpg", "modern.webp", "xmp.jpg", "profile.jpg", "profile.webp"):
        assert abs(pixels(out / name) - pixels(folder / name)).mean() < 3, name
    assert (pixels(out / "same.bmp.png") == noise()).all()
    assert abs(pixels(out / "gray16.png") - noise(1, high=65536, dtype=np.uint16)[..., None] / 257).max() <= 0.5
    assert abs(pixels(out / "rgb16.png") - noise(high=65536, dtype=np.uint16) / 257).max() <= 1
    assert (pixels(out / "gray.png") == noise(1)[..., None]).all()
    assert (pixels(out / "bits.png") == np.where(noise(1) > 127, 255, 0)[..., None]).all()
    palette = np.asarray(Image.fromarray(noise()).quantize(16).convert("RGB")).astype(int)
    assert (pixels(out / "palette.png") == palette).all()
    for name in ("rgba.png", "rgba.tif.png", "turned_alpha.png"):
        expected = UPRIGHT[8](noise(4)) if name == "turned_alpha.png" else noise(4)
        assert (pixels(out / name, "RGBA") == expected).all(), name
    assert (pixels(out / "rgba.webp", "RGBA")[..., 3] == noise(4)[..., 3]).all()
    assert (pixels(out / "gray_alpha.png", "RGBA") == noise(2)[..., [0, 0, 0, 1]]).all()
    index = np.asarray(Image.fromarray(noise()).quantize(16))
    assert (pixels(out / "palette_clear.png", "RGBA") == np.dstack([palette, index * 16])).all()
    assert (pixels(out / "palette_clear.gif.png", "RGBA")[..., 3] == np.where(index == 3, 0, 255)).all()
    key = (noise() == noise()[2, 3]).all(-1)
    assert (pixels(out / "colour_key.png", "RGBA") == np.dstack([noise(), np.where(key, 0, 255)])).all()
    for orientation, turn in UPRIGHT.items():
        assert (pixels(out / f"turned{orientation}.png") == turn(noise())).all(), orientation
        assert abs(pixels(out / f"turned{orientation}.jpg") - turn(smooth())).max() < 12, orientation
    assert abs(pixels(out / "cmyk.jpg") - (0, 255, 255)).max() <= 2
    assert abs(pixels(out / "cmyk_profile.jpg") - 255).max() <= 2, "shown without the profile of its inks"
    assert abs(pixels(out / "gray_profile.png") - 188).max() <= 1, "half the light is 188 in sRGB"
    for name in ("moving.webp", "moving.png"):
        with Image.open(out / name) as image:
            assert getattr(image, "n_frames", 1) == 1
    with Image.open(folder / "moving.gif") as image:
        assert (pixels(out / "moving.png") == np.asarray(image.convert("RGB"))).all()


def test_hostile_metadata(hostile):
    folder, _, out, *_ = hostile
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        assert Image.open(out / name).info["icc_profile"] == Image.open(folder / name).info["icc_profile"], name
    for name in ("cmyk_profile.jpg", "gray_profile.png", "bad_profile.png", "texts.png"):
        assert "icc_profile" not in Image.open(out / name).info or name == "texts.png"
    for orientation in UPRIGHT:
        for name in (f"turned{orientation}.jpg", f"turned{orientation}.png"):
            exif = Image.open(out / name).getexif()
            assert exif.get(274, 1) == 1 and exif[271] == "Maker" and exif.get_ifd(0x8825)[1] == "N", name
    image = Image.open(out / "texts.png")
    assert image.text["parameters"] == "a portrait, steps: 4\nseed: 7"
    title = image.text["Title"]
    assert (title, title.lang, title.tkey) == ("größe 写真", "de", "Titel")
    assert image.text["icc_profile"] == "a text that is named like a field"
    assert round(image.info["dpi"][0]) == 300
    assert Image.open(out / "xmp.jpg").info["xmp"] == Image.open(folder / "xmp.jpg").info["xmp"]
    assert Image.open(out / "liar.jpg").format == "JPEG", "the suffix says what is written"


def test_other_formats_keep_what_they_can(tmp_path, head, hostile):
    """The same files as JPEG: transparent parts on white, names that would meet kept apart, losses announced."""
    folder = hostile[0]
    names = ["rgba.png", "texts.png", "same.png", "same.jpg", "xmp.jpg", "turned6.png"]
    done = enhance(*[folder / name for name in names], "--model", head, "--out", tmp_path, "--strength", 0,
                   "--format", "jpg")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"rgba.jpg", "texts.jpg", "same.png.jpg", "same.jpg",
                                                          "xmp.jpg", "turned6.jpg"}
    alpha = noise(4)[..., 3:] / 255
    expected = noise(4)[..., :3] * alpha + 255 * (1 - alpha)
    assert abs(pixels(tmp_path / "rgba.jpg") - expected).mean() < 6
    assert Image.open(tmp_path / "turned6.jpg").getexif()[271] == "Maker"
    assert "shown on white (1 images" in done.stdout and "JPEG has no place for PNG texts (1 images" in done.stdout


# ------------------------------------------------------------------------------------------------------ interruptions
@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Forty pictures that take the small head a few seconds."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(40):
        Image.fromarray(noise(height=256, width=256, seed=i)).save(folder / f"{i:03d}.{'png' if i % 2 else 'jpg'}")
    return folder


def assert_whole(folder):
    for path in folder.rglob("*.*"):
        if not path.name.endswith(".tmp"):
            with Image.open(path) as image:
                image.load()  # raises on a truncated file
                assert image.size == (256, 256)


def finished(out):
    return [path for path in out.glob("*.*") if not path.name.endswith(".tmp")]


def start(folder, out, head, images, *args):
    """A run on its way, as soon as it has written `images` images."""
    process = subprocess.Popen([sys.executable, REPO / "enhance.py", folder, "--model", head, "--out", out, *args],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(finished(out)) < images:
        time.sleep(0.01)
    return process


def test_interrupted_runs_go_on(tmp_path, head, many):
    out, before = tmp_path / "out", 0
    for number, images in ((signal.SIGINT, 3), (signal.SIGTERM, 10), (signal.SIGKILL, 20)):
        process = start(many, out, head, images)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        present = {path: path.stat().st_mtime_ns for path in finished(out)}
        assert images <= len(present) < 40 and "Traceback" not in errors
        assert_whole(out)
        if number == signal.SIGKILL:
            assert process.returncode == -number
            (out / f".photo.jpg.{'0' * 32}.tmp").write_bytes(b"half")  # what a kill inside a write leaves behind
            (out / ".mine.tmp").write_bytes(b"not ours")
        else:
            assert process.returncode == 128 + number
            line = re.fullmatch(r"interrupted; (\d+) of \d+ images are done, the same command does the rest\n", errors)
            assert line and int(line[1]) == len(present) - before, errors
            assert not leftovers(out)
        before = len(present)
    done = enhance(many, "--model", head, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{40 - before} images enhanced"), done.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in present.items())
    assert_whole(out)
    assert leftovers(out) == [out / ".mine.tmp"] and len(finished(out)) == 40


def test_full_disk_stops_the_run_with_one_line(tmp_path, head, many):
    """A limit on file size stands for the full disk: it too cuts writes short, which Pillow overlooks in a JPEG."""
    for suffix in ("jpg", "png", "webp"):
        out = tmp_path / suffix
        done = enhance(many, "--model", head, "--out", out, "--format", suffix, "--quality", 40, "--strength", 0,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, 10_001)))
        assert done.returncode == 1 and not list(out.iterdir()), suffix
        assert re.fullmatch(r"error: cannot write to .*; 0 of 40 images are done, the same command does the rest\n",
                            done.stderr), done.stderr


def test_output_that_cannot_be_written(tmp_path, head, many):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (tmp_path / "file").write_text("no folder")
    for out in (locked, tmp_path / "file" / "below"):
        done = enhance(many, "--model", head, "--out", out)
        assert done.returncode == 1 and re.fullmatch(r"error: cannot write to .*\n", done.stderr), done.stderr


@pytest.mark.slow
def test_many_kills_at_random_moments(tmp_path, head, many):
    """SIGKILL, SIGTERM and SIGINT between the start of Python and the end of the work: nothing half-written, ever."""
    rng, out = np.random.default_rng(0), tmp_path / "out"
    for kill in range(32):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[kill % 4]
        if kill % 8 == 0:
            for path in out.glob("*"):
                path.unlink()
        process = start(many, out, head, 0, "--batch-size", str(rng.integers(1, 5)))
        time.sleep(rng.uniform(0.1, 6))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, -number, 128 + number)
        if out.is_dir():
            assert_whole(out)
    assert enhance(many, "--model", head, "--out", out).returncode == 0
    assert len(list(out.iterdir())) == 40
    assert_whole(out)


@pytest.mark.slow
def test_really_full_disk(tmp_path, head, many):
    """A tmpfs of one megabyte, in a mount namespace of its own."""
    kept = tmp_path.parent / f"{tmp_path.name}-kept"  # what was on it is gone with the namespace
    script = (f"mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} {REPO}/enhance.py {many} --model {head} "
              f"--out {tmp_path}/out --strength 0; code=$?; cp -r {tmp_path}/out {kept}; exit $code")
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert done.returncode == 1 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    assert 0 < len(finished(kept)) < 40 and not leftovers(kept)
    assert_whole(kept)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(tmp_path, head, many):
    peaks = []
    for count in (40, 400):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.jpg").symlink_to(many / f"{i % 40 // 2 * 2:03d}.jpg")
        done = enhance(folder, "--model", head, "--out", tmp_path / f"out{count}", "--batch-size", 4)
        peaks.append(float(re.search(r"peak memory ([\d.]+) GB", done.stdout)[1]))
    assert peaks[1] <= peaks[0] + 0.1, peaks
