"""DINO's augmentation: loader processes cut crops, the device changes their colours.

torchvision's transforms change all images of a batch by the same amount, and one by one they take
most of a processor's time. So `MultiCrop`, which runs in the loader processes, only draws by how
much each crop is to be changed, and `recoloured` changes a batch of them, on a GPU where there is
one. All random numbers come from the image's seed, so the result is the same for any number of
processes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

BLURRED_FROM = 96  # pixels: on smaller crops a blur erases what there is to see
RADIUS = 6  # of the blur, pixels: three standard deviations of its widest


# --------------------------------------------------------------------------------------------------
# In the loader processes
# --------------------------------------------------------------------------------------------------


class MultiCrop:
    """DINO's augmentation: crops of an image, and what the device is to change in each of them.

    image -> global crops (2, 3, size, size) and local crops (local_crops, 3, small, small), uint8,
    and changes (2 + local_crops, 8) for `recoloured`: colours, blur, mirror image.

    Unlike DINO we blur only crops of 96 px or more (SimCLR too leaves it out on CIFAR), and colours
    change in a fixed order, where DINO draws the order.

    drawn: the images are `Shapes`. Two crops of one image share its colours and the direction of
    its gratings, and a network would learn nothing else; so hues and angles are drawn anew for each
    crop.
    """

    def __init__(self, size: int, small: int, local_crops: int, split: float, drawn: bool):
        self.drawn, self.small, self.local_crops = drawn, small, local_crops
        self.to_global = self.crop(size, (split, 1.0))
        self.to_local = self.crop(small, (split / 5, split))
        # largest change of brightness, contrast, saturation and hue
        self.jitter = torch.tensor([0.4, 0.4, 0.2, 0.5 if drawn else 0.1])
        large, few = float(size >= BLURRED_FROM), float(small >= BLURRED_FROM)
        self.chances = torch.tensor([
            # blurred, mirrored, grey, solarised
            [1.0 * large, 0.5, 0.2, 0.0],
            [0.1 * large, 0.5, 0.2, 0.2],
            *[[0.5 * few, 0.5, 0.2, 0.0]] * local_crops,
        ])  # fmt: skip

    def crop(self, size: int, scale: tuple[float, float]) -> v2.Transform:
        crop = v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        if not self.drawn:
            return crop
        turn = v2.RandomRotation(180, InterpolationMode.BILINEAR)
        return v2.Compose([turn, crop, v2.PILToTensor()])

    def changes(self) -> Tensor:
        crops = len(self.chances)
        jitter = (2 * torch.rand(crops, 4) - 1) * self.jitter * (torch.rand(crops, 1) < 0.8)
        blur, *others = (torch.rand(crops, 4) < self.chances).float().split(1, dim=1)
        sigma = blur * torch.empty(crops, 1).uniform_(0.1, 2.0)
        return torch.cat([1 + jitter[:, :3], jitter[:, 3:], sigma, *others], dim=1)

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Pillow turns images faster, torchvision resizes tensors four times as fast.
        to = v2.functional.to_pil_image if self.drawn else v2.functional.pil_to_tensor
        image = to(image)
        global_crops = torch.stack([self.to_global(image) for _ in range(2)])
        local_crops = global_crops.new_zeros(self.local_crops, 3, self.small, self.small)
        for i in range(self.local_crops):
            local_crops[i] = self.to_local(image)
        return global_crops, local_crops, self.changes()


# --------------------------------------------------------------------------------------------------
# On the device
# --------------------------------------------------------------------------------------------------


def grey_of(images: Tensor) -> Tensor:
    """Luminance, (..., 3, height, width) -> (..., 1, height, width)."""
    red, green, blue = images.split(1, dim=-3)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def turned_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hues turned by a part of the colour circle, -.5 .. .5, in HSV; (..., 3, height, width).

    turn: broadcasts against (..., height, width).
    """
    red, green, blue = images.unbind(-3)
    value = images.amax(-3)
    chroma = value - images.amin(-3)
    c = torch.where(chroma > 0, chroma, 1.0)
    at_red, at_green, at_blue = (green - blue) / c, 2 + (blue - red) / c, 4 + (red - green) / c
    hue = torch.where(value == red, at_red, torch.where(value == green, at_green, at_blue))
    channels = []
    for start in (5, 3, 1):  # where a channel's rise to its plateau begins, in sixths of the circle
        k = (start + hue + 6 * turn) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-3)


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blurs, (batch, crop, 3, height, width); sigma: (batch, crop), pixels, 0 for none."""
    k = torch.arange(-RADIUS, RADIUS + 1, device=images.device)
    weights = (-0.5 * (k / sigma[..., None].clamp_min(1e-3)) ** 2).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    x = rearrange(images, "batch crop c height width -> 1 (batch crop c) height width")
    kernels = repeat(weights, "batch crop k -> (batch crop c) 1 1 k", c=3)
    for kernel in (kernels, kernels.mT):  # along rows, along columns
        across, along = kernel.shape[-1] // 2, kernel.shape[-2] // 2
        padded = F.pad(x, (across, across, along, along), mode="reflect")
        x = F.conv2d(padded, kernel, groups=len(kernel))
    return x.reshape(images.shape)


def recoloured(images: Tensor, changes: Tensor) -> Tensor:
    """images, (batch, crop, 3, height, width) uint8, each changed; floats in 0 .. 255.

    changes: (batch, crop, 8), of each image: factors of brightness, contrast and saturation, turn
    of the hue (-.5 .. .5), standard deviation of the blur (pixels, 0 for none), and whether it is
    mirrored, made grey, solarised (values from 128 on inverted), 0 or 1.
    """
    each = rearrange(changes, "batch crop change -> change batch crop 1 1 1")
    brightness, contrast, saturation, turn, _, mirrored, grey, solarised = each
    x = (brightness * images).clamp(0, 255)
    mean = reduce(grey_of(x), "batch crop 1 height width -> batch crop 1 1 1", "mean")
    x = torch.lerp(mean, x, contrast).clamp(0, 255)
    x = torch.lerp(grey_of(x), x, saturation).clamp(0, 255)
    x = turned_hue(x, turn.squeeze(-3))
    x = torch.where(grey > 0, grey_of(x), x)
    x = blurred(x, changes[..., 4]) if x.shape[-1] >= BLURRED_FROM else x
    x = torch.where(mirrored > 0, x.flip(-1), x)
    return torch.where((solarised > 0) & (x > 127.5), 255 - x, x)
