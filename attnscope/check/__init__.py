"""Checks on a model in hand: what leaks, what is not repeatable, what masks and scales really do.

Reading order: result, padding, batch, output, undisturbed, case, sight, soft, facts, dropout, eager, attention; then a file per kind of check:
future, leaks, repeats, modes, masks, scale, shapes, dtypes; then model, factory.
"""
