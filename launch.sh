#!/usr/bin/env bash
# One process a GPU (or NPROC CPU processes) on this node or many, with the flags of `python simple_distill.py`.
#
#   ./launch.sh --teacher T --student S                      every GPU of this node
#   NPROC=2 ./launch.sh                                      two processes (CPU too)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./launch.sh ...   on the first of two nodes; NODE_RANK=1 on the second
#   srun --ntasks-per-node=1 ./launch.sh ...                 under Slurm all of these come from the environment
#
# MASTER_PORT (29500) is for more than one run on the same hosts. Ctrl-C, SIGTERM or a closed terminal: the run saves and exits 0.
set -euo pipefail
[[ "${1:-}" == "--help" || "${1:-}" == "-h" ]] && { sed -n '2,10s/^# \{0,1\}//p' "$0"; exec python "$(dirname "$0")/simple_distill.py" --help; }

fail() { echo "error: $1" >&2; exit 2; }
number() { [[ "$2" =~ ^[0-9]{1,9}$ ]] && (( 10#$2 >= $3 )) || fail "$1 is '$2' in the environment, not a number from $3 on"; }

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
NPROC=${NPROC:-$(( gpus > 0 ? gpus : 1 ))}
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
if [[ -z "${MASTER_ADDR:-}" && -n "${SLURM_JOB_NODELIST:-}" ]]; then MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); fi
number NPROC "$NPROC" 1; number NNODES "$NNODES" 1; number NODE_RANK "$NODE_RANK" 0; number MASTER_PORT "${MASTER_PORT:-29500}" 1
(( NODE_RANK < NNODES )) || fail "NODE_RANK is $NODE_RANK of NNODES $NNODES; nodes count from 0"
(( ${MASTER_PORT:-29500} < 65536 )) || fail "MASTER_PORT is $MASTER_PORT; ports end at 65535"

where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
if (( NNODES == 1 )) && [[ -z "${MASTER_PORT:-}" ]]; then where=(--standalone); fi   # picks a free port by itself
if (( NNODES > 1 )); then echo "node $NODE_RANK of $NNODES waits for the others at ${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}"; fi
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
forward() {   # to the workers; where there are none yet (a second node is waited for), torchrun itself ends
    pkill "-$1" -P "$runner" && return 0   # a bare return would give back what the signal broke off
    kill -TERM "$runner" 2>/dev/null || return 0
    sleep 1; kill -KILL "$runner" 2>/dev/null || true
}
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'forward TERM' HUP   # the terminal was closed
# A signal ends `wait` early; once the runner is gone, `wait` still knows how it ended.
code=0; wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do wait "$runner" || true; done
wait "$runner" 2>/dev/null && code=0 || code=$?
exit "$code"
