"""How often a diagnosis is right: training programs with a known fault in them, and what the rules say of each.

Reading order: recipe (a program as plain data), model, borrowed and loop (the program: plain PyTorch, which knows nothing of
attnscope), bases (those that train well) and lab (runs of the lab that do), fault and kinds (what is put into them, and what
would be right to say of it), population (which programs, and running them), traces (what each signal did in a run), answered (a
row per program: what was said, and the traces), lead (how long before the loss each signal knew), score (how the answers are
counted), goals, sections (what is told of it), publish (the files that are left behind).
"""
