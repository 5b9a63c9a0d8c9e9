"""Writes `**options` out on the pages, as `tfqcomm.step.shared_arguments` does for `help()`.

The pages are built from the sources, without TensorFlow: so are the shared arguments found there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import griffe

EXCHANGE = "step.options.ExchangeOptions"
OPTIONS = re.compile(r"^    \*\*options:.*(?:\n {8}.*)*", re.MULTILINE)
ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
OF_KERAS = "    **options: as of `keras.optimizers.Optimizer`: `weight_decay`, `clipnorm` ..."


class SharedArguments(griffe.Extension):
    """Is told when all of the package has been read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        exchange = pkg[EXCHANGE]
        texts = dict(ATTRIBUTE.findall(exchange.docstring.value))
        shared = {name: exchange.attributes[name] for name in texts if name != "compressor"}
        for module in ("optimizers", "distribute"):
            for owner in classes(pkg[module]):
                init = owner.members.get("__init__")
                if init is not None and "options" in init.parameters:
                    write_out(owner, init, shared, texts)


def classes(module: griffe.Module) -> Iterator[griffe.Class]:
    """Those that a package defines, in all of its modules."""
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from classes(member)
        elif not member.is_alias and member.is_class:
            yield member


def write_out(owner: griffe.Class, init: griffe.Function, shared, texts) -> None:
    """Puts the shared arguments in the place of `**options`, but for Keras' own."""
    decorators = [str(decorator.value) for decorator in owner.decorators]
    optimizer = "takes_exchange_options" not in decorators
    compresses = not optimizer or "compressor" in init.parameters or "decides" in owner.members
    named = {parameter.name for parameter in init.parameters} | decided_by(owner)
    added = [name for name in shared if compresses and name not in named]
    at = [parameter.name for parameter in init.parameters].index("options")
    kept = init.parameters._params[at:] if optimizer else []
    init.parameters._params[at:] = [
        griffe.Parameter(
            name,
            kind=griffe.ParameterKind.keyword_only,
            annotation=shared[name].annotation,
            default=shared[name].value,
        )
        for name in added
    ] + kept
    if owner.docstring:
        lines = [f"    {name}: {texts[name]}" for name in added] + [OF_KERAS] * optimizer
        text = "\n".join(lines)
        owner.docstring.value = OPTIONS.sub(lambda _: text, owner.docstring.value)


def decided_by(owner: griffe.Class) -> set[str]:
    """The class attribute `decides`, a frozenset of names."""
    attribute = owner.attributes.get("decides")
    return set(re.findall(r"['\"](\w+)['\"]", str(attribute.value))) if attribute else set()
