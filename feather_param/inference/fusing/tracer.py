"""A tracer for torch.fx that records what the model does, or refuses."""

from __future__ import annotations

import dis
import inspect
import itertools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx.proxy
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from feather_param.selection.weights import LINEAR_AND_CONV

_FIXED = (type(None), bool, str, torch.dtype, torch.device)  # values on which a forward usually branches
_NUMBERS = (int, float)
_PROXY = torch.fx.proxy.__file__


class Untraceable(Exception):
    """The reason why a model has no graph."""


def require_fixed(value: Any, name: str, expected: Any) -> None:
    """Raise a ValueError unless an argument has the value for which the model was traced."""
    if type(value) is not type(expected) or value != expected:
        raise ValueError(
            f"expected {name}={expected!r}, as in the example, got {type(value).__name__}; "
            f"convert the model again, with {name} in the example"
        )


def require_tensor(value: Any, name: str) -> None:
    """Raise a TypeError unless an argument is a tensor, as in the example for which the model was traced."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected {name} to be a tensor, as in the example, got {type(value).__name__}; "
            "convert the model again, with such an example"
        )


def hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks that a call runs."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


class Tracer(fx.Tracer):
    """The tracer of torch.fx, with in-place operators, and with the arguments of an example.

    torch pickles the class with a graph, and makes a tracer without arguments to read the graph again.
    """

    proxy_buffer_attributes = True

    def __init__(self, named: Mapping[str, Any] | None = None, leaf: tuple[type, ...] = ()) -> None:
        super().__init__()
        self._named = named
        self._leaf = (*LINEAR_AND_CONV, torch.jit.ScriptModule, *leaf)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own_forward = type(m).forward is nn.BatchNorm2d.forward  # a subclass with torch's forward
        if isinstance(m, self._leaf) or own_forward or hooked(m):  # a traced hook would see no values
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # torch.fx would record a dict
            return self.create_proxy("call_function", OrderedDict, ([*a.items()],), {}).node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Record the condition of an assert statement; raise an error for other control flow."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename in (__file__, _PROXY):
            frame = frame.f_back
        if frame is None or not _in_assert(frame):
            return super().to_bool(obj)
        self.create_proxy("call_function", torch._assert, (obj, "assertion of the traced model failed"), {})
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        inputs = {}
        for parameter in itertools.islice(inspect.signature(root_fn).parameters.values(), 1, None):
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):  # the example gives none
                inputs[parameter.name] = self._input(parameter)
        return lambda root: root_fn(root, **inputs), [self.root]

    def _input(self, parameter: inspect.Parameter) -> Any:
        name, default = parameter.name, parameter.default
        absent = self._named is not None and name not in self._named
        if self._named is None or absent:
            node = self.create_proxy("placeholder", name, () if default is parameter.empty else (default,), {})
        else:
            node = self.create_proxy("placeholder", name, (), {})
        if self._named is None:
            return node
        value = default if absent else self._named[name]
        if isinstance(value, _FIXED) or (absent and isinstance(value, _NUMBERS)):
            self._require(require_fixed, node, name, value)
            return value
        if isinstance(value, Tensor):
            self._require(require_tensor, node, name)
        elif not isinstance(value, _NUMBERS):
            raise Untraceable(f"its argument {name} is a {type(value).__name__}")
        return node

    def _require(self, function: Callable[..., None], *args: Any) -> None:
        self.create_proxy("call_function", function, args, {}).node.meta["is_wrapped"] = True


def _in_assert(frame: types.FrameType) -> bool:
    """Return whether a frame is about to skip ``raise AssertionError`` if a condition is true."""
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in ("CACHE", "NOT_TAKEN")]
    rest = [i for i in code if i.offset >= frame.f_lasti][:3]  # the jump may follow the conversion to a bool
    for jump, after in itertools.pairwise(rest):
        if "JUMP" in jump.opname:
            raises = after.opname == "LOAD_ASSERTION_ERROR" or after.argrepr == "AssertionError"
            return raises and jump.opname.endswith("IF_TRUE")
    return False


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
)
_IN_PLACE = {f"__i{name}__": _in_place(getattr(operator, f"__i{name}__")) for name in _OPERATORS}


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` as in place. fx.Proxy records ``a + b``, so that other names of `a` differ."""

    vars().update(_IN_PLACE)

    def __getattr__(self, k: str) -> Attribute:
        return _Attribute(self, k)


class _Attribute(Attribute):
    vars().update(_IN_PLACE)
