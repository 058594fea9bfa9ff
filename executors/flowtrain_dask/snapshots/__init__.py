"""Snapshots: exact copies of the state that deferred handlers declare to read, and the view that shows them.

`slots` turns a declaration into the entries of a snapshot, and `taker` takes a snapshot at the handler's place in the
plan. `copiers` has the table of types and how they are copied, with `register_copier` for types of the user; `copying`
is one pass of copying; `tensors` and `modules` copy the types of their names. `series` shows series, which only grow,
so that their length is enough. Copies lie in the memory of a `pool`, which is reused. `view` shows a snapshot to the
handler.
"""

__all__: list[str] = []
