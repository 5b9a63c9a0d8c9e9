"""The lazy steps of all optimizers in NumPy, written from the papers and Keras' documentation.

Each is `step(x, gradients, touched, state, t)`: the rows `x` that a step touches, float64[r, d];
the gradient of each worker for these rows, and whether it has touched them; what is kept of these
rows, by name; and the number of the step, from 1 on. It returns the new rows and changes `state`.
"""

from __future__ import annotations

import numpy as np


def mean(gradients):
    return sum(gradients) / len(gradients)


def sgd(rate=0.1, momentum=0.0, nesterov=False, weight_decay=0.0):
    def step(x, gradients, touched, state, t):
        g = mean(gradients)
        x = x - rate * weight_decay * x
        state["velocity"][:] = momentum * state["velocity"] - rate * g
        if nesterov:
            return x + momentum * state["velocity"] - rate * g
        return x + state["velocity"]

    return {"velocity": 0.0}, step


def adagrad(rate=0.1, initial=0.1, epsilon=1e-7):
    def step(x, gradients, touched, state, t):
        g = mean(gradients)
        state["accumulator"] += g**2
        return x - rate * g / np.sqrt(state["accumulator"] + epsilon)

    return {"accumulator": initial}, step


def adam(rate=0.05, beta_1=0.9, beta_2=0.999, epsilon=1e-7, weight_decay=0.0, amsgrad=False):
    def step(x, gradients, touched, state, t):
        g = mean(gradients)
        x = x - rate * weight_decay * x
        state["m"][:] = beta_1 * state["m"] + (1 - beta_1) * g
        state["v"][:] = beta_2 * state["v"] + (1 - beta_2) * g**2
        state["largest"][:] = np.maximum(state["largest"], state["v"])
        v = state["largest"] if amsgrad else state["v"]
        alpha = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        return x - alpha * state["m"] / (np.sqrt(v) + epsilon)

    return {"m": 0.0, "v": 0.0, "largest": 0.0}, step


def rmsprop(rate=0.02, rho=0.9, momentum=0.0, centered=False, epsilon=1e-7):
    def step(x, gradients, touched, state, t):
        g = mean(gradients)
        state["v"][:] = rho * state["v"] + (1 - rho) * g**2
        state["mean"][:] = rho * state["mean"] + (1 - rho) * g
        variance = state["v"] - state["mean"] ** 2 if centered else state["v"]
        state["velocity"][:] = momentum * state["velocity"] + rate * g / np.sqrt(variance + epsilon)
        return x - state["velocity"]

    return {"v": 0.0, "mean": 0.0, "velocity": 0.0}, step


def comp_ams(rate=0.05, beta_1=0.9, beta_2=0.999, epsilon=1e-8):
    def step(x, gradients, touched, state, t):
        g = mean(gradients)
        state["m"][:] = beta_1 * state["m"] + (1 - beta_1) * g
        state["v"][:] = beta_2 * state["v"] + (1 - beta_2) * g**2
        state["largest"][:] = np.maximum(state["largest"], state["v"])
        return x - rate * state["m"] / np.sqrt(state["largest"] + epsilon)

    return {"m": 0.0, "v": 0.0, "largest": 0.0}, step


def qadam(rate=0.05, beta_1=0.9, theta=0.999, initial=1e-8, workers=2):
    """Each worker's moments of a row change when that worker touches it."""

    def step(x, gradients, touched, state, t):
        update = np.zeros_like(x)
        for i in range(workers):
            own, g = touched[i], gradients[i][touched[i]]
            m, v, count = (state[f"{name}{i}"] for name in ("m", "v", "t"))
            count[own] += 1
            decay = 1 - 1 / count[own] if theta == "1-1/t" else theta
            v[own] = decay * v[own] + (1 - decay) * g**2
            m[own] = beta_1 * m[own] + (1 - beta_1) * g
            update[own] += m[own] / np.sqrt(v[own])
        return x - rate * update / workers

    names = [f"{name}{i}" for i in range(workers) for name in ("m", "t")]
    return dict.fromkeys(names, 0.0) | {f"v{i}": initial for i in range(workers)}, step


def soft(a, b):
    return np.sign(a) * np.maximum(np.abs(a) - b, 0)


def qcmd(rate=0.05, weight=1e-3, delta=1e-2):
    def step(x, gradients, touched, state, t):
        q = mean(gradients)
        state["s"] += q * q
        h = delta + np.sqrt(state["s"])
        return soft(x - rate * q / h, rate * weight / h)

    return {"s": 0.0}, step


def qrda(rate=0.05, weight=1e-3, delta=1e-2, centered=False):
    """`t` is the number of steps that have touched the row."""

    def step(x, gradients, touched, state, t):
        q = mean(gradients)
        first = state["t"] == 0
        state["center"][:] = np.where(first, x if centered else 0.0, state["center"])
        state["t"] += 1
        state["s"] += q * q
        state["g"] += q
        h = delta + np.sqrt(state["s"])
        return soft(state["center"] - rate * state["g"] / h, rate * state["t"] * weight / h)

    return {"s": 0.0, "g": 0.0, "t": 0.0, "center": 0.0}, step


STEPS_OF = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": adagrad(),
    "adam": adam(),
    "amsgrad": adam(amsgrad=True),
    "adamw": adam(weight_decay=0.1),
    "rmsprop": rmsprop(),
    "centered": rmsprop(momentum=0.9, centered=True),
    "comp_ams": comp_ams(),
    "qadam": qadam(),
    "qadam by t": qadam(theta="1-1/t"),
    "qcmd": qcmd(),
    "qrda": qrda(),
    "qrda from x": qrda(centered=True),
}


def table_after_each_step(name: str, table, ids, targets) -> list[np.ndarray]:
    """The table of a model whose output are the rows of its ids, and whose loss is "mse".

    Args:
        table: float32[rows, d], at the beginning.
        ids: [steps, workers, batch, length].
        targets: [steps, workers, batch, length, d].
    """
    initial, step = STEPS_OF[name]
    table = table.astype(np.float64)
    state = {slot: np.full(table.shape, value, np.float64) for slot, value in initial.items()}
    tables = []
    for t, (ids_of_step, targets_of_step) in enumerate(zip(ids, targets, strict=True), 1):
        rows = np.unique(ids_of_step)
        gradients = []
        for own_ids, target in zip(ids_of_step, targets_of_step, strict=True):
            whole = np.zeros_like(table)
            np.add.at(whole, own_ids, 2 * (table[own_ids] - target) / target.size)
            gradients.append(whole[rows])
        touched = [np.isin(rows, own_ids) for own_ids in ids_of_step]
        kept = {slot: value[rows] for slot, value in state.items()}
        table[rows] = step(table[rows], gradients, touched, kept, t)
        for slot, value in kept.items():
            state[slot][rows] = value
        tables.append(table.copy())
    return tables


# ------------------------------------------------------------------- SGD with a residual per row


def coded(codec: str, rows) -> np.ndarray:
    """What arrives of float32 rows."""
    if codec == "bfloat16":
        bits = rows.view(np.uint32)
        even = (bits >> 16) & 1
        return ((bits + 0x7FFF + even) & np.uint32(0xFFFF0000)).view(np.float32)
    scale = np.abs(rows).max(1, keepdims=True)
    levels = np.round(np.float32(127) * (rows / np.where(scale == 0, np.inf, scale)))
    return scale * (levels.astype(np.float32) / np.float32(127))


def tables_with_feedback(table, ids, targets, codec: str, slots, rate: float):
    """As `table_after_each_step`, by SGD on encoded rows; and what each worker owes which id.

    Rounds in which somebody's gradient is not finite do not count. All numbers are float32: what
    is rounded then is the same to the bit.

    Args:
        slots: of each worker; "all": as many as rows; None: no feedback.
    """
    workers, tables = range(ids.shape[1]), []
    count = len(table) if slots in ("all", None) else slots
    owed: list[dict[int, tuple[int, np.ndarray]]] = [{} for _ in workers]  # slot -> id, row
    for ids_of_step, targets_of_step in zip(ids, targets, strict=True):
        total, after = np.zeros_like(table), []
        for own_ids, target, mine in zip(ids_of_step, targets_of_step, owed, strict=True):
            pushed = np.zeros_like(table)
            pulled = coded(codec, table)
            np.add.at(pushed, own_ids, 2 * (pulled[own_ids] - target) / np.float32(target.size))
            for row, value in mine.values():
                if row in own_ids and slots is not None:
                    pushed[row] += value
            sent = coded(codec, pushed)
            total += sent
            changed = {
                row % count: (int(row), pushed[row] - sent[row])
                for row in sorted(np.unique(own_ids), reverse=True)  # the smallest id stays
            }
            after.append(mine | changed)
        if np.isfinite(total).all():
            table = table - np.float32(rate) * (total / np.float32(len(workers)))
            owed = after
        tables.append(table)
    return tables, [dict(mine.values()) for mine in owed]
