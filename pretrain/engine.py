"""The door to DeepSpeed: configuration, optimizer steps, resumable state.

Batch sizes, clipping, optimizer and schedule belong to our configuration; a DeepSpeed JSON holds
what only DeepSpeed understands (ZeRO stage, precision, offload, communication).
"""

import difflib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.full_state import FullState

log = logging.getLogger(__name__)

OWNED: Final = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "steps_per_print": "log_every",
}
"""DeepSpeed keys that follow from our fields, and which."""

ALLOWED: Final = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""DeepSpeed keys that a JSON may set. DeepSpeed itself ignores unknown ones without a word."""


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; without one, ZeRO stage 1.

    Raises:
        ValueError: If a key is ours or unknown; the message names our field or the nearest key.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    for key in content:
        if key in OWNED:
            raise ValueError(f"{path} sets {key!r}; remove it and set {OWNED[key]} instead")
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {sorted(ALLOWED)}"
            raise ValueError(f"{path} has the unknown key {key!r}; {hint}")
    return content


def require_supported(content: Mapping[str, Any], device: str) -> None:
    """Refuse what DeepSpeed cannot run on this device, or we cannot save, before anything starts.

    Args:
        content: A checked DeepSpeed JSON.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: That names the setting and what to do.
    """
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        where = zero.get(name, {}).get("device", "none")
        if where == "none":
            continue
        if where != "cpu":
            raise ValueError(
                f"zero_optimization.{name}.device is {where!r}, from which checkpoints cannot be "
                "taken; choose 'cpu'"
            )
        if stage < least:
            raise ValueError(
                f"zero_optimization.{name} needs stage {least} or more, it is {stage}; raise "
                "zero_optimization.stage or leave it out"
            )
    if device == "cpu" and zero.get("zero_quantized_weights"):
        raise ValueError(
            "zero_optimization.zero_quantized_weights is not implemented on CPU; leave it out"
        )


def deepspeed_config(
    config: PretrainConfig, world_size: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Join a checked DeepSpeed JSON with what follows from our configuration."""
    return {
        # Offloading keeps our AdamW, so that it trains as every other stage does.
        "zero_force_ds_cpu_optimizer": False,
        **extra,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": _accumulation_steps(config, world_size),
        "gradient_clipping": config.optim.clip_norm,
        "steps_per_print": 2**31,
    }


def _accumulation_steps(config: PretrainConfig, world_size: int) -> int:
    # Cut by tokens, the micro-batches of a step differ in number and `backward` is told the last
    # one; all that DeepSpeed must know is that there may be several.
    steps = config.batch.accumulation_steps(world_size)
    return steps if config.batch.tokens is None else 2


def require_compiler(which: Callable[[str], str | None] = shutil.which) -> None:
    """Refuse early where DeepSpeed would fail to build its communication kernel on CPU."""
    if torch.cuda.is_available() or which(os.environ.get("CXX", "g++")):
        return
    raise ValueError(
        "DeepSpeed builds a small C++ kernel at first use and found no compiler; "
        "install one (Debian, Ubuntu: apt-get install g++)"
    )


def look_at_build_lock(folder: Path, now: float) -> None:
    """Clear the lock of a compilation that was killed: DeepSpeed would wait for it for ever.

    Args:
        folder: Where torch keeps compiled extensions.
        now: Seconds since the epoch; a lock of more than a quarter of an hour belongs to nobody.
    """
    for lock in folder.glob("**/deepspeed_*/lock"):
        try:
            age = now - lock.stat().st_mtime
        except FileNotFoundError:  # it was released meanwhile
            continue
        if age > 900:
            log.warning("removing %s, left by a compilation that was killed", lock)
            lock.unlink(missing_ok=True)
        else:
            log.info("another process compiles a kernel; if none does, delete %s", lock)


def construction(config: PretrainConfig, ranks: Ranks) -> Callable[[], AbstractContextManager[Any]]:
    """Say how modules are made so that under ZeRO 3 no rank ever holds the whole model.

    Returns:
        Gives a context in which each weight is cut as soon as it is there, anew for each use;
        one that does nothing without ZeRO 3, or for one rank, which holds everything anyway.
    """
    extra = read_deepspeed_json(config.deepspeed)
    if extra.get("zero_optimization", {}).get("stage") != 3 or ranks.world_size == 1:
        return nullcontext
    deepspeed = _import_deepspeed(ranks)
    content = deepspeed_config(config, ranks.world_size, extra)
    return partial(deepspeed.zero.Init, config_dict_or_path=content)


class TrainingEngine:
    """A DeepSpeed engine behind the few calls that the training loop makes."""

    def __init__(self, model: nn.Module, config: PretrainConfig, ranks: Ranks) -> None:
        require_compiler()
        look_at_build_lock(
            Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), time.time()
        )
        extra = read_deepspeed_json(config.deepspeed)
        deepspeed = _import_deepspeed(ranks)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
        )
        # In bf16 without ZeRO DeepSpeed makes a trial update, which Adam would count and decay by.
        self._skipping = True
        optimizer.register_step_pre_hook(self._forget_gradients)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device),
            optimizer=optimizer,
            config=deepspeed_config(config, ranks.world_size, extra),
        )
        self._skipping = False
        self._gather = deepspeed.zero.GatheredParameters
        self._state = FullState(self._engine)
        # DeepSpeed divides by both; our loss is already divided by the global number of targets.
        plain = not (self._engine.zero_optimization() or self._engine.bfloat16_enabled())
        self._plain, self._clip_norm = plain, config.optim.clip_norm
        self._norm = float("nan")
        self.on_progress: Callable[[], None] = lambda: None
        """Called with each forward pass and each piece of a checkpoint."""
        self._poison = torch.zeros((), device=ranks.device)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(self._look_at)
        self._undo = ranks.world_size * _accumulation_steps(config, ranks.world_size)

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the model forward."""
        self.on_progress()
        return self._engine(*inputs)

    @property
    def model(self) -> nn.Module:
        """The model inside; under ZeRO 3 its parameters are sharded."""
        model: nn.Module = self._engine.module
        return model

    def backward(self, loss: Tensor, is_last: bool | None = None) -> None:
        """Add the gradient of a loss: over ranks and micro-batches of a step, a plain sum.

        Args:
            loss: Of a micro-batch.
            is_last: Whether the step ends with it, the same on all ranks; none counts to
                `batch.accumulation_steps`.
        """
        if is_last is not None:
            self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._undo)

    def _look_at(self, gradient: Tensor) -> None:
        # 0 × the sum is 0 for finite gradients and NaN for others; no waiting for the device here.
        self._poison += 0.0 * gradient.sum(dtype=torch.float32)

    def gradient_is_finite(self) -> bool:
        """Tell whether all gradients since the last update were finite, on this rank."""
        return bool(torch.isfinite(self._poison))

    def _forget_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Let an update that is skipped change nothing: Adam passes over what has no gradient."""
        if self._skipping:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = None

    def step(self, learning_rate: float, update: bool = True) -> None:
        """Count a micro-batch; at the last of a step, clip and update.

        Args:
            learning_rate: Of this step.
            update: Without it weights and moments stay, and the step's gradients are dropped.
        """
        self._skipping = not update
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Without ZeRO and in float32 DeepSpeed clips but keeps no norm: take it here, just before.
        if self._plain and self._engine.is_gradient_accumulation_boundary():
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
            self._norm = float(norm)
        self._engine.step()
        if not update:
            self._poison.zero_()

    @property
    def gradient_norm(self) -> float:
        """Norm of the whole gradient at the last update, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else self._norm

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def whole_weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Gather the full weights on the CPU, one at a time; all ranks take part.

        Args:
            keep: Whether this rank wants them; else it gets none and makes no room.
        """
        weights = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            with self._gather([value] if hasattr(value, "ds_id") else []):
                if keep:
                    weights[name] = value.detach().float().cpu().clone()
        return weights

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has counted."""
        return self._state.optimizer_step

    def state_sizes(self) -> dict[str, int]:
        """Names of all that a checkpoint must hold, and the bytes that each takes."""
        return self._state.sizes()

    def read_state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Gather whole float32 weights and moments on the CPU of every rank; see `FullState`."""
        self.on_progress()
        return self._state.read(names)

    def write_state(self, tensors: Mapping[str, Tensor], optimizer_step: int) -> None:
        """Set all weights and moments, whatever stage and number of ranks they were read from."""
        self._state.write(tensors, optimizer_step)


def _import_deepspeed(ranks: Ranks) -> Any:
    """Import DeepSpeed quietly and let it join the process group."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed builds its kernel with the `ninja` on PATH: take this environment's, activated or
    # not. Another version of ninja would build the cached kernel again each time they alternate.
    here = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
    return deepspeed
