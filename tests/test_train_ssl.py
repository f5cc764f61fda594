"""DINO: its loss, its crops, its steps against the same steps by hand; run as a user runs it."""

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SMALL,
    assert_fails_in_one_line,
    make_image_folder,
    passes_computed_twice,
    run_here,
    run_main,
    run_script,
    share_of,
)

import train_ssl
from beyond.identity_init import COUNTS_ON, NEEDS, identity_init_
from minskip import PRESETS, ViT
from support import data, files, knn
from support.crops import MultiCrop, recoloured
from support.shapes import draw_shapes
from train_ssl import Network, dino_loss, scheduled, teacher_targets

RUN = [*SMALL, "--prototypes", "32"]


def small_network() -> Network:
    torch.manual_seed(0)
    return Network(ViT(16, 8, 0, dim=16, depth=2, num_heads=2), prototypes=12)


def load(path) -> dict:
    return torch.load(path, weights_only=True)


# ---- the method ----------------------------------------------------------------------------------


def test_the_loss_is_its_formula():
    """Summed entry by entry in float64, from the definition."""
    crops, batch, K, tau_s, tau_t = 5, 3, 7, 0.1, 0.04
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(crops, batch, K, generator=generator).double()
    teacher = torch.randn(2, batch, K, generator=generator).double()
    centre = torch.randn(K, generator=generator).double()

    def softmax(values: list[float]) -> list[float]:
        exps = [math.exp(v - max(values)) for v in values]
        return [e / math.fsum(exps) for e in exps]

    terms = []
    for i in range(batch):
        for g in range(2):
            P_t = softmax([(teacher[g, i, k] - centre[k]).item() / tau_t for k in range(K)])
            for s in range(crops):
                if s != g:  # no crop is asked to predict itself
                    P_s = softmax([student[s, i, k].item() / tau_s for k in range(K)])
                    terms.append(-math.fsum(p * math.log(q) for p, q in zip(P_t, P_s)))
    targets = teacher_targets(teacher, centre, tau_t)
    expected = math.fsum(terms) / len(terms)
    assert dino_loss(student, targets, tau_s).item() == pytest.approx(expected, rel=1e-5)


def test_a_uniform_output_has_loss_ln_K():
    """Why the loss near ln K means collapse and not learning."""
    targets = teacher_targets(torch.ones(2, 4, 50), torch.zeros(50), 0.04)
    assert dino_loss(torch.ones(6, 4, 50), targets, 0.1).item() == pytest.approx(math.log(50))


def test_crops_of_one_size_share_a_pass_and_keep_their_order():
    network = small_network()
    large, few = torch.randn(3, 2, 3, 16, 16), torch.randn(3, 5, 3, 8, 8)
    passes = []
    network.backbone.register_forward_hook(lambda m, inputs, out: passes.append(inputs[0].shape))
    features, logits = network(large, few)
    assert [tuple(shape) for shape in passes] == [(6, 3, 16, 16), (15, 3, 8, 8)]
    assert logits.shape == (7, 3, 12) and features.shape == (7, 3, 16)
    alone = [network.head(network.backbone(images)) for images in (large[2:3, 1], few[1:2, 4])]
    assert torch.allclose(logits[1, 2], alone[0][0], atol=1e-5)
    assert torch.allclose(logits[6, 1], alone[1][0], atol=1e-5)


def test_the_head_is_dinos():
    """Cosines with prototypes that count by direction alone; widths and start as published."""
    network = small_network()
    x = torch.randn(4, 16)
    before = network.head(x)
    with torch.no_grad():
        network.head.prototypes *= torch.rand(12, 1) + 0.5
    assert torch.allclose(network.head(x), before, atol=1e-6)
    assert before.abs().max() <= 1 + 1e-5  # cosines
    head = Network(ViT(16, 8, 0, dim=192, depth=1, num_heads=2), prototypes=512).head
    assert [layer.out_features for layer in head.mlp[::2]] == [2048, 2048, 256]
    assert head.prototypes.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.mlp[2].bias.abs().max() == 0
    x = y = torch.randn(2, 192)
    for layer in head.mlp[:4:2]:
        y = F.gelu(layer(y))
    y = head.mlp[4](y)
    P = head.prototypes
    cosines = (y / y.norm(dim=1, keepdim=True)) @ (P / P.norm(dim=1, keepdim=True)).T
    assert torch.allclose(head(x), cosines, atol=1e-5)


class Enough(Exception):
    """Ends a run once a test has seen what it came for."""


@pytest.mark.parametrize("words, size, small", [([], 32, 16), (["--image-size", 128], 128, 56)])
def test_the_demo_s_images_and_crops(words, size, small, tmp_path, monkeypatch):
    """Two crops of 32 px and four of 16 px, whose hues and angles may be any; k-NN on the images as
    they are drawn, of a split that is not trained on."""
    crops, given = [], []
    monkeypatch.setattr(train_ssl, "MultiCrop", lambda *x: crops.append(MultiCrop(*x)) or crops[0])

    def knn_loaders(args, sets, *more):
        given.append((sets, real(args, sets, *more)))
        raise Enough

    real = train_ssl.knn_loaders
    monkeypatch.setattr(train_ssl, "knn_loaders", knn_loaders)
    with pytest.raises(Enough):
        run_main(train_ssl.main, ["--workers", 0, *words], tmp_path, monkeypatch)
    [(sets, loaders)], [crop] = given, crops
    assert [(x.split, len(x)) for x in sets] == [("train", 5000), ("val", 2000)]
    for (images, labels), split in zip(map(next, map(iter, loaders)), ("train", "val")):
        drawn = draw_shapes(list(range(256)), size, split)
        assert torch.equal(images, drawn[0]) and torch.equal(labels, drawn[1])
    large, few, _ = crop(sets[0][0][0])
    assert large.shape == (2, 3, size, size) and few.shape == (4, 3, small, small)
    assert crop.drawn and crop.to_local.transforms[1].scale == (0.1, 0.5)


def test_schedules_start_and_end_where_dino_puts_them():
    args = argparse.Namespace(lr=1e-3, momentum=0.996, teacher_temperature=0.07)
    smaller = argparse.Namespace(**vars(args) | dict(lr=1e-9, teacher_temperature=0.03))
    first, risen, middle, last = (scheduled(step, 1000, 100, args) for step in (0, 99, 550, 1000))
    assert first["lr"] == pytest.approx(1e-5) and risen["lr"] == pytest.approx(1e-3)
    assert last["lr"] == pytest.approx(1e-6)
    assert middle["lr"] == pytest.approx((1e-3 + 1e-6) / 2)
    assert (first["weight_decay"], last["weight_decay"]) == pytest.approx((0.04, 0.4))
    assert (first["momentum"], last["momentum"]) == pytest.approx((0.996, 1.0))
    half = scheduled(500, 1000, 100, args)
    assert (half["weight_decay"], half["momentum"]) == pytest.approx((0.22, 0.998))
    assert first["teacher_temperature"] == pytest.approx(0.04)
    assert scheduled(50, 1000, 100, args)["teacher_temperature"] == pytest.approx(0.055)
    assert half["teacher_temperature"] == pytest.approx(0.07)
    for step in (200, 1000):  # below DINO's last rate or first temperature neither ever rises
        now = scheduled(step, 1000, 100, smaller)
        assert now["lr"] <= 1e-9 and now["teacher_temperature"] == pytest.approx(0.03)


def test_gradients_are_clipped_one_by_one():
    a, b, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    norm = train_ssl.clip_each_(iter([a, unused, b]), 2.0)
    assert norm.item() == pytest.approx(math.sqrt(25.25))
    assert torch.allclose(a.grad, torch.tensor([1.2, 1.6])) and torch.allclose(
        b.grad, torch.tensor([0.3, 0.4])
    )


def test_signs_of_collapse():
    """Entropy of the teacher; spread of unit features, 1 for random ones, 0 for equal ones."""
    targets = torch.tensor([0.5, 0.5, 0, 0]).expand(2, 3, 4)
    torch.manual_seed(0)
    signs = train_ssl.health(targets, 7 * torch.randn(2, 500, 64))
    assert signs["teacher_entropy"].item() == pytest.approx(math.log(2))
    assert signs["feature_std"].item() == pytest.approx(1, abs=0.02)
    assert train_ssl.health(targets, torch.ones(2, 5, 64))["feature_std"].item() < 1e-6
    args = argparse.Namespace(prototypes=4, warmup_epochs=1)

    def warning(entropy, std, epoch=2):
        return train_ssl.warning_of(
            dict(teacher_entropy=entropy, feature_std=std, epoch=epoch), args
        )

    assert warning(0.7, 0.5) is None and warning(math.log(4), 0.5, epoch=1) is None
    assert "uniform" in warning(math.log(4), 0.5) and "collapse" in warning(0.7, 0.01)


# ---- the loop, by hand ---------------------------------------------------------------------------


SEED = 5  # not the default, which a run might use whatever it is told


def crops_of(root, epoch: int, step: int, local_crops: int):
    """Global and local crops of a step of 20, from the seeds that `data` documents."""
    folder, crops = data.image_folder(root, "train"), MultiCrop(16, 8, local_crops, 0.3, False)
    [seed] = data.mixed_seeds(1, data.ORDER, SEED, epoch)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    out = []
    for index, seed in zip(
        order[step * 20 : (step + 1) * 20].tolist(),
        data.mixed_seeds(20, data.IMAGES, SEED, epoch, step),
    ):
        torch.manual_seed(seed)
        out.append(crops(folder[index][0]))
    *groups, changes = map(torch.stack, zip(*out))
    return [
        data.normalise(recoloured(images, change))
        for images, change in zip(groups, (changes[:, :2], changes[:, 2:]))
        if images.numel()
    ]


def half_cosine(first, last, progress):
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def dino_by_hand(root, student: Network, local_crops: int, held: bool):
    """Two epochs of three steps. Returns student, teacher, centre and the mean loss of epoch 2."""
    teacher, centre = copy.deepcopy(student), torch.zeros(32)
    decayed = {n for n, p in student.named_parameters() if p.ndim > 1}
    decayed -= {"backbone.cls_token", "backbone.pos_embed"}
    rises = [1 / 3, 2 / 3, 1.0]
    for epoch in range(2):
        losses = []
        for step in range(3):
            i = 3 * epoch + step
            lr = 0.3 * rises[i] if i < 3 else half_cosine(0.3, 1e-6, (i - 3) / 3)
            momentum = half_cosine(0.7, 1.0, i / 6)
            temperature = 0.04 + min(1.0, 10 * i / 6) * (0.06 - 0.04)
            groups = crops_of(root, epoch, step, local_crops)
            torch.manual_seed(data.mixed_seeds(1, data.STEP, SEED, epoch, step, 0)[0])
            with torch.no_grad():
                g = teacher.eval()(groups[0])[1]
            student.train().zero_grad()
            s = student(*groups)[1]
            P_t = ((g - centre) / temperature).softmax(-1)
            terms = [
                -(P_t[a] * (s[b] / 0.1).log_softmax(-1)).sum(-1)
                for a in range(2)
                for b in range(2 + local_crops)
                if a != b
            ]
            loss = torch.stack(terms).mean()
            loss.backward()
            losses.append(loss.item())
            with torch.no_grad():
                for name, p in student.named_parameters():
                    if name == "head.prototypes" and epoch == 0:
                        continue
                    clipped = p.grad * min(1.0, 3.0 / (p.grad.norm().item() + 1e-6))
                    decay = half_cosine(0.04, 0.4, i / 6) * (name in decayed)
                    update = lr * (clipped + decay * p)
                    p -= update * share_of(name, p) if held else update
                for t, p in zip(teacher.parameters(), student.parameters()):
                    t.copy_(momentum * t + (1 - momentum) * p)
                centre = 0.9 * centre + 0.1 * g.mean(dim=(0, 1))
    return student, teacher, centre, sum(losses) / 3


@pytest.mark.parametrize(
    "drop_path, local_crops, held", [(0.4, 3, False), (0, 0, False), (0, 1, True)]
)
def test_two_epochs_equal_the_same_steps_by_hand(
    drop_path, local_crops, held, image_root, tmp_path, monkeypatch, float64_sgd
):
    """The student, the teacher, the centre and the logged numbers.

    With drop-path without val/, where no k-NN has put the teacher into evaluation: it drops none.
    """
    root = image_root
    if drop_path:
        root = tmp_path / "images"
        shutil.copytree(image_root / "train", root / "train")
    words = [*RUN, "--data", root, "--out", tmp_path, "--batch-size", 20, "--lr", 0.3]
    words += ["--seed", SEED]
    words += ["--momentum", 0.7, "--teacher-temperature", 0.06, "--crop-split", 0.3]
    words += ["--drop-path", drop_path, "--local-crops", local_crops]
    words += ["--skipless", "--init", "identity", "--grad-accum", 2] if held else []
    words += ["--checkpoint-activations"] if held or drop_path else []
    twice = passes_computed_twice(monkeypatch)
    run_main(train_ssl.main, words, tmp_path, monkeypatch)
    assert bool(twice) == bool(held or drop_path)
    checkpoint = load(tmp_path / "last.pt")

    torch.manual_seed(SEED)
    shape = PRESETS["nano"] | dict(depth=2, drop_path=drop_path)
    shape |= dict(COUNTS_ON | NEEDS, residual=False) if held else dict(pos_embed_std=0.02)
    backbone = ViT(16, 8, 0, **shape)
    student = Network(identity_init_(backbone) if held else backbone, prototypes=32)
    start = copy.deepcopy(student)
    student, teacher, centre, loss = dino_by_hand(image_root, student, local_crops, held)
    assert (student.head.prototypes - start.head.prototypes).norm() > 0.01  # it did move
    for name, weight in student.state_dict().items():
        assert torch.allclose(checkpoint["student"][name], weight, atol=1e-6), name
    for key, module in (("model", teacher.backbone), ("teacher_head", teacher.head)):
        for name, weight in module.state_dict().items():
            assert torch.allclose(checkpoint[key][name], weight, atol=1e-6), name
    assert torch.allclose(checkpoint["centre"], centre, atol=1e-6)
    row = checkpoint["history"][-1]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["momentum"] == pytest.approx(half_cosine(0.7, 1.0, 5 / 6))
    expected = None if drop_path else pytest.approx(knn_by_hand(image_root, teacher.backbone))
    assert row["knn"] == expected


@torch.no_grad()
def knn_by_hand(root, model) -> float:
    """k-NN of the teacher's features on unaugmented images, all 60 neighbours' votes counted."""
    _, transform = data.augmentations(16, drawn=False)
    sets = []
    for split in ("train", "val"):
        folder = data.image_folder(root, split)
        images = torch.stack([transform(image) for image, _ in folder])
        features = model.eval()(data.normalise(images))
        sets.append((F.normalize(features, dim=1), torch.tensor([y for _, y in folder])))
    (bank, labels), (queries, truth) = sets
    hits = 0
    for query, y in zip(queries, truth):
        cosines = bank @ query
        votes = [0.0] * 5
        for i in cosines.argsort(descending=True)[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        hits += votes.index(max(votes)) == y
    return 100 * hits / len(truth)


def test_knn_is_scikit_learns_weighted_knn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)  # fewer than five classes
    labels = torch.randint(0, 4, (700,), generator=generator)
    points = F.normalize(centres[labels] + 2 * torch.randn(700, 16, generator=generator), dim=-1)
    bank, queries, bank_labels = points[:200], points[200:], labels[:200]
    for k in (1, 20, 500):
        peer = neighbors.KNeighborsClassifier(
            min(k, 200), metric="cosine", weights=lambda distance: torch.exp(
                (1 - torch.as_tensor(distance)) / 0.07
            ).numpy()
        )  # fmt: skip
        peer.fit(bank.numpy(), bank_labels.numpy())
        ours = knn.knn_classify(bank, bank_labels, queries, k)
        assert ours.tolist() == peer.predict(queries.numpy()).tolist()
        assert (ours == labels[200:]).float().mean() > 0.4


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(image_root, tmp_path_factory):
    """A folder with a skipless run on five classes of real files, and what it printed."""
    folder = tmp_path_factory.mktemp("ssl")
    done = run_script(
        "train_ssl.py",
        "--data",
        image_root,
        *RUN,
        "--skipless",
        "--init",
        "paper",
        "--out",
        "run",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_says_and_leaves_what_it_promises(finished):
    folder, printed = finished
    lines = printed.strip().splitlines()
    assert re.fullmatch(r"k-NN top-1 [\d.]+ %  \(2 epochs, [\d.]+ min\)", lines[-1])
    assert "skipless-paper, 2 blocks" in printed
    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {"loss", "teacher_entropy", "feature_std", "knn", "lr"} <= rows[2].keys()
    assert rows[0]["knn"] is not None and rows[1]["knn"] is None and rows[2]["knn"] is not None
    assert 0 < rows[2]["teacher_entropy"] <= math.log(32)
    assert (folder / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    groups = load(folder / "run/last.pt")["optimizer"]["param_groups"]
    assert [tuple(group["betas"]) for group in groups] == [(0.95, 0.95)] * 2  # SOAP's


def test_collapse_is_said_once_and_knn_measured_as_often_as_asked(
    image_root, tmp_path, monkeypatch, capsys
):
    words = ["--data", image_root, *RUN, "--teacher-temperature", "100", "--opt", "adamw"]
    words += ["--epochs", 5, "--knn-every", 2, "--out", "run"]
    run_main(train_ssl.main, words, tmp_path, monkeypatch)
    said = re.findall(r"warning: the teacher's output is uniform", capsys.readouterr().out)
    assert len(said) == 1
    history = load(tmp_path / "run/last.pt")["history"]
    measured = [row["epoch"] for row in history if row["knn"] is not None]
    assert measured == [0, 2, 4, 5]  # before training, every second epoch, and at the end


def test_memory_counts_every_crop(image_root, tmp_path, monkeypatch, capsys):
    """Here a global crop of 64 px has 65 tokens, a local one of 24 px 10: with eight of them 210
    tokens per image instead of 130."""

    def enough(run, *words):
        describe_memory(run, *words)
        raise Enough

    describe_memory, told = train_ssl.Run.describe_memory, []
    monkeypatch.setattr(train_ssl.Run, "describe_memory", enough)
    for count in (0, 8):
        words = ["--data", image_root, *RUN, "--local-crops", count, "--image-size", 64]
        with pytest.raises(Enough):
            run_main(train_ssl.main, words, tmp_path, monkeypatch)
        told += re.findall(r"([\d.]+) MB for each of 12 images", capsys.readouterr().out)
    assert float(told[1]) / float(told[0]) == pytest.approx(210 / 130, rel=0.05)


def test_adamw_has_dinos_betas_and_a_large_set_no_first_pass(image_root, tmp_path, monkeypatch):
    """And no k-NN is measured before training on a large set: a pass over it."""
    words = [*RUN, "--data", image_root, "--opt", "adamw", "--epochs", "1", "--warmup-epochs", "0"]
    for most, out, first in ((60, "a", 0), (59, "b", 1)):
        monkeypatch.setattr(train_ssl, "SMALL_SET", most)
        run_main(train_ssl.main, [*words, "--out", out], tmp_path, monkeypatch)
        checkpoint = load(tmp_path / out / "last.pt")
        group = checkpoint["optimizer"]["param_groups"][0]
        assert tuple(group["betas"]) == (0.9, 0.999)
        assert checkpoint["history"][0]["epoch"] == first and checkpoint["history"][0]["knn"]


def test_an_interrupted_run_resumes_exactly(image_root, tmp_path, monkeypatch, capsys):
    """And its images per second are those of the steps that it made itself: here 4 in 0.1 s."""
    args = ["--data", image_root, *RUN, "--batch-size", "4", "--skipless"]
    run_main(train_ssl.main, [*args, "--out", "a"], tmp_path, monkeypatch)
    lr_at, now = train_ssl.lr_at, [1000.0]
    monkeypatch.setattr("support.run.time.time", lambda: now[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which cron's processes ignore

    def lr_and_a_signal(step, *rest):  # as if Ctrl-C came in the second epoch's sixth step
        now[0] += 0.1
        if step == 15 + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return lr_at(step, *rest)

    monkeypatch.setattr(train_ssl, "lr_at", lr_and_a_signal)
    stopped = run_here(train_ssl.main, [*args, "--out", "b"], tmp_path, monkeypatch, capsys)
    assert stopped.returncode == 128 + signal.SIGINT and "continue with --resume" in stopped.stdout
    halfway = load(tmp_path / "b/last.pt")
    assert (halfway["epoch"], halfway["step"]) == (1, 6) and halfway["sums"]["loss"] > 0
    run_main(train_ssl.main, ["--resume", "b/last.pt", "--workers", "1"], tmp_path, monkeypatch)
    a, b = (load(tmp_path / f"{name}/last.pt") for name in "ab")
    for key in ("model", "student", "teacher_head"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert torch.equal(a["centre"], b["centre"])
    for key in ("knn", "loss", "teacher_entropy"):
        assert [r.get(key) for r in a["history"]] == [r.get(key) for r in b["history"]]
    assert b["history"][-1]["images_per_s"] == 40.0


def test_a_run_stopped_before_its_first_step_goes_on(image_root, tmp_path, monkeypatch, capsys):
    """While k-NN measures the untrained network: that is measured again."""
    words = ["--data", image_root, *RUN, "--epochs", 1, "--warmup-epochs", 0, "--skipless"]
    run_main(train_ssl.main, [*words, "--out", "a"], tmp_path, monkeypatch)
    batches = train_ssl.Batches
    small = lambda length, size, *rest: batches(length, min(size, 12), *rest)  # noqa: E731

    def normalise(images):
        os.kill(os.getpid(), signal.SIGTERM)
        return data.normalise(images)

    with monkeypatch.context() as p:
        p.setattr(train_ssl, "Batches", small)
        p.setattr("support.knn.normalise", normalise)
        stopped = run_here(train_ssl.main, [*words, "--out", "b"], tmp_path, p, capsys)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped at epoch 1, step 0; continue with --resume b/last.pt" in stopped.stdout
    run_main(train_ssl.main, ["--resume", "b/last.pt"], tmp_path, monkeypatch)
    a, b = (load(tmp_path / f"{name}/last.pt")["history"] for name in "ab")
    assert [(x["epoch"], x["knn"]) for x in a] == [(x["epoch"], x["knn"]) for x in b]
    assert len(b) == 2 and a[1]["loss"] == b[1]["loss"]


# ---- what it refuses -----------------------------------------------------------------------------


def test_without_val_knn_is_off(image_root, tmp_path, monkeypatch, capsys):
    root = tmp_path / "unlabelled"
    shutil.copytree(image_root / "train", root / "train")
    words = ["--data", root, *RUN, "--epochs", "1", "--warmup-epochs", "0"]
    run_main(train_ssl.main, words, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "k-NN    off" in printed and printed.strip().splitlines()[-1].startswith("k-NN off")


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data missing", "no such folder"),
        ("--image-size 20 --patch-size 8", "patch size must divide image size"),
        ("--beta 1", "--beta is not part of --init default"),
        ("--warmup-epochs 6 --epochs 6", "less than --epochs"),
        ("--crop-split 1.5", r"lie in \[0, 1\)"),
        ("--momentum 1", r"lie in \[0, 1\)"),
        ("--batch-size 9000", "exceeds the 5000 training images"),
        ("--lr -1", "be positive"),
        ("--device tpu", "use auto, cpu, cuda"),
        ("--prototypes many", "invalid int value"),
        ("--resume missing.pt", "no such file"),
        ("--prototypes 1000000000000", "out of memory; "),
    ],
)
def test_bad_input_ends_in_one_line(words, says, tmp_path, monkeypatch, capsys):
    done = run_here(train_ssl.main, words.split(), tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, says)


def test_bad_files_end_in_one_line(finished, tmp_path, monkeypatch, capsys):
    root = make_image_folder(tmp_path / "images")
    shutil.move(root / "val/class0", root / "val/classX")
    done = run_here(train_ssl.main, ["--data", root], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "must hold the same classes")
    files.save_checkpoint(tmp_path / "other.pt", dict(script="train_cls"))
    done = run_here(train_ssl.main, ["--resume", "other.pt"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "written by train_cls, not by train_ssl")
    last = finished[0] / "run/last.pt"
    done = run_here(train_ssl.main, ["--resume", last, "--lr", "5"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "contradicts the checkpoint")
    files.save_checkpoint(tmp_path / "last.pt", load(last) | dict(centre=torch.zeros(3)))
    done = run_here(train_ssl.main, ["--resume", "last.pt"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "last.pt is damaged or of another version")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", dict(model="nano", image_size=32, patch_size=8, lr=3e-3, epochs=6)),
        ("", dict(local_crops=4, prototypes=256, momentum=0.98, teacher_temperature=0.04)),
        ("--data x", dict(local_crops=8, prototypes=65536, momentum=0.996, lr=2e-3)),
        ("--data x", dict(teacher_temperature=0.07, crop_split=0.25, drop_path=0.1)),
        ("--data x --skipless", dict(model="small", init="paper", alpha=1.8, beta=1.0, c=3.0)),
        ("--data x --skipless", dict(lr=5e-4, drop_path=0.0)),
    ],
)
def test_where_a_setting_comes_from(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ssl.py", *words.split()])
    args, *_ = train_ssl.read_settings()
    assert {name: getattr(args, name) for name in expected} == expected
