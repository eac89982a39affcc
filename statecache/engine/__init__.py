"""What knows both stores: the cache that callers use, the flusher, recovery, verify, and the embedded server."""
