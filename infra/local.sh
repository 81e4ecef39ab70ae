#!/usr/bin/env bash
# A cluster on one machine without containers: an S3 server, MLflow with its artifacts there, two Ray nodes with a token.
#
#   infra/local.sh up          starts all that, waits until it answers, and prints the file to source
#   infra/local.sh down        ends it
#   infra/local.sh lose 2      kills node 2 (1 is the head) as a power cut would
#   infra/local.sh node 2      starts it (again)
#
# The S3 server is moto's, from the extra `dev`: it keeps objects in memory. State, logs, process ids and the token lie in
# $FSDINO_LOCAL (outputs/local). Ports: S3_PORT 9000, MLFLOW_PORT 5000, RAY_PORT 6379, DASHBOARD_PORT 8265.
# CPUs of the two nodes: HEAD_CPUS 2, NODE_CPUS 2. Dashboard, metrics and job submission are on 127.0.0.1 alone.
set -euo pipefail
cd "$(dirname "$0")/.."
state=${FSDINO_LOCAL:-outputs/local}
mkdir -p "$state"
state=$(cd "$state" && pwd)
s3=${S3_PORT:-9000} mlflow=${MLFLOW_PORT:-5000} ray=${RAY_PORT:-6379} dashboard=${DASHBOARD_PORT:-8265}
bin=${FSDINO_BIN:-$PWD/.venv/bin}
here=127.0.0.1

write_env() {
    (umask 077 && [ -s "$state/token" ] || "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' > "$state/token")
    chmod 600 "$state/token"
    cat > "$state/env" <<EOF
export AWS_ENDPOINT_URL=http://$here:$s3 AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local-secret AWS_DEFAULT_REGION=us-east-1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_USAGE_STATS_ENABLED=0
export RAY_ADDRESS=$here:$ray RAY_API_SERVER_ADDRESS=http://$here:$dashboard
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # it would start seven processes
# A killed node is noticed within seconds, not half a minute.
export RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3
export MLFLOW_SERVER=http://$here:$mlflow PATH=$bin:\$PATH
EOF
}

# start NAME COMMAND...: in a session of its own, so that `lose` and `down` end all of its processes and no others.
start() {
    local name=$1
    shift
    # shellcheck disable=SC1091
    (source "$state/env" && unset RAY_ADDRESS && exec setsid "$@") > "$state/$name.log" 2>&1 < /dev/null &
    echo $! > "$state/$name.pid"
}

# end NAME SIGNAL: Ray's processes leave the session's group, so the whole session is asked for.
end() {
    local pid
    [ -f "$state/$1.pid" ] || return 0
    pid=$(cat "$state/$1.pid")
    pkill "-$2" --session "$pid" 2> /dev/null || true
    rm -f "$state/$1.pid"
}

listens() { (exec 3<> "/dev/tcp/$here/$1") 2> /dev/null; }

await() {
    local name=$1 port=$2
    for _ in $(seq 600); do
        if listens "$port"; then return; fi
        if ! kill -0 "$(cat "$state/$name.pid")" 2> /dev/null; then break; fi
        sleep 0.2
    done
    echo "error: $name does not listen at port $port; see $state/$name.log" >&2
    exit 1
}

node() {
    if [ "$1" = 1 ]; then
        start node1 "$bin/ray" start --head --block --port="$ray" --num-cpus="${HEAD_CPUS:-2}" \
            --include-dashboard=true --dashboard-host="$here" --dashboard-port="$dashboard" --disable-usage-stats \
            --temp-dir="/tmp/fsdino-$ray" # short, as the sockets in it have at most 107 letters, and no other Ray's
        await node1 "$ray"
        await node1 "$dashboard"
    else
        # The agent's port of the first node is taken on this machine.
        start "node$1" "$bin/ray" start --block --address="$here:$ray" --num-cpus="${NODE_CPUS:-2}" \
            --dashboard-agent-listen-port=$((52365 + $1)) --disable-usage-stats
        for _ in $(seq 600); do
            if grep -q "runtime started" "$state/node$1.log"; then return; fi
            if ! kill -0 "$(cat "$state/node$1.pid")" 2> /dev/null; then break; fi
            sleep 0.2
        done
        echo "error: node $1 does not join; see $state/node$1.log" >&2
        exit 1
    fi
}

up() {
    for port in "$s3" "$mlflow" "$ray" "$dashboard"; do
        if listens "$port"; then
            echo "error: port $port is taken; set S3_PORT, MLFLOW_PORT, RAY_PORT or DASHBOARD_PORT" >&2
            exit 2
        fi
    done
    write_env
    start objects "$bin/python" -m moto.server -H "$here" -p "$s3"
    await objects "$s3"
    # shellcheck disable=SC1091
    (source "$state/env" && "$bin/python" -c 'import boto3; s = boto3.client("s3"); [s.create_bucket(Bucket=b) for b in ("data", "features", "runs", "mlflow")]')
    start mlflow "$bin/mlflow" server --host "$here" --port "$mlflow" --workers 1 \
        --backend-store-uri "sqlite:///$state/mlflow.db" --artifacts-destination s3://mlflow
    node 1
    node 2
    await mlflow "$mlflow"
    echo "$state/env"
}

down() {
    for file in "$state"/*.pid; do
        [ -e "$file" ] && end "$(basename "$file" .pid)" KILL
    done
    rm -rf "$state/token" "$state/mlflow.db" "/tmp/fsdino-$ray"
}

case "${1:-}" in
    up) up ;;
    down) down ;;
    lose) end "node${2:?which node}" KILL ;;
    node) node "${2:?which node}" ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
esac
