"""`pre` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation_tests import Projecting


class TestPre(Projecting):
    """What holds for every operation that projects."""

    operation = "pre"
