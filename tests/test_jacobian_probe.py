"""The probe's numbers against the same written out by hand, and what it shows of them."""

import json
import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_fails_in_one_line, run_here, run_main
from PIL import Image
from torch import Tensor, nn

import files
import jacobian_probe as probe
import jacobians
import networks
import pictures
from data import augmentations, image_folder, normalise
from minskip import MLP, PRESETS, Attention, Block, ViT
from shapes import draw_shapes

SHAPE = dict(image_size=16, patch_size=8, num_classes=5, dim=12, depth=2, num_heads=3)


def scattered(module: nn.Module, seed: int = 0) -> nn.Module:
    """float64, every parameter random, biases too, large enough for uneven attention."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5)
    return module


def scattered_vit(residual: bool = True, pool: str = "mean", **shape) -> ViT:
    return scattered(ViT(**SHAPE | shape, residual=residual, pool=pool))


def some_images(count: int = 3) -> tuple[Tensor, Tensor]:
    images, labels, _ = draw_shapes(list(range(count)), 16, "val")
    return normalise(images).double(), labels % 5


def attention_by_hand(attention: Attention, y: Tensor) -> tuple[list[Tensor], Tensor]:
    """(each head's matrix, the output) for one image's y, (token, dim), a head at a time."""
    d_h = y.shape[1] // attention.num_heads
    q, k, v = (y @ W.weight.T + W.bias for W in (attention.W_Q, attention.W_K, attention.W_V))
    heads = [slice(h * d_h, (h + 1) * d_h) for h in range(attention.num_heads)]
    P = [(q[:, h] @ k[:, h].T / math.sqrt(d_h)).softmax(-1) for h in heads]
    mixed = torch.cat([P[i] @ v[:, h] for i, h in enumerate(heads)], dim=1)
    return P, mixed @ attention.W_O.weight.T + attention.W_O.bias


def autograd_jacobian(function, y: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, y).reshape(y.numel(), y.numel())


def kappa(J: Tensor) -> float:
    singular = torch.linalg.svdvals(J)
    return (singular[0] / singular[-1]).item()


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual, pool", [(True, "cls"), (False, "mean")])
def test_gradient_norms_are_those_that_backward_leaves(residual, pool):
    model = scattered_vit(residual, pool)
    images, labels = some_images()
    tokens = model.forward_features(images, [0, 1, 2])
    norms = probe.gradient_norms(model, tokens, labels)

    by_hand = [model.embed(images)]
    for block in model.blocks:
        by_hand.append(block(by_hand[-1]))
    for h in by_hand:
        h.retain_grad()
    logits = model.classify(by_hand[-1])
    loss = sum(-logits[i].log_softmax(0)[label] for i, label in enumerate(labels)) / 3
    loss.backward()
    assert norms["g(tokens)"] == pytest.approx([h.grad.norm().item() for h in by_hand])
    for name in ("W_Q", "W_K", "W_V", "W_O", "fc1", "fc2"):
        expected = []
        for block in model.blocks:
            layer = getattr(block.mlp if "fc" in name else block.attention, name)
            expected.append(layer.weight.grad.square().sum().sqrt().item())
        assert norms[f"g({name})"] == pytest.approx(expected), name
    assert len(norms) == 7


def test_default_skipless_gradients_of_queries_vanish_while_values_do_not():
    """Why the probe shows each matrix apart."""
    torch.manual_seed(0)
    shape = SHAPE | dict(dim=64, depth=8, num_heads=2)
    model = networks.fresh_arm("skipless-default", pool="mean", **shape).double()
    images, labels = some_images()
    norms = probe.gradient_norms(model, model.forward_features(images, list(range(9))), labels)
    assert norms["g(W_Q)"][4] < 1e-3 * norms["g(W_Q)"][0]
    assert norms["g(W_V)"][4] > 0.1 * norms["g(W_V)"][0]


def test_apjn_of_scalings_is_exact():
    """h^{l+1} = a_l h^l: J^{L,l} is the product of later a^2, whatever the random signs."""
    tokens = [torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)]
    for a in (2.0, 0.5, 3.0):
        tokens.append(a * tokens[-1])
    assert probe.apjn(tokens) == pytest.approx([9.0, 2.25, 9.0, 1.0])


def test_apjn_is_the_mean_square_of_the_dense_jacobian():
    model = scattered_vit(residual=False)
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    measured = probe.apjn([x, model.blocks[0](x)], probes=400)[0]
    exact = [
        autograd_jacobian(lambda y: model.blocks[0](y[None])[0], image).square().sum() / (4 * 12)
        for image in x.detach()
    ]
    assert measured == pytest.approx(torch.stack(exact).mean().item(), rel=0.05)


def test_apjn_of_linear_uniform_attention_with_skips():
    """J = 1 + ((1 + s^2)^L - 1) / n."""
    n, L, d = 4, 4, 192
    values = []
    for seed in range(8):
        torch.manual_seed(seed)
        tokens = [torch.randn(1, n, d, requires_grad=True)]
        for _ in range(L):
            W = torch.randn(d, d) / math.sqrt(d)
            tokens.append(tokens[-1] + tokens[-1].mean(1, keepdim=True) @ W)
        values.append(probe.apjn(tokens, probes=20)[0])
    assert statistics.mean(values) == pytest.approx(1 + (2**L - 1) / n, rel=0.03)


# ---- tokens and attention ------------------------------------------------------------------------


def test_token_statistics_of_known_tokens():
    alike, apart = torch.ones(1, 5, 8), torch.eye(5, 8)[None]
    result = probe.token_statistics(alike)
    assert 0 <= result["1-corr"] < 1e-6
    assert result["eff.rank"] == pytest.approx(1, abs=1e-5)
    assert probe.token_statistics(3 * apart) == pytest.approx({"1-corr": 1, "eff.rank": 5})
    both = probe.token_statistics(torch.cat([alike, apart]))  # the mean over images
    assert both == pytest.approx({"1-corr": 0.5, "eff.rank": 3}, abs=1e-5)


def test_rounding_makes_no_correlation_larger_than_1():
    torch.manual_seed(0)
    for token in torch.randn(50, 7, dtype=torch.float64):
        assert probe.token_statistics(token.expand(1, 5, 7))["1-corr"] >= 0


def test_token_statistics_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None]
    cosines, ranks = [], []
    for image in x:
        for a in range(4):
            for b in range(4):
                if a != b:
                    length = image[a].norm() * image[b].norm()
                    cosines.append((image[a] @ image[b] / length).item())
        shares = [
            s / sum(torch.linalg.svdvals(image).tolist())
            for s in torch.linalg.svdvals(image).tolist()
        ]
        ranks.append(math.exp(-sum(s * math.log(s) for s in shares)))
    result = probe.token_statistics(x)
    assert result["1-corr"] == pytest.approx(1 - statistics.mean(cosines))
    assert result["eff.rank"] == pytest.approx(statistics.mean(ranks))


def test_attention_statistics_by_hand():
    """own over all tokens, heads and images; kappa of Z and of X + Z, X before its LayerNorm."""
    block = scattered(Block(12, 3, 4.0, residual=True))
    X = 2 * torch.randn(3, 5, 12, dtype=torch.float64) + 1
    own, of_Z, of_X_Z = [], [], []
    for image in X:
        P, Z = attention_by_hand(block.attention, block.norm1(image))
        own += [matrix[t, t].item() for matrix in P for t in range(5)]
        of_Z.append(kappa(Z))
        of_X_Z.append(kappa(image + Z))
    result = probe.attention_statistics(block, X)
    assert result["own"] == pytest.approx(statistics.mean(own))
    assert result["k(Z)"] == pytest.approx(statistics.median(of_Z))
    assert result["k(X+Z)"] == pytest.approx(statistics.median(of_X_Z))


# ---- Jacobians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_closed_form_attention_jacobian_equals_autograd(heads):
    attention = scattered(Attention(12, heads))
    y = torch.randn(5, 12, dtype=torch.float64)
    K = autograd_jacobian(lambda y: attention_by_hand(attention, y)[1], y)
    assert (jacobians.attention_jacobian(attention, y) - K).abs().max() < 1e-12


def test_mlp_jacobian_equals_autograd():
    mlp = scattered(MLP(6, 24))
    y = torch.randn(3, 6, dtype=torch.float64)
    blocks = torch.block_diag(*jacobians.mlp_jacobians(mlp, y))
    assert (autograd_jacobian(mlp, y) - blocks).abs().max() < 1e-12


def test_products_with_the_jacobian_are_adjoint():
    """<u, K v> = <K^T u, v>, and both agree with the closed form."""
    attention = scattered(Attention(32, 4))
    y = torch.randn(9, 32, dtype=torch.float64)
    forward, adjoint = jacobians.attention_maps(attention, y, skip=1.5)
    u, v = torch.randn(2, y.numel(), dtype=torch.float64)
    assert (u @ forward(v)).item() == pytest.approx((adjoint(u) @ v).item(), rel=1e-10)
    K = jacobians.attention_jacobian(attention, y) + 1.5 * torch.eye(y.numel())
    assert (forward(v) - K @ v).abs().max() < 1e-10


def test_golub_kahan_against_a_dense_svd():
    """With skips both ends are found; without, the smallest Ritz value is only an upper bound."""
    attention = scattered(Attention(24, 3))
    y = torch.randn(8, 24, dtype=torch.float64)
    K = jacobians.attention_jacobian(attention, y)
    for skip, both_found in ((3.0, True), (0.0, False)):
        singular = torch.linalg.svdvals(K + skip * torch.eye(len(K)))
        start = torch.randn(y.numel(), dtype=torch.float64)
        maps = jacobians.attention_maps(attention, y, skip)
        ritz = jacobians.golub_kahan(*maps, start, iterations=30)
        assert len(ritz) == 30
        assert ritz.max().item() == pytest.approx(singular.max().item(), rel=1e-3)
        assert ritz.min() >= singular.min() * (1 - 1e-9)
        if both_found:
            assert ritz.min().item() == pytest.approx(singular.min().item(), rel=0.05)


def test_golub_kahan_run_to_the_end_finds_every_singular_value():
    """And stops by itself where the start's Krylov space ends: here it is all of R^6, or half."""
    torch.manual_seed(0)
    M = torch.randn(6, 6, dtype=torch.float64)
    for J, start in ((M, torch.ones(6)), (torch.block_diag(M[:3, :3], M[3:, 3:]), torch.ones(6))):
        ritz = jacobians.golub_kahan(lambda v: J @ v, lambda u: J.T @ u, start.double(), 50)  # noqa: B023
        assert torch.allclose(ritz[:6], torch.linalg.svdvals(J))
    half = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    ritz = jacobians.golub_kahan(lambda v: J @ v, lambda u: J.T @ u, half, 50)
    assert torch.allclose(ritz[:3], torch.linalg.svdvals(M[:3, :3]))
    assert jacobians.golub_kahan(lambda v: 0 * v, lambda u: 0 * u, half, 5).tolist() == [0.0]


def test_condition_number_by_one_lu_equals_the_svds():
    """Of K, ill-conditioned, of K + I, and of a singular matrix."""
    attention = scattered(Attention(24, 3))
    K = jacobians.attention_jacobian(attention, torch.randn(8, 24, dtype=torch.float64))
    for J in (K, K + torch.eye(len(K))):
        assert jacobians.square_condition_number(J) == pytest.approx(kappa(J), rel=1e-4)
    K[3] = 0
    assert jacobians.square_condition_number(K) == 1e15
    assert (
        jacobians.square_condition_number(torch.diag(torch.tensor([1.0, 1e-20]).double())) == 1e15
    )


def test_condition_numbers_end_where_rounding_begins():
    assert jacobians.condition_number(torch.tensor([[8.0, 4.0], [6.0, 2.0]])) == 4
    for smallest in (0.0, 1e-17):
        assert jacobians.condition_number(torch.tensor([1.0, smallest])) == 1e15


@pytest.mark.parametrize("residual", [True, False])
def test_conditioning_is_that_of_autograds_jacobians(residual):
    """K at the first LayerNorm's output; the MLP's at the second's, over all tokens."""
    block = scattered(Block(12, 3, 2.0, residual=residual))
    x = 2 * torch.randn(4, 12, dtype=torch.float64) + 1
    y = block.norm1(x).detach()
    attended = attention_by_hand(block.attention, y)[1].detach()
    z = block.norm2(x + attended if residual else attended).detach()
    result = jacobians.conditioning(block, x)
    for name, layer, at in (
        ("K", lambda y: attention_by_hand(block.attention, y)[1], y),
        ("MLP", block.mlp, z),
    ):
        J = autograd_jacobian(layer, at)
        assert result[f"k({name})"] == pytest.approx(kappa(J), rel=1e-4)
        assert result[f"k({name}+I)"] == pytest.approx(kappa(J + torch.eye(48)), rel=1e-4)


def test_conditioning_of_a_large_block_is_bounded_from_below(monkeypatch):
    block = scattered(Block(24, 3, 4.0, residual=False))
    x = torch.randn(20, 24, dtype=torch.float64)
    exact = jacobians.conditioning(block, x)
    assert exact["k(K)"] == pytest.approx(
        kappa(jacobians.attention_jacobian(block.attention, block.norm1(x))), rel=1e-3
    )
    monkeypatch.setattr(jacobians, "DENSE_LIMIT", 479)
    torch.manual_seed(0)
    bound = jacobians.conditioning(block, x)
    for key in exact:
        assert 1 < bound[key] <= exact[key] * 1.01
        assert bound[key] > exact[key] / 3 or key == "k(K)"
    assert bound["k(K)"] != bound["k(K+I)"]
    tokens = block.norm2(block.attention(block.norm1(x)[None])[0])[::2]
    some = torch.linalg.svdvals(jacobians.mlp_jacobians(block.mlp, tokens))
    assert bound["k(MLP)"] == pytest.approx((some.max() / some.min()).item())


# ---- one network, several seeds ------------------------------------------------------------------


def test_measure_puts_each_number_at_its_block():
    model, (images, labels) = scattered_vit(), some_images()
    torch.manual_seed(3)
    result = probe.measure(model, images.float(), labels, "bar")
    tokens = model.forward_features(images.float().double(), [0, 1, 2])
    assert result["g(W_Q)"] == pytest.approx(probe.gradient_norms(model, tokens, labels)["g(W_Q)"])
    torch.manual_seed(3)
    assert result["APJN"] == pytest.approx(probe.apjn(tokens))
    assert len(result["1-corr"]) == len(result["eff.rank"]) == 3
    for i in range(3):
        assert result["1-corr"][i] == pytest.approx(probe.token_statistics(tokens[i])["1-corr"])
    for i, block in enumerate(model.blocks):
        for key, value in probe.attention_statistics(block, tokens[i]).items():
            assert result[key][i] == pytest.approx(value)
        for key, value in jacobians.conditioning(block, tokens[i][0]).items():
            assert result[key][i] == pytest.approx(value, rel=1e-5)
        assert len(result["own"]) == 2
    shown = {*probe.GRADIENTS, *probe.STATE}
    assert set(result) == shown  # nothing is measured that is not shown


def test_measurements_are_made_in_float64():
    model = ViT(**SHAPE, residual=False, pool="mean")
    images, labels = some_images()
    result = probe.measure(model, images.float(), labels, "bar")
    assert result["1-corr"][2] < 1e-9  # where float32 leaves 1e-7
    assert next(model.parameters()).dtype == torch.float64 and not model.training


def test_medians_are_taken_number_by_number():
    runs = [
        {"a": [1.0, 9.0], "b": [5.0]},
        {"a": [2.0, 7.0], "b": [6.0]},
        {"a": [8.0, 8.0], "b": [0.0]},
    ]
    assert probe.medians(runs) == {"a": [2.0, 8.0], "b": [5.0]}


# ---- what is shown -------------------------------------------------------------------------------


def record(depth: int = 12, arm: str = "residual", shade: str = "", exact: bool = True, **changed):
    """A network's record in which every column is 1 everywhere, but for the columns changed."""
    long = ("g(tokens)", "APJN", "1-corr", "eff.rank", *probe.THEORY)
    columns = [*probe.GRADIENTS, *probe.STATE] + (probe.THEORY if arm != "skipless-paper" else [])
    numbers = {c: [1.0] * (depth + (c in long)) for c in columns} | changed
    return dict(
        group=arm, shade=shade, depth=depth, residual=arm == "residual", tokens=16, exact=exact,
        medians=numbers, runs=[numbers],
    )  # fmt: skip


def test_numbers_are_shown_to_three_digits():
    assert [probe.shown(x) for x in (0, 1, 0.0012345, 48712.3, 1e5, 3.2e-9, 12.0)] == [
        "0", "1", "0.00123", "48700", "1e+05", "3e-09", "12",
    ]  # fmt: skip
    assert probe.shown(4871.23, at_least=True) == ">=4870"
    assert probe.shown(None) == ""


def test_lower_bounds_are_marked_and_nothing_else():
    ks = {key: [2.0, 3.0] for key in jacobians.CONDITIONS} | {"k(Z)": [2.0, 1e15]}
    exact, bound = (record(depth=2, exact=e, **ks) for e in (True, False))
    assert probe.at(exact, "k(K)", 1) == "2" and probe.at(bound, "k(K)", 2) == ">=3"
    assert probe.at(bound, "own", 1) == "1" and probe.at(bound, "k(Z)", 1) == "2"
    assert probe.at(exact, "k(Z)", 2) == ">=1e+15"
    assert probe.at(bound, "k(K)", 0) == probe.at(exact, "own", 0) == ""
    tokens = record(depth=2, **{"g(tokens)": [5.0, 6.0, 7.0]})
    assert [probe.at(tokens, "g(tokens)", b) for b in range(3)] == ["5", "6", "7"]


def test_tables_show_five_places_in_a_hundred_columns(capsys):
    numbers = [float(f"{b}.5e-17") for b in range(1, 13)]
    results = {"one": record(**{"k(K)": [1e15] * 12, "g(W_Q)": numbers}), "two": record(depth=2)}
    probe.print_table("title", probe.GRADIENTS, results)
    probe.print_table("title", probe.STATE, results)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    header, *rows = [line.split() for line in lines[2:9]]
    assert header == ["block", *probe.GRADIENTS]
    assert [row[0] for row in rows] == ["one", "0", "1", "4", "8", "12"]
    assert rows[1] == ["0", "1", "1"] and rows[2][2] == "2e-17" and rows[5][2] == "1e-16"
    assert [line.split()[0] for line in lines[9:13]] == ["two", "0", "1", "2"]


def test_every_column_and_panel_is_explained(tmp_path, monkeypatch, capsys):
    done = run_here(probe.main, ["--explain"], tmp_path, monkeypatch, capsys)
    assert not done.returncode and not list(tmp_path.iterdir())
    heads = re.findall(r"^(\S.*): (\S.*)$", done.stdout, re.M)
    columns = {column for _, names in heads for column in names.split(", ")}
    assert columns >= {*probe.GRADIENTS, *probe.STATE}
    titles = " / ".join(title for title, _ in heads)
    for name in probe.PANELS:
        assert name.removeprefix("gradient by ") in titles
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_every_column_is_in_a_table_or_panel_and_gradients_come_first():
    panels = [c for columns in probe.PANELS.values() for c in columns]
    assert panels[:7] == probe.GRADIENTS[:7] and len(panels) == len(set(panels))
    assert set(panels) >= {*probe.GRADIENTS, "1-corr", "eff.rank", "own", "k(K)", "k(K+I)"}


def test_conclusions_are_about_the_worst_block():
    """A network that recovers in the middle, as ViT-S did, is not called good."""
    W_Q = [1.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1e-4, 1]
    numbers = {
        "g(W_Q)": W_Q,
        "g(tokens)": [0.5] + [1.0] * 11 + [3.0],
        "1-corr": [0.5] * 9 + [2e-7] + [0.5] * 3,
        "k(K)": [2.0] * 4 + [7e6] + [2.0] * 7,
        "k(K+I)": [2.0] * 6 + [44.0] + [2.0] * 5,
    }
    with_skips = probe.conclusion("a", record(**numbers))
    without = probe.conclusion("b", record(arm="skipless-default", exact=False, **numbers))
    for text in (with_skips, without):
        assert "by the tokens varies 6-fold, by W_Q 10000-fold, least in block 11" in text
        assert "closest after block 9, 1 - correlation 2e-07" in text
    assert with_skips.startswith("a: ") and "k(K+I) is largest in block 7, 44." in with_skips
    assert "k(K) is largest in block 5, >=7e+06." in without
    dead = record(**{"g(W_Q)": [1.0] * 11 + [0.0]})
    assert "by W_Q >=1e+08-fold, least in block 12" in probe.conclusion("c", dead)


def drawn(results: dict, monkeypatch, title: str = "title"):
    """The figure that `draw` saves."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    probe.draw(results, "path", title)
    return figures[0]


def test_the_picture(monkeypatch):
    """Gradients first; one colour an arm; dashes, and the ends of log axes, said in the figure."""
    tiny = {"g(W_K)": [1e-17, 2.0], "k(K)": [3.0, 1e15], "own": [1e-12, 0.5], "APJN": [1.0, 4.0, 2]}
    residual = record(2)
    residual["runs"] = [{**residual["medians"], "APJN": [v] * 3} for v in (1e-12, 8.0)]
    paper = record(2, "skipless-paper", **tiny)
    figure = drawn({"residual": residual, "skipless-paper": paper}, monkeypatch)
    axes = {ax.get_title(): ax for ax in figure.axes}
    assert list(axes) == list(probe.PANELS) and next(iter(axes)) == "gradient by the tokens"
    colours = pictures.ARM_COLOURS
    lines = axes["gradient by W_Q, W_K"].get_lines()
    assert [(line.get_color(), line.get_linestyle()) for line in lines] == [
        (colours["residual"], "-"), (colours["residual"], "--"),
        (colours["skipless-paper"], "-"), (colours["skipless-paper"], "--"),
    ]  # fmt: skip
    assert lines[3].get_xdata().tolist() == [1, 2]
    assert lines[3].get_ydata().tolist() == pytest.approx([1e-8, 2])
    assert axes["kappa of the attention's K, K + I"].get_lines()[2].get_ydata()[1] == 1e8
    own = axes["own-token share of the attention"]
    assert own.get_yscale() == "linear" and own.get_lines()[1].get_ydata()[0] < 1e-11
    apjn = axes["APJN"]
    assert apjn.get_yscale() == "log"
    assert [line.get_linestyle() for line in apjn.get_lines()] == ["-", "--", ":", "-"]
    assert apjn.get_lines()[3].get_xdata().tolist() == [0, 1, 2]
    assert apjn.get_lines()[3].get_ydata().tolist() == [1, 4, 2]
    band = apjn.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1e-8, 8.0))  # the seeds, within the axis
    top, bottom = figure.legends
    assert [text.get_text() for text in top.get_texts()] == ["residual", "skipless-paper"]
    assert top.get_title().get_text() == "title"
    styles = {h.get_linestyle(): h.get_label() for h in bottom.legend_handles}
    assert list(styles) == ["-", "--", ":"]
    assert "W_K" in styles["--"] and "theory" in styles["--"] and "W_Q" in styles["-"]


def test_several_depths_are_told_by_paleness_and_names_by_colour(monkeypatch):
    results = {
        f"{arm}, {depth}": record(depth, arm, f"{depth} blocks")
        for arm in ("residual", "skipless-paper") for depth in (2, 4, 6)
    }  # fmt: skip
    looks, handles = probe.looks_of(results)
    for arm in ("residual", "skipless-paper"):
        mine = [looks[f"{arm}, {depth}"] for depth in (2, 4, 6)]
        assert {look["color"] for look in mine} == {pictures.ARM_COLOURS[arm]}
        assert [look["alpha"] for look in mine] == pytest.approx([1 / 3, 2 / 3, 1])
    labels = [handle.get_label() for handle in handles]
    assert labels == ["residual", "skipless-paper", "2 blocks", "4 blocks", "6 blocks"]
    assert looks["residual, 2"]["lw"] > looks["skipless-paper, 2"]["lw"]  # seen where they coincide


def test_two_runs_of_one_arm_have_two_colours():
    names = ("cls-nano-skipless-paper-soap", "cls-nano-skipless-paper-adamw", "mine")
    looks, _ = probe.looks_of({name: record(2, name) for name in names})
    assert looks[names[0]]["color"] == pictures.ARM_COLOURS["skipless-paper"]
    assert len({look["color"] for look in looks.values()}) == 3


# ---- the command ---------------------------------------------------------------------------------

TINY = "--depths 2 --seeds 2 --images 2 --image-size 16 --patch-size 8 --out o".split()


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures drawn, which are not, to save time."""
    seen = []
    monkeypatch.setattr(probe, "draw", lambda results, path, title: seen.append(title))
    return seen


def test_a_probe_of_the_default_arms(tmp_path, monkeypatch, capsys):
    run_main(probe.main, TINY, tmp_path, monkeypatch)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.index("g(tokens)") < out.index("1-corr") < out.index("residual: over")
    arms = networks.ARMS
    assert re.findall(r"^(\S+): over the blocks", out, re.M) == arms
    with Image.open(tmp_path / "o/probe.png") as image:
        assert image.width > 1000
    saved = json.loads((tmp_path / "o/probe.json").read_text())
    assert list(saved["networks"]) == arms and saved["arguments"]["pool"] == "mean"

    images, labels, _ = draw_shapes([0, 1], 16, "val")
    shape = SHAPE | PRESETS["nano"] | dict(depth=2, num_classes=10)
    for arm, result in saved["networks"].items():
        assert len(result["runs"]) == 2 and result["residual"] == (arm == "residual")
        assert result["tokens"] == 4 and result["exact"] and result["depth"] == 2
        assert ("APJN pair" in result["medians"]) == (arm in ("residual", "skipless-default"))
        torch.manual_seed(1)
        model = networks.fresh_arm(arm, pool="mean", **shape)
        expected = probe.measure(model, normalise(images), labels, "bar")
        if arm in ("residual", "skipless-default"):
            pair, scalar = probe.theory_of(model, model.embed(normalise(images).double()))
            expected |= {"APJN pair": pair, "APJN scalar": scalar}
        assert set(result["runs"][1]) == set(expected)
        for key, values in expected.items():
            assert result["runs"][1][key] == pytest.approx(values, rel=1e-3, abs=1e-12), key
        both = [run["g(W_V)"][0] for run in result["runs"]]
        assert both[0] != both[1]
        assert result["medians"]["g(W_V)"][0] == pytest.approx(statistics.mean(both))


def test_theory_is_left_out_with_a_class_token(tmp_path, monkeypatch, capsys, titles):
    flags = [*TINY, "--pool", "cls", "--variants", "residual", "--seeds", "1"]
    run_main(probe.main, flags, tmp_path, monkeypatch)
    assert "without its theory" in capsys.readouterr().out
    saved = json.loads((tmp_path / "o/probe.json").read_text())["networks"]["residual"]
    assert "APJN pair" not in saved["medians"] and saved["tokens"] == 5
    assert (
        "nano at initialisation: 5 tokens, 2 images of Shapes; log axes end at 1e-08" in titles[0]
    )


def test_several_depths_and_a_position_embedding(tmp_path, monkeypatch, capsys, titles):
    flags = [*TINY, "--depths", "1", "3", "--variants", "residual", "--pos-embed-std", "4"]
    run_main(probe.main, [*flags, "--images", "1"], tmp_path, monkeypatch)
    saved = json.loads((tmp_path / "o/probe.json").read_text())["networks"]
    assert [saved[f"residual, {L} blocks"]["depth"] for L in (1, 3)] == [1, 3]
    # positions outweigh what all patches have in common
    assert saved["residual, 3 blocks"]["medians"]["1-corr"][0] > 0.9
    assert "median of 2 seeds" in titles[0]


def a_checkpoint(folder, seed: int = 0, **changed) -> dict:
    """Saved as a trainer does, of a network with other weights than it was born with."""
    torch.manual_seed(seed)
    model = networks.fresh_arm("skipless-paper", 0.7, 1.0, 3.0, pool="mean", **SHAPE | changed)
    args = dict(seed=seed, init="paper", alpha=0.7, beta=1.0, c=3.0)
    born = {name: p.clone() for name, p in model.state_dict().items()}
    weights = {name: 1.5 * p for name, p in born.items()}
    content = dict(script="train_cls", model_config=model.config, model=weights, args=args)
    folder.mkdir()
    files.save_checkpoint(folder / "last.pt", content)
    return dict(born=born, trained=weights, config=model.config)


def test_trained_networks_are_probed_from_their_files(image_root, tmp_path, monkeypatch, titles):
    kept = {
        name: a_checkpoint(tmp_path / name, seed) for seed, name in enumerate(("residual", "b"))
    }
    flags = ["--checkpoint", "residual/last.pt", "b/last.pt", "--before", "--images", "2"]
    run_main(probe.main, [*flags, "--data", image_root, "--out", "o"], tmp_path, monkeypatch)
    saved = json.loads((tmp_path / "o/probe.json").read_text())["networks"]
    assert list(saved) == [f"{n}, {w}" for n in kept for w in ("before training", "trained")]
    folder, (_, transform) = image_folder(image_root, "val"), augmentations(16, drawn=False)
    pairs = [folder[i] for i in (0, 15)]  # of 30, spread over the classes
    images = normalise(torch.stack([transform(image) for image, _ in pairs]))
    labels = torch.tensor([label for _, label in pairs])
    assert labels.tolist() == [0, 2]
    for name, found in kept.items():
        for when, key in (("before training", "born"), ("trained", "trained")):
            model = ViT(**found["config"])
            model.load_state_dict(found[key])
            expected = probe.measure(model, images, labels, "bar")
            result = saved[f"{name}, {when}"]["medians"]
            assert len(saved[f"{name}, {when}"]["runs"]) == 1
            assert result["g(W_Q)"] == pytest.approx(expected["g(W_Q)"])
            assert "APJN pair" not in result and result["own"] == pytest.approx(expected["own"])
    assert titles[0].startswith("trained networks: 4 tokens, 2 images of ")


def test_a_backbone_without_a_head_is_probed(tmp_path, monkeypatch, titles):
    """Its pooled feature, of as many numbers as the width, stands in for the logits."""
    kept = a_checkpoint(tmp_path / "run", num_classes=0, dim=6)
    flags = ["--checkpoint", "run/last.pt", "--images", "14", "--out", "o"]
    run_main(probe.main, flags, tmp_path, monkeypatch)
    result = json.loads((tmp_path / "o/probe.json").read_text())["networks"]["run"]["medians"]
    model = ViT(**kept["config"]).double()
    model.load_state_dict(kept["trained"])
    images, labels, _ = draw_shapes(list(range(14)), 16, "val")
    feature = model(normalise(images).double())
    F.cross_entropy(feature, labels % 6).backward()
    expected = [block.mlp.fc2.weight.grad.norm().item() for block in model.blocks]
    assert result["g(fc2)"] == pytest.approx(expected)


def test_labels_beyond_a_networks_classes_are_wrapped(tmp_path, monkeypatch, titles):
    a_checkpoint(tmp_path / "run")  # five classes, Shapes has ten
    flags = ["--checkpoint", "run/last.pt", "--images", "7", "--out", "o"]
    run_main(probe.main, flags, tmp_path, monkeypatch)
    assert (tmp_path / "o/probe.json").exists()


def test_checkpoints_in_folders_of_one_name_keep_apart(tmp_path, monkeypatch, titles):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        a_checkpoint(tmp_path / place / "run")
    flags = ["--checkpoint", "x/run/last.pt", "y/run/last.pt", "--images", "2", "--out", "o"]
    run_main(probe.main, flags, tmp_path, monkeypatch)
    saved = json.loads((tmp_path / "o/probe.json").read_text())["networks"]
    assert list(saved) == ["run", "y/run/last.pt"]


BAD_FLAGS = {
    "--variants residual plain": "invalid choice: 'plain' .*skipless-default",
    "--image-size 30": "patch size must divide image size: image 30, patch 8",
    "--image-size 8": "an image is one token",
    "--checkpoint other.pt": "was not written by this version",
    "--checkpoint .": "no such file",
    "--data nowhere": "nowhere: no such folder",
    "--seeds 0": "--seeds: must be at least 1",
    "--pos-embed-std -1": "must not be negative",
    "--pos-embed-std 1e39": "the loss of this network is nan",
    "--before": "add --checkpoint",
    "--checkpoint other.pt --depths 3": "--depths is about fresh networks",
    "--checkpoint a/last.pt b/last.pt": r"different image sizes \[16, 32\]",
    "--device tpu": "use auto, cpu, cuda",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, tmp_path, monkeypatch, capsys):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    if "a/last.pt" in flags:
        a_checkpoint(tmp_path / "a")
        a_checkpoint(tmp_path / "b", image_size=32)
    done = run_here(probe.main, flags.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])
