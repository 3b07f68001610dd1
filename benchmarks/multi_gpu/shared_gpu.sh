#!/usr/bin/env bash
# One rank of several that share a GPU.
#
#   torchrun --nproc-per-node 4 --no-python benchmarks/multi_gpu/shared_gpu.sh SCRIPT FLAGS
#
# NCCL wants one rank a GPU and host, so each is a host of its own; they meet over sockets.
set -euo pipefail
[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit; }
IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-0}"
export CUDA_VISIBLE_DEVICES=${cards[LOCAL_RANK % ${#cards[@]}]} LOCAL_RANK=0
export NCCL_HOSTID=rank$RANK NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} NCCL_IB_DISABLE=1
exec "${PYTHON:-python3}" -m megatron_mhc.run "$@"
