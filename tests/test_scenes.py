"""Images with masks or boxes: what is read off the files, and what is refused in one line."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import assert_fails_in_one_line
from PIL import Image

import scenes
from data import open_rgb
from shapes import draw_shapes


def refused(capsys, function, *args) -> subprocess.CompletedProcess:
    """What a call that ends the program leaves, as `assert_fails_in_one_line` reads it."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    return subprocess.CompletedProcess([], ended.value.code, *capsys.readouterr())


def of_masks(*masks, size=None) -> scenes.Scenes:
    masks = [torch.tensor(m, dtype=torch.int32 if np.max(m) > 255 else torch.uint8) for m in masks]
    names = [f"{i}.jpg" for i in range(len(masks))]
    return scenes.Scenes(names, None, [size or tuple(m.shape) for m in masks], masks)


@pytest.fixture
def root(tmp_path):
    """train/ with two images and masks of two sizes, 0.jpg of 5 x 7 and 1.png of 4 x 6 pixels."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "train" / kind).mkdir(parents=True)
    for name, size in (("1.png", (4, 6)), ("0.JPG", (5, 7))):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train/images" / name)
        ids = rng.integers(0, 12, size).astype(np.uint8)
        Image.fromarray(ids).save(tmp_path / f"train/masks/{name[0]}.png")
    (tmp_path / "train/images/notes.txt").write_text("no image")
    return tmp_path


# ---- images and masks ----------------------------------------------------------------------------


def test_a_folder_is_read_in_order_each_image_with_its_mask(root):
    found = scenes.folder_scenes(root, "train", True)
    assert found.names == ["train/images/0.JPG", "train/images/1.png"]
    assert found.sizes == [(5, 7), (4, 6)]
    for i, (name, mask) in enumerate(zip(found.names, found.masks)):
        pixels = np.array(open_rgb(str(root / name)))
        assert np.array_equal(found.image(i).permute(1, 2, 0), pixels)
        ids = np.array(Image.open(root / f"train/masks/{i}.png"))
        assert mask.dtype == torch.uint8 and np.array_equal(mask, ids)


def test_masks_are_optional_only_where_nobody_needs_them(root, capsys):
    shutil.rmtree(root / "train/masks")
    assert scenes.folder_scenes(root, "train", need_masks=False).masks is None
    done = refused(capsys, scenes.folder_scenes, root, "train", True)
    assert_fails_in_one_line(done, "no folder .*train/masks; expected ROOT/train/images")


@pytest.mark.parametrize("kind", ["palette", "16 bits", "1 bit"])
def test_ids_of_other_kinds_of_masks(kind, tmp_path):
    ids = np.array([[0, 1, 1], [0, 0, 1]])
    if kind == "palette":
        image = Image.fromarray(ids.astype(np.uint8), "P")
        image.putpalette([200, 10, 10, 3, 100, 9])
    elif kind == "16 bits":
        ids = ids * 300
        image = Image.fromarray(ids.astype(np.uint16))
    else:
        image = Image.fromarray(ids.astype(bool))
    image.save(tmp_path / "mask.png")
    mask = scenes.read_mask(tmp_path / "mask.png", (2, 3))
    assert mask.tolist() == ids.tolist()
    assert mask.dtype == (torch.int32 if kind == "16 bits" else torch.uint8)


def test_synthetic_scenes_are_the_drawn_shapes_with_their_masks():
    found = scenes.synthetic_scenes(103, "val", 9)  # more than one part
    images, _, masks = draw_shapes([0, 57, 102], 9, "val")
    assert len(found.names) == 103 == len(set(found.names)) and found.sizes == [(9, 9)] * 103
    for i, number in enumerate((0, 57, 102)):
        assert torch.equal(found.image(number), images[i])
        assert torch.equal(found.masks[number], masks[i])


def damage(path, change) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


BAD_FOLDERS = {
    "no such folder": "nowhere: no folder .*nowhere/train/images; expected ROOT/train/images/",
    "no images": "no images in .*train/images",
    "no mask": "mask .*train/masks/1.png is missing; add it or remove",
    "other size": r"mask .*/1.png is of \(4, 5\), its image of \(4, 6\)",
    "turned": r"mask .*/1.png is of \(6, 4\), its image of \(4, 6\)",
    "colours": "mask .*/0.png is RGB, not one channel",
    "fractions": "mask .*/0.png is F, not one channel of integers",
    "negative": "mask .*/0.png is I, not one channel of integers >= 0",
    "image of text": "cannot read image .*train/images/1.png",
    "mask of text": "cannot read mask .*train/masks/1.png",
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_folders_end_in_one_line(what, root, capsys):
    masks, given = root / "train/masks", root
    if what == "no such folder":
        given = root / "nowhere"
    elif what == "no images":
        for file in (root / "train/images").glob("[01]*"):
            file.unlink()
    elif what == "no mask":
        (masks / "1.png").unlink()
    elif what == "other size":
        damage(masks / "1.png", lambda ids: ids[:, 1:])
    elif what == "turned":
        damage(masks / "1.png", lambda ids: ids.T)
    elif what == "colours":
        damage(masks / "0.png", lambda ids: np.stack([ids] * 3, axis=-1))
    elif what in ("fractions", "negative"):  # PNG holds neither: a TIFF under its name
        ids = np.array(Image.open(masks / "0.png")) - (-0.5 if what == "fractions" else 1.0)
        kind = np.float32 if what == "fractions" else np.int32
        Image.fromarray(ids.astype(kind)).save(masks / "0.png", format="TIFF")
    elif what == "image of text":
        (root / "train/images/1.png").write_text("this is no image")
    elif what == "mask of text":
        (masks / "1.png").write_text("this is no image")
    done = refused(capsys, scenes.folder_scenes, given, "train", True)
    assert_fails_in_one_line(done, BAD_FOLDERS[what])


# ---- classes -------------------------------------------------------------------------------------


def test_classes_are_counted_in_training_masks_without_ignored_pixels():
    train, reported = of_masks([[0, 3, 9]], [[1, 1, 1]], [[9, 9, 9]]), of_masks([[3, 9]], [[9, 9]])
    assert scenes.count_classes(train, reported, ignore=9) == 4
    assert scenes.count_classes(train, reported, ignore=300) == 10  # outside uint8


def test_unlabelled_pixels_not_declared_end_in_one_line(capsys):
    cases = [
        ([[0, 1]], [[0, 12]], "0.jpg holds id 12, the training masks none above 1; .*--ignore 12,"),
        ([[0, 1]], [[0, 2]], "0.jpg holds id 2, the training masks none above 1; .*--ignore 2,"),
        ([[0, 65535]], [[0]], "0.jpg holds id 65535, .*none above 4095; .*--ignore 65535"),
        ([[0, 4096]], [[0]], "0.jpg holds id 4096, allowed are none above 4095"),
        ([[255]], [[0]], "--ignore 255: the training masks hold nothing else"),
        ([[0]], [[255]], "--ignore 255: the reported masks hold nothing else"),
    ]
    for train, reported, expected in cases:
        done = refused(capsys, scenes.count_classes, of_masks(train), of_masks(reported), 255)
        assert_fails_in_one_line(done, expected)
    assert scenes.count_classes(of_masks([[4095]]), of_masks([[0]]), 255) == 4096


# ---- boxes ---------------------------------------------------------------------------------------


def test_boxes_end_behind_the_last_pixel():
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[0, 1, 1:3] = masks[0, 3, 2] = masks[1, 0, 4] = True
    boxes = scenes.boxes_around(masks)
    assert boxes.tolist() == [[1, 1, 3, 4], [4, 0, 5, 1]] and boxes.dtype == torch.float64
    assert scenes.boxes_around(masks[:0]).shape == (0, 4)


def test_true_boxes_of_masks_are_one_a_class():
    mask = [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [9, 9, 9, 9]]
    found = scenes.true_boxes(of_masks(mask, [[0, 9]], [[0, 700]]), None, ignore=9)
    assert [b.tolist() for b in found] == [[[0, 0, 2, 1], [3, 1, 4, 2]], [], [[1, 0, 2, 1]]]
    assert found[1].shape == (0, 4)
    [only] = scenes.true_boxes(of_masks(mask), None, ignore=300)  # 300 does not fit into uint8
    assert len(only) == 3


def test_true_boxes_of_a_file_are_preferred(root):
    lines = ["file\tx0\ty0\tx1\ty1", "train/images/1.png\t0.1\t1\t4\t2.3", ""]
    lines += ["./train/images/1.png\t1\t1\t2\t2"]
    (root / "boxes.tsv").write_text("\n".join(lines))
    read = scenes.folder_scenes(root, "train", True)
    none, two = scenes.true_boxes(read, str(root), 255)
    assert none.shape == (0, 4) and two.dtype == torch.float64
    assert two.tolist() == [[0.1, 1, 4, 2.3], [1, 1, 2, 2]]
    one, _ = scenes.true_boxes(read._replace(names=read.names[::-1]), str(root), 255)
    assert len(one) == 2  # found by name


GOOD = b"train/images/1.png\t0\t0\t5\t5\n"
BAD_BOXES = {
    "letters": (GOOD + b"train/images/1.png\t0\t0\tfive\t5", "line 2: .*: not file, x0, y0, x1"),
    "too few": (b"train/images/1.png\t0\t0\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "too many": (b"train/images/1.png\t0\t0\t5\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "right of left": (b"train/images/1.png\t5\t0\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "upside down": (b"train/images/1.png\t0\t5\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "outside left": (b"train/images/1.png\t-1\t0\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "outside above": (b"train/images/1.png\t0\t-1\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "endless": (b"train/images/1.png\t0\t0\t5\tinf", "line 1: .*: not file, x0, y0, x1, y1"),
    "endless width": (b"train/images/1.png\t0\t0\tinf\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "not a number": (b"train/images/1.png\tnan\t0\t5\t5", "line 1: .*: not file, x0, y0, x1, y1"),
    "no such file": (b"train/images/7.png\t0\t0\t5\t5", "line 1: .*: no such file under ROOT"),
    "late header": (GOOD + b"file\tx0\ty0\tx1\ty1", "line 2: .*: not file, x0, y0, x1, y1"),
    "latin-1": ("train/images/1\xe4.png\t0\t0\t5\t5".encode("latin-1"), "line 1: .*no such file"),
    "none here": (b"train/images/notes.txt\t0\t0\t5\t5", "no reported image has a true box"),
}


@pytest.mark.parametrize("what", BAD_BOXES)
def test_bad_boxes_end_in_one_line(what, root, capsys):
    text, expected = BAD_BOXES[what]
    (root / "boxes.tsv").write_bytes(text)
    read = scenes.folder_scenes(root, "train", True)
    done = refused(capsys, scenes.true_boxes, read, str(root), 255)
    assert_fails_in_one_line(done, expected)
