"""Captum's face of the package: formats inputs and targets, runs the engine, formats the result.

The only module that touches Captum, its private helpers included (``tests/test_captum.py`` holds
their contract).
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Sequence
from typing import Any, Literal

import torch
from captum._utils.common import (
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
    _select_targets,
)
from captum._utils.typing import TargetType, TensorOrTupleOfTensorsGeneric
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.fx import Node

from .errors import InputError
from .graph.capture import CapturedGraph, check_eval_mode, unwrap
from .graph.layers import layer_calls, leaf_calls, module_names
from .kernels import get_backend, is_reference_forced
from .plan.steps import Final
from .run.engine import Captured, Engine
from .run.recording import Recordings

Backend = Literal["auto", "compiled", "reference"]
ModuleOrModules = nn.Module | Sequence[nn.Module] | None


class _Explainer:
    """What the input and the layer variant share."""

    def _prepare(
        self,
        model: nn.Module,
        backend: Backend,
        layers: Sequence[str] | None = (),
        cuda_graphs: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"Relative LRP explains a torch.nn.Module, not a {type(model).__name__}: it "
                "needs the model's graph. Wrap the function in a module's forward."
            )
        self.model = model
        self.backend = backend
        kernels = get_backend(backend)
        # Where the reference is asked for, the graph runs as captured: the plainest definition.
        fuses = not is_reference_forced(backend)
        recordings = Recordings() if cuda_graphs else None
        self._engine = Engine(unwrap(model), kernels, fuses, layers, recordings=recordings)

    def has_convergence_delta(self) -> bool:
        """True: the delta is the largest violation of the local law (see ``attribute``)."""
        return True

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: every section's rule multiplies by the section's input."""
        return True


class RelativeLRP(_Explainer, Attribution):
    r"""
    Relative Layer-Wise Relevance Propagation [https://arxiv.org/abs/2501.14322]: one unit of
    relevance starts at the target output and is propagated backwards. In every linear
    section :math:`y = Jx + b` (a maximal chain of linear layers) it becomes

    .. math::
        q = x \odot J^\top r_y, \qquad r_x = q \, \|r_y\|_1 / \|q\|_1

    so that the absolute mass is carried exactly and nothing is divided by a single
    pre-activation. At a skip connection it is shared in proportion to the absolute values of
    the summands. There is no hyperparameter. The definition is one consistent with the
    paper's abstract; see ``docs/method.md``.

    The model is captured once per signature of its arguments by ``torch.export`` and never
    touched: no hooks, no attributes, no change of weights, flags or mode. Several threads may
    share one instance. Weights, modules and the settings of PyTorch's layers may change between
    calls; after a change of other attributes that the forward reads, make a new instance.

    Args:

        model (nn.Module): A model in eval mode. ``DataParallel`` and compiled modules are
                unwrapped.
        backend (str): ``"compiled"`` (the C++/CUDA kernels), ``"reference"`` (pure
                PyTorch) or ``"auto"``, which takes the compiled one where it is built.
        cuda_graphs (bool): On a GPU, record an explanation when its signature comes for the
                second time and replay it from then on, which saves the time of launching
                kernels one by one; for small batches. Changes of the weights are seen. The
                memory of the last four signatures is kept, that of one explanation each. An
                experiment: it has not run on a GPU yet (``docs/gpu-status.md``).

    Raises:

        InputError: If `model` is not a module.

    Examples::

        >>> model = torchvision.models.resnet50(weights="DEFAULT").eval()
        >>> rlrp = RelativeLRP(model)
        >>> # images: (N, 3, 224, 224) → attributions of the same shape
        >>> attributions = rlrp.attribute(images, target=labels)
        >>> attributions, delta = rlrp.attribute(
        ...     images, target=labels, return_convergence_delta=True
        ... )
    """

    def __init__(
        self, model: nn.Module, backend: Backend = "auto", cuda_graphs: bool = False
    ) -> None:
        Attribution.__init__(self, model)
        self._prepare(model, backend, cuda_graphs=cuda_graphs)

    @typing.overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        return_convergence_delta: Literal[True],
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> tuple[TensorOrTupleOfTensorsGeneric, Tensor]: ...

    @typing.overload
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: Literal[False] = False,
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric: ...

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric | tuple[TensorOrTupleOfTensorsGeneric, Tensor]:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Floating-point inputs to explain;
                    dimension 0 is the batch, aligned over all of them. A batch of 0 gives an
                    empty result.

            target (int, tuple, Tensor, or list, optional): The output to explain, in
                    any of Captum's forms:

                    - for 2D outputs an integer or a tensor with one integer (for all
                      examples), or a list of integers or 1D tensor (one for each example);
                    - for outputs with more dimensions a tuple of #output_dims - 1
                      integers, or a list of such tuples, one for each example;
                    - None if the model returns one scalar per example.

                    Default: None

            additional_forward_args (Any, optional): Further arguments of forward, after
                    the inputs: tensors, numbers, None, or tuples of these. They are constants:
                    no relevance is given to them.
                    Default: None

            return_convergence_delta (bool, optional): Whether to return the delta too.
                    Default: False

            verbose (bool, optional): Whether to write the steps of the propagation to
                    standard error.
                    Default: False

            internal_batch_size (int, optional): Explain so many examples at a time, which
                    bounds the memory and changes no result beyond rounding. If None, all at
                    once on a GPU; on a CPU as many as are fast, wherever it is sure that no
                    example influences another.
                    Default: None

        Returns:

            *Tensor* or *tuple[Tensor, ...]* of **attributions**, and **delta** if asked for:

            - **attributions**: Relevance of each input element, of the inputs' shape,
              dtype and device, contiguous and detached. Its unit is a share of the one unit
              put on the target: the absolute values of an example sum to 1 in a
              network without merges, and at most to 1 otherwise. A tuple if `inputs` is one.
            - **delta** (*Tensor*): Shape (batch,). The largest relative violation, over
              the sections, of the local law
              :math:`|\sum_i q_i - \sum_j (y_j - b_j) r_j| / \|q\|_1`: rounding error only,
              about 1e-6 in float32.

        Raises:

            UnsupportedOperationError: Relevance would have to cross an op without a rule.
            TrainingModeError: A module is in training mode; call ``model.eval()``.
            CaptureError: ``torch.export`` cannot capture the model.
            InputError: Inputs or target do not fit the model.
            NonFiniteError: An input, or a value the model computes, is not finite.
        """
        is_tuple = isinstance(inputs, tuple)
        tensors = _check_inputs(inputs)
        _check_floating(tensors, self.model)
        additional = _format_additional_forward_args(additional_forward_args) or ()
        batch = len(tensors[0])
        if internal_batch_size is not None and internal_batch_size < 1:
            raise InputError(f"internal_batch_size must be at least 1, not {internal_batch_size}.")
        if batch == 0:
            check_eval_mode(self._engine.model)
            parts = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors]
            delta = torch.zeros(0, dtype=_delta_dtype(tensors[0]), device=tensors[0].device)
        else:
            explanation = self._engine.explain(
                tensors,
                additional,
                functools.partial(_start, _at_hand(target), batch, self.model),
                measure_delta=return_convergence_delta,
                internal_batch_size=internal_batch_size,
            )
            parts = [
                _finish(part, x.dtype)
                for part, x in zip(explanation.relevance, tensors, strict=True)
            ]
            if explanation.delta is not None:
                delta = explanation.delta.to(_delta_dtype(tensors[0]))
            if verbose:
                captured = self._engine.captured((*tensors, *additional), len(tensors), batch)
                _report(captured)
        attributions = _format_output(is_tuple, tuple(parts))
        return (attributions, delta) if return_convergence_delta else attributions


class LayerRelativeLRP(_Explainer, LayerAttribution):
    r"""
    Relevance at the outputs or inputs of layers, by the same propagation as
    :class:`RelativeLRP` and in one pass however many layers are asked for.

    A layer inside a linear section (a convolution before its batch norm, say) gets the section's
    rule up to that point: with v its value and J' the rest of the section,
    :math:`v \odot J'^\top r_y`, carried to the same mass.

    Args:

        model (nn.Module): A model in eval mode.
        layer (nn.Module, list or tuple of them, or None): Any modules of the model:
                leaves, containers, activations. None takes every leaf module that carries
                relevance, in order of execution (:meth:`layer_names` tells them).
        backend (str): As for :class:`RelativeLRP`.

    Raises:

        InputError: If a layer is not a module of the model.

    Examples::

        >>> layer_rlrp = LayerRelativeLRP(model, model.layer4)
        >>> relevance = layer_rlrp.attribute(images, target=labels)  # (N, 2048, 7, 7)
        >>> heat = LayerAttribution.interpolate(relevance.sum(1, keepdim=True), (224, 224))
        >>> # text: integer tokens, explained at the embedding
        >>> tokens = LayerRelativeLRP(model, model.embedding).attribute(ids, target=1)
    """

    def __init__(
        self, model: nn.Module, layer: ModuleOrModules = None, backend: Backend = "auto"
    ) -> None:
        self._prepare(model, backend, None)
        LayerAttribution.__init__(self, model, layer)
        self._many = layer is None or isinstance(layer, (list, tuple, nn.ModuleList))
        self._names: list[list[str]] | None = None
        if layer is not None:
            modules: Sequence[nn.Module] = list(layer) if self._many else [layer]  # type: ignore[arg-type,list-item]
            self._names = [module_names(self._engine.model, unwrap(m)) for m in modules]
            self._engine.layers = [names[0] for names in self._names]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        attribute_to_layer_input: bool = False,
        verbose: bool = False,
    ) -> Any:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor, ...]): Inputs of the model, integer ones
                    (tokens) among them; dimension 0 is the batch.
            target (int, tuple, Tensor, or list, optional): As for :class:`RelativeLRP`.
            additional_forward_args (Any, optional): As for :class:`RelativeLRP`.
            return_convergence_delta (bool, optional): Whether to return the delta too.
            attribute_to_layer_input (bool, optional): Relevance at the layer's inputs
                    in place of its outputs. An input that other layers read too has its
                    whole relevance.
            verbose (bool, optional): Whether to write the steps to standard error.

        Returns:

            The relevance, of the shape of the layer's output (or input): a *Tensor*, or a
            *tuple* of them where the layer has several outputs or is called several times
            (in order of execution). A *list* with one entry for each layer if `layer` was a
            list, a tuple or None. With `return_convergence_delta` a pair of that and the
            **delta** of shape (batch,). Relevance that a layer does not receive is 0.

        Raises:

            InputError: If a layer is not called by the model, besides what
                :meth:`RelativeLRP.attribute` raises.
        """
        tensors = _check_inputs(inputs)
        additional = _format_additional_forward_args(additional_forward_args) or ()
        batch = len(tensors[0])
        key = (attribute_to_layer_input, None if self._names is None else str(self._names))

        def wanted(graph: CapturedGraph, explained: Sequence[Node]) -> list[Node]:
            groups = self._groups(graph, explained, attribute_to_layer_input)
            return list(dict.fromkeys(node for group in groups for node in group))

        # The empty batch runs as one sample, of which nothing is kept.
        run_on = tensors if batch else tuple(x.new_zeros((1, *x.shape[1:])) for x in tensors)
        captured = self._engine.captured(
            (*run_on, *additional), len(tensors), len(run_on[0]), wanted, key
        )
        groups = self._groups(captured.program.graph, captured.explained, attribute_to_layer_input)
        target = _at_hand(target) if batch else _any_target
        explanation = self._engine.explain(
            run_on,
            additional,
            functools.partial(_start, target, len(run_on[0]), self.model),
            wanted,
            key,
            measure_delta=return_convergence_delta,
        )
        by_node = dict(zip(captured.wanted, explanation.relevance, strict=True))
        results: list[Any] = []
        for group in groups:
            parts = tuple(
                _finish(by_node[n], n.meta["val"].dtype)[: None if batch else 0] for n in group
            )
            results.append(parts[0] if len(parts) == 1 else parts)
        if verbose:
            _report(captured)
        result = results if self._many else results[0]
        if not return_convergence_delta:
            return result
        assert explanation.delta is not None
        return result, explanation.delta.to(_delta_dtype(tensors[0]))[: None if batch else 0]

    def layer_names(
        self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: object | None = None
    ) -> list[str]:
        """Names of the leaf modules that carry relevance, in order of execution.

        Args:
            inputs: As for :meth:`attribute`; the values do not matter.
            additional_forward_args: As for :meth:`attribute`.

        Returns:
            Names as in ``model.named_modules()``: the entries of the list that :meth:`attribute`
            returns for ``layer=None``.
        """
        tensors = _check_inputs(inputs)
        additional = _format_additional_forward_args(additional_forward_args) or ()
        captured = self._engine.captured((*tensors, *additional), len(tensors), len(tensors[0]))
        return [name for name, _ in self._leaves(captured.program.graph, captured.explained)]

    def _leaves(
        self, graph: CapturedGraph, explained: Sequence[Node]
    ) -> list[tuple[str, list[Node]]]:
        return leaf_calls(self._engine.model, graph, explained)

    def _groups(
        self, graph: CapturedGraph, explained: Sequence[Node], of_inputs: bool
    ) -> list[list[Node]]:
        if self._names is None:
            if not of_inputs:
                return [nodes for _, nodes in self._leaves(graph, explained)]
            names = [[name] for name, _ in self._leaves(graph, explained)]
        else:
            names = self._names
        return [layer_calls(graph, explained, group, of_inputs) for group in names]


# ---- formats ----------------------------------------------------------------------------------


def _check_inputs(inputs: Any) -> tuple[Tensor, ...]:
    tensors: tuple[Tensor, ...] = (
        _format_tensor_into_tuples(inputs) if isinstance(inputs, (Tensor, tuple)) else ()
    )
    if not tensors or not all(isinstance(x, Tensor) for x in tensors):
        raise InputError(
            f"inputs must be a tensor or a tuple of tensors, not {type(inputs).__name__}. Other "
            "arguments go to additional_forward_args."
        )
    if any(x.dim() == 0 for x in tensors):
        raise InputError("inputs must have a batch dimension (dimension 0); got a scalar tensor.")
    if len({len(x) for x in tensors}) > 1:
        sizes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise InputError(f"inputs must have the same batch size in dimension 0; got {sizes}.")
    return tensors


def _check_floating(tensors: Sequence[Tensor], model: nn.Module) -> None:
    for i, x in enumerate(tensors):
        if not x.is_floating_point():
            embeddings = [
                name
                for name, module in model.named_modules()
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            ]
            layer = f"model.get_submodule('{embeddings[0]}')" if embeddings else "model.embedding"
            raise InputError(
                f"Input {i} has dtype {x.dtype}: an integer has no relevance of its own. Explain "
                f"the layer that embeds it, LayerRelativeLRP(model, {layer}), or convert "
                "the input by .float()."
            )


def _at_hand(target: Any) -> Any:
    """The target where Python can read it: on a GPU that waits, later for the whole forward."""
    return target.cpu() if isinstance(target, Tensor) else target


def _start(
    target: Any, whole: int, model: nn.Module, output: Tensor, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """One unit of relevance at the target of each sample (method.md §1).

    Args:
        target: The user's target, for all `whole` samples, or a function that finds one.
        whole: Number of samples the user passed.
        model: Named in errors.
        output: The model's output for some rows of them.
        rows: Which.
    """
    name, batch = type(model).__name__, rows.stop - rows.start
    if not output.is_floating_point():
        raise InputError(
            f"{name} returns {output.dtype}; an explanation needs floating-point scores."
        )
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    start = torch.zeros(output.shape, dtype=dtype, device=output.device)
    shape = tuple(output.shape)
    if not shape and batch == 1 and target is None:
        return start + 1, None
    if not shape or shape[0] != batch:
        raise InputError(
            f"{name} returns shape {shape} for a batch of {batch}; an explanation needs one row of "
            "scores per sample."
        )
    if target is None:
        if output.numel() != batch:
            raise InputError(
                f"target is missing: {name} returns shape {shape}, more than one score per sample. "
                f"Pass target, {_target_hint(shape)}."
            )
        chosen = torch.arange(batch, device=output.device)
    else:
        if callable(target):
            target = target(output)
        chosen = _choose(output, target, whole, rows, name)
    if chosen.numel() != batch:
        raise InputError(
            f"target {_short(target)} selects {chosen.numel() // batch} scores per sample of the "
            f"output of shape {shape}; an explanation needs one: {_target_hint(shape)}."
        )
    chosen = chosen.reshape(-1)
    start.view(-1).index_fill_(0, chosen, 1)
    if len(shape) != 2:
        return start, None
    return start, chosen if batch == 1 else chosen % shape[1]


def _choose(output: Tensor, target: Any, whole: int, rows: slice, name: str) -> Tensor:
    """The positions of the target's scores, counted over the whole output."""
    shape = tuple(output.shape)

    def wrong(reason: str) -> InputError:
        what = f"target {_short(target)} does not fit {name}'s output of shape {shape}"
        return InputError(f"{what}: {reason}.")

    given = target
    if isinstance(given, Tensor):
        if given.is_floating_point():
            raise wrong(f"it must hold integers, not {given.dtype}")
        if given.numel() > 1 and given.dim() == 2 and 1 in given.shape:
            given = given.reshape(-1)
    if isinstance(given, list) or (isinstance(given, Tensor) and given.numel() > 1):
        if len(given) != whole:
            raise wrong(f"it has {len(given)} entries for a batch of {whole}")
        given = given[rows]
    numbers = _numbers(given)
    if len(shape) == 2:
        if any(not -shape[1] <= n < shape[1] for n in numbers):
            raise wrong(f"indices go from 0 to {shape[1] - 1}")
        flat = not isinstance(given, tuple) and not (
            isinstance(given, list) and any(isinstance(n, (tuple, list)) for n in given)
        )
        if flat and len(numbers) in (1, shape[0]):  # the usual case, in one call
            many = numbers * shape[0] if len(numbers) == 1 else numbers
            chosen = [i * shape[1] + n % shape[1] for i, n in enumerate(many)]
            # Without waiting for a GPU, which still runs the forward.
            return torch.tensor(chosen, dtype=torch.int64).to(output.device, non_blocking=True)
    positions = torch.arange(output.numel(), device=output.device).view(shape)
    if isinstance(given, Tensor):
        given = given.to(positions.device)
        # A negative index counts from the end, as in a list.
        given = given % shape[1] if given.numel() > 1 or len(shape) == 2 else given
    try:
        return _select_targets(positions, given)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise wrong(f"{error}. It must be {_target_hint(shape)}") from error


def _numbers(target: Any) -> list[int]:
    if isinstance(target, Tensor):
        return [int(n) for n in target.reshape(-1).tolist()]
    if isinstance(target, (list, tuple)):
        return [n for item in target for n in _numbers(item)]
    return [int(target)] if isinstance(target, int) else []


def _target_hint(shape: tuple[int, ...]) -> str:
    if len(shape) <= 2:
        return "an integer below " + str(shape[-1]) + " or one for each sample"
    sizes = " x ".join(str(size) for size in shape[1:])
    return f"a tuple of {len(shape) - 1} indices into {sizes}, or a list of one for each sample"


def _short(target: Any) -> str:
    text = repr(target)
    return text if len(text) <= 60 else text[:57] + "..."


def _any_target(output: Tensor) -> Any:
    """Some target that fits, for the shapes of an empty batch."""
    return None if output.numel() == output.shape[0] else tuple([0] * (output.dim() - 1))


def _finish(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.to(dtype).contiguous()


def _delta_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _report(captured: Captured) -> None:
    for step in captured.program.plan.steps:
        if isinstance(step, Final):
            kind = "final section"
            what = " → ".join(str(call.target) for _, call in step.links)
        else:
            kind, what = type(step.rule).__name__, str(step.call.target)
        print(f"{step.output.name}: {kind}: {what}", file=sys.stderr)
