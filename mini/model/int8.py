"""Int8: matrices and what is multiplied with them as whole numbers of 8 bits, each with a scale.

    x ≈ s (q - z)        weights: z = 0, a scale s for each output, q of -127..127
                         inputs: dynamic, z = 0 and a scale for each token, from its own largest value;
                                 static, one s and z for all, from what an observer saw before, q of -128..127
    y = x Wᵀ + b ≈ s_x s_w (q_x q_wᵀ - z_x Σ q_w) + b        the sum is over whole numbers, and exact

(Jacob et al. 2018, §2.) Norms, softmax, biases, the residual stream and the small heads stay in floating point (Zafrir
et al. 2019, "Q8BERT"). A layer has two forms with the same scales: FakeQuantLinear computes those whole numbers
as floats, from weights that learn (quantization-aware training), and makes nothing faster; Int8Linear is what is
served: the weights in a quarter of the space, multiplied by the hardware's int8 instructions where there are such.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini.model.layers import Embedding, Linear

# For torch.compile: a layer's input is needed twice, for its scale and to be scaled; GELU is to be computed once.
INDUCTOR = {"realize_opcount_threshold": 8}
# Whole numbers up to 256 are exact in bfloat16, and as 128ths in float16. With both factors so small, sums of up to
# 33,000 products stay within its range, and on the way back gradients are not much larger than elsewhere.
SMALL = 2.0**-7
RANGE = ".input.range"  # of a static layer, behind its name in files


# ---------------------------------------------------------------- numbers
def quantize(x: Tensor, scale: Tensor, zero: Tensor | float = 0.0, low: int = -127) -> Tensor:
    """round(x / scale + zero), within low..127, as floats.

    The gradient passes straight through the rounding, but is zero for values that are cut off: there a small change of
    x changes nothing (Bengio et al. 2013; Krishnamoorthi 2018, eq. 9). The largest value, 127 but for a bit, stays.
    """
    y = x / scale + zero
    if not torch.is_grad_enabled():
        return y.round_().clamp_(low, 127)
    y = y.clamp(low - 1e-3, 127 + 1e-3)
    return y + (y.round() - y).detach()


def row_scales(weight: Tensor) -> Tensor:
    """(out, in) -> (out, 1): the largest |w| of each row is 127. A row of zeros has the scale 1."""
    largest = weight.detach().abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest / 127, 1.0)


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point for values of low..high; the range includes 0, which is therefore exact (padding, ReLU)."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-8)
    return scale, (-128 - (low / scale).round()).clamp(-128, 127)


def dequantized(product: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """s_x s_w · product + b: product (.., out) of whole numbers; scale (.., 1) or (); weight_scale (out,)."""
    y = product * (scale * weight_scale)
    return y if bias is None else y + bias


class KeepsFloat32(nn.Module):
    """Scales and ranges stay float32 when the rest of a model becomes bfloat16."""

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        kept = {name: b for name, b in self.named_buffers(recurse=False) if b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


# ---------------------------------------------------------------- inputs
class DynamicInput(nn.Module):
    """A scale for each token, from its own largest value: nothing has to be known beforehand."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """x (.., C) -> whole numbers (.., C) as floats, scales (.., 1), zero point."""
        x = x.float()
        scale = (x.detach().abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-8)
        return quantize(x, scale), scale, 0.0


class StaticInput(KeepsFloat32):
    """One scale and zero point for all tokens, from a range that an observer has found; weights train within it."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.register_buffer("range", torch.tensor([low, high]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = affine(*self.range)
        return quantize(x.float(), scale, zero, low=-128), scale, zero


# ---------------------------------------------------------------- layers that learn
class FakeQuantLinear(Linear):
    """A linear layer that computes what Int8Linear will, from float weights, with gradients."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, input: nn.Module, parts: list[int]):
        super().__init__(weight.size(1), weight.size(0), bias=False, parts=parts, device="meta")
        self.weight, self.bias, self.input = weight, bias, input

    def forward(self, x: Tensor) -> Tensor:
        q, scale, zero = self.input(x)
        weight_scale = row_scales(self.weight)
        product = whole_product(q - zero, quantize(self.weight, weight_scale))
        return dequantized(product, scale, weight_scale[:, 0], self.bias).to(x.dtype)


class FakeQuantEmbedding(Embedding):
    """The same for looked-up rows."""

    def __init__(self, weight: nn.Parameter):
        super().__init__(*weight.shape, device="meta")
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(tokens)  # (B, T, C)
        scale = row_scales(rows.detach().flatten(0, -2)).view(*tokens.shape, 1)
        return quantize(rows, scale) * scale


# ---------------------------------------------------------------- layers that are served
class Int8(KeepsFloat32):
    """A matrix as int8 with a scale for each row."""

    def __init__(self, weight: nn.Parameter, scale: Tensor):
        super().__init__()
        self.weight = weight  # (out, in) int8; a parameter, though it never learns: so a tied one stays one
        self.register_buffer("scale", scale)  # (out,)


class Int8Embedding(Int8):
    """Rows of int8, looked up and scaled."""

    by_token = True

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens] * self.scale[tokens][..., None]


class Int8Linear(Int8):
    def __init__(self, weight: nn.Parameter, scale: Tensor, layer: FakeQuantLinear):
        super().__init__(weight, scale)
        self.bias, self.input, self.parts = layer.bias, layer.input, layer.parts
        self.register_buffer("sums", weight.sum(dim=1).float() if isinstance(layer.input, StaticInput) else None)

    def forward(self, x: Tensor) -> Tensor:
        q, scale, zero = self.input(x)
        product = int8_matmul(q.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)
        if self.sums is not None:
            product = product - zero * self.sums
        return dequantized(product, scale, self.scale, self.bias).to(x.dtype)


def whole_product(q: Tensor, weight: Tensor) -> Tensor:
    """q (.., K) times weight (N, K), transposed, of whole numbers as floats; under autocast their sums are rounded."""
    return F.linear(q * SMALL, weight * SMALL).float() / SMALL**2


def int8_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """q (M, K), whole numbers as floats, times weight (N, K) int8, transposed -> (M, N)."""
    if not int8_units(q.device.type) or (q.is_cuda and (weight.size(0) % 8 or weight.size(1) % 8)):
        return whole_product(q.float(), weight.float())  # the same numbers, in no less time than floats take
    q = q.to(torch.int8)
    if q.is_cuda and len(q) <= 16:
        return torch._int_mm(F.pad(q, (0, 0, 0, 17 - len(q))), weight.t())[: len(q)]
    return torch._int_mm(q, weight.t())  # of the (N, K) matrix as it lies: faster for a single row


@torch.compiler.assume_constant_result  # torch.compile asks it, and does not look into it
def int8_units(device: str) -> bool:
    """Whether this machine multiplies int8 matrices, and rightly so."""
    return check_int8(device)


@functools.cache
def check_int8(device: str) -> bool:
    """Tries it, once, with all values of int8."""
    a = torch.arange(-128, 128).repeat(32, 1)  # (32, 256)
    b = torch.stack([torch.arange(-128, 128).roll(i) for i in range(8)])  # (8, 256)
    try:
        product = torch._int_mm(a.to(device, torch.int8), b.to(device, torch.int8).t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(product.cpu().long(), a @ b.t())


def backend(device: str) -> str:
    """What Int8Linear does on this device, in words."""
    return "torch._int_mm multiplies int8 matrices" if int8_units(device) else "no int8 products here: it uses floats"


# ---------------------------------------------------------------- models
def matrices(model: nn.Module, kind: type = Linear) -> dict[str, nn.Module]:
    """The layers of a kind, by name; of Linear all that are quantized, which small heads are not."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def prepare(model: nn.Module, ranges: dict[str, tuple[float, float]]) -> nn.Module:
    """Gives a model the layers that learn, in place; parameters keep their names and stay tied.

    ranges: of the layers whose inputs have one scale for all tokens; the others are dynamic.
    """
    for name, layer in matrices(model).items():
        input = StaticInput(*ranges[name]) if name in ranges else DynamicInput()
        put(model, name, FakeQuantLinear(layer.weight, layer.bias, input, layer.parts))
    for name, table in matrices(model, Embedding).items():
        put(model, name, FakeQuantEmbedding(table.weight))
    return model.train(model.training)


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Gives a prepared model the layers that are served, in place."""
    done: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def whole(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
        if id(weight) not in done:  # once for a matrix with two places
            scale = row_scales(weight)
            q = quantize(weight, scale).to(torch.int8)
            done[id(weight)] = nn.Parameter(q, requires_grad=False), scale[:, 0].float()
        return done[id(weight)]

    for name, layer in matrices(model, FakeQuantLinear).items():
        put(model, name, Int8Linear(*whole(layer.weight), layer))
    for name, table in matrices(model, FakeQuantEmbedding).items():
        put(model, name, Int8Embedding(*whole(table.weight)))
    return model.train(model.training)


@torch.no_grad()
def restore(model: nn.Module) -> nn.Module:
    """The inverse of `convert`: layers that learn, from the served ones. Converted again they are the same."""
    done: dict[int, nn.Parameter] = {}

    def floats(layer: Int8) -> nn.Parameter:
        return done.setdefault(id(layer.weight), nn.Parameter(layer.weight * layer.scale[:, None]))

    for name, layer in matrices(model, Int8Linear).items():
        put(model, name, FakeQuantLinear(floats(layer), layer.bias, layer.input, layer.parts))
    for name, table in matrices(model, Int8Embedding).items():
        put(model, name, FakeQuantEmbedding(floats(table)))
    return model.train(model.training)


def ranges_of(tensors: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """What `prepare` needs to make the layers that these tensors are of: of weights(model), or of a file."""
    found = {name.removesuffix(RANGE): tensor for name, tensor in tensors.items() if name.endswith(RANGE)}
    return {name: tuple(tensor.tolist()) for name, tensor in found.items() if tensor.shape == (2,)}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_int8(model: nn.Module) -> bool:
    return isinstance(model.stack.tokens, Int8Embedding)


def is_prepared(model: nn.Module) -> bool:
    return isinstance(model.stack.tokens, FakeQuantEmbedding)
