"""What README.md and docs/ say can be done can be done: commands, flags, names, snippets."""

import ast
import configparser
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

import tfqcomm
from tests.multi_process import ROOT
from tfqcomm.launch.__main__ import _parser

PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
PUBLIC = (
    "advise",
    "callbacks",
    "compressors",
    "distribute",
    "optimizers",
    "parameter_server",
    "sparsity",
)


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path, language: str) -> list[str]:
    """The code between ``` of one language, indented as it may be in a list."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", path.read_text(), re.M | re.S)
    return [textwrap.dedent(text) for _, kind, text in found if kind == language]


def commands() -> list[tuple[str, str]]:
    """(document, command) for all that a reader may type."""
    return [
        (name_of(path), line.partition("  #")[0].strip())
        for path in DOCUMENTS
        for block in blocks(path, "")
        for line in block.splitlines()
        if re.match(r"(python|make|pip) ", line)
    ]


SNIPPETS = [(name_of(path), block) for path in DOCUMENTS for block in blocks(path, "python")]
README_SNIPPETS = blocks(ROOT / "README.md", "python")


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert all(len(snippet.splitlines()) <= 8 for snippet in README_SNIPPETS)


def test_the_citation_is_of_this_version():
    assert f"\nversion: {tfqcomm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_there_are_commands_and_snippets_to_check():
    assert len(commands()) > 20
    assert len(SNIPPETS) > 8


def flags_in(words: list[str]) -> list[str]:
    return [word[2:].partition("=")[0] for word in words if word.startswith("--")]


def check_script(words: list[str]) -> None:
    """A script or module exists, and its text defines the flags that follow it."""
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        path = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        words = words[1:]
    else:
        path = ROOT / words[0]
    text = path.read_text()
    for flag in flags_in(words):
        assert re.search(rf'"(--)?{flag}"', text), f"{path.name} has no flag {flag}"


def check_launch(words: list[str]) -> None:
    options = _parser().parse_args(words)
    if options.command:
        check_script([*(["-m"] if options.module else []), *options.command])


def check_make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, assigned, _ = word.partition("=")
        pattern = rf"\b{name}\b" if assigned else rf"^{name}:"
        assert re.search(pattern, text, re.M), f"Makefile knows no {word}"


def check_pip(words: list[str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert extra in config["options.extras_require"]


@pytest.mark.parametrize(("document", "command"), commands())
def test_a_command_names_what_exists(document, command):
    program, *words = shlex.split(command)
    if program == "make":
        check_make(words)
    elif program == "pip":
        check_pip(words)
    elif words[:2] == ["-m", "tfqcomm.launch"]:
        check_launch(words[2:])
    else:
        check_script(words)


@pytest.mark.parametrize(("document", "snippet"), SNIPPETS)
def test_a_snippet_calls_what_exists_with_arguments_that_exist(document, snippet):
    if document == "CONTRIBUTING.md" and "def " in snippet:
        return  # a skeleton
    for node in ast.walk(ast.parse(snippet)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("tfqcomm."):
            continue
        called = pkgutil.resolve_name(ast.unparse(node.func))
        arguments = {keyword.arg: None for keyword in node.keywords}
        inspect.signature(called).bind_partial(*node.args, **arguments)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_names_what_exists(path):
    text = path.read_text()
    for dotted in sorted(set(re.findall(r"\btfqcomm(?:\.[A-Za-z]\w*)+", text))):
        assert pkgutil.resolve_name(dotted), dotted
    for found in sorted(set(re.findall(r"\b(?:tests|experiments|examples)/[\w/]*\.\w+", text))):
        assert (ROOT / found).exists(), found


def test_the_readme_links_to_what_exists():
    for target in re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_the_page_on_several_machines_has_every_flag_of_the_launcher():
    page = (ROOT / "docs" / "several_machines.md").read_text()
    said = set(re.findall(r"^\| `--(\w+)", page, re.M))
    assert said == set(re.findall(r"^  --(\w+)", _parser().format_help(), re.M))


def test_the_reference_has_every_public_name():
    said = set(
        re.findall(r"^::: (tfqcomm\.[\w.]+)", (ROOT / "docs/reference.md").read_text(), re.M)
    )
    exported = {
        f"tfqcomm.{room}.{name}" for room in PUBLIC for name in _exported(getattr(tfqcomm, room))
    }
    assert said - {"tfqcomm.launch.__main__"} == exported


def _exported(module) -> list[str]:
    if module is tfqcomm.sparsity:  # a file of its own
        return ["export_sparse"]
    return module.__all__


PRELUDE = """
import keras, numpy as np, tensorflow as tf
import tfqcomm

def build_model():
    dense = keras.layers.Dense(3, "softmax")
    return keras.Sequential([keras.Input([8]), keras.layers.Dense(256), dense])

def dataset_fn(context):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(32)

x, y = np.ones([128, 8], "float32"), np.zeros([128], "int32")
"""


@pytest.mark.slow
@pytest.mark.parametrize("snippet", README_SNIPPETS)
def test_a_snippet_of_the_readme_runs(snippet, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{snippet}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
