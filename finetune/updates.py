"""How the network's weights are updated: by one process with PyTorch, by several with DeepSpeed.

Both take the same steps: AdamW over what learns, each group at its own highest rate, the norm of
the whole gradient bounded. Both give Adam's moments whole and by the names of the weights, so that
a training which was stopped continues on any number of ranks.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finetune.config import FinetuneConfig
from pretrain.deepspeed_settings import joined, read_deepspeed_json, require_supported
from pretrain.distributed import Ranks
from pretrain.full_state import MOMENTS

Groups = list[dict[str, Any]]
"""Parameter groups: `params`, and in `lr_factor` their highest learning rate."""


class Updates(Protocol):
    """What the training loop needs; all ranks call it in the same order."""

    def train(self) -> None:
        """Turn to training mode."""

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Run the network."""

    def step(self, loss: Tensor, scale: float) -> None:
        """Add up the losses of all ranks and update the weights, at this share of their rates."""

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments, `exp_avg/<weight>` and `exp_avg_sq/<weight>`, on the first rank's CPU."""

    def restore(self, moments: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue with these moments, after so many steps; the weights are there already."""


def updates_of(
    network: nn.Module, groups: Groups, config: FinetuneConfig, ranks: Ranks
) -> "PlainUpdates | EngineUpdates":
    """Choose what suits the number of ranks; `network` is on its device."""
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    if ranks.world_size == 1:
        return PlainUpdates(network, optimizer, config.clip_norm)
    return EngineUpdates(network, optimizer, config, ranks)


class PlainUpdates:
    """Updates of one process."""

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._network, self._optimizer, self._clip_norm = network, optimizer, clip_norm

    def train(self) -> None:
        """Turn to training mode."""
        self._network.train()

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Run the network."""
        logits: Tensor = self._network(*inputs)
        return logits

    def step(self, loss: Tensor, scale: float) -> None:
        """Update the weights; see `Updates`."""
        for group in self._optimizer.param_groups:
            group["lr"] = scale * group["lr_factor"]
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments; see `Updates`."""
        found = {}
        for name, weight in _trained(self._network):
            state = self._optimizer.state[weight]
            for moment in MOMENTS:  # what no gradient reached so far has none
                value = state[moment] if moment in state else torch.zeros_like(weight)
                found[f"{moment}/{name}"] = value.cpu()
        return found

    def restore(self, moments: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue; see `Updates`."""
        for name, weight in _trained(self._network):
            state = {moment: moments[f"{moment}/{name}"].to(weight) for moment in MOMENTS}
            self._optimizer.state[weight] = {"step": torch.tensor(float(num_steps)), **state}


class EngineUpdates:
    """Updates of several ranks; DeepSpeed adds up their gradients."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: FinetuneConfig,
        ranks: Ranks,
    ) -> None:
        from pretrain.engine import TrainingEngine

        content = joined(read_deepspeed_json(config.deepspeed), 1, 1, config.clip_norm)
        self._network, self._is_first = network, ranks.is_first
        self._engine = TrainingEngine(network, optimizer, content, ranks)

    def train(self) -> None:
        """Turn to training mode."""
        self._engine.train()

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Run the network."""
        logits: Tensor = self._engine(*inputs)
        return logits

    def step(self, loss: Tensor, scale: float) -> None:
        """Update the weights; see `Updates`."""
        self._engine.backward(loss)
        self._engine.step(scale)

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments; see `Updates`."""
        found = {}
        for name, _ in _trained(self._network):
            state = self._engine.read_state([name])  # one at a time: all ranks of a host get it
            for moment in MOMENTS if self._is_first else ():
                found[f"{moment}/{name}"] = state[f"{moment}/{name}"]
        return found

    def restore(self, moments: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue; see `Updates`."""
        weights = {f"weight/{name}": value for name, value in self._network.state_dict().items()}
        self._engine.write_state({**weights, **moments}, num_steps)


def require_trainable(config: FinetuneConfig, ranks: Ranks) -> None:
    """Refuse a DeepSpeed JSON that fine-tuning cannot follow.

    Raises:
        ValueError: If it is not usable at all, or asks for weights in parts or in bfloat16.
    """
    if config.deepspeed is None:
        return
    if ranks.world_size == 1:
        warnings.warn(
            f"deepspeed is {config.deepspeed}, which changes nothing for one process; start "
            "several with `deepspeed --num_gpus 2 launchers/finetune.py`",
            UserWarning,
            stacklevel=2,
        )
    content = read_deepspeed_json(config.deepspeed)
    require_supported(content, ranks.device.type)
    if content.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError(
            f"{config.deepspeed}: zero_optimization.stage is 3, but in fine-tuning every rank has "
            "the whole network; give 0, 1 or 2"
        )
    if content.get("bf16", {}).get("enabled"):
        raise ValueError(
            f"{config.deepspeed}: bf16 is enabled, but fine-tuning computes in float32; leave it "
            "out"
        )


def _trained(network: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """What learns, by name."""
    return ((name, weight) for name, weight in network.named_parameters() if weight.requires_grad)
