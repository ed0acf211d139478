"""The model: every way to compute something equals the plain one."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import lm_loss

from mini import GPT, ModelConfig
from mini.errors import UserError
from mini.model.attention import KVCache, View, attend_fused, attend_reference
from mini.model.gpt import choose
from mini.model.transformer import rope_at, rotate
from mini.presets import model_preset
from mini.tensors import load_tensors, save_tensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt2"
SMALL = ModelConfig(n_layers=2, n_heads=4, d_model=32, max_len=24, vocab_size=50)
VARIANTS = {
    "gpt2": {},
    "modern": dict(norm="rmsnorm", positions="rope", activation="relu2", qk_norm=True, bias=False, tied=False),
    "sinusoidal": dict(positions="sinusoidal", activation="gelu"),
    "no positions": dict(positions="none", logit_softcap=5.0),
    "swiglu gqa": dict(activation="swiglu", n_kv_heads=2, positions="rope"),
    "post-norm": dict(norm_place="post"),
    "value embeddings": dict(value_embeddings=True, n_kv_heads=2, positions="rope", vocab_multiple=64),
    "per layer": dict(n_heads=[4, 1], d_head=8, d_ff=[16, 48]),
    "padded vocabulary": dict(vocab_multiple=64),
    "reference": dict(attention="reference"),
    "windows": dict(positions="rope", window=[3, 0], rope_base=[10000.0, 160000.0]),
    "windows, learned positions": dict(window=5),
    "lstm": dict(block="lstm", tied=False),
    "lstm, post-norm": dict(block="lstm", norm_place="post", bias=False),
}


def build(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes)).eval()
    with torch.no_grad():  # larger than at the start, so that every part matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", ["causal", "padding", "none"])
def test_reference_attention_equals_fused(mask):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    real = torch.rand(2, 7) > 0.3 if mask == "padding" else None
    outputs, gradients = [], []
    for attend in (attend_reference, attend_fused):
        out = attend(*tensors, View(mask == "causal", real), 0.0)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), tensors))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_rope_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    table = rope_at(torch.arange(30), 16, 10000.0)[:, :, None]  # (2, T, 1, D)

    def score(i: int, j: int) -> float:
        return float((rotate(q, table[:, i : i + 1]) * rotate(k, table[:, j : j + 1])).sum())

    assert score(5, 2) == pytest.approx(score(25, 22), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-2)
    assert float(rotate(q, table[:, 7:8]).norm()) == pytest.approx(float(q.norm()), abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_the_future(name):
    model, tokens = build(**VARIANTS[name]), random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 12, SMALL.vocab_size)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_gives_the_same_tokens(name):
    model, prompt = build(**VARIANTS[name]), random_tokens(3, 5)
    with_cache = model.generate(prompt, 30)  # slides: 5 + 30 > max_len 24
    assert torch.equal(with_cache, model.generate(prompt, 30, use_cache=False))
    plain = prompt
    for _ in range(30):  # and both are what anybody would write down
        plain = torch.cat([plain, model(plain[:, -24:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_cache, plain)


@pytest.mark.parametrize("name", ["gpt2", "modern", "windows", "sinusoidal"])
def test_packed_documents_are_as_each_alone(name):
    model, a, b = build(**VARIANTS[name]), random_tokens(1, 9), random_tokens(1, 8) + 1
    documents = torch.tensor([[3] * 9 + [4] * 8])
    packed = model.answer({"tokens": torch.cat([a, b], dim=1), "documents": documents})
    torch.testing.assert_close(packed, torch.cat([model(a), model(b)], dim=1))
    assert not torch.allclose(packed[:, 9:], model(torch.cat([a, b], dim=1))[:, 9:])


@pytest.mark.parametrize("block", [dict(positions="rope", window=[3, 5], value_embeddings=True),
                                   dict(positions="none", block="lstm")])  # fmt: skip
@pytest.mark.parametrize("prompt", [1, 2, 9, 30])
def test_with_windows_alone_a_text_has_no_end(prompt, block):
    """And its cache no more slots than a query sees: max_len is 24, the windows 3 and 5. Nor has it for an LSTM."""
    model, tokens = build(**block), random_tokens(2, prompt)
    with_cache = model.generate(tokens, 60)
    assert torch.equal(with_cache, model.generate(tokens, 60, use_cache=False))
    plain = tokens
    for _ in range(60):
        plain = torch.cat([plain, model(plain)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_cache, plain)
    cache = KVCache(model.config, 2, 100_000, tokens.device, torch.float32)
    assert [keys.size(2) for keys in cache.keys] == ([1, 1] if "block" in block else [4, 6])


@pytest.mark.parametrize("name", ["gpt2", "modern", "windows"])
def test_prompts_of_different_lengths(name):
    model, tokens = build(**VARIANTS[name]), random_tokens(3, 9)
    lengths = torch.tensor([9, 2, 5])
    together = model.generate(tokens, 20, lengths=lengths)
    for row, length, out in zip(tokens, lengths.tolist(), together, strict=True):
        alone = model.generate(row[None, :length], 20)[0]
        assert torch.equal(out[: length + 20], alone)


def test_prompt_longer_than_the_context():
    model, prompt = build(), random_tokens(1, 40)
    out = model.generate(prompt, 3)
    assert torch.equal(out[0, 40], model(prompt[:, -24:])[0, -1].argmax())


def test_stop_tokens_end_each_row():
    model, prompt = build(), random_tokens(4, 4)
    free = model.generate(prompt, 12)[:, 4:]
    stop = int(free[0, 3])
    stopped = model.generate(prompt, 12, stop=[stop])[:, 4:]
    for row, reference in zip(stopped.tolist(), free.tolist(), strict=True):
        end = reference.index(stop) + 1 if stop in reference else len(reference)
        assert row[:end] == reference[:end]
        assert set(row[end:]) <= {stop}


def test_compiled_step_agrees():
    model, prompt = build(), random_tokens(1, 5)
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception:
        pytest.skip("no compiler")
    assert torch.equal(model.generate(prompt, 10, compile=True), model.generate(prompt, 10))


def test_choose():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**options) -> list[float]:
        options = dict(temperature=1.0, top_k=None, top_p=None) | options
        return (torch.bincount(choose(logits, generator=generator, **options), minlength=4) / 4000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=0.0) == [1, 0, 0, 0]
    assert shares(temperature=0.5) == pytest.approx(
        [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365], abs=0.03
    )
    assert shares(top_k=2) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.03)  # 0.5 alone is not yet 0.6
    assert shares(top_p=0.4) == [1, 0, 0, 0]


def test_sampling_repeats_with_the_same_seed():
    model, prompt = build(), random_tokens(2, 4)
    draws = [
        model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_empty_prompt_is_refused():
    with pytest.raises(UserError, match="no tokens"):
        build().generate(torch.empty(1, 0, dtype=torch.long))


def test_loss_is_the_sum_over_targets():
    model, tokens = build(), random_tokens(2, 9)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    with torch.no_grad():
        loss = lm_loss(model, tokens[:, :-1], targets)
        probabilities = model(tokens[:, :-1]).log_softmax(-1)
    by_hand = -sum(probabilities[b, t, targets[b, t]] for b in range(2) for t in range(8) if targets[b, t] != -100)
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-5)


def test_zero_init_starts_at_the_uniform_distribution():
    model = GPT(replace(SMALL, zero_init=True, tied=False))
    loss = lm_loss(model, random_tokens(2, 9), random_tokens(2, 9)).detach() / 18
    assert float(loss) == pytest.approx(math.log(SMALL.vocab_size), rel=1e-5)


@torch.no_grad()
def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layers=8, n_heads=2, d_model=128, vocab_size=500))
    block = model.stack.blocks[3]
    assert float(block.mlp.up.weight.std()) == pytest.approx(0.02, rel=0.03)
    assert float(block.mlp.down.weight.std()) == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.03)
    assert float(block.attention.out.weight.std()) == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)


def test_vocab_multiple_pads_rows_only():
    model = build(vocab_multiple=64)
    assert model.stack.tokens.weight.shape == (64, 32)
    assert model.num_params() == build().num_params()
    assert model(random_tokens(1, 4)).shape == (1, 4, 50)


def test_activation_checkpointing_changes_nothing():
    tokens = random_tokens(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model = build(dropout=0.2).train()
        model.stack.checkpoint_activations = checkpointing
        torch.manual_seed(7)
        lm_loss(model, tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_dropout_only_in_training():
    model, tokens = build(dropout=0.5), random_tokens(1, 8)
    assert torch.equal(model(tokens), model(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))


def test_classifier_reads_the_last_real_token():
    model = build(n_classes=3)
    tokens, lengths = random_tokens(2, 9), torch.tensor([9, 4])
    logits = model.classify(tokens, lengths)
    torch.testing.assert_close(logits[1:], model.classify(tokens[1:, :4], torch.tensor([4])))
    changed = tokens.clone()
    changed[1, 4:] = 0
    torch.testing.assert_close(model.classify(changed, lengths), logits)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="not divisible"):
        ModelConfig(d_model=30, n_heads=4)


# ---------------------------------------------------------------- published weights
@pytest.mark.parametrize(
    "preset, parameters",
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_presets_have_the_published_sizes(preset, parameters):
    with torch.device("meta"):
        assert GPT(model_preset(preset)).num_params() == parameters


def test_published_weights_give_the_published_logits():
    expected = json.loads((FIXTURE / "expected.json").read_text())
    model = GPT.from_published(FIXTURE)
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)


def published_copy(folder: Path, change) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_tensors(FIXTURE / "model.safetensors").items()}
    (folder / "config.json").write_text((FIXTURE / "config.json").read_text())
    save_tensors(folder / "model.safetensors", change(tensors))
    return folder


def test_published_names_may_vary(tmp_path):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        bare["lm_head.weight"] = bare["wte.weight"]
        return bare

    model, same = GPT.from_published(published_copy(tmp_path, change)), GPT.from_published(FIXTURE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_pytorch_model_bin(tmp_path):
    (tmp_path / "config.json").write_text((FIXTURE / "config.json").read_text())
    torch.save(load_tensors(FIXTURE / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model, same = GPT.from_published(tmp_path), GPT.from_published(FIXTURE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_unfitting_weights_are_listed(tmp_path):
    def change(tensors):
        tensors["transformer.h.0.extra"] = torch.zeros(2)
        tensors["transformer.wpe.weight"] = torch.zeros(3, 16)
        del tensors["transformer.h.1.ln_2.bias"]
        return tensors

    with pytest.raises(UserError) as error:
        GPT.from_published(published_copy(tmp_path, change))
    message = str(error.value)
    assert "missing stack.blocks.1.norm2.bias [16]" in message
    assert "extra h.0.extra [2]" in message
    assert "stack.positions.weight is [3, 16], not [24, 16]" in message


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(UserError, match="llama"):
        GPT.from_published(tmp_path)


def test_deepcopy_keeps_the_head_tied():
    model = copy.deepcopy(build())
    assert model.head.weight is model.stack.tokens.weight
    assert F.linear(torch.ones(1, 32), model.head.weight).shape == (1, 50)


def test_weights_stored_in_fewer_bits_are_multiplied_in_float32():
    """The same as rounding the weights alone; what is computed from them is not rounded."""
    model, tokens = build(**VARIANTS["modern"]), random_tokens(2, 9)
    rounded = build(**VARIANTS["modern"])
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.copy_(module.weight.bfloat16())
        assert model.store(torch.bfloat16).head.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(tokens), rounded(tokens), atol=1e-6, rtol=1e-6)
        assert model(tokens).dtype == torch.float32
    prompt = random_tokens(1, 4)
    assert torch.equal(model.generate(prompt, 8), rounded.generate(prompt, 8))
