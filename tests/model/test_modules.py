"""What modules say of themselves: first values, who sees whom, units, arithmetic."""

import itertools

import pytest
import torch
from torch import nn

from mini import GPT, Bert, ModelConfig
from mini.compression.shrink import without_layers, without_units
from mini.model.attention import View, attend_fused, attend_local, attend_reference
from mini.presets import MODERN
from mini.tensors import weights

SIZE = dict(n_layers=3, n_heads=4, d_model=32, max_len=16, vocab_size=60)


def fresh(kind=GPT, seed: int = 1, **settings) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return weights(kind(ModelConfig(**{**SIZE, **settings})))


@pytest.mark.parametrize(
    "kind, one, other",
    [
        (GPT, {}, dict(n_classes=3)),
        (GPT, dict(norm_place="post"), dict(norm_place="post", n_layers=5)),
        (GPT, dict(tied=False), dict(tied=True)),
        (Bert, dict(mlm=True), dict(mlm=True, nsp=True, spans=True)),
        (GPT, {}, dict(positions="rope", qk_norm=True)),
    ],
)
def test_a_layer_or_a_head_more_moves_no_other_weight(kind, one, other):
    a, b = fresh(kind, **one), fresh(kind, **other)
    shared = a.keys() & b.keys()
    assert len(shared) > 10 and all(torch.equal(a[name], b[name]) for name in shared)


def test_first_values_follow_seed_and_name():
    a, b = fresh(seed=1), fresh(seed=2)
    matrices = [name for name, tensor in a.items() if tensor.ndim == 2]
    assert not any(torch.equal(a[name], b[name]) for name in matrices)
    assert not torch.equal(a["stack.blocks.0.mlp.up.weight"], a["stack.blocks.1.mlp.up.weight"])
    big = fresh(d_model=256, vocab_size=500)
    assert float(big["stack.tokens.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(big["stack.blocks.0.attention.out.weight"].std()) == pytest.approx(0.02 / 6**0.5, rel=0.02)
    zero = fresh(**MODERN)
    assert not zero["stack.blocks.2.mlp.down.weight"].any() and not zero["head.weight"].any()


# ---------------------------------------------------------------- who sees whom
def test_who_sees_whom():
    causal = View(True).mask(3, 3, torch.device("cpu"))
    assert causal.shape == (1, 1, 3, 3) and torch.equal(causal[0, 0], torch.ones(3, 3).tril().bool())
    assert View(True).only_causal(3) and not View(False).only_causal(3)  # just this is what the fused call is told
    assert not View(True, places=torch.tensor([[2], [0]])).only_causal(1)
    assert View(True, window=2).only_causal(3) and not View(True, window=2).only_causal(4)
    real = torch.tensor([[True, True, False]])
    assert View(False, real).mask(3, 3, torch.device("cpu")).tolist() == [[[[True, True, False]]]]
    assert View(False).mask(3, 3, torch.device("cpu")) is None
    cached = View(True, places=torch.tensor([[2], [0]])).mask(1, 4, torch.device("cpu"))
    assert cached[:, 0, 0].tolist() == [[True, True, True, False], [True, False, False, False]]
    ring = View(True, window=2, places=torch.tensor([[7], [1]])).mask(1, 3, torch.device("cpu"))  # places 6 7 5, 0 1 -
    assert ring[:, 0, 0].tolist() == [[True, True, True], [True, True, False]]
    rows = View(False, window=1, n_global=1).mask(4, 4, torch.device("cpu"))[0, 0].int().tolist()
    assert rows == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    packed = View(True, documents=torch.tensor([[0, 0, 1, 1]])).mask(4, 4, torch.device("cpu"))[0, 0].int().tolist()
    assert packed == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("T, window, n_global", [*itertools.product((64, 257), (2, 70), (0, 5))])
@pytest.mark.parametrize("causal, packed, ragged", [*itertools.product((False, True), repeat=3)])
def test_near_by_is_the_same_mask(T, window, n_global, causal, packed, ragged):
    """In blocks, forward and backward, as written out; padding, whose output nobody uses, aside."""
    if causal and n_global:
        return
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, T, 4, dtype=torch.double, generator=g, requires_grad=True) for _ in range(3)]
    real = torch.arange(T) < torch.tensor([[T], [T - 37]]) if ragged else None
    documents = (torch.rand(2, T, generator=g) < 0.05).cumsum(1) if packed else None
    view, found = View(causal, real, window, n_global, documents), []
    for attend in (attend_reference, attend_local):
        y = attend(*tensors, view, 0.0).transpose(1, 2)
        y = y if real is None else y[real]
        found.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    torch.testing.assert_close(*found)


def test_with_a_cache_both_attentions_agree():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.double, generator=g) for n in (1, 5, 5))
    view = View(True, places=torch.tensor([[4], [1]]))
    torch.testing.assert_close(attend_reference(q, k, v, view, 0.0), attend_fused(q, k, v, view, 0.0))
    alone = attend_reference(q[1:], k[1:, :, :2], v[1:, :, :2], View(False), 0.0)
    torch.testing.assert_close(attend_reference(q, k, v, view, 0.0)[1:], alone)


# ---------------------------------------------------------------- units
@pytest.mark.parametrize(
    "kind, settings", [(GPT, dict(window=100)), (GPT, dict(window=32)), (Bert, dict(causal=False, mlm=True))]
)
def test_compiled_and_recomputed_are_one_graph(kind, settings):
    """A recomputed block that changed something outside, such as a mask that all share, would not be compiled."""
    model = kind(ModelConfig(**{**SIZE, "max_len": 256, **settings}))
    model.stack.checkpoint_activations = True
    tokens = torch.randint(60, (2, 256))
    inputs = dict(tokens=tokens, lengths=torch.tensor([256, 200]), positions=tokens[:, :4], targets=tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model.answer, backend="aot_eager", fullgraph=True)(inputs)
    found = [
        torch.autograd.grad(y.square().sum(), model.stack.tokens.weight)[0] for y in (compiled, model.answer(inputs))
    ]
    torch.testing.assert_close(*found)


def test_a_buffer_that_depends_on_what_goes_is_not_lost_in_silence():
    """Slopes for each head, say, which files do not hold: the smaller model would compute another function."""

    class Sloped(GPT):
        def __init__(self, config: ModelConfig):
            super().__init__(config)
            for block in self.stack.blocks:
                slopes = 2.0 ** -torch.arange(1, block.attention.n_heads + 1)
                block.attention.register_buffer("slopes", slopes, persistent=False)

    model = Sloped(ModelConfig(**SIZE))
    gates = [torch.tensor([1.0, 0.0, 1.0, 1.0])] * 3
    with pytest.raises(ValueError, match=r"attention\.slopes depends on what was taken out"):
        without_units(model, "heads", gates)
    assert without_layers(model, [0, 2]).config.n_layers == 2  # layers are alike in it


def test_a_parameter_for_each_neuron_is_not_lost_in_silence():
    model = GPT(ModelConfig(**SIZE))
    for block in model.stack.blocks:
        block.mlp.bend = nn.Parameter(torch.ones(128))
    with pytest.raises(Exception, match="bend"):
        without_units(model, "neurons", [torch.arange(128) % 2.0] * 3)


# ---------------------------------------------------------------- arithmetic
def test_flops_are_those_of_the_modules():
    model = GPT(ModelConfig(**SIZE))
    matrices = 3 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * 60
    assert model.flops(16) == 2 * matrices + 3 * 4 * 16 * 32
    bert = Bert(ModelConfig(**SIZE, mlm=True, nsp=True))
    heads = 0.25 * 2 * (32 * 32 + 32 * 60) + 2 * (32 * 32 + 2 * 32) / 16
    assert bert.flops(16, predicted=0.25) == pytest.approx(model.stack.flops(16) + heads)
    model.stack.blocks[0].side = nn.Linear(32, 5)  # whatever is added counts
    assert model.flops(16) == 2 * (matrices + 32 * 5) + 3 * 4 * 16 * 32
    model.stack.blocks[0].mlp.inner = nn.Identity()  # and what it says of itself, however deep it lies
    model.stack.blocks[0].mlp.inner.flops = lambda length: 7.0 * length
    assert model.flops(16) == 2 * (matrices + 32 * 5) + 3 * 4 * 16 * 32 + 7 * 16
