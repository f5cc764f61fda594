"""The probe's numbers against the same written out by hand, and how it shows them."""

import json
import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_PARTS, assert_fails_in_one_line, run_here, run_main
from PIL import Image
from torch import Tensor, nn

import jacobian_probe as probe
from beyond.arms import ARMS, fresh_arm
from minskip import MLP, PRESETS, Attention, Block, ViT
from support import pictures
from support.data import augmentations, image_folder, normalise
from support.files import save_checkpoint
from support.shapes import draw_shapes

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
    """([P of each head], output) for one image's y, (token, dim), one head at a time."""
    d_h = y.shape[1] // attention.num_heads
    q, k, v = (y @ W.weight.T + W.bias for W in (attention.W_Q, attention.W_K, attention.W_V))
    heads = [slice(h * d_h, (h + 1) * d_h) for h in range(attention.num_heads)]
    P = [(q[:, h] @ k[:, h].T / math.sqrt(d_h)).softmax(-1) for h in heads]
    mixed = torch.cat([P[i] @ v[:, h] for i, h in enumerate(heads)], dim=1)
    return P, mixed @ attention.W_O.weight.T + attention.W_O.bias


def autograd_jacobian(function, y: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, y.detach()).reshape(y.numel(), -1)


def kappa(J: Tensor) -> float:
    singular = torch.linalg.svdvals(J)
    return (singular[0] / singular[-1]).item()


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual, pool", [(True, "cls"), (False, "mean")])
def test_gradient_norms_are_those_of_backward(residual, pool):
    model, (images, labels) = scattered_vit(residual, pool), some_images()
    norms = probe.gradient_norms(model, model.forward_features(images, [0, 1, 2]), labels)

    by_hand = [model.embed(images)]
    for block in model.blocks:
        by_hand.append(block(by_hand[-1]))
    for h in by_hand:
        h.retain_grad()
    logits = model.classify(by_hand[-1])
    (sum(-logits[i].log_softmax(0)[label] for i, label in enumerate(labels)) / 3).backward()
    assert norms["g(tokens)"] == pytest.approx([h.grad.norm().item() for h in by_hand])
    for name in ("W_Q", "W_K", "W_V", "W_O", "fc1", "fc2"):
        owners = [block.mlp if "fc" in name else block.attention for block in model.blocks]
        expected = [getattr(x, name).weight.grad.square().sum().sqrt().item() for x in owners]
        assert norms[f"g({name})"] == pytest.approx(expected), name
    assert len(norms) == 7


def test_default_skipless_gradients_of_queries_vanish_while_values_do_not():
    """Why the probe shows each matrix by itself."""
    torch.manual_seed(0)
    shape = SHAPE | dict(dim=64, depth=8, num_heads=2)
    model = fresh_arm("skipless-default", pool="mean", **shape).double()
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
    dense = [autograd_jacobian(lambda y: model.blocks[0](y[None])[0], image) for image in x]
    exact = torch.stack(dense).square().sum() / (2 * 4 * 12)
    assert measured == pytest.approx(exact.item(), rel=0.05)


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
    alike, different = torch.ones(1, 5, 8), torch.eye(5, 8)[None]
    assert probe.token_statistics(3 * different) == pytest.approx({"1-corr": 1, "eff.rank": 5})
    both = probe.token_statistics(torch.cat([alike, different]))  # the mean over images
    assert both == pytest.approx({"1-corr": 0.5, "eff.rank": 3}, abs=1e-5)
    torch.manual_seed(0)
    for token in torch.randn(50, 7, dtype=torch.float64):  # rounding must not make it negative
        assert 0 <= probe.token_statistics(token.expand(1, 5, 7))["1-corr"] < 1e-6


def test_token_statistics_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None]
    cosines, ranks = [], []
    for image in x:
        pairs = [(a, b) for i, a in enumerate(image) for j, b in enumerate(image) if i != j]
        cosines += [(a @ b / (a.norm() * b.norm())).item() for a, b in pairs]
        singular = torch.linalg.svdvals(image).tolist()
        shares = [s / sum(singular) for s in singular]
        ranks.append(math.exp(-sum(s * math.log(s) for s in shares)))
    result = probe.token_statistics(x)
    assert result["1-corr"] == pytest.approx(1 - statistics.mean(cosines))
    assert result["eff.rank"] == pytest.approx(statistics.mean(ranks))


def test_attention_statistics_by_hand():
    """own over all tokens, heads and images; kappa of Z and of X + Z, X before its LayerNorm."""
    block = scattered(Block(12, 3, 4.0, residual=True))
    X = 2 * torch.randn(3, 5, 12, dtype=torch.float64) + 1
    outputs = [attention_by_hand(block.attention, block.norm1(image)) for image in X]
    own = [P.diagonal().mean().item() for heads, _ in outputs for P in heads]
    expected = {
        "own": statistics.mean(own),
        "k(Z)": statistics.median(kappa(Z) for _, Z in outputs),
        "k(X+Z)": statistics.median(kappa(x + Z) for x, (_, Z) in zip(X, outputs)),
    }
    assert probe.attention_statistics(block, X) == pytest.approx(expected)


# ---- Jacobians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_closed_form_jacobians_equal_autograds(heads):
    attention, mlp = scattered(Attention(12, heads)), scattered(MLP(12, 24))
    y = torch.randn(5, 12, dtype=torch.float64)
    K = autograd_jacobian(lambda y: attention_by_hand(attention, y)[1], y)
    assert (probe.attention_jacobian(attention, y) - K).abs().max() < 1e-12
    blocks = torch.block_diag(*probe.mlp_jacobians(mlp, y))
    assert (autograd_jacobian(mlp, y) - blocks).abs().max() < 1e-12


@pytest.mark.parametrize("residual", [True, False])
def test_kappas_to_the_output_are_those_of_autograds_jacobians(residual):
    """From each block on, and down to the last block alone."""
    model = scattered_vit(residual, "cls", depth=3, norm_affine=residual, diagonal_bias=True)
    for block in model.blocks:  # keeps tokens different, so that kappa is more than rounding
        block.attention.diagonal_bias.data += 4
    image = some_images(1)[0][0]
    result = probe.conditioning_to_output(model, image)
    for i, x in enumerate(model.forward_features(image[None], [0, 1, 2])):
        J = autograd_jacobian(nn.Sequential(*model.blocks[i:]), x)
        s = torch.linalg.svdvals(J)  # 5 tokens of width 12: 60, less two per token
        assert result["k(J)"][i] == pytest.approx((s[0] / s[49]).item(), rel=1e-6)
        assert result["k(J) half"][i] == pytest.approx((s[0] / s[29]).item(), rel=1e-6)
        assert residual or s[50] < 1e-4 * s[49]  # only what a LayerNorm drops is left out
    assert (probe.block_jacobian(model.blocks[2], x[0]) - J).abs().max() < 1e-12
    assert result["k(J)"][3:] == result["k(J) half"][3:] == [1]
    if not residual:  # rank that a block has lost does not come back
        nn.init.zeros_(model.blocks[1].mlp.fc2.weight)
        for kappas in probe.conditioning_to_output(model, image).values():
            assert kappas[:2] == [1e15, 1e15] and kappas[2] < 1e15


@pytest.mark.parametrize("skip", [3.0, 0.0])
def test_krylov_stretches_lie_between_the_singular_values(skip):
    """With a skip both ends are found; without, the smallest is only an upper bound."""
    attention = scattered(Attention(24, 3))
    y = torch.randn(8, 24, dtype=torch.float64)
    found = probe.krylov_stretches(lambda y: probe.attention_of(attention, y) + skip * y, y, 30)
    K = probe.attention_jacobian(attention, y)
    exact = torch.linalg.svdvals(K + skip * torch.eye(len(K)))
    assert len(found) == 30
    assert found.max().item() == pytest.approx(exact.max().item(), rel=1e-3)
    assert found.min() >= exact.min() * (1 - 1e-9)
    if skip:
        assert found.min().item() == pytest.approx(exact.min().item(), rel=0.05)


def test_krylov_stretches_are_all_singular_values_in_the_end():
    M, y = torch.randn(6, 6).double(), torch.zeros(6).double()
    found = probe.krylov_stretches(lambda v: M @ v, y, 6)
    assert torch.allclose(found, torch.linalg.svdvals(M))
    assert probe.condition_number(probe.krylov_stretches(lambda v: 0 * v, y, 3)) == 1e15


def test_condition_numbers_end_where_rounding_begins():
    assert probe.condition_number(torch.tensor([[8.0, 4.0], [6.0, 2.0]])) == 4
    for smallest in (0.0, 1e-17):
        assert probe.condition_number(torch.tensor([1.0, smallest])) == 1e15


@pytest.mark.parametrize("residual", [True, False])
def test_conditioning_is_that_of_autograds_jacobians(residual):
    """K at the first LayerNorm's output; the MLP's at the second's, over all tokens."""
    block = scattered(Block(12, 3, 2.0, residual=residual))
    x = 2 * torch.randn(4, 12, dtype=torch.float64) + 1
    y = block.norm1(x)
    attended = attention_by_hand(block.attention, y)[1]
    z = block.norm2(x + attended if residual else attended)
    result = probe.conditioning(block, x)
    K = autograd_jacobian(lambda y: attention_by_hand(block.attention, y)[1], y)
    for name, J in (("K", K), ("MLP", autograd_jacobian(block.mlp, z))):
        assert result[f"k({name})"] == pytest.approx(kappa(J), rel=1e-6)
        assert result[f"k({name}+I)"] == pytest.approx(kappa(J + torch.eye(48)), rel=1e-6)


def test_conditioning_of_a_large_block_is_bounded_from_below(monkeypatch):
    block = scattered(Block(24, 3, 4.0, residual=False))
    x = torch.randn(20, 24, dtype=torch.float64)
    exact = probe.conditioning(block, x)
    monkeypatch.setattr(probe, "DENSE_LIMIT", 479)
    torch.manual_seed(0)
    bound = probe.conditioning(block, x)
    for key in exact:
        assert 1 < bound[key] <= exact[key] * 1.01
        assert bound[key] > exact[key] / 3 or key == "k(K)"
    assert bound["k(K)"] != bound["k(K+I)"]
    tokens = block.norm2(block.attention(block.norm1(x)[None])[0])[::2]  # of 20, about 8
    some = torch.linalg.svdvals(probe.mlp_jacobians(block.mlp, tokens))
    assert bound["k(MLP)"] == pytest.approx((some.max() / some.min()).item())


# ---- one network, several seeds ------------------------------------------------------------------


def test_measure_puts_each_number_at_its_block():
    """In float64."""
    model, (images, labels) = scattered_vit().float().train(), some_images()
    torch.manual_seed(3)
    result = probe.measure(model, images.float(), labels, "bar")
    tokens = model.forward_features(images.float().double(), [0, 1, 2])
    assert result["g(W_Q)"] == pytest.approx(probe.gradient_norms(model, tokens, labels)["g(W_Q)"])
    torch.manual_seed(3)
    assert result["APJN"] == pytest.approx(probe.apjn(tokens))
    assert len(result["1-corr"]) == len(result["eff.rank"]) == 3 and len(result["own"]) == 2
    for i, x in enumerate(tokens):
        expected = probe.token_statistics(x)
        if i < 2:
            block = model.blocks[i]
            expected |= probe.attention_statistics(block, x) | probe.conditioning(block, x[0])
        for key, value in expected.items():
            assert result[key][i] == pytest.approx(value, rel=1e-5)
    tables = {*probe.GRADIENTS, *probe.STATE} - {"k(J)"}  # which is measured for one seed only
    assert set(result) == tables  # all that is measured is shown
    assert next(model.parameters()).dtype == torch.float64 and not model.training
    alike = probe.measure(ViT(**SHAPE, residual=False, pool="mean"), images.float(), labels, "bar")
    assert alike["1-corr"][2] < 1e-9  # where float32 leaves 1e-7


def test_medians_are_taken_number_by_number():
    runs = [{"a": [1.0, 9.0], "b": [5.0], "c": [3.0]}]  # c: measured for the first seed only
    runs += [{"a": [2.0, 7.0], "b": [6.0]}, {"a": [8.0, 8.0], "b": [0.0]}]
    assert probe.medians(runs) == {"a": [2.0, 8.0], "b": [5.0], "c": [3.0]}


# ---- tables and conclusions ----------------------------------------------------------------------


def record(depth: int = 12, arm: str = "residual", shade: str = "", exact: bool = True, **changed):
    """A network's record with 1 for each number, apart from the columns in `changed`."""
    long = ("g(tokens)", "APJN", "k(J)", "k(J) half", "1-corr", "eff.rank", *probe.THEORY)
    columns = [*probe.GRADIENTS, *probe.STATE, "k(J) half"]
    columns += probe.THEORY if arm != "skipless-paper" else []
    numbers = {c: [1.0] * (depth + (c in long)) for c in columns} | changed
    return dict(
        group=arm, shade=shade, label=f"{arm} {shade}", depth=depth, residual=arm == "residual",
        tokens=16, exact=exact, medians=numbers, runs=[numbers],
    )  # fmt: skip


def test_numbers_have_three_digits():
    texts = [probe.three_digits(x) for x in (0, 1, 0.0012345, 48712.3, 1e5, 3.2e-9, 12.0)]
    assert texts == "0 1 0.00123 48700 1e+05 3e-09 12".split()
    assert probe.three_digits(4871.23, at_least=True) == ">=4870"


def test_lower_bounds_are_marked_and_nothing_else():
    ks = {key: [2.0, 3.0] for key in probe.CONDITIONS} | {"k(Z)": [2.0, 1e15]}
    exact, bound = (record(depth=2, exact=e, **ks) for e in (True, False))
    assert probe.cell(exact, "k(K)", 1) == "2" and probe.cell(bound, "k(K)", 2) == ">=3"
    assert probe.cell(bound, "own", 1) == "1" and probe.cell(bound, "k(Z)", 1) == "2"
    assert probe.cell(exact, "k(Z)", 2) == ">=1e+15"
    assert probe.cell(bound, "k(K)", 0) == probe.cell(exact, "own", 0) == ""
    tokens = record(depth=2, **{"g(tokens)": [5.0, 6.0, 7.0]})
    assert [probe.cell(tokens, "g(tokens)", b) for b in range(3)] == ["5", "6", "7"]


def test_tables_show_five_blocks_in_a_hundred_columns(capsys):
    numbers = [float(f"{b}.5e-17") for b in range(1, 13)]
    results = {"one": record(**{"k(K)": [1e15] * 12, "g(W_Q)": numbers}), "two": record(depth=2)}
    probe.print_table("title", probe.GRADIENTS, results)
    probe.print_table("title", probe.STATE, results)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    header, *rows = [line.split() for line in lines[2:9]]
    assert header == ["block", *probe.GRADIENTS]
    assert [row[0] for row in rows] == ["one", "0", "1", "4", "8", "12"]
    assert rows[1] == ["0", "1", "1", "1"] and rows[2][2] == "2e-17" and rows[5][2] == "1e-16"
    assert [line.split()[0] for line in lines[9:13]] == ["two", "0", "1", "2"]
    for result in results.values():  # of networks that are too wide
        del result["medians"]["k(J)"]
    probe.print_table("title", probe.GRADIENTS, results)
    assert "k(J)" not in capsys.readouterr().out


def test_conclusions_are_about_the_worst_block():
    """A network that recovers after a bad block must not be called good."""
    numbers = {
        "g(W_Q)": [1.0] * 10 + [1e-4, 1.0],
        "g(tokens)": [0.5] + [1.0] * 11 + [3.0],
        "1-corr": [0.5] * 9 + [2e-7] + [0.5] * 3,
        "k(K)": [2.0] * 4 + [7e6] + [2.0] * 7,
        "k(K+I)": [2.0] * 6 + [44.0] + [2.0] * 5,
    }
    with_skips = probe.conclusion("a", record(**numbers))
    without = probe.conclusion("b", record(arm="skipless-default", exact=False, **numbers))
    for text in (with_skips, without):
        assert "to the tokens varies 6-fold, with respect to W_Q 10000-fold, smallest in" in text
        assert "in block 11. Tokens are most alike after block 9, with 1-corr 2e-07." in text
    assert with_skips.startswith("a: ") and "k(K+I) is largest in block 7: 44." in with_skips
    assert "k(K) is largest in block 5: >=7e+06." in without
    dead = record(**{"g(W_Q)": [1.0] * 11 + [0.0]})
    assert "W_Q >=1e+08-fold, smallest in block 12" in probe.conclusion("c", dead)


# ---- the picture ---------------------------------------------------------------------------------


def drawn(results: dict, monkeypatch):
    """The figure that `draw` would save."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    probe.draw(results, "path", "title")
    return figures[0]


def lines_of(ax) -> list[tuple]:
    """(colour, line style, marker) of the lines of a panel or legend, in order."""
    return [(x.get_color(), x.get_linestyle(), x.get_marker()) for x in ax.get_lines()]


BLUE, GREEN = pictures.ARM_COLOURS["residual"], pictures.ARM_COLOURS["skipless-paper"]


def test_every_panel_shows_its_columns_against_the_blocks(monkeypatch):
    """All numbers differ, so no panel, axis or column can stand in for another; nor can the seeds'
    stand in for the medians."""
    numbers = record(2)["medians"]
    for i, (column, values) in enumerate(numbers.items(), start=1):
        numbers[column] = [0.01 * i + 0.002 * b for b in range(len(values))]
    seeds = [{column: [9.0] * len(values) for column, values in numbers.items()}]
    figure = drawn({"a": record(2) | dict(medians=numbers, runs=seeds)}, monkeypatch)
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == list(probe.PANELS)
    assert next(iter(panels)) == "gradient with respect to the tokens"
    for title, columns in probe.PANELS.items():
        lines = panels[title].get_lines()
        expected = columns + (probe.THEORY if columns == ["APJN"] else [])
        for line, column in zip(lines, expected, strict=True):
            values = numbers[column]
            assert list(line.get_ydata()) == pytest.approx(values), (title, column)
            assert list(line.get_xdata()) == list(range(3 - len(values), 3)), (title, column)
        assert panels[title].get_yscale() == ("linear" if columns == ["own"] else "log")
        assert panels[title].get_xscale() == "linear"
        if len(columns) == 2 and "half" not in columns[1]:  # the title says which is dashed
            assert title.endswith(columns[1][2:-1].replace("+", " + ") + " (dashed)")
    shown = {column for columns in probe.PANELS.values() for column in columns}
    assert shown >= {*probe.GRADIENTS, "k(J) half", "1-corr", "own", "k(K)", "k(K+I)"}


def test_the_picture_s_colours_ends_bounds_and_legends(monkeypatch):
    """One colour per arm. Dashes are the second of two quantities and nothing else; triangles mark
    lower bounds; theory is points; the axes' ends say that values beyond them are drawn there."""
    tiny = {"g(W_K)": [1e-17, 2.0], "k(K)": [3.0, 1e15], "own": [1e-12, 0.5], "APJN": [1.0, 4.0, 2]}
    residual, paper = record(2), record(2, "skipless-paper", **tiny)
    residual["runs"] = [{**residual["medians"], "APJN": [v] * 3} for v in (1e-12, 8.0)]
    figure = drawn({"residual": residual, "skipless-paper": paper}, monkeypatch)
    axes = {ax.get_title(): ax for ax in figure.axes}
    of_W = axes["gradient with respect to W_Q, W_K (dashed)"]
    solid = [(BLUE, "-", "None"), (GREEN, "-", "None")]
    assert lines_of(of_W) == [*solid, (BLUE, "--", "None"), (GREEN, "--", "None")]
    assert list(of_W.get_lines()[3].get_ydata()) == pytest.approx([1e-8, 2])
    figure.canvas.draw()
    assert "≤$10^{-8}$" in [text.get_text() for text in of_W.get_yticklabels()]
    of_K = axes["kappa of the attention's K, K + I (dashed)"]
    assert "≥$10^{15}$" in [text.get_text() for text in of_K.get_yticklabels()]
    assert of_K.get_lines()[1].get_marker() == "^" and of_K.get_lines()[1].get_markevery() == [1]
    assert {line.get_marker() for line in of_K.get_lines()} == {"None", "^"}
    own = axes["attention of a token to itself"]
    assert own.get_lines()[1].get_ydata()[0] < 1e-11 and own.get_ylim() == (0, 1)
    apjn = axes["APJN (theory: dots; scalar form: crosses)"]
    assert lines_of(apjn) == [*solid, (BLUE, "None", "o"), (BLUE, "None", "x")]
    band = apjn.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1e-8, 8.0))  # the seeds, within the axis
    top, bottom = figure.legends
    assert [text.get_text() for text in top.get_texts()] == ["residual ", "skipless-paper "]
    assert lines_of(top) == solid and top.get_title().get_text() == "title"
    notes = {h.get_label(): h for h in bottom.legend_handles}
    assert list(notes) == ["at least this value", "range of the seeds"]
    assert notes["at least this value"].get_marker() == "^"


def test_panels_without_numbers_are_left_out_and_bounds_of_wide_networks_marked(monkeypatch):
    wide = record(2, exact=False)
    del wide["medians"]["k(J)"], wide["medians"]["k(J) half"]
    figure = drawn({"residual": wide}, monkeypatch)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [title for title in probe.PANELS if "kappa of J" not in title]
    assert all(ax.get_lines() for ax in figure.axes)
    marked = [any(m == "^" for _, _, m in lines_of(ax)) for ax in figure.axes]
    assert marked == ["k(K)" in probe.PANELS[title] for title in titles]


def test_depths_differ_by_paleness_and_runs_by_colour(monkeypatch):
    results = {
        f"{arm}, {depth}": record(depth, arm, f"{depth} blocks")
        for arm in ("residual", "skipless-paper") for depth in (2, 4, 6)
    }  # fmt: skip
    looks = probe.network_looks(results)
    for arm in ("residual", "skipless-paper"):
        mine = [looks[f"{arm}, {depth}"] for depth in (2, 4, 6)]
        assert {look["color"] for look in mine} == {pictures.ARM_COLOURS[arm]}
        assert [look["alpha"] for look in mine] == pytest.approx([1 / 3, 2 / 3, 1])
    top = drawn(results, monkeypatch).legends[0]
    assert [text.get_text() for text in top.get_texts()] == [r["label"] for r in results.values()]
    assert [line.get_alpha() for line in top.get_lines()] == [x["alpha"] for x in looks.values()]
    assert looks["residual, 2"]["lw"] > looks["skipless-paper, 2"]["lw"]  # both show if they meet
    names = ("cls-nano-skipless-paper-soap", "cls-nano-skipless-paper-adamw", "mine")
    looks = probe.network_looks({name: record(2, name) for name in names})  # two runs of one arm
    assert looks[names[0]]["color"] == pictures.ARM_COLOURS["skipless-paper"]
    assert len({look["color"] for look in looks.values()}) == 3


# ---- the command ---------------------------------------------------------------------------------

TINY = "--depths 2 --seeds 2 --images 2 --image-size 16 --patch-size 8".split()


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures, which are not drawn, to save time."""
    seen = []
    monkeypatch.setattr(probe, "draw", lambda results, path, title: seen.append(title))
    return seen


def probed(flags: list, tmp_path, monkeypatch) -> dict:
    """The probe.json that the command writes with these flags."""
    run_main(probe.main, [*flags, "--out", "o"], tmp_path, monkeypatch)
    return json.loads((tmp_path / "o/probe.json").read_text())["networks"]


def test_a_probe_of_the_default_arms(tmp_path, monkeypatch, capsys):
    saved, out = probed(TINY, tmp_path, monkeypatch), capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.index("g(tokens)") < out.index("1-corr") < out.index("residual: across")
    arms = ARMS
    assert re.findall(r"^(\S+): across the blocks", out, re.M) == arms
    with Image.open(tmp_path / "o/probe.png") as image:
        assert image.width > 1000
    assert list(saved) == arms

    images, labels, _ = draw_shapes([0, 1], 16, "val")
    images, shape = normalise(images), SHAPE | PRESETS["nano"] | dict(depth=2, num_classes=10)
    for arm, result in saved.items():
        assert len(result["runs"]) == 2 and result["residual"] == (arm == "residual")
        assert result["tokens"] == 4 and result["exact"] and result["depth"] == 2
        assert ("APJN pair" in result["medians"]) == (arm in ("residual", "skipless-default"))
        for seed, run in enumerate(result["runs"]):
            torch.manual_seed(seed)
            model = fresh_arm(arm, pool="mean", **shape)
            expected = probe.measure(model, images, labels, "bar")
            if arm in ("residual", "skipless-default"):
                theory = probe.theory_of(model, model.embed(images.double()))
                expected |= dict(zip(("APJN pair", "APJN scalar"), theory))
            if seed == 0:
                expected |= probe.conditioning_to_output(model, images[0].double())
            assert set(run) == set(expected)
            for key, values in expected.items():
                assert run[key] == pytest.approx(values, rel=1e-3, abs=1e-12), key
        both = [run["g(W_V)"][0] for run in result["runs"]]
        assert both[0] != both[1]
        assert result["medians"]["g(W_V)"][0] == pytest.approx(statistics.mean(both))
        assert result["medians"]["k(J)"] == result["runs"][0]["k(J)"]


def test_theory_and_dense_jacobians_are_left_out(tmp_path, monkeypatch, capsys, titles):
    """With a class token; of networks that are too wide."""
    monkeypatch.setattr(probe, "DENSE_LIMIT", 319)
    flags = [*TINY, "--pool", "cls", "--variants", "residual", "--seeds", "1"]
    result = probed(flags, tmp_path, monkeypatch)["residual"]
    assert "k(J)" not in capsys.readouterr().out
    assert "APJN pair" not in result["medians"] and result["tokens"] == 5
    assert "k(J)" not in result["medians"] and not result["exact"]
    assert titles == ["nano at initialisation: 5 tokens, 2 images of Shapes"]


def test_several_depths_and_a_position_embedding(tmp_path, monkeypatch, titles):
    flags = [*TINY, "--depths", "1", "3", "--variants", "residual", "--pos-embed-std", "4"]
    saved = probed([*flags, "--images", "1"], tmp_path, monkeypatch)
    assert [saved[f"residual, {L} blocks"]["depth"] for L in (1, 3)] == [1, 3]
    # positions outweigh what all patches have in common
    assert saved["residual, 3 blocks"]["medians"]["1-corr"][0] > 0.9
    assert titles[0].endswith(", median of 2 seeds")


def a_checkpoint(folder, seed: int = 0, **changed) -> dict:
    """Saved as a trainer does; the weights differ from those before training."""
    torch.manual_seed(seed)
    model = fresh_arm("skipless-paper", 0.7, 1.0, 3.0, pool="mean", **SHAPE | changed)
    args = dict(seed=seed, init="paper", alpha=0.7, beta=1.0, c=3.0)
    born = {name: p.clone() for name, p in model.state_dict().items()}
    weights = {name: 1.5 * p for name, p in born.items()}
    content = dict(script="train_cls", model_config=model.config, model=weights, args=args)
    content |= dict(classes=[], epoch=1, **OTHER_PARTS)
    folder.mkdir(parents=True)
    save_checkpoint(folder / "last.pt", content)
    return {"before training": born, "trained": weights, "config": model.config}


def test_trained_networks_are_probed_from_their_files(image_root, tmp_path, monkeypatch, titles):
    kept = {name: a_checkpoint(tmp_path / name, seed) for seed, name in ((0, "residual"), (1, "b"))}
    flags = ["--checkpoint", "residual/last.pt", "b/last.pt", "--before", "--images", "2"]
    saved = probed([*flags, "--data", image_root], tmp_path, monkeypatch)
    assert list(saved) == [f"{n}, {w}" for n in kept for w in ("before training", "trained")]
    folder, (_, transform) = image_folder(image_root, "val"), augmentations(16, drawn=False)
    pairs = [folder[i] for i in (0, 15)]  # of 30, spread over the classes
    images = normalise(torch.stack([transform(image) for image, _ in pairs]))
    labels = torch.tensor([label for _, label in pairs])
    assert labels.tolist() == [0, 2]
    for name, result in saved.items():
        name, when = name.split(", ")
        model = ViT(**kept[name]["config"])
        model.load_state_dict(kept[name][when])
        expected = probe.measure(model, images, labels, "bar")
        numbers = result["medians"]
        assert len(result["runs"]) == 1 and "APJN pair" not in numbers
        for key in ("g(W_Q)", "own"):
            assert numbers[key] == pytest.approx(expected[key])
    assert [r["label"] for r in saved.values()] == list(saved)  # nothing here can be shortened
    assert titles[0].startswith("trained networks: 4 tokens, 2 images of ")


def test_a_backbone_without_a_head_is_probed(tmp_path, monkeypatch, titles):
    """Its pooled feature, of as many numbers as the width, stands in for the logits."""
    kept = a_checkpoint(tmp_path / "run", num_classes=0, dim=6)
    flags = ["--checkpoint", "run/last.pt", "--images", "14"]
    result = probed(flags, tmp_path, monkeypatch)["run"]["medians"]
    model = ViT(**kept["config"]).double()
    model.load_state_dict(kept["trained"])
    images, labels, _ = draw_shapes(list(range(14)), 16, "val")
    F.cross_entropy(model(normalise(images).double()), labels % 6).backward()
    expected = [block.mlp.fc2.weight.grad.norm().item() for block in model.blocks]
    assert result["g(fc2)"] == pytest.approx(expected)


def test_names_of_trained_networks(tmp_path, monkeypatch, titles):
    """Folders of the same name stay different networks; the legend shows what differs. Labels
    beyond a network's classes are wrapped: five classes, Shapes has ten."""
    for name in ("x/nano-a-soap", "y/nano-a-soap", "y/nano-b-soap"):
        a_checkpoint(tmp_path / name)

    def labels(*names: str) -> dict[str, str]:
        flags = ["--checkpoint", *(f"{name}/last.pt" for name in names), "--images", "7"]
        saved = probed(flags, tmp_path, monkeypatch)
        return {name: result["label"] for name, result in saved.items()}

    alike = labels("x/nano-a-soap", "y/nano-a-soap")
    assert list(alike) == ["nano-a-soap", "y/nano-a-soap/last.pt"]
    assert len(set(alike.values())) == 2
    different = labels("x/nano-a-soap", "y/nano-b-soap")
    assert different == {"nano-a-soap": "a", "nano-b-soap": "b"}


BAD_FLAGS = {
    "--variants residual plain": "plain is no arm: .*skipless-default",
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
