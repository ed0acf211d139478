"""Pretrain or fine-tune a BERT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini import tasks
from mini.config import BERT_PRESETS, run_command
from mini.data import ENCODER_TOKENS, MaskedSentences, prepare_tokens
from mini.labelled import LabelledTexts, labelled_tokenizer
from mini.squad import QuestionAnswers
from mini.start import make_model, make_world, need_files, read_settings, run

TASKS = ("mlm", "classify", "qa")  # fill masks, tell a text's label, find the answer in a text


def main(argv: list[str]) -> None:
    settings = read_settings(argv, __doc__, "bert", TASKS, BERT_PRESETS, ENCODER_TOKENS)
    data, config, training, options = settings.data, settings.model, settings.train, settings.examples
    name, tokenizer, labels = settings.run.task, settings.tokenizer, []
    world = make_world(training)

    # Text -> tokens -> the examples of each step, and the heads that learn from them.
    if name == "mlm":
        folder, tokenizer = world.main_first(
            lambda: prepare_tokens(data, config.vocab_size, tokenizer, settings.given, ENCODER_TOKENS)
        )
        examples = MaskedSentences(folder.train, folder.valid, tokenizer, config.max_len, training.seed, options)
        task, checksum = (
            tasks.MaskedLanguageModelling(examples, tokenizer),
            f"{folder.train.sha256}-{folder.valid.sha256}",
        )
        heads = dict(mlm=True, nsp=options.nsp)
    else:
        if name == "qa" and not data.train and not data.valid:
            data.train = data.valid = "python-docs"
        need_files(settings)
        columns = ["text"] if name == "classify" else []
        tokenizer = tokenizer or labelled_tokenizer(data, columns, config.vocab_size, ENCODER_TOKENS)
        kind = LabelledTexts if name == "classify" else QuestionAnswers
        examples = kind(data.train, data.valid, tokenizer, config.max_len, training.seed, training.batch_size, options)
        if name == "classify":
            task, labels = tasks.Classification(examples), examples.labels
        else:
            task = tasks.QuestionAnswering(examples)
        checksum = examples.checksum
        heads = dict(mlm=False, nsp=False, spans=name == "qa")

    model = make_model(settings, tokenizer, labels, pooler=False, **heads)
    run(settings, model, task, tokenizer, checksum, labels, world)


if __name__ == "__main__":
    run_command(main)
