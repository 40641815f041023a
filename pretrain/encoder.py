"""The shared encoder: tokens and gene embedding → Performer → one state per gene.

performer-pytorch builds the blocks; its attention is replaced in place by `pretrain.favor`, which
keeps the parameters and their names.
"""

import torch
from torch import Tensor, nn

from datastore.config import BinningConfig
from datastore.randomness import derive_key
from pretrain.config import EncoderConfig
from pretrain.favor import FavorAttention, Performer, draw_projection


class ExpressionEncoder(nn.Module):
    """Performer over the genes of a cell (Yang et al. 2022, Fig. 1b).

    One constant position follows the genes, as in the published model (16,906 genes + 1).
    """

    def __init__(self, config: EncoderConfig, binning: BinningConfig, num_genes: int) -> None:
        super().__init__()
        self.config = config
        self.binning = binning
        self.num_genes = num_genes
        self.expression = nn.Embedding(binning.num_tokens, config.dim)
        self.genes: nn.Embedding | None = None
        if config.gene_embedding != "none":
            self.genes = nn.Embedding(num_genes + 1, config.dim)
            self.genes.weight.requires_grad_(config.gene_embedding == "learned")
        self.performer = Performer(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.dim_head,
            ff_mult=config.ff_mult,
            nb_features=config.features,
            qkv_bias=False,
            attn_out_bias=True,
            auto_check_redraw=False,  # redrawn by step number, see redraw_projections
        )
        for attention in self._attentions():
            attention.__class__ = FavorAttention  # same buffers and parameters, other forward
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode cells.

        Args:
            tokens: Expression bins or mask tokens, integers of shape (B, G).

        Returns:
            States, (B, G + 1, D); B may be 0.

        Raises:
            ValueError: If the number of genes is not the model's.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_genes:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; the encoder knows {self.num_genes} genes"
            )
        if not len(tokens):
            # A rank without cells in a short last batch: performer-pytorch cannot attend over none,
            # and every weight must take part in the backward pass. Encode one cell and drop it.
            return self.forward(tokens.new_zeros(1, self.num_genes))[:0]
        tokens = nn.functional.pad(tokens.long(), (0, 1))  # the constant position
        x = self.expression(tokens)  # (B, G + 1, D)
        if self.genes is not None:
            x = x + self.genes(torch.arange(self.num_genes + 1, device=x.device))
        states: Tensor = self.norm(self.performer(x))
        return states

    @property
    def blocks(self) -> nn.ModuleList:
        """Performer blocks, first to last; each is (attention, feed-forward)."""
        layers: nn.ModuleList = self.performer.net.layers
        return layers

    def _attentions(self) -> list[nn.Module]:
        return [block[0].fn.fast_attention for block in self.performer.net.layers]

    def redraw_projections(self, seed: int, number: int) -> None:
        """Set the random features to draw `number` of a seed: the same on every rank, any time."""
        with torch.no_grad():
            for layer, attention in enumerate(self._attentions()):
                key = derive_key(seed, "projection", layer, number) >> 1  # torch takes 63 bits
                drawn = draw_projection(self.config.features, self.config.dim_head, key)
                attention.projection_matrix.copy_(drawn)  # type: ignore[operator]

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
) -> ExpressionEncoder:
    """Build an encoder with seeded weights and projections.

    Args:
        config: Shape.
        binning: Vocabulary.
        num_genes: Length of the panel, G.
        seed: Same seed, same weights, on every rank.
        gene_vectors: gene2vec vectors in panel order, (G, D); the constant position gets zeros.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, "weights") >> 1)
        encoder = ExpressionEncoder(config, binning, num_genes)
        nn.init.normal_(encoder.expression.weight)
        if encoder.genes is not None:
            nn.init.normal_(encoder.genes.weight)
    if gene_vectors is not None and encoder.genes is not None:
        with torch.no_grad():
            encoder.genes.weight.zero_()
            encoder.genes.weight[:num_genes] = gene_vectors
    encoder.redraw_projections(seed, 0)
    return encoder
