"""Pretrain or fine-tune a BERT. Without arguments: a small one on Python's own documentation, minutes on a laptop."""

from mini.config import BERT_PRESETS, run_command
from mini.devices import World
from mini.start import Settings, make_model, make_world, open_task, read_settings, run

TASKS = ("mlm", "classify", "qa")  # fill masks, tell a text's label, find the answer in a text
FINETUNE = dict(lr=5e-5)  # Devlin et al. 2019, A.3; small models learn faster with more


def read(argv: list[str]) -> Settings:
    """What the command line says."""
    return read_settings(argv, __doc__, "bert", TASKS, BERT_PRESETS, FINETUNE)


def learn(settings: Settings, world: World) -> None:
    """Trains it, in the folder of --out."""
    task, tokenizer = open_task(settings, world)  # text -> tokens -> the examples of each step
    name = settings.run.task
    heads = dict(mlm=name == "mlm", nsp=name == "mlm" and settings.task_options.nsp, spans=name == "qa", pooler=False)
    model = make_model(settings, task, tokenizer, **heads)
    run(settings, model, task, tokenizer, world)


def main(argv: list[str]) -> None:
    settings = read(argv)
    world = make_world(settings.train)
    learn(settings, world)
    world.leave()


if __name__ == "__main__":
    run_command(main)
