"""From declarations to a plan: which handlers run at an event, in which order, and why.

`reach` says which paths lead to one piece of state; `nodes` is the graph with a reason for every edge; `order` finds
the edges, and the conflicts that have no order; `resolver` asks callbacks for their answers; `checks` finds what is
read and never written. `plan` is what runs at one event and phase, `registry` holds the callbacks of a learner with all
their plans, `held_backends` finds the logging backends that a callback holds, and `executor` runs a plan.
"""

__all__: list[str] = []
