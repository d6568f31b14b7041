"""What attnscope costs, measured against what people would run without it.

Reading order: overhead (what is compared), plain (the loop to compare with), timing (how).
"""
