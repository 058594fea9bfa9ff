"""A simulated accelerator: a device for torch, written in Python, that is asynchronous and checks who orders what.

`backend.install` registers the device ``sim`` with torch, once in a process. Its memory is memory of the host, and its
kernels are those of the CPU, so every result can be compared with the CPU's to the bit. Its order is an accelerator's:

- Work of a stream is queued. A schedule decides which work runs before anybody waits for it, so that a program which
  is right under one order by luck is wrong under another (`machine`).
- Two pieces of work that use the same memory must be ordered by streams, events or the host. Otherwise the later one
  raises `clocks.Race`, in whatever order they happened to run (`clocks`).
- Memory without a reference is given out again at once, to the stream that it came from, and the next tensor in it is
  filled with NaN (`memory`).
- Every wait of the host for the device is counted by its kind (`Machine.waits`).

Read the modules in this order: `clocks`, `machine`, `memory`, `tensors`, `operators`, `copies`, `streams`,
`backend`. What no simulator in Python can show: how fast anything is, whether copies and kernels overlap, what the
kernels of a vendor compute, and graphs.
"""
