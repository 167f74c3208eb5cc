"""The step on CUDA: tables, launches, refreshes, and what is kept of them between steps."""
