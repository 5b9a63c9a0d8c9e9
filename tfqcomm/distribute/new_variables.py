"""Variables that were made since the workers last agreed: compared all at once.

TensorFlow sends every variable from the chief as it is made, one after the other, and workers whose
models differ wait for each other for ever. Here each worker makes its own, and before anything else
is done the workers compare what they have made in one exchange. Values that all have anyway (an
optimizer's zeros, seeded weights) are not sent; others are replaced by the chief's.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np
import tensorflow as tf

from tfqcomm import _tf_private
from tfqcomm.transport.base import Transport

_DIGEST_BYTES = 8


class NewVariables:
    """What this worker has made and not yet compared.

    Args:
        transport: to the other workers.
    """

    def __init__(self, transport: Transport):
        self._transport = transport
        self._pending: list[tf.Variable] = []

    def add(self, variable: tf.Variable) -> None:
        """Notes a variable that was just made, outside of any graph."""
        self._pending.append(variable)

    def agree(self) -> None:
        """Compares what is pending with the other workers', and takes over what the chief has.

        Raises:
            ValueError: on all workers, if they have made different variables.
        """
        if not self._pending or not tf.executing_eagerly():
            return
        pending, self._pending = self._pending, []
        copies = [_tf_private.copies_of(variable) for variable in pending]
        values = [tf.io.serialize_tensor(own[0]).numpy() for own in copies]
        digests = b"".join(hashlib.sha256(value).digest()[:_DIGEST_BYTES] for value in values)
        facts = {"devices per worker": str(self._transport.local)}
        for number, variable in enumerate(pending):
            facts[f"variable {number}, shape"] = str(variable.shape.as_list())
            facts[f"variable {number}, dtype"] = variable.dtype.name
        names = {f"variable {number}": v.name for number, v in enumerate(pending)}
        if not self._transport.agree("create variables", facts, names, evidence=digests):
            self._take_over(copies, values, digests)

    def _take_over(self, copies, values, digests):
        own = np.frombuffer(digests, "<i4").astype(np.int32)
        with _tf_private.doing("the values of new variables"):
            found = self._transport.gather_vectors(tf.constant(own)).numpy()
        found = found.reshape([self._transport.processes, len(values), -1])
        differ = np.flatnonzero((found != found[0]).any(axis=(0, 2)))
        data = io.BytesIO()
        np.savez(data, **{str(number): np.array(values[number]) for number in differ})
        with np.load(io.BytesIO(self._transport.share_bytes(data.getvalue()))) as chiefs:
            for number in differ:
                for copy in copies[number]:
                    copy.assign(tf.io.parse_tensor(chiefs[str(number)].item(), copy.dtype))
