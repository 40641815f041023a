"""FAVOR+ attention whose random features never sink to zero.

performer-pytorch subtracts the largest projection first and |k|²/2 afterwards, so keys (and
queries) of unit variance underflow to the additive epsilon and the attention becomes uniform; the
published scBERT takes that maximum over the whole batch besides, so a cell's result depends on its
neighbours. Here the maximum is taken per cell and head, of the complete exponent. Parameters and
state dict are those of performer-pytorch's `FastAttention`. (Choromanski et al. 2021, "Rethinking
attention with performers", equations 5 to 7 and Lemma 1.)
"""

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    # performer-pytorch imports interfaces that Python and torch are about to drop.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from performer_pytorch.performer_pytorch import (
        FastAttention,
        Performer,
        gaussian_orthogonal_random_matrix,
    )

__all__ = ["EPSILON", "FavorAttention", "Performer", "draw_projection", "favor_attention"]

EPSILON = 1e-4
"""Added to every feature, relative to the largest; performer-pytorch's value."""


class FavorAttention(FastAttention):  # type: ignore[misc]
    """Linear attention by positive orthogonal random features, one cell at a time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: Queries, (B, H, n, d).
            k: Keys, (B, H, n, d).
            v: Values, (B, H, n, d).

        Returns:
            Attended values, (B, H, n, d).
        """
        return favor_attention(q, k, v, self.projection_matrix)


def favor_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float = EPSILON
) -> Tensor:
    """Approximate softmax(q kᵀ / √d) v in time linear in the length n.

    Args:
        q: Queries, (B, H, n, d).
        k: Keys, (B, H, n, d).
        v: Values, (B, H, n, d).
        projection: Random directions, (m, d).
        epsilon: Added to each feature.

    Returns:
        Attended values, (B, H, n, d), in the type of `v`.
    """
    # Exponents need float32: bf16 has no digits left at |k|²/2 of 30.
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.25
    directions = projection.to(wide).t() * scale  # (d, m)
    with torch.autocast(q.device.type, enabled=False):
        q, k, values = q.to(wide), k.to(wide), v.to(wide)
        # |q|²/2 is the same for all features of a query and cancels in the normalization.
        exponent = q @ directions  # (B, H, n, m)
        query = torch.exp(exponent - exponent.amax(-1, keepdim=True).detach()) + epsilon
        exponent = k @ directions - (k * scale).square().sum(-1, keepdim=True) / 2
        key = torch.exp(exponent - exponent.amax((-1, -2), keepdim=True).detach()) + epsilon
        context = key.transpose(-1, -2) @ values  # (B, H, m, d)
        normalizer = query @ key.sum(-2).unsqueeze(-1)  # (B, H, n, 1)
        return (query @ context / normalizer).to(v.dtype)


def draw_projection(num_features: int, dim_head: int, seed: int) -> Tensor:
    """Draw orthogonal random directions of Gaussian length, (m, d), float32 on the CPU.

    The same seed gives the same directions on every rank and device; torch's global generator,
    from which performer-pytorch draws, is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        drawn: Tensor = gaussian_orthogonal_random_matrix(num_features, dim_head, scaling=0)
        # QR fixes the signs of its factors, so performer-pytorch's directions have a mean other
        # than zero and its attention a bias; random signs make them uniform on the sphere.
        signs = 2 * torch.randint(2, (num_features, 1)) - 1
        return drawn.float() * signs
