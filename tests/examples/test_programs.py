"""The short programs of ``flowtrain/examples``: what they print and learn, and that they stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from flowtrain import ValidationPhase
from flowtrain.callbacks import Metrics
from flowtrain.examples import classifier, distillation, gan, huggingface

EXAMPLES = Path(classifier.__file__).parent


@pytest.mark.parametrize(("name", "most"), [("classifier", 35), ("gan", 50), ("huggingface", 35), ("distillation", 35)])
def test_a_program_is_short(name: str, most: int) -> None:
    """Blank lines and docstrings do not count; imports do."""
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    lines = {number for number, line in enumerate(source.splitlines(), start=1) if line.strip()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    assert len(lines) <= most


def test_a_classifier_resumes_and_gives_classes_without_a_learner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    classifier.train(whole, 4)
    classifier.train(parts, 2)
    capsys.readouterr()
    classifier.train(parts, 4)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[::2]] == ["3", "4"]
    points = torch.rand(64, 2) * 2 - 1
    assert torch.equal(classifier.classify(points, whole), classifier.classify(points, parts))
    assert (classifier.classify(points, whole) == (points.prod(1) > 0).long()).float().mean() > 0.9


def test_a_gan_learns_the_circle() -> None:
    distances = [(gan.main(epochs).norm(dim=1) - 1).abs().mean().item() for epochs in (1, 20)]
    assert distances[1] < 0.25 < distances[0]


def test_a_student_with_few_labels_learns_from_its_teacher() -> None:
    learner = distillation.main(10)
    counts = learner.cbstate.history[distillation.Distil]
    assert (counts.epochs, counts.steps) == (10, 10 * 31)  # the many samples make 31 batches, the labelled ones one
    assert learner.cbstate.metrics_epoch[ValidationPhase]["Accuracy"].last()[1] > 0.9
    assert not any(param.requires_grad for param in learner.lossfn.teacher.parameters())


def test_a_model_of_hugging_face_is_trained_as_it_is() -> None:
    pytest.importorskip("transformers")
    learner = huggingface.main(4)
    assert learner.get_callback(Metrics) is not None
    hits = learner.cbstate.metrics_epoch[huggingface.TextValidationPhase]["Accuracy"].values
    assert hits[-1] > 0.9 > hits[0]
    assert "bert.embeddings.word_embeddings.weight" in learner.model.state_dict()  # the names of the model itself
    text = torch.tensor([[1, 2, 7, 4, 5, 6, 1, 2], [1, 2, 3, 4, 5, 6, 1, 2]])
    assert learner.model.eval()(input_ids=text).logits.argmax(1).tolist() == [1, 0]
