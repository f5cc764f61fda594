"""The model and its init, against formulas and against other people's implementations."""

import math
import statistics
import time

import pytest
import torch
from torch import nn

from common import draw_shapes, normalise
from jacobian_probe import attention_matrices, gradient_norms, token_statistics
from minskip import (
    MLP,
    PRESETS,
    Attention,
    Block,
    ViT,
    centred_gelu,
    conditioned_init_,
    depth_constants,
    haar_orthogonal,
    orthogonal_mlp_weight,
    query_key_projections,
    value_output_projections,
)

TINY = dict(image_size=16, patch_size=8, num_classes=5, width=24, depth=3, heads=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_with(W_Q, W_K, W_V, W_O, heads: int) -> Attention:
    """Our attention layer with given float64 weights of y = x W, no biases."""
    attention = Attention(len(W_Q), heads).double()
    with torch.no_grad():
        for name, W in dict(W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O).items():
            getattr(attention, name).weight.copy_(W.T)
            getattr(attention, name).bias.zero_()
    return attention


def autograd_jacobian(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """d vec(y) / d vec(x), (n d, n d), rows the outputs."""
    J = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], x)
    return J.reshape(x.numel(), x.numel())


def random_projections(d: int, seed: int = 0):
    g = seeded(seed)
    return [torch.randn(d, d, generator=g, dtype=torch.float64) / math.sqrt(d) for _ in range(4)]


# ---- the init's formulas -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [48, 192])
def test_value_output_product_has_condition_number_one(width):
    W_V, W_O = value_output_projections(width, c=3.0, generator=seeded())
    singular = torch.linalg.svdvals(W_V @ W_O)
    assert torch.allclose(singular, torch.full_like(singular, 9.0), rtol=1e-5)


def test_one_head_recovers_alpha_z_plus_beta_i_whole():
    """With one head nothing is truncated, so Z can be read back: it must be N(0, 1/d)."""
    d, alpha, beta = 256, 2.0, 0.6
    W_Q, W_K = query_key_projections(d, 1, alpha, beta, generator=seeded())
    Z = (W_Q.double() @ W_K.double().T - beta * torch.eye(d)) / alpha
    assert abs(Z.mean()) < 5 / d / math.sqrt(d)
    assert Z.std() * math.sqrt(d) == pytest.approx(1, abs=0.02)
    kurtosis = (Z / Z.std()).pow(4).mean()
    assert kurtosis == pytest.approx(3, abs=0.1)


def test_heads_have_the_law_of_a_dense_svd_per_head():
    """Rotating one SVD equals, in law, the plain reading: a fresh Z and a dense SVD per head."""
    d, heads, alpha, beta = 96, 3, 1.0, 1.0
    d_h = d // heads
    plain, ours = [], []
    g = seeded(1)
    for _ in range(20):
        W_Q, W_K = query_key_projections(d, heads, alpha, beta, generator=g)
        for h in range(heads):
            Z = torch.randn(d, d, generator=g) / math.sqrt(d)
            U, S, Vh = torch.linalg.svd(alpha * Z + beta * torch.eye(d))
            plain.append((U[:, :d_h] * S[:d_h]) @ Vh[:d_h])
            columns = slice(h * d_h, (h + 1) * d_h)
            ours.append(W_Q[:, columns] @ W_K[:, columns].T)
    plain, ours = torch.stack(plain), torch.stack(ours)
    # top singular values, share of the identity, size and symmetry of the rest
    for statistic in (
        lambda B: torch.linalg.svdvals(B)[:, :d_h].mean(0),
        lambda B: B.diagonal(dim1=-2, dim2=-1).mean().reshape(1),
        lambda B: B.std(dim=(-2, -1)).mean().reshape(1),
        lambda B: (B * B.mT).sum((-2, -1)).mean().reshape(1),
    ):
        assert torch.allclose(statistic(ours), statistic(plain), rtol=0.03)
    # and the heads of a layer do not share their singular vectors
    a, b = (torch.linalg.svd(ours[h])[0][:, :d_h] for h in (0, 1))
    overlap = (a.T @ b).pow(2).mean() * d
    assert overlap == pytest.approx(1, abs=0.15)


def test_query_and_key_share_the_singular_values_evenly():
    W_Q, W_K = query_key_projections(64, 4, generator=seeded())
    for h in range(4):
        q, k = W_Q[:, 16 * h : 16 * (h + 1)], W_K[:, 16 * h : 16 * (h + 1)]
        assert torch.allclose(q.T @ q, k.T @ k, atol=1e-5)
        assert torch.allclose(q.T @ q, torch.diag((q.T @ q).diagonal()), atol=1e-5)


def test_mlp_weights_are_scale_corrected_orthogonal():
    up = orthogonal_mlp_weight(48, 192, generator=seeded()).double()
    down = orthogonal_mlp_weight(192, 48, generator=seeded()).double()
    assert torch.allclose(up @ up.T, 4 * torch.eye(48).double(), atol=1e-5)
    assert torch.allclose(down.T @ down, torch.eye(48).double(), atol=1e-5)


def test_haar_matrices_are_centred():
    """Without the sign correction QR would favour one sign of the diagonal."""
    Q = haar_orthogonal(4000, 3, 3, generator=seeded())
    assert Q.mean(0).abs().max() < 4 / math.sqrt(3 * 4000)


def test_init_is_deterministic_and_respects_dtype():
    a, b = ViT(**TINY, residual=False), ViT(**TINY, residual=False).to(torch.bfloat16)
    conditioned_init_(a, generator=seeded(7))
    conditioned_init_(b, generator=seeded(7))
    wa, wb = a.blocks[1].attention.W_Q.weight, b.blocks[1].attention.W_Q.weight
    assert wb.dtype == torch.bfloat16
    assert torch.equal(wa.bfloat16(), wb)
    assert not a.blocks[0].attention.W_Q.weight.equal(a.blocks[1].attention.W_Q.weight)
    assert all(m.bias.abs().max() == 0 for m in a.blocks.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    "constants", [dict(c=0.0), dict(alpha=-1.0), dict(alpha=0.0, beta=0.0), dict(beta=math.nan)]
)
def test_init_refuses_impossible_constants(constants):
    with pytest.raises(ValueError, match=r"alpha|beta|c "):
        conditioned_init_(ViT(**TINY), **constants)


def test_init_refuses_models_it_does_not_know():
    with pytest.raises(TypeError, match=r"minskip\.ViT"):
        conditioned_init_(nn.Linear(3, 3))


# ---- the attention's Jacobian K: facts of the theory ---------------------------------------------


def test_one_token_attends_to_itself():
    W_Q, W_K, W_V, W_O = random_projections(16)
    x = torch.randn(1, 16, generator=seeded(), dtype=torch.float64)
    K = autograd_jacobian(attention_with(W_Q, W_K, W_V, W_O, 2), x)
    assert (K - (W_V @ W_O).T).abs().max() < 1e-12


def uniform_attention_jacobian(d=24, n=6, c=3.0):
    """K at W_Q = 0 (uniform attention) and W_V W_O = c^2 orthogonal."""
    W_V, W_O = (c * torch.linalg.qr(w).Q for w in random_projections(d)[:2])
    W_Q, W_K = torch.zeros(d, d, dtype=torch.float64), random_projections(d)[3]
    x = torch.randn(n, d, generator=seeded(2), dtype=torch.float64)
    return autograd_jacobian(attention_with(W_Q, W_K, W_V, W_O, 3), x), W_V @ W_O, d, c


def test_uniform_attention_has_rank_d():
    """Of n d directions only d survive: why a skipless block is ill-conditioned."""
    K, _, d, c = uniform_attention_jacobian()
    singular = torch.linalg.svdvals(K)
    assert (singular[:d] - c**2).abs().max() < 1e-10
    assert singular[d:].max() < 1e-10
    assert (K**2).sum().item() == pytest.approx(c**4 * d, rel=1e-10)


def test_a_skip_lifts_the_lost_directions_to_one():
    K, W, d, _ = uniform_attention_jacobian()
    singular = torch.linalg.svdvals(K + torch.eye(len(K)))
    expected = torch.linalg.svdvals(torch.eye(d) + W)
    assert singular.max().item() == pytest.approx(max(expected.max().item(), 1), rel=1e-9)
    assert singular.min().item() == pytest.approx(min(expected.min().item(), 1), rel=1e-9)


def test_layernorm_loses_two_directions_a_token():
    d = 32
    x = torch.randn(1, d, generator=seeded(), dtype=torch.float64) * 3 + 1
    norm = nn.LayerNorm(d, eps=0.0).double()
    singular = torch.linalg.svdvals(autograd_jacobian(norm, x))
    sd = x.std(correction=0)
    assert (singular[: d - 2] - 1 / sd).abs().max() < 1e-10
    assert singular[d - 2 :].max() < 1e-10


# ---- tokens at initialisation --------------------------------------------------------------------


def correlation(x: torch.Tensor) -> float:
    """Mean cosine between two different tokens, (n, d)."""
    x = nn.functional.normalize(x, dim=-1)
    n = len(x)
    return ((x @ x.T).sum().item() - n) / (n * (n - 1))


def test_gelu_alone_correlates_independent_tokens():
    """One orthogonal MLP takes uncorrelated tokens to (E gelu)^2 / E gelu^2 = 0.187."""
    d = 384
    mlp = MLP(d, 4 * d)
    with torch.no_grad():
        for fc in (mlp.fc1, mlp.fc2):
            fc.weight.copy_(orthogonal_mlp_weight(fc.in_features, fc.out_features).T)
            fc.bias.zero_()
        x = torch.randn(64, d, generator=seeded())
        assert correlation(mlp(x)) == pytest.approx(0.18714, abs=0.03)


def test_default_logits_are_small():
    """Their standard deviation is d std^2 before the division by sqrt(d_h): uniform attention."""
    d, std = 384, 0.02
    torch.manual_seed(0)
    attention = Attention(d, 1)
    for W in (attention.W_Q, attention.W_K):
        nn.init.normal_(W.weight, std=std)
        nn.init.zeros_(W.bias)
    x = torch.randn(256, d)
    with torch.no_grad():
        logits = attention.W_Q(x) @ attention.W_K(x).T / math.sqrt(d)
    assert logits.std().item() == pytest.approx(d * std**2, rel=0.05)


def test_one_default_attention_layer_leaves_no_token_differences():
    """1 - correlation falls to about s^2 (1 + n/d), s = d std^2: the reason --init exists."""
    n, d, std = 64, 384, 0.02
    torch.manual_seed(0)
    attention = Attention(d, 1)
    for W in (attention.W_Q, attention.W_K, attention.W_V, attention.W_O):
        nn.init.normal_(W.weight, std=std)
        nn.init.zeros_(W.bias)
    with torch.no_grad():
        lost = [1 - correlation(attention(torch.randn(1, n, d))[0]) for _ in range(10)]
    s = d * std**2
    assert sum(lost) / 10 == pytest.approx(s**2 * (1 + n / d), rel=0.2)


def test_default_init_loses_the_tokens_at_once_and_the_conditioned_one_later():
    """Two blocks suffice for the default init; the published constants lose them before block 12.

    That they do not last longer is a fact about them, and shown here as one.
    """
    images, _, _ = draw_shapes([0], 32, "train")
    after = {}
    for init in ("default", "conditioned"):
        torch.manual_seed(0)
        model = ViT(32, 8, 10, **PRESETS["nano"], residual=False, position_std=0.5)
        if init == "conditioned":
            conditioned_init_(model)
        with torch.no_grad():
            tokens = model.forward_features(images / 127.5 - 1, [1, 2, 12])
        after[init] = [correlation(t[0]) for t in tokens]
    assert after["default"][0] > 0.99 and after["default"][1] > 0.999999
    assert after["conditioned"][0] < 0.5 and after["conditioned"][1] < 0.8
    assert after["conditioned"][2] > 0.99


# ---- the model -----------------------------------------------------------------------------------


# ---- the scheme that holds at every depth --------------------------------------------------------


def test_the_mean_and_the_spread_of_a_gelu():
    """E phi^2 = .425221, E phi'^2 = .455851 at g = 1; E phi = g^2 / sqrt(2 pi (1 + g^2))."""
    for gain in (0.2, 0.5, 1.0):
        mean, _ = centred_gelu(gain)
        assert mean == pytest.approx(gain**2 / math.sqrt(2 * math.pi * (1 + gain**2)), rel=1e-6)
    mean, chi = centred_gelu(1.0)  # without the linear part z / 2, whose share is 1/4 in both
    assert chi == pytest.approx((1 + 0.455851 - 0.25) / (1 + 0.425221 - 0.25 - mean**2), rel=1e-5)
    assert centred_gelu(1e-3)[1] == pytest.approx(1, abs=1e-5)  # as good as linear


def depth_mlps(width: int, depth: int) -> list[MLP]:
    torch.manual_seed(0)
    model = ViT(8, 8, 0, width=width, depth=depth, heads=8, residual=False, pool="mean")
    return [block.mlp for block in conditioned_init_(model, scheme="depth").blocks]


def test_the_mlp_spreads_alike_tokens_as_much_as_attention_shrinks_them():
    """chi delta^2 = 1, measured: squared differences of alike tokens, mean over blocks' MLPs."""
    depth, width = 16, 256
    _, gain = depth_constants(width, 8, 1, depth)
    delta, (_, chi) = 1 - 1 / (2 * depth), centred_gelu(gain)
    assert chi * delta**2 == pytest.approx(1, abs=1e-6)
    x, step = torch.randn(2, 256, width, generator=seeded(2))
    x, y = nn.functional.layer_norm(torch.stack([x, x + 0.01 * step]), (width,))
    spread = []
    with torch.no_grad():
        for mlp in depth_mlps(width, depth):
            u, v = mlp(x), mlp(y)
            before, after = ((a - b).square().sum() / a.square().sum() for a, b in ((x, y), (u, v)))
            spread.append((after / before).item())
    assert statistics.mean(spread) == pytest.approx(chi, abs=0.005)
    assert token_statistics(u[None])["correlation"] == pytest.approx(0, abs=0.02)  # no mean left


def test_the_linear_part_of_the_mlp_is_the_identity_where_independent_frames_lose_rank():
    """Singular values of W_1 W_2 / 2: g on zero-mean tokens; those of independent ones reach 0.

    Those are cosines between two random d-dimensional subspaces of 4 d: between 0 and sqrt(3)/2.
    """
    width, depth = 128, 12
    mlp = depth_mlps(width, depth)[0]
    zero_mean = torch.eye(width) - 1 / width
    _, gain = depth_constants(width, 8, 1, depth)
    with torch.no_grad():
        linear = mlp.fc1.weight.T @ mlp.fc2.weight.T / 2
        assert torch.allclose(zero_mean @ linear, gain * zero_mean, atol=1e-5)
        assert mlp(torch.randn(5, width)).mean(dim=1).abs().max() < 1e-5  # LayerNorm finds no mean
        W_1 = orthogonal_mlp_weight(width, 4 * width, generator=seeded(0))
        W_2 = orthogonal_mlp_weight(4 * width, width, generator=seeded(1))
        cosines = torch.linalg.svdvals(W_1 @ W_2 / 2)
    assert cosines[0] == pytest.approx(math.sqrt(3) / 2, abs=0.02)
    assert cosines[-1] < 0.02


def test_the_depth_scheme_passes_zero_mean_tokens_on_unchanged():
    """W_V W_O = c^2 I, and W_Q = W_K with singular values sqrt(s) that give the logit gap."""
    width, heads, depth, c = 48, 3, 12, 2.0
    torch.manual_seed(0)
    model = ViT(16, 4, 0, width=width, depth=depth, heads=heads, residual=False, pool="mean")
    attention = conditioned_init_(model, c=c, scheme="depth").blocks[3].attention
    W_Q, W_K, W_V, W_O = (getattr(attention, f"W_{x}").weight.T for x in "QKVO")
    assert torch.allclose(W_V @ W_O, c**2 * torch.eye(width), atol=1e-4)
    assert torch.equal(W_Q, W_K)
    s, _ = depth_constants(width, heads, 16, depth)
    assert torch.allclose(W_Q.T @ W_Q, s * torch.eye(width), atol=1e-4)
    delta = 1 - 1 / (2 * depth)
    others = 15 * math.exp(-s * math.sqrt(width / heads) * (1 - 0.65))  # of one token's attention
    assert 1 / (1 + others) == pytest.approx(delta)


@pytest.mark.parametrize("mlp_ratio", [1, 2, 4])
def test_the_mlp_balances_attention_at_other_ratios(mlp_ratio):
    _, gain = depth_constants(64, 2, 17, 48, mlp_ratio)
    assert centred_gelu(gain, mlp_ratio)[1] * (1 - 1 / 96) ** 2 == pytest.approx(1, abs=1e-6)


def test_the_depth_scheme_refuses_what_it_does_not_fit():
    with pytest.raises(ValueError, match=r"mlp_ratio of at least 1, not 0\.5"):
        conditioned_init_(ViT(**TINY, mlp_ratio=0.5), scheme="depth")
    with pytest.raises(TypeError, match="number of tokens"):
        conditioned_init_(nn.Linear(2, 2), scheme="depth")


@torch.no_grad()
def own_share(block: Block, tokens: torch.Tensor) -> float:
    """Mean attention of a token to itself, over images, heads and tokens."""
    P = attention_matrices(block.attention, block.norm1(tokens))
    return P.diagonal(dim1=-2, dim2=-1).mean().item()


def depth_network(depth: int, width: int, heads: int, side: int, pool: str, scheme: str) -> ViT:
    torch.manual_seed(0)
    model = ViT(8 * side, 8, 10, width=width, depth=depth, heads=heads, residual=False,
                position_std=1.0, pool=pool)  # fmt: skip
    return conditioned_init_(model, scheme=scheme)


@pytest.mark.parametrize(
    "depth, width, heads, side, pool",
    [(6, 96, 3, 4, "cls"), (12, 64, 2, 4, "cls"), (12, 192, 3, 14, "mean"), (24, 192, 3, 4, "mean"),
     (96, 96, 3, 4, "mean"), (6, 96, 3, 28, "mean")],
)  # fmt: skip
def test_the_depth_scheme_keeps_tokens_apart_at_any_depth(depth, width, heads, side, pool):
    """Correlation at most .5 after the last block, where the paper's constants reach 1."""
    images, labels, _ = draw_shapes([0, 1, 2, 3], 8 * side, "val")
    images = normalise(images)
    model = depth_network(depth, width, heads, side, pool, "depth")
    tokens = model.forward_features(images, list(range(depth + 1)))
    assert token_statistics(tokens[-1])["correlation"] < 0.5
    shares = [own_share(block, x) for block, x in zip(model.blocks, tokens)]
    # Below delta: logits fluctuate, and 784 tokens are many for heads of 32 numbers.
    assert max(shares) < 0.999 and min(shares) > (0.3 if side < 28 else 0.1)
    norms = gradient_norms(model, tokens, labels)
    spread = {name: max(v) / min(v) for name, v in norms.items() if name != "tokens"}
    assert all(spread[name] < 30 for name in ("W_V", "W_O", "fc1", "fc2"))
    if pool == "mean" and depth <= 24:  # not at one class token, nor deeper (README)
        assert spread["W_Q"] < 60 and spread["W_K"] < 60
    if depth <= 12 and side < 28:
        paper = depth_network(depth, width, heads, side, pool, "paper")
        end = token_statistics(paper.forward_features(images, [depth])[0])
        assert end["correlation"] > (0.9 if depth == 6 else 0.999)


def test_init_refuses_a_scheme_it_does_not_know():
    with pytest.raises(ValueError, match='must be "paper" or "depth"'):
        conditioned_init_(ViT(**TINY), scheme="deep")


@pytest.mark.parametrize("preset, name", [("tiny", "vit_tiny"), ("small", "vit_small")])
def test_residual_vit_equals_timm(preset, name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"{name}_patch16_224", pretrained=False).eval()
    ours = ViT(224, 16, 1000, **PRESETS[preset]).eval()
    renamed = {
        "cls_token": "class_token",
        "pos_embed": "position_embedding",
        "patch_embed.proj": "patch_embedding",
        "attn.proj": "attention.W_O",
    }
    weights = {}
    with torch.no_grad():
        for p in theirs.parameters():  # timm's zero biases and unit norms would hide mistakes
            p.add_(0.02 * torch.randn_like(p))
    for name, value in theirs.state_dict().items():
        if ".attn.qkv." in name:
            for part, letter in zip(value.chunk(3), "QKV"):
                weights[name.replace("attn.qkv", f"attention.W_{letter}")] = part
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        weights[name] = value
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() < 1e-5


def test_the_skip_is_the_only_difference():
    """residual = r gives r x + f(x) twice; 0 gives the bare sub-blocks."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 24)
    for r in (0, 0.5, 1):
        block = Block(24, 3, 4.0, residual=r)
        y = r * x + block.attention(block.norm1(x))
        y = r * y + block.mlp(block.norm2(y))
        assert torch.allclose(block(x), y, atol=1e-6)


def test_features_after_chosen_blocks():
    model = ViT(**TINY)
    images = torch.randn(2, 3, 16, 16)
    embedded, last, first = model.forward_features(images, [0, 3, 1])
    assert torch.equal(embedded, model.embed(images))
    assert torch.equal(model.blocks[0](embedded), first)
    assert torch.equal(model.norm(last), model.forward_features(images))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        model.forward_features(images, [4])


@pytest.mark.parametrize("pool, tokens", [("cls", 5), ("mean", 4)])
def test_pooling_and_other_image_sizes(pool, tokens):
    model = ViT(**TINY, pool=pool)
    assert model.forward_features(torch.randn(1, 3, 16, 16)).shape == (1, tokens, 24)
    wide = torch.randn(1, 3, 16, 40)
    assert model.forward_features(wide).shape == (1, 10 + (pool == "cls"), 24)
    assert model(wide).shape == (1, 5)


def test_position_embedding_is_resized_like_an_image():
    model = ViT(32, 8, 5, width=24, depth=1, heads=3)
    with torch.no_grad():  # a linear ramp stays a ramp under bicubic interpolation
        ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1)
        model.position_embedding[:, 1:] = ramp
        resized = model.positions(8, 8)[0, 1:].reshape(8, 8, 24)
    assert torch.allclose(resized[:, 0], resized[:, 7])
    assert (resized[2:6, 0, 0].diff() - 0.5).abs().max() < 0.05


def test_drop_path_drops_whole_updates_and_only_in_training():
    torch.manual_seed(0)
    block = Block(24, 3, 4.0, residual=True, drop_path=0.999)
    x = torch.randn(8, 4, 24)
    assert torch.equal(block.train()(x), x)
    assert not torch.allclose(block.eval()(x), x)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(image_size=17), "patch size must divide"),
        (dict(heads=5), "heads must divide width"),
        (dict(pool="max"), "pool"),
        (dict(residual=2.0), "residual"),
        (dict(residual=False, drop_path=0.1), "drop_path needs a skip"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**TINY, **bad})
    with pytest.raises(ValueError, match="patch size must divide"):
        ViT(**TINY)(torch.zeros(1, 3, 16, 20))


def test_base_init_takes_seconds():
    """No timed assertion; the figure is in the README. This only shows that the sizes work."""
    model = ViT(**PRESETS["base"] | dict(depth=1), residual=False)
    started = time.time()
    conditioned_init_(model)
    print(f"one block of ViT-B: {time.time() - started:.2f} s")
    assert torch.linalg.svdvals(model.blocks[0].attention.W_V.weight).min() > 2.99
