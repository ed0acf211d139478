"""Whole numbers, their ranges, and that what is served is what was trained."""

import pytest
import torch

from mini import GPT, Bert, ModelConfig, quant
from mini.config import ENCODER, MODERN, QuantConfig, UserError
from mini.data import Batch
from mini.storage import weights

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
        hidden = model.stack(inputs["tokens"], padding=inputs["padding"])
        if model.kind == "gpt":
            return {"loss": model.logits(hidden).sum()}
        return {"loss": model.mlm(hidden[:, :3]).sum() + model.nsp(model.pool(hidden)).sum()}


def batches(width: int = 12, filling: int = 7) -> list[Batch]:
    lengths = torch.tensor([12, 9, 5, 7])
    real = torch.arange(width) < lengths[:, None]
    tokens = torch.full((4, width), filling)
    tokens[:, :12] = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(1))
    tokens[~real] = filling
    return [Batch({"tokens": tokens, "padding": real}, {}, 0)]


def ready(settings: dict, config: QuantConfig) -> GPT | Bert:
    model = make(settings)
    ranges = None if config.scheme == "dynamic" else quant.calibrate(model, config.observer, Task(), batches())
    return quant.prepare(model, config, ranges)


def run(model) -> torch.Tensor:
    return model.stack(batches()[0].inputs["tokens"])


def test_gradient_is_straight_inside_and_zero_outside():
    x = torch.tensor([-300.0, -126.6, 0.2, 100.4, 127.4, 500.0], requires_grad=True)
    q = quant.quantize(x, torch.tensor(1.0))
    q.sum().backward()
    assert q.tolist() == [-127, -127, 0, 100, 127, 127] and x.grad.tolist() == [0, 1, 1, 1, 0, 0]
    with torch.no_grad():
        assert torch.equal(quant.quantize(x, torch.tensor(1.0)), q)


@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.5, 3.0), (-2.0, -1.0), (0.0, 0.0), (-0.01, 5.0)])
def test_affine_covers_its_range_and_zero_is_exact(low, high):
    scale, zero = quant.affine(torch.tensor(low), torch.tensor(high))
    x = torch.linspace(min(low, 0), max(high, 0), 1001)
    q = quant.quantize(x, scale, zero, low=-128)
    assert q.min() >= -128 and q.max() <= 127 and zero == zero.round()
    assert ((q - zero) * scale - x).abs().max() <= 0.51 * scale + 1e-7
    assert float((quant.quantize(torch.zeros(1), scale, zero, low=-128) - zero) * scale) == 0


def test_row_scales():
    weight = torch.tensor([[1.0, -254.0], [0.0, 0.0]])
    assert quant.row_scales(weight).flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("config", SCHEMES)
def test_served_equals_trained(settings, config):
    model = ready(settings, config)
    with torch.no_grad():
        expected = run(model)
        served = quant.convert(model)
        torch.testing.assert_close(run(served), expected, atol=1e-4, rtol=1e-4)
    exact = run(make(settings))
    error = (expected - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    assert all(b.dtype == torch.int8 for n, b in served.named_buffers() if n.endswith("weight"))


@pytest.mark.parametrize("config", SCHEMES)
def test_hardware_and_fallback_agree(config, monkeypatch):
    model = quant.convert(ready(WAYS[2], config))
    with torch.no_grad():
        fast = run(model)
        monkeypatch.setattr(quant, "int8_units", lambda device: False)
        torch.testing.assert_close(run(model), fast, atol=1e-4, rtol=1e-4)


def test_int8_matmul_is_exact():
    g = torch.Generator().manual_seed(0)
    for M in (1, 5, 40):
        a = torch.randint(-128, 128, (M, 64), generator=g)
        b = torch.randint(-128, 128, (24, 64), generator=g)
        assert torch.equal(quant.int8_matmul(a.float(), b.to(torch.int8)).long(), a @ b.t())


@pytest.mark.parametrize("settings", WAYS)
def test_restored_is_the_same_again(settings):
    served = quant.convert(ready(settings, SCHEMES[1]))
    before = {name: tensor.clone() for name, tensor in weights(served).items()}
    again = weights(quant.convert(quant.restore(served)))
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
    quant.prepare(model, SCHEMES[0])
    head = model.head if model.kind == "gpt" else model.mlm.decoder
    assert head.weight is model.stack.tokens.weight and model.num_params() == n
    quant.convert(model)
    head = model.head if model.kind == "gpt" else model.mlm.decoder
    assert head.weight is model.stack.tokens.weight and model.num_params() == n
    assert sum(name.endswith("tokens.weight") or name == "head.weight" for name in weights(model)) == 1


def test_small_heads_stay_in_floating_point():
    model = quant.convert(ready(WAYS[2], SCHEMES[0]))
    assert isinstance(model.nsp, torch.nn.Linear) and isinstance(model.pooler, quant.Int8Linear)


# ---------------------------------------------------------------- ranges
@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse"])
@pytest.mark.parametrize("settings", [WAYS[0], WAYS[2]])
def test_padding_never_reaches_an_observer(observer, settings):
    a = quant.calibrate(make(settings), observer, Task(), batches())
    b = quant.calibrate(make(settings), observer, Task(), batches(width=16, filling=31))
    for name in a:
        if name != "head":  # outside of the stack, where the task's logits are
            assert a[name] == pytest.approx(b[name], abs=2e-4), name


def test_padding_never_reaches_a_moving_range():
    found = []
    for width, filling in ((12, 7), (16, 31)):
        model = ready(WAYS[2], SCHEMES[1]).train()
        with torch.no_grad():
            for _ in range(30):
                model.stack(**batches(width, filling)[0].inputs)
        found.append({n: b.clone() for n, b in model.named_buffers() if n.endswith("range") and "blocks" in n})
    assert found[0] and all(torch.allclose(a, found[1][n], atol=2e-3) for n, a in found[0].items())


def test_observers():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4000, 8, generator=g)
    values[3, 0, 0] = 100.0  # an outlier
    ranges = {}
    for kind in ("minmax", "ema", "percentile", "mse"):
        observer = quant.Observer(kind)
        for batch in values:
            observer.see(batch)
        ranges[kind] = observer.range()
    low, high = ranges["minmax"]
    assert (low, high) == (float(values.min()), 100.0)
    assert 4 < ranges["ema"][1] < 20  # one batch of five, remembered a little
    assert 3 < ranges["percentile"][1] < 10
    kept = values.flatten()
    assert quant.rounding_error(kept, *ranges["mse"]) <= quant.rounding_error(kept, low, high)


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
        loss = model.loss(tokens, tokens.roll(-1, 1))["loss"] / tokens.numel()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        learnt = model.loss(tokens, tokens.roll(-1, 1))["loss"]
        served = quant.convert(model).loss(tokens, tokens.roll(-1, 1))["loss"]
    assert float(served) == pytest.approx(float(learnt), rel=1e-4)


@pytest.mark.parametrize("config", SCHEMES)
def test_scales_keep_their_precision(config):
    model = quant.convert(ready(WAYS[0], config)).eval()
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
    stack = quant.convert(ready(WAYS[2], config)).eval().stack
    tokens = batches()[0].inputs["tokens"]
    with torch.no_grad():
        compiled = torch.compile(stack, backend="eager", fullgraph=True)(tokens)  # raises where the graph breaks
        torch.testing.assert_close(compiled, stack(tokens))
