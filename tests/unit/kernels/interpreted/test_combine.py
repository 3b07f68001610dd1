"""`combine` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation_tests import Operation


class TestCombine(Operation):
    """What holds for every operation."""

    operation = "combine"
