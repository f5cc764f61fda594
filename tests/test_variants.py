"""The variants: each part against its formula, the kernels of SPA, the initial weights, names."""

import argparse
import copy
import json
import math
import re
import sys

import pytest
import torch
from conftest import SMALL, correlation, run_main
from torch import nn

import jacobian_probe
import train_cls
import train_ssl
from beyond import arms, variants
from beyond.mimetic_init import mimetic_init_
from beyond.variants import kernels, start_, tat_after, tat_slope, vary_
from minskip import ViT
from support import files
from support.errors import UserError

DIM, HEADS = 32, 4


def vit(side: int = 4, depth: int = 3, residual: bool = False, pool: str = "mean", **varied) -> ViT:
    """A small network on side x side patches of 2 px, with the weights of the table."""
    torch.manual_seed(0)
    shape = dict(dim=DIM, depth=depth, num_heads=HEADS, residual=residual, pool=pool)
    return start_(vary_(ViT(2 * side, 2, 5, **shape), **varied))


@torch.no_grad()
def scatter_(module: nn.Module) -> nn.Module:
    """Moves all parameters: zeros, ones and equal values would hide mistakes."""
    for p in module.parameters():
        p.add_(0.3 * torch.randn_like(p))
    return module


# ---- norms ---------------------------------------------------------------------------------------


def test_dyt_and_derf_are_their_formulas_and_start_at_a_half():
    x, g = torch.linspace(-3, 3, 7)[:, None].expand(7, DIM), torch.arange(DIM)
    dyt, derf = variants.DyT(DIM), variants.Derf(DIM)
    torch.testing.assert_close(dyt(x), torch.tanh(0.5 * x))
    torch.testing.assert_close(derf(x), torch.erf(0.5 * x))
    numbers = dict(a=torch.tensor(2.0), gamma=g.float(), beta=torch.full((DIM,), 0.3))
    dyt.load_state_dict(numbers)
    derf.load_state_dict(numbers | dict(s=torch.tensor(0.7)))
    torch.testing.assert_close(dyt(x), g * torch.tanh(2 * x) + 0.3)
    torch.testing.assert_close(derf(x), g * torch.erf(2 * x + 0.7) + 0.3)


@pytest.mark.parametrize(
    "kind, name, numbers",
    [("norm", "dyt", "a beta gamma"), ("norm", "derf", "a beta gamma s"),
     ("attention", "value-skipinit", "alpha beta"), ("attention", "shaped", "alpha beta gamma")],
)  # fmt: skip
def test_what_is_learned(kind, name, numbers):
    """The numbers are parameters of each block's norms or attention, and have gradients."""
    model = vit(residual=True, **{kind: name})
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for block in model.blocks:
        for part in (block.norm1, block.norm2) if kind == "norm" else (block.attention,):
            found = dict(part.named_parameters(recurse=False))
            assert found.keys() == set(numbers.split())
            assert all(p.grad.abs().max() > 0 for p in found.values())


@pytest.mark.parametrize("norm, kind", [("rmsnorm", nn.RMSNorm), ("dyt", variants.DyT)])
def test_a_norm_stands_in_all_places(norm, kind):
    model = vit(norm=norm)
    norms = [model.norm, *(n for b in model.blocks for n in (b.norm1, b.norm2))]
    assert all(type(n) is kind for n in norms) and len(set(norms)) == 7  # none is used twice


def test_without_norms_one_stays_after_the_embedding_and_one_at_the_end():
    model = vit(norm="none")
    found = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert found == {"embed_norm", "norm"}
    x = model.embed(5 + 3 * torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 16), atol=1e-3, rtol=0)


@pytest.mark.parametrize("residual", [True, False])
def test_post_norm_written_out(residual):
    block = scatter_(vit(residual=residual, placement="post").blocks[1])
    x, r = torch.randn(2, 16, DIM), float(residual)
    y = block.norm1(r * x + block.attention(x))
    torch.testing.assert_close(block(x), block.norm2(r * y + block.mlp(y)))
    if residual:  # and drop-path drops both branches
        block.drop_path = nn.Dropout(1.0)
        torch.testing.assert_close(block(x), block.norm2(block.norm1(x)))


def test_decreasing_shortcuts_fall_on_a_line_from_1_to_07():
    """Over attention and MLP of three blocks: 1, .94, .88, .82, .76, .7."""
    x = torch.randn(2, 16, DIM)
    for i, block in enumerate(scatter_(vit(residual=True, shortcut="decreasing")).blocks):
        y = (1 - 0.12 * i) * x + block.attention(block.norm1(x))
        y = (0.94 - 0.12 * i) * y + block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x), y)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", variants.STARTS)
def test_what_mixes_the_values_is_what_weights_says_and_the_probe_s_k_its_jacobian(name):
    model = vit(attention=name).double()
    model.embed(torch.randn(1, 3, 8, 8).double())
    attention = scatter_(model.blocks[1].attention)
    x, step = torch.randn(16, DIM).double(), 1e-6 * torch.randn(16, DIM).double()
    A, (q, k, v) = attention.weights(x[None]), attention.queries_keys_values(x[None])
    torch.testing.assert_close(attention.mix(q, k, v), A @ v)
    torch.testing.assert_close(
        attention(x[None]), attention.W_O((A @ v).transpose(1, 2).flatten(2))
    )
    K = jacobian_probe.attention_jacobian(attention, x)
    change = (attention((x + step)[None]) - attention((x - step)[None])).flatten() / 2
    torch.testing.assert_close(K @ step.flatten(), change, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["value-skipinit", "shaped"])
def test_value_skipinit_and_shaped_start_as_the_identity_and_are_their_formulas(name):
    x, n = torch.randn(2, 16, DIM), 16
    attention = vit(attention=name).blocks[0].attention
    identity = torch.eye(n).expand(2, HEADS, n, n)
    torch.testing.assert_close(attention.weights(x), identity, atol=1e-6, rtol=0)
    with torch.no_grad():
        attention.W_Q.weight.normal_()
        attention.alpha.copy_(torch.arange(4.0))
        attention.beta.copy_(torch.arange(4.0) - 2)
        if name == "shaped":
            attention.gamma.fill_(3.0)
    q, k, _ = attention.queries_keys_values(x)
    P = (q @ k.mT / math.sqrt(DIM / HEADS)).softmax(-1)
    for head in range(HEADS):
        A = head * torch.eye(n) + (head - 2) * P[:, head] - (name == "shaped") * 3 / n
        torch.testing.assert_close(attention.weights(x)[:, head], A)


# ---- the kernels of u-spa and e-spa --------------------------------------------------------------


def test_the_kernel_of_a_line_and_its_powers():
    Sigma = torch.tensor([[math.exp(-0.3 * abs(i - j)) for j in range(7)] for i in range(7)])
    whole, root, inverse_root = (variants.line_kernel(7, 0.3, power) for power in (1, 0.5, -0.5))
    for found in (whole, root @ root, torch.linalg.inv(inverse_root @ inverse_root)):
        torch.testing.assert_close(found, Sigma.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side, gamma", [(4, 0.282), (8, 0.142), (14, 0.082)])
def test_e_spa_ends_at_the_mean_correlation_asked_for(side, gamma):
    *_, last = kernels("e-spa", 12, side, side)
    assert last == pytest.approx(gamma, abs=5e-4)
    K = torch.kron(variants.line_kernel(side, last), variants.line_kernel(side, last))
    assert (K.sum().item() - side**2) / (side**4 - side**2) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["u-spa", "e-spa"])
@pytest.mark.parametrize("rows, columns", [(4, 4), (3, 6)])
def test_the_kernel_after_a_hundred_layers(name, rows, columns):
    """In float32, through the modules themselves, with orthogonal W_V and W_O; also on another grid
    than the network was built for."""
    depth, n = 100, rows * columns
    model = vit(depth=depth, attention=name)
    model.embed(torch.randn(1, 3, 2 * rows, 2 * columns))
    x = nn.init.orthogonal_(torch.empty(n, DIM)) * DIM**0.5  # Sigma_0 = I
    with torch.no_grad():
        for block in model.blocks:
            x = block.attention(x[None])[0]
    last = kernels(name, depth, 4, 4)[-1]
    if name == "u-spa":
        Sigma = (1 - last) * torch.eye(n) + last
    else:
        Sigma = torch.kron(*(variants.line_kernel(m, last) for m in (rows, columns))).float()
    assert (x @ x.T / DIM - Sigma).abs().max() < 1e-4


def test_every_block_loses_the_same_fraction_and_the_first_sees_independent_tokens():
    a = [math.sqrt(1 - math.exp(-2 * gamma)) for gamma in kernels("e-spa", 10, 5, 5)]
    rest = [1 - rho for rho in kernels("u-spa", 10, 5, 5)]
    assert a[0] == rest[0] == 1 and rest[-1] == pytest.approx(0.5)
    for kept in (a, rest):
        assert [x / y for x, y in zip(kept[1:], kept)] == pytest.approx([kept[1]] * 10)


# ---- activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, eta, slope",
    [(12, 0.8, 0.206), (12, 0.7, 0.325), (24, 0.9, 0.239), (24, 0.8, 0.394), (6, 0.7, 0.120),
     (12, 0.897, 0), (13, 0.907, 0), (24, 0.961, 0)],
)  # fmt: skip
def test_what_a_slope_makes_of_independent_tokens(layers, eta, slope):
    """ReLU, slope 0, reaches the source's 0.9 only with more than 12 layers: we take 0.9 of it."""
    assert tat_after(layers, slope) == pytest.approx(eta, abs=1e-3)
    assert tat_after(layers, tat_slope(layers)) == pytest.approx(0.9 * tat_after(layers, 0.0))


def test_tat_keeps_the_variance_and_maps_correlations_as_its_equation_says():
    phi, c = variants.LeakyTAT(0.3), tat_after(2, 0.3)
    torch.manual_seed(0)
    u, w = torch.randn(2, 1_000_000, dtype=torch.float64)
    v = c * u + math.sqrt(1 - c * c) * w
    assert phi(u).square().mean().item() == pytest.approx(1, abs=5e-3)
    assert (phi(u) * phi(v)).mean().item() == pytest.approx(tat_after(3, 0.3), abs=5e-3)
    assert phi(torch.tensor(-2.0)) == pytest.approx(-0.6 * math.sqrt(2 / 1.09))


@pytest.mark.parametrize(
    "attention, least, most", [("e-spa", 0.9, 0.98), ("u-spa", 0.9, 0.98), ("shaped", 0.6, 0.95)]
)
def test_a_vanilla_vit_keeps_scale_and_tokens_apart_but_not_a_plain_one(attention, least, most):
    """No skip, no norm, 12 blocks at width 128. Attention alone would end at a correlation of 0.5
    (shaped: 0), tat alone at 0.8, and both together come further; a token's mean square stays near
    1. With the usual parts all tokens are alike, and nearly zero, after two blocks."""

    def tokens(**varied) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shape = dict(dim=128, depth=12, num_heads=4, residual=False, pool="mean", pos_embed_std=1.0)
        model = start_(vary_(ViT(16, 4, 5, **shape), norm="none", **varied))
        with torch.no_grad():
            return model.forward_features(torch.randn(1, 3, 16, 16), [0, 2, 12])

    *_, last = tokens(attention=attention, activation="tat")
    assert 0.5 < last.square().mean() < 5 and least < correlation(last) < most
    first, early, _ = tokens()
    assert correlation(early) > 0.999 and early.square().mean() < 1e-9 * first.square().mean()


# ---- the table, refusals, copies -----------------------------------------------------------------


@pytest.mark.parametrize("varied", [dict(attention="e-spa"), dict(activation="tat")])
def test_all_weights_are_drawn_by_the_generator(varied):
    model = vit(**varied)
    first, again, other = (
        copy.deepcopy(start_(model, torch.Generator().manual_seed(seed)).state_dict())
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name[9:] for name in first if not torch.equal(first[name], other[name])}
    values = {"attention.W_V.weight", "attention.W_O.weight"} if "attention" in varied else set()
    assert changed == {"mlp.fc1.weight", "mlp.fc2.weight"} | values


@pytest.mark.parametrize("activation", ["gelu", "tat"])
@pytest.mark.parametrize("name", variants.STARTS)
def test_the_table_of_starts(name, activation):
    model = vit(attention=name, activation=activation)
    zero, _, values, mlps = variants.STARTS[name]
    for block in model.blocks:
        a, mlp = block.attention, block.mlp
        assert (a.W_Q.weight.abs().max() == 0) == (zero == "zero")
        assert a.W_K.weight.std().item() == pytest.approx(0.02, rel=0.1)
        for product, orthogonal in (
            (a.W_O.weight @ a.W_V.weight, values == "orthogonal"),
            (mlp.fc2.weight.T, mlps == "orthogonal" or activation == "tat"),
            (mlp.fc1.weight / 2, mlps == "orthogonal" or activation == "tat"),
        ):
            assert torch.allclose(product.T @ product, torch.eye(DIM), atol=1e-4) == orthogonal
        assert activation == "gelu" or mlp.activation.slope == tat_slope(3)


@pytest.mark.parametrize(
    "varied, words",
    [(dict(attention="e-spa", pool="cls"), "class token has no place"),
     (dict(attention="u-spa", pool="cls"), "class token has no place"),
     (dict(attention="e-spa", side=1), "more than one token"),
     (dict(norm="none", placement="post"), "nothing to place"),
     (dict(activation="tat", residual=True), "without skips"),
     (dict(activation="tat", residual="mlp"), "without skips"),
     (dict(shortcut="decreasing"), "need all skips"),
     (dict(shortcut="decreasing", residual="attention"), "need all skips"),
     (dict(shortcut="decreasing", residual=True, placement="post"), "norms before")],
)  # fmt: skip
def test_combinations_without_meaning_are_refused(varied, words):
    with pytest.raises(ValueError, match=words):
        vit(**varied)


def test_a_copy_knows_its_own_grid():
    """DINO's teacher and averaged weights are copies, and may see other images: here 2 x 8 patches,
    where the network sees 4 x 4."""
    model = vit(attention="e-spa")
    twin, block = copy.deepcopy(model), model.blocks[0]
    x, other = model.embed(torch.randn(2, 3, 8, 8)), torch.randn(2, 3, 4, 16)
    y = block(x)
    twin.embed(other)
    torch.testing.assert_close(block(x), y)
    model.embed(other)
    assert not torch.allclose(block(x), y)


# ---- from the command line -----------------------------------------------------------------------

VANILLA = "--skipless --norm none --attention e-spa --activation tat"


def settled(monkeypatch, words: str = "") -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *words.split()])
    return train_cls.read_settings()[0]


@pytest.mark.parametrize(
    "words, expected",
    [("--skipless", dict(init="identity")), ("--norm dyt", dict(init="default")),
     ("--skipless --norm dyt", dict(init="paper", c=3.0, pool="cls")),
     (VANILLA, dict(init="paper", c=1.0, pool="mean")), (f"{VANILLA} --pool cls", dict(pool="cls")),
     (f"{VANILLA} --init default", dict(init="default")),
     ("--skipless --norm none --c 2", dict(c=2.0)), ("--skipless --attention shaped", dict(c=1.0))],
)  # fmt: skip
def test_what_a_variant_implies_for_settings_that_are_not_given(words, expected, monkeypatch):
    assert expected.items() <= vars(settled(monkeypatch, words)).items()


@pytest.mark.parametrize(
    "arm, c", [("skipless-paper", 3.0), ("skipless-paper+dyt", 3.0), ("skipless-paper+none", 1.0)]
)
def test_an_arm_has_the_paper_s_c_but_one_without_norms(arm, c):
    """Where no norm cancels it."""
    shape = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=1, num_heads=2)
    for given, expected in ((None, c), (1.7, 1.7)):
        W_V = arms.fresh_arm(arm, c=given, **shape).blocks[0].attention.W_V.weight
        torch.testing.assert_close(W_V @ W_V.T, expected**2 * torch.eye(24), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "attention, flag",
    [("shaped", "--c"), ("value-skipinit", "--c"), ("e-spa", "--alpha"), ("u-spa", "--beta")],
)
def test_constants_that_an_attention_does_not_take_are_refused(attention, flag, monkeypatch):
    with pytest.raises(UserError, match=f"{flag} is not part of --attention {attention}"):
        settled(monkeypatch, f"--skipless --attention {attention} {flag} 1")


def test_arms_are_named_by_what_differs(monkeypatch):
    name = arms.arm_of(settled(monkeypatch, VANILLA))
    assert name == "skipless-paper+none+e-spa+tat" == arms.ARM(name)
    parts = dict(norm="none", attention="e-spa", activation="tat")
    assert arms.parts_of(name) == ("skipless-paper", parts)
    assert arms.arm_of(settled(monkeypatch)) == arms.ARM("residual")
    starts = ["residual-default", "attention-skip", "mlp-skip-mimetic", "skipless", "dyt"]
    for wrong in (*starts, "residual+gelu+tat", "residual+relu", "residual+"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(wrong)} is no"):
            arms.ARM(wrong)


@pytest.mark.parametrize("arm", [*arms.NAMES, "residual+decreasing"])
@pytest.mark.parametrize("script", [train_cls, train_ssl])
def test_the_flags_of_an_arm_make_its_network(script, arm, monkeypatch):
    """The same weights as the sweep trains them and as the probe draws them; and the arm's name."""
    words = "--model nano --depth 2 --pool mean --pos-embed-std 0.5".split()
    words += ["--alpha", "2", "--beta", "0.6"] if "paper" in arm else []
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *arms.flags_of(arm)])
    args = script.read_settings()[0]
    torch.manual_seed(0)
    ours = train_cls.build_network(args, 0) if script is train_cls else script.build_backbone(args)
    torch.manual_seed(0)
    shape = dict(dim=64, num_heads=8, depth=2, image_size=32, patch_size=8, num_classes=0)
    theirs = arms.fresh_arm(arm, pool="mean", pos_embed_std=0.5, **shape)
    assert arms.arm_of(args) == arm == arms.ARM(arm)
    assert ours.config == theirs.config and str(ours) == str(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("skips, held", [(None, True), ("attention", True), ("mlp", False)])
def test_pairs_are_held_where_the_mlp_has_pairs(skips, held, monkeypatch):
    """AdamW's first step moves every entry by the rate, and the pairs by a tenth of it."""
    words = f"--skipless --skips {skips}" if skips else "--skipless"
    args = settled(monkeypatch, f"{words} --opt adamw --lr 1e-3 --weight-decay 0 --depth 1")
    model = train_cls.build_network(args, 5)
    optimizer, fc1 = train_cls.build_optimizer(args, model), model.blocks[0].mlp.fc1
    before = fc1.weight.detach().clone()
    (1e6 * model(torch.randn(8, 3, 32, 32)).square().sum()).backward()  # far above Adam's eps
    optimizer.step()
    moved = (fc1.weight - before).abs().median(dim=1).values
    torch.testing.assert_close(moved[128:], torch.full((128,), 1e-3), rtol=0.1, atol=0)
    pairs = torch.full((128,), 1e-4 if held else 1e-3)
    torch.testing.assert_close(moved[:128], pairs, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "words, message",
    [("--skips mlp", "add --skipless"), ("--skipless --init mimetic", "leave --skipless out"),
     ("--init mimetic --c 2", "--c is not part of --init mimetic"),
     ("--skipless --skips mlp --drop-path 0.1", "--drop-path needs skip")],
)  # fmt: skip
def test_settings_of_one_half_that_contradict_each_other(words, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        settled(monkeypatch, words)


def test_mimetic_products_are_near_the_identity_and_minus_the_identity():
    """W_Q W_K^T = .7 Z + .7 I and W_V W_O = .4 Z - .4 I: exactly where one head has all dimensions,
    and the first up to rank d_h in each of several. The MLPs keep their weights."""
    torch.manual_seed(0)
    d = 96
    model = ViT(16, 8, 5, dim=d, depth=2, num_heads=1)
    before = copy.deepcopy(model.state_dict())
    mimetic_init_(model, torch.Generator().manual_seed(1))
    for block in model.blocks:
        a = block.attention
        for left, right, diagonal, spread in (
            (a.W_Q.weight.T, a.W_K.weight, 0.7, 0.7), (a.W_V.weight.T, a.W_O.weight.T, -0.4, 0.4)
        ):  # fmt: skip
            Z = left @ right - diagonal * torch.eye(d)
            assert Z.std().item() == pytest.approx(spread / d**0.5, rel=0.05)
            assert abs(Z.mean().item()) < 0.01 and abs(Z.diagonal().mean().item()) < 0.03
    touched = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    parts = {name.split(".", 2)[2] for name in touched}
    assert parts == {f"attention.W_{letter}.weight" for letter in "QKVO"} and len(touched) == 8
    four = mimetic_init_(ViT(16, 8, 5, dim=d, depth=1, num_heads=4)).blocks[0].attention
    heads = zip(four.W_Q.weight.split(24), four.W_K.weight.split(24))
    traces = [(W_Q.T @ W_K).trace().item() / d for W_Q, W_K in heads]
    assert min(traces) > 0.15 and torch.linalg.matrix_rank(four.W_V.weight) == d


@pytest.mark.parametrize(
    "script, own", [(train_cls, "--mixup 0 --cutmix 0"), (train_ssl, "--prototypes 16")]
)
def test_a_variant_trains_and_comes_back_from_its_checkpoint(
    script, own, image_root, tmp_path, monkeypatch, capsys
):
    """DINO's local crops have another grid than its global ones, and its teacher is a copy."""
    words = [*SMALL, *f"{VANILLA} {own} --epochs 1 --warmup-epochs 0".split(), "--data", image_root]
    words += ["--checkpoint-activations"]  # each crop's must be computed again on its own grid
    run_main(script.main, [*words, "--out", tmp_path / "run"], tmp_path, monkeypatch)
    checkpoint = files.load_checkpoint(str(tmp_path / "run/last.pt"))
    fresh, images = arms.untrained_vit(checkpoint), torch.randn(2, 3, 16, 16)
    assert not torch.equal(arms.trained_vit(checkpoint)(images), fresh(images))
    own = ("residual", *variants.STANDARD)
    shape = {name: value for name, value in fresh.config.items() if name not in own}
    torch.manual_seed(0)
    constants = [checkpoint["args"][name] for name in ("alpha", "beta", "c")]
    built = arms.fresh_arm("skipless-paper+none+e-spa+tat", *constants, **shape)
    torch.testing.assert_close(built.state_dict(), fresh.state_dict())
    assert built.config == fresh.config and str(built) == str(fresh)  # the same parts


def test_the_probe_takes_variants(tmp_path, monkeypatch, capsys):
    names = ["residual+dyt", "skipless-paper+none+e-spa+tat"]
    words = "--depths 2 --seeds 1 --images 2 --image-size 16 --patch-size 8 --out probe".split()
    run_main(jacobian_probe.main, [*words, "--variants", *names], tmp_path, monkeypatch)
    record = json.loads((tmp_path / "probe/probe.json").read_text())["networks"]
    assert list(record) == names
    for network in record.values():
        assert all(math.isfinite(x) for x in network["medians"]["k(K)"])
