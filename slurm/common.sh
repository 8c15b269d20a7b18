# shellcheck shell=bash
# What the batch scripts of this directory have in common: they source it and call `run_job`.
#
#   words -> nodes -> settings -> models -> servers -> one task of srun per rank -> what its end means
#
# srun starts the ranks, not torchrun: a signal to the job then reaches every rank, and a rank that
# dies ends the step. Variables, and what becomes of a job: docs/slurm.md.
set -euo pipefail

# The number of one array task may be that of its whole array, so such a job is named by both.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
job=${job:-${SLURM_JOB_ID:-}}
attempt=${SLURM_RESTART_COUNT:-0}
run_dir='' logs='' requeued='' server_step=''
words=() python=() container=() options=()
declare -A model

run_job() {  # REPOSITORY CONF WORD...: CONF counts where no word is conf=NAME
  root=$1
  [[ $job ]] || fail 2 "sbatch: this is not a job; start the script with sbatch"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  trap at_limit TERM
  trap : USR1  # it is for the ranks
  read_words "${@:2}"
  choose_python
  choose_nodes
  if [[ $conf == debug && ! -e .cache/debug/prepared.json ]]; then
    alone "$root/tools/prepare_debug.py" --out .cache/debug
  fi
  read_settings
  use_converted_models
  start_servers
  train
}

fail() {  # STATUS MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

# --- words ----------------------------------------------------------------------------------------

read_words() {
  local word conf_given=$1 sweep='' task=${SLURM_ARRAY_TASK_ID:-} lines own=()
  shift
  for word in "$@"; do
    if [[ $word == sweep=* ]]; then sweep=${word#sweep=}; fi
  done
  if [[ $sweep ]]; then
    [[ $task ]] || fail 2 "sweep: $sweep without an array; submit with --array=0-N"
    [[ -r $sweep ]] || fail 2 "sweep: there is no file $sweep; name one with a line for each task"
    mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$sweep")
    ((task < ${#lines[@]})) ||
      fail 2 "sweep: $sweep has ${#lines[@]} lines, none for task $task; number them from 0"
    # xargs takes the quotes away and, unlike eval, runs nothing.
    xargs printf '%s\0' <<<"${lines[task]}" >"$scratch/line" ||
      fail 2 "sweep: $sweep, task $task: a quote without its other end; close it"
    mapfile -t -d '' own <"$scratch/line"
  elif [[ $task ]]; then
    fail 2 "--array: its tasks would all write to one run.dir; give sweep=FILE, a line for each"
  fi
  conf=$conf_given own_dir=''
  if [[ $sweep ]]; then own_dir=$task; fi
  for word in "${own[@]}"; do
    if [[ $word == run.dir=* ]]; then own_dir=''; fi
  done
  for word in "$@" "${own[@]}"; do
    case $word in
      sweep=*) ;;
      conf=*) conf=${word#conf=} ;;
      *) words+=("$word") ;;
    esac
  done
}

set_word() {  # KEY VALUE: adds an override whose value is exactly that text
  local value=${2//\\/\\\\}
  words+=("$1=\"${value//\"/\\\"}\"")
}

# --- nodes ----------------------------------------------------------------------------------------

choose_python() {  # MEGAOPD_ENV: where Python and its packages are
  local place=${MEGAOPD_ENV:-} mounts=$PWD:$PWD
  if [[ $root != "$PWD" ]]; then mounts+=,$root:$root; fi
  mounts+=${MEGAOPD_MOUNTS:+,$MEGAOPD_MOUNTS}
  # The program is the one that this script belongs to, installed or not.
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  case $place in
    '') python=(python) ;;
    venv:*) python=("${place#*:}/bin/python") ;;
    apptainer:*)
      python=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "${place#*:}" python) ;;
    pyxis:*)
      python=(python)
      container=("--container-image=${place#*:}" "--container-mounts=$mounts"
        "--container-workdir=$PWD") ;;
    *) fail 2 "MEGAOPD_ENV: found $place; write venv:DIR, pyxis:IMAGE or apptainer:IMAGE" ;;
  esac
  if ((${#container[@]} == 0)) && [[ ! $(command -v "${python[0]}") ]]; then
    fail 5 "MEGAOPD_ENV: there is no ${python[0]} on $(uname -n); name an environment that has it"
  fi
}

choose_nodes() {
  local servers=${MEGAOPD_SERVER_NODES:-0}
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  if [[ ! $servers =~ ^[0-9]+$ ]] || ((servers >= ${#nodes[@]})); then
    fail 2 "MEGAOPD_SERVER_NODES: $servers of ${#nodes[@]} nodes; leave at least one for training"
  fi
  num_nodes=$((${#nodes[@]} - servers))
  ranks_per_node=${SLURM_NTASKS_PER_NODE:-1}
  if [[ $conf == debug ]]; then ranks_per_node=2; fi
  export WORLD_SIZE=$((num_nodes * ranks_per_node)) LOCAL_WORLD_SIZE=$ranks_per_node
  MASTER_ADDR=$(address_of "${nodes[0]}")
  # Below the ports that Linux gives to outgoing connections, and another one for every attempt:
  # what is left of the last may still hold its own.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID + 7919 * attempt) % 12000))
  export MASTER_ADDR MASTER_PORT
  # Tells the link that broke; at INFO the log is full before anything breaks.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # A collective that failed ends its rank, which ends the step; otherwise it waits for ever.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  # Megatron overlaps tensor parallelism by the order in which it launches kernels: one queue.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # As torchrun has it: otherwise every rank takes a thread for each core of the node.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # What a rank says last is in its log when it is killed, and each has its own to say it in.
  export PYTHONUNBUFFERED=1 MEGAOPD_RANK_LOGS=1
}

address_of() {  # NODE: its address, as names of nodes need not resolve and may all be the same
  local text
  text=$(scontrol show node "$1" --oneliner)
  [[ $text =~ NodeAddr=([^[:space:]]+) ]] || fail 5 "Slurm: node $1 has no NodeAddr; see slurm.conf"
  echo "${BASH_REMATCH[1]}"
}

# A task of srun says which rank it is and becomes Python, so that signals reach that.
# shellcheck disable=SC2016
AS_RANK='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'

on_nodes() {  # FIRST NUMBER TASKS_PER_NODE WORD...: Python on these nodes; in the background
  local first=$1 number=$2 tasks=$3
  shift 3
  # Ranks are numbered node by node, and are not bound to the one core that srun would give each.
  exec srun --relative="$first" --nodes="$number" --ntasks="$((number * tasks))" \
    --ntasks-per-node="$tasks" --distribution=block --cpu-bind=none --kill-on-bad-exit=1 \
    --export=ALL "${options[@]}" "${container[@]}" \
    bash -c "$AS_RANK" rank "${python[@]}" "$@"
}

alone() {  # WORD...: Python as one process on the first node; what fails ends the job
  local status=0
  WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 on_nodes 0 1 1 "$@" 2>"$scratch/errors" &
  wait_for $! || status=$?
  if ((status)); then end "$status" "$scratch/errors" "$scratch/errors"; fi
}

wait_for() {  # PID: its status, whatever signals this script gets meanwhile
  local status
  while true; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || return "$status"
  done
}

# --- settings and models --------------------------------------------------------------------------

SETTINGS='
import sys
from megaopd.config import load
from megaopd.errors import run_cli

def show(argv):
    config = load(argv)
    print(config.run.dir, config.student.path, config.teacher.path, sep="\0", end="\0")

run_cli(show, sys.argv[1:])
'

read_settings() {
  local settings
  alone -c "$SETTINGS" "conf=$conf" "${words[@]}" >"$scratch/settings"
  mapfile -t -d '' settings <"$scratch/settings"
  run_dir=${settings[0]} model=([student]=${settings[1]} [teacher]=${settings[2]})
  if [[ $own_dir ]]; then
    run_dir+=/$own_dir
    set_word run.dir "$run_dir"
  fi
  logs=$run_dir/logs/$job-$attempt
  mkdir -p "$logs" || fail 5 "run.dir: $logs cannot be made; choose another directory"
}

use_converted_models() {  # MEGAOPD_CONVERT=DIR: Megatron checkpoints of the models, made once
  local key
  if [[ ! ${MEGAOPD_CONVERT:-} ]]; then return; fi
  for key in student teacher; do
    # What is no Hugging Face directory is left to the run, which says what is wrong with it.
    if [[ -f ${model[$key]}/config.json ]]; then
      convert_once "$(realpath "${model[$key]}")"
      set_word "$key.path" "$converted"
    fi
  done
}

convert_once() {  # HF: sets `converted`; of jobs that start together one does the work
  local holder status=0 tries=0
  converted=${MEGAOPD_CONVERT%/}$1
  mkdir -p "$(dirname "$converted")" ||
    fail 5 "MEGAOPD_CONVERT: $(dirname "$converted") cannot be made; choose another directory"
  until [[ -f $converted/iter_0000000/SHA256SUMS ]]; do
    if ln -s "$job" "$converted.lock" 2>/dev/null; then
      echo "job $job: converts $1 to $converted"
      rm -rf "$converted.$job"
      on_nodes 0 "$num_nodes" "$ranks_per_node" \
        -m megaopd.convert hf-to-megatron "$1" "$converted.$job" &>"$logs/convert.log" &
      wait_for $! || status=$?
      if ((status == 0)); then
        # The first to come is taken: the lock saves work, the rename makes it right.
        mv --no-target-directory --no-clobber "$converted.$job" "$converted"
      fi
      rm -rf "$converted.$job" "$converted.lock"
      if ((status)); then
        end "$(first_failure "$status" "$logs/convert.log")" "$logs/convert.log" "$logs/convert.log"
      elif [[ ! -f $converted/iter_0000000/SHA256SUMS ]]; then
        fail 4 "MEGAOPD_CONVERT: $converted is there, and is no whole checkpoint; remove it"
      fi
    elif holder=$(readlink "$converted.lock"); then
      if [[ $holder == "$job" || $(about "$holder" %T) != @(RUNNING|COMPLETING) ]]; then
        rm -f "$converted.lock"
      else
        sleep 2
      fi
    elif ((++tries == 10)); then
      fail 5 "MEGAOPD_CONVERT: $converted.lock cannot be made; choose another directory"
    fi
  done
}

# --- servers --------------------------------------------------------------------------------------

start_servers() {  # MEGAOPD_SERVER_NODES=K: SGLang servers on the last K nodes
  local node hosts='' ready=() urls status=0
  if ((num_nodes == ${#nodes[@]})); then return; fi
  for node in "${nodes[@]:num_nodes}"; do hosts+=,$(address_of "$node"); done
  # Other users cannot read the environment of our processes; they can read command lines.
  export MEGAOPD_SGLANG_API_KEY=${MEGAOPD_SGLANG_API_KEY:-$(random_key)}
  export MEGAOPD_SGLANG_ADMIN_KEY=${MEGAOPD_SGLANG_ADMIN_KEY:-$(random_key)}
  # Between hosts, without a directory in common; what the user says of it comes later and counts.
  words=(rollout.kind=sglang rollout.sglang.sync=distributed "${words[@]}")
  options=("--output=${logs//%/%%}/servers_%t.log")
  on_nodes "$num_nodes" "$((${#nodes[@]} - num_nodes))" 1 -m megaopd.serve \
    "hosts=${hosts#,}" "urls=$logs/urls" "conf=$conf" "${words[@]}" 2>"$logs/servers_srun.log" &
  server_step=$!
  options=()
  echo "job $job: waits for the servers of ${nodes[*]:num_nodes}"
  until ((${#ready[@]} == ${#nodes[@]} - num_nodes)); do
    if ! kill -0 "$server_step" 2>/dev/null; then
      wait "$server_step" || status=$?
      status=$(first_failure "$status" "$logs/servers_srun.log")
      end "$status" "$logs/servers_srun.log" "$logs"/servers_*.log
    fi
    sleep 1
    mapfile -t ready < <(cat "$logs"/urls_* 2>/dev/null)
  done
  urls=$(IFS=,; echo "${ready[*]}")
  words+=(rollout.launch=false "rollout.urls=[$urls]")
}

servers_were_lost() {
  ! kill -0 "$server_step" 2>/dev/null || grep -qs 'sglang server .*: restart ' "$logs"/servers_*.log
}

random_key() {
  head -c 32 /dev/urandom | base64 --wrap=0 | tr '+/' '-_' | tr -d =
}

# --- training and its end -------------------------------------------------------------------------

train() {
  local status=0
  options=("--output=${logs//%/%%}/rank_%t.log")
  describe >"$logs/job.log"
  echo "job $job, attempt $attempt: $WORLD_SIZE ranks on ${nodes[*]:0:num_nodes}; logs in $logs"
  on_nodes 0 "$num_nodes" "$ranks_per_node" -m megaopd.train "conf=$conf" "${words[@]}" \
    2>"$logs/srun.log" &
  wait_for $! || status=$?
  status=$(first_failure "$status" "$logs/srun.log")
  # That no server answers is the machine's fault if one of ours was lost.
  if ((status == 7)) && [[ $server_step ]] && servers_were_lost; then status=5; fi
  end "$status" "$logs/srun.log" "$logs"/rank_*.log
}

describe() {  # what this attempt runs, where, and the part of its environment that holds no key
  echo "job $job, attempt $attempt, $(date --iso-8601=seconds), nodes ${nodes[*]}"
  printf '%q ' "${python[@]}" -m megaopd.train "conf=$conf" "${words[@]}"
  echo
  local slurm='SLURM_(JOB_(ID|NAME|NODELIST|PARTITION)|CLUSTER_NAME|SUBMIT_DIR)'
  local ours='MEGAOPD_(ROOT|ENV|MOUNTS|CONVERT|SERVER_NODES|MAX_RESTARTS)'
  local ranks='MASTER_(ADDR|PORT)|(LOCAL_)?WORLD_SIZE|OMP_NUM_THREADS|CUDA_[A-Z_]+'
  local links='(NCCL|GLOO|UCX|FI|TORCH_NCCL)_[A-Z0-9_]+|PYTORCH_CUDA_ALLOC_CONF'
  env | grep -E "^($slurm|$ours|$ranks|$links)=" | sort
}

first_failure() {  # STATUS SRUN_LOG: the status of the rank that failed first
  # srun itself gives the highest of all, those that it ended because of the first included.
  case $(grep -m 1 -E '^srun: error: [^:]+: tasks? [0-9,-]+: ' "$2") in
    *': Exited with exit code '*)
      sed -nE '/^srun: error: .*: Exited with exit code ([0-9]+)$/{s//\1/p;q}' "$2" ;;
    '') echo "$1" ;;
    *) echo 137 ;;  # a signal
  esac
}

end() {  # STATUS SRUN_LOG LOG...: ends the job as the status of what it ran wants it
  local status=$1 log line=''
  if [[ $server_step ]]; then kill "$server_step" 2>/dev/null || true; fi
  if ((status)); then cat "$2" >&2; fi
  # The logs are in the order of the ranks: rank 0 comes first if it has something to say.
  for log in "${@:3}"; do
    line=$(grep -hsE '^(error|stopped): ' "$log" | tail -n 1) || true
    if [[ $line ]]; then break; fi
  done
  line=${line:-error: job $job: status $status without an error line; read ${logs:-what is above}}
  if ((status == 0)); then
    echo "job $job: done"
  elif ((status == 75)); then
    echo "$line"
    requeue || fail 75 "job $job: Slurm does not requeue it; submit it again, and it goes on"
  elif ((status == 5 || status > 128)) && may_fail_again; then
    echo "$line"
    requeue || fail "$status" "job $job: Slurm does not requeue it; submit it again, and it goes on"
  else
    echo "$line" >&2
  fi
  exit "$status"
}

may_fail_again() {  # counts failures in a row that brought no new checkpoint
  local counter=$run_dir/logs/$job.failures number=0 newest
  if [[ ! $run_dir ]]; then
    ((attempt < ${MEGAOPD_MAX_RESTARTS:-10}))
    return
  fi
  newest=$(newest_checkpoint)
  if [[ -f $counter ]]; then
    mapfile -t lines <"$counter"
    if [[ ${lines[1]} == "$newest" ]]; then number=${lines[0]}; fi
  fi
  printf '%s\n' "$((number + 1))" "$newest" >"$counter"
  ((number < ${MEGAOPD_MAX_RESTARTS:-10}))
}

newest_checkpoint() {
  local directory newest=none
  for directory in "$run_dir"/checkpoints/iter_*; do
    if [[ -d $directory ]]; then newest=$directory; fi
  done
  echo "$newest"
}

about() {  # JOB FORMAT: what squeue says of it
  squeue --noheader --job="$1" --format="$2" 2>/dev/null || true
}

requeue() {  # once, and only if Slurm has not taken the job in hand: it requeues after preemption
  local try state
  for try in 1 2 3 4 5 6; do
    state=$(about "$job" %T)
    if [[ $state == RUNNING ]]; then
      if scontrol requeue "$job"; then
        requeued=yes
        return
      fi
    elif [[ $state ]]; then
      echo "job $job: Slurm is ending it already ($state), and requeues it where that is due"
      return
    fi
    if ((try < 6)); then sleep 10; fi
  done
  return 1
}

at_limit() {  # SIGTERM: Slurm ends the job. At its time limit that would be for good.
  if [[ ! $requeued && $(about "$job" %r) == TimeLimit ]] && may_fail_again; then
    echo "job $job: at its time limit before the checkpoint was complete; give --signal more time"
    if scontrol requeue "$job"; then requeued=yes; fi
  fi
}
