"""The torch core: devices, precision, gradients, optimizers.

`torch_core` has `TorchCore`, which the loop calls, and `settings` checks its arguments. `devices` chooses the device
and moves data there, and `prefetch` moves batches, ahead of time where that gains something. `optimizers` checks and
makes optimizers, `accumulation` counts the batches of an accumulation group, and `precision` has autocast, the scaler
of fp16, and the guard that keeps NaN out of the parameters. `compile` runs models through `torch.compile`.

`world` knows the ranks of a training in several processes, and `replica` says what a loop needs from the models of one
of them. `data_parallel` trains a model on all ranks with DDP, `sharding` with FSDP, and `unsent_gradients` has the
gradients that a sharded model keeps for itself.
"""

__all__: list[str] = []
