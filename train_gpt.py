"""Pretrain or fine-tune a GPT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini.config import GPT_PRESETS, run_command
from mini.devices import World
from mini.start import Settings, make_model, make_world, open_task, read_settings, run

TASKS = ("lm", "classify", "pairs")  # predict text, tell a text's label, answer prompts


def read(argv: list[str]) -> Settings:
    """What the command line says."""
    return read_settings(argv, __doc__, "gpt", TASKS, GPT_PRESETS)


def learn(settings: Settings, world: World) -> None:
    """Trains it, in the folder of --out."""
    task, tokenizer = open_task(settings, world)  # text -> tokens -> the examples of each step
    model = make_model(settings, task, tokenizer)
    run(settings, model, task, tokenizer, world)


def main(argv: list[str]) -> None:
    settings = read(argv)
    world = make_world(settings.train)
    learn(settings, world)
    world.leave()


if __name__ == "__main__":
    run_command(main)
