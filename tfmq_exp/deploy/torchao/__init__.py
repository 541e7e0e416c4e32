"""torchao: matrix products in int8, fp8 or int4 on a GPU."""
