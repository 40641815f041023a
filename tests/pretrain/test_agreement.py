"""Ranks that no longer hold the same model are found, and the tensor and the rank are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.agreement import checksum, require_agreement
from pretrain.distributed import Ranks
from tests.support.ranks import run_ranks

P = 2**31 - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum_shows_any_flipped_bit_and_any_exchange(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(0, 2 if dtype == torch.bool else 100, (40, 50), generator=generator)
    value = value.to(dtype)
    changed, exchanged = value.clone(), value.clone()
    changed[20, 30] = ~changed[20, 30] if dtype == torch.bool else changed[20, 30] + 1
    exchanged[0, 0], exchanged[-1, -1] = 1, 0
    other = exchanged.clone()
    other[0, 0], other[-1, -1] = 0, 1

    assert checksum(value) == checksum(value.clone())
    assert checksum(value) != checksum(changed)
    assert checksum(exchanged) != checksum(other)


def test_checksum_is_the_sum_it_says() -> None:
    value = torch.tensor([3, 5, P + 7], dtype=torch.int64)
    assert int(checksum(value)) == (3 * 1 + 5 * 2 + 7 * 3) % P


def test_checksum_reads_what_lies_beyond_the_first_piece() -> None:
    value = torch.zeros(2**20 + 5)
    other = value.clone()
    other[-1] = 1e-30
    assert checksum(value) != checksum(other)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.projection: Tensor
        self.register_buffer("projection", torch.ones(4))


def disagree(ranks: Ranks) -> list[Any]:
    """Compare equal models, then with one changed weight, then with one changed projection."""
    found: list[Any] = []
    for changed in (None, "second", "projection"):
        torch.manual_seed(0)
        model = Pair()
        if ranks.rank == 2:
            with torch.no_grad():
                if changed == "second":
                    model.second.weight[1, 1] += 1e-7
                    model.projection[3] = 2  # comes later: the first that differs is named
                if changed == "projection":
                    model.projection[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        try:
            found.append(require_agreement(model, 7, ranks))
        except ValueError as error:
            found.append(str(error))
        except SystemExit as leaving:
            found.append(f"left with {leaving.code}")
    return found


@pytest.mark.multiprocess
def test_the_first_differing_tensor_and_the_odd_rank_are_named(tmp_path: Path) -> None:
    first, second, third = run_ranks(disagree, 3, tmp_path)

    assert first[0] == second[0] == third[0] == 3
    assert (
        "second.weight differs between ranks at step 7: rank 2 holds another than rank 0"
        in (first[1])
    )
    assert "projection differs between ranks at step 7: rank 2 holds another" in first[2]
    assert second[1:] == third[1:] == ["left with 2", "left with 2"]
