"""Seeded loading, augmentation and image files."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

import data as data_module
from data import Batches, augmentations, make_loader, mixed_seeds, normalise, open_rgb
from shapes import Shapes


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
    crop, flip, rand_augment, to_tensor, erasing = augmentations(48, drawn=False)[0].transforms
    assert tuple(crop.size) == (48, 48) and tuple(crop.scale) == (0.08, 1.0)
    assert crop.interpolation == InterpolationMode.BICUBIC and flip.p == 0.5
    assert (rand_augment.num_ops, rand_augment.magnitude) == (2, 9)
    assert isinstance(to_tensor, v2.PILToTensor) and erasing.p == 0.25
    grey = torch.tensor(erasing.value, dtype=torch.uint8)[None, :, None, None]
    assert normalise(grey).abs().max() < 0.02  # nothing, to the network
    assert list(rand_augment.fill) == list(erasing.value)


@pytest.mark.parametrize("size, side", [(128, 146), (32, 32)])
def test_validation_looks_at_the_middle(size, side):
    """Seven eighths of a large image, a small one whole."""
    resize, crop, _ = augmentations(size, drawn=False)[1].transforms
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


def test_a_large_set_is_not_decoded_at_the_start(tmp_path, capsys):
    """Headers alone, so that a million images do not take an hour; damage is still refused."""
    whole, damaged = tmp_path / "a.png", tmp_path / "b.png"
    Image.effect_noise((40, 40), 90).save(whole)
    damaged.write_bytes(whole.read_bytes()[:-300])
    data_module.check_images([str(whole), str(damaged)], decode_up_to=1)
    with pytest.raises(SystemExit):
        data_module.check_images([str(whole), str(damaged)])
    assert "b.png" in capsys.readouterr().err
    damaged.write_text("no image")
    with pytest.raises(SystemExit):
        data_module.check_images([str(whole), str(damaged)], decode_up_to=1)
