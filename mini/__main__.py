"""One door for everything but training: python -m mini COMMAND (or, installed, mini COMMAND)."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mini import ablate as ablations
from mini import bench as benchmarks
from mini import evaluate as judging
from mini import plan as planning
from mini.compression import rewrite as rewriting
from mini.flags import Checked, UserError, dispatch, of_type, option, parse_flags, peek, run_command
from mini.model.config import ModelConfig
from mini.model.transformer import Model
from mini.presets import BERT, BERT_PRESETS, GPT_PRESETS
from mini.storage import atomic_file, write_text
from mini.tasks import TASKS, qa
from mini.tasks.classify import ClassifyConfig
from mini.tasks.inputs import masked_ids, pad, pad_texts, text_cuts, text_ids
from mini.tasks.masked import show_token
from mini.tensors import all_finite
from mini.text.corpus import DataConfig
from mini.text.rows import read_rows, text_columns
from mini.text.tokenizer import ByteTokenizer, Tokenizer
from mini.text.tokens import is_token_folder, open_tokens, ready_tokenizer, source_name, write_token_folder
from mini.text.words import NORMALIZATIONS, normalize, parse_steps
from mini.training.checkpoints import read_result
from mini.training.devices import can_compile, pick_device, progress_bar
from mini.training.runs import check_output, is_published, load_run, read_config, read_labels

TABLES = (".tsv", ".csv", ".jsonl")
LABELS = "label\tprobability\ttext"  # the first line of what classify writes


@dataclass
class RunOptions(Checked):
    """Which run, and where it is computed."""

    run: str = option("", "a run folder, or one with published weights", positional="1")
    device: str = option("auto", "auto, cpu, cuda, mps")


@dataclass
class SampleOptions(RunOptions):
    """Continue a prompt with a GPT; several prompts are continued together."""

    prompts: list[str] = option([], "text to go on from", positional="+")
    max_new_tokens: int = option(200, "tokens to add at most", low=1, high=10_000_000)
    temperature: float = option(0.8, "0: always the likeliest; 1: as the model says; more: wilder", low=0, high=1e6)
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = option(0.95, "draw from the fewest tokens with this much probability together", low=1e-6, high=1)
    stop: str | None = option(None, "a token's text that ends the answer, beside <|endoftext|>")
    seed: int = option(0, "of the draw", low=0, high=2**63 - 1)
    use_cache: bool = option(True, "keep keys and values of earlier tokens; the text is the same without, later")
    compile: bool = option(False, "compile the step of one token: pays from some thousand tokens on")
    dtype: str = option("float32", "of weights and cache", ("float32", "bfloat16"))


def sample(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [SampleOptions], SampleOptions.__doc__)
    device = pick_device(options.device)
    model, tokenizer = load_run(options.run, device, kind="gpt")
    model.to(getattr(torch, options.dtype))
    task = TASKS["lm" if is_published(options.run) else read_config(options.run).task]
    rows = [task.ask(tokenizer, prompt) for prompt in options.prompts]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    for prompt, row in zip(options.prompts, rows, strict=True):
        if not row:
            raise UserError(f"the prompt {prompt!r} has no tokens: give at least one character")
        if len(row) > (most := model.config.max_len):
            warn([f"{prompt[:40]!r}: of its {len(row):,} tokens only the last {most} are seen"])
    stop = [] if tokenizer.eot is None else [tokenizer.eot]
    if options.stop is not None:
        ids = tokenizer.encode(options.stop)
        if len(ids) != 1:
            raise UserError(f"--stop {options.stop!r} is {len(ids)} tokens of this tokenizer, and must be one")
        stop += ids
    stream = model.stream(
        pad(rows, 0).to(device), options.max_new_tokens, temperature=options.temperature, top_k=options.top_k or None,
        top_p=options.top_p if options.top_p < 1 else None, stop=stop, use_cache=options.use_cache,
        compile=options.compile and can_compile(device, tqdm.write), lengths=lengths,
        generator=torch.Generator(device).manual_seed(options.seed),
    )  # fmt: skip
    if len(rows) == 1:  # to the terminal as it comes
        print(options.prompts[0], end=task.joint, flush=True)
        new = (int(token) for token in stream)
        for text in tokenizer.decode_stream(i for i in new if i not in stop):
            print(text, end="", flush=True)
        print()
        return
    bar = tqdm(stream, total=options.max_new_tokens, leave=False, delay=2, unit="token", dynamic_ncols=True)
    columns = [new.tolist() for new in bar]
    for prompt, ids in zip(options.prompts, zip(*columns, strict=True), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
        print(f"{prompt}{task.joint}{tokenizer.decode(ids[:end])}\n{'-' * 40}")


@dataclass
class ClassifyOptions(RunOptions):
    """Tell the label of texts with a run of --task classify."""

    texts: list[str] = option([], "texts, or one .tsv, .csv or .jsonl file with a text column", positional="+")
    out: str = option("", "write the table (label, probability, text; separated by tabs) here, instead of showing it")
    batch_size: int = option(32, "texts at a time", low=1)


def classify(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [ClassifyOptions], ClassifyOptions.__doc__)
    if options.out:
        check_output(Path(options.out), is_table, options.texts)
    model, tokenizer = load_run(options.run, pick_device(options.device))
    if not model.config.n_classes:
        raise UserError(f"{options.run} is not a classifier: train_{model.kind}.py --task classify makes one of it")
    labels = read_labels(options.run)
    if len(labels) != model.config.n_classes:  # published without names
        labels = [f"LABEL_{i}" for i in range(model.config.n_classes)]
    steps = parse_steps("normalize", task_options(options.run, ClassifyConfig).normalize, NORMALIZATIONS)
    rows = read_texts(options.texts)
    texts = [[tokenizer.encode(normalize(text, steps)) for text in row] for row in rows]
    logits = for_all(texts, options.run, model.classify, model, tokenizer, options.batch_size)  # (texts, classes)
    best = logits.softmax(dim=-1).max(dim=-1)
    lines = [LABELS]
    for row, p, i in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
        lines.append(f"{escaped(labels[i])}\t{p:.4f}\t{one_line(' '.join(row))}")
    if options.out:
        write_text(Path(options.out), "\n".join(lines) + "\n")
        print(f"{len(rows):,} labels are in {options.out}")
    else:
        print("\n".join(lines))


def is_table(path: Path) -> bool:
    """Whether a file is of the kind that classify writes."""
    mark = f"{LABELS}\n".encode()
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


def read_texts(given: list[str]) -> list[list[str]]:
    """The texts of the command line, or of the rows of a file that it names: each alone, or a pair."""
    if len(given) == 1 and Path(given[0]).suffix in TABLES:
        rows = read_rows(given[0], ["text"], ("text_b",))
        return [[row[name] for name in text_columns(rows)] for _, row in rows]
    for text in given:
        if not text.strip():
            raise UserError("a text is empty: there is nothing to tell")
        if len(text) < 256 and Path(text).exists():
            raise UserError(f"{text} is a file or folder, not a text: give one .tsv, .csv or .jsonl file, or texts")
    return [[text] for text in given]


def one_line(text: str) -> str:
    return " ".join(text.split())


def escaped(label: str) -> str:
    """A label as it is, but for tabs and line breaks."""
    return re.sub(r"[^\S ]", lambda match: repr(match[0])[1:-1], label)


def warn(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@torch.inference_mode()
def for_all(texts: list, where: str, compute: Callable, model: Model, tokenizer: Tokenizer, batch_size: int) -> Tensor:
    """(texts, ..): compute(tokens, segments, lengths) of all encoded texts or pairs; a note tells what max_len cuts."""
    max_len, device = model.config.max_len, next(model.parameters()).device
    warn(text_cuts(where, [sum(map(len, row)) for row in texts], len(texts[0]), max_len)[1])
    encoded = [text_ids(tokenizer, max_len, *row) for row in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i][0]))  # alike lengths: less padding
    outputs = []
    for chunk in progress(order, batch_size):
        inputs = pad_texts([encoded[i] for i in chunk], tokenizer, model.config.max_len)
        outputs.append(compute(**{name: tensor.to(device) for name, tensor in inputs.items()}).float().cpu())
    return numbers(torch.cat(outputs), where)[np.argsort(order)]


def numbers(outputs: Tensor, run: str) -> Tensor:
    """A model's outputs. Raises UserError where they are no numbers."""
    if not all_finite(outputs):
        raise UserError(f"{run}: what it computes is no number: its weights are of no use")
    return outputs


def progress(items: list, size: int) -> Iterator[list]:
    """The items, so many at a time, with a bar if it takes long."""
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    yield from progress_bar(chunks, leave=False, delay=2, unit="batch")


def task_options(run: str, kind: type):
    """The settings that a run was fine-tuned with; the defaults for published weights."""
    found = None if is_published(run) else read_config(run).task_options
    return found if isinstance(found, kind) else kind()


@dataclass
class FillOptions(RunOptions):
    """Fill the masks of a text with a BERT: for each the likeliest tokens, and their probabilities."""

    texts: list[str] = option([], 'texts with "[MASK]" in them', positional="+")
    top: int = option(5, "tokens to show for each mask", low=1)


@torch.inference_mode()
def fill(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [FillOptions], FillOptions.__doc__)
    device = pick_device(options.device)
    model, tokenizer = load_run(options.run, device, kind="bert")
    if model.mlm is None:
        raise UserError(f"{options.run} has no head for masked tokens; fine-tuned runs drop it: use the run before")
    for text in options.texts:
        whole = masked_ids(tokenizer, text)
        ids, _ = text_ids(tokenizer, model.config.max_len, whole)
        masks = [i for i, token in enumerate(ids) if token == tokenizer.mask]
        if len(masks) < max(1, text.count("[MASK]")):
            missing = "is cut off by max_len" if "[MASK]" in text else "is missing"
            raise UserError(f"{text[:60]!r}: [MASK] {missing}; it marks what is to be filled in")
        warn(text_cuts(repr(text[:40]), [len(whole)], 1, model.config.max_len)[1])
        inputs = dict(tokens=[ids], lengths=[len(ids)], positions=[masks])
        mlm, _ = model.predict(**{name: torch.tensor(value, device=device) for name, value in inputs.items()})
        shares = numbers(mlm[0], options.run).softmax(dim=-1)  # (M, V)
        probabilities, tokens = shares.topk(min(options.top, shares.size(-1)))  # (M, top)
        print(text)
        for i, likeliest in enumerate(zip(probabilities.tolist(), tokens.tolist(), strict=True), 1):
            if len(masks) > 1:
                print(f"mask {i}:")
            for p, token in zip(*likeliest, strict=True):
                print(f"  {p:.4f}  {show_token(tokenizer, token)}")


@dataclass
class AnswerOptions(RunOptions):
    """Answer a question from a text with a run of --task qa: the answer stands in the text."""

    question: str = option("", "what is asked")
    context: str = option("", "the text that holds the answer")
    show: int = option(1, "answers to show, the best first", low=1)


@torch.inference_mode()
def answer(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [AnswerOptions], AnswerOptions.__doc__)
    device = pick_device(options.device)
    model, tokenizer = load_run(options.run, device, kind="bert")
    if model.spans is None:
        raise UserError(f"{options.run} answers no questions: train_bert.py --task qa makes a run of it that does")
    for name in ("question", "context"):
        if not getattr(options, name).strip():
            raise UserError(f"--{name}: it is empty")
    settings = task_options(options.run, qa.QAConfig)
    question = qa.Question("", options.question, options.context, [], [])
    windows, cut = qa.cut_windows([question], tokenizer, model.config.max_len, settings)
    warn(qa.questions_note(repr(options.question[:40]), cut, qa.longest_question(model.config.max_len, settings)))
    spans = []
    for chunk in progress(windows, 32):
        inputs = qa.collate(chunk, tokenizer, model.config.max_len).to(device).inputs
        logits = numbers(model.find_spans(inputs["tokens"], inputs["lengths"], inputs["segments"]), options.run)
        found = qa.best_spans(*logits.unbind(1), inputs["context"], settings.n_best, settings.max_answer)
        spans.append(found.cpu())
    ((null, answers),) = qa.collect(windows, torch.cat(spans))
    threshold = (read_result(Path(options.run)) or {}).get("null_threshold")
    threshold = of_type(threshold, float | None, f"{options.run}/result.json: null_threshold")
    scores = [found.score for found in answers] + ([null] if threshold is not None else [])
    shares = torch.tensor(scores).softmax(dim=0).tolist()  # among the candidates, as in Devlin's run_squad.py
    if not answers or (threshold is not None and null - answers[0].score > threshold):
        why = "no span fits"
        if answers:
            why = f"the best span has {answers[0].score:.2f}, the threshold is {threshold:.2f}"
        print(f"(no answer in this text)\n    score {null:.2f}; {why}")
        return
    for found, share in list(zip(answers, shares, strict=False))[: options.show]:
        place = f"characters {found.start}-{found.end}"
        print(f"{found.text}\n    score {found.score:.2f}, probability {share:.4f}, {place}")


@dataclass
class RewriteOptions(RunOptions):
    """Write labelled texts anew: copies of each with words that a pretrained BERT finds likely in their places."""

    file: str = option("", ".tsv, .csv or .jsonl with text, [text_b] and label", positional="1")
    out: str = option("", "the file to write, of the same kind: the texts, each followed by its copies")


def rewrite(argv: list[str]) -> None:
    (options, how), _ = parse_flags(argv, [RewriteOptions, rewriting.RewriteConfig], RewriteOptions.__doc__)
    source, out = Path(options.file), Path(options.out)
    if not options.out:
        raise UserError("name the file to write with --out")
    read_rows(source, ["text", "label"], ("text_b",))  # refuses a wrong file before the model is loaded
    if out.suffix != source.suffix:
        raise UserError(f"--out {out}: has to be a {source.suffix} file, as {source} is")
    check_output(out)
    model, tokenizer = load_run(options.run, pick_device(options.device), kind="bert")
    if model.mlm is None:
        raise UserError(f"{options.run} has no head for masked tokens: name the run that it was fine-tuned from")
    n = rewriting.rewrite(source, out, model, tokenizer, how)
    print(f"{out}: {n:,} rows, of which {how.copies} in {how.copies + 1} are written anew")


@dataclass
class EmbedOptions(RunOptions):
    """Turn texts into vectors with a BERT: the mean of the last hidden states over a text's real tokens."""

    file: str = option("", ".tsv, .csv or .jsonl with a text column, or a text per line", positional="1")
    out: str = option("", "the .npy file to write, float32 (texts, d_model); default: the file's name + .npy")
    pooling: str = option("mean", "mean over the tokens, or the first token's state", ("mean", "cls"))
    batch_size: int = option(32, "texts at a time", low=1)


def embed(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [EmbedOptions], EmbedOptions.__doc__)
    out = Path(options.out or f"{options.file}.npy")
    check_output(out, is_vectors, [options.file])
    model, tokenizer = load_run(options.run, pick_device(options.device), kind="bert")
    texts = [[tokenizer.encode(text) for text in row] for row in read_lines(options.file)]
    compute = partial(model.embed, pooling=options.pooling)
    vectors = for_all(texts, options.file, compute, model, tokenizer, options.batch_size)
    with atomic_file(out) as temporary, open(temporary, "wb") as file:
        np.save(file, vectors.numpy())
    print(f"{len(vectors):,} vectors of {model.config.d_model} numbers are in {out}")


def is_vectors(path: Path) -> bool:
    """Whether a file is of the kind that embed writes."""
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    return isinstance(found, np.ndarray) and found.dtype == np.float32 and found.ndim == 2


def read_lines(path: str) -> list[list[str]]:
    if Path(path).suffix in TABLES:
        return read_texts([path])
    try:
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8: convert the file") from None
    if not any(map(str.strip, lines)):
        raise UserError(f"{path}: no text in it")
    return [[line] for line in lines]


@dataclass
class TokensOptions(Checked):
    """Turn text into a token folder, which --data takes: memory-mapped, with document and sentence offsets."""

    files: list[str] = option([], "text, .jsonl, .gz of either, folders of them, or a known corpus", positional="+")
    out: str = option("", "the folder to make")
    vocab_size: int = option(8192, "tokens of a trained BPE", low=1)
    workers: int = option(0, "threads that encode; 0: one per core", low=0)


def tokens(argv: list[str]) -> None:
    classes, without = [TokensOptions, DataConfig], {"data", "train"}
    (options, data), _ = parse_flags(argv, classes, TokensOptions.__doc__, without=without)
    if not options.out:
        raise UserError("name the folder to make with --out DIR")
    data = replace(data, data=options.files[0] if len(options.files) == 1 else options.files)
    tokenizer = ready_tokenizer(data)
    if is_token_folder(options.out):
        folder = open_tokens(options.out)
        if folder.meta.source != source_name(data, options.vocab_size, tokenizer):
            why = "made of another text, or by another tokenizer: delete it, or name another with --out"
            raise UserError(f"{options.out} is another token folder, {why}")
        print(f"{options.out} is finished already")
    else:
        folder = write_token_folder(data, options.vocab_size, tokenizer, Path(options.out), options.workers)
    splits = vars(folder.meta.splits)
    for name, split in splits.items():
        print(
            f"{name}: {split.n_tokens:,} tokens, {split.n_documents:,} documents, {split.n_sentences:,} "
            f"sentences, {split.n_bytes / max(1, split.n_tokens):.2f} bytes per token"
        )
    print(json.dumps({"out": options.out, **{name: split.n_tokens for name, split in splits.items()}}))


def bench(argv: list[str]) -> None:
    mlm = peek(argv, "what", "all") == "mlm"
    defaults = dict(BERT, batch_size=16, max_len=128, steps=40) if mlm else {}
    defaults["vocab_size"] = 8192
    classes = [benchmarks.BenchOptions, ModelConfig]
    (options, config), _ = parse_flags(argv, classes, benchmarks.BenchOptions.__doc__, **defaults)
    benchmarks.bench(options, config)


def ablate(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [ablations.AblateOptions], ablations.AblateOptions.__doc__)
    ablations.ablate(options)


def evaluate(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [judging.EvaluateOptions], judging.EvaluateOptions.__doc__)
    judging.evaluate(options)


def plan(argv: list[str]) -> None:
    words = [word.partition("=") for word in argv]  # --gpu-memory is --gpu_memory
    argv = [w[:2] + w[2:].replace("-", "_") + eq + value if w[:2] == "--" else w + eq + value for w, eq, value in words]
    presets = GPT_PRESETS | BERT_PRESETS
    of_bytes = presets.get(peek(argv, "preset", ""), {}).get("tokenizer") == "bytes"
    defaults = {"vocab_size": ByteTokenizer().vocab_size} if of_bytes else {}
    classes = [planning.PlanOptions, ModelConfig, planning.OptimConfig, planning.TrainConfig, planning.MLMConfig]
    said, without = planning.PlanOptions.__doc__, planning.NO_FLAGS
    (options, config, optim, loop, mlm), given = parse_flags(argv, classes, said, presets, without, **defaults)
    planning.plan(options, config, optim, loop, mlm, given)


COMMANDS = {
    "sample": (sample, "continue a prompt with a GPT"),
    "fill": (fill, "fill [MASK] in a text with a BERT"),
    "classify": (classify, "tell the label of texts"),
    "answer": (answer, "find the answer to a question in a text"),
    "embed": (embed, "texts -> vectors"),
    "rewrite": (rewrite, "labelled texts -> more of them, to train on"),
    "tokens": (tokens, "text -> token folder"),
    "evaluate": (evaluate, "judge a run on files that it has not seen"),
    "ablate": (ablate, "train arms with several seeds, and tell which differences are real"),
    "plan": (plan, "what a training will take of GPUs: memory, link, time"),
    "bench": (bench, "measure training and generation on this machine"),
}


def run(argv: list[str]) -> None:
    dispatch(argv, COMMANDS, "python -m mini")


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
