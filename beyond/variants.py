"""Alternatives to the parts of a block: other norms, other attentions, another activation.

    model = ViT(..., residual=False, pool="mean")
    start_(vary_(model, norm="none", attention="e-spa", activation="tat"))

makes a "vanilla" transformer, without skips and without norms in its blocks.

norm        `layernorm` and `rmsnorm` divide by the token's size; `dyt` and `derf` squash each entry
            instead; `none` leaves one LayerNorm after the embedding and one at the end
placement   `pre` is x + f(norm(x)); `post` is norm(x + f(x)), the transformer of 2017. Without
            skips the two are the same network, counted from another norm.
shortcut    `constant` is x + f(x); `decreasing` is w x + f(x), where w falls with depth
attention   tokens are mixed by a matrix A (n x n) per head. In `softmax`, A is
            P = softmax(q k^T / sqrt(d_h)); the others start as a matrix that loses less:
                value-skipinit  A = alpha I + beta P, at first alpha = 1, beta = 0: A = I
                shaped          A = alpha I + beta P - gamma 11^T / n, at first all 1: A = I
                u-spa, e-spa    "shaped to preserve attention", A = D softmax(q k^T / sqrt(d_h) + B)
                                with fixed D and B: every block makes tokens a little more alike,
                                to a chosen degree. u-spa: all pairs of tokens equally alike
                                (uniform); e-spa: less, the farther apart they are (exponential)
activation  `gelu`; `tat` ("tailored activation transformation"), a leaky ReLU. An activation with
            a mean makes tokens more alike in every block; its slope limits that to a chosen degree.

Sources: value-skipinit, u-spa, e-spa: He et al. 2023 (arXiv 2302.10322; theirs are causal, the
forms for tokens that all see each other are ours). shaped: Noci et al. 2023 (arXiv 2306.17759);
with one alpha, beta, gamma per head: He and Hofmann 2023 (arXiv 2311.01906). DyT: Zhu et al. 2025
(arXiv 2503.10622). Derf: Chen et al. 2025 (arXiv 2512.10938). What DyT and Derf do to gradients:
arXiv 2604.11890. Decreasing shortcuts: Zhang et al. 2024 (arXiv 2404.10947). TAT: Zhang et al. 2022
(arXiv 2203.08120).
"""

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.optimize import brentq
from torch import Tensor, nn

from minskip import (
    Attention,
    Block,
    ViT,
    orthogonal_mlp_weight,
    set_linear_,
    value_output_projections,
)

# Mean correlation of two tokens after the last block of u-spa and e-spa, from attention alone. The
# MLPs make tokens more alike too: with both, and tat, it is .92 to .96 after 12 blocks.
CORRELATION = 0.5
TAT_FRACTION = 0.9  # correlation after L layers of tat, as a fraction of ReLU's
INDEPENDENT = 50.0  # a gamma so large that tokens have nothing in common
LAST_SHORTCUT = 0.7  # weight of a decreasing shortcut in the last MLP, as in the authors' script
STANDARD = dict(
    norm="layernorm", placement="pre", attention="softmax", activation="gelu", shortcut="constant"
)


def differing(settings: dict) -> dict[str, str]:
    """The parts in a run's or a network's settings that are not the standard ones."""
    return {x: settings[x] for x in STANDARD if settings.get(x, STANDARD[x]) != STANDARD[x]}


# --------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------


class DyT(nn.Module):
    """gamma tanh(a x) + beta, a = 0.5 at the start. Shapes: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))
        self.gamma, self.beta = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.tanh(self.a * x) + self.beta


class Derf(DyT):
    """gamma erf(a x + s) + beta, a = 0.5 and s = 0 at the start."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.s = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * torch.erf(self.a * x + self.s) + self.beta


LayerNorm, RMSNorm = (functools.partial(kind, eps=1e-6) for kind in (nn.LayerNorm, nn.RMSNorm))
NORMS = dict(layernorm=LayerNorm, rmsnorm=RMSNorm, dyt=DyT, derf=Derf, none=nn.Identity)


class PostBlock(Block):
    """norm(x + f(x)) with skips, norm(f(x)) without."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        x = self.norm1(x + self.drop_path(y) if "attention" in self.skips else y)
        y = self.mlp(x)
        return self.norm2(x + self.drop_path(y) if "mlp" in self.skips else y)


# --------------------------------------------------------------------------------------------------
# Shortcuts
# --------------------------------------------------------------------------------------------------


class DecreasingBlock(Block):
    """w x + f(x), twice. `vary_` sets the two weights w; over the 2 L shortcuts of a network they
    fall on a line from 1 to `LAST_SHORTCUT`, so that deep tokens hold less of the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        w_attention, w_mlp = self.shortcuts
        x = w_attention * x + self.drop_path(self.attention(self.norm1(x)))
        return w_mlp * x + self.drop_path(self.mlp(self.norm2(x)))


# --------------------------------------------------------------------------------------------------
# Attention: `weights` returns A, and `mix` returns A v without forming A where it can.
# --------------------------------------------------------------------------------------------------


def per_head(numbers: Tensor) -> Tensor:
    """One number per head, (head,), to multiply (batch, head, token, ...)."""
    return numbers[:, None, None]


class ValueSkipInit(Attention):
    """A = alpha I + beta P, with one alpha and beta per head. He et al. 2023."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.alpha = nn.Parameter(torch.ones(num_heads))
        self.beta = nn.Parameter(torch.zeros(num_heads))

    def weights(self, x: Tensor) -> Tensor:
        P = super().weights(x)
        return per_head(self.alpha) * torch.eye(P.shape[-1]).to(P) + per_head(self.beta) * P

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return per_head(self.alpha) * v + per_head(self.beta) * super().mix(q, k, v)


class Shaped(ValueSkipInit):
    """A = alpha I + beta P - gamma 11^T / n. All are 1 and W_Q = 0 at first, so A = I exactly."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        nn.init.ones_(self.beta)
        self.gamma = nn.Parameter(torch.ones(num_heads))

    def weights(self, x: Tensor) -> Tensor:
        return super().weights(x) - per_head(self.gamma) / x.shape[1]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k, v) - per_head(self.gamma) * v.mean(dim=-2, keepdim=True)


# Shaped to preserve attention: choose the tokens' products (their kernel, n x n) at the input of a
# block, Sigma', and at its output, Sigma. The matrix A that takes one to the other,
# Sigma = A Sigma' A^T, is a scaled softmax, which is what attention computes while W_Q = 0:
#
#     A = Sigma^(1/2) Sigma'^(-1/2) = D softmax(B),   D = rowsum(A),   B = log(D^-1 A)
#
# now, before: rho (of u-spa) or gamma (of e-spa) in Sigma and in Sigma'.


@functools.cache  # per device too, because copying a tensor there in every step stalls the GPU
def u_spa(rows: int, columns: int, now: float, before: float, dtype, device):
    """D, (1, 1), and B, (token, token), for Sigma = (1 - rho) I + rho 11^T: tokens equally alike.

    A = a I + (r - a) 11^T / n = r softmax(b I),   b = log(1 + n a / (r - a))
    a^2 = (1 - rho) / (1 - rho'),   r^2 = (1 + (n - 1) rho) / (1 + (n - 1) rho')
    """
    n = rows * columns
    a = math.sqrt((1 - now) / (1 - before))
    r = math.sqrt((1 + (n - 1) * now) / (1 + (n - 1) * before))
    b = math.log1p(n * a / (r - a))
    D = torch.full((1, 1), r, dtype=dtype, device=device)
    return D, b * torch.eye(n, dtype=dtype, device=device)


def line_kernel(n: int, gamma: float, power: float = 1.0) -> Tensor:
    """Sigma^power for n tokens on a line, Sigma_ij = exp(-gamma |i - j|), in float64."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    S, V = torch.linalg.eigh(torch.exp(-gamma * (i[:, None] - i).abs()))
    return V * S**power @ V.T


@functools.cache
def e_spa(rows: int, columns: int, now: float, before: float, dtype, device):
    """D, (token, 1), and B, (token, token), for Sigma = exp(-gamma distance): near ones are alike.

    The distance |row - row'| + |column - column'| makes Sigma the Kronecker product of two lines'
    kernels, so A = A_rows (x) A_columns, and B is a Kronecker sum.
    """
    A = [line_kernel(n, now, 0.5) @ line_kernel(n, before, -0.5) for n in (rows, columns)]
    D = [a.sum(1, keepdim=True) for a in A]
    B = [(a / d).clamp(min=1e-30).log() for a, d in zip(A, D)]  # a 0 may be rounded to -1e-15
    B = rearrange(B[0], "i j -> i 1 j 1") + rearrange(B[1], "k l -> 1 k 1 l")
    B = rearrange(B, "i k j l -> (i k) (j l)")
    return torch.kron(*D).to(device, dtype), B.to(device, dtype)


GRID_ATTENTIONS = {"u-spa": u_spa, "e-spa": e_spa}


@torch.compiler.assume_constant_result  # compiled, a block keeps its D and B
def kept(attention: str, *settings) -> tuple[Tensor, Tensor]:
    return GRID_ATTENTIONS[attention](*settings)


class SPA(Attention):
    """A = D softmax(q k^T / sqrt(d_h) + B).

    attention: "u-spa" or "e-spa". now, before: this block's kernels.
    grid: number of patches -> rows, columns of the latest images of so many; see `ViT.embed`.
    """

    def __init__(
        self, dim: int, num_heads: int, attention: str, now: float, before: float, grid: dict
    ):
        super().__init__(dim, num_heads)
        self.attention, self.now, self.before, self.grid = attention, now, before, grid

    def D_and_B(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.grid[y.shape[-2]]
        return kept(self.attention, rows, columns, self.now, self.before, y.dtype, y.device)

    def logit_bias(self, q: Tensor) -> Tensor:
        return self.D_and_B(q)[1]

    def scaled(self, y: Tensor) -> Tensor:
        return self.D_and_B(y)[0] * y

    def weights(self, x: Tensor) -> Tensor:
        return self.scaled(super().weights(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scaled(super().mix(q, k, v))


def kernels(attention: str, depth: int, rows: int, columns: int) -> list[float]:
    """rho_l of u-spa or gamma_l of e-spa, l = 0 .. depth, from independent tokens to `CORRELATION`,
    where each block loses the same fraction:

        u-spa   1 - rho_l = (1 - rho_L)^(l / L)                     (ours)
        e-spa   a_l = sqrt(1 - exp(-2 gamma_l)) = a_L^(l / L)       (He et al. 2023)
    """
    if attention == "u-spa":
        return [1 - (1 - CORRELATION) ** (block / depth) for block in range(depth + 1)]
    if (n := rows * columns) < 2:
        raise ValueError("e-spa needs more than one token; make the patches smaller")

    def excess(gamma: float) -> float:  # of the mean correlation of two tokens, over what we want
        total = line_kernel(rows, gamma).sum() * line_kernel(columns, gamma).sum()
        return (total.item() - n) / (n * (n - 1)) - CORRELATION

    a_L = math.sqrt(1 - math.exp(-2 * brentq(excess, 1e-6, INDEPENDENT)))
    a = [a_L ** (block / depth) for block in range(1, depth + 1)]
    return [INDEPENDENT] + [-math.log1p(-(x**2)) / 2 for x in a]


# --------------------------------------------------------------------------------------------------
# Activation
# --------------------------------------------------------------------------------------------------


def tat_after(layers: int, s: float) -> float:
    """Correlation of two Gaussians, independent at first, after so many layers of `LeakyTAT`:

    c <- [(1 - s)^2 (sqrt(1 - c^2) + (pi - arccos c) c) / pi + 2 s c] / (1 + s^2)
    """
    c = 0.0
    for _ in range(layers):
        c = min(c, 1.0)  # rounding may give 1 + 2e-16
        arc = math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c
        c = ((1 - s) ** 2 * arc / math.pi + 2 * s * c) / (1 + s * s)
    return c


def tat_slope(layers: int) -> float:
    """The slope s at which independent tokens have the correlation eta after all layers.

    Zhang et al. take eta = 0.9. Small depths do not reach it: ReLU, s = 0, makes tokens most alike,
    and comes to .897 in 12 layers, .907 in 13, .961 in 24. So we take a fraction of what ReLU does.
    """
    eta = TAT_FRACTION * tat_after(layers, 0.0)
    return brentq(lambda s: tat_after(layers, s) - eta, 0.0, 1.0)


class LeakyTAT(nn.Module):
    """phi(x) = sqrt(2 / (1 + s^2)) leaky_relu(x, s), which keeps the variance of a Gaussian."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / (1 + self.slope**2)) * F.leaky_relu(x, self.slope)


# --------------------------------------------------------------------------------------------------
# The same parts, put into a ViT
# --------------------------------------------------------------------------------------------------

# Initial weights with each attention. "as --init" is the default or the paper's. "zero" makes the
# logits 0 (plus B). "orthogonal" is `value_output_projections` with c = 1 and
# `orthogonal_mlp_weight`, which keep the size of tokens: without norms nothing else does. With tat
# the MLPs are always orthogonal.
STARTS = {
    #                  W_Q          W_K          W_V and W_O   fc1 and fc2
    "softmax":        ("as --init", "as --init", "as --init",  "as --init"),
    "value-skipinit": ("as --init", "as --init", "orthogonal", "orthogonal"),
    "shaped":         ("zero",      "as --init", "orthogonal", "orthogonal"),
    "u-spa":          ("zero",      "as --init", "orthogonal", "orthogonal"),
    "e-spa":          ("zero",      "as --init", "orthogonal", "orthogonal"),
}  # fmt: skip

CHOICES = dict(
    norm=list(NORMS),
    attention=list(STARTS),
    activation=["gelu", "tat"],
    shortcut=["constant", "decreasing"],
)


def vary_(
    model: ViT,
    norm="layernorm",
    placement="pre",
    attention="softmax",
    activation="gelu",
    shortcut="constant",
) -> ViT:
    """Replace parts of a fresh `ViT`, in place, and note them in `model.config`.

    `start_` then sets the weights. Raises ValueError for combinations that have no meaning.
    """
    changed = differing(locals())
    model.config |= changed
    dim, num_heads, blocks = model.config["dim"], model.config["num_heads"], model.blocks
    if attention in GRID_ATTENTIONS and model.cls_token is not None:
        raise ValueError(f"a class token has no place in {attention}'s grid; use --pool mean")
    if placement == "post" and norm == "none":
        raise ValueError("without norms there is nothing to place before or after")
    if activation == "tat" and model.config["residual"]:
        raise ValueError("tat's slope is computed for a network without skips")
    if shortcut == "decreasing" and (model.config["residual"] is not True or placement == "post"):
        raise ValueError("decreasing shortcuts need all skips, and norms before the sub-blocks")
    if model.config["diagonal_bias"] and changed:
        raise ValueError("the identity init needs the standard LayerNorm, attention and GELU")
    weights = torch.linspace(1, LAST_SHORTCUT, 2 * len(blocks), device="cpu").view(-1, 2).tolist()
    for block, pair in zip(blocks, weights):
        if shortcut == "decreasing":
            block.__class__, block.shortcuts = DecreasingBlock, pair
        if norm != "layernorm":
            block.norm1, block.norm2 = NORMS[norm](dim), NORMS[norm](dim)
        if placement == "post":
            block.__class__ = PostBlock
        if activation == "tat":
            block.mlp.activation = LeakyTAT(tat_slope(len(blocks)))

    replacements = []
    if attention in GRID_ATTENTIONS:
        side = model.config["image_size"] // model.config["patch_size"]
        model.grid = {side**2: (side, side)}
        for before, now in pairwise(kernels(attention, len(blocks), side, side)):
            replacements.append(SPA(dim, num_heads, attention, now, before, model.grid))
    elif attention != "softmax":
        kind = {"value-skipinit": ValueSkipInit, "shaped": Shaped}[attention]
        replacements = [kind(dim, num_heads) for _ in blocks]
    for block, replacement in zip(blocks, replacements):
        replacement.load_state_dict(block.attention.state_dict(), strict=False)
        block.attention = replacement
    if norm == "none":
        model.embed_norm = LayerNorm(dim)
    elif norm != "layernorm":
        model.norm = NORMS[norm](dim)
    return model


@torch.no_grad()
def start_(model: ViT, generator: torch.Generator | None = None) -> ViT:
    """Set the weights that the table above does not leave to --init, in place."""
    variant = STANDARD | model.config
    W_Q, _, W_V_W_O, mlp = STARTS[variant["attention"]]
    for block in model.blocks:
        a, dim, hidden = block.attention, block.mlp.fc1.in_features, block.mlp.fc1.out_features
        if W_Q == "zero":
            set_linear_(a.W_Q, torch.zeros(dim, dim))
        if W_V_W_O == "orthogonal":
            for linear, W in zip((a.W_V, a.W_O), value_output_projections(dim, 1.0, generator)):
                set_linear_(linear, W)
        if mlp == "orthogonal" or variant["activation"] == "tat":
            set_linear_(block.mlp.fc1, orthogonal_mlp_weight(dim, hidden, generator))
            set_linear_(block.mlp.fc2, orthogonal_mlp_weight(hidden, dim, generator))
    return model
