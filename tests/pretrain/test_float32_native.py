"""The float32 kernels against whole feature maps and plain layers in float64, build by build."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.favor import draw_projection, favor_attention
from pretrain.feed_forward_native import native_feed_forward, usable
from pretrain.float32_native import attend, feed_forward
from pretrain.native import supported_variants
from tests.support.native_builds import names, runnable
from tests.support.tiny import BINNING, NUM_GENES

EPSILON = 1e-3


@pytest.fixture(params=names("float32"))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


class Cells:
    """Seeded packed cells of some lengths, and their queries."""

    def __init__(
        self, lengths: list[int], queries: list[int] | None, heads: int, dim: int, features: int
    ) -> None:
        random = torch.Generator().manual_seed(0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.query_offsets = torch.tensor([0, *(queries or lengths)]).cumsum(0)
        num_keys, num_queries = int(self.offsets[-1]), int(self.query_offsets[-1])
        self.q = torch.randn(num_queries, heads, dim, generator=random)
        self.k = torch.randn(num_keys, heads, dim, generator=random)
        self.v = torch.randn(num_keys, heads, dim, generator=random)
        self.projection = draw_projection(features, dim, 0)

    def native(self, variant: str) -> Tensor:
        offsets = self.offsets, self.query_offsets
        return attend(self.q, self.k, self.v, self.projection, EPSILON, *offsets, variant)

    def exact(self) -> Tensor:
        return self._exact(*(x.double() for x in (self.q, self.k, self.v)))

    def gradients(self, variant: str) -> list[Tensor]:
        q, k, v = leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        offsets = self.offsets, self.query_offsets
        out = attend(q, k, v, self.projection, EPSILON, *offsets, variant)
        return self._gradients(out, leaves)

    def exact_gradients(self) -> list[Tensor]:
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        return self._gradients(self._exact(*leaves), leaves)

    def _exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offsets = self.offsets, self.query_offsets
        return favor_attention(
            q, k, v, self.projection, *offsets, kernel="reference", epsilon=EPSILON
        )

    def _gradients(self, out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(Cells([70], None, 2, 64, 266), id="published width"),
        pytest.param(Cells([33, 1, 300, 5], [5, 1, 0, 11], 3, 64, 266), id="chosen queries"),
        pytest.param(Cells([40, 9], None, 2, 8, 24), id="narrow heads"),
        pytest.param(Cells([100], None, 2, 33, 50), id="odd widths"),
        pytest.param(Cells([64, 128], None, 1, 128, 33), id="whole strips"),
        pytest.param(Cells([5_000], None, 1, 32, 110), id="long"),
    ],
)
def test_attention_is_the_formula(given: Cells, variant: str) -> None:
    assert error(given.native(variant), given.exact()) < 5e-6  # worst seen 1e-6
    for found, exact in zip(given.gradients(variant), given.exact_gradients(), strict=True):
        assert error(found, exact) < 5e-6


@functools.cache
def long_cell() -> tuple[Cells, Tensor, list[Tensor]]:
    given = Cells([100_000], None, 1, 16, 40)
    return given, given.exact(), given.exact_gradients()


def test_a_long_cell_keeps_its_digits(variant: str) -> None:
    given, exact, exact_gradients = long_cell()
    assert error(given.native(variant), exact) < 5e-6  # worst 1.4e-6
    for found, right in zip(given.gradients(variant), exact_gradients, strict=True):
        assert error(found, right) < 5e-6  # worst 1.2e-6


def test_extreme_exponents_stay_right(variant: str) -> None:
    given = Cells([400], None, 2, 64, 266)
    given.q, given.k = (50 * x / x.norm(dim=-1, keepdim=True) for x in (given.q, given.k))
    # Exponents reach some 150 and |k|²/2 is 156: float32 keeps five digits of them.
    assert error(given.native(variant), given.exact()) < 5e-5  # worst 1.2e-5
    for found, exact in zip(given.gradients(variant), given.exact_gradients(), strict=True):
        assert error(found, exact) < 5e-5  # worst 1e-5
    # Small keys have the larger exponents: the running maximum rises again and again.
    given = Cells([700], None, 1, 8, 24)
    given.k *= torch.linspace(6, 0.1, 700)[:, None, None]
    assert error(given.native(variant), given.exact()) < 1e-5
    for found, exact in zip(given.gradients(variant), given.exact_gradients(), strict=True):
        assert error(found, exact) < 1e-5


def test_tiny_gradients_vanish_and_the_caller_keeps_tiny_numbers(variant: str) -> None:
    given = Cells([70], None, 2, 16, 20)
    q, k, v = leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
    offsets = given.offsets, given.query_offsets
    out = attend(q, k, v, given.projection, EPSILON, *offsets, variant)
    gradients = torch.autograd.grad(out, leaves, torch.full_like(out, 1e-40))

    assert not any(bool(gradient.any()) for gradient in gradients)  # exact ones are below 1e-38
    assert float(torch.tensor(1e-40) * 2) == pytest.approx(2e-40, rel=1e-4)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_a_number_is_not_hidden(name: str, variant: str) -> None:
    given = Cells([100, 70], None, 1, 8, 24)
    getattr(given, name)[120, 0, 3] = torch.nan
    found = given.native(variant)
    assert bool(found[:100].isfinite().all())
    assert bool(found[120].isnan().any())


def test_a_cell_does_not_depend_on_its_mates_nor_on_threads(variant: str) -> None:
    together = Cells([50, 300, 7], [50, 3, 7], 3, 64, 266)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append([together.native(variant), *together.gradients(variant)])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    alone = Cells([300], [3], 3, 64, 266)
    alone.q, alone.k, alone.v = together.q[50:53], together.k[50:350], together.v[50:350]
    assert torch.equal(alone.native(variant), results[0][0][50:53])
    alone.k, alone.v = (torch.stack([x, x], 1)[:, 1] for x in (alone.k, alone.v))
    assert not alone.k.is_contiguous()
    assert torch.equal(alone.native(variant), results[0][0][50:53])


@pytest.mark.parametrize("shape", [(70, 64, 256), (1, 200, 800), (130, 33, 50)])
def test_feed_forward_is_that_of_the_layers(shape: tuple[int, int, int], variant: str) -> None:
    rows, width, hidden = shape
    torch.manual_seed(0)
    norm, inner, outer = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 * torch.randn(rows, width) + 1
    wide = [copy.deepcopy(layer).double() for layer in (norm, inner, outer)]
    with torch.no_grad():
        found = feed_forward(x, norm, inner, outer, variant)
        hidden_units = nn.functional.gelu(wide[1](wide[0](x.double())))
        exact = x.double() + wide[2](hidden_units)
        assert error(found, exact) < 2e-6  # worst seen 4e-7
        assert torch.equal(feed_forward(x[-1:], norm, inner, outer, variant), found[-1:])


def test_cells_of_rows_are_rows(variant: str) -> None:
    norm, inner, outer = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    x = torch.randn(3, 20, 16, generator=_seeded())
    found = feed_forward(x, norm, inner, outer, variant)
    rows = feed_forward(x.flatten(0, 1), norm, inner, outer, variant)

    assert found.shape == x.shape
    assert torch.equal(found.flatten(0, 1), rows)
    with pytest.raises(ValueError, match=r"outer.weight is \(32, 16\); rows of 16"):
        feed_forward(x, norm, inner, inner, variant)
    with pytest.raises(ValueError, match="takes rows and weights of float32 alone"):
        feed_forward(x, norm, inner, outer.bfloat16(), variant)


def test_gradients_of_any_weight_are_not_lost() -> None:
    norm, inner, outer = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
    inner.weight.requires_grad_(False)
    assert usable(torch.ones(5, 16), "auto", inner.weight) is bool(supported_variants("float32"))

    native_feed_forward(torch.ones(5, 16), norm, inner, outer).sum().backward()

    assert outer.bias.grad is not None
    assert outer.bias.grad.tolist() == [5] * 16


@pytest.mark.skipif(not supported_variants("float32"), reason="this CPU cannot run the kernels")
class TestChoice:
    def test_auto_is_native(self) -> None:
        given = Cells([40, 30], None, 2, 64, 266)
        arguments = given.q, given.k, given.v, given.projection, given.offsets
        expected = given.native(supported_variants("float32")[0])
        for name in ("auto", "native"):
            found = favor_attention(*arguments, kernel=name, epsilon=EPSILON)
            assert torch.equal(found, expected)
        q, k, v = (x.double() for x in arguments[:3])
        with pytest.raises(ValueError, match="takes bfloat16 or float32, not float64"):
            favor_attention(q, k, v, given.projection, given.offsets, kernel="native")

    def test_an_encoder_gives_the_same_states(self) -> None:
        states = {}
        for kernel in ("auto", "torch"):
            config = EncoderConfig(dim=48, depth=2, heads=2, dim_head=24, kernel=kernel)
            encoder = build_encoder(config, BINNING, NUM_GENES, seed=0).eval()
            layer = encoder.performer.net.layers[0][1]
            with torch.no_grad():
                assert usable(torch.ones(1, 48), kernel, layer.norm.weight) is (kernel == "auto")
                states[kernel] = encoder(torch.randint(5, (3, NUM_GENES), generator=_seeded()))
            assert not usable(torch.ones(1, 48), kernel, layer.norm.weight)
        assert error(states["auto"], states["torch"].double()) < 1e-5
        assert not torch.equal(states["auto"], states["torch"])


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
