"""Lanes in other processes: what travels there and back, and what is done when a worker is lost.

`connect` makes a client of what the user passed, `transport` is a lane's side and keeps book of where the state is,
`calls` makes one call and sees it through, `worker` is what runs there. As bytes: `codec` and `reducing` (events and
snapshots), `entries` (a batch), `callback_state` and `pickling` (callbacks and their state). `block` is the memory
through which a worker on the same machine gets a large batch.
"""
