#!/usr/bin/env bash
# As deepseek_v4.sh, with the hyper-connections of DeepSeek-V4.1: a site reads the streams with the
# H_pre of the site before (single pass), and the last H_pre ends the model in a head's place.
#
#   examples/continue/deepseek_v4_1.sh --lr 1e-3    further flags go to Megatron and win
#
# transformers has no class for this model. The checkpoint is a file of hyper-connections alone,
# drawn from a seed, under the names that DeepSeek's checkpoint has.
#
# Imported, trained and written back: the two sites of each layer.
# Not imported: all else, as in deepseek_v4.sh. A draft for multi-token prediction (`mtp.*`) and
# Engram have no counterpart; convert names them where a checkpoint has them, this one has none.
set -euo pipefail
cd "$(dirname "$0")/../.."
NAME=deepseek_v4_1
source examples/continue.sh
continue_from deepseek_v4_1 "$@"
