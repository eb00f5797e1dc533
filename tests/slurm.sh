#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for the tests marked `slurm`.
#
#   tests/slurm.sh up            start it (and get it, if need be), wait until the nodes are idle
#   eval "$(tests/slurm.sh env)" what its clients need
#   tests/slurm.sh down          cancel its jobs and end its processes
#
# Needs root on Debian or Ubuntu, and neither systemd nor cgroups. SLURM's packages are unpacked
# under $SLURM_ROOT, not installed, unless the system has them. One munged, one slurmctld and two
# slurmds on 127.0.0.1, ports $SLURM_PORT and the two above it; several clusters live side by side
# with roots and ports of their own. Outside $SLURM_ROOT only a marked line of /etc/hosts is
# written, since a job's processes meet at the name of its first node, and taken out by `down`.
#
# The nodes have hostnames of their own, pretended GPUs, and two partitions: jobs of `high` preempt
# those of `test`, the default, which are requeued.
set -euo pipefail

ROOT=${SLURM_ROOT:-/tmp/slurm-tests}
PORT=${SLURM_PORT:-16900}
GRACE=10     # seconds from a preemption's signal to the forced requeue
KILL_WAIT=5  # seconds from SIGTERM to SIGKILL; SLURM's default is 30
REQUEUE_WAIT=5  # seconds that a requeued job is held back; SLURM's default is 120

NODES=(node1 node2)
PACKAGES=(slurmctld slurmd slurm-client munge)
MARK="# slurm-tests:$ROOT"
export SLURM_CONF=$ROOT/etc/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

die() { echo "slurm.sh: error: $*" >&2; exit 1; }
[[ $ROOT == /* && $ROOT != *[[:space:]]* ]] || die "SLURM_ROOT: an absolute path without spaces"

locate() { # where the programs are: unpacked here, or the system's
  if [ -f "$ROOT/pkg/.complete" ]; then
    BASE=$ROOT/pkg
    PLUGINS=$(dirname "$(find "$BASE/usr/lib" -name libslurmfull.so -print -quit)")
    export LD_LIBRARY_PATH=$PLUGINS:${PLUGINS%/*}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    PATH=$BASE/usr/bin:$PATH
  elif [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ] && [ -x /usr/sbin/munged ]; then
    BASE='' PLUGINS=''
  else
    return 1
  fi
}

get() { # the packages and those of their dependencies that are missing, unpacked
  [ "$(id -u)" = 0 ] || die "needs root"
  command -v apt-get >/dev/null || die "no SLURM here, and no apt-get to get it with"
  mkdir -p "$ROOT/pkg" "$ROOT/debs/partial"
  local options=(-y -qq --no-install-recommends --download-only -o "Dir::Cache::archives=$ROOT/debs")
  apt-get install "${options[@]}" "${PACKAGES[@]}" >"$ROOT/apt.log" 2>&1 ||
    { apt-get update -qq && apt-get install "${options[@]}" "${PACKAGES[@]}"; } >>"$ROOT/apt.log" 2>&1 ||
    { tail -n 5 "$ROOT/apt.log" >&2; die "apt-get found no ${PACKAGES[*]}"; }
  for deb in "$ROOT"/debs/*.deb; do dpkg-deb -x "$deb" "$ROOT/pkg"; done
  for name in slurmctld slurmd slurmstepd; do # what installing would link
    [ -e "$ROOT/pkg/usr/sbin/$name" ] || ln -s "$name-wlm" "$ROOT/pkg/usr/sbin/$name"
  done
  rm -rf "$ROOT/debs"
  : >"$ROOT/pkg/.complete"
}

configure() {
  mkdir -p "$ROOT"/{etc,run,log,state,dev} "${NODES[@]/#/$ROOT/spool/}"
  chmod 755 "$ROOT" "$ROOT/run"
  (umask 077; head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
  # A GPU must be a character device: copies of /dev/null. SLURM sets CUDA_VISIBLE_DEVICES by them.
  local gpu=Count=8
  if for i in {0..7}; do mknod "$ROOT/dev/gpu$i" c 1 3 || exit 1; done 2>/dev/null; then
    gpu="File=$ROOT/dev/gpu[0-7]"
  fi
  echo "Name=gpu $gpu" >"$ROOT/etc/gres.conf"
  # Ids begin with the clock, so that no two clusters' jobs share a folder. PREEMPTED jobs are to
  # get their own signal, not only SIGTERM.
  cat >"$SLURM_CONF" <<EOF
ClusterName=tests
SlurmctldHost=slurmctl(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=$REQUEUE_WAIT
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
${PLUGINS:+PluginDir=$PLUGINS}
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=$KILL_WAIT
MinJobAge=86400
FirstJobId=$((1 + $(date +%s) % 60000000))
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
EOF
  for i in "${!NODES[@]}"; do
    echo "NodeName=${NODES[i]} NodeHostname=${NODES[i]} NodeAddr=127.0.0.1 Port=$((PORT + i + 1))" \
      "CPUs=64 RealMemory=1000000 Gres=gpu:8 Feature=volta32gb" >>"$SLURM_CONF"
  done
}

start() { # start HOSTNAME COMMAND...: a daemon that goes into the background by itself
  local name=$1; shift
  unshare --uts bash -c 'hostname "$0" && exec "$@"' "$name" "$@" \
    </dev/null >>"$ROOT/log/start.out" 2>&1 || { cat "$ROOT/log/start.out" >&2; die "no $1"; }
}

pid_of() { # pid_of FILE: of a live process of this cluster
  local pid
  pid=$(cat "$1" 2>/dev/null) && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q "$ROOT/" &&
    echo "$pid"
}

up() {
  locate || { get; locate; }
  down
  trap down EXIT # unless all is well
  rm -rf "$ROOT"/{etc,run,log,state,spool,dev}
  configure
  echo "127.0.0.1 slurmctl ${NODES[*]} $MARK" >>/etc/hosts
  local run=$ROOT/run
  start slurmctl "$BASE/usr/sbin/munged" --key-file="$ROOT/etc/munge.key" \
    --socket="$run/munge.socket" --pid-file="$run/munged.pid" \
    --log-file="$ROOT/log/munged.log" --seed-file="$run/munged.seed"
  start slurmctl "$BASE/usr/sbin/slurmctld" -c -f "$SLURM_CONF"
  for node in "${NODES[@]}"; do
    start "$node" "$BASE/usr/sbin/slurmd" -N "$node" -f "$SLURM_CONF" -d "$BASE/usr/sbin/slurmstepd"
  done
  for _ in {1..300}; do
    [ "$(sinfo -h -N -p test -o %t 2>/dev/null | grep -cx idle)" = ${#NODES[@]} ] && { trap - EXIT; return; }
    sleep 0.1
  done
  grep -h error: "$ROOT"/log/*.log >&2 || true
  die "the nodes did not become idle"
}

down() {
  if pid_of "$ROOT/run/slurmctld.pid" >/dev/null; then
    squeue -h -o %A | sort -u | xargs -r scancel || true
    for _ in {1..100}; do [ -z "$(squeue -h)" ] && break; sleep 0.1; done
  fi
  for name in node1 node2 slurmctld munged; do
    local pid; pid=$(pid_of "$ROOT/run/$name.pid") || continue
    kill "$pid" || true
    for _ in {1..100}; do pid_of "$ROOT/run/$name.pid" >/dev/null || break; sleep 0.1; done
  done
  if grep -q "$MARK\$" /etc/hosts; then # in place: it may be a mount
    local rest; rest=$(grep -v "$MARK\$" /etc/hosts || true); printf '%s\n' "$rest" >/etc/hosts
  fi
}

case ${1:-} in
  up) up ;;
  down) locate && down ;;
  env)
    locate || die "not up"
    echo "export SLURM_CONF=$SLURM_CONF"
    [ -z "$BASE" ] || echo "export PATH=$BASE/usr/bin:\$PATH LD_LIBRARY_PATH=$LD_LIBRARY_PATH" ;;
  *) sed -n '2,7p' "$0"; exit 2 ;;
esac
