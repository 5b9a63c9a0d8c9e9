"""Which tensors of a graph would leave a GPU, as TensorFlow's register of kernels has it.

    for violation in violations(step.get_concrete_function(...).graph):
        print(violation)                # AddV2(int32): host memory

A graph is walked with the functions it calls. In those that XLA compiles everything stays on the
device, and each op must be one that it can compile for a GPU. Elsewhere, at each op that takes or
gives more than `LARGEST` elements it is asked whether there is a kernel for its types on a GPU, and
whether that keeps the large argument in host memory.

What calls functions keeps int32 arguments and results in host memory, whatever the register says
(`MemoryTypesForNode` in TensorFlow's `memory_types.cc`). A call that the graph optimizer inlines
has no such border.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import tensorflow as tf

from tfqcomm import _tf_private

LARGEST = 1024  # elements that may live in host memory
NO_KERNEL, HOST_MEMORY, NOT_COMPILED = "no kernel", "host memory", "XLA cannot compile it"
CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
CONTROL_FLOW = {"If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase"}
NO_OPS = {"Placeholder", "NoOp"}  # arguments of functions; nothing is computed


def violations(graph: tf.Graph) -> set[str]:
    """What is wrong with a graph, each kind once: "op(types of large arguments): what"."""
    return set(_walk(graph, set()))


def _walk(graph: tf.Graph, seen: set[str]) -> Iterator[str]:
    for op in graph.get_operations():
        if op.type not in NO_OPS:
            yield from _of_op(op)
        walk = _walk_compiled if is_compiled(op) else _walk
        for name in _called(op) - seen:
            seen.add(name)
            yield from walk(_tf_private.called_graph(graph, name), seen)


def _walk_compiled(graph: tf.Graph, seen: set[str]) -> Iterator[str]:
    _make_xla_register()
    for op in graph.get_operations():
        if op.type not in NO_OPS | CALLS | CONTROL_FLOW and _kernel(op, "XLA_GPU_JIT") is None:
            yield f"{op.type}: {NOT_COMPILED}"
        for name in _called(op) - seen:
            seen.add(name)
            yield from _walk_compiled(_tf_private.called_graph(graph, name), seen)


@functools.cache
def _make_xla_register() -> None:
    """XLA registers what it can compile, for all devices, when it compiles for the first time."""
    tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1))


def is_compiled(op: tf.Operation) -> bool:
    """Whether an op calls a function that XLA compiles."""
    return op.type in CALLS and op.node_def.attr["_XlaMustCompile"].b


def _is_inlined(op: tf.Operation) -> bool:
    return op.type in CALLS and not is_compiled(op) and not op.node_def.attr["_noinline"].b


def _called(op: tf.Operation) -> set[str]:
    attributes = op.node_def.attr.values()
    names = {a.func.name for a in attributes} | {f.name for a in attributes for f in a.list.func}
    return names - {""}


def _of_op(op: tf.Operation) -> Iterator[str]:
    large = [name for name, tensor in _arguments(op) if _is_large(tensor)]
    if not large or _is_inlined(op):
        return
    types = sorted({tensor.dtype.name for _, tensor in _arguments(op) if _is_large(tensor)})
    what = f"{op.type}({', '.join(types)})"
    if op.type in CALLS | CONTROL_FLOW:
        if "int32" in types:
            yield f"{what}: {HOST_MEMORY}"
        return
    kernel = _kernel(op)
    if kernel is None:
        yield f"{what}: {NO_KERNEL}"
    elif set(large) & set(kernel.host_memory_arg):
        yield f"{what}: {HOST_MEMORY}"


def _kernel(op: tf.Operation, device: str = "GPU"):
    """The kernel that a GPU would run, None where there is none."""
    fitting = [k for k in _tf_private.kernels_on(device, op.type) if _fits(k, op)]
    return fitting[0] if fitting else None


def _fits(kernel, op: tf.Operation) -> bool:
    for constraint in kernel.constraint:
        attribute = op.node_def.attr[constraint.name]
        types = attribute.list.type or [attribute.type]
        if not set(types) <= set(constraint.allowed_values.list.type):
            return False
    return True


def _arguments(op: tf.Operation) -> list[tuple[str, tf.Tensor]]:
    """The names that `host_memory_arg` uses, with the tensors; a list has its name many times."""
    named = []
    for arguments, tensors in (
        (op.op_def.input_arg, list(op.inputs)),
        (op.op_def.output_arg, list(op.outputs)),
    ):
        names = [arg.name for arg in arguments for _ in range(_length(arg, op))]
        named += zip(names, tensors, strict=True)
    return named


def _length(argument, op: tf.Operation) -> int:
    if argument.number_attr:
        return op.node_def.attr[argument.number_attr].i
    if argument.type_list_attr:
        return len(op.node_def.attr[argument.type_list_attr].list.type)
    return 1


def _is_large(tensor: tf.Tensor) -> bool:
    """Whether it holds, or may hold, more than `LARGEST` elements; handles are one each."""
    if tensor.dtype in (tf.resource, tf.variant):
        return False
    elements = tensor.shape.num_elements()
    return elements is None or elements > LARGEST
