"""Independent handlers of one event at the same time: the task graph, strands, and when they pay."""
