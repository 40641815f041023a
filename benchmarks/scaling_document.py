"""`docs/scaling.md` and its plot from the figures of `benchmarks/scaling.py`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.estimate import (
    DEVICES,
    activation_bytes,
    bytes_per_step,
    measure_size,
    seconds_per_cell,
)
from pretrain.memory_moments import CPU_PROCESS_BYTES, Placement

ROOT = Path(__file__).resolve().parents[1]
NUM_GENES = 16_906
PRESETS = {"scbert": 1, "1b": 3}
"""Preset and the ZeRO stage it is predicted for."""
NUM_GPUS = (8, 64, 512, 4_096)
CELLS_PER_GPU = 180
"""Of weak scaling, per step: the published 5,760 on 32 GPUs."""
STRONG_BATCH = 16_384
MEASURED = "this CPU"
CPU_NETWORK = 25e9 / 8
"""Bytes per second between CPU hosts, assumed: 25 Gbit/s."""


def write_document(result: dict[str, Any], docs: Path) -> None:
    """Write the page and its plot."""
    predicted = {preset: list(predict(preset, stage)) for preset, stage in PRESETS.items()}
    figures = result["figures"]
    if figures.keys() >= {"ranks", "traffic"}:
        traffic = figures["traffic"]["1"]["sent_bytes_in_theory"]
        predicted[MEASURED] = list(predict_measured(figures["ranks"]["1"], traffic))
    plot(predicted, docs / "images" / "scaling.png")
    (docs / "scaling.md").write_text(page(result, predicted), encoding="utf-8")


def predict(preset: str, stage: int) -> Iterator[dict[str, float]]:
    """Weak and strong scaling on H100 nodes of eight, as efficiencies; nothing hidden."""
    content = yaml.safe_load((ROOT / f"launchers/configs/pretrain/{preset}.yaml").read_text())
    shape = {**content["encoder"], "gene_embedding": "learned", "kernel": "torch"}
    encoder = EncoderConfig(**shape)
    config = PretrainConfig(store="", output="", encoder=encoder)
    size, device = measure_size(encoder, NUM_GENES), DEVICES["h100"]
    one = seconds_per_cell(
        config, size, activation_bytes(config, size.tokens, "bf16"), device, "bf16"
    )
    micro = content["batch"]["micro_size"]
    for gpus in NUM_GPUS:
        placement = Placement(nodes=gpus // 8, ranks_per_node=8, stage=stage, precision="bf16")
        wire = device.network if placement.nodes > 1 else device.link
        row: dict[str, float] = {"gpus": gpus}
        for name, total in (("weak", CELLS_PER_GPU * gpus), ("strong", STRONG_BATCH)):
            each = total // gpus
            cells = max(number for number in range(1, micro + 1) if each % number == 0)
            batch = BatchConfig(global_size=total, micro_size=cells)
            sent = bytes_per_step(replace(config, batch=batch), size, placement)
            compute = total / gpus * one
            row[name] = compute / (compute + sent / wire)
            row[f"{name}_cells"] = total / (compute + sent / wire)
        yield row


def predict_measured(alone: dict[str, float], traffic: float) -> Iterator[dict[str, float]]:
    """Weak and strong scaling of ranks like the one measured, under ZeRO 1; nothing hidden.

    Args:
        alone: What one rank did.
        traffic: Bytes of two ranks per step in theory, where each sends half of two gradients and
            weights; in large rings each sends twice that half.
    """
    one = 1 / alone["cells_per_second"]
    for ranks in NUM_GPUS:
        around = (ranks - 1) / ranks
        wire = traffic * around / CPU_NETWORK
        row: dict[str, float] = {"gpus": ranks}
        for name, total in (("weak", CELLS_PER_GPU * ranks), ("strong", STRONG_BATCH)):
            compute = total / ranks * one
            row[name] = compute / (compute + wire)
            row[f"{name}_cells"] = total / (compute + wire)
        yield row


def plot(predicted: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw predicted efficiency over the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for preset, rows in predicted.items():
        for name, style in (("weak", "-"), ("strong", "--")):
            axes.plot(
                [row["gpus"] for row in rows],
                [row[name] for row in rows],
                style,
                marker="o",
                label=f"{preset}, {name} scaling",
            )
    axes.set(
        xscale="log",
        xlabel="H100 GPUs (or ranks like this CPU's)",
        ylabel="efficiency, predicted",
        ylim=(0, 1.05),
    )
    axes.set_xticks(NUM_GPUS, [f"{number:,}" for number in NUM_GPUS])
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def page(result: dict[str, Any], predicted: dict[str, list[dict[str, float]]]) -> str:
    """Write down the page in Markdown, of the parts that were measured."""
    figures, machine = result["figures"], result["machine"]
    lines = [
        "# Scaling",
        "",
        "Measured by `python benchmarks/scaling.py --write` on "
        f"{machine['cores']} cores ({machine['cpu']}), ranks of one thread each, CPU and gloo; "
        "this page is written by it. No GPU was at hand: what is said of GPUs is a prediction.",
        "",
        "## Measured",
    ]
    for part, section in _SECTIONS.items():
        lines += ["", *(section(result) if part in figures else [f"{part}: not measured yet."])]
    busy = {part: load for part, load in result["load"].items() if load > machine["cores"]}
    if busy:
        told = ", ".join(f"{part} {load:.0f}" for part, load in busy.items())
        lines += ["", f"The machine had other work meanwhile (load average at the start): {told}."]
    return "\n".join([*lines, "", *_predicted(predicted), ""])


def _weak(result: dict[str, Any]) -> list[str]:
    turns = result["figures"]["weak"]
    return [
        f"Weak scaling from one to two ranks: {result['ratios']['weak_two_ranks']:.1%} of what two "
        "processes do at the same time without communication (median of "
        f"{len(turns)} turns from {min(a / b for a, b in turns):.1%} to "
        f"{max(a / b for a, b in turns):.1%}; bar 90 %).",
    ]


def _ranks(result: dict[str, Any]) -> list[str]:
    ratio = result["ratios"]["cpu_seconds_vs_calibration"]
    return [
        f"CPU seconds per cell in training are {ratio:.2f} times those that `scbert estimate --gpu "
        "cpu` measures beforehand (bar 0.75 to 1.25).",
        "",
        *_table(
            ("ranks", "cells/s", "share of time waiting for cells"),
            (
                (
                    f"{n} (time-sliced)" if int(n) > result["machine"]["cores"] else n,
                    f"{row['cells_per_second']:.1f}",
                    f"{row['loader_wait_share']:.1%}",
                )
                for n, row in result["figures"]["ranks"].items()
            ),
        ),
    ]


def _checkpoint(result: dict[str, Any]) -> list[str]:
    saved = result["figures"]["checkpoint"]
    return [
        f"A checkpoint of {saved['checkpoint_bytes'] / 1e9:.2f} GB (100 million weights and both "
        f"moments in float32) stops two ranks for {saved['checkpoint_stall_seconds']:.1f} s; "
        f"resuming takes {saved['start_seconds']:.1f} s to build the model and the engine, "
        f"{saved['resume_check_seconds']:.1f} s to check all digests and "
        f"{saved['resume_read_seconds']:.1f} s to read and set the state.",
    ]


def _building(result: dict[str, Any]) -> list[str]:
    built = result["figures"]["building"]
    return [
        "Under ZeRO 3 no rank ever holds the whole model: preset `1b` with two of its blocks "
        f"({built['parameters'] / 1e6:.0f} million parameters, {built['whole_bytes'] / 1e6:.0f} MB "
        f"in float32) on {built['ranks']} ranks takes {built['build_bytes'] / 1e6:.0f} MB of each "
        f"at most while it is built; a share is {built['whole_bytes'] / built['ranks'] / 1e6:.0f} "
        f"MB, the largest single parameter {built['largest_bytes'] / 1e6:.0f} MB.",
    ]


def _traffic(result: dict[str, Any]) -> list[str]:
    return [
        "Bytes per step on the wire, both of two ranks together, as the kernel counted them, for "
        "13 million parameters and two micro-batches a step:",
        "",
        *_table(
            ("ZeRO", "sent", "in theory", "ratio"),
            (
                (
                    stage,
                    f"{row['sent_bytes'] / 1e6:.1f} MB",
                    f"{row['sent_bytes_in_theory'] / 1e6:.1f} MB",
                    f"{result['ratios']['traffic_vs_estimate'][stage]:.3f}",
                )
                for stage, row in result["figures"]["traffic"].items()
            ),
        ),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _memory(result: dict[str, Any]) -> list[str]:
    return [
        "Memory of the fullest rank above what the process had before the model was built, beside "
        "`scbert estimate` (bar 15 %). glibc was told to give back at once what is freed "
        "(`MALLOC_MMAP_THRESHOLD_=65536`); by default it keeps some of it. The estimate follows "
        "what DeepSpeed allocates, see `pretrain/memory_moments.py`; nothing in it was fitted but "
        f"{CPU_PROCESS_BYTES / 1e6:.0f} MB for the process itself. Two ranks unless said, 300 "
        "genes, two micro-batches a step:",
        "",
        *_table(
            ("training", "peak", "estimated", "measured / estimated"),
            (
                (
                    name,
                    f"{row['peak_bytes'] / 1e6:.0f} MB",
                    f"{row['estimated_bytes'] / 1e6:.0f} MB",
                    f"{result['ratios']['memory_vs_estimate'][name]:.2f}",
                )
                for name, row in result["figures"]["memory"].items()
            ),
        ),
    ]


def _predicted(predicted: dict[str, list[dict[str, float]]]) -> list[str]:
    return [
        "## Predicted",
        "",
        "By `scbert estimate`: bf16 on nodes of eight H100, 400 Gbit/s for each GPU, 35 % of the "
        "peak reached, no communication hidden behind computation. Weak scaling gives each GPU "
        f"{CELLS_PER_GPU} cells a step, strong scaling deals {STRONG_BATCH:,} to all. `scbert` is "
        "predicted under ZeRO 1, `1b` under ZeRO 3, whose gathering for every micro-batch is what "
        "costs: a larger `batch.micro_size` is the remedy."
        + (
            f" `{MEASURED}` takes the cells/s that one rank was measured to do above, and 25 "
            "Gbit/s between ranks."
            if MEASURED in predicted
            else ""
        ),
        "",
        *_table(
            ("model", "ranks", "weak: cells/s", "efficiency", "strong: cells/s", "efficiency"),
            (
                (
                    preset,
                    f"{row['gpus']:,}",
                    f"{row['weak_cells']:,.0f}",
                    f"{row['weak']:.0%}",
                    f"{row['strong_cells']:,.0f}",
                    f"{row['strong']:.0%}",
                )
                for preset, rows in predicted.items()
                for row in rows
            ),
        ),
        "",
        "![Predicted efficiency](images/scaling.png)",
    ]


_SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "weak": _weak,
    "ranks": _ranks,
    "traffic": _traffic,
    "memory": _memory,
    "building": _building,
    "checkpoint": _checkpoint,
}
