"""Floor 6: gRPC servers, clients and the mapping of errors to status codes."""
