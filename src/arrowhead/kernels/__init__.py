"""Arrow attention, with a policy for each head, by several kernels that agree with one reference; `dispatch` chooses."""
