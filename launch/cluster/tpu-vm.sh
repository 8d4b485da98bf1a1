#!/bin/bash
# Training on a TPU slice of VMs by gcloud, the same command on every worker.   docs/pods.md explains every choice.
#
#     launch/cluster/tpu-vm.sh create  NAME ZONE v5p-128
#     launch/cluster/tpu-vm.sh install NAME ZONE REPOSITORY
#     launch/cluster/tpu-vm.sh start   NAME ZONE WORKERS train --config=v3_scaling --workdir=/shared/run
#     launch/cluster/tpu-vm.sh stop    NAME ZONE          # SIGTERM: the run saves and ends
#     launch/cluster/tpu-vm.sh logs    NAME ZONE

set -euo pipefail

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 2
}

[[ $# -ge 3 || (${1:-} == @(stop|logs) && $# -eq 3) ]] || usage
action=$1 name=$2 zone=$3
shift 3

# Runs a command line on all workers.
everywhere() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case $action in
create)
    gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="${1:?type, such as v5p-128}" \
        --version="${RUNTIME:-v2-alpha-tpuv5}"
    ;;
install)
    everywhere "python3 -m venv ~/venv && git clone $(printf %q "${1:?repository}") ~/deepseek_jax \
        && ~/venv/bin/pip install --quiet -e ~/deepseek_jax[tpu]"
    ;;
start)
    workers=${1:?number of workers}
    shift
    words=$(printf '%q ' "$@")
    # JAX asks the metadata server for everything but whether there are others: that is what the number says.
    # A unit of systemd outlives the ssh session, and its stop is a SIGTERM with the time that a save takes.
    everywhere "sudo systemd-run --unit=deepseek-jax --collect --uid=\$(id -u) --working-directory=\$HOME \
        --property=TimeoutStopSec=180 --property=SuccessExitStatus=143 --setenv=JAX_NUM_PROCESSES=$workers --setenv=HOME=\$HOME \
        ~/venv/bin/deepseek-jax supervise -- ~/venv/bin/deepseek-jax $words"
    ;;
stop)
    everywhere "sudo systemctl stop deepseek-jax"
    ;;
logs)
    everywhere "journalctl --unit=deepseek-jax --lines=20 --no-pager"
    ;;
*)
    usage
    ;;
esac
