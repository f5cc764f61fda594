"""The APJN's recursion against arithmetic by hand, sampling, and measured networks."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn

from beyond import theory
from jacobian_probe import apjn
from minskip import ViT

# ---- the moments of a map ------------------------------------------------------------------------

A = 0.7
MAPS = {
    "gelu": (F.gelu, theory.smooth),
    "relu": (F.relu, theory.relu),
    "derf": (lambda h: torch.erf(A * h), lambda q, p: theory.derf(q, p, A)),
    "dyt": (lambda h: torch.tanh(A * h), lambda q, p: theory.dyt(q, p, A)),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("q, p", [(1.7, 0.6), (1.7, -0.6), (20.0, 19.0)])
def test_moments_of_a_map_against_sampling(name, q, p):
    f, moments = MAPS[name]
    torch.manual_seed(0)
    x, y = torch.randn(2, 400_000, dtype=torch.float64)
    h = torch.stack([math.sqrt(q) * x, p / math.sqrt(q) * x + math.sqrt(q - p * p / q) * y])
    values = f(h.requires_grad_())
    slopes = torch.autograd.grad(values.sum(), h)[0]
    sampled = []
    for u, v in (values, slopes):
        sampled += [(u * u).mean().item(), (u * v).mean().item()]
    assert sampled == approx(moments(q, p), rel=0.015, abs=0.004)


def test_gelu_and_tanh_at_unit_variance():
    phi2, product, slope2, _ = theory.smooth(1.0, 0.0)
    assert (phi2, slope2) == approx((0.425221, 0.455851), abs=1e-5)
    assert product == approx(1 / (4 * math.pi))  # (E GELU)^2, and E GELU(z) = 1/sqrt(4 pi)
    phi2, _, slope2, _ = theory.dyt(1.0, 0.0)
    assert (phi2, slope2) == approx((0.394294, 0.464403), abs=1e-5)


def test_for_two_equal_tokens_products_are_squares():
    for moments in (theory.smooth, theory.relu, theory.derf, theory.dyt, theory.layer_norm):
        square, product, slope2, slopes = moments(1.3, 1.3)
        assert (square, slope2) == approx((product, slopes))


def test_derf_in_closed_form_equals_the_quadrature_and_dyt_is_right_at_large_q():
    """tanh(a h) is a step of width 1/a under a density of width 100: fixed nodes would fail."""
    for q, p in ((0.01, 0.003), (1.0, 0.4), (1.0, -0.4), (9.0, 9.0), (400.0, 399.0)):
        numeric = theory.smooth(q, p, lambda h: torch.erf(A * h), 1 / A)
        assert numeric == approx(theory.derf(q, p, A), rel=1e-6)
    q = 1e4
    expected = 4 * A / (3 * math.sqrt(2 * math.pi * q))  # density at 0 times the integral of N'^2
    assert theory.dyt(q, 0.0, A)[2] == approx(expected, rel=1e-3)


# ---- the recursion -------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False])
def test_two_blocks_by_hand(residual):
    """Two blocks written out step by step, with maps none of whose moments can be mistaken for
    another: what the second block sees on the way forward, and m_p on the way back."""

    def normaliser(q, p):
        return 1.1 * q, 0.9 * p, 1 / (1 + q), 1 / (2 + p)

    def activation(q, p):
        return 0.6 * q, 0.4 * p, 1 / (3 + q), 1 / (4 + p)

    n, q, p, (v, a, b), r = 3, 2.0, 0.5, (1.5, 0.8, 1.2), 1.0 if residual else 0.0
    factors = []
    for _ in range(2):
        of_attention = v / (1 + q), v / (2 + p)
        added = v * (1.1 * q + 2 * 0.9 * p) / 3
        q, p = r * q + added, r * p + added
        inner_q, inner_p = a * 1.1 * q, a * 0.9 * p
        of_mlp = a * b / (1 + q) / (3 + inner_q), a * b / (2 + p) / (4 + inner_p)
        factors.append((of_attention, of_mlp))
        q, p = r * q + b * 0.6 * inner_q, r * p + b * 0.4 * inner_p
    (attention_1, mlp_1), (attention_2, mlp_2) = factors
    m_q = r + mlp_2[0]
    m_q, m_p = r * m_q + attention_2[0] * m_q / 3, attention_2[1] * m_q / 3
    expected = [m_q, 1.0]
    m_q, m_p = m_q * (r + mlp_1[0]), m_p * (r + mlp_1[1])
    expected = [r * m_q + attention_1[0] * (m_q + 2 * m_p) / 3, *expected]
    pair, scalar = theory.apjn_theory(2, n, 2.0, 0.5, (v, a, b), residual, normaliser, activation)
    assert pair == approx(expected)
    second = (r + mlp_2[0]) * (r + attention_2[0] / 3)
    first = (r + mlp_1[0]) * (r + attention_1[0] / 3)
    assert scalar == approx([first * second, second, 1.0])


def test_a_relu_mlp_and_linear_uniform_attention_in_closed_form():
    """J^{L,0} = q_L / q_0 for the MLP behind a LayerNorm, where E phi'^2 = E phi^2 = 1/2: linear in
    depth. For the attention, 1 + ((1 + s^2)^L - 1) / n."""
    q, s2, n = 1.3, 1.7, 5
    J, _ = theory.apjn_theory(64, 8, q, 0.2, (0.0, 1.0, s2), activation=theory.relu)
    assert J[0] == approx((q + 64 * s2 / 2) / q, rel=1e-12)
    linear = dict(normaliser=lambda q, p: (q, p, 1.0, 1.0))
    J, scalar = theory.apjn_theory(4, n, q, 0.2, (s2, 1.0, 0.0), **linear)
    assert J[0] == approx(1 + ((1 + s2) ** 4 - 1) / n) and scalar[0] == approx((1 + s2 / n) ** 4)


def test_elementwise_normalisers_give_a_stretched_exponential():
    """x + s W N(a x): ln J grows like c a s sqrt(l), with c = 4 / pi for Derf."""

    def slope(N, l: int, a: float = 1.0, s: float = 1.0) -> float:  # noqa: E741
        maps = (lambda q, p: N(q, p, a)), lambda q, p: (q, p, 1.0, 1.0)
        J, _ = theory.apjn_theory(4 * l, 1, 1.0, 0.0, (0.0, s * s, 1.0), True, *maps)
        return math.log(J[l]) / math.sqrt(l)  # over the blocks from l to 4 l

    assert slope(theory.dyt, 16) == approx(1.161, abs=1e-3)
    assert slope(theory.derf, 16) == approx(1.334, abs=1e-3)
    assert slope(theory.derf, 400, a=2.0, s=0.7) == approx(2.0 * 0.7 * 4 / math.pi, rel=0.03)


# ---- against networks ----------------------------------------------------------------------------

NORMALISERS = {
    "LayerNorm": (lambda h: F.layer_norm(h, h.shape[-1:]), theory.layer_norm),
    "Derf": (torch.erf, theory.derf),
    "DyT": (torch.tanh, theory.dyt),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_measured_apjn_follows_the_pair_form_and_not_the_scalar_form(name):
    """J^{L,0} of L blocks of uniform attention and a ReLU MLP, within three standard errors and
    5 %, of which the finite width takes 3 % (60 seeds)."""
    (normalise, moments), n, L, d, p, measured = NORMALISERS[name], 8, 32, 320, 0.4, []
    for seed in range(8):
        torch.manual_seed(seed)
        shared, own = torch.randn(2, 1, d), torch.randn(2, n, d)
        h = first = (math.sqrt(p) * shared + math.sqrt(1 - p) * own).requires_grad_()
        for _ in range(L):
            W_V, W_O, W_1, W_2 = torch.randn(4, d, d) / math.sqrt(d)
            h = h + normalise(h).mean(1, keepdim=True) @ W_V @ W_O
            h = h + torch.relu(normalise(h) @ W_1 * math.sqrt(2)) @ W_2
        measured += [apjn([first, h])[0]]
    mean, error = statistics.mean(measured), statistics.stdev(measured) / math.sqrt(8)
    pair, scalar = theory.apjn_theory(L, n, 1.0, p, (1.0, 2.0, 1.0), True, moments, theory.relu)
    assert abs(mean - pair[0]) < 3 * error + 0.05 * pair[0]
    assert mean - scalar[0] > 4 * error


def test_theory_reads_its_inputs_from_the_network(monkeypatch):
    torch.manual_seed(0)
    model = ViT(16, 8, 3, dim=6, depth=2, num_heads=2, mlp_ratio=2.0, pool="mean", residual=False)
    for p in model.double().parameters():
        nn.init.normal_(p, mean=0.1)  # a mean multiplies too, so a variance would miss it
    gain = {}
    for name in ("attention.W_V", "attention.W_O", "mlp.fc1", "mlp.fc2"):
        weights = torch.stack([block.get_submodule(name).weight for block in model.blocks])
        gain[name[-3:]] = weights.shape[2] * weights.square().mean().item()
    x = torch.randn(2, 4, 6, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0, 5.0])[:, None]
    q = statistics.harmonic_mean(x.square().mean(-1).flatten().tolist())
    cosines = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)[:, ~torch.eye(4, dtype=bool)]
    seen = []
    monkeypatch.setattr(theory, "apjn_theory", lambda *args: seen.append(args) or ([], []))
    theory.theory_of(model, x)
    [(depth, n, *moments, gains, residual)] = seen
    assert (depth, n, residual) == (2, 4, False)
    assert gains == approx((gain["W_V"] * gain["W_O"], gain["fc1"], gain["fc2"]))
    assert moments == approx([q, q * cosines.mean().item()])


@pytest.mark.parametrize("residual, slack", [(False, 0.05), (True, 0.15)])
def test_theory_fits_a_vit_whose_tokens_differ_in_size(residual, slack):
    """The tokens' mean squares spread 16-fold, so an arithmetic mean for q would miss by a factor
    of 2. With skips the sizes become more equal with depth, hence more slack."""
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = ViT(16, 4, 3, dim=96, depth=2, num_heads=2, pool="mean", residual=residual)
        for name, p in model.blocks.named_parameters():
            if name.endswith(("W_V.weight", "W_O.weight", "fc1.weight", "fc2.weight")):
                nn.init.normal_(p, std=(1.0 if "fc2" in name else 1.5) * p.shape[1] ** -0.5)
        x = (torch.randn(2, 16, 96) * torch.linspace(0.5, 2.0, 16)[:, None]).requires_grad_()
        pair, _ = theory.theory_of(model, x.detach())
        ratios.append(apjn([x, nn.Sequential(*model.blocks)(x)])[0] / pair[0])
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    assert abs(statistics.mean(ratios) - 1) < slack + 2 * error
    assert error < 0.07
