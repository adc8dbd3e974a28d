"""Checks that an artifact computes what the PyTorch reference computes."""
