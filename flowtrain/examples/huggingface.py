"""Train a model of Hugging Face, with its own loss: ``python -m flowtrain.examples.huggingface``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from flowtrain import Learner, TrainingPhase, ValidationPhase
from flowtrain.callbacks import Metric, Metrics
from flowtrain.metrics import accuracy, model_loss

__all__ = ["TextPhase", "TextValidationPhase", "main"]


class TextPhase(TrainingPhase):
    """Train on mappings, whose items are the arguments of the model."""

    unpack = True


class TextValidationPhase(ValidationPhase):
    """Evaluate on mappings, whose items are the arguments of the model."""

    unpack = True


def main(epochs: int = 5) -> Learner:
    """Train a small model to tell whether a text has a certain word, and return the learner."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    texts = [torch.randint(1, 20, (8,)) for _ in range(384)]
    rows: Any = [{"input_ids": text, "labels": (text == 7).any().long()} for text in texts]  # a list is a dataset
    config = BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    learner = Learner(
        BertForSequenceClassification(config),  # or from_pretrained(...).train()
        model_loss,
        data={TextPhase: DataLoader(rows[:320], 16, shuffle=True), TextValidationPhase: DataLoader(rows[320:], 64)},
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        callbacks=[Metrics(Metric(lambda outputs, labels: accuracy(outputs.logits, labels), name="Accuracy"))],
    )
    learner.fit(epochs)
    return learner


if __name__ == "__main__":
    main()
