"""Pretrain or fine-tune a BERT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini import tasks
from mini.config import BERT_PRESETS, run_command
from mini.data import ENCODER_TOKENS, MaskedSentences, prepare_tokens
from mini.labelled import LabelledTexts, column_texts
from mini.squad import QuestionAnswers, squad_texts
from mini.start import fine_tuning_tokenizer, make_model, make_world, need_files, read_settings, run

TASKS = ("mlm", "classify", "qa")  # fill masks, tell a text's label, find the answer in a text
FINETUNE = dict(lr=5e-5)  # Devlin et al. 2019, A.3; small models learn faster with more


def main(argv: list[str]) -> None:
    settings = read_settings(argv, __doc__, "bert", TASKS, BERT_PRESETS, ENCODER_TOKENS, FINETUNE)
    data, config, training, options = settings.data, settings.model, settings.train, settings.task_options
    name, tokenizer, labels = settings.run.task, settings.tokenizer, []
    world = make_world(training)

    # Text -> tokens -> the examples of each step, and the heads that learn from them.
    if name == "mlm":
        folder, tokenizer = world.main_first(
            lambda: prepare_tokens(data, config.vocab_size, tokenizer, settings.given, ENCODER_TOKENS)
        )
        examples = MaskedSentences(folder.train, folder.valid, tokenizer, config.max_len, training.seed, options)
        task, checksum = tasks.MaskedLanguageModelling(examples, tokenizer), folder.checksum
        heads = dict(mlm=True, nsp=options.nsp)
    else:
        if name == "qa" and not data.train and not data.valid:
            data.train = data.valid = "python-docs"
        need_files(settings)
        common = config.max_len, training.seed, training.batch_size, options
        if name == "classify":
            columns = ["text"], ("text_b",)
            tokenizer = fine_tuning_tokenizer(settings, lambda: column_texts(data.train, *columns), ENCODER_TOKENS)
            examples = LabelledTexts(data.train, data.valid, tokenizer, *common)
            task, labels = tasks.Classification(examples), examples.labels
        else:
            tokenizer = fine_tuning_tokenizer(settings, lambda: squad_texts(data.train), ENCODER_TOKENS)
            examples = QuestionAnswers(data.train, data.valid, tokenizer, *common)
            task = tasks.QuestionAnswering(examples)
        checksum = examples.checksum
        heads = dict(mlm=False, nsp=False, spans=name == "qa")

    model = make_model(settings, tokenizer, labels, pooler=False, **heads)
    run(settings, model, task, tokenizer, checksum, labels, world)


if __name__ == "__main__":
    run_command(main)
