"""Share of features at the floor and entropy of the mean attention, against the whole matrix."""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from datastore.loader import TokenBatch
from pretrain.encoder import build_encoder
from pretrain.engine import TrainingEngine
from pretrain.evaluate import evaluate
from pretrain.favor import EPSILON, draw_projection
from pretrain.health import HealthRecord, attention_health, health_metrics, observed
from pretrain.published_attention import PUBLISHED_EPSILON, published_attention
from tests.pretrain.test_evaluate import ALONE, CONFIG, PlainEngine
from tests.support.tiny import BINNING, ENCODER, NUM_GENES


def test_figures_equal_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 3, 8, generator=generator, dtype=torch.float64) for n in (5, 40))
    directions = draw_projection(16, 8, seed=0).double()

    floor, entropy = attention_health(q, k, directions)

    for head in range(3):
        exponents = torch.tensor(
            [
                [float(w @ key * 8**-0.25 - key @ key * 8**-0.5 / 2) for w in directions]
                for key in k[:, head]
            ]
        )
        features = (exponents - exponents.max()).exp()
        assert floor[head] == pytest.approx(float((features < EPSILON).float().mean()), abs=1e-6)
        scores = (q[:, head].float() @ directions.float().t() * 8**-0.25).double()
        queries = (scores - scores.amax(1, keepdim=True)).exp() + EPSILON
        matrix = queries @ (features + EPSILON).double().t()
        weights = (matrix / matrix.sum(1, keepdim=True)).mean(0)
        expected = -float((weights * weights.log()).sum()) / math.log(40)
        assert entropy[head] == pytest.approx(expected, abs=1e-5)
    assert 0 < float(floor.min()) < 1


def test_figures_of_the_published_attention_are_those_of_its_own_weights() -> None:
    """Values that are unit vectors show the weights; long keys sink, as they do in that code."""
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(n, 3, 8, generator=generator, dtype=torch.float64) for n in (5, 40))
    directions = draw_projection(16, 8, seed=0).double()

    floor, entropy = attention_health(q, k, directions, published=True)

    units = torch.eye(40).double().unsqueeze(1).repeat(1, 3, 1)
    ends = torch.tensor([0, 5]), torch.tensor([0, 40])
    for column in range(5):
        part = units[:, :, column * 8 : column * 8 + 8]
        weights = published_attention(q, k, part, directions, ends[1], ends[0]).mean(0)  # (H, 8)
        entropy = entropy + (weights * weights.log()).sum(-1).float() / math.log(40)
    torch.testing.assert_close(entropy, torch.zeros(3), rtol=0, atol=1e-5)
    projected = k.transpose(0, 1) @ directions.t() * 8**-0.25
    half = k.transpose(0, 1).square().sum(-1, keepdim=True) * 8**-0.5 / 2
    expected = ((projected - half - projected.max()).exp() < PUBLISHED_EPSILON).double()
    torch.testing.assert_close(floor.double(), expected.mean((-1, -2)), rtol=0, atol=1e-6)
    assert float(floor.min()) > float(attention_health(q, k, directions)[0].max())


def test_a_model_is_measured_by_its_own_attention() -> None:
    tokens = torch.randint(0, 6, (3, NUM_GENES), generator=torch.Generator().manual_seed(0))
    shares = {}
    for attention in ("stable", "published"):
        config = replace(ENCODER, attention=attention)
        encoder = build_encoder(config, BINNING, NUM_GENES, seed=0)
        with torch.no_grad():
            encoder.performer.net.layers[0][0].fn.to_k.weight *= 6
        record = HealthRecord(len(encoder.blocks))
        with observed(encoder, record):
            encoder(tokens)
        shares[attention] = record.floor_share[0] / record.num_seen

    assert shares["published"] > shares["stable"] + 0.05


def test_equal_keys_have_the_highest_entropy_and_one_key_has_it_too() -> None:
    q, k = torch.randn(4, 2, 8), torch.zeros(30, 2, 8)
    directions = draw_projection(16, 8, seed=0)

    for keys in (k, k[:1]):
        floor, entropy = attention_health(q, keys, directions)
        torch.testing.assert_close(entropy, torch.ones(2))
        assert not floor.any()


def test_long_keys_sink_to_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    k = 30 * torch.randn(50, 1, 8, generator=generator)
    k[0] = 0

    floor, entropy = attention_health(k, k, draw_projection(16, 8, seed=0))

    assert float(floor) > 0.95
    assert torch.isfinite(entropy).all()


def test_every_block_is_seen_and_nothing_changes() -> None:
    encoder = build_encoder(ENCODER, BINNING, NUM_GENES, seed=0)
    tokens = torch.randint(0, 6, (3, NUM_GENES))
    expected = encoder(tokens)
    record = HealthRecord(len(encoder.blocks))

    with observed(encoder, record):
        states = encoder(tokens)
    encoder(tokens)

    assert torch.equal(states, expected)
    assert record.num_seen == 3 * ENCODER.heads
    metrics = health_metrics(record.sums())
    assert list(metrics) == [
        "attention_floor_share_block_1",
        "attention_floor_share_block_2",
        "attention_entropy_block_1",
        "attention_entropy_block_2",
    ]
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["attention_entropy_block_1"] > 0.5


def test_nothing_seen_gives_no_figures() -> None:
    assert health_metrics(HealthRecord(2).sums()) == {}


def test_evaluation_reports_health_when_asked() -> None:
    tokens = np.random.default_rng(0).integers(0, 6, (2, 3, NUM_GENES)).astype(np.uint8)
    batches = [TokenBatch(np.arange(3) + 3 * number, of) for number, of in enumerate(tokens)]
    engine = cast(TrainingEngine, PlainEngine())

    plain = evaluate(engine, batches, CONFIG, ALONE)
    metrics = evaluate(
        cast(TrainingEngine, PlainEngine()), batches, replace(CONFIG, attention_health=True), ALONE
    )

    assert {name: metrics[name] for name in plain} == plain
    assert len(metrics) == len(plain) + 2 * ENCODER.depth
