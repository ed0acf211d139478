"""Pretrain or fine-tune a GPT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini.config import GPT_PRESETS, run_command
from mini.start import make_model, make_world, open_task, read_settings, run

TASKS = ("lm", "classify", "pairs")  # predict text, tell a text's label, answer prompts


def main(argv: list[str]) -> None:
    settings = read_settings(argv, __doc__, "gpt", TASKS, GPT_PRESETS)
    world = make_world(settings.train)
    task, tokenizer = open_task(settings, world)  # text -> tokens -> the examples of each step
    model = make_model(settings, task, tokenizer)
    run(settings, model, task, tokenizer, world)


if __name__ == "__main__":
    run_command(main)
