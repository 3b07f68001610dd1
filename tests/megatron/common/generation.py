"""What a trained model reads with a cache, and what Megatron's static engine lets it write."""

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from tests.megatron.common.scenario import SEQUENCE, VOCABULARY


@torch.no_grad()
def decoded(model: GPTModel) -> dict[str, Tensor]:
    """Logits [b, t, VOCABULARY] of the last five of twelve tokens.

    whole: all tokens in one forward; cached: eight, then one at a time, past keys and values kept.
    """
    model.eval()
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12).expand(2, -1)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=12)
    options = {"inference_context": context, "runtime_gather_output": True}
    parts = [model(tokens[:, :8], positions[:, :8], mask[..., :8, :8], **options)]
    context.enable_decode_mode()
    for at in range(8, 12):
        context.sequence_len_offset = at
        one = slice(at, at + 1)
        parts.append(model(tokens[:, one], positions[:, one], None, **options))
    # after those, which are refused: a later stage has nothing to read
    whole = model(tokens, positions, mask)
    return {"whole": whole[:, -5:], "cached": torch.cat(parts, 1)[:, -5:]}


class Letters:
    """A tokenizer of Megatron's kind: a token is a letter's number."""

    vocab_size, bos, eod = VOCABULARY, 1, VOCABULARY - 1

    def tokenize(self, text: str) -> list[int]:
        """The numbers of a text's letters."""
        return [ord(letter) for letter in text]

    def detokenize(self, tokens: list[int], **_: Any) -> str:
        """The text of these numbers."""
        return "".join(map(chr, tokens))


def generated(model: GPTModel) -> dict[str, list[str]]:
    """Texts that follow two prompts, greedily.

    engine: from Megatron's static engine, which runs in inference mode; forward: from whole
    forwards under `no_grad`, one for each letter.
    """
    prompts, letters, length = ["to be or", "not to be"], Letters(), 8
    model.eval()
    model.config.attention_backend = AttnBackend.local
    # before the forwards, for which a later pipeline stage would have nothing to read
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=SEQUENCE)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), letters)
    engine = StaticInferenceEngine(controller, legacy=True)
    InferenceMode.unset_active()
    texts = []
    for prompt in prompts:
        tokens = letters.tokenize(prompt)
        for _ in range(length):
            mask = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool).triu(1)
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], mask)
            tokens.append(int(logits[0, -1].argmax()))
        texts.append(letters.detokenize(tokens[len(prompt) :]))
    sampling = SamplingParams(num_tokens_to_generate=length, top_k=1, return_log_probs=True)
    requests = engine.generate(prompts=prompts, sampling_params=sampling)
    InferenceMode.unset_active()  # of this process: other models of it train
    return {"engine": [request.generated_text for request in requests], "forward": texts}
