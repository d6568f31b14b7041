"""Watches attention and training in code that attnscope did not write, and changes nothing in it.

Reading order: patches, names, products, attention, capture, training, parameters, recording, attach, script.
"""
