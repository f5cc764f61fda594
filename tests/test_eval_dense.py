"""The three looks at tokens, each against the same computed by hand, and their commands."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

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
from beyond.arms import ARMS, fresh_arm
from minskip import PRESETS, ViT, conditioned_init_
from support import pictures, scenes
from support.data import MEAN, ORDER, STD, mixed_seeds
from support.errors import UserError
from support.files import save_checkpoint
from support.shapes import draw_shapes

CPU = torch.device("cpu")
ARGS = dict(init="paper", alpha=0.7, beta=1.0, c=2.0, seed=3)


def network(pool: str = "cls", residual: bool = False, image_size: int = 16, **more) -> ViT:
    """A small network in which every parameter counts: norms have gains, biases are not zero."""
    torch.manual_seed(0)
    shape = dict(patch_size=8, dim=16, depth=2, num_heads=2, pos_embed_std=0.5) | more
    model = ViT(image_size, num_classes=5, **shape, residual=residual, pool=pool)
    conditioned_init_(model, 0.7, 1.0, 2.0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def untrained(model: ViT) -> ViT:
    torch.manual_seed(ARGS["seed"])
    return conditioned_init_(ViT(**model.config), 0.7, 1.0, 2.0).eval().requires_grad_(False)


def save(path: Path, model: ViT, ema: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(script="train_cls", args=ARGS, model_config=model.config, ema=ema)
    facts |= dict(classes=[], epoch=1, **OTHER_PARTS)
    save_checkpoint(path, facts | dict(model=model.state_dict()))
    return path


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def random_inputs(width: int = 24) -> Tensor:
    return torch.randn(3, 3, 16, width, generator=torch.Generator().manual_seed(1))


def parsed(monkeypatch, *words) -> Namespace:
    monkeypatch.setattr("sys.argv", ["eval_dense.py", *map(str, words)])
    args = eval_dense.parse_arguments()
    args.device = CPU
    return args


def make_scenes(root: Path, splits=("train", "test"), bright: int = 1) -> Path:
    """Dark ground, class 0, below a bright one, and unlabelled pixels, 11, along the left rim."""
    generator = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = np.zeros(((20, 30), (17, 24))[i % 2], np.uint8 if bright < 256 else np.uint16)
            mask[: len(mask) // 2 + i] = bright
            image = 60 + 120 * (mask[..., None] > 0) + generator.integers(0, 30, (*mask.shape, 3))
            mask[:, :2] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


# ---- what is read off a network ------------------------------------------------------------------


def tokens_by_hand(model: ViT, images: Tensor) -> list[Tensor]:
    """Tokens after the embedding, the first block, the second."""
    tokens = [model.embed(images)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    return tokens


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_token_maps_and_keys_are_those_of_the_patches(pool):
    model, images = network(pool), random_inputs()
    tokens = tokens_by_hand(model, images)
    maps = eval_dense.token_maps(model, images, [2, 0, 1])  # in the order asked for
    for number, found in zip([2, 0, 1], maps):
        x = tokens[number]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = (x * model.norm.weight + model.norm.bias)[:, -6:]  # 2 x 3 patches
        expected = torch.stack([x[:, :3], x[:, 3:]], dim=1).permute(0, 3, 1, 2)
        assert found.shape == (3, 16, 2, 3) and torch.allclose(found, expected, atol=1e-5)
    last = model.blocks[1]
    x = last.norm1(tokens[1])[:, -6:]
    keys = x @ last.attention.W_K.weight.T + last.attention.W_K.bias
    assert torch.allclose(eval_dense.last_keys(model, images), keys, atol=1e-5)


@pytest.mark.parametrize("number", [1, 2])
def test_class_attention_is_the_softmax_row_of_the_class_token(number):
    model, images = network(), random_inputs()
    a, norm = model.blocks[number - 1].attention, model.blocks[number - 1].norm1
    x = norm(tokens_by_hand(model, images)[number - 1])
    expected = 0
    for head in (slice(0, 8), slice(8, 16)):
        q = x[:, 0] @ a.W_Q.weight[head].T + a.W_Q.bias[head]
        k = x @ a.W_K.weight[head].T + a.W_K.bias[head]
        logits = einsum(q, k, "b dim, b token dim -> b token") / math.sqrt(8)
        expected = expected + logits.softmax(dim=-1)[:, 1:] / 2
    found = eval_dense.class_attention(model, images, number)
    assert found.shape == (3, 2, 3) and torch.allclose(found.flatten(1), expected, atol=1e-6)


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
    # a batch without any label changes nothing
    probe = eval_dense.train_probe(features[:1], [torch.full_like(masks[0], 9)], 2, args)
    torch.manual_seed(5)
    assert torch.equal(probe[1].weight, torch.nn.Conv2d(3, 2, 1).weight)


def test_confusion_and_scores_equal_a_count_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]])
    halves = prediction.chunk(2), truth.chunk(2)  # as two images
    matrix = eval_dense.confusion(*halves, classes=4, ignore=255)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = eval_dense.scores(matrix)
    # class 0: 2 of 4, class 1: 2 of 5, class 2: 0 of 1, class 3 nowhere, so not in the mean
    assert found["iou"] == [50.0, pytest.approx(40.0), 0.0, None]
    assert found["miou"] == pytest.approx(30.0)
    assert found["accuracy"] == pytest.approx(100 * 4 / 7)
    large = torch.tensor([200, 255], dtype=torch.uint8)  # ids whose products do not fit into uint8
    matrix = eval_dense.confusion([large], [large], classes=256, ignore=-1)
    assert matrix[200, 200] == matrix[255, 255] == 1 and matrix.sum() == 2


def test_every_pixel_is_predicted_at_its_masks_own_resolution():
    probe = torch.nn.Conv2d(1, 2, 1).requires_grad_(False)
    probe.weight[:, 0, 0, 0], probe.bias[:] = torch.tensor([0.0, 1.0]), 0.0
    features = [torch.tensor([[[-1.0, 1.0]]]).half(), torch.tensor([[[3.0, -1.0]]]).half()]
    masks = [torch.zeros(3, 10), torch.zeros(1, 8)]
    first, second = eval_dense.predictions(probe, features, masks, CPU)
    assert torch.equal(first, (torch.arange(10) >= 5).long().expand(3, 10))
    # of the second image the logits are 3, 3, 2.5, 1.5, .5, -.5, -1, -1 at the pixels' centres
    assert second.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


# ---- TokenCut ------------------------------------------------------------------------------------


def tokencut_by_hand(keys: np.ndarray, rows: int, tau: float) -> list[np.ndarray]:
    """The object, from the eigenvectors D^1/2 x of I - D^-1/2 W D^-1/2; one for each seed, if
    entries are equal but for rounding."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    W = np.where(unit @ unit.T > tau, 1.0, 1e-5)
    root = np.sqrt(W.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(len(W)) - W / root[:, None] / root)
    assert values[2] - values[1] > 1e-6  # or there is no second eigenvector to speak of
    x, objects = vectors[:, 1] / root, []
    for seed in np.flatnonzero(np.abs(x) > np.abs(x).max() * (1 - 1e-8)):
        side = ((x > x.mean()) == (x[seed] > x.mean())).reshape(rows, -1)
        start = (np.arange(len(x)) == seed).reshape(rows, -1)
        objects.append(binary_propagation(start, mask=side))
    return objects


def test_tokencut_equals_an_implementation_of_its_own():
    generator, sizes, unique = np.random.default_rng(0), set(), 0
    for trial in range(40):
        tau = (0.2, -0.1)[trial % 2]
        centres = generator.normal(size=(2, 6))
        kinds = (generator.random((5, 8)) > 0.7).astype(int)
        kinds[1:4, 2:5] = 1
        keys = centres[kinds.flatten()] + 0.6 * generator.normal(size=(40, 6))
        found = eval_dense.tokencut(torch.from_numpy(keys), rows=5, tau=tau)
        objects = tokencut_by_hand(keys, 5, tau)
        assert found.shape == (5, 8) and any(np.array_equal(found, x) for x in objects)
        sizes.add(int(found.sum()))
        unique += len(objects) == 1
    assert len(sizes) > 8 and unique > 20  # objects of many sizes, few with a choice


def test_tokencut_cuts_at_tau():
    """Keys at a cosine of 0.5: two kinds for tau 0.6, one for tau 0.4, where any cut will do."""
    picture = torch.zeros(3, 4, dtype=torch.bool)
    picture[1:, 1:3] = True
    inside, outside = torch.tensor([1.0, 0]), torch.tensor([1, 3**0.5])
    keys = torch.where(picture.flatten()[:, None], inside, outside)
    assert torch.equal(eval_dense.tokencut(keys, 3, tau=0.6), picture)


def test_corloc_by_hand():
    """The object covers the left or the lower half of 4 x 6 pixels."""
    left, lower = torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0], [1]]).bool()

    def corloc(predicted: Tensor, *boxes) -> float:
        return eval_dense.corloc([predicted], [torch.tensor(boxes).double()], [(4, 6)])

    assert corloc(left, [0, 0, 3, 4]) == corloc(left, [0, 0, 3, 2]) == 100
    assert corloc(left, [0, 0, 3, 1.99]) == corloc(left, [3, 0, 6, 4]) == 0
    assert corloc(left, [4, 0, 6, 4], [0, 0, 3, 2]) == 100  # the best one counts
    assert corloc(lower, [0, 2, 6, 4]) == 100 and corloc(lower, [0, 0, 6, 2]) == 0
    # the mean is over the images with a box, each of its own size
    boxes = [torch.tensor(b).view(-1, 4) for b in ([0.0, 0, 30, 40], [], [0.0, 0, 30, 40])]
    assert eval_dense.corloc([left] * 3, boxes, [(40, 60), (4, 6), (4, 6)]) == 50


# ---- principal components ------------------------------------------------------------------------


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


def test_a_component_of_rounding_alone_has_no_colour():
    along = torch.tensor([0.0, 1.0, 3.0, 4.0, 9.0, 2.0]).double().view(1, 2, 3)
    tokens = torch.tensor([1.0, -2.0, 0.5, 3.0]).double().view(4, 1, 1) * along
    colours = eval_dense.principal_colours(tokens)
    assert torch.allclose(colours[..., 0], along[0] / 9)
    assert colours[..., 1:].abs().max() < 1e-2


def test_spread_by_hand_and_tokens_alike_are_grey_not_noise():
    tokens = torch.tensor([[[3.0, 3.0]], [[4.0, -4.0]]])  # mean (3, 0): each 4 away, of norm 5
    assert eval_dense.spread_of(tokens) == pytest.approx(0.8)
    step = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 2)
    for spread, grey in ((0.9e-3, True), (1.1e-3, False), (0.0, True)):
        tokens = torch.cat([torch.ones(1, 2, 2), spread * step, torch.zeros(1, 2, 2)]).double()
        assert eval_dense.spread_of(tokens) == pytest.approx(spread, rel=1e-3)
        assert bool((eval_dense.principal_colours(tokens) == 0.5).all()) == grey


# ---- networks and images -------------------------------------------------------------------------


def test_checkpoints_are_loaded_trained_frozen_and_beside_their_own_untrained_weights(
    tmp_path, monkeypatch
):
    model, images = network(residual=True, drop_path=0.5), random_inputs(16)
    path = save(tmp_path / "a/last.pt", model)
    found = eval_dense.load_networks(parsed(monkeypatch, "segment", path))
    assert list(found) == ["a", "a, untrained"]
    assert torch.equal(found["a"](images), model(images))  # nothing dropped: not training
    assert torch.equal(found["a, untrained"](images), untrained(model)(images))
    assert not any(p.requires_grad for m in found.values() for p in m.parameters())
    # averaged weights, if there are any, and no untrained network for pictures
    ema = {f"module.{k}": 2 * v for k, v in model.state_dict().items()}
    path = save(tmp_path / "b/last.pt", model, ema | {"n_averaged": torch.tensor(3)})
    [(name, found)] = eval_dense.load_networks(parsed(monkeypatch, "picture", path)).items()
    assert name == "b" and torch.equal(found.pos_embed, 2 * model.pos_embed)


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    paths = [str(save(tmp_path / folder / "last.pt", network())) for folder in ("x/a", "y/a", "b")]
    found = eval_dense.load_networks(parsed(monkeypatch, "picture", *paths))
    assert list(found) == [*paths[:2], "b"]


@pytest.mark.parametrize("arm", ARMS)
def test_random_networks_are_the_arms_at_their_own_defaults(arm, monkeypatch):
    args = parsed(monkeypatch, "picture", "--random-init", arm, "--seed", 4)
    [(name, found)] = eval_dense.load_networks(args).items()
    assert name == f"{arm}, random" and not found.training
    torch.manual_seed(4)
    shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
    expected = fresh_arm(arm, **shape)
    assert found.config == expected.config
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_input_sizes_are_whole_patches(monkeypatch, capsys):
    """And a size that a network was not trained at is printed."""
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


@pytest.mark.parametrize("depth, expected", [(12, [3, 6, 9, 12]), (6, [2, 3, 5, 6]), (2, [1, 2])])
def test_blocks_are_the_last_or_evenly_spaced(depth, expected):
    args, models = Namespace(blocks=None), dict(a=network(depth=depth))
    assert eval_dense.blocks_by_network(args, models, least=0, default=1) == dict(a=[depth])
    assert eval_dense.blocks_by_network(args, models, least=1, default=4) == dict(a=expected)


def test_without_a_folder_images_are_drawn(monkeypatch):
    args = parsed(monkeypatch, "segment", "--image-size", "8")
    for split, drawn, length in (("train", "train", 1000), ("reported", "val", 500)):
        found = eval_dense.load_images(args, split)
        assert len(found.names) == length
        assert torch.equal(found.image(9), draw_shapes([9], 8, drawn)[0][0])
    for words, side in ((["picture"], 120), (["picture", "--image-size", "8", "24"], 24)):
        found = eval_dense.load_images(parsed(monkeypatch, *words), "pictured")
        assert found.sizes == [(side, side)] * 2


def test_a_folders_test_is_reported_on_or_else_its_val(tmp_path, monkeypatch):
    """Its masks are needed, except for `discover` with boxes."""
    args = parsed(monkeypatch, "segment", "--data", make_scenes(tmp_path, ["train", "val"]))
    assert eval_dense.load_images(args, "train").names[0] == f"{tmp_path}/train/images/0.png"
    assert eval_dense.load_images(args, "reported").names[3] == f"{tmp_path}/val/images/3.png"
    make_scenes(tmp_path, ["test"])
    assert eval_dense.load_images(args, "reported").names[0] == f"{tmp_path}/test/images/0.png"
    shutil.rmtree(tmp_path / "test/masks")
    discover = parsed(monkeypatch, "discover", "--data", tmp_path)
    with pytest.raises(UserError, match=r"no folder .*test/masks"):
        eval_dense.load_images(discover, "reported")
    (tmp_path / "boxes.tsv").write_text("")
    assert eval_dense.load_images(discover, "reported").masks is None
    with pytest.raises(UserError, match=r"no folder .*test/masks"):
        eval_dense.load_images(args, "reported")


def test_networks_get_all_images_in_turn_resized_and_normalised(monkeypatch):
    monkeypatch.setattr(eval_dense, "BATCH_SIZE", 2)
    pixels = draw_shapes([0, 1, 2], 20, "val")[0]
    images = scenes.Scenes(["a", "b", "c"], pixels.__getitem__, [], None)
    batches = list(eval_dense.network_inputs(images, (16, 24), CPU, ""))
    assert [len(batch) for batch in batches] == [2, 1]
    resized = v2.functional.resize(pixels, [16, 24], InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(torch.cat(batches), normalised(resized), atol=1e-6)
    # features: the blocks' maps side by side, in half precision
    features = eval_dense.features_of(network(), batches, [2, 0])
    expected = [torch.cat(eval_dense.token_maps(network(), x, [2, 0]), dim=1) for x in batches]
    assert torch.equal(torch.stack(features), torch.cat(expected).half())


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs/a/last.pt, runs/mean/last.pt, scenes/."""
    folder = tmp_path_factory.mktemp("dense")
    save(folder / "runs/a/last.pt", network())
    save(folder / "runs/mean/last.pt", network(pool="mean", residual=True))
    make_scenes(folder / "scenes")
    return folder


def read_by_hand(folder: Path, split: str, size) -> tuple[Tensor, list[Tensor]]:
    """(network inputs, masks) of a split."""
    inputs, masks = [], []
    for i in range(4):
        pixels = torch.from_numpy(np.array(Image.open(folder / split / f"images/{i}.png")))
        image = rearrange(pixels, "row col colour -> colour row col")
        inputs.append(v2.functional.resize(image, size, InterpolationMode.BICUBIC))
        masks.append(torch.from_numpy(np.array(Image.open(folder / split / f"masks/{i}.png"))))
    return normalised(torch.stack(inputs)), masks


def test_segment_trains_on_train_and_reports_on_test(here, tmp_path, monkeypatch, capsys):
    words = ["segment", here / "runs/a/last.pt", "--data", here / "scenes", "--ignore", "11"]
    words += ["--epochs", "3", "--seed", "7", "--device", "cpu", "--out", "o"]
    run_main(eval_dense.main, [*words, "--blocks", "2", "0"], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "o/segment.json").read_text())
    assert list(record["results"]) == ["class 1 everywhere", "a", "a, untrained"]
    assert record["arguments"]["ignore"] == 11 and record["arguments"]["device"] == "cpu"
    args = Namespace(ignore=11, epochs=3, seed=7, device=CPU)
    train, masks = read_by_hand(here / "scenes", "train", [24, 32])
    test, truth = read_by_hand(here / "scenes", "test", [24, 32])
    for name, model in (("a", network()), ("a, untrained", untrained(network()))):
        seen, unseen = (eval_dense.features_of(model, [x], [2, 0]) for x in (train, test))
        probe = eval_dense.train_probe(seen, masks, 2, args)
        predicted = eval_dense.predictions(probe, unseen, truth, CPU)
        matrix = eval_dense.confusion(predicted, truth, 2, 11)
        expected = eval_dense.scores(matrix)
        facts = dict(confusion=matrix.tolist(), blocks=[2, 0], size=[24, 32])
        assert record["results"][name] == expected | facts
        row = [*name.split(), f"{expected['miou']:.1f}", f"{expected['accuracy']:.1f}"]
        assert row in [line.split() for line in printed.splitlines()]
    assert "4 training, 4 reported images, 2 classes" in printed and record["classes"] == 2
    # the last block if none is asked for
    run_main(eval_dense.main, words, tmp_path, monkeypatch)
    record = json.loads((tmp_path / "o/segment.json").read_text())
    assert record["results"]["a"]["blocks"] == [2]


@pytest.mark.parametrize("bright", [1, 300])
def test_the_baseline_guesses_the_most_frequent_class_of_training(
    bright, here, tmp_path, monkeypatch
):
    """Judged on the reported masks, with ids of 8 and 16 bits; in one of them it is nowhere."""
    root = make_scenes(tmp_path / "scenes", bright=bright)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(root / "test/masks/0.png")
    words = ["segment", here / "runs/a/last.pt", "--data", root, "--ignore", "11", "--epochs", "1"]
    run_main(eval_dense.main, [*words, "--out", "o"], tmp_path, monkeypatch)
    record = json.loads((tmp_path / "o/segment.json").read_text())
    found = record["results"][f"class {bright} everywhere"]
    right = 22 * 9 + 28 * 12 + 22 * 11  # pixels above the ground in test masks 1, 2 and 3
    total = 20 * 30 + 22 * 17 + 28 * 20 + 22 * 17
    assert found["accuracy"] == pytest.approx(100 * right / total)
    assert found["miou"] == pytest.approx(found["accuracy"] / 2)
    assert found["iou"][0] == 0 and found["iou"][1:bright] == [None] * (bright - 1)


@pytest.mark.parametrize("boxes", ["from masks", "from a file"])
def test_discover_cuts_every_image_with_a_box(boxes, here, tmp_path, monkeypatch, capsys):
    def noted(objects, true, sizes) -> float:
        cut.append(list(objects))
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
    inputs, masks = read_by_hand(here / "scenes", "test", [32, 40])
    keys = eval_dense.last_keys(network(pool="mean", residual=True), inputs)
    objects = [eval_dense.tokencut(k, 4, 0.5) for k in keys]
    assert all(map(torch.equal, cut[1], objects)) and len(cut[1]) == 4
    true = scenes.true_boxes(scenes.folder_scenes(root, "test", count == 4), root, 11)
    sizes = [tuple(mask.shape) for mask in masks]
    whole, mine = (corloc(x, true, sizes) for x in ([torch.ones(1, 1) > 0] * 4, objects))
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


def test_picture_shows_tokens_and_attention_of_every_network(here, tmp_path, monkeypatch):
    paths = [here / f"scenes/test/images/{i}.png" for i in (3, 0)]
    words = [here / "runs/a/last.pt", here / "runs/mean/last.pt", "--images", *paths]
    words += ["--blocks", "2", "1", "--image-size", "24", "32", "--out", "o"]
    figure, path = figure_of(words, tmp_path, monkeypatch)
    assert str(path) == "o/picture.png" and path.parent.is_dir()
    inputs = read_by_hand(here / "scenes", "test", [24, 32])[0][[3, 0]]
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
                weights = eval_dense.class_attention(model, inputs, block)[i]
                assert np.allclose(ax.images[0].get_array(), weights)
                assert ax.images[0].norm.vmin == 0 and ax.images[0].norm.vmax == weights.max()
                assert ax.get_title() == f"{title}peak {weights.max() / weights.mean():.1f}"


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


def test_commands_as_a_user_runs_them(here, tmp_path, monkeypatch, capsys):
    """In a process of its own: nothing on stderr, no line too wide, the result where promised."""
    words = ["segment", here / "runs/a/last.pt", here / "runs/mean/last.pt"]
    words += ["--data", here / "scenes", "--ignore", "11", "--epochs", "1"]
    done = run_script("eval_dense.py", *words, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.splitlines()[-1] == "runs/dense/segment.json"
    assert [f.name for f in (tmp_path / "runs/dense").iterdir()] == ["segment.json"]
    run_main(eval_dense.main, ["picture", here / "runs/mean/last.pt"], tmp_path, monkeypatch)
    assert capsys.readouterr().out.splitlines()[-1] == "runs/dense/picture.png"
    with Image.open(tmp_path / "runs/dense/picture.png") as image:
        assert image.width > 800 and image.height > 400


# ---- flags and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("command, own", [
    ("segment", dict(blocks=None, epochs=20, ignore=255)),
    ("discover", dict(tau=0.2, ignore=255)),
    ("picture", dict(blocks=None)),
])  # fmt: skip
def test_defaults(command, own, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval_dense.py", command])
    shared = dict(checkpoints=[], random_init=[], image_size=None, seed=0, data=None, images=None)
    shared |= dict(command=command, out=Path("runs/dense"), device="auto")
    assert vars(eval_dense.parse_arguments()) == shared | own


BAD_FLAGS = {
    "segment": "no network given",
    "explain {a}": "invalid choice: 'explain'",
    "segment {a} --data nowhere": "nowhere: no folder nowhere/train/images",
    "segment {a} --data=": "--data: must name a file or folder",
    "segment nowhere.pt": "nowhere.pt: no such file",
    "segment {image}": "damaged or of another program",
    "discover --random-init resnet": "resnet is no arm: .*skipless-paper",
    "segment {a} --data {root} --image-size 20 32": "20 32: use multiples of 8, the patch size",
    "segment {a} --data {root} --image-size 24 30": "24 30: use multiples of 8, the patch size",
    "segment {a} --data {root} --image-size 8": "--image-size 8 8 is less than four patches of a",
    "segment {a} --data {root} --image-size 8 24": "8 24 is less than four patches of a",
    "segment {a} --image-size 0": "--image-size: must be at least 1",
    "segment {a} --image-size 8 8 8": "takes one or two numbers, not 3",
    "segment {a} --blocks 1 3": "--blocks 3: a has 2 blocks; use numbers from 0 to 2",
    "segment {a} --blocks -1": "--blocks -1: a has 2 blocks; use numbers from 0 to 2",
    "picture {a} --blocks 0": "--blocks 0: a has 2 blocks; use numbers from 1 to 2",
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
    "picture {a} --out {image}": "cannot write into this folder",
    "segment {a} --out=": "--out: must name a file or folder",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, here, tmp_path, monkeypatch, capsys):
    root, image = here / "scenes", here / "scenes/test/images/0.png"
    words = flags.format(a=here / "runs/a/last.pt", root=root, image=image).split()
    words += [] if "--out" in flags else ["--out", "o"]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])
    assert not (tmp_path / "o").exists()  # nothing was begun


@pytest.mark.parametrize("command", ["segment", "discover", "picture"])
def test_a_checkpoint_with_one_flipped_bit_ends_in_one_line(
    command, here, tmp_path, monkeypatch, capsys
):
    content = bytearray((here / "runs/a/last.pt").read_bytes())
    weights = network().patch_embed.weight.numpy().tobytes()
    content[content.find(weights) + len(weights) // 2] ^= 4
    (tmp_path / "flipped.pt").write_bytes(content)
    words = [command, tmp_path / "flipped.pt"]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, r"flipped.pt is damaged \(at .*\); use another copy")


@pytest.mark.parametrize("command, split, mark, largest", [
    ("segment", "train", 65535, 4095), ("segment", "test", 12, 11), ("discover", "test", 4096, 4095)
])  # fmt: skip
def test_a_mark_for_unlabelled_pixels_ends_in_one_line(
    command, split, mark, largest, here, tmp_path, monkeypatch, capsys
):
    root = make_scenes(tmp_path / "scenes")
    mask = root / split / "masks/0.png"
    ids = np.array(Image.open(mask)).astype(np.uint16)
    ids[0, 0] = mark
    Image.fromarray(ids).save(mask)
    words = [command, here / "runs/a/last.pt", "--data", root]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    expected = f"{split}/images/0.png holds id {mark}, above {largest}, .*--ignore {mark}"
    assert_fails_in_one_line(done, expected)
