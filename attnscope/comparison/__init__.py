"""What members of runs did, side by side: one member's row, cells of a sweep, effects, intervals.

Reading order: member, statistics, subjects, learning_rates, cells.
"""
