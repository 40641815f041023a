"""Slurm's commands as far as the batch scripts use them, on this machine and without Slurm.

`sbatch` runs the script at once, task by task; `srun` starts all ranks. At most `most` of either
are run, however many the command line asks for. Requeueing and signals need a real Slurm: see
`tests/support/slurm.py`.
"""

import stat
from pathlib import Path

_SBATCH = """#!/bin/bash
# Options up to the script; the rest is the script's.
array="" nodes=1 ranks=1 cpus=1
while [ $# -gt 0 ]; do
    case $1 in
        --*=*) set -- "${{1%%=*}}" "${{1#*=}}" "${{@:2}}" ;;
        --array) array=${{2%%\\%*}}; shift 2 ;;
        --nodes) nodes=$2; shift 2 ;;
        --ntasks-per-node) ranks=$2; shift 2 ;;
        --cpus-per-task) cpus=$2; shift 2 ;;
        --*) shift 2 ;;
        *) break ;;
    esac
done
least() {{ echo $(($1 < {most} ? $1 : {most})); }}
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=$$ SLURM_ARRAY_JOB_ID=$$
export SLURM_CPUS_PER_TASK=$(least "$cpus")
export SLURM_NTASKS=$(least $((nodes * ranks))) SLURM_JOB_NODELIST=localhost
export SLURM_TASKS_PER_NODE=$SLURM_NTASKS
if [ -z "$array" ]; then exec bash "$@"; fi
first=${{array%%-*}}
export SLURM_ARRAY_TASK_COUNT=$(least $((${{array##*-}} - first + 1)))
for ((task = first; task < first + SLURM_ARRAY_TASK_COUNT; task++)); do
    SLURM_ARRAY_TASK_ID=$task bash "$@" || exit
done
"""

_SRUN = """#!/bin/bash
shift # --kill-on-bad-exit
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    ranks+=($!)
done
for rank in "${ranks[@]}"; do wait "$rank" || exit; done
"""

_SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && echo "$3"
"""


def install(folder: Path, most: int = 2) -> Path:
    """Write the commands into a folder, to be put first on PATH."""
    folder.mkdir(exist_ok=True)
    texts = {"sbatch": _SBATCH.format(most=most), "srun": _SRUN, "scontrol": _SCONTROL}
    for name, text in texts.items():
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder
