"""Heads: packed equals dense equals a cell alone; experts as a module equal the fitted maps."""

import numpy as np
import torch

from finetune.config import HeadConfig
from finetune.expert_pool import fit_pool
from finetune.expression import counts_per_10k
from finetune.heads import PooledHead, expression_logits
from tests.support.simulated import simulated_cells


def test_pooled_head_is_a_mean_and_an_attention_over_expressed_genes() -> None:
    torch.manual_seed(0)
    head = PooledHead(6, 9, 3, HeadConfig(kind="pooled", bottleneck=4)).eval()
    states = torch.randn(5, 9, 6)
    tokens = (torch.rand(5, 8) < 0.5).long()
    tokens[4] = 0  # a cell without counts keeps its constant position
    logits, embedding = head(states, tokens)
    for cell in range(5):
        shown = torch.cat([tokens[cell] > 0, torch.ones(1, dtype=torch.bool)])
        own = states[cell][shown]
        attention = head.query(own).softmax(dim=0)
        pooled = torch.cat([own.mean(dim=0), (attention * own).sum(dim=0)])
        expected = torch.relu(head.bottleneck(head.norm(pooled)))
        torch.testing.assert_close(embedding[cell], expected)
        torch.testing.assert_close(logits[cell], head.classes(expected))


def test_pooled_head_does_not_see_states_of_absent_genes() -> None:
    torch.manual_seed(0)
    head = PooledHead(6, 9, 3, HeadConfig(kind="pooled", bottleneck=4)).eval()
    states = torch.randn(2, 9, 6)
    tokens = torch.tensor([[1, 0, 2, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 3]])
    changed = states.clone()
    changed[:, :8][tokens == 0] = 100
    torch.testing.assert_close(head(states, tokens)[0], head(changed, tokens)[0])


def test_experts_as_a_module_give_the_pools_logits() -> None:
    counts, labels = simulated_cells((30, 20, 10))
    pool = fit_pool(counts, labels, seed=0)
    module = expression_logits(pool)
    rates = torch.from_numpy(counts_per_10k(counts).toarray())
    np.testing.assert_allclose(module(rates).numpy(), pool.predict(counts), rtol=1e-3, atol=1e-3)
