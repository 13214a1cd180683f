"""The gRPC door: servicers, interceptor, status mapping, health, reflection. The rest of a call is in service."""
