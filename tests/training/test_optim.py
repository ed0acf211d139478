import math

import pytest
import torch
from torch import nn

from mini import GPT, ModelConfig
from mini.flags import field_names
from mini.presets import PRESETS
from mini.training.muon import Muon, orthogonalize
from mini.training.optim import OptimConfig, make_optimizers, schedule


def test_cosine_and_warmup():
    config = OptimConfig(schedule="cosine", warmup=10, min_lr=0.1)
    values = [schedule(step, 110, config) for step in range(110)]
    assert values[0] == pytest.approx(1 / 11) and values[9] == pytest.approx(10 / 11)
    assert values[10] == 1.0
    assert values[60] == pytest.approx(0.55)  # half-way between 1 and 0.1
    assert values[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 99 / 100)))


def test_trapezoidal():
    config = OptimConfig(schedule="trapezoidal", warmup=0.1, cooldown=0.4, min_lr=0.0)
    values = [schedule(step, 100, config) for step in range(100)]
    assert values[10:61] == [1.0] * 51
    assert values[80] == pytest.approx(0.5) and values[99] == pytest.approx(1 / 40)
    assert values[:11] == sorted(values[:11])


def test_linear_and_constant():
    assert schedule(50, 100, OptimConfig(schedule="linear", warmup=0)) == 0.5
    assert schedule(99, 100, OptimConfig(schedule="constant", warmup=0)) == 1.0


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    X = orthogonalize(G)
    assert X.shape == G.shape
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inside = U.mT @ X @ Vh.mT  # diagonal, if the singular vectors are kept
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    lengths = torch.linalg.svdvals(G) / (G @ G.mT).norm(dim=(-2, -1), keepdim=True)[..., 0].sqrt()
    assert 0.65 < float(diagonal[lengths > 0.01].min()) and 0 < float(diagonal.min()) and float(diagonal.max()) < 1.25
    assert float((inside - torch.diag_embed(diagonal)).abs().max()) < 0.05


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 12, 48), (2, 48, 12)])
def test_orthogonalize_is_newton_schulz(shape):
    """The iteration as it is published, X <- aX + bAX + cA²X with A = XXᵀ, in double precision."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    X = G.double() / G.double().norm(dim=(-2, -1), keepdim=True)
    X = X / (X @ X.mT).norm(dim=(-2, -1), keepdim=True).sqrt()
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    torch.testing.assert_close(orthogonalize(G).double(), X, atol=2e-3, rtol=0)


def test_matrices_take_turns():
    """Each moves once in `turns` steps, with so many times the rate, by the momentum of all steps."""
    params = [nn.Parameter(torch.zeros(8, 8)) for _ in range(5)]
    optimizer = Muon(params, lr=0.1, momentum=0.5, weight_decay=0.0, turns=3, parts={})
    gradients = torch.randn(6, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    moved = []
    for step in range(6):
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, gradients[step], strict=True):
            p.grad = g.clone()
        optimizer.step()
        moved.append([not torch.equal(a, p) for a, p in zip(before, params, strict=True)])
    assert moved == [[(i + step) % 3 == 0 for i in range(5)] for step in range(6)]
    momentum = 0.25 * gradients[0, 2] + 0.5 * gradients[1, 2]  # of parameter 2, whose turn is the second step
    expected = -0.3 * orthogonalize((0.5 * gradients[1, 2] + 0.5 * momentum)[None])[0]
    optimizer = Muon([p := nn.Parameter(torch.zeros(8, 8))], lr=0.1, momentum=0.5, weight_decay=0.0, turns=3, parts={})
    optimizer.state[p] = {"momentum": 0.5 * gradients[0, 2], "step": torch.tensor(3)}
    p.grad = gradients[1, 2].clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=0)


def test_batching_equal_shapes_changes_nothing():
    """Muon on several matrices at once, a fused QKV among them, equals the update written for one at a time."""
    torch.manual_seed(0)
    qkv, a, b = (nn.Parameter(torch.randn(s)) for s in ((48, 16), (16, 16), (64, 16)))
    gradients = [torch.randn_like(p) for p in (qkv, a, b)]
    expected = []
    for p, g in zip((qkv, a, b), gradients, strict=True):
        momentum = 0.05 * g
        update = g + 0.95 * (momentum - g)
        parts = update.split(16) if p is qkv else [update]
        steps = [orthogonalize(x[None])[0] * max(1, x.size(0) / x.size(1)) ** 0.5 for x in parts]
        expected.append(p.detach() * (1 - 0.1 * 0.5) - 0.1 * torch.cat(steps))
    optimizer = Muon([qkv, a, b], lr=0.1, momentum=0.95, weight_decay=0.5, turns=1, parts={id(qkv): [16] * 3})
    for p, g in zip((qkv, a, b), gradients, strict=True):
        p.grad = g
    optimizer.step()
    for p, e in zip((qkv, a, b), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_group(name, tied):
    model = GPT(ModelConfig(n_layers=2, n_heads=2, d_model=16, vocab_size=20, tied=tied))
    optimizers = make_optimizers(model, OptimConfig(optimizer=name, lr=0.08, weight_decay=0.1))
    groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
    assert len(groups) == sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    assert groups.keys() == {id(p) for p in model.parameters()}
    for parameter_name, parameter in model.named_parameters():
        assert groups[id(parameter)]["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0), parameter_name
    block = model.stack.blocks[0]
    assert groups[id(block.mlp.up.weight)]["peak_lr"] == 0.08
    assert groups[id(model.stack.tokens.weight)]["peak_lr"] == (0.04 if name == "muon" else 0.08)
    assert groups[id(block.norm1.weight)]["peak_lr"] == (0.02 if name == "muon" else 0.08)


def test_published_warmups():
    """10,000 of BERT's million steps; and the same share of fewer."""
    for name, steps, expected in (("bert-base", 1_000_000, 10_000), ("gpt2", 100_000, 700), ("bert-base", 1000, 10)):
        config = OptimConfig(**{k: v for k, v in PRESETS[name].items() if k in field_names(OptimConfig)})
        shares = [schedule(step, steps, config) for step in range(expected + 2)]
        assert shares[:expected] == sorted(shares[:expected]) and max(shares) == shares[expected] == 1
        assert shares[expected - 1] < 1
