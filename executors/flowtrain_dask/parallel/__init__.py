"""Independent handlers of one event at the same time, with the serial result.

`task_graph` compiles a plan to a dask graph, a task for each handler: the graph that is shown and drawn. From its edges
`strands` says which handlers run one after the other on which thread, `firing` runs them and waits for all, and
`decision` times whether that is faster than inline. `torch_state` knows what torch keeps for each thread.
"""
