"""The kernel sources of csrc, compiled by g++ and run on CPU tensors; include/simt.h says how."""
