"""The drawn data set, seeded loading, image folders, checkpoints."""

import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

import common
from common import SHAPES, Batches, Seeded, Shapes, draw_shapes

# ---- Shapes --------------------------------------------------------------------------------------


def test_an_image_depends_on_seed_split_and_index_alone():
    images, labels, masks = draw_shapes([5, 6, 7], 32, "train")
    alone = draw_shapes([6], 32, "train")
    assert images[1].equal(alone[0][0]) and masks[1].equal(alone[2][0])
    assert labels.tolist() == [5, 6, 7]
    assert not images.equal(draw_shapes([5, 6, 7], 32, "val")[0])
    assert not images.equal(draw_shapes([5, 6, 7], 32, "train", seed=1)[0])
    image, label = Shapes("train", 10, 32)[6]
    assert image.equal(images[1]) and label == 6


def test_the_same_picture_at_every_size():
    small = draw_shapes(list(range(20)), 32, "train")
    large = draw_shapes(list(range(20)), 128, "train")
    shrunk = F.avg_pool2d(large[0].float(), 4)
    assert (shrunk - small[0].float()).abs().mean() < 3  # of 255
    share = [(masks > 0).float().mean() for _, _, masks in (small, large)]
    assert share[0] == pytest.approx(share[1].item(), rel=0.03)


def test_masks_mark_the_shape_and_nothing_else():
    images, labels, masks = draw_shapes(list(range(200)), 48, "val")
    assert len(SHAPES) >= 10
    for image, label, mask in zip(images.float() / 255, labels, masks):
        inside = mask > 0
        assert set(mask.unique().tolist()) == {0, label.item() + 1}
        assert 0.01 < inside.float().mean() < 0.6
        # shapes are of one bright colour
        assert image[:, inside].quantile(0.1, dim=1).min() > 0.3
        assert image[:, inside].median(dim=1).values.min() >= 0.54


def test_a_linear_classifier_on_pixels_stays_below_forty_percent():
    """Ridge regression, its strength chosen on the very images it is measured on."""
    train, labels, _ = draw_shapes(list(range(4000)), 32, "train")
    val, val_labels, _ = draw_shapes(list(range(1000)), 32, "val")
    X, V = train.flatten(1).float() / 255, val.flatten(1).float() / 255
    X, V = X - X.mean(0), V - X.mean(0)
    targets = X.T @ F.one_hot(labels).float()
    for strength in (100.0, 1000.0):
        W = torch.linalg.solve(X.T @ X + strength * torch.eye(X.shape[1]), targets)
        accuracy = ((V @ W).argmax(1) == val_labels).float().mean()
        assert accuracy < 0.4


# ---- loading -------------------------------------------------------------------------------------


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
    data = Seeded(Shapes("train", 64, 24), transform)
    results = []
    for workers in (0, 2):
        batches = Batches(64, 16, seed=0, shuffle=True)
        loader = common.make_loader(data, batches, workers, torch.device("cpu"))
        results.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*results)


def test_greyscale_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA"):
        Image.new(mode, (4, 4)).save(tmp_path / "image.png")
        assert common.open_rgb(str(tmp_path / "image.png")).mode == "RGB"


def test_seeds_of_neighbours_are_unrelated():
    steps = [(epoch, step) for epoch in range(30) for step in range(30)]
    seeds = [seed for numbers in steps for seed in common.mixed_seeds(1, *numbers)]
    assert len(set(seeds)) == 900
    bits = np.unpackbits(np.array(seeds, dtype=np.uint32).view(np.uint8))
    assert bits.mean() == pytest.approx(0.5, abs=0.02)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, script="train_cls", value=1)

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        common.save_checkpoint(path, value=Unpicklable())
    assert common.load_checkpoint(str(path))["value"] == 1


class Intruder:
    def __reduce__(self):
        return os.system, ("echo intruder > intruder.txt",)


@pytest.mark.parametrize(
    "kind", ["missing", "noise", "cut short", "code", "foreign", "other script"]
)
def test_only_our_own_checkpoints_are_taken(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if kind == "noise":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "cut short":
        common.save_checkpoint(path, script="train_cls", value=torch.randn(1000))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Intruder()))
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "other script":
        common.save_checkpoint(path, script="train_ssl")
    with pytest.raises(SystemExit) as stop:
        common.load_checkpoint(str(path), "train_cls")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(path) in message
    assert not (tmp_path / "intruder.txt").exists()
