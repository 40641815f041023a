"""The shared encoder: expression and gene embedding → Performer → one state per position.

performer-pytorch builds the blocks and names their parameters; `pretrain.block` runs them. Cells
are packed, one behind the other without padding, so that they may have any length:

- `encoder.sequence: full`, the published model: every gene of the panel, then a constant position.
- `expressed`: the genes of bin 1 or more, those that are hidden, perhaps a sample of the others,
  then the constant position.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datastore.config import BinningConfig
from datastore.randomness import derive_key
from pretrain.block import build_blocks
from pretrain.config import EncoderConfig
from pretrain.embedding import EXPRESSIONS
from pretrain.favor import draw_projection
from pretrain.sequence import check_packed, check_read, check_whole
from pretrain.sums import TokenEmbedding, TokenNorm


class ExpressionEncoder(nn.Module):
    """Performer over the genes of a cell (Yang et al. 2022, Fig. 1b).

    One constant position follows the genes, as in the published model (16,906 genes + 1); it is
    position `num_genes`, with token 0.

    Args:
        config: Shape.
        binning: Vocabulary.
        num_genes: Length of the panel, G.
        gene_vectors: What the gene table begins with, (G, D); the constant position gets zeros.
    """

    def __init__(
        self,
        config: EncoderConfig,
        binning: BinningConfig,
        num_genes: int,
        gene_vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.binning = binning
        self.num_genes = num_genes
        self.expression = EXPRESSIONS[config.expression](binning, config.dim)
        self.genes: nn.Embedding | None = None
        if config.gene_embedding != "none":
            table = None
            if gene_vectors is not None:  # at construction: ZeRO 3 cuts the table right after it
                table = nn.functional.pad(gene_vectors, (0, 0, 0, 1)).to(self.expression.weight)
            self.genes = TokenEmbedding(num_genes + 1, config.dim, _weight=table)
            self.genes.weight.requires_grad_(config.gene_embedding == "learned")
        self.performer = build_blocks(config)
        self.norm = TokenNorm(config.dim)

    def forward(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """Encode cells given as one token for each gene of the panel.

        An encoder of expressed genes encodes those alone; the others' states are zeros. How many
        there are is a number that torch.compile must let be one: without graph breaks this takes
        `torch._dynamo.config.capture_dynamic_output_shape_ops`. All else compiles without it.

        Args:
            tokens: Expression bins or mask tokens, integers of shape (B, G); a continuous encoder
                takes values, see `ContinuousExpression`.
            read: Positions whose states are wanted, `cell × (G + 1) + gene` in rising order, int64
                (T,); none wants all. Only with the full sequence.

        Returns:
            States, (B, G + 1, D); B may be 0. With `read`, (T, D).

        Raises:
            ValueError: If the number of genes, a token or a position is not the model's; under
                torch.compile values are not looked at.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_genes:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; the encoder knows {self.num_genes} genes"
            )
        if self.config.sequence == "expressed":
            if read is not None:
                raise ValueError("an encoder of expressed genes reads positions in encode() only")
            return self._scattered(tokens)
        if not len(tokens):
            # A rank without cells in a short last batch: every weight must take part in the
            # backward pass all the same. Encode one cell and drop it.
            states = self.forward(tokens.new_zeros(1, self.num_genes), read)
            return states[:0]
        self.expression.check(tokens)
        length = self.num_genes + 1
        check_read(read, len(tokens) * length)
        x = self.expression(nn.functional.pad(tokens, (0, 1)))  # (B, G + 1, D)
        if self.genes is not None:
            x = x + self.genes(torch.arange(length, device=x.device))
        offsets = torch.arange(len(tokens) + 1, device=x.device) * length
        states = self._blocks(x.flatten(0, 1), offsets, read)
        return states if read is not None else states.view(x.shape)

    def encode(
        self, genes: Tensor, tokens: Tensor, offsets: Tensor, read: Tensor | None = None
    ) -> Tensor:
        """Encode packed cells: each one's genes in any order, then its constant position.

        Args:
            genes: Panel position of each token, or G for the constant position; int64 (n,).
            tokens: Expression bins or mask tokens, integers (n,); values if continuous.
            offsets: First token of each cell, and n at the end; int64 (B + 1,).
            read: Tokens whose states are wanted, in rising order, int64 (T,); none wants all.

        Returns:
            States, (n, D), or (T, D) with `read`; B, n and T may be 0.

        Raises:
            ValueError: If a gene or token is out of range, the parts do not fit each other, a cell
                has a gene twice, does not end with the constant position and token 0, or has not
                all genes although `encoder.sequence` is full. Under torch.compile, which cannot
                look at values while it traces, only types and shapes are checked.
        """
        self.expression.check(tokens)
        check_packed(genes, tokens, offsets, self.num_genes)
        if self.config.sequence == "full":
            check_whole(offsets, self.num_genes)
        check_read(read, len(tokens))
        if len(offsets) == 1:  # no cells, as in `forward`
            genes, tokens = genes.new_full((1,), self.num_genes), tokens.new_zeros(1)
            return self._packed(genes, tokens, offsets.new_tensor([0, 1]), read)[:0]
        return self._packed(genes, tokens, offsets, read)

    def _packed(
        self, genes: Tensor, tokens: Tensor, offsets: Tensor, read: Tensor | None
    ) -> Tensor:
        x = self.expression(tokens)  # (n, D)
        if self.genes is not None:
            x = x + self.genes(genes)
        return self._blocks(x, offsets, read)

    def _scattered(self, tokens: Tensor) -> Tensor:
        """Encode the tokens that are not 0, and spread their states over (B, G + 1, D)."""
        tokens = nn.functional.pad(tokens, (0, 1))
        present = tokens != 0
        present[:, -1] = True
        offsets = nn.functional.pad(present.sum(1).cumsum(0), (1, 0))
        cells, genes = present.nonzero().unbind(1)
        packed = self.encode(genes, tokens[cells, genes], offsets)
        states = packed.new_zeros(*tokens.shape, packed.shape[-1])
        return states.masked_scatter(present.unsqueeze(-1), packed)

    def _blocks(self, x: Tensor, offsets: Tensor, read: Tensor | None) -> Tensor:
        """Run the blocks over packed embeddings; the last one only where somebody reads."""
        if read is not None and not len(read):  # nobody reads, but every weight takes part
            return self._blocks(x, offsets, offsets[:1])[:0]
        read_offsets = None if read is None else torch.searchsorted(read, offsets)
        for block in self.blocks[:-1]:
            x = self._run(block, x, offsets)
        states: Tensor = self.norm(self._run(self.blocks[-1], x, offsets, read, read_offsets))
        return states

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        offsets: Tensor,
        read: Tensor | None = None,
        read_offsets: Tensor | None = None,
    ) -> Tensor:
        if not (self.config.checkpointing and torch.is_grad_enabled()):
            plain: Tensor = block(x, offsets, read, read_offsets)
            return plain
        # Nothing in a block is random. ZeRO 3 takes the weights away between forward and backward,
        # so that their shapes say nothing of whether the same was computed again.
        again: Tensor = checkpoint(
            block,
            *(x, offsets, read, read_offsets),
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
        )
        return again

    @property
    def blocks(self) -> nn.ModuleList:
        """Performer blocks, first to last; each is (attention, feed-forward)."""
        layers: nn.ModuleList = self.performer.net.layers
        return layers

    def redraw_projections(self, seed: int, number: int) -> None:
        """Set the random features to draw `number` of a seed: the same on every rank, any time."""
        with torch.no_grad():
            for layer, (attention, _) in enumerate(self.performer.net.layers):
                key = derive_key(seed, "projection", layer, number) >> 1  # torch takes 63 bits
                drawn = draw_projection(self.config.features, self.config.dim_head, key)
                attention.fn.fast_attention.projection_matrix.copy_(drawn)

    def weights(self) -> dict[str, Tensor]:
        """State dict without performer-pytorch's second listing of every weight."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("performer.proj_updater.")
        }

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load what `weights` gave.

        Raises:
            ValueError: If names or shapes do not agree.
        """
        own = self.weights()
        if set(own) != set(weights):
            wrong = sorted(set(own) ^ set(weights))
            raise ValueError(f"the weights do not fit the encoder: {wrong[0]} (and others) differ")
        for name, value in weights.items():
            if own[name].shape != value.shape:
                raise ValueError(
                    f"the weights do not fit the encoder: {name} is {tuple(value.shape)}, "
                    f"expected {tuple(own[name].shape)}"
                )
        for name, value in weights.items():
            own[name].copy_(value)


def build_encoder(
    config: EncoderConfig,
    binning: BinningConfig,
    num_genes: int,
    seed: int,
    gene_vectors: Tensor | None = None,
    construction: AbstractContextManager[Any] | None = None,
) -> ExpressionEncoder:
    """Build an encoder with seeded weights and projections.

    Args:
        config: Shape.
        binning: Vocabulary.
        num_genes: Length of the panel, G.
        seed: Same seed, same weights, on every rank.
        gene_vectors: gene2vec vectors in panel order, (G, D); the constant position gets zeros.
        construction: Entered while the modules are made, such as `deepspeed.zero.Init`, which cuts
            each weight as soon as it is there; projections are drawn outside, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, "weights") >> 1)
        with construction or nullcontext():
            encoder = ExpressionEncoder(config, binning, num_genes, gene_vectors)
    encoder.redraw_projections(seed, 0)
    return encoder
