#!/usr/bin/env bash
# A recipe on several nodes without Slurm. The same command on every node, in any order:
#
#   NNODES=4 HEAD=node1 RUN=steerlm2_1 recipes/launch/torchrun.sh \
#       steerlm2_distributed --config llama3_1/70B_steerlm2_multinode lr=1e-7
#
# HEAD: one of the nodes, by a name or address that all can reach; port 29500 (PORT) must be open.
# RUN: any name, the same on all nodes. NPROC: GPUs of a node. output_dir must be on a file system
# that the nodes share.
#
# A lost process: all are started again (3 times at most) and resume from the newest whole
# checkpoint. A lost node: start the command again there within 10 minutes, and the others wait for
# it. To end the run with a checkpoint: kill -TERM the pid of this script, on every node.

set -uo pipefail

if (($# == 0)); then
    echo "usage: NNODES=N HEAD=HOST torchrun.sh RECIPE --config CONFIG [KEY=VALUE...]" >&2
    exit 2
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # train.sbatch explains these
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
logs=${LOG_DIR:-$PWD/logs}/${RUN:-steerlm2}
mkdir -p "$logs"

arguments=("$@")
case $1 in
*_distributed) arguments+=(resume_from_checkpoint=true) ;;
esac

# on_node, signals-to-handle: SIGTERM is for the ranks, which save and end with status 0.
exec python -m steerlm2.runs.on_node \
    tune run --nnodes "${NNODES:-1}" --nproc_per_node "${NPROC:-8}" \
    --rdzv_id "${RUN:-steerlm2}" --rdzv_backend c10d \
    --rdzv_endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv_conf join_timeout=600 \
    --max_restarts 3 --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    --log_dir "$logs" --redirects 3 --tee 0:3 "${arguments[@]}"
