"""What every test gets."""

import torch

# The tests' networks are so small that sharing an operator between threads costs a hundred times the operator.
torch.set_num_threads(1)
