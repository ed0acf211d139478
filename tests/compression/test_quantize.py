"""Whole numbers, their ranges, and that what is served is what was trained."""

import numpy as np
import pytest
import torch
from conftest import lm_loss

from mini import GPT, Bert, ModelConfig
from mini.compression import quantize
from mini.compression.activations import Examples
from mini.compression.quantize import QuantConfig
from mini.errors import UserError
from mini.model import int8
from mini.presets import ENCODER, MODERN
from mini.tasks.base import Batch
from mini.tensors import weights

SIZE = dict(n_layers=2, n_heads=4, d_model=32, max_len=16, vocab_size=60)
WAYS = [dict(SIZE), dict(SIZE, **MODERN), dict(SIZE, **ENCODER, norm_place="post", mlm=True, nsp=True)]
SCHEMES = [QuantConfig("dynamic"), QuantConfig("static")]


def make(settings: dict) -> GPT | Bert:
    torch.manual_seed(0)
    model = (GPT if settings.get("causal", True) else Bert)(ModelConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Task:
    def loss(self, model, inputs):
        hidden = model.stack(inputs["tokens"], real=inputs["real"])
        if model.kind == "gpt":
            return {"loss": model.logits(hidden).sum()}
        return {"loss": model.mlm(hidden[:, :3]).sum() + model.nsp(model.pool(hidden)).sum()}


def batches(width: int = 12, filling: int = 7) -> list[Batch]:
    lengths = torch.tensor([12, 9, 5, 7])
    real = torch.arange(width) < lengths[:, None]
    tokens = torch.full((4, width), filling)
    tokens[:, :12] = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(1))
    tokens[~real] = filling
    return [Batch({"tokens": tokens, "real": real}, {}, 0)]


def ready(settings: dict, config: QuantConfig) -> GPT | Bert:
    model = make(settings)
    ranges = (
        {} if config.scheme == "dynamic" else quantize.calibrate(model, config.observer, Examples(Task(), batches()))
    )
    return int8.prepare(model, ranges)


def run(model) -> torch.Tensor:
    return model.stack(batches()[0].inputs["tokens"])


def test_gradient_is_straight_inside_and_zero_outside():
    x = torch.tensor([-300.0, -126.6, 0.2, 100.4, 127.4, 500.0], requires_grad=True)
    q = int8.quantize(x, torch.tensor(1.0))
    q.sum().backward()
    assert q.tolist() == [-127, -127, 0, 100, 127, 127] and x.grad.tolist() == [0, 1, 1, 1, 0, 0]
    with torch.no_grad():
        assert torch.equal(int8.quantize(x, torch.tensor(1.0)), q)


def test_the_largest_value_of_a_row_learns():
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    int8.quantize(weight, int8.row_scales(weight)).sum().backward()
    assert bool((weight.grad != 0).all())


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.5, 3.0), (-2.0, -1.0), (0.0, 0.0), (-0.01, 5.0)])
def test_affine_covers_its_range_and_zero_is_exact(low, high):
    scale, zero = int8.affine(torch.tensor(low), torch.tensor(high))
    x = torch.linspace(min(low, 0), max(high, 0), 1001)
    q = int8.quantize(x, scale, zero, low=-128)
    assert q.min() >= -128 and q.max() <= 127 and zero == zero.round()
    assert ((q - zero) * scale - x).abs().max() <= 0.51 * scale + 1e-7
    assert float((int8.quantize(torch.zeros(1), scale, zero, low=-128) - zero) * scale) == 0


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_sums_of_whole_numbers_stay_within_float16(scheme):
    """768 products of 127 by 127 are 189 times its largest number."""
    torch.manual_seed(0)
    source = int8.DynamicInput() if scheme == "dynamic" else int8.StaticInput(0.0, 1.0)
    x, weight = torch.ones(2, 768), torch.nn.Parameter(torch.full((8, 768), 0.1))
    layer = int8.FakeQuantLinear(weight, None, source, [8])
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(layer(x), torch.full((2, 8), 76.8), rtol=2e-3, atol=0)
        whole = torch.full((2, 768), 127.0)
        product = int8.whole_product(whole, torch.full((8, 768), 127.0))
    torch.testing.assert_close(product, torch.full((2, 8), 127.0 * 127 * 768), rtol=1e-3, atol=0)


def test_gradients_of_float16_bear_the_scale_of_other_layers():
    torch.manual_seed(0)
    plain = torch.nn.Linear(384, 384, bias=False)
    torch.nn.init.normal_(plain.weight, std=0.05)
    layers = [plain, int8.FakeQuantLinear(plain.weight, None, int8.DynamicInput(), [384])]
    x = 2 * torch.randn(64, 384)

    def largest(layer) -> int:
        for power in range(30):
            with torch.autocast("cpu", torch.float16):
                inputs = x.clone().requires_grad_()
                loss = layer(inputs).float().square().sum() * 2.0**power
            if not all(g.isfinite().all() for g in torch.autograd.grad(loss, [inputs, plain.weight])):
                break
        return power

    assert largest(layers[1]) >= largest(plain)


def test_row_scales():
    weight = torch.tensor([[1.0, -254.0], [0.0, 0.0]])
    assert int8.row_scales(weight).flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("config", SCHEMES)
def test_served_equals_trained(settings, config):
    model = ready(settings, config)
    with torch.no_grad():
        expected = run(model)
        served = int8.convert(model)
        torch.testing.assert_close(run(served), expected, atol=1e-4, rtol=1e-4)
    exact = run(make(settings))
    error = (expected - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    assert all(layer.weight.dtype == torch.int8 for layer in int8.matrices(served, int8.Int8).values())
    assert len(int8.matrices(served, int8.Int8)) > 8 and not int8.matrices(served, int8.FakeQuantLinear)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_served_equals_trained_in_bfloat16(scheme):
    """Under the loop's autocast a layer's whole numbers stay exact: only its sums are rounded, as any others are."""
    torch.manual_seed(0)
    x = torch.randn(64, 256).relu().square()
    weight, bias = torch.nn.Parameter(0.02 * torch.randn(96, 256) + 0.01), torch.nn.Parameter(torch.randn(96))
    input = int8.StaticInput(0.0, float(x.max())) if scheme == "static" else int8.DynamicInput()
    layer = int8.FakeQuantLinear(weight, bias, input, [len(weight)])
    scale = int8.row_scales(weight)
    with torch.no_grad():
        whole = torch.nn.Parameter(int8.quantize(weight, scale).to(torch.int8), requires_grad=False)
        served = int8.Int8Linear(whole, scale[:, 0], layer)(x)
        with torch.autocast("cpu", torch.bfloat16):
            trained = layer(x)
    assert (trained - served).norm() < 0.003 * served.norm()


@pytest.mark.parametrize("config", SCHEMES)
def test_hardware_and_fallback_agree(config, monkeypatch):
    model = int8.convert(ready(WAYS[2], config))
    with torch.no_grad():
        fast = run(model)
        monkeypatch.setattr(int8, "int8_units", lambda device: False)
        torch.testing.assert_close(run(model), fast, atol=1e-4, rtol=1e-4)


def test_int8_matmul_is_exact():
    g = torch.Generator().manual_seed(0)
    for M in (1, 5, 40):
        a = torch.randint(-128, 128, (M, 64), generator=g)
        b = torch.randint(-128, 128, (24, 64), generator=g)
        assert torch.equal(int8.int8_matmul(a.float(), b.to(torch.int8)).long(), a @ b.t())


@pytest.mark.parametrize("settings", WAYS)
def test_restored_is_the_same_again(settings):
    served = int8.convert(ready(settings, SCHEMES[1]))
    before = {name: tensor.clone() for name, tensor in weights(served).items()}
    again = weights(int8.convert(int8.restore(served)))
    assert before.keys() == again.keys()
    for name, tensor in before.items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, again[name]), name
        else:
            torch.testing.assert_close(tensor, again[name])


@pytest.mark.parametrize("settings", [WAYS[0], WAYS[2]])
def test_tied_matrices_stay_one(settings):
    model = make(settings)
    n = model.num_params()
    int8.prepare(model, {})
    head = model.head if model.kind == "gpt" else model.mlm.decoder
    assert head.weight is model.stack.tokens.weight and model.num_params() == n
    int8.convert(model)
    head = model.head if model.kind == "gpt" else model.mlm.decoder
    assert head.weight is model.stack.tokens.weight and model.num_params() == n
    assert sum(name.endswith("tokens.weight") or name == "head.weight" for name in weights(model)) == 1
    model._apply(torch.clone)  # as a move to another device does
    head = model.head if model.kind == "gpt" else model.mlm.decoder
    assert head.weight is model.stack.tokens.weight and model.num_params() == n


def test_small_heads_stay_in_floating_point():
    model = int8.convert(ready(WAYS[2], SCHEMES[0]))
    assert isinstance(model.nsp, torch.nn.Linear) and isinstance(model.pooler, int8.Int8Linear)


# ---------------------------------------------------------------- ranges
@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse"])
@pytest.mark.parametrize("settings", [WAYS[0], WAYS[2]])
def test_padding_never_reaches_an_observer(observer, settings):
    a = quantize.calibrate(make(settings), observer, Examples(Task(), batches()))
    b = quantize.calibrate(make(settings), observer, Examples(Task(), batches(width=16, filling=31)))
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=2e-4), name


def test_observers():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4000, 256, generator=g)
    values[:, :, 7] *= 3  # one channel in 256, which a regular sample could pass by
    values[3, 0, 0] = 100.0  # an outlier
    ranges = {}
    for kind in ("minmax", "ema", "percentile", "mse"):
        observer = quantize.Observer(kind)
        for batch in values:
            observer.see(batch)
        ranges[kind] = observer.range()
    low, high = ranges["minmax"]
    assert (low, high) == (float(values.min()), 100.0)
    assert 4 < ranges["ema"][1] < 20  # one batch of five, remembered a little
    assert ranges["percentile"] == pytest.approx(np.quantile(values, [0.00005, 0.99995]).tolist(), rel=0.15)
    assert 5 < ranges["percentile"][1] < 10
    kept = values.flatten()
    errors = {kind: quantize.rounding_error(kept, *ends) for kind, ends in ranges.items()}
    assert min(errors, key=errors.get) == "mse" and errors["mse"] < 0.2 * errors["minmax"]


def test_layers_that_a_task_does_not_use_are_dynamic():
    class Stack:
        def loss(self, model, inputs):
            return {"loss": model.stack(inputs["tokens"]).sum()}

    model = make(WAYS[0])
    ranges = quantize.calibrate(model, "minmax", Examples(Stack(), batches()))
    assert "head" not in ranges and "stack.blocks.0.mlp.up" in ranges
    int8.prepare(model, ranges)
    assert isinstance(model.head.input, int8.DynamicInput)
    assert int8.ranges_of(weights(int8.convert(model))) == ranges


def test_training_leaves_ranges_alone():
    """So they depend neither on how a batch is cut nor on who shares it, and an observer's choice is served."""
    model = ready(WAYS[2], SCHEMES[1]).train()
    before = int8.ranges_of(weights(model))
    run(model)
    assert before and int8.ranges_of(weights(model)) == before


def test_an_empty_calibration_is_refused():
    with pytest.raises(UserError, match="calibrate 0"):
        QuantConfig("static", calibrate=0)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("config", SCHEMES)
def test_training_reaches_every_weight_and_serves_what_it_learnt(config):
    model = ready(WAYS[0], config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = batches()[0].inputs["tokens"]
    losses = []
    for _ in range(30):
        loss = lm_loss(model, tokens, tokens.roll(-1, 1)) / tokens.numel()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        learnt = lm_loss(model, tokens, tokens.roll(-1, 1))
        served = lm_loss(int8.convert(model), tokens, tokens.roll(-1, 1))
    assert float(served) == pytest.approx(float(learnt), rel=1e-4)


@pytest.mark.parametrize("config", SCHEMES)
def test_scales_keep_their_precision(config):
    model = int8.convert(ready(WAYS[0], config)).eval()
    tokens = batches()[0].inputs["tokens"]
    with torch.no_grad():
        exact = model(tokens)
        model.bfloat16().to("cpu")
        rounded = model(tokens)
    assert rounded.dtype == torch.bfloat16 and (rounded - exact).norm() < 0.03 * exact.norm()
    kept = [b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("scale", "sums", "range")]
    assert kept and all(buffer.dtype == torch.float32 for buffer in kept)
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), 3).shape == (1, 5)


@pytest.mark.parametrize("config", SCHEMES)
def test_compiled_in_one_piece(config):
    """Whether int8 products exist is asked when a model is compiled, not computed in it."""
    stack = int8.convert(ready(WAYS[2], config)).eval().stack
    tokens = batches()[0].inputs["tokens"]
    with torch.no_grad():
        compiled = torch.compile(stack, backend="eager", fullgraph=True)(tokens)  # raises where the graph breaks
        torch.testing.assert_close(compiled, stack(tokens))
