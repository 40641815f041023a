"""`docs/scaling.md` and its plot from the figures of `benchmarks/scaling.py`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.estimate import (
    DEVICES,
    Placement,
    activation_bytes,
    bytes_per_step,
    measure_size,
    seconds_per_cell,
)

ROOT = Path(__file__).resolve().parents[1]
NUM_GENES = 16_906
PRESETS = {"scbert": 1, "1b": 3}
"""Preset and the ZeRO stage it is predicted for."""
NUM_GPUS = (8, 64, 512, 4_096)
CELLS_PER_GPU = 180
"""Of weak scaling, per step: the published 5,760 on 32 GPUs."""
STRONG_BATCH = 16_384


def write_document(result: dict[str, Any], docs: Path) -> None:
    """Write the page and its plot."""
    predicted = {preset: list(predict(preset, stage)) for preset, stage in PRESETS.items()}
    plot(predicted, docs / "images" / "scaling.png")
    (docs / "scaling.md").write_text(page(result, predicted), encoding="utf-8")


def predict(preset: str, stage: int) -> Iterator[dict[str, float]]:
    """Weak and strong scaling on H100 nodes of eight, as efficiencies; nothing hidden."""
    content = yaml.safe_load((ROOT / f"launchers/configs/pretrain/{preset}.yaml").read_text())
    encoder = EncoderConfig(**{**content["encoder"], "gene_embedding": "learned"})
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
    axes.set(xscale="log", xlabel="H100 GPUs", ylabel="efficiency, predicted", ylim=(0, 1.05))
    axes.set_xticks(NUM_GPUS, [f"{number:,}" for number in NUM_GPUS])
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def page(result: dict[str, Any], predicted: dict[str, list[dict[str, float]]]) -> str:
    """Write down the page in Markdown."""
    figures, ratios, machine = result["figures"], result["ratios"], result["machine"]
    saved = figures["checkpoint"]
    lines = [
        "# Scaling",
        "",
        "Measured by `python benchmarks/scaling.py --write` on "
        f"{machine['cores']} cores ({machine['cpu']}), ranks of one thread each, CPU and gloo; "
        "this page is written by it. No GPU was at hand: what is said of GPUs is a prediction.",
        "",
        "## Measured",
        "",
        f"- Weak scaling from one to two ranks: {ratios['weak_two_ranks']:.1%} of what two "
        "processes do at the same time without communication (median of "
        f"{len(figures['weak'])} turns; bar 90 %).",
        f"- CPU seconds per cell in training are {ratios['cpu_seconds_vs_calibration']:.2f} times "
        "those that `scbert estimate --gpu cpu` measures beforehand (bar 0.75 to 1.25).",
        f"- A checkpoint of {saved['checkpoint_bytes'] / 1e9:.2f} GB (weights and both moments in "
        f"float32) stops two ranks for {saved['checkpoint_stall_seconds']:.1f} s; resuming takes "
        f"{saved['start_seconds']:.1f} s to build the model and the engine, "
        f"{saved['resume_check_seconds']:.1f} s to check all digests and "
        f"{saved['resume_read_seconds']:.1f} s to read and set the state.",
        "",
        "| ranks | cells/s | share of time waiting for cells |",
        "|---|---|---|",
    ]
    for number, row in figures["ranks"].items():
        sliced = " (time-sliced)" if int(number) > int(machine["cores"]) else ""
        lines.append(
            f"| {number}{sliced} | {row['cells_per_second']:.1f} | {row['loader_wait_share']:.1%} |"
        )
    lines += [
        "",
        "Two ranks, a model of 13 million parameters; memory is the highest resident size above "
        "that before the model was built, traffic what the kernel counted on the wire, all ranks "
        "together:",
        "",
        "| ZeRO | peak memory per rank | estimated | ratio | sent per step | theory | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, row in figures["stages"].items():
        memory, traffic = ratios["memory_vs_estimate"][stage], ratios["bytes_vs_theory"][stage]
        lines.append(
            f"| {stage} | {row['peak_bytes'] / 1e6:.0f} MB | "
            f"{row['estimated_bytes'] / 1e6:.0f} MB | {memory:.2f} | "
            f"{row['sent_bytes'] / 1e6:.0f} MB | "
            f"{row['sent_bytes_in_theory'] / 1e6:.0f} MB | {traffic:.2f} |"
        )
    lines += [
        "",
        "## Predicted",
        "",
        "By `scbert estimate`: bf16 on nodes of eight H100, 400 Gbit/s for each GPU, 35 % of the "
        "peak reached, no communication hidden behind computation. Weak scaling gives each GPU "
        f"{CELLS_PER_GPU} cells a step, strong scaling deals {STRONG_BATCH:,} to all. `scbert` is "
        "predicted under ZeRO 1, `1b` under ZeRO 3, whose gathering for every micro-batch is what "
        "costs: a larger `batch.micro_size` is the remedy.",
        "",
        "| preset | GPUs | weak: cells/s | efficiency | strong: cells/s | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for preset, rows in predicted.items():
        for row in rows:
            lines.append(
                f"| {preset} | {row['gpus']:,} | {row['weak_cells']:,.0f} | {row['weak']:.0%} | "
                f"{row['strong_cells']:,.0f} | {row['strong']:.0%} |"
            )
    lines += ["", "![Predicted efficiency](images/scaling.png)", ""]
    return "\n".join(lines)
