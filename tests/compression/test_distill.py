"""What a student learns from its teacher: each loss against its equation, students' shapes, and the command."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import last_json, metrics

from mini import GPT, Bert, ModelConfig, load_run
from mini.compression import distill
from mini.compression.activations import recording
from mini.compression.distill import DistillConfig
from mini.compression.shrink import without_layers
from mini.errors import UserError
from mini.model.attention import View, attend_reference
from mini.presets import ENCODER, MODERN
from mini.tasks.base import Batch, Task
from mini.tasks.classify import Classification
from mini.tasks.lm import LanguageModelling
from mini.tasks.masked import MaskedLanguageModelling
from mini.tasks.qa import QuestionAnswering
from mini.tensors import load_tensors

SIZE = dict(n_layers=4, n_heads=4, d_model=32, max_len=16, vocab_size=60)
WAYS = [
    dict(SIZE, **MODERN, logit_softcap=2.0),
    dict(SIZE, **MODERN, n_classes=3),
    dict(SIZE, **ENCODER, norm_place="post", n_classes=3),
    dict(SIZE, **ENCODER, mlm=True),
    dict(SIZE, **ENCODER, spans=True),
]
EVERYTHING = dict(soft=1.0, cosine=1.0, embedding=1.0, hidden=1.0, attention=1.0, relations=1.0)


def make(settings: dict, seed: int = 0, **changes) -> GPT | Bert:
    torch.manual_seed(seed)
    model = (GPT if settings.get("causal", True) else Bert)(ModelConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def task_for(settings: dict) -> Task:
    """The task of these heads, with its own loss, on other data than its own."""
    cls = LanguageModelling if settings.get("causal", True) else MaskedLanguageModelling
    cls = Classification if settings.get("n_classes") else QuestionAnswering if settings.get("spans") else cls
    task = cls.__new__(cls)
    task.class_weights = None
    return task


def inputs_for(settings: dict, width: int = 10) -> dict:
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([10, 7, 5, 8])
    tokens = torch.randint(60, (4, 10), generator=g)
    real = torch.arange(width) < lengths[:, None]
    if settings.get("causal", True) and not settings.get("n_classes"):
        targets = F.pad(torch.randint(60, (4, 10), generator=g), (0, width - 10)).masked_fill(~real, -100)
        return {"tokens": F.pad(tokens, (0, width - 10), value=3), "targets": targets}
    padded = F.pad(tokens, (0, width - 10), value=3)
    if settings.get("n_classes"):
        return {"tokens": padded, "lengths": lengths, "labels": torch.tensor([0, 2, 1, 1])}
    if settings.get("spans"):
        ends = {"starts": torch.tensor([3, 0, 2, 5]), "ends": torch.tensor([4, 0, 2, 7])}
        return {"tokens": padded, "lengths": lengths, "segments": torch.zeros_like(padded), **ends}
    places, targets = torch.tensor([[1, 4], [2, 2], [0, 3], [5, 6]]), torch.tensor([[9, 8], [7, -100], [6, 5], [4, 3]])
    return {"tokens": padded, "lengths": lengths, "positions": places, "targets": targets}


def lesson(settings: dict, **changes) -> tuple[distill.Distillation, GPT | Bert]:
    teacher = make(settings, seed=1)
    student = make(settings, n_layers=2, **changes)
    return distill.Distillation(task_for(settings), student, teacher, DistillConfig(**EVERYTHING, hard=1.0)), student


# ---------------------------------------------------------------- losses
def test_soft_targets_is_hintons_equation():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 7, generator=g, requires_grad=True), torch.randn(5, 7, generator=g)
    for T in (1.0, 2.0, 5.0):
        p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
        expected = T * T * (p * (p / q).log()).sum()
        found = distill.soft_targets(student, teacher, T)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found / 5, T * T * F.kl_div(q.log(), p, reduction="batchmean"))
        (gradient,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(gradient, T * (q - p).detach())  # of the size of q - p times T, not over T


def test_attention_and_relations_by_hand():
    g = torch.Generator().manual_seed(0)
    B, H, T, D = 2, 2, 4, 3
    a, b = (tuple(torch.randn(3, B, H, T, D, generator=g)) for _ in range(2))
    lengths = [4, 2]
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    visible = (real[:, None, :] & torch.ones(T, T, dtype=torch.bool).tril()).clone()
    error = divergence = 0.0
    joined = [x[2].transpose(1, 2).reshape(B, T, 3, 2) for x in (a, b)]  # three heads of two, of two of three
    for n in range(B):
        for t in range(lengths[n]):
            keys = range(t + 1)
            for h in range(H):
                s, u = ([float(x[0][n, h, t] @ x[1][n, h, j]) / math.sqrt(D) for j in keys] for x in (a, b))
                error += sum((x - y) ** 2 for x, y in zip(s, u, strict=True)) / len(s) / H
            for h in range(3):
                s, u = (
                    torch.tensor([float(x[n, t, h] @ x[n, j, h]) / math.sqrt(2) for j in keys]).softmax(0)
                    for x in joined
                )
                divergence += float((u * (u / s).log()).sum()) / 3
    assert float(distill.attention_error(a, b, visible, real)) == pytest.approx(error, rel=1e-4)
    for dtype in (torch.float32, torch.float16):  # which does not hold every mask's numbers
        found = float(distill.relation_error(a[2].to(dtype), b[2].to(dtype), 3, visible, real))
        assert found == pytest.approx(divergence, rel=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("settings", WAYS)
def test_observed_is_what_was_computed(settings):
    """From the queries, keys and values that were seen the block's attention follows; the rest is as it was."""
    model, inputs = make(settings), inputs_for(settings)
    inside = []
    out = model.stack.blocks[1].attention.out
    handle = out.register_forward_pre_hook(lambda module, arguments: inside.append(arguments[0]))
    with torch.no_grad():
        plain = task_for(settings).loss(model, inputs)
        with recording(model) as seen:
            watched = task_for(settings).loss(model, inputs)
    handle.remove()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert len(seen.hidden) == 5 and len(seen.attention) == 4 and len(inside) == 2
    q, k, v = seen.attention[1]
    y = attend_reference(q, k, v, View(model.config.causal, seen.real), 0.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y[seen.real], inside[0][seen.real], atol=1e-5, rtol=1e-4)
    assert model.stack.blocks[1].attention.attend.__name__.startswith("attend")  # put back


@pytest.mark.parametrize("settings", WAYS)
def test_a_copy_of_the_teacher_has_nothing_to_learn(settings):
    teacher, options = make(settings), DistillConfig(**EVERYTHING)
    task = distill.Distillation(task_for(settings), make(settings), teacher, options)
    with torch.no_grad():
        losses = task.loss(make(settings), inputs_for(settings))
    assert set(EVERYTHING) < set(losses)
    assert all(abs(float(losses[name])) < 1e-3 for name in EVERYTHING)
    assert sum(float(v) for name, v in losses.items() if name not in EVERYTHING) > 1


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("width", [32, 24])
def test_losses_depend_neither_on_padding_nor_on_how_a_batch_is_cut(settings, width):
    task, student = lesson(settings, d_model=width)
    assert bool(student.learning) == (width != 32)
    with torch.no_grad():
        whole = task.loss(student, inputs_for(settings))
        longer = task.loss(student, inputs_for(settings, width=14))
        parts = [task.loss(student, {k: v[i : i + 2] for k, v in inputs_for(settings).items()}) for i in (0, 2)]
    for name, value in whole.items():
        assert float(value) > 0
        torch.testing.assert_close(longer[name], value, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(sum(part[name] for part in parts), value, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_each_loss_alone_brings_the_student_nearer(settings, name):
    teacher, student = make(settings, seed=1), make(settings, n_layers=2, d_model=24)
    weights = dict.fromkeys((*EVERYTHING, "hard"), 0.0) | {name: 1.0}
    task = distill.Distillation(task_for(settings), student, teacher, DistillConfig(**weights))
    before = [p.clone() for p in teacher.parameters()]
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    seen = []
    for _ in range(25):
        loss = task.loss(student, inputs_for(settings))[name]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


# ---------------------------------------------------------------- layers and students
def test_layer_maps():
    assert distill.layer_map("uniform", 4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]  # g(m) = 3m, counted from 1
    assert distill.layer_map("last", 2, 6) == [(0, 4), (1, 5)] and distill.layer_map("first", 2, 6) == [(0, 0), (1, 1)]
    assert distill.layer_map("0:0,2:1", 2, 6) == [(0, 0), (1, 2)]
    for spec, message in (
        ("0:0,6:1", "no 6"),
        ("0:0,0:0", "twice"),
        ("0:2", "no 2"),
        ("0-1", "teacher:student"),
        ("lst", "teacher:student"),
    ):
        with pytest.raises(UserError, match=message):
            distill.layer_map(spec, 2, 6)
    with pytest.raises(UserError, match="has 8 layers"):
        distill.layer_map("uniform", 8, 6)


@pytest.mark.parametrize(
    "name, layers, width", [("distilbert", 6, 768), ("tinybert4", 4, 312), ("tinybert6", 6, 768), ("minilm6", 6, 384)]
)
def test_students_of_bert_base_are_those_of_the_papers(name, layers, width):
    base = ModelConfig(n_layers=12, n_heads=12, d_model=768, **ENCODER)
    config = distill.student_config(base, DistillConfig(student=name))
    assert (config.n_layers, config.d_model, config.n_heads) == (layers, width, 12)


def test_students_begin_with_their_teachers_layers():
    teacher = make(WAYS[0])
    student = distill.make_student(teacher, DistillConfig(n_layers=2))
    for mine, theirs in ((0, 0), (1, 3)):
        ours = student.stack.blocks[mine].state_dict()
        assert all(torch.equal(t, ours[n]) for n, t in teacher.stack.blocks[theirs].state_dict().items())
    assert torch.equal(student.head.weight, teacher.head.weight)
    fresh = distill.make_student(teacher, DistillConfig(n_layers=2, start="random"))
    assert not torch.equal(fresh.head.weight, teacher.head.weight)
    assert distill.make_student(teacher, DistillConfig(d_model=16)).config.d_model == 16
    with pytest.raises(UserError, match="teacher's width"):
        distill.make_student(teacher, DistillConfig(d_model=16, start="first"))
    with pytest.raises(UserError, match="names 3 layers"):
        distill.make_student(teacher, DistillConfig(start="0,1,2"))


def test_heads_that_do_not_fit_are_refused():
    teacher, student = make(WAYS[0]), make(WAYS[0], n_layers=2, n_heads=2)
    with pytest.raises(UserError, match="has 2 heads"):
        distill.Distillation(task_for(WAYS[0]), student, teacher, DistillConfig("tinybert"))
    distill.Distillation(task_for(WAYS[0]), student, teacher, DistillConfig("minilm"))
    with pytest.raises(UserError, match="cut into so many"):
        distill.Distillation(task_for(WAYS[0]), student, teacher, DistillConfig("minilm", relation_heads=5))


def test_a_student_of_a_teacher_with_uneven_layers():
    teacher = make(SIZE, d_ff=[80, 76, 60, 64])
    with pytest.raises(UserError, match="--n_heads and --d_ff"):
        distill.make_student(teacher, DistillConfig())
    student = distill.make_student(teacher, DistillConfig(n_heads=4, d_ff=64))
    assert student.config.d_ff == 64 and student.config.n_layers == 2


@pytest.mark.parametrize("settings", WAYS)
@pytest.mark.parametrize("spec, theirs", [("uniform", [1, 3]), ("first", [0, 1]), ("2:0,0:1", [2, 0])])
def test_each_layer_learns_from_the_one_it_is_given(settings, spec, theirs):
    """Layers are equal to the student's where the map leads, and to none of them elsewhere."""
    student, teacher = make(settings, n_layers=2), make(settings, seed=5)
    with torch.no_grad():  # layers that hand their input on, so that a layer's place does not matter
        for name, parameter in [*student.named_parameters(), *teacher.named_parameters()]:
            if ".attention.out." in name or ".mlp.down." in name:
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(name.endswith("weight"))
        copied = {n: p for n, p in student.state_dict().items() if ".blocks." not in n}
        teacher.load_state_dict(copied, strict=False)
        for mine, layer in enumerate(theirs):
            teacher.stack.blocks[layer].load_state_dict(student.stack.blocks[mine].state_dict())

    def losses(spec: str) -> dict:
        options = DistillConfig(**EVERYTHING, layer_map=spec)
        task = distill.Distillation(task_for(settings), student, teacher, options)
        with torch.no_grad():
            return task.loss(student, inputs_for(settings))

    right, wrong = losses(spec), losses("0:0,2:1" if spec == "uniform" else "last")
    for name in ("attention", "relations"):
        assert float(right[name]) < 1e-4 and float(wrong[name]) > 1e-2


@pytest.mark.parametrize("settings", WAYS)
def test_hidden_states_are_those_after_each_layer(settings):
    """Of a teacher that begins with the student's two layers the first two states are the student's."""
    teacher = make(settings)
    student = without_layers(teacher, [0, 1])
    for spec, equal in (("0:0", True), ("1:1", True), ("1:0", False), ("0:1", False), ("3:1", False)):
        options = DistillConfig(hidden=1.0, hard=1.0, soft=0.0, layer_map=spec)
        task = distill.Distillation(task_for(settings), student, teacher, options)
        with torch.no_grad():
            found = float(task.loss(student, inputs_for(settings))["hidden"])
        assert (found < 1e-4) == equal, spec


def test_two_last_layers_are_compared_behind_the_last_norm():
    teacher = make(WAYS[0])
    student = make(WAYS[0])
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.stack.norm.weight.mul_(2)
    options = DistillConfig(hidden=1.0, cosine=1.0, layer_map="3:3")
    with torch.no_grad():
        losses = distill.Distillation(task_for(WAYS[0]), student, teacher, options).loss(student, inputs_for(WAYS[0]))
        with recording(teacher) as seen:
            task_for(WAYS[0]).loss(teacher, inputs_for(WAYS[0]))
    expected = seen.final[seen.real].square().mean(-1).sum()  # (2 h - h)²
    torch.testing.assert_close(losses["hidden"], expected)
    assert abs(float(losses["cosine"])) < 1e-3


def test_each_loss_is_divided_by_what_it_is_a_sum_over():
    """Soft targets by the answers, all other losses of the teacher by the real tokens, as the loop does of itself."""
    for settings, counts in ((WAYS[0], {"lm": 7}), (WAYS[4], {"qa": 8}), (WAYS[3], {"mlm": 6, "nsp": 4})):
        options = DistillConfig(**EVERYTHING)
        lesson = distill.Distillation(task_for(settings), make(settings), make(settings), options)
        found = lesson.counts(Batch({}, counts, n_tokens=30))
        assert found == counts | {"soft": next(iter(counts.values()))}


def test_the_task_keeps_its_own_weights():
    task = task_for(WAYS[3])
    task.loss_weights, task.default_weight = {"nsp": 0.25}, 0.5
    mlm = distill.Distillation(task, make(WAYS[3]), make(WAYS[3]), DistillConfig(alpha=0.8))
    assert mlm.loss_weights == {"soft": 0.8, "nsp": pytest.approx(0.05)} and mlm.default_weight == pytest.approx(0.1)


def test_a_loss_that_a_teacher_would_drop_is_refused(monkeypatch):
    task = task_for(WAYS[0])
    monkeypatch.setattr(type(task), "loss", lambda self, model, inputs: {})
    with pytest.raises(UserError, match="losses"):
        distill.Distillation(task, make(WAYS[0]), make(WAYS[0]), DistillConfig())


def test_the_teacher_neither_drops_nor_learns():
    settings = dict(WAYS[0], dropout=0.5)
    teacher, student = make(settings, seed=1).train(), make(settings, dropout=0.0)
    task = distill.Distillation(task_for(settings), student, teacher, DistillConfig())
    first, second = (task.loss(student, inputs_for(settings))["soft"] for _ in range(2))
    assert torch.equal(first, second) and not any(p.requires_grad for p in teacher.parameters())


def test_a_head_that_learns_nothing_keeps_no_best_weights():
    for options, best in ((DistillConfig("tinybert"), None), (DistillConfig(), "accuracy")):
        assert distill.Distillation(task_for(WAYS[2]), make(WAYS[2]), make(WAYS[2]), options).best == best


def test_without_a_weight_the_teacher_is_not_asked():
    task = distill.Distillation(task_for(WAYS[0]), make(WAYS[0]), make(WAYS[0]), DistillConfig(alpha=0.0))
    task.ask = None
    assert task.loss(make(WAYS[0]), inputs_for(WAYS[0])).keys() == {"lm"}


# ---------------------------------------------------------------- the command
def taught(command, gpt, out, *flags, status=0, ranks=0):
    flags = ["--steps", 12, "--eval_every", 0, *flags]
    return command("compress.py", "distill", gpt, "--out", out, *flags, status=status, ranks=ranks)


@pytest.mark.parametrize("recipe, names", [("hinton", "soft"), ("tinybert", "embedding hidden attention")])
def test_a_student_of_another_width_goes_on_to_the_bit(gpt, tmp_path, command, recipe, names):
    flags = ["--recipe", recipe, "--student", "tinybert6", "--d_model", 16, "--checkpoint_every", 6]
    done = taught(command, gpt, tmp_path / "whole", *flags)
    assert "The teacher: val_loss" in done.stdout
    row = metrics(tmp_path / "whole")[-1]
    assert {"lm", *names.split()} < set(row)
    weights = DistillConfig(recipe).weights()
    weights["lm"] = weights["hard"]
    assert row["loss"] == pytest.approx(sum(weights[name] * row[name] for name in weights if name in row), rel=1e-5)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    (tmp_path / "cut" / "model.safetensors").unlink()
    load_run(tmp_path / "cut")  # an unfinished one opens, without its projections
    assert "going on from" in taught(command, gpt, tmp_path / "cut", *flags).stdout
    whole, cut = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    model, _ = load_run(tmp_path / "whole")
    assert model.config.d_model == 16 and model.config.n_layers == 1
    before = json.loads((gpt / "result.json").read_text())["parameters"]
    assert last_json(done)["parameters"] == model.num_params() < before
    command("compress.py", "quantize", tmp_path / "whole", "--out", tmp_path / "int8")


def test_several_processes_teach_as_one(gpt, tmp_path, command):
    flags = ["--recipe", "distilbert", "--d_model", 16, "--dtype", "float32"]
    one = last_json(taught(command, gpt, tmp_path / "one", *flags))
    two = last_json(taught(command, gpt, tmp_path / "two", *flags, "--accumulation", 2, ranks=2))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


def test_refusals(gpt, text_file, tmp_path, command):
    other = tmp_path / "bpe"
    size = ["--n_layers", 1, "--n_heads", 2, "--d_model", 32, "--max_len", 32, "--device", "cpu", "--lr", 0]
    quick = ["--steps", 1, "--eval_every", 0, "--sample_every", 0]
    command("train_gpt.py", "--data", text_file, "--vocab_size", 300, *size, *quick, "--out", other)
    for run, flags, message in [
        (gpt, ["--recipe", "minilm", "--layer_map", "0:0,2:1"], "no 2"),
        (gpt, ["--layer_map", "last"], "--layer_map has no effect here"),
        (gpt, ["--train", text_file], "is pretrained and reads --data"),
        (gpt, ["--cache", text_file], "is a file"),
        (gpt, ["--recipe", "tinybert", "--n_heads", 1], "has 1 heads"),
        (gpt, ["--init", other], "another tokenizer"),
        (gpt, ["--init", gpt.parent / "nothing"], "no such run folder"),
        (gpt, ["--recipe", "hintn"], "did you mean hinton"),
        (gpt, ["--alpha", 0.5, "--soft", 1], "--alpha"),
        (gpt, ["--soft", 0, "--hard", 0], "nothing to learn"),
        (other, [], "no better than chance"),
    ]:
        done = taught(command, run, tmp_path / "x", *flags, status=2)
        assert message in done.stderr and not (tmp_path / "x").exists(), message
