"""What there is to learn: this dictionary is all that names the tasks. (tasks/base.py says what a task is.)"""

from mini.tasks.base import Task
from mini.tasks.classify import Classification
from mini.tasks.denoise import Denoising
from mini.tasks.hidden import HiddenStates
from mini.tasks.lm import LanguageModelling
from mini.tasks.masked import MaskedLanguageModelling
from mini.tasks.pairs import PromptAnswers
from mini.tasks.qa import QuestionAnswering

TASKS: dict[str, type[Task]] = {  # of those that a model can learn, the first that pretrains is the default
    "lm": LanguageModelling,
    "denoise": Denoising,
    "mlm": MaskedLanguageModelling,
    "classify": Classification,
    "pairs": PromptAnswers,
    "qa": QuestionAnswering,
    "hidden": HiddenStates,
}
