"""The APJN's recursion against arithmetic by hand, sampling, and measured networks."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F

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
    assert sampled == pytest.approx(moments(q, p), rel=0.015, abs=0.004)


def test_gelu_and_tanh_at_unit_variance():
    phi2, cross, slope2, _ = theory.smooth(1.0, 0.0)
    assert (phi2, slope2) == pytest.approx((0.425221, 0.455851), abs=1e-5)
    assert cross == pytest.approx(1 / (4 * math.pi))  # (E GELU)^2, and E GELU(z) = 1/sqrt(4 pi)
    phi2, _, slope2, _ = theory.dyt(1.0, 0.0)
    assert (phi2, slope2) == pytest.approx((0.394294, 0.464403), abs=1e-5)


def test_for_two_equal_tokens_products_are_squares():
    for moments in (theory.smooth, theory.relu, theory.derf, theory.dyt, theory.layer_norm):
        square, product, slope2, slopes = moments(1.3, 1.3)
        assert (square, slope2) == pytest.approx((product, slopes))


def test_derf_in_closed_form_equals_the_quadrature_and_dyt_is_right_at_large_q():
    """tanh(a h) is a step of width 1/a under a density of width 100: fixed nodes would fail."""
    for q, p in ((0.01, 0.003), (1.0, 0.4), (1.0, -0.4), (9.0, 9.0), (400.0, 399.0)):
        numeric = theory.smooth(q, p, lambda h: torch.erf(A * h), 1 / A)
        assert numeric == pytest.approx(theory.derf(q, p, A), rel=1e-6)
    q = 1e4
    expected = 4 * A / (3 * math.sqrt(2 * math.pi * q))  # density at 0 times the integral of N'^2
    assert theory.dyt(q, 0.0, A)[2] == pytest.approx(expected, rel=1e-3)


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
    assert pair == pytest.approx(expected)
    second = (r + mlp_2[0]) * (r + attention_2[0] / 3)
    first = (r + mlp_1[0]) * (r + attention_1[0] / 3)
    assert scalar == pytest.approx([first * second, second, 1.0])


def test_apjn_of_a_relu_mlp_behind_layernorm_is_a_power_law():
    """J^{L,0} = q_L / q_0 exactly: E phi'^2 = E phi^2 = 1/2 at q = 1. Linear in depth."""
    q0, gain, L = 1.3, 1.7, 64
    J, _ = theory.apjn_theory(L, 8, q0, 0.2, (0.0, 1.0, gain), activation=theory.relu)
    assert J[0] == pytest.approx((q0 + L * gain / 2) / q0, rel=1e-12)


def test_elementwise_normalisers_give_a_stretched_exponential():
    """x + s W N(a x): ln J grows like c a s sqrt(l), c = 8 / (3 sqrt(2 pi)) for DyT, 4/pi Derf."""

    def local_slope(N, first, last, a=1.0, s=1.0):
        J, _ = theory.apjn_theory(
            last, 1, 1.0, 0.0, (0.0, s * s, 1.0), True, lambda q, p: N(q, p, a),
            lambda q, p: (q, p, 1.0, 1.0),
        )  # fmt: skip
        return math.log(J[first]) / (math.sqrt(last) - math.sqrt(first))

    c_dyt, c_derf = 8 / (3 * math.sqrt(2 * math.pi)), 4 / math.pi
    assert local_slope(theory.dyt, 16, 64) == pytest.approx(1.161, abs=1e-3)
    assert local_slope(theory.dyt, 50, 200, a=2.0) == pytest.approx(2 * c_dyt, rel=0.07)
    assert local_slope(theory.derf, 16, 64) == pytest.approx(1.334, abs=1e-3)
    for a, s in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.7)):
        slope = local_slope(theory.derf, 400, 1600, a, s)
        assert slope == pytest.approx(a * s * c_derf, rel=0.03)


# ---- against networks ----------------------------------------------------------------------------

NORMALISERS = {
    "LayerNorm": (lambda h: F.layer_norm(h, h.shape[-1:]), theory.layer_norm),
    "Derf": (torch.erf, theory.derf),
    "DyT": (torch.tanh, theory.dyt),
}


def toy_apjn(seed: int, normalise, n: int, L: int, d: int, correlation: float) -> float:
    """J^{L,0} measured on L blocks of uniform attention and a ReLU MLP; gains are 1, fc1's 2."""
    torch.manual_seed(seed)
    shared, own = torch.randn(2, 1, d), torch.randn(2, n, d)
    first = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    h = first.requires_grad_()
    for _ in range(L):
        W_V, W_O, W_1, W_2 = torch.randn(4, d, d) / math.sqrt(d)
        h = h + normalise(h).mean(1, keepdim=True) @ W_V @ W_O
        h = h + torch.relu(normalise(h) @ W_1 * math.sqrt(2)) @ W_2
    return apjn([first, h], probes=2)[0]


@pytest.mark.parametrize("name", NORMALISERS)
def test_measured_apjn_follows_the_pair_form_and_not_the_scalar_form(name):
    """Within three standard errors and 5 %, of which the finite width takes 3 % (60 seeds)."""
    (normalise, moments), n, L = NORMALISERS[name], 8, 32
    values = [toy_apjn(seed, normalise, n, L, 320, 0.4) for seed in range(8)]
    measured, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    gains = (1.0, 2.0, 1.0)
    pair, scalar = theory.apjn_theory(L, n, 1.0, 0.4, gains, True, moments, theory.relu)
    assert abs(measured - pair[0]) < 3 * error + 0.05 * pair[0]
    assert measured - scalar[0] > 4 * error


def test_theory_reads_its_inputs_from_the_network(monkeypatch):
    torch.manual_seed(0)
    model = ViT(16, 8, 3, dim=6, depth=2, num_heads=2, mlp_ratio=2.0, pool="mean", residual=False)
    model = model.double()
    expected = []
    with torch.no_grad():
        for path in ("attention.W_V", "attention.W_O", "mlp.fc1", "mlp.fc2"):
            squares = []
            for block in model.blocks:
                W = block.get_submodule(path).weight
                W.normal_(mean=0.1)  # a mean multiplies too, so a variance would miss it
                squares += [(W[i, j] ** 2).item() for i in range(len(W)) for j in range(len(W.T))]
            expected.append(W.shape[1] * statistics.mean(squares))
    x = torch.randn(2, 4, 6, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0, 5.0])[:, None]
    norms = [[math.sqrt(sum(v * v for v in token)) for token in image] for image in x.tolist()]
    q = 1 / statistics.mean(6 / norm**2 for image in norms for norm in image)
    cosines = [
        (x[i, a] @ x[i, b]).item() / norms[i][a] / norms[i][b]
        for i in range(2) for a in range(4) for b in range(4) if a != b
    ]  # fmt: skip
    seen = []
    monkeypatch.setattr(theory, "apjn_theory", lambda *args: seen.append(args) or ([], []))
    theory.theory_of(model, x)
    [(depth, n, q_seen, p_seen, gains, residual)] = seen
    g_V, g_O, g_1, g_2 = expected
    assert (depth, n, residual) == (2, 4, False)
    assert gains == pytest.approx((g_V * g_O, g_1, g_2))
    assert (q_seen, p_seen) == pytest.approx((q, q * statistics.mean(cosines)))


@pytest.mark.parametrize("residual, slack", [(False, 0.05), (True, 0.15)])
def test_theory_fits_a_vit_whose_tokens_differ_in_size(residual, slack):
    """The tokens' mean squares spread 16-fold, so an arithmetic mean for q would miss by a factor
    of 2. With skips the sizes become more equal with depth, hence more slack."""
    ratios = []
    for seed in range(40):
        torch.manual_seed(seed)
        model = ViT(16, 4, 3, dim=96, depth=2, num_heads=2, pool="mean", residual=residual)
        with torch.no_grad():
            for block in model.blocks:
                for linear in (block.attention.W_V, block.attention.W_O, block.mlp.fc1):
                    linear.weight.normal_(std=1.5 * linear.in_features**-0.5)
                block.mlp.fc2.weight.normal_(std=block.mlp.fc2.in_features**-0.5)
        x = torch.randn(2, 16, 96) * torch.linspace(0.5, 2.0, 16)[:, None]
        tokens = [x.requires_grad_()]
        for block in model.blocks:
            tokens.append(block(tokens[-1]))
        pair, _ = theory.theory_of(model, x.detach())
        ratios.append(apjn(tokens, probes=2)[0] / pair[0])
    error = statistics.stdev(ratios) / math.sqrt(len(ratios))
    assert abs(statistics.mean(ratios) - 1) < slack + 2 * error
    assert error < 0.07
