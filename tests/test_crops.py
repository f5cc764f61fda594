"""DINO's crops and their colours: each image of a batch as torchvision changes it alone."""

import argparse

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

import train_cls
import train_ssl
from support import data
from support.crops import BLURRED_FROM, MultiCrop, blurred, grey_of, recoloured, turned_hue
from support.shapes import Shapes

NOTHING = [1, 1, 1, 0, 0, 0, 0, 0]  # the changes that leave a crop as it is


def crops_of(side: int, batch: int = 2, crops: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    smooth = torch.rand(batch * crops, 3, 5, 5, generator=generator)
    images = tv.resize(smooth, [side, side], antialias=True).mul(255).round()
    images[:, :, : side // 4] = images[:, :1, : side // 4]  # grey: without a hue
    images[0, :, side // 2 :] = torch.tensor([255, 0, 0]).view(3, 1, 1)
    return images.view(batch, crops, 3, side, side).to(torch.uint8)


@pytest.mark.parametrize("turn", [-0.5, -0.13, 0, 0.07, 0.31, 0.5])
def test_hues_turn_as_in_torchvision(turn):
    images = crops_of(9).float() / 255
    expected = tv.adjust_hue(images, turn)
    torch.testing.assert_close(turned_hue(images, torch.tensor(turn)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.3, 1.1, 2.0])
def test_a_blur_is_torchvision_s(sigma):
    images = crops_of(20).float()
    expected = tv.gaussian_blur(images, [13, 13], [sigma, sigma])
    sigmas = torch.zeros(2, 3)
    sigmas[1, 2] = sigma
    ours = blurred(images, sigmas)
    torch.testing.assert_close(ours[1, 2], expected[1, 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours[0], images[0])  # 0 is none


def test_each_crop_is_changed_by_its_own_amounts():
    """Against torchvision's functions, one crop at a time."""
    images = crops_of(BLURRED_FROM)
    changes = torch.tensor([
        [NOTHING, [1.3, 0.7, 1.15, 0.09, 0, 0, 0, 0], [0.65, 1.4, 0.85, -0.04, 1.7, 1, 0, 1]],
        [[1, 1, 1, 0, 0, 1, 0, 0], [1.2, 1, 1, 0, 0.5, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 1]],
    ])  # fmt: skip
    result = recoloured(images, changes)
    for b in range(2):
        for crop in range(3):
            b_, c_, s_, turn, sigma, mirrored, grey, solarised = changes[b, crop].tolist()
            x = tv.adjust_brightness(images[b, crop].float() / 255, b_)
            x = tv.adjust_hue(tv.adjust_saturation(tv.adjust_contrast(x, c_), s_), turn)
            x = tv.rgb_to_grayscale(x, num_output_channels=3) if grey else x
            x = tv.gaussian_blur(x, [13, 13], [sigma, sigma]) if sigma else x
            x = tv.horizontal_flip(x) if mirrored else x
            x = 255 * (tv.solarize(x, 127.5 / 255) if solarised else x)
            torch.testing.assert_close(result[b, crop], x, atol=0.02, rtol=0)
    torch.testing.assert_close(result[0, 0], images[0, 0].float(), atol=1e-3, rtol=0)
    inverted = torch.where(images[1, 2] < 128, images[1, 2], 255 - images[1, 2]).float()
    torch.testing.assert_close(result[1, 2], inverted, atol=1e-3, rtol=0)


def test_small_crops_are_not_blurred():
    images, changes = crops_of(BLURRED_FROM - 1), torch.tensor(NOTHING).repeat(2, 3, 1).float()
    changes[..., 4] = 2.0
    torch.testing.assert_close(recoloured(images, changes), images.float(), atol=1e-3, rtol=0)


def test_the_augmentation_is_dinos_for_vit_s():
    """Global crops of .25 .. 1, local ones of .05 .. .25; how often and how much they change."""
    multi = MultiCrop(224, 96, 8, 0.25, drawn=False)
    for crop, scale, side in (
        (multi.to_global, (0.25, 1), 224),
        (multi.to_local, (0.05, 0.25), 96),
    ):
        assert tuple(crop.scale) == scale and list(crop.size) == [side, side]
        assert crop.interpolation == InterpolationMode.BICUBIC and crop.antialias
    torch.manual_seed(3)
    drawn = torch.stack([multi.changes() for _ in range(4000)])  # (draw, crop, change)
    jitter, sigma, marks = drawn[..., :4], drawn[..., 4], drawn[..., 5:]
    jittered = (jitter != torch.tensor([1, 1, 1, 0])).any(-1)
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert jittered.float().T.corrcoef().fill_diagonal_(0).abs().max() < 0.1  # crop by crop
    low, high = jitter.amin(dim=(0, 1)).tolist(), jitter.amax(dim=(0, 1)).tolist()
    assert low == pytest.approx([0.6, 0.6, 0.8, -0.1], abs=2e-3)
    assert high == pytest.approx([1.4, 1.4, 1.2, 0.1], abs=2e-3)
    often = [(sigma > 0).float().mean(0), *marks.mean(0).unbind(-1)]  # of each crop
    expected = [[1, 0.1] + 8 * [0.5], 10 * [0.5], 10 * [0.2], [0, 0.2] + 8 * [0]]
    for got, wanted in zip(often, expected):
        assert got.tolist() == pytest.approx(wanted, abs=0.03)
    widths = sigma[sigma > 0]
    assert [widths.min(), widths.mean(), widths.max()] == pytest.approx([0.1, 1.05, 2], abs=0.02)
    apart = jitter[jittered]
    assert apart.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03  # drawn independently
    assert not MultiCrop(95, 40, 8, 0.25, drawn=False).changes()[:, 4].any()


def test_crops_have_their_sizes_and_their_own_transform():
    crops = MultiCrop(32, 16, local_crops=3, split=0.5, drawn=False)
    large, few, changes = crops(Image.new("RGB", (40, 30)))
    assert large.shape == (2, 3, 32, 32) and few.shape == (3, 3, 16, 16)
    assert large.dtype == few.dtype == torch.uint8 and changes.shape == (5, 8)
    large, few, changes = MultiCrop(32, 16, 0, 0.5, drawn=True)(torch.zeros(3, 32, 32).byte())
    assert few.shape == (0, 3, 16, 16) and changes.shape == (2, 8)


def test_crops_are_made_of_their_seed():
    crops = data.Seeded(Shapes("train", 4), MultiCrop(32, 16, 2, 0.5, drawn=True))
    (first, _), (again, _), (other, _) = (crops.__getitems__([(1, seed)])[0] for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))


def test_drawn_images_may_be_of_any_angle_and_hue():
    multi = MultiCrop(32, 16, 4, 0.5, drawn=True)
    for crop, scale in ((multi.to_global, (0.5, 1)), (multi.to_local, (0.1, 0.5))):
        turn, cut, _ = crop.transforms
        assert turn.degrees == [-180, 180] and tuple(cut.scale) == scale
    assert multi.jitter.tolist() == pytest.approx([0.4, 0.4, 0.2, 0.5])
    red, green, blue = grey_of(torch.eye(3).view(3, 3, 1, 1)).flatten().tolist()
    assert (red, green, blue) == pytest.approx((0.2989, 0.587, 0.114))


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    """Never below four times the image's size; other files and smaller images as they are."""
    large = tv.to_pil_image(crops_of(64)[0, 1]).resize((1300, 700), Image.Resampling.BICUBIC)
    large.save(tmp_path / "a.jpg", quality=95)
    large.save(tmp_path / "a.png")
    sizes = {side: data.open_rgb(str(tmp_path / "a.jpg"), side).size for side in (20, 43, 87, 88)}
    assert sizes == {20: (163, 88), 43: (325, 175), 87: (650, 350), 88: (1300, 700)}
    assert data.open_rgb(str(tmp_path / "a.jpg")).size == (1300, 700)
    assert data.open_rgb(str(tmp_path / "a.png"), 20).size == (1300, 700)
    to_val = data.augmentations(20, drawn=False)[1]
    small, whole = (to_val(data.open_rgb(str(tmp_path / "a.jpg"), s)).int() for s in (20, None))
    assert (small - whole).abs().float().mean() < 2


def test_resizing_is_pillow_s():
    """On uint8 tensors torchvision does what Pillow does, up to rounding."""
    image = tv.to_pil_image(crops_of(80)[0, 2])
    to_val = data.augmentations(24, drawn=False)[1]
    theirs = v2.Resize(24, interpolation=InterpolationMode.BICUBIC)(image)
    apart = (to_val(image).int() - tv.pil_to_tensor(theirs).int()).abs()
    assert apart.max() <= 1


@pytest.mark.parametrize("load", [train_cls.both_sets, train_ssl.load_sets])
def test_trainers_decode_for_their_image_size(load, image_root):
    args = argparse.Namespace(data=str(image_root), image_size=13)
    for folder in load(args):
        assert folder.loader.keywords == {"image_size": 13}
