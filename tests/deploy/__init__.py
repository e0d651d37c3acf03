"""Files for systemd, Prometheus and Grafana, and the command that prints them."""
