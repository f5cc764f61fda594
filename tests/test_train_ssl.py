"""DINO: its loss, its crops, its teacher, its k-NN; and the script run as a user runs it."""

import argparse
import copy
import json
import math
import re
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    SMALL,
    assert_fails_in_one_line,
    make_image_folder,
    run_here,
    run_interrupted,
    run_script,
    run_scripts,
)
from PIL import Image

import common
import train_ssl
from minskip import ViT
from train_ssl import Head, MultiCrop, Network, dino_loss, knn_classify, scheduled, teacher_targets

RUN = [*SMALL, "--epochs", "2", "--warmup-epochs", "1", "--workers", "0", "--prototypes", "32"]


def small_network() -> Network:
    torch.manual_seed(0)
    return Network(ViT(16, 8, 0, width=16, depth=2, heads=2), Head(16, 32, 8, prototypes=12))


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


def test_prototypes_count_by_their_direction_alone():
    network = small_network()
    x = torch.randn(4, 16)
    before = network.head(x)
    with torch.no_grad():
        network.head.prototypes *= torch.rand(12, 1) + 0.5
    assert torch.allclose(network.head(x), before, atol=1e-6)
    assert before.abs().max() <= 1 + 1e-5  # cosines


def test_multi_crop_sizes_and_the_224_recipe():
    assert train_ssl.local_size(224, 16) == 96
    large, few = MultiCrop(32, 16, local_crops=3, split=0.5, drawn=False)(
        Image.new("RGB", (40, 30))
    )
    assert large.shape == (2, 3, 32, 32) and few.shape == (3, 3, 16, 16)
    assert large.dtype == few.dtype == torch.uint8
    large, few = MultiCrop(32, 16, local_crops=0, split=0.5, drawn=True)(
        torch.zeros(3, 32, 32).byte()
    )
    assert few.shape == (0, 3, 16, 16)


def test_crops_are_made_of_their_seed():
    data = common.Seeded(common.Shapes("train", 4), MultiCrop(32, 16, 2, 0.5, drawn=True))
    (first, _), (again, _), (other, _) = (data.__getitems__([(1, seed)])[0] for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_schedules_start_and_end_where_dino_puts_them():
    args = argparse.Namespace(lr=1e-3, momentum=0.996, teacher_temperature=0.07)
    first, risen, last = (scheduled(step, 1000, 100, args) for step in (0, 99, 999))
    assert first["lr"] == pytest.approx(1e-5) and risen["lr"] == pytest.approx(1e-3)
    assert last["lr"] == pytest.approx(1e-6)
    assert (first["weight_decay"], last["weight_decay"]) == pytest.approx((0.04, 0.4))
    assert (first["momentum"], last["momentum"]) == pytest.approx((0.996, 1.0))
    assert first["teacher_temperature"] == pytest.approx(0.04)
    assert risen["teacher_temperature"] == pytest.approx(0.07, abs=1e-3)
    beyond = scheduled(5000, 1000, 100, args)  # clamped: nothing swings back
    assert beyond == pytest.approx(last)


def test_no_decay_on_biases_norms_and_embeddings():
    network = small_network()
    [optimizer] = common.build_optimizers(network, "adamw", 1e-3, 0.04)
    plain = {id(p) for g in optimizer.param_groups if not g["decayed"] for p in g["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in plain}
    assert all("bias" in n or "norm" in n or "token" in n or "position" in n for n in names)
    assert {"backbone.class_token", "backbone.position_embedding", "head.mlp.0.bias"} <= names
    assert all(g["weight_decay"] == (0.04 if g["decayed"] else 0) for g in optimizer.param_groups)


def test_knn_is_scikit_learns_weighted_knn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)  # fewer than five classes
    labels = torch.randint(0, 4, (300,), generator=generator)
    points = F.normalize(centres[labels] + 2 * torch.randn(300, 16, generator=generator), dim=-1)
    bank, queries, bank_labels = points[:200], points[200:], labels[:200]
    for k in (1, 20, 500):
        peer = neighbors.KNeighborsClassifier(
            min(k, 200), metric="cosine", weights=lambda distance: torch.exp(
                (1 - torch.as_tensor(distance)) / 0.07
            ).numpy()
        )  # fmt: skip
        peer.fit(bank.numpy(), bank_labels.numpy())
        ours = knn_classify(bank, bank_labels, queries, k)
        assert ours.tolist() == peer.predict(queries.numpy()).tolist()
        assert (ours == labels[200:]).float().mean() > 0.4


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(image_root, tmp_path_factory):
    """A folder with runs on five classes of real files, and what each run printed."""
    folder = tmp_path_factory.mktemp("ssl")
    base = ["train_ssl.py", "--data", image_root, *RUN]
    done = run_scripts(
        {
            "straight": [*base, "--skipless", "--out", "runs/straight"],
            "one-epoch": [*base, "--epochs", "1", "--warmup-epochs", "0", "--out", "runs/one-epoch",
                          "--momentum", "0.9999999"],
            "uniform": [*base, "--teacher-temperature", "100", "--opt", "adamw"],
            "muon": [*base, "--opt", "muon", "--local-crops", "0", "--out", "runs/muon"],
        },
        folder,
    )  # fmt: skip
    for run in done.values():
        assert run.returncode == 0, run.stderr
    return folder, {name: run.stdout for name, run in done.items()}


def test_a_run_says_and_leaves_what_it_promises(finished):
    folder, printed = finished
    lines = printed["straight"].strip().splitlines()
    assert re.fullmatch(r"k-NN top-1 [\d.]+ %  \(2 epochs, [\d.]+ min\)", lines[-1])
    assert "skipless, conditioned init" in printed["straight"]
    text = (folder / "runs/straight/log.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {"train_loss", "teacher_entropy", "feature_std", "knn", "lr"} <= rows[2].keys()
    assert rows[0]["knn"] is not None and rows[2]["knn"] is not None
    assert 0 < rows[2]["teacher_entropy"] <= math.log(32)
    assert (folder / "runs/straight/curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_teacher_learns_from_no_gradient_and_shares_no_memory(finished):
    """With a momentum of all but 1 it stays where it began while the student walks away."""
    checkpoint = load(finished[0] / "runs/one-epoch/last.pt")
    for name, weight in checkpoint["model"].items():
        if "W_V.weight" in name:
            moved = (checkpoint["student"][f"backbone.{name}"] - weight).norm()
            assert moved > 1e-3
    torch.manual_seed(0)
    start = ViT(**checkpoint["model_config"]).state_dict()
    assert all(torch.allclose(start[k], v, atol=1e-5) for k, v in checkpoint["model"].items())


def test_prototypes_are_frozen_for_the_first_epoch_only(finished):
    """In these steps the teacher's stay at the start, so the student's must equal them."""
    student, teacher = (
        lambda c: c["student"]["head.prototypes"],
        lambda c: c["teacher_head"]["prototypes"],
    )
    first = load(finished[0] / "runs/one-epoch/last.pt")
    assert torch.equal(student(first), teacher(first))
    second = load(finished[0] / "runs/straight/last.pt")
    assert not torch.allclose(student(second), teacher(second), atol=1e-4)


def test_collapse_is_said_in_one_line(finished):
    printed = finished[1]["uniform"]
    assert len(re.findall(r"warning: the teacher's output is uniform", printed)) == 1
    assert "warning" not in finished[1]["straight"]


def test_the_checkpoint_gives_the_teachers_backbone(finished):
    checkpoint = common.load_checkpoint(str(finished[0] / "runs/straight/last.pt"), "train_ssl")
    model = common.model_of(checkpoint)
    assert model.config["num_classes"] == 0 and model.config["residual"] is False
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 64)
    assert checkpoint["centre"].shape == (32,) and checkpoint["centre"].abs().max() > 0


def test_an_interrupted_run_resumes_exactly(image_root, tmp_path):
    args = ["--data", image_root, *RUN, "--batch-size", "4", "--epochs", "4", "--skipless"]
    straight = run_script("train_ssl.py", *args, "--out", "runs/a", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    # As if SIGTERM came before the 21st of 4 x 15 steps' ends: in the second epoch's sixth step.
    stopped = run_interrupted(
        "train_ssl", 20, [*args, "--out", "runs/b", "--workers", "1"], tmp_path
    )
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "continue with --resume" in stopped.stdout and not stopped.stderr
    halfway = load(tmp_path / "runs/b/last.pt")
    assert (halfway["epoch"], halfway["step"]) == (1, 5) and halfway["sums"].abs().sum() > 0
    resumed = run_script("train_ssl.py", "--resume", "runs/b/last.pt", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load(tmp_path / f"runs/{name}/last.pt") for name in "ab")
    for key in ("model", "student", "teacher_head"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
    assert torch.equal(a["centre"], b["centre"])
    for key in ("knn", "train_loss", "teacher_entropy"):
        assert [r.get(key) for r in a["history"]] == [r.get(key) for r in b["history"]]


def test_two_processes_train_what_one_does(image_root, tmp_path):
    """Crops come of the image's seed and the centre is synchronised: the same up to rounding."""
    args = ["--data", image_root, *RUN, "--skipless", "--opt", "adamw"]
    one = run_script("train_ssl.py", *args, "--out", "one", cwd=tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run_script("train_ssl.py", *args, "--out", "two", cwd=tmp_path, launcher=launcher)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert torch.allclose(a["centre"], b["centre"], atol=1e-4)
    rows = [
        [(row["train_loss"], row["teacher_entropy"]) for row in c["history"][1:]] for c in (a, b)
    ]
    assert rows[0] == [pytest.approx(row, abs=1e-3) for row in rows[1]]


# ---- what it refuses -----------------------------------------------------------------------------


def test_without_val_knn_is_off(image_root, tmp_path):
    root = tmp_path / "unlabelled"
    shutil.copytree(image_root / "train", root / "train")
    done = run_script("train_ssl.py", "--data", root, *RUN, "--epochs", "1", "--warmup-epochs", "0",
                      cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "k-NN    off" in done.stdout and done.stdout.strip().splitlines()[-1].startswith(
        "k-NN off"
    )


@pytest.mark.parametrize(
    "words, says",
    [
        ("--data missing", "no such folder"),
        ("--image-size 20 --patch-size 8", "patch size must divide image size"),
        ("--alpha 1", "add --init conditioned"),
        ("--warmup-epochs 6 --epochs 6", "less than --epochs"),
        ("--crop-split 1.5", r"lie in \[0, 1\)"),
        ("--momentum 1", r"lie in \[0, 1\)"),
        ("--batch-size 9000", "exceeds the 5000 training images"),
        ("--lr -1", "be positive"),
        ("--device tpu", "use auto, cpu, cuda"),
        ("--prototypes many", "invalid int value"),
        ("--resume missing.pt", "no such file"),
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
    common.save_checkpoint(tmp_path / "other.pt", script="train_cls")
    done = run_here(train_ssl.main, ["--resume", "other.pt"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "written by train_cls, not by train_ssl")
    last = finished[0] / "runs/straight/last.pt"
    done = run_here(train_ssl.main, ["--resume", last, "--lr", "5"], tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, "contradicts the checkpoint")


def test_a_network_and_its_deep_copy_agree():
    """The teacher is one: nothing in the student may resist copying."""
    network = small_network()
    twin = copy.deepcopy(network)
    x = torch.randn(2, 2, 3, 16, 16)
    assert torch.equal(network(x)[1], twin(x)[1])
    assert all(p is not q for p, q in zip(network.parameters(), twin.parameters()))
