"""The Jacobian K of a sub-block, attention or MLP, that of many blocks, J, and their kappas.

A skipless network multiplies factors K, a residual one K + I. K is taken at the sub-block's
LayerNorm's output: at its input it has two exact zero singular values a token, and kappa is
infinite. The size of J is the averaged partial Jacobian norm.

Small ones (n d <= DENSE_LIMIT, n tokens of width d) are formed whole and kappa, the condition
number, is exact; of larger K products with vectors give a lower bound.
"""

import math
from collections.abc import Callable

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from minskip import MLP, Attention, Block, ViT

DENSE_LIMIT = 1200  # K of that many rows: 11 MB and a tenth of a second
MLP_TOKENS = 8  # about as many tokens' MLP Jacobians are decomposed where K is not formed whole
LARGEST = 1e15  # a condition number above this is float64's rounding


def explicit(attention: Attention, y: Tensor) -> Tensor:
    """attention(y) for y of (token, dim), the matrix formed: the fused kernel has no second
    derivative."""
    mixed = attention.weights(y[None]) @ attention.queries_keys_values(y[None])[2]
    return attention.W_O(rearrange(mixed, "1 head token dim -> token (head dim)"))


@torch.no_grad()
def attention_jacobian(attention: Attention, y: Tensor) -> Tensor:
    """Closed form of d attention(y) / d y, (n d, n d), rows the outputs; y is (token, dim).

    Per head, q = y W_Q + b_Q and so on, P = softmax(q k^T / sqrt(d_h)), Y = v W_O:

        value   d out_a / d y_b += P_ab W_V W_O
        query   d out_a / d y_a += sum_b P_ab (W_Q k_b) (Y_b - (P Y)_a)^T / sqrt(d_h)
        key     d out_a / d y_b += P_ab (W_K q_a) (Y_b - (P Y)_a)^T / sqrt(d_h)

    Of the attentions in `variants.py`, which have no such form here, by automatic differentiation.
    """
    if type(attention) is not Attention:
        K = torch.func.jacrev(lambda y: explicit(attention, y))(y)
        return rearrange(K, "a i b j -> (a i) (b j)")
    heads = dict(head=attention.num_heads)
    W_Q, W_K, W_V = (
        rearrange(W.weight, "(head dim) model -> head model dim", **heads)
        for W in (attention.W_Q, attention.W_K, attention.W_V)
    )
    W_O = rearrange(attention.W_O.weight, "model (head dim) -> head dim model", **heads)
    q, k, v = attention.queries_keys_values(y[None])[:, 0]  # (head, token, d_h) each
    P, Y = attention.weights(y[None])[0], v @ W_O
    centred = Y[:, None] - (P @ Y)[:, :, None]  # Y_b - (P Y)_a, (head, a, b, dim)
    scale = 1 / math.sqrt(q.shape[-1])
    K = einsum(P, W_V @ W_O, "h a b, h j i -> a i b j")
    K += scale * einsum(P, q @ W_K.mT, centred, "h a b, h a j, h a b i -> a i b j")
    query = scale * einsum(P, k @ W_Q.mT, centred, "h a b, h b j, h a b i -> a i j")
    diagonal = torch.arange(len(y))
    K[diagonal, :, diagonal, :] += query
    return rearrange(K, "a i b j -> (a i) (b j)")


@torch.no_grad()
def mlp_jacobians(mlp: MLP, y: Tensor) -> Tensor:
    """d mlp(y) / d y for each token, (token, d, d), rows the outputs: all of K that is not zero."""
    z = mlp.fc1(y)
    slope = torch.func.grad(lambda z: mlp.activation(z).sum())(z)
    return einsum(mlp.fc2.weight, slope, mlp.fc1.weight, "i h, t h, h j -> t i j")


@torch.no_grad()
def block_jacobian(block: Block, x: Tensor) -> Tensor:
    """d block(x) / d x, (n d, n d), rows the outputs; x is (token, dim).

    (M N_2 + r I) (K N_1 + r I), N the LayerNorms' Jacobians, r = 1 with skips and 0 without.
    """
    n, d = x.shape
    r = float(block.residual)

    def norm_jacobians(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(norm))(x)

    y = block.norm1(x)
    h = r * x + block.attention(y[None])[0]
    K = rearrange(attention_jacobian(block.attention, y), "(a i) (b j) -> a i b j", a=n, b=n)
    A = einsum(K, norm_jacobians(block.norm1, x), "a i b j, b j k -> a i b k")
    A += r * torch.eye(n * d).to(x).view_as(A)
    M = mlp_jacobians(block.mlp, block.norm2(h)) @ norm_jacobians(block.norm2, h)
    M += r * torch.eye(d).to(x)
    return rearrange(einsum(M, A, "a l i, a i b k -> a l b k"), "a l b k -> (a l) (b k)")


def attention_maps(attention: Attention, y: Tensor, skip: float) -> tuple[Callable, Callable]:
    """v -> (K + skip I) v and u -> (K + skip I)^T u on flat vectors, without forming K."""
    _, pull = torch.func.vjp(lambda y: explicit(attention, y), y)  # u -> K^T u, itself a linear map
    _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))  # its adjoint: v -> K v
    return (
        lambda v: push(v.view_as(y))[0].flatten() + skip * v,
        lambda u: pull(u.view_as(y))[0].flatten() + skip * u,
    )


def condition_number(singular: Tensor) -> float:
    """kappa, the largest over the smallest of some singular values, at most `LARGEST`."""
    largest, smallest = singular.max().item(), singular.min().item()
    return min(largest / smallest, LARGEST) if smallest > 0 else LARGEST


def orthogonalised(x: Tensor, Q: Tensor) -> Tensor:
    """x less its part in the span of Q's orthonormal rows; one pass leaves rounding, two do not."""
    for _ in range(2):
        x = x - (Q @ x) @ Q
    return x


def golub_kahan(
    forward: Callable, adjoint: Callable, start: Tensor, iterations: int = 20
) -> Tensor:
    """Ritz values of a square map by Golub-Kahan bidiagonalisation, fully reorthogonalised.

    start: any vector of the map's input. The largest is a lower bound of sigma_max, reliable after
    some ten iterations; the smallest only an *upper* bound of sigma_min.
    """
    right, left = (start.new_empty(iterations + 1, len(start)) for _ in range(2))
    right[0] = start / start.norm()
    B = start.new_zeros(iterations, iterations + 1)  # bidiagonal; its square part counts
    for i in range(iterations):
        u = orthogonalised(forward(right[i]), left[:i])
        B[i, i] = u.norm()
        if B[i, i] == 0:
            break
        left[i] = u / B[i, i]
        v = orthogonalised(adjoint(left[i]), right[: i + 1])
        B[i, i + 1] = v.norm()
        if B[i, i + 1] <= 1e-12 * B[0, 0]:
            break
        right[i + 1] = v / B[i, i + 1]
    return torch.linalg.svdvals(B[: i + 1, : i + 1])


@torch.no_grad()
def square_condition_number(J: Tensor) -> float:
    """kappa of a square matrix, at a third of the time of an SVD.

    The largest Ritz values of J and of its inverse, the inverse applied through one LU: largest
    ones converge fast, in 30 steps to six digits of the SVD's kappa where that is below 1e12.
    """
    LU, pivots, _ = torch.linalg.lu_factor_ex(J)
    diagonal = LU.diagonal().abs()
    if diagonal.min() <= 1e-30 * diagonal.max():  # singular; far below what rounding leaves
        return LARGEST

    def solve(v: Tensor, transposed: bool = False) -> Tensor:
        return torch.linalg.lu_solve(LU, pivots, v[:, None], adjoint=transposed)[:, 0]

    start = torch.randn(len(J), dtype=J.dtype, device=J.device)
    largest = golub_kahan(lambda v: J @ v, lambda u: u @ J, start, 30).max()
    inverse = golub_kahan(solve, lambda u: solve(u, transposed=True), start, 30).max()
    return min((largest * inverse).item(), LARGEST)


CONDITIONS = ["k(K)", "k(K+I)", "k(MLP)", "k(MLP+I)"]


@torch.no_grad()
def conditioning(block: Block, x: Tensor) -> dict[str, float]:
    """kappa of the attention's K and K + I, and of the MLP's, for one image's x, (token, dim).

    Exact up to n d = DENSE_LIMIT; beyond, lower bounds: Golub-Kahan for the attention, some of the
    tokens for the MLP.
    """
    y = block.norm1(x)
    attended = block.attention(y[None])[0]
    z = block.norm2(x + attended if block.residual else attended)
    if x.numel() <= DENSE_LIMIT:
        K = attention_jacobian(block.attention, y)
        kappas = [square_condition_number(J) for J in (K, K + torch.eye(len(K)).to(K))]
    else:
        start = torch.randn(y.numel()).to(y)
        maps = [attention_maps(block.attention, y, skip) for skip in (0.0, 1.0)]
        kappas = [condition_number(golub_kahan(*pair, start)) for pair in maps]
        z = z[:: max(1, len(z) // MLP_TOKENS)]
    K = mlp_jacobians(block.mlp, z)
    for J in (K, K + torch.eye(K.shape[-1]).to(K)):
        kappas.append(condition_number(torch.linalg.svdvals(J)))  # over all tokens
    return dict(zip(CONDITIONS, kappas))


def apjn(tokens: list[Tensor], probes: int = 2) -> list[float]:
    """J^{L,l} = E ||d h^L / d h^l||_F^2 / (n d) for l = 0 .. L, averaged over the images.

    One backward pass a probe gives every l: with v of random signs, E ||J^T v||^2 = ||J||_F^2.
    """
    totals = [0.0] * len(tokens)
    for _ in range(probes):
        v = torch.randint(0, 2, tokens[-1].shape, device=tokens[-1].device) * 2.0 - 1
        gradients = torch.autograd.grad(tokens[-1], tokens, v.to(tokens[-1]), retain_graph=True)
        for i, g in enumerate(gradients):
            totals[i] += g.square().mean().item() / probes
    return totals


@torch.no_grad()
def progressive_conditioning(model: ViT, image: Tensor) -> dict[str, list[float]]:
    """kappa of J = d h^L / d h^l for l = 0 .. L, one image's, (channel, height, width).

    A LayerNorm drops two directions a token, its mean and its length, so that J without skips has
    as many zeros among its singular values and kappa is infinite. Hence, for all networks alike:
    k(J) is the largest over the n (d - 2)-th, k(J) half the largest over the median.
    """
    inputs = model.forward_features(image[None], list(range(len(model.blocks))))
    n, d = inputs[0].shape[1:]
    J = torch.eye(n * d).to(inputs[0])
    kappas = {"k(J)": [1.0], "k(J) half": [1.0]}
    for block, x in reversed(list(zip(model.blocks, inputs))):
        if kappas["k(J) half"][0] < LARGEST:  # else it stays: rank once lost does not come back
            J = J @ block_jacobian(block, x[0])
            singular = torch.linalg.svdvals(J)
        kappas["k(J)"].insert(0, condition_number(singular[: n * (d - 2)]))
        kappas["k(J) half"].insert(0, condition_number(singular[: n * d // 2]))
    return kappas
