"""Independent handlers of one event at the same time, with the serial result.

A plan goes through these modules: `compile` (a dask task for each handler), `strands` (which handlers on which thread),
`firing` (one event: the barrier, failures), `ways` and `race` (inline or parallel: measured). `compat` is the only one
that imports dask's internals, and `torch_state` the only one that knows what torch keeps for a thread.
"""
