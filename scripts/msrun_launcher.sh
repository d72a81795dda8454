#!/usr/bin/env bash
# Starts a command on several cards, or CPU processes, and watches it: the same positional arguments as MindFormers' launcher.
#   msrun_launcher.sh COMMAND                                                                            8 workers
#   msrun_launcher.sh COMMAND WORKER_NUM
#   msrun_launcher.sh COMMAND WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
#   msrun_launcher.sh COMMAND WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT
set -euo pipefail

case $# in
    1|2|6|9) ;;
    *)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
        echo "error: $# arguments are given, 1, 2, 6 or 9 are wanted. Is COMMAND in quotes?" >&2
        exit 2
        ;;
esac

module=$(cd "$(dirname "${BASH_SOURCE[0]}")/../research/qwen1_5" && pwd)
if ! python=$(command -v python || command -v python3); then
    echo "error: no python in PATH. Activate the environment that MindSpore is installed in." >&2
    exit 2
fi
PYTHONPATH=$module${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m qwen15.launch "$@"
