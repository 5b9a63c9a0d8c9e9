"""What every module of the package owes its reader."""

import ast
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfqcomm
from tfqcomm.launch import start as _start

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["tfqcomm", *(m.name for m in pkgutil.walk_packages(tfqcomm.__path__, "tfqcomm."))]


def exports() -> list[tuple[str, object]]:
    """Every name in an `__all__`, with what it stands for."""
    modules = [importlib.import_module(name) for name in MODULES]
    return [
        (f"{module.__name__}.{name}", getattr(module, name))
        for module in modules
        for name in getattr(module, "__all__", [])
    ]


EXPORTS = exports()


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_docstring(name):
    assert importlib.import_module(name).__doc__


def test_every_folder_is_a_package():
    """Folders without `__init__.py` work in a checkout and are missing from a wheel."""
    for path in pathlib.Path(tfqcomm.__path__[0]).rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path.parent


@pytest.mark.parametrize("name", MODULES)
def test_init_holds_only_imports_and_all(name):
    module = importlib.import_module(name)
    if not hasattr(module, "__path__"):
        return
    docstring, *body = ast.parse(inspect.getsource(module)).body
    assert isinstance(docstring, ast.Expr)
    imported = []
    if name == "tfqcomm":  # The launcher, a part of the package, is to start without the rest.
        start, launcher, *body = body
        assert ast.unparse(start) == "from tfqcomm.launch.start import is_launcher"
        assert ast.unparse(launcher.test) == "not is_launcher()" and not launcher.orelse
        probe, *subpackages = launcher.body
        assert ast.unparse(probe) == "import tfqcomm._tf_private.probe"
        body = [*subpackages, *body]
    for node in body:
        if isinstance(node, ast.ImportFrom):
            imported += [alias.asname or alias.name for alias in node.names]
        else:
            held = {"__all__", "__version__"} if name == "tfqcomm" else {"__all__"}
            assert isinstance(node, ast.Assign), f"line {node.lineno}: {ast.unparse(node)}"
            assert ast.unparse(node.targets) in held, f"line {node.lineno}: {ast.unparse(node)}"
    assert sorted(imported) == sorted(module.__all__)


@pytest.mark.parametrize(("name", "value"), EXPORTS, ids=[name for name, _ in EXPORTS])
def test_export_is_documented(name, value):
    assert value.__doc__, f"{name} has no docstring"
    if not inspect.isclass(value):
        return
    assert not value.__doc__.startswith(f"{value.__name__}("), f"{name}: the docstring is generated"
    for attribute, member in vars(value).items():
        function = getattr(member, "__func__", member)  # of class methods and static methods
        if not attribute.startswith("_") and isinstance(function, types.FunctionType | property):
            # Looks through the base classes, too: an override may leave its text to them.
            assert inspect.getdoc(getattr(value, attribute)), f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(
        module,
        extraglobs={"keras": keras, "np": np, "tf": tf, "tfqcomm": tfqcomm},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.failed == 0


@pytest.mark.parametrize(
    ("arguments", "options", "is_launcher"),
    [
        (["-m"], ["-m", "tfqcomm.launch", "-m", "x"], True),
        (["-m"], ["-X", "dev", "-m", "tfqcomm.launch"], True),
        (["-m"], ["-m", "mine", "-m", "tfqcomm.launch"], False),  # whose __init__ imports tfqcomm
        (["mine.py", "-m", "tfqcomm.launch"], ["mine.py", "-m", "tfqcomm.launch"], False),
        ([""], [], False),
    ],
)
def test_the_launcher_alone_starts_without_tensorflow(monkeypatch, arguments, options, is_launcher):
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("sys.orig_argv", ["python", *options])
    assert _start.is_launcher() is is_launcher


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_what_exists(document):
    text = (ROOT / document).read_text()
    for dotted in sorted(set(re.findall(r"\btfqcomm(?:\.[A-Za-z]\w*)+", text))):
        assert pkgutil.resolve_name(dotted), dotted
    for path in sorted(set(re.findall(r"\b(?:tfqcomm|tests|experiments)/[\w/]*(?:\.\w+)?", text))):
        assert (ROOT / path).exists() or "my_codec" in path, path
