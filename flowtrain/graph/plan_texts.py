"""Texts about plans on several ranks: where each callback runs, and the lines by which ranks compare their plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeAlias

from flowtrain.callback.access import dotted
from flowtrain.callback.conditions import Condition
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.nodes import Node, Order
from flowtrain.graph.shared_state import Peers, SharedState, ranks_of

__all__ = ["Description", "describe", "first_difference", "ranks_text"]


def ranks_text(nodes: Sequence[Node], peers: Peers, shared: SharedState) -> str:
    """Return the text for `Callbacks.explain` that says on which ranks each callback runs, and what is local."""
    width = max((len(node.name) for node in nodes), default=0)
    lines = [f"{peers.size} ranks, of which this is {peers.rank}"]
    for node in nodes:
        place, why = ranks_of(node)
        lines.append(f"     {node.name:{width}}  on {'every rank' if place == 'every' else 'the main rank'}: {why}")
    lines += [f"     cbstate.{entry} differs between ranks: {why}" for entry, why in sorted(shared.local.items())]
    return "\n".join(lines)


Description: TypeAlias = list[tuple[str, str]]
"""The lines of a description of plans: the event and phase, and one handler with its declaration."""


def describe(orders: Iterable[tuple[type[Event], type[Phase], Order]]) -> Description:
    """Return all plans as lines that the ranks compare, since they must run the same handlers in the same order."""
    lines = []
    for event_type, phase_type, order in orders:
        where = f"({event_type.__name__}, {phase_type.__name__})"
        for node, handler in zip(order.nodes, order.handlers, strict=True):
            access = ", ".join(f"{dotted(path)}: {kind!r}" for path, kind in node.stated(node.access[handler]))
            conditions = "".join(f" if {_shown(each)}" for each in node.callback.conditions)
            ranks = f" on {ranks_of(node).ranks} rank"
            lines.append((where, f"{node.name}.{handler.attribute}{ranks}{conditions} {{{access}}}"))
    return lines


def _shown(condition: Condition) -> str:
    """Return a condition with the plain values among its arguments, the same text in every process."""
    values = {name: value for name, value in vars(condition).items() if not name.startswith("_")}
    plain = [f"{name}={value!r}" for name, value in values.items() if isinstance(value, (bool, int, float, str))]
    return f"{type(condition).__name__}({', '.join([condition.event_type.__name__, *plain])})"


def first_difference(plans: Sequence[Description]) -> str:
    """Return the first difference between the plans of the ranks in words; empty if all are the same.

    Args:
        plans: What `describe` has returned on each rank, in the order of the ranks.
    """
    main = _by_place(plans[0])
    for rank, plan in enumerate(map(_by_place, plans)):
        for where in [*main, *plan]:
            for here, there in zip_longest(main.get(where, ()), plan.get(where, ()), fillvalue="nothing more"):
                if here != there:
                    return f"rank {rank} has {there} at {where}, the main rank has {here}"
    return ""


def _by_place(plan: Description) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for where, handler in plan:
        found.setdefault(where, []).append(handler)
    return found
