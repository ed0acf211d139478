"""Pretrain or fine-tune a BERT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini.flags import run_command
from mini.presets import BERT_PRESETS
from mini.training.start import FINETUNE, Settings, learn, make_world, read_settings


def read(argv: list[str]) -> Settings:
    """What the command line says."""
    finetune = FINETUNE | dict(lr=5e-5)  # Devlin et al. 2019, A.3; small models learn faster with more
    return read_settings(argv, __doc__, "bert", BERT_PRESETS, finetune)


def main(argv: list[str]) -> None:
    settings = read(argv)
    world = make_world(settings.train)
    learn(settings, world)  # text -> tokens -> examples; the model; the loop
    world.leave()


if __name__ == "__main__":
    run_command(main)
