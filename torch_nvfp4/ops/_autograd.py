"""How the ops take part in autograd: which arguments have a gradient, and words for those that have none."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from torch_nvfp4.ops._library import register_fake

# Not torch.library.register_autograd: its forward mode gives zeros, and under torch.func its errors do not name the op.
_AUTOGRAD = torch.library.Library("nvfp4", "FRAGMENT")
_REASONS: dict[int, str] = {}
"""What ``nvfp4::no_gradient`` raises, by its argument ``reason``: a checksum of the words and not their place, since a
graph that another version of this package traced may come out of a compiler's cache."""

Backward = Callable[[Tensor, dict[str, Any], dict[str, bool]], dict[str, Tensor]]
"""``backward(grad_output, arguments, needed)``: gradients by name of those arguments that are needed and have one. In
the place of an argument whose values it does not read (``Unread``) stands the shape."""

Unread = Callable[[dict[str, bool]], Sequence[str]]
"""``unread(needed)``: the arguments of which the backward for these needs no values, so that nothing is saved."""


def _no_gradient(grad_output: Tensor, input: Tensor, reason: int) -> NoReturn:
    words = "an op of nvfp4 has no gradient that is asked for; compile again for the words of this version"
    raise NotImplementedError(_REASONS.get(reason, words))


_AUTOGRAD.impl("no_gradient", _no_gradient, "CompositeExplicitAutograd")


@register_fake("no_gradient")
def _(grad_output: Tensor, input: Tensor, reason: int) -> Tensor:
    return torch.empty_like(input)


def _reason(op: str, what: str, alternative: str) -> int:
    words = f"nvfp4::{op} has no gradient{what}. {alternative}"
    reason = zlib.crc32(words.encode())
    _REASONS[reason] = words
    return reason


def _overload(op: str) -> Any:
    name, _, overload_name = op.partition(".")
    return getattr(getattr(torch.ops.nvfp4, name), overload_name or "default")


def _in_forward_mode(tensors: list[Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _gradient(
    overload: Any, names: list[str], reasons: dict[str, int], backward: Backward | None, unread: Unread | None
) -> type[torch.autograd.Function]:
    """The autograd function of an op with these positional arguments, called with its keywords as one dict first."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(kwargs: dict[str, Any], *args: Any) -> Any:
            if not torch._C._are_functorch_transforms_active():
                return _below(overload, args, kwargs)
            # Outer levels of the transforms have derivatives of their own, which Function switches off.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below(overload, args, kwargs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.kwargs, *args = inputs
            needed = dict(zip(names, ctx.needs_input_grad[1:], strict=False))
            shapes = () if unread is None else unread(needed)
            kept = [arg.shape if name in shapes else arg for name, arg in zip(names, args, strict=False)]
            ctx.saved = [isinstance(arg, Tensor) for arg in kept]
            ctx.constants = [None if saved else arg for saved, arg in zip(ctx.saved, kept, strict=True)]
            ctx.save_for_backward(*[arg for arg in kept if isinstance(arg, Tensor)])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            tensors = iter(ctx.saved_tensors)
            pairs = zip(ctx.saved, ctx.constants, strict=True)
            args = [next(tensors) if saved else constant for saved, constant in pairs]
            arguments = dict(zip(names, args, strict=False))
            needed = dict(zip(names, ctx.needs_input_grad[1:], strict=False))
            found: dict[str, Tensor] = {}
            if backward is not None:
                found = backward(grads[0].contiguous(), {**arguments, **ctx.kwargs}, needed)
            results: list[Tensor | None] = [None]
            for name, wanted in needed.items():
                if wanted and name not in found:
                    found[name] = torch.ops.nvfp4.no_gradient(grads[0], arguments[name], reasons[name])
                results.append(found.get(name))
            return tuple(results)

    return Gradient


def _below(overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args, **kwargs)


def register_autograd(
    op: str, alternative: str, backward: Backward | None = None, unread: Unread | None = None
) -> None:
    """Registers the gradients of ``nvfp4::<op>``, or, without ``backward``, that it has none.

    A gradient that does not exist raises NotImplementedError with ``alternative`` when it is computed, so that a
    forward pass whose derivative nobody takes runs and compiles. Forward mode raises at once.

    Registered at import: autograd that is registered after an op was first traced gives wrong gradients under AOT.
    """
    overload = _overload(op)
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]
    reasons = {name: _reason(op, f" with respect to {name}", alternative) for name in names}
    forward_mode = _reason(op, " in forward mode", alternative)
    gradient = _gradient(overload, names, reasons, backward, unread)

    def autograd(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if _in_forward_mode(tensors):
            raise NotImplementedError(_REASONS[forward_mode])
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return _below(overload, args, kwargs)
        if torch._C._are_functorch_transforms_active():
            # This kernel runs at one level of the transforms, and Function.apply would start at the outermost again.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, gradient).apply(kwargs, *args)  # type: ignore[misc]
        return gradient.apply(kwargs, *args)

    _AUTOGRAD.impl(op, autograd, "Autograd")


def register_no_autograd_of_out(op: str, alternative: str) -> None:
    """Makes an out overload, such as "moe.out", raise at once where a gradient is wanted, since no result of its own
    could raise in backward; and marks ``out`` as changed for whoever saved it for a backward of theirs."""
    overload = _overload(op)
    reason = _reason(op, "", alternative)

    def autograd(*args: Any, out: Tensor, **kwargs: Any) -> None:
        tensors = [arg for arg in (*args, out) if isinstance(arg, Tensor)]
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted or _in_forward_mode(tensors):
            raise NotImplementedError(_REASONS[reason])
        write(*args, out=out, **kwargs)

    def write(*args: Any, out: Tensor, **kwargs: Any) -> None:
        """Inference mode comes here at once, where ``out`` was made outside of it."""
        with torch._C._AutoDispatchBelowADInplaceOrView():
            overload(*args, **kwargs, out=out)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)

    _AUTOGRAD.impl(op, autograd, "Autograd")
    _AUTOGRAD.impl(op, write, "ADInplaceOrView")
