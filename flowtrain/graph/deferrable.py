"""Deferrable callbacks in the graph: what they may declare, and the arrivals of what they write with a lag.

A handler of a deferrable callback may run after its event, and elsewhere. So the callback only consumes, with one
exception: with ``Write(lag=n)`` it may write an entry of ``cbstate`` that others see from the n-th later event on, of
the same type and phase. The graph has a node of its own for this, the *arrival* (`arrival_of`): it takes part in the
event like a handler that writes the entry at once, before all handlers, so readers are ordered after it and a second
writer is a conflict, as ever. The handler itself only reads the entry at its event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from flowtrain.callback.access import Declaration, Path, Write, dotted, lag_of, lags_of, overlap
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event, FitBegin, FitEnd
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CallbackError
from flowtrain.errors.arguments import is_a
from flowtrain.graph.nodes import Node, Order
from flowtrain.state.arrivals import LateStream
from flowtrain.state.late_writes import LateLearner
from flowtrain.state.learner_state import LearnerState

__all__ = ["LateWrites", "arrival_of", "check_deferrable", "late_writes"]

_Call: TypeAlias = Callable[[Event, Phase, LearnerView], None]


def arrival_of(node: Node, handler: Handler) -> tuple[Node, Handler] | None:
    """Return the node and the handler that let the late writes of a handler arrive; ``None`` if it makes none."""
    written: Declaration = tuple((path, Write()) for path in lags_of(node.access[handler]))
    if not written:
        return None
    own = Handler(handler.event_type, handler.phase_type, None, "Callback", "arrival")
    name = f"{node.name}.arrival"
    made = Node(Callback(), name, -1 - node.position, ((Callback, own),), {own: written}, written, writer=node)
    return made, own


class LateWrites:
    """The late writes of one handler, at the events of one type and phase.

    Args:
        stream: The arrivals of these writes.
        event: The name of the event type, for texts.
        learner: The state that the view of the handler shows; ``None`` for the arrival, which writes at once.

    Attributes:
        stream, learner: The same.
    """

    def __init__(self, stream: LateStream, event: str, learner: LateLearner | None) -> None:
        self.stream = stream
        self.learner = learner
        self._event = event

    def arrive(self, event: Event, phase: Phase, view: LearnerView) -> None:
        """Let what was written at earlier events arrive: the call of an arrival."""
        self.stream.arrive(view.updates)

    def keeping(self, call: _Call) -> _Call:
        """Return the call of the handler in place, which keeps its writes until they arrive."""
        stream, learner = self.stream, self.learner
        assert learner is not None

        def keep(event: Event, phase: Phase, view: LearnerView) -> None:
            """_Call the handler, and keep what it writes."""
            learner.taken()  # those of a handler that has failed
            try:
                call(event, phase, view)
            except Exception:
                stream.put()  # if the fit continues, its entries are missing
                raise
            stream.put(learner.taken())

        return keep

    def explain(self) -> Iterator[str]:
        """Yield a line for each path: when what is written there arrives."""
        for path, lag in self.stream.lags.items():
            when = f"{lag} {self._event}{'s' if lag > 1 else ''}"
            yield f"{path} arrives, written {when} before" if self.learner is None else f"{path} arrives {when} later"


def late_writes(
    node: Node, handler: Handler, order: Order, plan: tuple[type[Event], type[Phase]], state: LearnerState
) -> LateWrites | None:
    """Return the late writes of a handler in a plan, or those that it lets arrive; ``None`` if there are none.

    Args:
        node: The callback, or an arrival.
        handler: Its handler.
        order: The order of the plan.
        plan: The event type and phase type of the plan.
        state: The state of the learner.
    """
    writer, declaration = node.asked, node.access[handler]
    if node.writer is not None:
        handlers = dict(zip(order.nodes, order.handlers, strict=True))
        declaration = writer.access[handlers[writer]]
    if not (lags := lags_of(declaration)):
        return None
    stream = state.arrivals.stream(writer.name, *plan, lags)
    stream.readers = tuple(
        other.name
        for other, each in zip(order.nodes, order.handlers, strict=True)
        if other.asked is not writer
        and any(overlap(path, read) for path, _ in other.access[each] for read in lags if path[0] == "cbstate")
    )
    own = LateLearner(state, declaration, writer.name) if node.writer is None else None
    return LateWrites(stream, plan[0].__name__, own)


def check_deferrable(nodes: Iterable[Node]) -> None:
    """Check that deferrable callbacks only consume (rule 19), and that only they write with a lag.

    Raises:
        CallbackError: A deferrable callback declares to write state at once, or to draw from the generators of
            training. Another callback declares to write with a lag, or a handler of `FitBegin` or `FitEnd` does. Or
            `Callback.stochastic` is not ``True``, ``False`` or ``None``, or is ``True`` for a callback that is not
            deferrable.
    """
    for node in nodes:
        _check_stochastic(node)
        _check_lags(node)
        if not node.callback.deferrable:
            continue
        for path, kind in node.union:
            # Other resources are allowed: callbacks that share one share a lane, which processes them in order.
            if not isinstance(kind, Write) or (path[0] == "resource" and path[1] != "rng") or lag_of(kind) is not None:
                continue
            if path[0] == "resource":
                raise CallbackError(
                    f"{node.name} is deferrable and declares Write() on 'resource.rng', training's random numbers. A "
                    f"deferrable callback has random numbers of its own, from the seed of the run, its name and the "
                    f"number of the event: leave 'resource.rng' out. Set deferrable = False if it must draw those of "
                    f"training."
                )
            raise CallbackError(
                f"{node.name} is deferrable and declares Write() on {dotted(path)!r}. A deferrable callback may run "
                f"later and elsewhere, on a snapshot: what it writes would come too late, or never reach this process. "
                f"Set deferrable = False, or declare Read().{_later(path)}"
            )


def _later(path: Path) -> str:
    """Return the hint that an entry of ``cbstate`` can be written with a lag; empty for any other path."""
    if path[0] != "cbstate" or len(path) < 2:
        return ""
    return f' A result that may arrive an event later is declared so: {{"{dotted(path)}": Write(lag=1)}}.'


def _check_lags(node: Node) -> None:
    """Check the handlers that write with a lag: their callback is deferrable, and their events come again in a fit."""
    for _, handler in node.handlers:
        for path, lag in lags_of(node.access[handler]).items():
            said = f"{node.name} declares {dotted(path)!r}: Write(lag={lag})"
            if not node.callback.deferrable:
                raise CallbackError(
                    f"{said}, and is not deferrable: its handlers run in place, and what they write is there at once. "
                    f"Set deferrable = True in {type(node.callback).__name__}, or declare Write()."
                )
            if any(issubclass(each, handler.event_type) for each in (FitBegin, FitEnd)):
                raise CallbackError(
                    f"{said}, and {handler.attribute} handles {handler.event_type.__name__}: a write of FitBegin or "
                    f"FitEnd would arrive in another fit. Handle another event, or give the handler an access= "
                    f"without this path."
                )


def _check_stochastic(node: Node) -> None:
    """Check `Callback.stochastic`: only a deferrable callback may be stochastic."""
    stochastic = node.callback.stochastic
    if stochastic is None or stochastic is False or (stochastic is True and node.callback.deferrable):
        return
    if not is_a(stochastic, bool):
        raise CallbackError(
            f"{node.name}.stochastic is {stochastic!r}. It is True or False, whether the handlers of a deferrable "
            f"callback draw random numbers, or None where it does not say."
        )
    raise CallbackError(
        f"{node.name} says stochastic = True and is not deferrable, so it has no random numbers of its own: it draws "
        f"those of training. If nothing in training waits for it, set deferrable = True. Otherwise leave stochastic "
        f'out, and declare {{"resource.rng": Write()}} in {type(node.callback).__name__}.state_access.'
    )
