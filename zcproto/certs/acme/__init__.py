"""Certificates of a public CA, ordered by ACME (RFC 8555).

Reading order: challenges, schedule, client, orders, source. Only client.py needs the extra `acme`, and is
imported by the thread that orders.
"""
