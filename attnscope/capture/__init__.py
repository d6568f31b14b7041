"""Sees attention in code that attnscope did not write: what the scope and the checks look at a foreign model with.

Reading order: seen (a call, brought into one form); dispatch, dynamo, patches (how PyTorch is listened to); names (whose call
it is); fused, products, by_hand, flex, kernels, eager (attention that runs eagerly); graphs, sites, compiled (in compiled
graphs); imports; calls (all calls of one forward pass).
"""
