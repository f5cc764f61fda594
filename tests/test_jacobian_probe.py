"""The probe's estimators against autograd and dense algebra, its theory against measurements."""

import json
import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, assert_fails_in_one_line, run_here, run_script
from torch import nn

import common
import jacobian_probe as probe
from minskip import MLP, Attention, Block, ViT


def random_attention(d: int, heads: int, dtype=torch.float64) -> Attention:
    """Large weights and biases, so that the attention is far from uniform."""
    torch.manual_seed(0)
    attention = Attention(d, heads)
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_(std=d**-0.5)
    return attention.to(dtype)


def autograd_jacobian(function, y: torch.Tensor) -> torch.Tensor:
    return torch.autograd.functional.jacobian(function, y).reshape(y.numel(), y.numel())


# ---- Jacobians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_closed_form_attention_jacobian_equals_autograd(heads):
    attention = random_attention(12, heads)
    y = torch.randn(5, 12, dtype=torch.float64)
    K = autograd_jacobian(lambda y: attention(y[None])[0], y)
    assert (probe.attention_jacobian(attention, y) - K).abs().max() < 1e-12


def test_mlp_jacobian_equals_autograd():
    mlp = MLP(6, 24).double()
    y = torch.randn(3, 6, dtype=torch.float64)
    whole = autograd_jacobian(mlp, y)
    blocks = torch.block_diag(*probe.mlp_jacobians(mlp, y))
    assert (whole - blocks).abs().max() < 1e-12


def test_products_with_the_jacobian_are_adjoint():
    """<u, K v> = <K^T u, v> in float32, and both agree with the closed form."""
    attention = random_attention(32, 4, torch.float32)
    y = torch.randn(9, 32)
    forward, adjoint = probe.attention_maps(attention, y, skip=1.0)
    u, v = torch.randn(2, y.numel())
    left, right = (u @ forward(v)).item(), (adjoint(u) @ v).item()
    scale = (u.norm() * forward(v).norm()).item()
    assert abs(left - right) < 1e-5 * scale
    K = probe.attention_jacobian(attention, y) + torch.eye(y.numel())
    assert torch.allclose(forward(v), K @ v, atol=1e-4)


def test_golub_kahan_against_a_dense_svd():
    """With skips both ends are found; without, the smallest Ritz value is only an upper bound."""
    attention = random_attention(24, 3)
    y = torch.randn(8, 24, dtype=torch.float64)
    K = probe.attention_jacobian(attention, y)
    for skip, exact_below in ((3.0, True), (0.0, False)):
        singular = torch.linalg.svdvals(K + skip * torch.eye(len(K)))
        forward, adjoint = probe.attention_maps(attention, y, skip)
        start = torch.randn(y.numel(), dtype=torch.float64)
        ritz = probe.golub_kahan(forward, adjoint, start, iterations=30)
        assert ritz.max().item() == pytest.approx(singular.max().item(), rel=1e-3)
        assert ritz.min() >= singular.min() * (1 - 1e-9)
        if exact_below:
            assert ritz.min().item() == pytest.approx(singular.min().item(), rel=0.05)


def test_condition_number_by_one_lu_equals_the_svds():
    """Of K, ill-conditioned, of K + I, and of a singular matrix."""
    attention = random_attention(24, 3)
    y = torch.randn(8, 24, dtype=torch.float64)
    K = probe.attention_jacobian(attention, y)
    for J in (K, K + torch.eye(len(K))):
        expected = probe.condition_number(torch.linalg.svdvals(J))
        assert probe.square_condition_number(J) == pytest.approx(expected, rel=1e-4)
    K[3] = 0
    assert probe.square_condition_number(K) == math.inf


def test_conditioning_is_exact_when_small_and_a_bound_when_large(monkeypatch):
    block = Block(24, 3, 4.0, residual=False)
    x = torch.randn(6, 24)
    exact = probe.conditioning(block, x)
    monkeypatch.setattr(probe, "DENSE_LIMIT", 0)
    bound = probe.conditioning(block, x)
    assert exact["exact"] and not bound["exact"]
    for key in ("attention", "attention_plus_I", "mlp", "mlp_plus_I"):
        assert bound[key] <= exact[key] * 1.01


# ---- APJN ----------------------------------------------------------------------------------------


def test_apjn_of_a_skipless_rmsnorm_network_is_exact():
    """x <- c^2 O RMSNorm(x) with O orthogonal: J q_0 / c^4 = (d - 1) / d at every depth."""
    d, c = 16, 3.0
    torch.manual_seed(0)
    x0 = torch.randn(1, d, dtype=torch.float64) * 1.7
    rotations = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for _ in range(8)]
    for depth in (1, 3, 8):

        def network(x, depth=depth):
            for matrix in rotations[:depth]:
                x = c**2 * F.rms_norm(x, (d,), eps=0.0) @ matrix
            return x

        J = autograd_jacobian(network, x0).square().sum().item() / d
        q0 = x0.square().mean().item()
        assert J * q0 / c**4 == pytest.approx((d - 1) / d, rel=1e-8)


def test_apjn_of_linear_uniform_attention_with_skips():
    """J = 1 + ((1 + s^2)^L - 1) / n; measured by the probe's estimator."""
    n, L, d, s = 4, 4, 256, 1.0
    values = []
    for seed in range(8):
        torch.manual_seed(seed)
        tokens = [torch.randn(1, n, d, requires_grad=True)]
        for _ in range(L):
            W = s * torch.randn(d, d) / math.sqrt(d)
            tokens.append(tokens[-1] + tokens[-1].mean(1, keepdim=True) @ W)
        values.append(probe.apjn(tokens, probes=20)[0])
    expected = 1 + ((1 + s**2) ** L - 1) / n
    assert statistics.mean(values) == pytest.approx(expected, rel=0.03)


def unit_gain_network(seed: int, d: int, L: int, residual: bool) -> nn.ModuleList:
    """Blocks with uniform attention (W_Q = 0) and every other gain in variance 1."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(Block(d, 4, 4.0, residual=residual) for _ in range(L))
    with torch.no_grad():
        for block in blocks:
            a, m = block.attention, block.mlp
            a.W_Q.weight.zero_()
            for linear in (a.W_K, a.W_V, a.W_O, m.fc1, m.fc2):
                linear.weight.normal_(std=linear.in_features**-0.5)
            for linear in (a.W_Q, a.W_K, a.W_V, a.W_O, m.fc1, m.fc2):
                linear.bias.zero_()
    return blocks


@pytest.mark.parametrize(
    "n, L, d, residual", [(4, 12, 512, True), (8, 12, 512, True), (8, 6, 512, False)]
)
def test_measured_apjn_agrees_with_the_pair_recursion_and_not_with_the_scalar(n, L, d, residual):
    values = []
    for seed in range(6):
        blocks = unit_gain_network(seed, d, L, residual)
        tokens = [torch.randn(2, n, d, requires_grad=True)]
        for block in blocks:
            tokens.append(block(tokens[-1]))
        values.append(probe.apjn(tokens, probes=2)[0])
    pair, scalar = probe.apjn_theory(L, n, 1.0, 0.0, 1.0, 1.0, 1.0, float(residual))
    error = statistics.stdev(values) / math.sqrt(len(values))
    measured = statistics.mean(values)
    assert abs(measured - pair[0]) < 3 * error + 0.03 * pair[0]  # 3 % for the finite width
    assert abs(measured - scalar[0]) > 6 * error


def test_gaussian_moments():
    phi2, cross, slope2, _ = probe.gaussian_moments(1.0, 0.0)
    assert phi2 == pytest.approx(0.425221, abs=1e-5)
    assert slope2 == pytest.approx(0.455851, abs=1e-5)
    assert cross / phi2 == pytest.approx(0.18714, abs=1e-4)  # as the MLP test measures it
    phi2, _, slope2, _ = probe.dyt(1.0, 0.0)
    assert phi2 == pytest.approx(0.394294, abs=1e-5)
    assert slope2 == pytest.approx(0.464403, abs=1e-5)
    *_, alike = probe.gaussian_moments(1.3, 1.3)
    assert alike == pytest.approx(probe.gaussian_moments(1.3, 0.0)[2])


MAPS = {
    "relu": (F.relu, probe.relu_moments),
    "gelu": (F.gelu, probe.gaussian_moments),
    "derf": (lambda h: torch.erf(0.7 * h), lambda q, p: probe.derf(q, p, 0.7)),
    "dyt": (lambda h: torch.tanh(0.7 * h), lambda q, p: probe.dyt(q, p, 0.7)),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("q, p", [(1.7, 0.6), (1.7, -0.6), (20.0, 19.0)])
def test_the_four_numbers_of_a_map_against_sampling(name, q, p):
    f, moments = MAPS[name]
    torch.manual_seed(0)
    x, y = torch.randn(2, 400_000, dtype=torch.float64)
    h = torch.stack([math.sqrt(q) * x, p / math.sqrt(q) * x + math.sqrt(q - p * p / q) * y])
    h.requires_grad_()
    values = f(h)
    slopes = torch.autograd.grad(values.sum(), h)[0]
    sampled = []
    for u, v in (values, slopes):
        sampled += [(u * u).mean().item(), (u * v).mean().item()]
    assert sampled == pytest.approx(moments(q, p), rel=0.01, abs=0.003)


def test_derf_in_closed_form_equals_the_quadrature_and_dyt_is_right_at_large_q():
    """tanh(h) is a step of width 1 under a density of width 100: where fixed nodes would fail."""
    a = 0.7
    erf = (lambda h: torch.erf(a * h),
           lambda h: 2 * a / math.sqrt(math.pi) * torch.exp(-((a * h) ** 2)))  # fmt: skip
    for q, p in ((0.01, 0.003), (1.0, 0.4), (1.0, -0.4), (9.0, 9.0), (400.0, 399.0)):
        numeric = probe.gaussian_moments(q, p, *erf, scale=1 / a)
        assert numeric == pytest.approx(probe.derf(q, p, a), rel=1e-6)
    q = 1e4
    expected = 4 * a / (3 * math.sqrt(2 * math.pi * q))  # density at 0 times the integral of N'^2
    assert probe.dyt(q, 0.0, a)[2] == pytest.approx(expected, rel=1e-3)


def test_apjn_of_a_relu_mlp_behind_layernorm_is_a_power_law():
    """J^{L,0} = q_L / q_0 exactly: E phi'^2 = E phi^2 = 1/2 at q = 1. Linear in depth."""
    q0, gain, L = 1.3, 1.7, 64
    J, _ = probe.apjn_theory(L, 8, q0, 0.2, 0.0, 1.0, gain, activation=probe.relu_moments)
    assert J[0] == pytest.approx((q0 + L * gain / 2) / q0, rel=1e-12)


def local_slope(normaliser, first: int, last: int, a: float = 1.0, s: float = 1.0) -> float:
    """Of ln J^{l,0} against sqrt(l) for the recursion of x + s W N(a x), q_0 = 1."""
    J, _ = probe.apjn_theory(
        last, 1, 1.0, 0.0, 0.0, s * s, 1.0, normaliser=lambda q, p: normaliser(q, p, a),
        activation=lambda q, p: (q, p, 1.0, 1.0),
    )  # fmt: skip
    return math.log(J[first]) / (math.sqrt(last) - math.sqrt(first))  # J^{last,first} = the ratio


def test_elementwise_normalisers_give_a_stretched_exponential():
    """ln J grows like c a s sqrt(l), c = 8 / (3 sqrt(2 pi)) for DyT, 4 / pi for Derf."""
    c_dyt, c_derf = 8 / (3 * math.sqrt(2 * math.pi)), 4 / math.pi
    assert local_slope(probe.dyt, 16, 64) == pytest.approx(1.161, abs=1e-3)
    assert local_slope(probe.dyt, 100, 400) == pytest.approx(c_dyt, rel=0.05)
    assert local_slope(probe.dyt, 100, 400, a=2.0) == pytest.approx(2 * c_dyt, rel=0.05)
    assert local_slope(probe.derf, 16, 64) == pytest.approx(1.334, abs=1e-3)
    for a, s in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.7)):
        assert local_slope(probe.derf, 1600, 6400, a, s) == pytest.approx(a * s * c_derf, rel=0.015)


NORMALISERS = {
    "LayerNorm": (lambda h: F.layer_norm(h, h.shape[-1:]), probe.layer_norm),
    "Derf": (torch.erf, probe.derf),
    "DyT": (torch.tanh, probe.dyt),
}


def toy_apjn(seed: int, normalise, n: int, L: int, d: int, correlation: float) -> float:
    """J^{L,0} of L blocks with W_Q = 0 and a ReLU; gains in variance 1, fc1's 2."""
    torch.manual_seed(seed)
    shared, own = torch.randn(2, 1, d), torch.randn(2, n, d)
    first = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    h = first.requires_grad_()
    for _ in range(L):
        W_V, W_O, W_1, W_2 = torch.randn(4, d, d) / math.sqrt(d)
        h = h + normalise(h).mean(1, keepdim=True) @ W_V @ W_O
        h = h + torch.relu(normalise(h) @ W_1 * math.sqrt(2)) @ W_2
    return probe.apjn([first, h], probes=2)[0]


@pytest.mark.parametrize(
    "name, n, L", [("LayerNorm", 4, 64), ("LayerNorm", 8, 32), ("Derf", 8, 32), ("DyT", 8, 32)]
)
def test_measured_apjn_is_within_three_standard_errors_of_the_pair_recursion(name, n, L):
    """Eight seeds at d = 512, no slack.

    With 60 seeds the finite width shows: LayerNorm n = 8 gives 20.56 +- 0.23 against 19.95, Derf
    495 +- 7.5 against 474, DyT 233 +- 3.5 against 226, some 3 % above; LayerNorm n = 4 53.7 +- 1.1
    against 53.9.
    """
    normalise, statistics_of = NORMALISERS[name]
    values = [toy_apjn(seed, normalise, n, L, 512, 0.4) for seed in range(8)]
    measured, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    pair, scalar = probe.apjn_theory(
        L, n, 1.0, 0.4, 1.0, 2.0, 1.0, normaliser=statistics_of, activation=probe.relu_moments
    )
    assert abs(measured - pair[0]) < 3 * error
    assert measured - scalar[0] > 5 * error


# ---- tokens, attention, gradients ----------------------------------------------------------------


def test_token_statistics_of_known_tokens():
    alike = torch.ones(1, 5, 8)
    assert probe.token_statistics(alike)["correlation"] == pytest.approx(1)
    assert probe.token_statistics(alike)["effective_rank"] == pytest.approx(1, abs=1e-6)
    apart = torch.eye(5, 8)[None]
    result = probe.token_statistics(apart)
    assert result["correlation"] == pytest.approx(0, abs=1e-12)
    assert result["effective_rank"] == pytest.approx(5)
    assert result["norm"] == pytest.approx(1)


def test_attention_statistics_of_uniform_attention():
    block = unit_gain_network(0, 16, 1, residual=False)[0]
    result = probe.attention_statistics(block, torch.randn(2, 5, 16))
    assert result["own_share"] == pytest.approx(1 / 5)
    assert result["entropy"] == pytest.approx(math.log(5))
    assert result["kappa_Z"] > 1e10 > 1e4 > result["kappa_Z_skip"]


def test_default_skipless_gradients_of_queries_vanish_while_values_do_not():
    """Theory, section 2, last point: why the probe shows each matrix apart."""
    torch.manual_seed(0)
    model = ViT(32, 8, 10, width=64, depth=8, heads=2, residual=False)
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images, list(range(9)))
    norms = probe.gradient_norms(model, tokens, torch.tensor([1, 2]))
    assert norms["W_Q"][4] < 1e-3 * norms["W_Q"][0]
    assert norms["W_V"][4] > 0.1 * norms["W_V"][0]
    assert len(norms["tokens"]) == 9 and len(norms["fc2"]) == 8


# ---- what is printed -----------------------------------------------------------------------------


def test_lower_bounds_are_marked_number_by_number(monkeypatch, capsys):
    assert probe.shown_kappa(48712.3, exact=True) == "48700"
    assert probe.shown_kappa(4871.23, exact=False) == ">=4870"
    assert probe.shown_kappa(2e49, exact=True) == probe.shown_kappa(math.inf, True) == ">=1e+15"

    monkeypatch.setattr(probe, "DENSE_LIMIT", 0)
    torch.manual_seed(0)
    model = ViT(16, 8, 10, width=24, depth=2, heads=3)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    result = probe.measure(model, images, labels, bar=probe.tqdm(disable=True))
    probe.print_table({"residual": result})
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line][1:]
    for row in rows:
        bounds = {column for column, cell in zip(header, row) if cell.startswith(">=")}
        assert bounds >= {"k(K)", "k(K+I)", "k(MLP)"} and "own" not in bounds
        assert len(row) == len(header)


# ---- demos ---------------------------------------------------------------------------------------


def test_linear_head_formula_equals_gradient_descent():
    torch.manual_seed(0)
    Z, Y = torch.randn(12, 7, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    eta = 1 / torch.linalg.svdvals(Z)[0].item() ** 2
    W, losses = torch.zeros(7, 3, dtype=torch.float64), []
    for _ in range(51):
        losses.append((Z @ W - Y).square().sum())
        W = W - eta * Z.T @ (Z @ W - Y)
    exact = probe.linear_head_losses(Z, Y, eta, 50)
    assert (torch.stack(losses) / exact - 1).abs().max() < 1e-12


def test_the_norm_the_tutorial_misquotes():
    torch.manual_seed(0)
    norms = torch.stack([torch.randn(1, 10, 512).norm() for _ in range(50)])
    assert norms.mean().item() == pytest.approx(71.55, abs=2.2)


def test_the_gradient_flow_demo_shows_quoted_and_measured(tmp_path):
    done = run_script("jacobian_probe.py", "--demo", "gradient-flow", "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2.656e-05" in done.stdout and "13780.6" in done.stdout and "226.4" in done.stdout
    assert (tmp_path / "o/gradient-flow.png").exists()


# ---- the command ---------------------------------------------------------------------------------


def test_a_probe_of_three_variants(tmp_path):
    flags = ["--depths", "3", "--seeds", "2", "--image-size", "16", "--images", "2", "--out", "o"]
    done = run_script("jacobian_probe.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tables = [line for line in lines if re.match(r"^ +\S", line)]
    assert len(tables) == 3 * 4 and max(map(len, tables)) <= 100
    assert re.search(r"skipless: token differences die by block [12];", done.stdout)
    record = json.loads((tmp_path / "o/probe.json").read_text())
    result = record["medians"]["skipless+conditioned"]
    assert len(result["blocks"]["kappa_attention"]) == 3 and len(result["apjn"]) == 4
    assert record["seeds"] == [0, 1]
    assert (tmp_path / "o/probe.png").read_bytes().startswith(b"\x89PNG")


def test_trained_networks_are_probed_from_their_files(image_root, tmp_path):
    train = [*SMALL, "--data", image_root, "--epochs", "1", "--warmup-epochs", "0", "--ema", "0.5"]
    for name in ("a", "b"):
        run = run_script("train_cls.py", *train, "--out", name, "--workers", "0", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    files = ["a/last.pt", "b/last.pt"]
    args = ["--checkpoint", *files, "--data", image_root, "--out", "o"]
    done = run_script("jacobian_probe.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"a", "b"} == set(json.loads((tmp_path / "o/probe.json").read_text())["medians"])

    checkpoint = torch.load(tmp_path / "a/last.pt", weights_only=True)
    checkpoint["ema"]["module.head.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    done = run_script("jacobian_probe.py", "--checkpoint", "nan.pt", cwd=tmp_path)
    assert_fails_in_one_line(done, "the loss of this network is nan")


def test_a_backbone_without_a_head_is_probed(tmp_path):
    """Its pooled feature, of as many numbers as the width, stands in for the logits."""
    model = ViT(16, 8, 0, width=24, depth=2, heads=3, residual=False)
    content = dict(model_config=model.config, model=model.state_dict(), ema=None)
    common.save_checkpoint(tmp_path / "backbone.pt", **content)
    done = run_script(
        "jacobian_probe.py", "--checkpoint", "backbone.pt", "--out", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    medians = json.loads((tmp_path / "o/probe.json").read_text())["medians"]["backbone.pt"]
    assert all(norm > 0 for norm in medians["gradients"]["tokens"])


BAD_FLAGS = {
    "--variants residual plain": r"'plain' is unknown; possible: residual, residual\+cond",
    "--variants skipless+dyt": r"unknown; possible: .*skipless\+conditioned",
    "--image-size 30": "patch size must divide image size: image 30, patch 8",
    "--checkpoint other.pt": "was not written by this project",
    "--data nowhere": "nowhere: no such folder",
    "--seeds 0": "--seeds must be at least 1",
    "--before": "add --checkpoint",
    "--checkpoint other.pt --depths 3": "--depths is about fresh networks",
    "--demo magic": "invalid choice",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, tmp_path, monkeypatch, capsys):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    done = run_here(probe.main, flags.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])


def test_explain_has_at_most_five_sentences_a_panel(tmp_path):
    done = run_script("jacobian_probe.py", "--explain", cwd=tmp_path)
    assert done.returncode == 0
    for name, text in probe.EXPLANATIONS.items():
        assert name in done.stdout
        assert len(re.findall(r"\.(?:\s|$)", text)) <= 5
