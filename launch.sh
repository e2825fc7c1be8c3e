#!/usr/bin/env bash
# One process a GPU (or NPROC CPU processes) on this node or many, with the flags of simple_distill.py.
#   ./launch.sh --teacher T --student S                      every GPU of this node
#   NPROC=2 ./launch.sh                                      two processes (CPU too)
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./launch.sh ...   the first of two nodes; NODE_RANK=1: the second
#   srun --ntasks-per-node=1 ./launch.sh ...                 under Slurm all of these come from the environment
# MASTER_PORT (29500) is for more than one run on the same hosts. Ctrl-C, SIGTERM, a closed terminal: saves, exits 0.
set -euo pipefail
[[ "${1:-}" =~ ^(-h|--help)$ ]] && { sed -n '2,7s/^# \{0,1\}//p' "$0"; exec python "$(dirname "$0")/simple_distill.py" -h; }
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
NNODES=${NNODES:-${SLURM_NNODES:-1}} NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
[[ $NPROC-$NODE_RANK-$NNODES =~ ^[1-9][0-9]*-[0-9]+-[0-9]+$ ]] && (( NODE_RANK < NNODES )) ||
    { echo "error: NPROC is $NPROC, NODE_RANK $NODE_RANK of NNODES $NNODES; nodes count from 0" >&2; exit 2; }
[[ -z "${SLURM_JOB_NODELIST:-}" ]] || first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
where="--nnodes=$NNODES --node-rank=$NODE_RANK --master-addr=${MASTER_ADDR:-${first:-127.0.0.1}} --master-port=${MASTER_PORT:-29500}"
if (( NNODES == 1 )) && [[ -z "${MASTER_PORT:-}" ]]; then where=--standalone; else echo "waits for all nodes: $where"; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) > NPROC ? $(nproc) / NPROC : 1 ))}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# torchrun, but what a worker could say in one `error:` line stays that line, and exit code 2. It would kill the workers 30
# seconds after a signal, so it hears none but Ctrl-\; they get theirs from here, and take as long as they need to save.
torchrun='import logging, signal, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.ERROR)   # of torchrun itself
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
try:
    main()
except ChildFailedError as e:
    sys.exit(2 if e.get_first_failure()[1].exitcode == 2 else str(e))'
python -c "$torchrun" --signals-to-handle=SIGQUIT --nproc-per-node="$NPROC" $where "$(dirname "$0")/simple_distill.py" "$@" &
trap 'pkill -TERM -P $! || { sleep 1; kill -KILL $! || true; }' INT TERM HUP   # no workers: it waits for another node
until wait $! || ! kill -0 $! 2> /dev/null; do :; done   # a signal ends `wait` early
wait $!   # how torchrun ended, once more
