"""One Performer block over packed cells: attention, then feed-forward, each behind a LayerNorm.

performer-pytorch builds the modules and names their parameters; the forward passes here take their
place. They work on cells of any length, one behind the other, make one product of the three that
give queries, keys and values, and can leave out what nobody reads: a block whose states are read
at some positions only still needs keys and values everywhere, but queries, output projection and
feed-forward just there.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pretrain.config import EncoderConfig
from pretrain.favor import (
    FavorAttention,
    Performer,
    PreLayerNorm,
    favor_attention,
    fresh_projection,
)
from pretrain.feed_forward_native import native_feed_forward, usable
from pretrain.fused import split_fused
from pretrain.products import linear
from pretrain.published_attention import published_attention
from pretrain.sums import TokenNorm

Observer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]
"""Takes queries, keys, random directions, and the offsets of keys and of queries."""


class EncoderBlock(nn.ModuleList):
    """A block of performer-pytorch, (attention, feed-forward), with a forward pass of its own."""

    def forward(
        self, x: Tensor, offsets: Tensor, read: Tensor | None, read_offsets: Tensor | None
    ) -> Tensor:
        """Attend within each cell, then transform each position.

        Args:
            x: States, packed, (n, D).
            offsets: First position of each cell, and n at the end; int64 (B + 1,).
            read: Positions whose new states are wanted, in order, (T,); none wants all.
            read_offsets: First entry of each cell in `read`, and T at the end; int64 (B + 1,).

        Returns:
            New states, (n, D) or (T, D).
        """
        attention, feed_forward = self
        attended = attention(x, offsets=offsets, read=read, read_offsets=read_offsets)
        x = (x if read is None else x.index_select(0, read)) + attended
        del attended  # 7 MB per cell at full length, not needed any more
        states: Tensor = feed_forward(x)
        return states


class FusedFeedForward(PreLayerNorm):  # type: ignore[misc]
    """LayerNorm and feed-forward of performer-pytorch, with the residual around them."""

    kernel: str

    def forward(self, x: Tensor) -> Tensor:
        """Add to each row what the feed-forward makes of it, (n, D)."""
        inner, outer = self.fn.fn.w1, self.fn.fn.w2
        if usable(x, self.kernel, inner.weight):
            return native_feed_forward(x, self.norm, inner, outer)
        hidden = self.fn.fn.act(linear(self.norm(x), inner.weight, inner.bias))
        return x + linear(hidden, outer.weight, outer.bias)


class FusedAttention(nn.Module):
    """Self-attention of performer-pytorch, with its parameters and one product for q, k and v."""

    heads: int
    kernel: str
    published: bool
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.Linear
    fast_attention: FavorAttention
    observer: Observer | None = None
    """Shown the arguments of each attention, for `pretrain.health`."""

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        read: Tensor | None = None,
        read_offsets: Tensor | None = None,
    ) -> Tensor:
        """Attend within each cell; arguments as those of `EncoderBlock.forward`."""
        if read is None:
            q, k, v = self._project(x, self.to_q, self.to_k, self.to_v)
        else:
            k, v = self._project(x, self.to_k, self.to_v)
            (q,) = self._project(x.index_select(0, read), self.to_q)
        directions = self.fast_attention.projection_matrix
        if self.observer is not None:
            self.observer(q, k, directions, offsets, offsets if read is None else read_offsets)
        if self.published:
            attended = published_attention(q, k, v, directions, offsets, read_offsets)
        else:
            attended = favor_attention(
                q, k, v, directions, offsets, read_offsets, kernel=self.kernel
            )
        return linear(attended.flatten(1), self.to_out.weight, self.to_out.bias)

    def _project(self, x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
        """Apply linear maps at once; each result is (n, H, d)."""
        weight = torch.cat([each.weight for each in maps])
        joined = linear(x, weight)  # (n, maps × H × d)
        return split_fused(joined.view(len(x), len(maps), self.heads, -1))


def build_blocks(config: EncoderConfig) -> Performer:
    """Build performer-pytorch's modules and give them the forward passes above.

    Its random directions are left zero: who builds draws them, see `draw_projection`. Its own
    `redraw_projection_matrix` draws from torch's global generator, as it does everywhere.
    """
    with _undrawn_directions():
        performer = Performer(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.dim_head,
            ff_mult=config.ff_mult,
            nb_features=config.features,
            qkv_bias=False,
            attn_out_bias=True,
            auto_check_redraw=False,  # redrawn by step number, by whoever trains
        )
    for block in performer.net.layers:
        attention = block[0].fn
        attention.fast_attention.__class__ = FavorAttention
        attention.fast_attention.create_projection = functools.partial(
            fresh_projection, config.features, config.dim_head
        )
        attention.__class__ = FusedAttention
        attention.kernel = config.kernel
        attention.published = config.attention == "published"
        block[1].__class__ = FusedFeedForward
        for before in block:
            before.norm.__class__ = TokenNorm
        block[1].kernel = config.kernel
        block.__class__ = EncoderBlock
    return performer


@contextmanager
def _undrawn_directions() -> Iterator[None]:
    """Let performer-pytorch make zeros where it would draw directions.

    Under DeepSpeed's zero.Init tensors are bfloat16, of which there is no QR decomposition.
    """
    module = sys.modules[Performer.__module__]
    draw = module.gaussian_orthogonal_random_matrix
    module.gaussian_orthogonal_random_matrix = _zeros  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.gaussian_orthogonal_random_matrix = draw  # type: ignore[attr-defined]


def _zeros(nb_rows: int, nb_columns: int, **_: object) -> Tensor:
    return torch.zeros(nb_rows, nb_columns)
