"""The init of our own: its constants against their equations, its effect at every depth."""

import math
import statistics

import pytest
import torch
from torch import nn

from data import normalise
from depth_init import COUNTS_ON, centred_gelu, depth_constants, depth_init_
from minskip import MLP, ViT, conditioned_init_, orthogonal_mlp_weight
from shapes import draw_shapes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_and_the_spread_of_a_gelu():
    """E phi^2 = .425221, E phi'^2 = .455851 at g = 1; E phi = g^2 / sqrt(2 pi (1 + g^2))."""
    for gain in (0.2, 0.5, 1.0):
        mean, _ = centred_gelu(gain)
        assert mean == pytest.approx(gain**2 / math.sqrt(2 * math.pi * (1 + gain**2)), rel=1e-6)
    mean, chi = centred_gelu(1.0)  # without the linear part z / 2, whose share is 1/4 in both
    assert chi == pytest.approx((1 + 0.455851 - 0.25) / (1 + 0.425221 - 0.25 - mean**2), rel=1e-5)
    assert centred_gelu(1e-3)[1] == pytest.approx(1, abs=1e-5)  # as good as linear


def depth_mlps(width: int, depth: int) -> list[MLP]:
    torch.manual_seed(0)
    model = ViT(8, 8, 0, dim=width, depth=depth, num_heads=8, residual=False, pool="mean")
    return [block.mlp for block in depth_init_(model).blocks]


def test_the_mlp_spreads_alike_tokens_as_much_as_attention_shrinks_them():
    """chi delta^2 = 1, measured: squared differences of alike tokens, mean over blocks' MLPs."""
    depth, width = 16, 256
    _, gain = depth_constants(width, 8, 1, depth)
    delta, (_, chi) = 1 - 1 / (2 * depth), centred_gelu(gain)
    assert chi * delta**2 == pytest.approx(1, abs=1e-6)
    x, step = torch.randn(2, 256, width, generator=seeded(2))
    x, y = nn.functional.layer_norm(torch.stack([x, x + 0.01 * step]), (width,))
    spread = []
    with torch.no_grad():
        for mlp in depth_mlps(width, depth):
            u, v = mlp(x), mlp(y)
            before, after = ((a - b).square().sum() / a.square().sum() for a, b in ((x, y), (u, v)))
            spread.append((after / before).item())
    assert statistics.mean(spread) == pytest.approx(chi, abs=0.005)
    assert correlation(u[None]) == pytest.approx(0, abs=0.02)  # no mean left


def test_the_linear_part_of_the_mlp_is_the_identity_where_independent_frames_lose_rank():
    """Singular values of W_1 W_2 / 2: g on zero-mean tokens; those of independent ones reach 0.

    Those are cosines between two random d-dimensional subspaces of 4 d: between 0 and sqrt(3)/2.
    """
    width, depth = 128, 12
    mlp = depth_mlps(width, depth)[0]
    zero_mean = torch.eye(width) - 1 / width
    _, gain = depth_constants(width, 8, 1, depth)
    with torch.no_grad():
        linear = mlp.fc1.weight.T @ mlp.fc2.weight.T / 2
        assert torch.allclose(zero_mean @ linear, gain * zero_mean, atol=1e-5)
        assert mlp(torch.randn(5, width)).mean(dim=1).abs().max() < 1e-5  # LayerNorm finds no mean
        W_1 = orthogonal_mlp_weight(width, 4 * width, generator=seeded(0))
        W_2 = orthogonal_mlp_weight(4 * width, width, generator=seeded(1))
        cosines = torch.linalg.svdvals(W_1 @ W_2 / 2)
    assert cosines[0] == pytest.approx(math.sqrt(3) / 2, abs=0.02)
    assert cosines[-1] < 0.02


def test_the_depth_scheme_passes_zero_mean_tokens_on_unchanged():
    """W_V W_O = c^2 I, and W_Q = W_K with singular values sqrt(s) that give the logit gap."""
    width, heads, depth, c = 48, 3, 12, 2.0
    torch.manual_seed(0)
    model = ViT(16, 4, 0, dim=width, depth=depth, num_heads=heads, residual=False, pool="mean")
    attention = depth_init_(model, c=c).blocks[3].attention
    W_Q, W_K, W_V, W_O = (getattr(attention, f"W_{x}").weight.T for x in "QKVO")
    assert torch.allclose(W_V @ W_O, c**2 * torch.eye(width), atol=1e-4)
    assert torch.equal(W_Q, W_K)
    s, _ = depth_constants(width, heads, 16, depth)
    assert torch.allclose(W_Q.T @ W_Q, s * torch.eye(width), atol=1e-4)
    delta = 1 - 1 / (2 * depth)
    others = 15 * math.exp(-s * math.sqrt(width / heads) * (1 - 0.65))  # of one token's attention
    assert 1 / (1 + others) == pytest.approx(delta)


@pytest.mark.parametrize("mlp_ratio", [1, 2, 4])
def test_the_mlp_balances_attention_at_other_ratios(mlp_ratio):
    _, gain = depth_constants(64, 2, 17, 48, mlp_ratio)
    assert centred_gelu(gain, mlp_ratio)[1] * (1 - 1 / 96) ** 2 == pytest.approx(1, abs=1e-6)


def test_the_depth_init_refuses_what_it_does_not_fit():
    with pytest.raises(ValueError, match=r"mlp_ratio of at least 1, not 0\.5"):
        depth_init_(ViT(8, 8, 0, dim=24, depth=1, num_heads=2, mlp_ratio=0.5))
    with pytest.raises(TypeError, match=r"minskip\.ViT"):
        depth_init_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="c must be a positive number"):
        depth_init_(ViT(8, 8, 0, dim=24, depth=1, num_heads=2), c=0)


@torch.no_grad()
def correlation(tokens: torch.Tensor) -> float:
    """Mean cosine of two different tokens, (image, token, dim)."""
    x = nn.functional.normalize(tokens, dim=-1)
    n = x.shape[1]
    return ((x @ x.mT).sum((-2, -1)).mean().item() - n) / (n * (n - 1))


@pytest.mark.parametrize(
    "depth, dim, num_heads, side",
    [(6, 96, 3, 4), (12, 64, 2, 4), (12, 192, 3, 14), (24, 192, 3, 4), (96, 96, 3, 4)],
)
def test_the_depth_init_keeps_tokens_apart_at_any_depth(depth, dim, num_heads, side):
    """Correlation at most .5 after the last block, where the paper's constants reach 1."""
    images = normalise(draw_shapes([0, 1], 8 * side, "val")[0])
    shape = dict(image_size=8 * side, patch_size=8, num_classes=10, dim=dim, depth=depth)
    shape |= dict(num_heads=num_heads, residual=False, **COUNTS_ON)
    torch.manual_seed(0)
    model = depth_init_(ViT(**shape))
    with torch.no_grad():
        *tokens, last = model.forward_features(images, list(range(depth + 1)))
        P = [b.attention.weights(b.norm1(x)) for b, x in zip(model.blocks, tokens)]
    assert correlation(last) < 0.5
    shares = [p.diagonal(dim1=-2, dim2=-1).mean().item() for p in P]
    assert max(shares) < 0.9999 and min(shares) > 0.3  # below delta: logits fluctuate
    if depth <= 12:
        paper = conditioned_init_(ViT(**shape))
        [last] = paper.forward_features(images, [depth])
        assert correlation(last) > (0.9 if depth == 6 else 0.999)
