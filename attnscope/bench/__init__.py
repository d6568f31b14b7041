"""What attnscope costs, measured against what people would run without it.

Reading order: overhead (recording; plain is the loop to compare with), sweeps (members together), reports (time and memory of
reading), timing (how).
"""
