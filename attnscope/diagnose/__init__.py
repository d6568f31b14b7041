"""What went wrong in a run, and which of it is a cause. Reading order: finding, rules, causes, symptoms, by_member."""

from attnscope.diagnose.finding import Evidence, Finding, to_table
from attnscope.diagnose.rules import RULES, diagnose

__all__ = ["RULES", "Evidence", "Finding", "diagnose", "to_table"]
