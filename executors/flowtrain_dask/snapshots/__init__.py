"""Snapshots: exact copies of what deferred handlers declare to read, and the view that shows them.

`slots` says what a declaration makes a snapshot of, `taker` takes it at the handler's place in the plan. How a value is
copied: `copies` (which copier for which type; `register_copier` for your own), `copying` (one pass), `tensors`,
`modules`, `states` (flowtrain's own containers), `rebuilt` (Python's and numpy's), `cuts`, `marks` and `sources`
(series, which only grow, so that their length is enough). Where copies lie: `pool` (memory that is used again),
`parcels` and `mappings` (memory that a worker on this machine reads where it is). `frozen` is what the handler sees.
"""
