"""Lanes whose handlers run in other processes: on the workers of a dask cluster.

`connect` makes a client from the argument of the user, and `connection` is that client, which is made again after the
cluster was lost and is back. `transport` is the lane's side: it sends batches of events, and always holds enough to
begin again when a worker is lost. `calls` makes one call to the cluster and watches it, and `worker` is the function
that runs there. `codec` encodes a batch of events with their snapshots as bytes, `callback_state` callbacks and their
state, and `pickling` is the pickler of both; `plain_pickling` is that of files, which hold no code. `block` hands a
large batch to a worker on the same machine through memory.
"""

__all__: list[str] = []
