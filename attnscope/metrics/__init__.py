"""What is measured: tensors in, tensors out. Column names are those of the tables on disk (`attnscope.runs.layout`).

Reading order: attention, gradients, form, loss, activations.
"""
