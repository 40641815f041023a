"""What is estimated before a run, against counting and hand arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launchers import estimate as launcher
from pretrain import estimate
from pretrain.building import build_model
from pretrain.config import BatchConfig, EncoderConfig, MaskingConfig, PretrainConfig
from pretrain.encoder import build_encoder
from pretrain.memory_moments import BUCKET, CPU_PROCESS_BYTES, ModelSize, Placement, at_fullest
from tests.support.tiny import BINNING, ENCODER, tiny_config, tiny_panel

CONFIG = tiny_config("store", "output")
WIDE = EncoderConfig(dim=64, depth=3, heads=4, dim_head=16, num_features=48, kernel="reference")


def test_elements_are_those_of_the_model() -> None:
    model = build_model(CONFIG, tiny_panel())
    size = estimate.measure_size(ENCODER, len(tiny_panel()))

    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.frozen == 0
    assert size.largest == max(p.numel() for p in model.parameters())
    frozen = replace(ENCODER, gene_embedding="gene2vec")
    assert estimate.measure_size(frozen, 32).frozen == 33 * ENCODER.dim


def test_operations_are_those_that_torch_counts() -> None:
    encoder = build_encoder(WIDE, BINNING, 200, seed=0)
    tokens = torch.zeros(1, 200, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(tokens)
    size = estimate.measure_size(WIDE, 200)
    assert counter.get_total_flops() == pytest.approx(size.flops, rel=0.02)  # measured 0.6 %


def test_the_published_model_has_the_published_size() -> None:
    size = estimate.measure_size(EncoderConfig(gene_embedding="gene2vec"), 16_906)
    assert (size.trained, size.frozen) == (5_007_207, 16_907 * 200)
    assert size.flops == pytest.approx(307e9, rel=0.01)


def test_expressed_genes_are_a_twentieth() -> None:
    config = replace(WIDE, sequence="expressed", num_zeros=100)
    assert estimate.tokens_per_cell(config, 16_906) == pytest.approx(0.053 * 16_906 + 101)
    masking = MaskingConfig(ratio=0.2, zeros=2)
    assert estimate.tokens_per_cell(config, 16_906, masking) == pytest.approx(
        0.053 * 1.4 * 16_906 + 101
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kept_bytes_of_larger_models_follow_from_small_ones(checkpointing: bool) -> None:
    config = replace(CONFIG, encoder=replace(WIDE, depth=5, checkpointing=checkpointing))
    found = estimate.activation_bytes(config, 501, "fp32")
    counted = estimate._kept_bytes(config, 5, 500, "fp32")
    if checkpointing:  # and one block is there again in the backward pass
        plain = replace(config, encoder=replace(WIDE, depth=2))
        counted += estimate._kept_bytes(plain, 2, 500, "fp32")
        counted -= estimate._kept_bytes(plain, 1, 500, "fp32")
    assert found == pytest.approx(counted, rel=0.02)


def test_joined_weights_are_kept_once_for_all_cells() -> None:
    config = replace(CONFIG, encoder=replace(WIDE, depth=3))
    model = estimate._small_model(config, 20)
    one, two = (estimate._kept_by(model, estimate._one_cell(config, 20, n)) for n in (1, 2))
    joined = estimate._joined_bytes(config, Placement())
    assert 2 * one - two == pytest.approx(joined, rel=0.15)  # the projections, too


def test_bf16_keeps_about_half() -> None:
    config = replace(CONFIG, encoder=WIDE)
    wide, narrow = (estimate.activation_bytes(config, 301, p) for p in ("fp32", "bf16"))
    assert 0.4 < narrow / wide < 0.85


def size_of(trained: int, frozen: int = 0) -> ModelSize:
    return ModelSize(
        trained=trained, frozen=frozen, largest=10, small=0, buffer_bytes=0, tokens=0.0, flops=1e6
    )


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        pytest.param(0, "fp32", (4400, 4000, 8000), id="ZeRO 0"),
        pytest.param(1, "fp32", (4400, 4000, 3000), id="ZeRO 1"),
        pytest.param(2, "fp32", (4400, 1000, 3000), id="ZeRO 2"),
        pytest.param(3, "fp32", (1100, 1000, 3000), id="ZeRO 3"),
        pytest.param(0, "bf16", (2200, 2000, 12000), id="bf16, ZeRO 0"),
        pytest.param(3, "bf16", (550, 500, 3000), id="bf16, ZeRO 3"),
    ],
)
def test_state_by_hand(stage: int, precision: str, expected: tuple[int, ...]) -> None:
    """1,000 trained and 100 frozen elements on four ranks."""
    placement = Placement(nodes=2, ranks_per_node=2, stage=stage, precision=precision)  # type: ignore[arg-type]
    config = replace(CONFIG, batch=BatchConfig(global_size=32, micro_size=4))
    need = estimate.memory(config, size_of(1000, 100), placement, 0.0)
    assert [need.parameters, need.gradients, need.optimizer] == list(expected)
    if stage:
        moved = estimate.memory(config, size_of(1000, 100), replace(placement, offload=True), 0.0)
        assert moved.optimizer < 1 < expected[2] <= moved.host


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        pytest.param(0, 0.75 * 2 * 4000, id="all-reduce"),
        pytest.param(1, 0.75 * 2 * 4000, id="reduce, gather"),
        pytest.param(2, 0.75 * (2 * 4000 + 4000), id="reduce after both micro-batches"),
        pytest.param(3, 0.75 * 2 * (2 * 4400 + 4000), id="gather twice, reduce"),
    ],
)
def test_traffic_by_hand(stage: int, expected: float) -> None:
    config = replace(CONFIG, batch=BatchConfig(global_size=16, micro_size=2))
    placement = Placement(ranks_per_node=4, stage=stage)
    assert estimate.bytes_per_step(config, size_of(1000, 100), placement) == expected
    assert estimate.bytes_per_step(config, size_of(1000, 100), Placement(stage=stage)) == 0
    # gloo has no reduce-scatter: ZeRO 1 sends another gradient, ZeRO 2 one for each micro-batch.
    more = {1: 0.75 * 4000, 2: 0.75 * 2 * 4000}.get(stage, 0.0)
    gloo = replace(placement, gloo=True)
    assert estimate.bytes_per_step(config, size_of(1000, 100), gloo) == expected + more


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    size = estimate.measure_size(ENCODER, 32)
    cells = estimate.largest_micro_batch(CONFIG, size, Placement(), 1e6, 10e9)

    def total(micro: int) -> float:
        config = replace(CONFIG, batch=BatchConfig(global_size=2 * micro, micro_size=micro))
        return estimate.memory(config, size, Placement(), 1e6).total

    assert total(cells) <= 10e9 < total(cells + 1)
    assert estimate.largest_micro_batch(CONFIG, size, Placement(), 1e6, 10.0) == 0


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "buffers"),
    [
        pytest.param(0, 1, "fp32", 8 * 10, id="Adam's temporaries of the largest tensor"),
        pytest.param(0, 2, "fp32", 4 * 1000, id="all gradients flattened"),
        pytest.param(0, 1, "bf16", 4 * 1000 + 8 * 10, id="gradients in float32 as well"),
        pytest.param(1, 1, "fp32", 4 * 1000 + 8 * 1000, id="gradient flattened, temporaries"),
        pytest.param(1, 4, "fp32", 4 * 1000, id="the bucket flattened by rank"),
        pytest.param(2, 4, "fp32", 2 * 4 * 1000, id="the bucket, and flattened by rank"),
        pytest.param(3, 4, "fp32", 4 * 3 * 1000, id="bucket, all gathered, as a message as well"),
    ],
)
def test_buffers_by_hand(
    stage: int, ranks: int, precision: str, buffers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 trained elements, the largest tensor has 10; hardly any activations."""
    placement = Placement(ranks_per_node=ranks, stage=stage, precision=precision, gloo=True)  # type: ignore[arg-type]
    config = replace(CONFIG, batch=BatchConfig(global_size=32, micro_size=4))
    monkeypatch.setattr(estimate, "_joined_bytes", lambda *_: 0.0)
    need = estimate.memory(config, size_of(1000), placement, 0.0)
    width = 2 if precision == "bf16" else 4
    total = need.gradients + need.buffers - CPU_PROCESS_BYTES
    gradients = 0.0 if (stage, ranks) == (1, 1) else width * 1000 / (ranks if stage > 1 else 1)
    assert total == gradients + buffers


def test_many_activations_outweigh_what_comes_after_them() -> None:
    size, placement = size_of(1000), Placement(ranks_per_node=4, stage=2)
    few, many = (
        at_fullest(size, placement, activations, several=True) for activations in (1e3, 1e6)
    )
    assert (few.activations, many.activations) == (0, 1e6)
    assert many.total == 4 * 1000 + 12 * 250 + 4 * 250 + 1e6 + 4 * BUCKET


def test_calibration_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert estimate.calibrate(CONFIG, 32, cells=4, repeats=1) > 0
    assert torch.get_num_threads() == threads


class TestCommand:
    def test_prints_parts_and_speed(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--preset", "quickstart", "--nodes", "1", "--gpus-per-node", "2"]
        assert launcher.main([*arguments, "--gpu", "h100", "--num-genes", "500"]) == 0
        printed = capsys.readouterr().out
        for words in ("ranks  ", "optimizer", "stage 3", "largest micro-batch", "35% of the peak"):
            assert words in printed

    def test_measures_on_this_machine(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert launcher.main(["--preset", "quickstart", "--gpu", "cpu", "--num_genes", "50"]) == 0
        assert "measured here" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--nodes", "0"], "nodes is 0 and gpus_per_node 1; give 1 or more"),
            (["--gpus_per_node", "7"], "not a multiple of batch.micro_size 8 × 7 ranks"),
            (["--gpu", "v9"], "invalid choice: 'v9'"),
            (["--encoder.dimm", "3"], "did you mean --encoder.dim?"),
        ],
    )
    def test_refusals(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert launcher.main(["--preset", "quickstart", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "millions"), [("100m", 98.0), ("1b", 1041.7)])
def test_large_presets_have_their_size(preset: str, millions: float) -> None:
    from launchers import cli

    config: PretrainConfig = cli.parse(
        PretrainConfig,
        ["--preset", preset, "--store", "s", "--output", "o"],
        launcher="pretrain.py",
        description="",
        example="",
    )
    size = estimate.measure_size(config.encoder, 16_906)
    assert size.trained / 1e6 == pytest.approx(millions, rel=1e-3)
