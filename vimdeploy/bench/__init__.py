"""Latency, throughput, memory and energy of artifacts and of what they are compared with, on this host."""
