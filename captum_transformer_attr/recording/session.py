"""One recorded forward, ready for any number of backward passes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_transformer_attr.errors import InputError, UnsupportedModelError
from captum_transformer_attr.recording.agreement import agreement_of, compare, plain_forward
from captum_transformer_attr.recording.audit import audit
from captum_transformer_attr.recording.batch_axis import (
    Batch,
    possible,
    reading_of,
    refuse_mixing,
    refuse_other_rows,
)
from captum_transformer_attr.recording.inputs import Inputs, attach
from captum_transformer_attr.recording.leaving import WAYS_OUT_OF_THE_GRAPH, place
from captum_transformer_attr.recording.modules import Modules, as_evaluated, uncompiled, watched
from captum_transformer_attr.recording.node import LayoutLostError, Node
from captum_transformer_attr.recording.outputs import OutputChoice, unwrap
from captum_transformer_attr.recording.precision import is_half
from captum_transformer_attr.recording.products import exact_products
from captum_transformer_attr.recording.quantised import dequantised
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.recording.snapshot import Place, edge_at, zeros_at
from captum_transformer_attr.recording.tags import CUT, HANDLE, Tag, tag_of
from captum_transformer_attr.recording.tap import Tap
from captum_transformer_attr.recording.targets import Contrast, select

if TYPE_CHECKING:
    from captum_transformer_attr.ops.attention import Attention


class Recording:
    """The graph of one forward.

    Attributes:
        output: the model's output, unwrapped, on the graph.
        selected: one number per example, once a target was chosen.
        nodes: the operations a signal passes.
        attentions: the attention calls among them in execution order.
    """

    def __init__(self, recorder: Recorder, inputs: Inputs, output: Tensor) -> None:
        self.recorder, self.inputs, self.output = recorder, inputs, output
        self.selected: Tensor = output
        self.subtracted: Tensor | None = None
        self.target: Any = None
        self.nodes: list[Node] = []
        self.attentions: list[Attention] = []
        self.derived: dict[str, Any] = {}  # what others worked out from the graph below the selected outputs

    def select(self, target: Any) -> Tensor:
        """Choose what is explained and audit the graph below it. ``(N,)``.

        Raises:
            AssertionError, IndexError: for a target that does not fit the output, as Captum does.
            UnsupportedOperationError: if an operation has no rule.
        """
        self.target = target
        self.derived.clear()
        # Of a difference the first term is what relevance and token flow start from; ``start`` knows both.
        self.selected = select(self.output, target.first if isinstance(target, Contrast) else target)
        self.subtracted = select(self.output, target.second) if isinstance(target, Contrast) else None
        if not self.selected.requires_grad:
            path = getattr(self.output, CUT, None)
            cause = "" if path is None else f": {place(path)} takes it out of the graph ({WAYS_OUT_OF_THE_GRAPH})"
            raise UnsupportedModelError(
                f"the selected output does not depend on the inputs through differentiable operations{cause}"
            )
        finite = self.selected.detach().isfinite()
        if not bool(finite.all()):
            example = int((~finite).nonzero()[0])
            raise UnsupportedModelError(
                f"the selected output of example {example} is not finite ({self.selected[example].item()}): nothing "
                "can be explained. "
                f"Way out: check the plain forward; a mask that hides every key of a row gives NaN"
            )
        if self.recorder.mixes_examples and self.recorder.batch > 1:
            raise LayoutLostError("a slice of the batch axis")
        nodes = set(audit(self.selected)).union(() if self.subtracted is None else audit(self.subtracted))
        self.nodes = sorted(nodes, key=lambda node: node.index)
        self.attentions = [cast("Attention", n) for n in self.nodes if n.is_attention]
        return self.selected

    def send(
        self,
        signal: Signal,
        wrt: Sequence[Place],
        start: Tensor | None = None,
        source: Tensor | None = None,
        absorbed: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Send a signal from the selected outputs, or ``source``, back to ``wrt``; what nothing reached is zero.

        ``absorbed`` gets what parameters took of it, see ``Pass``.
        """
        sources = [self.selected if source is None else source]
        starts = [torch.ones_like(sources[0]) if start is None else start]
        if source is None and self.subtracted is not None and signal.carries == "gradient":
            sources.append(self.subtracted)
            starts.append(-starts[0])
        grads = self.relay(signal, sources, starts, wrt, absorbed=absorbed)
        return [zeros_at(place) if g is None else g for g, place in zip(grads, wrt, strict=True)]

    def relay(
        self,
        signal: Signal,
        outputs: Sequence[Place],
        starts: Sequence[Tensor],
        wrt: Sequence[Place],
        create_graph: bool = False,
        absorbed: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Send a signal from anywhere in the graph to anywhere; None where nothing arrived."""
        if not wrt:
            return ()  # autograd refuses to be asked for nothing
        ends: list[Any] = [edge_at(place) for place in outputs]
        beginnings: list[Any] = [edge_at(place) for place in wrt]
        with self.recorder.sending(signal, absorbed):
            return torch.autograd.grad(ends, beginnings, starts, True, create_graph, allow_unused=True)

    def tag(self, tensor: Tensor) -> Tag:
        """Provenance of a recorded tensor."""
        tag = tag_of(tensor)
        assert tag is not None
        return tag


ONE_AT_A_TIME = threading.RLock()
"""Threads that share a model must hold this: a recording changes its mode, flags and hooks until it ends."""


@contextlib.contextmanager
def recorded(
    function: Any,
    inputs: Inputs,
    output: OutputChoice = None,
    verified: set[Any] | None = None,
    constants: bool = False,
    tap: Tap | None = None,
) -> Iterator[Recording]:
    """Run the model once, recorded. Model and process are as before when the context ends, whatever happens.

    Args:
        function: the model, or Captum's ``forward_func``.
        inputs: see ``parse``.
        output: which tensor of the output is explained.
        verified: what was compared with the plain forward before, of a batch also one example alone; a model of another
            structure or inputs of another shape are compared now and added. None compares nothing.
        tap: gets the tensors that pass chosen layers.
        constants: also record attention among constants (learned queries).

    Raises:
        UnsupportedModelError: if the recorded forward does not give what the plain forward gives, or not one row per
            example.
        LayoutLostError: if the examples of the batch influence each other; then, as after one raised inside the
            context, ``inputs`` knows how its examples are cut.
    """
    modules = Modules(function)
    recorder = recorder_for(modules, inputs, constants)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            full_precision(),
            as_evaluated(modules) as put_attributes_back,
            uncompiled(),
        ):

            def put_back() -> None:
                put_attributes_back()
                recorder.writes.restore_owned()

            recorder.writes.owned = modules.owned()
            state = modules.random_state()
            result = record(function, inputs, output, modules, recorder, tap)
            put_back()
            refuse_other_rows(inputs, result)

            def forward(inputs: Inputs) -> Tensor:
                put_back()
                return plain_forward(function, inputs, output)

            signature = (modules.structure(), inputs.signature(), output, constants)
            # The plain forward continues the random numbers, so that a model that uses them gives something else.
            is_random = not all(map(torch.equal, state, modules.random_state()))
            batch = Batch(
                inputs, forward, result.detach(), lambda alone: agreement_of(function, alone, recorder.autocast)
            )
            try:
                if is_random or (verified is not None and signature not in verified):
                    compare(function, forward(inputs), result, recorder.autocast)
                    if inputs.batch > 1:
                        refuse_mixing(batch)
                if verified is not None:
                    verified.add(signature)
                yield Recording(recorder, inputs, result)
            except LayoutLostError:
                settle(batch, verified, ("one reading", signature))
                raise
    finally:
        recorder.writes.restore_owned()
        for node in recorder.nodes:
            node.__dict__.clear()
        recorder.clear()


def settle(batch: Batch, verified: set[Any] | None, one_reading: Any) -> None:
    """Decide how the examples are cut; ``one_reading`` is verified where shapes leave no choice."""
    inputs = batch.inputs
    clear = inputs.batch == 1 or (not inputs.unclear() and len(inputs.explained) == 1)
    if clear or (verified is not None and one_reading in verified):
        return
    among = possible(batch)
    inputs.shared = reading_of(batch, among)
    if verified is not None and len(among) < 2 and not inputs.shared:
        verified.add(one_reading)


def recorder_for(modules: Modules, inputs: Inputs, constants: bool) -> Recorder:
    """A recorder in the precision in which a model and its inputs are followed."""
    recorder = Recorder(inputs.batch)
    recorder.constants = constants
    dtype = modules.dtype() or inputs.dtype
    recorder.promote = is_half(dtype) or is_half(inputs.dtype)
    recorder.handle_dtype = torch.float32 if recorder.promote else dtype
    return recorder


def record(
    function: Any, inputs: Inputs, output: OutputChoice, modules: Modules, recorder: Recorder, tap: Tap | None
) -> Tensor:
    """Run the model once, recorded; the tensor that is explained."""
    values = attach(inputs, recorder.handle_dtype, recorder.promote)
    for i, name in enumerate(inputs.explained):
        given = getattr(values[name], HANDLE, values[name])
        recorder.edges[i], recorder.made[given.grad_fn] = get_gradient_edge(given), tag_of(given)  # type: ignore[assignment]
    tapping = contextlib.nullcontext() if tap is None else tap.installed(recorder)
    args, kwargs = inputs.arguments(values)
    with dequantised(m for _, m in modules.named), tapping, watched(modules, recorder), recorder:
        explained = unwrap(followable(function, *args, **kwargs), output)
    if not explained.is_floating_point():
        raise InputError(
            f"the model returned {explained.dtype} of shape {tuple(explained.shape)}, which has no gradient; choose a "
            "floating tensor with output="
        )
    return explained


def followable(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model.

    Raises:
        UnsupportedModelError: if torch has a kernel without a gradient for a call (flex attention on CPUs).
    """
    try:
        return function(*args, **kwargs)
    except NotImplementedError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"the model does not run where gradients are followed: {reason} "
            f"Way out: another implementation of its attention (attn_implementation='sdpa'), or another device."
        ) from error


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Neither a caller's autocast region nor reduced float32 products reach into recording and rules."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), exact_products():
        yield
