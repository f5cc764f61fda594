"""The variants: each part against its formula, the kernels of SPA, the initial weights, names."""

import argparse
import copy
import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, run_main
from einops import rearrange
from torch import nn

import jacobian_probe
import train_cls
import train_ssl
from beyond import arms, variants
from beyond.variants import kernels, start_, tat_after, tat_correlation, tat_slope, vary_
from minskip import ViT
from support import files, pictures
from support.errors import UserError

DIM, HEADS = 32, 4


def vit(side: int = 4, depth: int = 3, residual: bool = False, pool: str = "mean", **varied) -> ViT:
    """A small network on side x side patches of 2 px, with the weights of the table."""
    torch.manual_seed(0)
    shape = dict(dim=DIM, depth=depth, num_heads=HEADS, residual=residual, pool=pool)
    return start_(vary_(ViT(2 * side, 2, 5, **shape), **varied))


# ---- norms ---------------------------------------------------------------------------------------


def test_dyt_and_derf_are_their_formulas_and_start_at_a_half():
    x = torch.linspace(-3, 3, 7)[:, None].expand(7, DIM)
    dyt, derf = variants.DyT(DIM), variants.Derf(DIM)
    torch.testing.assert_close(dyt(x), torch.tanh(0.5 * x))
    torch.testing.assert_close(derf(x), torch.erf(0.5 * x))
    with torch.no_grad():
        for module in (dyt, derf):
            module.a.fill_(2.0)
            module.gamma.copy_(torch.arange(DIM))
            module.beta.fill_(0.3)
        derf.s.fill_(0.7)
    g = torch.arange(DIM)
    torch.testing.assert_close(dyt(x), g * torch.tanh(2 * x) + 0.3)
    torch.testing.assert_close(derf(x), g * torch.erf(2 * x + 0.7) + 0.3)


@pytest.mark.parametrize(
    "varied, numbers",
    [
        (dict(norm="dyt"), "a beta gamma"),
        (dict(norm="derf"), "a beta gamma s"),
        (dict(attention="value-skipinit"), "alpha beta"),
        (dict(attention="shaped"), "alpha beta gamma"),
    ],
)
def test_what_is_learned(varied, numbers):
    """The numbers are parameters of each block's norms or attention, and have gradients."""
    model = vit(residual=True, **varied)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    for block in model.blocks:
        for part in (block.norm1, block.norm2) if "norm" in varied else (block.attention,):
            found = dict(part.named_parameters(recurse=False))
            assert found.keys() == set(numbers.split())
            assert all(p.grad.abs().max() > 0 for p in found.values())


@pytest.mark.parametrize("norm, kind", [("rmsnorm", nn.RMSNorm), ("dyt", variants.DyT)])
def test_a_norm_stands_in_all_places(norm, kind):
    model = vit(norm=norm)
    norms = [model.norm, *(n for b in model.blocks for n in (b.norm1, b.norm2))]
    assert all(type(n) is kind for n in norms) and len(set(norms)) == 7  # none is used twice
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_without_norms_one_stays_after_the_embedding_and_one_at_the_end():
    model = vit(norm="none")
    found = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert found == {"embed_norm", "norm"}
    x = model.embed(5 + 3 * torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 16), atol=1e-3, rtol=0)


@pytest.mark.parametrize("residual", [True, False])
def test_post_norm_written_out(residual):
    block = vit(residual=residual, placement="post").blocks[1]
    x, r = torch.randn(2, 16, DIM), float(residual)
    y = block.norm1(r * x + block.attention(x))
    torch.testing.assert_close(block(x), block.norm2(r * y + block.mlp(y)))
    if residual:  # and drop-path drops both branches
        block.drop_path = nn.Dropout(1.0)
        torch.testing.assert_close(block(x), block.norm2(block.norm1(x)))


def test_without_skips_post_is_pre_shifted_by_one_norm():
    """pre: ... norm1 attention norm2 MLP | norm1 attention ...; post starts one norm later."""
    pre, post = vit(placement="pre"), vit(placement="post")
    post.load_state_dict(pre.state_dict())
    images = torch.randn(2, 3, 8, 8)
    y = pre.embed(images)
    x = pre.blocks[0].norm1(y)
    for pre_block, post_block in zip(pre.blocks, post.blocks):
        x, y = post_block(x), pre_block(y)
    torch.testing.assert_close(x, pre.norm(y))  # all norms are equal, as none was trained


# ---- attention -----------------------------------------------------------------------------------


def mixing_matrix(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the attention does to values, (batch, head, token, token), probed with unit vectors."""
    q, k, _ = attention.queries_keys_values(x)
    n = x.shape[1]
    v = torch.eye(n).expand(len(x), attention.num_heads, n, n)
    return attention.mix(q, k, v)


@pytest.mark.parametrize("name", ["softmax", "value-skipinit", "shaped", "u-spa", "e-spa"])
def test_what_mixes_the_values_is_what_weights_says(name):
    model = vit(attention=name)
    x = torch.randn(2, 16, DIM)
    model.embed(torch.randn(1, 3, 8, 8))
    attention = model.blocks[1].attention
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.3 * torch.randn_like(p))
    torch.testing.assert_close(mixing_matrix(attention, x), attention.weights(x))
    v = attention.queries_keys_values(x)[2]
    y = rearrange(attention.weights(x) @ v, "b head token dim -> b token (head dim)")
    torch.testing.assert_close(attention(x), attention.W_O(y))


def test_value_skipinit_and_shaped_start_as_the_identity_and_are_their_formulas():
    x, n = torch.randn(2, 16, DIM), 16
    for name in ("value-skipinit", "shaped"):
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
    gamma, n = 0.3, 7
    Sigma = torch.tensor([[math.exp(-gamma * abs(i - j)) for j in range(n)] for i in range(n)])
    for power, product in ((1.0, Sigma), (0.5, Sigma), (-1.0, torch.eye(n)), (-0.5, torch.eye(n))):
        found = variants.line_kernel(n, gamma, power)
        found = found @ found if abs(power) == 0.5 else found
        found = found @ Sigma.double() if power < 0 else found
        torch.testing.assert_close(found, product.double(), atol=1e-6, rtol=0)


def test_u_spa_is_a_scaled_softmax_of_a_diagonal():
    rho, before, n = 0.3, 0.1, 12
    D, B = variants.u_spa(3, 4, rho, before, torch.float64, torch.device("cpu"))
    Sigma, Sigma_before = ((1 - r) * torch.eye(n, dtype=torch.float64) + r for r in (rho, before))
    A = D * B.softmax(-1)
    torch.testing.assert_close(A @ Sigma_before @ A.T, Sigma, atol=1e-11, rtol=0)


@pytest.mark.parametrize("side, gamma", [(4, 0.282), (8, 0.142), (14, 0.082)])
def test_e_spa_ends_at_the_mean_correlation_asked_for(side, gamma):
    *_, last = kernels("e-spa", 12, side, side)
    assert last == pytest.approx(gamma, abs=5e-4)
    K = torch.kron(variants.line_kernel(side, last), variants.line_kernel(side, last))
    n = side**2
    assert (K.sum() - n).item() / (n * n - n) == pytest.approx(0.5, abs=1e-6)


def own_kernel(x: torch.Tensor) -> torch.Tensor:
    """The tokens' products, (token, token), for x of (token, dim)."""
    return x @ x.mT / x.shape[-1]


@pytest.mark.parametrize("name", ["u-spa", "e-spa"])
@pytest.mark.parametrize("rows, columns", [(4, 4), (3, 6)])
def test_the_kernel_after_a_hundred_layers(name, rows, columns):
    """In float32, through the modules themselves, with orthogonal W_V and W_O; also on another grid
    than the network was built for."""
    depth, n = 100, rows * columns
    torch.manual_seed(0)
    model = vary_(ViT(8, 2, 5, dim=DIM, depth=depth, num_heads=HEADS, pool="mean"), attention=name)
    start_(model).embed(torch.randn(1, 3, 2 * rows, 2 * columns))
    x = nn.init.orthogonal_(torch.empty(n, DIM)) * DIM**0.5  # Sigma_0 = I
    with torch.no_grad():
        for block in model.blocks:
            x = block.attention(x[None])[0]
    last = kernels(name, depth, 4, 4)[-1]
    if name == "u-spa":
        Sigma = (1 - last) * torch.eye(n) + last
    else:
        Sigma = torch.kron(*(variants.line_kernel(m, last) for m in (rows, columns))).float()
    assert (own_kernel(x) - Sigma).abs().max() < 1e-4


def test_every_block_loses_the_same_fraction_and_the_first_sees_independent_tokens():
    gammas = kernels("e-spa", 10, 5, 5)
    a = [math.sqrt(1 - math.exp(-2 * gamma)) for gamma in gammas]
    assert a[0] == 1  # independent tokens
    assert [x / y for x, y in zip(a[1:], a)] == pytest.approx([a[1]] * 10)
    rho = kernels("u-spa", 10, 5, 5)
    ratios = [(1 - x) / (1 - y) for x, y in zip(rho[1:], rho)]
    assert (
        rho[0] == 0 and rho[-1] == pytest.approx(0.5) and ratios == pytest.approx([ratios[0]] * 10)
    )


# ---- activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, eta, slope",
    [(12, 0.8, 0.206), (12, 0.7, 0.325), (24, 0.9, 0.239), (24, 0.8, 0.394), (6, 0.7, 0.120)],
)
def test_what_a_slope_makes_of_independent_tokens(layers, eta, slope):
    assert tat_after(layers, slope) == pytest.approx(eta, abs=1e-3)


def test_tat_s_slope_leads_to_nine_tenths_of_what_relu_reaches():
    """ReLU, and so any slope, reaches the source's 0.9 only with more than 12 layers."""
    reached = [tat_after(layers, 0.0) for layers in (12, 13, 24)]
    assert reached == pytest.approx([0.897, 0.907, 0.961], abs=5e-4)
    for layers in (2, 12, 24):
        assert tat_after(layers, tat_slope(layers)) == pytest.approx(0.9 * tat_after(layers, 0.0))


def test_tat_keeps_the_variance_and_maps_correlations_as_c_says():
    phi, c = variants.LeakyTAT(0.3), 0.4
    torch.manual_seed(0)
    u, w = torch.randn(2, 1_000_000, dtype=torch.float64)
    v = c * u + math.sqrt(1 - c * c) * w
    assert phi(u).square().mean().item() == pytest.approx(1, abs=5e-3)
    assert (phi(u) * phi(v)).mean().item() == pytest.approx(tat_correlation(c, 0.3), abs=5e-3)
    assert phi(torch.tensor(-2.0)) == pytest.approx(-0.6 * math.sqrt(2 / 1.09))


def correlation(x: torch.Tensor) -> float:
    x = F.normalize(x, dim=-1)
    n = len(x)
    return ((x.sum(0).square().sum() - n) / (n * (n - 1))).item()


@pytest.mark.parametrize(
    "attention, least, most", [("e-spa", 0.9, 0.98), ("u-spa", 0.9, 0.98), ("shaped", 0.6, 0.95)]
)
def test_a_vanilla_vit_keeps_scale_and_tokens_apart_where_a_plain_one_does_not(
    attention, least, most
):
    """No skip, no norm, 12 blocks at width 128. Attention alone would end at a correlation of 0.5
    (shaped: 0), tat alone at 0.8, and both together come further; a token's mean square stays near
    1. With the usual parts all tokens are alike, and nearly zero, after two blocks."""

    def tokens(**varied) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shape = dict(dim=128, depth=12, num_heads=4, residual=False, pool="mean", pos_embed_std=1.0)
        model = start_(vary_(ViT(16, 4, 5, **shape), norm="none", **varied))
        with torch.no_grad():
            return [x[0] for x in model.forward_features(torch.randn(1, 3, 16, 16), [0, 2, 12])]

    *_, last = tokens(attention=attention, activation="tat")
    assert 0.5 < last.square().mean() < 5 and least < correlation(last) < most
    first, early, _ = tokens()
    assert correlation(early) > 0.999 and early.square().mean() < 1e-9 * first.square().mean()


# ---- the table, refusals, copies -----------------------------------------------------------------


def test_all_weights_are_drawn_by_the_generator():
    for varied in (dict(attention="e-spa"), dict(activation="tat")):
        model = vit(**varied)
        first, again, other = (
            copy.deepcopy(start_(model, torch.Generator().manual_seed(seed)).state_dict())
            for seed in (3, 3, 4)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        changed = " ".join(name for name in first if not torch.equal(first[name], other[name]))
        assert "fc1.weight" in changed and "fc2.weight" in changed
        assert ("W_V.weight" in changed) == ("W_O.weight" in changed) == ("attention" in varied)


@pytest.mark.parametrize("name", variants.STARTS)
def test_the_table_of_starts(name):
    model = vit(attention=name)
    zero, _, values, _ = variants.STARTS[name]
    for block in model.blocks:
        a, mlp = block.attention, block.mlp
        assert (a.W_Q.weight.abs().max() == 0) == (zero == "zero")
        assert a.W_K.weight.std().item() == pytest.approx(0.02, rel=0.1)
        product = torch.linalg.svdvals(a.W_O.weight @ a.W_V.weight)
        square = mlp.fc2.weight @ mlp.fc2.weight.T
        orthogonal = [
            torch.allclose(product, torch.ones(DIM), atol=1e-4),
            torch.allclose(square, torch.eye(DIM), atol=1e-4),
        ]
        assert orthogonal == [values == "orthogonal"] * 2


def test_tat_s_mlps_are_orthogonal_with_any_attention():
    mlp = vit(activation="tat").blocks[0].mlp
    torch.testing.assert_close(
        mlp.fc1.weight.T @ mlp.fc1.weight, 4 * torch.eye(DIM), atol=1e-4, rtol=0
    )
    relu_alone = variants.tat_after(3, 0.0)
    assert variants.tat_after(3, mlp.activation.slope) == pytest.approx(0.9 * relu_alone)


@pytest.mark.parametrize(
    "varied, words",
    [
        (dict(attention="e-spa", pool="cls"), "class token has no place"),
        (dict(attention="u-spa", pool="cls"), "class token has no place"),
        (dict(attention="e-spa", side=1), "more than one token"),
        (dict(norm="none", placement="post"), "nothing to place"),
        (dict(activation="tat", residual=True), "without skips"),
    ],
)
def test_combinations_without_meaning_are_refused(varied, words):
    with pytest.raises(ValueError, match=words):
        vit(**varied)


def test_a_copy_knows_its_own_grid():
    """DINO's teacher and averaged weights are copies, and local crops have another grid."""
    model = vit(attention="e-spa")
    twin = copy.deepcopy(model)
    large, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 6)
    y = model(large)
    twin(small)
    torch.testing.assert_close(model(large), y)
    assert model.grid == dict(rows=4, columns=4) and twin.grid == dict(rows=2, columns=3)


# ---- from the command line -----------------------------------------------------------------------

VANILLA = "--skipless --norm none --attention e-spa --activation tat"


def settled(monkeypatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train_cls.py", *words])
    return train_cls.read_settings()[0]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--skipless", dict(init="identity")),
        ("--norm dyt", dict(init="default")),
        ("--skipless --norm dyt", dict(init="paper", c=3.0, pool="cls")),
        (VANILLA, dict(init="paper", c=1.0, pool="mean")),
        (f"{VANILLA} --pool cls", dict(pool="cls")),
        (f"{VANILLA} --init default", dict(init="default")),
        ("--skipless --norm none --c 2", dict(c=2.0)),
        ("--skipless --attention shaped", dict(c=1.0)),
    ],
)
def test_a_variant_without_skips_takes_the_paper_s_init_and_what_else_it_needs(
    words, expected, monkeypatch
):
    settings = vars(settled(monkeypatch, *words.split()))
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    "words, dead",
    [
        ("--attention shaped --c 3", "--c is not part of --attention shaped"),
        ("--attention value-skipinit --c 3", "--c is not part of --attention value-skipinit"),
        ("--attention e-spa --alpha 1", "--alpha is not part of --attention e-spa"),
        ("--attention u-spa --beta 1", "--beta is not part of --attention u-spa"),
    ],
)
def test_constants_that_an_attention_does_not_take_are_refused(words, dead, monkeypatch):
    with pytest.raises(UserError, match=dead):
        settled(monkeypatch, "--skipless", *words.split())


def test_arms_are_named_by_what_differs(monkeypatch):
    name = arms.arm_of(settled(monkeypatch, *VANILLA.split()))
    assert name == "skipless-paper+none+e-spa+tat" == arms.ARM(name)
    parts = dict(norm="none", attention="e-spa", activation="tat")
    assert arms.parts_of(name) == ("skipless-paper", parts)
    assert arms.arm_of(settled(monkeypatch)) == arms.ARM("residual")
    for wrong in ("residual+gelu+tat", "residual+relu", "skipless", "dyt", "residual+"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(wrong)} is no"):
            arms.ARM(wrong)


@pytest.mark.parametrize("script", [train_cls, train_ssl])
def test_a_variant_trains_and_comes_back_from_its_checkpoint(
    script, image_root, tmp_path, monkeypatch, capsys
):
    """DINO's local crops have another grid than its global ones, and its teacher is a copy."""
    words = [
        *SMALL,
        *VANILLA.split(),
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--data",
        image_root,
    ]
    words += ["--prototypes", "16"] if script is train_ssl else ["--mixup", "0", "--cutmix", "0"]
    words += ["--checkpoint-activations"]  # each crop's must be computed again on its own grid
    run_main(script.main, [*words, "--out", tmp_path / "run"], tmp_path, monkeypatch)
    checkpoint = files.load_checkpoint(str(tmp_path / "run/last.pt"))
    images = torch.randn(2, 3, 16, 16)
    again = arms.trained_vit(checkpoint)(images)
    fresh = arms.untrained_vit(checkpoint)
    assert not torch.equal(again, fresh(images))
    block = fresh.blocks[0]
    assert isinstance(block.norm1, nn.Identity) and isinstance(block.attention, variants.SPA)
    assert isinstance(block.mlp.activation, variants.LeakyTAT)
    own = ("residual", *variants.STANDARD)
    shape = {name: value for name, value in fresh.config.items() if name not in own}
    torch.manual_seed(0)
    constants = [checkpoint["args"][name] for name in ("alpha", "beta", "c")]
    built = arms.fresh_arm("skipless-paper+none+e-spa+tat", *constants, **shape)
    torch.testing.assert_close(built.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("name", ["value-skipinit", "shaped", "u-spa", "e-spa"])
def test_the_probe_s_k_is_the_jacobian_of_the_attention(name):
    attention = vit(attention=name, side=2).double()
    attention.embed(torch.randn(1, 3, 4, 4).double())
    attention = attention.blocks[1].attention
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.3 * torch.randn_like(p))
    y, step = torch.randn(4, DIM).double(), 1e-6 * torch.randn(4, DIM).double()
    K = jacobian_probe.attention_jacobian(attention, y)
    change = (attention((y + step)[None]) - attention((y - step)[None])).flatten() / 2
    torch.testing.assert_close(K @ step.flatten(), change, rtol=1e-6, atol=1e-12)


def test_variants_of_one_arm_have_colours_of_their_own():
    names = ["residual", "residual+dyt", "skipless-paper", "residual+derf"]
    colours = [pictures.colour_of(name, names) for name in names]
    assert len(set(colours)) == 4 and colours[0] == pictures.ARM_COLOURS["residual"]


def test_the_probe_takes_variants(tmp_path, monkeypatch, capsys):
    words = "--variants residual+dyt skipless-paper+none+e-spa+tat --depths 2 --seeds 1 --images 2"
    words += " --image-size 16 --patch-size 8 --out probe"
    run_main(jacobian_probe.main, words.split(), tmp_path, monkeypatch)
    record = json.loads((tmp_path / "probe/probe.json").read_text())["networks"]
    assert list(record) == ["residual+dyt", "skipless-paper+none+e-spa+tat"]
    for network in record.values():
        assert all(math.isfinite(x) for x in network["medians"]["k(K)"])
