"""The reference operators' quantised matrices are what NumPy makes of them: what the kernels are held to."""

from __future__ import annotations

import numpy as np
import pytest
from kernels_cases import F32, Quantised, linear, relative_error
from test_kernels_quantised import SCHEMES, columns_for, scheme_name


def parameters(ms, matrix):
    """The tensors of a matrix as a network holds them; scales of bfloat16 are kept for the kernels' own tests."""
    return ms.ParameterTuple([ms.Parameter(ms.Tensor(getattr(part, "memory", part)), f"part{i}", False)
                              for i, part in enumerate(matrix.parts)])


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
def test_reference_project_dequantises(scheme):
    import mindspore as ms
    from qwen15.ops import reference

    ms.set_device("CPU")
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
    rng = np.random.default_rng(1)
    cols = columns_for(scheme)[1]
    scheme = {**scheme, "scale_dtype": F32} if scheme.get("scale_dtype") == "bfloat16" else scheme
    w, x = Quantised(rng, (40, cols), **scheme), rng.standard_normal((3, cols)).astype(np.float32)

    class Net(ms.nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.w, self.project, self.look_up = parameters(ms, w), reference.Project(), reference.Embed()

        def construct(self, x, ids):
            return self.project(x, self.w), self.look_up(ids, self.w[:3])

    ids = np.array([3, 0, 39], np.int32)
    got, rows = (result.asnumpy() for result in Net()(ms.Tensor(x), ms.Tensor(ids)))
    assert relative_error(got, linear(x.astype(np.float64), w)) < 1e-6
    np.testing.assert_array_equal(rows, w.values[ids].astype(np.float32))
