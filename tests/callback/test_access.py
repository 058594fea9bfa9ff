"""Declarations of access: their normal form, the paths that they grant, and whether two declarations touch one path."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.callback.access import (
    ROOTS,
    Access,
    Declaration,
    Path,
    Read,
    Write,
    collective,
    declare,
    dotted,
    granted,
    render,
    union,
)
from flowtrain.errors import AccessError
from tests.support.untyped import untyped

NAMES = ["a", "b", "0", "weight"]
KINDS: list[Read | Write] = [Read(), Read(optional=True), Read(full=True), Read(optional=True, full=True), Write()]
LOSS: Path = ("batch", "loss")

roots = st.sampled_from(["batch", "cbstate", "model", "params", "optimizer", "resource"])
paths = st.tuples(roots, st.lists(st.sampled_from(NAMES), max_size=3)).map(lambda each: (each[0], *each[1]))


def _legal(entry: tuple[Path, Read | Write]) -> tuple[Path, Read | Write]:
    path = entry[0]
    return ((*path, "rng") if len(path) == 1 else path, Write()) if path[0] == "resource" else entry


entries = st.tuples(paths, st.sampled_from(KINDS)).map(_legal)
declarations = st.lists(entries, max_size=6).map(lambda found: union([((path, kind),) for path, kind in found]))


# --- normal form


@pytest.mark.parametrize(
    "access",
    [
        {"batch.loss": Read(), "batch.x.y": Write(), "cbstate": Read(optional=True)},
        {"batch": {"loss": Read(), "x": {"y": Write()}}, "cbstate": Read(optional=True)},
        {"batch": {"x.y": Write(), "loss": Read()}, "cbstate": Read(optional=True)},
        {"cbstate": Read(optional=True), "batch.x": {"y": Write()}, "batch": {"loss": Read()}},
    ],
)
def test_dotted_and_nested_mean_the_same(access: Access) -> None:
    assert declare(access, "me") == (
        (("batch", "loss"), Read()),
        (("batch", "x", "y"), Write()),
        (("cbstate",), Read(optional=True)),
    )


@given(declarations, st.data())
def test_every_way_to_nest_a_declaration_is_one_declaration(declaration: Declaration, data: st.DataObject) -> None:
    """Each path is cut into dotted keys at random, in random order: the normal form of the declaration is the same."""
    order = data.draw(st.permutations(declaration))
    access: dict[str, Any] = {}
    for path, kind in order:
        cuts = data.draw(st.sets(st.integers(1, len(path) - 1))) if len(path) > 1 else set[int]()
        bounds = [0, *sorted(cuts), len(path)]
        keys = [".".join(path[start:end]) for start, end in itertools.pairwise(bounds)]
        level = access
        for key in keys[:-1]:
            if not isinstance(level.setdefault(key, {}), dict):
                break  # another key ends here with Read() or Write(), so only a dotted key can go deeper
            level = level[key]
        else:
            if keys[-1] not in level:
                level[keys[-1]] = kind
                continue
        access.setdefault(dotted(path), kind)
    found = declare(access, "me")
    assert set(found) <= set(declaration)
    if len(found) == len(declaration):
        assert found == declaration
    assert declare({dotted(path): kind for path, kind in order}, "me") == declaration


@given(declarations)
def test_a_rendered_declaration_reads_back(declaration: Declaration) -> None:
    assert declare(eval(render(declaration), {"Read": Read, "Write": Write}), "me") == declaration


@pytest.mark.parametrize("name", ['say "hi"', "it's", "back\\slash", "two words", "π", "line\nbreak"])
def test_names_of_any_kind_are_rendered_as_source(name: str) -> None:
    declaration = declare({"cbstate.tracehistory": {name: Write()}}, "me")
    assert declare(eval(render(declaration), {"Write": Write}), "me") == declaration


def test_one_path_twice_is_the_stronger_of_both() -> None:
    assert declare({"batch": {"x": Read(optional=True)}, "batch.x": Read()}, "me") == ((("batch", "x"), Read()),)
    assert declare({"batch.x": Write(), "batch": {"x": Read()}}, "me") == ((("batch", "x"), Write()),)


def test_a_full_read_stays_full() -> None:
    """Rule 22: a callback that iterates over a whole series declares it, and no other declaration reverts it."""
    full, optional, plain = Read(full=True), Read(optional=True), Read()
    x: Path = ("cbstate", "x")
    assert union([((x, full),), ((x, optional),), ((x, plain),)]) == ((x, Read(full=True)),)
    assert union([((x, optional),), ((x, Read(optional=True, full=True)),)]) == ((x, Read(optional=True, full=True)),)
    assert union([((x, full),), ((x, Write()),)]) == ((x, Write()),)
    assert granted(((("cbstate",), full), (x, optional)), x) == full
    assert render(((x, Read(optional=True, full=True)),)) == '{"cbstate.x": Read(optional=True, full=True)}'


def test_empty_declarations() -> None:
    assert declare({}, "me") == declare({"batch": {}}, "me") == ()
    assert render(()) == "{}"


@pytest.mark.parametrize(
    ("access", "message"),
    [
        (
            {"btach.loss": Read()},
            "P.state_access() declares 'btach.loss', but a learner has no 'btach'. Did you mean 'batch'? A path begins "
            f"with one of: {', '.join(ROOTS)}.",
        ),
        (
            {"batch.loss": Read},
            "P.state_access() declares 'batch.loss': Read without parentheses. Write Read(), an instance of it.",
        ),
        (
            {"batch": {"loss": Write}},
            "P.state_access() declares 'batch.loss': Write without parentheses. Write Write(), an instance of it.",
        ),
        (Read, "P.state_access() is Read without parentheses. Write Read(), an instance of it."),
        (
            {"batch.loss": "read"},
            "P.state_access() declares 'batch.loss': 'read', which is neither Read(), Write() nor a mapping. "
            'Write a mapping such as {"batch.loss": Read()}.',
        ),
        (
            ["batch.loss"],
            "P.state_access() is ['batch.loss'], which is neither Read(), Write() nor a mapping. "
            'Write a mapping such as {"batch.loss": Read()}.',
        ),
        (
            None,
            "P.state_access() is None, which is neither Read(), Write() nor a mapping. "
            'Write a mapping such as {"batch.loss": Read()}.',
        ),
        (
            {"batch..loss": Read()},
            "P.state_access() declares the path 'batch..loss'. A path is names joined by dots, as \"batch.loss\".",
        ),
        (
            {"batch": {"": Read()}},
            "P.state_access() declares the path ''. A path is names joined by dots, as \"batch.loss\".",
        ),
        (
            {("batch", "loss"): Read()},
            "P.state_access() declares the path ('batch', 'loss'). A path is names joined by dots, as \"batch.loss\".",
        ),
        (
            {"resource": Write()},
            "P.state_access() declares 'resource': Write(). A resource has a name and is used or not used: "
            'write {"resource.rng": Write()}.',
        ),
        (
            {"resource.pyplot": Read()},
            "P.state_access() declares 'resource.pyplot': Read(). A resource has a name and is used or not used: "
            'write {"resource.pyplot": Write()}.',
        ),
        (
            {"cbstate._state": Write()},
            "P.state_access() declares 'cbstate._state': an entry's name does not begin with an underscore. "
            "Name it 'cbstate.state'.",
        ),
    ],
)
def test_what_cannot_be_read_is_said(access: Any, message: str) -> None:
    """Rule 4: an unknown first part and `Read` without parentheses are errors, and name the nearest valid path."""
    with pytest.raises(AccessError) as caught:
        declare(access, "P.state_access()")
    assert str(caught.value) == message


def test_declarations_are_values() -> None:
    assert (repr(Read()), repr(Read(optional=True)), repr(Write())) == ("Read()", "Read(optional=True)", "Write()")
    assert len({Read(), Read(), Read(optional=True), Write(), Write()}) == 3
    assert len({declare({"batch.x": Read()}, "one"), declare({"batch": {"x": Read()}}, "other")}) == 1


# --- the paths that a declaration grants


def test_a_path_covers_what_lies_below_it() -> None:
    """Rule 4: a declared path grants access to every path below it."""
    declaration = declare({"batch": Read(), "batch.x": Write(), "cbstate.a.b": Read(optional=True)}, "me")
    assert granted(declaration, ("batch",)) == Read()
    assert granted(declaration, ("batch", "loss", "deep")) == Read()
    assert granted(declaration, ("batch", "x", "deep")) == Write()
    assert granted(declaration, ("cbstate", "a")) is None
    assert granted(declaration, ("cbstate", "a", "b", "c")) == Read(optional=True)
    assert granted(declaration, ("cbstate", "a", "bc")) is None
    assert granted((), ("batch",)) is None


@given(st.lists(declarations, max_size=4), paths)
def test_a_union_grants_what_one_of_them_grants(several: list[Declaration], path: Path) -> None:
    """Rule 3: `setup` gets the union of all declarations of its callback."""
    each = [kind for declaration in several if (kind := granted(declaration, path)) is not None]
    expected: Read | Write | None = Write() if Write() in each else None
    reads = [kind for kind in each if isinstance(kind, Read)]
    if reads and expected is None:
        expected = Read(optional=all(kind.optional for kind in reads), full=any(kind.full for kind in reads))
    assert granted(union(several), path) == expected


# --- exchanges between ranks


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (Read(reduce="mean"), 'Read(reduce="mean")'),
        (Read(optional=True, reduce="max"), 'Read(optional=True, reduce="max")'),
        (Read(gather=True), "Read(gather=True)"),
        (Write(broadcast=True), "Write(broadcast=True)"),
        (Write(), "Write()"),
    ],
)
def test_an_exchange_is_printed_compared_and_hashed(kind: Read | Write, source: str) -> None:
    assert repr(kind) == source
    declaration = declare({"cbstate.best": kind}, "me")
    assert render(declaration) == f'{{"cbstate.best": {source}}}'
    assert declare(eval(render(declaration), {"Read": Read, "Write": Write}), "me") == declaration
    assert hash(declaration) == hash(declare({"cbstate": {"best": kind}}, "me"))
    plain = Write() if isinstance(kind, Write) else Read()
    assert (kind == plain) is not collective(kind)


def test_a_collective_is_an_exchange_of_values() -> None:
    assert [collective(kind) for kind in KINDS] == [False] * 5
    kinds: list[Read | Write] = [Read(reduce="min"), Read(gather=True), Write(broadcast=True)]
    assert all(map(collective, kinds))


def test_what_both_declarations_allow_is_the_value_of_this_rank_unless_both_ask_for_all() -> None:
    """`Callback.setup` sees the union, and no rank exchanges values there."""
    mean, total, several, plain = Read(reduce="mean"), Read(reduce="sum"), Read(gather=True), Read()
    cases: list[tuple[Read | Write, Read | Write, Read | Write]] = [
        (mean, mean, mean),
        (mean, total, plain),
        (mean, plain, plain),
        (several, plain, plain),
        (several, several, several),
        (Read(optional=True, reduce="mean"), mean, mean),
        (mean, Write(), Write()),
        (Write(broadcast=True), Write(), Write(broadcast=True)),
        (Write(broadcast=True), mean, Write(broadcast=True)),
    ]
    for one, other, both in cases:
        assert union([((LOSS, one),), ((LOSS, other),)]) == ((LOSS, both),)
        assert union([((LOSS, other),), ((LOSS, one),)]) == ((LOSS, both),)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"reduce": "average"},
            "Read(reduce='average'): the values of all ranks become their 'mean', 'sum', 'min' or 'max'. "
            'Write Read(reduce="mean"), or Read(gather=True) for a list of all values.',
        ),
        (
            {"reduce": "mean", "gather": True},
            'Read(reduce="mean", gather=True): a handler gets either one value for all ranks, or a list of their '
            'values. Write Read(reduce="mean") or Read(gather=True).',
        ),
        (
            {"full": True, "reduce": "sum"},
            'Read(full=True, reduce="sum"): full=True is for a series, and a series is not exchanged between ranks. '
            "Leave full=True out, or declare Read(full=True) for the series of this rank.",
        ),
        ({"gather": "all"}, "Read(gather='all'): gather is True or False. Write Read(gather=True)."),
        ({"optional": 1}, "Read(optional=1): optional is True or False. Write Read(optional=True)."),
    ],
)
def test_arguments_of_a_read_are_checked(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(AccessError) as error:
        Read(**arguments)
    assert str(error.value) == text


def test_arguments_of_a_write_are_checked() -> None:
    with pytest.raises(AccessError, match=r"^Write\(broadcast='main'\): broadcast is True or False\."):
        Write(untyped("main"))


@pytest.mark.parametrize(
    "access",
    [
        {"batch.loss": Read(reduce="mean")},
        {"cbstate.best": Read(gather=True), "batch": Read()},
        {"params": Read(gather=True), "batch.grads": Read(gather=True)},
        {"cbstate.best": Write(broadcast=True), "cbstate": Write()},
        {"model": Write(broadcast=True), "params.0.weight": Write(broadcast=True)},
        {"optimizer.hyperparams": Write(broadcast=True), "optimizer.gen.hyperparams": Write(broadcast=True)},
    ],
)
def test_values_that_ranks_can_exchange(access: Access) -> None:
    assert dict(declare(access, "me")) == {tuple(path.split(".")): kind for path, kind in access.items()}


_ENTRY = "Ranks exchange one entry of batch or cbstate as a whole, such as"
_SEND = (
    "The main rank can send an entry of cbstate, the model, its parameters, or optimizer.hyperparams. Write the value "
    'to an entry of cbstate, and send that: {"cbstate.sent": Write(broadcast=True)}.'
)


@pytest.mark.parametrize(
    ("access", "text"),
    [
        ({"batch": Read(gather=True)}, f'{_ENTRY} {{"batch.loss": Read(gather=True)}}.'),
        ({"data": Read(gather=True)}, f'{_ENTRY} {{"batch.loss": Read(gather=True)}}.'),
        ({"cbstate.a.b": Read(reduce="sum")}, f'{_ENTRY} {{"cbstate.a": Read(reduce="sum")}}.'),
        ({"optimizer.hyperparams": Read(reduce="mean")}, f'{_ENTRY} {{"batch.loss": Read(reduce="mean")}}.'),
        (
            {"params": Read(reduce="mean")},
            "Parameters and gradients are the same on every rank, or sharded. To see whole tensors declare all of "
            'them: {"params": Read(gather=True)}.',
        ),
        ({"model": Read(gather=True)}, 'To see whole tensors declare all of them: {"params": Read(gather=True)}.'),
        (
            {"batch.grads.0.weight": Read(gather=True)},
            'To see whole tensors declare all of them: {"batch.grads": Read(gather=True)}.',
        ),
        ({"batch.inputs": Write(broadcast=True)}, _SEND),
        ({"cbstate.a.b": Write(broadcast=True)}, _SEND),
        ({"resource.rng": Write(broadcast=True)}, _SEND),
        (
            {"optimizer": Write(broadcast=True)},
            "The ranks exchange the hyperparameters of an optimizer, and not the rest of it. Write "
            '{"optimizer.hyperparams": Write(broadcast=True)}.',
        ),
        (
            {"optimizer.gen.param_groups": Write(broadcast=True)},
            'Write {"optimizer.gen.hyperparams": Write(broadcast=True)}.',
        ),
        (
            {"batch.loss": Read(reduce="mean"), "batch": {"loss": Read()}},
            "me declares 'batch.loss': Read(), and declares the same path with Read(reduce=\"mean\"). A path has one "
            "of them: a handler that needs both values is two handlers, each with its own @on(..., access=...).",
        ),
        (
            {"batch.loss": Read(reduce="mean"), "batch": Write()},
            "me declares 'batch.loss': Read(reduce=\"mean\"), and 'batch': Write(), which reaches the value of this "
            "rank alone. Leave one of them out.",
        ),
        (
            {"cbstate.a": Read(gather=True), "cbstate.a.b": Read()},
            "me declares 'cbstate.a': Read(gather=True), and 'cbstate.a.b': Read(), which reaches the value of this "
            "rank alone. Leave one of them out.",
        ),
    ],
)
def test_values_that_ranks_cannot_exchange(access: Access, text: str) -> None:
    with pytest.raises(AccessError) as error:
        declare(access, "me")
    assert str(error.value).startswith("me declares '")
    assert str(error.value).endswith(text)
