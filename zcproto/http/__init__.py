"""HTTP/1.1 for health checks, metrics, the status page and the control socket (sans-IO)."""
