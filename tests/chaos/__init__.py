"""What deferred callbacks go through: workers that are killed while they work, clusters that vanish, very long runs.

``python -m tests.chaos --minutes 10`` trains on a cluster of real processes and kills them; see `tests.chaos.run`.
``--cut`` cuts the link between training and cluster for 15 seconds, in network namespaces; see `tests.chaos.cut`.
``--soak`` and ``--loaders`` are about what grows and what hangs; see `tests.chaos.soak` and `tests.chaos.loaders`.
"""
