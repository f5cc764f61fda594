"""The APJN of a transformer at initialisation, by a recursion over its blocks.

The averaged partial Jacobian norm, of n tokens of width d, from block l to the last, L, is

    J^{L,l} = E || d h^L / d h^l ||_F^2 / (n d),

the mean squared effect on the last tokens of a random change after block l.

Take u and v, one coordinate of two tokens, jointly Gaussian with E u^2 = E v^2 = q and E u v = p.
All that the recursion asks of a map f is then four numbers, functions of (q, p):

    E f(u)^2,   E f(u) f(v),   E f'(u)^2,   E f'(u) f'(v)

Source: "Subcritical Signal Propagation at Initialization in Normalization-Free Transformers"
(arXiv 2604.11890). The pair form below, and the last of a normaliser's four numbers, are ours.
"""

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minskip import ViT

Four = tuple[float, float, float, float]


def grid(std: float, width: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(h), h ~ N(0, std^2), for an f that bends over a distance width."""
    step = width / max(std, width) / 3  # trapezoids: exponentially accurate, however large std is
    z = step * torch.arange(-math.ceil(8 / step), math.ceil(8 / step) + 1, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2)
    return std * z, density / density.sum()


def smooth(q: float, p: float, f: Callable = F.gelu, width: float = 1.0) -> Four:
    """Any smooth f, by quadrature; by default the GELU.

    u = shared + own, v = +-shared + own', of variances |p| and q - |p|: given the shared part they
    are independent, and E f(u) and E f(v) the same function of it.
    """
    shared, w_shared = grid(math.sqrt(abs(p)), width)
    own, w_own = grid(math.sqrt(max(q - abs(p), 0)), width)
    h = shared[:, None] + own
    numbers = []
    for values in (f(h), torch.func.grad(lambda h: f(h).sum())(h)):
        of_u = values @ w_own
        of_v = of_u if p >= 0 else of_u.flip(0)
        numbers += [w_shared @ values**2 @ w_own, w_shared @ (of_u * of_v)]
    return tuple(x.item() for x in numbers)


def layer_norm(q: float, p: float) -> Four:
    """LayerNorm of many coordinates: a division by sqrt(q)."""
    return 1.0, p / q, 1 / q, 1 / q


def derf(q: float, p: float, a: float = 1.0) -> Four:
    """erf(a h) in the LayerNorm's place."""
    Q, P = 2 * a * a * q, 2 * a * a * p
    square, product = (2 / math.pi * math.asin(x / (1 + Q)) for x in (Q, P))
    slopes = (4 * a * a / math.pi / math.sqrt((1 + Q) ** 2 - x**2) for x in (Q, P))
    return square, product, *slopes


def dyt(q: float, p: float, a: float = 1.0) -> Four:
    """tanh(a h) in the LayerNorm's place."""
    return smooth(q, p, lambda h: torch.tanh(a * h), 1 / a)


def relu(q: float, p: float) -> Four:
    """In the GELU's place (Cho and Saul 2009)."""
    r = min(max(p / q, -1.0), 1.0)
    angle = math.pi - math.acos(r)
    return q / 2, q * (math.sqrt(1 - r * r) + r * angle) / math.tau, 1 / 2, angle / math.tau


def apjn_theory(
    depth: int,
    n: int,
    q: float,
    p: float,
    gains: tuple[float, float, float],
    residual: bool = True,
    normaliser: Callable[..., Four] = layer_norm,
    activation: Callable[..., Four] = smooth,
) -> tuple[list[float], list[float]]:
    """J^{L,l} for l = 0 .. L, in pair form and in the published scalar form.

    Blocks are x + attention(N x), x + MLP(N x), or the same without "x +" (r = 1 or 0); attention
    is uniform, as it nearly is at the default init. q and p are those of the embedded tokens;
    gains (g_OV, g_1, g_2) what W_V W_O, fc1 and fc2 multiply a variance by.

    There:  attention   q, p <- r (q, p) + g_OV (E N^2 + (n - 1) E N N) / n
            MLP         q <- r q + g_2 E phi^2,  p <- r p + g_2 E phi phi, at g_1 (E N^2, E N N)
    Back, from (m_q, m_p) = (1, 0), the mean products of a token's gradients and of two tokens':
            MLP         m_q <- m_q (r + g_1 g_2 E N'^2 E phi'^2),  m_p with E N' N' E phi' phi'
            attention   m_q <- r m_q + g_OV E N'^2 m,  m_p <- r m_p + g_OV E N' N' m,
                        m = (m_q + (n - 1) m_p) / n

    and J is m_q. The scalar form has no m_p: it falls short wherever attention mixes tokens.
    """
    r, (g_OV, g_1, g_2) = float(residual), gains
    trace = []
    for _ in range(depth):
        N2, NN, dN2, dNN = normaliser(q, p)
        attention = g_OV * dN2, g_OV * dNN
        mean = g_OV * (N2 + (n - 1) * NN) / n
        q, p = r * q + mean, r * p + mean
        N2, NN, dN2, dNN = normaliser(q, p)
        phi2, phiphi, dphi2, dphidphi = activation(g_1 * N2, g_1 * NN)
        trace.append((attention, (g_1 * g_2 * dN2 * dphi2, g_1 * g_2 * dNN * dphidphi)))
        q, p = r * q + g_2 * phi2, r * p + g_2 * phiphi

    m_q, m_p = 1.0, 0.0
    pair, scalar = [1.0], [1.0]
    for (attention_q, attention_p), (mlp_q, mlp_p) in reversed(trace):
        m_q, m_p = m_q * (r + mlp_q), m_p * (r + mlp_p)
        m = (m_q + (n - 1) * m_p) / n
        m_q, m_p = r * m_q + attention_q * m, r * m_p + attention_p * m
        pair.append(m_q)
        scalar.append(scalar[-1] * (r + mlp_q) * (r + attention_q / n))
    return pair[::-1], scalar[::-1]


@torch.no_grad()
def theory_of(model: ViT, embedded: Tensor) -> tuple[list[float], list[float]]:
    """`apjn_theory` of a network at the default init, without a class token.

    embedded: its embedded tokens, (batch, token, dim). A LayerNorm sees every token at a size of
    its own: q is the harmonic mean, 1 / q being what its derivative averages, and p / q the mean
    cosine of two tokens. (A class token starts near 0, where no mean describes it.)
    """
    x, n = embedded.double(), embedded.shape[1]
    q = 1 / x.square().mean(-1).reciprocal().mean().item()
    cosines = F.normalize(x, dim=-1).sum(1).square().sum(-1).mean().item() - n  # of n (n-1) pairs

    def gain(path: str) -> float:  # rows times the variance of the entries
        weights = [block.get_submodule(path).weight for block in model.blocks]
        return statistics.mean(W.shape[1] * W.square().mean().item() for W in weights)

    gains = gain("attention.W_V") * gain("attention.W_O"), gain("mlp.fc1"), gain("mlp.fc2")
    p = q * cosines / (n * (n - 1))
    return apjn_theory(len(model.blocks), n, q, p, gains, model.config["residual"])
