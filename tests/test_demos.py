"""What the demos print is what the computation written out by hand gives."""

import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from PIL import Image
from torch import nn

import theory
from demos import apjn, convergence, exercises, gradient_flow


def test_gradients_by_layer_are_those_of_the_tutorials_listing():
    for skip in (True, False):
        torch.manual_seed(5)
        layers = [nn.Linear(64, 64) for _ in range(50)]
        x = torch.randn(1, 64, requires_grad=True)
        y, last = x, None
        for layer in layers:
            last = y
            y = y + 0.1 * torch.tanh(layer(y)) if skip else torch.tanh(layer(y))
        last.retain_grad()
        y.sum().backward()
        norms = gradient_flow.gradients_by_layer(skip, seed=5)
        assert len(norms) == 51 and norms[50] == pytest.approx(8)  # sqrt(64): y itself
        assert norms[0] == pytest.approx(x.grad.norm().item(), rel=1e-4)
        assert norms[49] == pytest.approx(last.grad.norm().item(), rel=1e-4)


def test_gradient_flow_prints_measured_beside_quoted(tmp_path, monkeypatch, capsys):
    run_main(gradient_flow.main, ["--seeds", "20", "--out", "o"], tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    rows = {line[:43].strip(): line[43:].split() for line in out.splitlines()}
    assert rows["0.9^100"][:2] == ["2.656e-05", "2.656e-05"]
    assert rows["1.1^100"][:2] == ["13780.6", "13780.6"]
    measured, quoted, *_ = rows["norm of randn(1, 10, 512)"]
    assert float(measured) == pytest.approx(math.sqrt(5120), abs=0.3) and quoted == "226.4"
    assert rows["... after x = 0.9 * x, 100 times"][:2] == ["1.9e-03", "5.96e-08"]
    measured, quoted, *factor = rows["... after x = x + 0.01 * x, 100 times"]
    assert float(measured) == pytest.approx(71.55 * 2.7048, rel=0.01) and quoted == "preserved"
    assert factor == ["1.01^100", "=", "2.70"]
    measured, quoted, *spread = rows["gradient at the first of 50, with skips"]
    firsts = [gradient_flow.gradients_by_layer(True, seed)[0] for seed in range(20)]
    assert float(measured) == pytest.approx(statistics.median_low(firsts), rel=0.01)
    assert quoted == "8.92" and 8 < float(measured) < 9
    assert [float(spread[0]), float(spread[2])] == pytest.approx(
        [min(firsts), max(firsts)], rel=0.1
    )
    measured, quoted, *_ = rows["gradient at the first of 50, without skips"]
    assert 1e-12 < float(measured) < 1e-11 and quoted == "3e-8"
    with Image.open(tmp_path / "o/gradient-flow.png") as image:
        assert image.width > 500


def test_demos_run_from_anywhere_and_end_bad_flags_in_one_line(tmp_path, monkeypatch, capsys):
    script = ROOT / "demos/gradient_flow.py"  # beside which the project's modules do not lie
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, "--seeds", "0"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert_fails_in_one_line(done, "--seeds: must be at least 1")
    (tmp_path / "file").touch()
    for demo in (convergence, gradient_flow):
        done = run_here(demo.main, ["--out", "file/o"], tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, "cannot write into this folder")


# ---- convergence ---------------------------------------------------------------------------------


def attention_by_hand(X, W_Q, W_K, W_V, skip):
    n, d = X.shape
    Z = torch.zeros(n, W_V.shape[1], dtype=X.dtype)
    for a in range(n):
        logits = torch.stack([(X[a] @ W_Q) @ (X[b] @ W_K) / math.sqrt(d) for b in range(n)])
        for b in range(n):
            Z[a] += logits.softmax(0)[b] * (X[b] @ W_V)
    return Z + X if skip else Z


NAMES = ["W_Q", "W_K", "W_V", "W_1", "W_2", "R"]
ALL = tuple(NAMES)


def tiny_problem(layers: int = 1):
    torch.manual_seed(0)

    def gaussian(rows, columns):
        return torch.randn(rows, columns, dtype=torch.float64) / math.sqrt(columns)

    X, Y, weights = gaussian(5, 6), gaussian(5, 2), []
    for number in range(1, layers + 1):
        out = 2 if number == layers else 6
        shapes = [(6, 6), (6, 6), (6, 6), (6, 8), (8, out), (6, out)]
        weights.append({name: gaussian(*shape) for name, shape in zip(NAMES, shapes)})
    return X, Y, weights


def network_by_hand(X, layers, skip, mlp_skip):
    for W in layers:
        Z = attention_by_hand(X, W["W_Q"], W["W_K"], W["W_V"], skip)
        X = (Z @ W["W_1"]).clamp(min=0) @ W["W_2"]
        if mlp_skip:
            X = X + (Z @ W["R"] if W is layers[-1] else Z)
    return Z, X


def test_the_attention_layer_by_hand():
    X, _, [W] = tiny_problem()
    for skip in (True, False):
        three = W["W_Q"], W["W_K"], W["W_V"], skip
        assert torch.allclose(convergence.attention(X, *three), attention_by_hand(X, *three))


@pytest.mark.parametrize("skips", [(False, False), (True, False), (True, True)])
def test_the_networks_by_hand(skips):
    for depth in (1, 2, 3):
        X, _, layers = tiny_problem(depth)
        ours, theirs = (f(X, layers, *skips) for f in (convergence.network, network_by_hand))
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs))


def test_linear_head_formula_equals_gradient_descent():
    torch.manual_seed(0)
    Z, Y = torch.randn(12, 7, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    eta = 1 / torch.linalg.svdvals(Z)[0].item() ** 2
    W, losses = torch.zeros(7, 3, dtype=torch.float64), []
    for _ in range(51):
        losses.append((Z @ W - Y).square().sum())
        W = W - eta * Z.T @ (Z @ W - Y)
    exact = convergence.linear_head_losses(Z, Y, eta, 50)
    assert (torch.stack(losses) / exact - 1).abs().max() < 1e-12


DESCENTS = [  # layers, skips, trained
    (1, (False, False), ALL[:5]),
    (1, (True, False), ALL[:5]),
    (2, (True, True), ALL),
    (1, (True, False), ("W_1", "W_2")),
]


@pytest.mark.parametrize("depth, skips, trained", DESCENTS)
def test_descent_is_gradient_descent_with_the_tangent_kernels_step(depth, skips, trained):
    X, Y, layers = tiny_problem(depth)
    weights = [W[name].requires_grad_() for W in layers for name in trained]
    of = dict(allow_unused=True, materialize_grads=True)
    out = network_by_hand(X, layers, *skips)[1].flatten()
    rows = [torch.autograd.grad(y, weights, retain_graph=True, **of) for y in out]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    eta = 1 / torch.linalg.svdvals(J)[0].item() ** 2
    expected = []
    for _ in range(4):
        loss = ((network_by_hand(X, layers, *skips)[1] - Y) ** 2).sum() / 2
        expected.append(loss.item())
        for w, g in zip(weights, torch.autograd.grad(loss, weights, **of)):
            w.data -= eta * g
    X, Y, start = tiny_problem(depth)
    before = [w.clone() for W in start for w in W.values()]
    losses = convergence.descend(X, Y, start, skips, trained, limit=3)
    assert losses == pytest.approx(expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (w for W in start for w in W.values())))
    losses = convergence.descend(X, Y, start, skips, trained, limit=400)
    first = next((i for i, loss in enumerate(losses) if loss <= 1e-3 * losses[0]), 400)
    assert len(losses) == first + 1


def test_problems_have_the_correlation_and_scales_asked_for():
    X, Y, [first, last] = convergence.draw_problem(0, 0.5, 0.2, targets=3, layers=2)
    assert (X.shape, Y.shape, X.dtype) == ((32, 64), (32, 3), torch.float64)
    products = []
    for seed in range(30):
        X = convergence.draw_problem(seed, 0.5, 0.2)[0]
        products.append(((X @ X.T).sum() - (X * X).sum()).item() / (32 * 31 * 64))
        assert (X * X).mean().item() == pytest.approx(1, abs=0.5)
    assert statistics.mean(products) == pytest.approx(0.5, abs=0.06)
    stds = dict(W_Q=0.025, W_K=0.025, W_V=0.125, W_1=0.125, W_2=0.0625, R=0.125)
    for W, out in ((first, 64), (last, 3)):
        assert W["W_2"].shape == (256, out) and W["R"].shape == (64, out)
        for name, std in stds.items():
            assert W[name].square().mean().sqrt().item() == pytest.approx(std, rel=0.15)
        assert not torch.equal(W["W_Q"], W["W_K"])
    again = convergence.draw_problem(0, 0.0, 1.0)
    assert again[0].shape == (32, 64) and not torch.equal(again[0], X)


def test_convergence_prints_what_the_skip_is_worth(tmp_path, monkeypatch, capsys):
    words = ["--seeds", "2", "--limit", "60", "--out", "o"]
    trained = ("W_1", "W_2")
    settings = {"one": convergence.INDEPENDENT | dict(trained=trained)}
    monkeypatch.setattr(convergence, "SETTINGS", settings | {"two": convergence.INDEPENDENT})
    run_main(convergence.main, words, tmp_path, monkeypatch)
    head, title, *lines = capsys.readouterr().out.splitlines()
    assert head == "steps to 1e-3 of the first loss, 2 seeds" and title == "one"
    assert lines[5] == "two" and lines[-1] == "o/convergence.png"
    steps = {}
    for line, (name, (*skips, _)) in zip(lines, convergence.SKIPS.items()):
        problems = [convergence.draw_problem(seed, 0.0, 1.0) for seed in range(2)]
        runs = [convergence.descend(*p, skips, trained, 60) for p in problems]
        steps[name] = [len(losses) - 1 for losses in runs]
        Zs = [convergence.network(X, layers, *skips)[0] for X, _, layers in problems]
        low, high = sorted(torch.linalg.cond(Z).item() for Z in Zs)
        least, most = min(steps[name]), max(steps[name])
        limit = " (limit 60)" * (most == 60)
        told = f"kappa of Z {low:.2g} .. {high:.2g}, steps {least} .. {most}{limit}"
        assert line.strip().startswith(name) and line.endswith(told)
    for line, name in zip(lines[3:], ("around attention", "around both")):
        ratios = [a / b for a, b in zip(steps["no skip"], steps[name])]
        told = f"{min(ratios):.2f} .. {max(ratios):.2f} times as fast as without"
        more = "more than " * (max(steps["no skip"]) == 60)
        assert line == f"    {name}: {more}{told}"
    with Image.open(tmp_path / "o/convergence.png") as image:
        assert image.width > 1000


def test_the_skip_helps_where_tokens_are_alike():
    """Fewer steps with the skip, as kappa of Z falls."""
    problem = convergence.draw_problem(0, **convergence.ALIKE)
    with_skip = convergence.descend(*problem, (True, False), ALL, 2000)
    without = convergence.descend(*problem, (False, False), ALL, 2000)
    assert with_skip[-1] <= 1e-3 * with_skip[0]
    assert without[-1] > 1e-3 * without[0]


# ---- APJN against depth --------------------------------------------------------------------------


def test_apjn_s_networks_have_the_variances_it_says():
    block = apjn.network(2, "dyt", 0.7).blocks[1]
    attention, mlp = block.attention, block.mlp
    variances = {
        attention.W_V: 1 / 256,
        attention.W_O: 1 / 256,
        mlp.fc1: 2 / 256,
        mlp.fc2: 1 / 1024,
    }
    for layer, variance in variances.items():
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.03)
    assert attention.W_Q.weight.abs().max() == 0 and isinstance(mlp.activation, nn.ReLU)
    assert block.norm1.a.item() == block.norm2.a.item() == pytest.approx(0.7)


def test_apjn_measures_what_the_recursion_expects():
    for norm, a, normaliser in apjn.KINDS.values():
        torch.manual_seed(0)
        [first, last] = apjn.measured(apjn.network(8, norm, a), [1, 8])
        expected = apjn.expected(normaliser, [1, 8])
        assert [first, last] == pytest.approx(expected, rel=0.15)
    alone = theory.apjn_theory(3, 16, 1.0, 0.0, (1.0, 2.0, 1.0), activation=theory.relu)[0][0]
    assert apjn.expected(theory.layer_norm, [3]) == [alone]


def test_apjn_s_slopes():
    depths = [1, 8, 16, 32]
    power = [100, *(0.3 * L**0.8 for L in depths[1:])]  # below 8 blocks nothing counts
    assert apjn.slope(power, depths, log=True) == pytest.approx(0.8)
    stretched = [100, *(0.3 * math.exp(1.1 * math.sqrt(L)) for L in depths[1:])]
    assert apjn.slope(stretched, depths, log=False) == pytest.approx(1.1)


def test_apjn_prints_slopes_and_draws(tmp_path, monkeypatch, capsys):
    run_main(apjn.main, ["--seeds", "1", "--depth", "16", "--out", "o"], tmp_path, monkeypatch)
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines] == list(apjn.KINDS) and last == "o/apjn.png"
    for line, (norm, a, normaliser) in zip(lines, apjn.KINDS.values()):
        torch.manual_seed(0)
        J = apjn.measured(apjn.network(16, norm, a), [1, 2, 4, 8, 16])
        mean, low, _, high, recursion = line.replace("(", "").replace(")", "").split()[-5:]
        both = [apjn.slope(j, [1, 2, 4, 8, 16], norm == "layernorm")
                for j in (J, apjn.expected(normaliser, [1, 2, 4, 8, 16]))]  # fmt: skip
        assert float(mean) == float(low) == float(high) == pytest.approx(both[0], abs=6e-4)
        assert float(recursion) == pytest.approx(both[1], abs=6e-4)
    done = run_here(apjn.main, ["--depth", "15"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "--depth 15: .* 16 blocks")


# ---- exercises -----------------------------------------------------------------------------------


FORMULAS = {  # of a layer, its input x and its branch f; with the gate at 0.3
    exercises.Plain: lambda layer, x, f: f,
    exercises.Skip: lambda layer, x, f: x + f,
    exercises.Scaled: lambda layer, x, f: x + f / 10,
    exercises.Gate: lambda layer, x, f: x + 0.3 * f,
    exercises.Highway: lambda layer, x, f: x + torch.sigmoid(layer.transform(x)) * (f - x),
    exercises.Product: lambda layer, x, f: x * f,
    exercises.Projection: lambda layer, x, f: x @ layer.P.weight.T + f,
    exercises.PostNorm: lambda layer, x, f: nn.functional.layer_norm(x + f, (64,)),
}


@pytest.mark.parametrize("kind", exercises.KINDS)
def test_each_exercise_is_its_formula(kind):
    torch.manual_seed(0)
    layer, x = kind(), torch.randn(3, 64)
    branch = torch.tanh(x @ layer.linear.weight.T + layer.linear.bias)
    if kind is exercises.Dropout:
        update = layer(x) - x
        kept = update != 0
        assert 0.3 < kept.float().mean() < 0.7
        torch.testing.assert_close(update[kept], 2 * branch[kept])
        return
    if kind is exercises.Gate:
        torch.testing.assert_close(layer(x), x)
        nn.init.constant_(layer.g, 0.3)
    if kind is exercises.Highway:
        assert layer.transform.bias.tolist() == [-2.0] * 64
    torch.testing.assert_close(layer(x), FORMULAS[kind](layer, x, branch))


def test_through_measures_the_gradient_and_the_sizes():
    layers = exercises.network(exercises.Skip, 4, seed=3)
    torch.manual_seed(7)
    gradient, sizes = exercises.through(layers)
    torch.manual_seed(7)
    x = h = torch.randn(1, 64, requires_grad=True)
    signs = torch.randint(0, 2, (64,)) * 2.0 - 1
    rms = []
    for layer in layers:
        h = h + torch.tanh(layer.linear(h))
        rms.append(h.norm().item() / 8)
    (h @ signs).backward()
    assert gradient == pytest.approx(x.grad.norm().item()) and sizes == pytest.approx(rms)


def test_the_greatest_depth_ends_before_the_first_failure(monkeypatch):
    monkeypatch.setattr(exercises, "learns", lambda kind, depth, seed: depth not in (16, 32))
    assert exercises.greatest_depth(exercises.Plain, 0) == 8
    monkeypatch.setattr(exercises, "learns", lambda kind, depth, seed: True)
    assert exercises.greatest_depth(exercises.Plain, 0) == 128


def test_a_deep_plain_network_does_not_learn_where_one_with_skips_does():
    assert exercises.learns(exercises.Plain, 8, 0) and not exercises.learns(exercises.Plain, 40, 0)
    assert exercises.learns(exercises.Scaled, 40, 0)


def test_the_exercises_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exercises, "greatest_depth", lambda kind, seed: 10 + seed)
    run_main(exercises.main, ["--seeds", "3"], tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    gradients, sizes, depths = (
        [line.split() for line in part.splitlines()] for part in out.split("\n\n")
    )
    names = [kind.__name__ for kind in exercises.KINDS]
    assert [row[0] for row in gradients[1:]] == names == [row[0] for row in sizes[2:]]
    runs = [exercises.through(exercises.network(exercises.Scaled, 50, seed)) for seed in range(3)]
    middle = statistics.median(gradient for gradient, _ in runs)
    row = names.index("Scaled")
    assert float(gradients[1 + row][1]) == pytest.approx(middle, rel=0.06)
    last = statistics.median(rms[49] for _, rms in runs)
    assert float(sizes[2 + row][-1]) == pytest.approx(last, rel=0.06)
    assert [row[1:] for row in depths[1:]] == [["10", "11", "12"]] * 4
