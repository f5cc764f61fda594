"""The three looks at tokens, each against the same computed by hand, and their commands."""

import json
import math
import shutil
from argparse import Namespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_PARTS, assert_fails_in_one_line, run_here, run_main, run_script
from einops import einsum, rearrange
from PIL import Image
from scipy.ndimage import binary_propagation
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

import eval_dense
import files
import networks
import pictures
import scenes
from data import MEAN, ORDER, STD, mixed_seeds
from minskip import PRESETS, ViT, conditioned_init_
from shapes import draw_shapes

CPU = torch.device("cpu")
SHAPE = dict(patch_size=8, dim=16, depth=2, num_heads=2)
ARGS = dict(init="paper", alpha=0.7, beta=1.0, c=2.0, seed=3)


def network(pool: str = "cls", residual: bool = False, image_size: int = 16, **more) -> ViT:
    """A small network whose every parameter counts: norms with gains, biases not zero."""
    torch.manual_seed(0)
    shape = SHAPE | dict(pos_embed_std=0.5) | more
    model = ViT(image_size, num_classes=5, **shape, residual=residual, pool=pool)
    conditioned_init_(model, 0.7, 1.0, 2.0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def save(path, model: ViT, ema: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(script="train_cls", args=ARGS, model_config=model.config, ema=ema)
    facts |= dict(classes=[], epoch=1, **OTHER_PARTS)
    files.save_checkpoint(path, facts | dict(model=model.state_dict()))


def normed(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def some_inputs(width: int = 24) -> Tensor:
    return torch.randn(3, 3, 16, width, generator=torch.Generator().manual_seed(1))


def parsed(monkeypatch, *words) -> Namespace:
    monkeypatch.setattr("sys.argv", ["eval_dense.py", *map(str, words)])
    args = eval_dense.parse_arguments()
    args.device = CPU
    return args


# ---- what is read off a network ------------------------------------------------------------------


def tokens_by_hand(model: ViT, images: Tensor) -> list[Tensor]:
    """Tokens after the embedding, the first block, the second."""
    tokens = [model.embed(images)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    return tokens


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_token_maps_are_normed_patch_tokens_of_the_blocks_in_the_order_asked(pool):
    model, images = network(pool), some_inputs()
    maps = eval_dense.token_maps(model, images, [2, 0, 1])
    tokens = tokens_by_hand(model, images)
    for number, found in zip([2, 0, 1], maps):
        x = tokens[number]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = (x * model.norm.weight + model.norm.bias)[:, -6:]  # 2 x 3 patches
        assert found.shape == (3, 16, 2, 3)
        for row in range(2):
            for column in range(3):
                assert torch.allclose(found[:, :, row, column], x[:, 3 * row + column], atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_keys_are_those_the_last_attention_computes(pool):
    model, images = network(pool), some_inputs()
    last = model.blocks[1]
    x = last.norm1(tokens_by_hand(model, images)[1])[:, -6:]
    keys = x @ last.attention.W_K.weight.T + last.attention.W_K.bias
    assert torch.allclose(eval_dense.last_keys(model, images), keys, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_class_attention_is_the_softmax_row_of_the_class_token(number):
    model, images = network(), some_inputs()
    a, norm = model.blocks[number - 1].attention, model.blocks[number - 1].norm1
    x = norm(tokens_by_hand(model, images)[number - 1])
    expected = 0
    for head in (slice(0, 8), slice(8, 16)):
        q = x[:, 0] @ a.W_Q.weight[head].T + a.W_Q.bias[head]
        k = x @ a.W_K.weight[head].T + a.W_K.bias[head]
        logits = einsum(q, k, "b dim, b token dim -> b token") / math.sqrt(8)
        expected = expected + logits.softmax(dim=-1)[:, 1:] / 2
    share = eval_dense.class_attention(model, images, number)
    assert share.shape == (3, 2, 3)
    assert torch.allclose(share.flatten(1), expected, atol=1e-6)


# ---- the probe -----------------------------------------------------------------------------------


def train_by_hand(features: list[Tensor], masks: list[Tensor], seed: int, epochs: int):
    """(linear map, running mean, running variance) after all steps, in float64."""
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(3, 2, 1).double()
    optimizer, means, variances = torch.optim.Adam(conv.parameters()), [], []
    for step in range(2 * epochs):
        [order_seed] = mixed_seeds(1, ORDER, seed, step // 2)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(order_seed)).tolist()
        numbers = order[32:] if step % 2 else order[:32]
        x = torch.stack([features[i].double() for i in numbers])
        means.append(x.mean(dim=(0, 2, 3)))
        variances.append(x.var(dim=(0, 2, 3)))
        biased = x.var(dim=(0, 2, 3), correction=0)
        x = (x - means[-1].view(3, 1, 1)) / (biased + 1e-5).sqrt().view(3, 1, 1)
        losses, labelled = [], 0
        for i, y in zip(numbers, conv(x)):
            logits = F.interpolate(y[None], masks[i].shape, mode="bilinear")[0]
            logs = logits - logits.exp().sum(dim=0).log()
            losses += [-logs[c][masks[i] == c].sum() for c in (0, 1)]
            labelled += int((masks[i] != 9).sum())
        optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * step / 2 / epochs)) / 2
        optimizer.zero_grad()
        (sum(losses) / labelled).backward()
        optimizer.step()
    return conv, torch.stack(means).mean(dim=0), torch.stack(variances).mean(dim=0)


def test_the_probe_takes_the_steps_written_out_by_hand():
    """Forty images make two batches; masks of two sizes, ignored pixels, an image without label."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 2, 3, generator=generator).half() for _ in range(40)]
    sizes = [(5, 8) if i % 3 else (2, 3) for i in range(40)]
    masks = [torch.randint(0, 2, s, generator=generator).to(torch.uint8) for s in sizes]
    for i, mask in enumerate(masks):
        mask[: i % 2, : i % 3] = 9
    masks[7][:] = 9
    args = Namespace(ignore=9, epochs=3, seed=5, device=CPU)
    probe = eval_dense.train_probe(features, masks, 2, args)
    conv, mean, variance = train_by_hand(features, masks, 5, 3)
    for found, expected in zip(probe[1].parameters(), conv.parameters()):
        assert torch.allclose(found.double(), expected, atol=2e-5)
    x = (features[0].double() - mean.view(3, 1, 1)) / (variance + 1e-5).sqrt().view(3, 1, 1)
    assert torch.allclose(probe(features[0][None].float())[0].double(), conv(x), atol=1e-4)
    assert not probe.training and not probe[1].weight.requires_grad


def test_images_without_a_label_teach_nothing_and_break_nothing():
    args = Namespace(ignore=255, epochs=1, seed=0, device=CPU)
    masks = [torch.full((4, 4), 255, dtype=torch.uint8)]
    probe = eval_dense.train_probe([torch.randn(3, 2, 2)], masks, 2, args)
    torch.manual_seed(0)
    assert torch.equal(probe[1].weight, torch.nn.Conv2d(3, 2, 1).weight)


def test_confusion_and_scores_equal_a_count_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]])
    matrix = eval_dense.confusion(prediction, truth, classes=4, ignore=255)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = eval_dense.scores(matrix)
    # class 0: 2 of 4, class 1: 2 of 5, class 2: 0 of 1, class 3 nowhere, so not in the mean
    assert found["iou"] == [50.0, pytest.approx(40.0), 0.0, None]
    assert found["miou"] == pytest.approx(30.0)
    assert found["accuracy"] == pytest.approx(100 * 4 / 7)


def test_ids_near_256_are_no_other_classes():
    truth = torch.tensor([200, 255], dtype=torch.uint8)
    matrix = eval_dense.confusion(truth, truth, classes=256, ignore=-1)
    assert matrix[200, 200] == matrix[255, 255] == 1 and matrix.sum() == 2


def test_every_pixel_is_judged_at_its_masks_own_resolution():
    probe = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        probe.weight[:, 0, 0, 0], probe.bias[:] = torch.tensor([0.0, 1.0]), 0.0
    features = [torch.tensor([[[-1.0, 1.0]]]).half(), torch.tensor([[[3.0, -1.0]]]).half()]
    masks = [(torch.arange(10) >= 5).expand(3, 10).to(torch.uint8), torch.zeros(1, 8).byte()]
    masks[0][0, 0] = masks[1][0, 0] = 7
    with torch.no_grad():
        args = Namespace(ignore=7, device=CPU)
        matrix = eval_dense.measure_probe(probe, features, masks, 2, args)
    # second image: 3, 3, 2.5, 1.5, .5, -.5, -1, -1 at the pixels' centres; the first is ignored
    assert matrix.tolist() == [[14 + 3, 4], [0, 15]]


def test_the_majority_is_that_of_training_and_judged_on_the_reported_masks():
    train = [torch.tensor([9, 9, 9, 9, 9, 0]), torch.tensor([1, 1, 1, 2])]
    reported = [torch.tensor([0, 0, 9]), torch.tensor([0, 1, 9])]
    best, found = eval_dense.majority(train, reported, classes=3, ignore=9)
    assert best == 1
    assert found == dict(miou=12.5, accuracy=25.0, iou=[0.0, 25.0, None])


# ---- TokenCut ------------------------------------------------------------------------------------


def eigenvector_by_hand(keys: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
    """(x, all eigenvalues): of I - D^-1/2 W D^-1/2, whose eigenvectors are D^1/2 x."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    W = np.where(unit @ unit.T > tau, 1.0, 1e-5)
    root = np.sqrt(W.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(len(W)) - W / root[:, None] / root)
    return vectors[:, 1] / root, values


@pytest.mark.parametrize("tau", [0.2, -0.1])
def test_fiedler_vector_solves_the_generalised_problem(tau):
    keys = np.random.default_rng(0).normal(size=(40, 6))
    expected, _ = eigenvector_by_hand(keys, tau)
    found = eval_dense.fiedler_vector(torch.from_numpy(keys), tau)
    expected = expected * np.sign(found @ expected)
    assert np.allclose(found / np.linalg.norm(found), expected / np.linalg.norm(expected))


def test_foreground_by_hand():
    def found(*rows) -> list:
        return eval_dense.foreground(np.array(rows, dtype=float)).int().tolist()

    # the largest absolute entry is the seed, whatever its sign: -9 here, and the mean is below 0
    assert found([-9, -8, 1], [1, 1, -9.5], [1, 1, 1]) == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert found([9, 8, -1], [-1, -1, -1]) == [[1, 1, 0], [0, 0, 0]]
    # cut at the mean (3), not at 0, nor at the median (1): 2 is background, all are above 0
    assert found([9, 2, 1], [1, 1, 4]) == [[1, 0, 0], [0, 0, 0]]
    assert found([9, 4, 1], [1, 1, 2]) == [[1, 1, 0], [0, 0, 0]]
    # corners do not connect, edges do
    assert found([9, 0, 0], [0, 9, 0]) == [[1, 0, 0], [0, 0, 0]]
    assert found([0, 8, 0], [8, 9, 0]) == [[0, 1, 0], [1, 1, 0]]


def tokencut_by_hand(keys: np.ndarray, rows: int, tau: float) -> list[np.ndarray]:
    """A seed's part: of each seed, where entries are equal but for rounding."""
    x, values = eigenvector_by_hand(keys, tau)
    assert values[2] - values[1] > 1e-6  # or there is no second eigenvector to speak of
    parts = []
    for seed in np.flatnonzero(np.abs(x) > np.abs(x).max() * (1 - 1e-8)):
        side = ((x > x.mean()) == (x[seed] > x.mean())).reshape(rows, -1)
        start = (np.arange(len(x)) == seed).reshape(rows, -1)
        parts.append(binary_propagation(start, mask=side))
    return parts


def test_tokencut_equals_an_implementation_of_its_own():
    generator, sizes, unique = np.random.default_rng(0), set(), 0
    for _ in range(40):
        centres = generator.normal(size=(2, 6))
        kinds = (generator.random((5, 8)) > 0.7).astype(int)
        kinds[1:4, 2:5] = 1
        keys = centres[kinds.flatten()] + 0.6 * generator.normal(size=(40, 6))
        found = eval_dense.tokencut(torch.from_numpy(keys), rows=5, tau=0.2)
        parts = tokencut_by_hand(keys, 5, 0.2)
        assert found.shape == (5, 8) and any(np.array_equal(found, part) for part in parts)
        sizes.add(int(found.sum()))
        unique += len(parts) == 1
    assert len(sizes) > 8 and unique > 20  # cuts of many kinds, few with a choice


def test_tokencut_cuts_at_tau_and_leaves_a_single_patch_whole():
    """Keys at a cosine of 0.5: two kinds for tau 0.6, one for tau 0.4, where any cut will do."""
    picture = torch.zeros(3, 4, dtype=torch.bool)
    picture[1:, 1:3] = True
    inside, outside = torch.tensor([1.0, 0]), torch.tensor([1, 3**0.5])
    keys = torch.where(picture.flatten()[:, None], inside, outside)
    assert torch.equal(eval_dense.tokencut(keys, 3, tau=0.6), picture)
    assert eval_dense.tokencut(keys[:1], 1, 0.2).tolist() == [[True]]


def test_corloc_by_hand():
    """The part covers the left half of 4 x 6 pixels."""
    left, lower = torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0], [1]]).bool()

    def corloc(part: Tensor, *boxes) -> float:
        return eval_dense.corloc([part], [torch.tensor(boxes).double()], [(4, 6)])

    assert corloc(left, [0, 0, 3, 4]) == corloc(left, [0, 0, 3, 2]) == 100
    assert corloc(left, [0, 0, 3, 1.99]) == corloc(left, [3, 0, 6, 4]) == 0
    assert corloc(left, [4, 0, 6, 4], [0, 0, 3, 2]) == 100  # the best one counts
    assert corloc(lower, [0, 2, 6, 4]) == 100 and corloc(lower, [0, 0, 6, 2]) == 0
    # the mean is over the images with a box, each of its own size
    boxes = [torch.tensor(b).view(-1, 4) for b in ([0.0, 0, 30, 40], [], [0.0, 0, 30, 40])]
    assert eval_dense.corloc([left] * 3, boxes, [(40, 60), (4, 6), (4, 6)]) == 50


# ---- principal components ------------------------------------------------------------------------


def test_spread_by_hand():
    tokens = torch.tensor([[[3.0, 3.0]], [[4.0, -4.0]]])  # mean (3, 0): each 4 away, of norm 5
    assert eval_dense.spread_of(tokens) == pytest.approx(0.8)
    assert eval_dense.spread_of(tokens[:, :, :1]) == 0


def test_principal_colours_are_rescaled_eigenvector_coordinates():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3, 2, 0.1, 0.1, 0.1])[:, None, None]
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    tokens = torch.randn(6, 4, 5, generator=generator) * scale
    tokens = einsum(turned, tokens, "i j, j row col -> i row col") + 1
    x = tokens.flatten(1).T.double().numpy()
    x = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(x.T @ x)
    expected = x @ vectors[:, [5, 4, 3]]
    for c in expected.T:
        c *= np.sign(c[np.abs(c).argmax()])
        c -= c.min()
        c /= c.max()
    colours = eval_dense.principal_colours(tokens)
    assert np.allclose(colours, expected.reshape(4, 5, 3), atol=1e-6)


def test_few_tokens_have_fewer_colours():
    colours = eval_dense.principal_colours(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]))
    assert sorted(colours[0, :, 0].tolist()) == [0, 1] and colours[..., 1:].abs().max() == 0


def test_a_component_of_rounding_alone_has_no_colour():
    along = torch.tensor([0.0, 1.0, 3.0, 4.0, 9.0, 2.0]).double().view(1, 2, 3)
    tokens = torch.tensor([1.0, -2.0, 0.5, 3.0]).double().view(4, 1, 1) * along
    colours = eval_dense.principal_colours(tokens)
    assert torch.allclose(colours[..., 0], along[0] / 9)
    assert colours[..., 1:].abs().max() < 1e-2


def test_tokens_alike_are_grey_not_noise():
    step = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 2)
    for spread, grey in ((0.9e-3, True), (1.1e-3, False), (0.0, True)):
        tokens = torch.cat([torch.ones(1, 2, 2), spread * step]).double()
        assert eval_dense.spread_of(tokens) == pytest.approx(spread, rel=1e-3)
        assert bool((eval_dense.principal_colours(tokens) == 0.5).all()) == grey


# ---- networks and what they are shown ------------------------------------------------------------


def test_checkpoints_are_loaded_trained_frozen_and_beside_their_own_untrained_weights(
    tmp_path, monkeypatch
):
    model = network(residual=True, drop_path=0.5)
    save(tmp_path / "a/last.pt", model)
    found = eval_dense.load_networks(parsed(monkeypatch, "segment", tmp_path / "a/last.pt"))
    assert list(found) == ["a", "a, untrained"]
    images = some_inputs(16)
    assert torch.equal(found["a"](images), model(images))  # nothing dropped: not training
    torch.manual_seed(ARGS["seed"])
    fresh = conditioned_init_(ViT(**model.config), 0.7, 1.0, 2.0).eval()
    assert torch.equal(found["a, untrained"](images), fresh(images))
    assert not torch.equal(fresh(images), model(images))
    assert not any(p.requires_grad for m in found.values() for p in m.parameters())
    found = eval_dense.load_networks(parsed(monkeypatch, "picture", tmp_path / "a/last.pt"))
    assert list(found) == ["a"]


def test_averaged_weights_are_what_is_looked_at(tmp_path, monkeypatch):
    model = network()
    ema = {f"module.{k}": 2 * v for k, v in model.state_dict().items()}
    save(tmp_path / "a/last.pt", model, ema | {"n_averaged": torch.tensor(3)})
    found = eval_dense.load_networks(parsed(monkeypatch, "discover", tmp_path / "a/last.pt"))
    assert torch.equal(found["a"].pos_embed, 2 * model.pos_embed)


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    paths = [str(tmp_path / folder / "last.pt") for folder in ("x/a", "y/a", "b")]
    for path in paths:
        save(tmp_path / path, network())
    found = eval_dense.load_networks(parsed(monkeypatch, "picture", *paths))
    assert list(found) == [*paths[:2], "b"]


@pytest.mark.parametrize("arm", networks.ARMS)
def test_random_networks_are_the_arms_at_their_own_defaults(arm, monkeypatch):
    args = parsed(monkeypatch, "picture", "--random-init", arm, "--seed", 4)
    [(name, found)] = eval_dense.load_networks(args).items()
    assert name == f"{arm}, random" and not found.training
    torch.manual_seed(4)
    shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
    expected = networks.fresh_arm(arm, **shape)
    assert found.config == expected.config
    for a, b in zip(found.parameters(), expected.parameters()):
        assert torch.equal(a, b)


def test_input_sizes_are_whole_patches(monkeypatch, capsys):
    """And a size that a network was not trained at is said."""
    models = dict(a=network(), b=network(image_size=28, patch_size=14))

    def sizes(*first, asked=()) -> list:
        args = parsed(monkeypatch, "picture", *(["--image-size", *asked] if asked else []))
        return list(eval_dense.input_sizes(args, models, first).values())

    assert sizes(120, 16) == [(120, 16), (126, 28)]  # whatever they were trained at
    assert sizes(3, 57) == [(8, 64), (14, 70)]
    assert sizes(45, 60, asked=[56]) == 2 * [(56, 56)]
    assert sizes(45, 60, asked=[56, 112]) == 2 * [(56, 112)]
    note = "b: position embedding interpolated from 28 px to 56 x 112\n"
    assert capsys.readouterr().out.endswith(note)
    models = {"a": network(), "b, untrained": network(image_size=28, patch_size=14)}
    assert sizes(16, 16) == [(16, 16), (28, 28)] and not capsys.readouterr().out


def test_without_a_folder_images_are_drawn(monkeypatch):
    args = parsed(monkeypatch, "segment", "--image-size", "8")
    train, reported = eval_dense.load_scenes(args, "train", "reported")
    assert len(train.names) == 1000 and len(reported.names) == 500
    assert torch.equal(train.image(9), draw_shapes([9], 8, "train")[0][0])
    assert torch.equal(reported.image(9), draw_shapes([9], 8, "val")[0][0])
    for words, side in ((["picture"], 120), (["picture", "--image-size", "8", "24"], 24)):
        [shown] = eval_dense.load_scenes(parsed(monkeypatch, *words), "shown")
        assert shown.sizes == [(side, side)] * 2


@pytest.mark.parametrize("depth, expected", [(12, [3, 6, 9, 12]), (6, [2, 3, 5, 6]), (2, [1, 2])])
def test_blocks_are_the_last_or_evenly_spaced(depth, expected):
    args, models = Namespace(blocks=None), dict(a=network(depth=depth))
    assert eval_dense.chosen_blocks(args, models, parts=1, least=0) == dict(a=[depth])
    assert eval_dense.chosen_blocks(args, models, parts=4, least=1) == dict(a=expected)


def make_scenes(root, splits=("train", "test")):
    """Streets in miniature: dark ground 0 below, bright 1 above, an ignored 11 along the rim."""
    generator = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = np.zeros(((20, 30), (17, 24))[i % 2], np.uint8)
            mask[: len(mask) // 2 + i] = 1
            image = 60 + 120 * mask[..., None] + generator.integers(0, 30, (*mask.shape, 3))
            mask[:, :2] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


def test_test_is_reported_on_and_val_where_there_is_no_test(tmp_path, monkeypatch):
    make_scenes(tmp_path, ["train", "val"])
    args = parsed(monkeypatch, "segment", "--data", tmp_path)
    train, val = eval_dense.load_scenes(args, "train", "reported")
    assert train.names[0] == f"{tmp_path}/train/images/0.png"
    assert val.names[3] == f"{tmp_path}/val/images/3.png"
    make_scenes(tmp_path, ["test"])
    [test] = eval_dense.load_scenes(args, "reported")
    assert test.names[0] == f"{tmp_path}/test/images/0.png"


def test_masks_are_needed_unless_discover_has_boxes(tmp_path, monkeypatch, capsys):
    make_scenes(tmp_path, ["test"])
    shutil.rmtree(tmp_path / "test/masks")

    def load(command: str):
        return eval_dense.load_scenes(parsed(monkeypatch, command, "--data", tmp_path), "reported")

    with pytest.raises(SystemExit):
        load("discover")
    (tmp_path / "boxes.tsv").write_text("")
    assert load("discover")[0].masks is None
    with pytest.raises(SystemExit):
        load("segment")
    assert capsys.readouterr().err.count("no folder") == 2


def test_networks_are_shown_all_images_in_turn_resized_and_normalised(monkeypatch):
    monkeypatch.setattr(eval_dense, "BATCH_SIZE", 2)
    images = draw_shapes([0, 1, 2], 20, "val")[0]
    some = scenes.Scenes(["a", "b", "c"], images.__getitem__, [], None)
    parts = list(eval_dense.network_inputs(some, (16, 24), CPU, ""))
    assert [len(part) for part in parts] == [2, 1]
    resized = v2.functional.resize(images, [16, 24], InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(torch.cat(parts), normed(resized), atol=1e-6)


def test_features_are_half_precision_maps_of_the_blocks_side_by_side():
    model, inputs = network(), some_inputs().split(2)
    features = eval_dense.features_of(model, inputs, [2, 0])
    expected = [torch.cat(eval_dense.token_maps(model, x, [2, 0]), dim=1) for x in inputs]
    assert torch.equal(torch.stack(features), torch.cat(expected).half())


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs/a/last.pt, runs/mean/last.pt, nan.pt, large.pt, odd.pt, scenes/."""
    folder = tmp_path_factory.mktemp("dense")
    save(folder / "runs/a/last.pt", network())
    save(folder / "runs/mean/last.pt", network(pool="mean", residual=True))
    broken = network()
    broken.head.bias[0] = float("nan")
    save(folder / "nan.pt", broken)
    large = network()
    for weight in large.blocks.parameters():
        weight *= 1e30
    save(folder / "large.pt", large)
    usual = files.load_checkpoint(str(folder / "runs/a/last.pt"))
    files.save_checkpoint(folder / "odd.pt", usual | dict(args=ARGS | dict(init="papers")))
    make_scenes(folder / "scenes")
    return folder


def shown(folder, split: str, size) -> tuple[Tensor, list[Tensor]]:
    """(network inputs, masks) of a split, read here by hand."""
    inputs, masks = [], []
    for i in range(4):
        pixels = torch.from_numpy(np.array(Image.open(folder / split / f"images/{i}.png")))
        image = rearrange(pixels, "row col colour -> colour row col")
        inputs.append(v2.functional.resize(image, size, InterpolationMode.BICUBIC))
        masks.append(torch.from_numpy(np.array(Image.open(folder / split / f"masks/{i}.png"))))
    return normed(torch.stack(inputs)), masks


def test_segment_trains_on_train_and_reports_on_test(here, tmp_path, monkeypatch, capsys):
    words = ["segment", here / "runs/a/last.pt", "--data", here / "scenes", "--ignore", "11"]
    words += ["--blocks", "2", "0", "--epochs", "3", "--seed", "7", "--device", "cpu"]
    run_main(eval_dense.main, [*words, "--out", "one"], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "one/segment.json").read_text())
    assert list(record["results"]) == ["class 1 everywhere", "a", "a, untrained"]
    assert record["arguments"]["ignore"] == 11 and record["arguments"]["device"] == "cpu"
    trained = network()
    torch.manual_seed(ARGS["seed"])
    fresh = conditioned_init_(ViT(**trained.config), 0.7, 1.0, 2.0)
    args = Namespace(ignore=11, epochs=3, seed=7, device=CPU)
    (train, masks), (test, truth) = (shown(here / "scenes", s, [24, 32]) for s in ("train", "test"))
    for name, model in (("a", trained), ("a, untrained", fresh.requires_grad_(False))):
        seen, unseen = (eval_dense.features_of(model, [x], [2, 0]) for x in (train, test))
        probe = eval_dense.train_probe(seen, masks, 2, args)
        matrix = eval_dense.measure_probe(probe, unseen, truth, 2, args)
        expected = eval_dense.scores(matrix)
        facts = dict(confusion=matrix.tolist(), blocks=[2, 0], size=[24, 32])
        assert record["results"][name] == expected | facts
        row = [*name.split(), f"{expected['miou']:.1f}", f"{expected['accuracy']:.1f}"]
        assert row in [line.split() for line in printed.splitlines()]
    best, baseline = eval_dense.majority(masks, truth, 2, 11)
    assert record["results"][f"class {best} everywhere"] == baseline
    assert "4 training, 4 reported images, 2 classes" in printed and record["classes"] == 2
    # the last block where none is asked for
    words = words[: words.index("--blocks")] + words[words.index("--epochs") :]
    run_main(eval_dense.main, [*words, "--out", "two"], tmp_path, monkeypatch)
    record = json.loads((tmp_path / "two/segment.json").read_text())
    assert record["results"]["a"]["blocks"] == [2]


@pytest.mark.parametrize("boxes", ["from masks", "from a file"])
def test_discover_cuts_every_image_with_a_box(boxes, here, tmp_path, monkeypatch, capsys):
    def noted(parts, true, sizes) -> float:
        cut.append(list(parts))
        return corloc(cut[-1], true, sizes)

    corloc, cut, root = eval_dense.corloc, [], here / "scenes"
    monkeypatch.setattr(eval_dense, "corloc", noted)
    if boxes == "from a file":
        root = make_scenes(tmp_path / "scenes")
        shutil.rmtree(root / "test/masks")
        lines = [f"test/images/{i}.png\t0\t0\t{x}\t{y}" for i, x, y in [(1, 24, 11), (2, 30, 13)]]
        (root / "boxes.tsv").write_text("\n".join([*lines, "test/images/2.png\t0\t0\t30\t20"]))
    words = ["discover", here / "runs/mean/last.pt", "--data", root, "--ignore", "11"]
    words += ["--tau", "0.5", "--image-size", "32", "40", "--out", "o"]
    run_main(eval_dense.main, words, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "o/discover.json").read_text())
    count = 4 if boxes == "from masks" else 2
    assert f"{count} of 4 images have a true box" in printed and record["images"] == count
    inputs, masks = shown(here / "scenes", "test", [32, 40])
    keys = eval_dense.last_keys(network(pool="mean", residual=True), inputs)
    parts = [eval_dense.tokencut(k, 4, 0.5) for k in keys]
    assert all(map(torch.equal, cut[1], parts)) and len(cut[1]) == 4
    true = scenes.true_boxes(scenes.folder_scenes(root, "test", count == 4), str(root), 11)
    sizes = [tuple(mask.shape) for mask in masks]
    whole, mine = (corloc(x, true, sizes) for x in ([torch.ones(1, 1) > 0] * 4, parts))
    assert list(record["results"]) == ["the whole image", "mean", "mean, untrained"]
    assert record["results"]["the whole image"] == dict(corloc=whole)
    assert record["results"]["mean"] == dict(corloc=mine, size=[32, 40])
    assert ["mean", f"{mine:.1f}"] in [line.split() for line in printed.splitlines()]


def figure_of(words, cwd, monkeypatch):
    """(the figure that `picture` would save, where)."""
    caught = []
    monkeypatch.setattr(pictures, "save_figure", lambda *given: caught.append(given))
    run_main(eval_dense.main, ["picture", *words], cwd, monkeypatch)
    [(figure, path)] = caught
    figure.canvas.draw()
    plt.close(figure)
    return figure, path


def test_picture_shows_tokens_and_attention_of_every_network(here, tmp_path, monkeypatch, capsys):
    paths = [here / f"scenes/test/images/{i}.png" for i in (3, 0)]
    words = [here / "runs/a/last.pt", here / "runs/mean/last.pt", "--images", *paths]
    words += ["--blocks", "2", "1", "--image-size", "24", "32", "--out", "o"]
    figure, path = figure_of(words, tmp_path, monkeypatch)
    assert str(path) == "o/picture.png" and path.parent.is_dir()
    inputs = shown(here / "scenes", "test", [24, 32])[0][[3, 0]]
    models = dict(a=network(), mean=network(pool="mean", residual=True))
    for part, (name, model) in zip(figure.subfigs, models.items()):
        assert part.get_suptitle() == name
        axes = np.array(part.axes).reshape(2, 5)
        assert [ax.get_title() for ax in axes[:, 0]] == ["image\n", ""]
        for ax, path in zip(axes[:, 0], paths):
            assert np.array_equal(ax.images[0].get_array(), np.array(Image.open(path)))
        for column, block in enumerate((2, 1)):
            [maps] = eval_dense.token_maps(model, inputs, [block])
            for i, x in enumerate(maps):
                ax, title = axes[i, 1 + column], ("" if i else f"tokens,\nblock {block}\n")
                assert np.allclose(ax.images[0].get_array(), eval_dense.principal_colours(x))
                assert ax.get_title() == f"{title}spread {eval_dense.spread_of(x):.1g}"
                ax, title = axes[i, 3 + column], ("" if i else f"attention,\nblock {block}\n")
                if name == "mean":  # which has no class token
                    assert not ax.images and not ax.get_title() and not ax.axison
                    continue
                share = eval_dense.class_attention(model, inputs, block)[i]
                assert np.allclose(ax.images[0].get_array(), share)
                assert ax.images[0].norm.vmin == 0 and ax.images[0].norm.vmax == share.max()
                assert ax.get_title() == f"{title}peak {share.max() / share.mean():.1f}"


def test_picture_says_where_tokens_are_alike_and_captions_can_be_read(tmp_path, monkeypatch):
    words = ["--random-init", "skipless-default", "--random-init", "residual", "--out", "o"]
    figure, _ = figure_of(words, tmp_path, monkeypatch)
    for part, arm in zip(figure.subfigs, ("skipless-default", "residual")):
        assert part._suptitle.get_color() == pictures.ARM_COLOURS[arm]
    alike, apart = (np.array(part.axes).reshape(2, 9) for part in figure.subfigs)
    quarters = [f"block {b}" for b in (3, 6, 9, 12)]
    assert [ax.get_title().splitlines()[1] for ax in alike[0, 1:5]] == quarters
    assert alike[0, 0].images[0].get_array().shape == (120, 120, 3)
    assert alike[0, 1].images[0].get_array().shape == (15, 15, 3)
    for ax in alike[:, 4]:
        assert ax.get_title().splitlines()[-1].startswith("alike ")
        assert np.all(ax.images[0].get_array() == 0.5)
    assert not any("alike" in ax.get_title() for ax in apart.flat)
    # beside a page of text, 900 pixels wide, a caption is 9 pixels high, and none is over another
    scale = 900 / figure.bbox.width
    for ax in [*alike.flat, *apart.flat]:
        assert ax.title.get_fontsize() * figure.dpi / 72 * scale >= 9
        assert ax.title.get_window_extent().width < ax.get_window_extent().width * 1.05


def test_picture_is_written(here, tmp_path, monkeypatch, capsys):
    run_main(eval_dense.main, ["picture", here / "runs/mean/last.pt"], tmp_path, monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1] == "runs/dense/picture.png"
    with Image.open(tmp_path / "runs/dense/picture.png") as image:
        assert image.width > 800 and image.height > 400


def test_a_command_as_a_user_runs_it(here, tmp_path):
    """In a process of its own: nothing on stderr, no line too wide, the result where promised."""
    words = ["segment", here / "runs/a/last.pt", here / "runs/mean/last.pt"]
    words += ["--data", here / "scenes", "--ignore", "11", "--epochs", "1"]
    done = run_script("eval_dense.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.splitlines()[-1] == "runs/dense/segment.json"
    assert [f.name for f in (tmp_path / "runs/dense").iterdir()] == ["segment.json"]


# ---- flags ---------------------------------------------------------------------------------------


def test_defaults(monkeypatch):
    shared = dict(checkpoints=[], random_init=[], image_size=None, seed=0, data=None, images=None)
    own = dict(
        segment=dict(blocks=None, epochs=20, ignore=255),
        discover=dict(tau=0.2, ignore=255),
        picture=dict(blocks=None),
    )
    for command, more in own.items():
        monkeypatch.setattr("sys.argv", ["eval_dense.py", command])
        found = vars(eval_dense.parse_arguments())
        assert str(found.pop("out")) == "runs/dense" and found.pop("device") == "auto"
        assert found == shared | more | dict(command=command)


def test_one_probe_learns_what_is_where(monkeypatch):
    """Class 0 in the upper three rows of tokens, 1 in the lower three, at whatever resolution."""
    sizes = [(45, 60), (30, 21), (45, 60), (7, 90)]
    features = torch.zeros(len(sizes), 4, 6, 8)
    features[:, 0, 3:] = 1
    masks = [(torch.arange(h) >= round(h / 2))[:, None].expand(h, w).byte() for h, w in sizes]
    args = parsed(monkeypatch, "segment")
    probe = eval_dense.train_probe([*features.half()], masks, 2, args)
    matrix = eval_dense.measure_probe(probe, [*features.half()], masks, 2, args)
    assert eval_dense.scores(matrix)["accuracy"] > 95


BAD_FLAGS = {
    "segment": "no network given",
    "explain {a}": "invalid choice: 'explain'",
    "segment {a} --data nowhere": "nowhere: no folder nowhere/train/images",
    "segment nowhere.pt": "nowhere.pt: no such file",
    "segment {image}": "damaged or of another program",
    "discover --random-init resnet": "resnet is no arm: .*skipless-paper",
    "segment {a} --data {root} --image-size 20 32": "--image-size 20 32: .* patch, 8",
    "segment {a} --data {root} --image-size 24 30": "--image-size 24 30: .* patch, 8",
    "segment {a} --image-size 0": "--image-size: must be at least 1",
    "segment {a} --image-size 8 8 8": "takes one or two numbers, not 3",
    "segment {a} --blocks 1 3": r"--blocks 3: a has 2 blocks; give numbers 0\.\.2",
    "segment {a} --blocks -1": r"--blocks -1: a has 2 blocks; give numbers 0\.\.2",
    "picture {a} --blocks 0": r"--blocks 0: a has 2 blocks; give numbers 1\.\.2",
    "picture {a} --images {image} nowhere.png": "cannot read image nowhere.png .*No such file",
    "picture {a} --images {a}": "cannot read image .*last.pt",
    "picture {a} --data {root}": "unrecognized arguments: --data",
    "discover {a} --blocks 1": "unrecognized arguments: --blocks",
    "segment {a} --epo 3": "unrecognized arguments: --epo",
    "segment {a} --epochs 0": "--epochs: must be at least 1",
    "segment {a} --seed -1": "--seed: must lie in",
    "discover {a} --tau 1": "--tau: must lie between -1 and 1",
    "discover {a} --tau -1": "--tau: must lie between -1 and 1",
    "segment {a} --device tpu": "is not known here",
    "segment {a} --data {root} --out {image} --ignore 11": "cannot write into this folder",
    "discover {a} --data {root} --out {image} --ignore 11": "cannot write into this folder",
    "segment {a} --data {root} --image-size 8": "--image-size 8 8 is one patch of a",
    "discover {a} --data {root} --out /proc/self --ignore 11": "cannot write into this folder",
    "picture {a} --out {image}": "cannot write into this folder",
    "segment {a} --out=": "--out: must name a file or folder",
    "segment {odd}": "odd.pt is damaged: its settings give",
    "segment {nan}": "nan.pt holds weights that are not finite",
    "discover {nan}": "nan.pt holds weights that are not finite",
    "picture {nan}": "nan.pt holds weights that are not finite",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, here, tmp_path, monkeypatch, capsys):
    root, image = here / "scenes", here / "scenes/test/images/0.png"
    things = {name: here / f"{name}.pt" for name in ("nan", "odd")}
    words = flags.format(a=here / "runs/a/last.pt", root=root, image=image, **things).split()
    words += [] if "--out" in flags else ["--out", "o"]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])
    assert not (tmp_path / "o").exists()  # nothing was begun


def test_a_line_of_boxes_that_is_none_ends_in_one_line(here, tmp_path, monkeypatch, capsys):
    root = make_scenes(tmp_path / "scenes")
    (root / "boxes.tsv").write_bytes(b"test/images/0\xe4.png\t0\t0\t5\t5")  # nor is it UTF-8
    words = ["discover", here / "runs/a/last.pt", "--data", root]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "boxes.tsv, line 1: .*expected a file of ROOT, x0, y0, x1, y1")


@pytest.mark.parametrize("command", ["segment", "discover", "picture"])
def test_tokens_that_are_not_finite_end_in_one_line(command, here, tmp_path, monkeypatch, capsys):
    """Of weights that are; the figures would look normal."""
    words = [command, here / "large.pt"]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "tokens are not finite; use an earlier checkpoint")


BAD_SCENES = {  # what is done, where, and what is said
    "segment": (65535, "train", r"train/images/0.png holds id 65535, above 4095, .*--ignore 65535"),
    "segment, a larger one": (2**31 - 1, "train", "holds id 2147483647, above 4095"),
    "segment, in test alone": (
        12,
        "test",
        r"test/images/0.png holds id 12, above 11, .*--ignore 12",
    ),
    "discover": (65535, "test", r"test/images/0.png holds id 65535, above 4095, .*--ignore 65535"),
    "segment, the image turned": (None, "train", r"is of \(20, 30\), its image of \(30, 20\)"),
}


@pytest.mark.parametrize("what", BAD_SCENES)
def test_bad_scenes_end_in_one_line(what, here, tmp_path, monkeypatch, capsys):
    root, (mark, split, said) = make_scenes(tmp_path / "scenes"), BAD_SCENES[what]
    image, mask = (root / split / kind / "0.png" for kind in ("images", "masks"))
    if mark:
        ids = np.array(Image.open(mask)).astype(np.int32)
        ids[0, 0] = mark
        Image.fromarray(ids).save(mask, format="TIFF")
    else:
        tag = Image.Exif()
        tag[0x0112] = 6
        Image.open(image).save(image, exif=tag)
    words = [what.split(",")[0], here / "runs/a/last.pt", "--data", root]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, said)
