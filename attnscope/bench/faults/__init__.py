"""How often a diagnosis is right: training programs with a known fault in them, and what the rules say of each.

Reading order: recipe (a program as plain data), model, borrowed and loop (the program: plain PyTorch, which knows nothing of
attnscope), bases (those that train well) and lab (runs of the lab that do), fault and kinds (what is put into them, and what
would be right to say of it), population (which programs, and running them), score (the answers).
"""
