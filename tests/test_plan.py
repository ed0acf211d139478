"""What `mini plan` counts, against what PyTorch keeps, holds and computes here, however fast the machine."""

from dataclasses import replace

import pytest
import torch
from conftest import last_json
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mini import GPT, Bert, ModelConfig, plan
from mini.bench import BenchOptions, random_task
from mini.model.layers import Linear
from mini.plan import PlanOptions
from mini.presets import PRESETS, model_preset
from mini.training import loop
from mini.training.loop import TrainConfig
from mini.training.muon import orthogonalize
from mini.training.optim import OptimConfig, make_optimizers
from mini.training.ranks import World

SMALL = dict(n_layers=3, n_heads=4, d_model=64, max_len=48, vocab_size=100)
MODERN = dict(norm="rmsnorm", positions="rope", activation="relu2", qk_norm=True, bias=False, tied=False)
ENCODER = dict(causal=False, n_segments=2, norm_place="post", activation="gelu")
MODERN_ENCODER = dict(
    causal=False, positions="rope", window=[0, 32, 32], activation="geglu", embed_norm=True, bias=False
)
VARIANTS = {
    "gpt": {},
    "bert": ENCODER,
    "dropout": dict(ENCODER, dropout=0.1),
    "long": dict(max_len=600, n_layers=1),
    "fused": dict(attention="fused"),
    "written": dict(attention="reference"),
    "gated": dict(activation="swiglu"),
    "grouped": dict(n_kv_heads=2),
    "lists": dict(n_heads=[4, 2, 2], d_head=16, d_ff=[64, 128, 300]),
    "modern": MODERN,
    "values": dict(MODERN, value_embeddings=True),
    "values-fused": dict(MODERN, value_embeddings=True, attention="fused"),
    "grouped-values": dict(MODERN, value_embeddings=True, n_kv_heads=2),
    "window": dict(window=16, max_len=512),
    "modernbert": dict(MODERN_ENCODER, max_len=512),
}


def kept_bytes(config: ModelConfig, B: int, dtype: torch.dtype) -> int:
    """What autograd keeps of a stack's forward pass: numbers, each storage once, without weights and their copies."""
    model = (GPT if config.causal else Bert)(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # holds them, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    bf16 = dtype == torch.bfloat16
    tokens, real = torch.randint(config.vocab_size, (B, config.max_len)), None
    if not config.causal:
        real = torch.ones_like(tokens, dtype=torch.bool)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        keep(model.stack(tokens, real=real))
    copies = sum(2 * m.weight.numel() for m in model.stack.modules() if isinstance(m, Linear)) if bf16 else 0
    return sum(t.untyped_storage().nbytes() for t in kept.values()) - copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_activations(name, dtype):
    """To the byte, but for tables of positions and masks that all rows share."""
    c, B, a = ModelConfig(**SMALL | VARIANTS[name]), 4, dtype.itemsize
    counted = sum(plan.block_bytes(c, layer, B, c.max_len, a, True) for layer in range(c.n_layers))
    counted += plan.ends_bytes(c, B, c.max_len, 1.0, a, True)
    exact = c.positions == "learned" and c.causal and not c.window
    assert counted == pytest.approx(kept_bytes(c, B, dtype), rel=0 if exact else 0.01)


def step_peak(what: str, c: ModelConfig, o: PlanOptions, train: TrainConfig, optim: OptimConfig) -> tuple[float, float]:
    """The most bytes that PyTorch holds in a training step, the third, and the plan's."""
    task, model = random_task(BenchOptions(what=what, steps=20, batch_size=train.batch_size), c)
    optimizers, world = make_optimizers(model, optim), World("cpu")
    model.train().stack.checkpoint_activations = train.checkpoint_activations
    losses_of, size, dtype = loop.Losses(model, task), loop.micro_batch_size(train, world), getattr(torch, o.dtype)

    def step(n: int) -> None:
        batches = loop.micro_batches(task, n, size, train, world)
        counts, n_tokens, _ = loop.count(task, batches, world)
        loop.backward(losses_of, task, model.loss_weights, batches, counts, n_tokens, dtype, world)
        loop.clip_gradients(model, optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step(0), step(1)
    states = [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    held = most = sum(t.nbytes for t in [*model.parameters(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step(2)
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # below 0 where something is freed
        most = max(most, held)
    moments = plan.memory(model, o, train, optim, task.predicted)
    return most, max(sum(parts.values()) for name, parts in moments.items() if name != "an evaluation")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "what, config, train, optimizer",
    [
        ("train", dict(d_model=256), {}, "adamw"),  # weights are the most of it
        ("train", dict(d_model=256), dict(accumulation=2), "muon"),
        ("train", dict(MODERN, value_embeddings=True, max_len=128), {}, "adamw"),  # activations are
        ("train", dict(d_model=128, max_len=128, n_layers=6), dict(checkpoint_activations=True), "adamw"),
        ("train", dict(vocab_size=8000), {}, "adamw"),  # the loss is
        ("train", dict(vocab_size=8000, logit_softcap=15.0), {}, "adamw"),
        ("mlm", dict(ENCODER, d_model=128, dropout=0.1), {}, "adamw"),
    ],
)
def test_the_peak_of_a_step(what, config, train, optimizer, dtype):
    train, optim = TrainConfig(batch_size=8, **train), OptimConfig(optimizer=optimizer, turns=1)
    c = ModelConfig(**SMALL | dict(vocab_size=300) | config)
    measured, counted = step_peak(what, c, PlanOptions(dtype=dtype, device="cpu"), train, optim)
    assert counted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", ["laptop", "bert-laptop", "modernbert-laptop", "char"])
def test_the_parameters_of_presets(name, command):
    """Those of a real model."""
    figures, c = last_json(command("-m", "mini", "plan", "--preset", name)), model_preset(name)
    if not c.causal:
        c = replace(c, mlm=True, nsp=PRESETS[name].get("nsp", True))
    if PRESETS[name].get("tokenizer") == "bytes":
        c = replace(c, vocab_size=257)
    assert figures["parameters"] == (GPT if c.causal else Bert)(c).num_params()


def test_all_presets_are_planned(command):
    for name in PRESETS:
        figures = last_json(command("-m", "mini", "plan", "--preset", name, "--gpus", 8, "--shard", "true"))
        assert figures["bytes"] == pytest.approx(sum(figures["held"].values())) and figures["step_seconds"] > 0


def test_the_share_that_meets_the_vocabulary_is_the_task_s(command):
    task, model = random_task(BenchOptions(what="mlm"), ModelConfig(**SMALL | ENCODER | dict(vocab_size=320)))
    size = ["--n_layers", 3, "--n_heads", 4, "--d_model", 64, "--max_len", 48, "--vocab_size", 320]
    done = command("-m", "mini", "plan", "--preset", "bert-base", *size, "--batch_size", 2)
    assert last_json(done)["flops"] == pytest.approx(2 * 48 * 3 * model.flops(48, task.predicted))


def test_muon_s_arithmetic_is_what_pytorch_counts():
    with torch.device("meta"):
        model = GPT(ModelConfig(**SMALL | dict(d_ff=96)))
    matrices = [m for m in model.stack.blocks.modules() if isinstance(m, Linear)]
    with FlopCounterMode(display=False) as counted:
        for part in (part for m in matrices for part in m.weight.split(m.parts)):
            orthogonalize(part[None])
    assert counted.get_total_flops() == sum(plan.muon_flops(model))


def test_matrices_are_dealt_to_processes():
    assert plan.busiest([3.0, 1.0, 2.0, 5.0], turns=2, n=2) == (3 + 5) / 2  # by turns 3 and 2, 1 and 5
    assert plan.busiest([3.0, 1.0, 2.0, 5.0], turns=10, n=1) == 11 / 10
    assert plan.busiest([3.0, 1.0, 2.0, 5.0], turns=1, n=3) == 5 + 1


def planned(command, *flags: object) -> dict:
    size = ["--preset", "gpt2", "--vocab_size", 5056, "--batch_size", 64, "--accumulation", 2]
    return last_json(command("-m", "mini", "plan", *size, *flags))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_many_gpus_and_one(command, optimizer):
    own = ["--optimizer", optimizer, "--turns", 10]
    one, many = planned(command, *own), planned(command, *own, "--gpus", 8)
    parts = planned(command, *own, "--gpus", 8, "--shard", "true")
    exact = planned(command, *own, "--gpus", 8, "--shard", "true", "--dtype", "float32")
    P, blocks = one["parameters"], 12 * (12 * 768**2 + 13 * 768)
    matrices = 12 * 12 * 768**2 / 10 if optimizer == "muon" else 0  # whose turn it is
    assert one["bytes_sent"] == 0 and one["step_seconds"] == pytest.approx(one["arithmetic_seconds"])
    assert many["flops"] == parts["flops"]
    assert one["flops"] / 8 <= many["flops"] * (1 + 1e-9) < one["flops"] / 8 * (1.02 if optimizer == "muon" else 1.001)
    assert many["bytes_sent"] == pytest.approx(7 / 8 * 4 * (2 * P + matrices))
    assert exact["bytes_sent"] == pytest.approx(7 / 8 * 4 * (2 * (2 * P + blocks) + 2 * matrices / 8))
    assert parts["bytes_sent"] == pytest.approx(7 / 8 * 4 * (2 * 2 * P + 2 * matrices / 8))  # blocks in bfloat16
    for name in ("parameters", "optimizer state", "gradients"):
        assert many["held"][name] == pytest.approx(one["held"][name])
        assert parts["held"][name] == pytest.approx(one["held"][name] / 8)
    assert one["held"]["parameters"] == 4 * P
    slow = planned(command, *own, "--gpus", 8, "--link", 1e6)
    assert slow["bottleneck"] == "link" and slow["step_seconds"] > slow["link_seconds"]


def test_what_would_make_it_fit_does(command):
    small = ["--gpus", 4, "--gpu-memory=4e9", "--dtype", "float32"]
    tight = planned(command, *small)
    assert not tight["fits"] and tight["bottleneck"] == "memory" and tight["ways_to_fit"]
    for way in tight["ways_to_fit"]:
        assert planned(command, *small, *way.split())["fits"]
    none = planned(command, "--gpu_memory", 1e6)
    assert not none["fits"] and none["ways_to_fit"] == []


def test_the_preset_s_batch_is_made_to_fit_the_gpus_and_yours_is_not(command):
    assert last_json(command("-m", "mini", "plan", "--preset", "gpt2-xl", "--gpus", 64))["batch_size"] == 640
    done = command("-m", "mini", "plan", "--preset", "gpt2-xl", "--gpus", 64, "--batch_size", 480, status=2)
    assert "--batch_size 480 cannot be cut into 64 ranks x 5 parts" in done.stderr


def test_tokens_are_steps(command):
    figures = planned(command, "--tokens", 1e9)
    assert figures["steps"] == round(1e9 / (64 * 1024)) and figures["tokens"] == figures["steps"] * 64 * 1024


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpus", 0], "--gpus 0: must be at least 1"),
        (["--gpu_memory", 80], "--gpu_memory 80.0: must be at least 1,000,000"),
        (["--gpu-memory", "much"], "--gpu_memory much: expected a number"),
        (["--preset", "gpt3"], "unknown preset gpt3 (did you mean gpt2"),
        (["--link", "-1"], "--link -1.0: must be at least 1"),
        (["--lr", 1], "unknown flag --lr"),
        (["--steps", 9, "--tokens", 1e6], "--steps and --tokens"),
        (["--tokens", 0], "--tokens 0"),
        (["--steps", 0], "--steps 0"),
        (["--block", "lstm"], "--block lstm"),
        (["--mask_rate", 0.1], "--mask_rate is of a BERT's training"),
        (["--gpus", 3, "--batch_size", 4], "--batch_size 4 cannot be cut into 3 ranks x 1 parts: give 3 or 6"),
    ],
)
def test_what_cannot_be_planned(command, flags, message):
    done = command("-m", "mini", "plan", *flags, status=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
