"""Judges a run on files that it has not seen, each figure with its standard error.

What a file is decides what is asked of it: good and bad sentences (BLiMP's minimal pairs), choices (HellaSwag's form),
else whatever the run's own task is judged by, with the run's own preparation.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini.flags import Checked, UserError, option
from mini.model.transformer import Model
from mini.tasks.base import IGNORE, Task
from mini.tasks.inputs import pad, pad_texts, text_ids
from mini.tasks.metrics import with_error
from mini.text.rows import parse_json_row, read_rows
from mini.text.tokenizer import Tokenizer
from mini.training.checkpoints import read_result
from mini.training.devices import autocast, pick_dtype, progress_bar
from mini.training.loop import measure
from mini.training.ranks import World
from mini.training.start import Settings, open_run, open_test

PARTS = 30  # of a file, at the least, whose figures' differences tell the standard error


@dataclass
class EvaluateOptions(Checked):
    """Judge a run on files that it has not been chosen on."""

    run: str = option("", "a run folder, or one with published weights", positional="1")
    files: list[str] = option([], "what the run's task reads; or .jsonl with good, bad; or context, choices, answer",
                              positional="+")  # fmt: skip
    tokenizer: str | None = option(None, "for published weights that come without one")
    batch_size: int = option(32, "texts at a time, at the most", low=1)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("float32", "of matrix products", ("auto", "bfloat16", "float32"))


def evaluate(options: EvaluateOptions) -> None:
    """Prints a line for each figure, then all of them as one JSON object."""
    settings, world = open_run(options.run, options.tokenizer), World(options.device)
    model, dtype = settings.source.to(world.device).eval(), pick_dtype(options.dtype, world.device)
    judged = {}
    for path in options.files:
        judged[path] = judge(path, model, settings, world, dtype, options.batch_size)
        figures = judged[path]
        if not all(math.isfinite(v) for v in figures.values() if isinstance(v, float)):
            raise UserError(f"{options.run}: what it computes is no number: its weights are of no use")
        print(f"{path}: {figures['judged']:,} {figures['unit']}")
        for name in (name for name, value in figures.items() if isinstance(value, float) and not name.endswith("_se")):
            error = f" ± {figures[f'{name}_se']:.4f}" if f"{name}_se" in figures else ""
            print(f"  {name:20} {figures[name]:.4f}{error}")
    one = len(judged) == 1
    print(json.dumps({"run": options.run, **({"file": path, **judged[path]} if one else {"files": judged})}))


def judge(path: str, model: Model, settings: Settings, world: World, dtype: torch.dtype, batch_size: int) -> dict:
    """A file's figures, and {name}_se; `judged` says how many of which unit."""
    names, by_rows = columns_of(path), None
    if {"good", "bad"} <= names:
        by_rows = judge_pairs
    elif {"context", "choices"} <= names:
        by_rows = judge_choices
    elif settings.job.task == "mlm" and {"text", "text_b"} <= names:
        by_rows = judge_next
    if by_rows:
        with torch.inference_mode(), autocast(world.device, dtype):
            return by_rows(path, model, settings.tokenizer, batch_size)
    if settings.job.task == "lm" and {"prompt", "answer"} <= names:
        settings = replace(settings, job=replace(settings.job, task="pairs"), task_options=None)
    task = open_test(settings, path, batch_size)
    task.settle(read_result(Path(settings.job.init)) or {})
    for note in task.notes:
        print(f"note: {note}")
    return judge_task(task, model, world, dtype, batch_size)


def columns_of(path: str) -> set[str]:
    """What a row of a table has; nothing, if it is none."""
    if not path.endswith((".jsonl", ".tsv", ".csv")) or not Path(path).is_file():
        return set()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "").rstrip("\n")
    if not path.endswith(".jsonl"):
        return set(first.split("\t" if path.endswith(".tsv") else ","))
    try:
        return set(parse_json_row(first, path, lists=True))
    except UserError:  # as its reader will say
        return set()


# ---------------------------------------------------------------- by the run's own task
def judge_task(task: Task, model: Model, world: World, dtype: torch.dtype, batch_size: int) -> dict:
    """Its figures; their standard errors by the jackknife: how they change where one part of the file is left out."""
    size = min(batch_size, max(1, task.n_valid // PARTS)) if task.additive else batch_size
    parts = [*measure(model, task, world, dtype, size)]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    figures = {name: value for name, value in task.metrics(total).items() if isinstance(value, float)}
    if task.additive and len(parts) > 1:
        without = [task.metrics({name: total[name] - part[name] for name in total}) for part in parts]
        for name in list(figures):
            values = [other[name] for other in without if name in other]
            figures[f"{name}_se"] = math.sqrt((len(values) - 1) * np.var(values))  # Efron & Stein 1981
    return figures | {"judged": task.n_valid, "unit": task.unit}


# ---------------------------------------------------------------- by likelihood
def judge_pairs(path: str, model: Model, tokenizer: Tokenizer, batch_size: int) -> dict:
    """Minimal pairs (Warstadt et al. 2020, "BLiMP"): how often the good sentence is likelier than the bad one."""
    rows = [row for _, row in read_rows(path, ["good", "bad"])]
    scores = [
        likelihoods(model, tokenizer, [("", row[name]) for row in rows], path, batch_size) for name in ("good", "bad")
    ]
    good, bad = scores
    right = np.where(good == bad, 0.5, good > bad)
    return with_error("accuracy", right) | {"chance": 0.5, "judged": len(rows), "unit": "minimal pairs"}


def judge_choices(path: str, model: Model, tokenizer: Tokenizer, batch_size: int) -> dict:
    """Multiple choice: which continuation of a context is the likeliest, as a whole and (accuracy_norm) per byte."""
    rows = list(read_choices(path))
    asked = [(context, choice) for context, choices, _ in rows for choice in choices]
    scores = likelihoods(model, tokenizer, asked, path, batch_size)
    lengths = np.array([len(choice.encode()) for _, choice in asked])
    right, right_norm, at = [], [], 0
    for _, choices, answer in rows:
        part = slice(at, at + len(choices))
        right.append(scores[part].argmax() == answer)
        right_norm.append((scores[part] / lengths[part]).argmax() == answer)
        at += len(choices)
    chance = float(np.mean([1 / len(choices) for _, choices, _ in rows]))
    figures = with_error("accuracy", np.array(right)) | with_error("accuracy_norm", np.array(right_norm))
    return figures | {"chance": chance, "judged": len(rows), "unit": "questions"}


def judge_next(path: str, model: Model, tokenizer: Tokenizer, batch_size: int) -> dict:
    """Pairs of texts, label 0 or "next" where the second follows, 1 or "random" where not: the NSP head's accuracy."""
    if model.nsp is None:
        raise UserError(f"{path}: pairs of texts, but the run was pretrained without --nsp")
    rows, known = read_rows(path, ["text", "text_b", "label"]), {"0": 0, "next": 0, "1": 1, "random": 1}
    encoded, labels = [], []
    for place, row in rows:
        if row["label"].strip() not in known:
            raise UserError(f"{place}: label {row['label']!r}: 0 or next where text_b follows, 1 or random where not")
        labels.append(known[row["label"].strip()])
        parts = [tokenizer.encode(row[name]) for name in ("text", "text_b")]
        encoded.append(text_ids(tokenizer, model.config.max_len, *parts))
    logits = []
    for begin in progress_bar(range(0, len(rows), batch_size), leave=False, delay=2, unit="batch"):
        inputs = to_device(pad_texts(encoded[begin : begin + batch_size], tokenizer, model.config.max_len), model)
        inputs["positions"] = torch.zeros_like(inputs["tokens"][:, :1])
        logits.append(model.answers(inputs)["nsp"].float().cpu())
    right = torch.cat(logits).argmax(-1).numpy() == np.array(labels)
    return with_error("nsp_accuracy", right) | {"judged": len(rows), "unit": "pairs"}


def read_choices(path: str) -> Iterator[tuple[str, list[str], int]]:
    """(context, choices, number of the right one) of each line."""
    for n, line in enumerate(Path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{n}"
        row = parse_json_row(line, place, lists=True)
        context, choices, answer = (row.get(name) for name in ("context", "choices", "answer"))
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not isinstance(context, str) or not texts or type(answer) is not int or not 0 <= answer < len(choices):
            raise UserError(f'{place}: expected {{"context": text, "choices": two texts or more, "answer": from 0}}')
        space = "" if not context or context[-1].isspace() else " "
        yield context, [choice if choice[0].isspace() else space + choice for choice in choices], answer


@torch.inference_mode()
def likelihoods(
    model: Model, tokenizer: Tokenizer, texts: list[tuple[str, str]], path: str, batch_size: int
) -> np.ndarray:
    """(N,) the log-probability of each text after its context: of a GPT; of a BERT the pseudo-likelihood.

    That is the sum over the text's tokens, each masked alone (Salazar et al. 2020). Contexts lose their beginning
    where max_len asks for it.
    """
    head = [i for i in ([tokenizer.eot] if model.kind == "gpt" else [tokenizer.cls]) if i is not None]
    tail = [] if model.kind == "gpt" else [tokenizer.sep]
    if model.kind == "bert" and (model.mlm is None or tokenizer.mask is None):
        raise UserError(f"{path}: this BERT fills no masks; judge the run that it was fine-tuned from")
    if model.kind == "gpt" and model.config.n_classes:
        raise UserError(f"{path}: this GPT tells classes, not texts; judge the run that it was fine-tuned from")
    room = model.config.max_len - len(head) - len(tail) + (model.kind == "gpt")  # a GPT's last token is a target only
    rows, n_cut = [], 0
    for context, text in texts:
        before, ids = tokenizer.encode(context) if context else [], tokenizer.encode(text)
        if not ids or len(ids) > room:
            raise UserError(f"{path}: {text[:40]!r} has {len(ids)} tokens, and there is room for 1 to {room}")
        n_cut += len(before) + len(ids) > room
        before = before[max(0, len(before) + len(ids) - room) :]
        rows.append(([*head, *before, *ids, *tail], len(head) + len(before), len(ids)))
    if n_cut:
        print(
            f"note: {path}: {n_cut:,} of {len(rows):,} contexts lose their beginning: there is room for {room} tokens"
        )
    asked = rows if model.kind == "gpt" else [(ids, begin + i, 1, n) for n, (ids, begin, count) in enumerate(rows)
                                              for i in range(count)]  # fmt: skip
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
    scores = np.zeros(len(rows))
    for first in progress_bar(range(0, len(order), batch_size), leave=False, delay=2, unit="batch"):
        chosen = [asked[i] for i in order[first : first + batch_size]]
        tokens = pad([ids for ids, *_ in chosen], 0, model.config.max_len)
        if model.kind == "gpt":
            places = [[*range(max(1, begin), begin + count)] for _, begin, count in chosen]  # nothing tells the first
            targets = pad(
                [[ids[p] for p in at] for at, (ids, *_) in zip(places, chosen, strict=True)], IGNORE
            )  # (B, M)
            inputs = {"tokens": tokens[:, :-1], "positions": pad([[p - 1 for p in at] for at in places], 0)}  # (B, M)
            logits = model.answers(to_device(inputs, model))["lm"].flatten(0, 1).float().cpu()  # (B M, V)
            losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
            scores[order[first : first + batch_size]] = -losses.view(targets.shape).double().sum(-1).numpy()
        else:
            places = torch.tensor([[begin] for _, begin, _, _ in chosen])
            targets = tokens.gather(1, places)
            inputs = {"tokens": tokens.scatter(1, places, tokenizer.mask), "positions": places,
                      "lengths": torch.tensor([len(ids) for ids, *_ in chosen])}  # fmt: skip
            logits = model.answers(to_device(inputs, model))["mlm"][:, 0].float().cpu()
            found = logits.log_softmax(-1).gather(1, targets)[:, 0]
            np.add.at(scores, [n for *_, n in chosen], found.double().numpy())
    return scores


def to_device(inputs: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs.items()}
