"""Private names of TensorFlow and Keras stand in `tfqcomm/_tf_private.py` and nowhere else.

Also here: what the sources must not hold at all.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import pytest

import tfqcomm

ROOT = pathlib.Path(__file__).parent.parent
SEAM = ROOT / "tfqcomm" / "_tf_private.py"

PACKAGE = sorted((ROOT / "tfqcomm").rglob("*.py"))
EVERYTHING = PACKAGE + [
    path
    for folder in ("models", "experiments", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != pathlib.Path(__file__)
]

PRIVATE_PATHS = re.compile(r"tensorflow\.python|tensorflow\.core|keras\.src|\btf\.__internal__")

# Public, though they begin with an underscore: of namedtuples, of `os`, what Python itself gives to
# abstract classes, and our own seam.
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit", "_abc_impl", "_tf_private"}


def path_id(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def is_private(name: object) -> bool:
    if not isinstance(name, str) or name in PUBLIC:
        return False
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_no_private_module(path):
    if path != SEAM:
        assert not PRIVATE_PATHS.findall(path.read_text())


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_no_private_attribute_of_another_object(path):
    """`self._x` is one's own; `extended._x`, and `getattr(extended, "_x")`, are somebody else's.

    A test may look inside what it imports from tfqcomm: `selection._candidates`.
    """
    if path == SEAM:
        return
    tree = ast.parse(path.read_text())
    own = {"self", "cls", "super()"} | (
        imported_from_tfqcomm(tree) if "tests" in path.parts else set()
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            assert owner in own, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "getattr",
            "setattr",
            "hasattr",
        }:
            name = getattr(node.args[1], "value", None)
            assert not is_private(name), f"line {node.lineno}: {ast.unparse(node)}"


def imported_from_tfqcomm(tree: ast.AST) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "tfqcomm"
        for alias in node.names
    }


@functools.cache
def private_names_of(host: type) -> set[str]:
    """The private methods of a TensorFlow or Keras class and what its methods set on `self`."""
    names = {name for name in vars(host) if is_private(name)}
    with contextlib.suppress(OSError, TypeError):  # a class without Python source
        names |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(host)))
    return names


def own_classes() -> list[type]:
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(tfqcomm.__path__, "tfqcomm.")
        if not info.name.endswith("._tf_private")
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("cls", own_classes(), ids=lambda cls: cls.__qualname__)
def test_no_private_name_of_a_base_class(cls):
    """A subclass of a Keras or TensorFlow class overrides and reads only what is public there."""
    hosts = [b for b in cls.__mro__ if b.__module__.split(".")[0] in {"keras", "tensorflow"}]
    theirs = set().union(*map(private_names_of, hosts))
    used = {name for name in vars(cls) if is_private(name)}
    used |= set(re.findall(r"\b(?:self|cls|super\(\))\.(_[a-z]\w*)", inspect.getsource(cls)))
    taken = used & theirs
    assert not taken


@pytest.mark.parametrize("path", PACKAGE, ids=path_id)
def test_package_raises_real_errors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplemented" not in ast.unparse(node.exc), f"line {node.lineno}: a stub"


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_nothing_is_left_to_do(path):
    assert not re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())
