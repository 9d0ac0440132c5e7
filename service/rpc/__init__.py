"""The gRPC side: the only package, with the server, that knows grpc and the generated messages."""
