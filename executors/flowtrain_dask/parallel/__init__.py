"""Independent handlers of one event run at the same time, with the serial result.

`task_graph` compiles a plan to a dask graph with one task for each handler; users look at it and draw it. `strands`
spreads the handlers over threads by the edges of that graph. `firing` runs the strands of one event and waits for all
of them, and `decision` measures whether this is faster than running inline. `torch_state` carries torch's state of the
training thread to the other threads, and `threads` starts and wakes these so that no interrupt can break it.
"""

__all__: list[str] = []
