"""Audit: run a model once on the meta device and list every activation that is computed, whoever computes it.

Modules tell what a model has; only a forward tells what it calls. Operators are watched below autograd, so a
`F.relu` in the middle of an attention or a norm that multiplies by its own sigmoid shows up as a module does.
"""

import copy
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ActivationCall", "audit_activations"]

# ATen's names, without the underscore of the in-place form.
_OPERATORS = {
    "relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "softplus", "softshrink", "hardshrink", "log_sigmoid_forward", "threshold", "tanh",
}  # fmt: skip
_VIEWS = {"view", "_unsafe_view", "reshape", "unsqueeze", "expand", "_to_copy", "alias", "detach", "t", "permute"}


@dataclass(frozen=True)
class ActivationCall:
    """An activation that is computed by something other than DiTAC.

    Attributes:
        operator: ATen's operator, or a formula ("x * sigmoid(x)").
        path: The innermost module in whose forward it was called; empty for the model itself.
        source: "file:line" of the innermost frame outside torch.
        calls: How often in one forward.
    """

    operator: str
    path: str
    source: str
    calls: int = 1

    def __str__(self) -> str:
        return f"{self.operator} in {self.path or 'the model'} ({self.source})"


def audit_activations(model: nn.Module, input_size: Sequence[int] | None = None) -> list[ActivationCall]:
    """Every activation call that is no DiTAC, from one forward in eval mode on the meta device.

    Neither gates (sigmoid, hard sigmoid), nor softmax, nor clamps count, nor what an LSTM does inside. The model is
    not changed and its weights are not read.

    Args:
        model: Any module that takes one tensor.
        input_size: Shape of the input without batch, `(channels, height, width)`; timm's configuration where None.

    Returns:
        In the order of the first call; empty if DiTAC is everywhere.

    Raises:
        ValueError: No `input_size`, and the model has no configuration that gives one.
    """
    if input_size is None:
        config = getattr(model, "pretrained_cfg", None) or {}
        input_size = config.get("input_size")
        if input_size is None:
            raise ValueError("input_size is needed, (channels, height, width): the model has no timm configuration.")
    twin = meta_twin(model).eval()
    recorder = _Recorder()
    with ExitStack() as stack:
        for name, module in twin.named_modules():
            stack.callback(module.register_forward_pre_hook(recorder.enter(name, module)).remove)
            stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        dtypes = (parameter.dtype for parameter in twin.parameters() if parameter.is_floating_point())
        twin(torch.empty(1, *input_size, dtype=next(dtypes, None), device="meta"))
    return [ActivationCall(*call, count) for call, count in recorder.calls.items()]


def meta_twin(model: nn.Module) -> nn.Module:
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
            elif isinstance(tensor, Tensor):
                memo[id(tensor)] = tensor.detach().to("meta")
    return copy.deepcopy(model, memo)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.stack: list[tuple[str, nn.Module]] = []
        # Data flow, by identity of tensors, which `alive` keeps from being reused.
        self.alive: list[Tensor] = []
        self.scaled: dict[int, int] = {}  # x * constant -> x
        self.sigmoids: dict[int, set[int]] = {}  # sigmoid(x) or sigmoid(x * constant) -> x
        self.weights: set[int] = set()  # views of parameters

    def enter(self, name: str, module: nn.Module):
        return lambda *_: self.stack.append((name, module))

    def leave(self, *_) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func, types, args: tuple = (), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0].rstrip("_")
        if name in _OPERATORS:
            if not any(isinstance(module, nn.RNNBase) for _, module in self.stack):
                self.record(name)
        elif name == "hardtanh" and tuple(args[1:3]) == (0, 6):
            self.record("relu6")
        elif name in _VIEWS:
            if self.is_weight(args[0]):
                self.mark(self.weights.add, out)
        elif name == "sigmoid":
            x = id(args[0])
            self.mark(lambda key: self.sigmoids.update({key: {x, self.scaled.get(x, x)}}), out, args[0])
        elif name == "mul" and isinstance(out, Tensor):
            self.multiply(args[0], args[1], out)
        elif name == "maximum" and any(map(self.is_weight, args[:2])):
            self.record("maximum(x, threshold)")
        return out

    def multiply(self, a, b, out: Tensor) -> None:
        for x, other in ((a, b), (b, a)):
            if not isinstance(x, Tensor):
                continue
            if id(x) in self.sigmoids.get(id(other), ()):
                self.record("x * sigmoid(x)")
            elif not isinstance(other, Tensor) or other.ndim == 0 or self.is_weight(other):
                self.mark(lambda key, x=x: self.scaled.update({key: id(x)}), out, x)

    def is_weight(self, tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or id(tensor) in self.weights

    def mark(self, note, out: Tensor, *inputs: Tensor) -> None:
        self.alive += [out, *inputs]
        note(id(out))

    def record(self, operator: str) -> None:
        path = self.stack[-1][0] if self.stack else ""
        self.calls[operator, path, _source()] += 1


def _source() -> str:
    beneath = (f"{Path(torch.__file__).parent}{os.sep}", __file__, "<")
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(beneath):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    for entry in sorted(sys.path, key=len, reverse=True):  # timm/layers/..., wherever it is installed
        if entry and path.is_relative_to(entry):
            path = path.relative_to(entry)
            break
    return f"{path}:{frame.f_lineno}"
