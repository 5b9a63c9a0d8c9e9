"""Arguments that many constructors share, told once: in signatures, in docstrings, in errors.

A constructor names what its own class decides. What it shares with others is `**options`: the
fields of `ExchangeOptions`, to which optimizers add Keras' own. `show` writes all of them out for
`help()` and for editors; docs/shared_arguments.py does the same for the pages.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Mapping

from tfqcomm.step.options import ExchangeOptions

Parameters = Mapping[str, inspect.Parameter]

_OF_GRADIENTS = ("scale_residual", "accumulate", "embedding_rows")
_OPTIONS = re.compile(r"^    \*\*options:.*(?:\n {8}.*)*", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


def keyword(name: str, default, annotation=inspect.Parameter.empty) -> inspect.Parameter:
    """An argument that is given by its name alone."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def exchange_arguments(*, of_gradients: bool = True) -> dict[str, inspect.Parameter]:
    """Those of `ExchangeOptions` that have the same default everywhere: all but `compressor`.

    Args:
        of_gradients: also those that mean something for the gradients of a step alone.
    """
    left_out = {"compressor"} if of_gradients else {"compressor", *_OF_GRADIENTS}
    return {
        field.name: keyword(field.name, field.default, field.type)
        for field in dataclasses.fields(ExchangeOptions)
        if field.name not in left_out
    }


def exchange_texts() -> dict[str, str]:
    """What each of them means, from the docstring of `ExchangeOptions`."""
    return dict(_ATTRIBUTE.findall(inspect.getdoc(ExchangeOptions) or ""))


def show(owner: type, shared: Parameters, texts: Mapping[str, str], rest: str = "") -> None:
    """Writes `**options` out, in the signature and the docstring of a class.

    Args:
        owner: whose own `__init__` takes `**options`; else nothing is done.
        shared: what these may be; what the signature names itself stays as it is there.
        texts: name -> description, for the section "Args".
        rest: of the section, in place of those without a text.
    """
    init = vars(owner).get("__init__")
    own = inspect.signature(init).parameters if init else {}
    if init is None or "options" not in own:
        return
    named = [parameter for name, parameter in own.items() if name != "options"]
    added = [parameter for name, parameter in shared.items() if name not in own]
    # Of the function, and not of the class, whose subclasses would inherit it.
    init.__signature__ = inspect.Signature([*named, *added])
    if owner.__doc__ is not None:  # `python -OO` has none
        lines = [f"    {p.name}: {texts[p.name]}" for p in added if p.name in texts]
        text = "\n".join([*lines, *([f"    {rest}"] if rest else [])])
        owner.__doc__ = _OPTIONS.sub(lambda _: text, inspect.cleandoc(owner.__doc__))


def takes_exchange_options(owner: type) -> type:
    """Decorates a class whose `**options` are the arguments of `ExchangeOptions`."""
    show(owner, exchange_arguments(), exchange_texts())
    return owner


def refuse_unknown(
    owner: type,
    options: Mapping[str, object],
    shared: Collection[str],
    error: Callable[[str], Exception] = ValueError,
) -> None:
    """Refuses options that are none of `shared`.

    Args:
        owner: whose constructor was called.
        error: what is raised.
    """
    unknown = {name: value for name, value in options.items() if name not in shared}
    if not unknown:
        return
    own = inspect.signature(owner).parameters.values()
    named = [parameter.name for parameter in own if parameter.kind != parameter.VAR_KEYWORD]
    allowed = dict.fromkeys([*named, *shared])
    raise error(
        f"Argument(s) not recognized: {unknown}. Those of {owner.__name__} are "
        f"{', '.join(allowed)}. "
        f"Received: {', '.join(f'{name}={value!r}' for name, value in unknown.items())}"
    )
