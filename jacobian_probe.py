"""See why skip connections matter: measure networks with and without them, block by block.

    python jacobian_probe.py                                      nano, drawn images, CPU
    python jacobian_probe.py --depths 12 24 48                    does it hold with depth?
    python jacobian_probe.py --model small --image-size 224 --patch-size 16 --seeds 1
    python jacobian_probe.py --checkpoint runs/a/last.pt runs/b/last.pt      trained networks

Prints a table and a line of conclusion per network; writes OUT/probe.json (every number) and
OUT/probe.png (one panel per quantity). `--explain` says what each panel means.

Sources: the conditioning view is Ji et al., "Cutting the Skip" (arXiv 2510.00345); the averaged
partial Jacobian norm (APJN) and its recursions are from "Subcritical Signal Propagation at
Initialization in Normalization-Free Transformers" (arXiv 2604.11890); the attention output's
singular values from "Convergence of Gradient Descent on Transformers with Residual Connections"
(arXiv 2506.05249).
"""

import argparse
import copy
import functools
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from tqdm import tqdm

import common
from minskip import PRESETS, Attention, Block, ViT, conditioned_init_

# --------------------------------------------------------------------------------------------------
# Variants: combinations spelled in the model's own words
# --------------------------------------------------------------------------------------------------

BODIES = {"residual": True, "skipless": False}
INITS = {
    "conditioned": conditioned_init_,
    "depth": functools.partial(conditioned_init_, scheme="depth"),
}


BEFORE = ", before"  # ends the name of a checkpoint's network as it was before training


def build_variant(name: str, position_std: float | None = None, **shape) -> ViT:
    """A fresh network for a name like "residual", "skipless" or "skipless+conditioned".

    position_std: None takes what the init counts on.

    Ends the program, listing what is possible, when a word is unknown.
    """
    body, *inits = name.split("+")
    if body not in BODIES or len(inits) > 1 or not set(inits) <= set(INITS):
        possible = [f"{b}{i}" for b in BODIES for i in ("", *(f"+{init}" for init in INITS))]
        common.fail(f"--variants {name!r} is unknown; possible: {', '.join(possible)}")
    if position_std is None:
        position_std = 1.0 if "depth" in inits else 0.02
    try:
        model = ViT(**shape, residual=BODIES[body], position_std=position_std)
    except ValueError as error:
        common.fail(str(error))
    for init in inits:
        INITS[init](model)
    return model


# --------------------------------------------------------------------------------------------------
# Theory: the APJN of a pre-norm transformer at initialisation
# --------------------------------------------------------------------------------------------------
# u and v are one coordinate of two tokens, Gaussian with E u^2 = E v^2 = q and E u v = p. All that
# the recursion needs of a map f is four numbers: E f(u)^2, E f(u) f(v), E f'(u)^2, E f'(u) f'(v).
# The functions below give them for three normalisers and two activations.


def gelu_slope(z: Tensor) -> Tensor:
    """GELU's derivative, exact form: Phi(z) + z phi(z)."""
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def normal_grid(std: float, scale: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(h), h of that standard deviation, f bending over a distance scale.

    Trapezoids, equally spaced in h: exponentially accurate, and unlike a fixed number of
    Gauss-Hermite nodes still so where f is narrow, as tanh is for std >> scale.
    """
    if std == 0:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    step = min(std, scale) / 3
    reach = math.ceil(8 * std / step)
    h = step * torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-((h / std) ** 2) / 2)
    return h, weights / weights.sum()


def gaussian_moments(
    q: float, p: float, f: Callable = F.gelu, slope: Callable = gelu_slope, scale: float = 1.0
) -> tuple[float, float, float, float]:
    """The four numbers of a smooth f that bends over a distance scale; by default GELU's.

    u = shared + own and v = +-shared + own', of variances |p| and q - |p|. Given the shared part
    the two are independent, and E f(u) and E f(v) the same function of it.
    """
    shared, w_shared = normal_grid(math.sqrt(abs(p)), scale)
    own, w_own = normal_grid(math.sqrt(max(q - abs(p), 0)), scale)
    h = shared[:, None] + own
    moments = []
    for values in (f(h), slope(h)):
        mean = values @ w_own
        other = mean if p >= 0 else mean.flip(0)
        moments += [w_shared @ values**2 @ w_own, w_shared @ (mean * other)]
    return tuple(moment.item() for moment in moments)


def relu_moments(q: float, p: float) -> tuple[float, float, float, float]:
    """ReLU, in closed form (Cho and Saul 2009)."""
    r = min(max(p / q, -1.0), 1.0)
    angle = math.pi - math.acos(r)
    cross = q * (math.sqrt(1 - r * r) + r * angle) / (2 * math.pi)
    return q / 2, cross, 0.5, angle / (2 * math.pi)


def layer_norm(q: float, p: float) -> tuple[float, float, float, float]:
    """LayerNorm of many coordinates: a division by sqrt(q), its derivative 1 / sqrt(q)."""
    return 1.0, p / q, 1 / q, 1 / q


def derf(q: float, p: float, a: float = 1.0) -> tuple[float, float, float, float]:
    """erf(a h) in the LayerNorm's place, Derf, in closed form (the last of the four our own)."""
    Q, P = 2 * a * a * q, 2 * a * a * p
    ff, cross = (2 / math.pi * math.asin(x / (1 + Q)) for x in (Q, P))
    slopes = (4 * a * a / math.pi / math.sqrt((1 + Q) ** 2 - x**2) for x in (Q, P))
    return ff, cross, *slopes


def dyt(q: float, p: float, a: float = 1.0) -> tuple[float, float, float, float]:
    """tanh(a h) in the LayerNorm's place, DyT: no closed form."""
    return gaussian_moments(
        q, p, lambda h: torch.tanh(a * h), lambda h: a * (1 - torch.tanh(a * h) ** 2), 1 / a
    )


def apjn_theory(
    depth: int,
    n: int,
    q: float,
    p: float,
    ov2: float,
    fc1_2: float,
    fc2_2: float,
    skip: float = 1.0,
    normaliser: Callable = layer_norm,
    activation: Callable = gaussian_moments,
) -> tuple[list[float], list[float]]:
    """J^{L,l} for l = 0 .. L by the pair recursion and by the published scalar form.

    Blocks are skip * x + attention(N x), then skip * x + MLP(N x), with attention uniform (as it
    is at the default init). q is the mean square of a coordinate of the embedded tokens, p the
    mean product over two tokens; ov2, fc1_2, fc2_2 the gains in variance of W_V W_O, fc1 and fc2
    (rows times their entries' variance). normaliser and activation give a map's four numbers: of
    N they are q~, p~, q^, p^, and of the activation phi, taken at (fc1_2 q~, fc1_2 p~), as below.

    Forward:   attention  q, p <- skip^2 (q, p) + ov2 (q~ + (n - 1) p~) / n
               MLP        q <- skip^2 q + fc2_2 E phi^2,  p <- skip^2 p + fc2_2 E phi phi
    Backward:  (m_q, m_p) = (1, 0) at the output, mean products of a token's gradients and of two's
               attention  s = (m_q + (n - 1) m_p) / n
                          m_q <- skip^2 m_q + ov2 q^ s,  m_p <- skip^2 m_p + ov2 p^ s
               MLP        m_q <- m_q (skip^2 + fc1_2 fc2_2 q^ E phi'^2),  m_p with p^ E phi' phi'
    The scalar form drops m_p, the covariance of gradients across tokens, and falls short.
    """
    r2 = skip**2
    trace = []  # of each sub-block, what the way back needs: is it attention, and both gains
    for _ in range(depth):
        q1, p1, dq, dp = normaliser(q, p)
        trace.append((True, ov2 * dq, ov2 * dp))
        mean = ov2 * (q1 + (n - 1) * p1) / n
        q, p = r2 * q + mean, r2 * p + mean
        q1, p1, dq, dp = normaliser(q, p)
        phi2, phiphi, d2, dd = activation(fc1_2 * q1, fc1_2 * p1)
        trace.append((False, fc1_2 * fc2_2 * dq * d2, fc1_2 * fc2_2 * dp * dd))
        q, p = r2 * q + fc2_2 * phi2, r2 * p + fc2_2 * phiphi
    m_q, m_p, scalar = 1.0, 0.0, 1.0
    pair_form, scalar_form = [m_q], [scalar]
    for is_attention, gain_q, gain_p in reversed(trace):
        if is_attention:
            s = (m_q + (n - 1) * m_p) / n
            m_q, m_p = r2 * m_q + gain_q * s, r2 * m_p + gain_p * s
            scalar *= r2 + gain_q / n
            pair_form.append(m_q)
            scalar_form.append(scalar)
        else:
            m_q, m_p = m_q * (r2 + gain_q), m_p * (r2 + gain_p)
            scalar *= r2 + gain_q
    return pair_form[::-1], scalar_form[::-1]


def theory_of(model: ViT, embedded: Tensor) -> tuple[list[float], list[float]]:
    """`apjn_theory` with the gains read off a network's weights and its embedded tokens."""
    n, d = embedded.shape[-2:]
    x = embedded.double()
    q = x.square().mean().item()
    total = x.sum(dim=-2).square().sum(-1).mean().item() / d  # n q + n (n - 1) p
    p = (total / n - q) / (n - 1)
    gains = []
    for path in ("attention.W_V", "attention.W_O", "mlp.fc1", "mlp.fc2"):
        weights = [block.get_submodule(path).weight for block in model.blocks]
        gains.append(statistics.mean(w.shape[1] * w.var().item() for w in weights))
    skip = model.blocks[0].residual
    return apjn_theory(len(model.blocks), n, q, p, gains[0] * gains[1], *gains[2:], skip)


# --------------------------------------------------------------------------------------------------
# Measurements along a network
# --------------------------------------------------------------------------------------------------


def apjn(tokens: list[Tensor], probes: int = 2) -> list[float]:
    """J^{L,l} = E ||d h^L / d h^l||_F^2 / (n d) for l = 0 .. L, averaged over the images.

    tokens: h^0 .. h^L, (batch, token, width), connected by a graph. One backward pass a probe
    gives every l: with v Rademacher, E ||J^T v||^2 = ||J||_F^2.
    """
    out = tokens[-1]
    totals = [0.0] * len(tokens)
    for _ in range(probes):
        v = torch.randint(0, 2, out.shape, device=out.device).to(out.dtype) * 2 - 1
        gradients = torch.autograd.grad(out, tokens, v, retain_graph=True)
        for i, g in enumerate(gradients):
            totals[i] += g.double().square().mean().item() / probes
    return totals


MATRICES = {
    "W_Q": "attention.W_Q",
    "W_K": "attention.W_K",
    "W_V": "attention.W_V",
    "W_O": "attention.W_O",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def gradient_norms(model: ViT, tokens: list[Tensor], labels: Tensor) -> dict[str, list[float]]:
    """Norm of the loss's gradient by the tokens h^0 .. h^L and by each weight matrix of each block.

    Separately, because one norm alone misleads: where attention has become uniform the gradients
    of W_Q and W_K are zero while those of W_V and the MLP are not.
    """
    loss = F.cross_entropy(model.classify(tokens[-1]), labels)
    if not math.isfinite(loss.item()):
        common.fail(f"the loss of this network is {loss.item()}; nothing can be measured on it")
    weights = [
        block.get_submodule(path).weight for path in MATRICES.values() for block in model.blocks
    ]
    gradients = torch.autograd.grad(loss, [*tokens, *weights], retain_graph=True)
    norms = [g.double().norm().item() for g in gradients]
    L = len(model.blocks)
    result = {"tokens": norms[: L + 1]}
    for i, name in enumerate(MATRICES):
        result[name] = norms[L + 1 + i * L : L + 1 + (i + 1) * L]
    return result


def condition_number(singular: Tensor) -> float:
    """Largest over smallest singular value; infinite where the smallest is zero."""
    smallest = singular.min().item()
    return singular.max().item() / smallest if smallest > 0 else math.inf


def token_statistics(x: Tensor) -> dict[str, float]:
    """Correlation, norm and effective rank of tokens, (batch, token, width), mean over images.

    Correlation: mean cosine of two different tokens. Effective rank: exp of the entropy of the
    singular values' shares (Roy and Vetterli 2007), of n tokens at most n.
    """
    x = x.detach().double()
    n = x.shape[1]
    unit = F.normalize(x, dim=-1)
    correlation = (unit.sum(1).square().sum(-1) - n) / (n * (n - 1))
    shares = torch.linalg.svdvals(x)
    shares = shares / shares.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1)
    return dict(
        correlation=correlation.mean().item(),
        norm=x.norm(dim=-1).mean().item(),
        effective_rank=entropy.exp().mean().item(),
    )


def attention_matrices(attention: Attention, y: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_h)), (batch, head, token, token), for tokens y after the LayerNorm."""
    q, k = (
        rearrange(W(y), "batch token (head dim) -> batch head token dim", head=attention.heads)
        for W in (attention.W_Q, attention.W_K)
    )
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


@torch.no_grad()
def attention_statistics(block: Block, x: Tensor) -> dict[str, float]:
    """What the attention does to tokens x, (batch, token, width), at a block's input.

    own_share: mean of the attention matrix's diagonal, 1 / n when uniform. entropy: of its rows,
    nats, log n when uniform. kappa_P: median over heads and images. The attention output's
    extreme singular values and kappa, without (Z) and with the skip (x + Z); source 4: they set
    the linear rate of gradient descent.
    """
    x, block = x.detach().double(), copy.deepcopy(block).double()
    y = block.norm1(x)
    P = attention_matrices(block.attention, y)
    Z = block.attention(y)
    values = torch.linalg.svdvals(P)
    kappa_P = [condition_number(s) for s in values.flatten(0, 1)]
    result = dict(
        own_share=P.diagonal(dim1=-2, dim2=-1).mean().item(),
        entropy=-(P * P.clamp_min(1e-300).log()).sum(-1).mean().item(),
        kappa_P=statistics.median(kappa_P),
    )
    for name, output in (("Z", Z), ("Z_skip", x + Z)):
        singular = torch.linalg.svdvals(output)
        result[f"sigma_max_{name}"] = singular[:, 0].mean().item()
        result[f"sigma_min_{name}"] = singular[:, -1].mean().item()
        result[f"kappa_{name}"] = statistics.median(condition_number(s) for s in singular)
    return result


# --------------------------------------------------------------------------------------------------
# The Jacobian K of a sub-block, at its LayerNorm's output
# (at the LayerNorm's input it has two exact zero singular values a token and kappa is infinite)
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_jacobian(attention: Attention, y: Tensor) -> Tensor:
    """Closed form of d attention(y) / d y, (n d, n d), rows the outputs; y is (token, width).

    Per head, q = y W_Q + b_Q and so on, P = softmax(q k^T / sqrt(d_h)), Y = v W_O:

        value   d out_a / d y_b += P_ab W_V W_O
        query   d out_a / d y_a += sum_b P_ab (W_Q k_b) (Y_b - (P Y)_a)^T / sqrt(d_h)
        key     d out_a / d y_c += P_ac (W_K q_a) (Y_c - (P Y)_a)^T / sqrt(d_h)
    """
    n, d = y.shape
    K = y.new_zeros(n, d, n, d)
    weights = [W.weight.T.chunk(attention.heads, dim=1) for W in
               (attention.W_Q, attention.W_K, attention.W_V)]  # each (d, d_h)  # fmt: skip
    W_Os = attention.W_O.weight.T.chunk(attention.heads, dim=0)  # each (d_h, d)
    projected = [W(y).chunk(attention.heads, dim=1) for W in
                 (attention.W_Q, attention.W_K, attention.W_V)]  # fmt: skip
    diagonal = torch.arange(n)
    for W_Q, W_K, W_V, W_O, q, k, v in zip(*weights, W_Os, *projected):
        scale = 1 / math.sqrt(q.shape[1])
        P = (scale * q @ k.T).softmax(-1)
        Y = v @ W_O
        centred = Y[None] - (P @ Y)[:, None]  # Y_b - (P Y)_a, (a, b, d)
        K += einsum(P, W_V @ W_O, "a b, j i -> a i b j")
        query = einsum(P, k @ W_Q.T, centred, "a b, b j, a b i -> a i j")
        K[diagonal, :, diagonal, :] += scale * query
        K += scale * einsum(P, q @ W_K.T, centred, "a c, a j, a c i -> a i c j")
    return rearrange(K, "a i b j -> (a i) (b j)")


@torch.no_grad()
def mlp_jacobians(mlp: nn.Module, y: Tensor) -> Tensor:
    """d mlp(y) / d y for each token, (token, d, d), rows the outputs: all of K that is not zero."""
    slope = gelu_slope(mlp.fc1(y))
    return einsum(mlp.fc2.weight, slope, mlp.fc1.weight, "i h, t h, h j -> t i j")


def orthogonalised(x: Tensor, basis: list[Tensor]) -> Tensor:
    """x less its part in the span of orthonormal vectors; one pass leaves rounding, two do not."""
    if basis:
        Q = torch.stack(basis)
        for _ in range(2):
            x = x - (Q @ x) @ Q
    return x


def golub_kahan(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int = 20,
) -> Tensor:
    """Ritz values of a linear map by Golub-Kahan bidiagonalisation with full reorthogonalisation.

    start: any vector of the map's input. The largest is a lower bound of sigma_max, reliable after
    some ten iterations; the smallest only an *upper* bound of sigma_min.
    """
    right, left = [start / start.norm()], []
    alphas, betas = [], []
    for _ in range(iterations):
        u = orthogonalised(forward(right[-1]), left)
        alphas.append(u.norm())
        if alphas[-1] == 0:
            break
        left.append(u / alphas[-1])
        v = orthogonalised(adjoint(left[-1]), right)
        betas.append(v.norm())
        if betas[-1] <= 1e-12 * alphas[0]:
            break
        right.append(v / betas[-1])
    k = len(alphas)
    B = torch.diag(torch.stack(alphas))
    if k > 1:
        B = B + torch.diag(torch.stack(betas[: k - 1]), 1)
    return torch.linalg.svdvals(B.double())


def attention_maps(
    attention: Attention, y: Tensor, skip: float = 0.0
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """v -> (K + skip I) v and u -> (K + skip I)^T u on flat vectors, without forming K."""

    def explicit(y: Tensor) -> Tensor:  # not the fused kernel, which has no forward derivative
        P = attention_matrices(attention, y[None])
        v = rearrange(attention.W_V(y[None]), "1 t (h d) -> 1 h t d", h=attention.heads)
        return attention.W_O(rearrange(P @ v, "1 h t d -> t (h d)"))

    _, pull = torch.func.vjp(explicit, y)

    def forward(v: Tensor) -> Tensor:
        return torch.func.jvp(explicit, (y,), (v.view_as(y),))[1].flatten() + skip * v

    def adjoint(u: Tensor) -> Tensor:
        return pull(u.view_as(y))[0].flatten() + skip * u

    return forward, adjoint


@torch.no_grad()
def square_condition_number(J: Tensor) -> float:
    """kappa of a square matrix, infinite if singular; a quarter of the time of an SVD.

    The largest Ritz values of J and of its inverse, the inverse applied through one LU: largest
    ones converge fast, in 30 steps to six digits of the SVD's kappa where that is below 1e12.
    """
    LU, pivots, _ = torch.linalg.lu_factor_ex(J)
    diagonal = LU.diagonal().abs()
    if diagonal.min() <= 1e-30 * diagonal.max():  # singular; far below what rounding leaves
        return math.inf

    def solve(v: Tensor, transposed: bool = False) -> Tensor:
        return torch.linalg.lu_solve(LU, pivots, v[:, None], adjoint=transposed)[:, 0]

    start = torch.randn(len(J), dtype=J.dtype, device=J.device)
    largest = golub_kahan(lambda v: J @ v, lambda u: u @ J, start, 30).max()
    inverse = golub_kahan(solve, lambda u: solve(u, transposed=True), start, 30).max()
    return (largest * inverse).item()


DENSE_LIMIT = 1200  # n d up to which K is formed whole, in float64: 11 MB and a tenth of a second
MLP_TOKENS = 8  # tokens whose MLP Jacobian is decomposed when K is not formed whole


def conditioning(block: Block, x: Tensor) -> dict[str, float | bool]:
    """kappa of both sub-blocks' Jacobians K, and of K + I, for one image's x, (token, width).

    Dense and exact in float64 up to DENSE_LIMIT, with `exact` True; beyond, Golub-Kahan for the
    attention and a few tokens for the MLP, both lower bounds of kappa.
    """
    exact = x.numel() <= DENSE_LIMIT
    x = x.detach()
    if exact:
        block, x = copy.deepcopy(block).double(), x.double()
    with torch.no_grad():
        y = block.norm1(x)
        z = block.norm2(block.residual * x + block.attention(y[None])[0])
    result = dict(exact=exact)
    if exact:
        K = attention_jacobian(block.attention, y)
        identity = torch.eye(len(K), dtype=K.dtype, device=K.device)
        for name, J in (("attention", K), ("attention_plus_I", K + identity)):
            result[name] = square_condition_number(J)
    else:
        start = torch.randn(y.numel(), device=y.device, dtype=y.dtype)
        for name, skip in (("attention", 0.0), ("attention_plus_I", 1.0)):
            forward, adjoint = attention_maps(block.attention, y, skip)
            with torch.no_grad():
                result[name] = condition_number(golub_kahan(forward, adjoint, start))
        z = z[:: max(1, len(z) // MLP_TOKENS)]
    K = mlp_jacobians(block.mlp, z)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    for name, J in (("mlp", K), ("mlp_plus_I", K + identity)):
        result[name] = condition_number(torch.linalg.svdvals(J))  # block-diagonal: over all tokens
    return result


# --------------------------------------------------------------------------------------------------
# One network, measured whole
# --------------------------------------------------------------------------------------------------


def measure(model: ViT, images: Tensor, labels: Tensor, bar: tqdm) -> dict:
    """All measurements of one network: lists over l = 0 .. L (tokens) or over blocks 1 .. L."""
    model.eval()
    tokens = model.forward_features(images, list(range(len(model.blocks) + 1)))
    result = dict(gradients=gradient_norms(model, tokens, labels), apjn=apjn(tokens))
    per_token = [token_statistics(x) for x in tokens]
    result["tokens"] = {key: [row[key] for row in per_token] for key in per_token[0]}
    bar.update()
    per_block = []
    for block, x in zip(model.blocks, tokens):
        row = attention_statistics(block, x)
        kappas = conditioning(block, x[0])
        row |= {key if key == "exact" else f"kappa_{key}": v for key, v in kappas.items()}
        per_block.append(row)
        bar.update()
    result["blocks"] = {key: [row[key] for row in per_block] for key in per_block[0]}
    return result


def medians(runs: list[dict]) -> dict:
    """The same structure with the median over runs at every number."""
    if isinstance(runs[0], dict):
        return {key: medians([run[key] for run in runs]) for key in runs[0]}
    if isinstance(runs[0], list):
        return [medians(list(values)) for values in zip(*runs)]
    return statistics.median(runs)


# --------------------------------------------------------------------------------------------------
# What a person sees
# --------------------------------------------------------------------------------------------------

EXPLANATIONS = {
    "1 - token correlation": """
        How different an image's tokens still are after a block: 1 minus the mean cosine of two
        tokens. At 1 they are unrelated; at 0 they are all the same, and no later block can tell
        them apart. Softmax attention averages tokens, so without a skip this falls with every
        block; the skip adds the block's input back and holds it up.""",
    "own-token share": """
        How much of its attention a token keeps for itself: the mean diagonal of the attention
        matrix. 1/n is uniform attention, a plain average of all tokens. Near 1 the block treats
        each token apart. To carry differences through L blocks a skipless network needs a share
        of about 1 - 1/(2 L).""",
    "kappa of the attention's K": """
        Condition number of the attention's Jacobian K: its largest over its smallest stretch of a
        small change of the input. A skipless network multiplies bare factors K (solid), a residual
        one K + I (dashed). Uniform attention keeps d of n d directions, so kappa of K is infinite
        up to rounding. At real sizes the curves are lower bounds.""",
    "gradient of W_Q": """
        Norm of the loss's gradient by each block's W_Q, over that of the first block's W_V. Where
        tokens are alike, changing the attention changes nothing and this vanishes although other
        gradients do not. A plot of one overall gradient norm hides it.""",
    "APJN": """
        Averaged partial Jacobian norm from block l to the output: the mean squared effect on the
        last tokens of a random change after block l. 1 is ideal; growth or decay towards the left
        is an exploding or vanishing gradient. The band spans the seeds. For default inits, dashed
        is the theory in pair form, dotted its published scalar form, which drops the covariance of
        gradients between tokens.""",
    "kappa of the attention output": """
        Largest over smallest singular value of the attention's output for one image, the matrix
        whose conditioning sets the linear rate of gradient descent. Solid without the skip, dashed
        with it. Tokens that are alike make it a matrix of rank one. The skip adds the rank of the
        block's input back.""",
}


def series(result: dict) -> dict[str, list[tuple[list[float], str]]]:
    """Panel title -> curves (values, line style) against the block number."""
    blocks, gradients = result["blocks"], result["gradients"]
    relative = [g / max(gradients["W_V"][0], 1e-300) for g in gradients["W_Q"]]
    panels = {
        "1 - token correlation": [([1 - c for c in result["tokens"]["correlation"]], "-")],
        "own-token share": [(blocks["own_share"], "-")],
        "kappa of the attention's K": [
            (blocks["kappa_attention"], "-"),
            (blocks["kappa_attention_plus_I"], "--"),
        ],
        "gradient of W_Q": [(relative, "-")],
        "APJN": [(result["apjn"], "-")],
        "kappa of the attention output": [(blocks["kappa_Z"], "-"), (blocks["kappa_Z_skip"], "--")],
    }
    if "apjn_theory" in result:
        panels["APJN"] += [(result["apjn_theory"], "--"), (result["apjn_theory_scalar"], ":")]
    return panels


def draw(results: dict[str, dict], per_seed: dict[str, list], path: Path, title: str) -> None:
    """One panel per quantity against the block number, one colour per network, pale before."""
    names = list(EXPLANATIONS)
    trained = list(dict.fromkeys(network.removesuffix(BEFORE) for network in results))
    looks = {}
    for network in results:
        number = trained.index(network.removesuffix(BEFORE))
        pale = network.endswith(BEFORE)
        looks[network] = dict(
            color=common.COLOURS[number % len(common.COLOURS)],
            alpha=0.4 if pale else 1.0,
            lw=2.4 if pale else 1.6,
        )
    same_depth = len({len(result["apjn"]) for result in results.values()}) == 1
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, name in zip(axes.flat, names):
        for network, result in results.items():
            look = looks[network]
            for values, style in series(result)[name]:
                first = 0 if len(values) > len(result["blocks"]["own_share"]) else 1
                clipped = [min(max(v, 1e-17), 1e17) for v in values]
                ax.plot(range(first, first + len(values)), clipped, style, **look)
            if name == "APJN":
                values = np.array([run["apjn"] for run in per_seed[network]])
                ax.fill_between(
                    range(values.shape[1]),
                    values.min(0),
                    values.max(0),
                    color=look["color"],
                    alpha=0.2,
                )
            named = name == "1 - token correlation" and not network.endswith(BEFORE)
            if named and same_depth:  # each line named where it ends
                ax.annotate(
                    network,
                    (first + len(values) - 1, clipped[-1]),
                    xytext=(-2, 5),
                    textcoords="offset points",
                    ha="right",
                    fontsize=8,
                    color=look["color"],
                )
        ax.set_title(name, fontsize=10)
        ax.set_yscale("linear" if name == "own-token share" else "log")
        ax.set_xlabel("block", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    handles = [plt.Line2D([], [], **look, label=network) for network, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    common.save_figure(figure, path)


def shown(value: float) -> str:
    """A number that is not negative, to three digits, in at most seven characters."""
    if not math.isfinite(value):
        return "inf"
    plain = 1e-3 <= abs(value) < 99950 or value == 0
    return f"{float(f'{value:.3g}'):g}" if plain else f"{value:.0e}"


def shown_kappa(kappa: float, exact: bool) -> str:
    """With >= before a lower bound; past 1e15, in float64, an exact method gives one too."""
    largest = 1e15
    at_least = "" if exact and kappa <= largest else ">="
    return at_least + shown(min(kappa, largest))


def print_table(results: dict[str, dict]) -> None:
    """At five depths of each network, in at most 100 columns; k is kappa, own the share."""
    columns = "block 1-corr eff.rank own k(P) k(K) k(K+I) k(MLP) k(Z) grad.W_Q APJN".split()
    for name, result in results.items():
        blocks, L = result["blocks"], len(result["blocks"]["own_share"])
        print(f"\n{name}")
        print(" ".join(f"{c:>8}" for c in columns))
        for b in sorted({1, 2, max(1, L // 3), max(1, 2 * L // 3), L}):
            exact = blocks["exact"][b - 1]
            cells = [
                str(b),
                shown(1 - result["tokens"]["correlation"][b]),
                shown(result["tokens"]["effective_rank"][b]),
                shown(blocks["own_share"][b - 1]),
                shown_kappa(blocks["kappa_P"][b - 1], True),
                shown_kappa(blocks["kappa_attention"][b - 1], exact),
                shown_kappa(blocks["kappa_attention_plus_I"][b - 1], exact),
                shown_kappa(blocks["kappa_mlp"][b - 1], exact),
                shown_kappa(blocks["kappa_Z"][b - 1], True),
                shown(result["gradients"]["W_Q"][b - 1]),
                shown(result["apjn"][b]),
            ]
            print(" ".join(f"{c:>8}" for c in cells))


def conclusion(name: str, result: dict) -> str:
    """One line computed from the numbers."""
    different = [1 - c for c in result["tokens"]["correlation"]]
    L = len(different) - 1
    dead = next((b for b, value in enumerate(different) if value < 0.01), None)
    tokens = (
        f"token differences die by block {dead}"
        if dead is not None
        else f"tokens stay apart (1 - correlation {different[-1]:.2g} after block {L})"
    )
    W_Q = result["gradients"]["W_Q"]
    middle = W_Q[L // 2] / max(W_Q[0], 1e-300)
    gradient = (
        f"the gradient of W_Q {'falls' if middle < 1 else 'grows'} "
        f"{shown(max(middle, 1 / max(middle, 1e-300)))}-fold from block 1 to {L // 2 + 1}"
    )
    used, key = ("K + I", "attention_plus_I") if result["residual"] else ("K", "attention")
    kappa = statistics.median(result["blocks"][f"kappa_{key}"])
    shown_value = shown_kappa(kappa, all(result["blocks"]["exact"]))
    return f"{name}: {tokens}; {gradient}; median kappa of {used} {shown_value}."


# --------------------------------------------------------------------------------------------------
# Demo: gradient flow (the tutorial on residual connections, checked)
# --------------------------------------------------------------------------------------------------


def demo_gradient_flow(out: Path) -> None:
    """Three demonstrations that a tutorial gives of what skips do, measured beside its figures.

    The tutorial does not say which width, layers or loss its last one has; ours are printed.
    """
    torch.manual_seed(0)
    print("1. Products of a hundred equal factors: 0.9 and 1.1 are far from 1.")
    print(f"   0.9^100 = {0.9**100:.3e}    1.1^100 = {1.1**100:.1f}    (quoted alike)")
    norms = torch.stack([torch.randn(1, 10, 512).norm() for _ in range(200)])
    print("\n2. The norm of torch.randn(1, 10, 512), which is sqrt(5120) = 71.55:")
    print(f"   measured {norms.mean():.1f} +- {norms.std():.1f}    (quoted: 226.4)")
    print(f"   a hundred residual updates of 1 % each: x {1.01**100:.2f}, not preserved")

    print("\n3. Fifty layers tanh(W x) of width 64: norm of d (sum of outputs) / d (layer's input)")
    depth, width, seeds = 50, 64, 50
    medians_by_kind = {}
    for kind, skip, quoted in (("without skips", 0.0, "3e-8"), ("with skips", 1.0, "8.92")):
        runs = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            layers = [nn.Linear(width, width) for _ in range(depth)]
            hidden = [torch.randn(1, width, requires_grad=True)]
            for layer in layers:
                hidden.append(skip * hidden[-1] + torch.tanh(layer(hidden[-1])))
            gradients = torch.autograd.grad(hidden[-1].sum(), hidden)
            runs.append([g.norm().item() for g in gradients])
        medians_by_kind[kind] = [statistics.median(values) for values in zip(*runs)]
        first = sorted(run[0] for run in runs)
        print(
            f"   {kind:13s}  at layer 1: median {statistics.median(first):.2e}, "
            f"range {first[0]:.1e} .. {first[-1]:.1e}  ({seeds} seeds; quoted: {quoted})"
        )
    print(
        "\nTwo sentences often read that are not so: 'with a skip the gradient is at least 1'\n"
        "(with F(x) = -x it is 0), and 'the chain is 1 plus a sum' (it is a product of 1 + dF_i)."
    )
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (kind, values), colour in zip(medians_by_kind.items(), ("#D55E00", "#0072B2")):
        ax.plot(range(depth + 1), values, color=colour, label=kind)
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_title(f"gradient norm, median of {seeds} seeds", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    common.save_figure(figure, out / "gradient-flow.png")


# --------------------------------------------------------------------------------------------------
# Demo: convergence of gradient descent (source 4)
# --------------------------------------------------------------------------------------------------


def linear_head_losses(Z: Tensor, Y: Tensor, eta: float, steps: int) -> Tensor:
    """||Z W_t - Y||^2 for t = 0 .. steps of gradient descent on ||Z W - Y||^2 / 2 from W_0 = 0.

    With Z = U S V^T:  sum_i (1 - eta s_i^2)^(2 t) (u_i^T Y)^2 + ||(I - U U^T) Y||^2
    """
    U, S, _ = torch.linalg.svd(Z, full_matrices=False)
    energy = (U.T @ Y).square().sum(-1)
    rest = (Y - U @ (U.T @ Y)).square().sum()
    t = torch.arange(steps + 1, dtype=Z.dtype)[:, None]
    return ((1 - eta * S**2) ** (2 * t) * energy).sum(-1) + rest


def attention_layer(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, skip: bool) -> Tensor:
    """Single-head attention output Z, (n, D), with or without its skip."""
    P = (X @ W_Q @ W_K.T @ X.T / math.sqrt(X.shape[1])).softmax(-1)
    return P @ X @ W_V + (X if skip else 0)


def descend(
    X: Tensor, Y: Tensor, weights: list[Tensor], skip: bool, max_steps: int
) -> tuple[list[float], float]:
    """Losses of full-batch gradient descent on attention + ReLU MLP, all weights trained.

    Step size 1 / (largest eigenvalue of the tangent kernel at the start); ends at 1e-3 of the
    first loss. Returns the losses and kappa of Z at the start.
    """
    weights = [w.clone().requires_grad_() for w in weights]

    def residual_of(W_Q, W_K, W_V, W_1, W_2):
        return torch.relu(attention_layer(X, W_Q, W_K, W_V, skip) @ W_1) @ W_2 - Y

    J = torch.func.jacrev(residual_of, argnums=tuple(range(5)))(*weights)
    J = torch.cat([j.detach().reshape(Y.numel(), -1) for j in J], dim=1)
    eta = 1 / torch.linalg.eigvalsh(J @ J.T)[-1].item()
    kappa = condition_number(torch.linalg.svdvals(attention_layer(X, *weights[:3], skip).detach()))
    losses = []
    while not losses or (losses[-1] > 1e-3 * losses[0] and len(losses) <= max_steps):
        loss = residual_of(*weights).square().sum() / 2
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients):
                w -= eta * g
    return losses, kappa


def demo_convergence(out: Path, seeds: int, max_steps: int = 8000) -> None:
    """Gradient descent with and without the skip: two settings, one of which favours it."""
    n, D, hidden = 32, 64, 256
    settings = {
        "alike tokens (correlation 0.5), QK x 0.2": (0.5, 0.2),
        "independent tokens, QK x 1": (0.0, 1.0),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for ax, (name, (correlation, scale)) in zip(axes, settings.items()):
        print(f"\n{name}: n = {n}, D = {D}, one scalar target a token, {seeds} seeds")
        steps = {False: [], True: []}
        kappas = {False: [], True: []}
        for seed in tqdm(range(seeds), name, disable=None, leave=False):
            torch.manual_seed(seed)
            shared = torch.randn(1, D, dtype=torch.float64)
            own = torch.randn(n, D, dtype=torch.float64)
            X = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
            Y = torch.randn(n, 1, dtype=torch.float64)
            shapes = [(D, D), (D, D), (D, D), (D, hidden), (hidden, 1)]
            weights = [torch.randn(s, dtype=torch.float64) / math.sqrt(s[0]) for s in shapes]
            weights[0] *= scale
            weights[1] *= scale
            for skip, colour in ((False, "#D55E00"), (True, "#0072B2")):
                losses, kappa = descend(X, Y, weights, skip, max_steps)
                steps[skip].append(len(losses) - 1)
                kappas[skip].append(kappa)
                label = None if seed else ("with skip" if skip else "without skip")
                ax.plot([v / losses[0] for v in losses], color=colour, lw=0.9, label=label)
                if seed == 0:  # the surrogate: a linear head on the frozen attention output
                    Z = attention_layer(X, *weights[:3], skip)
                    eta = 1 / torch.linalg.svdvals(Z)[0].item() ** 2
                    exact = linear_head_losses(Z, Y, eta, len(losses) - 1)
                    label = "linear head on Z, exact" if skip else None
                    ax.plot(exact / exact[0], ":", color=colour, lw=1.4, label=label)
        for skip in (False, True):
            reached = [s for s in steps[skip] if s < max_steps]
            print(
                f"   {'with   ' if skip else 'without'} skip: kappa(Z) {min(kappas[skip]):.3g} .. "
                f"{max(kappas[skip]):.3g}, steps to 1e-3 of the first loss "
                f"{min(steps[skip])} .. {max(steps[skip])}"
                + ("" if len(reached) == seeds else f"  (limit {max_steps} reached)")
            )
        ratio = [a / b for a, b in zip(steps[False], steps[True])]
        print(f"   the skip makes it {min(ratio):.2f} .. {max(ratio):.2f} times faster")
        ax.set_yscale("log")
        ax.set_ylim(5e-4, 1.5)
        ax.set_xscale("log")
        ax.set_xlabel("gradient descent step")
        ax.set_title(name, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss / first loss")
    axes[0].legend(frameon=False, fontsize=8)
    common.save_figure(figure, out / "convergence.png")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = p.add_argument
    add(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="networks to compare: residual or skipless, +conditioned or +depth for the init "
        "[residual skipless skipless+conditioned]",
    )
    add("--depths", nargs="+", type=int, metavar="L", help="depths to compare [12]")
    add("--model", choices=list(PRESETS), help="width and heads [nano]")
    add("--image-size", type=int, help="side of the images, pixels [32]")
    add("--patch-size", type=int, help="side of a patch, pixels [8]")
    add("--position-std", type=float, help="std of the position embedding; larger keeps tokens "
        "apart longer [0.02, and 1 for +depth, which counts on it]")  # fmt: skip
    add("--pool", choices=["cls", "mean"], help="class token, or mean over patch tokens [cls; mean "
        "if one of the variants is +depth, which counts on it]")  # fmt: skip
    add("--data", help="folder with val/<class>/*: real images; left out: drawn ones")
    add("--images", type=int, default=4, help="images measured; numbers are means over them [4]")
    add("--checkpoint", nargs="+", metavar="CKPT", help="trained networks instead of --variants")
    add("--before", action="store_true", help="each checkpoint also as it was before training")
    add("--seeds", type=int, help="fresh weights per variant; medians are shown [5]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--out", type=Path, default=Path("runs/probe"), help="folder of probe.json, probe.png")
    add("--explain", action="store_true", help="print what each panel means")
    add("--demo", choices=["gradient-flow", "convergence"], help="a demonstration instead: what a "
        "skip does to gradients, or to the speed of gradient descent")  # fmt: skip
    p.error = common.fail  # one line, like every other mistake
    return p.parse_args()


# Settings of fresh networks; a checkpoint brings its own.
FRESH = dict(
    variants=["residual", "skipless", "skipless+conditioned"],
    depths=[12],
    model="nano",
    image_size=32,
    patch_size=8,
    position_std=None,
    pool=None,
    seeds=5,
)


def load_images(args: argparse.Namespace, size: int, device) -> tuple[Tensor, Tensor]:
    """(images, labels): normalised as in training, (batch, 3, size, size) and (batch,)."""
    if args.data is None:
        images, labels, _ = common.draw_shapes(list(range(args.images)), size, "val")
    else:
        folder = common.image_folder(args.data, "val")
        chosen = [i * len(folder) // args.images for i in range(args.images)]
        _, transform = common.augmentations(size, drawn=False)
        pairs = [folder[i] for i in chosen]
        images = torch.stack([transform(image) for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
    return common.normalise(images.to(device)), labels.to(device)


def main() -> None:
    args = parse_arguments()
    if args.explain:
        for name, text in EXPLANATIONS.items():
            print(f"{name}{textwrap.dedent(text)}\n")
        return
    flags = vars(args)
    if args.checkpoint and (useless := [name for name in FRESH if flags[name] is not None]):
        flag = "--" + useless[0].replace("_", "-")
        common.fail(f"{flag} is about fresh networks; leave it out with --checkpoint")
    flags |= {name: value for name, value in FRESH.items() if flags[name] is None}
    if args.before and not args.checkpoint:
        common.fail("--before is about trained networks: add --checkpoint")
    for name in ("images", "seeds", "image_size", "patch_size", "depths"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            common.fail(f"--{name.replace('_', '-')} must be at least 1, not {values}")
    device, _, _ = common.start_processes(args.device)
    common.make_folder(args.out)
    started = time.time()
    if args.demo:
        if args.demo == "gradient-flow":
            demo_gradient_flow(args.out)
        else:
            demo_convergence(args.out, args.seeds)
        print(f"\n{args.out}/{args.demo}.png  ({time.time() - started:.0f} s)")
        return

    # ---- the networks: name -> function of a seed ------------------------------------------------
    networks: dict[str, Callable[[int], ViT]] = {}
    if args.checkpoint:
        sizes = set()
        for path in args.checkpoint:
            checkpoint = common.load_checkpoint(path)
            model = common.model_of(checkpoint)
            sizes.add(model.config["image_size"])
            name = Path(path).parent.name
            name = path if name in ("", *networks) else name
            networks[name] = lambda seed, m=model: m
            if args.before:
                untrained = common.untrained_model_of(checkpoint)
                networks[f"{name}{BEFORE}"] = lambda seed, m=untrained: m
        if len(sizes) > 1:
            common.fail(f"--checkpoint: trained at different image sizes {sorted(sizes)}")
        size, seeds = sizes.pop(), [0]
    else:
        size, seeds = args.image_size, list(range(args.seeds))
        # one for all, so that the gradients of all compare
        pool = args.pool or ("mean" if any("+depth" in v for v in args.variants) else "cls")
        for variant in args.variants:
            for depth in args.depths:
                shape = dict(PRESETS[args.model], depth=depth, image_size=size,
                             patch_size=args.patch_size, num_classes=10,
                             position_std=args.position_std, pool=pool)  # fmt: skip
                name = variant if len(args.depths) == 1 else f"{variant}, L = {depth}"
                build_variant(variant, **{**shape, "depth": 1})  # fails before any work is done
                networks[name] = lambda seed, v=variant, s=shape: build_variant(v, **s)
    images, labels = load_images(args, size, device)

    # ---- measure ---------------------------------------------------------------------------------
    results, per_seed, tokens = {}, {}, set()
    depths = (
        [len(build(0).blocks) for build in networks.values()] if args.checkpoint else args.depths
    )
    total = (sum(depths) + len(depths)) * len(seeds)  # a step for each block, one for the whole
    total *= 1 if args.checkpoint else len(args.variants)
    bar = tqdm(total=total, disable=None, leave=False, unit=" blocks")
    for name, build in networks.items():
        runs = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = build(seed).to(device)
            # Any class does for a gradient. A self-supervised backbone has no head; its pooled
            # feature stands in for the logits, a class for each of its numbers.
            classes = labels % (model.config["num_classes"] or model.config["width"])
            bar.set_description(f"{name}, seed {seed}")
            runs.append(measure(model, images, classes, bar))
        per_seed[name] = runs
        tokens.add(model.position_embedding.shape[1])
        results[name] = medians(runs)
        results[name]["residual"] = bool(model.config["residual"])
        if not args.checkpoint and "+" not in name:
            embedded = model.embed(images).detach()
            pair, scalar = theory_of(model, embedded)
            results[name] |= dict(apjn_theory=pair, apjn_theory_scalar=scalar)
    bar.close()

    # ---- show ------------------------------------------------------------------------------------
    print_table(results)
    print()
    for name, result in results.items():
        print(conclusion(name, result))
    source = args.data or "Shapes"
    what = "trained networks" if args.checkpoint else f"{args.model} at initialisation"
    counts = " or ".join(map(str, sorted(tokens)))
    title = f"{what}, {counts} tokens, {len(images)} images of {source}; "
    title += f"median of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    draw(results, per_seed, args.out / "probe.png", title)
    arguments = {k: str(v) for k, v in vars(args).items()}
    record = dict(arguments=arguments, seeds=seeds, tokens=sorted(tokens), torch=torch.__version__)
    record |= dict(medians=results, runs=per_seed)
    text = json.dumps(record).replace("Infinity", "1e999")  # which every JSON reader takes
    common.write_atomically(args.out / "probe.json", lambda p: p.write_text(text))
    print(f"\n{args.out}/probe.png, {args.out}/probe.json  ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    with common.one_line_errors("take fewer --images or a smaller --model"):
        main()
