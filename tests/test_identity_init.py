"""Our own init: what a block computes at the start, at every depth, and how it is kept."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import correlation, share_of
from torch import nn

from beyond.identity_init import COUNTS_ON, NEEDS, hold_pairs, identity_init_
from minskip import ViT, conditioned_init_
from soap import SOAP
from support.data import normalise
from support.shapes import draw_shapes


def network(depth: int, dim: int = 64, num_heads: int = 8, side: int = 4, **more) -> ViT:
    torch.manual_seed(0)
    shape = dict(dim=dim, depth=depth, num_heads=num_heads, residual=False)
    return ViT(8 * side, 8, 10, **shape | COUNTS_ON | NEEDS | more)


def gradients(model: ViT, images, labels) -> dict[str, torch.Tensor]:
    F.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("ratio", [2, 4, 6])
def test_the_mlp_is_the_identity_plus_its_free_units(ratio):
    """GELU(z) - GELU(-z) = z: exactly g^2 x, whatever g is, and the free units beside it."""
    d, number = 96, 5
    g2 = 2 * number
    block = identity_init_(network(24, dim=d, mlp_ratio=ratio)).blocks[number - 1]
    x = F.layer_norm(torch.randn(500, d), (d,))
    W_1, W_2 = block.mlp.fc1.weight.T, block.mlp.fc2.weight.T
    with torch.no_grad():
        free = F.gelu(x @ W_1[:, 2 * d :]) @ W_2[2 * d :]
        assert torch.allclose(block.mlp(x) - free, g2 * x, atol=1e-5 * g2)
    if ratio > 2:
        assert free.std().item() == pytest.approx(0.65, rel=0.15)
    F_ = W_1[:, :d] / math.sqrt(g2)
    assert torch.allclose(F_.T @ F_, torch.eye(d), atol=1e-5)


@pytest.mark.parametrize("depth, dim, num_heads", [(4, 64, 8), (12, 96, 4), (48, 64, 2)])
def test_keepers_pass_tokens_on_and_fetchers_bring_the_mean(depth, dim, num_heads):
    """With W_Q = 0: delta x + (1 - delta) (mean of the others), and a projection of the mean."""
    model = identity_init_(network(depth, dim, num_heads))
    attention, n, d_h = model.blocks[1].attention, 16, dim // num_heads
    nn.init.zeros_(attention.W_Q.weight)
    kept = dim - max(1, num_heads // 4) * d_h
    delta, c2 = 1 - 1 / (n * depth), dim * dim
    x = F.layer_norm(torch.randn(1, n, dim), (dim,))
    with torch.no_grad():
        y, P = attention(x)[0], attention.weights(x)[0]
        own = P.diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(own[: kept // d_h], torch.tensor(delta), atol=1e-6)
        assert torch.allclose(own[kept // d_h :], torch.tensor(1 / n), atol=1e-6)
        others = (x[0].sum(0) - x[0]) / (n - 1)
        expected = c2 * (delta * x[0] + (1 - delta) * others)
        assert torch.allclose(y[:, :kept], expected[:, :kept], rtol=1e-4, atol=1e-5 * c2)
        frame = attention.W_V.weight.T[:, kept:] / math.sqrt(c2)
        assert torch.allclose(frame.T @ frame, torch.eye(dim - kept), atol=1e-5)
        fetched = c2 * x[0].mean(0) @ frame
        assert torch.allclose(y[:, kept:], fetched.expand(n, -1), rtol=1e-4, atol=1e-5 * c2)


@pytest.mark.parametrize(
    "depth, dim, num_heads, side, pool",
    [(4, 64, 8, 4, "mean"), (12, 96, 3, 14, "cls"), (24, 64, 2, 4, "mean"), (48, 96, 8, 4, "mean"),
     (12, 64, 4, 28, "mean")],
)  # fmt: skip
def test_tokens_stay_apart_at_every_depth(depth, dim, num_heads, side, pool):
    """Correlation below .9 after the last block, with 4 to 48 blocks and 16 to 784 tokens."""
    images = normalise(draw_shapes([0, 1], 8 * side, "val")[0])
    model = identity_init_(network(depth, dim, num_heads, side, pool=pool))
    [end] = model.forward_features(images, [depth])
    assert correlation(end) < 0.9 and end.isfinite().all()
    if depth == 12 and side == 14:  # where they are all alike with the paper's constants
        paper = conditioned_init_(network(depth, dim, num_heads, side))
        assert correlation(paper.forward_features(images, [depth])[0]) > 0.99


@pytest.mark.parametrize("n", [2, 9, 16, 17, 690])
def test_keepers_keep_their_token_however_many_there_are(n):
    """On images of any size delta is the training's 1 - 1/(n_0 L), and fetchers take the mean."""
    n_0, depth = 16, 3
    attention = identity_init_(network(depth)).blocks[1].attention
    x = torch.randn(1, n, 64)
    with torch.no_grad():
        attention.W_Q.weight.zero_()
        P = attention.weights(x)[0]
        assert torch.allclose(P.diagonal(dim1=-2, dim2=-1)[:6], torch.tensor(1 - 1 / (n_0 * depth)))
        assert torch.allclose(P[6:], torch.tensor(1 / n))
        if n == n_0:  # to the bit, as before there were other sizes
            b, q = attention.diagonal_bias, torch.randn(1, 8, n, 8)
            assert torch.equal(attention.logit_bias(q)[0], b[:, None, None] * torch.eye(n))


def test_tokens_stay_apart_on_larger_images_too():
    """Trained at 16 tokens, asked at 576; with b as it is .89 instead of .30."""
    images = normalise(draw_shapes([0, 1], 192, "val")[0])
    [end] = identity_init_(network(12)).forward_features(images, [12])
    assert correlation(end) < 0.35


def test_the_gradient_of_block_l_is_the_first_block_s_over_l():
    """Because g^2 = 2 l: block l changes 1/l of what it is handed. A residual network's gradients
    are alike in all blocks; block 1's are a few times as large, W_V's in units of its entries, c.

    The free units' follow 1/l in all 24 blocks, the fetchers' and W_Q's until two thirds of them,
    from where on tokens are more alike.
    """
    images, labels, _ = draw_shapes(list(range(8)), 32, "val")
    images = normalise(images)
    found = gradients(identity_init_(network(24)), images, labels)
    residual = ViT(32, 8, 10, dim=64, depth=24, num_heads=8, pool="mean", pos_embed_std=0.5)
    theirs = gradients(residual, images, labels)
    everything, free = slice(None), slice(128, None)
    for path, part, unit, last, spread in (
        ("mlp.fc1.weight", (free, everything), 1, 24, 1.4),
        ("mlp.fc2.weight", (everything, free), 1, 24, 1.4),
        ("attention.W_V.weight", (slice(48, None), everything), 64, 16, 2),  # the fetchers
        ("attention.W_Q.weight", (everything, everything), 1, 16, 3),
    ):
        norms = [
            block * found[f"blocks.{block - 1}.{path}"][part].norm().item()
            for block in range(1, last + 1)
        ]
        assert max(norms) < spread * min(norms), path
        first = f"blocks.0.{path}"
        assert 1 < unit * found[first][part].std() / theirs[first][part].std() < 15, path
    for block in range(24):
        assert found[f"blocks.{block}.attention.diagonal_bias"].abs().min() > 0  # of every head
    assert not any("blocks" in name and "norm" in name for name in found)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="pairs take 2 x 64 hidden units; there are 64"):
        identity_init_(network(2, mlp_ratio=1))
    with pytest.raises(ValueError, match="two heads or more"):
        identity_init_(network(2, num_heads=1))
    for changed in (dict(diagonal_bias=False), dict(norm_affine=True)):
        with pytest.raises(TypeError, match="diagonal_bias=True, norm_affine=False"):
            identity_init_(network(2, **changed))
    with pytest.raises(TypeError, match=r"minskip\.ViT"):
        identity_init_(nn.Linear(2, 2))


def test_all_weights_are_drawn_by_the_generator_and_old_biases_are_cleared():
    """Whatever torch's global generator does, and whatever the network held before."""
    nets = [network(2) for _ in range(3)]
    for linear in (m for m in nets[0].blocks.modules() if isinstance(m, nn.Linear)):
        nn.init.ones_(linear.bias)
    for net, seed in zip(nets, (3, 3, 4)):
        identity_init_(net, torch.Generator().manual_seed(seed))  # the global one has moved on
    model, again, changed = (net.state_dict() for net in nets)
    for name, weight in model.items():
        assert torch.equal(weight, again[name]), name
        if name.startswith("blocks") and name.endswith(".bias"):
            assert weight.abs().max() == 0, name
        if any(part in name for part in ("W_V.weight", "fc1.weight", "fc2.weight")):
            assert not torch.equal(weight, changed[name]), name
    first, second = (model[f"blocks.{b}.mlp.fc1.weight"][128:] for b in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind, as_list", [(SOAP, False), (torch.optim.AdamW, True)])
def test_pairs_take_a_tenth_of_each_step_and_all_else_the_whole(kind, as_list):
    """Weight decay included: two optimizers, one of them held, on the same network's gradients."""
    images, labels, _ = draw_shapes(list(range(4)), 32, "val")
    model = identity_init_(network(2))
    twin = copy.deepcopy(model)
    held, free = (kind(net.parameters(), lr=1e-2, weight_decay=0.5) for net in (model, twin))
    hold_pairs(held, [(b.mlp.fc1, b.mlp.fc2) for b in model.blocks] if as_list else model)
    for _ in range(3):
        twin.load_state_dict(model.state_dict())  # so that gradients stay equal
        before = copy.deepcopy(model.state_dict())
        for net, optimizer in ((model, held), (twin, free)):
            net.zero_grad()
            gradients(net, normalise(images), labels)
            optimizer.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters()):
            expected = share_of(name, p) * (q - before[name])
            torch.testing.assert_close(p - before[name], expected, rtol=1e-3, atol=1e-6, msg=name)
    pair = "blocks.1.mlp.fc1.weight"
    assert (twin.state_dict()[pair] - before[pair])[:128].abs().mean() > 1e-4
