"""The torch core: devices, precision, gradients, optimizers.

`core` is what the loop calls; `settings` are its checked arguments. `devices` and `placement` move data to where the
model is, `prefetch` ahead of time; `optimizers` checks and makes optimizers; `accumulation` counts the batches of a
group; `precision` is autocast and the scaler of fp16; `nan_guard` keeps NaN out of the parameters; `structure` is
what training can change about models and optimizers that no ``state_dict`` holds; `compile` is `torch.compile`.
"""

__all__: list[str] = []
