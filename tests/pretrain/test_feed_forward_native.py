"""The native feed-forward against the plain layers in float64, build by build."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pretrain import block, feed_forward_native
from pretrain.block import build_blocks
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.feed_forward_native import native_feed_forward, usable
from pretrain.native import supported_variants
from tests.support.native_builds import names, runnable
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

BF16 = torch.bfloat16


@pytest.fixture(params=names("bf16"))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


class Layers(nn.Module):
    """Seeded bf16 layers, rows and a gradient."""

    def __init__(self, rows: int, width: int, hidden: int, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, hidden)
            self.outer = nn.Linear(hidden, width)
            nn.init.normal_(self.norm.weight, 1.0, 0.2)
            nn.init.normal_(self.norm.bias, 0.0, 0.2)
            self.to(BF16)
            self.x = (2 * torch.randn(rows, width) + 0.3).to(BF16).to(dtype)
            self.grad = torch.randn(rows, width).to(BF16).to(dtype)

    def native(self, variant: str) -> list[Tensor]:
        """Output, and gradients of the rows and of all weights."""
        x = self.x.clone().requires_grad_()
        is_wide = x.dtype == torch.float32  # as under autocast, where products are of bf16
        with torch.autocast("cpu", BF16, enabled=is_wide):
            out = native_feed_forward(x, self.norm, self.inner, self.outer, variant)
        return self._with_gradients(x, out)

    def exact(self) -> list[Tensor]:
        wide = copy.deepcopy(self).double()
        x = self.x.double().requires_grad_()
        out = x + wide.outer(nn.functional.gelu(wide.inner(wide.norm(x))))
        return wide._with_gradients(x, out)

    def _with_gradients(self, x: Tensor, out: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(out, [x, *self.parameters()], self.grad.to(out.dtype))
        return [out.detach(), *gradients]


def relative(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize(
    ("rows", "width", "hidden"),
    [
        pytest.param(300, 200, 800, id="published width"),
        pytest.param(1, 16, 32, id="one row"),
        pytest.param(333, 37, 75, id="odd widths"),
        pytest.param(70, 8, 3, id="narrower than a vector"),
        pytest.param(1300, 64, 256, id="two spans of rows"),
        pytest.param(257, 40, 161, id="one row and one unit over"),
    ],
)
def test_equals_the_plain_layers(rows: int, width: int, hidden: int, variant: str) -> None:
    layers = Layers(rows, width, hidden)

    assert max(relative(layers.native(variant), layers.exact())) < 0.006  # worst 4.3e-3


def test_float32_rows_keep_their_digits(variant: str) -> None:
    layers = Layers(100, 64, 256, torch.float32)
    layers.x += 1e-3 * layers.x.sin()
    ours, exact = layers.native(variant), layers.exact()

    assert ours[0].dtype == torch.float32
    assert max(relative(ours[:2], exact[:2])) < 6e-4  # worst 2.4e-4
    assert max(relative(ours, exact)) < 0.006


def test_neither_threads_nor_other_rows_matter(variant: str) -> None:
    # Large enough that runs differ if spans are not added in their order.
    layers = Layers(8192, 64, 256)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, *(5,) * 6):
            torch.set_num_threads(number)
            results.append(layers.native(variant))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))

    layers.x, layers.grad = layers.x[1000:1037], layers.grad[1000:1037]
    for together, alone in zip(results[0][:2], layers.native(variant)[:2], strict=True):
        assert torch.equal(together[1000:1037], alone)


def test_extreme_rows(variant: str) -> None:
    layers = Layers(4, 32, 64)
    layers.x = torch.stack(
        [torch.zeros(32), torch.ones(32), *(s * layers.x[0] for s in (1e4, 1e30))]
    )
    layers.x = layers.x.to(BF16)
    with torch.no_grad():
        layers.inner.weight *= 1e3  # GELU is 0 or the identity
    ours, exact = layers.native(variant), layers.exact()

    assert all(bool(x.isfinite().all()) for x in ours)
    assert max(relative(ours[:1], exact[:1])) < 0.01


def test_no_rows(variant: str) -> None:
    layers = Layers(0, 16, 32)
    out, _, *weights = layers.native(variant)

    assert out.shape == (0, 16)
    assert not any(bool(gradient.any()) for gradient in weights)


def test_strided_rows_and_gradients(variant: str) -> None:
    layers = Layers(50, 32, 64)
    expected = layers.native(variant)
    layers.x, layers.grad = (x.t().contiguous().t() for x in (layers.x, layers.grad))

    assert all(torch.equal(a, b) for a, b in zip(layers.native(variant), expected, strict=True))


def test_cells_of_rows_are_rows(variant: str) -> None:
    layers = Layers(60, 32, 64)
    expected = layers.native(variant)
    layers.x, layers.grad = (x.view(3, 20, 32) for x in (layers.x, layers.grad))
    out, grad_x, *weights = layers.native(variant)

    assert out.shape == grad_x.shape == (3, 20, 32)
    found = [out.flatten(0, 1), grad_x.flatten(0, 1), *weights]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
class TestWhatDoesNotFit:
    """It is refused by name: a kernel would read what lies beyond, or nowhere."""

    @pytest.fixture
    def layers(self, dtype: torch.dtype) -> Layers:
        return Layers(5, 16, 32).to(dtype).requires_grad_(False)

    @staticmethod
    def refused(layers: Layers, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            native_feed_forward(layers.x, layers.norm, layers.inner, layers.outer)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("norm.weight", (15,)),
            ("norm.bias", (17,)),
            ("inner.weight", (32, 17)),
            ("inner.bias", (31,)),
            ("outer.weight", (16, 31)),
            ("outer.bias", (15,)),
        ],
    )
    def test_weights(self, name: str, shape: tuple[int, ...], layers: Layers) -> None:
        layer, _, field = name.partition(".")
        layers.x = layers.x.to(layers.norm.weight.dtype)
        whole = getattr(layers.get_submodule(layer), field)
        changes: dict[str, nn.Parameter | None] = {
            f"^{name} is on meta": nn.Parameter(whole.to("meta")),
            rf"^{name} is \({', '.join(map(str, shape))}": nn.Parameter(whole.new_zeros(shape)),
        }
        if field == "bias":  # layers can be built without
            changes[f"^{name} is missing"] = None
        for told, changed in changes.items():
            setattr(layers.get_submodule(layer), field, changed)
            self.refused(layers, told)

    def test_rows(self, layers: Layers, dtype: torch.dtype) -> None:
        for x, told in (
            (torch.zeros(5, 17, dtype=dtype), r"norm.weight is \(16,\); rows of 17"),
            (torch.zeros(5, 16, dtype=dtype, device="meta"), "^x is on meta"),
            (torch.zeros(5, 16, dtype=torch.float64), "^x is float64"),
            (torch.zeros((), dtype=dtype), "^x is a single number"),
        ):
            layers.x = x
            self.refused(layers, told)


@pytest.mark.skipif(not supported_variants(), reason="this CPU cannot run the kernel")
class TestChoice:
    @staticmethod
    def layer(kernel: str) -> nn.Module:
        config = EncoderConfig(dim=16, depth=1, heads=2, dim_head=8, kernel=kernel)  # type: ignore[arg-type]
        built: nn.Module = build_blocks(config).net.layers[0][1]
        return built

    @pytest.mark.parametrize("kernel", ["auto", "native", "torch"])
    def test_blocks_take_it_for_bfloat16(
        self, kernel: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Tensor] = []

        def noted(x: Tensor, *layers: nn.Module) -> Tensor:
            calls.append(x)
            return native_feed_forward(x, *layers)  # type: ignore[arg-type]

        monkeypatch.setattr(block, "native_feed_forward", noted)
        layer, x = self.layer(kernel), torch.randn(5, 16)
        with torch.autocast("cpu", BF16):
            mixed = layer(x)
        plain, narrow = layer(x), layer.to(BF16)(x.to(BF16))

        assert len(calls) == (0 if kernel == "torch" else 2)
        assert mixed.dtype == torch.float32
        for other in (mixed, narrow):
            torch.testing.assert_close(other.float(), plain, rtol=0.02, atol=0.02)

    def test_other_types_and_machines_take_the_plain_layers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, weight = torch.zeros(3, 16, dtype=BF16), torch.zeros(2, dtype=BF16)

        assert usable(x, "auto", weight)
        assert not usable(x.float(), "auto", weight)
        assert not usable(x, "reference", weight)
        assert not usable(x.to("meta"), "auto", weight)
        assert not usable(x, "auto", weight, weight.to("meta"))
        with torch.autocast("cpu", torch.float16):
            assert not usable(x, "auto", weight)
        monkeypatch.setattr(feed_forward_native, "missing", lambda: "there is no C++ compiler")
        assert not usable(x, "auto", weight)

    def test_checkpointed_blocks_give_the_same_bits(self) -> None:
        results = []
        for checkpointing in (False, True):
            config = replace(ENCODER, checkpointing=checkpointing)
            encoder = build_encoder(config, BINNING, NUM_GENES, seed=0).to(BF16)
            tokens = torch.arange(4 * NUM_GENES).view(4, NUM_GENES) % BINNING.num_tokens
            states = encoder(tokens, torch.tensor([0, 5, 70]))
            states.float().square().sum().backward()
            weights = encoder.named_parameters()
            results.append(
                {"": states} | {name: w.grad for name, w in weights if w.grad is not None}
            )

        plain, again = results
        assert set(plain) == set(again)
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        assert "performer.net.layers.0.1.fn.fn.w1.weight" in plain
