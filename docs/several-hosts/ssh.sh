#!/usr/bin/env bash
# Starts the server on several hosts over ssh, a process on each, and shows their logs (docs/several-hosts.md):
#   ssh.sh 10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 -- --mesh tp=8,cp=4 --model DIR
# The first host is process 0, under an address that the others reach. What follows `--` are the server's flags, the same for all.
# Ctrl-C ends the server when its requests have ended: every process gets SIGTERM, also when this script's connection breaks.
#
# From the environment: PYTHON, its path on the hosts (python); COORDINATOR_PORT (8476).
set -euo pipefail

hosts=()
while (($#)) && [[ $1 != -- ]]; do
  hosts+=("$1")
  shift
done
if ((${#hosts[@]} == 0 || $# == 0)); then
  echo "usage: $0 HOST... -- FLAGS OF THE SERVER" >&2
  exit 2
fi
shift

# On each host. The first line of the input is the key, so that no user of the host sees it among the arguments; the input's end
# is the sign to stop. (A background command reads from /dev/null: descriptor 4 keeps the input.)
# shellcheck disable=SC2016
remote='read -r JAX_MLA_CP_CLUSTER_KEY; export JAX_MLA_CP_CLUSTER_KEY
exec 4<&0
"$@" 4<&- & server=$!
{ cat; kill -TERM "$server"; } <&4 >/dev/null 2>&1 & watch=$!
wait "$server"; code=$?
kill "$watch" 2>/dev/null
exit "$code"'

key=$(openssl rand -hex 32)
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/stop"
exec 3<>"$folder/stop" 4<"$folder/stop" # what reads from 4 sees its end when 3 is closed

jobs=()
for i in "${!hosts[@]}"; do
  command=("${PYTHON:-python}" -m jax_mla_cp.serve
    --coordinator "${hosts[0]#*@}:${COORDINATOR_PORT:-8476}" --num-processes "${#hosts[@]}" --process-id "$i" "$@")
  {
    trap '' INT # Ctrl-C is for this script
    ssh -o BatchMode=yes -o ServerAliveInterval=15 "${hosts[i]}" "$(printf '%q ' bash -c "$remote" server "${command[@]}")" \
      < <(echo "$key" && exec cat <&4) 2>&1 | sed -u "s/^/$i ${hosts[i]}: /"
  } 3>&- &
  jobs+=("$!")
done

interrupted=
stop() {
  trap '' INT TERM
  interrupted=1
  echo "stopping: running requests may finish (--drain-timeout)" >&2
  exec 3>&-
}
trap stop INT TERM

status=0
for job in "${jobs[@]}"; do
  while true; do
    interrupted='' code=0
    wait "$job" || code=$?
    if [[ -z $interrupted ]]; then break; fi # otherwise the signal has ended `wait`, not the job
  done
  if ((code > status)); then status=$code; fi
done
exit "$status"
