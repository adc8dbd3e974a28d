"""Operators: the selective scan for PyTorch, on CPU and CUDA."""
