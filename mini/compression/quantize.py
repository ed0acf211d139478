"""Quantization: the ranges in which the inputs of int8 layers lie, found by looking at examples.

What an int8 layer is, and how it learns, is in model/int8.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini.compression.activations import Examples, seeing
from mini.flags import Checked, UserError, option
from mini.model.int8 import affine, matrices, quantize
from mini.model.transformer import Model

SCHEMES = ("dynamic", "static", "qat")
SAMPLE = 2**14  # values that an observer keeps of each batch


@dataclass
class QuantConfig(Checked):
    """Int8 weights, and how what is multiplied with them is quantized."""

    scheme: str = option("dynamic", "inputs' scales: each token's; fixed before; fixed, weights trained", SCHEMES)
    observer: str = option("minmax", "how static and qat find the fixed ranges", ("minmax", "ema", "percentile", "mse"))
    calibrate: int = option(256, "training examples that static and qat look at for it", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.scheme != "dynamic" and not self.calibrate:
            raise UserError(f"--calibrate 0: --scheme {self.scheme} needs examples to find its ranges")


class Observer:
    """Watches values and proposes the range in which they are to be quantized.

    minmax: all of them; ema: a moving average of each batch's extremes; percentile: all but the outermost 0.01 %;
    mse: the range whose quantization has the smallest mean squared error.
    """

    def __init__(self, kind: str):
        self.kind, self.low, self.high, self.kept = kind, None, None, []
        self.generator = torch.Generator().manual_seed(0)

    def see(self, x: Tensor) -> None:
        """x (N, C): real tokens only."""
        low, high = x.min(), x.max()
        if self.low is None:
            self.low, self.high = low, high
        elif self.kind == "ema":
            self.low, self.high = self.low.lerp(low, 0.1), self.high.lerp(high, 0.1)
        else:
            self.low, self.high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        if self.kind in ("percentile", "mse"):
            drawn = torch.randint(x.numel(), (min(SAMPLE, x.numel()),), generator=self.generator)
            self.kept.append(x.flatten()[drawn.to(x.device)].float().cpu())

    def range(self) -> tuple[float, float]:
        low, high = float(self.low), float(self.high)
        if self.kind == "percentile":
            low, high = np.quantile(torch.cat(self.kept).numpy(), [0.00005, 0.99995]).tolist()
        if self.kind == "mse":
            values = torch.cat(self.kept)
            shares = [i / 50 for i in range(1, 51)]  # of the whole range, from each side, one after the other
            for _ in range(2):
                high = min((high * s for s in shares), key=lambda end: rounding_error(values, low, end))
                low = min((low * s for s in shares), key=lambda end: rounding_error(values, end, high))
        return low, high


def rounding_error(values: Tensor, low: float, high: float) -> float:
    scale, zero = affine(torch.tensor(low), torch.tensor(high))
    return float(((quantize(values, scale, zero, low=-128) - zero) * scale - values).square().mean())


def calibrate(model: Model, observer: str, examples: Examples) -> dict[str, tuple[float, float]]:
    """The range of each linear layer's input, of the model as it is; none for layers that the task does not use."""
    observers = {name: Observer(observer) for name in matrices(model)}
    with seeing(model, matrices(model), lambda name, x, y: observers[name].see(x)):
        examples.run(model)
    return {name: seen.range() for name, seen in observers.items() if seen.low is not None}
