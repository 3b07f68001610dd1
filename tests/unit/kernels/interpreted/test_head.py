"""`head` under Triton's interpreter."""

from tests.unit.kernels.interpreted.operation_tests import Projecting


class TestHead(Projecting):
    """What holds for every operation that projects."""

    operation = "head"
