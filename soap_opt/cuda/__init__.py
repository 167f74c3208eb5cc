"""The step on CUDA: its tables, launches and refreshes, and the memory that these keep between steps."""
