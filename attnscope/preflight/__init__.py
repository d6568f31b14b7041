"""What a config or a model will do, before a step of it is trained.

Reading order: streams and theory (predicted), rehearsal (measured on a throw-away copy), wrapped (a member as a module, for the checks),
lab (a config), foreign (a model in hand); variance (the law that 1/√d_head comes from).
"""
