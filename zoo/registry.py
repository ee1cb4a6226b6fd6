"""One registry for every kind of plugin: names to classes, resolved when they are asked for."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from zoo.errors import PluginError, UnknownNameError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes of one kind.

    A name resolves to, in this order: a class registered in this process, a built-in ("module:Class", imported when
    asked for), an installed entry point of `group`. A string with a colon is a class itself: `package.module:Class` or
    `path/to/file.py:Class`.
    """

    def __init__(self, kind: str, base: Callable[[], type[T]], group: str, builtins: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._builtins = builtins
        self._registered: dict[str, type[T]] = {}
        self._entry_points: dict[str, list[EntryPoint]] | None = None

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: `@register("my_mixer")`. Raises PluginError when another class holds the name."""

        def add(cls: type[T]) -> type[T]:
            if not (isinstance(cls, type) and issubclass(cls, self._base())):
                raise PluginError(
                    f"{self.kind} {name!r}: {cls!r} is not a subclass of zoo.{self._base().__name__}; "
                    "derive it from that."
                )
            if ":" in name or not name:
                raise PluginError(f"{self.kind} name {name!r} must not be empty or hold ':'; choose another name.")
            holder = self._registered.get(name)
            if name in self._builtins and f"{cls.__module__}:{cls.__qualname__}" != self._builtins[name]:
                raise PluginError(
                    f"{self.kind} name {name!r} is taken by the built-in {self._builtins[name]}; choose another name."
                )
            # The same class seen again (a plugin file that another one imports as a module) is no collision.
            if holder is not None and _place(holder) != _place(cls):
                raise PluginError(
                    f"{self.kind} name {name!r} is taken by {holder.__module__}:{holder.__qualname__}; "
                    "choose another name."
                )
            for point in self._points().get(name, []):
                if point.value != f"{cls.__module__}:{cls.__qualname__}":
                    raise PluginError(
                        f"{self.kind} name {name!r} is taken by the installed {_origin(point)}; choose another name."
                    )
            self._registered[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Every name that can be asked for, sorted; nothing is imported."""
        return sorted({*self._builtins, *self._registered, *self._points()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return name in self._builtins or name in self._registered or name in self._points()

    def is_builtin(self, name: str) -> bool:
        return name in self._builtins

    def get(self, name: str) -> type[T]:
        """The class behind `name`.

        Raises:
            UnknownNameError: no such name; the nearest one is suggested.
            PluginError: the plugin that holds the name fails to import, collides with another, or gives a wrong class.
        """
        if not isinstance(name, str):
            raise UnknownNameError(f"a {self.kind} name must be text, not {name!r}.")
        if name in self._registered:
            return self._registered[name]
        if name in self._builtins:
            return self._load(name, self._builtins[name])
        if ":" in name:
            return self._load(name, name)
        points = self._points().get(name, [])
        if len({point.value for point in points}) > 1:
            raise PluginError(
                f"{self.kind} name {name!r} is claimed by {' and by '.join(_origin(point) for point in points)}; "
                "uninstall one, or name the class: 'module:Class'."
            )
        if points:
            return self._load(name, points[0].value, origin=_origin(points[0]))
        if name.endswith(".py"):
            raise UnknownNameError(f"{self.kind} {name!r} is a file; name the class in it too: {name + ':Class'!r}.")
        raise UnknownNameError(
            f"unknown {self.kind} {name!r}.{did_you_mean(name, self.names())} Known: {', '.join(self.names())}. "
            f"A {self.kind} of your own: --plugin FILE.py, or 'module:Class'."
        )

    def summary(self, name: str) -> str:
        """The first line of the class's docstring. A built-in is read, not imported: importing torch takes seconds."""
        if name in self._builtins and name not in self._registered:
            module, _, attribute = self._builtins[name].partition(":")
            spec = importlib.util.find_spec(module)
            source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
            classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == attribute]
            docstring = ast.get_docstring(classes[0]) if classes else None
        else:
            docstring = self.get(name).__doc__
        return (docstring or "").strip().partition("\n")[0]

    def version(self, name: str) -> str:
        """The class's `version`; for a plugin, the hash of its source too, so that an edit is a new version."""
        cls = self.get(name)
        version = str(getattr(cls, "version", 1))
        if self.is_builtin(name):
            return version
        try:
            file = inspect.getsourcefile(cls)
        except TypeError:
            file = None
        if file is None:
            return version
        source = b"".join(path.read_bytes() for path in _sources(cls.__module__, file))
        return f"{version}+{hashlib.sha256(source).hexdigest()[:12]}"

    def check_installed(self) -> dict[str, str]:
        """Load every entry point; the errors of those that fail, by name. Nothing is raised: the others go on."""
        errors = {}
        for name, points in self._points().items():
            try:
                if name in self._builtins:
                    raise PluginError(
                        f"{self.kind} {name!r} from {_origin(points[0])} collides with the built-in "
                        f"{self._builtins[name]}, which is used; rename the entry point."
                    )
                self.get(name)
            except PluginError as error:
                errors[name] = str(error)
        return errors

    def _points(self) -> dict[str, list[EntryPoint]]:
        if self._entry_points is None:
            self._entry_points = {}
            for point in entry_points(group=self.group):
                self._entry_points.setdefault(point.name, []).append(point)
        return self._entry_points

    def _load(self, name: str, target: str, origin: str | None = None) -> type[T]:
        module_name, _, attribute = target.rpartition(":")
        where = origin or repr(target)
        try:
            module = load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.kind} {name!r} cannot be loaded from {where}: {_describe(error)}") from error
        cls = getattr(module, attribute, None)
        if not (isinstance(cls, type) and issubclass(cls, self._base())):
            classes = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, self._base())]
            found = "is missing" if cls is None else f"is {cls!r}"
            raise PluginError(
                f"{self.kind} {name!r} from {where}: {attribute!r} {found}; expected a subclass of "
                f"zoo.{self._base().__name__}.{did_you_mean(attribute, classes)}"
            )
        return cls


def _place(cls: type) -> tuple[str, str]:
    """The file, or else the module, of a class, and its name there."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return str(Path(file).resolve()) if file else cls.__module__, cls.__qualname__


@functools.cache
def _sources(module: str, file: str) -> tuple[Path, ...]:
    """The file of a plugin's module, and those that this imports from its folder or package, at any depth."""
    own = Path(file).resolve()
    files, seen, waiting = {own}, {module}, [sys.modules[module]]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            name = str(value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None))
            imported = sys.modules.get(name)
            if name in seen or imported is None:
                continue
            seen.add(name)
            path = Path(getattr(imported, "__file__", None) or "").resolve()
            beside = path.parent == own.parent and "site-packages" not in path.parts
            if path.suffix == ".py" and (beside or _package(name) == _package(module)):
                files.add(path)
                waiting.append(imported)
    return tuple(sorted(files))


def _package(module: str) -> str:
    return module.partition(".")[0]


def load_plugins(plugins: Iterable[str]) -> None:
    """Import every plugin: a file that ends in .py, or a module. Raises PluginError that names it."""
    for plugin in plugins:
        if plugin.endswith(".py"):
            load_file(plugin)
            continue
        try:
            importlib.import_module(plugin)
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"plugin module {plugin!r} fails to import: {_describe(error)}") from error


def load_file(path: str | Path) -> ModuleType:
    """Import a plugin file once per process; its module name is derived from the path, so classes in it can be pickled.

    Raises PluginError when the file is missing or fails to import.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise PluginError(f"plugin file {str(path)!r} does not exist; give the path of a Python file.")
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"zoo_plugin_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {str(path)!r} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, PluginError):
            raise PluginError(f"plugin file {str(path)!r}: {error}") from error
        raise PluginError(f"plugin file {str(path)!r} fails to import: {_describe(error)}") from error
    return module


def _origin(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    return f"entry point {point.name!r}{package} ({point.value})"


def _describe(error: BaseException) -> str:
    """Type, message and the deepest line that ran in the plugin's own folder (a syntax error says its own)."""
    ours = (__file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename not in ours and not f.filename.startswith("<frozen ")]
    inside = [f for f in theirs if Path(f.filename).is_relative_to(Path(theirs[0].filename).parent)]
    where = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {error}{where}"
