"""The lab: what the kernels are made of and do, known without a GPU."""
