"""The synthetic data set: what an image depends on, what its mask marks, how hard it is."""

import pytest
import torch
import torch.nn.functional as F

from support.shapes import SHAPES, Shapes, draw_shapes


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
    small, _, small_masks = draw_shapes(list(range(20)), 32, "train")
    large, _, large_masks = draw_shapes(list(range(20)), 128, "train")
    assert (F.avg_pool2d(large.float(), 4) - small.float()).abs().mean() < 3  # of 255
    area, expected = ((masks > 0).float().mean().item() for masks in (small_masks, large_masks))
    assert area == pytest.approx(expected, rel=0.03)


def test_masks_mark_the_shape_and_nothing_else():
    images, labels, masks = draw_shapes(list(range(200)), 48, "val")
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
    targets = X.T @ F.one_hot(labels, len(SHAPES)).float()
    for strength in (100.0, 1000.0):
        W = torch.linalg.solve(X.T @ X + strength * torch.eye(X.shape[1]), targets)
        assert ((V @ W).argmax(1) == val_labels).float().mean() < 0.4
