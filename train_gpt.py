"""Pretrain or fine-tune a GPT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini import tasks
from mini.config import GPT_PRESETS, run_command
from mini.data import LMWindows, prepare_tokens
from mini.labelled import LabelledTexts, PromptAnswers, column_texts
from mini.start import fine_tuning_tokenizer, make_model, make_world, need_files, read_settings, run

TASKS = ("lm", "classify", "pairs")  # predict text, tell a text's label, answer prompts


def main(argv: list[str]) -> None:
    settings = read_settings(argv, __doc__, "gpt", TASKS, GPT_PRESETS)
    data, config, training = settings.data, settings.model, settings.train
    name, tokenizer, labels = settings.run.task, settings.tokenizer, []
    world = make_world(training)

    # Text -> tokens -> the examples of each step.
    if name == "lm":
        folder, tokenizer = world.main_first(lambda: prepare_tokens(data, config.vocab_size, tokenizer, settings.given))
        examples = LMWindows(folder.train, folder.valid, tokenizer, config.max_len, training.seed)
        task, checksum = tasks.LanguageModelling(examples, tokenizer), folder.checksum
    else:
        need_files(settings)
        columns = (["text"], ("text_b",)) if name == "classify" else (["prompt", "answer"],)
        tokenizer = fine_tuning_tokenizer(settings, lambda: column_texts(data.train, *columns))
        common = data.train, data.valid, tokenizer, config.max_len, training.seed, training.batch_size
        if name == "classify":
            examples = LabelledTexts(*common, settings.task_options)
            task, labels = tasks.Classification(examples), examples.labels
        else:
            examples = PromptAnswers(*common)
            task = tasks.Answering(examples, tokenizer)
        checksum = examples.checksum

    model = make_model(settings, tokenizer, labels)
    if name == "classify" and not settings.model.tied:
        model.head.requires_grad_(False)  # a classifier predicts no tokens
    run(settings, model, task, tokenizer, checksum, labels, world)


if __name__ == "__main__":
    run_command(main)
