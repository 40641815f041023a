"""Checkpoints of the published layout: names, shapes, numerics, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datastore.genes import GenePanel, write_panel
from launchers import export as launcher
from pretrain.export import read_export
from pretrain.favor import Performer
from pretrain.published import import_published
from pretrain.published_attention import PUBLISHED_EPSILON, published_attention
from tests.support.tiny import tiny_panel

NUM_GENES = 32


class GeneTable(nn.Module):
    def __init__(self, positions: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(positions, dim)


class PublishedModel(nn.Module):
    """The published `PerformerLM`: the same names and shapes, performer-pytorch's own forward."""

    def __init__(self, num_genes: int = NUM_GENES, **shape: int) -> None:
        super().__init__()
        shape = {"dim": 16, "depth": 2, "heads": 1, "dim_head": 8, "nb_features": 20} | shape
        dim = shape["dim"]
        self.token_emb = nn.Embedding(7, dim)
        self.pos_emb = GeneTable(num_genes + 1, dim)
        self.performer = Performer(
            **shape, ff_mult=4, qkv_bias=False, attn_out_bias=True, auto_check_redraw=False
        )
        self.norm = nn.LayerNorm(dim)
        self.to_out = nn.Linear(dim, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(nn.functional.pad(tokens, (0, 1))) + self.pos_emb.emb.weight
        logits: Tensor = self.to_out(self.norm(self.performer(x)))
        return logits


def save(folder: Path, state: Any, **more: Any) -> Path:
    path = folder / "published.pth"
    torch.save({"epoch": 3, "model_state_dict": state, "losses": 0.7, **more}, path)
    return path


def published_model(**shape: int) -> PublishedModel:
    torch.manual_seed(0)
    return PublishedModel(**shape).eval()


def test_an_imported_model_computes_what_the_published_one_did(tmp_path: Path) -> None:
    """One head and one cell: then performer-pytorch's stabiliser is the published one."""
    model = published_model()
    output = tmp_path / "export"
    import_published(save(tmp_path, model.state_dict()), tiny_panel(), output, "published")

    export = read_export(output, "encoder")
    config = export.encoder_config
    assert (config.dim, config.depth, config.heads, config.dim_head) == (16, 2, 1, 8)
    assert (config.num_features, config.ff_mult, config.attention) == (20, 4, "published")
    assert (config.gene_embedding, export.binning.num_tokens) == ("gene2vec", 7)
    assert export.metadata["provenance"]["imported_from"] == "published.pth"
    encoder = export.encoder()
    head = {name: export.weights[f"head.{name}"] for name in ("weight", "bias")}
    tokens = torch.randint(0, 7, (3, NUM_GENES), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = nn.functional.linear(encoder(tokens), **head)
        theirs = torch.cat([model(cell[None]) for cell in tokens])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # worst 4.8e-7


def test_the_stable_numerics_are_others(tmp_path: Path) -> None:
    model = published_model()
    with torch.no_grad():  # long keys, whose features sink
        model.performer.net.layers[1][0].fn.to_k.weight *= 8
    path = save(tmp_path, model.state_dict())
    tokens = torch.randint(0, 7, (1, NUM_GENES), generator=torch.Generator().manual_seed(1))
    states = {}
    for attention in ("published", "stable"):
        import_published(path, tiny_panel(), tmp_path / attention, attention)
        with torch.no_grad():
            states[attention] = read_export(tmp_path / attention).encoder()(tokens)
    assert float((states["published"] - states["stable"]).abs().max()) > 1e-3


def test_attention_is_the_published_formula_cell_by_cell() -> None:
    """Against NumPy in float64, written out for each head from the published `softmax_kernel`."""
    rng = np.random.default_rng(0)
    lengths, heads, d, m = [5, 0, 9], 3, 4, 11
    q, k, v = (rng.normal(size=(sum(lengths), heads, d)) for _ in range(3))
    directions = rng.normal(size=(m, d))
    expected = np.empty_like(q)
    start = 0
    for length in lengths:
        cell = slice(start, start + length)
        start += length
        if not length:
            continue
        scaled_q, scaled_k = q[cell] * d**-0.25, k[cell] * d**-0.25
        dash_q, dash_k = scaled_q @ directions.T, scaled_k @ directions.T  # (n, H, m)
        half_q = (scaled_q**2).sum(-1, keepdims=True) / 2
        half_k = (scaled_k**2).sum(-1, keepdims=True) / 2
        largest = dash_q.max(-1, keepdims=True)
        fq = m**-0.5 * (np.exp(dash_q - half_q - largest) + PUBLISHED_EPSILON)
        fk = m**-0.5 * (np.exp(dash_k - half_k - dash_k.max()) + PUBLISHED_EPSILON)
        for head in range(heads):
            weights = fq[:, head] @ fk[:, head].T
            weights /= weights.sum(-1, keepdims=True)
            expected[cell, head] = weights @ v[cell, head]
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    tq, tk, tv, projection = (torch.from_numpy(x) for x in (q, k, v, directions))
    found = published_attention(tq, tk, tv, projection, offsets)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-13)  # worst 6.7e-16

    read = [1, 4, 7]
    some = published_attention(
        tq[read], tk, tv, projection, offsets, query_offsets=torch.tensor([0, 2, 2, 3])
    )
    np.testing.assert_allclose(some.numpy(), expected[read], rtol=0, atol=1e-13)


def test_the_published_shapes_are_read_off_the_file(tmp_path: Path) -> None:
    model = PublishedModel(16_906, dim=200, depth=6, heads=10, dim_head=64, nb_features=266)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    panel = GenePanel(tuple(f"G{number}" for number in range(16_906)))
    import_published(save(tmp_path, state), panel, tmp_path / "export", "published")

    export = read_export(tmp_path / "export")
    config = export.encoder_config
    assert (config.dim, config.depth, config.heads, config.dim_head) == (200, 6, 10, 64)
    assert (config.num_features, config.ff_mult) == (266, 4)
    count = sum(value.numel() for name, value in export.weights.items() if "projection" not in name)
    block = 4 * 200 * 640 + 200 + 2 * 200 * 800 + 800 + 200 + 4 * 200
    assert count == 16_907 * 200 + 7 * 200 + 6 * block + 2 * 200 + 200 * 7 + 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"to_out.weight": None}, "has no to_out.weight", id="missing"),
        pytest.param({"lstm.weight": 0}, "has lstm.weight, which the published", id="unknown"),
        pytest.param({"to_out.fc1.weight": 0}, "a fine-tuned classifier", id="fine-tuned"),
        pytest.param(
            {"performer.net.layers.1.0.fn.to_q.weight": None}, r"1\.0\.fn\.to_q\.weight", id="block"
        ),
        pytest.param({"norm.weight": torch.zeros(3)}, r"norm\.weight is \(3,\)", id="shape"),
        pytest.param(
            {"performer.net.layers.0.0.fn.to_q.weight": None},
            r"has no performer\.net\.layers\.0\.0\.fn\.to_q",
            id="first block",
        ),
    ],
)
def test_other_layouts_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = dict(published_model().state_dict())
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = torch.as_tensor(value)
    with pytest.raises(ValueError, match=message):
        import_published(save(tmp_path, state), tiny_panel(), tmp_path / "export", "published")
    assert not (tmp_path / "export").exists()


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_a_file_that_could_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, published_model().state_dict(), extra=Payload())
    with pytest.raises(ValueError, match="is not loaded, for it could run code"):
        import_published(path, tiny_panel(), tmp_path / "export", "published")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04 torn"])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth"):
        import_published(path, tiny_panel(), tmp_path / "export", "published")


def test_the_command_imports_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, published_model().state_dict())
    write_panel(tiny_panel(), tmp_path / "genes.txt")
    write_panel(tiny_panel(20), tmp_path / "fewer.txt")
    out = ["--output", str(tmp_path / "export")]

    assert launcher.main([str(path), *out, "--genes", str(tmp_path / "genes.txt")]) == 0
    assert read_export(tmp_path / "export").encoder_config.attention == "published"
    for arguments, words in (
        ([str(path), *out], "--genes is missing"),
        ([str(path), *out, "--genes", str(tmp_path / "fewer.txt")], "knows 32 genes (and one"),
        ([str(path), *out, "--genes", str(tmp_path / "genes.txt"), "--best"], "--best is for"),
        ([str(tmp_path / "none"), *out], "give a training's output or a .pth file"),
        ([str(tmp_path), *out], "there is no whole checkpoint in"),
        ([str(tmp_path), *out, "--attention", "stable"], "--attention is for published"),
    ):
        capsys.readouterr()
        assert launcher.main(arguments) == 2
        assert words in capsys.readouterr().err
