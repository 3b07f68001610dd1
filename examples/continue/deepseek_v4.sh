#!/usr/bin/env bash
# Takes the hyper-connections of a tiny DeepSeek-V4 from Hugging Face's format, goes on training a
# V4-like model with them in Megatron and writes them back; on the CPU, in two minutes.
#
#   examples/continue/deepseek_v4.sh --lr 1e-3    further flags go to Megatron and win
#
# The checkpoint is made on the spot by the model class of transformers, with weights from a seed:
# nothing is downloaded, and nothing of it has been trained.
#
# Imported, trained and written back: the two sites of each layer and the learned head.
# Not imported: all else. Attention, experts, embeddings are what a mapping of your own brings
# (Megatron-Bridge, a script). Here an ordinary Megatron model stands for its result: a mixture of
# experts with latent attention, which Megatron's local layers can run on a CPU. V4's own attention
# (compressed, sparse) is not in it. So the loss shows that training goes on, not what V4 can do.
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=deepseek_v4
source examples/continue.sh
continue_from deepseek_v4 "$@"
