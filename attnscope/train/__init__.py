"""Train the members of a config and record what happens inside them.

Reading order: run (a whole run), loop (one part), step (one step), optimizer, clipping, schedule; recording and alarms
turn what was seen into rows and events; evaluation looks at held-out data.
"""
