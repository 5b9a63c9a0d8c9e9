"""Who may import whom. The imports are read from the sources, so that none is missed.

One folder a line, each above those that it may import from:

_tf_private, checks, sparsity, pages, cluster
kernels
compressors
transport
state
aggregators
step
optimizers, costs
distribute, callbacks, launch
parameter_server, advise
tfqcomm itself
models: Keras only           experiments, benchmarks, examples: the public tfqcomm and models
"""

import ast
import configparser
import functools
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

LAYERS = [  # a module imports from the lines above its own, and from its own folder
    {"_tf_private", "checks", "sparsity", "pages", "cluster"},
    {"kernels"},
    {"compressors"},
    {"transport"},
    {"state"},
    {"aggregators"},
    {"step"},
    {"optimizers", "costs"},
    {"distribute", "callbacks", "launch"},
    {"parameter_server", "advise"},
]
LEVEL_OF = {unit: level for level, units in enumerate(LAYERS) for unit in units}

DECLARED_FOR = {  # folder -> extras of setup.cfg that are installed where it runs
    "tfqcomm": [],
    "models": [],
    "experiments": ["experiments"],
    "benchmarks": ["experiments"],
    "examples": [],
    "tests": ["experiments", "test"],
}

OPTIONAL = {  # module -> what it does without where it is not installed, of an extra
    "tfqcomm.advise.plot": {"matplotlib"},
    "benchmarks.ddp": {"torch"},  # the extra `peers`; started where it is there
    "benchmarks.ddp_accuracy": {"torch"},
    "benchmarks.ddp_workers": {"torch"},
    "examples.ray.train": {"ray"},  # whoever runs it has it
    "examples.recommender": {"tensorflow_datasets"},  # with --movielens
}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in DECLARED_FOR
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def names_in(folder: str) -> list[str]:
    return [name for name in SOURCES if name.split(".")[0] == folder]


def imports(name: str) -> set[str]:
    """Dotted names that module `name` imports, also inside functions.

    `from tfqcomm import wire` counts as `tfqcomm.wire`, `from tfqcomm.wire import pack` as
    `tfqcomm.wire`: the longest part that is a module.
    """
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in SOURCES else node.module)
    return found


def own_imports(name: str) -> list[list[str]]:
    """The imports of module `name` from tfqcomm, as parts below `tfqcomm`."""
    return [i.split(".")[1:] for i in sorted(imports(name)) if i.split(".")[0] == "tfqcomm"]


@pytest.mark.parametrize("name", [name for name in names_in("tfqcomm") if name != "tfqcomm"])
def test_imports_only_downwards(name):
    unit = name.split(".")[1]
    assert unit in LEVEL_OF, f"{name} stands in no layer: give it one, here and in the docstring"
    for parts in own_imports(name):
        assert parts, f"{name} imports tfqcomm itself, which is above everything"
        below = LEVEL_OF.get(parts[0], len(LAYERS)) < LEVEL_OF[unit]
        assert below or parts[0] == unit, f"{name} imports tfqcomm.{'.'.join(parts)}, not below it"


def is_algorithm(name: str) -> bool:
    """Whether a module registers a codec or an optimizer."""
    classes = [n for n in ast.parse(SOURCES[name].read_text()).body if isinstance(n, ast.ClassDef)]
    decorators = [ast.unparse(d) for c in classes for d in c.decorator_list]
    return any(re.match(r"(\w+\.)?register", decorator) for decorator in decorators)


def test_algorithms_never_import_one_another():
    algorithms = {name for name in names_in("tfqcomm") if is_algorithm(name)}
    assert "tfqcomm.compressors.top_k" in algorithms
    for name in algorithms:
        assert not imports(name) & algorithms, name


def test_no_import_cycles():
    graph = {
        name: {i for i in imports(name) if i in SOURCES and i != "tfqcomm"}
        for name in names_in("tfqcomm")
    }
    while leaves := {name for name, below in graph.items() if not below & graph.keys()}:
        graph = {name: below for name, below in graph.items() if name not in leaves}
    assert not graph, f"a cycle among {sorted(graph)}"


def test_transport_knows_no_codec_and_codecs_know_no_strategy():
    for name in names_in("tfqcomm"):
        if name.startswith("tfqcomm.transport"):
            assert ["compressors"] not in [parts[:1] for parts in own_imports(name)], name
        if name.startswith("tfqcomm.compressors"):
            assert "tf.distribute" not in SOURCES[name].read_text(), name


def test_models_are_plain_keras():
    for name in names_in("models"):
        roots = {i.split(".")[0] for i in imports(name)} - sys.stdlib_module_names
        assert roots <= {"keras", "models"}, name


def exported(name: str) -> list[str]:
    """What `__all__` of a package holds, without importing it."""
    for node in ast.parse(SOURCES[name].read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def reached(name: str) -> set[str]:
    """Every `tfqcomm.x.y...` that a module imports or writes out, and every imported name."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {i for i in found if re.fullmatch(r"tfqcomm(\.\w+)+", i)}


def users():
    """All but the benchmark of the kernels of a step, which no public name reaches."""
    names = {n for folder in ("experiments", "benchmarks", "examples") for n in names_in(folder)}
    return sorted(names - {"benchmarks.codecs"})


@pytest.mark.parametrize("name", users())
def test_experiments_use_only_what_is_public(name):
    allowed = {"tfqcomm", "models", name.split(".")[0]}
    ours = {i.split(".")[0] for i in imports(name)} & DECLARED_FOR.keys()
    assert ours <= allowed, f"{name} imports {sorted(ours - allowed)}"
    for path in sorted(reached(name)):
        _, unit, *rest = path.split(".")
        assert unit in exported("tfqcomm"), f"{name} uses {path}, which tfqcomm does not export"
        package = f"tfqcomm.{unit}"
        if rest and SOURCES[package].name == "__init__.py":
            assert rest[0] in exported(package), f"{name} uses {path}, not exported by {package}"


@functools.cache
def modules_of(distribution: str) -> set[str]:
    """The top-level modules that an installed distribution brings."""
    files = importlib.metadata.files(distribution)
    return {file.parts[0].removesuffix(".py") for file in files}


@pytest.mark.parametrize("folder", DECLARED_FOR)
def test_imports_are_declared_in_setup_cfg(folder):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    for extra in DECLARED_FOR[folder]:
        lines += config["options.extras_require"][extra].split("\n")
    declared = [re.match(r"[\w-]+", line)[0] for line in lines if line]

    roots = set()
    for name in names_in(folder):
        roots |= {i.split(".")[0] for i in imports(name)} - OPTIONAL.get(name, set())
    foreign = roots - sys.stdlib_module_names - DECLARED_FOR.keys()
    undeclared = foreign - set().union(*map(modules_of, declared))
    assert not undeclared, f"{folder} imports what setup.cfg does not declare"


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested():
    """`make test-oldest` installs what setup.cfg names as the lowest."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requirements = config["options"]["install_requires"]
    tested = re.search(r"^OLDEST_VERSIONS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    for name in ("tensorflow", "keras"):
        lowest = re.search(rf"^{name} >=([\d.]+)", requirements, re.M)[1]
        assert f"'{name}=={lowest}.*'" in tested
