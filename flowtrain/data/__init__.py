"""Data: the batches and other nested values that users bring, whatever containers they use, and loaders of them.

`nested` takes nested data apart and puts it together again, for every package that goes through such data, and
`batch_size` finds how many samples a batch has. `loaders` has the loader that combines several, and `tensor_bytes` the
content of a tensor as bytes. For several ranks `rank_loaders` gives each rank its share of a loader, and `rank_batches`
tells equal batches and the last batch.
"""

from __future__ import annotations

from flowtrain.data.loaders import CombinedLoader

__all__ = ["CombinedLoader"]
