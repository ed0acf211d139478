"""Pretrain or fine-tune a GPT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini.flags import run_command
from mini.presets import GPT_PRESETS
from mini.training.start import Settings, learn, make_world, read_settings


def read(argv: list[str]) -> Settings:
    """What the command line says."""
    return read_settings(argv, __doc__, "gpt", GPT_PRESETS)


def main(argv: list[str]) -> None:
    settings = read(argv)
    world = make_world(settings.train)
    learn(settings, world)  # text -> tokens -> examples; the model; the loop
    world.leave()


if __name__ == "__main__":
    run_command(main)
