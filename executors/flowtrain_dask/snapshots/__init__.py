"""Snapshots: exact copies of what deferred handlers declare to read, and the view that shows them.

`slots` says what a declaration makes a snapshot of, `taker` takes it at the handler's place in the plan. How a value is
copied: `copiers` (which copier for which type; `register_copier` for your own), `copying` (one pass), `tensors`,
`modules`, `containers` (Python's and numpy's; flowtrain's own copy themselves), `series` (of which nothing is copied,
because they only grow). Copies lie in the memory of a `pool`, which is used again.
`view` is what the handler sees.
"""
