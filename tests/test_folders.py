"""Folders of images as users have them: what the scripts leave out, point out, and refuse."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_fails_in_one_line, make_image_folder, run_here, run_main
from PIL import Image

import train_cls
import train_ssl
from support import data
from support.errors import UserError

ONE_EPOCH = [*SMALL, "--epochs", "1", "--warmup-epochs", "0", "--out", "run"]
DINO = [*ONE_EPOCH, "--prototypes", "64", "--local-crops", "2"]


@pytest.fixture
def root(tmp_path):
    return make_image_folder(tmp_path / "images", classes=3)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Trains, by default with labels, on --data; returns what is printed and the checkpoint."""

    def run(root, script=train_cls, flags=ONE_EPOCH):
        run_main(script.main, ["--data", root, *flags], tmp_path, monkeypatch)
        return capsys.readouterr().out, torch.load(tmp_path / "run/last.pt", weights_only=True)

    return run


def one_level_down(root, *names: str) -> None:
    """train/class0 becomes train/NAME/class0, for each name; val/ likewise."""
    for split in ("train", "val"):
        (root / split).rename(root / "moved")
        for name in names:
            shutil.copytree(root / "moved", root / split / name)
        shutil.rmtree(root / "moved")


def flatten(root) -> None:
    """All training images into train/ itself; val/ keeps its classes."""
    for number, path in enumerate(sorted((root / "train").rglob("*.png"))):
        path.rename(root / f"train/{number}.png")
    for folder in (root / "train").glob("class*"):
        shutil.rmtree(folder)


# ---- left out ------------------------------------------------------------------------------------


def add_hidden(root) -> None:
    """Ten things per split that no user sees, of which none is an image of theirs."""
    for split in ("train", "val"):
        folder = root / split
        for copy in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "class1/.git/x", "class2/a/.b"):
            shutil.copytree(folder / "class0", folder / copy)
        for file in (".DS_Store", "class0/._00.png", "class0/.x.png", "class1/Thumbs.db"):
            (folder / file).write_text("no image")
        shutil.copy(folder / "class0/00.png", folder / "class2/a/.hidden.png")


def test_hidden_files_and_folders_change_nothing_but_are_counted(root, train, tmp_path):
    plain, before = train(root)
    shutil.rmtree(tmp_path / "run")
    add_hidden(root)
    out, after = train(root)
    assert plain.count("left out") == 0 and out.count("left out") == 2
    for split in ("train", "val"):
        assert f"note    {root}/{split}: left out 10 hidden files or folders\n" in out
    assert after["classes"] == ["class0", "class1", "class2"]
    assert after["listing"] == before["listing"]
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name]), name


def test_a_root_in_a_hidden_folder_is_no_hidden_root(root, tmp_path):
    shutil.move(root, tmp_path / ".cache/images")
    assert len(data.image_folder(str(tmp_path / ".cache/images"), "train")) == 60


@pytest.mark.parametrize("script, flags", [(train_cls, ONE_EPOCH), (train_ssl, DINO)])
def test_files_not_known_as_images_are_counted_by_extension(script, flags, root, train):
    ends = [*[".GIF"] * 5, *[".jfif"] * 4, *[".avif"] * 3, *[""] * 2, ".JPG", ".Tiff"]
    for path, end in zip(sorted((root / "train").glob("*/*.png"))[::3], ends):
        path.rename(path.with_suffix(end))
    shutil.copy(root / "val/class0/00.png", root / "val/loose.png")
    out, checkpoint = train(root, script, flags)
    assert f"{root}/train: left out 5 .gif, 4 .jfif, 3 .avif, 2 without extension\n" in out
    assert f"{root}/val: left out 1 images in no class\n" in out
    assert checkpoint["images"] == 46


def test_many_kinds_of_files_are_told_in_one_short_line(root, capsys):
    for number in range(50):
        (root / f"train/class0/a.{number}").write_text("")
    data.image_folder(str(root), "train")
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith(", ...") and len(line) < len(str(root)) + 70


def test_the_order_is_that_of_torchvision(root):
    """Or a run from before could not be resumed."""
    for name in ("class0-b", "class0/inner", "class0/inner-b", "class0/inner/deep"):
        shutil.copytree(root / "train/class1", root / "train" / name)
    ours, theirs = (
        kind(str(root), "train") if kind is data.image_folder else kind(str(root / "train"))
        for kind in (data.image_folder, data.ImageFolder)
    )
    assert ours.samples == theirs.samples and ours.classes == theirs.classes
    assert ours.targets == theirs.targets and ours.root == theirs.root


# ---- labels --------------------------------------------------------------------------------------


def test_one_folder_level_too_many(root, train, tmp_path, monkeypatch, capsys):
    """A single class is refused with labels; DINO does without labels, and then without k-NN."""
    one_level_down(root, "images")
    words = ["--data", root, *ONE_EPOCH]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "only class in .*train is images; one folder level too many?")
    out, checkpoint = train(root, train_ssl, DINO)
    assert "k-NN    off" in out and checkpoint["classes"] == ["images"]
    with pytest.raises(UserError, match=r"only class in .*val is images; one folder level"):
        data.image_folder(str(root), "val", need_labels=True)


def test_classes_that_all_have_the_same_folders_are_pointed_out(root, train, tmp_path, capsys):
    one_level_down(root, "part1", "part2")
    out, _ = train(root)
    assert "every class has the folders class0, class1, class2; one folder level too many?" in out
    for name in ("class0", "class1"):  # Tiny-ImageNet's layout, and images beside their crops
        shutil.copytree(root / "train/part1/class0", tmp_path / f"good/train/{name}/images")
        for folder in (".", "left", "right"):
            shutil.copytree(
                root / "train/part1/class0",
                tmp_path / f"crops/train/{name}/{folder}",
                dirs_exist_ok=True,
            )
    for name in ("good", "crops"):
        data.image_folder(str(tmp_path / name), "train")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("found", ["test", "Validation", "valid", "VAL"])
def test_a_folder_of_another_name_is_to_be_renamed(found, root, tmp_path, monkeypatch, capsys):
    (root / "val").rename(root / found)
    words = ["--data", root, *ONE_EPOCH]
    done = run_here(train_cls.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, f"no folder {root}/val; rename {found} to val$")
    (root / "train").rename(root / "Training")
    for script in (train_cls, train_ssl):
        done = run_here(script.main, words, tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, f"no folder {root}/train; rename Training to train$")


@pytest.mark.parametrize("bare", [False, True])
def test_dino_takes_images_without_class_folders(bare, root, train, tmp_path, monkeypatch, capsys):
    flatten(root)
    (root / "train/.DS_Store").write_text("")
    folder = root / "train" if bare else root
    if bare:
        shutil.copytree(root / "train", folder / "more")
    out, checkpoint = train(folder, train_ssl, DINO)
    more = "60 images in subfolders, 2 hidden" if bare else "1 hidden"
    assert f"{root}/train: left out {more} files or folders\n" in out and "k-NN    off" in out
    assert (checkpoint["images"], checkpoint["classes"]) == (60, [""])
    train_set, val_set = data.image_folders(str(folder), check=True, need_val=False)
    with pytest.raises(UserError, match=r"no folder .*val; expected ROOT/val/<class>"):
        data.image_folder(str(root / "train"), "val")
    assert val_set is None and train_set.root == str(root / "train")
    assert [os.path.basename(path) for path, _ in train_set.samples[:3]] == [
        "0.png",
        "1.png",
        "10.png",
    ]
    assert train_set[1][1] == 0 and train_set[1][0].size == (24, 24)
    resumed = ["--resume", "run/last.pt", "--data", folder, "--epochs", "2"]
    run_main(train_ssl.main, resumed, tmp_path, monkeypatch)
    (root / "train/0.png").write_bytes((root / "train/1.png").read_bytes())
    done = run_here(train_ssl.main, [*resumed, "--epochs", "3"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "this folder has 60 others; give it the same images")
    done = run_here(train_cls.main, ["--data", folder, *SMALL], tmp_path, monkeypatch, capsys)
    expected = "no folder .*train" if bare else "Couldn't find any class folder in .*train"
    assert_fails_in_one_line(done, f"{expected}; expected ROOT/train/<class>")


def test_a_class_whose_images_are_all_left_out_is_named(root, tmp_path, monkeypatch, capsys):
    for path in (root / "train/class1").glob("*.png"):
        path.rename(path.with_suffix(".jp2"))
    done = run_here(train_cls.main, ["--data", root, *SMALL], tmp_path, monkeypatch, capsys)
    assert f"{root}/train: left out 18 .jp2\n" in done.stdout
    assert_fails_in_one_line(done, r"no images in .*train/class1; add some \(.jpg .* or remove")


def test_a_folder_that_may_not_be_read_is_named(root, tmp_path, monkeypatch, capsys):
    """Not left out in silence, as os.walk does."""
    real, locked = os.scandir, str(root / "train/class1")

    def scandir(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = run_here(train_cls.main, ["--data", root, *SMALL], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, f"error: {locked}: Permission denied")


# ---- what is in the files ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["link", "links to classes", "links to files", "copy", "some"])
def test_validation_images_that_were_trained_on_are_pointed_out(how, root, train):
    images = sorted((root / "train").glob("*/*.png"))
    shutil.rmtree(root / "val")
    if how == "link":
        (root / "val").symlink_to("train")
    elif how == "links to classes":
        (root / "val").mkdir()
        for path in (root / "train").iterdir():
            (root / "val" / path.name).symlink_to(path)
    else:
        shutil.copytree(root / "train", root / "val")
        for path in images if how == "links to files" else images[7:] if how == "some" else []:
            other = root / "val" / path.relative_to(root / "train")
            other.unlink()
            if how == "some":  # another image of the same name
                Image.new("RGB", (9, 5), (7, 0, 9)).save(other)
            else:
                os.link(path, other)
    out, _ = train(root)
    assert f"note    {7 if how == 'some' else 60} of 60 images in val/ are in train/ too" in out


def test_other_images_of_the_same_names_are_no_copies(root, train):
    """Nor are those of the same size in bytes, as files without compression are."""
    for split in ("train", "val"):
        for path in sorted((root / split).glob("*/*.png")):
            Image.open(path).rotate(180 * (split == "val")).save(path.with_suffix(".bmp"))
            path.unlink()
    out, _ = train(root)
    assert "in train/ too" not in out


def test_sixteen_bit_files_are_read_and_pointed_out_where_they_are_dark(root, train):
    for path in (root / "train").glob("*/*.png"):
        grey = (np.asarray(Image.open(path).convert("L")) * 13.0).astype(">u2")  # at most 3315
        path.with_suffix(".pgm").write_bytes(b"P5\n24 24\n65535\n" + grey.tobytes())
        path.unlink()
    out, checkpoint = train(root)
    assert (
        "hold only 12 bits, 0 .. 4095 of 65535, and are almost black; multiply them by 16" in out
        and checkpoint["images"] == 60
    )


def test_a_path_of_bytes_that_are_no_text_trains_and_resumes(root, train, tmp_path, monkeypatch):
    renamed = os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4d")
    root.rename(renamed)
    out, checkpoint = train(renamed)
    assert checkpoint["args"]["data"] == renamed and "top-1" in out
    words = ["--resume", "run/last.pt", "--epochs", "2"]
    run_main(train_cls.main, words, tmp_path, monkeypatch)
    assert torch.load(tmp_path / "run/last.pt")["epoch"] == 2
