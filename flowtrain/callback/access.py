"""Access declarations: `Read` and `Write` on the paths that a handler touches.

A user writes a declaration as a mapping from paths to access, dotted or nested; both of these mean the same::

    {"batch.loss": Read(), "cbstate.best": Write()}
    {"batch": {"loss": Read()}, "cbstate": {"best": Write()}}

`declare` checks it and brings it into the normal form that the rest of the library uses (`Declaration`). A path covers
everything below it. Different paths may reach the same state: `flowtrain.graph.reach` knows which ones do.

In a training on several ranks, which are processes with a batch each, a declaration may ask for a *collective*: an
exchange of values in which every rank takes part. `Read(reduce=...)` and `Read(gather=True)` show a handler the values
of all ranks, and `Write(broadcast=True)` sends the value that the main rank wrote to the others. In one process the
same handler sees its own value, or a list of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias, Union

from flowtrain.errors import AccessError
from flowtrain.errors.arguments import is_a, is_whole
from flowtrain.errors.describing import nearest

__all__ = [
    "REDUCTIONS",
    "ROOTS",
    "WHOLE",
    "Access",
    "Declaration",
    "Path",
    "Read",
    "Reduction",
    "Write",
    "at_event",
    "canonical",
    "collective",
    "declare",
    "dotted",
    "granted",
    "lag_of",
    "lags_of",
    "merged",
    "overlap",
    "render",
    "union",
]

Path: TypeAlias = tuple[str, ...]
"""The parts of a path: ``("batch", "loss")`` for ``batch.loss``."""

ROOTS = ("model", "lossfn", "optimizer", "data", "params", "batch", "cbstate", "callbacks", "resource")
"""The first parts that a path can have: the attributes of a view, and ``resource`` for things outside the learner."""

Reduction: TypeAlias = Literal["mean", "sum", "min", "max"]
"""How the values of all ranks become one."""

REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "min", "max")

WHOLE: tuple[Path, ...] = (("params",), ("batch", "grads"))
"""The paths at which ``Read(gather=True)`` puts sharded tensors together, instead of making a list of all values."""


@dataclass(frozen=True, slots=True)
class Read:
    """Declare that a handler reads the state at a path, and everything below it.

    Args:
        optional: The view gives ``None`` while the state does not exist, instead of a `MissingStateError`.
        full: The handler iterates over all values of a series at the path. This matters for deferrable callbacks only:
            an executor sends just the newest values of a series to another process, so the handler stays in this one.
        reduce: The handler gets one value made of those of all ranks, the same on every rank: their ``"mean"``,
            ``"sum"``, ``"min"`` or ``"max"``, element by element for tensors. In one process it is the value itself.
        gather: The handler gets a list of the values of all ranks, in the order of the ranks. In one process that list
            has one value. At ``params`` and ``batch.grads`` there is no list: tensors that are sharded over the ranks
            are put together, and others are shown as they are.

    Raises:
        AccessError: An argument has a wrong value, or two arguments exclude each other.
    """

    optional: bool = False
    full: bool = False
    reduce: Reduction | None = None
    gather: bool = False

    def __post_init__(self) -> None:
        _check_flags(self, "optional", "full", "gather")
        if self.reduce is not None and self.reduce not in REDUCTIONS:
            raise AccessError(
                f"Read(reduce={self.reduce!r}): the values of all ranks become their 'mean', 'sum', 'min' or 'max'. "
                f'Write Read(reduce="mean"), or Read(gather=True) for a list of all values.'
            )
        if self.reduce is not None and self.gather:
            raise AccessError(
                f"{self!r}: a handler gets either one value for all ranks, or a list of their values. "
                f"Write Read(reduce={_literal(self.reduce)}) or Read(gather=True)."
            )
        if self.full and collective(self):
            raise AccessError(
                f"{self!r}: full=True is for a series, and a series is not exchanged between ranks. Leave full=True "
                f"out, or declare Read(full=True) for the series of this rank."
            )

    def __repr__(self) -> str:
        return _render_access(self)


@dataclass(frozen=True, slots=True)
class Write:
    """Declare that a handler writes, and may read, the state at a path and everything below it.

    Args:
        broadcast: After the handler every rank gets the value that the main rank has at the path. In one process this
            does nothing.
        lag: After how many events, of the type and phase of the handler's event, the write arrives: before that event
            runs any handler. This is for handlers of a deferrable callback, which may take as long as that, and for
            entries of ``cbstate``. ``None``: the write is made at once.

    Raises:
        AccessError: An argument has a wrong value, or two arguments exclude each other.
    """

    broadcast: bool = False
    lag: int | None = None

    def __post_init__(self) -> None:
        _check_flags(self, "broadcast")
        if self.lag is None:
            return
        if not is_whole(self.lag) or self.lag < 1:
            raise AccessError(
                f"Write(lag={self.lag!r}): lag is after how many events the write arrives, a whole number of at least "
                f"1. Write Write(lag=1), or Write() for a write that is made at once."
            )
        if self.broadcast:
            raise AccessError(
                f"{self!r}: a write that arrives later is not sent to other ranks, since every rank makes it itself. "
                f"Write Write(lag={self.lag}) or Write(broadcast=True)."
            )

    def __repr__(self) -> str:
        return _render_access(self)


def collective(access: Read | Write) -> bool:
    """Tell whether an access asks for an exchange of values between ranks.

    >>> collective(Read(reduce="mean")), collective(Write())
    (True, False)
    """
    return access.broadcast if isinstance(access, Write) else access.gather or access.reduce is not None


def _check_flags(access: Read | Write, *names: str) -> None:
    for name in names:
        value: object = getattr(access, name)
        if not is_a(value, bool):
            kind = type(access).__name__
            raise AccessError(f"{kind}({name}={value!r}): {name} is True or False. Write {kind}({name}=True).")


def _render_access(access: Read | Write) -> str:
    """Return the source of an access, with the arguments that differ from their defaults."""
    given = {field.name: getattr(access, field.name) for field in fields(access)}
    shown = [f"{name}={_literal(value)}" for name, value in given.items() if value is not None and value is not False]
    return f"{type(access).__name__}({', '.join(shown)})"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


# typing.Union, because a forward reference in quotes does not take the | operator.
Access: TypeAlias = Mapping[str, Union[Read, Write, "Access"]]
"""A declaration as a user writes it, dotted or nested."""

Declaration: TypeAlias = tuple[tuple[Path, Read | Write], ...]
"""A declaration in normal form: one pair for each path, sorted by path. It is hashable, so views are cached by it."""


def declare(access: Access, owner: str) -> Declaration:
    """Bring a declaration into normal form.

    Args:
        access: The declaration as a callback returns it, dotted or nested.
        owner: The source of the declaration, for messages: ``"Printer.state_access()"``.

    Raises:
        AccessError: A path has something else than `Read()` or `Write()`, an unknown first part, or an empty part.
    """
    strongest: dict[Path, Read | Write] = {}
    for path, kind in _flatten(access, (), owner):
        if path[0] not in ROOTS:
            raise AccessError(
                f"{owner} declares {dotted(path)!r}, but a learner has no {path[0]!r}.{nearest(path[0], ROOTS)} "
                f"A path begins with one of: {', '.join(ROOTS)}."
            )
        # Two users of a resource always take turns, so reading it is no weaker than writing it.
        if path[0] == "resource" and (len(path) == 1 or isinstance(kind, Read)):
            raise AccessError(
                f"{owner} declares {dotted(path)!r}: {kind!r}. A resource has a name and is used or not used: "
                f'write {{"{dotted(path) if len(path) > 1 else "resource.rng"}": Write()}}.'
            )
        # The compiled views keep attributes of their own under such names.
        if path[0] in ("batch", "cbstate", "optimizer") and len(path) > 1 and path[1].startswith("_"):
            raise AccessError(
                f"{owner} declares {dotted(path)!r}: an entry's name does not begin with an underscore. "
                f"Name it {dotted((path[0], path[1].lstrip('_'), *path[2:]))!r}."
            )
        _check_collective(path, kind, strongest.get(path), owner)
        _check_lag(path, kind, owner)
        strongest[path] = _stronger(strongest.get(path), kind)  # a path may be there twice: dotted and nested
    _check_covering(strongest, owner)
    _check_lags(strongest, owner)
    return tuple(sorted(strongest.items(), key=lambda item: item[0]))


_EXCHANGED = ("batch", "cbstate")
"""The roots with entries that ranks exchange, each as a whole."""

_SENT = ("model", "params", "optimizer", "cbstate")
"""The roots below which the main rank can send a value to the others."""


def _check_collective(path: Path, kind: Read | Write, other: Read | Write | None, owner: str) -> None:
    """Check that the value at a path can be exchanged between ranks, if the access asks for that.

    Args:
        path: The path.
        kind: The access.
        other: The access that the same declaration has for this path too, written in another way.
        owner: The source of the declaration.
    """
    said = f"{owner} declares {dotted(path)!r}: {kind!r}"
    if other is not None and other != kind and (collective(kind) or collective(other)):
        raise AccessError(
            f"{said}, and declares the same path with {other!r}. A path has one of them: a handler that needs both "
            f"values is two handlers, each with its own @on(..., access=...)."
        )
    if not collective(kind):
        return
    if isinstance(kind, Write):
        if path[0] not in _SENT or (path[0] == "cbstate" and len(path) != 2):
            raise AccessError(
                f"{said}. The main rank can send an entry of cbstate, the model, its parameters, or "
                f"optimizer.hyperparams. Write the value to an entry of cbstate, and send that: "
                f'{{"cbstate.sent": Write(broadcast=True)}}.'
            )
        if path[0] == "optimizer" and path[-1] != "hyperparams":
            narrow = dotted((*(path if path[-1] != "param_groups" else path[:-1]), "hyperparams"))
            raise AccessError(
                f"{said}. The ranks exchange the hyperparameters of an optimizer, and not the rest of it. Write "
                f'{{"{narrow}": Write(broadcast=True)}}.'
            )
        return
    whole = kind.gather and path in WHOLE
    if whole or (path[0] in _EXCHANGED and len(path) == 2 and path not in WHOLE):
        return
    if path[0] in ("model", "params") or path[:2] == ("batch", "grads"):
        root = '"batch.grads"' if path[0] == "batch" else '"params"'
        raise AccessError(
            f"{said}. Parameters and gradients are the same on every rank, or sharded. To see whole tensors declare "
            f"all of them: {{{root}: Read(gather=True)}}."
        )
    raise AccessError(
        f"{said}. Ranks exchange one entry of batch or cbstate as a whole, such as "
        f'{{"{dotted(path[:2]) if path[0] in _EXCHANGED and len(path) > 1 else "batch.loss"}": {kind!r}}}.'
    )


def _check_covering(declared: Mapping[Path, Read | Write], owner: str) -> None:
    """Check that a path with the values of all ranks shows these, and not the value of this rank by another path."""
    for path, kind in declared.items():
        if isinstance(kind, Write) or not collective(kind):
            continue
        for other, access in declared.items():
            above = other == path[: len(other)]
            if other != path and overlap(path, other) and (not above or isinstance(access, Write)):
                raise AccessError(
                    f"{owner} declares {dotted(path)!r}: {kind!r}, and {dotted(other)!r}: {access!r}, which reaches "
                    f"the value of this rank alone. Leave one of them out."
                )


def _check_lag(path: Path, kind: Read | Write, owner: str) -> None:
    """Check that a write that arrives later is one to an entry of ``cbstate``."""
    if lag_of(kind) is not None and (path[0] != "cbstate" or len(path) < 2):
        raise AccessError(
            f"{owner} declares {dotted(path)!r}: {kind!r}. Only entries of cbstate, named one by one, can be written "
            f'with a lag: training itself uses all other state at once. Write {{"cbstate.scores": {kind!r}}} and read '
            f"that entry where the value is needed."
        )


def _check_lags(declared: Mapping[Path, Read | Write], owner: str) -> None:
    """Check that one handler writes nothing with two lags, or both with a lag and at once."""
    for path, kind in declared.items():
        for other, access in declared.items():
            below = path != other and path == other[: len(path)]
            if below and isinstance(kind, Write) and isinstance(access, Write) and kind.lag != access.lag:
                raise AccessError(
                    f"{owner} declares {dotted(path)!r}: {kind!r}, and {dotted(other)!r}: {access!r}, which is a part "
                    f"of it. What is written there would have two lags. Leave one of them out."
                )


def _flatten(access: object, prefix: Path, owner: str) -> Iterator[tuple[Path, Read | Write]]:
    """Yield the paths of a nested declaration with their access; `prefix` is the path of `access` itself."""
    if not isinstance(access, Mapping):
        where = f"{owner} declares {dotted(prefix)!r}: " if prefix else f"{owner} is "
        if access is Read or access is Write:
            name = "Read" if access is Read else "Write"
            raise AccessError(f"{where}{name} without parentheses. Write {name}(), an instance of it.")
        raise AccessError(
            f"{where}{access!r}, which is neither Read(), Write() nor a mapping. "
            f'Write a mapping such as {{"batch.loss": Read()}}.'
        )
    for key, value in access.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise AccessError(f'{owner} declares the path {key!r}. A path is names joined by dots, as "batch.loss".')
        path = (*prefix, *key.split("."))
        if isinstance(value, (Read, Write)):
            yield path, value
        else:
            yield from _flatten(value, path, owner)


def _stronger(one: Read | Write | None, other: Read | Write) -> Read | Write:
    """Return the access that allows all that either of two allows; `Write` includes reading."""
    if one is None or one == other:
        return other
    if isinstance(one, Write) or isinstance(other, Write):
        writes = [each for each in (one, other) if isinstance(each, Write)]
        # A write that one of two handlers makes at once is made at once by their union, which `setup` gets.
        lags = [each.lag for each in writes if each.lag is not None]
        return Write(any(each.broadcast for each in writes), min(lags) if len(lags) == len(writes) else None)
    # A read that is optional for one of two handlers is still required by the other. A value of this rank alone is
    # what both handlers can get where only one of them asks for the values of all ranks.
    both = Read(optional=one.optional and other.optional, full=one.full or other.full)
    alike = (one.reduce, one.gather) == (other.reduce, other.gather)
    return replace(both, reduce=one.reduce, gather=one.gather) if alike else both


def union(declarations: Iterable[Declaration]) -> Declaration:
    """Return one declaration that allows all that any of several allows.

    For each path `Write` beats `Read`, and `Read` beats an optional read. A `Read` is full if one of several is full,
    and reduced or gathered if all are so in the same way.
    """
    strongest: dict[Path, Read | Write] = {}
    for declaration in declarations:
        for path, kind in declaration:
            strongest[path] = _stronger(strongest.get(path), kind)
    return tuple(sorted(strongest.items(), key=lambda item: item[0]))


def merged(found: Declaration, declared: Mapping[Path, Read | Write]) -> Declaration:
    """Return the access that a run has found, with the exchanges that are declared: no run can find these."""
    return tuple(
        (path, known if type(known) is type(kind) and collective(known) else kind)
        for path, kind in found
        for known in [declared.get(path, kind)]
    )


def granted(declaration: Declaration, path: Path) -> Read | Write | None:
    """Return the strongest access that a declaration gives at a path; ``None`` where the path is not declared.

    A path is declared if the declaration names the path itself or a path above it.
    """
    strongest: Read | Write | None = None
    for declared, kind in declaration:
        if path[: len(declared)] == declared:
            strongest = _stronger(strongest, kind)
    return strongest


def lag_of(kind: Read | Write) -> int | None:
    """Return after how many events a write arrives; ``None`` for a write that is made at once, and for a read."""
    return kind.lag if isinstance(kind, Write) else None


def lags_of(declaration: Declaration) -> dict[Path, int]:
    """Return the paths that a handler writes with a lag, each with the lag.

    >>> lags_of(declare({"batch.loss": Read(), "cbstate.scores": Write(lag=2)}, "example"))
    {('cbstate', 'scores'): 2}
    """
    return {path: lag for path, kind in declaration if (lag := lag_of(kind)) is not None}


def at_event(declaration: Declaration) -> Declaration:
    """Return what a handler does to the state at its own event: a write with a lag only reads there.

    >>> render(at_event(declare({"cbstate.scores": Write(lag=2)}, "example")))
    '{"cbstate.scores": Read(optional=True)}'
    """
    return tuple((path, kind if lag_of(kind) is None else Read(optional=True)) for path, kind in declaration)


def dotted(path: Path) -> str:
    """Return a path as the user writes it.

    >>> dotted(("batch", "loss"))
    'batch.loss'
    """
    return ".".join(path)


def render(declaration: Declaration) -> str:
    """Return a declaration as source code, which a message shows so that the user can paste it.

    >>> render(declare({"batch": {"loss": Read()}}, "example"))
    '{"batch.loss": Read()}'
    """
    return "{" + ", ".join(f"{_quoted(path)}: {kind!r}" for path, kind in declaration) + "}"


def _quoted(path: Path) -> str:
    """Return a path as a string literal in double quotes, as the formatters write it, where that needs no escapes."""
    text = dotted(path)
    return f'"{text}"' if text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


def canonical(path: Path) -> Path:
    """Return a path without the alias ``params``, which stands for the parameters of ``model``.

    >>> canonical(("params", "0", "weight"))
    ('model', '0', 'weight')
    """
    return ("model", *path[1:]) if path[0] == "params" else path


def overlap(one: Path, other: Path) -> bool:
    """Tell whether two canonical paths overlap: they are equal, or one is a prefix of the other.

    Two paths that do not overlap may still reach one object, such as a parameter that an optimizer holds:
    `flowtrain.graph.reach` finds these.
    """
    return one[: len(other)] == other[: len(one)]
