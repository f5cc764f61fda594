"""The APJN of a transformer at initialisation, by a recursion over its blocks.

The averaged partial Jacobian norm (APJN), for n tokens of width d, from block l to the last, L, is

    J^{L,l} = E || d h^L / d h^l ||_F^2 / (n d),

the mean square by which a random change after block l changes the last tokens.

Let u and v be the same coordinate of two tokens, jointly Gaussian with E u^2 = E v^2 = q and
E u v = p. Of each map f in a block the recursion needs only four moments, functions of (q, p):

    E f(u)^2,   E f(u) f(v),   E f'(u)^2,   E f'(u) f'(v)

Source: "Subcritical Signal Propagation at Initialization in Normalization-Free Transformers"
(arXiv 2604.11890). The pair form below, and the fourth moment of the normalisers, are ours.
"""

import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minskip import ViT

Moments = tuple[float, float, float, float]


def nodes_and_weights(std: float, width: float) -> tuple[Tensor, Tensor]:
    """Quadrature for E f(h), h ~ N(0, std^2), where f bends over a distance of `width`."""
    step = width / max(std, width) / 3  # trapezoids: exponentially accurate, however large std is
    z = step * torch.arange(-math.ceil(8 / step), math.ceil(8 / step) + 1, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2)
    return std * z, density / density.sum()


def smooth(q: float, p: float, f: Callable = F.gelu, width: float = 1.0) -> Moments:
    """Any smooth f, by quadrature; by default the GELU.

    Write u = s + t and v = +-s + t', with s shared, of variance |p|, and t, t' independent, of
    variance q - |p|. Given s, f(u) and f(v) are independent, with the same mean as a function of s.
    """
    s, w_s = nodes_and_weights(math.sqrt(abs(p)), width)
    t, w_t = nodes_and_weights(math.sqrt(max(q - abs(p), 0)), width)
    h = s[:, None] + t
    moments = []
    for values in (f(h), torch.func.grad(lambda h: f(h).sum())(h)):
        mean_u = values @ w_t
        mean_v = mean_u if p >= 0 else mean_u.flip(0)
        moments += [w_s @ values**2 @ w_t, w_s @ (mean_u * mean_v)]
    return tuple(x.item() for x in moments)


def layer_norm(q: float, p: float) -> Moments:
    """LayerNorm of many coordinates: a division by sqrt(q)."""
    return 1.0, p / q, 1 / q, 1 / q


def derf(q: float, p: float, a: float = 1.0) -> Moments:
    """erf(a h), in place of a LayerNorm."""
    Q, P = 2 * a * a * q, 2 * a * a * p
    square, product = (2 / math.pi * math.asin(x / (1 + Q)) for x in (Q, P))
    slopes = (4 * a * a / math.pi / math.sqrt((1 + Q) ** 2 - x**2) for x in (Q, P))
    return square, product, *slopes


def dyt(q: float, p: float, a: float = 1.0) -> Moments:
    """tanh(a h), in place of a LayerNorm."""
    return smooth(q, p, lambda h: torch.tanh(a * h), 1 / a)


def relu(q: float, p: float) -> Moments:
    """ReLU, in place of the GELU (Cho and Saul 2009)."""
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
    normaliser: Callable[..., Moments] = layer_norm,
    activation: Callable[..., Moments] = smooth,
) -> tuple[list[float], list[float]]:
    """J^{L,l} for l = 0 .. L, in the pair form and in the published scalar form.

    A block is x + attention(N x), then x + MLP(N x), with a normaliser N and an activation phi; the
    skips x + are there for r = 1 and not for r = 0. Attention is taken as uniform, which it nearly
    is at the default init. q and p are those of the embedded tokens; (g_OV, g_1, g_2) are the
    factors by which W_V W_O, fc1 and fc2 multiply a variance.

    Forward:
        attention   q, p <- r (q, p) + g_OV (E N^2 + (n - 1) E N N) / n
        MLP         q <- r q + g_2 E phi^2,  p <- r p + g_2 E phi phi, at g_1 (E N^2, E N N)
    Backward, with m_q the mean square of a token's gradient and m_p the mean product of two
    tokens' gradients, from (m_q, m_p) = (1, 0):
        MLP         m_q <- m_q (r + g_1 g_2 E N'^2 E phi'^2),  m_p with E N' N' E phi' phi'
        attention   m_q <- r m_q + g_OV E N'^2 m,  m_p <- r m_p + g_OV E N' N' m,
                    m = (m_q + (n - 1) m_p) / n

    J is m_q. The scalar form has no m_p, so it falls short wherever attention mixes tokens.
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
    """`apjn_theory` for a network at the default init, without a class token.

    embedded: (batch, token, dim). Tokens differ in size, and the derivative of LayerNorm averages
    1 / q, so q is the harmonic mean; p / q is the mean cosine of two tokens. (A class token starts
    near 0, which no mean describes.) Without skips it describes the median network only: of single
    ones of width 64 it gives .3 to 6 times what is measured, of width 192 .3 to 1.7 times.
    """
    x, n = embedded.double(), embedded.shape[1]
    q = 1 / x.square().mean(-1).reciprocal().mean().item()
    cosines = F.normalize(x, dim=-1).sum(1).square().sum(-1).mean().item() - n  # of n (n-1) pairs

    def gain(path: str) -> float:  # fan-in times the mean square of the entries
        weights = [block.get_submodule(path).weight for block in model.blocks]
        return statistics.mean(W.shape[1] * W.square().mean().item() for W in weights)

    gains = gain("attention.W_V") * gain("attention.W_O"), gain("mlp.fc1"), gain("mlp.fc2")
    p = q * cosines / (n * (n - 1))
    return apjn_theory(len(model.blocks), n, q, p, gains, model.config["residual"])
