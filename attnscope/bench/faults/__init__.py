"""How often a diagnosis is right: training programs with a known fault in them, and what the rules say of each.

Reading order: recipe (a program as plain data), model and loop (the program: plain PyTorch, which knows nothing of attnscope),
kinds (the faults, and what would be right to say of each), population (which programs, and running them), traces (what each signal
did in a run), answered (a row per program: what was said, and the traces), lead (how long before the loss each signal knew), score
(how the answers are counted), goals, sections (what is told of it), publish (the files that are left behind).
"""
