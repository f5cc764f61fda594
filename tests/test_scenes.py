"""Images with masks or boxes: what is read off the files, and what is refused in one line."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from support import scenes
from support.data import open_rgb
from support.errors import UserError


def of_masks(*masks) -> scenes.Scenes:
    masks = [torch.tensor(m, dtype=torch.int32 if np.max(m) > 255 else torch.uint8) for m in masks]
    names = [f"{i}.jpg" for i in range(len(masks))]
    return scenes.Scenes(names, None, [tuple(m.shape) for m in masks], masks)


@pytest.fixture
def root(tmp_path):
    """train/ with two images and their masks: 0.JPG of 5 x 7 and 1.png of 4 x 6 pixels."""
    rng = np.random.default_rng(0)
    for image, mask, size in (("1.png", "1.png", (4, 6)), ("0.JPG", "0.png", (5, 7))):
        for path, shape in ((f"images/{image}", (*size, 3)), (f"masks/{mask}", size)):
            (tmp_path / "train" / path).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / path)
    (tmp_path / "train/images/notes.txt").write_text("no image")
    return tmp_path


# ---- images and masks ----------------------------------------------------------------------------


def test_a_folder_is_read_in_order_each_image_with_its_mask(root):
    found = scenes.folder_scenes(root, "train", True)
    assert found.names == [f"{root}/train/images/0.JPG", f"{root}/train/images/1.png"]
    assert found.sizes == [(5, 7), (4, 6)]
    for i, (name, mask) in enumerate(zip(found.names, found.masks)):
        assert np.array_equal(found.image(i).permute(1, 2, 0), open_rgb(name))
        ids = np.array(Image.open(root / f"train/masks/{i}.png"))
        assert mask.dtype == torch.uint8 and np.array_equal(mask, ids)


def test_an_image_that_its_exif_tag_turns_has_the_size_it_is_seen_in(root):
    """As a telephone's: stored lying, 6 wide and 4 high."""
    path, mask, tag = root / "train/images/1.png", root / "train/masks/1.png", Image.Exif()
    tag[0x0112] = 6
    Image.open(path).save(path, exif=tag)
    with pytest.raises(UserError, match=r"is \(4, 6\), its image \(6, 4\)"):  # not turned
        scenes.folder_scenes(root, "train", True)
    Image.open(mask).rotate(-90, expand=True).save(mask)
    found = scenes.folder_scenes(root, "train", True)
    assert found.sizes[1] == found.image(1).shape[1:] == found.masks[1].shape == (6, 4)


@pytest.mark.parametrize("number", [3, 6, 8])
def test_a_mask_is_turned_by_its_own_tag_whatever_its_images_says(number, root):
    """An annotation tool may copy the tag, turn the pixels, or do neither."""
    image, mask, tag = root / "train/images/1.png", root / "train/masks/1.png", Image.Exif()
    pixels = {path: Image.open(path).copy() for path in (image, mask)}
    tag[0x0112] = number
    upright = np.asarray(pixels[mask].rotate({3: 180, 6: -90, 8: 90}[number], expand=True))
    for path in (image, mask):
        pixels[path].save(path, exif=tag)
    found = scenes.folder_scenes(root, "train", True)
    assert np.array_equal(found.masks[1], upright) and found.sizes[1] == upright.shape
    pixels[image].save(image)  # now only the mask has a tag
    with pytest.raises(UserError, match="make them equal") if number != 3 else nullcontext():
        found = scenes.folder_scenes(root, "train", True)
    assert np.array_equal(found.masks[1], upright)


def test_masks_with_extensions_in_capitals_and_hidden_files_in_between(root, capsys):
    ids = scenes.folder_scenes(root, "train", True).masks
    assert capsys.readouterr().out == f"note    {root}/train/images: left out 1 .txt\n"
    for number, end in enumerate((".PNG", ".Png")):
        (root / f"train/masks/{number}.png").rename(root / f"train/masks/{number}{end}")
    for kind in ("images", "masks"):
        (root / f"train/{kind}/._1.png").write_text("no image")
        (root / f"train/{kind}/__MACOSX").mkdir()
        (root / f"train/{kind}/Thumbs.db").write_text("no image")
    found = scenes.folder_scenes(root, "train", True)
    assert [*map(torch.equal, found.masks, ids)] == [True, True] and len(found.names) == 2
    for line in capsys.readouterr().out.splitlines():
        assert "left out 3 hidden files or folders" in line
    (root / "train/masks/0.PNG").unlink()
    with pytest.raises(UserError, match=f"mask {root}/train/masks/0.png is missing"):
        scenes.folder_scenes(root, "train", True)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_ids_of_other_kinds_of_masks(mode, tmp_path):
    ids = np.array([[0, 1, 1], [0, 0, 1]]) * (300 if mode == "I;16" else 1)
    image = Image.fromarray(ids.astype({"P": np.uint8, "I;16": np.uint16, "1": bool}[mode]))
    if mode == "P":
        image.putpalette([200, 10, 10, 3, 100, 9])
    assert image.mode == mode
    image.save(tmp_path / "mask.png")
    mask = scenes.read_mask(tmp_path / "mask.png", (2, 3))
    assert mask.tolist() == ids.tolist()
    assert mask.dtype == (torch.int32 if mode == "I;16" else torch.uint8)


@pytest.mark.parametrize("ids, message", [
    (np.zeros((4, 5), np.uint8), r"is \(4, 5\), its image \(4, 6\) pixels"),
    (np.zeros((4, 6, 3), np.uint8), "is RGB; save class ids as one channel"),
    (np.full((4, 6), 0.5, np.float32), "is F; save class ids as one channel of integers"),
    (np.full((4, 6), -1, np.int32), "is I; save class ids as one channel of integers >= 0"),
])  # fmt: skip
def test_bad_masks_are_refused(ids, message, tmp_path):
    path = tmp_path / "1.png"
    Image.fromarray(ids).save(path, format="TIFF")  # PNG holds neither fractions nor a sign
    with pytest.raises(UserError, match=f"mask {path} {message}"):
        scenes.read_mask(path, (4, 6))


def test_bad_folders_are_refused(root):
    def refused(split: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            scenes.folder_scenes(root, split, True)

    image, mask = root / "train/images/1.png", root / "train/masks/1.png"
    refused("val", f"no images in {root}/val/images; expected ROOT/val/images/")
    (root / "Validation").mkdir()
    refused("val", f"no images in {root}/val/images; rename Validation to val$")
    mask.write_text("this is no image")
    refused("train", f"cannot read mask {mask}")
    mask.unlink()
    refused("train", f"mask {mask} is missing; add it or remove")
    assert scenes.folder_scenes(root, "train", with_masks=False).masks is None
    image.write_text("this is no image")
    refused("train", f"cannot read image {image}")


# ---- classes -------------------------------------------------------------------------------------


def test_classes_are_counted_in_training_masks_without_ignored_pixels():
    train, reported = of_masks([[0, 3, 9]], [[1, 1, 1]], [[9, 9, 9]]), of_masks([[3, 9]], [[9, 9]])
    assert scenes.count_classes(train, reported, ignore=9) == 4
    assert scenes.count_classes(train, reported, ignore=300) == 10  # outside uint8
    assert scenes.count_classes(of_masks([[4095]]), of_masks([[0]]), 255) == 4096


@pytest.mark.parametrize("train, reported, message", [
    ([[0, 1]], [[0, 2]], "0.jpg holds id 2, above 1, the largest .*--ignore 2,"),
    ([[0, 4096]], [[0]], "0.jpg holds id 4096, above 4095, the largest allowed .*--ignore 4096"),
    ([[2**31 - 1]], [[0]], "0.jpg holds id 2147483647, above 4095"),
    ([[255]], [[0]], "--ignore 255: the training masks hold no other id"),
    ([[0]], [[255]], "--ignore 255: the reported masks hold no other id"),
])  # fmt: skip
def test_unlabelled_pixels_not_declared_are_refused(train, reported, message):
    with pytest.raises(UserError, match=message):
        scenes.count_classes(of_masks(train), of_masks(reported), 255)


# ---- boxes ---------------------------------------------------------------------------------------


def test_true_boxes_of_masks_are_one_a_class_and_end_behind_the_last_pixel():
    mask = [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [9, 9, 9, 9]]
    found = scenes.true_boxes(of_masks(mask, [[0, 9]], [[0, 700]]), None, ignore=9)
    assert [b.tolist() for b in found] == [[[0, 0, 2, 1], [3, 1, 4, 2]], [], [[1, 0, 2, 1]]]
    assert found[1].shape == (0, 4) and all(b.dtype == torch.float64 for b in found)
    [only] = scenes.true_boxes(of_masks(mask), None, ignore=300)  # 300 does not fit into uint8
    assert len(only) == 3
    with pytest.raises(UserError, match="holds id 4096, above 4095"):  # not an object but a mark
        scenes.true_boxes(of_masks(mask, [[0, 4096]]), None, ignore=9)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("header", [b"", b"file\tx0\ty0\tx1\ty1\r\n"])
def test_boxes_may_begin_with_a_byte_order_mark(mark, header, root):
    (root / "boxes.tsv").write_bytes(mark + header + b"train/images/1.png\t0\t1\t4\t3\r\n")
    assert scenes.read_boxes(root / "boxes.tsv") == {f"{root}/train/images/1.png": [[0, 1, 4, 3]]}


def test_true_boxes_of_a_file_are_preferred(root):
    lines = ["file\tx0\ty0\tx1\ty1", "train/images/1.png\t0.1\t1\t4\t2.3", ""]
    lines += ["./train/images/1.png\t1\t1\t2\t2"]
    (root / "boxes.tsv").write_text("\n".join(lines))
    read = scenes.folder_scenes(root, "train", True)
    none, two = scenes.true_boxes(read, root, 255)
    assert none.shape == (0, 4) and two.dtype == torch.float64
    assert two.tolist() == [[0.1, 1, 4, 2.3], [1, 1, 2, 2]]
    one, _ = scenes.true_boxes(read._replace(names=read.names[::-1]), root, 255)
    assert len(one) == 2  # found by name
    (root / "boxes.tsv").write_text("train/images/notes.txt\t0\t0\t5\t5")
    with pytest.raises(UserError, match="no reported image has a true box"):
        scenes.true_boxes(read, root, 255)


BAD_BOXES = ["1.png\t0\t0\tfive\t5", "1.png\t0\t0\t5", "1.png\t0\t0\t5\t5\t5"]
BAD_BOXES += ["1.png\t5\t0\t5\t5", "1.png\t0\t5\t5\t5", "1.png\t-1\t0\t5\t5", "1.png\t0\t-1\t5\t5"]
BAD_BOXES += ["1.png\t0\t0\t5\tinf", "1.png\t0\t0\tinf\t5", "1.png\tnan\t0\t5\t5"]
BAD_BOXES += ["7.png\t0\t0\t5\t5", "1\xe4.png\t0\t0\t5\t5"]  # no such file; nor is it UTF-8
BAD_BOXES += ["1.png\t0\t0\t5\t5\nfile\tx0\ty0\tx1\ty1"]  # a late header


@pytest.mark.parametrize("lines", BAD_BOXES)
def test_bad_boxes_are_refused(lines, root):
    (root / "boxes.tsv").write_bytes(f"train/images/{lines}".encode("latin-1"))
    number = len(lines.splitlines())
    with pytest.raises(UserError, match=f"line {number} is .*; expected a file of ROOT, x0, y0"):
        scenes.read_boxes(root / "boxes.tsv")
