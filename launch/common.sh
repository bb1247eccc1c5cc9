# shellcheck shell=bash
# Sourced by the scripts beside it.

# Ends with the comment at the head of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "launch/${0##*/}" >&2
  exit 2
}

fail() {
  echo "$0: $*" >&2
  exit 1
}

# Ends with the names of all settings that are missing.
need() {
  local name missing=
  for name; do
    [[ -n ${!name:-} ]] || missing+=" $name"
  done
  [[ -z $missing ]] || fail "set$missing: without a command this script says what they are"
}

# Ends unless run.py's arguments say where all hosts keep the run.
need_workdir() {
  [[ " $* " == *' --workdir'[=\ ]* ]] || fail "add --workdir=gs://BUCKET/RUN, or another place that all hosts share"
}

# Executes a command, or with DRY_RUN=1 prints it as a shell would read it.
run() {
  [[ -n ${DRY_RUN:-} ]] || { "$@"; return; }
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
    line+=" $word"
  done
  echo "${line:1}"
}
