"""Trace networks for ONNX once per structure: PyTorch's exporter takes seconds even if only weights changed."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qcompress.engines import onnx_graph, onnx_tracing


@contextlib.contextmanager
def traced_once(most: int | None = None) -> Iterator[None]:
    """Context manager in which `onnx_tracing.trace` traces each structure once and fills in each network's weights.

    Args:
        most: maximum number of graphs to keep, the last ones used; each takes as many bytes as its network.
    """
    from onnx import numpy_helper

    known: dict[Any, Any] = {}
    trace = onnx_tracing.trace

    def again(model: nn.Module, example: Any) -> Any:
        state = model.state_dict(keep_vars=True)
        shared = [[name for name in state if state[name] is tensor] for tensor in state.values()]
        inputs = tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, example)
        key = str((model, shared, inputs))
        traced = known.pop(key, None)
        known[key] = trace(model, example) if traced is None else traced
        if most is not None and len(known) > most:
            del known[next(iter(known))]
        proto = onnx_graph.copied(known[key])
        for item in proto.graph.initializer:
            if (tensor := state.get(item.name.removeprefix("model."))) is not None:
                item.CopyFrom(numpy_helper.from_array(tensor.detach().numpy(), item.name))
        return proto

    with mock.patch.object(onnx_tracing, "trace", again):
        yield
