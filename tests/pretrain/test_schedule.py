"""Learning rates by hand."""

from dataclasses import replace

import pytest

from pretrain.config import OptimConfig
from pretrain.schedule import learning_rate

CONSTANT = OptimConfig(lr=1.0, min_lr=0.1, schedule="constant", warmup_steps=4)
COSINE = replace(CONSTANT, schedule="cosine")
RESTARTS = OptimConfig(
    lr=1.0,
    min_lr=0.1,
    schedule="restarts",
    restart_epochs=4,
    restart_warmup_epochs=2,
    restart_decay=0.5,
)


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        pytest.param(CONSTANT, 0, 0.25, id="constant, first step of the warm-up"),
        pytest.param(CONSTANT, 3, 1.0, id="constant, last step of the warm-up"),
        pytest.param(CONSTANT, 99, 1.0, id="constant, later"),
        pytest.param(replace(CONSTANT, warmup_steps=0), 0, 1.0, id="constant, no warm-up"),
        pytest.param(COSINE, 1, 0.5, id="cosine, warm-up"),
        pytest.param(COSINE, 4, 1.0, id="cosine, top"),
        pytest.param(COSINE, 8, 0.55, id="cosine, half way: (1 + 0.1) / 2"),
        pytest.param(COSINE, 12, 0.1, id="cosine, end"),
        pytest.param(COSINE, 500, 0.1, id="cosine, past the end"),
        # Ten steps an epoch: the rate stays for a whole epoch.
        pytest.param(RESTARTS, 0, 0.55, id="restarts, warm-up: 0.1 + 0.9 / 2"),
        pytest.param(RESTARTS, 9, 0.55, id="restarts, same epoch"),
        pytest.param(RESTARTS, 10, 1.0, id="restarts, end of the warm-up"),
        pytest.param(RESTARTS, 20, 1.0, id="restarts, top of the cosine"),
        pytest.param(RESTARTS, 30, 0.55, id="restarts, half way down"),
        pytest.param(RESTARTS, 40, 0.3, id="second cycle, warm-up: 0.1 + 0.4 / 2"),
        pytest.param(RESTARTS, 50, 0.5, id="second cycle, its top is half"),
        pytest.param(RESTARTS, 90, 0.3, id="second cycle, half way down its 6 epochs"),
        pytest.param(RESTARTS, 120, 0.175, id="third cycle, warm-up: 0.1 + 0.15 / 2"),
        pytest.param(RESTARTS, 10 * (4 + 8 + 16), 0.1 + 0.025 / 2, id="fourth cycle"),
    ],
)
def test_learning_rate(config: OptimConfig, step: int, expected: float) -> None:
    assert learning_rate(step, 10, 12, config) == pytest.approx(expected, rel=1e-12)


def test_restarts_double_in_length() -> None:
    falling = replace(RESTARTS, restart_warmup_epochs=0)
    rates = [learning_rate(epoch, 1, 10**6, falling) for epoch in range(60)]

    assert [e for e in range(1, 60) if rates[e] > rates[e - 1]] == [4, 12, 28]
    assert [rates[e] for e in (0, 4, 12, 28)] == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_decay_does_not_go_below_the_lowest_rate() -> None:
    far = 4 * (2**12 - 1) + 1  # epoch 1 of the thirteenth cycle: 0.5^12 is below 0.1

    assert learning_rate(far, 1, 10**6, RESTARTS) == pytest.approx(0.1)


def test_warmup_longer_than_the_training() -> None:
    assert learning_rate(2, 10, 3, COSINE) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"lr": 0.0}, "optim.lr is 0.0", id="no rate"),
        pytest.param({"lr": float("nan")}, "optim.lr is nan", id="not a number"),
        pytest.param({"min_lr": 2.0}, "min_lr 2.0", id="lowest above highest"),
        pytest.param({"clip_norm": 0.0}, "optim.clip_norm is 0.0", id="clip to nothing"),
        pytest.param({"warmup_steps": -1}, "warmup_steps", id="negative warm-up"),
        pytest.param({"restart_warmup_epochs": 15}, "restart_epochs", id="warm-up only"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**{"lr": 1.0, **changes})  # type: ignore[arg-type]
