"""A custom operator whose inputs are written once, as a NamedTuple, and read by its names.

torch gives the computation, the fake and the autograd of an operator bare tuples of inputs, and
takes a bare tuple of gradients; here they are the fields of the NamedTuple, whose order and types
are the schema.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Given = TypeVar("Given", bound=tuple[Any, ...])
Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


class Operator(Generic[Given, Result]):
    """``stepagent::name``: what computes it, and its empty results for the compiler."""

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Given],
        compute: Callable[[Given], Result],
        fake: Callable[[Given], Result],
    ) -> None:
        """Register it.

        Args:
            name: of the operator.
            inputs: the class of the NamedTuple, in the order of the schema.
            compute: the results.
            fake: tensors of their shapes and dtypes, with nothing computed.
        """

        def run(*values: Any) -> Result:
            return compute(inputs(*values))

        results = inspect.signature(compute).return_annotation
        signature = inspect.signature(inputs).replace(return_annotation=results)
        run.__signature__ = signature  # type: ignore[attr-defined]  # what the schema is read from
        self.name = name
        self.compute = run  # without torch around it
        self.inputs = inputs
        self.fields = tuple(signature.parameters)
        self.custom_op = torch.library.custom_op(f"stepagent::{name}", run, mutates_args=())
        self.custom_op.register_fake(lambda *values: fake(inputs(*values)))

    def __call__(self, given: Given) -> Result:
        if not torch.compiler.is_compiling():
            self._refuse_forward_mode(given)
        return cast(Result, self.custom_op(*given))

    def _refuse_forward_mode(self, given: Given) -> None:
        """A custom operator drops tangents: its forward-mode derivative would be a silent 0."""
        tangent_of = forward_ad.unpack_dual  # costs little where no dual level is entered
        for field, value in zip(self.fields, given, strict=True):
            if not isinstance(value, Tensor):
                continue
            if tangent_of(value).tangent is not None:  # type: ignore[no-untyped-call]
                raise NotImplementedError(
                    f"stepagent::{self.name} must be differentiated in reverse mode (backward, "
                    f"grad, vjp, jacrev), got {field} with a forward-mode tangent (jvp, jacfwd)"
                )

    def differentiate(
        self,
        save: Callable[[Any, Given, Any], Mapping[str, Any]],
        backward: Callable[["Saved"], Mapping[str, Tensor | None]],
    ) -> None:
        """Register the autograd formula.

        Args:
            save: of context, inputs and results, what the backward needs: tensors and others, by
                any names. It marks on the context which results have no gradient.
            backward: from what was saved, the gradients by the names of inputs; all others are
                None.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            saved = save(ctx, self.inputs(*inputs), output)
            tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
            ctx.names = tuple(tensors)
            ctx.others = {name: value for name, value in saved.items() if name not in tensors}
            ctx.save_for_backward(*tensors.values())

        def autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            # Once: activation checkpointing unpacks what was saved a single time.
            tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
            # Not strict: where torch traces, an input that has its default may be left out.
            needs = dict(zip(self.fields, ctx.needs_input_grad, strict=False))
            named = backward(Saved({**tensors, **ctx.others}, grads, needs))
            return tuple(named.get(field) for field in self.fields)

        self.custom_op.register_autograd(autograd, setup_context=setup_context)


class Saved(NamedTuple):
    """What a backward gets."""

    values: dict[str, Any]  # what `save` named
    grads: tuple[Any, ...]  # of the results
    needs: dict[str, bool]  # of each input, whether its gradient is asked for

    def those_of(self, inputs: type[tuple[Any, ...]]) -> dict[str, Any]:
        """What was saved under the names of these inputs."""
        return {k: v for k, v in self.values.items() if k in inputs._fields}  # type: ignore[attr-defined]
