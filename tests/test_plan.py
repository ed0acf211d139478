"""What mini plan computes, against what autograd keeps, what is alive at one time, and the real model's own counts."""

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import last_json
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mini.bench import BenchOptions, random_task
from mini.model.attention import View
from mini.model.config import ModelConfig
from mini.model.transformer import Block, rope_at
from mini.plan import PlanOptions, block_bytes, memory, read, seconds, sizes
from mini.presets import PRESETS, model_preset
from mini.training.devices import World
from mini.training.loop import Losses, TrainConfig, backward, clip_gradients, micro_batches
from mini.training.optim import OptimConfig, make_optimizers, orthogonalize
from mini.training.runs import MODELS

MODERN = dict(norm="rmsnorm", positions="rope", activation="relu2", qk_norm=True, bias=False)
ENCODER = dict(norm_place="post", causal=False, activation="gelu")
SHORT = {"float32": 4, "bfloat16": 2}


def kept_bytes(c: ModelConfig, B: int, T: int, dtype: str) -> int:
    """Of the storages that autograd keeps of a block's forward pass, apart from parameters and whole numbers."""
    block = Block(c, 0).train()
    rope = rope_at(torch.arange(T), c.head_size, 1e4).unsqueeze(-2) if c.positions == "rope" else None
    x, tokens = torch.randn(B, T, c.d_model, requires_grad=True), torch.zeros(B, T, dtype=torch.int64)
    parameters, found = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage
        return tensor

    view = View(c.causal, None, c.layers("window")[0], c.n_global)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        block(x, tokens, view, rope, None)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "tolerance, changes",
    [
        (0, dict(attention="fused")),
        (0, dict(attention="reference")),
        (0, dict(attention="auto")),
        (0, dict(ENCODER, attention="auto")),
        (0, dict(ENCODER, dropout=0.1)),
        (0, dict(activation="swiglu", value_embeddings=True, attention="fused")),
        (0, dict(n_kv_heads=2, attention="fused")),
        (0.02, dict(MODERN, attention="fused")),  # tables of RoPE are small, and not counted
        (0.02, dict(MODERN, value_embeddings=True)),
        (0.02, dict(MODERN, n_kv_heads=2, attention="fused")),
        (0.05, dict(positions="rope", max_len=512, window=16)),
        (0.05, dict(ENCODER, positions="rope", max_len=512, window=16, n_global=1)),
    ],
)
def test_what_autograd_keeps(dtype, tolerance, changes):
    c = ModelConfig(**{**dict(n_layers=1, n_heads=4, d_model=64, max_len=80), **changes})
    B, T = 3, c.max_len
    copies = 2 * sum(p.numel() for p in Block(c, 0).parameters() if p.ndim == 2) if dtype == "bfloat16" else 0
    if c.value_embeddings:
        copies -= copies and 2 * c.n_rows * c.d_model  # a table is no matrix of a product
    counted = block_bytes(c, 0, B, T, SHORT[dtype], cpu=True) + copies
    assert kept_bytes(c, B, T, dtype) == pytest.approx(counted, rel=tolerance, abs=0)


class Live(TorchDispatchMode):
    """The most bytes of tensors that are alive at one time."""

    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.alive:
                self.alive.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()

    def add(self, n: int) -> None:
        self.now += n
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "changes, loop, optimizer",
    [
        (dict(n_layers=4), dict(batch_size=8), "adamw"),
        (dict(n_layers=2, vocab_size=8192), dict(batch_size=8), "adamw"),
        (dict(n_layers=2, d_model=256, max_len=32), dict(batch_size=1), "adamw"),
        (dict(n_layers=2, d_model=256, max_len=32), dict(batch_size=1), "muon"),
        (dict(n_layers=6), dict(batch_size=16, checkpoint_activations=True), "adamw"),
        (dict(MODERN, n_layers=4, value_embeddings=True, tied=False), dict(batch_size=8, accumulation=2), "muon"),
        (dict(ENCODER, n_layers=4, n_segments=2, dropout=0.1, vocab_size=4096), dict(batch_size=16), "adamw"),
    ],
)
def test_the_most_that_is_alive(dtype, changes, loop, optimizer):
    config = ModelConfig(**{**dict(n_heads=4, d_model=128, max_len=128, vocab_size=512), **changes})
    train, optim = TrainConfig(dtype=dtype, device="cpu", **loop), OptimConfig(optimizer=optimizer, turns=2)
    world = World("cpu")
    with Live() as live:
        what = "train" if config.causal else "mlm"
        task, model = random_task(BenchOptions(what, batch_size=train.batch_size, steps=20), config)
        model.stack.checkpoint_activations = train.checkpoint_activations
        model.freeze_unused()
        optimizers = make_optimizers(model.train(), optim)
        for step in range(3):  # from the second on there are the optimizer's moments
            live.most = live.now
            batches = micro_batches(task, step, train.batch_size // train.accumulation, train, world)
            backward(Losses(model, task), task, {}, batches, getattr(torch, dtype), world)
            clip_gradients(model, 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
    assert memory(PlanOptions(), model, train, optim, task)["peak"] == pytest.approx(live.most, rel=0.15)


@pytest.mark.parametrize("preset", ["laptop", "laptop-long", "bert-laptop", "bert-tiny", "modernbert-laptop"])
def test_the_models_own_counts(preset):
    options, model, train, optim, task = read(["--preset", preset, "--optimizer", "muon"])
    kind = type(model).kind
    real = MODELS[kind](replace(model_preset(preset), mlm=model.config.mlm, nsp=model.config.nsp))
    assert model.num_params() == real.num_params() and all(p.is_meta for p in model.parameters())
    assert train.batch_size == PRESETS[preset]["batch_size"] and options.gpus == 1
    adamw, muon = make_optimizers(real, optim)
    counts = [sum(p.numel() for group in o.param_groups for p in group["params"]) for o in (adamw, muon)]
    size = sizes(model, optim)
    assert [size.learn - size.hidden, size.hidden] == counts
    tokens = train.batch_size * model.config.max_len
    found = seconds(options, model, train, optim, task)
    assert found["flops"] - found["muon_flops"] == 3 * tokens * real.flops(model.config.max_len, task.predicted)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)])
def test_flops_of_muon(shape):
    _, model, train, optim, task = read(["--optimizer", "muon", "--turns", "1", "--preset", "char"])
    a, b = shape[1:]
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape))
    assert counter.get_total_flops() == shape[0] * (4 * min(a, b) ** 2 * max(a, b) + 34 * min(a, b) ** 3)
    C = model.config.d_model  # four square matrices of a layer, and two of the MLP
    assert seconds(PlanOptions(), model, train, optim, task)["muon_flops"] == 4 * (4 * 38 + 2 * (16 + 34)) * C**3


def test_one_gpu_and_many():
    def on(*flags: str) -> tuple[dict, dict]:
        settings = read(["--preset", "gpt2", "--batch-size", "64", "--accumulation=1", *flags])
        return memory(*settings), seconds(*settings)

    (one, alone), (many, together) = on("--accumulation", "8"), on("--gpus", "8")
    P = one["parameters"]
    assert alone["bytes_sent"] == one["buckets"] == 0 and alone["step_s"] == pytest.approx(alone["arithmetic_s"])
    assert many["buckets"] == P and together["bytes_sent"] == 2 * 7 / 8 * P
    assert one["activations"] == many["activations"] and together["flops"] == alone["flops"]
    assert together["arithmetic_s"] == pytest.approx(alone["arithmetic_s"] / 8)
    shared, exchanged = on("--gpus", "8", "--shard", "true")
    for name in ("parameters", "gradients", "optimizer"):
        assert shared[name] == many[name] / 8
    assert shared["activations"] == many["activations"] and shared["peak"] < many["peak"]
    blocks = 12 * 12 * 768**2 * 4  # bytes, without biases and norms
    assert exchanged["bytes_sent"] == pytest.approx(7 / 8 * (2 * P + blocks), rel=1e-3)
    again, slower = on("--gpus", "8", "--checkpoint_activations", "true")
    assert again["activations"] < many["activations"] / 8 and slower["flops"] > 1.2 * together["flops"]
    slow = on("--gpus", "8", "--link", "1")[1]
    assert slow["step_s"] == pytest.approx(slow["link_s"], rel=1e-6)


def test_the_command(command):
    flags = [
        "--preset",
        "gpt2-xl",
        "--gpu-memory",
        "80e9",
        "--gpu-flops",
        "400e12",
        "--link",
        "25e9",
        "--tokens",
        "30e9",
    ]
    done = command("-m", "mini", "plan", *flags, "--gpus", 64)
    found = last_json(done)
    assert found["parameters"] == 1_557_611_200 and found["fits"] and found["bottleneck"] == "arithmetic"
    assert "--batch_size 512 --accumulation 1" in done.stdout and found["micro_batch"] == 8
    assert found["tokens"] == pytest.approx(30e9, rel=1e-4)
    small = ["--preset", "gpt2-xl", "--gpus", 8, "--gpu_memory"]
    tight = last_json(command("-m", "mini", "plan", *small, "40e9"))
    assert not tight["fits"] and tight["bottleneck"] == "memory" and len(tight["remedies"]) == 2
    for remedy in tight["remedies"]:
        assert last_json(command("-m", "mini", "plan", *small, "40e9", *remedy.split()))["fits"]
    assert last_json(command("-m", "mini", "plan", *small, "1e9"))["remedies"] == []
    sharded = last_json(command("-m", "mini", "plan", *flags, "--gpus", 64, "--shard", "true", "--link", "1e9"))
    assert sharded["bottleneck"] == "link"
    for preset in PRESETS:
        assert last_json(command("-m", "mini", "plan", "--preset", preset))["bytes"]["peak"] > 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpu-memory", "0"], "--gpu_memory 0.0: must be at least 1"),
        (["--preset", "gtp2"], "did you mean gpt2?"),
        (["--gpu_flop", "1"], "did you mean --gpu_flops?"),
        (["--preset", "gpt2", "--gpus", "7", "--batch_size", "480"], "cannot be cut into 7 ranks x 5 parts"),
        (["--block", "lstm"], "only a transformer's"),
        (["--nsp", "false"], "it is for BERTs"),
        (["--shard", "true"], "--gpus"),
        (["--steps", "1", "--tokens", "1"], "give one of them"),
    ],
)
def test_what_is_refused(command, flags, said):
    done = command("-m", "mini", "plan", *flags, status=2)
    assert said in done.stderr and done.stderr.count("\n") == 1
