"""The model and its init, against formulas and against other people's implementations."""

import inspect
import math

import pytest
import torch
from conftest import correlation
from torch import nn

from beyond.identity_init import (
    NEEDS,
    identity_init_,
    keepers_and_fetchers,
    mirrored_pairs,
    own_token_bias,
)
from minskip import (
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


# ---- the init's formulas -------------------------------------------------------------------------


def test_one_head_recovers_alpha_z_plus_beta_i_whole():
    """With one head nothing is truncated, so Z can be read back: mean 0 and variance 1/d."""
    d, alpha, beta = 256, 1.7, 0.9
    W_Q, W_K = query_key_projections(d, 1, alpha, beta, generator=seeded())
    Z = (W_Q.double() @ W_K.double().T - beta * torch.eye(d)) / alpha
    assert abs(Z.mean()) < 5 / d / math.sqrt(d)
    assert Z.std() * math.sqrt(d) == pytest.approx(1, abs=0.02)


def test_heads_have_the_law_of_a_dense_svd_per_head():
    """Rotating one SVD is, in law, the same as the plain way: a fresh Z and SVD for each head."""
    d, heads, alpha, beta = 96, 3, 1.0, 1.0
    d_h = d // heads
    plain, ours = [], []
    g = seeded(1)
    for _ in range(20):
        W_Q, W_K = query_key_projections(d, heads, alpha, beta, generator=g)
        for q, k in zip(W_Q.split(d_h, dim=1), W_K.split(d_h, dim=1)):
            Z = torch.randn(d, d, generator=g) / math.sqrt(d)
            U, S, Vh = torch.linalg.svd(alpha * Z + beta * torch.eye(d))
            plain.append((U[:, :d_h] * S[:d_h]) @ Vh[:d_h])
            ours.append(q @ k.T)
            # W_Q and W_K share the singular values evenly
            assert torch.allclose(q.T @ q, k.T @ k, atol=1e-5)
            assert torch.allclose(q.T @ q, torch.diag((q.T @ q).diagonal()), atol=1e-5)
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
    assert (a.T @ b).pow(2).mean() * d == pytest.approx(1, abs=0.15)


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


def test_init_refuses_impossible_constants_and_models_it_does_not_know():
    bad_c, bad_alpha = [(2, 1, 0), (2, 1, math.inf)], [(-1, 2, 3), (math.inf, 1, 3)]
    for bad in [*bad_c, *bad_alpha, (2, -1, 3), (1, math.nan, 3), (0, 0, 3)]:
        with pytest.raises(ValueError, match="c must be positive, alpha and beta"):
            conditioned_init_(ViT(**TINY), *bad)
    for other in (nn.Linear(3, 3), nn.ModuleDict(dict(blocks=nn.ModuleList([nn.GELU()])))):
        with pytest.raises(TypeError, match=r"minskip\.ViT"):
            conditioned_init_(other)


@pytest.mark.parametrize(
    "function, arguments",
    [(value_output_projections, (12, 2.0)), (query_key_projections, (12, 3)),
     (orthogonal_mlp_weight, (12, 48)), (keepers_and_fetchers, (16, 4)),
     (own_token_bias, (4, 17, 12)), (mirrored_pairs, (8, 32, 3))],
)  # fmt: skip
def test_each_function_works_when_copied_alone_and_under_any_default_dtype(function, arguments):
    """Its text below `import math, torch`, in an empty file. Half precision has no SVD: float32."""
    names = {}
    exec("import math, torch\n\n" + inspect.getsource(function), names)

    def drawn(function, dtype=torch.float32):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            return function(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)

    expected = drawn(function)
    copied = drawn(names[function.__name__])
    halves = (drawn(function, dtype) for dtype in (torch.bfloat16, torch.float16))
    for found in (copied, *halves):  # torch.equal refuses different dtypes
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(W.dtype == torch.float64 for W in drawn(function, torch.float64))


# ---- the attention's Jacobian K: facts of the theory ---------------------------------------------


def test_uniform_attention_has_rank_d_and_a_skip_lifts_the_lost_directions_to_one():
    """With W_Q = 0 and W_V W_O = c^2 orthogonal, K keeps d of n d directions: why a block without
    skips is ill-conditioned. A single token attends to itself: K = (W_V W_O)^T."""
    torch.manual_seed(0)
    d, n, c = 24, 6, 3.0
    attention = Attention(d, 3).double()
    nn.init.zeros_(attention.W_Q.weight)
    nn.init.zeros_(attention.W_Q.bias)
    for linear in (attention.W_V, attention.W_O):
        nn.init.orthogonal_(linear.weight, gain=c)

    def jacobian(n: int) -> torch.Tensor:
        x = torch.randn(n, d, dtype=torch.float64)
        J = torch.autograd.functional.jacobian(lambda x: attention(x[None])[0], x)
        return J.reshape(n * d, n * d)  # rows: outputs

    W, K = attention.W_O.weight @ attention.W_V.weight, jacobian(n)
    assert (jacobian(1) - W).abs().max() < 1e-12
    singular = torch.linalg.svdvals(K)
    assert (singular[:d] - c**2).abs().max() < 1e-10 and singular[d:].max() < 1e-10
    lifted = torch.linalg.svdvals(K + torch.eye(n * d))
    expected = torch.linalg.svdvals(W + torch.eye(d))
    assert lifted.max().item() == pytest.approx(max(expected.max().item(), 1), rel=1e-9)
    assert lifted.min().item() == pytest.approx(min(expected.min().item(), 1), rel=1e-9)


# ---- tokens at initialisation --------------------------------------------------------------------


def test_tokens_become_alike_at_once_by_the_default_init_and_later_by_the_paper_s():
    """After two blocks; with the published constants before block 12, at this small size."""
    images = draw_shapes([0], 32, "train")[0] / 127.5 - 1
    torch.manual_seed(0)
    model = ViT(32, 8, 10, **PRESETS["nano"], residual=False, pos_embed_std=0.5)
    first, second = (correlation(x) for x in model.forward_features(images, [1, 2]))
    assert first > 0.99 and second > 0.999999
    conditioned_init_(model)
    first, second, last = (correlation(x) for x in model.forward_features(images, [1, 2, 12]))
    assert first < 0.5 and second < 0.8 and last > 0.99


# ---- the model -----------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    """Table 1 of Dosovitskiy et al. 2021, and of Touvron et al. 2021 for tiny and small."""
    assert [*PRESETS["base"]] == ["dim", "depth", "num_heads"]
    assert {name: tuple(size.values()) for name, size in PRESETS.items() if name != "nano"} == dict(
        tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16)
    )


def test_residual_vit_equals_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    ours = ViT(224, 16, 1000, **PRESETS["tiny"]).eval()
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
    """x + f(x) with a skip, f(x) without, with the same sub-blocks and norms; in both halves of a
    block or in one."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 24)
    for residual, r, s in ((False, 0, 0), (True, 1, 1), ("attention", 1, 0), ("mlp", 0, 1)):
        block = Block(24, 3, 4.0, residual=residual)
        for p in block.parameters():
            p.data.add_(0.1 * torch.randn_like(p))  # equal norms could be exchanged unnoticed
        y = r * x + block.attention(block.norm1(x))
        assert torch.equal(block(x), s * y + block.mlp(block.norm2(y)))


@pytest.mark.parametrize("half, other", [("attention", "mlp"), ("mlp", "attention")])
def test_a_half_that_alone_keeps_its_skip_is_the_standard_one(half, other):
    """Neither init touches its weights; its norm is affine and its logits have no bias, even in a
    network built for the identity init, whose other half is as that init needs it."""
    for init_, needs in ((conditioned_init_, {}), (identity_init_, NEEDS)):
        model = ViT(**TINY | needs, residual=half)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        init_(model)
        for name, x in model.state_dict().items():
            changed = f".{other}." in name and name.endswith(("fc1.weight", "W_V.weight"))
            assert not changed or not torch.equal(x, before[name]), name
            assert f".{other}." in name or torch.equal(x, before[name]), name
    for block in model.blocks:
        norms = dict(attention=block.norm1, mlp=block.norm2)
        assert norms[half].elementwise_affine and not norms[other].elementwise_affine
        assert (block.attention.diagonal_bias is None) == (half == "attention")


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


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_pooling_and_other_image_sizes(pool):
    model = ViT(**TINY, pool=pool)
    for images in (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 40)):
        embedded, last, first = model.forward_features(images, [0, 3, 1])
        assert last.shape == (2, images.shape[-1] // 4 + (pool == "cls"), 24)
        assert torch.equal(embedded, model.embed(images))
        assert torch.equal(model.blocks[0](embedded), first)
        pooled = model.norm(last)[:, 0] if pool == "cls" else model.norm(last).mean(dim=1)
        torch.testing.assert_close(model.head(pooled), model(images))
        assert torch.equal(model.classify(last), model(images))
    with pytest.raises(ValueError, match=r"0\.\.3"):
        model.forward_features(images, [4])


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


@pytest.mark.parametrize(
    "bad, words",
    [(dict(image_size=17), "patch size must divide"), (dict(num_heads=5), "num_heads must divide"),
     (dict(pool="max"), "pool"), (dict(drop_path=1.0), "drop_path must lie"),
     (dict(residual=False, drop_path=0.1), "drop_path needs all skips"),
     (dict(residual="mlp", drop_path=0.1), "drop_path needs all"),
     (dict(residual="ffn"), 'residual is True, False, "attention" or "mlp", not \'ffn\'')],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**TINY, **bad})
    with pytest.raises(ValueError, match="patch size must divide image size: images are 16 x 20"):
        ViT(**TINY)(torch.zeros(1, 3, 16, 20))


@pytest.mark.parametrize("residual, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_under_bf16_a_skip_keeps_tokens_in_float32(residual, dtype):
    """The README names this limit: the two networks are then compared at different precision."""
    model = ViT(16, 8, dim=32, depth=2, num_heads=2, num_classes=3, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_features(torch.randn(2, 3, 16, 16), [0, 1, 2])
    assert [x.dtype for x in tokens] == [torch.float32, dtype, dtype]
