"""From declarations to a plan: which handlers run at an event, in which order, and why.

`reach` maps a path to the pieces of state that it reaches. `nodes` has the types of the dependency graph, with a reason
for every edge; `order` finds the edges, and the conflicts that have no order; `resolver` asks callbacks for their
answers to a conflict. `checks` finds declarations of state that does not exist, and callbacks without a handler;
`deferrable` says what a deferrable callback may declare, and lets arrive what it writes with a lag. `plan` binds the
handlers of one event and phase to their views, `registry` holds the callbacks of a learner with all their plans,
`held_backends` finds the logging backends that a callback holds, `executor` is the interface of the executors, which
run plans, `serial` is the default one, and `drawing` shows plans as pictures. `clock` times handlers and whatever else
takes time, for a timeline, and `what_if` is an estimate from these times.

Where several ranks train together, `shared_state` knows which state is the same on all of them, and refuses callbacks
that would change that; `exchange` has the exchanges of values between ranks, and `plan_texts` writes plans as lines
that the ranks compare.
"""

__all__: list[str] = []
