"""Each lesson's claims are facts, and its picture and table show what its functions compute."""

import ast
import importlib
import math
from statistics import mean, median

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, assert_fails_in_one_line, run_here, run_main
from matplotlib.colors import to_hex
from torch.nn.functional import scaled_dot_product_attention

from support import pictures

LESSONS = sorted((ROOT / "lessons").glob("*.py"))
MODULES = [importlib.import_module(f"lessons.{path.stem}") for path in LESSONS]
flow, exercises, why, constants, depth, speed = MODULES

BLUE, ORANGE = (
    pictures.ARM_COLOURS[arm] for arm in ("residual", "skipless-default")
)  # skips: blue
KINDS = pictures.OTHER_COLOURS[:4]
LEARNS = [*[ORANGE] * 2, *[BLUE] * 8, *[ORANGE] * 2, *[BLUE] * 6]  # in the stub below
LOOKS = {  # of each panel: how its title begins, the scales of x and y, and the lines' colours
    flow: [("size of the gradient", "linear", "log", [BLUE, BLUE, ORANGE, ORANGE])],
    exercises: [
        ("gradient at layer 1", "log", "linear", LEARNS),
        ("rms of the output", "log", "linear", LEARNS),
        ("depth that learns", "log", "linear", LEARNS),
    ],
    why: [
        ("the n d = 6 x 32 singular", "linear", "log", [BLUE, BLUE, ORANGE, ORANGE, "grey"]),
        ("1 - correlation", "linear", "log", [BLUE, BLUE, ORANGE, ORANGE]),
    ],
    constants: [
        ("own-token share", "linear", "linear", KINDS[:2]),
        ("kappa(K)", "linear", "log", KINDS[:3]),
        ("1 - correlation", "linear", "log", [c for c in KINDS[:3] for _ in range(2)]),
    ],
    depth: [(f"J, against {x}", scale, "log", [c for c in KINDS for _ in range(3)])
            for x, scale in (("depth L", "log"), ("sqrt(L)", "linear"))],
    speed: [(f"loss / first loss, tokens {kind}", "log", "log", [ORANGE, ORANGE, BLUE, BLUE])
            for kind in ("alike", "independent")],
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a lesson's main(); returns (printed lines, [the lines of each panel])."""

    def run(lesson, seeds):
        drawn = []

        def save(figure, path):
            figure.savefig(path, dpi=30)  # so that what cannot be drawn fails here
            assert lesson.__name__ == f"lessons.{path.stem}"
            for ax, (title, x, y, colours) in zip(figure.axes, LOOKS[lesson], strict=True):
                assert ax.get_title().startswith(title)
                assert (ax.get_xscale(), ax.get_yscale()) == (x, y)
                assert [to_hex(line.get_color()) for line in ax.lines] == [*map(to_hex, colours)]
                labels = ax.get_legend_handles_labels()[1]
                assert len({*labels}) == len(labels)
            drawn.extend([list(line.get_ydata()) for line in ax.lines] for ax in figure.axes)

        monkeypatch.setattr(lesson, "save_figure", save)
        run_main(lesson.main, ["--seeds", seeds, "--out", "o"], tmp_path, monkeypatch)
        return capsys.readouterr().out.splitlines(), drawn

    yield run
    plt.close("all")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_is_short_and_asks_one_question(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 125
    assert docstring.splitlines()[0].endswith("?")
    for words in (f"python lessons/{path.name}", "\nWhat to see: ", "\nChange and try: "):
        assert docstring.count(words) == 1, words
    assert (ROOT / f"results/lessons/{path.stem}.png").exists()


@pytest.mark.parametrize("lesson", MODULES)
def test_bad_flags_end_in_one_line(lesson, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for flag, value, words in (("--seeds", 0, "at least 1"), ("--out", "file/o", "cannot write")):
        done = run_here(lesson.main, [flag, value], tmp_path, monkeypatch, capsys)
        assert_fails_in_one_line(done, words)


def test_gradient_flow_prints_measured_beside_quoted(run, monkeypatch):
    lines, [[with_skips, quote, without, other_quote]] = run(flow, 21)
    assert [line[48:58].strip() for line in lines[1:4]] == ["226.4", "5.96e-08", "preserved"]
    measured = [float(line[37:47]) for line in lines[1:]]
    # 71.55 = sqrt(5120), times 0.9^100 and 1.01^100; then the gradients
    assert measured[:3] == pytest.approx([71.55, 1.9e-3, 193.5], rel=0.01)
    assert measured[3:] == pytest.approx([with_skips[0], without[0]], rel=0.01)
    assert 7.5 < with_skips[0] < 9.5 and 1e-12 < without[0] < 1e-11
    assert (quote, other_quote) == ([8.92], [3e-8])
    for skip, line in ((True, with_skips), (False, without)):
        runs = [flow.gradients_by_layer(skip, seed) for seed in range(21)]
        assert len(line) == 51 and line[50] == pytest.approx(8)  # sqrt(64): the output's own
        assert line == pytest.approx([median(layer) for layer in zip(*runs)])
    monkeypatch.setattr(flow, "BRANCH", 1.0)  # "change and try": ten times as large
    assert 5 < flow.gradients_by_layer(True, seed=0)[0] / with_skips[0] < 20


MEASURED = {  # gradient at the first of 50 layers and rms of the output, as in results/README.md
    "F(x)": (3.9e-12, 0.087), "x + F(x)": (87, 5.6), "x + 0.1 F(x)": (8.3, 1.0),
    "x + g F(x), g learned from 0": (8.0, 0.99), "(1 - T) x + T F(x), T a gate": (0.015, 0.018),
    "x F(x)": (0, 0), "x + dropout(F(x))": (210, 8.1), "P x + F(x), P a matrix": (1.4e-4, 0.11),
    "LayerNorm(x + F(x))": (9.0, 1.0),
}  # fmt: skip


def test_the_exercises_table_and_picture(run, monkeypatch):
    # with a third of Adam's rate x F(x) learns at no depth, with three times the rate at 8 layers
    assert [exercises.greatest_depth("x F(x)", seed) for seed in (0, 1)] == [4, 4]
    assert exercises.greatest_depth("F(x)", 0) == 8 and exercises.learns("x + 0.1 F(x)", 32, 0)
    succeeds = dict.fromkeys(MEASURED, 100) | {"F(x)": 16, "x F(x)": 1}  # made up: Adam takes long
    monkeypatch.setattr(exercises, "learns", lambda name, depth, seed: depth <= succeeds[name])
    lines, panels = run(exercises, 20)
    assert panels[0] == [[name] * k for name in MEASURED for k in (20, 1)]  # a bar and a dot each
    assert [line[:33].strip() for line in lines[1:]] == list(MEASURED)
    table = zip(*(line[33:].replace(",", "").split() for line in lines[1:]))
    columns = [*zip(*MEASURED.values()), [min(depth, 64) for depth in succeeds.values()]]
    for ax, printed, expected in zip(plt.gcf().axes, table, columns):
        bars, dots = ([median(line.get_xdata()) for line in ax.lines[i::2]] for i in (0, 1))
        for found in (map(float, printed), bars, dots):
            assert list(found) == pytest.approx(expected, rel=0.06, abs=0)


def test_uniform_attention_has_a_derivative_of_rank_d():
    """W_Q = 0: the n d singular values are those of W_V W_O and zeros."""
    torch.manual_seed(1)
    x, W = torch.randn(5, 32).double(), torch.randn(4, 32, 32).double() / 6
    W[0] = 0
    assert torch.allclose(why.attention(x, *W), x.mean(0).expand(5, 32) @ W[2] @ W[3])
    K = torch.func.jacrev(why.attention)(x, *W).reshape(160, 160)
    expected = torch.cat([torch.linalg.svdvals(W[2] @ W[3]), torch.zeros(128)])
    assert torch.allclose(torch.linalg.svdvals(K), expected, atol=1e-10)


def test_softmax_attention_collapses_in_two_blocks_without_a_skip(run):
    (_, *rows), [[*singular, _], different] = run(why, 3)  # the last line on the left marks d
    cases = [(K, size) for K in ("K + I (skip)", "K (no skip)") for size in ("usual", "larger")]
    for (K, size), s, d, row in zip(cases, singular, different, rows, strict=True):
        assert row.startswith(f"{K}, {size}") and len(s) == 192 and len(d) == 9
        printed = [float(number) for number in row.split()[-4:]]
        assert printed == pytest.approx([s[0] / s[-1], d[1], d[2], d[8]], rel=0.06)
    for (K, size), *drawn in zip(cases, singular, different):
        torch.manual_seed(0)
        skip = K.startswith("K + I")
        for line, function in zip(drawn, (why.spectrum, why.differences)):
            seeds = [function(why.STDS[size], skip) for _ in range(3)]
            assert line == pytest.approx([median(values) for values in zip(*seeds)])
    (lifted, _, bare, _), (kept, _, lost, later) = singular, different
    assert lifted[-1] > 0.9 and lifted[0] < 1.1 and min(kept) > 0.9
    assert bare[0] > 30 * bare[32] and bare[0] > 1e6 * bare[-1]
    assert lost[1] < 1e-3 and lost[2] < 1e-12 and later[2] > 1e-4 and later[8] < 1e-12
    s, n, d = 32 * 0.02**2, 6, 32
    assert lost[1] == pytest.approx(s**2 * (1 + n / d), rel=0.6)  # theory, for large n and d


SHARES = [  # of a token's attention, for itself; the last is "change and try"
    ("ViT-B", 2, 0.6, 0.77), ("ViT-B", 1.8, 1, 0.99), ("ViT-S", 2, 0.6, 0.70),
    ("tiny", 1.8, 1, 0.99), ("nano, 2 heads", 2, 0.6, 0.61), ("nano, 8 heads", 2, 0.6, 0.30),
    ("nano, 8 heads", 1.8, 1, 0.51), ("nano, 8 heads", 2, 10, 0.86),
]  # fmt: skip


@pytest.mark.parametrize("size, alpha, beta, share", SHARES)
def test_own_token_shares(size, alpha, beta, share):
    seeds = range(1 if size.startswith("ViT") else 20)
    found = mean(constants.own_token_share(size, alpha, beta, seed) for seed in seeds)
    assert found == pytest.approx(share, abs=0.04)


def test_what_alpha_beta_and_c_do():
    pairs = ((0.5, 0.6), (2, 0.6), (0.5, 2), (2, 2))
    kappas = [median(constants.kappa(*pair, seed) for seed in range(3)) for pair in pairs]
    assert kappas[0] < 30 and kappas[1] > 300  # alpha spoils the conditioning,
    assert kappas[2] < 2 and kappas[3] < 3  # and beta mends it
    for alpha, beta in ((2, 0.6), (1.8, 1)):  # nano's tokens are alike after seven blocks
        found = constants.differences(constants.skipless_nano(alpha, beta, 3))
        assert len(found) == 13 and found[0] > 0.9 and found[2] > 0.2 and found[7] < 1e-6
    assert constants.differences(constants.skipless_nano(2, 10, 3))[7] > 1e-2


def test_the_table_and_picture_of_the_constants(run, monkeypatch):
    monkeypatch.setattr(constants, "SIZES", {"small": (64, 2, 16), "large": (1, 1, 1)})
    monkeypatch.setattr(constants, "own_token_share", lambda size, a, b, seed: a + b + seed**2)
    monkeypatch.setattr(constants, "kappa", lambda a, b, seed: 10 + a + b + seed**2)
    lines, [left, middle, right] = run(constants, 3)
    assert lines[1].split()[:7] == "small 4.27 (2.60 .. 6.60) 4.47 (2.80".split()
    assert left == [pytest.approx([2 + b + 5 / 3 for b in constants.BETAS])] * 2
    assert middle == [pytest.approx([11 + a + b for b in constants.BETAS]) for a in (0.5, 1, 2)]
    for line, dots in zip(right[::2], right[1::2]):  # c = 3 and c = 1: the same forward pass
        assert len(line) == 13 and line[:4] == pytest.approx(dots[:4], rel=1e-3)
    assert lines[-1].split()[-8:] == "W_Q 1.000 W_K 1.000 W_V 0.333 W_O 0.333".split()


def test_the_apjn_of_a_linear_map_is_its_squared_norm():
    torch.manual_seed(0)
    x, A = torch.randn(2, 3, 50, requires_grad=True), torch.randn(50, 50)
    assert depth.apjn(x, x @ A, probes=200) == pytest.approx(A.square().sum().item() / 50, rel=0.05)


def test_measured_gradients_follow_the_recursion(run, monkeypatch):
    block = depth.network(2, "dyt", 0.7).blocks[1]
    assert block.norm1.a.item() == block.norm2.a.item() == pytest.approx(0.7)
    assert not block.attention.W_Q.weight.any() and "ReLU" in str(block.mlp.activation)
    laws = [math.log, math.sqrt, math.sqrt, math.sqrt]  # of LayerNorm, DyT, DyT, Derf
    curves = [depth.expected(normaliser) for _, _, normaliser in depth.KINDS.values()]
    found = [depth.slope(curve, law) for curve, law in zip(curves, laws)]
    assert found == pytest.approx([0.789, 0.669, 1.044, 1.197], abs=6e-4)  # results/README.md
    quarter = depth.expected(lambda q, p: depth.dyt(q, p, a=0.25))  # "change and try"
    assert [quarter[-1], curves[0][-1]] == pytest.approx([17, 45], rel=0.02)
    monkeypatch.setattr(depth, "DEPTHS", [1, 8, 16])
    (_, *rows), [left, right] = run(depth, 2)
    assert left == right
    for ax, x in zip(plt.gcf().axes, ([1, 8, 16], [1, 8**0.5, 4])):
        assert all(list(line.get_xdata()) == x for line in ax.lines)
    for row, name, law, curve, recursion, *seeds in zip(
        rows, depth.KINDS, laws, curves, left[::3], left[1::3], left[2::3], strict=True
    ):
        assert recursion == pytest.approx([curve[0], curve[3], curve[4]])
        assert all(measured == pytest.approx(recursion, rel=0.25) for measured in seeds)
        low, high = sorted(depth.slope(J, law) for J in seeds)
        printed = (
            f"{(low + high) / 2:.3f} ({low:.3f} .. {high:.3f}) {depth.slope(recursion, law):.3f}"
        )
        assert low < high and row.startswith(name) and row.split()[-5:] == printed.split()


@pytest.mark.parametrize("skip", [True, False])
def test_descent_is_gradient_descent_with_the_tangent_kernels_step(skip):
    X, Y, W = speed.draw_problem(3, 0.3, 1.0)
    weights = {name: w.clone().requires_grad_() for name, w in W.items()}

    def output():
        Z = scaled_dot_product_attention(*(X @ weights[name] for name in ("W_Q", "W_K", "W_V")))
        return (((Z + skip * X) @ weights["W_1"]).clamp(min=0) @ weights["W_2"]).flatten()

    rows = [torch.autograd.grad(y, weights.values(), retain_graph=True) for y in output()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    eta, expected = 1 / torch.linalg.svdvals(J)[0].item() ** 2, []
    for _ in range(4):
        loss = (output() - Y.flatten()).square().sum() / 2
        expected.append(loss.item())
        for w, g in zip(weights.values(), torch.autograd.grad(loss, weights.values())):
            w.data -= eta * g
    assert speed.descend(X, Y, W, skip, limit=3) == pytest.approx(expected)


def test_linear_head_formula_equals_gradient_descent():
    torch.manual_seed(0)
    Z, Y = torch.randn(12, 7).double(), torch.randn(12, 3).double()
    eta = 1 / torch.linalg.svdvals(Z)[0].item() ** 2
    W, losses = torch.zeros(7, 3).double(), []
    for _ in range(51):
        losses.append((Z @ W - Y).square().sum())
        W = W - eta * Z.T @ (Z @ W - Y)
    assert (torch.stack(losses) / speed.linear_head_losses(Z, Y, 50) - 1).abs().max() < 1e-12


def test_the_skip_helps_where_tokens_are_alike_and_not_where_they_are_independent(monkeypatch):
    alike = speed.draw_problem(0, *speed.INPUTS["tokens alike"])
    assert alike[0].var(dim=0).mean().item() == pytest.approx(1 - 0.5, rel=0.1)
    assert alike[0].square().mean().item() == pytest.approx(1, rel=0.3)
    assert alike[2]["W_Q"].std().item() == pytest.approx(0.2 / 8, rel=0.1)
    fast = speed.descend(*alike, True, 2000)
    assert len(fast) < 1400 and fast[-1] <= 1e-3 * fast[0] < fast[-2]
    assert len(speed.descend(*alike, False, 2 * len(fast))) == 2 * len(fast) + 1  # not yet there
    problems = [speed.draw_problem(seed, *speed.INPUTS["tokens independent"]) for seed in range(3)]
    steps = [[len(speed.descend(*p, skip, 500)) - 1 for p in problems] for skip in (False, True)]
    assert [f(s) for s in steps for f in (min, max)] == pytest.approx([21, 62, 79, 91], abs=1)
    monkeypatch.setattr(speed, "TRAINED", ["W_1", "W_2"])  # "change and try"
    slow, quick = (len(speed.descend(*problems[0], skip, 500)) for skip in (False, True))
    assert slow > 2 * quick


def test_the_table_and_picture_of_the_speed(run, monkeypatch):
    monkeypatch.setattr(speed, "LIMIT", 60)
    (_, *rows), [left, right] = run(speed, 1)
    cases = [(key, skip) for key in speed.INPUTS for skip in (False, True)]
    lines = [*left, *right]
    for row, (key, skip), drawn, dotted in zip(rows, cases, lines[::2], lines[1::2], strict=True):
        X, Y, W = speed.draw_problem(0, *speed.INPUTS[key])
        losses, Z = speed.descend(X, Y, W, skip, 60), speed.attention(X, W, skip)
        exact = speed.linear_head_losses(Z, Y, 60)
        assert drawn == pytest.approx([loss / losses[0] for loss in losses])
        assert dotted == pytest.approx((exact / exact[0]).tolist())
        kappa, steps = f"{torch.linalg.cond(Z).item():.2g}", str(len(losses) - 1)
        assert row.startswith(f"{key}, {'with skip' if skip else 'without skip'} ")
        assert row.split()[-6:] == [kappa, "..", kappa, steps, "..", steps]
