"""The door to DeepSpeed: models, optimizer steps, resumable state."""

import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from pretrain.config import PretrainConfig
from pretrain.deepspeed_settings import deepspeed_config, read_deepspeed_json
from pretrain.distributed import Ranks
from pretrain.full_state import FullState

log = logging.getLogger(__name__)


def require_compiler(which: Callable[[str], str | None] = shutil.which) -> None:
    """Refuse early where DeepSpeed would fail to build its communication kernel on CPU."""
    program = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    if torch.cuda.is_available() or which(program[0]):
        return
    raise ValueError(
        f"DeepSpeed builds a small C++ kernel at first use and found no compiler {program[0]}; "
        "install one (Debian, Ubuntu: apt-get install g++), and unset CXX if it names another"
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
    # Drawn in float32 as under every other stage; `_cast_shares` rounds what was cut.
    content.pop("bf16", None)
    return partial(deepspeed.zero.Init, config_dict_or_path=content)


def _cast_shares(model: nn.Module) -> None:
    """Round weights that ZeRO 3 has cut in float32 to bfloat16, where DeepSpeed wants them so."""
    for weight in model.parameters():
        if hasattr(weight, "ds_tensor"):
            weight.data = weight.data.bfloat16()
            weight.ds_tensor.data = weight.ds_tensor.data.bfloat16()


def pretraining_engine(model: nn.Module, config: PretrainConfig, ranks: Ranks) -> "TrainingEngine":
    """Make the engine of a pretraining: AdamW over all that is trained, at one learning rate."""
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
    )
    extra = read_deepspeed_json(config.deepspeed)
    return TrainingEngine(
        model, optimizer, deepspeed_config(config, ranks.world_size, extra), ranks
    )


class TrainingEngine:
    """A DeepSpeed engine behind the few calls that a training loop makes."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        content: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        """Hand a model over to DeepSpeed.

        Args:
            model: Equal on all ranks but for its parameters, which the first rank's replace.
            optimizer: AdamW over what is trained. A group that has `lr_factor` trains at so many
                times the learning rate of `step`.
            content: What DeepSpeed is told, see `deepspeed_settings.joined`.
            ranks: This process among all.
        """
        deepspeed = _import_deepspeed(ranks)
        # In bf16 without ZeRO DeepSpeed makes a trial update, which Adam would count and decay by.
        self._skipping = True
        if content.get("bf16", {}).get("enabled"):
            _cast_shares(model)
        optimizer.register_step_pre_hook(self._forget_gradients)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(ranks.device), optimizer=optimizer, config=dict(content)
        )
        self._skipping = False
        self._gather = deepspeed.zero.GatheredParameters
        self._state = FullState(self._engine)
        plain = not (self._engine.zero_optimization() or self._engine.bfloat16_enabled())
        self._plain, self._clip_norm = plain, content["gradient_clipping"]
        self._norm = float("nan")
        self.on_progress: Callable[[], None] = lambda: None
        """Called with each forward pass and each piece of a checkpoint."""
        self._poison = torch.zeros((), device=ranks.device)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(self._look_at)
        # DeepSpeed divides by both; our loss is already divided by what the whole step holds.
        self._undo = ranks.world_size * content["gradient_accumulation_steps"]

    def __call__(self, *inputs: Tensor | None) -> Any:
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
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
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
    require_compiler()
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed builds its kernel with the `ninja` on PATH: take this environment's, activated or
    # not. Another version of ninja would build the cached kernel again each time they alternate.
    here = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != here:
        os.environ["PATH"] = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    look_at_build_lock(Path(extensions), time.time())
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
