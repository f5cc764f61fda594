"""Each lesson's claims are facts, and its picture and table show what its functions compute."""

import ast
import importlib.util
import math
import statistics

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from torch import nn

LESSONS = sorted((ROOT / "lessons").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"lesson_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flow, exercises, why, constants, depth, speed = map(load, LESSONS)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a lesson's main(); returns (printed lines, [the picture's axes])."""

    def run(lesson, *words):
        drawn = []

        def save(figure, path):
            figure.savefig(path, dpi=30)  # so that what cannot be drawn fails here
            drawn.append((figure.axes, path))

        monkeypatch.setattr(lesson, "save_figure", save)
        run_main(lesson.main, [*words, "--out", "o"], tmp_path, monkeypatch)
        lines = capsys.readouterr().out.splitlines()
        [(axes, path)] = drawn
        assert lines[-1] == str(path) and path.stem == lesson.__name__.removeprefix("lesson_")
        assert max(map(len, lines)) <= 100
        return lines, axes

    yield run
    plt.close("all")


def lines_of(ax) -> list[list[float]]:
    return [torch.as_tensor(line.get_ydata()).tolist() for line in ax.lines]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_short_and_asks_one_question(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 150
    assert docstring.splitlines()[0].endswith("?")
    for words in (f"python lessons/{path.name}", "\nWhat to see: ", "\nChange and try: "):
        assert docstring.count(words) == 1, words
    assert (ROOT / f"results/lessons/{path.stem}.png").exists()


@pytest.mark.parametrize("lesson", [flow, exercises, why, constants, depth, speed])
def test_bad_flags_end_in_one_line(lesson, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for flag, value, words in (("--seeds", 0, "at least 1"), ("--out", "file/o", "cannot write")):
        done = run_here(lesson.main, [flag, value], tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, words)


# ---- 1. Gradient flow ----------------------------------------------------------------------------


def test_gradient_flow_prints_measured_beside_quoted(run):
    lines, [ax] = run(flow, "--seeds", "21")
    rows = {line[:37].strip(): line[37:].split() for line in lines}
    assert rows["0.9^100"] == ["2.656e-05"] * 2 and rows["1.1^100"] == ["13780.6"] * 2
    assert float(rows["norm of randn(1, 10, 512)"][0]) == pytest.approx(71.55, abs=0.3)
    assert rows["... after 100 times x = 0.9 x"][:2] == ["1.9e-03", "5.96e-08"]
    assert float(rows["... after 100 times x = x + 0.01 x"][0]) == pytest.approx(193.5, rel=0.01)
    assert 7.5 < float(rows["gradient at layer 1, with skips"][0]) < 9.5
    assert 1e-12 < float(rows["gradient at layer 1, without skips"][0]) < 1e-11
    with_skips, quote, without, other_quote = lines_of(ax)
    assert (quote, other_quote) == ([8.92], [3e-8])
    for skip, line in ((True, with_skips), (False, without)):
        runs = [flow.gradients_by_layer(skip, seed) for seed in range(21)]
        assert len(line) == 51 and line[50] == pytest.approx(8)  # sqrt(64): the output's own
        assert line == pytest.approx([statistics.median(layer) for layer in zip(*runs)])


def test_the_plain_skip_explodes_tenfold(monkeypatch):  # "change and try", written out
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(50)]
    y = x = torch.randn(1, 64, requires_grad=True)
    for layer in layers:
        y = y + torch.tanh(layer(y))
    expected = torch.autograd.grad(y.sum(), x)[0].norm().item()
    small = flow.gradients_by_layer(True, seed=0)[0]
    monkeypatch.setattr(flow, "BRANCH", 1.0)
    large = flow.gradients_by_layer(True, seed=0)[0]
    assert large == pytest.approx(expected, rel=1e-4) and 5 < large / small < 20


# ---- 2. Exercises --------------------------------------------------------------------------------

MEASURED = {  # gradient at the first of 50 layers and rms of the output, as in results/README.md
    "F(x)": (3.9e-12, 0.087),
    "x + F(x)": (87, 5.6),
    "x + 0.1 F(x)": (8.3, 1.0),
    "x + g F(x), g learned from 0": (8.0, 0.99),
    "(1 - T) x + T F(x), T a gate": (0.015, 0.018),
    "x F(x)": (0, 0),
    "x + dropout(F(x))": (210, 8.1),
    "P x + F(x), P a matrix": (1.4e-4, 0.11),
    "LayerNorm(x + F(x))": (9.0, 1.0),
}


@pytest.mark.parametrize("formula", exercises.COMBINATIONS)
def test_what_each_combination_does_to_gradients_and_sizes(formula):
    pairs = zip(*(exercises.gradient_and_size(formula, seed) for seed in range(20)))
    medians = [statistics.median(values) for values in pairs]
    assert medians == pytest.approx(MEASURED[formula], rel=0.06, abs=0)


def test_a_deep_network_learns_only_with_skips():
    assert exercises.learns("F(x)", 4, 0) and not exercises.learns("F(x)", 32, 0)
    assert exercises.learns("x + 0.1 F(x)", 32, 0)


def test_the_exercises_table_and_picture(run, monkeypatch):
    monkeypatch.setattr(exercises, "gradient_and_size", lambda formula, seed: (3e-3 + seed, 1.5))
    succeeds = dict.fromkeys(exercises.COMBINATIONS, 100) | {"F(x)": 16, "x F(x)": 1}
    monkeypatch.setattr(exercises, "learns", lambda name, depth, seed: depth <= succeeds[name])
    lines, axes = run(exercises, "--seeds", "3")
    rows = {line[:33].strip(): line[33:].split() for line in lines}
    assert rows["F(x)"] == ["1", "1.5", "16,", "16"]
    assert rows["x F(x)"][2:] == ["1,", "1"] and rows["x + F(x)"][2:] == ["64,", "64"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == list(succeeds)
    for ax, bar, middle in zip(axes, (3e-3, 1.5, 16), (1.003, 1.5, 16)):
        assert min(ax.lines[0].get_xdata()) == bar
        assert ax.lines[1].get_xdata() == [middle] and ax.lines[1].get_ydata() == [0]


# ---- 3. Why attention needs a skip ---------------------------------------------------------------


def test_uniform_attention_has_a_derivative_of_rank_d():
    """W_Q = 0: the n d singular values are those of W_V W_O and zeros; with the skip none is 0."""
    torch.manual_seed(1)
    x, W = torch.randn(5, 32).double(), torch.randn(3, 32, 32).double() / 6
    y = why.attention(x, torch.zeros(32, 32).double(), *W)
    assert torch.allclose(y, x.mean(0).expand(5, 32) @ W[1] @ W[2])
    K = torch.func.jacrev(why.attention)(x, torch.zeros(32, 32).double(), *W).reshape(160, 160)
    expected = torch.cat([torch.linalg.svdvals(W[1] @ W[2]), torch.zeros(128)])
    assert torch.allclose(torch.linalg.svdvals(K), expected, atol=1e-10)


def test_softmax_attention_collapses_in_two_blocks_without_a_skip(run):
    lines, [left, right] = run(why, "--seeds", "3")
    singular, different = lines_of(left)[:4], lines_of(right)
    titles = ["K + I, usual", "K + I, larger", "K, usual", "K, larger"]
    for title, s, d, row in zip(titles, singular, different, lines[2:]):
        kappa, *printed = map(float, row.split()[-4:])
        assert row.startswith(title) and len(s) == 192 and len(d) == 9
        assert kappa == pytest.approx(s[0] / s[-1], rel=0.06)
        assert printed == pytest.approx([d[1], d[2], d[8]], rel=0.06)
    (lifted, _, bare, _), (kept, _, lost, later) = singular, different
    assert lifted[-1] > 0.9 and lifted[0] < 1.1
    assert bare[0] > 30 * bare[32] and bare[0] > 1e6 * bare[-1]
    assert min(kept) > 0.9 and lost[1] < 1e-3 and lost[2] < 1e-12
    assert later[2] > 1e-4 and later[8] < 1e-12
    s, n, d = 32 * 0.02**2, 6, 32
    assert lost[1] == pytest.approx(s**2 * (1 + n / d), rel=0.6)  # theory, for large n and d


# ---- 4. alpha, beta, c ---------------------------------------------------------------------------

SHARES = [  # of a token's attention, for itself, at alpha and beta
    ("ViT-B", 2, 0.6, 0.77),
    ("ViT-B", 1.8, 1, 0.99),
    ("ViT-S", 2, 0.6, 0.70),
    ("tiny", 1.8, 1, 0.99),
    ("nano, 2 heads", 2, 0.6, 0.61),
    ("nano, 8 heads", 2, 0.6, 0.30),
    ("nano, 8 heads", 1.8, 1, 0.51),
    ("nano, 8 heads", 2, 10, 0.86),  # "change and try"
]


@pytest.mark.parametrize("size, alpha, beta, share", SHARES)
def test_own_token_shares(size, alpha, beta, share):
    seeds = range(1 if size.startswith("ViT") else 20)
    found = [constants.own_token_share(size, alpha, beta, seed) for seed in seeds]
    assert statistics.mean(found) == pytest.approx(share, abs=0.04)


def test_beta_conditions_attention_and_alpha_spoils_it():
    kappas = {
        (alpha, beta): statistics.median(constants.kappa(alpha, beta, seed) for seed in range(3))
        for alpha, beta in ((0.5, 0.6), (2, 0.6), (0.5, 2), (2, 2))
    }
    assert kappas[0.5, 0.6] < 30 and kappas[2, 0.6] > 300
    assert kappas[0.5, 2] < 2 and kappas[2, 2] < 3


def test_c_scales_gradients_and_nothing_else():
    ratios = [a / b for a, b in zip(constants.gradient_norms(3), constants.gradient_norms(1))]
    assert ratios == pytest.approx([1, 1, 1 / 3, 1 / 3], rel=1e-3)


def test_tokens_of_nano_are_alike_after_seven_blocks():
    for alpha, beta in constants.PUBLISHED:
        found = constants.differences(constants.skipless_nano(alpha, beta, 3, 0))
        assert len(found) == 13 and found[0] > 0.9 and found[2] > 0.2 and found[7] < 1e-6
    assert constants.differences(constants.skipless_nano(2, 10, 3, 0))[7] > 1e-2


def test_the_table_and_picture_of_the_constants(run, monkeypatch):
    monkeypatch.setattr(constants, "SIZES", {"small": (64, 2, 16)})
    monkeypatch.setattr(constants, "own_token_share", lambda size, a, b, seed: a + b + seed**2)
    monkeypatch.setattr(constants, "kappa", lambda a, b, seed: 10 + a + b + seed**2)
    lines, [left, middle, right] = run(constants, "--seeds", "3")
    assert lines[2].split() == "small 4.27 (2.60 .. 6.60) 4.47 (2.80 .. 6.80)".split()
    assert lines_of(left) == [pytest.approx([2 + b + 5 / 3 for b in constants.BETAS])]
    expected = [[11 + a + b for b in constants.BETAS] for a in (0.5, 1, 2)]
    assert lines_of(middle) == [pytest.approx(line) for line in expected]
    for line, dots in zip(lines_of(right)[::2], lines_of(right)[1::2]):
        assert len(line) == 13 and line[:4] == pytest.approx(dots[:4], rel=1e-3)
    assert lines[-2].split()[-8:] == "W_Q 1.000 W_K 1.000 W_V 0.333 W_O 0.333".split()


# ---- 5. Gradients by depth -----------------------------------------------------------------------


def test_the_apjn_of_a_linear_map_is_its_squared_norm():
    torch.manual_seed(0)
    x, A = torch.randn(2, 3, 50, requires_grad=True), torch.randn(50, 50)
    expected = A.square().sum().item() / 50
    assert depth.apjn(x, x @ A, probes=200) == pytest.approx(expected, rel=0.05)


def test_the_networks_have_the_variances_of_the_docstring():
    block = depth.network(2, "dyt", 0.7).blocks[1]
    W = dict(W_V=block.attention.W_V, W_O=block.attention.W_O, up=block.mlp.fc1, down=block.mlp.fc2)
    variances = {name: layer.weight.var().item() for name, layer in W.items()}
    expected = dict(W_V=1 / 256, W_O=1 / 256, up=2 / 256, down=1 / 1024)
    assert variances == pytest.approx(expected, rel=0.03)
    assert block.attention.W_Q.weight.abs().max() == 0 and isinstance(block.mlp.activation, nn.ReLU)
    assert block.norm1.a.item() == block.norm2.a.item() == pytest.approx(0.7)


def test_measured_gradients_follow_the_recursion(run, monkeypatch):
    monkeypatch.setattr(depth, "DEPTHS", [1, 8, 16])
    lines, axes = run(depth, "--seeds", "1")
    drawn, again = (iter(lines_of(ax)) for ax in axes)
    for row, (name, (_, a, normaliser)) in zip(lines[1:], depth.KINDS.items(), strict=False):
        of_depth = math.log if a is None else math.sqrt
        recursion, measured = next(drawn), next(drawn)
        assert [next(again), next(again)] == [recursion, measured]
        assert recursion == pytest.approx(depth.expected(normaliser))
        assert measured == pytest.approx(recursion, rel=0.25)
        slopes = [depth.slope(J, of_depth) for J in (measured, recursion)]
        mean, low, _, high, line = (word.strip("()") for word in row.split()[-5:])
        assert row.startswith(name) and mean == low == high
        assert [float(mean), float(line)] == pytest.approx(slopes, abs=6e-4)


def test_the_recursions_slopes_are_those_of_the_page():
    found = {
        name: depth.slope(depth.expected(normaliser), math.log if a is None else math.sqrt)
        for name, (_, a, normaliser) in depth.KINDS.items()
    }
    expected = {
        "LayerNorm": 0.789,
        "DyT, a = 0.5": 0.669,
        "DyT, a = 1": 1.044,
        "Derf, a = 1": 1.197,
    }
    assert found == pytest.approx(expected, abs=6e-4)
    quarter = depth.expected(lambda q, p: depth.theory.dyt(q, p, a=0.25))
    layer_norm = depth.expected(depth.theory.layer_norm)
    assert [quarter[-1], layer_norm[-1]] == pytest.approx([17, 45], rel=0.02)  # "change and try"


# ---- 6. Speed of descent -------------------------------------------------------------------------


def attention_by_hand(X, W, skip):
    Z = torch.zeros_like(X)
    for a in range(len(X)):
        logits = torch.stack([(X[a] @ W["W_Q"]) @ (x @ W["W_K"]) / math.sqrt(64) for x in X])
        Z[a] = sum(p * (x @ W["W_V"]) for p, x in zip(logits.softmax(0), X))
    return Z + X if skip else Z


@pytest.mark.parametrize("skip", [True, False])
def test_descent_is_gradient_descent_with_the_tangent_kernels_step(skip):
    X, Y, W = speed.draw_problem(3, 0.3, 1.0)
    before = {name: w.clone() for name, w in W.items()}
    assert torch.allclose(speed.attention(X, W, skip), attention_by_hand(X, W, skip))
    weights = {name: w.clone().requires_grad_() for name, w in W.items()}

    def output():
        Z = speed.attention(X, weights, skip)
        return ((Z @ weights["W_1"]).clamp(min=0) @ weights["W_2"]).flatten()

    rows = [torch.autograd.grad(y, weights.values(), retain_graph=True) for y in output()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    eta, expected = 1 / torch.linalg.svdvals(J)[0].item() ** 2, []
    for _ in range(4):
        loss = (output() - Y.flatten()).square().sum() / 2
        expected.append(loss.item())
        for w, g in zip(weights.values(), torch.autograd.grad(loss, weights.values())):
            w.data -= eta * g
    assert speed.descend(X, Y, W, skip, limit=3) == pytest.approx(expected)
    assert all(torch.equal(W[name], w) for name, w in before.items())


def test_linear_head_formula_equals_gradient_descent():
    torch.manual_seed(0)
    Z, Y = torch.randn(12, 7).double(), torch.randn(12, 3).double()
    eta = 1 / torch.linalg.svdvals(Z)[0].item() ** 2
    W, losses = torch.zeros(7, 3).double(), []
    for _ in range(51):
        losses.append((Z @ W - Y).square().sum())
        W = W - eta * Z.T @ (Z @ W - Y)
    exact = speed.linear_head_losses(Z, Y, eta, 50)
    assert (torch.stack(losses) / exact - 1).abs().max() < 1e-12


def test_the_skip_helps_where_tokens_are_alike_and_not_where_they_are_independent(monkeypatch):
    alike = speed.draw_problem(0, *speed.INPUTS["tokens alike"])
    assert alike[0].var(dim=0).mean().item() == pytest.approx(1 - 0.5, rel=0.1)
    assert alike[0].square().mean().item() == pytest.approx(1, rel=0.3)
    assert alike[2]["W_Q"].std().item() == pytest.approx(0.2 / 8, rel=0.1)
    fast = speed.descend(*alike, True, 2000)
    assert len(fast) < 1400 and fast[-1] <= 1e-3 * fast[0] < fast[-2]
    assert len(speed.descend(*alike, False, 2 * len(fast))) == 2 * len(fast) + 1  # not yet there
    problems = [speed.draw_problem(seed, *speed.INPUTS["tokens independent"]) for seed in range(3)]
    without, with_skip = (
        sorted(len(speed.descend(*problem, skip, 500)) - 1 for problem in problems)
        for skip in (False, True)
    )
    assert [without[0], without[-1], with_skip[0], with_skip[-1]] == pytest.approx(
        [21, 62, 79, 91],
        abs=1,  # as in results/README.md
    )
    independent = problems[0]
    monkeypatch.setattr(speed, "TRAINED", ["W_1", "W_2"])  # "change and try"
    slow, quick = (len(speed.descend(*independent, skip, 500)) for skip in (False, True))
    assert slow > 2 * quick


def test_the_table_and_picture_of_the_speed(run):
    lines, axes = run(speed, "--seeds", "1", "--limit", "60")
    rows = iter(lines[1:])
    for ax, (title, of_input) in zip(axes, speed.INPUTS.items()):
        X, Y, W = speed.draw_problem(0, *of_input)
        drawn = iter(lines_of(ax))
        for skip, words in ((False, "without skip"), (True, "with skip")):
            losses, Z = speed.descend(X, Y, W, skip, 60), speed.attention(X, W, skip)
            s = torch.linalg.svdvals(Z)
            exact = speed.linear_head_losses(Z, Y, s[0].item() ** -2, 60)
            assert next(drawn) == pytest.approx([loss / losses[0] for loss in losses])
            assert next(drawn) == pytest.approx([losses[-1] / losses[0]])
            assert next(drawn) == pytest.approx((exact / exact[0]).tolist())
            kappa, steps = f"{s[0] / s[-1]:.2g}", str(len(losses) - 1)
            assert next(rows).split()[-6:] == [kappa, "..", kappa, steps, "..", steps]
            assert f"{title}, {words}" in "\n".join(lines)
