"""How each weight of a `Trainer` travels, for people."""

from __future__ import annotations

from tfqcomm.parameter_server.messages.program import Program
from tfqcomm.state.traffic import Route


def routes(program: Program) -> list[Route]:
    """One for each weight."""
    return [
        Route(v.path, tuple(v.shape), _where(program, index), _how(program, index))
        for index, v in enumerate(program.model_step.weights)
    ]


def _where(program: Program, variable: int) -> str:
    servers = [
        index
        for index, server in enumerate(program.servers)
        if any(p.variable == variable for p in (*server.format.pieces, *server.rows.format.parts))
    ]
    return f"parameter server {', '.join(map(str, servers))}"


def _how(program: Program, variable: int) -> str:
    if variable in program.lookups.tables:
        slots = program.row_feedback.slots.get(variable)
        owed = f", pushed with error feedback in {slots} slots" if slots else ""
        return f"rows of each batch, {program.servers[0].rows.format.codec.name}{owed}"
    if not any(p.variable == variable for p in program.large):
        return "float32"
    weight_codec = program.servers[0].format.weight_codec
    return f"pulled {weight_codec}, pushed {program.options.compressor}"
