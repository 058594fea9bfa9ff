"""Examples: whole programs to read and to run, such as ``python -m flowtrain.examples.digits``.

`digits` has all parts of a program, with logs, checkpoints and an interface of the command line. The others are short:
`classifier` resumes and gives its best weights to plain torch, `gan` has two optimizers, `distillation` two loaders,
and `huggingface` a model of transformers with its own loss.
"""

from __future__ import annotations

__all__: list[str] = []
