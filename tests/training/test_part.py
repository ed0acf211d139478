"""Fine-tuning a part: what stays stays to the bit, what learns learns at its rate, and adapters end in the matrices."""

import signal

import pytest
import torch
from conftest import last_json, signalled

from mini import GPT, ModelConfig
from mini.errors import UserError
from mini.model import lora, sparse
from mini.tensors import load_tensors
from mini.training.checkpoints import served
from mini.training.optim import OptimConfig, make_optimizers
from mini.training.part import PartConfig, choose_part, depth

LAYERS = 3
FLAGS = ["--steps", 6, "--batch_size", 8, "--lr", 0.01, "--max_len", 32, "--log_every", 1, "--device", "cpu"]


def model(**changes) -> GPT:
    torch.manual_seed(0)
    config = dict(n_layers=LAYERS, n_heads=2, d_model=16, max_len=12, vocab_size=30, n_classes=2)
    return GPT(ModelConfig(**config | changes)).eval()


def learning(found: GPT) -> set[str]:
    return {name for name, p in found.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- adapters
def test_adapters_begin_as_nothing_and_end_in_the_matrices():
    plain, adapted = model(), model()
    tokens = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(1))
    choose_part(adapted, PartConfig(lora_rank=3, lora_alpha=12), "it")
    torch.testing.assert_close(adapted(tokens), plain(tokens), rtol=0, atol=0)
    for adapter in adapted.learning["lora"].values():
        torch.nn.init.normal_(adapter.B.weight, std=0.1)
    matrices = {f"{name}.weight" for name, m in plain.named_modules() if ".blocks." in name and hasattr(m, "parts")}
    alive, saved = adapted(tokens), served(adapted)
    adapted.end_learning()
    torch.testing.assert_close(adapted(tokens), alive)
    assert not torch.allclose(alive, plain(tokens)) and not adapted.learning
    for name, before in plain.named_parameters():
        after = adapted.get_parameter(name)
        assert torch.equal(saved[name], after)
        change = after - before
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 3 if name in matrices else not change.any(), name
    assert len(matrices) == 4 * LAYERS and saved.keys() == dict(plain.named_parameters()).keys()


def test_what_learns_beside_the_adapters():
    found = model()
    choose_part(found, PartConfig(lora_rank=2), "it")
    assert {n for n in learning(found) if not n.startswith("learning.lora.")} == {
        "classifier.weight",
        "classifier.bias",
    }
    thin = 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)  # r (in + out) of Q, K and V, of O, and of both of the MLP
    adapters = [p.numel() for n, p in found.named_parameters() if n.startswith("learning.")]
    assert sum(adapters) == LAYERS * thin and float(found.learning["lora"]["stack/blocks/0/mlp/up"].scale) == 2


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_with_adapters_is_an_ordinary_run(gpt, labelled, command, cache, tmp_path, ranks):
    argv = ["train_gpt.py", "--task", "classify", "--init", gpt, "--train", labelled / "train.tsv", "--valid",
            labelled / "valid.tsv", *FLAGS, "--lora_rank", 4, "--checkpoint_every", 2]  # fmt: skip
    done = command(*argv, "--out", tmp_path / "a", ranks=ranks)
    before, after = (load_tensors(folder / "model.safetensors") for folder in (gpt, tmp_path / "a"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert after.keys() - before.keys() == {"classifier.weight", "classifier.bias"}
    assert changed and all(".blocks." in name and before[name].ndim == 2 for name in changed)
    assert all(torch.linalg.matrix_rank(after[n] - before[n], rtol=1e-3) <= 4 for n in changed)
    result = last_json(done)
    adapters = 2 * 4 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)
    assert result["trained_parameters"] == adapters + 2 * 32 + 2 and "parameters learn" in done.stdout
    assert result["parameters"] == sum(t.numel() for t in after.values())
    if not ranks:  # and it goes on to the bit
        stopped = signalled(3, signal.SIGTERM, [*argv, "--out", tmp_path / "b"], cache)
        assert stopped.returncode == 128 + signal.SIGTERM
        command("-m", "mini", "classify", tmp_path / "b", "a great film")  # from a checkpoint
        command(*argv, "--out", tmp_path / "b")
        a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
        assert a == b
    command("compress.py", "quantize", tmp_path / "a", "--scheme", "dynamic", "--out", tmp_path / "int8")


# ---------------------------------------------------------------- freezing
@pytest.mark.parametrize(("what", "stay"), [
    ("0.34", {"stack.tokens", "stack.positions", "stack.blocks.0"}),
    ("1", {"stack.tokens", "stack.positions", "stack.blocks.0", "stack.blocks.1", "stack.blocks.2"}),
    ("0", {"stack.tokens", "stack.positions"}),
    ("stack.blocks.1, stack.blocks.2.mlp", {"stack.blocks.1", "stack.blocks.2.mlp"}),
    ("none", set()),
])  # fmt: skip
def test_freezing(what, stay):
    found = model()
    choose_part(found, PartConfig(freeze=what), "it")
    frozen = {name for name, _ in found.named_parameters()} - learning(found)
    assert frozen == {name for name, _ in found.named_parameters() if any(f"{name}.".startswith(f"{s}.") for s in stay)}


def test_frozen_weights_stay_to_the_bit(bert, labelled, command, tmp_path):
    argv = ["train_bert.py", "--task", "classify", "--init", bert, "--train", labelled / "train.tsv", "--valid",
            labelled / "valid.tsv", *FLAGS, "--weight_decay", 0.1, "--freeze", 0.5]  # fmt: skip
    command(*argv, "--out", tmp_path / "a")
    before, after = (load_tensors(folder / "model.safetensors") for folder in (bert, tmp_path / "a"))
    same = {name for name in before.keys() & after if torch.equal(before[name], after[name])}
    stack = {name for name in after if name.startswith("stack.")}
    assert stack - same == {name for name in stack if name.startswith(("stack.blocks.1", "stack.norm"))}


# ---------------------------------------------------------------- layer after layer
@pytest.mark.parametrize(("options", "lowest"), [
    (dict(), [4, 4, 3, 3, 3, 2, 2, 2, 1, 1] + [0] * 10),
    (dict(freeze="0"), [4, 4, 4, 3, 3, 3, 3, 2, 2, 2] + [1] * 10),
    (dict(lora_rank=2), [4, 4, 4, 3, 3, 3, 3, 2, 2, 2] + [1] * 10),
])  # fmt: skip
def test_unfreezing(options, lowest):
    found = model()
    (method,) = choose_part(found, PartConfig(unfreeze=0.5, **options), "it")
    learns = [(name, p) for name, p in found.named_parameters() if p.requires_grad]
    assert len({depth(found, name) for name, _ in learns}) == len(set(lowest))
    for done, low in enumerate(lowest):
        for _, p in learns:
            p.grad = torch.ones_like(p)
        method.after_backward(done, 20)
        alive = {depth(found, name) for name, p in learns if p.grad is not None}
        assert alive == set(range(low, LAYERS + 2)), done  # all behind it, too


@pytest.mark.parametrize("config", [dict(n_classes=0), dict(n_classes=0, tied=False), dict()])
def test_the_head_is_what_gives_the_answer(config):
    found = model(**config)
    top = {name for name, _ in found.named_parameters() if depth(found, name) == LAYERS + 1}
    head = {"stack.tokens.weight"} if config == dict(n_classes=0) else {"head.weight"} if config else {
        "classifier.weight", "classifier.bias"}  # fmt: skip
    assert top == head | {"stack.norm.weight", "stack.norm.bias"}


def test_adapters_and_freezing_together():
    found = model()
    choose_part(found, PartConfig(freeze="0.34", lora_rank=2), "it")
    assert {name.split("/")[2] for name in found.learning["lora"]} == {"1", "2"}


def test_muon_keeps_its_turns_where_parameters_begin_late():
    """Every matrix is stepped once in four steps, whenever it began."""
    found = model(n_classes=0)
    (method,) = choose_part(found, PartConfig(unfreeze=0.5), "it")
    _, muon = make_optimizers(found, OptimConfig("muon", turns=4))
    stepped = {name: [] for name, p in found.named_parameters() if ".blocks." in name and p.ndim == 2}
    for done in range(40):
        before = {name: found.get_parameter(name).clone() for name in stepped}
        for p in found.parameters():
            p.grad = torch.ones_like(p)
        method.after_backward(done, 40)
        muon.step()
        for name in stepped:
            if not torch.equal(before[name], found.get_parameter(name)):
                stepped[name].append(done)
    for name, steps in stepped.items():
        begin = round(method.begins[name] * 20)
        assert begin <= steps[0] < begin + 4 and set(torch.tensor(steps).diff().tolist()) == {4}, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_unfreezing_goes_on_to_the_bit(gpt, labelled, command, cache, tmp_path, optimizer):
    argv = ["train_gpt.py", "--task", "classify", "--init", gpt, "--train", labelled / "train.tsv", "--valid",
            labelled / "valid.tsv", *FLAGS, "--unfreeze", 0.9, "--layer_decay", 0.8,
            "--optimizer", optimizer, "--turns", 2]  # fmt: skip
    command(*argv, "--out", tmp_path / "a")
    assert signalled(2, signal.SIGTERM, [*argv, "--out", tmp_path / "b"], cache).returncode == 128 + signal.SIGTERM
    assert "going on from" in command(*argv, "--out", tmp_path / "b").stdout
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_fall_from_layer_to_layer(optimizer):
    found = model()
    choose_part(found, PartConfig(layer_decay=0.5), "it")
    rates = {id(p): g["peak_lr"] for o in make_optimizers(found, OptimConfig(optimizer)) for g in o.param_groups
             for p in g["params"]}  # fmt: skip
    plain = make_optimizers(twin := model(), OptimConfig(optimizer))
    usual = {id(p): g["peak_lr"] for o in plain for g in o.param_groups for p in g["params"]}
    for name, p in found.named_parameters():
        share = 0.5 ** (LAYERS + 1 - depth(found, name))
        assert rates[id(p)] == pytest.approx(share * usual[id(twin.get_parameter(name))]), name
    assert depth(found, "stack.positions.weight") == 0 and depth(found, "stack.norm.weight") == LAYERS + 1


# ---------------------------------------------------------------- refused
@pytest.mark.parametrize(("options", "says"), [
    (dict(freeze="2"), "a share of the layers is 0 to 1"),
    (dict(freeze="stack.block"), "begins so, as with .*stack.norm, classifier"),
    (dict(freeze="stack,classifier"), "nothing is left that learns"),
    (dict(freeze="stack.,head,classifier", tied=False), "nothing is left that learns"),
    (dict(freeze="stack,classifier", tied=False), "nothing is left that learns"),
    (dict(freeze="1", unfreeze=0.5), "nothing that could begin later"),
    (dict(lora_rank=17), "--lora_rank 17: stack.blocks.0.attention.qkv is 48 x 16; give less"),
    (dict(lora_alpha=3), "--lora_alpha: without --lora_rank"),
])  # fmt: skip
def test_refused(options, says):
    tied = options.pop("tied", True)
    with pytest.raises(UserError, match=says):
        choose_part(model(tied=tied), PartConfig(**options), "it")


@pytest.mark.parametrize("names", [["A.weight"], ["A.weight", "B.weight", "scale"]])
def test_odd_adapters_of_a_file(names):
    tensors = {f"{lora.PREFIX}stack/x.{name}": torch.ones(2, 2) for name in names}
    with pytest.raises(UserError, match=r"a file: learning.*does not fit its matrix"):
        lora.merged(tensors, "a file")


def test_adapters_would_fill_zeros():
    pruned = model()
    sparse.set_masks(pruned, {"stack.blocks.0.mlp.up.weight": torch.rand(64, 16) > 0.5})
    with pytest.raises(UserError, match="it is pruned or int8"):
        choose_part(pruned, PartConfig(lora_rank=2), "it")


def test_a_part_of_nothing(command, text_file, tmp_path):
    done = command("train_gpt.py", "--data", text_file, "--freeze", 0.5, "--out", tmp_path / "x", status=2)
    assert "--freeze: a part of what?" in done.stderr and not (tmp_path / "x").exists()
