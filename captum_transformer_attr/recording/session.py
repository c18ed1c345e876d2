"""One recorded forward, ready for any number of backward passes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_transformer_attr.errors import UnsupportedModelError
from captum_transformer_attr.recording.audit import audit
from captum_transformer_attr.recording.inputs import Inputs, attach, private
from captum_transformer_attr.recording.modules import Modules, as_evaluated, uncompiled, watched
from captum_transformer_attr.recording.node import LayoutLostError, Node
from captum_transformer_attr.recording.outputs import OutputChoice, unwrap
from captum_transformer_attr.recording.precision import is_half
from captum_transformer_attr.recording.quantised import AGREEMENT as QUANTISED_AGREEMENT
from captum_transformer_attr.recording.quantised import dequantised, quantised_layers
from captum_transformer_attr.recording.recorder import Recorder
from captum_transformer_attr.recording.signal import Signal
from captum_transformer_attr.recording.tags import CUT, HANDLE, Tag, tag_of
from captum_transformer_attr.recording.tap import Tap
from captum_transformer_attr.recording.targets import Contrast, select

if TYPE_CHECKING:
    from captum_transformer_attr.ops.attention import Attention

# How far the recorded forward may be from the plain one, relative to the largest output: rounding, not more.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


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
            cause = f": module '{path}' takes it out of the graph (detach, .data or no_grad)" if path else ""
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
        wrt: Sequence[Tensor],
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
        return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wrt, strict=True)]

    def relay(
        self,
        signal: Signal,
        outputs: Sequence[Any],
        starts: Sequence[Tensor],
        wrt: Sequence[Any],
        create_graph: bool = False,
        absorbed: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Send a signal from anywhere in the graph (tensors or ``GradientEdge``); None where nothing arrived."""
        with self.recorder.sending(signal, absorbed):
            return torch.autograd.grad(outputs, wrt, starts, True, create_graph, allow_unused=True)

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
        UnsupportedModelError: if the recorded forward does not give what the plain forward gives.
        LayoutLostError: if the examples of the batch influence each other.
    """
    recorder = Recorder(inputs.batch)
    recorder.constants = constants
    modules = Modules(function)
    dtype = modules.dtype() or inputs.dtype
    recorder.promote = is_half(dtype) or is_half(inputs.dtype)
    recorder.handle_dtype = torch.float32 if recorder.promote else dtype
    recording: Recording | None = None
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            full_precision(),
            as_evaluated(modules) as put_back,
            uncompiled(),
        ):
            recorder.writes.owned = modules.owned()
            state = modules.random_state()
            values = attach(inputs, recorder.handle_dtype, recorder.promote)
            for i, name in enumerate(inputs.explained):
                given = getattr(values[name], HANDLE, values[name])
                recorder.edges[i], recorder.made[given.grad_fn] = get_gradient_edge(given), tag_of(given)  # type: ignore[assignment]
            tapping = contextlib.nullcontext() if tap is None else tap.installed(recorder)
            with dequantised(m for _, m in modules.named), tapping, watched(modules, recorder), recorder:
                args, kwargs = inputs.arguments(values)
                result = unwrap(followable(function, *args, **kwargs), output)
            put_back()
            recorder.writes.restore_owned()
            signature = (modules.structure(), inputs.signature())
            # The plain forward continues the random numbers, so that a model that uses them gives something else.
            if (verified is not None and signature not in verified) or not all(
                map(torch.equal, state, modules.random_state())
            ):
                plain = compare(function, inputs, output, result, recorder.autocast)
                if inputs.batch > 1:
                    put_back()
                    recorder.writes.restore_owned()
                    refuse_mixing(function, inputs, output, plain, recorder.autocast)
            if verified is not None:
                verified.add(signature)
            recording = Recording(recorder, inputs, result)
            yield recording
    finally:
        recorder.writes.restore_owned()
        for node in recorder.nodes:
            node.__dict__.clear()
        recorder.clear()


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


def plain_forward(function: Any, inputs: Inputs, output: OutputChoice) -> Tensor:
    """What the model gives without us."""
    with torch.no_grad():
        args, kwargs = inputs.arguments({name: private(value) for name, value in inputs.values.items()})
        return unwrap(function(*args, **kwargs), output)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """A caller's autocast region does not reach into recording and rules."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def agreement_of(function: Any, plain: Tensor, autocast: torch.dtype | None) -> float:
    """How far two forwards may be apart, relative to the largest output."""
    if quantised_layers(m for _, m in Modules(function).named):
        return QUANTISED_AGREEMENT
    return max(AGREEMENT[plain.dtype], 0.0 if autocast is None else AGREEMENT[autocast])


def refuse_mixing(
    function: Any, inputs: Inputs, output: OutputChoice, plain: Tensor, autocast: torch.dtype | None
) -> None:
    """An example that influences others cannot be explained together with them: its scores would be theirs.

    Batch statistics and means over the batch do so.

    Looks at the last example. What a model cannot compute alone, or gives another shape alone (scores of all pairs), is
    left to the layouts.

    Raises:
        LayoutLostError: so that the examples are explained one by one, and each gets what it would get alone.
    """
    last = inputs.batch - 1
    try:
        alone = plain_forward(function, inputs.example(last), output)
    except Exception:  # noqa: BLE001  arguments that belong to the whole batch
        return
    if alone.ndim == 0 or alone.shape[0] != 1 or plain.shape != (inputs.batch, *alone.shape[1:]):
        return
    together = plain[last:].double()
    finite = together.isfinite() & alone.isfinite()
    if not bool(finite.any()):
        return
    size = together[finite].abs().max().item()
    allowed = agreement_of(function, plain, autocast) * max(size, 1e-3)
    if (together - alone.double())[finite].abs().max().item() > allowed:
        raise LayoutLostError("the examples of this batch influence each other")


def compare(
    function: Any, inputs: Inputs, output: OutputChoice, recorded_output: Tensor, autocast: torch.dtype | None = None
) -> Tensor:
    """The recorded forward equals the plain one, which is returned, to rounding, or the call fails."""
    plain = plain_forward(function, inputs, output)
    if plain.shape != recorded_output.shape:
        raise UnsupportedModelError(
            f"the recorded forward gives shape {tuple(recorded_output.shape)}, the plain one {tuple(plain.shape)}"
        )
    recorded_output = recorded_output.detach()
    finite = plain.isfinite()
    difference = (plain.double() - recorded_output.double()).abs()[finite]
    worst = difference.max().item() if difference.numel() else 0.0
    size = plain[finite].abs().max().item() if difference.numel() else 0.0
    allowed = agreement_of(function, plain, autocast) * max(size, 1e-3)
    if not worst <= allowed or not torch.equal(finite, recorded_output.to(plain.dtype).isfinite()):
        raise UnsupportedModelError(
            f"the recorded forward differs from the plain one by {worst:.2g} (outputs up to {size:.2g}): the model is "
            "random in evaluation mode or "
            "computes in a way that cannot be followed; make it deterministic, or register_rule for the module in "
            "question"
        )
    return plain
