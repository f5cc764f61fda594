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
from pytest import approx
from torch import Tensor, nn

import jacobian_probe as probe
from beyond.arms import ARMS, fresh_arm
from beyond.variants import vary_
from minskip import PRESETS, Attention, Block, ViT
from support.data import augmentations, image_folder, normalise
from support.files import save_checkpoint
from support.pictures import ARM_COLOURS
from support.shapes import draw_shapes

SHAPE = dict(image_size=16, patch_size=8, num_classes=5, dim=12, depth=2, num_heads=3)


def scattered(module: nn.Module) -> nn.Module:
    """float64, every parameter random, biases too, large enough for uneven attention."""
    torch.manual_seed(0)
    for p in module.double().parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.5)
    return module


def some_images(number: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    images, labels, _ = draw_shapes(list(range(number)), 16, "val")
    return normalise(images).double(), labels % classes


def autograd_jacobian(function, y: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, y.detach()).reshape(y.numel(), -1)


# ---- one network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("residual, pool", [(True, "cls"), (False, "mean"), ("mlp", "mean")])
def test_every_number_is_the_one_written_out_by_hand(residual, pool):
    """In float64, and at its block."""
    model = scattered(ViT(**SHAPE, residual=residual, pool=pool)).float().train()
    images, labels = some_images(3)
    torch.manual_seed(3)
    measured = probe.measure(model, images.float(), labels, "bar")
    assert next(model.parameters()).dtype == torch.float64 and not model.training

    h = [model.embed(images.float().double())]
    for block in model.blocks:
        h.append(block(h[-1]))
    for x in h:
        x.retain_grad()
    log_p = model.classify(h[-1]).log_softmax(1)
    (-sum(row[label] for row, label in zip(log_p, labels)) / 3).backward(retain_graph=True)
    expected = {"g(tokens)": [x.grad.norm().item() for x in h]}
    for name in ("W_Q", "W_K", "W_V", "W_O", "fc1", "fc2"):
        owners = [block.mlp if "fc" in name else block.attention for block in model.blocks]
        expected[f"g({name})"] = [getattr(x, name).weight.grad.norm().item() for x in owners]
    torch.manual_seed(3)
    expected |= {"APJN": probe.apjn(h)} | {column: [] for column in probe.STATE}
    for x in h:
        cosines = F.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
        pairs = ~torch.eye(x.shape[1], dtype=bool)  # of two different tokens
        expected["1-corr"].append(1 - cosines[:, pairs].mean().item())
        p = [s / s.sum() for s in torch.linalg.svdvals(x.detach())]
        expected["eff.rank"].append(statistics.mean(math.exp(-(s * s.log()).sum()) for s in p))
    for block, X in zip(model.blocks, h):
        y = block.norm1(X)
        Z, P = block.attention(y), block.attention.weights(y)
        expected["own"].append(statistics.mean(p.trace().item() / len(p) for p in P.flatten(0, 1)))
        expected["k(Z)"].append(statistics.median(torch.linalg.cond(Z).tolist()))
        expected["k(X+Z)"].append(statistics.median(torch.linalg.cond(X + Z).tolist()))
        K = autograd_jacobian(block.attention, y[:1])
        M = autograd_jacobian(block.mlp, block.norm2(X[0] + Z[0] if residual is True else Z[0]))
        for J, name in ((K, "K"), (M, "MLP")):
            expected[f"k({name})"].append(torch.linalg.cond(J).item())
            expected[f"k({name}+I)"].append(torch.linalg.cond(J + torch.eye(len(J))).item())
    assert set(measured) == {*probe.GRADIENTS, *probe.STATE} - {"k(J)"}  # all of it is shown
    for column, values in measured.items():
        assert values == approx(expected[column], rel=1e-3), column


def test_equal_tokens_differ_by_nothing_up_to_rounding():
    for token in torch.randn(50, 7, dtype=torch.float64):
        alike = probe.token_statistics(token.expand(1, 5, 7))
        assert 0 <= alike["1-corr"] < 1e-6 and alike["eff.rank"] == approx(1, abs=1e-5)


def test_apjn_of_scalings_is_exact():
    """h^{l+1} = a_l h^l: J^{L,l} is the product of later a^2, whatever the random signs."""
    tokens = [torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)]
    for a in (2.0, 0.5, 3.0):
        tokens.append(a * tokens[-1])
    assert probe.apjn(tokens) == approx([9.0, 2.25, 9.0, 1.0])


# ---- Jacobians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False, "attention", "mlp", "decreasing"])
def test_kappas_to_the_output_are_those_of_autograds_jacobians(residual):
    """From each block on, and down to the last block alone."""
    shape = SHAPE | dict(depth=3, norm_affine=residual is not False, diagonal_bias=True)
    if residual == "decreasing":
        shape |= dict(diagonal_bias=False)
        model = scattered(vary_(ViT(**shape), shortcut=residual))
    else:
        model = scattered(ViT(**shape, residual=residual))
    for block in model.blocks:  # keeps tokens different, so that kappa is more than rounding
        if block.attention.diagonal_bias is not None:
            block.attention.diagonal_bias.data += 4
    image = some_images(1)[0][0]
    result = probe.conditioning_to_output(model, image)
    for i, x in enumerate(model.forward_features(image[None], [0, 1, 2])):
        J = autograd_jacobian(nn.Sequential(*model.blocks[i:]), x)
        s = torch.linalg.svdvals(J)  # 5 tokens of width 12: 60, less two per token
        assert result["k(J)"][i] == approx((s[0] / s[49]).item(), rel=1e-6)
        assert result["k(J) half"][i] == approx((s[0] / s[29]).item(), rel=1e-6)
        if residual in (False, "attention"):  # only what a LayerNorm drops is left out
            assert s[50] < 1e-4 * s[49]
    assert (probe.block_jacobian(model.blocks[2], x[0]) - J).abs().max() < 1e-12
    assert result["k(J)"][3:] == result["k(J) half"][3:] == [1]
    if residual is False:  # rank that a block has lost does not come back
        nn.init.zeros_(model.blocks[1].mlp.fc2.weight)
        for kappas in probe.conditioning_to_output(model, image).values():
            assert kappas[:2] == [1e15, 1e15] and kappas[2] < 1e15
    assert probe.condition_number(torch.tensor([1.0, 1e-17])) == 1e15  # as beyond is rounding


@pytest.mark.parametrize("skip", [3.0, 0.0])
def test_krylov_stretches_lie_between_the_singular_values(skip):
    """With a skip both ends are found; without, the smallest is only an upper bound."""
    attention, y = scattered(Attention(24, 3)), torch.randn(8, 24, dtype=torch.float64)
    found = probe.krylov_stretches(lambda y: probe.attention_of(attention, y) + skip * y, y, 30)
    K = probe.attention_jacobian(attention, y)
    exact = torch.linalg.svdvals(K + skip * torch.eye(len(K)))
    assert len(found) == 30 and found.min() >= exact.min() * (1 - 1e-9)
    assert found.max().item() == approx(exact.max().item(), rel=1e-3)
    assert not skip or found.min().item() == approx(exact.min().item(), rel=0.05)
    M = K[:6, :6]  # after as many steps as M has rows: all of them
    all_of_M = probe.krylov_stretches(lambda v: M @ v, torch.zeros_like(M[0]), 6)
    assert torch.allclose(all_of_M, torch.linalg.svdvals(M))


def test_conditioning_of_a_large_block_is_bounded_from_below(monkeypatch):
    block, x = scattered(Block(24, 3, 4.0, residual=False)), torch.randn(20, 24).double()
    exact = probe.conditioning(block, x)
    monkeypatch.setattr(probe, "DENSE_LIMIT", 479)
    bound = probe.conditioning(block, x)
    for key, most in exact.items():
        assert 1 < bound[key] <= most * 1.01
        assert bound[key] > most / 3 or key == "k(K)"
    assert bound["k(K)"] != bound["k(K+I)"]
    z = block.norm2(block.attention(block.norm1(x)[None])[0])[::2]  # of 20 tokens, about 8
    singular = torch.linalg.svdvals(probe.mlp_jacobians(block.mlp, z))
    assert bound["k(MLP)"] == approx((singular.max() / singular.min()).item())


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


def test_tables_show_five_blocks_and_mark_lower_bounds(capsys):
    texts = [probe.three_digits(x) for x in (0, 1, 0.0012345, 48712.3, 1e5, 3.2e-9, 12.0)]
    assert texts == "0 1 0.00123 48700 1e+05 3e-09 12".split()
    tiny = [float(f"{b}.4e-17") for b in range(1, 13)]
    changed = {"k(K)": [1e15] * 11 + [3.0], "g(W_Q)": tiny, "1-corr": [5.0] + [1.0] * 12}
    results = {"one": record(exact=False, **changed), "two": record(2, **{"k(Z)": [2.0, 1e15]})}
    probe.print_table("title", probe.STATE, results)
    probe.print_table("title", probe.GRADIENTS, results)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines]
    state, gradients = rows[2:13], rows[15:]
    assert state[0] == ["block", *probe.STATE] and gradients[0] == ["block", *probe.GRADIENTS]
    for table in (state, gradients):
        assert [row[0] for row in table[1:]] == "one 0 1 4 8 12 two 0 1 2".split()
    assert gradients[2] == ["0", "1", "1", "1"]  # what has a number before block 1
    assert [row[2] for row in gradients[3:7]] == ["1e-17", "4e-17", "8e-17", "1e-16"]
    assert state[2] == ["0", "5", "1"] and state[3][4] == ">=1e+15"
    assert state[6] == "12 1 1 1 >=3 >=1 >=1 >=1 1 1".split()
    assert state[9:] == ["1 1 1 1 1 1 1 1 2 1".split(), "2 1 1 1 1 1 1 1 >=1e+15 1".split()]


def test_conclusions_are_about_the_worst_block():
    """A network that recovers after a bad block must not be called good."""
    numbers = {
        "g(W_Q)": [1.0] * 10 + [1e-4, 1.0],
        "g(tokens)": [0.5] + [1.0] * 11 + [3.0],
        "1-corr": [0.5] * 9 + [2e-7] + [0.5] * 3,
        "k(K)": [2.0] * 4 + [7e6] + [2.0] * 7,
        "k(K+I)": [2.0] * 6 + [44.0] + [2.0] * 5,
    }
    worst = {"residual": "k(K+I) is largest in block 7: 44."}
    worst |= {"skipless-default": "k(K) is largest in block 5: >=7e+06."}
    for arm, ending in worst.items():
        result = record(12, arm, exact=arm == "residual", **numbers)
        assert probe.conclusion(arm, result) == (
            f"{arm}: across the blocks the gradient with respect to the tokens varies 6-fold, with "
            "respect to W_Q 10000-fold, smallest in block 11. Tokens are most alike after block 9, "
            f"with 1-corr 2e-07. {ending}"
        )
    dead = record(**{"g(W_Q)": [1.0] * 11 + [0.0]})
    assert "W_Q >=1e+08-fold, smallest in block 12" in probe.conclusion("c", dead)


# ---- the picture ---------------------------------------------------------------------------------

BLUE, GREEN = ARM_COLOURS["residual"], ARM_COLOURS["skipless-paper"]


@pytest.fixture
def drawn(monkeypatch):
    """results -> the figure that `draw` would save."""
    figures = []
    monkeypatch.setattr(probe, "save_figure", lambda figure, path: figures.append(figure))
    return lambda results: probe.draw(results, "path", "title") or figures[-1]


def lines_of(ax) -> list[tuple]:
    """(colour, line style, marker) of the lines of a panel or legend, in order."""
    return [(x.get_color(), x.get_linestyle(), x.get_marker()) for x in ax.get_lines()]


def test_every_panel_shows_its_columns_against_the_blocks(drawn):
    """All numbers differ, so no panel, axis or column can stand in for another; nor can the seeds'
    stand in for the medians."""
    numbers = record(2)["medians"]
    for i, (column, values) in enumerate(numbers.items(), start=1):
        numbers[column] = [0.01 * i + 0.002 * b for b in range(len(values))]
    seeds = [{column: [9.0] * len(values) for column, values in numbers.items()}]
    panels = drawn({"a": record(2) | dict(medians=numbers, runs=seeds)}).axes
    assert panels[0].get_title() == "gradient with respect to the tokens"
    for ax, (title, columns) in zip(panels, probe.PANELS.items(), strict=True):
        assert ax.get_title() == title
        for line, column in zip(ax.get_lines(), columns, strict=True):
            values = numbers[column]
            assert list(line.get_ydata()) == approx(values), (title, column)
            assert list(line.get_xdata()) == list(range(3 - len(values), 3)), (title, column)
        assert ax.get_yscale() == ("linear" if columns == ["own"] else "log")
        assert ax.get_xscale() == "linear"
        if len(columns) == 2 and "half" not in columns[1]:  # the title says which is dashed
            assert title.endswith(columns[1][2:-1].replace("+", " + ") + " (dashed)")
    shown = {column for columns in probe.PANELS.values() for column in columns}
    assert shown >= {*probe.GRADIENTS, *probe.THEORY, "k(J) half", "1-corr", "own", "k(K)"}


def test_the_picture_s_colours_ends_bounds_and_legends(drawn):
    """One colour per arm. Dashes are the second of two quantities and nothing else; triangles mark
    lower bounds; theory is points; the axes' ends say that values beyond them are drawn there."""
    tiny = {"g(W_K)": [1e-17, 2.0], "k(K)": [3.0, 1e15], "own": [1e-12, 0.5]}
    residual, paper = record(2), record(2, "skipless-paper", **tiny)
    residual["runs"] = [{**residual["medians"], "APJN": [v] * 3} for v in (1e-12, 8.0)]
    figure = drawn({"residual": residual, "skipless-paper": paper})
    figure.canvas.draw()
    _, of_W, _, _, _, own, of_K, _, apjn = figure.axes
    solid = [(BLUE, "-", "None"), (GREEN, "-", "None")]
    assert lines_of(of_W) == [*solid, (BLUE, "--", "None"), (GREEN, "--", "None")]
    assert list(of_W.get_lines()[3].get_ydata()) == approx([1e-8, 2])
    assert "≤$10^{-8}$" in [text.get_text() for text in of_W.get_yticklabels()]
    assert "≥$10^{15}$" in [text.get_text() for text in of_K.get_yticklabels()]
    assert [marker for _, _, marker in lines_of(of_K)] == ["None", "^", "None", "None"]
    assert of_K.get_lines()[1].get_markevery() == [1]
    assert own.get_lines()[1].get_ydata()[0] < 1e-11 and own.get_ylim() == (0, 1)
    assert lines_of(apjn) == [*solid, (BLUE, "None", "o"), (BLUE, "None", "x")]
    band = apjn.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == approx((1e-8, 8.0))  # the seeds, within the axis
    top, bottom = figure.legends
    assert [text.get_text() for text in top.get_texts()] == ["residual ", "skipless-paper "]
    assert lines_of(top) == solid and top.get_title().get_text() == "title"
    notes = [(h.get_label(), h.get_marker()) for h in bottom.legend_handles[:1]]
    assert notes == [("at least this value", "^")]
    assert bottom.get_texts()[1].get_text() == "range of the seeds"


def test_panels_without_numbers_are_left_out_and_bounds_of_wide_networks_marked(drawn):
    wide = record(2, "skipless-paper", exact=False)  # has no theory
    del wide["medians"]["k(J)"], wide["medians"]["k(J) half"]
    figure = drawn({"residual": wide})
    titles = [title for title in probe.PANELS if "kappa of J" not in title]
    assert [ax.get_title() for ax in figure.axes] == [*titles[:-1], "APJN"]
    assert len(figure.legends[1].get_texts()) == 1  # one seed has no range
    for ax, title in zip(figure.axes, titles):
        marked = {marker == "^" for _, _, marker in lines_of(ax)}
        assert marked == {"k(K)" in probe.PANELS[title]}, title


def test_depths_differ_by_paleness_and_runs_by_colour(drawn):
    arms, depths = ("residual", "skipless-paper"), (2, 4, 6)
    results = {f"{a}, {L}": record(L, a, f"{L} blocks") for a in arms for L in depths}
    figure = drawn(results)
    for lines in (figure.axes[0].get_lines(), figure.legends[0].get_lines()):
        assert [line.get_color() for line in lines] == 3 * [BLUE] + 3 * [GREEN]
        assert [line.get_alpha() for line in lines] == approx(2 * [1 / 3, 2 / 3, 1])
        assert lines[0].get_linewidth() > lines[3].get_linewidth()  # both show if they meet
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [result["label"] for result in results.values()]
    names = ("cls-nano-skipless-paper-soap", "cls-nano-skipless-paper-adamw", "mine")
    lines = drawn({name: record(2, name) for name in names}).axes[0].get_lines()
    assert lines[0].get_color() == GREEN  # two runs of one arm
    assert len({line.get_color() for line in lines}) == 3


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """flags -> the networks in the probe.json that the command writes."""

    def run(*flags) -> dict:
        run_main(probe.main, [*flags, "--out", "o"], tmp_path, monkeypatch)
        return json.loads((tmp_path / "o/probe.json").read_text())["networks"]

    return run


@pytest.fixture
def titles(monkeypatch):
    """The titles of the pictures, which are not drawn, to save time."""
    seen = []
    monkeypatch.setattr(probe, "draw", lambda results, path, title: seen.append(title))
    return seen


TINY = "--image-size 16 --patch-size 8".split()


def test_a_probe_of_the_default_arms(probed, tmp_path, capsys):
    saved, out = probed(*TINY, *"--depths 2 --images 2 --seeds 3".split()), capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert out.index("g(tokens)") < out.index("1-corr") < out.index("residual: across")
    assert re.findall(r"^(\S+): across the blocks", out, re.M) == list(saved) == ARMS
    assert Image.open(tmp_path / "o/probe.png").width > 1000

    images, labels = some_images(2, classes=10)
    shape = SHAPE | PRESETS["nano"] | dict(depth=2, num_classes=10, pool="mean")
    for arm, result in saved.items():
        sizes = dict(tokens=4, exact=True, depth=2, residual=arm == "residual")
        assert {key: result[key] for key in sizes} == sizes and len(result["runs"]) == 3
        for seed, run in enumerate(result["runs"]):
            torch.manual_seed(seed)
            model = fresh_arm(arm, **shape)
            expected = probe.measure(model, images, labels, "bar")
            if arm in ("residual", "skipless-default"):
                expected |= dict(zip(probe.THEORY, probe.theory_of(model, model.embed(images))))
            if seed == 0:
                expected |= probe.conditioning_to_output(model, images[0])
            assert run == {key: approx(x, rel=1e-3, abs=1e-12) for key, x in expected.items()}
        assert result["medians"]["k(J)"] == result["runs"][0]["k(J)"]
        of_seeds = zip(*(run["g(tokens)"] for run in result["runs"]))
        assert result["medians"]["g(tokens)"] == [sorted(values)[1] for values in of_seeds]


def test_depths_position_embedding_and_what_is_left_out(probed, monkeypatch, capsys, titles):
    """The theory with a class token, J of networks that are too wide."""
    monkeypatch.setattr(probe, "DENSE_LIMIT", 319)
    flags = "--depths 1 3 --variants residual --pool cls --pos-embed-std 4 --images 1 --seeds 2"
    saved = probed(*TINY, *flags.split())
    assert "k(J)" not in capsys.readouterr().out
    assert list(saved) == ["residual, 1 blocks", "residual, 3 blocks"]
    for depth, result in zip((1, 3), saved.values()):
        assert not {"APJN pair", "k(J)"} & set(result["medians"])
        assert (result["depth"], result["tokens"], result["exact"]) == (depth, 5, False)
        # positions outweigh what all patches have in common
        assert result["medians"]["1-corr"][0] > 0.9
    assert titles == ["nano at initialisation: 5 tokens, 1 images of Shapes, median of 2 seeds"]


def a_checkpoint(folder, seed: int = 0, **changed) -> dict:
    """Saved as a trainer does; the weights differ from those before training."""
    torch.manual_seed(seed)
    model = fresh_arm("skipless-paper", 0.7, 1.0, 3.0, pool="mean", **SHAPE | changed)
    args = dict(seed=seed, init="paper", alpha=0.7, beta=1.0, c=3.0)
    born = {name: p.clone() for name, p in model.state_dict().items()}
    weights = {name: 1.5 * p for name, p in born.items()}
    content = dict(script="train_cls", model_config=model.config, model=weights, args=args)
    folder.mkdir(parents=True)
    save_checkpoint(folder / "last.pt", content | dict(classes=[], epoch=1, **OTHER_PARTS))
    return {"before training": born, "trained": weights, "config": model.config}


def test_trained_networks_are_probed_from_their_files(image_root, tmp_path, probed, titles):
    """A label beyond the classes is wrapped; without a head, the pooled feature is the logits."""
    kept = {"residual": a_checkpoint(tmp_path / "residual", 0, num_classes=2)}
    kept |= {"b": a_checkpoint(tmp_path / "b", 1, num_classes=0)}
    flags = "--checkpoint residual/last.pt b/last.pt --before --images 2 --data"
    saved = probed(*flags.split(), image_root)
    assert list(saved) == [f"{n}, {w}" for n in kept for w in ("before training", "trained")]
    folder, (_, transform) = image_folder(image_root, "val"), augmentations(16, drawn=False)
    (first, label_0), (second, label_2) = folder[0], folder[15]  # of 30
    assert (label_0, label_2) == (0, 2)
    images = normalise(torch.stack([transform(first), transform(second)]))
    for name, result in saved.items():
        run, when = name.split(", ")
        model = ViT(**kept[run]["config"])
        model.load_state_dict(kept[run][when])
        labels = torch.tensor([0, 0 if run == "residual" else 2])
        expected, numbers = probe.measure(model, images, labels, "bar"), result["medians"]
        assert len(result["runs"]) == 1 and "APJN pair" not in numbers
        for key in ("g(W_Q)", "own"):
            assert numbers[key] == approx(expected[key])
        assert result["label"] == name  # nothing here can be shortened
    assert titles == [f"trained networks: 4 tokens, 2 images of {image_root}"]


def test_names_of_trained_networks(tmp_path, probed, titles):
    """Folders of the same name stay different networks; the legend shows what differs."""
    for name in ("x/nano-a-soap", "y/nano-a-soap", "y/nano-b-soap"):
        a_checkpoint(tmp_path / name)
    alike = probed("--checkpoint", "x/nano-a-soap/last.pt", "y/nano-a-soap/last.pt")
    assert list(alike) == ["nano-a-soap", "y/nano-a-soap/last.pt"]
    assert len({result["label"] for result in alike.values()}) == 2
    different = probed("--checkpoint", "x/nano-a-soap/last.pt", "y/nano-b-soap/last.pt")
    assert [result["label"] for result in different.values()] == ["a", "b"]


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
    for name, size in (("a", 16), ("b", 32)):
        a_checkpoint(tmp_path / name, image_size=size)
    done = run_here(probe.main, flags.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])
