"""Data: the batches and other nested values that users bring, whatever containers they use.

`nested` takes nested data apart and puts it together again, for every package that goes through such data, and
`batch_size` finds how many samples a batch has.
"""

__all__: list[str] = []
