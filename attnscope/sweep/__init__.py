"""Many members, many parts, one run directory.

Reading order: plan (members -> parts that fit), run (who trains which part, and what happens when one dies), workers and
on_ray (where parts are trained), standing (how a part is doing, from the run directory).
"""
