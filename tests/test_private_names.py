"""Private names of TensorFlow and Keras stand in `tfqcomm/_tf_private/` and nowhere else.

But for its probe, which must know each of them. Also here: what the sources must not hold at all.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import keras
import pytest

import tfqcomm
from tfqcomm._tf_private import probe

ROOT = pathlib.Path(__file__).parent.parent
SEAM = sorted((ROOT / "tfqcomm" / "_tf_private").glob("*.py"))

PACKAGE = sorted((ROOT / "tfqcomm").rglob("*.py"))
EVERYTHING = PACKAGE + [
    path
    for folder in ("models", "experiments", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != pathlib.Path(__file__)
]

PRIVATE_PATHS = re.compile(r"tensorflow\.python|tensorflow\.core|keras\.src|\btf\.__internal__")

# Public, though they begin with an underscore: of namedtuples, of `os`, what Python itself gives to
# abstract classes, and our own seam.
PUBLIC = {
    "_replace",
    "_asdict",
    "_fields",
    "_make",
    "_exit",
    "_abc_impl",
    "_tf_private",
}


def path_id(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def is_private(name: object) -> bool:
    if not isinstance(name, str) or name in PUBLIC:
        return False
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_no_private_module(path):
    if path not in SEAM:
        assert not PRIVATE_PATHS.findall(path.read_text())


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_no_private_attribute_of_another_object(path):
    """`self._x` is one's own; `extended._x`, and `getattr(extended, "_x")`, are somebody else's.

    A test may look inside what it imports from tfqcomm: `selection._candidates`.
    """
    if path in SEAM:
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
        if "._tf_private" not in info.name
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


SEAM_TREE = ast.Module(
    [node for path in SEAM if path.stem != "probe" for node in ast.parse(path.read_text()).body], []
)


def own_names_of_the_seam() -> set[str]:
    """What the seam defines, and what its classes and functions set on objects."""
    names = set()
    for node in ast.walk(SEAM_TREE):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(getattr(node, "attr", None) or node.id)
    return names


def private_names_of_the_seam() -> set[str]:
    """Every private attribute that it reads, calls or wraps."""
    names = set()
    for node in ast.walk(SEAM_TREE):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "_wrap"}:
            names.add(getattr(node.args[1], "value", None))
    return {name for name in names if is_private(name)}


def test_every_private_name_is_probed():
    """Or an upgrade that renames it would be an error in the middle of a run."""
    probed = {name.rpartition(":")[2].rpartition(".")[2] for name in probe.NAMES}
    probed |= {name for names in probe.SET.values() for name in names}
    probed |= probe.OPTIONAL
    assert not private_names_of_the_seam() - own_names_of_the_seam() - probed


def test_every_private_module_is_probed():
    probed = " ".join([*probe.NAMES, *probe.SET])
    for node in ast.walk(SEAM_TREE):
        if isinstance(node, ast.ImportFrom) and PRIVATE_PATHS.match(node.module):
            for alias in node.names:  # a module, or a name in one
                whole = {f"{node.module}.{alias.name}:", f"{node.module}:{alias.name}"}
                assert any(name in probed for name in whole), f"{node.module}, {alias.name}"


@pytest.mark.parametrize(
    ("owner", "change", "message"),
    [
        (keras.Model, {"_symbolic_build": None}, "keras:Model._symbolic_build is missing"),
        (
            keras.Optimizer,
            {"_clip_gradients": lambda self, gradients: None},
            "keras:Optimizer._clip_gradients takes (self, gradients), where ('grads',) was expec",
        ),
        (
            keras.Optimizer,
            {"update_step": lambda self, gradient, variable, learning_rate, state: None},
            "keras:Optimizer.update_step takes (self, gradient, variable, learning_rate, state), ",
        ),
    ],
)
def test_a_name_that_an_upgrade_changed_is_one_clear_error(monkeypatch, owner, change, message):
    ((name, new),) = change.items()
    base = next(base for base in owner.__mro__ if name in vars(base))
    if new is None:
        monkeypatch.delattr(base, name)
    else:
        monkeypatch.setattr(base, name, new)
    with pytest.raises(ImportError) as caught:
        probe.check()
    assert message in str(caught.value)
    assert str(caught.value).startswith("tfqcomm does not fit the installed TensorFlow 2.")
    assert f"It was checked on {probe.CHECKED_ON}" in str(caught.value)


def test_an_attribute_that_a_class_no_longer_sets_is_named(monkeypatch):
    monkeypatch.setitem(probe.SET, "keras:Model", ("_no_such_attribute",))
    with pytest.raises(ImportError, match="keras:Model has no attribute _no_such_attribute"):
        probe.check()


def test_a_module_that_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(probe.NAMES, "tensorflow.python.no_such:name", None)
    with pytest.raises(ImportError, match="tensorflow.python.no_such:name is missing"):
        probe.check()


@pytest.mark.parametrize("path", PACKAGE, ids=path_id)
def test_package_raises_real_errors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: an assert"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "NotImplemented" not in ast.unparse(node.exc), f"line {node.lineno}: a stub"


@pytest.mark.parametrize("path", EVERYTHING, ids=path_id)
def test_nothing_is_left_to_do(path):
    assert not re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())
