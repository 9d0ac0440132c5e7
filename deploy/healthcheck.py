"""Exits with 0 when the service on this machine reports SERVING: the container's health check."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel("127.0.0.1:50051") as channel:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
    except grpc.RpcError as error:
        sys.exit(f"no answer: {error.code().name}")
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    sys.exit(0 if serving else "not serving")
