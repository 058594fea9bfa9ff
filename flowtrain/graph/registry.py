"""The callbacks of a learner: checked, ordered and set up as one change, or not at all.

A new `Callbacks` is made whenever the list changes. It gives every callback a unique name (`unique_names`), checks
every declaration, and orders every event that is known: the library's events and those with a handler, in the phases
that the learner has data for or that a handler names. Then it calls `setup` of the new callbacks. If any of this fails,
the learner keeps the callbacks that it had, and ``cbstate`` is restored.

An event type or phase type that is met later is checked and ordered before its first event is fired.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

from flowtrain.callback.access import Declaration, Write, declare, union
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event, FitBegin, FitEnd
from flowtrain.callback.handler import Handler, check_handlers, find_handler
from flowtrain.callback.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.errors import CallbackError, RankError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import nearest
from flowtrain.graph.checks import (
    check_batch,
    check_cbstate,
    check_exchanged,
    check_made,
    check_marks,
    check_parts,
    check_series,
    entries_written,
)
from flowtrain.graph.clock import Clock, Measured
from flowtrain.graph.deferrable import arrival_of, check_deferrable
from flowtrain.graph.drawing import Drawing, check_drawn, draw_plan
from flowtrain.graph.held_backends import backends_of
from flowtrain.graph.nodes import (
    CallbackGraph,
    Node,
    Order,
    assign_names,
    step_events,
    to_networkx,
    unique_names,
    within,
)
from flowtrain.graph.order import order_event, order_setup
from flowtrain.graph.plan import Call, Plan, PlanKey, PlannedHandler, make_plan, owner_of, set_up
from flowtrain.graph.plan_texts import Description, describe, ranks_text
from flowtrain.graph.reach import Reach
from flowtrain.graph.resolver import Resolver
from flowtrain.graph.shared_state import Peers, check_exchange_events, check_ranks, exchanges_of, runs_here
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import make_entries, restore_point
from flowtrain.state.views import bind_view

__all__ = [
    "Callbacks",
    "callback_graph",
]

_ABSTRACT = (Phase, AbstractTrainingPhase, AbstractValidationPhase)  # no epoch runs in one of these
_Accept: TypeAlias = Callable[[Sequence[Node], LearnerState], None]


class Callbacks(Sequence[Callback]):
    """The callbacks of a learner, in list order, with their graph and plans.

    Args:
        callbacks: The callbacks.
        state: The learner's state, which the views of the callbacks show.
        phases: The phases that the learner has data for.
        before: The callbacks that the learner has now; those that stay are not set up again.
        watch: Wraps the call of each handler in a check; strict mode passes it.
        accept: The `Executor.check` of the executor. It is called last, and an exception of it refuses the callbacks.
        peers: The processes, if several train together.

    Attributes:
        written: The entries of ``cbstate`` that callbacks of this learner have ever declared to write.
        shared: Which state is the same on every rank, if several processes train together; otherwise ``None``.
        measured: The times of handlers in the last fit with a timeline.

    Raises:
        FlowtrainError: The declarations have no valid order, or name state that does not exist.
    """

    def __init__(
        self,
        callbacks: Iterable[Callback],
        state: LearnerState,
        phases: Iterable[type[Phase]] = (),
        before: Iterable[Callback] = (),
        watch: Callable[[PlannedHandler], Call] | None = None,
        accept: _Accept | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._state = state
        self._watch = watch
        self._peers = peers
        self._resolver = Resolver()
        self._reach = Reach(state)
        self._plans: dict[PlanKey, Plan] = {}
        # Three caches: most events are handled by the same handlers in every phase, and many callbacks share a type.
        self._orders: dict[tuple[Any, ...], Order] = {}
        self._participants: dict[PlanKey, list[tuple[Node, Handler]]] = {}
        self._dispatch: dict[tuple[Any, ...], Handler | None] = {}
        self._notes: Callable[[Plan], str] = lambda plan: ""
        self._costs: Callable[[Plan], Mapping[int, float]] = lambda plan: {}
        self._clock: Clock | None = None
        self.measured = Measured()
        names = unique_names(list(callbacks))
        self._nodes = [self._make_node(callback, name, place) for place, (callback, name) in enumerate(names)]
        self._phases = _known_phases(self._nodes, phases)
        self._known = {key: self._order(*key) for key in self._pairs()}
        check_deferrable(self._nodes)
        check_series(self._nodes)
        check_exchanged(self._nodes)
        check_parts(self._nodes, state)
        # An entry stays in `cbstate` when the callback that wrote it leaves, so other callbacks may still read it.
        earlier: frozenset[str] = before.written if isinstance(before, Callbacks) else frozenset()
        check_cbstate(self._nodes, state.cbstate, earlier)
        self.written: frozenset[str] = earlier | entries_written(self._nodes)
        self.shared = None if peers is None else check_ranks(self._nodes, peers)
        for phase in self._phases:
            events = step_events(phase, self._nodes)
            check_batch(phase, {event: self._meeting(event, phase) for event in events})
        names_before = [(node.callback, node.callback.name) for node in self._nodes]
        # From here on callbacks and `cbstate` change, so a failure has to undo it.
        try:
            assign_names((node.callback, node.name) for node in self._nodes)
            self._set_up({id(callback) for callback in before}, accept)
            state.arrivals.keep(node.name for node in self._nodes)
        except BaseException:
            assign_names(names_before)
            for callback in (former := list(before)):
                callback.check_callbacks(former)
            raise

    # --- the public part: `learner.callbacks`

    @property
    def graph(self) -> CallbackGraph:
        """The dependency graph over all known events: callbacks by name, each edge with ``reason`` and ``events``."""
        return to_networkx(self._nodes, {key: self._known[key] for key in self.known})

    @property
    def known(self) -> list[PlanKey]:
        """The pairs of an event type and a phase type that have handlers, in the order in which a fit fires them."""
        return [key for key, order in self._known.items() if order.nodes]

    def plan(self, event_type: type[Event], phase_type: type[Phase]) -> Plan:
        """Return the plan for an event and phase, which is made at its first use.

        Raises:
            FlowtrainError: The declarations have no valid order for these types, or name state that does not exist.
        """
        key = (event_type, phase_type)
        if key not in self._plans:
            if key not in self._known:
                self._add_types(event_type, phase_type)
            timed = None if self._clock is None else self._clock.around
            self._plans[key] = make_plan(*key, self._known[key], self._state, self._watch, self._peers, timed)
        return self._plans[key]

    def explain(self) -> str:
        """Return a text with the serial order and the reason of every edge, for each event and phase with handlers.

        In a training on several ranks it begins with the ranks on which each callback runs, and why.
        """
        blocks = []
        if self._peers is not None and self.shared is not None:
            blocks.append(ranks_text(self._nodes, self._peers, self.shared))
        for event, phase in self.known:
            plan = self.plan(event, phase)
            note, *more = self._notes(plan).split("\n")
            title = f"{event.__name__}, {phase.__name__}" + (f"  [{note}]" if note else "")
            blocks.append("\n".join([title, *plan.explain(), *(f"     {line}" for line in more)]))
        return "\n\n".join(blocks) or "No callback has a handler for a known event."

    def draw(
        self, event: type[Event], phase: type[Phase] | None = None, to: str | os.PathLike[str] | None = None
    ) -> Drawing:
        """Return a picture of the handlers of an event: which of them run first, and why.

        After a fit with a timeline (`flowtrain.callbacks.Timeline`) it has the median time of each handler, and the
        path through the graph that takes longest in colour: the event takes that long however many handlers run at the
        same time. Without one it has the times that the executor has measured, if it has.

        Args:
            event: The type of the event.
            phase: The type of the phase; ``None`` for the first one in which the event has handlers.
            to: A file to write the picture to, which ends with ``.svg``, ``.html`` or ``.mmd`` (text for Mermaid).

        Raises:
            UsageError: `event` or `phase` is no type of that kind, or the file cannot be written.
        """
        check_drawn(event, phase)
        plan = self.plan(event, phase or next((met for each, met in self.known if each is event), Phase))
        return draw_plan(plan, self._notes(plan).splitlines(), self.measured.of(plan) or self._costs(plan), to)

    def find(self, wanted: type | str | Callback) -> Callback | None:
        """Return the first callback of a type, subclasses included, or of a name, or this one; ``None`` without it.

        Raises:
            CallbackError: `wanted` is no type, no name and no callback.
        """
        if isinstance(wanted, (str, Callback)):
            return next((n.callback for n in self._nodes if n.name == wanted or n.callback is wanted), None)
        if not is_a(wanted, type):
            raise CallbackError(
                f"A callback is found by its type or name, got {wanted!r}. "
                f'Pass a class, such as Recorder, or a name, such as "Recorder".'
            )
        return next((node.callback for node in self._nodes if isinstance(node.callback, wanted)), None)

    def must_find(self, wanted: type | str | Callback) -> Callback:
        """Return the first callback of a type, subclasses included, or of a name, or this one.

        Raises:
            CallbackError: The learner has no such callback.
        """
        callback = self.find(wanted)
        if callback is None:
            name = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", repr(wanted))
            names = [node.name for node in self._nodes]
            raise CallbackError(
                f"There is no callback {name}.{nearest(name, names)} The learner has: {', '.join(names) or 'none'}."
            )
        return callback

    def must_find_same(self, new: Callback) -> Callback:
        """Return the one callback that has exactly the type of `new`, so that `new` can replace it.

        Raises:
            CallbackError: No callback has exactly that type, or more than one has it.
        """
        same = [node.callback for node in self._nodes if type(node.callback) is type(new)]
        if len(same) != 1:
            raise CallbackError(
                f"replace_callback({new!r}) needs exactly one {type(new).__name__} to replace; there are {len(same)}. "
                f"Use set_callbacks(...) or add_callback(...)."
            )
        return same[0]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The callbacks with their names and declarations."""
        return tuple(self._nodes)

    @property
    def running(self) -> tuple[Node, ...]:
        """The callbacks whose handlers run in this process: all, except on ranks that are not the main one."""
        return tuple(node for node in self._nodes if runs_here(node, self._peers))

    def check_requests(self, names: Iterable[str]) -> None:
        """Check that callbacks of these names, which request a checkpoint on several ranks, say that they may.

        Raises:
            RankError: One of them does not.
        """
        for node in self._nodes if self._peers is not None else ():
            if node.name in names and not node.callback.may_checkpoint:
                raise RankError(
                    f"{node.name} requests a checkpoint, in which all ranks take part, and does not say so. Set "
                    f"may_checkpoint = True in the class: its handlers then run on every rank, and ranks compare what "
                    f"they request, so that no rank waits for one that requests nothing."
                )

    def describe(self) -> Description:
        """Return the plans of all known events as lines that ranks compare (`flowtrain.graph.plan_texts`)."""
        return describe((*key, order) for key, order in self._known.items())

    def annotate(
        self, notes: Callable[[Plan], str], costs: Callable[[Plan], Mapping[int, float]] | None = None
    ) -> None:
        """Let `explain` add the text that a function gives for each plan, and `draw` the seconds by position.

        Args:
            notes: `Executor.explain`.
            costs: `flowtrain.graph.executor.Measuring.costs`; ``None`` if the executor measures nothing.
        """
        self._notes = notes
        self._costs = costs or self._costs

    def time(self, clock: Clock | None) -> None:
        """Have the handlers of all plans timed from now on, or no longer for ``None``. The times stay in `measured`."""
        self._clock = clock
        self._plans.clear()
        if clock is not None:
            self.measured = clock.measured

    @overload
    def __getitem__(self, index: int) -> Callback: ...
    @overload
    def __getitem__(self, index: slice) -> list[Callback]: ...
    def __getitem__(self, index: int | slice) -> Callback | list[Callback]:
        return [node.callback for node in self._nodes][index]

    def __len__(self) -> int:
        return len(self._nodes)

    def __repr__(self) -> str:
        return f"<Callbacks: {', '.join(node.name for node in self._nodes) or 'none'}>"

    # --- how the plans are made

    def _meeting(self, event: type[Event], phase: type[Phase]) -> list[tuple[Node, Handler]]:
        """Return the callbacks that meet at an event and phase, in list order, each with its handler."""
        key = (event, phase)
        if key not in self._participants:
            participants = []
            for node in self._nodes:
                lookup = (node.handlers, event, phase)
                if lookup not in self._dispatch:
                    self._dispatch[lookup] = find_handler(node.handlers, event, phase)
                if (handler := self._dispatch[lookup]) is not None:
                    participants.append((node, handler))
            # Arrivals come first: what was written with a lag is there before any handler of the event.
            arrivals = filter(None, (arrival_of(*each) for each in participants))
            self._participants[key] = [*arrivals, *participants]
        return self._participants[key]

    def _add_types(self, event_type: type[Event], phase_type: type[Phase]) -> None:
        """Check and order an event type or phase type that is met for the first time.

        All events of a new phase are checked before the first of them is fired.
        """
        events = list(dict.fromkeys([*step_events(phase_type, self._nodes), event_type]))
        check_batch(phase_type, {event: self._meeting(event, phase_type) for event in events})
        # No epoch of an abstract phase runs, so its other events are never fired.
        fired = [event_type] if phase_type in _ABSTRACT else events
        self._known |= {(event, phase_type): self._order(event, phase_type) for event in fired}

    def _order(self, event: type[Event], phase: type[Phase]) -> Order:
        """Return the order of the callbacks that meet at an event and phase."""
        participants = self._meeting(event, phase)
        # The order depends on the handlers only, so phases in which the same handlers meet share it.
        key = (event, *((node.position, id(handler)) for node, handler in participants))
        if key not in self._orders:
            self._orders[key] = order_event(event, phase, participants, self._resolver, self._reach)
        check_exchange_events(event, phase, self._orders[key], self._peers)
        return self._orders[key]

    def _pairs(self) -> Iterator[PlanKey]:
        """Yield the known pairs of an event type and a phase type, in the order in which a fit fires them."""
        yield FitBegin, Phase
        for phase in self._phases:
            for event in step_events(phase, self._nodes):
                yield event, phase
        yield FitEnd, Phase

    def _make_node(self, callback: Callback, name: str, position: int) -> Node:
        """Look up the handlers, declarations and backends of a callback, and check its handlers."""
        with within(f"{name}.handlers"):
            handlers = tuple(callback.handlers())
        if not handlers:
            check_marks(callback)
        check_handlers(handlers)
        for _, handler in handlers:
            handler.check(callback)
        type_name = type(callback).__name__
        passed = callback.access_argument
        if passed is not None:
            declare(passed, f"{type_name}(access=...)")  # first, so that an error names the argument
        backends = backends_of(callback)
        sinks = declare({backend.resource: Write() for backend in backends}, type_name)
        with within(f"{name}.state_access"):
            stated = callback.state_access()
        shared = union([declare(stated, f"{type_name}.state_access()"), sinks])
        access: dict[Handler, Declaration] = {}
        for _, handler in handlers:
            where = f"{type_name}.{handler.attribute} ({handler.decorator()}...))"
            access[handler] = shared if handler.access is None else union([declare(handler.access, where), sinks])
        exchanges = any(any(exchanges_of(each, self._peers)) for each in access.values())
        whole = union([shared, *access.values()])
        return Node(callback, name, position, handlers, access, whole, backends, sinks, exchanges)

    def _call_setup(self, node: Node) -> None:
        """Call `Callback.setup` with a view, and refuse requests that only a running fit can serve."""
        with within(f"{node.name}.setup"):
            set_up(node, bind_view(node.union, self._state, owner_of(node, None)), self._state)
        if self._state.fired:
            event = self._state.fired[0][1]
            raise CallbackError(
                f"{node.name}.setup fires {event!r}, and nothing runs yet that it could follow. Fire it at FitBegin."
            )
        if self._state.requests:
            raise CallbackError(
                f"{node.name}.setup asks for a checkpoint, and no learner is built yet. Ask for it at FitBegin."
            )

    def _set_up(self, known: set[int], accept: _Accept | None) -> None:
        """Make the containers, call `setup` of the callbacks whose ids are not `known`, and let the executor check.

        If anything fails, ``cbstate`` is restored.
        """
        cbstate = self._state.cbstate
        restore = restore_point(cbstate)
        try:
            union = (item for node in self._nodes for item in node.union)
            written = [path for path, kind in union if isinstance(kind, Write) and path[0] == "cbstate"]
            make_entries(cbstate, written, late=self._state.lag > 0)
            with_setup = [node for node in self._nodes if type(node.callback).setup is not Callback.setup]
            for node in order_setup([node for node in with_setup if id(node.callback) not in known], self._reach):
                self._call_setup(node)
            check_made(self._nodes, cbstate)
            for node in self._nodes:
                with within(f"{node.name}.check_callbacks"):
                    node.callback.check_callbacks(self)
            if accept is not None:
                accept(self.running, self._state)
        except BaseException:
            restore()
            self._state.fired.clear()  # a `setup` may have fired an event before it raised
            self._state.requests.clear()
            raise


def _known_phases(nodes: Iterable[Node], phases: Iterable[type[Phase]]) -> list[type[Phase]]:
    """Return the phases with data and those that handlers name, without the abstract ones."""
    named = (handler.phase_type for node in nodes for _, handler in node.handlers)
    return [phase for phase in dict.fromkeys([*phases, *named]) if phase not in _ABSTRACT]


def callback_graph(callbacks: Iterable[Callback]) -> CallbackGraph:
    """Return the dependency graph of a list of callbacks, without a learner and without a call of `setup`.

    The graph covers training, validation, and the phases that handlers name. A node is the name of a callback, with the
    attribute ``callback``. An edge has the attributes ``reason``, a text, and ``events``, a tuple of pairs of an event
    type and a phase type.

    Raises:
        FlowtrainError: The declarations have no valid order, or name state that does not exist.
    """
    return _Unbound(callbacks, LearnerState(), (TrainingPhase, ValidationPhase)).graph


class _Unbound(Callbacks):
    """Callbacks without a learner: they are checked and ordered, and not set up."""

    def _set_up(self, known: set[int], accept: _Accept | None) -> None:
        pass
