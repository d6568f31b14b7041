"""Sees attention in code that attnscope did not write: what the scope and the checks look at a foreign model with.

Reading order: seen (a call, brought into one form), products, eager, kernels, compiled and sites (where calls are found);
dispatch and patches (how PyTorch is listened to), names (whose call it is), calls (all calls of one forward pass).
"""
