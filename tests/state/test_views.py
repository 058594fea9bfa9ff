"""Rules 3 to 5: a view allows the declared paths, and refuses all others with the declaration to paste."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flowtrain import Access, Callback, EpochEnd, Event, Phase, Read, TrainingPhase, ValidationPhase, Write, on
from flowtrain.callback.access import ROOTS, Declaration, Path, declare, dotted, granted, overlap, union
from flowtrain.callback.view import LearnerView
from flowtrain.errors import FlowtrainError, MissingStateError, ProtectedException, UsageError
from flowtrain.state.learner_state import Named
from flowtrain.state.partial_view import Owner
from flowtrain.state.readonly import ReadOnlyDict, ReadOnlyList
from flowtrain.state.views import bind_view, compile_view
from flowtrain.testing import tiny_learner
from tests.support.untyped import untyped
from tests.support.views import made, view_of

# --- the property: an access is granted, or refused with the declaration that grants it


@dataclass(frozen=True)
class Touch:
    """An action of a handler, and the access that it needs."""

    path: Path
    access: str
    do: str

    def __call__(self, learner: LearnerView) -> None:
        exec(self.do, {"learner": learner, "P": TrainingPhase, "one": torch.ones(1), "torch": torch})

    def allowed(self, declaration: Declaration) -> bool:
        kind = granted(declaration, self.path)
        return kind is not None and (self.access == "Read" or isinstance(kind, Write))


TOUCHES = [
    Touch(tuple(path.split(".")), access, do)
    for path, access, do in [
        ("model", "Read", "learner.model(torch.ones(1, 2))"),
        ("model.encoder", "Read", "learner.model.encoder"),
        ("lossfn", "Read", "learner.lossfn"),
        ("callbacks", "Read", "learner.callbacks"),
        ("data", "Read", "learner.data[P][0]"),
        ("data", "Write", "learner.data[P] = [3]"),
        ("params.encoder.weight", "Read", "learner.params['encoder.weight']"),
        ("params.head.bias", "Read", "learner.params['head.bias'].sum()"),
        ("optimizer.hyperparams", "Read", "learner.optimizer.hyperparams[0]['lr']"),
        ("optimizer.hyperparams", "Write", "learner.optimizer.hyperparams[0]['lr'] = 0.5"),
        ("optimizer.state", "Read", "len(learner.optimizer.state)"),
        ("optimizer", "Write", "learner.optimizer.step()"),
        ("batch.loss", "Read", "learner.batch.loss"),
        ("batch.loss", "Read", "'loss' in learner.batch"),
        ("batch.loss", "Write", "learner.batch.loss = one"),
        ("batch.loss", "Write", "del learner.batch.loss"),
        ("batch.inputs", "Read", "learner.batch.inputs['x']"),
        ("batch.inputs", "Write", "learner.batch.inputs['x'] = one"),
        ("batch.new", "Write", "learner.batch.new = [1]"),
        ("batch.grads.encoder.weight", "Read", "learner.batch.grads['encoder.weight']"),
        ("batch.grads.head.bias", "Write", "learner.batch.grads['head.bias'] = learner.batch.grads['head.bias'] + 1"),
        ("cbstate.best", "Read", "learner.cbstate.best"),
        ("cbstate.best", "Write", "learner.cbstate.best = 0.1"),
        ("cbstate.best", "Write", "learner.cbstate.best = []"),
        ("cbstate.seen", "Read", "len(learner.cbstate.seen)"),
        ("cbstate.seen", "Write", "learner.cbstate.seen.append(2)"),
        ("cbstate.seen", "Write", "learner.cbstate.seen += [2]"),
        ("cbstate.new", "Write", "learner.cbstate.new = {}"),
        ("cbstate.mine.p", "Read", "learner.cbstate.mine.p[0]"),
        ("cbstate.mine.p", "Write", "learner.cbstate.mine.p.append(2)"),
        ("cbstate.mine.q", "Write", "learner.cbstate.mine.q = 3"),
        ("cbstate.mine.q", "Write", "del learner.cbstate.mine.q"),
        ("cbstate.tracehistory.Norm", "Read", "learner.cbstate.tracehistory[P]['Norm'].last()"),
        ("cbstate.tracehistory.Norm", "Write", "learner.cbstate.tracehistory[P].push('Norm', 1.0, 2)"),
        ("cbstate.tracehistory.Norm", "Write", "learner.cbstate.tracehistory[P]['Norm'].push(1.0, 2)"),
        ("cbstate.tracehistory.New one", "Write", "learner.cbstate.tracehistory[P].push('New one', 1.0, 2)"),
    ]
]

PATHS = sorted({touch.path[:length] for touch in TOUCHES for length in range(1, len(touch.path) + 1)})
declarations = st.dictionaries(
    st.sampled_from(PATHS), st.sampled_from([Read(), Read(optional=True), Write()]), max_size=6
).map(lambda found: tuple(sorted(found.items())))


def pasted(message: str) -> Declaration:
    """Return the declaration that a refusal prints, evaluated as source code."""
    names = {"Read": Read, "Write": Write, "Access": dict}
    code = textwrap.dedent(message.partition("\n\n")[2])
    if code.startswith("def state_access"):
        exec(code, names)
        function: Any = names["state_access"]
        return declare(function(None), "pasted")
    if code.startswith("@on("):
        names["on"] = lambda *args, access: access  # type: ignore[assignment]  # in place of the real decorator
        return declare(eval(code[1:], {**names, "BatchEnd": None}), "pasted")
    # A twin does not know its callback, so its refusal says which path to add.
    [found] = re.findall(r"[Dd]eclare (\{.*\})\.", message)
    return declare(eval(found, names), "pasted")


@given(declarations, st.sampled_from(TOUCHES), st.sampled_from(["", "@on(BatchEnd, "]))
@example(declare({"cbstate.tracehistory": Read()}, ""), TOUCHES[-2], "")
@example(declare({"cbstate.mine.p": Read(), "cbstate": Write()}, ""), TOUCHES[-7], "")
@example(declare({"optimizer": Write(), "optimizer.step": Read()}, ""), TOUCHES[11], "")
def test_an_access_is_granted_or_its_declaration_is_printed(
    declaration: Declaration, touch: Touch, decorator: str
) -> None:
    """Rules 3 and 4: pasting the declaration that a refusal prints allows the action, and keeps the other grants."""
    while not touch.allowed(declaration):
        with pytest.raises(ProtectedException) as caught:
            touch(view_of(declaration, made(), decorator))
        refused, text = caught.value, str(caught.value)
        assert overlap(tuple(refused.path.split(".")), touch.path)
        assert text.startswith(f"{refused.access} access to Learner.{refused.path} disallowed.\n")
        wider = pasted(text)
        if "The container was read" in text or "() writes." in text:
            wider = union([declaration, wider])
        assert wider != declaration
        assert all(granted(wider, path) in (kind, Read(), Write()) for path, kind in declaration)
        declaration = wider
    touch(view_of(declaration, made(), decorator))


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: f"{touch.access} {touch.do}")
def test_without_a_declaration_nothing_is_allowed(touch: Touch) -> None:
    with pytest.raises(ProtectedException):
        touch(view_of({}, made()))


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: f"{touch.access} {touch.do}")
def test_the_declaration_of_the_path_alone_is_enough(touch: Touch) -> None:
    touch(view_of({dotted(touch.path): Write()}, made()))
    if touch.access == "Read":
        touch(view_of({dotted(touch.path): Read()}, made()))
    else:
        with pytest.raises(ProtectedException):
            touch(view_of({dotted(touch.path): Read()}, made()))


def test_a_refusal_in_full() -> None:
    """Rule 3: the refusal names the touched path, even if no part of it is declared, and the callback."""
    with pytest.raises(ProtectedException) as caught:
        _ = view_of({}, made()).batch.loss
    text = str(caught.value)
    assert text.startswith("Read access to Learner.batch.loss disallowed.\n")
    assert text.endswith(
        'In Mine.state_access write:\n\n    def state_access(self) -> Access:\n        return {"batch.loss": Read()}\n'
    )


# --- compiled once, shared


def test_equal_declarations_share_one_class() -> None:
    """Rule 5: a view class is compiled once for each declaration."""
    one = declare({"batch.loss": Read(), "cbstate.best": Write()}, "one")
    other = declare({"cbstate": {"best": Write()}, "batch": {"loss": Read()}}, "other")
    assert compile_view(one) is compile_view(other)
    state = made()
    first, second = view_of(one, state), view_of(other, made())
    assert type(first) is type(second)
    assert type(first.batch) is type(second.batch)
    assert type(first) is not type(view_of({"batch.loss": Read()}, state))
    assert first.cbstate.best == second.cbstate.best
    first.cbstate.best = 7
    assert (first.cbstate.best, second.cbstate.best) == (7, 0.5)


def test_a_declared_entry_is_read_without_a_python_call() -> None:
    state = made()
    state.batch.inputs = torch.ones(2)
    state.batch_twin = state.batch  # phases do this if a batch holds only tensors
    learner = view_of({"batch.loss": Read(), "batch.inputs": Write(), "cbstate.seen": Read()}, state)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    _, _, _ = learner.batch.loss, learner.batch.inputs, learner.cbstate.seen
    sys.setprofile(None)
    assert calls == []


# --- aliases and resources


def test_parameters_are_a_read_only_mapping() -> None:
    """Rule 5."""
    learner = view_of({"params": Write()}, made())
    assert list(learner.params) == ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]
    with pytest.raises(TypeError):
        learner.params["encoder.weight"] = torch.ones(1)


def test_the_model_does_not_open_its_parameters_path() -> None:
    with pytest.raises(ProtectedException, match=r"Read access to Learner\.params disallowed"):
        _ = view_of({"model": Write()}, made()).params


@pytest.mark.parametrize(
    ("access", "lr", "state"),
    [
        ({"optimizer.hyperparams": Write()}, True, False),
        ({"optimizer.hyperparams": Write(), "optimizer.state": Read()}, True, True),
        ({"optimizer.state": Write()}, False, True),
        ({"optimizer": Read()}, False, True),
        ({"optimizer": Write()}, True, True),
        ({"optimizer": Read(), "optimizer.hyperparams": Write()}, True, True),
    ],
)
def test_the_parts_of_an_optimizer(access: Access, lr: bool, state: bool) -> None:
    """Rule 5: each part is a path of its own, and plain `optimizer` covers both."""
    learner = view_of(access, made())

    def works(do: Callable[[], Any]) -> bool:
        try:
            do()
        except ProtectedException:
            return False
        return True

    assert works(lambda: learner.optimizer.hyperparams[0].update(lr=0.5)) is lr
    assert works(lambda: len(learner.optimizer.state)) is state


@pytest.mark.parametrize(
    ("access", "said"),
    [
        ({}, "In Mine.state_access write:\n\n    def state_access(self) -> Access:\n        return {WANTED}\n"),
        ({"optimizer.hyperparams": Write()}, ""),
        ({"optimizer.hyperparams": Read(), "params": Read()}, ""),
    ],
)
def test_who_touches_parameter_groups_is_told_the_path_that_reaches_no_parameter(access: Access, said: str) -> None:
    """Rule 5: declaring ``param_groups`` conflicts with every callback that writes a parameter."""
    with pytest.raises(ProtectedException) as caught:
        view_of(access, made()).optimizer.param_groups[0]["lr"] = 0.5
    assert caught.value.path == "optimizer.param_groups"
    text = str(caught.value)
    advice = (
        "param_groups reach the parameters too. The learning rates are at learner.optimizer.hyperparams, the same "
        'groups without the parameters, and these are at learner.params. Write learner.optimizer.hyperparams[0]["lr"] '
        "instead."
    )
    assert advice in text
    rest = text.split(advice)[1].strip()
    assert rest == said.replace("WANTED", '"optimizer.hyperparams": Read()').strip()


def test_several_optimizers_are_advised_by_name() -> None:
    models = Named("model", {"gen": torch.nn.Linear(1, 1), "critic": torch.nn.Linear(1, 1)})
    state = made(models, {"gen": torch.optim.SGD, "critic": torch.optim.SGD})
    learner = view_of({"optimizer.gen.hyperparams": Write()}, state)
    with pytest.raises(ProtectedException, match=r'Write learner\.optimizer\.gen\.hyperparams\[0\]\["lr"\] instead\.$'):
        _ = learner.optimizer.gen.param_groups


def test_several_optimizers_by_name() -> None:
    models = Named("model", {"gen": torch.nn.Linear(1, 1), "critic": torch.nn.Linear(1, 1)})
    state = made(models, {"gen": torch.optim.SGD, "critic": torch.optim.SGD})
    writer = view_of({"optimizer.gen.hyperparams": Write()}, state)
    writer.optimizer.gen.hyperparams[0]["lr"] = 0.5
    for access in ({"optimizer.gen.hyperparams": Read()}, {"optimizer.gen": Read()}, {"optimizer": Read()}):
        reader = view_of(access, state)
        assert reader.optimizer.gen.hyperparams[0]["lr"] == 0.5
        with pytest.raises(ProtectedException, match=r"Learner\.optimizer\.gen\.hyperparams"):
            reader.optimizer.gen.hyperparams[0]["lr"] = 1
    refused: list[Callable[[], Any]] = [lambda: writer.optimizer.critic, lambda: writer.optimizer.gen.state]
    for undeclared in refused:
        with pytest.raises(ProtectedException):
            undeclared()
    assert view_of({"model.gen": Read()}, state).model.gen is models.gen


@pytest.mark.cpu_only("gives gradients of the CPU")
@pytest.mark.parametrize("plain", [True, False], ids=["batch of tensors", "batch with containers"])
def test_gradients_to_read_cannot_be_replaced(plain: bool) -> None:
    """Rule 5: ``batch.grads`` is a path of its own; with `Read()` every way to reach the gradients is read-only."""
    state = made()
    if plain:
        state.batch_twin = state.batch
    for access in ({"batch.grads": Read()}, {"batch": Read()}, {"batch.grads.head": Read()}):
        learner = view_of(access, state)
        assert torch.equal(learner.batch.grads["head.bias"], torch.ones(1))
        with pytest.raises(ProtectedException, match=r"Write access to Learner\.batch\.grads"):
            learner.batch.grads["head.bias"] = torch.zeros(1)
    view_of({"batch.grads": Write()}, state).batch.grads["head.bias"] = torch.zeros(1)
    assert state.model.head.bias.grad.item() == 0


def test_gradients_that_a_phase_keeps_in_a_dict() -> None:
    state = made()
    state.batch.grads = {"w": torch.ones(1)}
    for access in ({"batch.grads": Read()}, {"batch": Read()}):
        assert view_of(access, state).batch.grads["w"] == 1


def test_resources_are_no_attributes() -> None:
    """Rule 6: a resource has no path, so a view has no attribute for it."""
    learner = view_of({"resource.rng": Write(), "resource.pyplot": Write()}, made())
    with pytest.raises(AttributeError, match="a handler's learner has no 'resource'"):
        _ = untyped(learner).resource
    with pytest.raises(AttributeError, match=r"so 3 cannot be assigned to it: .* Keep the object in an attribute"):
        untyped(learner).resource = 3


def test_data_by_phase() -> None:
    state = made()
    reader, writer = view_of({"data": Read()}, state), view_of({"data": Write()}, state)
    assert type(reader.data[TrainingPhase]) is ReadOnlyList
    writer.data[ValidationPhase] = [1]
    assert ValidationPhase in reader.data
    with pytest.raises(ProtectedException):
        del reader.data[TrainingPhase]


# --- the view itself


@pytest.mark.parametrize("name", ["fit", "epoch", "step", "validate", "run_batch"])
def test_the_loop_is_not_a_handlers_to_run(name: str) -> None:
    """Rule 18."""
    with pytest.raises(UsageError) as caught:
        getattr(view_of({"model": Write()}, made()), name)
    assert str(caught.value) == (
        f"Mine calls learner.{name}() in a handler, but the loop is running. Raise CancelBatchException, "
        f"CancelEpochException or CancelFittingException to end a part of training, or fire an event with "
        f"learner.fire(...)."
    )


def test_a_name_that_no_learner_has() -> None:
    learner: Any = view_of({"batch": Write()}, made())
    with pytest.raises(AttributeError) as caught:
        _ = learner.btach
    assert str(caught.value) == (
        "a handler's learner has no 'btach'. Did you mean 'batch'? It has: model, lossfn, optimizer, data, params, "
        "batch, cbstate, callbacks and fire(); the numbers of epochs, steps and updates are in "
        "cbstate.history."
    )
    with pytest.raises(AttributeError, match=r"no 'seen'\. To keep something declare .* write learner\.cbstate\.seen"):
        learner.seen = 1
    assert not isinstance(caught.value, FlowtrainError)
    with pytest.raises(AttributeError, match=r"^a handler's learner has no 'modle'\. Did you mean 'model'\?"):
        learner.modle = 1


@pytest.mark.parametrize("root", [root for root in ROOTS if root != "resource"])
def test_nothing_of_the_learner_is_replaced(root: str) -> None:
    """No declaration is printed if `Write` is declared already, because pasting it would not help."""
    changes: list[Callable[[LearnerView], None]] = [lambda x: setattr(x, root, 1), lambda x: delattr(x, root)]
    for change in changes:
        with pytest.raises(ProtectedException, match=rf"Write access to Learner\.{root} disallowed"):
            change(view_of({root: Read()}, made()))
        with pytest.raises(UsageError) as caught:
            change(view_of({root: Write()}, made()))
        assert str(caught.value) == (
            f"Mine replaces learner.{root}, which the training core, the optimizer and other views hold. "
            f"Change it in place."
        )


def test_a_name_with_an_underscore_is_no_entry() -> None:
    learner = view_of({"cbstate.best": Read(), "batch.loss": Read()}, made())
    for space in (learner.cbstate, learner.batch):
        with pytest.raises(AttributeError):
            _ = space._mine
        with pytest.raises(AttributeError, match="no entry begins with an underscore"):
            space._mine = 1


def test_fire_puts_an_event_in_the_queue() -> None:
    """Rule 18."""

    class Improved(Event):
        """A user's event."""

    state, event = made(), Improved()
    learner = view_of({}, state)
    learner.fire(event)
    assert state.fired == [("Mine", event)]
    with pytest.raises(UsageError) as caught:
        learner.fire(untyped(Improved))
    assert str(caught.value) == f"fire() takes an event, got {Improved!r}. Write learner.fire(MyEvent())."


def test_what_a_view_says_of_itself() -> None:
    learner = view_of({"batch.loss": Read()}, made())
    assert isinstance(learner, LearnerView)
    assert repr(learner) == "LearnerView of Mine"
    assert repr(learner.batch) == "Learner.batch as Mine sees it"


# --- namespaces


@pytest.mark.parametrize("root", ["batch", "cbstate"])
def test_a_whole_namespace_to_read(root: str) -> None:
    state = made()
    learner = view_of({root: Read()}, state)
    space = getattr(learner, root)
    name = {"batch": "inputs", "cbstate": "seen"}[root]
    assert getattr(space, name) == getattr(getattr(state, root), name)
    assert isinstance(getattr(space, name), (ReadOnlyDict, ReadOnlyList))
    assert name in space
    assert "absent" not in space
    changes: list[Callable[[], None]] = [
        lambda: setattr(space, name, 1),
        lambda: setattr(space, "new", 1),
        lambda: delattr(space, name),
    ]
    for change in changes:
        with pytest.raises(ProtectedException, match="Write access"):
            change()
    with pytest.raises(MissingStateError) as caught:
        _ = space.absent
    said = f"Mine reads Learner.{root}.absent, and there is nothing. {root}.absent does not exist (yet). "
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("root", ["batch", "cbstate"])
def test_a_whole_namespace_to_write(root: str) -> None:
    state = made()
    space = getattr(view_of({root: Write()}, state), root)
    target = getattr(state, root)
    space.new = [1]
    space.new.append(2)
    assert target.new == [1, 2]
    assert "new" in space
    del space.new
    assert "new" not in vars(target)
    with pytest.raises(MissingStateError):
        _ = space.new


@pytest.mark.parametrize("root", ["batch", "cbstate"])
@pytest.mark.parametrize("value", [[1], {"a": [1]}, ({"a": 1}, 2)], ids=["list", "dict", "tuple"])
def test_an_assigned_container_is_raw_to_writers_and_read_only_to_readers(root: str, value: Any) -> None:
    """Rule 3: assigned containers get a twin at once, even in a batch that held only tensors before."""
    state = made()
    state.batch = state.batch_twin = type(state.batch)()
    readers = [view_of({f"{root}.mine": Read()}, state), view_of({root: Read()}, state)]
    writer = view_of({f"{root}.mine": Write()}, state)
    getattr(writer, root).mine = value
    assert getattr(writer, root).mine is value
    for reader in readers:
        seen = getattr(reader, root).mine
        assert seen is not value
        assert seen == value
    getattr(writer, root).mine = 5
    assert all(getattr(reader, root).mine == 5 for reader in readers)
    getattr(writer, root).mine = torch.ones(2)
    assert all(getattr(reader, root).mine is getattr(writer, root).mine for reader in readers)
    delattr(getattr(writer, root), "mine")
    for reader in readers:
        with pytest.raises(MissingStateError):
            _ = getattr(reader, root).mine


def test_a_view_shows_the_batch_of_the_moment() -> None:
    state = made()
    learner = view_of({"batch.loss": Read()}, state)
    batch = type(state.batch)()
    batch.loss = torch.zeros(())
    state.show(batch)
    assert learner.batch.loss is batch.loss


@pytest.mark.parametrize("value", [None, 5, [1]], ids=repr)
def test_a_series_is_filled_and_never_replaced(value: Any) -> None:
    """Other callbacks hold the series, so not even a plain value may replace it."""
    state = made()
    for access in ({"cbstate.tracehistory": Write()}, {"cbstate": Write()}):
        with pytest.raises(UsageError, match=r"^cbstate\.tracehistory is a PhaseMap and is filled, never replaced"):
            view_of(access, state).cbstate.tracehistory = value
    assert state.cbstate.tracehistory is not value


# --- optional reads


@pytest.mark.parametrize("entry", ["batch.absent", "cbstate.absent", "cbstate.mine.absent", "cbstate.absent.deep",
                                   "cbstate.tracehistory.Absent", "batch.grads.absent"])  # fmt: skip
def test_an_optional_read_of_nothing_is_none(entry: str) -> None:
    def read(access: Access) -> Any:
        found: Any = view_of(access, made())
        for name in entry.split("."):
            found = found[name] if name in ("Absent", "absent") and "grads" in entry else getattr(found, name)
            if name == "tracehistory":
                found = found[TrainingPhase]
        return found

    assert read({entry: Read(optional=True)}) is None
    with pytest.raises(MissingStateError) as caught:
        read({entry: Read()})
    assert caught.value.path == entry
    assert f'declare {{"{entry}": Read(optional=True)}} and handle None.' in str(caught.value)


def test_an_optional_read_of_what_is_there_is_the_plain_getter() -> None:
    """Rule 4."""
    state = made()
    plain, optional = (view_of({"batch.loss": kind}, state) for kind in (Read(), Read(optional=True)))
    assert optional.batch.loss is plain.batch.loss is state.batch.loss
    getters = [type(view.batch).__dict__["loss"] for view in (plain, optional)]
    assert [type(getter.fget).__name__ for getter in getters] == ["attrgetter", "attrgetter"]


def test_a_whole_optional_read() -> None:
    learner = view_of({"cbstate": Read(optional=True)}, made())
    assert learner.cbstate.absent is None
    assert learner.cbstate.best == 0.5


# --- exchanges between ranks


def test_in_one_process_all_ranks_are_this_one() -> None:
    """A reduced value is the value itself, a gathered one a list of it, and parameters are whole anyway."""
    state = made()
    access: Access = {
        "batch.loss": Read(reduce="mean"),
        "batch.inputs": Read(gather=True),
        "batch.grads": Read(gather=True),
        "cbstate.seen": Read(reduce="sum"),
        "cbstate.best": Write(broadcast=True),
        "params": Read(gather=True),
    }
    view = view_of(access, state)
    assert view.batch.loss is state.batch.loss
    assert type(view.batch.inputs) is list
    assert view.batch.inputs == [{"x": state.batch.inputs["x"]}]
    assert view.params is state.params
    assert view.batch.grads["head.bias"] is state.model.head.bias.grad
    assert view.cbstate.seen == [1]
    assert isinstance(view.cbstate.seen, ReadOnlyList)
    view.cbstate.best = 0.25
    assert state.cbstate.best == 0.25


def test_a_missing_value_of_this_rank() -> None:
    access: Access = {
        "batch.a": Read(optional=True, reduce="sum"),
        "batch.b": Read(optional=True, gather=True),
        "batch.c": Read(gather=True),
    }
    view = view_of(access, made())
    assert (view.batch.a, view.batch.b) == (None, [None])
    with pytest.raises(MissingStateError, match=r"Mine reads Learner\.batch\.c, and there is nothing"):
        _ = view.batch.c


def test_a_deferrable_handler_sees_the_value_detached() -> None:
    state = made()
    state.batch.loss = torch.ones((), requires_grad=True) * 2
    declaration = declare({"batch.loss": Read(reduce="mean"), "batch.inputs": Read(gather=True)}, "Mine")
    owner = Owner("Mine", "Mine", "state_access", declaration, consumes=True)
    view = bind_view(declaration, state, owner)
    loss: torch.Tensor = view.batch.loss
    assert not loss.requires_grad
    assert loss.item() == 2
    assert len(view.batch.inputs) == 1


def test_the_values_of_all_ranks_are_shown_while_the_handler_runs() -> None:
    state, exchanged = made(), dict[Path, Any]()
    declaration = declare({"batch.loss": Read(reduce="mean"), "cbstate.seen": Read(gather=True)}, "Mine")
    view = bind_view(declaration, state, Owner("Mine", "Mine", "state_access", declaration, exchanged=exchanged))
    exchanged |= {("batch", "loss"): 7.0, ("cbstate", "seen"): [[1], [2]]}
    assert view.batch.loss == 7.0
    assert view.cbstate.seen == [[1], [2]]
    exchanged.clear()
    with pytest.raises(UsageError) as error:
        _ = view.batch.loss
    assert str(error.value) == (
        'Mine reads batch.loss, declared with Read(reduce="mean"), and its handler does not run now. The ranks '
        "exchange the value for one call of the handler: keep the value, and not `learner`."
    )


def test_a_refusal_keeps_the_exchanges_that_are_declared() -> None:
    view = view_of({"batch.loss": Read(reduce="mean"), "cbstate.best": Write(broadcast=True)}, made())
    with pytest.raises(ProtectedException) as error:
        _ = view.batch.inputs
    assert pasted(str(error.value)) == declare(
        {"batch.loss": Read(reduce="mean"), "cbstate.best": Write(broadcast=True), "batch.inputs": Read()}, "Mine"
    )


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_a_deferrable_callback_reads_no_number_of_updates(executor: str) -> None:
    class Late(Callback):
        deferrable = True

        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            print(learner.updates)

    learner = tiny_learner(Late(), n_batches=1, executor=executor)
    with learner, pytest.raises(UsageError) as raised:
        learner.fit(1)
    assert str(raised.value) == (
        "Late is deferrable and reads learner.updates: training may be ahead of its handlers. Declare "
        '{"cbstate.history": Read()} and read those of a phase: learner.cbstate.history[phase].updates.'
    )


def test_an_error_within_a_property_of_the_model_is_told() -> None:
    class Broken(torch.nn.Linear):
        @property
        def head(self) -> object:
            return self.hidden

    class Looks(Callback):
        def state_access(self) -> Access:
            return {"model.head": Read()}

        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            assert learner.model.head

    with pytest.raises(MissingStateError, match=r"and there is nothing\. 'Broken' object has no attribute"):
        tiny_learner(Looks(), model=Broken(1, 1), n_batches=1).fit(1)
