"""Weighted k-nearest-neighbour classification: what frozen features know of an image's class."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minskip import ViT
from support.data import normalise
from support.processes import autocast, mean_over_processes, on_device, progress


@torch.no_grad()
def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class of each query by the vote of its k nearest neighbours, weighted exp(cosine / tau).

    Wu et al. 2018 (arXiv 1805.01978), as DINO evaluates. bank (n, dim) and queries (m, dim) have
    unit length; with fewer than k images in the bank all vote. Returns (m,).
    """
    classes = int(bank_labels.max()) + 1
    votes = []
    for part in queries.split(256):  # similarities of a whole set would not fit
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))
        weights = (similarity / temperature).exp()
        score = weights.new_zeros(len(part), classes)
        votes.append(score.scatter_add_(1, bank_labels[nearest], weights).argmax(1))
    return torch.cat(votes)


@torch.no_grad()
def features_of(model: ViT, loader, device: torch.device, amp: str) -> tuple[Tensor, Tensor]:
    """Unit-length pooled features, (image, dim), and labels, (image,), of a data set."""
    model.eval()
    features, labels = [], []
    for images, classes in progress(loader, "k-NN features"):
        images, classes = on_device([images, classes], device)
        with autocast(device, amp):
            features.append(model(normalise(images)).float())
        labels.append(classes)
    return F.normalize(torch.cat(features), dim=-1), torch.cat(labels)


def gathered(x: Tensor) -> Tensor:
    """The processes' tensors, which may differ in length, one after the other along axis 0."""
    if not dist.is_initialized():
        return x
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, int(max(lengths)) - len(x)])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths)])


def knn_accuracy(model: ViT, train_loader, val_loader, device: torch.device, amp: str) -> float:
    """Top-1 in percent of the validation images' classes, from the training images'."""
    bank, bank_labels = (gathered(x) for x in features_of(model, train_loader, device, amp))
    queries, labels = features_of(model, val_loader, device, amp)
    hits = (knn_classify(bank, bank_labels, queries) == labels).sum()
    counts = mean_over_processes(torch.stack([hits, torch.full_like(hits, len(labels))]).double())
    return (100 * counts[0] / counts[1]).item()
