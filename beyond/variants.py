"""The neighbours: what else may stand where a block has its LayerNorms, softmax attention and GELU.

    model = ViT(..., residual=False, pool="mean")
    start_(vary_(model, norm="none", attention="e-spa", activation="tat"))

is a vanilla transformer: no skip, no norm. Everything here has the shapes of what it replaces.

norm        what divides: `layernorm`, `rmsnorm`; what saturates instead: `dyt`, `derf`; or `none`,
            when one LayerNorm after the embedding and the last one stay
placement   `pre` is x + f(norm(x)); `post` norm(x + f(x)), the transformer of 2017. Without skips
            the two are one network whose norms are counted from another place.
attention   what mixes tokens is a matrix A, n x n. `softmax` is P = softmax(q k^T / sqrt(d_h)); the
            others start near the identity, or as a matrix that forgets little:
                value-skipinit  A = alpha I + beta P,  alpha = 1, beta = 0 at the start
                shaped          A = alpha I + beta P - gamma 11^T / n,  all 1: I at the start
                u-spa, e-spa    A = D softmax(q k^T / sqrt(d_h) + B): B and D such that tokens keep
                                a chosen kernel (their products) from block to block
activation  `gelu`; `tat`, the leaky ReLU whose slope lets the MLPs of all L blocks turn independent
            tokens into tokens of a chosen correlation, no more

Sources: value-skipinit, u-spa and e-spa He et al. 2023 (arXiv 2302.10322; causal there, the forms
for tokens that see each other are ours); shaped: Noci et al. 2023 (arXiv 2306.17759), its numbers a
head: He and Hofmann 2023 (arXiv 2311.01906); DyT: Zhu et al. 2025 (arXiv 2503.10622); Derf: Chen et
al. 2025 (arXiv 2512.10938); what both do to gradients: arXiv 2604.11890; TAT: Zhang et al. 2022
(arXiv 2203.08120).
"""

import functools
import math
from collections.abc import Callable, Iterator
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
    set_,
    value_output_projections,
)

CORRELATION = 0.5  # of two tokens after the last block, on average, that u-spa and e-spa aim at
TAT_SHARE = 0.9  # of the correlation that L layers of ReLU make of independent tokens, tat's do
INDEPENDENT = 50.0  # a gamma of tokens with nothing in common
STANDARD = dict(norm="layernorm", placement="pre", attention="softmax", activation="gelu")


def differing(settings: dict) -> dict[str, str]:
    """Those of a run's or a network's settings that are a block's parts and not the usual ones."""
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


NORMS = {
    "layernorm": functools.partial(nn.LayerNorm, eps=1e-6),
    "rmsnorm": functools.partial(nn.RMSNorm, eps=1e-6),
    "dyt": DyT,
    "derf": Derf,
    "none": nn.Identity,
}


class PostBlock(Block):
    """norm(x + f(x)), or norm(f(x)) without skips."""

    def forward(self, x: Tensor) -> Tensor:
        if self.residual:
            x = self.norm1(x + self.drop_path(self.attention(x)))
            x = self.norm2(x + self.drop_path(self.mlp(x)))
        else:
            x = self.norm1(self.attention(x))
            x = self.norm2(self.mlp(x))
        return x


# --------------------------------------------------------------------------------------------------
# Attention. P is what Attention.weights computes; `mix` returns A v, `weights` A.
# --------------------------------------------------------------------------------------------------


def each(head: Tensor) -> Tensor:
    """A number a head, (head,), beside (batch, head, token, token)."""
    return head[:, None, None]


class ValueSkipInit(Attention):
    """A = alpha I + beta P, a pair of numbers a head. He et al. 2023."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.alpha = nn.Parameter(torch.ones(num_heads))
        self.beta = nn.Parameter(torch.zeros(num_heads))

    def weights(self, x: Tensor) -> Tensor:
        P = super().weights(x)
        return each(self.alpha) * torch.eye(P.shape[-1]).to(P) + each(self.beta) * P

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return each(self.alpha) * v + each(self.beta) * super().mix(q, k, v)


class Shaped(ValueSkipInit):
    """A = alpha I + beta P - gamma 11^T / n: exactly I while W_Q = 0 and all are 1."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        nn.init.ones_(self.beta)
        self.gamma = nn.Parameter(torch.ones(num_heads))

    def weights(self, x: Tensor) -> Tensor:
        return super().weights(x) - each(self.gamma) / x.shape[1]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(q, k, v) - each(self.gamma) * v.mean(dim=-2, keepdim=True)


# Shaped to preserve: A takes one kernel of the tokens, Sigma', to the next, Sigma = A Sigma' A^T,

#     A = Sigma^(1/2) Sigma'^(-1/2) = D softmax(B),   D = rowsum(A),   B = log(D^-1 A)

# with the products of the tokens of a block's input as Sigma', and W_Q = 0 at the start.


@torch.compiler.disable  # which would trace into the cached function
@functools.cache  # a device's too: a tensor from the CPU in every step would wait for the GPU
def u_spa(
    rows: int, columns: int, now: float, before: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """D, (1, 1), and B, (token, token), for Sigma = (1 - rho) I + rho 11^T: all tokens equally far.

    now, before: rho and rho', of the block's output and its input.

        A = a I + (r - a) 11^T / n = r softmax(b I),   b = log(1 + n a / (r - a))
        a^2 = (1 - rho) / (1 - rho'),   r^2 = (1 + (n - 1) rho) / (1 + (n - 1) rho')
    """
    n = rows * columns
    a = math.sqrt((1 - now) / (1 - before))
    r = math.sqrt((1 + (n - 1) * now) / (1 + (n - 1) * before))
    b = math.log1p(n * a / (r - a))
    how = dict(dtype=dtype, device=device)
    return torch.full((1, 1), r, **how), b * torch.eye(n, **how)


def line_kernel(n: int, gamma: float, power: float = 1.0) -> Tensor:
    """Sigma^power of n tokens in a line, Sigma_ij = exp(-gamma |i - j|), in float64."""
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    S, V = torch.linalg.eigh(torch.exp(-gamma * (i[:, None] - i).abs()))
    return V * S**power @ V.T


@torch.compiler.disable
@functools.cache
def e_spa(
    rows: int, columns: int, now: float, before: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """D, (token, 1), and B, (token, token), for Sigma = exp(-gamma distance): near ones are alike.

    distance: |row - row'| + |column - column'|, so that Sigma is a Kronecker product of two lines',
    A = A_rows (x) A_columns, and B a Kronecker sum. now, before: gamma and gamma'.
    """
    D, B = [], []
    for n in (rows, columns):
        A = line_kernel(n, now, 0.5) @ line_kernel(n, before, -0.5)
        D.append(A.sum(1))
        B.append((A / D[-1][:, None]).clamp(min=1e-30).log())  # zeros are -1e-15 by rounding
    B = rearrange(B[0], "i j -> i 1 j 1") + rearrange(B[1], "k l -> 1 k 1 l")
    D, B = torch.outer(*D).view(-1, 1), rearrange(B, "i k j l -> (i k) (j l)")
    return D.to(device, dtype), B.to(device, dtype)


GRID_ATTENTIONS = {"u-spa": u_spa, "e-spa": e_spa}


class SPA(Attention):
    """A = D softmax(q k^T / sqrt(d_h) + B).

    D_and_B: `u_spa` or `e_spa` with the block's kernels given. grid: the rows and columns of
    patches, kept up to date by `ViT.embed`.
    """

    def __init__(self, dim: int, num_heads: int, D_and_B: Callable, grid: dict[str, int]):
        super().__init__(dim, num_heads)
        self.D_and_B, self.grid = D_and_B, grid

    def logit_bias(self, q: Tensor) -> Tensor:
        return self.D_and_B(**self.grid, dtype=q.dtype, device=q.device)[1]

    def scaled(self, y: Tensor) -> Tensor:
        return self.D_and_B(**self.grid, dtype=y.dtype, device=y.device)[0] * y

    def weights(self, x: Tensor) -> Tensor:
        return self.scaled(super().weights(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.scaled(super().mix(q, k, v))


def gamma_of(correlation: float, rows: int, columns: int) -> float:
    """The gamma at which two tokens of a grid correlate so on average."""
    n = rows * columns
    if n < 2:
        raise ValueError("e-spa keeps tokens apart, and here is one; make the patches smaller")

    def excess(gamma: float) -> float:
        total = line_kernel(rows, gamma).sum() * line_kernel(columns, gamma).sum()
        return (total.item() - n) / (n * (n - 1)) - correlation

    return brentq(excess, 1e-6, INDEPENDENT)


def kernels(attention: str, depth: int, rows: int, columns: int) -> list[float]:
    """rho_l of u-spa or gamma_l of e-spa, l = 0 .. depth: from independent tokens to `CORRELATION`,
    each block forgetting the same share:

        u-spa   1 - rho_l = (1 - rho_L)^(l / L)                     (ours)
        e-spa   a_l = sqrt(1 - exp(-2 gamma_l)) = a_L^(l / L)       (He et al. 2023)
    """
    if attention == "u-spa":
        return [1 - (1 - CORRELATION) ** (block / depth) for block in range(depth + 1)]
    a_L = math.sqrt(1 - math.exp(-2 * gamma_of(CORRELATION, rows, columns)))
    a = [a_L ** (block / depth) for block in range(1, depth + 1)]
    return [INDEPENDENT] + [-math.log1p(-(x**2)) / 2 for x in a]


# --------------------------------------------------------------------------------------------------
# Activation
# --------------------------------------------------------------------------------------------------


def tat_correlation(c: float, slope: float) -> float:
    """C(c), the correlation of phi(u) and phi(v) for standard Gaussians u, v of correlation c, and
    phi as in `LeakyTAT`."""
    s, c = slope, min(max(c, -1.0), 1.0)
    arc = math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c
    return ((1 - s) ** 2 * arc / math.pi + 2 * s * c) / (1 + s * s)


def tat_after(layers: int, slope: float) -> float:
    """C applied `layers` times to 0."""
    c = 0.0
    for _ in range(layers):
        c = tat_correlation(c, slope)
    return c


def tat_slope(layers: int) -> float:
    """The slope s at which C, applied `layers` times to 0, is eta: `TAT_SHARE` of what ReLU, s = 0,
    comes to, as Zhang et al.'s 0.9 is out of its reach: 0.81 for 12 layers."""
    eta = TAT_SHARE * tat_after(layers, 0.0)
    return brentq(lambda slope: tat_after(layers, slope) - eta, 0.0, 1.0)


class LeakyTAT(nn.Module):
    """phi(x) = sqrt(2 / (1 + s^2)) leaky_relu(x, s): keeps the variance of a Gaussian."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / (1 + self.slope**2)) * F.leaky_relu(x, self.slope)


# --------------------------------------------------------------------------------------------------
# ... put into a ViT
# --------------------------------------------------------------------------------------------------

# What each attention's weights start as. "as --init": default, paper or identity. zero: no logits
# but B's. orthogonal: `value_output_projections` with c = 1, `orthogonal_mlp_weight`; without a
# LayerNorm the scale matters, and this keeps it. tat's MLPs are orthogonal with any attention.
STARTS = {
    #                  W_Q          W_K          W_V and W_O   fc1 and fc2
    "softmax":        ("as --init", "as --init", "as --init",  "as --init"),
    "value-skipinit": ("as --init", "as --init", "orthogonal", "orthogonal"),
    "shaped":         ("zero",      "as --init", "orthogonal", "orthogonal"),
    "u-spa":          ("zero",      "as --init", "orthogonal", "orthogonal"),
    "e-spa":          ("zero",      "as --init", "orthogonal", "orthogonal"),
}  # fmt: skip


CHOICES = dict(norm=list(NORMS), attention=list(STARTS), activation=["gelu", "tat"])  # of the flags


def attentions(name: str, model: ViT) -> Iterator[Attention]:
    """A block's attention after the other's."""
    dim, num_heads, depth = (model.config[x] for x in ("dim", "num_heads", "depth"))
    if name in GRID_ATTENTIONS:
        side = model.config["image_size"] // model.config["patch_size"]
        for before, now in pairwise(kernels(name, depth, side, side)):
            D_and_B = functools.partial(GRID_ATTENTIONS[name], before=before, now=now)
            yield SPA(dim, num_heads, D_and_B, model.grid)
    else:
        kind = {"value-skipinit": ValueSkipInit, "shaped": Shaped}[name]
        for _ in range(depth):
            yield kind(dim, num_heads)


def vary_(
    model: ViT,
    norm: str = "layernorm",
    placement: str = "pre",
    attention: str = "softmax",
    activation: str = "gelu",
) -> ViT:
    """Put other parts into the blocks of a fresh `ViT`, in place; the defaults change nothing.

    What differs goes into `model.config`. The weights are set afterwards, by `start_`.

    Raises:
        ValueError: combinations without meaning, and why.
    """
    dim, blocks = model.config["dim"], model.blocks
    asked = dict(norm=norm, placement=placement, attention=attention, activation=activation)
    changed = differing(asked)
    model.config |= changed
    if attention in GRID_ATTENTIONS and model.cls_token is not None:
        raise ValueError(
            f"{attention} keeps a kernel of the grid of patches, in which a class token has no "
            "place; pool the mean"
        )
    if placement == "post" and norm == "none":
        raise ValueError("without norms there is nothing to place before or after")
    if activation == "tat" and model.config["residual"]:
        raise ValueError("tat's slope is made for a network without skips")
    if model.config["diagonal_bias"] and changed:
        raise ValueError("the identity init is made for the standard LayerNorm, attention and GELU")
    slope = tat_slope(len(blocks)) if activation == "tat" else None
    for block in blocks:
        if norm != "layernorm":
            block.norm1, block.norm2 = NORMS[norm](dim), NORMS[norm](dim)
        if placement == "post":
            block.__class__ = PostBlock
        if activation == "tat":
            block.mlp.activation = LeakyTAT(slope)
    if attention != "softmax":
        for block, other in zip(blocks, attentions(attention, model)):
            other.load_state_dict(block.attention.state_dict(), strict=False)
            block.attention = other
    if norm == "none":
        model.embed_norm = NORMS["layernorm"](dim)
    elif norm != "layernorm":
        model.norm = NORMS[norm](dim)
    return model


@torch.no_grad()
def start_(model: ViT, generator: torch.Generator | None = None) -> ViT:
    """The weights of the table above, in place, over what --init gave."""
    variant = STANDARD | model.config
    W_Q, _, W_V_W_O, mlp = STARTS[variant["attention"]]
    for block in model.blocks:
        a, dim, hidden = block.attention, block.mlp.fc1.in_features, block.mlp.fc1.out_features
        if W_Q == "zero":
            nn.init.zeros_(a.W_Q.weight)
            nn.init.zeros_(a.W_Q.bias)
        if W_V_W_O == "orthogonal":
            for linear, W in zip((a.W_V, a.W_O), value_output_projections(dim, 1.0, generator)):
                set_(linear, W)
        if mlp == "orthogonal" or variant["activation"] == "tat":
            set_(block.mlp.fc1, orthogonal_mlp_weight(dim, hidden, generator))
            set_(block.mlp.fc2, orthogonal_mlp_weight(hidden, dim, generator))
    return model
