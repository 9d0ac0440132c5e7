#!/usr/bin/env bash
# Runs Envoy and drains it before it ends: envoy/run.sh ENVOY [its arguments], with its admin port in ADMIN_PORT (9901).
#
# After SIGTERM, for DRAIN_DELAY seconds (5), `GET /health` answers 503 and every answer asks its caller to reconnect:
# time for load balancers to choose another Envoy. Then Envoy accepts no more connections, and running requests have
# DRAIN_SECONDS (30) to finish. A second signal ends it within a second.
#
# Two environment variables change the configuration of `-c`: COMPLETION_LONGEST_REQUEST_SECONDS, the service's setting,
# and METRICS_HOST, the address of Envoy's metrics port.
set -u

configuration() {
  sed -e "s/&longest_request 600s/\&longest_request ${COMPLETION_LONGEST_REQUEST_SECONDS:-600}s/" \
    -e "s/&metrics_host 127\.0\.0\.1/\&metrics_host ${METRICS_HOST:-127.0.0.1}/" "$1"
}

ask() {
  exec 3<> "/dev/tcp/127.0.0.1/${ADMIN_PORT:-9901}" || return
  printf '%s HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n' "$1" >&3
  cat <&3
  exec 3>&-
}

idle() {
  ask 'GET /stats?filter=^http.public.downstream_rq_active$' | grep -q 'downstream_rq_active: 0'
}

drain() {
  trap 'kill -TERM "$envoy"' TERM INT
  ask 'POST /healthcheck/fail' > /dev/null
  sleep "${DRAIN_DELAY:-5}"
  ask 'POST /drain_listeners' > /dev/null
  for ((second = 0; second < ${DRAIN_SECONDS:-30}; second++)); do
    if idle; then break; fi
    sleep 1
  done
  kill -TERM "$envoy"
}

command=()
while (($#)); do
  case $1 in
    -c) command+=(--config-yaml "$(configuration "$2")"); shift ;;
    *) command+=("$1") ;;
  esac
  shift
done

trap drain TERM INT
"${command[@]}" &
envoy=$!
# A signal interrupts `wait`; only the end of Envoy ends this loop.
while wait "$envoy"; code=$?; kill -0 "$envoy" 2> /dev/null; do :; done
exit "$code"
