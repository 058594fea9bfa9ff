"""Parts of containers: a view shows a `Part` where a handler declares only paths inside a container.

With ``Write`` on ``cbstate.tracehistory.GradNorm``, ``learner.cbstate.tracehistory`` is a `Part` that has this one
series in every phase, since a path leaves out the phase. With ``Read`` on ``params.encoder.weight``,
``learner.params`` is a `Part` with one parameter.

A `Part` looks its container up at each use, so it stays valid when the container is replaced. It asks its `Owner` to
refuse everything that is not declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from flowtrain.callback.access import WHOLE, Declaration, Path, Read, Write, dotted, granted, render, union
from flowtrain.callback.phases import Phase, as_phase
from flowtrain.errors import MissingStateError, ProtectedException, UsageError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.container import Tree
from flowtrain.state.detached import detached
from flowtrain.state.late_writes import LatePart
from flowtrain.state.readonly import readonly
from flowtrain.state.series import SeriesMap

__all__ = ["Owner", "Part", "tree", "writes"]


def tree(declaration: Declaration) -> Tree:
    """Return a declaration as nested dictionaries, by the parts of its paths.

    Where a path and a path below it are both declared, the access of the shorter path gets the empty name.

    >>> from flowtrain.callback.access import declare
    >>> tree(declare({"batch.loss": Read(), "batch.inputs": Read()}, "example"))
    {'batch': {'inputs': Read(), 'loss': Read()}}
    """
    root: Tree = {}
    for path, kind in declaration:
        level = root
        for name in path[:-1]:
            inner = level.setdefault(name, {})
            if not isinstance(inner, dict):  # the shorter path, which sorts first, is declared too
                inner = level[name] = {"": inner}
            level = inner
        level[path[-1]] = kind
    return root


@dataclass(frozen=True)
class Owner:
    """The callback that a view belongs to, with the text to edit, so that a refusal can name both.

    Attributes:
        callback: The name of the callback in the learner.
        type_name: The name of the type of the callback.
        where: The place of the declaration: ``"state_access"``, the handler whose `on` has ``access=``, or
            ``"access="``.
        declaration: The declaration in that place.
        decorator: The source of the handler's decorator up to the access; empty for ``state_access``.
        passed: The declaration that the user passed to the callback as ``access=``, if there is one.
        consumes: Whether the view is for a handler of a deferrable callback, which sees detached tensors even where it
            runs in place, and asks the loop for nothing.
        copied: Whether the view shows copies, which need not be detached.
        remedy: What the user changes where a declared path does not exist; empty for a change of the declaration.
        exchanged: While the handler runs, the values of all ranks by the paths that it declares with ``reduce=`` or
            ``gather=``; ``None`` in one process, and in `Callback.setup`.
    """

    callback: str
    type_name: str
    where: str
    declaration: Declaration
    decorator: str = ""
    passed: Declaration | None = None
    consumes: bool = False
    copied: bool = False
    remedy: str = ""
    exchanged: dict[Path, Any] | None = field(default=None, compare=False)

    def of_all_ranks(self, path: Path, access: Read, find: Callable[[], Any]) -> Any:
        """Return the value at a path that is declared with ``reduce=`` or ``gather=``.

        Args:
            path: The path.
            access: The access that is declared for it.
            find: A function that returns the value of this rank as the handler may see it.
        """
        exchanged = self.exchanged
        if exchanged is not None and path in exchanged:
            found = exchanged[path]
            return [self.shown(value, path) for value in found] if path in self.gathered else self.shown(found, path)
        if path in WHOLE:  # every rank has all of it
            return find()
        if exchanged is not None:
            raise UsageError(
                f"{self.callback} reads {dotted(path)}, declared with {access!r}, and its handler does not run now. "
                f"The ranks exchange the value for one call of the handler: keep the value, and not `learner`."
            )
        try:
            value = find()
        except MissingStateError:
            if not access.optional:
                raise
            value = None
        return [value] if access.gather else value

    def shown(self, value: Any, path: Path) -> Any:
        """Return a value as a handler sees it that declares to read the path: read-only, and detached if deferrable."""
        if self.detaches and not (path[0] == "params" and self.keeps_params):
            value = detached(value)
        return readonly(value, dotted(path))

    @property
    def detaches(self) -> bool:
        """Whether the view detaches what it shows."""
        return self.consumes and not self.copied

    @property
    def gathered(self) -> list[Path]:
        """The paths at which the handler sees a list of the values of all ranks."""
        return [path for path, kind in self.declaration if isinstance(kind, Read) and kind.gather and path not in WHOLE]

    @property
    def keeps_params(self) -> bool:
        """Whether the parameters stay as they are, since the handler compares them with those of another path.

        These are the parameters of ``model``, and the keys of the optimizer's state; a detached tensor is another
        object.
        """
        paths = [path for path, _ in self.declaration]
        return ("model",) in paths or any(path[0] == "optimizer" and path[-1] != "hyperparams" for path in paths)

    def refuse(self, access: str, path: Path) -> NoReturn:
        """Raise the `ProtectedException` for a path, with the declaration to paste.

        Args:
            access: ``"Read"`` or ``"Write"``: the access that is not declared.
            path: The path. It may be declared with `Read()`, which the new declaration then replaces.
        """
        own = self.declaration if self.passed is None else self.passed
        declares = "declares" if self.passed is None else "was given access to"
        reason = f"{self.callback} {declares} {render(own) if own else 'nothing'}."
        target = path
        if path[0] == "optimizer" and path[-1] == "param_groups":
            # Most code that touches the groups wants the learning rate only, and conflicts less by the narrower path.
            target = (*path[:-1], "hyperparams")
            reason += (
                f" param_groups reach the parameters too. The learning rates are at learner.{dotted(target)}, the same "
                f"groups without the parameters, and these are at learner.params. Write "
                f'learner.{dotted(target)}[0]["lr"] instead.'
            )
            if granted(self.declaration, target) is not None:
                raise ProtectedException(access, dotted(path), reason)
        needed = render(union([own, ((target, Write() if access == "Write" else Read()),)]))
        place = f"In {self.type_name}.{self.where} write"
        if self.passed is not None:
            place, paste = "Pass it what its function touches", f"{self.type_name}(..., access={needed})"
        elif self.decorator:
            paste = f"{self.decorator}access={needed})"
        else:
            paste = f"def state_access(self) -> Access:\n        return {needed}"
        raise ProtectedException(access, dotted(path), f"{reason} {place}:\n\n    {paste}\n")

    def missing(self, path: Path, cause: BaseException | None) -> NoReturn:
        """Raise the `MissingStateError` for a declared path at which nothing exists.

        Args:
            path: The path.
            cause: The exception of the look-up, whose text becomes part of the message: it may have been raised within
                a property.
        """
        reason = f" {cause}" if isinstance(cause, AttributeError) else ""
        declare = f'If that is expected, declare {{"{dotted(path)}": Read(optional=True)}} and handle None.'
        raise MissingStateError(
            dotted(path),
            f"{self.callback} reads Learner.{dotted(path)}, and there is nothing.{reason} {self.remedy or declare}",
        ) from cause


class Part(Mapping[Any, Any]):
    """The declared items of one container, as a mapping and as a namespace; by phase if the container is by phase.

    Args:
        owner: The callback that the view belongs to.
        path: The path of the container.
        inside: The declarations below the path.
        find: A function that returns the container.
    """

    __slots__ = ("_by_phase", "_find", "_owner", "_path", "_pushes", "_tree")

    def __init__(self, owner: Owner, path: Path, inside: Tree, find: Callable[[], Any]) -> None:
        self._owner = owner
        self._path = path
        self._tree = inside
        self._find = find
        self._by_phase: dict[Phase, Part] = {}
        # The `push` of each series whose declaration was checked, so that later calls cost one look-up.
        self._pushes: dict[str, Callable[[Any, int], None]] = {}

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to a series that is declared with `Write()`.

        Args:
            name: The name of the series.
            value: A number, or a tensor of one element.
            step: The number of the step.

        Raises:
            TypeError: The container has no series.
            ProtectedException: The series is not declared with `Write()`.
        """
        push = self._pushes.get(name)
        if push is None:
            container = self._find()
            if not _holds_series(container):
                raise TypeError(
                    f"Learner.{dotted(self._path)} is a {type(container).__name__}, and only series take push(). "
                    f"Assign to its items or attributes instead."
                )
            self._must_write(name)
            push = self._pushes[name] = container.series(name).push
        push(value, step)

    def __getitem__(self, key: Any) -> Any:
        part = self._by_phase.get(key)
        if part is not None:
            return part
        if as_phase(key) is not None:
            phase, find = key if isinstance(key, Phase) else key(), self._find
            # The function refers to `find` and not to `self`, which holds the part: that would be a reference cycle.
            part = Part(self._owner, self._path, self._tree, lambda: find()[phase])
            self._by_phase[phase] = part
            return part
        return self._item(str(key))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._item(name)

    def _item(self, name: str) -> Any:
        """Return an item as the owner may see it: the item itself, a read-only twin, or a `Part` of it."""
        path = (*self._path, *name.split("."))
        access = granted(self._owner.declaration, path)
        inner = self._tree.get(name)
        # An item that may be read as a whole is a part too, if something inside it may be written.
        if isinstance(inner, dict) and (access is None or (isinstance(access, Read) and writes(inner))):
            return Part(self._owner, path, inner, lambda: _get_item(self._find(), name))
        if access is None:
            self._owner.refuse("Read", path)
        try:
            container = self._find()
            if _holds_series(container) and isinstance(access, Write):  # a writer may make the series here
                return container.series(name)
            value = _get_item(container, name)
        except (KeyError, AttributeError) as error:
            if isinstance(access, Read) and access.optional:
                return None
            self._owner.missing(path, error)
        return value if isinstance(access, Write) else self._owner.shown(value, path)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._must_write(key)
        self._find()[key] = value

    def __delitem__(self, key: Any) -> None:
        self._must_write(key)
        del self._find()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Part.__slots__:  # assigned by the constructor
            object.__setattr__(self, name, value)
            return
        self._must_write(name)
        setattr(self._find(), name, value)

    def __delattr__(self, name: str) -> None:
        self._must_write(name)
        delattr(self._find(), name)

    def _must_write(self, key: Any) -> None:
        """Refuse to write an item that is not declared with `Write()`."""
        # A path leaves out the phase, so to replace the item of a phase is to write the container.
        path = self._path if as_phase(key) is not None else (*self._path, *str(key).split("."))
        if not isinstance(granted(self._owner.declaration, path), Write):
            self._owner.refuse("Write", path)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the item of a key, or the default if the container has no such item."""
        return self[key] if key in self else default  # noqa: SIM401  # this is `get` itself

    def __contains__(self, key: object) -> bool:
        path = (*self._path, *str(key).split("."))
        if as_phase(key) is None and str(key) not in self._tree and granted(self._owner.declaration, path) is None:
            self._owner.refuse("Read", path)
        try:
            container = self._find()
        except (KeyError, AttributeError):
            return False
        return key in container if isinstance(container, Mapping) else hasattr(container, str(key))

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the call of a module, since the call reads all of the module and not only a part."""
        self._owner.refuse("Read", self._path)

    def __iter__(self) -> Iterator[Any]:
        container = self._find()
        if isinstance(container, PhaseMap):
            return iter(list(container))
        if not isinstance(container, Mapping):
            return iter([name for name in self._tree if name])
        return iter([key for key in container if granted(self._owner.declaration, (*self._path, *str(key).split(".")))])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Part(Learner.{dotted(self._path)}: {', '.join(name for name in self._tree if name)})"


def _holds_series(container: Any) -> bool:
    """Tell whether a container holds series by name; one that is written with a lag says it itself."""
    return isinstance(container, SeriesMap) or (isinstance(container, LatePart) and container.holds_series)


def writes(inside: Tree) -> bool:
    """Tell whether anything in a nested declaration is a `Write`."""
    return any(writes(kind) if isinstance(kind, dict) else isinstance(kind, Write) for kind in inside.values())


def _get_item(container: Any, name: str) -> Any:
    """Return an item of a container by name: a key of a mapping, or an attribute of any other object."""
    if isinstance(container, Mapping):
        return container[name]
    return getattr(container, name)
