"""Watches attention and training in code that attnscope did not write, and changes nothing in it.

Reading order: patches, names, products, attention, capture, compiled (what is seen of attention); parameters, training (of
the step); recording, stopping, watcher (what becomes of it); attach, script, callbacks, trackers, calls (ways in and out).
"""
