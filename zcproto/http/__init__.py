"""HTTP/1.1 for what is no call: health, metrics, a page for people, the control socket. No I/O, no clock."""
