"""`combine` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation import Operation


class TestCombine(Operation):
    """What holds for every operation."""

    operation = "combine"
