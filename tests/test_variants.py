"""The variants: each part against its formula, kernels that shaped attentions keep, the table."""

import argparse
import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, run_main
from einops import rearrange
from torch import nn

import cli
import files
import jacobian_probe
import jacobians
import networks
import pictures
import train_cls
import train_ssl
import variants
from minskip import ViT
from variants import kernels, start_, tat_after, tat_correlation, tat_slope, vary_

DIM, HEADS = 32, 4


def vit(side: int = 4, depth: int = 3, residual: bool = False, pool: str = "mean", **varied) -> ViT:
    """A small network on a grid of side x side patches of 2 px, its weights as the table says."""
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


@pytest.mark.parametrize("norm, kind", [("rmsnorm", nn.RMSNorm), ("dyt", variants.DyT)])
def test_a_norm_stands_in_all_places(norm, kind):
    model = vit(norm=norm)
    norms = [model.norm, *(n for b in model.blocks for n in (b.norm1, b.norm2))]
    assert all(type(n) is kind for n in norms)
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
    """What the attention does with values, (batch, head, token, token), by probing it units."""
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


def e_spa_causal(n: int, gamma: float, before: float) -> torch.Tensor:
    """A for causal tokens in a line in closed form, He et al. 2023; both gammas finite."""
    lam, lam_before = math.exp(-gamma), math.exp(-before)
    ratio = math.sqrt(1 - lam**2) / math.sqrt(1 - lam_before**2)
    A = torch.zeros(n, n, dtype=torch.float64)
    A[0, 0] = 1
    for i in range(1, n):
        A[i, i] = ratio
        A[i, 0] = lam ** (i - 1) * (lam - lam_before * ratio)
        for j in range(1, i):
            A[i, j] = ratio * lam ** (i - j - 1) * (lam - lam_before)
    return A


def test_the_causal_e_spa_in_closed_form_is_cholesky_s():
    for gamma, before in ((0.3, 0.5), (0.05, 2.0)):
        L, L_before = (torch.linalg.cholesky(variants.line_kernel(12, g)) for g in (gamma, before))
        A = e_spa_causal(12, gamma, before)
        torch.testing.assert_close(A, L @ L_before.inverse(), atol=1e-11, rtol=0)


def test_u_spa_is_a_scaled_softmax_of_a_diagonal():
    rho, before, n = 0.3, 0.1, 12
    D, B = variants.u_spa(3, 4, rho, before, torch.float64, torch.device("cpu"))
    Sigma, Sigma_before = ((1 - r) * torch.eye(n, dtype=torch.float64) + r for r in (rho, before))
    A = D * B.softmax(-1)
    torch.testing.assert_close(A @ Sigma_before @ A.T, Sigma, atol=1e-11, rtol=0)


def test_the_own_share_of_a_softmax_with_a_bias_on_its_diagonal():
    """softmax(b I) is the mean's projection plus a share of the rest, off the mean direction."""
    n, b = 197, 5.0
    A = (b * torch.eye(n, dtype=torch.float64)).softmax(-1)
    share = (math.exp(b) - 1) / (math.exp(b) + n - 1)
    assert share == pytest.approx(0.428013, abs=1e-6)
    S = torch.linalg.eigvalsh(A)
    assert S[:-1].tolist() == pytest.approx([share] * (n - 1)) and S[-1] == pytest.approx(1.0)


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
    """In float32, through the modules themselves, W_V and W_O orthogonal; also on another grid than
    the network was built for."""
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


def test_every_block_of_e_spa_keeps_the_same_share_of_a_and_begins_with_independent_tokens():
    gammas = kernels("e-spa", 10, 5, 5)
    a = [math.sqrt(1 - math.exp(-2 * gamma)) for gamma in gammas]
    assert a[0] == 1  # independent tokens
    assert [x / y for x, y in zip(a[1:], a)] == pytest.approx([a[1]] * 10)
    rho = kernels("u-spa", 10, 5, 5)
    assert rho[0] == 0 and rho[-1] == pytest.approx(0.5) and rho == sorted(rho)


# ---- activation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, eta, slope",
    [(12, 0.8, 0.206), (12, 0.7, 0.325), (24, 0.9, 0.239), (24, 0.8, 0.394), (6, 0.7, 0.120)],
)
def test_what_a_slope_makes_of_independent_tokens(layers, eta, slope):
    assert tat_after(layers, slope) == pytest.approx(eta, abs=1e-3)


def test_tat_s_slope_leads_to_nine_tenths_of_what_relu_reaches():
    """Which after 12 layers is 0.897: a correlation of 0.9, the source's, is out of reach."""
    assert tat_after(12, 0.0) == pytest.approx(0.897, abs=5e-4)
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


@pytest.mark.parametrize("attention", ["e-spa", "u-spa", "shaped"])
def test_a_vanilla_vit_keeps_scale_and_tokens_apart_where_a_plain_one_does_not(attention):
    """No skip, no norm, 12 blocks at width 128. The attention alone would end at a correlation of
    0.5 (shaped: 0), tat alone at 0.8; together they come to 0.85 .. 0.96, and a token's mean square
    from 1 to 1 .. 3.4. With the usual parts all tokens are alike, and gone, after two blocks."""

    def tokens(**varied) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shape = dict(dim=128, depth=12, num_heads=4, residual=False, pool="mean", pos_embed_std=1.0)
        model = start_(vary_(ViT(16, 4, 5, **shape), norm="none", **varied))
        with torch.no_grad():
            return [x[0] for x in model.forward_features(torch.randn(1, 3, 16, 16), [0, 2, 12])]

    *_, last = tokens(attention=attention, activation="tat")
    assert 0.5 < last.square().mean() < 5 and 0.5 < correlation(last) < 0.98
    first, early, _ = tokens()
    assert correlation(early) > 0.999 and early.square().mean() < 1e-9 * first.square().mean()


# ---- the table, refusals, copies -----------------------------------------------------------------


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
        (dict(norm="none", placement="post"), "nothing to place"),
        (dict(activation="tat", residual=True), "without skips"),
    ],
)
def test_combinations_without_meaning_are_refused(varied, words):
    with pytest.raises(ValueError, match=words):
        vit(**varied)


def test_a_copy_knows_its_own_grid():
    """A teacher or an average of weights is a copy; local crops have another grid."""
    model = vit(attention="e-spa")
    twin = copy.deepcopy(model)
    large, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 6)
    y = model(large)
    twin(small)
    torch.testing.assert_close(model(large), y)
    assert model.grid == dict(rows=4, columns=4) and twin.grid == dict(rows=2, columns=3)


# ---- from the command line -----------------------------------------------------------------------

VANILLA = "--skipless --norm none --attention e-spa --activation tat".split()


def settled(*words: str) -> argparse.Namespace:
    p, _ = cli.trainer_flags("", train_cls.DEMO, train_cls.FOLDER, train_cls.SKIPLESS)
    layers = train_cls.DEMO, train_cls.FOLDER, train_cls.SKIPLESS
    return cli.settle(vars(p.parse_args(words)), *layers, None, set())


def test_a_variant_without_skips_takes_the_paper_s_init_and_what_else_it_needs():
    assert settled("--skipless").init == "identity" and settled("--norm", "dyt").init == "default"
    dyt = settled("--skipless", "--norm", "dyt")
    assert (dyt.init, dyt.c, dyt.pool) == ("paper", 3.0, "cls")
    assert dyt.lr == train_cls.SKIPLESS["lr"]["paper"]["soap"]
    vanilla = settled(*VANILLA)
    assert (vanilla.init, vanilla.c, vanilla.pool) == ("paper", 1.0, "mean")
    assert settled(*VANILLA, "--pool", "cls").pool == "cls"
    assert settled("--skipless", "--norm", "none", "--c", "2").c == 2.0
    assert settled("--skipless", "--attention", "shaped").c == 1.0
    assert settled(*VANILLA, "--init", "default").init == "default"


@pytest.mark.parametrize(
    "words, dead",
    [
        ("--attention shaped --c 3", "--c is not part of --attention shaped"),
        ("--attention value-skipinit --c 3", "--c is not part of --attention value-skipinit"),
        ("--attention e-spa --alpha 1", "--alpha is not part of --attention e-spa"),
        ("--attention u-spa --beta 1", "--beta is not part of --attention u-spa"),
    ],
)
def test_constants_that_an_attention_does_not_take_are_refused(words, dead, capsys):
    with pytest.raises(SystemExit):
        settled("--skipless", *words.split())
    assert dead in capsys.readouterr().err
    assert settled("--skipless", "--attention", "value-skipinit", "--alpha", "1").alpha == 1.0


def test_arms_are_named_by_what_differs():
    args = settled(*VANILLA)
    name = networks.arm_of(args)
    assert name == "skipless-paper+none+e-spa+tat" == networks.arm(name)
    assert networks.parts_of(name) == (
        "skipless-paper",
        dict(norm="none", attention="e-spa", activation="tat"),
    )
    assert networks.arm_of(settled()) == networks.arm("residual")
    for wrong in ("residual+gelu+tat", "residual+relu", "skipless", "dyt", "residual+"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"^{re.escape(wrong)} is no arm: resid"
        ):
            networks.arm(wrong)


@pytest.mark.parametrize("script", [train_cls, train_ssl])
def test_a_variant_trains_and_comes_back_from_its_checkpoint(
    script, image_root, tmp_path, monkeypatch, capsys
):
    """DINO's local crops have another grid than its global ones, its teacher is a copy."""
    words = [*SMALL, *VANILLA, "--epochs", "1", "--warmup-epochs", "0", "--data", image_root]
    words += ["--prototypes", "16"] if script is train_ssl else ["--mixup", "0", "--cutmix", "0"]
    words += ["--checkpoint-activations"]  # computed again, it is for the crops' own grid
    run_main(script.main, [*words, "--out", tmp_path / "run"], tmp_path, monkeypatch)
    checkpoint = files.load_checkpoint(str(tmp_path / "run/last.pt"))
    images = torch.randn(2, 3, 16, 16)
    again = networks.trained_vit(checkpoint)(images)
    fresh = networks.untrained_vit(checkpoint)
    assert not torch.equal(again, fresh(images))
    block = fresh.blocks[0]
    assert isinstance(block.norm1, nn.Identity) and isinstance(block.attention, variants.SPA)
    assert isinstance(block.mlp.activation, variants.LeakyTAT)
    torch.manual_seed(0)
    constants = [checkpoint["args"][name] for name in ("alpha", "beta", "c")]
    built = networks.fresh_arm("skipless-paper+none+e-spa+tat", *constants, **shape_of(fresh))
    torch.testing.assert_close(built.state_dict(), fresh.state_dict())


def shape_of(model: ViT) -> dict:
    own = ("residual", *variants.STANDARD)
    return {name: value for name, value in model.config.items() if name not in own}


@pytest.mark.parametrize("name", ["value-skipinit", "shaped", "u-spa", "e-spa"])
def test_the_probe_s_k_is_the_jacobian_of_the_attention(name):
    attention = vit(attention=name, side=2).double()
    attention.embed(torch.randn(1, 3, 4, 4).double())
    attention = attention.blocks[1].attention
    with torch.no_grad():
        for p in attention.parameters():
            p.add_(0.3 * torch.randn_like(p))
    y, step = torch.randn(4, DIM).double(), 1e-6 * torch.randn(4, DIM).double()
    K = jacobians.attention_jacobian(attention, y)
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
