"""The plans of the evidence: which models, rates, seeds and lengths each of them trains."""

import dataclasses
from collections.abc import Mapping

MHC = ("--mhc",)
MODELS: Mapping[str, tuple[str, ...]] = {
    "ordinary": (),
    "hc": (*MHC, "--mhc-variant", "hc"),
    "mhc": MHC,
    "mhc_zero": (*MHC, "--mhc-init", "zero"),
    "mhc_n2": (*MHC, "--mhc-num-streams", "2"),
    "mhc_n8": (*MHC, "--mhc-num-streams", "8"),
    "mhc_sinkhorn5": (*MHC, "--mhc-sinkhorn-iterations", "5"),
    "mhc_static": (*MHC, "--static"),
    "mhc_fast": (*MHC, "--rate-factor", "10"),
    "mhc_zero_random": (*MHC, "--mhc-init", "zero", "--phi-std", "0.02"),
    "mhc_eps": (*MHC, "--adam-eps", "1e-15"),
    "moe_ordinary": (),
    "moe_mhc": MHC,
}
"""Flags of `pretrain.py`: --static keeps phi at zero, so no coefficient depends on a token (alpha
multiplies zero then); --rate-factor multiplies the steps of alpha and b; --phi-std starts phi at
random, which alone tells the streams of init zero apart. --adam-eps is Megatron's:
whether it is Adam's eps that holds b_res."""
COMPARED = ("ordinary", "hc", "mhc", "mhc_zero")
ABLATIONS = (
    *("mhc_n2", "mhc_n8", "mhc_sinkhorn5", "mhc_static"),
    *("mhc_fast", "mhc_eps", "mhc_zero_random"),
)
SWEEP_RATES = (1e-3, 2e-3, 5e-4, 4e-3)
"""In this order: the ends, which are least likely the best, are last."""
BREAKING_RATES = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SEEDS = (1, 2, 3)

LOCAL = (
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-rope-fusion", "--no-gradient-accumulation-fusion", "--disable-jit-fuser"),
    *("--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"),
)
"""Without Transformer Engine and fusions: what a CPU can run too."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    Attributes:
        flags: Megatron's, for all models.
        moe: more of them, for the models whose names begin with moe_.
        runner: megatron_mhc.run's own flags.
        sequence, batch: tokens a sequence, sequences a step.
        micro: sequences a micro-batch, by model; "" for the others.
        tokens: of a whole run.
        validation: tokens of a validation, at most.
        vocab_size, megabytes: of the text; None: all there is.
        environment: of its processes.
        save, start: see `schedule.Budget`.
        fusing: whether the Triton kernels run: a GPU.
    """

    flags: tuple[str, ...]
    moe: tuple[str, ...]
    runner: tuple[str, ...]
    sequence: int
    batch: int
    micro: Mapping[str, int]
    tokens: int
    validation: int
    vocab_size: int
    megabytes: float | None
    environment: Mapping[str, str]
    save: float
    start: float
    fusing: bool

    @property
    def step(self) -> int:
        """Tokens a step."""
        return self.sequence * self.batch

    def micro_batch(self, model: str) -> int:
        """Sequences a micro-batch of a model."""
        return self.micro.get(model, self.micro[""])


def _moe(experts: int, ffn: int, topk: int, layers: int) -> tuple[str, ...]:
    return (
        *("--num-experts", str(experts), "--moe-ffn-hidden-size", str(ffn)),
        *("--moe-layer-freq", f"([0]*1+[1]*{layers - 1})", "--moe-router-topk", str(topk)),
        *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"),
        *("--moe-router-dtype", "fp32", "--moe-token-dispatcher-type", "alltoall"),
    )


PAPER_RATIO = Size(
    # 99 million parameters: 24 layers of 3.4, 2 x 8.4 of embeddings
    flags=(
        *("--num-layers", "24", "--hidden-size", "512", "--ffn-hidden-size", "1536"),
        *("--num-attention-heads", "8", "--transformer-impl", "transformer_engine", "--bf16"),
        *("--no-gradient-accumulation-fusion", "--num-workers", "2", "--init-method-std", "0.02"),
    ),
    # as many parameters active as in the dense model, 264 million in all
    moe=(*_moe(experts=16, ffn=384, topk=4, layers=24), "--moe-grouped-gemm"),
    runner=(),
    sequence=1024,
    batch=128,
    # a micro-batch of 65,536 tokens keeps the GPU busier than the host
    micro={"": 64, "mhc_n8": 32, "moe_ordinary": 32, "moe_mhc": 32},
    tokens=2**28,
    validation=2**20,
    vocab_size=16384,
    megabytes=None,
    environment={"OMP_NUM_THREADS": "2"},
    save=45,
    start=75,
    fusing=True,
)
TINY = Size(
    flags=(
        *("--num-layers", "4", "--hidden-size", "32", "--ffn-hidden-size", "64"),
        *("--num-attention-heads", "2", "--distributed-backend", "gloo"),
        *(*LOCAL, "--num-workers", "0", "--init-method-std", "0.06"),
    ),
    moe=_moe(experts=4, ffn=32, topk=2, layers=4),
    runner=("--cpu",),
    sequence=64,
    batch=4,
    micro={"": 2},
    tokens=48 * 256,
    validation=8 * 256,
    vocab_size=512,
    megabytes=4,
    # compiling would take every process longer than its training
    environment={"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    save=60,
    start=0,
    fusing=False,
)
SIZES = {"paper_ratio": PAPER_RATIO, "tiny": TINY}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run that a plan asks for: `rate` None is the best rate that the sweep found.

    Attributes:
        part: the share of a whole run's tokens.
        rate_of: the model whose best rate it takes.
    """

    model: str
    seed: int
    part: float = 1.0
    rate: float | None = None
    rate_of: str = ""


def swept_as(model: str) -> str:
    """The model whose best rate of the sweep a model takes."""
    base = model.removeprefix("moe_")
    return base if base in COMPARED else "mhc"


def _best(model: str, seed: int, part: float = 1.0) -> Job:
    return Job(model, seed, part, rate_of=swept_as(model))


PLANS: Mapping[str, tuple[Job, ...]] = {
    # how fast each is and what memory it takes, before tokens are chosen
    "speed": tuple(Job(m, 1, 1 / 50, 1e-3) for m in (*COMPARED, "moe_ordinary", "moe_mhc")),
    "sweep": tuple(Job(m, 1, 1 / 3, rate) for rate in SWEEP_RATES for m in COMPARED),
    "breaks": tuple(Job(m, 1, 1 / 6, rate) for rate in BREAKING_RATES for m in COMPARED),
    "main": (
        *(_best(m, SEEDS[0]) for m in COMPARED),
        *(_best(m, seed) for seed in SEEDS[1:] for m in ("ordinary", "mhc")),
    ),
    # what the ordinary model makes of as much time as mHC takes, and a little more
    "longer": (_best("ordinary", 1, 4 / 3),),
    "moe": (_best("moe_ordinary", 1, 1 / 3), _best("moe_mhc", 1, 1 / 3)),
    # their reference, and init, are runs of the sweep at the same rate: mhc and mhc_zero
    "ablations": tuple(_best(model, 1, 1 / 3) for model in ABLATIONS),
}
AT_BEST = ("main", "longer", "moe")
"""Plans whose runs are compared at the best rate of each model."""
