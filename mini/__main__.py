"""One door for everything but training: python -m mini COMMAND (or, installed, mini COMMAND)."""

import csv
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from mini import bench as benchmarks
from mini.config import DataConfig, ModelConfig, UserError, check, nearest, option, parse_flags, run_command
from mini.data import pad, read_rows, text_ids, write_token_folder
from mini.devices import can_compile, pick_device
from mini.runs import load_run, read_labels
from mini.tokens import is_token_folder


@dataclass
class SampleOptions:
    """Continue a prompt with a GPT; several prompts are continued together."""

    run: str = option("", "a GPT's run folder, or one with published weights", positional="1")
    prompts: list[str] = field(
        default_factory=list, metadata=dict(help="text to go on from", choices=(), positional="+")
    )
    max_new_tokens: int = option(200, "tokens to add at most", low=1)
    temperature: float = option(
        0.8, "0: always the likeliest token; 1: as the model says; more: wilder", low=0, high=1e6
    )
    top_k: int = option(0, "draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = option(0.95, "draw from the fewest tokens with this much probability together", low=1e-6, high=1)
    stop: str | None = option(None, "a token's text that ends the answer, beside <|endoftext|>")
    seed: int = option(0, "of the draw", low=0, high=2**63 - 1)
    use_cache: bool = option(True, "keep keys and values of earlier tokens; the text is the same without, later")
    compile: bool = option(False, "compile the step of one token: pays from some thousand tokens on")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: str = option("float32", "of weights and cache", ("float32", "bfloat16"))

    def __post_init__(self):
        check(self)


def sample(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [SampleOptions], SampleOptions.__doc__)
    device = pick_device(options.device)
    model, tokenizer = load_run(options.run, device, kind="gpt")
    model.to(getattr(torch, options.dtype))
    rows = [tokenizer.encode(prompt) for prompt in options.prompts]
    for prompt, row in zip(options.prompts, rows, strict=True):
        if not row:
            raise UserError(f"the prompt {prompt!r} has no tokens: give at least one character")
    stop = [] if tokenizer.eot is None else [tokenizer.eot]
    if options.stop is not None:
        ids = tokenizer.encode(options.stop)
        if len(ids) != 1:
            raise UserError(f"--stop {options.stop!r} is {len(ids)} tokens of this tokenizer, and must be one")
        stop += ids
    choices = dict(
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p if options.top_p < 1 else None,
        stop=stop,
        use_cache=options.use_cache,
        compile=options.compile and can_compile(device, tqdm.write),
        generator=torch.Generator(device).manual_seed(options.seed),
        lengths=torch.tensor([len(row) for row in rows], device=device),
    )
    stream = model.stream(pad(rows, 0).to(device), options.max_new_tokens, **choices)
    if len(rows) == 1:  # to the terminal as it comes
        print(options.prompts[0], end="", flush=True)
        new = (int(token) for token in stream)
        for text in tokenizer.decode_stream(i for i in new if i not in stop):
            print(text, end="", flush=True)
        print()
        return
    bar = tqdm(stream, total=options.max_new_tokens, leave=False, delay=2, unit="token", dynamic_ncols=True)
    columns = [new.tolist() for new in bar]
    for prompt, ids in zip(options.prompts, zip(*columns, strict=True), strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
        print(f"{prompt}{tokenizer.decode(ids[:end])}\n{'-' * 40}")


@dataclass
class ClassifyOptions:
    """Tell the label of texts with a run of --task classify."""

    run: str = option("", "a run folder", positional="1")
    texts: list[str] = field(
        default_factory=list,
        metadata=dict(help="texts, or one .tsv, .csv or .jsonl file with a text column", choices=(), positional="+"),
    )
    batch_size: int = option(32, "texts at a time", low=1)
    device: str = option("auto", "auto, cpu, cuda, mps")

    def __post_init__(self):
        check(self)


def classify(argv: list[str]) -> None:
    (options,), _ = parse_flags(argv, [ClassifyOptions], ClassifyOptions.__doc__)
    model, tokenizer = load_run(options.run, pick_device(options.device))
    labels = read_labels(options.run)
    if not labels:
        raise UserError(
            f"{options.run} is not a classifier: make one of it with "
            f"python train_gpt.py --task classify --init {options.run} --train FILE --valid FILE"
        )
    texts = [{"text": text} for text in options.texts]
    if len(texts) == 1 and Path(options.texts[0]).suffix in (".tsv", ".csv", ".jsonl"):
        texts = [row for _, row in read_rows(options.texts[0], ["text"], ("text_b",))]
    out = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, escapechar="\\")
    out.writerow(["label", "probability", "text"])
    for start in range(0, len(texts), options.batch_size):
        chunk = texts[start : start + options.batch_size]
        rows = [text_ids(tokenizer, model.config.max_len, t["text"], t.get("text_b")) for t in chunk]
        lengths = torch.tensor([len(row) for row in rows])
        device = next(model.parameters()).device
        with torch.inference_mode():
            probabilities = model.classify(pad(rows, 0).to(device), lengths.to(device)).softmax(dim=-1).cpu()
        for text, row in zip(chunk, probabilities, strict=True):
            out.writerow([labels[int(row.argmax())], f"{float(row.max()):.4f}", " ".join(text["text"].split())])


@dataclass
class TokensOptions:
    """Turn text into a token folder, which --data takes: memory-mapped, with document and sentence offsets."""

    files: list[str] = field(
        default_factory=list,
        metadata=dict(
            help="text, .jsonl, .gz of either, folders of them, or a known corpus", choices=(), positional="+"
        ),
    )
    out: str = option("", "the folder to make")
    vocab_size: int = option(8192, "tokens of a trained BPE", low=1)
    workers: int = option(0, "threads that encode; 0: one per core", low=0)

    def __post_init__(self):
        check(self)


def tokens(argv: list[str]) -> None:
    (options, data), _ = parse_flags(
        argv, [TokensOptions, DataConfig], TokensOptions.__doc__, without={"data", "train"}
    )
    if not options.out:
        raise UserError("name the folder to make with --out DIR")
    if is_token_folder(options.out):
        raise UserError(f"{options.out} is a token folder already: delete it, or name another with --out")
    files = options.files[0] if len(options.files) == 1 else options.files
    data = dataclasses.replace(data, data=files)
    folder = write_token_folder(data, options.vocab_size, None, Path(options.out), options.workers or None)
    splits = folder.meta["splits"]
    for name, split in splits.items():
        print(
            f"{name}: {split['n_tokens']:,} tokens, {split['n_documents']:,} documents, {split['n_sentences']:,} "
            f"sentences, {split['n_bytes'] / split['n_tokens']:.2f} bytes per token"
        )
    print(json.dumps({"out": options.out, **{name: s["n_tokens"] for name, s in splits.items()}}))


def bench(argv: list[str]) -> None:
    (options, config), _ = parse_flags(
        argv, [benchmarks.BenchOptions, ModelConfig], benchmarks.BenchOptions.__doc__, vocab_size=8192
    )
    benchmarks.run(options, config)


COMMANDS = {
    "sample": (sample, "continue a prompt with a GPT"),
    "classify": (classify, "tell the label of texts"),
    "tokens": (tokens, "text -> token folder"),
    "bench": (bench, "measure training and generation on this machine"),
}
USAGE = "usage: python -m mini COMMAND ... (COMMAND --help lists its flags)\n\n" + "\n".join(
    f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()
)


def dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}{nearest(name, COMMANDS)}: choose one of {', '.join(COMMANDS)}")
    sys.argv[0] = f"python -m mini {name}"
    COMMANDS[name][0](rest)


def main() -> None:
    run_command(dispatch)


if __name__ == "__main__":
    main()
