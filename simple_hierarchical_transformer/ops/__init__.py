"""Kernels that know nothing of the architecture: functions of tensors, and the modules that wrap them."""
