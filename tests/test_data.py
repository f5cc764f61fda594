"""Seeded loading, augmentation and image files."""

import multiprocessing
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import script_environment
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from support import data as data_module
from support.data import Batches, augmentations, make_loader, mixed_seeds, normalise, open_rgb
from support.errors import UserError, errors_in_one_line
from support.shapes import Shapes


def test_processes_share_a_batch_and_a_resumed_epoch_is_the_rest_of_it():
    whole = Batches(50, 12, seed=3, shuffle=True)
    whole.epoch = 2
    batches = list(whole)
    assert len(batches) == 4 == len(whole)
    assert len({index for batch in batches for index, _ in batch}) == 48
    for rank in (0, 1):
        half = Batches(50, 12, seed=3, shuffle=True, rank=rank, world=2)
        half.epoch = 2
        assert list(half) == [batch[rank::2] for batch in batches]
    whole.first = 3
    assert list(whole) == batches[3:]
    whole.epoch, whole.first = 3, 0
    assert list(whole) != batches
    assert sum(len(b) for b in Batches(50, 12, seed=3, shuffle=False)) == 50


def test_augmentation_does_not_depend_on_the_number_of_workers():
    transform = v2.Compose([v2.RandomResizedCrop(16), v2.RandAugment()])
    data = Shapes("train", 64, 24)
    results = []
    for workers in (0, 2):
        batches = Batches(64, 16, seed=0, shuffle=True)
        loader = make_loader(data, transform, batches, workers, torch.device("cpu"))
        results.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*results)


def test_greyscale_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA"):
        Image.new(mode, (4, 4)).save(tmp_path / "image.png")
        assert open_rgb(str(tmp_path / "image.png")).mode == "RGB"


def write_png(path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits per channel, from (row, column, channel); Pillow writes only greyscale."""
    rows, columns, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]  # grey, grey and alpha, RGB, RGBA
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)  # 0: no filter
    parts = dict(IHDR=struct.pack(">IIBBBBB", columns, rows, 16, kind, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in (parts | dict(IDAT=zlib.compress(lines), IEND=b"")).items():
        part = name.encode() + part
        content += struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P + alpha", "L", "RGB", "I;16", "LA;16"])
def test_transparent_pixels_are_grey_whatever_lies_under_them(kind, tmp_path):
    """An opaque pixel of 51 beside a transparent one. As alpha alone draws many an icon, 51 and 51
    would be alike."""
    path, grey, more = tmp_path / "image.png", np.array([[51, 204]], np.uint8), {}
    alpha = np.array([[255, 0]], np.uint8)
    if kind == "LA;16":
        write_png(path, np.stack([grey * 0 + 51, alpha], -1).astype(int) * 257)
    else:
        if kind == "I;16":
            image, more = (
                Image.fromarray(grey.astype(np.uint16) * 257),
                dict(transparency=204 * 257),
            )
        elif kind in ("RGBA", "LA"):
            image = Image.fromarray(grey * 0 + 51).convert(kind)
            image.putalpha(Image.fromarray(alpha))
        elif kind[0] == "P":
            image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
            image.putpalette([51, 51, 51] * 2)
            more = dict(transparency=b"\xff\0" if kind == "P + alpha" else 1)
        else:
            image = Image.fromarray(grey).convert(kind)
            more = dict(transparency=204 if kind == "L" else (204, 204, 204))
        image.save(path, **more)
    assert np.asarray(open_rgb(str(path))).tolist() == [[[51, 51, 51], [124, 116, 104]]]
    assert normalise(torch.tensor([124, 116, 104]).view(1, 3, 1, 1)).abs().max() < 0.02


def test_what_is_half_transparent_is_mixed_and_what_is_opaque_kept(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.array([[[7, 201, 90, 255], [4, 16, 204, 51]]], np.uint8)).save(path)
    assert np.asarray(open_rgb(str(path))).tolist() == [[[7, 201, 90], [100, 96, 124]]]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("largest", [65535, 1000])
def test_a_16_bit_pgm_is_scaled_by_the_largest_value_that_it_names(largest, plain, tmp_path):
    path, values = tmp_path / "image.pgm", np.array([0, largest // 5, largest])
    content = " ".join(map(str, values)).encode() if plain else values.astype(">u2").tobytes()
    path.write_bytes(b"P%d\n3 1\n%d\n%s\n" % (2 if plain else 5, largest, content))
    assert np.asarray(open_rgb(str(path)))[0, :, 1].tolist() == [0, 51, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 13, 16])
def test_files_of_16_bits_that_hold_fewer_are_pointed_out(bits, channels, tmp_path, capsys):
    """Read as they are, they are black. One image that is not is enough to be silent."""
    rng, largest, paths = np.random.default_rng(0), 2**bits - 1, []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.png"))
        pixels = rng.integers(0, largest // (3 - number), (4, 5, channels), endpoint=True)
        pixels[3, 4] = largest // (3 - number)
        write_png(tmp_path / f"{number}.png", pixels)
    Image.new("L", (4, 4), 255).save(tmp_path / "8 bits.png")
    assert data_module.image_sizes([*paths, str(tmp_path / "8 bits.png")])[1] == (4, 5)
    out = capsys.readouterr().out
    assert (f" {bits} bits, 0 .. {largest} of 65535, and are" in out) if bits <= 12 else not out
    write_png(tmp_path / "bright.png", np.full((1, 1, 3), 4096))
    data_module.image_sizes([str(tmp_path / "bright.png"), *paths])
    assert not capsys.readouterr().out


def test_sixteen_bits_a_pixel_are_scaled_and_thirty_two_refused(tmp_path):
    """Pillow clips them: all but the darkest 1/256 of the range would be white."""
    path = str(tmp_path / "image.png")
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(ramp).save(path)
    assert np.asarray(open_rgb(path))[0, :, 1].tolist() == list(range(256))
    words = r"image\.tiff has 32 bits per pixel; save it with 8 or 16"
    Image.fromarray(np.array([[256, 257, 65534]], np.uint16)).save(path)
    assert np.asarray(open_rgb(path))[0, :, 1].tolist() == [0, 1, 254]  # 65535 is 255, so 257 is 1
    for kind in (np.int32, np.float32):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / "image.tiff")
        with pytest.raises(UserError, match=words):
            open_rgb(str(tmp_path / "image.tiff"))


def test_an_image_is_turned_as_its_tag_says(tmp_path):
    image, tag = Image.new("RGB", (6, 4)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 6, 1))
    tag[0x0112] = 6  # the top is on the right
    image.save(tmp_path / "image.png", exif=tag)
    turned = np.asarray(open_rgb(str(tmp_path / "image.png")))
    assert turned.shape == (6, 4, 3) and (turned[:, 3] == 255).all() and not turned[:, :3].any()
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(tmp_path / "image.png", exif=tag)
    assert np.array_equal(np.asarray(open_rgb(str(tmp_path / "image.png"))), turned)


def tags(*entries: bytes) -> bytes:
    """EXIF metadata of 12-byte entries; 8 zero bytes follow them, at 14 + 12 x their number."""
    count = struct.pack(">H", len(entries))
    return b"Exif\0\0MM\0*\0\0\0\x08" + count + b"".join(entries) + bytes(4) + bytes(8)


TURN_6 = bytes.fromhex("0112 0003 0000 0001 0006 0000")
ODD_METADATA = dict(
    negative_resolution=tags(TURN_6, bytes.fromhex("011a 0008 0000 0001 ffff 0000")),
    resolution_0_by_0=tags(TURN_6, bytes.fromhex("011a 0005 0000 0001 0000 0026")),
    no_such_type=tags(TURN_6, bytes.fromhex("011a 00ff 0000 0001 0000 0000")),
    beyond_the_end=tags(TURN_6, bytes.fromhex("010f 0002 0000 00ff 0000 ffff")),
    exif_folder_beyond_the_end=tags(TURN_6, bytes.fromhex("8769 0004 0000 0001 00ff ffff")),
    gps_of_another_type=tags(TURN_6, bytes.fromhex("8825 0002 0000 0001 6162 0000")),
)
UPRIGHT = dict(
    orientation_9=tags(TURN_6[:9] + b"\x09" + TURN_6[10:]),
    orientation_in_words=tags(bytes.fromhex("0112 0002 0000 0004 746f7000")),
    no_metadata=b"Exif\0\0this is no list of tags",
    cut_short=tags(TURN_6)[:17],
)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it skips
@pytest.mark.parametrize("name", ODD_METADATA | UPRIGHT)
@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_odd_metadata_does_not_matter(name, kind, tmp_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 16, 4))  # white above, which belongs on the right
    path = str(tmp_path / f"image.{kind}")
    image.save(path, exif=(ODD_METADATA | UPRIGHT)[name])
    read = np.asarray(open_rgb(path))
    white = read[:, 4:] if name in ODD_METADATA else read[:4]
    assert read.shape == ((16, 8, 3) if name in ODD_METADATA else (8, 16, 3))
    assert white.min() > 200 and read.mean() == pytest.approx(127.5, abs=9)


@pytest.mark.parametrize("number", range(1, 9))
def test_each_orientation_is_turned_as_pillow_turns_it(number, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    path, tag = tmp_path / "image.png", Image.Exif()
    tag[0x0112] = number
    Image.fromarray(pixels).save(path, exif=tag)
    turned = ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(np.asarray(open_rgb(str(path))), np.asarray(turned))


def test_links_to_other_folders_are_followed(image_root, tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(2):
        (tmp_path / f"train/{number}").symlink_to(image_root / f"train/class{number}")
    assert len(data_module.image_folder(str(tmp_path), "train")) == 2 * 12


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("65 GB"), "out of memory (65 GB); use less"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(error, words, capsys):
    with pytest.raises(SystemExit), errors_in_one_line("use less"):
        raise error
    message = capsys.readouterr().err
    assert message.startswith(f"error: {words}") and message.count("\n") == 1


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_has_left_is_told_and_no_traceback_follows(flush, tmp_path):
    """As `head` does: what is left is written once more as Python ends."""
    (tmp_path / "talks.py").write_text(
        f"from support.errors import errors_in_one_line\nwith errors_in_one_line('-'):\n"
        " print(1, flush=True)\n input()\n"
        f" print(2, flush={flush})\n"
    )
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = script_environment()
    environment.pop("PYTHONUNBUFFERED", None)
    with subprocess.Popen(
        [sys.executable, "talks.py"], cwd=tmp_path, env=environment, text=True, **ends
    ) as talks:
        talks.stdout.readline()
        talks.stdout.close()
        talks.stdin.write("\n")
        talks.stdin.close()
        said = talks.stderr.read()
    assert said == "error: output: Broken pipe\n"
    assert talks.returncode == 1
    with open("/dev/full", "w") as full:
        how = dict(input="\n", stdout=full, stderr=subprocess.PIPE, text=True)
        talks = subprocess.run([sys.executable, "talks.py"], cwd=tmp_path, env=environment, **how)
    assert talks.stderr == "error: output: No space left on device\n" and talks.returncode == 1


class Wrong(Shapes):
    def __getitems__(self, indices):
        raise RuntimeError("shapes do not fit")


class Damaged(Shapes):
    def __getitems__(self, indices):
        raise UserError("image x.png is damaged")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes in other ways")
def test_workers_are_forked_whatever_the_default(monkeypatch):
    """forkserver, Python 3.14's, starts them with signals not yet ignored."""
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method("forkserver")
    batches = Batches(8, 4, seed=0, shuffle=True)
    shapes, cpu = Shapes("train", 8, 16), torch.device("cpu")
    loader = make_loader(shapes, v2.Identity(), batches, 1, cpu)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert make_loader(shapes, v2.Identity(), batches, 0, cpu).multiprocessing_context is None


def test_an_error_in_a_worker_is_one_line_without_its_traceback(capsys):
    batches = Batches(8, 4, seed=0, shuffle=True)
    loader = make_loader(Damaged("train", 8, 16), v2.Identity(), batches, 1, torch.device("cpu"))
    iterator = iter(loader)
    with pytest.raises(SystemExit), errors_in_one_line("-"):
        next(iterator)
    assert capsys.readouterr().err == "error: image x.png is damaged\n"
    iterator._shutdown_workers()


def test_a_mistake_in_a_worker_is_not_called_a_lack_of_memory():
    batches = Batches(8, 4, seed=0, shuffle=True)
    loader = make_loader(Wrong("train", 8, 16), v2.Identity(), batches, 1, torch.device("cpu"))
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match="shapes do not fit"), errors_in_one_line("-"):
        next(iterator)
    iterator._shutdown_workers()  # they heed no signal, and the error's frames hold the iterator


def test_seeds_of_neighbours_are_unrelated():
    steps = [(epoch, step) for epoch in range(30) for step in range(30)]
    seeds = [seed for numbers in steps for seed in mixed_seeds(1, *numbers)]
    assert len(set(seeds)) == 900
    bits = np.unpackbits(np.array(seeds, dtype=np.uint32).view(np.uint8))
    assert bits.mean() == pytest.approx(0.5, abs=0.02)


# ---- augmentation --------------------------------------------------------------------------------


def test_images_are_normalised_by_imagenets_statistics():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    assert normalise(white)[0, :, 1, 1].tolist() == pytest.approx(expected)
    assert normalise(0 * white)[0, 0, 0, 0].item() == pytest.approx(-0.485 / 0.229)
    assert normalise(white).dtype == torch.float32


def test_the_training_augmentation_is_the_customary_one():
    """Crop, flip, RandAugment of 2 at 9, random erasing of a quarter; filled with the mean."""
    transforms = augmentations(48, drawn=False)[0].transforms
    to_resize, crop, flip, to_colour, rand_augment, to_tensor, erasing = transforms
    assert isinstance(to_resize, v2.PILToTensor) and isinstance(to_colour, v2.ToPILImage)
    assert tuple(crop.size) == (48, 48) and tuple(crop.scale) == (0.08, 1.0)
    assert crop.interpolation == InterpolationMode.BICUBIC and flip.p == 0.5
    assert (rand_augment.num_ops, rand_augment.magnitude) == (2, 9)
    assert isinstance(to_tensor, v2.PILToTensor) and erasing.p == 0.25
    grey = torch.tensor(erasing.value, dtype=torch.uint8)[None, :, None, None]
    assert normalise(grey).abs().max() < 0.02  # nothing, to the network
    assert list(rand_augment.fill) == list(erasing.value)


def test_loaders_share_the_cores_that_are_granted(monkeypatch):
    monkeypatch.setattr(
        data_module.os, "sched_getaffinity", lambda _: set(range(11)), raising=False
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # whatever started the tests
    assert data_module.cores() == 11
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as torchrun says
    assert data_module.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert data_module.cores() == 1
    monkeypatch.setattr(
        data_module.os, "sched_getaffinity", lambda _: set(range(192)), raising=False
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert data_module.cores() == 16  # not 24


@pytest.mark.parametrize("size, side", [(128, 146), (32, 32)])
def test_validation_looks_at_the_middle(size, side):
    """Seven eighths of a large image, a small one whole."""
    _, resize, crop = augmentations(size, drawn=False)[1].transforms
    assert resize.size == [side] and tuple(crop.size) == (size, size)
    assert resize.interpolation == InterpolationMode.BICUBIC
    image = Image.fromarray(np.arange(200 * 100 * 3, dtype=np.uint8).reshape(100, 200, 3))
    assert augmentations(size, drawn=False)[1](image).shape == (3, size, size)


def test_shapes_are_only_turned_over():
    train, val = augmentations(32, drawn=True)
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32)
    versions = {tuple(train(image)[0, [0, 0, -1], [0, -1, 0]].tolist()) for _ in range(60)}
    corners = image[0]
    assert versions == {
        (a[0, 0].item(), a[0, -1].item(), a[-1, 0].item())
        for a in (corners, corners.flip(0), corners.flip(1), corners.flip(0, 1))
    }
    assert torch.equal(val(image), image)


def test_of_a_large_set_a_sample_is_looked_at_and_as_many_at_once_as_there_are_cores(monkeypatch):
    """So that a million images do not take an hour at every start, nor large ones all memory."""
    at_once, most, seen, lock = [], [], [], threading.Lock()

    def opened(path):
        with lock:
            at_once.append(path)
            most.append(len(at_once))
        time.sleep(1e-4)
        with lock:
            at_once.remove(path)
            seen.append(path)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(data_module, "open_rgb", opened)
    monkeypatch.setattr(data_module, "CORES", 3)
    monkeypatch.setattr(data_module, "CHECKED_ALL", 2500)
    data_module.image_sizes(data_module.sample([str(i) for i in range(2500)]))
    assert len(seen) == 2500 and 1 < max(most) <= 3
    seen.clear()
    data_module.image_sizes(data_module.sample([str(i) for i in range(50_000)]))
    assert sorted(map(int, seen)) == list(range(0, 50_000, 25))
