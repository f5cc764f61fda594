"""The model and its init, against formulas and against other people's implementations."""

import inspect
import math

import pytest
import torch
from torch import nn

from minskip import (
    MLP,
    PRESETS,
    Attention,
    Block,
    ViT,
    conditioned_init_,
    orthogonal_mlp_weight,
    query_key_projections,
    value_output_projections,
)
from support.shapes import draw_shapes

TINY = dict(image_size=16, patch_size=8, num_classes=5, dim=24, depth=3, num_heads=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_with(W_Q, W_K, W_V, W_O, heads: int) -> Attention:
    """Our attention layer in float64 with these weights of y = x W, and no biases."""
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


@pytest.mark.parametrize("width, c", [(48, 3.0), (192, 0.7)])
def test_value_output_product_has_condition_number_one(width, c):
    W_V, W_O = value_output_projections(width, c, generator=seeded())
    singular = torch.linalg.svdvals(W_V @ W_O)
    torch.testing.assert_close(singular, torch.full_like(singular, c**2), rtol=1e-5, atol=0)


def test_one_head_recovers_alpha_z_plus_beta_i_whole():
    """With one head nothing is truncated, so Z can be read back: it must be N(0, 1/d)."""
    d, alpha, beta = 256, 1.7, 0.9
    W_Q, W_K = query_key_projections(d, 1, alpha, beta, generator=seeded())
    Z = (W_Q.double() @ W_K.double().T - beta * torch.eye(d)) / alpha
    assert abs(Z.mean()) < 5 / d / math.sqrt(d)
    assert Z.std() * math.sqrt(d) == pytest.approx(1, abs=0.02)
    kurtosis = (Z / Z.std()).pow(4).mean()
    assert kurtosis == pytest.approx(3, abs=0.1)


def test_heads_have_the_law_of_a_dense_svd_per_head():
    """Rotating one SVD is, in law, the same as the plain way: a fresh Z and SVD for each head."""
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
    # top singular values, weight of the identity, size and symmetry of the rest
    for statistic in (
        lambda B: torch.linalg.svdvals(B)[:, :d_h].mean(0),
        lambda B: B.diagonal(dim1=-2, dim2=-1).mean().reshape(1),
        lambda B: B.std(dim=(-2, -1)).mean().reshape(1),
        lambda B: (B * B.mT).sum((-2, -1)).mean().reshape(1),
    ):
        assert torch.allclose(statistic(ours), statistic(plain), rtol=0.03)
    # and the heads of a layer have different singular vectors
    a, b = (torch.linalg.svd(ours[h])[0][:, :d_h] for h in (0, 1))
    overlap = (a.T @ b).pow(2).mean() * d
    assert overlap == pytest.approx(1, abs=0.15)


def test_query_and_key_share_the_singular_values_evenly():
    W_Q, W_K = query_key_projections(64, 4, generator=seeded())
    for h in range(4):
        q, k = W_Q[:, 16 * h : 16 * (h + 1)], W_K[:, 16 * h : 16 * (h + 1)]
        assert torch.allclose(q.T @ q, k.T @ k, atol=1e-5)
        assert torch.allclose(q.T @ q, torch.diag((q.T @ q).diagonal()), atol=1e-5)


def test_the_init_puts_every_weight_into_every_block():
    """W_V W_O is c^2 orthogonal, W_Q W_K^T alpha Z + beta I, fc1 2 x and fc2 1 x orthogonal."""
    alpha, beta, c, d = 0.01, 1.3, 1.7, 24
    model = ViT(**TINY | dict(num_heads=1), residual=False)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    for linear in (m for m in model.blocks.modules() if isinstance(m, nn.Linear)):
        nn.init.ones_(linear.bias)
    conditioned_init_(model, alpha, beta, c, seeded())
    eye, close = torch.eye(d), dict(atol=1e-4, rtol=0)
    for block in model.blocks:
        a, mlp = block.attention, block.mlp
        W_V_W_O, W_Q_W_K = a.W_V.weight.T @ a.W_O.weight.T, a.W_Q.weight.T @ a.W_K.weight
        torch.testing.assert_close(W_V_W_O @ W_V_W_O.T, c**4 * eye, **close)
        torch.testing.assert_close(a.W_V.weight @ a.W_V.weight.T, c**2 * eye, **close)
        torch.testing.assert_close(W_Q_W_K, beta * eye, atol=0.02, rtol=0)
        assert (W_Q_W_K - beta * eye).std().item() == pytest.approx(alpha / d**0.5, rel=0.1)
        torch.testing.assert_close(mlp.fc1.weight.T @ mlp.fc1.weight, 4 * eye, **close)
        torch.testing.assert_close(mlp.fc2.weight @ mlp.fc2.weight.T, eye, **close)
    for name, x in model.state_dict().items():  # biases are zero, and the rest is left alone
        if "norm" in name or "blocks" not in name:
            assert torch.equal(x, before[name]), name
        elif name.endswith("bias"):
            assert x.abs().max() == 0, name


def test_all_weights_are_drawn_by_the_generator_and_keep_their_dtype():
    """Whatever torch's global generator does; bf16 weights are the float32 ones, rounded."""
    nets = [ViT(**TINY) for _ in range(4)]
    nets[1].bfloat16()
    for net, seed in zip(nets, (7, 7, 7, 8)):
        torch.rand(1)  # moves the global generator
        conditioned_init_(net, generator=seeded(seed))
    first, rounded, again, other = (dict(net.blocks.named_parameters()) for net in nets)
    for name in (name for name in first if name.endswith("weight") and "norm" not in name):
        assert torch.equal(first[name], again[name]), name
        assert torch.equal(first[name].bfloat16(), rounded[name]), name
        assert not torch.equal(first[name], other[name]), name
        assert not torch.equal(first[name], first[f"{(int(name[0]) + 1) % 3}{name[1:]}"]), name
    W_Q = first["0.attention.W_Q.weight"]  # one head's columns are orthogonal, two heads' are not
    assert (W_Q @ W_Q.T)[:8, 8:].abs().max() > 0.1


@pytest.mark.parametrize(
    "constants",
    [
        dict(c=0.0),
        dict(alpha=-1.0),
        dict(alpha=0.0, beta=0.0),
        dict(beta=math.nan),
        dict(c=math.inf),
    ],
)
def test_init_refuses_impossible_constants(constants):
    with pytest.raises(ValueError, match="c must be positive, alpha and beta"):
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


# ---- tokens at initialisation --------------------------------------------------------------------


def correlation(x: torch.Tensor) -> float:
    """Mean cosine between two different tokens, for (n, d)."""
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


def test_default_attention_is_uniform_and_leaves_no_token_differences():
    """The logits q k^T / sqrt(d_h) have the standard deviation s = d std^2, and one layer makes
    1 - correlation about s^2 (1 + n/d): the reason why there are other inits."""
    n, d, std = 64, 384, 0.02
    torch.manual_seed(0)
    attention = ViT(16, 8, dim=d, depth=1, num_heads=1).blocks[0].attention
    s = d * std**2
    with torch.no_grad():
        x = torch.randn(4 * n, d)
        logits = attention.W_Q(x) @ attention.W_K(x).T / math.sqrt(d)
        assert logits.std().item() == pytest.approx(s, rel=0.05)
        lost = [1 - correlation(attention(torch.randn(1, n, d))[0]) for _ in range(10)]
    assert sum(lost) / 10 == pytest.approx(s**2 * (1 + n / d), rel=0.2)


def test_tokens_become_alike_at_once_by_the_default_init_and_later_by_the_paper_s():
    """After two blocks; with the published constants before block 12, at this small size."""
    images, _, _ = draw_shapes([0], 32, "train")
    after = {}
    for init in ("default", "conditioned"):
        torch.manual_seed(0)
        model = ViT(32, 8, 10, **PRESETS["nano"], residual=False, pos_embed_std=0.5)
        if init == "conditioned":
            conditioned_init_(model)
        with torch.no_grad():
            tokens = model.forward_features(images / 127.5 - 1, [1, 2, 12])
        after[init] = [correlation(t[0]) for t in tokens]
    assert after["default"][0] > 0.99 and after["default"][1] > 0.999999
    assert after["conditioned"][0] < 0.5 and after["conditioned"][1] < 0.8
    assert after["conditioned"][2] > 0.99


# ---- the model -----------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    """Table 1 of Dosovitskiy et al. 2021, and of Touvron et al. 2021 for tiny and small."""
    sizes = {name: tuple(PRESETS[name].values()) for name in ("tiny", "small", "base", "large")}
    assert [*PRESETS["base"]] == ["dim", "depth", "num_heads"]
    assert sizes == dict(
        tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16)
    )


@pytest.mark.parametrize("preset, name", [("tiny", "vit_tiny"), ("small", "vit_small")])
def test_residual_vit_equals_timm(preset, name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"{name}_patch16_224", pretrained=False).eval()
    ours = ViT(224, 16, 1000, **PRESETS[preset]).eval()
    weights = {}
    with torch.no_grad():
        for p in theirs.parameters():  # zero biases and equal norms would hide mistakes
            p.add_(0.02 * torch.randn_like(p))
    for name, value in theirs.state_dict().items():
        if ".attn.qkv." in name:
            for part, letter in zip(value.chunk(3), "QKV"):
                weights[name.replace("attn.qkv", f"attention.W_{letter}")] = part
        else:
            name = name.replace("patch_embed.proj", "patch_embed")
            weights[name.replace("attn.proj", "attention.W_O")] = value
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() < 1e-5


def test_the_skip_is_the_only_difference():
    """With skips x + f(x), twice; without them f(x), with the same sub-blocks and norms."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 24)
    for skip in (0, 1):
        block = Block(24, 3, 4.0, residual=bool(skip))
        for p in block.parameters():
            p.data.add_(0.1 * torch.randn_like(p))  # equal norms could be exchanged unnoticed
        y = skip * x + block.attention(block.norm1(x))
        y = skip * y + block.mlp(block.norm2(y))
        assert torch.equal(block(x), y)


def test_attention_written_out():
    """Head by head in float64, from x W_Q, x W_K, x W_V, W_O; biases and all."""
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    Q, K, V = (x[0] @ W.weight.T + W.bias for W in (attention.W_Q, attention.W_K, attention.W_V))
    heads = []
    for h in range(3):
        q, k, v = (Y[:, 4 * h : 4 * h + 4] for Y in (Q, K, V))
        P = (q @ k.T / 2).exp()  # sqrt(d_h) = 2
        P = P / P.sum(dim=1, keepdim=True)
        assert torch.allclose(attention.weights(x)[0, h], P, atol=1e-12)
        heads.append(P @ v)
    expected = torch.cat(heads, dim=1) @ attention.W_O.weight.T + attention.W_O.bias
    assert torch.allclose(attention(x)[0], expected, atol=1e-12)


def test_features_after_chosen_blocks():
    model = ViT(**TINY)
    images = torch.randn(2, 3, 16, 16)
    embedded, last, first = model.forward_features(images, [0, 3, 1])
    assert torch.equal(embedded, model.embed(images))
    assert torch.equal(model.blocks[0](embedded), first)
    assert torch.equal(model.classify(last), model(images))
    assert torch.equal(model.head(model.norm(last)[:, 0]), model(images))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        model.forward_features(images, [4])


@pytest.mark.parametrize("pool, tokens", [("cls", 5), ("mean", 4)])
def test_pooling_and_other_image_sizes(pool, tokens):
    model = ViT(**TINY, pool=pool)
    [last] = model.forward_features(torch.randn(1, 3, 16, 16), [3])
    assert last.shape == (1, tokens, 24)
    wide = torch.randn(1, 3, 16, 40)
    [last] = model.forward_features(wide, [3])
    assert last.shape == (1, 10 + (pool == "cls"), 24)
    if pool == "mean":
        assert torch.allclose(model(wide), model.head(model.norm(last).mean(dim=1)))


def test_pos_embed_is_resized_like_dinos():
    """Bicubic, without antialiasing; the class token keeps its own. In bf16 too."""
    model = ViT(32, 8, 5, dim=24, depth=1, num_heads=3, pos_embed_std=1.0)
    resized = model.interpolate_pos_embed(6, 3)
    assert torch.equal(resized[:, 0], model.pos_embed[:, 0])
    grid = model.pos_embed[0, 1:].detach().reshape(4, 4, 24).permute(2, 0, 1)[None]
    expected = nn.functional.interpolate(grid, (6, 3), mode="bicubic")[0]
    assert torch.allclose(resized[0, 1:], expected.flatten(1).T, atol=1e-6)
    assert torch.equal(model.interpolate_pos_embed(4, 4), model.pos_embed)
    with torch.no_grad():
        low = model.to(torch.bfloat16)(torch.randn(1, 3, 48, 24, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_the_default_init_has_the_standard_deviations_asked_for():
    """Not 12 % less, as after a truncation at two of them."""
    model = ViT(64, 4, 500, dim=96, depth=1, num_heads=3, pos_embed_std=1.0)
    assert model.pos_embed.std().item() == pytest.approx(1, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.patch_embed.weight.std().item() == pytest.approx(48**-0.5, rel=0.03)
    assert model.cls_token.abs().max() < 1e-5
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(b.abs().max() == 0 for b in biases)


def test_drop_path_drops_whole_updates_and_only_in_training():
    torch.manual_seed(0)
    block = Block(24, 3, 4.0, residual=True, drop_path=0.999)
    x = torch.randn(8, 4, 24)
    assert torch.equal(block.train()(x), x)
    assert not torch.allclose(block.eval()(x), x)
    blocks = ViT(**TINY, drop_path=0.3).blocks
    rates = [getattr(block.drop_path, "p", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])  # growing with depth
    assert blocks[1].drop_path.mode == "row"  # an image at a time


def test_a_network_is_built_again_from_its_config():
    model = ViT(**TINY, pool="mean", residual=False, pos_embed_std=0.3)
    assert model.config.keys() >= {"image_size", "dim", "residual", "pool", "in_channels"}
    ViT(**model.config).load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(image_size=17), "patch size must divide"),
        (dict(num_heads=5), "num_heads must divide dim"),
        (dict(pool="max"), "pool"),
        (dict(drop_path=1.0), "drop_path must lie"),
        (dict(residual=False, drop_path=0.1), "drop_path needs a skip"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**TINY, **bad})
    with pytest.raises(ValueError, match="patch size must divide"):
        ViT(**TINY)(torch.zeros(1, 3, 16, 20))


# ---- copied elsewhere ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, arguments, shape",
    [
        (value_output_projections, (12, 2.0), (2, 12, 12)),
        (query_key_projections, (12, 3), (2, 12, 12)),
        (orthogonal_mlp_weight, (12, 48), (12, 48)),
    ],
)
def test_each_function_works_when_copied_alone(function, arguments, shape):
    """Its text below `import math, torch`, in an empty file."""
    names = {}
    exec("import math, torch\n\n" + inspect.getsource(function), names)
    torch.manual_seed(0)
    copied = names[function.__name__](*arguments)
    torch.manual_seed(0)
    ours = function(*arguments)
    for a, b in zip(copied, ours):
        assert torch.equal(a, b)
    assert tuple(torch.stack(list(copied)).shape) == shape


@pytest.mark.parametrize("residual, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_under_bf16_a_skip_keeps_tokens_in_float32(residual, dtype):
    """The README names this limit: the two networks are then compared at different precision."""
    model = ViT(16, 8, dim=32, depth=2, num_heads=2, num_classes=3, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_features(torch.randn(2, 3, 16, 16), [0, 1, 2])
    assert [x.dtype for x in tokens] == [torch.float32, dtype, dtype]
