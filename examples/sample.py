"""Samples text from a checkpoint that `pretrain_gpt.py` saved for the byte-level data.

Takes the flags of the training run that describe the model (and `--mhc`, through the same runner),
`--load` for the checkpoint's folder, and its own:

    python -m megatron_mhc.run --cpu examples/sample.py MODEL_FLAGS --mhc --load DIR \\
        --prompt "def " --temperature 0.8 --sample-seed 1

One process; every new byte runs the whole context again, which a model of this size can afford.
"""

import argparse

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from pretrain_gpt import describe_model

END_OF_DOCUMENT = 256


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds this script's flags to Megatron's."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--prompt", default="def ", help="the text to continue")
    group.add_argument("--num-texts", type=int, default=2, help="how many continuations")
    group.add_argument("--num-bytes", type=int, default=200, help="how long each becomes")
    group.add_argument(
        "--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest"
    )
    group.add_argument("--top-k", type=int, default=40, help="candidates at each byte; 0 takes all")
    group.add_argument("--sample-seed", type=int, default=0, help="the same seed, the same text")
    return parser


def check(args: argparse.Namespace) -> None:
    """Stops with a sentence where the flags make no sense."""
    problems = {
        "--load is missing: name the folder that training gave as --save": args.load is None,
        f"no checkpoint in {args.load}": not checkpoint_exists(args.load),
        "sampling runs in one process: any checkpoint loads into one": args.world_size != 1,
        "--prompt is empty": not args.prompt,
        "--num-texts and --num-bytes must be at least 1": min(args.num_texts, args.num_bytes) < 1,
        "--temperature and --top-k must not be negative": min(args.temperature, args.top_k) < 0,
        f"--vocab-size must be {END_OF_DOCUMENT + 1}: bytes and the end of a document": (
            args.vocab_size != END_OF_DOCUMENT + 1
        ),
    }
    for sentence, is_so in problems.items():
        if is_so:
            raise SystemExit(f"sample: {sentence}")


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """Builds the model as training does and loads its weights, without an optimizer."""
    args.skip_train = args.no_load_optim = args.no_load_rng = True
    initialize_megatron()
    config, model_provider = describe_model(args)
    if model_provider is not None:
        how = {"model_provider_func": model_provider}
    else:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        how = {"cfg_container": config, "pg_collection": groups}
    models, _, _ = setup_model_and_optimizer(model_type=ModelType.encoder_or_decoder, **how)
    return models[0].eval()


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws one token for each row of `logits` [rows, vocabulary]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(model: torch.nn.Module, args: argparse.Namespace) -> list[str]:
    """Continues the prompt `num_texts` times, each up to `num_bytes` or the document's end."""
    # Drawn on the host, so that a seed means the same text on every device.
    generator = torch.Generator().manual_seed(args.sample_seed)
    tokens = torch.tensor([list(args.prompt.encode())] * args.num_texts)
    for _ in range(args.num_bytes):
        context = tokens[:, -args.seq_length :].cuda()
        positions = torch.arange(context.size(1)).cuda().expand_as(context)
        logits = model(context, positions, None)[:, -1, : args.vocab_size].float().cpu()
        new = choose(logits, args.temperature, args.top_k, generator)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
    texts = []
    for row in tokens.tolist():
        end = row.index(END_OF_DOCUMENT) if END_OF_DOCUMENT in row else len(row)
        texts.append(bytes(row[:end]).decode(errors="replace"))
    return texts


def main() -> None:
    """Loads the checkpoint and prints the texts."""
    args = parse_and_validate_args(extra_args_provider=add_arguments)
    check(args)
    model = load_model(args)
    for number, text in enumerate(generate(model, args), start=1):
        print(f"--- sample {number} of {args.num_texts}, iteration {args.iteration} ---")
        print(text, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
