#!/usr/bin/env bash
# Pipelines, expert, tensor and context parallelism over NCCL, on 2, 4 or 8 GPUs of one host, in one
# call under 10 minutes; --help says more.
#
#   benchmarks/multi_gpu/run.sh --out runs/multi_gpu
#   benchmarks/multi_gpu/run.sh --cpu --out /tmp/multi_gpu      # rehearses on CPU processes, tiny
set -euo pipefail
cd "$(dirname "$0")/../.."
# NVLink multicast wants rights that a container may not have.
export NCCL_NVLS_ENABLE=0
# Transformer Engine's attention has a faster backward that adds in any order.
export NVTE_ALLOW_NONDETERMINISTIC_ALGO=0
exec "${PYTHON:-python3}" benchmarks/multi_gpu/run.py "$@"
