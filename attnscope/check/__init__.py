"""Checks on a model in hand: what leaks, what is not repeatable, what masks and scales really do.

Reading order: result, batch, output, undisturbed, case, sight, attention, future, leaks, repeats, masks, scale, model, factory.
"""
