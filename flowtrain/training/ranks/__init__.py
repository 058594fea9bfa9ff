"""Training on several ranks: one decision for all of them, at points to which they come in the same order.

`sync_points` has these points, and what ranks tell each other there. `ranks` puts them into the loop
(`flowtrain.training.together.Together`), `batch_sync` into a batch (`flowtrain.training.step.Steps`), and `batches`
divides the data, ends each epoch with the same batch on all ranks, and evaluates a sharded model on all of them
together.

The other parts of training on several ranks are where their like is for one process: processes and models in
`flowtrain.core.world` and `flowtrain.core.replica`, loaders in `flowtrain.data.rank_loaders`, checkpoints in
`flowtrain.training.checkpoint.rank_checkpoints`, and declared exchanges in `flowtrain.graph.exchange`.
"""

__all__: list[str] = []
