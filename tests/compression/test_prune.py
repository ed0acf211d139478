"""What goes, exactly how much of it, and that it stays gone."""

import pytest
import torch
from conftest import lm_loss
from torch import nn

from mini import GPT, Bert, ModelConfig
from mini.compression import prune, shrink
from mini.compression.activations import Examples
from mini.compression.prune import PruneConfig
from mini.errors import UserError
from mini.model import sparse
from mini.presets import ENCODER, MODERN
from mini.tasks.base import Batch, Task
from mini.tensors import save_tensors, weights
from mini.training.optim import OptimConfig, make_optimizers

SIZE = dict(n_layers=3, n_heads=4, d_model=32, max_len=16, vocab_size=60)
GPT_WAYS = [dict(SIZE), dict(SIZE, **MODERN), dict(SIZE, activation="swiglu", bias=True), dict(SIZE, n_heads=[4, 2, 3],
            d_head=8, d_ff=[64, 20, 32]), dict(SIZE, value_embeddings=True, tied=False)]  # fmt: skip
GRADIENT = PruneConfig(pattern="heads", method="gradient")
BERT_WAYS = dict(SIZE, **ENCODER, norm_place="post", activation="gelu", mlm=True, nsp=True)


def make(settings: dict) -> GPT | Bert:
    torch.manual_seed(0)
    model = (GPT if settings.get("causal", True) else Bert)(ModelConfig(**settings)).eval()
    with torch.no_grad():  # nothing at zero or one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(B: int = 4, T: int = 12) -> torch.Tensor:
    return torch.randint(60, (B, T), generator=torch.Generator().manual_seed(1))


class Hidden(Task):
    """A task with a loss for each token of a BERT, in which padding counts for nothing."""

    def loss(self, model, inputs):
        hidden = model.encode(inputs["tokens"], inputs["lengths"])
        real = torch.arange(hidden.size(1)) < inputs["lengths"][:, None]
        return {"loss": hidden[real].square().sum()}


def batches(width: int = 12) -> list[Batch]:
    lengths = torch.tensor([12, 9, 5, 7])
    real = torch.arange(width) < lengths[:, None]
    filled = torch.full((4, width), 7)
    filled[:, :12] = tokens()
    filled[~real] = 7
    return [Batch({"tokens": filled, "lengths": lengths}, {}, 0)]


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((layer.weight == 0).sum()) for name, layer in sparse.prunable(model).items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_is_exact(sparsity, scope):
    model = make(GPT_WAYS[0])
    prune.prune(model, PruneConfig(sparsity, scope=scope), sparsity, 0)
    sizes = {name: layer.weight.numel() for name, layer in sparse.prunable(model).items()}
    total = sum(sizes.values())
    if scope == "global":
        assert sum(zeros(model).values()) == round(sparsity * total)
    else:
        assert zeros(model) == {name: round(sparsity * n) for name, n in sizes.items()}
    assert sparse.sparsity(model) == pytest.approx(sparsity, abs=len(sizes) / total)


def test_ties_do_not_take_more():
    model = make(GPT_WAYS[0])
    with torch.no_grad():
        for layer in sparse.prunable(model).values():
            layer.weight.fill_(0.5)
    prune.prune(model, PruneConfig(0.25), 0.25, 0)
    assert all(zeros(model)[n] == round(0.25 * la.weight.numel()) for n, la in sparse.prunable(model).items())


def test_the_smallest_go_and_the_rest_is_untouched():
    model = make(BERT_WAYS)
    before = {name: layer.weight.detach().clone() for name, layer in sparse.prunable(model).items()}
    prune.prune(model, PruneConfig(0.6), 0.6, 0)
    for name, mask in sparse.masks_of(model).items():
        assert before[name][~mask].abs().max() <= before[name][mask].abs().min()
        assert torch.equal(model.get_parameter(name), before[name] * mask)


def test_what_is_prunable():
    names = set(sparse.prunable(make(dict(BERT_WAYS, n_classes=3))))
    assert "stack.tokens.weight" in names and "mlm.dense.weight" in names and "pooler.weight" in names
    assert not {"classifier.weight", "nsp.weight", "mlm.decoder.weight", "stack.segments.weight"} & names  # tied, small
    assert "head.weight" in sparse.prunable(make(GPT_WAYS[1])) and "head.weight" not in sparse.prunable(
        make(GPT_WAYS[0])
    )


def test_tied_weights_stay_tied():
    model = make(BERT_WAYS)
    prune.prune(model, PruneConfig(0.5), 0.5, 0)
    assert model.mlm.decoder.weight is model.stack.tokens.weight
    assert (model.mlm.decoder.weight == 0).sum() == round(0.5 * 60 * 32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zeros_survive_training(optimizer):
    def train(held: bool) -> GPT:
        model = make(GPT_WAYS[0]).train()
        optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, turns=1, lr=0.01, weight_decay=0.1))
        for step in range(4):
            if step == 2:  # pruned while the optimizer's momentum is warm
                prune.prune(model, PruneConfig(0.5), 0.5, 0)
            lm_loss(model, tokens(), tokens().roll(-1, 1)).backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
            if held:
                sparse.hold(model)
        return model

    masked = train(held=True)
    for name, mask in sparse.masks_of(masked).items():
        assert (masked.get_parameter(name)[~mask] == 0).all() and (masked.get_parameter(name)[mask] != 0).all()
    free = train(held=False)  # what hold() is for
    assert sum(zeros(free).values()) < 0.01 * sum(int((~m).sum()) for m in sparse.masks_of(free).values())


def test_half_twice_is_half():
    model = make(GPT_WAYS[0])
    prune.prune(model, PruneConfig(0.5), 0.5, 0)
    before = zeros(model)
    prune.prune(model, PruneConfig(0.5), 0.5, 0)
    assert zeros(model) == before
    prune.prune(model, PruneConfig(0.7), 0.7, 0)
    assert all(n > before[name] for name, n in zeros(model).items())


@pytest.mark.parametrize("then", [PruneConfig(0.5), PruneConfig(0.5, scope="global"), PruneConfig(pattern="2:4")])
def test_masked_weights_stay_masked_whatever_comes_next(then):
    for first in (PruneConfig(0.5, scope="global"), PruneConfig(0.5, method="random"), PruneConfig(pattern="2:4")):
        model = make(GPT_WAYS[0])
        prune.prune(model, first, 0.5, 0)
        before = {name: mask.clone() for name, mask in sparse.masks_of(model).items()}
        prune.prune(model, then, 0.5, 0)
        assert not any((mask & ~before[name]).any() for name, mask in sparse.masks_of(model).items())


def test_gradients_of_masked_weights_do_not_count():
    model = make(GPT_WAYS[0])
    prune.prune(model, PruneConfig(0.9), 0.9, 0)
    lm_loss(model, tokens(), tokens().roll(-1, 1)).backward()
    sparse.HoldMasks(model).after_backward(0, 1)
    for name, mask in sparse.masks_of(model).items():
        gradient = model.get_parameter(name).grad
        assert (gradient[~mask] == 0).all() and gradient[mask].abs().sum() > 0


def test_cubic():
    assert prune.cubic(0.5, 0.9) == pytest.approx(0.7875) and prune.cubic(0, 0.9) == 0 and prune.cubic(1, 0.9) == 0.9
    assert prune.cubic(0, 0.9, 0.5) == 0.5
    model, options = make(GPT_WAYS[0]), PruneConfig(0.9, schedule="cubic")
    method, seen = prune.CubicPruning(model, options, 0), []
    for done in range(1, 91):
        assert method.after_step(done, 90) == (done >= 60)
        seen.append(sparse.sparsity(model))
    assert seen == sorted(seen) and seen[29] == pytest.approx(0.7875, abs=1e-3)
    assert seen[59] == seen[-1] == pytest.approx(0.9, abs=1e-3) and seen[40] < seen[59]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_of_m(pattern):
    n, m = map(int, pattern.split(":"))
    model = make(GPT_WAYS[0])
    prune.prune(model, PruneConfig(pattern=pattern), 0.5, 0)
    for mask in sparse.masks_of(model).values():
        assert (mask.view(mask.size(0), -1, m).sum(-1) == n).all()
    with pytest.raises(UserError, match="multiple of 6"):
        prune.prune(model, PruneConfig(pattern="3:6"), 0.5, 0)


def test_wanda_is_weight_times_input_norm_without_padding():
    """|W_ij| ‖X_j‖₂ compared within each output, on inputs computed here by hand."""
    model, task = make(BERT_WAYS), Hidden()
    seen = {}
    layer = model.stack.blocks[0].attention.qkv
    handle = layer.register_forward_hook(lambda m, a, o: seen.update(x=a[0].detach()))
    inputs = batches()[0].inputs
    task.loss(model, inputs)
    handle.remove()
    real = torch.arange(12) < inputs["lengths"][:, None]
    norms = seen["x"][real].norm(dim=0)
    prune.prune(model, PruneConfig(0.5, method="wanda"), 0.5, 0, Examples(task, batches()))
    mask = sparse.masks_of(model)["stack.blocks.0.attention.qkv.weight"]
    expected = (make(BERT_WAYS).stack.blocks[0].attention.qkv.weight.abs() * norms).topk(16, dim=1).indices
    assert torch.equal(mask, torch.zeros_like(mask).scatter(1, expected, True))

    padded = make(BERT_WAYS)
    prune.prune(padded, PruneConfig(0.5, method="wanda"), 0.5, 0, Examples(task, batches(width=16)))
    for name, mask in sparse.masks_of(model).items():
        assert (mask != sparse.masks_of(padded)[name]).float().mean() < 0.005  # rounding may swap two neighbours


# ---------------------------------------------------------------- heads, neurons, layers
@pytest.mark.parametrize("settings", [*GPT_WAYS, BERT_WAYS])
@pytest.mark.parametrize("part", ["heads", "neurons"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_smaller_model_equals_gated_one(settings, part, scope):
    model = make(settings)
    alive = shrink.choose_units(model, PruneConfig(0.5, pattern=part, scope=scope), 0)
    with shrink.gated(model, part, alive):
        expected = model.stack(tokens())
    small = shrink.without_units(model, part, alive)
    torch.testing.assert_close(small.stack(tokens()), expected, atol=1e-5, rtol=1e-5)
    left = [int(gate.sum()) for gate in alive]
    assert shrink.sizes(small, part) == left and min(left) >= 1
    assert sum(shrink.sizes(model, part)) - sum(left) == (
        round(0.5 * sum(shrink.sizes(model, part)))
        if scope == "global"
        else sum(round(0.5 * n) for n in shrink.sizes(model, part))
    )
    assert small.num_params() < model.num_params()
    assert not torch.allclose(model.stack(tokens()), expected, atol=1e-3)  # the gates did something


def test_removed_units_take_their_masks_along():
    model = make(GPT_WAYS[0])
    prune.prune(model, PruneConfig(0.5), 0.5, 0)
    alive = shrink.choose_units(model, PruneConfig(0.5, pattern="neurons"), 0)
    small = shrink.without_units(model, "neurons", alive)
    assert all(m.shape == small.get_parameter(n).shape for n, m in sparse.masks_of(small).items())
    assert all((small.get_parameter(n)[~m] == 0).all() for n, m in sparse.masks_of(small).items())


def test_gradient_importance_is_the_derivative_of_the_loss():
    """|∂L/∂ξ| of a text, by central differences."""
    model, task = make(BERT_WAYS).double(), Hidden()
    (batch,) = batches()
    one = {name: value[:1] for name, value in batch.inputs.items()}
    ones = [torch.ones(4, dtype=torch.double) for _ in range(3)]
    found = shrink.importance(model, GRADIENT, ones, 0, Examples(task, [Batch(one, {}, 0)]))
    expected = []
    for layer in range(3):
        slopes = []
        for head in range(4):
            losses = []
            for shift in (1e-5, -1e-5):
                gates = [gate.clone() for gate in ones]
                gates[layer][head] += shift
                with shrink.gated(model, "heads", gates):
                    losses.append(float(task.loss(model, one)["loss"].detach()))
            slopes.append(abs(losses[0] - losses[1]) / 2e-5)
        expected.append(torch.tensor(slopes) / torch.tensor(slopes).norm())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=1e-4, rtol=1e-3)


def test_gradient_importance_adds_up_texts_not_their_sum():
    """The mean of absolute values, which two texts of opposite slopes cannot cancel; and padding is nothing to it."""
    model, task = make(BERT_WAYS), Hidden()
    ones = [torch.ones(4) for _ in range(3)]
    together = shrink.importance(model, GRADIENT, ones, 0, Examples(task, batches()))
    inputs = batches(width=15)[0].inputs
    single = [Batch({n: v[i : i + 1] for n, v in inputs.items()}, {}, 0) for i in range(4)]
    apart = shrink.importance(model, GRADIENT, ones, 0, Examples(task, single))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_heads_that_cannot_go():
    model = make(dict(SIZE, n_kv_heads=2))
    with pytest.raises(UserError, match="share keys and values"):
        shrink.check_units(model, PruneConfig(0.5, pattern="heads"))
    shrink.check_units(model, PruneConfig(0.5, pattern="neurons"))
    with pytest.raises(UserError, match="all 4 heads of layer 0"):
        shrink.check_units(make(GPT_WAYS[0]), PruneConfig(0.9, pattern="heads"))
    with pytest.raises(UserError, match="fewer than one"):
        shrink.check_units(make(GPT_WAYS[0]), PruneConfig(0.9, pattern="heads", scope="global"))


@pytest.mark.parametrize("settings", [GPT_WAYS[3], BERT_WAYS])
def test_fewer_layers(settings):
    model = make(settings)
    prune.prune(model, PruneConfig(0.3), 0.3, 0)
    small = shrink.without_layers(model, [0, 2])
    expected = make(settings)
    prune.prune(expected, PruneConfig(0.3), 0.3, 0)
    del expected.stack.blocks[1]
    torch.testing.assert_close(small.stack(tokens()), expected.stack(tokens()))
    assert small.config.n_layers == 2 and sparse.sparsity(small) == pytest.approx(0.3, abs=1e-3)


def test_influence():
    model, task = make(BERT_WAYS | dict(norm_place="pre")), Hidden()
    with torch.no_grad():  # a block that adds nothing
        for linear in (model.stack.blocks[1].attention.out, model.stack.blocks[1].mlp.down):
            linear.weight.zero_()
            linear.bias.zero_()
    values = shrink.influence(model, Examples(task, batches()))
    assert values[1] == pytest.approx(0, abs=1e-6) and min(values[0], values[2]) > 0.01
    torch.testing.assert_close(values, shrink.influence(model, Examples(task, batches(width=16))), atol=1e-5, rtol=1e-4)


def test_spread():
    assert (
        shrink.spread(6, 12) == [0, 2, 4, 7, 9, 11]
        and shrink.spread(1, 6) == [0]
        and shrink.spread(4, 4) == [0, 1, 2, 3]
    )


# ---------------------------------------------------------------- files
def test_packed_file(tmp_path):
    model = make(dict(SIZE, d_model=128, vocab_size=500))
    save_tensors(tmp_path / "dense", weights(model))
    prune.prune(model, PruneConfig(0.9), 0.9, 0)
    expected = weights(model)
    save_tensors(tmp_path / "packed", sparse.pack(expected))
    assert (tmp_path / "packed").stat().st_size < 0.16 * (tmp_path / "dense").stat().st_size
    fresh = GPT(model.config)
    found = sparse.unpack(sparse.pack(expected), lambda: weights(fresh), "file")
    sparse.take_masks(fresh, found)
    assert found.keys() == expected.keys() == weights(fresh).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    damaged = sparse.pack(expected)
    damaged["stack.tokens.weight.kept"] = damaged["stack.tokens.weight.kept"][1:]
    with pytest.raises(UserError, match="damaged"):
        sparse.unpack(damaged, lambda: weights(GPT(model.config)), "file")
    damaged["stranger.bits"] = damaged.pop("stack.tokens.weight.bits")
    with pytest.raises(UserError, match="stranger"):
        sparse.unpack(damaged, lambda: weights(GPT(model.config)), "file")
