"""The whole training state of a DeepSpeed engine, parameter by parameter, whatever its ZeRO stage.

DeepSpeed's own checkpoints are pickles cut for one stage and one number of ranks. Here every
parameter is brought together (float32 weight and Adam's two moments), so that what one cluster
saved another can load: any number of ranks, any stage, offloaded or not. All ranks call everything
here, in the same order; at no time does a rank hold more than the parameters it was asked for.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class FullState:
    """Reads and writes the state of one engine."""

    def __init__(self, engine: Any) -> None:
        from deepspeed import utils, zero

        self._model: nn.Module = engine.module
        self._gathered = zero.GatheredParameters
        self._fragments = utils
        self._outer = engine.optimizer
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._sharded = engine.zero_optimization()
        # Without ZeRO each parameter has its own entry; in bf16 that of its float32 copy.
        pairs: Iterable[tuple[Tensor, Tensor]] = ()
        if not self._sharded:
            low = getattr(self._outer, "fp16_groups", None)
            groups = [group["params"] for group in self._inner.param_groups]
            pairs = (
                (parameter, master)
                for ours, theirs in zip(low or groups, groups, strict=True)
                for parameter, master in zip(ours, theirs, strict=True)
            )
        self._master = {id(parameter): master for parameter, master in pairs}

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has counted, for its bias correction."""
        if not self._inner.state:
            return 0
        return int(next(iter(self._inner.state.values()))["step"])

    def sizes(self) -> dict[str, int]:
        """Name of each parameter and buffer, with the bytes that it takes in a checkpoint."""
        sizes = {}
        for name, parameter in self._model.named_parameters():
            numel = int(getattr(parameter, "ds_numel", parameter.numel()))
            sizes[name] = 4 * numel * (3 if parameter.requires_grad else 1)
        return sizes | {name: value.nbytes for name, value in self._buffers()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Gather some parameters and buffers, on the CPU.

        Returns:
            `weight/<name>` in float32; of what is trained also `exp_avg/<name>` and
            `exp_avg_sq/<name>`. Buffers keep their type.
        """
        if not self._inner.state:  # no update was made yet, the first steps were skipped
            self._make_room(0)
        self._link_moments()
        parameters, buffers = dict(self._model.named_parameters()), dict(self._buffers())
        tensors = {}
        for name in names:
            if name in buffers:
                tensors[f"weight/{name}"] = buffers[name]
                continue
            parameter = parameters[name]
            if not parameter.requires_grad:
                with self._gathered([parameter]):
                    tensors[f"weight/{name}"] = parameter.detach().float().clone()
                continue
            tensors[f"weight/{name}"] = self._trained(parameter)
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self._trained(parameter, moment)
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def write(self, tensors: Mapping[str, Tensor], optimizer_step: int) -> None:
        """Set parameters, moments and buffers to what `read` gave, on all ranks.

        Args:
            tensors: Any lazy or whole mapping with all keys of the model.
            optimizer_step: Updates that Adam had counted.

        Raises:
            ValueError: If a tensor is missing or has another shape.
        """
        self._make_room(optimizer_step)
        for name, buffer in self._buffers():
            buffer.copy_(_checked(tensors, f"weight/{name}", buffer.shape))
        for name, parameter in self._model.named_parameters():
            shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            weight = _checked(tensors, f"weight/{name}", shape)
            with torch.no_grad(), self._gathered([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            if not parameter.requires_grad:
                continue
            self._set_trained(parameter, weight)
            for moment in MOMENTS:
                value = _checked(tensors, f"{moment}/{name}", shape)
                self._set_trained(parameter, value, moment)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        saved = self._model.state_dict(keep_vars=True)
        return ((name, value) for name, value in self._model.named_buffers() if name in saved)

    def _trained(self, parameter: Tensor, moment: str | None = None) -> Tensor:
        if not self._sharded:
            master = self._master[id(parameter)]
            value: Tensor = master if moment is None else self._inner.state[master][moment]
        elif moment is None:
            value = self._fragments.safe_get_full_fp32_param(parameter)
        else:
            value = self._fragments.safe_get_full_optimizer_state(parameter, moment)
        return value

    def _set_trained(self, parameter: Tensor, value: Tensor, moment: str | None = None) -> None:
        if not self._sharded:
            master = self._master[id(parameter)]
            target = master if moment is None else self._inner.state[master][moment]
            with torch.no_grad():
                target.copy_(value)
        elif hasattr(parameter, "ds_tensor"):  # stage 3, whose own setter fails on ragged shares
            share = _share(parameter, value)
            if moment is None:
                self._fragments.safe_set_local_fp32_param(parameter, share)
            else:
                self._fragments.safe_set_local_optimizer_state(parameter, share, moment)
        elif moment is None:
            self._fragments.safe_set_full_fp32_param(parameter, value)
        else:
            self._fragments.safe_set_full_optimizer_state(parameter, value, moment)

    def _make_room(self, optimizer_step: int) -> None:
        """Give Adam the moments that it would make at its first update."""
        for flat in self._flat_weights():
            self._inner.state[flat] = {
                "step": torch.tensor(float(optimizer_step)),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed find each weight's moments, in stages 1 and 2.

        Of several groups it looks by itself when only the first one has moments.
        """
        if hasattr(self._outer, "_lazy_init_hp_params_optimizer_state"):
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()

    def _flat_weights(self) -> list[Tensor]:
        """The float32 tensors that Adam works on, on this rank."""
        if not self._sharded:
            return list(self._master.values())
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(self._outer, name):
                return list(getattr(self._outer, name))
        raise ValueError(f"checkpoints of {type(self._outer).__name__} are not supported")


def _share(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor under ZeRO 3; the last parts are filled up with zeros."""
    length = parameter.ds_tensor.numel()
    start = dist.get_rank(parameter.ds_process_group) * length
    part = value.flatten()[start : start + length]
    return nn.functional.pad(part, (0, length - part.numel()))


def _checked(tensors: Mapping[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    try:
        value = tensors[key]
    except KeyError:
        raise ValueError(f"the checkpoint has no {key}") from None
    if value.shape != shape:
        raise ValueError(
            f"{key} of the checkpoint is {tuple(value.shape)}, the model's is {tuple(shape)}"
        )
    return value
