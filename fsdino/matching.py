"""Training-free matching as in INSID3 (arXiv 2603.28480), on any frozen features: positional debiasing, agreement of
forward and backward matches, and clusters of the query that are taken or left whole."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from fsdino.prompts import mask_to_grid

COMPONENTS = 500 / 1024  # of the channels, those of the paper's ViT-L: the subspace of position
DISTANCE = 0.4  # average cosine distance up to which clusters are merged
THRESHOLD = 0.2  # of a cluster's score


def positional_basis(blank: Float[Tensor, "c g g"]) -> Float[Tensor, "c r"]:
    """Orthonormal directions in which the features of an empty image vary: position, and nothing else."""
    features = F.normalize(blank.flatten(1).double(), dim=0)
    vectors, values, _ = torch.linalg.svd(features - features.mean(1, keepdim=True), full_matrices=False)
    kept = int((values > 1e-4 * values.max().clamp_min(1e-12)).sum())
    return vectors[:, : min(kept, round(COMPONENTS * len(blank)))].to(blank.dtype)


def matching_logits(
    late: Float[Tensor, "b k c g g"],
    masks: Float[Tensor, "b k h w"],
    query: Float[Tensor, "b c g g"],
    basis: Float[Tensor, "c r"],
) -> Float[Tensor, "b 1 g g"]:
    """One half on the positions of the class, minus one half elsewhere."""
    found = torch.stack([_match(*one, basis) for one in zip(late, masks, query, strict=True)])
    return (found.to(query.dtype) - 0.5)[:, None]


def _match(
    late: Float[Tensor, "k c g g"],
    masks: Float[Tensor, "k h w"],
    query: Float[Tensor, "c g g"],
    basis: Float[Tensor, "c r"],
) -> Bool[Tensor, "g g"]:
    grid = query.shape[-1]
    shown = foreground(masks.to(late.dtype), grid).flatten(1)
    plain = F.normalize(query.flatten(1), dim=0)
    reference, target = (_debiased(x, basis) for x in (late.flatten(2), plain[None]))
    prototypes = [(x * m).sum(1) / m.sum() for x, m in zip(reference, shown, strict=True)]
    prototype = F.normalize(torch.stack(prototypes).mean(0), dim=0)
    similarity = prototype @ target[0]
    forward = similarity > 0 if (similarity > 0).any() else similarity > similarity.quantile(0.9)
    votes = sum(m[(target[0].T @ x).argmax(1)].int() for x, m in zip(reference, shown, strict=True))
    candidates = forward & (votes >= -(-len(late) // 2))
    taken = torch.zeros(grid * grid, dtype=torch.bool, device=query.device)
    if candidates.any():
        taken = _whole_clusters(plain, target[0], prototype, similarity, candidates)
    return taken.unflatten(0, (grid, grid))


def _whole_clusters(
    plain: Float[Tensor, "c n"],
    debiased: Float[Tensor, "c n"],
    prototype: Float[Tensor, "c"],
    similarity: Float[Tensor, "n"],
    candidates: Bool[Tensor, "n"],
) -> Bool[Tensor, "n"]:
    """The clusters like the one that the prototype resembles most, weighted by how far they are candidates."""
    labels = torch.from_numpy(clusters(plain.T.cpu().numpy())).long().to(plain.device)
    member = F.one_hot(labels).to(plain.dtype)
    size = member.sum(0)
    own, centred = (F.normalize(x @ member, dim=0) for x in (plain, debiased))
    agreed = candidates.to(plain.dtype) @ member / size
    seed = torch.where(agreed > 0, prototype @ centred, -torch.inf).argmax()
    agreed[seed] = 1
    score = (similarity @ member / size) * (own[:, seed] @ own) * agreed
    return (score > THRESHOLD)[labels]


def clusters(features: Float[np.ndarray, "n c"]) -> np.ndarray:
    """Numbers of clusters from 0, by average linkage of cosine distances."""
    joined = linkage(features.astype(np.float64), "average", "cosine")
    return fcluster(joined, DISTANCE, "distance") - 1


def foreground(masks: Float[Tensor, "k h w"], grid: int) -> Bool[Tensor, "k g g"]:
    """Positions that a mask covers by half; if none, the one that it covers most."""
    share = mask_to_grid(masks, grid)
    most = share.amax((-2, -1), keepdim=True)
    return (share > 0.5) | ((share == most) & (most <= 0.5) & (most > 0))


def _debiased(features: Float[Tensor, "k c n"], basis: Float[Tensor, "c r"]) -> Float[Tensor, "k c n"]:
    unit = F.normalize(features, dim=1)
    return F.normalize(unit - basis @ (basis.T @ unit), dim=1)
