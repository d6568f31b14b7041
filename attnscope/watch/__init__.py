"""Watches attention and training in code that attnscope did not write, and changes nothing in it.

Reading order: parameters, training, finite (what is seen of a step); layers, recording, stopping, watcher (what becomes of
it); attach, script, callbacks, trackers (ways in and out). Attention itself is seen by `attnscope.capture`.
"""
