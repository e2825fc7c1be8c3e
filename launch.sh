#!/usr/bin/env bash
# One process a GPU (or NPROC CPU processes) on this node or many, with the flags of `python simple_distill.py`.
#
#   ./launch.sh --teacher T --student S                      every GPU of this node
#   NPROC=2 ./launch.sh                                      two processes (CPU too)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./launch.sh ...   on the first of two nodes; NODE_RANK=1 on the second
#   srun --ntasks-per-node=1 ./launch.sh ...                 under Slurm all of these come from the environment
#
# MASTER_PORT (29500) is for more than one run on the same hosts. Ctrl-C or SIGTERM: the run saves and exits 0.
set -euo pipefail
[[ "${1:-}" == "--help" || "${1:-}" == "-h" ]] && { sed -n '2,10s/^# \{0,1\}//p' "$0"; exec python "$(dirname "$0")/simple_distill.py" --help; }

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
NPROC=${NPROC:-$(( gpus > 0 ? gpus : 1 ))}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [[ -z "${MASTER_ADDR:-}" && -n "${SLURM_JOB_NODELIST:-}" ]]; then MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); fi

where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
if (( NNODES == 1 )) && [[ -z "${MASTER_PORT:-}" ]]; then where=(--standalone); fi   # picks a free port by itself
cores=$(nproc); export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores / NPROC > 0 ? cores / NPROC : 1 ))}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# torchrun, but what a user can mend stays one `error:` line with exit code 2; another failure shows torchrun's summary.
torchrun='import logging, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.ERROR)   # of torchrun itself
try:
    main()
except ChildFailedError as e:
    code = e.get_first_failure()[1].exitcode
    code == 2 or print(e, file=sys.stderr)
    sys.exit(code if code > 0 else 1)'
# In a session of its own torchrun does not see the terminal's Ctrl-C: the workers get it from here, save, and exit 0.
setsid python -c "$torchrun" --nproc-per-node "$NPROC" "${where[@]}" "$(dirname "$0")/simple_distill.py" "$@" &
runner=$!
trap 'pkill -INT -P "$runner" || true' INT
trap 'pkill -TERM -P "$runner" || true' TERM
code=0; wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do code=0; wait "$runner" || code=$?; done   # a signal ends `wait` early
exit "$code"
