"""Arguments that belong together: each is handed on as one."""

from typing import Literal, NamedTuple, get_args

from torch import Tensor


class Sizes(NamedTuple):
    """Of streams [..., n, C], or [..., n*C]: T tokens, n streams, C the width of one."""

    tokens: int
    n: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> "Sizes":
        """Of streams x [..., n, C]."""
        n, width = x.shape[-2:]
        return cls(x.numel() // (n * width), n, width)


class Mixing(NamedTuple):
    """What a site leaves when its sublayer has run: all that `combine` takes beside the streams."""

    f: Tensor
    h_post: Tensor
    h_res: Tensor
    f_bias: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        """Of the streams that it goes with."""
        n, width = self.h_post.shape[-1], self.f.shape[-1]
        return Sizes(self.f.numel() // width, n, width)

    def detach(self) -> "Mixing":
        """The same tensors outside their graph."""
        f_bias = None if self.f_bias is None else self.f_bias.detach()
        return Mixing(self.f.detach(), self.h_post.detach(), self.h_res.detach(), f_bias)


NormForm = Literal["inside_root", "outside_root"]
NORM_FORMS: tuple[str, ...] = get_args(NormForm)
"""Where norm_eps stands: 1 / sqrt(mean square + eps), or 1 / (rms + eps)."""
SinkhornOrder = Literal["columns_first", "rows_first"]
SINKHORN_ORDERS: tuple[str, ...] = get_args(SinkhornOrder)
"""Which sums of H_res an iteration divides by first; it ends with the others, which are exact."""


class Options(NamedTuple):
    """How the coefficients are computed: the keywords of `reference.coefficients`."""

    iterations: int = 20
    norm_eps: float = 1e-6
    pre_eps: float = 0.0
    sinkhorn_eps: float = 0.0
    norm_form: str = "inside_root"
    sinkhorn_order: str = "columns_first"

    @property
    def outside_root(self) -> bool:
        """Whether norm_eps stands outside the root."""
        return self.norm_form == "outside_root"

    @property
    def rows_first(self) -> bool:
        """Whether Sinkhorn divides by the sums over src first."""
        return self.sinkhorn_order == "rows_first"


DEFAULT = Options()
"""The paper's."""
