"""The state of a learner: its batch, and models by name."""

from __future__ import annotations

import pytest
import torch

from flowtrain.state.batch import ReadOnlyBatch
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.readonly import ReadOnlyList


def test_a_new_batch_is_shown_with_a_twin() -> None:
    state = LearnerState()
    assert state.batch_twin is state.batch
    batch = type(state.batch)()
    batch.inputs = [1]
    state.show(batch)
    assert state.batch is batch
    assert isinstance(state.batch_twin, ReadOnlyBatch)
    assert type(state.batch_twin.inputs) is ReadOnlyList


# --- names


def test_several_by_name() -> None:
    gen, critic = torch.nn.Linear(1, 1), torch.nn.Linear(1, 2)
    named = Named("model", {"gen": gen, "critic": critic})
    assert named.gen is named["gen"] is gen
    assert dict(named) == {"gen": gen, "critic": critic}
    assert repr(named) == "Named(model: gen, critic)"
    said = "there is no model 'citric'; the learner has: gen, critic. Did you mean 'critic'?"
    with pytest.raises(AttributeError) as by_attribute:
        _ = named.citric
    assert str(by_attribute.value) == said
    with pytest.raises(KeyError) as by_key:
        named["citric"]
    assert by_key.value.args == (said,)
    with pytest.raises(AttributeError) as replaced:
        named.gen = critic
    assert str(replaced.value) == "model.gen cannot be replaced; pass the models to Learner."


def test_the_twins_of_what_has_a_name() -> None:
    named = Named("optimizer", {"gen": [1], "critic": torch.ones(1)})
    assert named.__twins__ is named.__twins__
    assert type(named.__twins__.gen) is ReadOnlyList
    assert named.__twins__.critic is named.critic
