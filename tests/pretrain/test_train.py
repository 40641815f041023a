"""The training loop with real DeepSpeed, on one rank and on two.

Every start of processes costs seconds: three of them train all configurations, tests look at what
came of it.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore.config import SelectionConfig
from datastore.gene_embedding import write_gene_vectors
from datastore.genes import GenePanel, write_panel
from datastore.store import file_digest
from pretrain import step as training
from pretrain import train
from pretrain.config import Gene2VecConfig, PretrainConfig
from pretrain.conversion import export_checkpoint, find_checkpoint
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine, pretraining_engine
from pretrain.export import read_export
from pretrain.masking import mask_batch
from pretrain.window import Window
from tests.support.plain import HELD_OUT, NUM_STEPS, largest_difference, plain_training
from tests.support.ranks import run_ranks
from tests.support.tiny import ENCODER, NUM_CELLS, tiny_config, tiny_panel, tiny_store

pytestmark = pytest.mark.multiprocess

EMPTY_CELL = 20
GENE_VECTORS: dict[str, Any] = {"encoder": replace(ENCODER, gene_embedding="gene2vec")}
EVEN_CELLS = SelectionConfig(where={"side": ["even"]})
TWICE_AS_ODD = SelectionConfig(weight_by="side", weights={"odd": 2.0})
Lines = dict[int, dict[str, float]]


@dataclass
class Outcome:
    """What one rank saw of one training; plain values that travel between processes."""

    result: dict[str, Any]
    error: str
    weights_digest: str
    positions: list[tuple[int, list[int]]]
    """Epoch and store positions of each micro-batch trained on."""


def train_each(ranks: Ranks, configs: dict[str, PretrainConfig]) -> dict[str, Outcome]:
    """Run several trainings in this process, one after another."""
    return {name: train_one(ranks, config) for name, config in configs.items()}


def train_one(ranks: Ranks, config: PretrainConfig) -> Outcome:
    outcome = Outcome({}, "", "", [])
    engines: list[TrainingEngine] = []

    def watched(*arguments: Any) -> TrainingEngine:
        engines.append(pretraining_engine(*arguments))
        return engines[-1]

    def recording(batch: Any, draw: int, *rest: Any) -> Any:
        outcome.positions.append((draw, batch.positions.tolist()))
        return mask_batch(batch, draw, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "pretraining_engine", watched)
        patch.setattr(training, "mask_batch", recording)
        try:
            outcome.result = train.pretrain(config, ranks)
        except ValueError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        else:
            weights = engines[0].whole_weights()  # projections are among them
            joined = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
            outcome.weights_digest = hashlib.sha256(joined).hexdigest()
    return outcome


@dataclass
class Trainings:
    """All trainings of this module."""

    folder: Path
    one: dict[str, Outcome]
    two: list[dict[str, Outcome]]

    def config(self, name: str) -> PretrainConfig:
        return tiny_config(self.folder / "store", self.folder / name)

    def lines(self, name: str) -> Lines:
        """Metrics by step; of a step that was logged twice the later line counts."""
        lines: Lines = {}
        for text in (self.folder / name / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            lines[line["step"]] = lines.get(line["step"], {}) | line
        return lines

    def series(self, name: str, metric: str) -> NDArray[np.float64]:
        return np.array([line[metric] for _, line in sorted(self.lines(name).items())])

    def export(self, name: str) -> dict[str, Tensor]:
        return read_export(self.folder / name / "export", "encoder").weights


def zero_json(folder: Path, number: int, offload: bool = False, **more: Any) -> str:
    """Write a DeepSpeed JSON of a ZeRO stage."""
    zero: dict[str, Any] = {"stage": number}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    path = folder / f"zero{number}{'_offload' * offload}{'_'.join(more)}.json"
    path.write_text(json.dumps({"zero_optimization": zero, **more}))
    return str(path)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    folder = tmp_path_factory.mktemp("trainings")
    store = tiny_store(folder / "store", empty=EMPTY_CELL).path
    other_store = tiny_store(folder / "other_store", 48).path

    vectors, other_vectors = (
        Gene2VecConfig(vectors=f"{folder}/vectors_{seed}/genes.npy") for seed in (0, 1)
    )
    for seed in (0, 1):
        matrix = np.random.default_rng(seed).normal(size=(30, ENCODER.dim)).astype(np.float32)
        panel = GenePanel(tiny_panel().names[:30])
        write_gene_vectors(folder / f"vectors_{seed}", matrix, panel, {"method": "at random"})

    def config(name: str, **changes: Any) -> PretrainConfig:
        return replace(tiny_config(store, folder / name), **changes)

    def stage(number: int, **more: Any) -> str:
        return zero_json(folder, number, **more)

    first = {
        "straight": config("straight"),
        "stopped": config("stopped", stop_after=3),
        "short": config("short", max_steps=2, validation_share=0.0),
        **{f"zero{n}": config(f"zero{n}", deepspeed=stage(n)) for n in (0, 2, 3)},
        "bf16": config("bf16", deepspeed=stage(1, bf16={"enabled": True}), max_steps=2),
        "chosen": config("chosen", data=EVEN_CELLS),
        "vectors": config("vectors", **GENE_VECTORS, gene2vec=vectors, stop_after=3, max_steps=4),
        "weighted": config("weighted", data=TWICE_AS_ODD),
        "weighted_stopped": config("weighted_stopped", data=TWICE_AS_ODD, stop_after=5),
    }
    changed = {
        "other store": config("stopped", store=str(other_store)),
        "other seed": config("stopped", seed=1),
        "other encoder": config("stopped", encoder=replace(ENCODER, depth=1)),
        "other cells": config("stopped", data=EVEN_CELLS),
        "other vectors": config("vectors", **GENE_VECTORS, gene2vec=other_vectors, max_steps=4),
        "vectors_continued": config("vectors", **GENE_VECTORS, gene2vec=vectors, max_steps=4),
        "continued": config("stopped"),
        "again": config("stopped"),
    }
    on_two = {
        "two_zero3_stopped": config("two_zero3_stopped", stop_after=3, deepspeed=stage(3)),
        "two": config("two"),
        "two_zero3": config("two_zero3", deepspeed=stage(3)),
        "two_stopped": config("two_stopped", stop_after=3),
        **{
            f"two_bf16_zero{n}": config(
                f"two_bf16_zero{n}", deepspeed=stage(n, bf16={"enabled": True}), max_steps=4
            )
            for n in (1, 3)
        },
        "two_continued": config("two_stopped"),
        "weighted_on_two": config("weighted_stopped", data=TWICE_AS_ODD),
        "grown": config("grown", deepspeed=stage(3)),
    }
    one = run_ranks(train_each, 1, folder, first)[0]
    for name in ("stopped_at_3", "grown"):
        shutil.copytree(folder / "stopped", folder / name)
    one |= run_ranks(train_each, 1, folder, changed)[0]
    two = run_ranks(train_each, 2, folder, on_two)
    return Trainings(folder, one, two)


class TestOneRank:
    def test_result(self, trainings: Trainings) -> None:
        result = trainings.one["straight"].result

        assert (result["step"], result["total_steps"]) == (NUM_STEPS, NUM_STEPS)
        assert result["export"] == str(trainings.folder / "straight" / "export")
        assert list(result["metrics"]) == [
            "validation_loss",
            "validation_masked_accuracy",
            "validation_commonest_bin_accuracy",
        ]
        assert len(trainings.lines("straight")) == NUM_STEPS

    def test_equals_plain_pytorch(self, trainings: Trainings) -> None:
        losses, norms, weights = plain_training(trainings.config("straight"))

        np.testing.assert_allclose(trainings.series("straight", "loss"), losses, rtol=1e-6)
        np.testing.assert_allclose(trainings.series("straight", "gradient_norm"), norms, rtol=1e-6)
        # Worst: losses and norms 1.1e-7 relative, weights 1.2e-7 after 8 steps.
        assert largest_difference(trainings.export("straight"), weights) < 2e-6

    def test_a_cell_without_expressed_genes_does_no_harm(self, trainings: Trainings) -> None:
        trained_on = [p for _, batch in trainings.one["straight"].positions for p in batch]

        assert trained_on.count(EMPTY_CELL) == 2
        assert np.isfinite(trainings.series("straight", "loss")).all()
        assert all(bool(w.isfinite().all()) for w in trainings.export("straight").values())

    def test_stopping_and_continuing_changes_nothing(self, trainings: Trainings) -> None:
        stopped, continued = trainings.one["stopped"].result, trainings.one["continued"].result

        assert (stopped["step"], stopped["export"]) == (3, None)
        assert continued["step"] == NUM_STEPS
        assert continued["run_id"] == stopped["run_id"] is not None
        for metric in ("loss", "gradient_norm", "learning_rate", "masked_accuracy", "epoch"):
            resumed, straight = (trainings.series(n, metric) for n in ("stopped", "straight"))
            np.testing.assert_array_equal(resumed, straight)
        one, other = trainings.export("stopped"), trainings.export("straight")
        assert set(one) == set(other)
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert continued["metrics"] == trainings.one["straight"].result["metrics"]

    def test_starting_a_finished_training_again_only_exports(self, trainings: Trainings) -> None:
        continued, again = trainings.one["continued"], trainings.one["again"]

        assert again.positions == []
        assert again.result == continued.result
        assert again.weights_digest == continued.weights_digest

    @pytest.mark.parametrize(
        ("name", "field"),
        [
            ("other store", "store_id = "),
            ("other seed", "seed = 0, now it is 1"),
            ("other encoder", "encoder.depth = 2, now it is 1"),
            ("other cells", "data.where = {}, now it is {'side': ['even']}"),
            ("other vectors", "gene2vec.vectors = "),
        ],
    )
    def test_checkpoint_of_another_training_is_refused(
        self, name: str, field: str, trainings: Trainings
    ) -> None:
        error = trainings.one[name].error

        assert error.startswith("CheckpointMismatchError: ")
        assert f"step_00000003 was trained with {field}" in error

    def test_gene_vectors_stay_and_the_export_says_where_they_come_from(
        self, trainings: Trainings
    ) -> None:
        matrix = np.load(trainings.folder / "vectors_0" / "genes.npy")
        table = trainings.export("vectors")["encoder.genes.weight"].numpy()
        np.testing.assert_array_equal(table[:30], matrix)
        assert not table[30:].any()
        provenance = read_export(trainings.folder / "vectors" / "export").metadata["provenance"]
        digest = file_digest(trainings.folder / "vectors_0" / "genes.npy")
        said = provenance["gene_vectors"]
        assert (said["method"], said["sha256"]) == ("at random", digest)
        assert said["genes_of_panel_without"] == 2
        straight = read_export(trainings.folder / "straight" / "export").metadata["provenance"]
        assert straight["gene_vectors"] is None

    def test_only_chosen_cells_are_trained_on(self, trainings: Trainings) -> None:
        seen = Counter(p for _, batch in trainings.one["chosen"].positions for p in batch)

        assert seen == dict.fromkeys(range(16, NUM_CELLS, 2), 2)
        assert trainings.one["chosen"].result["total_steps"] == 4
        params = self.params(trainings, "chosen")
        assert (params["training_cells"], params["held_out_cells"]) == ("24", "8")
        assert params["data.where"] == "{'side': ['even']}"

    @staticmethod
    def params(trainings: Trainings, name: str) -> dict[str, str]:
        from mlflow import MlflowClient

        uri = f"sqlite:///{trainings.folder / 'mlflow.db'}"
        run = MlflowClient(uri).get_run(trainings.one[name].result["run_id"])
        return dict(run.data.params)

    def test_groups_are_trained_on_by_their_weights(self, trainings: Trainings) -> None:
        for epoch in (0, 1):
            # With weights, masks are drawn anew at each step, of which an epoch has four.
            seen = [
                p
                for step, batch in trainings.one["weighted"].positions
                for p in batch
                if step // 4 == epoch
            ]
            # 24 even and 25 odd cells are left; odd ones are seen twice as often.
            assert Counter(position % 2 for position in seen) == {0: 16, 1: 33}

    def test_max_steps_and_no_held_out_cells(self, trainings: Trainings) -> None:
        result = trainings.one["short"].result

        assert (result["step"], result["total_steps"], result["metrics"]) == (2, 2, {})
        assert (Path(result["export"]) / "model.safetensors").exists()

    @pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
    def test_every_zero_stage_trains_alike(self, name: str, trainings: Trainings) -> None:
        assert trainings.one[name].error == ""
        for metric in ("loss", "gradient_norm"):
            one, other = (trainings.series(n, metric) for n in (name, "straight"))
            np.testing.assert_allclose(one, other, rtol=1e-6)  # worst 6.4e-8 (norm, ZeRO 3)
        difference = largest_difference(trainings.export(name), trainings.export("straight"))
        assert difference < 2e-6  # worst 0

    def test_bf16_trains_nearly_alike(self, trainings: Trainings) -> None:
        one, other = trainings.series("bf16", "loss"), trainings.series("straight", "loss")[:2]

        np.testing.assert_allclose(one, other, rtol=0.01)  # worst 1.5e-3

    def test_checkpoints_are_published_and_pruned(self, trainings: Trainings) -> None:
        folder = trainings.folder / "stopped" / "checkpoints"

        assert json.loads((folder / "latest").read_text()) == "step_00000008"
        assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000004", "step_00000008"]


class TestExportOfCheckpoints:
    @pytest.mark.parametrize("name", ["straight", "zero3", "two_zero3"])
    def test_is_what_the_training_exported(self, name: str, trainings: Trainings) -> None:
        checkpoint = find_checkpoint(trainings.folder / name)
        assert checkpoint.name == "step_00000008"
        output = trainings.folder / "exports" / name
        export_checkpoint(checkpoint, output)

        made, expected = (
            read_export(folder, "encoder")
            for folder in (output, trainings.folder / name / "export")
        )
        assert set(made.weights) == set(expected.weights)
        assert all(torch.equal(made.weights[n], value) for n, value in expected.weights.items())
        assert made.panel == expected.panel
        assert made.encoder_config == expected.encoder_config
        assert made.metadata["provenance"]["step"] == NUM_STEPS

    def test_best_and_earlier_ones(self, trainings: Trainings) -> None:
        folder = trainings.folder / "straight"
        lines = trainings.lines("straight")
        best = min((4, 8), key=lambda step: lines[step]["validation_loss"])

        assert find_checkpoint(folder, best=True).name == f"step_{best:08d}"
        earlier = folder / "checkpoints" / "step_00000004"
        assert find_checkpoint(earlier) == earlier
        with pytest.raises(ValueError, match="nothing was held out; omit --best"):
            find_checkpoint(trainings.folder / "short", best=True)

    def test_other_genes_and_damage_are_refused(self, trainings: Trainings, tmp_path: Path) -> None:
        checkpoint = find_checkpoint(trainings.folder / "straight")
        write_panel(GenePanel(tuple(reversed(tiny_panel().names))), tmp_path / "genes.txt")
        with pytest.raises(ValueError, match=r"genes\.txt does not name the genes, in order"):
            export_checkpoint(checkpoint, tmp_path / "export", tmp_path / "genes.txt")
        alone = shutil.copytree(checkpoint, tmp_path / "moved" / checkpoint.name)
        with pytest.raises(FileNotFoundError, match=r"name the store's: --genes STORE/genes\.txt"):
            export_checkpoint(alone, tmp_path / "export")
        piece = next(alone.glob("*.safetensors"))
        piece.write_bytes(piece.read_bytes()[:-1] + b"?")
        with pytest.raises(ValueError, match=r"cannot be exported: .* is damaged"):
            find_checkpoint(alone)
        assert not (tmp_path / "export").exists()


class TestTwoRanks:
    def test_weights_and_projections_are_equal_on_all_ranks(self, trainings: Trainings) -> None:
        for name in ("two", "two_zero3", "two_continued"):
            digests = {rank[name].weights_digest for rank in trainings.two}
            assert len(digests) == 1
            assert digests != {""}

    def test_results_are_equal_but_for_the_run(self, trainings: Trainings) -> None:
        first, second = (rank["two"].result for rank in trainings.two)

        assert first["run_id"] is not None
        assert second == {**first, "run_id": None}

    @pytest.mark.parametrize("name", ["two", "two_zero3"])
    def test_every_cell_is_seen_once_an_epoch(self, name: str, trainings: Trainings) -> None:
        for epoch in (0, 1):
            seen = [
                position
                for rank in trainings.two
                for e, batch in rank[name].positions
                for position in batch
                if e == epoch
            ]
            assert sorted(seen) == list(range(HELD_OUT, NUM_CELLS))

    def test_last_batch_leaves_a_rank_without_cells(self, trainings: Trainings) -> None:
        shares = [[len(batch) for _, batch in rank["two"].positions] for rank in trainings.two]

        # 16 a step: 2 micro-batches of 4 on each rank, three times, then the 49th cell.
        assert shares[0] == [4, 4, 4, 4, 4, 4, 1, 0] * 2
        assert shares[1] == [4, 4, 4, 4, 4, 4, 0, 0] * 2

    @pytest.mark.parametrize("name", ["two", "two_zero3"])
    def test_two_ranks_train_as_one_does(self, name: str, trainings: Trainings) -> None:
        for metric in ("loss", "gradient_norm"):
            two, one = (trainings.series(n, metric) for n in (name, "straight"))
            np.testing.assert_allclose(two, one, rtol=1e-6)  # worst 1.0e-7
        difference = largest_difference(trainings.export(name), trainings.export("straight"))
        assert difference < 2e-6  # worst 1.2e-7

    def test_a_weighted_training_continues_on_two_ranks(self, trainings: Trainings) -> None:
        one, two = (trainings.series(n, "loss") for n in ("weighted", "weighted_stopped"))
        np.testing.assert_allclose(two, one, rtol=1e-6)  # worst 6.2e-8
        assert trainings.two[0]["weighted_on_two"].result["step"] == NUM_STEPS
        before = [p for _, batch in trainings.one["weighted_stopped"].positions for p in batch]
        after = [
            p
            for rank in trainings.two
            for _, batch in rank["weighted_on_two"].positions
            for p in batch
        ]
        everything = [p for _, batch in trainings.one["weighted"].positions for p in batch]
        assert sorted([*before, *after]) == sorted(everything)

    def test_bf16_starts_alike_under_zero_1_and_3_and_stays_near(
        self, trainings: Trainings
    ) -> None:
        one, three = (trainings.series(f"two_bf16_zero{n}", "loss") for n in (1, 3))

        assert len(one) == 4
        assert three[0] == pytest.approx(one[0], rel=1e-6)
        np.testing.assert_allclose(three, one, rtol=1e-3)  # measured: 1.8e-4 after four steps

    def test_held_out_metrics_are_those_of_one_rank(self, trainings: Trainings) -> None:
        for step in (4, 8):
            two, one = (trainings.lines(name)[step] for name in ("two", "straight"))
            for metric in trainings.one["straight"].result["metrics"]:
                assert two[metric] == pytest.approx(one[metric], rel=1e-6)  # worst 2.4e-8

    def test_stopping_and_continuing_changes_nothing(self, trainings: Trainings) -> None:
        resumed, straight = (trainings.series(n, "loss") for n in ("two_stopped", "two"))

        np.testing.assert_array_equal(resumed, straight)
        one, other = trainings.export("two_stopped"), trainings.export("two")
        assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_two_ranks_continue_what_one_began_under_another_stage(
        self, trainings: Trainings
    ) -> None:
        continues_as_if_nothing_had_happened("grown", trainings.two, trainings)


def continues_as_if_nothing_had_happened(
    run: str, ranks: list[dict[str, Outcome]], trainings: Trainings
) -> None:
    """Compare a run that moved elsewhere after 3 steps with the one that was never stopped."""
    assert {rank[run].error for rank in ranks} == {""}
    for metric in ("loss", "gradient_norm", "learning_rate"):
        continued, straight = (trainings.series(n, metric) for n in (run, "straight"))
        np.testing.assert_allclose(continued, straight, rtol=1e-6)
    difference = largest_difference(trainings.export(run), trainings.export("straight"))
    assert difference < 2e-6
    seen = cells_of_steps([rank[run] for rank in ranks])
    assert seen == cells_of_steps([trainings.one["straight"]])[-len(seen) :]
    assert len(seen) == NUM_STEPS - 3


def cells_of_steps(ranks: list[Outcome]) -> list[list[int]]:
    """Store positions that all ranks trained on, step by step; a step has 4 micro-batches."""
    share = 4 // len(ranks)
    steps = len(ranks[0].positions) // share
    return [
        sorted(
            position
            for rank in ranks
            for _, batch in rank.positions[step * share : (step + 1) * share]
            for position in batch
        )
        for step in range(steps)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("began", "num_ranks"), [("stopped_at_3", 2), ("two_zero3_stopped", 1)])
def test_any_number_of_ranks_continues_under_any_stage(
    began: str, num_ranks: int, trainings: Trainings
) -> None:
    """One rank under ZeRO 1 → two under any stage; two under ZeRO 3 → one under any stage."""
    folder = trainings.folder
    stages = {f"zero{number}": zero_json(folder, number) for number in range(4)}
    stages["offload"] = zero_json(folder, 2, offload=True)
    runs = {f"{began}_{name}": path for name, path in stages.items()}
    for run in runs:
        shutil.copytree(folder / began, folder / run)
    configs = {
        run: tiny_config(folder / "store", folder / run, deepspeed=path)
        for run, path in runs.items()
    }
    ranks = run_ranks(train_each, num_ranks, folder, configs)
    for run in runs:
        continues_as_if_nothing_had_happened(run, ranks, trainings)


@pytest.mark.slow
def test_four_ranks_continue_what_two_began_and_two_what_four_began(trainings: Trainings) -> None:
    """Two ranks under ZeRO 3 → four under 1; four under 1 → two under 3, and the reverse."""
    folder = trainings.folder

    def config(run: str, stage: int, **changes: Any) -> PretrainConfig:
        path = zero_json(folder, stage)
        return tiny_config(folder / "store", folder / run, deepspeed=path, **changes)

    shutil.copytree(folder / "two_zero3_stopped", folder / "two_to_four")
    four = run_ranks(
        train_each,
        4,
        folder,
        {
            "two_to_four": config("two_to_four", 1),
            "four_zero1": config("four_zero1", 1, stop_after=3),
            "four_zero3": config("four_zero3", 3, stop_after=3),
        },
    )
    two = run_ranks(
        train_each, 2, folder, {f"four_zero{n}": config(f"four_zero{n}", 4 - n) for n in (1, 3)}
    )
    continues_as_if_nothing_had_happened("two_to_four", four, trainings)
    for run in ("four_zero1", "four_zero3"):
        continues_as_if_nothing_had_happened(run, two, trainings)


def test_a_straggler_is_named_after_three_windows(caplog: pytest.LogCaptureFixture) -> None:
    window = Window(["n1", "n2", "n3"])
    for own in ([1.0, 1.0, 3.0], [1.0, 1.0, 3.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.9]):
        window.look_for_straggler(own)
    assert not caplog.records
    for _ in range(5):
        window.look_for_straggler([1.0, 1.2, 3.0])
    assert [record.getMessage() for record in caplog.records] == [
        "rank 2 (n3) is a straggler: 3.00 s of its own work, the others' median 1.10 s"
    ]
