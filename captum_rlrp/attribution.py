"""Captum's face of the package: formats inputs and targets, runs the engine, formats the result.

The only module that touches Captum, its private helpers included (``tests/test_captum.py`` holds
their contract).
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from captum._utils.common import _format_additional_forward_args, _format_output
from captum._utils.typing import TargetType
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.fx import Node

from .errors import InputError
from .graph.capture import CapturedGraph, check_eval_mode, unwrap
from .graph.form import Form, Output
from .graph.layers import layer_calls, leaf_calls, module_names, tied_names
from .inputs import batch_of, check_inputs, named_inputs
from .kernels import get_backend, is_reference_forced
from .plan.steps import Final
from .rules.base import cast
from .run.capturing import Captured
from .run.engine import Engine
from .run.wide import wide_enough
from .targets import any_target, at_hand, region, several, start_at

Backend = Literal["auto", "compiled", "reference"]
# Captum has a variable like it, but is not typed for those who use it.
Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...], dict[str, Tensor])
ModuleOrModules = nn.Module | Sequence[nn.Module] | None


class _Explainer:
    """What the input and the layer variant share."""

    def _prepare(
        self,
        model: nn.Module,
        backend: Backend,
        layers: Sequence[str] | None = (),
        cuda_graphs: bool = False,
        output: Output = None,
        allow_random: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"Relative LRP explains a torch.nn.Module, not a {type(model).__name__}: it "
                "needs the model's graph. Pass the module itself, or wrap the function in a "
                "module's forward."
            )
        self.model = model
        self.backend = backend
        kernels = get_backend(backend)
        # Where the reference is asked for, the graph runs as captured: the plainest definition.
        fuses = not is_reference_forced(backend)
        self._engine = Engine(
            unwrap(model),
            kernels,
            fuses,
            layers,
            cuda_graphs=cuda_graphs,
            form=Form(output),
            allow_random=allow_random,
        )

    def has_convergence_delta(self) -> bool:
        """True: the delta is the largest violation of the law's sums (see ``attribute``)."""
        return True

    def compute_convergence_delta(
        self, attributions: Tensor | tuple[Tensor, ...], output: Tensor | None = None
    ) -> Tensor:
        """How far the relevance is from summing up, as Captum's ``LRP`` defines it.

        Args:
            attributions (Tensor or tuple[Tensor, ...]): What ``attribute`` returned.
            output (Tensor, optional): What the relevance of each example is to sum up to. It is
                    a share of one unit here, not of the score, so the default is 1 for each.

        Returns:
            *Tensor* of shape (batch,): `output` less the sum of each example's relevance. Signed
            shares do not sum to 1; ``return_convergence_delta=True`` measures the law that holds.
        """
        parts = attributions if isinstance(attributions, tuple) else (attributions,)
        total = sum(part.flatten(1).sum(1) for part in parts)
        assert isinstance(total, Tensor)
        return (torch.ones_like(total) if output is None else output.flatten()) - total

    def attribute_future(self) -> None:
        """Not available, as for Captum's own LRP."""
        raise NotImplementedError(f"attribute_future is not available for {type(self).__name__}.")

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: contributions are products with the input."""
        return True


class RelativeLRP(_Explainer, Attribution):
    r"""
    Relative Layer-Wise Relevance Propagation [https://arxiv.org/abs/2501.14322]: one unit of
    relevance starts at the target output and is propagated backwards, in proportion to
    contributions. With ``c_ji = a_ji x_i`` the contribution of input i to output j of a linear
    map, and ``D_j = Σ_k |c_jk|``::

        spatial maps     r_i = Σ_j r_j |c_ji| / D_j
        dense maps       r_i = Σ_j r_j  c_ji  / D_j

    Nothing in a divisor cancels, and every share lies in [-1, 1]. A skip connection follows the
    same law. There is no hyperparameter. The definition is one consistent with the paper's
    abstract; see ``docs/method.md``.

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
        output (str, int or callable, optional): Which of the model's outputs to explain: a
                name (``"logits"``), an index, or a function of what the model returns. Not
                needed where it returns one tensor, or Hugging Face's output with logits.
                Default: None
        allow_random (bool): Take random numbers that forward draws for constants, other ones
                at each call, where otherwise there is an error.

    Raises:

        InputError: If `model` is not a module.

    Examples::

        >>> model = torchvision.models.resnet18().eval()  # with your weights
        >>> rlrp = RelativeLRP(model)
        >>> # images: (N, 3, 224, 224) → attributions of the same shape
        >>> attributions = rlrp.attribute(images, target=labels)
        >>> attributions, delta = rlrp.attribute(
        ...     images, target=labels, return_convergence_delta=True
        ... )
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Backend = "auto",
        cuda_graphs: bool = False,
        output: Output = None,
        allow_random: bool = False,
    ) -> None:
        Attribution.__init__(self, model)
        self._prepare(
            model, backend, cuda_graphs=cuda_graphs, output=output, allow_random=allow_random
        )

    @typing.overload
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        return_convergence_delta: Literal[True],
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> tuple[Inputs, Tensor]: ...

    @typing.overload
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: Literal[False] = False,
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> Inputs: ...

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Inputs,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        verbose: bool = False,
        internal_batch_size: int | None = None,
    ) -> Inputs | tuple[Inputs, Tensor]:
        r"""
        Args:

            inputs (Tensor, tuple[Tensor, ...] or dict[str, Tensor]): Inputs to explain;
                    dimension 0 is the batch, aligned over all of them. Integers (tokens,
                    categories) are explained where the model embeds them, one number for each.
                    A dict goes to forward by name, or as one dict where forward has no such
                    parameters. A batch of 0 gives an empty result. Of a graph network (one that
                    is given pairs of node numbers) dimension 0 are the nodes, and the target
                    is one integer for all graphs.

            target (int, tuple, Tensor, or list, optional): The output to explain, in
                    any of Captum's forms (NumPy's integers and arrays do as well):

                    - for 2D outputs an integer or a tensor with one integer (for all
                      examples), or a list of integers or 1D tensor (one for each example);
                    - for outputs with more dimensions a tuple of #output_dims - 1
                      integers, or a list of such tuples, one for each example;
                    - None if the model returns one scalar per example;
                    - several in one forward: a range (for all examples), or a list of lists of
                      integers (one list for each example). The results then have a dimension
                      of targets behind the batch;
                    - a region: a pair of a class and a mask over the positions (for all
                      examples or one for each), which explains the sum of the class's scores
                      there.

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

            *Tensor*, *tuple* or *dict* of **attributions**, as `inputs` is, and **delta** if
            asked for:

            - **attributions**: Relevance of each input element, of the inputs' shape,
              dtype and device, contiguous and detached; float32 for float16, whose least
              number is above most shares, and for integers. Its unit is a share of the one
              unit put on the target: the absolute values of an example sum to 1 at most.
            - **delta** (*Tensor*): Shape (batch,). The largest relative violation, over all
              linear maps, of ``Σ_i r_i = Σ_j r_j`` (in dense maps
              ``Σ_j r_j (y_j − b_j) / D_j``): rounding error only, about 1e-6 in float32.

        Raises:

            UnsupportedOperationError: Relevance would have to cross an op without a rule.
            TrainingModeError: A module is in training mode; call ``model.eval()``.
            CaptureError: ``torch.export`` cannot capture the model.
            InputError: Inputs or target do not fit the model.
            NonFiniteError: An input, or a value the model computes, is not finite.
        """
        keys = tuple(inputs) if isinstance(inputs, dict) else None
        given, form = named_inputs(inputs, self._engine.model, self._engine.form)
        tensors: tuple[Tensor, ...] = check_inputs(given)
        additional: tuple[Any, ...] = _format_additional_forward_args(additional_forward_args) or ()
        batch = tensors[0].shape[0]
        if internal_batch_size is not None and not (
            isinstance(internal_batch_size, int) and internal_batch_size >= 1
        ):
            raise InputError(
                f"internal_batch_size must be an integer of at least 1, not {internal_batch_size}."
            )
        under = region(target)
        if under is not None:
            target, mask = None, under[1]
            form = replace(form, region=under[0])
            additional = (*additional, mask)
        targets = several(target, batch)
        if batch == 0:
            check_eval_mode(self._engine.model)
            parts = [torch.zeros(x.shape, dtype=_dtype_of(x), device=x.device) for x in tensors]
            delta = torch.zeros(0, dtype=_delta_dtype(tensors[0]), device=tensors[0].device)
        else:
            starts = [
                functools.partial(start_at, at_hand(one), batch, self.model)
                for one in (targets or [target])
            ]
            explanation = self._engine.explain(
                tensors,
                additional,
                starts[0] if targets is None else starts,
                measure_delta=return_convergence_delta,
                internal_batch_size=internal_batch_size,
                form=form,
            )
            parts = [
                _finish(part, _dtype_of(x))
                for part, x in zip(explanation.relevance, tensors, strict=True)
            ]
            if explanation.delta is not None:
                delta = explanation.delta.to(_delta_dtype(tensors[0]))
            if verbose:
                args = (*tensors, *additional)
                _report(self._engine.captured(args, len(tensors), batch, form=form))
        attributions: Any = _format_output(isinstance(given, tuple), tuple(parts))
        if keys is not None:
            attributions = dict(zip(keys, parts, strict=True))
        return (attributions, delta) if return_convergence_delta else attributions


class LayerRelativeLRP(_Explainer, LayerAttribution):
    r"""
    Relevance at the outputs or inputs of layers, by the same propagation as
    :class:`RelativeLRP` and in one pass however many layers are asked for.

    A layer inside the final section (the linear maps that end at the output) gets the section's
    rule up to that point: with v its value and J' the rest of the section, ``v ⊙ J'ᵀ r``, divided
    by its absolute sum. A convolution in front of its batch norm has the relevance of the norm's
    output, because the norm passes it on.

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
        >>> relevance = layer_rlrp.attribute(images, target=labels)  # (N, 512, 7, 7)
        >>> heat = LayerAttribution.interpolate(relevance.sum(1, keepdim=True), (224, 224))
        >>> # text: integer tokens, explained at the embedding
        >>> tokens = LayerRelativeLRP(reader, reader.embedding).attribute(ids, target=1)
    """

    def __init__(
        self,
        model: nn.Module,
        layer: ModuleOrModules = None,
        backend: Backend = "auto",
        output: Output = None,
        allow_random: bool = False,
    ) -> None:
        self._prepare(model, backend, None, output=output, allow_random=allow_random)
        LayerAttribution.__init__(self, model, layer)

    @property
    def layer(self) -> ModuleOrModules:
        """The layers asked for; others may be assigned."""
        return self._layer

    @layer.setter
    def layer(self, layer: ModuleOrModules) -> None:
        many = layer is None or isinstance(layer, (list, tuple, nn.ModuleList))
        names: list[list[str]] | None = None
        self._tied: list[list[str]] = []
        if layer is not None:
            modules: Sequence[nn.Module] = list(layer) if many else [layer]  # type: ignore[arg-type,list-item]
            model = self._engine.model
            names = [module_names(model, unwrap(m)) for m in modules]
            self._tied = [tied_names(model, unwrap(m)) for m in modules]
        self._layer, self._many, self._names = layer, many, names
        self._engine.layers = None if names is None else [some[0] for some in names]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor],
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
        given, form = named_inputs(inputs, self._engine.model, self._engine.form)
        tensors = check_inputs(given)
        additional = _format_additional_forward_args(additional_forward_args) or ()
        batch = batch_of(tensors, additional, self._engine.model)
        targets = several(target, batch)
        key = (attribute_to_layer_input, None if self._names is None else str(self._names))

        def wanted(graph: CapturedGraph, explained: Sequence[Node]) -> list[Node]:
            groups = self._groups(graph, explained, attribute_to_layer_input)
            return list(dict.fromkeys(node for group in groups for node in group))

        # The empty batch runs as one sample, of which nothing is kept.
        run_on = tensors if batch else tuple(x.new_zeros((1, *x.shape[1:])) for x in tensors)
        rows = batch or 1
        captured = self._engine.captured(
            (*run_on, *additional), len(tensors), rows, wanted, key, form
        )
        groups = self._groups(captured.program.graph, captured.explained, attribute_to_layer_input)
        starts = [
            functools.partial(start_at, at_hand(one) if batch else any_target, rows, self.model)
            for one in (targets or [target])
        ]
        explanation = self._engine.explain(
            run_on,
            additional,
            starts[0] if targets is None else starts,
            wanted,
            key,
            measure_delta=return_convergence_delta,
            form=form,
            batch=rows,
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
        given, form = named_inputs(inputs, self._engine.model, self._engine.form)
        tensors = check_inputs(given)
        additional = _format_additional_forward_args(additional_forward_args) or ()
        batch = batch_of(tensors, additional, self._engine.model)
        args = (*tensors, *additional)
        captured = self._engine.captured(args, len(tensors), batch, form=form)
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
        tied = self._tied or [[] for _ in names]
        return [
            layer_calls(graph, explained, group, of_inputs, others)
            for group, others in zip(names, tied, strict=True)
        ]


def _finish(part: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(part, wide_enough(dtype)).contiguous()


def _dtype_of(x: Tensor) -> torch.dtype:
    """That of the relevance at an input."""
    return wide_enough(x.dtype) if x.is_floating_point() else torch.float32


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
