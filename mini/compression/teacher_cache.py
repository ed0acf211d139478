"""A teacher's answers, kept in files: who tries out many students asks the teacher once.

A batch's answers are found by a checksum of what it holds. So whatever changes the batches, another seed or masks that
are drawn anew, only misses the cache, and never gets what belongs to another. Of each answer the k likeliest classes
and their log-probabilities at the temperature are kept; the others count as one.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.errors import UserError
from mini.tensors import digest_tensors, load_tensors, save_tensors, weights


class TeacherCache:
    """The answers of one teacher at one temperature, in a folder that several runs may use at the same time."""

    def __init__(self, folder: str | Path, teacher: nn.Module, k: int, temperature: float):
        self.k, self.temperature = k, temperature
        self.folder = Path(folder) / digest_tensors(weights(teacher), str(teacher.config), str(k), str(temperature))

    def batches(self) -> int:
        """The number of batches whose answers are there."""
        return len(list(self.folder.glob("*.safetensors")))

    def __call__(self, inputs: dict[str, Tensor], ask: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What merged() makes of a batch's answers, and their likeliest classes (N, k).

        ask() -> the teacher's logits (N, V), called where they are new.
        """
        device = next(iter(inputs.values())).device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        path = self.folder / f"{digest_tensors(inputs, str(autocast))}.safetensors"
        try:
            kept = load_tensors(path)
            whole = (
                digest_tensors({n: kept[n] for n in ("log_probs", "classes")}) == bytes(kept["check"].tolist()).decode()
            )
        except (UserError, KeyError, ValueError, TypeError):  # not there, or damaged: asked anew
            whole = False
        if not whole:
            log_probs = F.log_softmax(ask().float() / self.temperature, dim=-1)  # (N, V)
            classes = log_probs.topk(min(self.k, log_probs.size(1))).indices  # (N, k)
            kept = {"log_probs": merged(log_probs, classes), "classes": classes.int()}
            save_tensors(path, kept | {"check": torch.tensor(list(digest_tensors(kept).encode()), dtype=torch.uint8)})
        return kept["log_probs"].to(device), kept["classes"].long().to(device)


def merged(log_probs: Tensor, classes: Tensor) -> Tensor:
    """Log-probabilities (N, V) of all classes -> those of the named ones (N, k), and where there are more their sum."""
    kept = log_probs.gather(1, classes)
    if classes.size(1) == log_probs.size(1):
        return kept
    rest = log_probs.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([kept, rest], dim=1)  # (N, k + 1)


def merged_soft_targets(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """T² Σ KL(p_T ‖ p_S) between merged classes: with k = V soft_targets, and otherwise never more.

    student: logits (N, V); teacher, classes: from a TeacherCache.
    """
    log_probs = merged(F.log_softmax(student.float() / temperature, dim=-1), classes)
    return temperature**2 * F.kl_div(log_probs, teacher, log_target=True, reduction="sum")
